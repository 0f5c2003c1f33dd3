"""
Stage 0: supervised fine-tuning on rationales (MSRL 4.1, A.2). Teaches the answer format,
<think> rationale </think> <answer> A or B </answer>, and with it the annotators' taste and biases.

    python stage0_sft.py                            # toy world
    python stage0_sft.py --preset paper             # InternVL3.5 on nvidia/HelpSteer3
    python stage0_sft.py --target label             # Eq. 2: the label alone, the paper's baseline
    python stage0_sft.py --preset r1                # R1-Reward's cold start; its RL is in stage 3

The loss is the mean negative log-likelihood of the answer's tokens, its end-of-sequence token
included and the prompt's tokens not.
"""

import math
import re
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Literal

import torch
import torch.nn.functional as F

import common
import sharding
from common import knob
from data import TABLE_5, load_rows

STAGE = Path(__file__).stem


@dataclass
class Config:
    # the first five to turn
    target: Literal["rationale", "label"] = knob(
        "rationale", "'rationale', or 'label': Eq. 2, the generative baseline")
    lr: float = knob(2e-4, "AdamW, warm-up over 3 %% of the steps, then constant (paper: 1e-5)")
    epochs: int = knob(3, "passes over the rows (paper: 3; 1 for the label baseline)")
    batch_size: int = knob(32, "rows per optimiser step, over all processes (paper: 128)")
    data: str = knob("toy/sft.jsonl", "preference rows with rationales, or HelpSteer3 (paper: 40k)")

    # data
    model: str = knob("toy/backbone", "checkpoint to start from")
    heldout: str = knob("toy/heldout_text.jsonl", "rows judged before and after; '' for none")
    out: str = knob("runs/stage0_sft", "run folder; the same command resumes it")
    seed: int = knob(0, "of the order of rows and of sides")
    style: Literal["msrl", "r1"] = knob("msrl", "prompt and answer: 'msrl' (A/B, Figures 4-7) or "
                                        "'r1' (1/2, R1-Reward's Table 1; no generation rows)")
    form: Literal["pixels", "caption"] = knob("pixels", "'caption': captions in place of media")
    frames: int = knob(8, "frames per video, evenly spaced")
    max_tiles: int = knob(12, "tiles per image; fewer save memory")
    max_pixels: int = knob(0, "of an image for Qwen-VL, kept by the checkpoint for what follows; "
                           "0: as it says (MSRL's script: 1003520, R1-Reward's: 501760)")
    max_prompt_tokens: int = knob(2048, "longer prompts are skipped and counted, never cut")
    skip_bad_rows: bool = knob(False, "leave bad rows out and count them instead of stopping")
    media_root: str = knob("", "folders, separated by commas, where rows' media may lie, too; else "
                           "in that of their file")
    exclude: str = knob("", "benchmark files; training rows that are in them too are left out "
                        "(the paper's S1 is built from VL-RewardBench's sources)")

    # optimiser
    micro_batch: int = knob(8, "rows per forward; changes memory, not the gradient")
    max_grad_norm: float = knob(1.0, "gradient norm clip")
    freeze_vision: bool = knob(True, "freeze vision tower and projector (paper: yes, text only)")
    lora_rank: int = knob(0, "train a LoRA adapter of this rank, not the weights; 0 = off. On all "
                          "linear layers but the head, those of the vision tower unless it is "
                          "frozen. Needs peft, and about 10 times the --lr (UNSPECIFIED in MSRL)")
    gradient_checkpointing: bool = knob(False, "recompute activations: slower, far less memory")
    shard: Literal["auto", "yes", "no"] = knob(
        "auto", "FSDP2: split weights, gradients, optimiser state and KL reference among the "
        "processes of torchrun. 'auto': if a replica does not fit the card, as --dry_run tells it")

    # evaluation on held-out rows, and saved states
    max_new_tokens: int = knob(112, "of the held-out answers; targets with more are counted")
    eval_batch: int = knob(128, "judgements decoded together")
    save_every: int = knob(100, "steps between saved states")
    tracker: Literal["none", "tensorboard", "wandb", "trackio"] = knob(
        "none", "draws the curves of metrics.jsonl elsewhere, too, if it is installed")


# MSRL A.2: 1e-5, 128, 3 epochs; 5.1: 40k rows of HelpSteer3
PAPER = dict(**common.BACKBONES["internvl"], data="nvidia/HelpSteer3", heldout="", lr=1e-5,
             batch_size=128, epochs=3, micro_batch=1, max_prompt_tokens=4096, max_new_tokens=1024,
             gradient_checkpointing=True, skip_bad_rows=True, eval_batch=4)
