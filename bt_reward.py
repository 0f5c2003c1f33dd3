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

Shapes: b rows within a micro-batch, G responses to a prompt, N scores, L tokens, H hidden size.
"""

import json
import math
import random
import re
import time
from collections import Counter
from dataclasses import asdict, dataclass, field
from functools import lru_cache
from itertools import combinations
from pathlib import Path
from types import SimpleNamespace
from typing import Literal

import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import nn
from tqdm import tqdm

import common
from stage1_text_grpo import knob, pack, sample_group

OTHER = {"A": "B", "B": "A"}
HELDOUT = ",".join(f"toy/heldout_{task}.jsonl" for task in common.TASKS)


def several(help):
    return field(default_factory=list, metadata={"help": help})


@dataclass
class Config:
    model: str = knob("toy/backbone", "checkpoint to start from; its head is always a new one")
    data: str = knob("toy/text_rl.jsonl:2000,toy/mm_rl.jsonl", "preference rows; file.jsonl:500 "
                     "takes 500 of them, and so weighs the sources. BaseReward Table 15: "
                     "multimodal to text 1 : 0.5 is best for multimodal benchmarks")
    heldout: str = knob(HELDOUT, "rows scored before and after; '' for none")
    out: str = knob("runs/bt_reward", "run folder; the same command resumes it")
    seed: int = knob(0, "of the head's weights and of the order of rows and sides")
    head_layers: int = knob(2, "of the reward head, 1 to 5 (BaseReward Table 2: 2; DT2IT: 1)")
    head_activation: Literal["none", "tanh", "relu", "silu"] = knob(
        "silu", "between the head's layers (BaseReward Table 2: silu)")
    zero_coefficient: float = knob(0.0, "lambda of mean((r_w + r_l)^2), BaseReward Algorithm 1. "
                                   "Its Figure 1: 0 is best")
    length_norm: bool = knob(False, "r / log(length + 1), BaseReward Algorithm 1. Its Figure 1: no")
    balance_length: bool = knob(False, "drop rows until the better response is the longer one as "
                                "often as the shorter one (BaseReward Table 12: helps where the "
                                "data is biased, costs a little elsewhere)")
    t2i: Literal["pair", "swap"] = knob(
        "pair", "generation rows. 'pair': both media in one prompt, the response says which is "
        "better (DT2IT Eq. 3). 'swap': the medium is the prompt and the text the response "
        "(Omni-Reward, Eq. 2); scores single candidates, too")
    freeze_vision: bool = knob(False, "freeze vision tower and projector (DT2IT's script: yes)")
    epochs: int = knob(10, "passes over the rows (papers: 1)")
    batch_size: int = knob(32, "rows an optimiser step, over all processes (MSRL, BaseReward: 128; "
                           "DT2IT: 512)")
    micro_batch: int = knob(8, "rows a forward; changes memory, not the gradient")
    lr: float = knob(5e-4, "AdamW; warm-up over 10 %% of the steps, then a cosine to 0 (DT2IT). "
                     "MSRL, DT2IT: 1e-5; BaseReward: 3e-6")
    max_grad_norm: float = knob(1.0, "gradient norm clip")
    max_prompt_tokens: int = knob(2048, "rows with a longer prompt are skipped and counted")
    max_response_tokens: int = knob(1024, "longer responses are cut here; rows whose two responses "
                                    "are the same then are left out and counted")
    frames: int = knob(8, "frames a video, evenly spaced")
    max_tiles: int = knob(12, "tiles an image; fewer save memory")
    gradient_checkpointing: bool = knob(False, "recompute activations: slower, far less memory")
    eval_batch: int = knob(128, "rows scored together")
    save_every: int = knob(100, "steps between saved states")
    skip_bad_rows: bool = knob(False, "leave bad rows out and count them instead of stopping")
    exclude: str = knob("", "benchmark files; training rows that are in them too are left out")
    curate: str = knob("", "noisy preference rows to clean (DT2IT 3.3); writes curated.jsonl")
    models: list[str] = several("reward models that vote on the preference strength. The first is "
                                "the own one, whose agreement keeps a row")
    judges: list[str] = several("generative checkpoints that re-annotate the rest, in both orders; "
                                "none: the rest is dropped")
    iterations: int = knob(0, "T of DT2IT's loop: train on --data, curate a T-th of --curate, "
                           "train on both, curate both, train, and so on (paper: 2)")
    judge_tokens: int = knob(160, "of a judge's answer, or of any other sampled one")
    construct: str = knob("", 'rows {"id", "task", "prompt", "media", "reference", "responses"} to '
                          "make preference rows of (DT2IT 3.1); K responses, or none: then "
                          "--candidates write them")
    teacher: str = knob("", "generative checkpoint that scores (paper: GPT-5.2)")
    candidates: list[str] = several("generative checkpoints that answer; a row has its own one, so "
                                    "that style tells nothing (paper: six)")
    samples: int = knob(4, "K, responses a row (UNSPECIFIED)")
    low: float = knob(5.0, "a group with no score above it gets an answer that knows the reference "
                      "(UNSPECIFIED)")
    high: float = knob(8.0, "a group with no score below it gets answers to a noised image "
                       "(UNSPECIFIED)")
    noise: float = knob(1.0, "std of that noise, in stds of a pixel (UNSPECIFIED)")


# MSRL A.2: one epoch over "the complete set" of labelled multimodal rows, here those of stages 2
# and 3 together, at 1e-5 and 128
PAPER = dict(model="OpenGVLab/InternVL3_5-8B-HF", heldout="", epochs=1, batch_size=128, lr=1e-5,
             data=common.TABLE_5.format(13000, 5000, 5219, 6666, 5000, 4595), micro_batch=1,
             max_prompt_tokens=8192, judge_tokens=2048, gradient_checkpointing=True)


# ------------------------------------------------------------------------------------------- model
def reward_head(hidden, layers, activation):
    """[N, H] -> [N, 1]. UNSPECIFIED: the width of the layers in between; ours is H."""
    act = {"none": nn.Identity, "tanh": nn.Tanh, "relu": nn.ReLU, "silu": nn.SiLU}[activation]
    inner = [part for _ in range(layers - 1) for part in (nn.Linear(hidden, hidden), act())]
    return nn.Sequential(*inner, nn.Linear(hidden, 1))


def add_head(model, settings):
    """`settings` go into stage.json: what the head is, and how rows are put to the model."""
    hidden = model.get_input_embeddings().weight
    model.reward_head = reward_head(hidden.shape[1], settings["head_layers"],
                                    settings["head_activation"]).to(hidden.device)
    model.settings = settings
    return model


def settings_of(config):
    return {name: config[name] for name in ("head_layers", "head_activation", "t2i", "length_norm",
                                            "max_response_tokens")}


def candidates(row, encoder, settings):
    """Preference row -> [(Prompt, [answer ids, ...]), ...], an answer for A and then one for B (or
    for each of any number of responses)."""
    limit, text = settings["max_response_tokens"], row["prompt"]
    # the end-of-sequence token, which the head reads, is never cut off
    ids = lambda answer: encoder.answer_ids(answer)[:-1][:limit - 1] + [encoder.eos_id]
    video = row["task"].startswith("video")
    place = "<video>" if video else "<image>"
    if not row["task"].endswith("generation"):
        # UNSPECIFIED: the prompt. MSRL A.2 follows Figures 4-7, which hold both responses; Eq. 1
        # scores them one by one, so ours is what the user of a chat model would have sent.
        prompt = encoder.encode(" ".join([place] * len(row["media"]) + [text]), row["media"], video)
        return [(prompt, [ids(r) for r in row["responses"]])]
    if settings["t2i"] == "swap":  # DT2IT Eq. 2. UNSPECIFIED: what is asked, with the medium
        return [(encoder.encode(f"{place} describe", [m], video), [ids(text)])
                for m in row["media"]]
    name = "Video" if video else "Image"                                       # DT2IT Eq. 3
    # UNSPECIFIED: the evaluation prompt E. Which medium is the first is batch_of()'s coin.
    prompt = encoder.encode(f"{name} 1: {place}\n{name} 2: {place}\nCaption: {text}\nWhich "
                            f"{name} is better?", row["media"], video)
    return [(prompt, [ids(f"{name} {i} is better than {name} {j}.") for i, j in ((1, 2), (2, 1))])]


def score_group(model, encoder, prompts, answers):
    """b prompts and the ids of their answers [b][G], which may differ in number -> scores [N], in
    the order of the answers."""
    device = next(model.parameters()).device
    ids, positions, sees, _, tail, _, pixels = pack(prompts, answers, encoder.pad_id, device)
    media = {} if pixels is None else {"pixel_values": pixels}
    with common.autocast(device):
        hidden = model.model(input_ids=ids, attention_mask=sees, position_ids=positions,
                             use_cache=False, **media).last_hidden_state               # [b, L, H]
    rows, last, lengths = [], [], []
    for i, group in enumerate(answers):
        at = ids.shape[1] - tail.shape[1] - 1  # the prompt's last token
        for answer in group:
            at += len(answer)
            rows, last, lengths = rows + [i], last + [at], lengths + [len(answer)]
    scores = model.reward_head(hidden[rows, last].float())[:, 0]                       # [N], fp32
    if model.settings["length_norm"]:
        # UNSPECIFIED: l in Algorithm 1; ours counts tokens, the end-of-sequence token included.
        # Scoring divides, too: what was trained is the quotient.
        scores = scores / torch.tensor(lengths, device=device).log1p()          # Algorithm 1, 5-6
    return scores


def score_batch(model, encoder, rows):
    """b rows of G candidates each -> scores [b * G]."""
    parts = [part for row in rows for part in candidates(row, encoder, model.settings)]
    return score_group(model, encoder, [p for p, _ in parts], [a for _, a in parts])


def bt_loss(chosen, rejected, zero_coefficient):
    """Scores [b] each -> loss [b]."""
    loss = -F.logsigmoid(chosen - rejected)                                            # Eq. 1
    return loss + zero_coefficient * (chosen + rejected) ** 2                   # Algorithm 1, 10


# ------------------------------------------------------------------------------------------- rows
def measure(row, encoder, settings):
    """-> tokens of the row's longest prompt; row["same"] tells whether its candidates are equal."""
    if len(row["media"]) != common.N_MEDIA[row["task"]]:
        raise common.BadRow("has no media; a reward model reads no captions")
    parts = candidates(row, encoder, settings)
    answers = [ids for _, group in parts for ids in group]
    row["same"] = row["task"].endswith("generation") and len({*row["media"]}) == 1 or \
        len(parts) == 1 and answers[0] == answers[1]  # two parts: one text, two media
    return max(len(prompt.ids) for prompt, _ in parts)


