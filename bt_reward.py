"""
A Bradley-Terry reward model: one number for one response (MSRL Eq. 1, BaseReward, DT2IT-MRM).

    python bt_reward.py                                          # toy world, all five tasks
    torchrun --nproc_per_node=8 bt_reward.py --preset paper      # MSRL's discriminative baseline
    python bt_reward.py --curate noisy.jsonl --models RM1 RM2 --judges DIR --out runs/curated
    python bt_reward.py --construct prompts.jsonl --teacher DIR --candidates DIR1 DIR2 --out DIR

The language model's head gives way to a small MLP that reads the last token's hidden state:

    input     text, understanding    prompt, media | response
              generation, pair       both media, prompt, which is better? | "Image 1 is better ..."
              generation, swap       one medium, describe | prompt
    reward    r(y|x) = MLP(hidden state of the last token)                   score_group
    loss      -log sigmoid(r(y_w|x) - r(y_l|x))                    Eq. 1     bt_loss

Both responses to a prompt stand in one sequence, [prompt | response A | response B], and cannot see
each other, so prompt and media are computed once: the packed forward of stage 1.

Shapes: b rows in a micro-batch, G responses per prompt, N scores, L tokens, H hidden size.
"""

import json
import math
import random
import re
import sys
import time
from collections import Counter
from dataclasses import asdict, dataclass
from functools import cache
from itertools import combinations, permutations
from pathlib import Path
from types import SimpleNamespace
from typing import Literal

import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import nn
from tqdm import tqdm

import common
from common import knob
from data import TABLE_5, better_first, load_rows, raw_rows
from stage1_text_grpo import pack, sample_group

STAGE = Path(__file__).stem
HELDOUT = ",".join(f"toy/heldout_{task}.jsonl" for task in common.TASKS)


@dataclass
class Config:
    # the first five to turn
    model: str = knob("toy/backbone", "checkpoint to start from; its head is always a new one")
    data: str = knob("toy/text_rl.jsonl:2000,toy/mm_rl.jsonl", "preference rows; file.jsonl:500 "
                     "takes 500, which weighs the sources. BaseReward Table 15: multimodal to "
                     "text 1 : 0.5 is best for multimodal benchmarks")
    out: str = knob("runs/bt_reward", "run folder; the same command resumes it")
    lr: float = knob(5e-4, "AdamW; warm-up over 10 %% of the steps, then a cosine to 0 (DT2IT). "
                     "MSRL, DT2IT: 1e-5; BaseReward: 3e-6")
    epochs: int = knob(10, "passes over the rows (papers: 1)")

    # data
    heldout: str = knob(HELDOUT, "rows scored before and after; '' for none")
    exclude: str = knob("", "benchmark files; training rows that are also in them are left out")
    skip_bad_rows: bool = knob(False, "leave bad rows out and count them instead of stopping")
    t2i: Literal["pair", "swap"] = knob(
        "pair", "generation rows. 'pair': both media in one prompt, the response says which is "
        "better (DT2IT Eq. 3). 'swap': the medium is the prompt and the text the response "
        "(Omni-Reward, Eq. 2); this one can also score single candidates")
    balance_length: bool = knob(False, "drop rows until better is longer as often as shorter "
                                "(BaseReward Table 12: helps where the data is biased, costs a "
                                "little elsewhere)")
    max_prompt_tokens: int = knob(2048, "rows with a longer prompt are skipped and counted")
    max_response_tokens: int = knob(1024, "longer responses are cut here; rows with a cut response "
                                    "are counted; if their two responses are the same after the "
                                    "cut, they are left out")
    frames: int = knob(8, "frames per video, evenly spaced; a reward model remembers its own")
    max_tiles: int = knob(12, "tiles per image; fewer save memory; remembered, too")

    # the head
    head_layers: int = knob(2, "of the reward head, 1 to 5 (BaseReward Table 2: 2; DT2IT: 1)")
    head_activation: Literal["none", "tanh", "relu", "silu"] = knob(
        "silu", "between the head's layers (BaseReward Table 2: silu)")

    # objective
    zero_coefficient: float = knob(0.0, "lambda of mean((r_w + r_l)^2), BaseReward Algorithm 1. "
                                   "Its Figure 1: 0 is best")
    length_norm: bool = knob(False, "r / log(length + 1), BaseReward Algorithm 1. Its Figure 1: no")

    # optimiser
    seed: int = knob(0, "of the head's weights and of the order of rows and sides")
    batch_size: int = knob(32, "rows per optimiser step, over all processes (MSRL, BaseReward: "
                           "128; DT2IT: 512)")
    micro_batch: int = knob(8, "rows per forward pass; changes memory, not the gradient")
    max_grad_norm: float = knob(1.0, "gradient norm clip")
    freeze_vision: bool = knob(False, "freeze vision tower and projector (DT2IT's script: yes)")
    gradient_checkpointing: bool = knob(False, "recompute activations: slower, far less memory")

    # looks and logs
    eval_batch: int = knob(128, "rows scored together")
    save_every: int = knob(100, "steps between saved states")

    # curation
    curate: str = knob("", "noisy preference rows to clean (DT2IT 3.3); writes curated.jsonl")
    models: list[str] = knob([], "reward models that vote on the preference strength, two or more. "
                             "A row is kept if the first of them agrees with its label; with "
                             "--iterations the first is the loop's own model, and these are the "
                             "others")
    judges: list[str] = knob([], "generative checkpoints that re-annotate the other rows, in both "
                             "orders; without judges these rows are dropped")
    iterations: int = knob(0, "T of DT2IT's loop: train on --data, curate a T-th of --curate, "
                           "train on both, curate both, train, and so on (paper: 2)")
    judge_tokens: int = knob(160, "longest answer of a judge, or of any other sampled answer")

    # construction
    construct: str = knob("", 'rows {"id", "task", "prompt", "media", "reference", "responses"} to '
                          "make preference rows of (DT2IT 3.1). 'responses' holds K responses, "
                          "which stay as they are, or none: then --candidates write them")
    teacher: str = knob("", "generative checkpoint that scores (paper: GPT-5.2)")
    candidates: list[str] = knob([], "generative checkpoints that answer. One of them writes all "
                                 "answers to a prompt, so that style tells nothing (paper: six)")
    samples: int = knob(4, "K, responses per row (UNSPECIFIED)")
    low: float = knob(5.0, "if no score is above it, a new answer sees the reference (UNSPECIFIED)")
    high: float = knob(8.0, "if no score is below it, new answers see a noised image (UNSPECIFIED)")
    noise: float = knob(1.0, "std of that noise, in stds of a pixel (UNSPECIFIED)")

    def check(self):
        if not 1 <= self.head_layers <= 5:
            raise ValueError("--head_layers is 1 to 5")
        if self.max_response_tokens < 1:
            raise ValueError("--max_response_tokens is at least 1")
        if self.iterations < 0:
            raise ValueError("--iterations is 0 (no loop) or more")
        if self.iterations and not self.curate:
            raise ValueError("--iterations needs rows to --curate")
        if self.construct and not (self.teacher and self.candidates):
            raise ValueError("--construct needs a --teacher and --candidates")
        if self.construct and self.samples < 2:
            raise ValueError("--samples is at least 2: one response makes no pair")
        # the loop's own model is a voter, too
        voters = len(set(self.models)) + (self.iterations > 0)
        if self.curate and not self.construct and voters < 2:
            raise ValueError("--curate needs two voters, so two --models (with --iterations one): "
                             "reward models made by this script. A model that votes alone would "
                             "agree with every label that it has flipped itself")