# The generative baseline (A.2): one epoch over all labelled multimodal rows, those of stages 2 and
# 3 together, with pixels and a vision tower that learns
PAPER_LABEL = dict(data=TABLE_5.format(13000, 5000, 5219, 6666, 5000, 4595), epochs=1,
                   freeze_vision=False, max_prompt_tokens=8192)


def paper(args):
    """What --preset paper takes, which depends on --target."""
    return PAPER | (PAPER_LABEL if args.target == "label" else {})


# What both stages of R1-Reward share. UNSPECIFIED in the paper, from its train.sh, which is for RL:
# pixels, both budgets of tokens, a vision tower that learns.
R1_REWARD = dict(style="r1", heldout="", max_pixels=501_760, max_prompt_tokens=20_480,
                 max_new_tokens=1024, freeze_vision=False, micro_batch=1,
                 gradient_checkpointing=True, skip_bad_rows=True)
# R1-Reward 5: "QwenVL-2.5-7B-Instruct", 1 epoch, 1e-5, 256.
# DEVIATION: its 200k rows with GPT-4o's reasoning (4.3) are not released. `eval.py --attempts 3
# --style r1 --out runs/r1/annotated.jsonl` makes such rows of yours, with --api by a served model.
R1_SFT = R1_REWARD | dict(model="Qwen/Qwen2.5-VL-7B-Instruct", data="runs/r1/annotated.jsonl",
                          epochs=1, lr=1e-5, batch_size=256)
# R1-Reward 5, for stage 3: 1e-6, KL 0, 256 prompts a rollout and 128 an update, 5 epochs. 4.1: the
# advantages of REINFORCE++, the 3-sigma filter. 4.3: its reward. train.sh: one answer a prompt,
# temperature 1, pre-clip at 1e3, clip 0.2, means over answers.
# The published rows are those that took GPT-4o two attempts or more, 17,261; so --min_attempts 2,
# which is for rows of eval.py --attempts, has nothing left to do.
# UNSPECIFIED: the schedule. Ours is constant, train.sh's a cosine down to a tenth.
# DEVIATION: the referee is a text model. R1-Reward's is Qwen2.5-VL-7B-Instruct, and reads text.
R1_RL = R1_REWARD | dict(model="runs/stage0_sft", data="yifanzhang114/R1-Reward-RL",
                         lr=1e-6, beta=0.0, batch_size=256, mini_batch=128,
                         max_steps=5 * 17_261 // 256, group_size=1, advantage="batch",
                         sigma=3.0, reward="r1", referee="Qwen/Qwen2.5-7B-Instruct",
                         temperature=1.0, pre_clip=1e3, clip_low=0.2, clip_high=0.2,
                         normaliser="sequence", rollout_batch=16, save_every=50)

PRESETS = {"paper": paper, "r1": R1_SFT}


def answer_nll(model, ids, mask, positions, labels, media):
    """-> summed negative log-likelihood of the answer tokens, and how many there are."""
    # the head is applied from the first column on that any answer has
    keep = labels.shape[1] - int((labels >= 0).any(0).nonzero()[0])
    with common.autocast(ids.device):
        logits = model(input_ids=ids, attention_mask=mask, position_ids=positions, use_cache=False,
                       logits_to_keep=keep + 1, **media).logits                # [b, keep+1, V]
    nll = F.cross_entropy(logits[:, :-1].flatten(0, 1).float(), labels[:, -keep:].flatten(),
                          ignore_index=-100, reduction="sum")
    return nll, (labels >= 0).sum().item()


def target_text(row, target, style="msrl"):
    """What the model learns to answer."""
    answer = f"<answer>\n{row['label']}\n</answer>"                        # w = l in Eq. 2
    if target == "rationale":
        answer = f"<think>\n{row['rationale'].strip()}\n</think>\n{answer}"
    return in_style(answer, style)


