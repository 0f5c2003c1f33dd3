"""
Stage 2: GRPO on captions (MSRL 4.2). Stage 1, but each image or video is replaced by its caption,
naming the task in <type> earns 0.2, and every batch replays some text rows of stage 1.

    python stage2_caption_grpo.py                                # toy world, from stage 1
    torchrun --nproc_per_node=8 stage2_caption_grpo.py --preset paper

One step, for B prompts with G answers each:

    sample    G answers a prompt; the prompt is run once, its cache is shared        sample_group
    reward    format + accuracy + task recognition                       MSRL 4.2    common.py
    advantage (r - mean of the group) / std of the group                 [GRPO]      advantages
    log-probs [prompt | answer 1 | ... | answer G] as one sequence                   packed_logps
    loss      PPO clip on the pre-clipped ratio + beta * KL to the start Eq. 3       grpo_loss

Shapes: B prompts, G answers each, N = B*G, T tokens, P prompt length, C answer length, V
vocabulary, S = the lengths of one prompt's G answers added up; `b` is B within a micro-batch.
"""

import copy
import math
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Literal

import torch
import torch.nn.functional as F
from tqdm import tqdm

import common
from common import accuracy_reward, format_reward, sum_over_ranks, task_reward

HELDOUT = ",".join(f"toy/heldout_{task}.jsonl:100" for task in common.TASKS)
STAGE = Path(__file__).stem
FORM = "caption"  # how rows with media are shown; text rows have none
REWARDS = {"format": format_reward, "accuracy": accuracy_reward, "task": task_reward}
SCHEMES = {"paper": {"format": 1.0, "accuracy": 1.0, "task": 1.0},   # task_reward is 0 or 0.2
           "script": {"format": 0.2, "accuracy": 1.0, "task": 0.2},  # as released: 0.2 * 0.2
           # R1-Reward 4.3: 0.5 * format + accuracy * (1 + 0.5 * consistency)
           "r1": {"format": 0.5, "accuracy": 1.0, "consistency": 0.5}}


def knob(default, help):
    return field(default=default, metadata={"help": help})