# MSRL A.2: one epoch over "the complete set" of labelled multimodal rows, here those of stages 2
# and 3 together, at 1e-5 and 128
PAPER = dict(model="OpenGVLab/InternVL3_5-8B-HF", heldout="", epochs=1, batch_size=128, lr=1e-5,
             data=TABLE_5.format(13000, 5000, 5219, 6666, 5000, 4595), micro_batch=1,
             max_prompt_tokens=8192, judge_tokens=2048, gradient_checkpointing=True,
             skip_bad_rows=True)


# ------------------------------------------------------------------------------------------- model
def reward_head(hidden, layers, activation):
    """An MLP from [N, H] to [N, 1]. UNSPECIFIED: the width of the layers in between; ours is H."""
    kinds = {"none": nn.Identity, "tanh": nn.Tanh, "relu": nn.ReLU, "silu": nn.SiLU}
    parts = []
    for _ in range(layers - 1):
        parts += [nn.Linear(hidden, hidden), kinds[activation]()]
    return nn.Sequential(*parts, nn.Linear(hidden, 1))


def add_head(model, settings):
    """`settings`, see settings_of(), say what the head is and how rows are put to the model."""
    embeddings = model.get_input_embeddings().weight                                   # [V, H]
    head = reward_head(embeddings.shape[1], settings["head_layers"], settings["head_activation"])
    model.reward_head = head.to(embeddings.device)
    model.settings = settings
    return model


def settings_of(config):
    """The part of a run's configuration (a dict) that scoring needs, too."""
    names = ("head_layers", "head_activation", "t2i", "length_norm", "max_response_tokens")
    settings = {name: config[name] for name in names}
    settings["frames"] = config.get("frames", 8)  # checkpoints before these were stored had 8, 12
    settings["max_tiles"] = config.get("max_tiles", 12)
    return settings


def bt_loss(chosen, rejected, zero_coefficient):
    """Scores [b] of the better and [b] of the worse responses -> loss [b]."""
    loss = -F.logsigmoid(chosen - rejected)                                            # Eq. 1
    return loss + zero_coefficient * (chosen + rejected) ** 2                   # Algorithm 1, 10


def score_group(model, encoder, prompts, answers):
    """b prompts and the token ids of their answers [b][G], where G may differ from prompt to prompt
    -> scores [N] in fp32, in the order of the answers."""
    device = next(model.parameters()).device
    ids, positions, sees, _, _, owner, media = pack(prompts, answers, encoder.pad_id, device)
    masks = common.layer_masks(model, sees, positions)
    with common.autocast(device):
        hidden = model.model(input_ids=ids, attention_mask=masks, position_ids=positions,
                             use_cache=False, **media).last_hidden_state               # [b, L, H]
    following = F.pad(owner[:, 1:], (0, 1), value=-1)  # the next token's answer       [b, S]
    last = (owner > 0) & (owner != following)
    hidden = hidden[:, -owner.shape[1]:][last]                                         # [N, H]
    scores = model.reward_head(hidden.float())[:, 0]                             # r(y|x), [N]
    if model.settings["length_norm"]:
        # UNSPECIFIED: l in Algorithm 1; ours counts tokens, the end-of-sequence token included.
        # Scoring divides, too: what was trained is the quotient.
        lengths = [len(answer) for group in answers for answer in group]
        scores = scores / torch.tensor(lengths, device=device).log1p()          # Algorithm 1, 5-6
    return scores


def score_batch(model, encoder, rows):
    """b rows of G candidates each -> scores [b * G]. Raises BadRow if a medium cannot be read."""
    parts = []
    for row in rows:
        parts += candidates(row, encoder, model.settings)
    prompts, answers = zip(*parts, strict=True)
    return score_group(model, encoder, prompts, answers)