def load_pairs(sources, encoder, settings, cfg, exclude=""):
    """Preference rows, checked and measured as this model reads them."""
    # load_rows() wants no more of an encoder than this
    reader = SimpleNamespace(forbidden=encoder.forbidden,
                             check=lambda row, form: measure(row, encoder, settings))
    rows = common.load_rows(sources, reader, "pixels", cfg.max_prompt_tokens, cfg.skip_bad_rows,
                            exclude)
    kept = [row for row in rows if not row.pop("same")]
    if common.rank() == 0 and len(kept) < len(rows):
        print(f"{len(rows) - len(kept)} rows left out: their candidates are the same, at "
              f"{cfg.max_response_tokens} tokens")
    if not kept:
        raise SystemExit(f"{sources}: no row left; raise --max_response_tokens.")
    return kept


def longer(row):
    """1 if the better response is the longer one, -1 if the shorter, 0 for equals and media."""
    a, b = map(len, row["responses"] or ("", ""))
    return ((a > b) - (a < b)) * (1 if row["label"] == "A" else -1)


def balanced(rows, seed):
    """Drop rows at random until better is longer as often as shorter (BaseReward D.4).
    UNSPECIFIED: how the paper resamples."""
    sides = {s: [r for r in rows if longer(r) == s] for s in (1, 0, -1)}
    n, rng = min(len(sides[1]), len(sides[-1])), random.Random(seed)
    kept = sides[0] + rng.sample(sides[1], n) + rng.sample(sides[-1], n)
    if common.rank() == 0:
        print(f"--balance_length: the better response is the longer one in {len(sides[1])} rows, "
              f"the shorter in {len(sides[-1])}; {len(kept)} of {len(rows)} rows kept")
    if not kept:
        raise SystemExit("--balance_length leaves no row: the better response is the longer one in "
                         "all rows, or in none.")
    return kept


