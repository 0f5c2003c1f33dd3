"""
Stage 0: supervised fine-tuning on rationales (MSRL 4.1, A.2). Teaches the answer format,
<think> rationale </think> <answer> A or B </answer>, and with it the annotators' taste and biases.

    python stage0_sft.py                            # toy world
    python stage0_sft.py --preset paper             # InternVL3.5 on nvidia/HelpSteer3
    python stage0_sft.py --target label             # Eq. 2: the label alone, the paper's baseline

The loss is the mean negative log-likelihood of the answer's tokens, its end-of-sequence token
included and the prompt's tokens not.
"""

import math
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

import torch
import torch.nn.functional as F
from tqdm import tqdm

import common
from stage1_text_grpo import evaluate, knob


@dataclass
class Config:
    model: str = knob("toy/backbone", "checkpoint to start from")
    data: str = knob("toy/sft.jsonl", "preference rows with rationales, or HelpSteer3 (paper: 40k)")
    heldout: str = knob("toy/heldout_text.jsonl", "rows judged before and after; '' for none")
    out: str = knob("runs/stage0_sft", "run folder; the same command resumes it")
    seed: int = knob(0, "of the order of rows and of sides")
    target: Literal["rationale", "label"] = knob(
        "rationale", "'rationale', or 'label': Eq. 2, the generative baseline")
    style: Literal["msrl", "r1"] = knob("msrl", "prompt and answer: 'msrl' (A/B, Figures 4-7) or "
                                        "'r1' (1/2, R1-Reward's Table 1; no generation rows)")
    form: Literal["pixels", "caption"] = knob("pixels", "'caption': captions in place of media")
    freeze_vision: bool = knob(True, "freeze vision tower and projector (paper: yes, text only)")
    epochs: int = knob(3, "passes over the rows (paper: 3; 1 for the label baseline)")
    batch_size: int = knob(32, "rows an optimiser step, over all processes (paper: 128)")
    micro_batch: int = knob(32, "rows a forward; changes memory, not the gradient")
    lr: float = knob(2e-4, "AdamW, warm-up over 3 %% of the steps, then constant (paper: 1e-5)")
    max_grad_norm: float = knob(1.0, "gradient norm clip")
    max_prompt_tokens: int = knob(2048, "longer prompts are skipped and counted, never cut")
    max_new_tokens: int = knob(112, "of the held-out answers")
    gradient_checkpointing: bool = knob(False, "recompute activations: slower, far less memory")
    eval_batch: int = knob(128, "judgements decoded together")
    save_every: int = knob(100, "steps between saved states")
    skip_bad_rows: bool = knob(False, "leave bad rows out and count them instead of stopping")


PAPER = dict(model="OpenGVLab/InternVL3_5-8B-HF", data="nvidia/HelpSteer3", heldout="", lr=1e-5,
             batch_size=128, micro_batch=1, max_prompt_tokens=4096, max_new_tokens=1024,
             gradient_checkpointing=True)


def target_text(row, target, style="msrl"):
    """What the model learns to answer."""
    answer = f"<answer>\n{row['label']}\n</answer>"
    if target == "label":
        return common.in_style(answer, style)                             # w = l in Eq. 2
    return common.in_style(f"<think>\n{row['rationale'].strip()}\n</think>\n{answer}", style)


def collate(prompts, answers, pad_id, device):
    """b prompts and their answers' ids -> ids [b, L], mask [b, L], labels [b, L] (-100 outside the
    answer), pixels or None. Prompt on the left, answer right after it, padding on the right."""
    whole = [p.ids + a for p, a in zip(prompts, answers)]
    width = max(map(len, whole))
    pad = lambda x, fill: x + [fill] * (width - len(x))
    ids = torch.tensor([pad(w, pad_id) for w in whole], device=device)
    mask = torch.tensor([pad([1] * len(w), 0) for w in whole], device=device)
    labels = torch.tensor([pad([-100] * len(p.ids) + a, -100) for p, a in zip(prompts, answers)],
                          device=device)
    pixels = [p.pixels for p in prompts if p.pixels is not None]
    return ids, mask, labels, torch.cat(pixels).to(device) if pixels else None


def answer_nll(model, ids, mask, labels, pixels):
    """-> summed negative log-likelihood of the answer tokens, and how many there are."""
    media = {} if pixels is None else {"pixel_values": pixels}
    # the head is applied from the first column on that any answer has
    keep = labels.shape[1] - int((labels >= 0).any(0).nonzero()[0])
    with common.autocast(ids.device):
        logits = model(input_ids=ids, attention_mask=mask, use_cache=False,
                       logits_to_keep=keep + 1, **media).logits                # [b, keep+1, V]
    nll = F.cross_entropy(logits[:, :-1].flatten(0, 1).float(), labels[:, -keep:].flatten(),
                          ignore_index=-100, reduction="sum")
    return nll, (labels >= 0).sum().item()


