"""
Stage 2b: cross-modal knowledge distillation (MSRL 4.2, Eq. 5). The model that judges captions
teaches itself to judge pixels: what it wrote when it read the caption becomes what it is to write
when it sees the image.

    python stage2b_cmkd.py                                       # toy world, from stage 2
    torchrun --nproc_per_node=8 stage2b_cmkd.py --preset paper

    sample    n = 8 rationales a row, given its caption                  Eq. 5       distill
    select    majority verdict, agreeing, well-formed, most confident    4.2, 1)-3)  select
    train     SFT on [<caption>c</caption>, o*], given only the pixels   4.2         stage 0's loop

No gold label is used up to here: rows carry it along for the report alone.
"""

from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from tqdm import tqdm

import common
from stage0_sft import finetune
from stage1_text_grpo import knob, sample_group
from stage2_caption_grpo import HELDOUT


@dataclass
class Config:
    model: str = knob("runs/stage2_caption_grpo", "teacher, and the student's starting point")
    data: str = knob("toy/caption_rl.jsonl:900,toy/text_rl.jsonl:300", "rows with media and "
                     "captions; text rows among them are distilled as they are. DEVIATION: the "
                     "paper has none. On the toy world text fell to 51 without, 98 with them")
    heldout: str = knob(HELDOUT, "rows judged before and after; '' for none")
    out: str = knob("runs/stage2b_cmkd", "run folder; the same command resumes it")
    seed: int = knob(0, "of sampling and of the order of rows and sides")
    samples: int = knob(8, "n, rationales a row (paper: 8)")
    temperature: float = knob(1.0, "of sampling (UNSPECIFIED)")
    rollout_batch: int = knob(32, "rows sampled together, over all processes; results are written "
                              "after each such batch")
    form: Literal["pixels", "caption"] = knob("pixels", "what the student is shown; the teacher "
                                              "reads captions")
    freeze_vision: bool = knob(False, "freeze vision tower and projector (paper: no)")
    epochs: int = knob(3, "passes over the distilled rows (UNSPECIFIED; the released script: 1)")
    batch_size: int = knob(32, "rows an optimiser step, over all processes (paper: 128)")
    micro_batch: int = knob(16, "rows a forward; changes memory, not the gradient")
    lr: float = knob(2e-4, "AdamW, warm-up over 3 %% of the steps, then constant (paper: 2e-6)")
    max_grad_norm: float = knob(1.0, "gradient norm clip")
    max_prompt_tokens: int = knob(2048, "longer prompts are skipped and counted, never cut")
    max_new_tokens: int = knob(160, "of the sampled rationales, longer ones count as malformed; "
                               "and of held-out answers")
    frames: int = knob(8, "frames a video, evenly spaced")
    max_tiles: int = knob(12, "tiles an image; fewer save memory")
    gradient_checkpointing: bool = knob(False, "recompute activations: slower, far less memory")
    eval_batch: int = knob(128, "judgements decoded together")
    save_every: int = knob(100, "steps between saved states")
    skip_bad_rows: bool = knob(False, "leave bad rows out and count them instead of stopping")
    exclude: str = knob("", "benchmark files; training rows that are in them too are left out "
                        "(the paper's S1 is built from VL-RewardBench's sources)")


PAPER = dict(data="runs/stage2_caption_grpo/captioned.jsonl", heldout="", lr=2e-6,
             batch_size=128, micro_batch=1, epochs=1,
             max_prompt_tokens=8192, max_new_tokens=1024, gradient_checkpointing=True)


def select(texts, confidences):
    """n sampled answers of one row and the confidence of each -> (index of o*, None), or (None,
    why the row is dropped). Sees no label."""
    verdicts = [common.parse(t).verdict for t in texts]
    votes = Counter(v for v in verdicts if v is not None)
    if not votes:
        return None, "no verdict"
    if votes["A"] == votes["B"]:  # UNSPECIFIED: mode() of a tie; without a majority no pseudo-label
        return None, "tie"
    pseudo = votes.most_common(1)[0][0]                                   # 1) w^ = mode(w_1..w_n)
    agree = [j for j, v in enumerate(verdicts) if v == pseudo]            #    the others go
    formed = [j for j in agree if common.parse(texts[j]).well_formed]     # 2) format
    if not formed:
        return None, "malformed"
    return max(formed, key=lambda j: confidences[j]), None                # 3) most confident