@dataclass
class Config:
    model: str = knob("runs/stage1_text_grpo", "checkpoint to start from; also the KL reference")
    data: str = knob("toy/caption_rl.jsonl", "preference rows with captions; several, separated "
                     "by commas. Paper: 20k rows of Table 5")
    captioner: str = knob("", "vision-language checkpoint that describes media without captions "
                          "(paper: GPT-5); written to captions.jsonl in the run folder")
    caption_prompt: str = knob("describe", "what it is asked; this is the toy backbone's word")
    replay: str = knob("toy/text_rl.jsonl", "text rows of stage 1 to choose replayed ones from")
    replay_ratio: str = knob("5:1", "captions : text in every batch (paper: 5:1; Table 6: "
                             "1:0, 1:1, 2:1, 4:1, 5:1)")
    replay_candidates: int = knob(200, "text rows judged to find the replayed ones among them")
    heldout: str = knob(HELDOUT, "rows judged before and after; '' for none")
    out: str = knob("runs/stage2_caption_grpo", "run folder; the same command resumes it")
    seed: int = knob(0, "of the data order and of sampling")
    max_steps: int = knob(40, "rollouts; each is followed by updates_per_rollout optimiser steps")
    batch_size: int = knob(24, "prompts a rollout, over all processes. Paper: 'batch size of "
                           "128'; its script counts answers: 16 prompts x 8")
    group_size: int = knob(8, "G, answers a prompt (paper: 8)")
    updates_per_rollout: int = knob(1, "optimiser steps on each rollout; above 1 the ratio leaves "
                                    "1 and the clips begin to matter")
    micro_batch: int = knob(6, "prompts (whole groups) a forward: memory, not the gradient")
    rollout_batch: int = knob(64, "prompts sampled together on one process, for memory; other "
                              "chunks draw other answers")
    freeze_vision: bool = knob(False, "freeze vision tower and projector. Paper: no, from stage 2 "
                               "on; its script: yes. Captions give them no gradient either way")
    lr: float = knob(8e-5, "AdamW, constant (paper: 1e-6)")
    max_grad_norm: float = knob(1.0, "gradient norm clip")
    beta: float = knob(0.04, "weight of the KL to the starting model; 0 loads no reference. Paper: "
                       "framework default 0.04; its script: 0")
    clip_low: float = knob(0.2, "PPO clip below 1")
    clip_high: float = knob(0.2, "PPO clip above 1. Paper: default 0.2; its script: 0.28")
    pre_clip: float = knob(1e3, "StableReinforce: ratio clamped to [1/x, x] before exp; 0 = off")
    sigma: float = knob(3.0, "StableReinforce: answers with |z| above this are left out; 0 = off. "
                        "In a group |z| <= sqrt(G-1): at G=8 only --advantage batch can reach 3")
    advantage: Literal["group", "batch"] = knob(
        "group", "'group' (GRPO) or 'batch' (REINFORCE++, R1-Reward)")
    scale_std: bool = knob(True, "divide by the std. Paper: GRPO, so yes; its script: no")
    normaliser: Literal["sequence", "token"] = knob(
        "sequence", "'sequence': mean over answers of token means (GRPO, the paper's framework); "
        "'token': mean over tokens (TRL's default)")
    reward: Literal["paper", "script", "r1"] = knob(
        "paper", "'paper': format 1 + accuracy 1 + task 0.2; 'script': 0.2 + 1 + 0.04, as "
        "released; 'r1': R1-Reward's, with consistency of reasoning and verdict")
    referee: str = knob("rule", "who tells consistency: 'rule' (the last comparison stated) or a "
                        "checkpoint that is asked, text only (R1-Reward: Qwen2.5-VL-7B-Instruct)")
    style: Literal["msrl", "r1"] = knob("msrl", "prompt and answer: 'msrl' (A/B, Figures 4-7) or "
                                        "'r1' (1/2, R1-Reward's Table 1; no generation rows)")
    temperature: float = knob(1.0, "of sampling and of the scored distribution; no top-p or top-k")
    max_prompt_tokens: int = knob(1024, "longer prompts are skipped and counted, never cut")
    max_new_tokens: int = knob(128, "answers are cut here and count as truncated (paper: 512)")
    gradient_checkpointing: bool = knob(False, "recompute activations: slower, far less memory")
    eval_every: int = knob(20, "steps between looks at the held-out rows; 0 = only at the end")
    eval_rows: int = knob(100, "about as many rows in those looks; the first and last take all")
    eval_batch: int = knob(128, "judgements decoded together")
    save_every: int = knob(20, "steps between saved states")
    log_rollouts_every: int = knob(10, "steps between whole groups written to rollouts.jsonl")
    skip_bad_rows: bool = knob(False, "leave bad rows out and count them instead of stopping")
    exclude: str = knob("", "benchmark files; training rows that are in them too are left out "
                        "(the paper's S1 is built from VL-RewardBench's sources)")
    min_attempts: int = knob(0, "train on rows that took eval.py --attempts this many or more "
                             "(R1-Reward: 2, progressive difficulty)")


PAPER = dict(data=common.TABLE_5.format(5000, 2500, 2580, 4323, 2500, 2539), heldout="",
             captioner="OpenGVLab/InternVL3_5-8B-HF", caption_prompt="Describe this in detail.",
             replay="wangclnlp/GRAM-RR-TrainingData:4000", replay_candidates=4000,
             batch_size=24, micro_batch=1,  # 20 + 4: of 16, no 5:1 can be made
             rollout_batch=2, lr=1e-6, temperature=0.9, max_new_tokens=512, max_steps=972,
             max_prompt_tokens=4096, gradient_checkpointing=True, save_every=200)


# --- same in stages 1, 2, 3 -----------------------------------------------------------------------
@dataclass
class Rollout:
    ids: list   # N answers as lists of token ids, EOS included; the G of one prompt are adjacent
    logp: list  # N lists: the log-prob each token had when it was sampled