def main():
    cfg = common.parse_config(Config, __doc__, PAPER)
    device = common.start_processes(cfg.batch_size)
    state = common.open_run(cfg.out, cfg)
    model, encoder = common.load(cfg.model, device, style=cfg.style)

    limits = cfg.form, cfg.max_prompt_tokens, cfg.skip_bad_rows
    rows = common.load_rows(cfg.data, encoder, *limits)
    if cfg.target == "rationale":
        told = [r for r in rows if r.get("rationale")]
        if not told:
            raise SystemExit(f"{cfg.data}: no row has a 'rationale'; other rows, or --target label")
        if common.rank() == 0 and len(told) < len(rows):
            print(f"{len(rows) - len(told)} rows without a rationale left out")
        rows = told
    heldout = common.load_rows(cfg.heldout, encoder, *limits) if cfg.heldout else []
    finetune(model, encoder, rows, lambda row: target_text(row, cfg.target, cfg.style), heldout,
             state, cfg, stage="stage0_sft",
             may_swap=common.can_swap if cfg.target == "rationale" else lambda row: True)
    common.end_processes()


def finetune(model, encoder, rows, target, heldout, state, cfg, stage, may_swap):
    """Epochs over `rows`, each row's answer being target(row), its order a coin if may_swap(row);
    resumes from `state`; writes the checkpoint with held-out results before and after. Stage 2b
    trains with it, too."""
    device = next(model.parameters()).device
    if cfg.freeze_vision:
        common.freeze_vision(model)
    if cfg.gradient_checkpointing:
        model.gradient_checkpointing_enable()
    trainable = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trainable, lr=cfg.lr, betas=(0.9, 0.95), weight_decay=0.0)
    steps = max(1, cfg.epochs * len(rows) // cfg.batch_size)
    warmup = max(1, round(0.03 * steps))
    start, before = 0, None
    if state is not None:
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        start, before = state["step"], state["before"]
    elif heldout:
        before = evaluate(model, encoder, heldout, cfg, "before", cfg.form)

    mine = slice(common.rank(), None, common.world())
    bar = tqdm(range(start, steps), initial=start, total=steps, desc=stage,
               disable=common.rank() > 0, mininterval=2)
    for step in bar:
        began = time.time()
        batch = common.batch_of(rows, step, cfg.batch_size, cfg.seed, may_swap)[mine]
        for group in optimizer.param_groups:
            group["lr"] = cfg.lr * min(1, (step + 1) / warmup)
        if cfg.gradient_checkpointing:
            model.train()
        parts = [batch[i:i + cfg.micro_batch] for i in range(0, len(batch), cfg.micro_batch)]
        parts = [collate([encoder(row, cfg.form) for row in part],
                         [encoder.answer_ids(target(row)) for row in part], encoder.pad_id, device)
                 for part in parts]
        # one normaliser for all micro-batches and processes: the gradient of the mean over tokens
        tokens, = common.sum_over_ranks(sum((part[2] >= 0).sum().item() for part in parts))
        nll = 0.0
        for part in parts:
            loss = answer_nll(model, *part)[0] / tokens
            loss.backward()
            nll += loss.item()
        common.sum_gradients(trainable)
        norm = torch.nn.utils.clip_grad_norm_(trainable, cfg.max_grad_norm).item()
        if not math.isfinite(norm):
            raise SystemExit(f"step {step + 1}: the gradient is not a number; go on from the last "
                             "saved state with a smaller --lr.")
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        nll, = common.sum_over_ranks(nll)
        bar.set_postfix(loss=f"{nll:.3f}", refresh=False)
        if common.rank() == 0:
            seconds = time.time() - began
            common.append(Path(cfg.out, "metrics.jsonl"), {
                "step": step + 1, "loss": nll, "grad_norm": norm, "num_tokens": tokens,
                "step_time": seconds, "peak_memory_gb": common.peak_memory_gb()})
            if (step + 1) % cfg.save_every == 0 or step + 1 == steps:
                common.save_state(cfg.out, model, optimizer, step + 1, cfg, before=before)

    after = evaluate(model, encoder, heldout, cfg, "after", cfg.form) if heldout else None
    if common.rank() == 0:
        common.save_checkpoint(cfg.out, model, encoder, stage=stage, parent=cfg.model, step=steps,
                               config=asdict(cfg), heldout={"before": before, "after": after})
        print(f"wrote {cfg.out}/")


if __name__ == "__main__":
    main()
