"""
A Bradley-Terry reward model: one number for one response (MSRL Eq. 1, BaseReward, DT2IT-MRM).

    python bt_reward.py                                          # toy world, all five tasks
    torchrun --nproc_per_node=8 bt_reward.py --preset paper      # MSRL's discriminative baseline
    torchrun --nproc_per_node=8 bt_reward.py --preset basereward    # or dt2it

The language model's head gives way to a small MLP that reads the last token's hidden state:

    input     text, understanding    prompt, media | response
              generation, pair       both media, prompt, which is better? | "Image 1 is better ..."
              generation, swap       one medium, describe | prompt
    reward    r(y|x) = MLP(hidden state of the last token)                   score_group
    loss      -log sigmoid(r(y_w|x) - r(y_l|x))                    Eq. 1     bt_loss

Both responses to a prompt stand in one sequence, [prompt | response A | response B], and cannot see
each other, so prompt and media are computed once: the packed forward of stage 1.

What DT2IT-MRM does to preference rows with such models (--construct, --curate, --iterations) is in
dt2it.py.

Shapes: b rows in a micro-batch, G responses per prompt, N scores, L tokens, H hidden size.
"""

import math
import random
import sys
import time
from dataclasses import asdict, dataclass
from functools import partial
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
import decoding
import sharding
from common import knob
from data import TABLE_5, load_rows
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
                     "MSRL's and DT2IT's paper: 1e-5; BaseReward: 3e-6")
    epochs: int = knob(10, "passes over the rows (papers: 1)")

    # data
    heldout: str = knob(HELDOUT, "rows scored before and after; '' for none")
    exclude: str = knob("", "benchmark files; training rows that are also in them are left out")
    media_root: str = knob("", "folders, separated by commas, where rows' media may lie, too; else "
                           "in that of their file")
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
    max_pixels: int = knob(0, "of an image for Qwen-VL, kept by the checkpoint; 0: as it says "
                           "(DT2IT: 518 x 518)")

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
    lora_rank: int = knob(0, "train a LoRA adapter of this rank, not the weights; 0 = off. On all "
                          "linear layers but the head, those of the vision tower unless it is "
                          "frozen. Needs peft, and about 10 times the --lr (UNSPECIFIED in MSRL)")
    gradient_checkpointing: bool = knob(False, "recompute activations: slower, far less memory")
    shard: Literal["auto", "yes", "no"] = knob(
        "auto", "FSDP2: split weights, gradients, optimiser state and KL reference among the "
        "processes of torchrun. 'auto': if a replica does not fit the card, as --dry_run tells it")

    # looks and logs
    eval_batch: int = knob(128, "rows scored together")
    save_every: int = knob(100, "steps between saved states")
    tracker: Literal["none", "tensorboard", "wandb", "trackio"] = knob(
        "none", "draws the curves of metrics.jsonl elsewhere, too, if it is installed")

    def check(self):
        if not 1 <= self.head_layers <= 5:
            raise ValueError("--head_layers is 1 to 5")
        if self.max_response_tokens < 1:
            raise ValueError("--max_response_tokens is at least 1")


# What models of 7B and more need, whoever's recipe it is
LARGE = dict(heldout="", micro_batch=1, max_prompt_tokens=8192, gradient_checkpointing=True,
             skip_bad_rows=True, eval_batch=4)

# MSRL A.2: one epoch over "the complete set" of labelled multimodal rows, here those of stages 2
# and 3 together, at 1e-5 and 128
PAPER = LARGE | dict(**common.BACKBONES["internvl"], epochs=1, batch_size=128, lr=1e-5,
                     data=TABLE_5.format(13000, 5000, 5219, 6666, 5000, 4595))

# BaseReward 4.1: Qwen2.5-VL-7B, 3e-6, 128, no auxiliary loss (3.3: nor length norm), two layers
# with SiLU (3.2). UNSPECIFIED: epochs (ours: one, as MSRL and DT2IT), the schedule (ours: DT2IT's),
# frozen parts (none), pixels (those of the same authors' R1-Reward script).
# Data: the seven sets that are not gray in Table 5, those of Table 8, 2.8M pairs; sizes: Table 4.
# DEVIATION: of R1-Reward's 200k only its RL rows are released; "Others" (63k) are not listed;
# Ultra-Hard has the pairs of UltraFeedback with the largest difference, ours are drawn from all.
# UNSPECIFIED: which 65k of Tulu-3. MMPR comes as many files: write their rows to one, with the
# paths of images relative to it.
BASEREWARD = LARGE | dict(
    model="Qwen/Qwen2.5-VL-7B-Instruct", max_pixels=501_760, epochs=1, batch_size=128, lr=3e-6,
    head_layers=2, head_activation="silu", zero_coefficient=0.0, length_norm=False,
    data="openbmb/RLAIF-V-Dataset,data/MMPR-v1.2/all.jsonl:2000000,yifanzhang114/R1-Reward-RL,"
         "allenai/llama-3.1-tulu-3-8b-preference-mixture:65000,"
         "allenai/olmo-2-1124-7b-preference-mix,openbmb/UltraFeedback:63000")