@torch.no_grad()
def sample_group(model, encoder, prompts, group_size, temperature, max_new_tokens, generator):
    """B prompts -> G answers each. The prompts (and their images) are run once, then their cache is
    repeated G times; finished rows leave the batch. temperature 0 is greedy.

    Sampling is plain softmax: top-p or top-k would draw from another distribution than the one
    packed_logps scores, and the ratio would no longer be 1 at the first update."""
    model.eval()  # also turns gradient checkpointing off, which would silently disable the cache
    device = next(model.parameters()).device
    ids, mask, pixels = common.left_pad(prompts, encoder.pad_id, device)              # [B, P]
    media = {} if pixels is None else {"pixel_values": pixels}
    eos = torch.tensor(encoder.eos_ids, device=device)
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    cache = common.decoding_cache()
    with common.autocast(device):
        out = model(input_ids=ids, attention_mask=mask, position_ids=positions, use_cache=True,
                    past_key_values=cache, logits_to_keep=1, **media)
    cache.batch_repeat_interleave(group_size)                                         # [N, ...]
    logits = out.logits[:, -1].repeat_interleave(group_size, 0)                       # [N, V]
    mask = mask.repeat_interleave(group_size, 0)                                      # [N, P]
    position = mask.sum(1, keepdim=True)                                              # [N, 1]
    n = len(mask)
    tokens = torch.full((n, max_new_tokens), -1, device=device)
    logps = torch.zeros(n, max_new_tokens, device=device)
    row = torch.arange(n, device=device)      # batch row -> answer
    alive = torch.ones(n, dtype=torch.bool, device=device)
    for t in range(max_new_tokens):
        logp = scored_logits(logits, encoder, temperature).log_softmax(-1)            # [rows, V]
        token = logp.argmax(-1) if temperature == 0 else \
            torch.multinomial(logp.exp(), 1, generator=generator)[:, 0]               # [rows]
        tokens[row[alive], t] = token[alive]
        logps[row[alive], t] = logp.gather(1, token[:, None])[alive, 0]
        alive &= ~torch.isin(token, eos)      # the EOS itself is part of the answer
        if not alive.any() or t == max_new_tokens - 1:
            break
        if alive.sum() <= 0.75 * len(alive):  # compaction: finished rows leave the batch
            keep = alive.nonzero()[:, 0]
            cache.batch_select_indices(keep)
            token, mask, position = token[keep], mask[keep], position[keep]
            row, alive = row[keep], alive[keep]
        mask = torch.cat([mask, mask.new_ones(len(mask), 1)], 1)                     # [rows, P+t+1]
        with common.autocast(device):
            out = model(input_ids=token[:, None], attention_mask=mask, position_ids=position,
                        past_key_values=cache, use_cache=True)
        logits, position = out.logits[:, -1], position + 1
    lengths = (tokens >= 0).sum(1).tolist()
    return Rollout([r[:k] for r, k in zip(tokens.tolist(), lengths)],
                   [r[:k] for r, k in zip(logps.tolist(), lengths)])


def scored_logits(logits, encoder, temperature):
    """Model logits -> fp32 logits of the distribution we sample from and train. An image
    placeholder in an answer would ask the next forward for an image that is not there: no mass."""
    logits = logits.float() / (temperature or 1.0)
    if encoder.image_token_id is not None:
        logits[..., encoder.image_token_id] = torch.finfo(torch.float32).min
    return logits


def advantages(rewards, every_reward, kind, scale_std, sigma):
    """rewards [B, G] of this process and every_reward [B_all, G] of all processes, both float64
    -> advantages [B, G] and keep [B, G], False where the 3-sigma filter leaves an answer out."""
    base, dim = (rewards, 1) if kind == "group" else (every_reward.flatten()[None], 1)
    mean = base.mean(dim, keepdim=True)                                                # [B or 1, 1]
    std = base.std(dim, correction=0, keepdim=True)
    # Equal rewards give exactly 0. Untested, rounding noise over a tiny std would be a signal.
    spread = base.amax(dim, keepdim=True) > base.amin(dim, keepdim=True)
    z = torch.where(spread, (rewards - mean) / std.where(spread, torch.ones_like(std)), 0.0)
    keep = (z.abs() <= sigma) if sigma > 0 else torch.ones_like(z, dtype=torch.bool)   # [SR filter]
    return (z if scale_std else torch.where(spread, rewards - mean, 0.0)), keep


