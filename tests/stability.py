"""
R1-Reward's Table 6 and Figure 5 in miniature: REINFORCE++ without and with StableReinforce's two
parts, where the paper says that they matter: many updates a rollout, no limit to the gradient, most
answers right. Slow, so not part of the tests; what is finished is not run again.

    python tests/stability.py           # after tests/curriculum.py --seeds 0 1 2, from its stage 1
    python tests/stability.py --rates 3e-4 --passes 16 --steps 2   # 64 optimiser steps a rollout

Settings, fixed before the first run: from the judge after stage 1, advantages over the batch,
beta 0, --reward r1. Sampling at temperature 1.2 makes four rewards of two (2 right, 1.5 right by
reasoning that concludes nothing, 0.5 wrong, 0 no format) and 5 to 13 % of the answers worse than
1.5. Four rollouts of 24 prompts x 8 answers, each used 4 times in mini-batches of 6 prompts: 16
optimiser steps a rollout, `old` from the sampler, gradient norms clipped at 1e9. Rates 1e-4, 3e-4
and 1e-3, seeds 0, 1, 2; at the end 400 held-out texts, both orders, greedy.

Where A < 0 the clip of PPO does not bound the loss: min(r*A, clip(r)*A) is r*A, however large r.
So the tokens with r > 1e3 and A < 0 are counted, over all optimiser steps and tokens in the loss.
"""

import argparse
import json
import math
import shutil
import sys
import time
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import torch
from curriculum import ROOT, lines

import common
import stage1_text_grpo as stage1
from data import load_rows

METHODS = {"REINFORCE++": ["--pre_clip", 0, "--sigma", 0],
           "+ pre-clip": ["--pre_clip", 1e3, "--sigma", 0],
           "+ advantage filter": ["--pre_clip", 0, "--sigma", 3],
           "StableReinforce (both)": ["--pre_clip", 1e3, "--sigma", 3]}
REGIME = ["--advantage", "batch", "--beta", 0, "--reward", "r1", "--temperature", 1.2,
          "--mini_batch", 6, "--max_grad_norm", 1e9, "--heldout", "", "--log_rollouts_every", 1]
ANSWER_TOKENS = 112  # the stages' own limit
LIMIT = math.log(1e3)
grpo_loss, optimizer_step = stage1.grpo_loss, common.optimizer_step


def watch(seen):
    """Let stage 1 tell what passes through its loss and its optimiser steps -> into `seen`."""
    def watched_loss(logp, old, ref, advantage, weight, *settings):
        used = weight > 0  # no padding, and no answer that the filter leaves out
        log_ratio = (logp - old).detach()[used]
        negative = log_ratio[advantage[used] < 0]
        seen["tokens"] += used.sum().item()
        seen["outside"] += (log_ratio.abs() > LIMIT).sum().item()
        seen["unbounded"] += (negative > LIMIT).sum().item()
        if len(log_ratio):
            seen["log_ratio"] = max(seen["log_ratio"], log_ratio.max().item())
        if len(negative):
            seen["log_ratio, A < 0"] = max(seen["log_ratio, A < 0"], negative.max().item())
        loss, stats = grpo_loss(logp, old, ref, advantage, weight, *settings)
        seen["losses"].append(loss.item())
        return loss, stats

    def watched_step(*args):
        seen["norms"].append(optimizer_step(*args))
        return seen["norms"][-1]
    stage1.grpo_loss, common.optimizer_step = watched_loss, watched_step


def heldout(folder, rows):
    model, encoder = common.load(str(folder))
    data = load_rows(f"{ROOT}/toy/heldout_text.jsonl:{rows}", encoder, "pixels", quiet=True)
    settings = SimpleNamespace(eval_batch=128, max_new_tokens=ANSWER_TOKENS)
    return common.evaluate(model, encoder, data, settings, folder.name, "pixels",
                           stage1.sample_group)


def train(start, out, seed, rate, flags, args):
    """One run in this process, unless it is there. -> what was seen of it"""
    kept = out / "seen.json"
    if not kept.exists():
        shutil.rmtree(out, ignore_errors=True)  # half a run: what was seen of it is lost
        began = time.time()
        seen = Counter(losses=[], norms=[], ended="")
        watch(seen)
        sys.argv = ["stage1_text_grpo.py", *map(str, [
            "--model", start, "--out", out, "--seed", seed, "--lr", rate,
            "--max_steps", args.steps, "--updates_per_rollout", args.passes,
            "--data", f"{ROOT}/toy/text_rl.jsonl:400", "--max_new_tokens", ANSWER_TOKENS,
            *REGIME, *flags])]
        print("$ python " + " ".join(sys.argv), flush=True)
        try:
            stage1.main()
            seen["heldout"] = heldout(out, args.rows)
        except SystemExit as stopped:  # three gradients in a row that are no number
            if isinstance(stopped.code, int):  # no: SIGTERM
                raise
            seen["ended"] = str(stopped)
        seen["minutes"] = (time.time() - began) / 60
        kept.write_text(json.dumps(seen))
    sampled = []  # log-probs of one prompt's answers in each rollout
    for group in lines(out / "rollouts.jsonl"):
        sampled += [min(answer) for answer in group["logp_sampled"]]
    return {**json.loads(kept.read_text()), "steps": lines(out / "metrics.jsonl"),
            "rarest": min(sampled)}