# DT2IT-MRM 4.3: Qwen3-VL-8B-Instruct, a linear head, no auxiliary loss, one epoch at 1e-5 and 512,
# images of up to 518 x 518 pixels, a cosine after a warm-up of 0.1 (learning_rate). Its script: the
# vision tower is frozen. 3.2, Eq. 3: generation rows are pairs of images.
# Data: what dt2it.py writes, D_0 and the curated open sets; the paper's own rows are not released.
DT2IT = LARGE | dict(
    model="Qwen/Qwen3-VL-8B-Instruct", max_pixels=518 * 518, epochs=1, batch_size=512, lr=1e-5,
    head_layers=1, zero_coefficient=0.0, length_norm=False, freeze_vision=True, t2i="pair",
    data="runs/pairs/pairs.jsonl,runs/curated/curated.jsonl")

PRESETS = {"paper": PAPER, "basereward": BASEREWARD, "dt2it": DT2IT}


# ------------------------------------------------------------------------------------------- model
def reward_head(hidden, layers, activation):
    """An MLP from [N, H] to [N, 1]. UNSPECIFIED: the width of the layers in between; ours is H."""
    kinds = {"none": nn.Identity, "tanh": nn.Tanh, "relu": nn.ReLU, "silu": nn.SiLU}
    parts = []
    for _ in range(layers - 1):
        parts += [nn.Linear(hidden, hidden), kinds[activation]()]
    return nn.Sequential(*parts, nn.Linear(hidden, 1))


def add_head(model, settings):
    """`settings`, see settings_of(), say what the head is and how rows are put to the model. The
    head of the language model, which nothing uses any more, is frozen unless it is the embeddings:
    several processes would fill in a gradient and make moments for it."""
    embeddings = model.get_input_embeddings().weight                                   # [V, H]
    unused = model.get_output_embeddings()
    if unused.weight is not embeddings:
        unused.requires_grad_(False)
    head = reward_head(embeddings.shape[1], settings["head_layers"], settings["head_activation"])
    model.reward_head = head.to(embeddings.device)
    model.settings = settings
    model.forward = partial(token_scores, model)
    return model


