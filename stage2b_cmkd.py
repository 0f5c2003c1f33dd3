"""
Stage 2b: cross-modal knowledge distillation (MSRL 4.2, Eq. 5). The model that judges captions
teaches itself to judge pixels: what it wrote when it read the caption becomes what it is to write
when it sees the image.

    python stage2b_cmkd.py                                       # toy world, from stage 2
    torchrun --nproc_per_node=8 stage2b_cmkd.py --preset paper

    sample    n = 8 rationales a row, given its caption                  Eq. 5       distill
    select    majority verdict, agreeing, well-formed, most confident    4.2, 1)-3)  select
    train     SFT on [<caption>c</caption>, o*], given only the pixels   4.2         stage 0's loop

The teacher is asked as Figures 4-7 ask; the student's prompt asks for the <caption> it is to write.

No gold label is used up to here: rows carry it along for the report alone.
"""

import copy
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch

import common
import sharding
from common import knob
from data import load_rows
from stage0_sft import finetune
from stage1_text_grpo import sample_group
from stage2_caption_grpo import HELDOUT

STAGE = Path(__file__).stem


@dataclass
class Config:
    # the first five to turn
    samples: int = knob(8, "n, rationales per row (paper: 8)")
    lr: float = knob(2e-4, "AdamW, warm-up over 3 %% of the steps, then constant (paper: 2e-6)")
    epochs: int = knob(3, "passes over the distilled rows (UNSPECIFIED; the released script: 1)")
    batch_size: int = knob(32, "rows per optimiser step, over all processes (paper: 128)")
    data: str = knob("toy/caption_rl.jsonl:900,toy/text_rl.jsonl:300", "rows with media and "
                     "captions; text rows among them are distilled as they are. DEVIATION: the "
                     "paper has none. On the toy world text fell to 51 without, 98 with them")

    # data
    model: str = knob("runs/stage2_caption_grpo", "teacher, and the student's starting point")
    heldout: str = knob(HELDOUT, "rows judged before and after; '' for none")
    out: str = knob("runs/stage2b_cmkd", "run folder; the same command resumes it")
    seed: int = knob(0, "of sampling and of the order of rows and sides")
    style: Literal["msrl", "caption"] = knob(
        "caption", "the student's prompt: 'caption' asks for the <caption> that is taught "
        "(DEVIATION), 'msrl' (Figures 4-7, the teacher's) does not")
    form: Literal["pixels", "caption"] = knob("pixels", "what the student is shown; the teacher "
                                              "reads captions")
    frames: int = knob(8, "frames per video, evenly spaced")
    max_tiles: int = knob(12, "tiles per image; fewer save memory")
    max_pixels: int = knob(0, "of an image for Qwen-VL, see stage 0; 0: as the checkpoint says")
    max_prompt_tokens: int = knob(2048, "longer prompts are skipped and counted, never cut")
    skip_bad_rows: bool = knob(False, "leave bad rows out and count them instead of stopping")
    media_root: str = knob("", "folders, separated by commas, where rows' media may lie, too; else "
                           "in that of their file")
    exclude: str = knob("", "benchmark files; training rows that are in them too are left out "
                        "(the paper's S1 is built from VL-RewardBench's sources)")

    # sampling
    temperature: float = knob(1.0, "of sampling (UNSPECIFIED)")
    max_new_tokens: int = knob(160, "of the sampled rationales, longer ones count as malformed; "
                               "and of held-out answers")
    rollout_batch: int = knob(32, "rows sampled together, over all processes; results are written "
                              "after each such batch")

    # optimiser
    micro_batch: int = knob(8, "rows per forward; changes memory, not the gradient")
    max_grad_norm: float = knob(1.0, "gradient norm clip")
    freeze_vision: bool = knob(False, "freeze vision tower and projector (paper: no)")
    lora_rank: int = knob(0, "train a LoRA adapter of this rank, not the weights; 0 = off. On all "
                          "linear layers but the head, those of the vision tower unless it is "
                          "frozen. Needs peft, and about 10 times the --lr (UNSPECIFIED in MSRL)")
    gradient_checkpointing: bool = knob(False, "recompute activations: slower, far less memory")
    shard: Literal["auto", "yes", "no"] = knob(
        "auto", "FSDP2: split weights, gradients, optimiser state and KL reference among the "
        "processes of torchrun. 'auto': if a replica does not fit the card, as --dry_run tells it")

    # evaluation on held-out rows, and saved states
    eval_batch: int = knob(128, "judgements decoded together")
    save_every: int = knob(100, "steps between saved states")
    tracker: Literal["none", "tensorboard", "wandb", "trackio"] = knob(
        "none", "draws the curves of metrics.jsonl elsewhere, too, if it is installed")