# ---------------------------------------------------------------------------------------- scoring
def load(folder, device="cpu", frames=8, max_tiles=12):
    """-> reward model and encoder, for score_rows() and its like."""
    files = [Path(folder, name) for name in ("stage.json", "reward_head.safetensors")]
    if not all(map(Path.exists, files)):
        raise SystemExit(f"{folder}: no reward model (no reward_head.safetensors and stage.json). "
                         "`python bt_reward.py` makes one.")
    model, encoder = common.load(folder, device, "python bt_reward.py", frames=frames,
                                 max_tiles=max_tiles)
    add_head(model, settings_of(common.stage_of(folder)["config"]))
    model.reward_head.load_state_dict(load_file(files[1]))
    return model.eval(), encoder


@torch.no_grad()
def score_all(model, encoder, rows, batch_size=64, desc="scoring"):
    """-> for every row the list of its candidates' scores."""
    model.eval()
    order = sorted(range(len(rows)), key=lambda i: rows[i].get("tokens", 0))  # less padding
    batches = [order[k:k + batch_size] for k in range(0, len(order), batch_size)]
    found = []
    for k in tqdm(range(common.rank(), len(batches), common.world()), desc=desc, leave=False,
                  disable=common.rank() > 0, mininterval=1):
        some = [rows[i] for i in batches[k]]
        try:
            scores = iter(score_batch(model, encoder, some).tolist())
        except common.BadRow as e:
            raise SystemExit(f"scoring {', '.join(str(row.get('id')) for row in some)}: one {e}.")
        found += [(i, [next(scores) for _ in row["responses"] or row["media"]])
                  for i, row in zip(batches[k], some)]
    return [scores for _, scores in sorted(common.gather_list(found))]


