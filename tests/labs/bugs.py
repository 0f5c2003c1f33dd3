"""
Lab 11: twelve silent bugs of real trainers. Each is a line of today's scripts written otherwise;
training still runs, and its log shows it to those who look. Who had them: solutions.md.

    python tests/labs/lab.py plant 3                        # writes my_labs/bug_3/
    python tests/labs/lab.py compare runs/healthy runs/bug_3
    python tests/labs/lab.py guess 3 top-p
"""

import json
import math
import random
from dataclasses import dataclass
from pathlib import Path

from lab import STAGE_1, definitions, replaced, text_of


@dataclass
class Bug:
    name: str
    file: str
    function: str   # the change is in this one
    old: str        # stands in it exactly once
    new: str
    figure: str     # of figures(): where it shows
    when: str       # a key of WHEN: in which step
    times: float    # above 1: at least so many times the healthy figure, else at most


WHEN = {"first": lambda values: values[0], "last": lambda values: values[-1], "least": min,
        "most": max, "mean": lambda values: sum(values) / len(values)}
GAP = "sampling/sampling_logp_difference/mean"
RAREST = "probability of the rarest token"
UNFAIR = "difference of advantages at equal rewards"


BUGS = [
    # sampled at the temperature, trained without it
    Bug("temperature", STAGE_1, "token_logps",
        "scored_logits(logits, encoder, temperature)", "scored_logits(logits, encoder, 1)",
        GAP, "first", 1e3),
    # the weights that sample are never renewed
    Bug("stale-sampler", STAGE_1, "main",
        "roll_out(model, encoder", "roll_out(ref or model, encoder",
        GAP, "last", 1e3),
    # the checkpoint's generation_config has top_p 0.8
    Bug("top-p", STAGE_1, "draw",
        "    cumulative = logp.double().exp().cumsum(-1)",
        "    p, words = logp.double().exp().sort(-1, descending=True)\n"
        "    p = p.masked_fill(p.cumsum(-1) - p > 0.8, 0.0)\n"
        "    cumulative = torch.zeros_like(p).scatter(-1, words, p).cumsum(-1)",
        RAREST, "least", 3),
    # equal seeds for all answers of a group
    Bug("same-dice", STAGE_1, "draw",
        "torch.rand(*logp.shape[:-1], 1,", "torch.rand(len(logp), 1, 1,",
        "reward_std", "mean", 0.01),
    # padding is the end-of-sequence token, and the mask is "not padding"
    Bug("no-eos", STAGE_1, "sample_group",
        "(tokens >= 0).sum(2)", "((tokens >= 0) & ~torch.isin(tokens, eos)).sum(2)",
        "completions/clipped_ratio", "mean", 1e3),
    # rewards come as [G, B] and are read as [B, G]
    Bug("mixed-groups", STAGE_1, "main",
        "advantages(rewards, every_reward",
        "advantages(rewards.mT.reshape(rewards.shape), every_reward",
        UNFAIR, "most", 1e3),
    # the mean over each micro-batch, and these means added up
    Bug("micro-mean", STAGE_1, "grpo_update",
        "per_token(weight[part], owner)",
        "per_token(weight[part] / (weight[part] * lengths[part]).sum(), owner)",
        "grad_norm", "first", 1.5),
    # gradients of all steps add up
    Bug("no-zero-grad", "common.py", "optimizer_step",
        "    optimizer.zero_grad(set_to_none=True)\n", "",
        "grad_norm", "last", 1.5),
    # the reference is no copy
    Bug("moving-reference", STAGE_1, "main",
        "common.reference(model)", "model",
        "kl", "last", 0.5),
    # weights in bf16, without a master copy: small steps are rounded away
    Bug("bf16-weights", "common.py", "optimizer_step",
        "        optimizer.step()\n",
        "        optimizer.step()\n        for parameter in parameters:\n"
        "            parameter.data = parameter.data.bfloat16().float()\n",
        "kl", "last", 0.5),
    # old log-probs are those of the policy that is being trained, in every pass
    Bug("fresh-old", STAGE_1, "grpo_update",
        "old[first] = token_values(sampled[part], owner)", "old[first] = logp.detach()",
        "clip_ratio/high_mean", "mean", 0.01),
    # the sides are exchanged, the label is not
    Bug("lost-label", "common.py", "batch_of",
        "row = swap(row)", 'row = {**swap(row), "label": row["label"]}',
        "rewards/accuracy/mean", "mean", 0.8),
]


def numbered(seed=0):
    """-> the bugs in the order of their numbers, from 1 on, in which nothing can be read. The seed
    is for grading."""
    return random.Random(f"bugs {seed}").sample(BUGS, len(BUGS))


def planted(source, bug):
    """The source of bug.file with the bug in it. Raises SystemExit where the line is gone."""
    text = text_of(source, bug.function) if bug.function in definitions(source) else ""
    if text.count(bug.old) != 1:
        raise SystemExit(f"{bug.file}: the bug {bug.name!r} changes a line of {bug.function}() "
                         f"that stands there {text.count(bug.old)} times; mend it in "
                         "tests/labs/bugs.py")
    return replaced(source, {bug.function: text.replace(bug.old, bug.new)})


# ------------------------------------------------------------------------------ what a log shows
def lines(path):
    return [json.loads(line) for line in path.read_text("utf-8").splitlines()]


def figures(folder):
    """A run folder -> {figure: a value for each step}: those of metrics.jsonl, and two of the
    groups in rollouts.jsonl."""
    for name in ("metrics.jsonl", "rollouts.jsonl"):
        if not Path(folder, name).exists():
            raise SystemExit(f"{folder} has no {name}: it is no run of a GRPO stage")
    steps, found = lines(Path(folder, "metrics.jsonl")), {}
    for name in steps[0]:
        if all(name in step for step in steps):
            found[name] = [step[name] for step in steps]
    for group in lines(Path(folder, "rollouts.jsonl")):
        rarest = min(min(answer) for answer in group["logp_sampled"])
        found.setdefault(RAREST, []).append(math.exp(rarest))
        found.setdefault(UNFAIR, []).append(unfairness(group))
    return found


def unfairness(group):
    """The largest difference of two advantages in a group whose answers earned the same."""
    by_reward = {}
    for reward, advantage in zip(group["reward"], group["advantages"], strict=True):
        by_reward.setdefault(reward, []).append(advantage)
    return max(max(same) - min(same) for same in by_reward.values())


def trace(bug, healthy, sick):
    """Two runs' figures() -> the bug's figure in the healthy and in the other run, and whether they
    differ as the bug's bound says."""
    before, after = (WHEN[bug.when](found[bug.figure]) for found in (healthy, sick))
    bound = bug.times * max(before, 1e-9)
    return before, after, after >= bound if bug.times > 1 else after <= bound