def distill(model, encoder, rows, cfg):
    """n answers and their confidences for every row. samples.jsonl grows batch by batch, so a
    killed run goes on where it was. UNSPECIFIED: what confidence is; ours is the mean log-prob of
    an answer's tokens, end-of-sequence included. -> a list parallel to rows."""
    device = next(model.parameters()).device
    path = Path(cfg.out, "samples.jsonl")
    made_by = {k: getattr(cfg, k) for k in ("model", "seed", "samples", "temperature", "frames",
                                            "rollout_batch", "max_new_tokens", "max_tiles")}
    mark = common.mark_of({**made_by, "checkpoint": common.stamps(cfg.model)}, rows)
    was, *done = common.whole_lines(path) or [mark]
    if was != mark:
        raise SystemExit(f"{path} was sampled by {was[0]}, or from other rows. Take another --out, "
                         "or delete it.")
    if len(done) < len(rows):
        done = done[:len(done) // cfg.rollout_batch * cfg.rollout_batch]  # whole batches
    if common.rank() == 0:
        common.write_lines(path, [mark, *done])
    for at in tqdm(range(len(done), len(rows), cfg.rollout_batch), unit="batch", mininterval=1,
                   desc="sampling rationales", disable=common.rank() > 0):
        mine = range(at + common.rank(), min(at + cfg.rollout_batch, len(rows)), common.world())
        generator = torch.Generator(device).manual_seed(
            (cfg.seed * 1_000_003 + at) * 1009 + common.rank())
        some = []
        if mine:
            answers = sample_group(model, encoder, [encoder(rows[i], "caption") for i in mine],
                                   cfg.samples, cfg.temperature, cfg.max_new_tokens, generator)
        for k, i in enumerate(mine):
            its = slice(k * cfg.samples, (k + 1) * cfg.samples)
            some.append({"row": i, "id": rows[i]["id"],
                         "texts": [encoder.decode(ids) for ids in answers.ids[its]],
                         "confidences": [sum(p) / len(p) for p in answers.logp[its]]})
        some = sorted(common.gather_list(some), key=lambda s: s["row"])
        done += some
        if common.rank() == 0:
            for s in some:
                common.append(path, s)
    return done


def distilled(rows, samples):
    """-> rows whose label is the pseudo-label and whose rationale is o*'s, and the report."""
    kept, counts = [], Counter(rows=len(rows))
    right = 0
    for row, s in zip(rows, samples):
        best, why = select(s["texts"], s["confidences"])
        counts[why or "kept"] += 1
        if best is None:
            continue
        text = s["texts"][best]
        label = common.parse(text).verdict
        right += label == row["label"]  # for information only
        kept.append({**row, "label": label, "confidence": s["confidences"][best],
                     "rationale": text.partition("<think>")[2].partition("</think>")[0].strip()})
    return kept, {**counts, "pseudo-label accuracy": right / max(len(kept), 1)}


def target_text(row):
    """[c, o*]: the caption, then the rationale and the verdict."""
    think = f"<think>\n{row['rationale']}\n</think>\n<answer>\n{row['label']}\n</answer>"
    return common.caption_text(row) + think


def main():
    cfg = common.parse_config(Config, __doc__, PAPER)
    device = common.start_processes(cfg.batch_size)
    state = common.open_run(cfg.out, cfg)
    if common.trained_style(cfg.model) != "msrl":
        raise SystemExit(f"{cfg.model} was trained with --style r1; a <caption> belongs to MSRL's "
                         "templates only.")
    model, encoder = common.load(cfg.model, device, made_by="python stage2_caption_grpo.py",
                                 frames=cfg.frames, max_tiles=cfg.max_tiles)
    # both forms are checked now, not after hours of sampling: the student's, then the teacher's
    seen = common.load_rows(cfg.data, encoder, cfg.form, cfg.max_prompt_tokens, cfg.skip_bad_rows,
                            cfg.exclude)
    rows = [r for r in seen if r["captions"] or not r["media"]]
    if not rows:
        raise SystemExit(f"{cfg.data}: no row has captions; --captioner of stage 2 makes them.")
    if common.rank() == 0 and len(rows) < len(seen):
        print(f"{len(seen) - len(rows)} rows without captions left out")
    # the sides by a coin: the teacher may have a favourite, the labels' order is not to be trusted
    rows = [common.swap(r) if common.coin("cmkd", cfg.seed, r["id"]) else r for r in rows]
    rows, report = distilled(rows, distill(model, encoder, rows, cfg))
    if common.rank() == 0:
        print("distilled: " + ", ".join(f"{k} {v:.3g}" if isinstance(v, float) else f"{k} {v}"
                                        for k, v in report.items()))
        common.write_lines(Path(cfg.out, "cmkd.jsonl"), [
            {**r, "media": [str(Path(m).resolve()) for m in r["media"]]} for r in rows])
    if not rows:
        raise SystemExit(f"{cfg.model} gave no usable rationale: {report}; see samples.jsonl")
    heldout = common.load_rows(cfg.heldout, encoder, cfg.form, cfg.max_prompt_tokens,
                               cfg.skip_bad_rows) if cfg.heldout else []
    finetune(model, encoder, rows, target_text, heldout, state, cfg, stage="stage2b_cmkd",
             may_swap=lambda row: False)  # o* is what the teacher wrote about this order
    common.end_processes()


if __name__ == "__main__":
    main()