def score_rows(model, encoder, rows, batch_size=64, desc="scoring"):
    """-> (score of A, score of B) for every preference row. Two media in one prompt (--t2i pair)
    are shown in both orders, and the means count."""
    scores = score_all(model, encoder, rows, batch_size, desc)
    paired = [i for i, row in enumerate(rows) if model.settings["t2i"] == "pair"
              and row["task"].endswith("generation")]
    turned = score_all(model, encoder, [common.swap(rows[i]) for i in paired], batch_size, desc)
    for i, (b, a) in zip(paired, turned):
        scores[i] = [(scores[i][0] + a) / 2, (scores[i][1] + b) / 2]
    return [tuple(s) for s in scores]


def score_texts(model, encoder, items, batch_size=64, desc="scoring"):
    """Single candidates {"task", "prompt", "media", "response"} -> one score each. The candidate of
    a generation task is its one medium."""
    if model.settings["t2i"] == "pair" and any(x["task"].endswith("generation") for x in items):
        raise SystemExit("this reward model compares two images or videos (--t2i pair) and cannot "
                         "score one alone; train one with --t2i swap.")
    rows = [{**x, "responses": None if x["task"].endswith("generation") else [x["response"]]}
            for x in items]
    return [scores[0] for scores in score_all(model, encoder, rows, batch_size, desc)]


@torch.no_grad()
def group_rewards(model, encoder, item, responses, scheme="hybrid", reference=None,
                  max_new_tokens=512):
    """Rewards for a group of answers to one prompt, to train another model with (BaseReward C).
    `item` is {"task", "prompt", "media"}, no generation task. "rule": 1 if the answer is the
    reference, else 0; "model": its score; "hybrid": 1 if it is the reference, else sigmoid(score).
    A judge (common.load) in place of a reward model (load): its score is the share of the other
    answers it is preferred to, every pair in both orders; being in [0, 1], it needs no sigmoid."""
    if item["task"].endswith("generation"):
        raise ValueError(f"{item['task']}: texts are rewarded, not images or videos")
    matches = [float(reference is not None and r.strip() == reference.strip()) for r in responses]
    if scheme == "rule":
        return matches
    if hasattr(model, "reward_head"):
        scores = score_batch(model, encoder, [{**item, "responses": list(responses)}])
        own, bounded = scores.tolist(), scores.sigmoid().tolist()
    else:
        pairs = list(combinations(range(len(responses)), 2))
        rows = [{**item, "id": str(p), "captions": [], "tokens": 0, "label": "A",
                 "responses": [responses[i] for i in p]} for p in pairs]
        own = [0.0] * len(responses)
        for pred in common.judge(model, encoder, rows, sample_group, max_new_tokens=max_new_tokens):
            for i, side in zip(pairs[pred["row"]], "AB"):  # no verdict: half to each (UNSPECIFIED)
                own[i] += (0.5 if pred["pred"] is None else pred["pred"] == side) / (
                    2 * (len(responses) - 1))
        bounded = own
    return own if scheme == "model" else [m or s for m, s in zip(matches, bounded)]


def describe(rows, scores):
    """-> accuracy, margin, mean chosen and rejected score; of all rows, "tasks" by task."""
    def figures(some):
        right = [s if r["label"] == "A" else s[::-1] for r, s in some]
        mean = lambda values: sum(values) / len(right)
        return {"accuracy": mean([c > r for c, r in right]),  # equal scores are no preference
                "margin": mean([c - r for c, r in right]), "chosen": mean([c for c, _ in right]),
                "rejected": mean([r for _, r in right]), "n": len(right)}
    pairs = list(zip(rows, scores))
    return {**figures(pairs), "tasks": {t: figures(some) for t in common.TASKS if (
        some := [p for p in pairs if p[0]["task"] == t])}}


def evaluate(model, encoder, rows, cfg, when):
    result = describe(rows, score_rows(model, encoder, rows, cfg.eval_batch, f"held-out, {when}"))
    if common.rank() == 0:
        tqdm.write(f"held-out, {when}: accuracy {result['accuracy']:.1%} on {len(rows)} rows, "
                   f"margin {result['margin']:.2f}; " + ", ".join(
                       f"{t} {f['accuracy']:.1%}" for t, f in result["tasks"].items()))
    return result