def spread(values, form=".2f"):
    """Mean (lowest to highest)"""
    low, mean, high = (f"{v:{form}}" for v in (min(values), sum(values) / len(values), max(values)))
    return f"{mean} ({low} to {high})"


def outcome(runs):
    """Cells of the first table."""
    rewards = [[step["reward"] for step in run["steps"]] for run in runs]
    ends = [run.get("heldout", {"accuracy": 0.0, "format": 0.0}) for run in runs]
    return [spread([min(r[1:]) for r in rewards]), spread([r[-1] for r in rewards]),
            spread([100 * e["accuracy"] for e in ends], ".1f"),
            " ".join(f"{100 * e['accuracy']:.1f}" for e in ends),
            spread([100 * e["format"] for e in ends], ".0f"),
            spread([run["steps"][-1]["completions/mean_length"] for run in runs], ".0f"),
            str(sum(run["ended"] != "" for run in runs))]


def mechanism(runs):
    """Cells of the second table. Norms that are no number are counted as skipped steps."""
    filtered = [step["filter_ratio"] for run in runs for step in run["steps"]]
    norms = [norm for run in runs for norm in run["norms"]]
    finite = [norm for norm in norms if math.isfinite(norm)]
    negative = [run.get("log_ratio, A < 0", 0.0) for run in runs]  # all of them left out: none
    losses = [abs(loss) for run in runs for loss in run["losses"]]
    return [spread([100 * f for f in filtered], ".1f"),
            spread([100 * run["outside"] / run["tokens"] for run in runs], ".3f"),
            spread([100 * run["unbounded"] / run["tokens"] for run in runs], ".4f"),
            f"{max(run['log_ratio'] for run in runs):.1f}",
            f"{max(negative):.1f}",
            f"{min(run['rarest'] for run in runs):.1f}",
            f"{max(losses):.3g}", f"{max(finite):.3g}", str(len(norms) - len(finite))]


def cliff():
    """Which of 192 answers the filter leaves out, exactly: `right` ones of reward 2, others 0.5 or
    0. With two rewards z of the wrong ones is -sqrt(right / wrong): all or none go, at 10 %."""
    print("\n| reward 2 | 0.5 | 0 | z of 0.5 | z of 0 | left out |\n|--:|--:|--:|--:|--:|--:|")
    for wrong, malformed in [(1, 0), (19, 0), (20, 0), (40, 0), (10, 4), (20, 4), (40, 4), (0, 1)]:
        rewards = torch.full((24, 8), 2.0, dtype=torch.float64)
        rewards.view(-1)[:wrong + malformed] = 0.5
        rewards.view(-1)[:malformed] = 0.0
        z, keep = stage1.advantages(rewards, rewards, "batch", True, 3.0)
        cells = []
        for value in (0.5, 0.0):
            chosen = z[rewards == value]
            cells.append(f"{chosen[0]:.3f}" if len(chosen) else "-")
        print(f"| {192 - wrong - malformed} | {wrong} | {malformed} | {' | '.join(cells)} | "
              f"{(~keep).sum()} |")


def main():
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="runs/seed{seed}/0-1", help="a good judge for each seed")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--rates", type=float, nargs="+", default=[1e-4, 3e-4, 1e-3])
    parser.add_argument("--steps", type=int, default=4, help="rollouts, 2 or more")
    parser.add_argument("--passes", type=int, default=4, help="over each rollout, of 4 steps each")
    parser.add_argument("--rows", type=int, default=400, help="held-out texts")
    parser.add_argument("--out", default="runs/stability")
    args = parser.parse_args()
    cliff()
    outcomes, mechanisms = [], []
    for rate in args.rates:
        runs = {method: [] for method in METHODS}
        for seed in args.seeds:  # all methods of a seed together, should time run out
            for method, flags in METHODS.items():
                start = ROOT / args.model.format(seed=seed)
                name = [args.steps, args.passes, args.rows, rate, seed, *flags]
                out = ROOT / Path(args.out, "_".join(map(str, name)))
                runs[method].append(train(start, out, seed, rate, flags, args))
        for method, of_seeds in runs.items():
            first = f"| {rate:g} | {method} | "
            outcomes.append(first + " | ".join(outcome(of_seeds)) + " |")
            mechanisms.append(first + " | ".join(mechanism(of_seeds)) + " |")
            minutes = sum(run["minutes"] for run in of_seeds)
            print(f"{rate:g} {method}: {minutes:.1f} min", flush=True)
    print("\n| rate | method | lowest reward after the first rollout | last reward | held-out, % | "
          "by seed | well-formed, % | tokens an answer | stopped |\n|" + "--:|" * 9)
    print("\n".join(outcomes))
    print("\n| rate | method | left out, % | r outside 1e-3 to 1e3, % of tokens | r > 1e3 and "
          "A < 0, % | largest log r | with A < 0 | log p of the rarest token sampled | "
          "largest loss | largest gradient | skipped steps |\n|" + "--:|" * 11)
    print("\n".join(mechanisms))


if __name__ == "__main__":
    main()
