"""
Stage 1: GRPO on text preferences (MSRL 4.1, Eq. 3-4), with StableReinforce's pre-clip and advantage
filter (R1-Reward 4.1). Vision tower and projector stay frozen.

    python stage1_text_grpo.py                                   # toy world, from runs/stage0_sft
    torchrun --nproc_per_node=8 stage1_text_grpo.py --preset paper

One step, for B prompts with G answers each:

    sample    G answers per prompt; the prompt is run once, its cache is shared      sample_group
    reward    format + accuracy, from stage 2 on + task                  Eq. 4       score_answers
    advantage (r - mean of the group) / std of the group                 [GRPO]      advantages
    log-probs [prompt | answer 1 | ... | answer G] as one sequence                   packed_logps
    loss      PPO clip on the pre-clipped ratio + beta * KL to the start Eq. 3       grpo_loss

The file goes from the equations over the loop to sampling, packing and scoring of tokens.

Shapes: B prompts, G answers each, N = B*G, T tokens, P prompt length, C answer length, V
vocabulary, S = the lengths of one prompt's G answers added up; `b` is B within a micro-batch.
"""

import math
import time
from collections import Counter
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

import torch
from torch.utils.checkpoint import checkpoint

import common
import decoding
import sharding
from common import knob, sum_over_ranks
from data import hard_rows, load_rows

HELDOUT = "toy/heldout_text.jsonl"
STAGE = Path(__file__).stem
FORM = "pixels"  # how rows with media are shown; text rows have none
REWARDS = {"format": common.format_reward,
           "accuracy": common.accuracy_reward}
# Weights of the rewards. task_reward is 0 or 0.2, and counts from stage 2 on.
SCHEMES = {"paper": {"format": 1.0, "accuracy": 1.0, "task": 1.0},   # Eq. 4; MSRL 4.2
           "script": {"format": 0.2, "accuracy": 1.0, "task": 0.2},  # the released train_*_grpo.sh
           # R1-Reward 4.3: 0.5 * format + accuracy * (1 + 0.5 * consistency)
           "r1": {"format": 0.5, "accuracy": 1.0, "consistency": 0.5}}