def token_scores(model, last, **inputs):
    """The forward of a reward model, as one call, because a sharded model is whole only in its own.
    last [b, S]: True for the tokens to be read, among the last S of L -> scores [N] in fp32."""
    with common.autocast(last.device):
        hidden = model.model(use_cache=False, **inputs).last_hidden_state              # [b, L, H]
    hidden = hidden[:, -last.shape[1]:][last]                                          # [N, H]
    return model.reward_head(hidden.float())[:, 0]                               # r(y|x), [N]


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
    masks = decoding.layer_masks(model, sees, positions, answers=answers)
    following = F.pad(owner[:, 1:], (0, 1), value=-1)  # the next token's answer       [b, S]
    last = (owner > 0) & (owner != following)
    scores = model(last=last, input_ids=ids, attention_mask=masks, position_ids=positions, **media)
    if model.settings["length_norm"]:
        # UNSPECIFIED: l in Algorithm 1; ours counts tokens, the end-of-sequence token included.
        # Scoring divides, too: what was trained is the quotient.
        lengths = []
        for group in answers:
            lengths += [len(answer) for answer in group]
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
    shards = sharding.wanted(cfg, device)
    model, encoder = common.load(cfg.model, device, made_by=Config.model, shards=shards,
                                 frames=cfg.frames, max_tiles=cfg.max_tiles,
                                 max_pixels=cfg.max_pixels)
    settings = settings_of(asdict(cfg))
    if cfg.freeze_vision:
        common.freeze_vision(model)
    if cfg.lora_rank:
        common.add_adapter(model, cfg.lora_rank, cfg.seed)
    torch.manual_seed(cfg.seed)
    add_head(model, settings)  # behind the adapter: it is new, and trained as it is
    if shards:
        sharding.shard(model, cfg, device)
    if cfg.gradient_checkpointing:
        model.gradient_checkpointing_enable()
    if rows is None:
        rows = load_pairs(cfg.data, encoder, settings, cfg, cfg.exclude)
    heldout = load_pairs(cfg.heldout, encoder, settings, cfg) if cfg.heldout else []
    if cfg.balance_length:
        rows = balanced(rows, cfg.seed)
    optimizer = common.make_optimizer(model, cfg.lr)
    steps = max(1, cfg.epochs * len(rows) // cfg.batch_size)
    start, kept = common.resume(state, model, optimizer)
    if state is None and heldout:
        kept["before"] = evaluate(model, encoder, heldout, cfg, "before")

    mine = slice(common.rank(), None, common.world())  # this process's rows of a batch
    bar = common.progress(start, steps, STAGE)
    for step in bar:
        began = time.time()
        batch = common.batch_of(rows, step, cfg.batch_size, cfg.seed)[mine]
        batch.sort(key=lambda row: row["tokens"])  # alike lengths together: less padding
        rate = learning_rate(step, steps, cfg.lr)
        for group in optimizer.param_groups:
            group["lr"] = rate
        scores, loss = backward(model, encoder, batch, cfg)
        norm = common.optimizer_step(optimizer, common.trainable(model), cfg.max_grad_norm)
        loss, = common.sum_over_ranks(loss)
        metrics = describe(common.gather_list(batch), common.gather_list(scores))
        bar.set_postfix(loss=f"{loss:.3f}", acc=f"{metrics['accuracy']:.2f}", refresh=False)
        stop = bar.stop_asked()  # SIGTERM
        if common.rank() == 0:
            common.log_step(out, {
                "step": step + 1, "loss": loss, "grad_norm": norm, "lr": rate, **metrics,
                "skipped_steps": int(not math.isfinite(norm)),
                "step_time": time.time() - began, "peak_memory_gb": common.peak_memory_gb(),
                **common.first_change(optimizer)}, cfg.tracker)
        if stop or (step + 1) % cfg.save_every == 0 or step + 1 == steps:
            common.save_state(out, model, optimizer, step + 1, cfg, **kept)
        if stop:
            common.end_stopped(out, step + 1)
    after = evaluate(model, encoder, heldout, cfg, "after") if heldout else None
    save(out, model, encoder, cfg, steps, {"before": kept.get("before"), "after": after})
    if common.rank() == 0:
        print(f"wrote {out}/")
    common.gather_list([])  # no process goes on before all is written


def learning_rate(step, steps, peak):
    """Of one step (the first is 0): a line up to `peak`, then half a cosine down to 0."""
    warmup = max(1, round(0.1 * steps))
    if step < warmup:
        return peak * (step + 1) / warmup
    done = (step - warmup) / max(1, steps - warmup)  # 0 to 1
    return peak * (0.5 + 0.5 * math.cos(math.pi * done))


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
    """Write the head to a file of its own, and the rest as an ordinary checkpoint. All processes
    call it, the first one writes."""
    head = model.reward_head
    weights = sharding.full_state(head)
    if common.rank() == 0:
        with common.writing(Path(out, "reward_head.safetensors")):
            save_file(weights, Path(out, "reward_head.safetensors"))
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
    ids = encoder.answer_ids(text)[:-1]  # without the end
    return ids[:limit - 1] + [encoder.eos_id]


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

    # all that load_rows() needs
    reader = SimpleNamespace(forbidden=encoder.forbidden, check=check,
                             kept_as=f"{encoder.kept_as} {settings}")
    rows = load_rows(sources, reader, "pixels", cfg.max_prompt_tokens, cfg.skip_bad_rows,
                     cfg.media_root, exclude)
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
        longest = 0
        for _, _, answers in as_texts(row, settings["t2i"]):
            for text in answers:
                longest = max(longest, len(encoder.answer_ids(text)))
        if longest > settings["max_response_tokens"]:
            count += 1
    return count


def report_cut(rows, encoder, settings, what):
    """Say how many rows have a cut response; on stderr, as eval.py writes JSON to stdout."""
    if common.rank() > 0:
        return
    count = cut_rows(rows, encoder, settings)
    if count:
        print(f"{what}: {count} of {len(rows)} rows have a response cut at "
              f"{settings['max_response_tokens']} tokens", file=sys.stderr)


def extra_length(row):
    """Characters that the better response has more than the worse one; 0 for media."""
    if row["responses"] is None:
        return 0
    a, b = row["responses"]
    extra = len(a) - len(b)
    return extra if row["label"] == "A" else -extra


def balanced(rows, seed):
    """Drop rows at random until better is longer as often as shorter (BaseReward D.4).
    UNSPECIFIED: how the paper resamples. Raises SystemExit if no row is left."""
    longer, shorter, equal = [], [], []  # rows, by their better response
    for row in rows:
        extra = extra_length(row)
        if extra > 0:
            longer.append(row)
        elif extra < 0:
            shorter.append(row)
        else:
            equal.append(row)
    n, rng = min(len(longer), len(shorter)), random.Random(seed)
    kept = equal + rng.sample(longer, n) + rng.sample(shorter, n)
    if common.rank() == 0:
        print(f"--balance_length: the better response is the longer one in {len(longer)} "
              f"rows, the shorter in {len(shorter)}; {len(kept)} of {len(rows)} rows kept")
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
    with sharding.whole(model):  # processes have different numbers of batches
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
    swapped_scores = score_all(model, encoder, swapped, batch_size, desc)
    for i, (b, a) in zip(pairs, swapped_scores, strict=True):  # here B stood first
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


def main():
    cfg = common.parse_config(Config, __doc__, PRESETS)
    device = common.start_processes(cfg.batch_size)
    train(cfg, device, cfg.out)
    common.end_processes()


if __name__ == "__main__":
    main()