def pack(prompts, answers, pad_id, device):
    """b prompts with G answers each -> one sequence a prompt, [prompt | answer 1 | ... | answer G].

        owner      0  0  0  1  1  2  2  2     0 prompt, 1..G the answers, -1 padding
        positions  0  1  2  3  4  3  4  5     every answer starts right after the prompt
        source           2  3  2  5  6        the place whose logits predict this answer token

    A token sees itself and what is before it in the prompt and in its own answer, no other answer.
    -> ids, positions [b, L], attention mask [b, 1, L, L], source [b, S] counted from the prompt's
    last token, target ids [b, S] and owner [b, S]; L = P + S."""
    ids, mask, pixels = common.left_pad(prompts, pad_id, device)                       # [b, P]
    b, width = ids.shape
    longest = max(sum(map(len, group)) for group in answers)
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
            place[i, at:at + n] = len(prompts[i].ids) + torch.arange(n, device=device)
            source[i, at + 1:at + n] = torch.arange(at + 1, at + n, device=device)     # first: 0
            at += n
    full = torch.cat([mask - 1, owner], 1)                                             # [b, L]
    positions = torch.cat([(mask.cumsum(1) - 1).clamp(min=0), place], 1)
    q, k = full[:, :, None], full[:, None, :]
    sees = ((k == 0) | (k == q)).tril()  # padding sees padding: no empty row, no NaN
    return torch.cat([ids, tail], 1), positions, sees[:, None], source, tail, owner, pixels


def packed_logps(model, encoder, prompts, answers, temperature):
    """-> log-probs [b, S] of the answer tokens (0 on padding), entropy [b, S], owner [b, S].

    The prompt is computed once for its G answers: P + G*C tokens instead of G*(P + C). The head
    works from the prompt's last token on, and log-softmax is logits minus logsumexp in fp32."""
    device = next(model.parameters()).device
    ids, positions, sees, source, target, owner, pixels = pack(prompts, answers, encoder.pad_id,
                                                               device)
    media = {} if pixels is None else {"pixel_values": pixels}
    with common.autocast(device):
        logits = model(input_ids=ids, attention_mask=sees, position_ids=positions, use_cache=False,
                       logits_to_keep=target.shape[1] + 1, **media).logits             # [b, 1+S, V]
    logits = scored_logits(logits, encoder, temperature)
    norm = logits.logsumexp(-1)                                                        # [b, 1+S]
    picked = logits[torch.arange(len(ids), device=device)[:, None], source, target]    # [b, S]
    logp = (picked - norm.gather(1, source)).masked_fill(owner < 0, 0.0)
    with torch.no_grad():
        entropy = norm - ((logits - norm[..., None]).exp() * logits).sum(-1)           # [b, 1+S]
    return logp, entropy.gather(1, source), owner


