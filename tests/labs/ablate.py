"""
Lab 12: one thing changed in stage 1, over three seeds, judged on the same held-out rows, compared
row by row.

    python tests/labs/ablate.py scale_std                 # after tests/toy_world.py, stage0_sft.py
    python tests/labs/ablate.py kl --steps 20 --seeds 0 1 2 3 4
    python tests/labs/ablate.py mine --flags --clip_high 0.28

Every run starts from the same stage 0; a seed is one of data order and sampling. What is finished
already is not run again.
"""

import argparse
from pathlib import Path

import diagnosis  # noqa: F401  (puts the repository on the path)
from curriculum import ROOT, lines, run

import eval as evaluation
from data import read_benchmark

CLAIMS = {  # name: what is claimed, and the flags of the run without it
    "scale_std": ("dividing advantages by the std helps (the paper's script does not divide)",
                  ["--scale_std", "False"]),
    "kl": ("the KL to the start helps (the paper's script has none)", ["--beta", "0"]),
    "group_size": ("8 answers to 24 prompts teach more than 2 answers to 96",
                   ["--group_size", "2", "--batch_size", "96", "--micro_batch", "24"]),
    "warm_start": ("stage 0 is needed before stage 1", ["--model", "toy/backbone"]),
    "mine": ("yours, by --flags", []),
}


def finished(name, flags, seed, args):
    """Train and judge, unless it is done. -> scored rows, and the mean reward of the training"""
    out = Path(args.out, f"{name}_{args.steps}_{seed}")
    if not (ROOT / out / "stage.json").exists():
        run("stage1_text_grpo.py", "--model", args.model, "--max_steps", args.steps, "--seed", seed,
            "--heldout", "", "--out", out, *flags)
    predictions = out / "predictions.jsonl"
    run("eval.py", "--model", out, "--data", args.data, "--out", predictions)
    rows = read_benchmark("rows", str(ROOT / args.data))
    scored = evaluation.scored_rows(rows, evaluation.read_predictions(ROOT / predictions, rows))
    steps = lines(ROOT / out / "metrics.jsonl")
    return scored, sum(step["reward"] for step in steps) / len(steps)


def accuracy(scored):
    return 100 * evaluation.mean(scored)


def difference(with_it, without):
    """-> the paired comparison as text, per cent, and its interval"""
    result = evaluation.compare(with_it, without)
    low, high = [100 * end for end in result["interval"]]
    text = f"{100 * result['difference']:+.1f} [{low:+.1f}, {high:+.1f}]"
    return f"{text} | {result['sign_test_p']:.2g}", (low, high)


def average_rows(runs):
    """The scored rows of several seeds -> the same rows, each with its mean points: one row is one
    question, however often it was asked."""
    rows = []
    for same in zip(*runs, strict=True):
        points = sum(row["points"] for row in same) / len(same)
        rows.append({**same[0], "points": points})
    return rows


def verdict(differences, interval):
    """What may be said. The rule stands before the run: the claim shows if every seed has the same
    sign, and 0 is outside the interval of all seeds together."""
    low, high = interval
    one_sign = all(d > 0 for d in differences) or all(d < 0 for d in differences)
    if one_sign and (low > 0 or high < 0):
        return f"It shows: {'with' if low > 0 else 'without'} it is better, in every seed."
    return (f"It does not show. These rows could have shown about {(high - low) / 2:.1f} points; "
            "this is no proof of equality.")


def main():
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("claim", choices=CLAIMS)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--model", default="runs/stage0_sft", help="where every run starts")
    parser.add_argument("--data", default="toy/heldout_text.jsonl")
    parser.add_argument("--out", default="runs/ablate", help="folder of the runs")
    parser.add_argument("--flags", nargs=argparse.REMAINDER, default=[],
                        help="of the run without it, for the claim 'mine'; last")
    args = parser.parse_args()
    claim, flags = CLAIMS[args.claim]
    name = args.claim
    if name == "mine":
        if not args.flags:
            parser.error("mine needs --flags")
        flags = args.flags
        name = "mine" + "".join(flags).replace("--", "_").replace("/", "_")
    table, with_it, without, differences = [], [], [], []
    for seed in args.seeds:
        scored, reward = finished("default", [], seed, args)
        other, other_reward = finished(name, flags, seed, args)
        with_it.append(scored)
        without.append(other)
        differences.append(accuracy(scored) - accuracy(other))
        table.append(f"| {seed} | {accuracy(scored):.1f} | {accuracy(other):.1f} | "
                     f"{difference(scored, other)[0]} | {reward:.3f} | {other_reward:.3f} |")
    text, interval = difference(average_rows(with_it), average_rows(without))
    print(f"\nClaim: {claim}. Without it: {' '.join(flags)}; {args.steps} steps, {args.data}\n\n"
          "| seed | with | without | with - without, 95 % | p | reward, with | without |\n"
          "|---|--:|--:|--:|--:|--:|--:|\n" + "\n".join(table)
          + f"\n| all | | | {text} | | |\n\n" + verdict(differences, interval))


if __name__ == "__main__":
    main()