@dataclass
class Config:
    # the first five to turn
    lr: float = knob(4e-5, "AdamW, constant (UNSPECIFIED; paper: 1e-6)")
    beta: float = knob(0.04, "weight of the KL to the starting model; 0 loads no reference. Paper: "
                       "framework default 0.04; its script: 0")
    group_size: int = knob(8, "G, answers per prompt (paper: 8; R1-Reward: 1, with --advantage "
                           "batch)")
    batch_size: int = knob(24, "prompts per rollout, over all processes. Paper: 'batch size of "
                           "128'; its script counts answers: 16 prompts x 8")
    max_steps: int = knob(60, "rollouts; each is followed by updates_per_rollout passes over it")

    # data
    model: str = knob("runs/stage0_sft", "checkpoint to start from; also the KL reference")
    data: str = knob("toy/text_rl.jsonl", "preference rows, GRAM-RR-TrainingData or RM-Bench; "
                     "several, separated by commas. Paper: 400k rows of GRAM-RR-TrainingData")
    heldout: str = knob(HELDOUT, "rows judged before and after; '' for none")
    out: str = knob("runs/stage1_text_grpo", "run folder; the same command resumes it")
    seed: int = knob(0, "of the data order and of sampling")
    style: Literal["msrl", "caption", "r1"] = knob(
        "msrl", "prompt and answer: 'msrl' (A/B, Figures 4-7), 'caption' (<caption> before "
        "<think>, not in it) or 'r1' (1/2, R1-Reward's Table 1; no generation rows)")
    max_prompt_tokens: int = knob(1024, "longer prompts are skipped and counted, never cut")
    skip_bad_rows: bool = knob(False, "leave bad rows out and count them instead of stopping")
    media_root: str = knob("", "folders, separated by commas, where rows' media may lie, too; else "
                           "in that of their file")
    exclude: str = knob("", "benchmark files; training rows that are in them too are left out "
                        "(the paper's S1 is built from VL-RewardBench's sources)")
    min_attempts: int = knob(0, "train on rows that took eval.py --attempts this many or more "
                             "(R1-Reward: 2, progressive difficulty)")

    # sampling
    temperature: float = knob(1.0, "of sampling and of the scored distribution; no top-p or top-k")
    max_new_tokens: int = knob(112, "answers are cut here and count as truncated. The paper names "
                               "none; its framework's default is 512, its script has 1024")
    rollout_batch: int = knob(64, "prompts sampled together on one process, for memory; other "
                              "chunks draw other answers")

    # objective: rewards, advantages, loss
    reward: Literal["paper", "script", "r1"] = knob(
        "paper", "weights of format, accuracy and, from stage 2 on, task. 'paper': 1, 1, and 0.2 "
        "for the task; 'script': 0.2, 1, 0.04, as released; 'r1': R1-Reward's, with consistency "
        "of reasoning and verdict")
    referee: str = knob("rule", "who tells consistency: 'rule' (the last comparison stated) or a "
                        "checkpoint that is asked about right verdicts, text only, as "
                        "Qwen/Qwen2.5-7B-Instruct (R1-Reward: Qwen2.5-VL-7B, not loadable here)")
    advantage: Literal["group", "batch"] = knob(
        "group", "'group' (GRPO) or 'batch' (REINFORCE++, R1-Reward)")
    scale_std: bool = knob(True, "divide by the std. Paper: GRPO, so yes; its script: no")
    sigma: float = knob(3.0, "StableReinforce: answers with |z| above this are left out; 0 = off. "
                        "In a group |z| <= sqrt(G-1): at G=8 only --advantage batch can reach 3. "
                        "From G=11 on a group does, and what goes is then the one right answer "
                        "among wrong ones as well as the one wrong among right ones")
    kl: Literal["k1", "k2", "k3"] = knob(
        "k3", "which estimate of the KL is in the loss. 'k3' (GRPO, Eq. 3) follows the gradient of "
        "KL(reference || policy), though its mean is KL(policy || reference), and neither from the "
        "second step on a rollout on; 'k1' and 'k2', with the ratio, follow KL(policy || "
        "reference)")
    pre_clip: float = knob(1e3, "StableReinforce: ratio clamped to [1/x, x] before exp; 0 = off")
    clip_low: float = knob(0.2, "PPO clip below 1")
    clip_high: float = knob(0.2, "PPO clip above 1. Paper: default 0.2; its script: 0.28")
    normaliser: Literal["sequence", "token"] = knob(
        "sequence", "'sequence': mean over answers of token means (GRPO, the paper's framework); "
        "'token': mean over tokens (TRL's default)")

    # optimiser
    updates_per_rollout: int = knob(1, "passes over each rollout; above 1 the ratio leaves 1 and "
                                    "the clips begin to matter")
    mini_batch: int = knob(0, "prompts per optimiser step, over all processes; 0 = the whole "
                           "rollout. Less than --batch_size: the ratio leaves 1 at the second "
                           "(R1-Reward: 128 of 256)")
    micro_batch: int = knob(4, "prompts (whole groups) per forward: memory, not the gradient")
    max_grad_norm: float = knob(1.0, "gradient norm clip")
    freeze_vision: bool = knob(True, "freeze vision tower and projector. Paper: in stage 1, not "
                               "from 2 on; its script: in 1 and 2")
    lora_rank: int = knob(0, "train a LoRA adapter of this rank, not the weights; 0 = off. On all "
                          "linear layers but the head, those of the vision tower unless it is "
                          "frozen. Needs peft, and about 10 times the --lr (UNSPECIFIED in MSRL)")
    gradient_checkpointing: bool = knob(False, "recompute activations: slower, far less memory")
    shard: Literal["auto", "yes", "no"] = knob(
        "auto", "FSDP2: split weights, gradients, optimiser state and KL reference among the "
        "processes of torchrun. 'auto': if a replica does not fit the card, as --dry_run tells it")

    # evaluation on held-out rows, and logs
    eval_every: int = knob(20, "steps between looks at the held-out rows; 0 = only at the end")
    eval_rows: int = knob(100, "about as many rows in those looks; the first and last take all")
    eval_batch: int = knob(128, "judgements decoded together")
    save_every: int = knob(20, "steps between saved states")
    log_rollouts_every: int = knob(10, "steps between whole groups written to rollouts.jsonl")
    tracker: Literal["none", "tensorboard", "wandb", "trackio"] = knob(
        "none", "draws the curves of metrics.jsonl elsewhere, too, if it is installed")

    def check(self):
        compared = self.group_size  # the answers whose rewards an advantage compares
        if self.advantage == "batch":
            compared *= self.batch_size
        if compared < 2 or self.group_size < 1:
            raise ValueError("--group_size must be at least 2, or 1 with --advantage batch and "
                             "more prompts: an answer alone has no advantage")
        if self.mini_batch < 0 or self.mini_batch and self.batch_size % self.mini_batch:
            raise ValueError(f"--mini_batch {self.mini_batch} must divide --batch_size "
                             f"{self.batch_size}, or be 0 for all of it in one step")
        if self.mini_batch % common.world():
            raise ValueError(f"--mini_batch {self.mini_batch} does not divide among "
                             f"{common.world()} processes")
        if 0 < self.pre_clip <= 1:
            raise ValueError("--pre_clip must be above 1, or 0 for off")


PAPER = dict(heldout="", micro_batch=1, lr=1e-6, temperature=0.9, save_every=200,
             gradient_checkpointing=True, skip_bad_rows=True,
             data="wangclnlp/GRAM-RR-TrainingData:400000",
             batch_size=16, max_steps=25_000, rollout_batch=2,
             max_prompt_tokens=4096, max_new_tokens=1024, eval_batch=8)
PRESETS = {"paper": PAPER}