def grpo_loss(logp, old, ref, advantage, weight, clip_low, clip_high, pre_clip, beta):
    """All arguments [b, S] per token but the last four. `weight` holds the whole normalisation (0
    on padding), so the loss is a plain sum. -> loss, and per-token {name: value} for the log.

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
    kl = d.exp() - d - 1                                                               # [k3], Eq. 3
    return ((policy + beta * kl) * weight).sum(), {**stats, "kl": kl.detach()}


def per_token(x, owner):
    """One number an answer [b, G] -> one a token [b, S]: 0 on padding."""
    return F.pad(x.float(), (1, 0)).to(owner.device).gather(1, owner.clamp(min=0))


def grpo_update(model, ref, encoder, optimizer, prompts, answers, adv, keep, cfg, sampled=None):
    """updates_per_rollout optimiser steps on B prompts, their answers [B][G], advantages and keep
    [B, G]. Processes and micro-batches share one normaliser, so neither changes the gradient.
    `sampled` [B][G]: the answers' log-probs when sampled, only to log how far ours differ.
    -> {name: mean over answer tokens, or sum for the loss}."""
    trainable = [p for p in model.parameters() if p.requires_grad]
    lengths = torch.tensor([[len(a) for a in group] for group in answers], dtype=torch.float64)
    # every answer weighs 1/C a token (GRPO: token mean, then mean over answers), or every token 1
    weight = keep / lengths if cfg.normaliser == "sequence" else keep.double()         # [B, G]
    count, = sum_over_ranks((weight * lengths).sum().item())
    weight = weight / max(count, 1.0)
    old, reference = {}, {}
    for update in range(cfg.updates_per_rollout):
        totals = {}
        if cfg.gradient_checkpointing:
            model.train()
        for at in range(0, len(prompts), cfg.micro_batch):
            part = slice(at, at + cfg.micro_batch)
            logp, entropy, owner = packed_logps(model, encoder, prompts[part], answers[part],
                                                cfg.temperature)                       # [b, S]
            if update == 0:
                old[at] = logp.detach()
                if ref is not None:
                    with torch.no_grad():
                        reference[at] = packed_logps(ref, encoder, prompts[part], answers[part],
                                                     cfg.temperature)[0]
            loss, stats = grpo_loss(logp, old[at], reference.get(at), per_token(adv[part], owner),
                                    per_token(weight[part], owner), cfg.clip_low, cfg.clip_high,
                                    cfg.pre_clip, cfg.beta)
            loss.backward()
            real = owner > 0
            stats |= {"entropy": entropy, "tokens": torch.ones_like(entropy)}
            if sampled:  # cache against packed forward: rounding, or a bug in one of the two
                flat = [p for group in sampled[part] for answer in group for p in answer]
                then = torch.zeros_like(logp).masked_scatter(real, logp.new_tensor(flat))
                stats["sampling/sampling_logp_difference/mean"] = (old[at] - then).abs()
            for name, value in stats.items():
                totals[name] = totals.get(name, 0.0) + value[real].double().sum().item()
            totals["loss"] = totals.get("loss", 0.0) + loss.item()
        common.sum_gradients(trainable)
        norm = torch.nn.utils.clip_grad_norm_(trainable, cfg.max_grad_norm).item()
        if not math.isfinite(norm):  # the same number on every process, so all stop together
            raise SystemExit(f"the gradient became {norm}; no step was taken. Go on from the last "
                             "saved state with a smaller --lr; see kl in metrics.jsonl.")
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    names = sorted(totals)
    totals = dict(zip(names, sum_over_ranks(*(totals[n] for n in names))))
    tokens = totals.pop("tokens")
    loss = totals.pop("loss")
    return {"loss": loss, "grad_norm": norm, **{n: v / tokens for n, v in totals.items()}}


def evaluate(model, encoder, rows, cfg, when, form):
    """Greedy verdicts on held-out rows in both orders. -> figures of all rows, "tasks" by task."""
    preds = common.judge(model, encoder, rows, sample_group, form, batch_size=cfg.eval_batch,
                         max_new_tokens=cfg.max_new_tokens, desc=f"held-out, {when}")
    result = common.summarize(rows, preds)
    by_task = {t: common.summarize(rows, some)["accuracy"] for t in common.TASKS if (
        some := [p for p in preds if rows[p["row"]]["task"] == t])}
    if common.rank() == 0:
        tasks = ", ".join(f"{t} {a:.1%}" for t, a in by_task.items())
        tqdm.write(common.show(f"held-out, {when}", result) + (f"; {tasks}" if tasks else ""))
    return {**result, "tasks": by_task}


def describe(rollout, texts, each, everyone, keep, encoder, cfg):
    """The rollout's part of metrics.jsonl, over all processes (README explains each figure)."""
    verdicts = [common.parse(t).verdict for t in texts]
    ended = [bool(ids) and ids[-1] in encoder.eos_ids for ids in rollout.ids]
    n, tokens, cut, said, said_a, kept = sum_over_ranks(
        len(texts), sum(map(len, rollout.ids)), ended.count(False),
        len(texts) - verdicts.count(None), verdicts.count("A"), keep.sum().item())
    metrics = {"reward": everyone.mean().item(),
               "reward_std": everyone.std(1, correction=0).mean().item(),
               "frac_reward_zero_std": (everyone.amax(1) == everyone.amin(1)).float().mean().item(),
               "completions/mean_length": tokens / n, "completions/clipped_ratio": cut / n,
               "share_a": said_a / max(said, 1), "filter_ratio": 1 - kept / n, "num_tokens": tokens}
    for name, values in each.items():
        values = common.gather(values)
        metrics |= {f"rewards/{name}/mean": values.mean().item(),
                    f"rewards/{name}/std": values.std(correction=0).item()}
    return metrics