# --------------------------------------------------------------------------------------- training
def train(cfg, device, out, rows=None):
    """Train on `rows`, or on those of --data; the checkpoint goes to the folder `out`."""
    state = common.open_run(out, cfg)
    model, encoder = common.load(cfg.model, device, made_by=Config.model, frames=cfg.frames,
                                 max_tiles=cfg.max_tiles)
    settings = settings_of(asdict(cfg))
    torch.manual_seed(cfg.seed)
    add_head(model, settings)
    if cfg.freeze_vision:
        common.freeze_vision(model)
    if cfg.gradient_checkpointing:
        model.gradient_checkpointing_enable()
    rows = rows or load_pairs(cfg.data, encoder, settings, cfg, cfg.exclude)
    heldout = load_pairs(cfg.heldout, encoder, settings, cfg) if cfg.heldout else []
    if cfg.balance_length:
        rows = balanced(rows, cfg.seed)
    optimizer = common.make_optimizer(model, cfg.lr)
    steps = max(1, cfg.epochs * len(rows) // cfg.batch_size)
    warmup = max(1, round(0.1 * steps))
    start, kept = common.resume(state, model, optimizer)
    if state is None and heldout:
        kept["before"] = evaluate(model, encoder, heldout, cfg, "before")

    mine = slice(common.rank(), None, common.world())
    bar = common.progress(start, steps, STAGE)
    for step in bar:
        began = time.time()
        batch = common.batch_of(rows, step, cfg.batch_size, cfg.seed)[mine]
        batch.sort(key=lambda row: row["tokens"])  # alike lengths together: less padding
        done = (step - warmup) / max(1, steps - warmup)
        rate = (step + 1) / warmup                           # a line up to 1, then half a cosine
        if step >= warmup:
            rate = 0.5 + 0.5 * math.cos(math.pi * done)
        for group in optimizer.param_groups:
            group["lr"] = cfg.lr * rate
        scores, loss = backward(model, encoder, batch, cfg)
        norm = common.optimizer_step(optimizer, common.trainable(model), cfg.max_grad_norm)
        loss, = common.sum_over_ranks(loss)
        metrics = describe(common.gather_list(batch), common.gather_list(scores))
        bar.set_postfix(loss=f"{loss:.3f}", acc=f"{metrics['accuracy']:.2f}", refresh=False)
        if common.rank() == 0:
            common.append(Path(out, "metrics.jsonl"), {
                "step": step + 1, "loss": loss, "grad_norm": norm, "lr": group["lr"], **metrics,
                "step_time": time.time() - began, "peak_memory_gb": common.peak_memory_gb()})
            if (step + 1) % cfg.save_every == 0 or step + 1 == steps:
                common.save_state(out, model, optimizer, step + 1, cfg, **kept)
    after = evaluate(model, encoder, heldout, cfg, "after") if heldout else None
    if common.rank() == 0:
        save(out, model, encoder, cfg, steps, {"before": kept.get("before"), "after": after})
        print(f"wrote {out}/")
    common.gather_list([])  # no process goes on before all is written


def backward(model, encoder, batch, cfg):
    """Add the gradient of this process's rows, one micro-batch after another. -> their scores
    [[A, B], ...] and their loss, a share of the mean over the rows of all processes."""
    if cfg.gradient_checkpointing:
        model.train()
    scores, loss = [], 0.0
    for at in range(0, len(batch), cfg.micro_batch):
        rows = batch[at:at + cfg.micro_batch]
        pairs = score_batch(model, encoder, rows).view(-1, 2)                          # [b, 2]
        better = ["AB".index(row["label"]) for row in rows]
        better = torch.tensor(better, device=pairs.device)[:, None]                    # [b, 1]
        chosen = pairs.gather(1, better)[:, 0]                                         # r(y_w|x)
        rejected = pairs.gather(1, 1 - better)[:, 0]                                   # r(y_l|x)
        part = bt_loss(chosen, rejected, cfg.zero_coefficient).sum() / cfg.batch_size
        part.backward()
        loss += part.item()
        scores += pairs.tolist()
    return scores, loss


def describe(rows, scores):
    """N preference rows and their scores (of A, of B) -> the figures of all rows, and under
    "tasks" those of each task."""
    pairs = []
    for row, (a, b) in zip(rows, scores, strict=True):
        pairs.append((a, b) if row["label"] == "A" else (b, a))
    pairs = torch.tensor(pairs, dtype=torch.float64)
    tasks = {}
    for task in common.TASKS:
        of_task = torch.tensor([row["task"] == task for row in rows])
        if of_task.any():
            tasks[task] = figures(pairs[of_task])
    return {**figures(pairs), "tasks": tasks}


def figures(pairs):
    """Scores [N, 2], the better response's first -> accuracy, and means of margin and scores."""
    chosen, rejected = pairs.unbind(1)
    margins = chosen - rejected
    return {"accuracy": (margins > 0).double().mean().item(),  # equal scores are no preference
            "margin": margins.mean().item(), "chosen": chosen.mean().item(),
            "rejected": rejected.mean().item(), "n": len(pairs)}


def evaluate(model, encoder, rows, cfg, when):
    """Score the held-out rows and print how many are right. -> describe()'s figures."""
    scores = score_rows(model, encoder, rows, cfg.eval_batch, f"held-out, {when}", report=False)
    result = describe(rows, scores)
    tasks = [f"{task} {f['accuracy']:.1%}" for task, f in result["tasks"].items()]
    if common.rank() == 0:
        tqdm.write(f"held-out, {when}: accuracy {result['accuracy']:.1%} on {len(rows)} rows, "
                   f"margin {result['margin']:.2f}; {', '.join(tasks)}")
    return result


def save(out, model, encoder, cfg, step, heldout):
    """Write the head to a file of its own, and the rest as an ordinary checkpoint."""
    head = model.reward_head
    save_file(head.state_dict(), Path(out, "reward_head.safetensors"))
    del model.reward_head
    common.save_checkpoint(out, model, encoder, stage=STAGE, parent=cfg.model, step=step,
                           config=asdict(cfg), heldout=heldout)
    model.reward_head = head


# ------------------------------------------------------------------------------------------- rows
def after_media(row, text):
    """The text, after one <image> or <video> for each medium of the row."""
    place = "<video>" if row["task"].startswith("video") else "<image>"
    return " ".join([place] * len(row["media"]) + [text])


def as_texts(row, t2i):
    """Preference row -> [(prompt, media paths, answers), ...], all of it text. One prompt has an
    answer for A and one for B; with --t2i swap there are two prompts of one answer each."""
    if not row["task"].endswith("generation"):
        # UNSPECIFIED: the prompt. MSRL A.2 follows Figures 4-7, which hold both responses; Eq. 1
        # scores them one by one, so ours is what the user of a chat model would have sent.
        return [(after_media(row, row["prompt"]), row["media"], row["responses"])]
    video = row["task"].startswith("video")
    place, name = ("<video>", "Video") if video else ("<image>", "Image")
    if t2i == "swap":                                                          # DT2IT Eq. 2
        # UNSPECIFIED: what is asked, with the medium
        return [(f"{place} describe", [medium], [row["prompt"]]) for medium in row["media"]]
    # UNSPECIFIED: the evaluation prompt E. Which medium is the first is batch_of()'s coin.
    prompt = (f"{name} 1: {place}\n{name} 2: {place}\nCaption: {row['prompt']}\n"
              f"Which {name} is better?")
    answers = [f"{name} 1 is better than {name} 2.", f"{name} 2 is better than {name} 1."]
    return [(prompt, row["media"], answers)]                                   # DT2IT Eq. 3


def cut_ids(text, encoder, limit):
    """An answer's token ids, `limit` at most. The last one, which the head reads, always marks the
    end of the sequence."""
    return encoder.answer_ids(text)[:-1][:limit - 1] + [encoder.eos_id]


def candidates(row, encoder, settings):
    """Preference row -> [(Prompt, [answer ids, ...]), ...], the answer for A before the one for B.
    Any number of responses will do. Raises BadRow if a medium cannot be read."""
    parts = []
    for text, media, answers in as_texts(row, settings["t2i"]):
        prompt = encoder.encode(text, media, row["task"].startswith("video"))
        ids = [cut_ids(answer, encoder, settings["max_response_tokens"]) for answer in answers]
        parts.append((prompt, ids))
    return parts


def candidates_are_equal(row, encoder, settings):
    """True if this model reads the same for A as for B, so that there is nothing to learn."""
    if row["task"].endswith("generation") and row["media"][0] == row["media"][1]:
        return True
    parts = as_texts(row, settings["t2i"])
    if len(parts) == 2:  # one text, two media
        return False
    a, b = parts[0][2]
    limit = settings["max_response_tokens"]
    return cut_ids(a, encoder, limit) == cut_ids(b, encoder, limit)


def measure(row, encoder, settings):
    """-> tokens of the row's longest prompt. Raises BadRow if a medium is missing or broken."""
    if len(row["media"]) != common.N_MEDIA[row["task"]]:
        raise common.BadRow("has no media; a reward model reads no captions")
    return max(len(prompt.ids) for prompt, _ in candidates(row, encoder, settings))


def load_pairs(sources, encoder, settings, cfg, exclude=""):
    """Comma-separated sources -> preference rows, checked and measured as this model reads them.
    Raises SystemExit for a bad row, and if no row is left."""
    def check(row, form):
        return measure(row, encoder, settings)

    reader = SimpleNamespace(forbidden=encoder.forbidden, check=check)  # all that load_rows() needs
    rows = load_rows(sources, reader, "pixels", cfg.max_prompt_tokens, cfg.skip_bad_rows,
                     exclude)
    kept = [row for row in rows if not candidates_are_equal(row, encoder, settings)]
    limit = settings["max_response_tokens"]
    if common.rank() == 0 and len(kept) < len(rows):
        print(f"{len(rows) - len(kept)} rows left out: their candidates are the same, at "
              f"{limit} tokens")
    if not kept:
        raise SystemExit(f"{sources}: no row left; raise --max_response_tokens.")
    report_cut(kept, encoder, settings, sources)
    return kept


def cut_rows(rows, encoder, settings):
    """-> how many of the rows have a response that cut_ids() cuts."""
    count = 0
    for row in rows:
        texts = [text for _, _, answers in as_texts(row, settings["t2i"]) for text in answers]
        longest = max(len(encoder.answer_ids(text)) for text in texts)
        count += longest > settings["max_response_tokens"]
    return count


def report_cut(rows, encoder, settings, what):
    """Say how many rows have a cut response; on stderr, as eval.py writes JSON to stdout."""
    if common.rank() > 0:
        return
    count = cut_rows(rows, encoder, settings)
    if count:
        print(f"{what}: {count} of {len(rows)} rows have a response cut at "
              f"{settings['max_response_tokens']} tokens", file=sys.stderr)


def longer(row):
    """1 if the better response is the longer one, -1 if the shorter, 0 for equals and media."""
    better, worse = row["responses"] or ("", "")
    if row["label"] == "B":
        better, worse = worse, better
    return (len(better) > len(worse)) - (len(better) < len(worse))


def balanced(rows, seed):
    """Drop rows at random until better is longer as often as shorter (BaseReward D.4).
    UNSPECIFIED: how the paper resamples. Raises SystemExit if no row is left."""
    groups = {1: [], 0: [], -1: []}
    for row in rows:
        groups[longer(row)].append(row)
    long, equal, short = groups.values()
    n, rng = min(len(long), len(short)), random.Random(seed)
    kept = equal + rng.sample(long, n) + rng.sample(short, n)
    if common.rank() == 0:
        print(f"--balance_length: the better response is the longer one in {len(long)} rows, "
              f"the shorter in {len(short)}; {len(kept)} of {len(rows)} rows kept")
    if not kept:
        raise SystemExit("--balance_length leaves no row: the better response is the longer one in "
                         "all rows, or in none.")
    return kept


# ---------------------------------------------------------------------------- scoring, for others
def load(folder, device="cpu", frames=None, max_tiles=None):
    """-> reward model in eval mode and its Encoder. None: as many frames per video and tiles per
    image as it was trained with. Raises SystemExit if there is no reward model."""
    head = Path(folder, "reward_head.safetensors")
    if not (head.exists() and Path(folder, "stage.json").exists()):
        raise SystemExit(f"{folder}: no reward model (no reward_head.safetensors and stage.json). "
                         "`python bt_reward.py` makes one.")
    settings = settings_of(common.stage_of(folder)["config"])
    if frames is not None:
        settings["frames"] = frames
    if max_tiles is not None:
        settings["max_tiles"] = max_tiles
    model, encoder = common.load(folder, device, "runs/bt_reward", frames=settings["frames"],
                                 max_tiles=settings["max_tiles"])
    add_head(model, settings)
    model.reward_head.load_state_dict(load_file(head))
    return model.eval(), encoder


@torch.no_grad()
def score_all(model, encoder, rows, batch_size=64, desc="scoring"):
    """-> for every row the list of its candidates' scores, on every process. Raises SystemExit if a
    medium cannot be read."""
    model.eval()
    order = sorted(range(len(rows)), key=lambda i: rows[i].get("tokens", 0))  # less padding
    starts = range(0, len(rows), batch_size)[common.rank()::common.world()]
    found = []  # (place of a row, scores)
    for start in tqdm(starts, desc=desc, leave=False, disable=common.rank() > 0, mininterval=1):
        places = order[start:start + batch_size]
        batch = [rows[i] for i in places]
        try:
            scores = score_batch(model, encoder, batch).tolist()
        except common.BadRow as e:
            ids = ", ".join(str(row.get("id")) for row in batch)
            raise SystemExit(f"scoring {ids}: one {e}.") from None
        for i, row in zip(places, batch, strict=True):
            n = len(row["responses"] or row["media"])
            found.append((i, scores[:n]))
            scores = scores[n:]
    return [scores for _, scores in sorted(common.gather_list(found))]


def score_rows(model, encoder, rows, batch_size=64, desc="scoring", report=True):
    """-> (score of A, score of B) for every preference row. Two media in one prompt (--t2i pair)
    are shown in both orders, and the means count. `report`: say how many rows have a response that
    is cut."""
    if report:
        report_cut(rows, encoder, model.settings, desc)
    scores = score_all(model, encoder, rows, batch_size, desc)
    pairs = []  # places of the rows with two media in one prompt
    if model.settings["t2i"] == "pair":
        pairs = [i for i, row in enumerate(rows) if row["task"].endswith("generation")]
    swapped = [common.swap(rows[i]) for i in pairs]
    for i, (b, a) in zip(pairs, score_all(model, encoder, swapped, batch_size, desc), strict=True):
        scores[i] = [(scores[i][0] + a) / 2, (scores[i][1] + b) / 2]
    return [tuple(pair) for pair in scores]


def score_texts(model, encoder, items, batch_size=64, desc="scoring"):
    """Single candidates {"task", "prompt", "media", "response"} -> one score each. The candidate of
    a generation task is its one medium. Raises SystemExit if --t2i pair meets one of these."""
    rows = []
    for item in items:
        if not item["task"].endswith("generation"):
            rows.append({**item, "responses": [item["response"]]})
        elif model.settings["t2i"] == "swap":
            rows.append({**item, "responses": None})
        else:
            raise SystemExit("this reward model compares two images or videos (--t2i pair) and "
                             "cannot score one alone; train one with --t2i swap.")
    report_cut(rows, encoder, model.settings, desc)
    return [scores[0] for scores in score_all(model, encoder, rows, batch_size, desc)]


SCHEMES = ("rule", "model", "hybrid")


@torch.no_grad()
def group_rewards(model, encoder, item, responses, scheme="hybrid", reference=None,
                  max_new_tokens=512):
    """G answers to one prompt -> G rewards, to train another model with (BaseReward C).
    `item` is {"task", "prompt", "media"}.

        "rule"      1 if the answer is the reference, else 0
        "model"     its score by a reward model (load), or by a judge (common.load): the share
                    of the other answers that the judge prefers it to
        "hybrid"    1 if it is the reference, else sigmoid(score); a judge's share needs no sigmoid

    An answer is ill-formed if it is empty or holds one of our tags or a special token of the model,
    which no template may show. It is not scored and gets the least reward there is (UNSPECIFIED):
    0, or, as the scores of a reward model have no least one, under "model" the least score of the
    others (0 if there are none). A judge's share counts it as beaten by every well-formed answer.
    A reward model reads the first max_response_tokens of an answer. Raises ValueError for another
    scheme, for "rule" without a reference, and for a generation task."""
    if scheme not in SCHEMES:
        raise ValueError(f"scheme {scheme!r} is unknown; use one of {', '.join(SCHEMES)}")
    if scheme == "rule" and reference is None:
        raise ValueError("scheme 'rule' compares with a reference; give one")
    if item["task"].endswith("generation"):
        raise ValueError(f"{item['task']}: texts are rewarded, not images or videos")
    formed = []  # places of the well-formed answers
    for i, answer in enumerate(responses):
        if well_formed(answer, encoder):
            formed.append(i)
    rewards = [0.0] * len(responses)
    if scheme != "rule" and formed:
        texts = [responses[i] for i in formed]
        if hasattr(model, "reward_head"):
            scores, least = model_rewards(model, encoder, item, texts, scheme)
        else:
            beaten = len(responses) - len(formed)
            scores = shares_preferred(model, encoder, item, texts, max_new_tokens, beaten)
            least = 0.0
        rewards = [least] * len(responses)
        for i, score in zip(formed, scores, strict=True):
            rewards[i] = score
    if scheme != "model" and reference is not None:
        for i in formed:
            if responses[i].strip() == reference.strip():
                rewards[i] = 1.0
    return rewards


def well_formed(answer, encoder):
    """False for a text that common.check_text() refuses."""
    try:
        common.check_text("answer", answer, encoder.forbidden)
    except common.BadRow:
        return False
    return True


def model_rewards(model, encoder, item, texts, scheme):
    """-> a reward model's rewards for n texts, and the least reward that any text can have."""
    scores = score_batch(model, encoder, [{**item, "responses": texts}])
    if scheme == "hybrid":
        return scores.sigmoid().tolist(), 0.0
    return scores.tolist(), scores.min().item()


def shares_preferred(model, encoder, item, responses, max_new_tokens, beaten=0):
    """A judge compares all pairs of n answers in both orders -> for each answer the share of its
    comparisons that it wins, in [0, 1]. `beaten` is the number of further answers, not shown to the
    judge, that each of the n wins against. UNSPECIFIED: no verdict is half a win for both."""
    pairs = list(combinations(range(len(responses)), 2))
    rows = []
    for i, j in pairs:
        rows.append({**item, "id": str((i, j)), "captions": [], "tokens": 0, "label": "A",
                     "responses": [responses[i], responses[j]]})
    others = len(responses) - 1 + beaten
    comparisons = max(1, 2 * others)  # per answer
    shares = [2 * beaten / comparisons] * len(responses)
    for pred in common.judge(model, encoder, rows, sample_group, max_new_tokens=max_new_tokens):
        i, j = pairs[pred["at"]]
        won = {"A": 1.0, "B": 0.0, None: 0.5}[pred["pred"]]
        shares[i] += won / comparisons
        shares[j] += (1 - won) / comparisons
    return shares


# --------------------------------------------------------------------------------------- curation
def margin(scores, label):
    """(score of A, score of B) -> score of the labelled side minus that of the other."""
    a, b = scores
    return a - b if label == "A" else b - a


def to_flip(strengths):
    """Preference strengths -> the places of the lower half of the negative ones. UNSPECIFIED: half
    of an odd number; ours is rounded down."""
    negative = [i for i, strength in enumerate(strengths) if strength < 0]
    negative.sort(key=lambda i: strengths[i])
    return set(negative[:len(negative) // 2])


def judge_style(folder):
    """-> the prompt style ("msrl", "caption" or "r1") that the judge in `folder` was trained with
    and is to be asked in. Raises SystemExit for a reward model, which cannot be a judge."""
    if common.stage_of(folder).get("stage") == "bt_reward":
        raise SystemExit(f"{folder} is a reward model and states no verdict; --judges are made by "
                         "the stages, --models by this script.")
    return common.trained_style(folder)


def answers_file(out, folder):
    """Where the scores or verdicts of the checkpoint in `folder` are kept for a resumed run."""
    name = str(folder).strip("./").replace("/", "-")
    return out / f"by-{name}.jsonl"


def scores_by(folder, rows, cfg, device, out):
    """-> (score of A, score of B) for each row, by the reward model in `folder`, which sees as
    many frames and tiles as it was trained with."""
    what = f"scores of {folder}"

    @cache  # loaded once, and only if a row is left to score
    def reward_model():
        model, encoder = load(folder, device)
        report_cut(rows, encoder, model.settings, what)  # once, not for every chunk
        return model, encoder

    def work(chunk, at):
        return score_rows(*reward_model(), chunk, cfg.eval_batch, what, report=False)

    return common.resumed(answers_file(out, folder), {"model": common.stamps(folder)}, rows, work)


def verdicts_by(folder, rows, cfg, device, out):
    """-> for each row the verdicts ("A", "B" or None) of the judge in `folder`, one per order."""
    args = {"frames": cfg.frames, "max_tiles": cfg.max_tiles}

    @cache  # loaded once, and only if a row is left to judge
    def judge():
        return common.load(folder, device, style=judge_style(folder), **args)

    def work(chunk, at):
        return verdicts_on(chunk, *judge(), folder, cfg)

    return common.resumed(answers_file(out, folder), {"model": common.stamps(folder), **args,
                                                      "judge_tokens": cfg.judge_tokens}, rows, work)


def verdicts_on(rows, model, encoder, folder, cfg):
    """The work of verdicts_by(). A row whose prompt is too long for the judge gets no verdict.
    Raises SystemExit for a row that the judge cannot read."""
    fit = []  # places of the rows that are judged
    for i, row in enumerate(rows):
        try:
            if encoder.check(row, "pixels") <= cfg.max_prompt_tokens:
                fit.append(i)
        except common.BadRow as e:
            raise SystemExit(f"{folder} cannot judge row {row['id']}: it {e}.") from None
    preds = common.judge(model, encoder, [rows[i] for i in fit], sample_group,
                         batch_size=cfg.eval_batch, max_new_tokens=cfg.judge_tokens,
                         desc=f"verdicts of {folder}")
    verdicts = [[] for _ in rows]
    for pred in preds:
        verdicts[fit[pred["at"]]].append(pred["pred"])
    return verdicts


def curate(rows, voters, reward_model, judges, cfg, device, out):
    """DT2IT 3.3, three steps; see its Figure 1 (d). -> the rows that are kept, relabelled. They are
    also written to curated.jsonl in the folder `out`, the others to dropped.jsonl (each row with
    what happened to it), and the counts to curation.json."""
    out = Path(out)
    out.mkdir(parents=True, exist_ok=True)
    rows = [with_record(row) for row in rows]
    flip_worst(rows, [scores_by(folder, rows, cfg, device, out) for folder in voters])
    doubted = []  # step 2: what the reward model agrees with is kept
    for row, scores in zip(rows, scores_by(reward_model, rows, cfg, device, out), strict=True):
        agreement = margin(scores, row["label"])
        row["curation"] |= {"own_margin": agreement, "fate": "agreed"}
        if not agreement > 0:  # also if it is not a number
            doubted.append(row)
    if doubted:
        reannotate(doubted, [verdicts_by(folder, doubted, cfg, device, out) for folder in judges])
    kept, dropped = [], []
    for row in rows:
        if row["label"] != row["curation"]["given"]:
            row["rationale"] = None  # it argued for the other side
        group = dropped if row["curation"]["fate"].startswith("dropped") else kept
        group.append(row)
    if common.rank() == 0:
        summary = curation_summary(rows, kept)
        common.write_lines(out / "dropped.jsonl", dropped)
        common.write_lines(out / "curated.jsonl", kept)
        (out / "curation.json").write_text(json.dumps(summary, indent=2) + "\n")
        print(f"{out}/curated.jsonl: {listed(summary)}")
    return kept


def with_record(row):
    """A copy of the row with absolute media paths and an empty record under "curation"."""
    media = [str(Path(path).resolve()) for path in row["media"]]
    record = {"given": row["label"], "flipped": False, "before": row.get("curation")}
    return {**row, "media": media, "curation": record}


def flip_worst(rows, votes):
    """Step 1, in place: preference strength is the mean margin of the voters (`votes` holds the
    scores of one voter for all rows). In each source the labels of the weakest rows are flipped."""
    if not votes:
        return
    sources = {}
    for i, row in enumerate(rows):
        margins = [margin(scores[i], row["label"]) for scores in votes]
        row["curation"]["strength"] = sum(margins) / len(margins)
        sources.setdefault(row.get("source"), []).append(row)
    for members in sources.values():
        strengths = [row["curation"]["strength"] for row in members]
        for i in to_flip(strengths):
            members[i]["label"] = common.OTHER[members[i]["label"]]
            members[i]["curation"]["flipped"] = True


def reannotate(rows, ballots):
    """Step 3, in place: the label is what most verdicts say, of all judges in both orders; ties are
    dropped. `ballots` holds the verdicts of one judge for all rows."""
    for i, row in enumerate(rows):
        votes = Counter()
        for ballot in ballots:
            votes.update(ballot[i])
        del votes[None]
        fate = "re-annotated"
        if votes["A"] != votes["B"]:
            row["label"] = "A" if votes["A"] > votes["B"] else "B"
        elif votes["A"]:
            fate = "dropped: tie"
        else:
            fate = "dropped: no verdict"
        row["curation"] |= {"fate": fate, "votes": dict(votes)}


def curation_summary(rows, kept):
    """-> what happened to how many of the rows."""
    fates = Counter(row["curation"]["fate"] for row in rows)
    flipped = sum(row["curation"]["flipped"] for row in rows)
    relabelled = sum(row["label"] != row["curation"]["given"] for row in kept)
    return {"rows": len(rows), "flipped": flipped, **fates, "kept": len(kept),
            "kept with another label than given": relabelled}


def listed(counts):
    return ", ".join(f"{name} {n}" for name, n in counts.items())


def curate_file(cfg, device):
    """Curate the rows of --curate once. Raises SystemExit if no row is left."""
    model, encoder = load(cfg.models[0], device)
    rows = load_pairs(cfg.curate, encoder, model.settings, cfg, cfg.exclude)
    del model  # it is loaded again when its turn comes
    if not curate(rows, cfg.models, cfg.models[0], cfg.judges, cfg, device, cfg.out):
        raise SystemExit(f"{cfg.out}: curation left no row; see dropped.jsonl.")


def train_once(cfg, device, out, rows):
    """Train into the folder `out`, unless a finished run is there. -> `out`"""
    if Path(out, "stage.json").exists():
        common.open_run(out, cfg)  # refuses a run of other settings
    else:
        train(cfg, device, out, rows)
    return out


def iterate(cfg, device):
    """DT2IT 3.3, the framework: training and curation in turns, T times."""
    encoder = common.load(cfg.model, device, frames=cfg.frames, max_tiles=cfg.max_tiles)[1]
    settings, out = settings_of(asdict(cfg)), Path(cfg.out)
    data = load_pairs(cfg.data, encoder, settings, cfg, cfg.exclude)           # D_0
    noisy = load_pairs(cfg.curate, encoder, settings, cfg, cfg.exclude)        # D^open
    if len(noisy) < cfg.iterations:
        raise SystemExit(f"{cfg.curate}: {len(noisy)} rows are too few for --iterations "
                         f"{cfg.iterations}.")
    model = train_once(cfg, device, out / "0-model", data)                     # r_0
    for t in range(1, cfg.iterations + 1):
        # UNSPECIFIED: what is new in an iteration (paper: three data sets, then two); a T-th here
        new = noisy[t - 1::cfg.iterations]                                     # 1. D_t^open
        new = curate(new, [model, *cfg.models], model, cfg.judges, cfg, device,
                     out / f"{t}-new")                                         # 2. D_t^cur
        both = data + new                                                      # 3. D'_t
        first = train_once(cfg, device, out / f"{t}-first", both)              #    r'_t
        data = curate(both, [], first, cfg.judges, cfg, device, out / f"{t}-all")  # 4. D_t
        if not data:
            raise SystemExit(f"{out}/{t}-all: curation left no row; see dropped.jsonl.")
        model = train_once(cfg, device, out / f"{t}-model", data)              # 5. r_t
    if common.rank() == 0:
        print(f"the last model is {model}/")


# --------------------------------------------------------------------------- debiased construction
# DT2IT Table 10, shortened: DEVIATION. UNSPECIFIED: the JSON.
SCORING = """\
Please act as an impartial evaluator and assess the quality of several AI assistants' responses to \
the same user's prompt based on the provided image. Score each response from 0 to 10, integers \
only, on each of these criteria:
1. Accuracy: nothing in it conflicts with the image or the prompt, or is not present in them.
2. Helpfulness: it answers what is asked and follows the instructions.
3. Completeness: it addresses all requests, with all necessary details and analysis.
4. Language Quality: it is fluent, clear, to the point, in the style the task requires.
5. Creativity: novelty and insight where needed; 10 if the prompt does not require creativity.
6. Ethics: safety, privacy, fairness, harmlessness; 10 if the prompt does not touch them.
First generate your own complete reference answer; the standard answer may contain errors, so \
examine the image carefully. Next assign weights to the criteria by their importance; they must \
sum to 1.0. Then compare each response with the image, the prompt and your reference answer. The \
order in which the responses are presented is not related to their quality, and a longer response \
is not necessarily better.
End with a JSON list, one object per response: \
[{{"weights": [6 numbers], "scores": [6 integers]}}, ...]

### User Prompt:
{question}

### Standard Human-Generated Answer:
{reference}

{responses}"""


def overall(text, n):
    """The teacher's text on n responses -> their weighted scores S, or None if malformed."""
    try:
        verdicts = json.loads(re.search(r"\[\s*\{.*\}\s*\]", text, re.DOTALL)[0])
        scores = [weighted(verdict["weights"], verdict["scores"]) for verdict in verdicts]
    except (ValueError, KeyError, TypeError):
        return None
    return scores if len(scores) == n else None


def weighted(weights, scores):
    """Six weights that sum to 1, six scores of 0 to 10 -> S. Raises ValueError or TypeError."""
    fine = (len(weights) == len(scores) == 6 and abs(sum(weights) - 1) < 0.01
            and min(weights) >= 0 and set(scores) <= set(range(11)))
    if not fine:
        raise ValueError("malformed scores")
    return round(sum(w * s for w, s in zip(weights, scores, strict=True)), 2)


def agreed(listwise, pointwise):
    """Two scores of each of K responses -> places (better, worse) wherever both say so."""
    return [(i, j) for i, j in permutations(range(len(listwise)), 2)
            if listwise[i] > listwise[j] and pointwise[i] > pointwise[j]]


def ask(checkpoint, row, texts, n, cfg, rng, temperature=1.0, noise=0.0):
    """Ask (model, encoder) each text about the row's media -> n answers to the first text, n to
    the next; None for an answer that --judge_tokens cut. Each call draws one seed from `rng`.
    `noise` on the media is in stds of a pixel."""
    model, encoder = checkpoint
    seed = rng.randrange(2**31)
    prompts = []
    for text in texts:
        prompt = encoder.encode(after_media(row, text), row["media"],
                                row["task"].startswith("video"))
        if noise:  # pixels are normalised: their std is about 1
            generator = torch.Generator().manual_seed(seed)
            pixel_noise = torch.randn(prompt.pixels.shape, generator=generator)
            prompt.pixels = prompt.pixels + noise * pixel_noise
        prompts.append(prompt)
    generator = torch.Generator(next(model.parameters()).device).manual_seed(seed)
    rollout = sample_group(model, encoder, prompts, n, temperature, cfg.judge_tokens, generator)
    answers = []
    for group in rollout.ids:
        for ids in group:
            ended = len(ids) > 0 and ids[-1] in encoder.eos_ids
            answers.append(encoder.decode(ids) if ended else None)
    return answers


def complete(answers, outcomes):
    """The answers that were not cut: half an answer is no worse one, it is none. The others are
    counted in the Counter `outcomes`."""
    whole = [answer for answer in answers if answer is not None]
    if len(whole) < len(answers):
        outcomes["cut answers dropped"] += len(answers) - len(whole)
    return whole


def teacher_scores(row, groups, models, cfg, rng):
    """-> for each group of responses their scores S, or None if the teacher's text is malformed or
    cut."""
    questions = []
    for group in groups:
        shown = [f"### Response {i}:\n{text}" for i, text in enumerate(group, 1)]
        questions.append(SCORING.format(question=row["prompt"], reference=row["reference"],
                                        responses="\n\n".join(shown)))
    texts = ask(models[cfg.teacher], row, questions, 1, cfg, rng, temperature=0.0)
    return [overall(text or "", len(group)) for text, group in zip(texts, groups, strict=True)]


def replace_some(row, responses, scores, writer, helper, cfg, rng):
    """Step 4: if all responses are bad or all are good, write some to replace as many. -> the
    new answers (None for a cut one), what was done. UNSPECIFIED: how many; all are scored again."""
    if scores and max(scores) <= cfg.low:
        known = f"{row['prompt']}\nThe answer is known: {row['reference']}"
        return ask(helper, row, [known], 1, cfg, rng), "all low"
    if scores and min(scores) >= cfg.high and row["media"]:
        half = len(responses) // 2
        return ask(writer, row, [row["prompt"]], half, cfg, rng, noise=cfg.noise), "all high"
    return [], "as they were"


def pairs_of(row, models, cfg):
    """DT2IT 3.1, steps 2 to 5, for one row; `models` are {folder: (model, encoder)}. -> its
    preference rows, and what was done: {outcome: 1, "cut answers dropped": how many}."""
    rng = random.Random(f"{cfg.seed}:{row['id']}")
    outcomes = Counter()
    # one model writes them all: the better one is not known by its style
    writer, helper = models[rng.choice(cfg.candidates)], models[rng.choice(cfg.candidates)]
    responses = row["responses"]
    if not responses:                                                                  # step 2
        # DEVIATION: the paper samples hot and with a nucleus, ours at temperature 1 without
        responses = complete(ask(writer, row, [row["prompt"]], cfg.samples, cfg, rng), outcomes)
        if len(responses) < 2:
            return [], outcomes + Counter(["too few whole answers"])
    listwise, = teacher_scores(row, [responses], models, cfg, rng)                     # step 3
    done = "as they were"
    # UNSPECIFIED: responses that came with the row. The paper lets their own writer add the worse
    # ones, so that style tells nothing; here it is not known, so these stay as they are.
    if not row["responses"]:                                                           # step 4
        new, done = replace_some(row, responses, listwise, writer, helper, cfg, rng)
        new = complete(new, outcomes)
        if new:
            responses = responses[len(new):] + new
            listwise, = teacher_scores(row, [responses], models, cfg, rng)
    alone = [[response] for response in responses]
    pointwise = teacher_scores(row, alone, models, cfg, rng)                           # step 5
    if listwise is None or None in pointwise:  # DEVIATION: the released script tries 3 times
        return [], outcomes + Counter(["malformed scores"])
    pairs = []
    for i, j in agreed(listwise, [score for score, in pointwise]):
        pair = better_first(f"{row['id']}/{i}-{j}", row["prompt"], responses[i],
                            responses[j], row["task"], row["media"], source="constructed")
        if responses[i] != responses[j] and usable(pair, models):
            pairs.append(pair)
    return pairs, outcomes + Counter([done])


def usable(pair, models):
    """False if an answer is empty, or holds a tag or special token: training would refuse it."""
    try:
        for _, encoder in models.values():
            common.check_row(pair, "", encoder.forbidden)
    except common.BadRow:
        return False
    return True


def check_prompt(raw, folder):
    """One row of --construct as it stands in its file -> the same, checked, with media paths that
    start from `folder` and the list "responses". Raises BadRow."""
    if isinstance(raw, common.BadRow):
        raise raw
    if not isinstance(raw, dict) or not isinstance(raw.get("reference"), str) or \
            str(raw.get("task")).endswith("generation"):
        raise common.BadRow("needs a 'reference' text and a task that is no generation")
    responses = raw.get("responses") or []
    if not isinstance(responses, list) or len(responses) == 1:
        raise common.BadRow("has 'responses' that are no list of two or more")
    for text in [*responses, raw["reference"]]:
        row = common.check_row({**raw, "label": "A", "responses": [text, text]}, folder)
    if len(row["media"]) != common.N_MEDIA[row["task"]]:
        raise common.BadRow("has no media; the teacher reads no captions")
    for path in row["media"]:  # now, not in the middle of the run
        if row["task"].startswith("video"):
            common.open_video(path, 1)
        else:
            common.open_image(path)
    return {**row, "responses": responses}


def construct(cfg, device):
    """Every row of --construct -> pairs.jsonl. All checkpoints are in memory at once."""
    rows, out = [], Path(cfg.out)
    out.mkdir(parents=True, exist_ok=True)
    for where, raw in raw_rows(cfg.construct):
        try:
            rows.append(check_prompt(raw, Path(cfg.construct).resolve().parent))
        except common.BadRow as e:
            raise SystemExit(f"{where}: row {e}.") from None
    models = {}
    for folder in {cfg.teacher, *cfg.candidates}:
        models[folder] = common.load(folder, device, frames=cfg.frames, max_tiles=cfg.max_tiles)

    def work(chunk, at):
        mine = range(common.rank(), len(chunk), common.world())
        found = [(i, pairs_of(chunk[i], models, cfg)) for i in mine]
        return [result for _, result in sorted(common.gather_list(found))]

    made_by = {k: getattr(cfg, k) for k in ("teacher", "candidates", "samples", "low", "high",
                                            "noise", "judge_tokens", "seed", "frames", "max_tiles")}
    made_by["files"] = common.stamps(cfg.teacher, *cfg.candidates)
    pairs, outcomes = [], Counter()
    for made, done in common.resumed(out / "groups.jsonl", made_by, rows, work, chunk=16):
        pairs += made
        outcomes.update(done)
    if common.rank() == 0:
        common.write_lines(out / "pairs.jsonl", pairs)
        print(f"{out}/pairs.jsonl: {len(pairs)} pairs of {len(rows)} rows: {listed(outcomes)}")


def main():
    cfg = common.parse_config(Config, __doc__, PAPER)
    device = common.start_processes(cfg.batch_size)
    if cfg.construct:
        construct(cfg, device)
    elif cfg.iterations:
        iterate(cfg, device)
    elif cfg.curate:
        curate_file(cfg, device)
    else:
        train(cfg, device, cfg.out)
    common.end_processes()


if __name__ == "__main__":
    main()