PAPER = dict(data="runs/stage2_caption_grpo/captioned.jsonl", media_root="data", heldout="",
             lr=2e-6, batch_size=128, micro_batch=1, epochs=1, rollout_batch=8, eval_batch=4,
             max_prompt_tokens=8192, max_new_tokens=1024, gradient_checkpointing=True,
             skip_bad_rows=True)
PRESETS = {"paper": PAPER}


def select(texts, confidences):
    """n sampled answers of one row and the confidence of each -> (index of o*, None), or (None,
    why the row is dropped). Sees no label."""
    answers = [common.parse(text) for text in texts]
    votes = Counter(answer.verdict for answer in answers if answer.verdict is not None)
    if not votes:
        return None, "no verdict"
    if votes["A"] == votes["B"]:  # UNSPECIFIED: mode() of a tie; without a majority no pseudo-label
        return None, "tie"
    pseudo_label = votes.most_common(1)[0][0]                             # 1) w^ = mode(w_1..w_n)
    agreeing = [j for j, answer in enumerate(answers) if answer.verdict == pseudo_label]
    formed = [j for j in agreeing if answers[j].well_formed]              # 2) format
    if not formed:
        return None, "malformed"
    return max(formed, key=lambda j: confidences[j]), None                # 3) most confident


def distill(model, encoder, rows, cfg):
    """n answers and their confidences for every row. samples.jsonl grows batch by batch, so a
    killed run goes on where it was. UNSPECIFIED: what confidence is; ours is the mean log-prob of
    an answer's tokens, end-of-sequence included. UNSPECIFIED: whether the teacher sees the media
    too (Eq. 5: "given s and c"); ours reads the caption alone, as it was trained in stage 2.
    -> a list parallel to rows."""
    device = next(model.parameters()).device
    settings = ("model", "seed", "samples", "temperature", "frames", "rollout_batch",
                "max_new_tokens", "max_tiles", "max_pixels")
    made_by = {name: getattr(cfg, name) for name in settings}
    made_by["checkpoint"] = common.stamps(cfg.model)

    def sample(batch, at):
        mine = range(common.rank(), len(batch), common.world())
        prompts = [encoder(batch[i], "caption") for i in mine]
        generator = torch.Generator(device).manual_seed(
            (cfg.seed * 1_000_003 + at) * 1009 + common.rank())
        samples = []
        if prompts:
            rollout = sample_group(model, encoder, prompts, cfg.samples, cfg.temperature,
                                   cfg.max_new_tokens, generator)
            for i, ids, logps in zip(mine, rollout.ids, rollout.logp, strict=True):
                samples.append({"row": at + i, "id": batch[i]["id"],
                                "texts": [encoder.decode(answer) for answer in ids],
                                "confidences": [sum(logp) / len(logp) for logp in logps]})
        return sorted(common.gather_list(samples), key=lambda s: s["row"])
    with sharding.whole(model):
        return common.resumed(Path(cfg.out, "samples.jsonl"), made_by, rows, sample,
                              cfg.rollout_batch, "sampling rationales")