# --- same in stages 1, 2, 3: the equations --------------------------------------------------------
def advantages(rewards, every_reward, kind, scale_std, sigma):
    """rewards [B, G] of this process and every_reward [B_all, G] of all processes, both float64
    -> advantages [B, G] and keep [B, G], False where the 3-sigma filter leaves an answer out.
    UNSPECIFIED: which std. Ours is the population's (correction=0): these G answers are all that is
    compared, and |z| <= sqrt(G-1)."""
    if kind == "group":  # against the G answers to the same prompt
        mean = rewards.mean(1, keepdim=True)                                           # [B, 1]
        std = rewards.std(1, correction=0, keepdim=True)
        equal = rewards.amax(1, keepdim=True) == rewards.amin(1, keepdim=True)
    else:  # against all answers of the rollout, so G may be 1 (REINFORCE++, R1-Reward)
        mean = every_reward.mean()
        std = every_reward.std(correction=0)
        equal = every_reward.max() == every_reward.min()
    # Equal rewards give exactly 0. Untested, rounding noise over a tiny std would be a signal.
    centred = (rewards - mean).masked_fill(equal, 0.0)                                 # [B, G]
    z = centred / std.masked_fill(equal, 1.0)                                          # [GRPO]
    keep = torch.ones_like(z, dtype=torch.bool)
    if sigma > 0:
        keep = z.abs() <= sigma                                                        # [SR filter]
    return (z if scale_std else centred), keep


def grpo_loss(logp, old, ref, advantage, weight, clip_low, clip_high, pre_clip, beta, kl="k3"):
    """All arguments [b, S] per token but the last five. `weight` holds the whole normalisation (0
    on padding), so the loss is a plain sum. -> loss, and per-token {name: value} for the log, where
    the divergence is always told by k3.

    At the first update after a rollout logp == old: every ratio is 1, and as the advantages of a
    group add up to 0, the loss starts AT ZERO BY DESIGN. Its gradient is not. Watch the reward."""
    log_ratio = logp - old
    if pre_clip > 0:
        log_ratio = log_ratio.clamp(-math.log(pre_clip), math.log(pre_clip))         # [SR pre-clip]
    ratio = log_ratio.exp()
    clipped = ratio.clamp(1 - clip_low, 1 + clip_high)
    policy = -torch.min(ratio * advantage, clipped * advantage)                        # [PPO clip]
    stats = {"clip_ratio/low_mean": (ratio < 1 - clip_low) & (advantage < 0),
             "clip_ratio/high_mean": (ratio > 1 + clip_high) & (advantage > 0),
             "pre_clip_ratio": log_ratio != logp - old}
    if beta == 0:
        return (policy * weight).sum(), stats
    d = (ref - logp).clamp(-20, 20)  # against overflow only: a sampled token is never that far off
    k3 = d.exp() - d - 1                                                               # [k3], Eq. 3
    penalty = kl_penalty(kl, k3, d, ratio)
    return ((policy + beta * penalty) * weight).sum(), {**stats, "kl": k3.detach()}


def kl_penalty(kl, k3, d, ratio):
    """The divergence from the reference in the loss; all [b, S], d = log(reference / policy).

    A token's estimate and its gradient are two things. With tokens drawn from the policy, k1 and k3
    have the mean KL(policy || reference). But the gradient of k3, averaged over those tokens, is
    that of KL(reference || policy): GRPO pulls the policy over all that the reference may say. From
    the second step on a rollout, tokens come from an older policy and k3 lacks the ratio that would
    make up for it; GRPO and Eq. 3 have none, so it follows neither divergence any more.

    k1 and k2 follow KL(policy || reference), in every step: the policy stays where the reference
    is likely. Their ratio corrects for the older policy (up to the pre-clip). None of the three
    knows that a token decides which tokens can come after it."""
    if kl == "k1":  # as a cost in the reward, so the gradient goes through the ratio alone
        return ratio * -d.detach()
    if kl == "k2":  # the same gradient by another way: here the ratio only weighs
        return ratio.detach() * d.square() / 2
    return k3


def per_token(per_answer, owner):
    """One number per answer [b, G] -> one per token [b, S], 0 on padding. owner [b, S] is 1..G for
    the tokens of the answers, -1 for padding."""
    answer = (owner - 1).clamp(min=0)
    values = per_answer.float().to(owner.device).gather(1, answer)
    return values.masked_fill(owner < 1, 0.0)


