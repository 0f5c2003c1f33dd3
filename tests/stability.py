"""
R1-Reward's Table 6 and Figure 5 in miniature: text RL with several updates per rollout and
advantages standardised over the batch, without and with StableReinforce's two parts. Slow, so not
part of the tests.

    python tests/stability.py        # after tests/curriculum.py --seeds 0 1 2, from its stage 1

From a judge that is already good: among 192 answers a handful are wrong, their advantages are far
below -3, and these few answers steer the update. That is R1-Reward's case of 255 ones and one zero.
Gradients and shares are those of the last update of each rollout.
"""

import argparse
import json
from pathlib import Path

from curriculum import ROOT, lines, run

METHODS = {"REINFORCE++": ["--pre_clip", 0, "--sigma", 0],
           "+ pre-clip": ["--pre_clip", 1e3, "--sigma", 0],
           "+ advantage filter": ["--pre_clip", 0, "--sigma", 3],
           "StableReinforce (both)": ["--pre_clip", 1e3, "--sigma", 3]}


def main():
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="runs/seed{seed}/0-1", help="a good judge for each seed")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--updates", type=int, default=4, help="optimiser steps per rollout")
    parser.add_argument("--steps", type=int, default=5, help="rollouts")
    parser.add_argument("--heldout", default="toy/heldout_text.jsonl:100")
    parser.add_argument("--out", default="runs/stability")
    args = parser.parse_args()
    table = []
    for method, flags in METHODS.items():
        for seed in args.seeds:
            name = [args.steps, args.updates, args.lr, *flags, seed]
            out = Path(args.out, "_".join(map(str, name)))
            if not (ROOT / out / "stage.json").exists():
                run("stage1_text_grpo.py", "--model", args.model.format(seed=seed), "--out", out,
                    "--seed", seed, "--advantage", "batch", "--lr", args.lr, *flags, "--beta", 0,
                    "--updates_per_rollout", args.updates, "--max_steps", args.steps,
                    "--heldout", args.heldout, "--eval_every", 0, check=False)
            steps = lines(ROOT / out / "metrics.jsonl")
            after = "stopped"  # a stage stops at a gradient that is not finite
            if (ROOT / out / "stage.json").exists():
                heldout = json.loads((ROOT / out / "stage.json").read_text())["heldout"]
                after = " -> ".join(f"{100 * heldout[x]['accuracy']:.0f}" for x in heldout)
            table.append(f"| {method} | {seed} | " + " ".join(f"{s['reward']:.2f}" for s in steps)
                         + f" | {after} | {max(s['grad_norm'] for s in steps):.2g} | "
                         f"{max(s['filter_ratio'] for s in steps):.1%} | "
                         f"{max(s['pre_clip_ratio'] for s in steps):.1%} |")
    print("\n| | seed | reward, step by step | held-out | largest gradient | filtered | clipped |\n"
          "|---|--:|---|--:|--:|--:|--:|\n" + "\n".join(table))


if __name__ == "__main__":
    main()