def distilled(rows, samples):
    """-> rows whose label is the pseudo-label and whose rationale is o*'s, and the report."""
    kept, counts = [], Counter(rows=len(rows))
    right = 0
    for row, sample in zip(rows, samples, strict=True):
        best, why = select(sample["texts"], sample["confidences"])
        counts[why or "kept"] += 1
        if best is None:
            continue
        text = sample["texts"][best]
        label = common.parse(text).verdict
        right += label == row["label"]  # for information only
        kept.append({**row, "label": label, "confidence": sample["confidences"][best],
                     "rationale": text.partition("<think>")[2].partition("</think>")[0].strip()})
    return kept, {**counts, "pseudo-label accuracy": round(right / max(len(kept), 1), 4)}


def caption_text(row):
    """`<caption>` as it stands before the reasoning, two captions headed as in Figures 9 and 11;
    '' for a text row."""
    captions = row["captions"]
    if not row["media"]:
        return ""
    if len(captions) == 2:
        name = "Video" if row["task"].startswith("video") else "Image"
        captions = [f"<{name} {side}>\n{caption}"
                    for side, caption in zip("AB", captions, strict=True)]
    return "<caption>\n" + "\n".join(captions) + "\n</caption>\n"


def target_text(row):
    """[c, o*]: the caption, then the rationale and the verdict."""
    think = f"<think>\n{row['rationale']}\n</think>\n<answer>\n{row['label']}\n</answer>"
    return caption_text(row) + think


def main():
    cfg = common.parse_config(Config, __doc__, PRESETS)
    device = common.start_processes(cfg.batch_size)
    state = common.open_run(cfg.out, cfg)
    if common.trained_style(cfg.model) == "r1":
        raise SystemExit(f"{cfg.model} was trained with --style r1; a <caption> belongs to MSRL's "
                         "templates only.")
    shards = sharding.wanted(cfg, device)
    model, student = common.load(cfg.model, device, made_by=Config.model, shards=shards,
                                 frames=cfg.frames, max_tiles=cfg.max_tiles,
                                 max_pixels=cfg.max_pixels, style=cfg.style)
    if shards:
        sharding.shard(model, cfg, device)
    teacher = copy.copy(student)  # the same model is both; they may be asked in different words
    teacher.style = "msrl"
    # what can fail comes before hours of sampling: both prompts are measured, in their own words
    limits = cfg.form, cfg.max_prompt_tokens, cfg.skip_bad_rows, cfg.media_root
    heldout = load_rows(cfg.heldout, student, *limits) if cfg.heldout else []
    loaded = load_rows(cfg.data, student, *limits, cfg.exclude)
    captioned = [row for row in loaded if row["captions"] or not row["media"]]
    if not captioned:
        raise SystemExit(f"{cfg.data}: no row has captions; --captioner of stage 2 makes them.")
    rows = [row for row in captioned if teacher.check(row, "caption") <= cfg.max_prompt_tokens]
    if not rows:
        raise SystemExit(f"{cfg.data}: with captions every prompt is over {cfg.max_prompt_tokens} "
                         "tokens; raise --max_prompt_tokens.")
    if common.rank() == 0 and len(captioned) < len(loaded):
        print(f"{len(loaded) - len(captioned)} rows without captions left out")
    if common.rank() == 0 and len(rows) < len(captioned):
        print(f"{len(captioned) - len(rows)} rows left out: with captions they are over "
              f"{cfg.max_prompt_tokens} tokens")
    # the sides by a coin: the teacher may have a favourite, the labels' order is not to be trusted
    for i, row in enumerate(rows):
        if common.coin("cmkd", cfg.seed, row["id"]):
            rows[i] = common.swap(row)
    rows, report = distilled(rows, distill(model, teacher, rows, cfg))
    if not rows:
        raise SystemExit(f"{cfg.model} gave no usable rationale: {report}; see samples.jsonl")
    for row in rows:
        row["media"] = [str(Path(path).resolve()) for path in row["media"]]
    if common.rank() == 0:
        print("distilled: " + ", ".join(f"{name} {count}" for name, count in report.items()))
        common.write_lines(Path(cfg.out, "cmkd.jsonl"), rows)
    finetune(model, student, rows, target_text, heldout, state, cfg, STAGE,
             may_swap=lambda row: False,  # o* is what the teacher wrote about this order
             sample=sample_group)
    common.end_processes()


if __name__ == "__main__":
    main()
