"""
What `eval.py --rank` buys on the toy world: does the best of 8 hold the right answer, and how far
does a cheap schedule agree with the full one? Minutes, so not part of the tests.

    python tests/ranking.py --model runs/stage1_text_grpo

Each set asks a held-out text question; one of its 8 candidates is right, any may be flourished, so
picking one at random is right 1 time in 8.
"""

import argparse
import random
import subprocess
import sys
from itertools import combinations
from pathlib import Path

import toy_world
from toy_world import COLOURS, ROOT, SHAPES

import common
from eval import bradley_terry, schedule, shares_of, win_rates


def candidate_set(rng, i, n=8):
    """-> {"id", "prompt", "candidates", "right": index of the right one}"""
    row = {}
    while "facts" not in row:  # not the rows that ask for the whole description
        row = toy_world.make_row(rng, "text", True)
    right = row["facts"]["value"]
    values = next(v for v in (COLOURS, SHAPES, [f"{c} {s}" for c in COLOURS for s in SHAPES])
                  if right in v)
    flourishes = [None, *toy_world.FLOURISHES]
    wrong = rng.sample([(v, f) for v in values if v != right for f in flourishes], n - 1)
    answers = [(right, rng.choice(flourishes)), *wrong]
    order = rng.sample(range(n), n)
    return {"id": f"set-{i}", "prompt": row["prompt"], "right": order.index(0),
            "candidates": [toy_world.respond(f"it is {value}", flourish)
                           for value, flourish in (answers[k] for k in order)]}


def alike(a, b):
    """Share of the pairs that both rewards order the same way; even in either: half."""
    signs = [((a[i] - a[j]) * (b[i] - b[j])) for i, j in combinations(range(len(a)), 2)]
    return sum((s > 0) + 0.5 * (s == 0) for s in signs) / len(signs)


def main():
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="runs/stage1_text_grpo")
    parser.add_argument("--sets", type=int, default=100)
    parser.add_argument("--rounds", type=int, nargs="+", default=[1, 2, 3, 5, 7])
    parser.add_argument("--draws", type=int, default=5, help="schedules drawn, for the mean")
    parser.add_argument("--out", default="runs/ranking", help="one folder per model, written here")
    args = parser.parse_args()
    out = Path(args.out, args.model.strip("./").replace("/", "-"))
    out.mkdir(parents=True, exist_ok=True)
    rng = random.Random(5)
    sets = [candidate_set(rng, i) for i in range(args.sets)]
    common.write_lines(out / "candidates.jsonl", sets)
    subprocess.run([sys.executable, ROOT / "eval.py", "--model", args.model, "--rank",
                    out / "candidates.jsonl", "--out", out / "full.jsonl"], check=True)
    full = [r["rewards"] for r in common.whole_lines(out / "full.jsonl")]
    # greedy verdicts do not change, so those of a cheap schedule are among those of the full one
    shares = shares_of(common.whole_lines(out / "full.judged.jsonl"))
    print("\n| judgements per set | fit | best of 8 right, % | same best as full, % | "
          "pairs ordered as by full, % |\n|--:|---|--:|--:|--:|")
    for rounds in args.rounds:
        for fit in (win_rates, bradley_terry):
            totals, n = [0, 0, 0], args.draws * len(sets)
            for k, s in list(enumerate(sets)) * args.draws:
                pairs = schedule(8, rounds, rng)
                rewards = fit(8, [(*p, shares[k, *p]) for p in pairs])[0]
                best = rewards.index(max(rewards))
                totals[0] += best == s["right"]
                totals[1] += best == full[k].index(max(full[k]))
                totals[2] += alike(rewards, full[k])
            print(f"| {2 * len(pairs)} | {fit.__name__} | "
                  + " | ".join(f"{100 * t / n:.1f}" for t in totals) + " |", flush=True)
    print(f"\none at random: {100 / 8:.1f} % right")


if __name__ == "__main__":
    main()