def grpo_update(model, ref, encoder, optimizer, prompts, answers, advantage, keep, cfg,
                sampled=None):
    """updates_per_rollout passes over B prompts, their answers [B][G], advantages and keep [B, G];
    in each pass one optimiser step for every mini-batch. Processes and micro-batches share the
    normaliser of a step, so neither changes the gradient. `sampled` [B][G]: the log-probs of the
    answers' tokens when they were sampled.
    -> {name: mean over the answer tokens of the last pass}; the loss is the mean over its steps,
    the gradient norm that of the last step, the difference to the sampler that of the first."""
    minis = pieces(0, len(prompts), cfg.mini_batch // common.world() or len(prompts))
    # the gradient of a step is a sum: its prompts may come in any order
    order = longest_first(prompts, answers, minis)
    prompts, answers = [prompts[i] for i in order], [answers[i] for i in order]
    advantage, keep = advantage[order], keep[order]
    if sampled is not None:
        sampled = [sampled[i] for i in order]
    lengths = torch.tensor([[len(answer) for answer in group] for group in answers]).double()
    weight = keep.double()              # 'token': the mean over all tokens              # [B, G]
    if cfg.normaliser == "sequence":
        weight = weight / lengths       # GRPO: the mean over answers of their token means
    for mini in minis:  # one normaliser for each step, over the answers of all processes
        count, = sum_over_ranks((weight[mini] * lengths[mini]).sum().item())
        weight[mini] /= max(count, 1.0)
    several_steps = len(minis) * cfg.updates_per_rollout > 1
    old, reference = {}, {}  # log-probs by micro-batch, before the first step
    if several_steps and sampled is None:
        old = frozen_logps(model, encoder, prompts, answers, minis, cfg)
    if ref is not None:
        reference = frozen_logps(ref, encoder, prompts, answers, minis, cfg)
    difference, skipped = Counter(), 0
    for step, mini in enumerate(minis * cfg.updates_per_rollout):
        if mini.start == 0:  # a new pass
            totals = Counter()
        if cfg.gradient_checkpointing:
            model.train()
        for part in pieces(mini.start, mini.stop, cfg.micro_batch):
            logp, entropy, owner = packed_logps(model, encoder, prompts[part], answers[part],
                                                cfg.temperature)                       # [b, S]
            first = part.start
            if not several_steps:
                old[first] = logp.detach()  # no step came before: the ratio is exactly 1
            elif sampled is not None:  # of the policy that drew them, to rounding what ours were
                old[first] = token_values(sampled[part], owner)
            loss, stats = grpo_loss(
                logp, old[first], reference.get(first), per_token(advantage[part], owner),
                per_token(weight[part], owner), cfg.clip_low, cfg.clip_high, cfg.pre_clip, cfg.beta,
                cfg.kl)
            loss.backward()
            totals["loss"] += loss.item()
            add_up(totals, {**stats, "entropy": entropy}, owner)
            if step == 0 and sampled is not None:  # cache against packed forward: rounding, or bug
                gap = (logp.detach() - token_values(sampled[part], owner)).abs()
                add_up(difference, {"sampling/sampling_logp_difference/mean": gap}, owner)
        norm = common.optimizer_step(optimizer, common.trainable(model), cfg.max_grad_norm)
        skipped += not math.isfinite(norm)
    loss, = sum_over_ranks(totals.pop("loss") / len(minis))
    return {"loss": loss, "grad_norm": norm, "skipped_steps": skipped, **token_means(totals),
            **token_means(difference), **common.first_change(optimizer)}


def pieces(start, stop, size):
    """Slices of `size` prompts, the last one with what is left."""
    return [slice(at, min(at + size, stop)) for at in range(start, stop, size)]


def longest_first(prompts, answers, minis):
    """-> the prompts of each mini-batch, by number, in order of their packed lengths: micro-batches
    of like lengths have less padding. Where memory is short, mostly the first of them tells."""
    lengths = []
    for prompt, group in zip(prompts, answers, strict=True):
        lengths.append(len(prompt.ids) + sum(map(len, group)))
    order = []
    for mini in minis:
        order += sorted(range(mini.start, mini.stop), key=lengths.__getitem__, reverse=True)
    return order


@torch.no_grad()
def frozen_logps(model, encoder, prompts, answers, minis, cfg):
    """-> {first prompt of a micro-batch: log-probs [b, S] of its answers}, without a gradient."""
    logps = {}
    for mini in minis:
        for part in pieces(mini.start, mini.stop, cfg.micro_batch):
            logps[part.start] = packed_logps(model, encoder, prompts[part], answers[part],
                                             cfg.temperature, with_entropy=False)[0]
    return logps


def add_up(totals, values, owner):
    """Add {name: values [b, S]} and the number of tokens to the totals; padding counts nowhere."""
    for name, value in values.items():
        totals[name] += value[owner > 0].double().sum().item()
    totals["tokens"] += (owner > 0).sum().item()


def token_means(totals):
    """-> {name: mean over the tokens of all processes}"""
    names = sorted(totals)
    sums = dict(zip(names, sum_over_ranks(*[totals[name] for name in names]), strict=True))
    tokens = sums.pop("tokens", None)
    return {name: total / tokens for name, total in sums.items()}


def score_answers(texts, batch, functions):
    """The texts of the answers [B][G] and the rows [B] they answer -> {name: rewards [B, G]}."""
    scores = {name: torch.zeros(len(texts), len(texts[0]), dtype=torch.float64)
              for name in functions}
    for b, (row, group) in enumerate(zip(batch, texts, strict=True)):
        for g, text in enumerate(group):
            for name, function in functions.items():
                scores[name][b, g] = function(text, row)                               # Eq. 4
    return scores
# --- end of the equations -------------------------------------------------------------------------


def main():
    cfg = common.parse_config(Config, __doc__, PRESETS)
    device = common.start_processes(cfg.batch_size)
    state = common.open_run(cfg.out, cfg)

    # ------------------------------------------------------------------------------ model and data
    shards = sharding.wanted(cfg, device)
    model, encoder = common.load(cfg.model, device, made_by=Config.model, shards=shards,
                                 style=cfg.style)
    if cfg.freeze_vision:
        common.freeze_vision(model)
    if cfg.lora_rank:
        common.add_adapter(model, cfg.lora_rank, cfg.seed)
    if shards:
        sharding.shard(model, cfg, device)
    ref = common.reference(model) if cfg.beta > 0 else None
    if cfg.gradient_checkpointing:
        model.gradient_checkpointing_enable()
    optimizer = common.make_optimizer(model, cfg.lr)
    limits = FORM, cfg.max_prompt_tokens, cfg.skip_bad_rows, cfg.media_root
    rows = load_rows(cfg.data, encoder, *limits, exclude=cfg.exclude)
    rows = hard_rows(rows, cfg.min_attempts)
    heldout = load_rows(cfg.heldout, encoder, *limits) if cfg.heldout else []
    heldout_subset = heldout[::max(1, len(heldout) // cfg.eval_rows)]  # spread over all tasks
    start, saved = common.resume(state, model, optimizer)
    if state is None and heldout:
        saved["before"] = common.evaluate(model, encoder, heldout, cfg, "before", FORM,
                                          sample_group)
    del state
    functions = dict(REWARDS)
    if cfg.reward == "r1":
        functions["consistency"] = common.consistency_reward(cfg.referee, sample_group, device,
                                                             cfg.style)

    # ------------------------------------------------------------------------------ the GRPO loop
    mine = slice(common.rank(), None, common.world())  # whole groups never straddle processes
    bar = common.progress(start, cfg.max_steps, STAGE)
    for step in bar:
        began = time.time()
        batch = common.batch_of(rows, step, cfg.batch_size, cfg.seed)[mine]            # B rows
        prompts = [encoder(row, FORM) for row in batch]

        # 1. sample G answers per prompt; another seed for every step and process
        generator = torch.Generator(device).manual_seed(
            (cfg.seed * 1_000_003 + step) * 1009 + common.rank())
        rollout = roll_out(model, encoder, prompts, cfg, generator)                    # [B][G]
        sampling_ended = time.time()

        # 2. rewards: the tokens we train on are the sampled ones, text is for the judge only
        texts = [[common.as_ab(encoder.decode(ids), cfg.style) for ids in group]
                 for group in rollout.ids]                                             # [B][G]
        scores = score_answers(texts, batch, functions)                        # {name: [B, G]}
        weights = SCHEMES[cfg.reward]
        rewards = sum(weights.get(name, 0.0) * values for name, values in scores.items())

        # 3. advantages [B, G]
        every_reward = common.gather(rewards)                                          # [B_all, G]
        advantage, keep = advantages(rewards, every_reward, cfg.advantage, cfg.scale_std, cfg.sigma)

        # 4. log-probs, loss, update
        metrics = grpo_update(model, ref, encoder, optimizer, prompts, rollout.ids, advantage, keep,
                              cfg, rollout.logp)

        difference = metrics["sampling/sampling_logp_difference/mean"]
        if step == start and difference > 0.1:  # rounding is below 1e-3 in fp32
            raise SystemExit(f"sampling and training differ by {difference:.2g} nats per token in "
                             f"the first step: {cfg.model} is not computed alike in both. Nothing "
                             "was saved; report the model's architecture.")

        # 5. log, save, evaluate on held-out rows
        metrics |= describe(rollout, texts, scores, every_reward, keep, encoder)
        seconds = time.time() - began
        metrics |= {"step_time": seconds, "sample_time": sampling_ended - began,
                    "tokens_per_second": metrics["num_tokens"] / seconds,
                    "peak_memory_gb": common.peak_memory_gb()}
        done = step + 1
        if cfg.eval_every and heldout and done % cfg.eval_every == 0 and done < cfg.max_steps:
            result = common.evaluate(model, encoder, heldout_subset, cfg, f"step {done}", FORM,
                                     sample_group)
            metrics["eval_accuracy"] = result["accuracy"]
        stop = bar.stop_asked()  # SIGTERM
        if common.rank() == 0:
            common.log_step(cfg.out, {"step": done, **metrics}, cfg.tracker)
        if cfg.log_rollouts_every and step % cfg.log_rollouts_every == 0:
            b = (advantage != 0).any(1).int().argmax().item()  # first with a signal, else 0
            tokens = logged_tokens(model, encoder, prompts[b], rollout.ids[b], rollout.logp[b], cfg)
            if common.rank() == 0:  # and not before: a sharded model is run by all processes
                common.append(Path(cfg.out, "rollouts.jsonl"), {
                    "step": done, "id": batch[b]["id"], "label": batch[b]["label"],
                    "media": batch[b]["media"], "answers": texts[b],
                    "prompt": common.render(batch[b], FORM, cfg.style),
                    "rewards": {name: values[b].tolist() for name, values in scores.items()},
                    "reward": rewards[b].tolist(), "advantages": advantage[b].tolist(),
                    "kept": keep[b].tolist(), **tokens})
        if stop or done % cfg.save_every == 0 or done == cfg.max_steps:
            common.save_state(cfg.out, model, optimizer, done, cfg, **saved)
        if stop:
            common.end_stopped(cfg.out, done)
        bar.set_postfix(reward=f"{metrics['reward']:.3g}", kl=f"{metrics.get('kl', 0):.3g}",
                        acc=f"{metrics['rewards/accuracy/mean']:.3g}", refresh=False)

    # ------------------------------------------------------------------------------------- result
    after = None
    if heldout:
        after = common.evaluate(model, encoder, heldout, cfg, "after", FORM, sample_group)
    common.save_checkpoint(cfg.out, model, encoder, stage=STAGE, parent=cfg.model,
                           step=max(start, cfg.max_steps), config=asdict(cfg),
                           heldout={"before": saved.get("before"), "after": after})
    if common.rank() == 0:
        print(f"wrote {cfg.out}/")
    common.end_processes()


# --- same in stages 1, 2, 3: how tokens get there -------------------------------------------------
ROWS_AT_ONCE = 1024  # of logits in fp32: memory, not the numbers


@dataclass
class Rollout:
    ids: list   # [B][G] answers as lists of token ids, end-of-sequence token included
    logp: list  # [B][G] lists: the log-prob each token had when it was sampled


def roll_out(model, encoder, prompts, cfg, generator):
    """B prompts -> their Rollout, cfg.rollout_batch prompts at a time."""
    rollout = Rollout([], [])
    with sharding.whole(model):
        for at in range(0, len(prompts), cfg.rollout_batch):
            part = sample_group(model, encoder, prompts[at:at + cfg.rollout_batch], cfg.group_size,
                                cfg.temperature, cfg.max_new_tokens, generator)
            rollout.ids += part.ids
            rollout.logp += part.logp
    return rollout


@torch.no_grad()
def sample_group(model, encoder, prompts, group_size, temperature, max_new_tokens, generator):
    """B prompts -> G answers each. The prompts (and their images) are run once; then their answers
    grow side by side behind them, a token of each at a time, in columns [B, A]. An answer sees what
    it sees in pack(), so keys and values of a prompt are there once, not G times. Finished answers
    leave their column, finished prompts the batch: A = G only at first. temperature 0 is greedy.

    Sampling is plain softmax: top-p or top-k would draw from another distribution than the one
    packed_logps scores, and the ratio would no longer be 1 at the first update. UNSPECIFIED in the
    paper; its script leaves its framework's top-p 0.9 and top-k 50, and scores without them."""
    model.eval()  # also turns gradient checkpointing off, which would silently disable the cache
    device = next(model.parameters()).device
    ids, mask, places, media = common.left_pad(prompts, encoder.pad_id, device)       # [B, P]
    eos = torch.tensor(encoder.eos_ids, device=device)
    decode = decoding.Decoder(model, ids.shape[1] + group_size * max_new_tokens)
    with common.autocast(device):
        out = model(input_ids=ids, attention_mask=mask, position_ids=places, use_cache=True,
                    past_key_values=decode.cache, logits_to_keep=1, **media)
    n = len(ids)
    logits = out.logits[:, -1:].expand(-1, group_size, -1)                            # [B, A, V]
    owner = mask - 1                          # 0 prompt, 1..G the answers, -1 padding  [B, P]
    position = places[..., -1:].expand(*places.shape[:-1], group_size)  # Qwen-VL: [3, B, A]
    prompt = torch.arange(n, device=device)[:, None]
    answer = torch.arange(group_size, device=device).expand(n, -1)                    # [B, A]
    alive = torch.ones(n, group_size, dtype=torch.bool, device=device)
    tokens = torch.full((n, group_size, max_new_tokens), -1, device=device)           # [B, G, C]
    logps = torch.zeros(n, group_size, max_new_tokens, device=device)
    for t in range(max_new_tokens):
        logp = scored_logits(logits, encoder, temperature).log_softmax(-1)            # [B, A, V]
        token = logp.argmax(-1) if temperature == 0 else draw(logp, generator)        # [B, A]
        tokens[prompt, answer, t] = token.where(alive, -1)
        logps[prompt, answer, t] = logp.gather(2, token[..., None])[..., 0]
        alive &= ~torch.isin(token, eos)      # the EOS itself is part of the answer
        if not alive.any() or t == max_new_tokens - 1:
            break
        keep, widest = alive.any(1), alive.sum(1).max()
        if keep.sum() * widest <= 0.75 * alive.numel():  # compaction
            first = alive.int().argsort(dim=1, descending=True, stable=True)[keep, :widest]
            token, answer, alive = [x[keep].gather(1, first) for x in (token, answer, alive)]
            prompt, owner, places = prompt[keep], owner[keep], places[..., keep, :]
            position = position[..., keep, :widest]  # the same in all columns
            if not keep.all():
                decode.cache.batch_select_indices(keep.nonzero()[:, 0])
        position = position + 1
        places = torch.cat([places, position], -1)                                    # [B, L]
        mine = torch.where(alive, answer + 1, -2)  # nobody looks at what comes after the end
        owner = torch.cat([owner, mine], 1)                                           # [B, L]
        sees = (owner == 0)[:, None] | (owner[:, None] == mine[..., None])            # [B, A, L]
        masks = decoding.layer_masks(model, sees[:, None], position, places)
        logits = decode(token, masks, position)
    lengths, tokens, logps = (tokens >= 0).sum(2).tolist(), tokens.tolist(), logps.tolist()
    rollout = Rollout([], [])
    for b in range(n):
        rollout.ids.append([tokens[b][g][:lengths[b][g]] for g in range(group_size)])
        rollout.logp.append([logps[b][g][:lengths[b][g]] for g in range(group_size)])
    return rollout


def draw(logp, generator):
    """Log-probs [..., V] -> tokens [...]: where their share of the cumulative sum holds a uniform
    number. torch.multinomial draws one number for every word of V. In float64, because a sum of
    fp32 near 1 swallows words rarer than 6e-8, of which a large V has many."""
    cumulative = logp.double().exp().cumsum(-1)                                       # [..., V]
    uniform = torch.rand(*logp.shape[:-1], 1, dtype=torch.float64, device=logp.device,
                         generator=generator)
    return torch.searchsorted(cumulative, uniform * cumulative[..., -1:], right=True)[..., 0]


def scored_logits(logits, encoder, temperature):
    """Model logits -> fp32 logits of the distribution we sample from and train. An image
    placeholder in an answer would ask the next forward for an image that is not there: no mass."""
    logits = logits.float()
    if temperature not in (0, 1):
        logits = logits / temperature
    if encoder.image_token_id is not None:
        placeholder = torch.tensor([encoder.image_token_id], device=logits.device)
        logits = logits.index_fill(-1, placeholder, torch.finfo(torch.float32).min)
    return logits


def pack(prompts, answers, pad_id, device):
    """b prompts with G answers each -> one sequence each, [prompt | answer 1 | ... | answer G].

        owner      0  0  0  1  1  2  2  2     0 prompt, 1..G the answers, -1 padding
        positions  0  1  2  3  4  3  4  5     every answer starts right after the prompt
        source           2  3  2  5  6        the place whose logits predict this answer token

    A token sees itself and what is before it in the prompt and in its own answer, no other answer.
    -> ids, positions [b, L] (Qwen-VL: [3, b, L]), attention mask [b, 1, L, L], source [b, S]
    counted from the prompt's last token, target ids [b, S], owner [b, S] and media; L = P + S."""
    ids, mask, positions, media = common.left_pad(prompts, pad_id, device)             # [b, P]
    b, width = ids.shape
    longest = max(sum(len(answer) for answer in group) for group in answers)
    tail = torch.full((b, longest), pad_id, device=device)                             # [b, S]
    owner = torch.full((b, longest), -1, device=device)
    source = torch.zeros(b, longest, dtype=torch.long, device=device)
    place = torch.zeros(b, longest, dtype=torch.long, device=device)
    for i, group in enumerate(answers):
        at = 0
        for g, answer in enumerate(group, 1):
            n = len(answer)
            tail[i, at:at + n] = torch.tensor(answer, device=device)
            owner[i, at:at + n] = g
            place[i, at:at + n] = prompts[i].following(n)
            source[i, at + 1:at + n] = torch.arange(at + 1, at + n, device=device)     # first: 0
            at += n
    full = torch.cat([mask - 1, owner], 1)                                             # [b, L]
    positions = torch.cat([positions, place.expand(*positions.shape[:-1], -1)], -1)
    q, k = full[:, :, None], full[:, None, :]
    sees = ((k == 0) | (k == q)).tril()  # padding sees padding: no empty row, no NaN
    return torch.cat([ids, tail], 1), positions, sees[:, None], source, tail, owner, media


def packed_logps(model, encoder, prompts, answers, temperature, with_entropy=True):
    """-> log-probs [b, S] of the answer tokens (0 on padding), entropy [b, S], owner [b, S].

    The prompt is computed once for its G answers: P + G*C tokens instead of G*(P + C). The head
    works from the prompt's last token on. Of long answers the fp32 log-probs of whole rows [V] are
    made ROWS_AT_ONCE at a time, and again in the backward pass: with V = 151k they are 0.6 MB each,
    and 8 answers of 1,024 tokens have 8,193."""
    device = next(model.parameters()).device
    ids, positions, sees, source, target, owner, media = pack(prompts, answers, encoder.pad_id,
                                                              device)
    masks = decoding.layer_masks(model, sees, positions, answers=answers)
    with common.autocast(device):
        logits = model(input_ids=ids, attention_mask=masks, position_ids=positions, use_cache=False,
                       logits_to_keep=target.shape[1] + 1, **media).logits             # [b, 1+S, V]
    parts = logits.split(ROWS_AT_ONCE, 1)
    del logits
    logp, entropy = 0.0, 0.0
    for i, part in enumerate(parts):
        inputs = part, source - i * ROWS_AT_ONCE, target, encoder, temperature, with_entropy
        if len(parts) == 1:
            values = token_logps(*inputs)
        else:
            values = checkpoint(token_logps, *inputs, use_reentrant=False)
        logp, entropy = logp + values[0], entropy + values[1]
    return logp.masked_fill(owner < 0, 0.0), entropy, owner


def token_logps(logits, source, target, encoder, temperature, with_entropy):
    """Some rows of logits [b, r, V], source [b, S] counted from the first of them -> log-probs and
    entropies [b, S] of the tokens that these rows predict, 0 for the others."""
    logp = scored_logits(logits, encoder, temperature).log_softmax(-1)                 # [b, r, V]
    rows = torch.arange(len(logp), device=logp.device)[:, None]                        # [b, 1]
    place = source.clamp(0, logp.shape[1] - 1)
    others = place != source
    picked = logp[rows, place, target].masked_fill(others, 0.0)                        # [b, S]
    entropy = torch.zeros_like(picked)
    if with_entropy:
        with torch.no_grad():
            parts = logp.split(64, 1)  # of all rows at once, exp(logp) would be as large as logp
            entropy = torch.cat([-(part.exp() * part).sum(-1) for part in parts], 1)
            entropy = entropy[rows, place].masked_fill(others, 0.0)
    return picked, entropy


def token_values(values, owner):
    """[b][G] lists, one number per token -> [b, S], each at the place of its token, 0 on padding"""
    flat = [value for group in values for answer in group for value in answer]
    places = torch.zeros(owner.shape, device=owner.device)
    return places.masked_scatter(owner > 0, torch.tensor(flat, device=owner.device))


@torch.no_grad()
def logged_tokens(model, encoder, prompt, answers, sampled, cfg):
    """For rollouts.jsonl: one prompt's answers [G] and the log-probs their tokens were sampled with
    -> {"tokens": the text each token adds, "logp_sampled", "logp_after": the step}, [G] lists."""
    model.eval()  # as in sampling
    logp, _, owner = packed_logps(model, encoder, [prompt], [answers], cfg.temperature)  # [1, S]
    log = {"tokens": [], "logp_sampled": [], "logp_after": []}
    for g, ids in enumerate(answers, 1):
        tokens, before = [], ""
        for n in range(1, len(ids) + 1):  # not one by one: a character may be several tokens
            text = encoder.tokenizer.decode(ids[:n], skip_special_tokens=False).rstrip("\ufffd")
            tokens.append(text[len(before):])
            before = text
        log["tokens"].append(tokens)
        log["logp_sampled"].append([round(value, 5) for value in sampled[g - 1]])
        log["logp_after"].append([round(value, 5) for value in logp[owner == g].tolist()])
    return log


def describe(rollout, texts, scores, every_reward, keep, encoder):
    """The rollout's part of metrics.jsonl, over all processes (README explains each figure)."""
    counts = Counter()
    for ids_of_group, texts_of_group in zip(rollout.ids, texts, strict=True):
        for ids, text in zip(ids_of_group, texts_of_group, strict=True):
            verdict = common.parse(text).verdict
            counts["answers"] += 1
            counts["tokens"] += len(ids)
            counts["cut"] += not ids or ids[-1] not in encoder.eos_ids
            counts["verdicts"] += verdict is not None
            counts["says A"] += verdict == "A"
    answers, tokens, cut, verdicts, says_a, kept = sum_over_ranks(
        counts["answers"], counts["tokens"], counts["cut"], counts["verdicts"], counts["says A"],
        keep.sum().item())
    # with one answer each, the rollout is the group
    groups = every_reward if every_reward.shape[1] > 1 else every_reward.mT
    equal = groups.amax(1) == groups.amin(1)
    metrics = {"reward": every_reward.mean().item(),
               "reward_std": groups.std(1, correction=0).mean().item(),
               "frac_reward_zero_std": equal.float().mean().item(),
               "completions/mean_length": tokens / answers,
               "completions/clipped_ratio": cut / answers,
               "share_a": says_a / max(verdicts, 1),
               "filter_ratio": 1 - kept / answers, "num_tokens": tokens}
    for name, values in scores.items():
        values = common.gather(values)
        metrics[f"rewards/{name}/mean"] = values.mean().item()
        metrics[f"rewards/{name}/std"] = values.std(correction=0).item()
    return metrics
# --- end of what is same in stages 1, 2, 3 --------------------------------------------------------


if __name__ == "__main__":
    main()