def collate(prompts, answers, pad_id, device):
    """b prompts and their answers' ids -> ids [b, L], mask [b, L], positions [b, L] (Qwen-VL:
    [3, b, L]), labels [b, L] (-100 outside the answer), media. Prompt on the left, answer right
    after it, padding on the right."""
    width = max(len(p.ids) + len(answer) for p, answer in zip(prompts, answers, strict=True))
    ids, mask, positions, labels = [], [], [], []
    for prompt, answer in zip(prompts, answers, strict=True):
        length = len(prompt.ids) + len(answer)
        padding = width - length
        ids.append(prompt.ids + answer + [pad_id] * padding)
        mask.append([1] * length + [0] * padding)
        after = prompt.following(width - len(prompt.ids))
        after = after.expand(*prompt.positions.shape[:-1], -1)
        positions.append(torch.cat([prompt.positions, after], -1))
        labels.append([-100] * len(prompt.ids) + answer + [-100] * padding)
    return (torch.tensor(ids, device=device), torch.tensor(mask, device=device),
            torch.stack(positions, -2).to(device), torch.tensor(labels, device=device),
            common.media_of(prompts, device))


def finetune(model, encoder, rows, target, heldout, state, cfg, stage, may_swap, sample):
    """Epochs over `rows`, each row's answer being target(row), its order a coin if may_swap(row);
    resumes from `state`; writes the checkpoint with held-out results before and after. `sample`
    writes the held-out answers. Stage 2b trains with it, too."""
    device = next(model.parameters()).device
    if cfg.freeze_vision:
        common.freeze_vision(model)
    if cfg.lora_rank:
        common.add_adapter(model, cfg.lora_rank, cfg.seed)
    if cfg.gradient_checkpointing:
        model.gradient_checkpointing_enable()
    warn_of_long_targets(rows, target, encoder, cfg)
    optimizer = common.make_optimizer(model, cfg.lr)
    steps = max(1, cfg.epochs * len(rows) // cfg.batch_size)
    warmup = max(1, round(0.03 * steps))
    start, kept = common.resume(state, model, optimizer)
    if state is None and heldout:
        kept["before"] = common.evaluate(model, encoder, heldout, cfg, "before", cfg.form, sample)

    mine = slice(common.rank(), None, common.world())
    bar = common.progress(start, steps, stage)
    for step in bar:
        began = time.time()
        batch = common.batch_of(rows, step, cfg.batch_size, cfg.seed, may_swap)[mine]
        for group in optimizer.param_groups:
            group["lr"] = cfg.lr * min(1, (step + 1) / warmup)
        if cfg.gradient_checkpointing:
            model.train()
        pairs = [(encoder(row, cfg.form), encoder.answer_ids(target(row))) for row in batch]
        # a step's gradient is a sum, in any order; rows of like lengths have less padding
        pairs.sort(key=lambda pair: len(pair[0].ids) + len(pair[1]), reverse=True)
        parts, tokens = [], 0
        for at in range(0, len(pairs), cfg.micro_batch):
            prompts, answers = zip(*pairs[at:at + cfg.micro_batch], strict=True)
            parts.append(collate(prompts, answers, encoder.pad_id, device))
            tokens += sum(map(len, answers))
        del pairs, prompts, answers  # their pixels are in `parts`
        # one normaliser for all micro-batches and processes: the gradient of the mean over tokens
        tokens, = common.sum_over_ranks(tokens)
        nll = 0.0
        for part in parts:
            loss = answer_nll(model, *part)[0] / tokens
            loss.backward()
            nll += loss.item()
        norm = common.optimizer_step(optimizer, common.trainable(model), cfg.max_grad_norm)
        nll, = common.sum_over_ranks(nll)
        bar.set_postfix(loss=f"{nll:.3f}", refresh=False)
        stop = bar.stop_asked()  # SIGTERM
        if common.rank() == 0:
            common.log_step(cfg.out, {
                "step": step + 1, "loss": nll, "grad_norm": norm,
                "skipped_steps": int(not math.isfinite(norm)), "num_tokens": tokens,
                "step_time": time.time() - began, "peak_memory_gb": common.peak_memory_gb(),
                **common.first_change(optimizer)}, cfg.tracker)
        if stop or (step + 1) % cfg.save_every == 0 or step + 1 == steps:
            common.save_state(cfg.out, model, optimizer, step + 1, cfg, **kept)
        if stop:
            common.end_stopped(cfg.out, step + 1)

    after = None
    if heldout:
        after = common.evaluate(model, encoder, heldout, cfg, "after", cfg.form, sample)
    common.save_checkpoint(cfg.out, model, encoder, stage=stage, parent=cfg.model, step=steps,
                           config=asdict(cfg),
                           heldout={"before": kept.get("before"), "after": after})
    if common.rank() == 0:
        print(f"wrote {cfg.out}/")


def warn_of_long_targets(rows, target, encoder, cfg):
    """Answers that are taught but longer than what is sampled later would all be cut."""
    long = 0
    for row in rows:
        long += len(encoder.answer_ids(target(row))) > cfg.max_new_tokens
    if long and common.rank() == 0:
        print(f"{long} of {len(rows)} targets have more than --max_new_tokens "
              f"{cfg.max_new_tokens} tokens: an answer as long as they are is cut when it is "
              "sampled with this budget, and so earns nothing in the stages to come")


def main():
    cfg = common.parse_config(Config, __doc__, PRESETS)
    device = common.start_processes(cfg.batch_size)
    state = common.open_run(cfg.out, cfg)
    shards = sharding.wanted(cfg, device)
    model, encoder = common.load(cfg.model, device, made_by=Config.model, shards=shards,
                                 style=cfg.style, frames=cfg.frames, max_tiles=cfg.max_tiles,
                                 max_pixels=cfg.max_pixels)
    if shards:
        sharding.shard(model, cfg, device)

    limits = cfg.form, cfg.max_prompt_tokens, cfg.skip_bad_rows, cfg.media_root
    rows = load_rows(cfg.data, encoder, *limits, cfg.exclude)
    if cfg.target == "rationale":
        with_rationale = [row for row in rows if row.get("rationale")]
        if not with_rationale:
            raise SystemExit(f"{cfg.data}: no row has a 'rationale'; other rows, or --target label")
        if common.rank() == 0 and len(with_rationale) < len(rows):
            unclear = sum("unclear_rationale" in row for row in rows)
            print(f"{len(rows) - len(with_rationale)} rows without a rationale left out, {unclear} "
                  "of them because theirs names a response by its place")
        rows = with_rationale
    heldout = load_rows(cfg.heldout, encoder, *limits) if cfg.heldout else []

    def target(row):
        return target_text(row, cfg.target, cfg.style)

    def may_swap(row):
        return cfg.target == "label" or can_swap(row)
    finetune(model, encoder, rows, target, heldout, state, cfg, STAGE, may_swap,
             generate_greedily)
    common.end_processes()


def in_style(text, style):
    """An answer that is to be learned, in the style that is asked for: in "r1" 1 and 2 stand for A
    and B, in the verdict and wherever a candidate is named."""
    if style != "r1":
        return text

    def with_digits(match):
        return re.sub(r"\b[AB]\b", lambda side: {"A": "1", "B": "2"}[side[0]], match[0])
    named = r"(?:<answer>\s*|\b(?i:response|answer|assistant|chatbot)s? )[AB]\b"
    return re.sub(named + r"(?: (?:and|or) [AB]\b)?", with_digits, text)


def can_swap(row):
    """False if the rationale names a side in a way that swap() does not change: a bare "B", an "A"
    that is no article, "the first response"."""
    rest = common.SIDES_IN_RATIONALE.sub("", row.get("rationale") or "")
    return not re.search(r"\bB\b|(?<=[a-z] )A\b|\bA\b(?=['’.,:)])|\b(?i:former|latter)\b|"
                         r"\b(?i:first|second) (?i:response|answer|one|image|video)\b",
                         rest)


@torch.no_grad()
def generate_greedily(model, encoder, prompts, group_size=1, temperature=0.0, max_new_tokens=512,
                      generator=None):
    """B prompts -> one greedy answer each, .ids [B][1], by transformers' generate(). It takes the
    arguments of the other stages' sample_group(), because judging asks either of them."""
    assert group_size == 1 and temperature == 0
    model.eval()
    device = next(model.parameters()).device
    ids, mask, positions, media = common.left_pad(prompts, encoder.pad_id, device)    # [B, P]
    more = {}
    if encoder.image_token_id is not None:
        more["suppress_tokens"] = [encoder.image_token_id]
    with common.autocast(device):
        out = model.generate(input_ids=ids, attention_mask=mask, position_ids=positions,
                             max_new_tokens=max_new_tokens, do_sample=False,
                             eos_token_id=encoder.eos_ids, pad_token_id=encoder.pad_id,
                             synced_gpus=False,  # a sharded model is whole in here
                             **media, **more)
    answers = []
    for answer in out[:, ids.shape[1]:].tolist():
        ends = [t for t, token in enumerate(answer) if token in encoder.eos_ids]
        answers.append([answer[:ends[0] + 1] if ends else answer])  # the rest is padding
    return SimpleNamespace(ids=answers, logp=None)


if __name__ == "__main__":
    main()