# --------------------------------------------------------------------------------------- training
def train(cfg, device, out, rows=None):
    """Train on `rows`, or on those of --data; the checkpoint goes to `out`."""
    state = common.open_run(out, cfg)
    model, encoder = common.load(cfg.model, device, frames=cfg.frames, max_tiles=cfg.max_tiles)
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
    trainable = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trainable, lr=cfg.lr, betas=(0.9, 0.95), weight_decay=0.0)
    steps = max(1, cfg.epochs * len(rows) // cfg.batch_size)
    warmup = max(1, round(0.1 * steps))
    start, before = 0, None
    if state is not None:
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        start, before = state["step"], state["before"]
    elif heldout:
        before = evaluate(model, encoder, heldout, cfg, "before")

    mine = slice(common.rank(), None, common.world())
    bar = tqdm(range(start, steps), initial=start, total=steps, desc="bt_reward",
               disable=common.rank() > 0, mininterval=2)
    for step in bar:
        began = time.time()
        batch = common.batch_of(rows, step, cfg.batch_size, cfg.seed)[mine]
        batch.sort(key=lambda row: row["tokens"])  # alike lengths together: less padding
        done = (step - warmup) / max(1, steps - warmup)
        for group in optimizer.param_groups:
            group["lr"] = cfg.lr * ((step + 1) / warmup if step < warmup else
                                    0.5 + 0.5 * math.cos(math.pi * done))
        if cfg.gradient_checkpointing:
            model.train()
        scores, loss = [], 0.0
        for at in range(0, len(batch), cfg.micro_batch):
            some = batch[at:at + cfg.micro_batch]
            pair = score_batch(model, encoder, some).view(-1, 2)                       # [b, 2]
            right = torch.tensor(["AB".index(r["label"]) for r in some], device=device)[:, None]
            chosen, rejected = pair.gather(1, right)[:, 0], pair.gather(1, 1 - right)[:, 0]
            part = bt_loss(chosen, rejected, cfg.zero_coefficient).sum() / cfg.batch_size
            part.backward()
            loss += part.item()
            scores += pair.tolist()
        common.sum_gradients(trainable)
        norm = torch.nn.utils.clip_grad_norm_(trainable, cfg.max_grad_norm).item()
        if not math.isfinite(norm):
            raise SystemExit(f"step {step + 1}: the gradient is not a number; go on from the last "
                             "saved state with a smaller --lr.")
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        loss, = common.sum_over_ranks(loss)
        metrics = describe(common.gather_list(batch), common.gather_list(scores))
        bar.set_postfix(loss=f"{loss:.3f}", acc=f"{metrics['accuracy']:.2f}", refresh=False)
        if common.rank() == 0:
            common.append(Path(out, "metrics.jsonl"), {
                "step": step + 1, "loss": loss, "grad_norm": norm, "lr": group["lr"], **metrics,
                "step_time": time.time() - began, "peak_memory_gb": common.peak_memory_gb()})
            if (step + 1) % cfg.save_every == 0 or step + 1 == steps:
                common.save_state(out, model, optimizer, step + 1, cfg, before=before)
    after = evaluate(model, encoder, heldout, cfg, "after") if heldout else None
    if common.rank() == 0:
        save(out, model, encoder, cfg, steps, {"before": before, "after": after})
        print(f"wrote {out}/")
    common.gather_list([])  # no process goes on before all is written


def save(out, model, encoder, cfg, step, heldout):
    head = model.reward_head
    save_file(head.state_dict(), Path(out, "reward_head.safetensors"))
    del model.reward_head  # the rest is an ordinary checkpoint
    common.save_checkpoint(out, model, encoder, stage="bt_reward", parent=cfg.model, step=step,
                           config=asdict(cfg), heldout=heldout)
    model.reward_head = head


# --------------------------------------------------------------------------------------- curation
def margin(scores, label):
    return (scores[0] - scores[1]) * (1 if label == "A" else -1)


def to_flip(strengths):
    """Preference strengths -> the places of the lower half of the negative ones. UNSPECIFIED: half
    of an odd number; ours is rounded down."""
    negative = sorted((s, i) for i, s in enumerate(strengths) if s < 0)
    return {i for _, i in negative[:len(negative) // 2]}


def judge_style(folder):
    """What a judge is to be asked in. A reward model is none."""
    if common.stage_of(folder).get("stage") == "bt_reward":
        raise SystemExit(f"{folder} is a reward model and states no verdict; --judges are made by "
                         "the stages, --models by this script.")
    return common.trained_style(folder)


def voters_and_judges(rows, cfg, device, out):
    """-> two functions that ask one checkpoint: scored(folder), two scores for each of `rows`, and
    judged(folder, some), its verdicts on each of some rows in both orders. What was asked before
    is read from by-<folder>.jsonl below `out`; a model is loaded only if something is left."""
    place = lambda folder: out / f"by-{str(folder).strip('./').replace('/', '-')}.jsonl"
    args = {"frames": cfg.frames, "max_tiles": cfg.max_tiles}
    reward_model = lru_cache(1)(lambda folder: load(folder, device, **args))
    generative = lru_cache(1)(lambda folder: common.load(
        folder, device, style=judge_style(folder), **args))

    def readable(folder, encoder, row):
        """A prompt that is too long for a judge gets no verdict of it."""
        try:
            return encoder.check(row, "pixels") <= cfg.max_prompt_tokens
        except common.BadRow as e:
            raise SystemExit(f"{folder} cannot judge row {row['id']}: it {e}.")

    def scored(folder):
        return common.resumed(
            place(folder), {"model": common.stamps(folder), **args}, rows, lambda some: score_rows(
                *reward_model(folder), some, cfg.eval_batch, f"scores of {folder}"))

    def judged(folder, doubted):
        def work(some):
            model, encoder = generative(folder)
            fit = [k for k, row in enumerate(some) if readable(folder, encoder, row)]
            preds = common.judge(model, encoder, [some[k] for k in fit], sample_group,
                                 batch_size=cfg.eval_batch, max_new_tokens=cfg.judge_tokens,
                                 desc=f"verdicts of {folder}")
            said = [[] for _ in some]
            for p in preds:
                said[fit[p["row"]]].append(p["pred"])
            return said
        return common.resumed(place(folder), {"model": common.stamps(folder), **args,
                                              "judge_tokens": cfg.judge_tokens}, doubted, work)

    return scored, judged


def curate(rows, voters, own, judges, cfg, device, out):
    """DT2IT 3.3, three steps; see its Figure 1 (d). Writes curated.jsonl, dropped.jsonl (each row
    with what happened to it) and curation.json below `out`. -> the curated rows."""
    out = Path(out)
    out.mkdir(parents=True, exist_ok=True)
    rows = [{**row, "media": [str(Path(m).resolve()) for m in row["media"]],
             "curation": {"given": row["label"], "flipped": False,
                          "before": row.get("curation")}} for row in rows]
    scored, judged = voters_and_judges(rows, cfg, device, out)
    # 1. preference strength: the mean margin of the voters; flip the worst, set by set
    votes = [scored(folder) for folder in voters]
    for source in dict.fromkeys(row.get("source") for row in rows) if votes else ():
        its = [i for i, row in enumerate(rows) if row.get("source") == source]
        strengths = [sum(margin(v[i], rows[i]["label"]) for v in votes) / len(votes) for i in its]
        worst = to_flip(strengths)
        for k, i in enumerate(its):
            rows[i]["curation"] |= {"strength": strengths[k], "flipped": k in worst}
            if k in worst:
                rows[i]["label"] = OTHER[rows[i]["label"]]
    # 2. what the own model agrees with is kept
    doubted = []
    for row, scores in zip(rows, scored(own)):
        row["curation"] |= {"own_margin": margin(scores, row["label"]), "fate": "agreed"}
        if not row["curation"]["own_margin"] > 0:  # also if it is not a number
            doubted.append(row)
    # 3. the rest goes to the judges, each in both orders; majority, ties dropped
    ballots = [judged(folder, doubted) for folder in judges] if doubted else []
    for i, row in enumerate(doubted):
        said = Counter(v for ballot in ballots for v in ballot[i] if v)
        row["curation"] |= {"fate": "re-annotated", "votes": dict(said)}
        if said["A"] == said["B"]:
            row["curation"]["fate"] = "dropped: " + ("tie" if said["A"] else "no verdict")
        else:
            row["label"] = max("AB", key=lambda side: said[side])
    for row in rows:
        if row["label"] != row["curation"]["given"]:
            row["rationale"] = None  # it argued for the other side
    parts = [[r for r in rows if r["curation"]["fate"].startswith("dropped") == b] for b in (0, 1)]
    summary = {"rows": len(rows), "flipped": sum(r["curation"]["flipped"] for r in rows),
               **Counter(r["curation"]["fate"] for r in rows), "kept": len(parts[0]),
               "kept with another label than given": sum(
                   r["label"] != r["curation"]["given"] for r in parts[0])}
    if common.rank() == 0:
        common.write_lines(out / "dropped.jsonl", parts[1])
        common.write_lines(out / "curated.jsonl", parts[0])
        (out / "curation.json").write_text(json.dumps(summary, indent=2) + "\n")
        print(f"{out}/curated.jsonl: " + ", ".join(f"{k} {v}" for k, v in summary.items()))
    return parts[0]


def iterate(cfg, device):
    """DT2IT 3.3, the framework: training and curation in turns, T times."""
    model, encoder = common.load(cfg.model, device, frames=cfg.frames, max_tiles=cfg.max_tiles)
    del model  # train() and curate() load what they need
    settings = settings_of(asdict(cfg))
    data, noisy = (load_pairs(source, encoder, settings, cfg, cfg.exclude)
                   for source in (cfg.data, cfg.curate))                       # D_0, and D^open
    if len(noisy) < cfg.iterations:
        raise SystemExit(f"{cfg.curate}: {len(noisy)} rows are too few for --iterations "
                         f"{cfg.iterations}.")
    step = lambda t, name: Path(cfg.out, f"{t}-{name}")

    def trained(rows, out):
        if Path(out, "stage.json").exists():
            common.open_run(out, cfg)  # refuses a run of other settings
        else:
            train(cfg, device, out, rows)
        return out

    own = trained(data, step(0, "model"))                                      # r_0
    for t in range(1, cfg.iterations + 1):
        # UNSPECIFIED: what is new in an iteration (paper: three data sets, then two); a T-th here
        new = noisy[t - 1::cfg.iterations]                                     # 1. D_t^open
        new = curate(new, [own, *cfg.models], own, cfg.judges, cfg, device,
                     step(t, "new"))                                           # 2. D_t^cur
        both = data + new                                                      # 3. D'_t, r'_t
        better = trained(both, step(t, "first"))
        data = curate(both, [], better, cfg.judges, cfg, device, step(t, "all"))  # 4. D_t
        if not data:
            raise SystemExit(f"{step(t, 'all')}: curation left no row; see dropped.jsonl.")
        own = trained(data, step(t, "model"))                                  # 5. r_t
    if common.rank() == 0:
        print(f"the last model is {own}/")


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
End with a JSON list, one object a response: \
[{{"weights": [6 numbers], "scores": [6 integers]}}, ...]

### User Prompt:
{question}

### Standard Human-Generated Answer:
{reference}

{responses}"""


def overall(text, n):
    """The teacher's text on n responses -> their weighted scores S, or None if it is malformed."""
    try:
        found = json.loads(re.search(r"\[\s*\{.*\}\s*\]", text, re.DOTALL)[0])
        fine = len(found) == n and all(
            len(x["weights"]) == len(x["scores"]) == 6 and abs(sum(x["weights"]) - 1) < 0.01
            and min(x["weights"]) >= 0 and set(x["scores"]) <= set(range(11)) for x in found)
        return [round(sum(w * s for w, s in zip(x["weights"], x["scores"])), 2)
                for x in found] if fine else None
    except (ValueError, KeyError, TypeError):
        return None


def agreed(listwise, pointwise):
    """Scores of K responses -> (better, worse) wherever both ways of scoring say so."""
    both = range(len(listwise))
    return [(i, j) for i in both for j in both
            if listwise[i] > listwise[j] and pointwise[i] > pointwise[j]]


def pairs_of(row, models, cfg):
    """DT2IT 3.1, steps 2 to 5, for one row. -> its preference rows, and what was done."""
    rng = random.Random(f"{cfg.seed}:{row['id']}")
    # one model writes them all: the better one is not known by its style
    writer, helper = rng.choice(cfg.candidates), rng.choice(cfg.candidates)
    video = row["task"].startswith("video")
    places = ["<video>" if video else "<image>"] * len(row["media"])

    def answers(folder, texts, n, temperature=1.0, noise=0.0):
        model, encoder = models[folder]
        device = next(model.parameters()).device
        prompts = [encoder.encode(" ".join([*places, t]), row["media"], video) for t in texts]
        seed = rng.randrange(2**31)
        for prompt in prompts if noise else ():  # pixels are normalised: their std is about 1
            prompt.pixels = prompt.pixels + noise * torch.randn(
                prompt.pixels.shape, generator=torch.Generator().manual_seed(seed))
        return [encoder.decode(ids) for ids in sample_group(
            model, encoder, prompts, n, temperature, cfg.judge_tokens,
            torch.Generator(device).manual_seed(seed)).ids]

    def scores(groups):
        told = ["\n\n".join(f"### Response {i}:\n{t}" for i, t in enumerate(g, 1)) for g in groups]
        texts = answers(cfg.teacher, [SCORING.format(
            question=row["prompt"], reference=row["reference"], responses=t) for t in told], 1, 0.0)
        return [overall(t, len(g)) for t, g in zip(texts, groups)]

    # DEVIATION: the paper samples hot and with a nucleus, ours at temperature 1 without
    responses = row["responses"] or answers(writer, [row["prompt"]], cfg.samples)      # step 2
    listwise, = scores([responses])                                                    # step 3
    done = "as they were"
    # step 4. UNSPECIFIED: the new ones replace as many, and all are scored again
    if listwise and max(listwise) <= cfg.low:
        done = "all low"
        known = f"{row['prompt']}\nThe answer is known: {row['reference']}"
        responses = responses[1:] + answers(helper, [known], 1)
    elif listwise and min(listwise) >= cfg.high and row["media"]:
        done, half = "all high", len(responses) // 2
        responses = responses[half:] + answers(writer, [row["prompt"]], half, noise=cfg.noise)
    if done != "as they were":
        listwise, = scores([responses])
    pointwise = scores([[r] for r in responses])                                       # step 5
    if listwise is None or None in pointwise:  # DEVIATION: the released script tries 3 times
        return [], "malformed scores"
    pairs = [common.better_first(f"{row['id']}/{i}-{j}", row["prompt"], responses[i], responses[j],
                                 row["task"], row["media"], source="constructed")
             for i, j in agreed(listwise, [p[0] for p in pointwise])
             if responses[i] != responses[j]]
    return [p for p in pairs if usable(p, models)], done


def usable(pair, models):
    """Not if an answer is empty, or holds a tag or special token: training would refuse it."""
    special = [t for _, encoder in models.values() for t in encoder.special_tokens]
    try:
        return bool(common.check_row(pair, "", (*common.FORBIDDEN, *special)))
    except common.BadRow:
        return False


def construct(cfg, device):
    """Every row of --construct -> pairs.jsonl. All checkpoints are in memory at once."""
    rows, out = [], Path(cfg.out)
    out.mkdir(parents=True, exist_ok=True)
    for where, raw in common.raw_rows(cfg.construct):
        try:
            if isinstance(raw, common.BadRow):
                raise raw
            if not isinstance(raw, dict) or not isinstance(raw.get("reference"), str) or \
                    str(raw.get("task")).endswith("generation"):
                raise common.BadRow("needs a 'reference' text and a task that is no generation")
            texts = raw.get("responses") or []
            if not isinstance(texts, list) or len(texts) == 1:
                raise common.BadRow("has 'responses' that are no list of two or more")
            for text in [*texts, raw["reference"]]:
                row = common.check_row({**raw, "label": "A", "responses": [text, text]},
                                       Path(cfg.construct).resolve().parent)
            if len(row["media"]) != common.N_MEDIA[row["task"]]:
                raise common.BadRow("has no media; the teacher reads no captions")
            for path in row["media"]:  # now, not in the middle of the run
                common.open_video(path, 1) if "video" in row["task"] else common.open_image(path)
            rows.append({**row, "responses": texts})
        except common.BadRow as e:
            raise SystemExit(f"{where}: row {e}.")
    models = {f: common.load(f, device, frames=cfg.frames, max_tiles=cfg.max_tiles)
              for f in {cfg.teacher, *cfg.candidates}}

    def work(some):
        mine = range(common.rank(), len(some), common.world())
        found = [(i, pairs_of(some[i], models, cfg)) for i in mine]
        return [x for _, x in sorted(common.gather_list(found), key=lambda x: x[0])]

    made_by = {k: getattr(cfg, k) for k in ("teacher", "candidates", "samples", "low", "high",
                                            "noise", "judge_tokens", "seed", "frames", "max_tiles")}
    made_by["files"] = common.stamps(cfg.teacher, *cfg.candidates)
    found = common.resumed(out / "groups.jsonl", made_by, rows, work, chunk=16)
    if common.rank() == 0:
        common.write_lines(out / "pairs.jsonl", [pair for pairs, _ in found for pair in pairs])
        print(f"{out}/pairs.jsonl: {sum(len(p) for p, _ in found)} pairs of {len(rows)} rows: "
              + ", ".join(f"{k} {n}" for k, n in Counter(d for _, d in found).items()))


def main():
    cfg = common.parse_config(Config, __doc__, PAPER)
    if not 1 <= cfg.head_layers <= 5 or cfg.max_response_tokens < 1:
        raise SystemExit("--head_layers is 1 to 5, --max_response_tokens at least 1.")
    if cfg.iterations and not cfg.curate:
        raise SystemExit("--iterations needs rows to --curate.")
    device = common.start_processes(cfg.batch_size)
    if cfg.construct:
        if not (cfg.teacher and cfg.candidates):
            raise SystemExit("--construct needs a --teacher and --candidates.")
        if cfg.samples < 2:
            raise SystemExit("--samples is at least 2: one response makes no pair.")
        construct(cfg, device)
    elif cfg.iterations:
        iterate(cfg, device)
    elif cfg.curate:
        if not cfg.models:
            raise SystemExit("--curate needs --models: reward models made by this script.")
        model, encoder = load(cfg.models[0], device, cfg.frames, cfg.max_tiles)
        rows = load_pairs(cfg.curate, encoder, model.settings, cfg, cfg.exclude)
        del model  # it is loaded again when its turn comes
        if not curate(rows, cfg.models, cfg.models[0], cfg.judges, cfg, device, cfg.out):
            raise SystemExit(f"{cfg.out}: curation left no row; see dropped.jsonl.")
    else:
        train(cfg, device, cfg.out)
    common.end_processes()


if __name__ == "__main__":
    main()
