"""
What `eval.py --rank` buys on the toy world: does the best of 8 hold the right answer, and how far
does a cheap schedule agree with the full one? Minutes, so not part of the tests.

    python tests/ranking.py --model runs/stage1_text_grpo

Each set asks a held-out text question; one of its 8 candidates is right, any may be flourished, so
picking one at random is right 1 time in 8.
"""

import argparse
import json
import random
import subprocess
import sys
from itertools import combinations
from pathlib import Path

import toy_world
from toy_world import COLOURS, ROOT, SHAPES


def candidate_set(rng, i, n=8):
    """-> {"id", "prompt", "candidates", "right": index of the right one}"""
    row = toy_world.make_row(rng, "text", True)
    right = row["facts"]["value"]
    values = next(v for v in (COLOURS, SHAPES, [f"{c} {s}" for c in COLOURS for s in SHAPES])
                  if right in v)
    flourishes = [None, *toy_world.FLOURISHES]
    wrong = rng.sample([(v, f) for v in values if v != right for f in flourishes], n - 1)
    answers = [(right, rng.choice(flourishes)), *wrong]
    order = rng.sample(range(n), n)
    return {"id": f"set-{i}", "prompt": row["prompt"], "right": order.index(0),
            "candidates": [toy_world.respond(*answers[k]) for k in order]}


def alike(a, b):
    """Share of the pairs that both rewards order the same way; one that either leaves even: half."""
    signs = [((a[i] - a[j]) * (b[i] - b[j])) for i, j in combinations(range(len(a)), 2)]
    return sum((s > 0) + 0.5 * (s == 0) for s in signs) / len(signs)


def main():
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="runs/stage1_text_grpo")
    parser.add_argument("--sets", type=int, default=100)
    parser.add_argument("--rounds", type=int, nargs="+", default=[7, 1, 2, 3, 5])
    parser.add_argument("--out", default="runs/ranking", help="folder of what is written")
    args = parser.parse_args()
    out = Path(args.out)
    out.mkdir(parents=True, exist_ok=True)
    rng = random.Random(5)
    sets = [candidate_set(rng, i) for i in range(args.sets)]
    (out / "candidates.jsonl").write_text("".join(json.dumps(s) + "\n" for s in sets))
    print("| judgements a set | fitted by | best of 8 right, % | same best as full, % | pairs "
          "ordered as by full, % |\n|--:|---|--:|--:|--:|")
    full = None
    for rounds in args.rounds:  # 7: the full round robin
        for fit in ("win_rate", "bradley_terry"):
            file = out / f"{rounds}-{fit}.jsonl"
            for name in ("judged.jsonl", "judged.settings.json"):  # both fits share the judgements
                if (old := out / f"{rounds}-win_rate.{name}").exists():
                    (out / f"{rounds}-{fit}.{name}").write_bytes(old.read_bytes())
            subprocess.run([sys.executable, ROOT / "eval.py", "--model", args.model, "--rank",
                            out / "candidates.jsonl", "--rounds", str(rounds), "--aggregate", fit,
                            "--batch_size", "256", "--out", file], check=True,
                           stdout=subprocess.DEVNULL)
            lines = [json.loads(line) for line in file.read_text().splitlines()]
            full = full or lines
            right = sum(s["right"] == r["best"] for s, r in zip(sets, lines))
            best = sum(f["best"] == r["best"] for f, r in zip(full, lines))
            pairs = sum(alike(f["rewards"], r["rewards"]) for f, r in zip(full, lines))
            print(f"| {lines[0]['judgements']} | {fit} | " + " | ".join(
                f"{100 * x / len(sets):.1f}" for x in (right, best, pairs)) + " |", flush=True)
    print(f"\none at random: {100 / 8:.1f} % right")


if __name__ == "__main__":
    main()