# --- end of what is same in stages 1, 2, 3 --------------------------------------------------------


def main():
    cfg = common.parse_config(Config, __doc__, PAPER)
    device = common.start_processes(cfg.batch_size)
    state = common.open_run(cfg.out, cfg)

    # ------------------------------------------------------------------------------ model and data
    model, encoder = common.load(cfg.model, device, made_by="python stage1_text_grpo.py",
                                 style=cfg.style)
    ref = copy.deepcopy(model).requires_grad_(False) if cfg.beta > 0 else None
    if cfg.freeze_vision:
        common.freeze_vision(model)
    if cfg.gradient_checkpointing:
        model.gradient_checkpointing_enable()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=cfg.lr,
                                  betas=(0.9, 0.95), weight_decay=0.0)
    limits = FORM, cfg.max_prompt_tokens, cfg.skip_bad_rows
    # what can fail comes before the captioner's hours; at 1:0 there is nothing to replay
    texts = n_replay(cfg) and common.load_rows(cfg.replay, encoder, *limits, exclude=cfg.exclude)
    data = common.captioned(cfg, sample_group, device) if cfg.captioner else cfg.data
    rows = common.load_rows(data, encoder, *limits, exclude=cfg.exclude)
    rows = common.hard_rows(rows, cfg.min_attempts)
    heldout = common.load_rows(cfg.heldout, encoder, *limits) if cfg.heldout else []
    looks = heldout[::max(1, len(heldout) // cfg.eval_rows)]  # spread over all tasks
    start, before, replay = 0, None, None
    if state is not None:
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        start, before, replay = state["step"], state["before"], state["replay"]
    elif heldout:
        before = evaluate(model, encoder, heldout, cfg, "before", FORM)
    del state
    functions = dict(REWARDS)
    if cfg.reward == "r1":
        functions["consistency"] = common.consistency_reward(cfg.referee, sample_group, device,
                                                             cfg.style)
    if texts and replay is None:
        replay = choose_replay(model, encoder, texts, cfg)

    # ------------------------------------------------------------------------------ the GRPO loop
    mine = slice(common.rank(), None, common.world())  # whole groups never straddle processes
    bar = tqdm(range(start, cfg.max_steps), initial=start, total=cfg.max_steps, desc=STAGE,
               disable=common.rank() > 0, mininterval=2)
    for step in bar:
        began = time.time()
        batch = mixed_batch(rows, replay, step, cfg)[mine]                             # B rows
        prompts = [encoder(row, FORM) for row in batch]

        # 1. sample G answers a prompt; another seed for every step and process
        generator = torch.Generator(device).manual_seed(
            (cfg.seed * 1_000_003 + step) * 1009 + common.rank())
        rollout = Rollout([], [])
        for at in range(0, len(prompts), cfg.rollout_batch):
            some = sample_group(model, encoder, prompts[at:at + cfg.rollout_batch], cfg.group_size,
                                cfg.temperature, cfg.max_new_tokens, generator)
            rollout.ids += some.ids
            rollout.logp += some.logp
        sampled = time.time()

        # 2. rewards [B, G]: the tokens we train on are the sampled ones, text is for the judge only
        texts = [common.as_ab(encoder.decode(ids), cfg.style) for ids in rollout.ids]  # N
        owners = [row for row in batch for _ in range(cfg.group_size)]
        each = {name: torch.tensor([f(t, r) for t, r in zip(texts, owners)], dtype=torch.float64)
                .view(-1, cfg.group_size) for name, f in functions.items()}
        rewards = sum(weight * each[name] for name, weight in SCHEMES[cfg.reward].items())

        # 3. advantages [B, G]
        everyone = common.gather(rewards)                                              # [B_all, G]
        adv, keep = advantages(rewards, everyone, cfg.advantage, cfg.scale_std, cfg.sigma)

        # 4. log-probs, loss, update
        grouped = lambda x: [x[i:i + cfg.group_size] for i in range(0, len(x), cfg.group_size)]
        metrics = grpo_update(model, ref, encoder, optimizer, prompts, grouped(rollout.ids), adv,
                              keep, cfg, grouped(rollout.logp))

        # 5. log, save, look at the held-out rows
        metrics |= describe(rollout, texts, each, everyone, keep, encoder, cfg)
        seconds = time.time() - began
        metrics |= {"step_time": seconds, "sample_time": sampled - began,
                    "tokens_per_second": metrics["num_tokens"] / seconds,
                    "peak_memory_gb": common.peak_memory_gb()}
        done = step + 1
        if cfg.eval_every and heldout and done % cfg.eval_every == 0 and done < cfg.max_steps:
            metrics["eval_accuracy"] = evaluate(model, encoder, looks, cfg, f"step {done}",
                                                FORM)["accuracy"]
        if common.rank() == 0:
            common.append(Path(cfg.out, "metrics.jsonl"), {"step": done, **metrics})
            if cfg.log_rollouts_every and step % cfg.log_rollouts_every == 0:
                common.append(Path(cfg.out, "rollouts.jsonl"), {
                    "step": done, "id": batch[0]["id"], "label": batch[0]["label"],
                    "prompt": common.render(batch[0], FORM, cfg.style),
                    "answers": texts[:cfg.group_size],
                    "rewards": {n: r[0].tolist() for n, r in each.items()},
                    "advantages": adv[0].tolist(), "kept": keep[0].tolist()})
            if done % cfg.save_every == 0 or done == cfg.max_steps:
                common.save_state(cfg.out, model, optimizer, done, cfg, before=before,
                                  replay=replay)
        bar.set_postfix({k: f"{metrics.get(name, 0):.3g}" for k, name in (
            ("reward", "reward"), ("acc", "rewards/accuracy/mean"), ("kl", "kl"))}, refresh=False)

    # ------------------------------------------------------------------------------------- result
    after = evaluate(model, encoder, heldout, cfg, "after", FORM) if heldout else None
    if common.rank() == 0:
        common.save_checkpoint(cfg.out, model, encoder, stage=STAGE, parent=cfg.model,
                               step=max(start, cfg.max_steps), config=asdict(cfg),
                               heldout={"before": before, "after": after})
        print(f"wrote {cfg.out}/")
    common.end_processes()


def n_replay(cfg):
    """Replayed texts a batch: the share --replay_ratio asks for, to the nearest whole prompt."""
    captions, texts = map(int, cfg.replay_ratio.split(":"))
    n = round(cfg.batch_size * texts / (captions + texts))
    if n == cfg.batch_size or texts and n == 0:
        raise SystemExit(f"--replay_ratio {cfg.replay_ratio} needs a larger --batch_size")
    return n


def mixed_batch(rows, replay, step, cfg):
    """Captions, then replayed texts, in the same proportion in every batch."""
    texts = common.batch_of(replay, step, n_replay(cfg), cfg.seed) if n_replay(cfg) else []
    return common.batch_of(rows, step, cfg.batch_size - len(texts), cfg.seed) + texts


def choose_replay(model, encoder, rows, cfg):
    """The "high-quality" text rows of MSRL 4.2. UNSPECIFIED: how they are chosen. Ours are those
    where the starting model names the label in both orders: label and judge vouch for each other,
    so a noisy label, the usual fault of large text sets, is unlikely to be replayed."""
    rows = common.batch_of(rows, 0, min(cfg.replay_candidates, len(rows)), cfg.seed)
    preds = common.judge(model, encoder, rows, sample_group, FORM, batch_size=cfg.eval_batch,
                         max_new_tokens=cfg.max_new_tokens, desc="choosing texts to replay")
    wrong = {p["row"] for p in preds if p["pred"] != rows[p["row"]]["label"]}
    good = [row for i, row in enumerate(rows) if i not in wrong]
    if common.rank() == 0:
        print(f"{cfg.replay}: {len(good)} of {len(rows)} rows good enough to replay, "
              f"{n_replay(cfg)} of {cfg.batch_size} prompts in every batch")
    if not good:
        raise SystemExit(f"{cfg.replay}: {cfg.model} judges none of {len(rows)} rows right in both "
                         "orders; start from a better model, or --replay_ratio 1:0")
    return good


if __name__ == "__main__":
    main()
