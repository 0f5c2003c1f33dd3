"""
`--dry_run` on any training script: what would be run, what is missing, and what memory it takes. No
weights are loaded, nothing is downloaded, no run folder is made.

    python stage1_text_grpo.py --preset paper --dry_run

    1  report      settings beside the paper's values; steps and tokens
    2  sources     every file, data set and checkpoint that is named: found, or what makes it
    3  sizes       parameters, counted on torch's meta device
    4  memory      of one process in bytes, one function a term, by formulas that can be checked by
                   hand; tests/test_dry_run.py compares them with what autograd really keeps

Memory is told for the worst case: all prompts have --max_prompt_tokens and all answers
--max_new_tokens. It is that of a GPU, where autocast computes in bf16 with fp32 weights.

Shapes: P prompt length, C answer length, G answers that share a prompt, L = P + G*C, b prompts in a
micro-batch, S = G*C tokens that are scored, V vocabulary.
"""

import re
import sys
import time
from dataclasses import asdict, dataclass, replace
from itertools import islice
from pathlib import Path

import torch
import transformers
from transformers.utils import cached_file

import common
import data
import decoding
from stage1_text_grpo import ROWS_AT_ONCE

PROCESSES = (1, 8, 16)
GIB = 2 ** 30


def room(total):
    """GiB for tensors on a card of so many. CUDA, its libraries and NCCL take about one, and what
    the allocator cannot use is lost (UNSPECIFIED how much; ours: 3 of 79, and 1.5 at least)."""
    return total - 1 - max(1.5, total * 3 / 79)


CARDS = {"80 GB": room(79), "24 GB": room(23.5)}  # 75 and 21


# ==================================================================================================
# 1. The report

def report(cfg, presets, preset):
    """Print it. `presets`: the script's; `preset`: the name of the one that was taken, or "toy"."""
    if common.rank() > 0:
        return
    form = form_of(cfg)
    print_settings(cfg, presets, preset)
    print_checkpoints(cfg)
    rows = print_sources(cfg)
    print_steps(cfg, rows, mean_prompt(cfg, form))
    sizes = sizes_of(cfg)
    print_sizes(sizes)
    print_memory(sizes, cfg, form)


def form_of(cfg):
    """How the script of these settings shows rows with media."""
    return getattr(cfg, "form", getattr(sys.modules[type(cfg).__module__], "FORM", "pixels"))


def print_settings(cfg, presets, preset):
    """The knobs that are not at their default, or for which the preset, by default the first one,
    has another value."""
    name = preset if preset in presets else next(iter(presets))
    values = presets[name](cfg) if callable(presets[name]) else presets[name]
    lines = [("setting", "this run", "default", f"--preset {name}")]
    for knob, default in asdict(type(cfg)()).items():
        value = getattr(cfg, knob)
        if value != default or values.get(knob, value) != value:
            lines.append((knob, value, default, values.get(knob, default)))
    print()
    for knob, *values in lines:
        cells = [shorten("''" if value == "" else str(value)).ljust(27) for value in values]
        print(f"{knob:24}{' '.join(cells)}".rstrip())


def shorten(text, width=27):
    return text if len(text) <= width else text[:width - 3] + "..."


def print_steps(cfg, rows, measured):
    """`rows`: how many --data has, None if that is not known. `measured`: see mean_prompt()."""
    print()
    work = work_of(cfg, 1, "pixels")
    if work.kind == "grpo":
        what = f"{cfg.batch_size} prompts x {work.answers} answers"
        print(f"steps       {cfg.max_steps:,} of {what}")
    elif rows is None:
        print(f"steps       epochs x rows / {cfg.batch_size}; how many rows is not known yet")
    else:
        steps = max(1, cfg.epochs * rows // cfg.batch_size)
        print(f"steps       {steps:,}: {cfg.epochs} epochs of up to {rows:,} rows, "
              f"{cfg.batch_size} a step")
    answers = work.answers * work.answer
    most = cfg.batch_size * (work.prompt + answers)
    print(f"tokens      a step has up to {most:,}: {cfg.batch_size} x ({work.prompt:,} of the "
          f"prompt + {work.answers} x {work.answer:,})")
    if measured:
        count, mean = measured
        print(f"            prompts have {mean:,.0f} on average ({count} rows of --data), so about "
              f"{cfg.batch_size * (mean + answers):,.0f}")


def mean_prompt(cfg, form, most=200, seconds=5):
    """-> (rows, mean tokens of their prompts) of the first rows of --data, or None if there is no
    file, or no checkpoint here whose tokenizer would tell."""
    source = re.sub(r":\d+(@\d+)?$", "", cfg.data.split(",")[0])
    here = Path(cfg.model).is_dir() and checkpoint_state(cfg.model).startswith("found")
    if not here or not Path(source).is_file():
        return None
    sight = {"frames": getattr(cfg, "frames", 8), "max_tiles": getattr(cfg, "max_tiles", 12),
             "max_pixels": getattr(cfg, "max_pixels", 0), "style": getattr(cfg, "style", "msrl")}
    config = transformers.AutoConfig.from_pretrained(cfg.model)
    encoder = common.Encoder(cfg.model, config, **sight)
    lengths, began = [], time.time()
    for where, raw in data.raw_rows(source):
        if isinstance(raw, common.BadRow):
            continue
        try:
            for row in data.convert(raw, where.rpartition(":")[2].strip("[]")):
                row = common.check_row(row, Path(source).parent, encoder.forbidden)
                lengths.append(prompt_tokens(row, encoder, cfg, form))
        except common.BadRow:  # first_bad_row() says so
            continue
        if len(lengths) >= most or time.time() - began > seconds:
            break
    return (len(lengths), sum(lengths) / len(lengths)) if lengths else None


def prompt_tokens(row, encoder, cfg, form):
    """Of one row, as this script shows it. Raises BadRow."""
    if hasattr(cfg, "head_layers"):  # a reward model has prompts of its own
        import bt_reward
        return bt_reward.measure(row, encoder, bt_reward.settings_of(asdict(cfg)))
    return encoder.check(row, form)


# ==================================================================================================
# 2. Sources and checkpoints

def print_sources(cfg):
    """-> rows of --data, None if one of its sources does not tell."""
    total = 0
    print()
    for name in ("data", "heldout", "exclude", "replay", "construct", "curate"):
        for source in filter(None, getattr(cfg, name, "").split(",")):
            state, rows = source_state(source)
            if name not in ("exclude", "construct"):
                state += first_bad_row(source)
            print(f"--{name:10}{source}: {state}")
            if name == "data":
                total = None if rows is None or total is None else total + rows
    return total


def source_state(source):
    """-> what to say of one source, and how many rows it gives or None."""
    sample = re.fullmatch(r"(.+?):(\d+)(?:@(\d+))?", source)
    wanted, offset = None, 0
    if sample:
        source, wanted, offset = sample[1], int(sample[2]), int(sample[3] or 0)
    path = Path(source)
    if path.is_file():
        there = count_rows(path)
        rows = there if wanted is None else max(0, min(wanted, there - offset))
        return f"found, {rows:,} of {there:,} rows", rows
    if path.is_dir():
        return "MISSING: is a folder; name a file in it", None
    if is_hub_id(source):
        folder = Path(hub_cache(), "datasets--" + source.replace("/", "--"))
        if folder.is_dir():
            return "found in the hub's local cache", wanted
        return "on the hub; `hf download --repo-type dataset` fetches it beforehand", wanted
    return f"MISSING: {maker_of(source)}", None


def first_bad_row(source, most=100):
    """-> what to say of the first bad one of the first rows of a file; '' if there is none. Media
    are not opened."""
    path = Path(re.sub(r":\d+(@\d+)?$", "", source))
    if not path.is_file():
        return ""
    for where, raw in islice(data.raw_rows(str(path)), most):
        try:
            if isinstance(raw, common.BadRow):
                raise raw
            for row in data.convert(raw, where.rpartition(":")[2].strip("[]")):
                common.check_row(row, path.parent)
        except common.BadRow as e:
            return f"; {where}: row {e}"
    return ""


def count_rows(path):
    if path.suffix == ".parquet":
        import pyarrow.parquet  # here, because it takes a while to import; datasets brings it
        return pyarrow.parquet.ParquetFile(path).metadata.num_rows
    if path.suffix == ".jsonl":
        with open(path, "rb") as file:
            return sum(1 for line in file if line.strip())
    return sum(1 for _ in data.file_rows(path))


def print_checkpoints(cfg):
    print()
    for name in ("model", "referee", "captioner", "teacher", "candidates", "models", "judges"):
        folders = getattr(cfg, name, "")
        if isinstance(folders, str):
            folders = [folders]
        for folder in folders:
            if folder and (name, folder) != ("referee", "rule"):
                print(f"--{name:10}{folder}: {checkpoint_state(folder)}")


def checkpoint_state(folder):
    if Path(folder).is_dir():
        for files, what in (("config.json", "config.json"), ("*.safetensors", "weights"),
                            ("tokenizer*", "tokenizer")):
            if not any(Path(folder).glob(files)):
                return f"MISSING: no {what} in it; {maker_of(folder)}"
        stage = common.stage_of(folder)
        return f"found, of {stage['stage']}, step {stage['step']}" if stage else "found"
    if config_file(folder):
        return "found in the hub's local cache"
    if is_hub_id(folder):
        return "on the hub; `hf download` fetches it beforehand"
    return f"MISSING: {maker_of(folder)}"


def config_file(folder):
    """-> its config.json, here or in the hub's local cache, or None."""
    if Path(folder).is_dir():
        file = Path(folder, "config.json")
        return file if file.is_file() else None
    if not is_hub_id(folder):
        return None
    return cached_file(folder, "config.json", local_files_only=True,
                       _raise_exceptions_for_missing_entries=False,
                       _raise_exceptions_for_connection_errors=False)


def is_hub_id(name):
    ours = name.startswith((".", "/", "runs/", "toy/", "data/"))
    return name.count("/") == 1 and not ours and not Path(name).suffix.startswith(".json")


def hub_cache():
    from huggingface_hub.constants import HF_HUB_CACHE  # transformers brings it
    return HF_HUB_CACHE


def maker_of(name):
    """What to do about a file or folder that is not there."""
    parts = Path(name).parts
    if parts[0] == "toy":
        return "`python tests/toy_world.py` makes it"
    if parts[-1] == "captioned.jsonl":
        return "`python stage2_caption_grpo.py --captioner DIR` writes it"
    if parts[-1] == "annotated.jsonl":
        return "`python eval.py --attempts 3` writes it"
    if parts[-1] == "pairs.jsonl":
        return "`python dt2it.py --construct` writes it"
    script = f"{parts[1]}.py" if parts[0] == "runs" and len(parts) > 1 else ""
    if script and Path(__file__).with_name(script).is_file():
        return f"`python {script}` makes it"
    if parts[0] == "data":
        return "download the set (TABLE_5 and part 3 of data.py name them)"
    return "no such file or folder"


# ==================================================================================================
# 3. Sizes

VOCABULARY = 151_936
# InternVL3.5: hidden size, layers, heads, heads of keys and values, intermediate size of its
# language model, which is Qwen3 0.6B, 1.7B, 4B, 8B or 14B with a head of its own; heads have 128.
# Model card and Qwen3's config.json. Of 1B, 1,060,897,792 parameters are published.
INTERNVL = {"1B": (1024, 28, 16, 8, 3072), "2B": (2048, 28, 16, 8, 6144),
            "4B": (2560, 36, 32, 8, 9728), "8B": (4096, 36, 32, 8, 12288),
            "14B": (5120, 40, 40, 8, 17408)}
SHOWN = ("1B", "4B", "8B", "14B")
# InternViT-300M, the same in all; a tile of 448 x 448 is 32 x 32 patches and a class token
VISION = dict(hidden_size=1024, intermediate_size=4096, num_hidden_layers=24, attention_bias=True,
              num_attention_heads=16, image_size=[448, 448], patch_size=[14, 14])
TILE = 1025             # tokens of a tile in the vision tower,
TILE_PIXELS = 3 * 448 * 448
TILE_IN_PROMPT = 256    # and as placeholders in a prompt


def internvl_config(name):
    """The config of InternVL3.5 of a size."""
    hidden, layers, heads, kv_heads, intermediate = INTERNVL[name]
    text = dict(model_type="qwen3", vocab_size=VOCABULARY, hidden_size=hidden, head_dim=128,
                num_hidden_layers=layers, num_attention_heads=heads,
                num_key_value_heads=kv_heads, intermediate_size=intermediate,
                tie_word_embeddings=False)
    return transformers.InternVLConfig(text_config=text, vision_config=VISION,
                                       tie_word_embeddings=False)


@dataclass
class Size:
    """Of one model. Counts are of parameters; tied ones are counted once."""
    name: str
    parameters: int
    trained: int
    linear: int           # weights of linear layers that a gradient passes through
    layer: int            # of one layer of the language model
    head: int             # V * hidden
    tied: bool            # are head and embeddings one
    lora: bool
    vision_trained: bool
    text: object          # config of the language model
    vision: object        # of InternVL's vision tower; None without one, or with another

    @property
    def head_dim(self):
        given = getattr(self.text, "head_dim", None)
        return given or self.text.hidden_size // self.text.num_attention_heads

    @property
    def kv_heads(self):  # old models (GPT-2, Pythia) have as many as of queries, and do not say so
        return getattr(self.text, "num_key_value_heads", None) or self.text.num_attention_heads

    @property
    def intermediate(self):  # GPT-2 and OPT have other names for it, and four times as a rule
        return getattr(self.text, "intermediate_size", None) or 4 * self.text.hidden_size


def on_meta(config):
    """The model of a config, without weights."""
    auto = transformers.AutoModelForCausalLM
    if hasattr(config, "vision_config"):
        auto = transformers.AutoModelForImageTextToText
    with torch.device("meta"):
        model = auto.from_config(config, attn_implementation=decoding.ATTENTION)
    decoding.refuse_other_attention(model)
    return model


def measure(name, config, cfg=None):
    """-> Size of a model that is trained with the settings of a script; None: all of it is."""
    model = on_meta(config)
    head = model.get_output_embeddings()
    tied = head.weight is model.get_input_embeddings().weight
    if cfg and cfg.freeze_vision:
        common.freeze_vision(model)
    scores = hasattr(cfg, "head_layers")
    if scores and not tied:  # a reward model does not use it
        head.requires_grad_(False)
    linear = 0
    for layer in model.modules():
        if isinstance(layer, torch.nn.Linear) and layer.weight.requires_grad:
            linear += layer.weight.numel()
    decoder = model.get_decoder()
    layers = next(part for part in decoder.modules() if isinstance(part, torch.nn.ModuleList))
    layer = count(layers[0].parameters())
    lora = bool(cfg and cfg.lora_rank)
    if lora:
        common.add_adapter(model, cfg.lora_rank, seed=0)
    if scores:
        import bt_reward
        with torch.device("meta"):
            bt_reward.add_head(model, bt_reward.settings_of(asdict(cfg)))
    vision = getattr(config, "vision_config", None)
    if getattr(vision, "model_type", None) != "internvl_vision":
        vision = None
    return Size(name, count(model.parameters()), count(common.trainable(model)), linear, layer,
                head.weight.numel(), tied, lora, not (cfg and cfg.freeze_vision),
                config.get_text_config(), vision)


def count(parameters):
    return sum(parameter.numel() for parameter in parameters)


def sizes_of(cfg):
    """The model of this run, if its config is at hand, and InternVL3.5 in four sizes."""
    sizes = []
    file = config_file(cfg.model)
    if file:
        config = transformers.AutoConfig.from_pretrained(Path(file).parent)
        sizes.append(measure("--model", config, cfg))
    for name in SHOWN:
        sizes.append(measure(name, internvl_config(name), cfg))
    return sizes


def print_sizes(sizes):
    print(f"\n{'model':10}{'parameters':>16}{'trained':>16}{'frozen':>16}")
    for size in sizes:
        frozen = size.parameters - size.trained
        print(f"{size.name:10}{size.parameters:16,}{size.trained:16,}{frozen:16,}")
    print("1B to 14B are InternVL3.5's")


# ==================================================================================================
# 4. Memory

@dataclass
class Work:
    """What one process has to do, at most."""
    kind: str            # "grpo", "sft" (stages 0 and 2b) or "bt" (reward model)
    prompt: int          # P
    answer: int          # C
    answers: int         # G: 1 for SFT, 2 for a reward model
    prompts: int         # of one step
    micro: int           # b
    rolled_out: int      # prompts that are sampled for together; 0: none
    samples: int         # answers to each of them
    judged: int          # held-out or candidate rows that are judged together; 0: none
    tiles: int           # of one prompt
    reference: bool      # is there a KL, and so a reference
    checkpointing: bool  # are activations recomputed

    @property
    def length(self):    # L
        return self.prompt + self.answers * self.answer

    @property
    def packed(self):    # is attention that of decoding.packed_attention()
        return self.kind != "sft" and self.answers * self.answer >= decoding.TWO_CALLS_FROM

    @property
    def scored(self):    # 1 + S: the head works from the prompt's last token on
        return 1 + self.answers * self.answer


def work_of(cfg, processes, form):
    """-> Work of one of so many processes."""
    prompts = max(1, cfg.batch_size // processes)
    kind, answers, answer = "sft", 1, getattr(cfg, "max_new_tokens", 0)
    rolled_out = samples = judged = tiles = 0
    if hasattr(cfg, "group_size"):
        kind, answers = "grpo", cfg.group_size
        rolled_out, samples = min(cfg.rollout_batch, prompts), cfg.group_size
    elif hasattr(cfg, "head_layers"):
        kind, answers, answer = "bt", 2, cfg.max_response_tokens
    elif hasattr(cfg, "rollout_batch"):  # stage 2b, whose rollout_batch is over all processes
        rolled_out, samples = -(-cfg.rollout_batch // processes), cfg.samples
    if kind != "bt" and (cfg.heldout or getattr(cfg, "replay", "")):
        judged = cfg.eval_batch
    if form == "pixels" and hasattr(cfg, "frames"):  # two images or videos fill the prompt
        most = 2 * max(cfg.max_tiles + 1, cfg.frames)  # an image has a thumbnail, too
        tiles = min(cfg.max_prompt_tokens // TILE_IN_PROMPT, most)
    mini = -(-getattr(cfg, "mini_batch", 0) // processes) or prompts
    return Work(kind, cfg.max_prompt_tokens, answer, answers, prompts,
                min(cfg.micro_batch, mini, prompts), rolled_out, samples, judged, tiles,
                getattr(cfg, "beta", 0) > 0, cfg.gradient_checkpointing)


# What is always there. `shards`: over how many processes it is spread; 1: each has all of it.

def weight_bytes(size, shards=1):
    return 4 * size.parameters / shards                             # fp32


def reference_bytes(size, work, shards=1):
    """A second model; with an adapter it is the model without it."""
    return 4 * size.parameters / shards if work.reference and not size.lora else 0


def adamw_bytes(size, shards=1):
    return 8 * size.trained / shards                                # two moments in fp32


# What comes and goes.

def gradient_bytes(size, shards=1):
    return 4 * size.trained / shards                                # fp32, not while it samples


def layer_activations(size, work, mixed=True):
    """What autograd keeps of one layer of Qwen3 for a micro-batch. `mixed`: under autocast, else in
    fp32."""
    h, f, heads = size.text.hidden_size, size.intermediate, size.text.num_attention_heads
    q, k = heads * size.head_dim, size.kv_heads * size.head_dim
    token = 2 * 4 * h + 4 * q + 4 * k       # inputs of all norms, fp32
    if mixed:
        token += 5 * 2 * h                  # their output, in bf16 once for each of q k v gate up
        token += 4 * 2 * f                  # gate, silu(gate), up, their product
        token += 2 * q if size.lora else 2 * 4 * h + 2 * q + 2 * k  # A's input; or for the
    else:                                                           # norms' weights
        token += 2 * 4 * h + 4 * 4 * f
        token += 0 if size.lora else 2 * 4 * h + 4 * q + 4 * k
    token += 4 * (2 + 2 * heads + size.kv_heads)  # norms' scales, logsumexp
    attention = (2 if mixed else 4) * attention_numbers(work, q, k, mixed)
    return work.micro * (work.length * token + attention)


def attention_numbers(work, q, k, mixed):
    """How many numbers attention keeps of a sequence: q; k and v, repeated for all heads; output;
    the mask. Packed answers (decoding.packed_attention) have keys of their own, in which those of
    the prompt are there again, and the output once more, put together; all layers share masks."""
    prompt, answers = work.prompt, work.answers * work.answer
    if not work.packed:
        return 4 * q * work.length + work.length ** 2
    seen = prompt + work.answer
    query = prompt if mixed else work.length  # autocast copies the part, fp32 keeps the whole
    of_prompt = query * q + prompt * q
    if work.micro == 1:  # no padding, so no mask: keys and values are taken as they are
        of_prompt += query * k + work.length * k
    else:
        of_prompt += 2 * prompt * q
    of_answers = 2 * answers * q + 2 * work.answers * seen * k
    return of_prompt + of_answers + work.length * q


def layer_temporaries(size, tokens, mixed=True):
    """Of the backward of one layer beyond what was kept: gradients of its output (also in bf16), of
    the widest activation and of the widest weight (in both)."""
    h, f = size.text.hidden_size, size.intermediate
    if mixed:
        return tokens * (6 * h + 2 * f) + 6 * h * f
    return 4 * tokens * (h + f) + 4 * h * f


def vision_activations(size, tiles, mixed=True):
    """What autograd keeps of one layer of InternVL's vision tower."""
    h, f = size.vision.hidden_size, size.vision.intermediate_size
    token = 2 * 4 * h                       # inputs of both norms
    if mixed:
        token += 4 * 2 * h + 4 * 2 * h      # their output for q, k, v and the MLP; attention
        token += 2 * 2 * h + 2 * 2 * f      # results of attention and MLP; inside the MLP
    else:
        token += 2 * 4 * h + 4 * 4 * h + 2 * 4 * h + 2 * 4 * f
    return tiles * TILE * (token + 4 * (4 + size.vision.num_attention_heads))


def kept_activations(size, work, mixed=True):
    """What is kept of the whole forward of a micro-batch, but for the logits."""
    rows, h = work.micro, size.text.hidden_size
    layer = layer_activations(size, work, mixed)
    casts = 2 * size.linear
    if work.checkpointing:              # a layer's input alone, fp32; of the copies the head's
        layer = 4 * h * rows * work.length
        casts = 2 * size.head * (work.kind != "bt")
    kept = size.text.num_hidden_layers * layer + (casts if mixed else 0)
    if size.vision and size.vision_trained and work.tiles:
        layer = vision_activations(size, rows * work.tiles, mixed)
        if work.checkpointing:
            layer = 4 * size.vision.hidden_size * rows * work.tiles * TILE
        kept += size.vision.num_hidden_layers * layer
    masks = work.length ** 2            # truth values
    if work.packed:
        of_answers = work.answers * work.answer * (work.prompt + work.answer)
        heads = size.text.num_attention_heads // size.kv_heads  # that share keys
        of_prompt = work.prompt ** 2 if rows > 1 else 0  # one has no padding, and needs no mask
        masks += of_answers + (2 if mixed else 4) * (of_prompt + heads * of_answers)
    return kept + last_norm(size, work) + rows * masks


def last_norm(size, work):
    """Its input and normed input, fp32."""
    return 2 * 4 * size.text.hidden_size * work.micro * work.length


def logit_bytes(size, work, mixed=True):
    """The logits [b, 1+S, V] and all that is made of them, at its peak. A reward model has none."""
    number, row = (2 if mixed else 4), work.micro * size.text.vocab_size
    if work.kind == "bt":
        return 0
    if work.kind == "sft":  # answer_nll(): log-softmax, its gradient, that of the logits, in fp32
        return 3 * 4 * row * work.scored
    # packed_logps(): the logits, and their gradient but for the part that is at work, of which
    # there are log-softmax and two gradients in fp32
    part = min(work.scored, ROWS_AT_ONCE)
    return row * (number * work.scored + number * (work.scored - part) + 3 * 4 * part)


def update_bytes(size, work, mixed=True):
    """The peak of a micro-batch beyond weights and gradients, in one of four moments."""
    kept, logits = kept_activations(size, work, mixed), logit_bytes(size, work, mixed)
    copy = (2 if mixed else 4) * work.micro * work.scored * size.text.vocab_size
    forward_ends, head = kept, 4 * size.head  # a reward model: the gradient of its embeddings
    if logits:
        forward_ends += copy
        head += kept + copy             # the gradients of the logits and of the head's weight
    layer = kept + layer_temporaries(size, work.micro * work.length, mixed)
    layer -= last_norm(size, work)      # its turn was before
    if work.checkpointing:
        layer += layer_activations(size, work, mixed)
        layer += 2 * size.layer if mixed else 0
    return max(forward_ends, kept + logits, head, layer) + pixel_bytes(work)


def pixel_bytes(work):
    """Tiles of a micro-batch, fp32; SFT puts those of the whole step on the device."""
    rows = work.prompts if work.kind == "sft" else work.micro
    return 4 * TILE_PIXELS * work.tiles * rows


def cache_bytes(size, prompts, tokens, mixed=True):
    """Keys and values [prompts, kv_heads, tokens, head_dim] of all layers; `tokens`: of a prompt
    and all its answers."""
    token = 2 * prompts * size.kv_heads * size.head_dim
    return size.text.num_hidden_layers * token * tokens * (2 if mixed else 4)


def sampling_bytes(size, work, prompts, samples, mixed=True):
    """The peak of sampling beyond weights: when the prompts are run, when the last token is, or
    when it is drawn."""
    number = 2 if mixed else 4
    q = size.text.num_attention_heads * size.head_dim
    # of one layer without gradients: its inputs, and the widest of what it makes of them
    width = 12 * size.text.hidden_size + max(3 * number * size.intermediate, 14 * q)
    most = work.prompt + samples * work.answer
    roomy = min(most, 3 * work.prompt // 2)  # decoding.RoomyLayer
    begins = cache_bytes(size, prompts, roomy, mixed) + prompts * work.prompt * width
    begins += prompts * work.prompt ** 2 * (1 + number)  # the mask, as truth values and numbers
    cast_weight, cast_head = 0, 0
    if mixed:  # autocast's copies of the weight at work
        cast_weight = 2 * size.text.hidden_size * size.intermediate
        cast_head = 2 * size.head
    if size.vision and work.tiles:
        width = 10 * size.vision.hidden_size + 2 * number * size.vision.intermediate_size
        begins += prompts * work.tiles * (TILE * width + 4 * TILE_PIXELS)
    ends = cache_bytes(size, prompts, most, mixed)
    # draw(): logits, their log-softmax in fp32, sums and what they add up in float64
    drawn = (number + 4 + 2 * 8) * prompts * samples * size.text.vocab_size
    return max(begins + cast_weight, ends + cast_head, ends + drawn)


# Sharded: each process holds a part of what is always there and of the gradients, and gathers.

def gathered_to_sample(size):
    """sharding.whole(): all weights in fp32 on each process."""
    return 4 * size.parameters


def gathered_to_update(size):
    """What is outside the layers is one unit and whole from forward to backward, then its gradient
    is; of the layers the one at work and the next, and a layer's gradient."""
    outside = size.parameters - size.text.num_hidden_layers * size.layer
    return 4 * (2 * outside + 3 * size.layer)


def memory(size, work, shards=1):
    """-> {term: bytes} of one process; "sample", "judge", "update" and "step" are the peaks of the
    parts of a step, of all that is there then."""
    gathered = gathered_to_sample(size) if shards > 1 else 0
    terms = {"weights": weight_bytes(size, shards), "AdamW": adamw_bytes(size, shards),
             "reference": reference_bytes(size, work, shards),
             "gradients": gradient_bytes(size, shards)}
    always = terms["weights"] + terms["AdamW"] + terms["reference"]
    tokens = work.prompt + work.samples * work.answer
    terms["cache"] = cache_bytes(size, work.rolled_out, tokens)
    terms["logits"] = logit_bytes(size, work)
    terms["activations"] = kept_activations(size, work)
    for name, prompts, samples in (("sample", work.rolled_out, work.samples),
                                   ("judge", work.judged, 1)):
        taken = sampling_bytes(size, work, prompts, samples)
        terms[name] = always + gathered + taken if prompts else 0
    terms["update"] = always + terms["gradients"] + update_bytes(size, work)
    if shards > 1:
        terms["update"] += gathered_to_update(size)
    terms["step"] = always + terms["gradients"]
    return terms


def replica_gib(cfg, config):
    """-> GiB that one of the processes of this run needs without --shard, at its highest peak.
    `config`: the model's. sharding.wanted() asks."""
    size = measure("--model", config, cfg)
    terms = memory(size, work_of(cfg, common.world(), form_of(cfg)))
    return max(terms[name] for name in PEAKS) / GIB


PEAKS = ("sample", "judge", "update", "step")
TERMS = ("weights", "AdamW", "reference", "gradients", "activations", "logits", "cache", *PEAKS)


def largest(size, work, shards, card):
    """-> the largest --micro_batch and --rollout_batch with which a card is enough; 0: none."""
    micro = rolled_out = 0
    for n in range(1, work.prompts + 1):
        terms = memory(size, replace(work, micro=n, rolled_out=n), shards)
        if terms["update"] <= CARDS[card] * GIB:
            micro = n
        if terms["sample"] <= CARDS[card] * GIB:
            rolled_out = n
    return micro, rolled_out


def print_memory(sizes, cfg, form):
    work = work_of(cfg, 1, form)
    print(f"\nmemory of a process in GiB, if all prompts have {work.prompt:,} tokens and all "
          f"answers {work.answer:,}")
    titles = ["weights", "AdamW", "refer.", "grads", "activ.", "logits", "cache", *PEAKS]
    print(f"{'':18}{''.join(title.rjust(8) for title in titles)}  80 GB 24 GB micro rollout")
    for size in sizes:
        for processes in PROCESSES:
            print_line(size, work_of(cfg, processes, form), processes, 1)
            if processes > 1:
                print_line(size, work_of(cfg, processes, form), processes, processes)
    size = next(size for size in sizes if size.name == "8B")
    other = kept_activations(size, replace(work, checkpointing=not work.checkpointing)) / GIB
    print(f"""
weights to grads   fp32; sharded: spread over the processes
activ., logits     of a micro-batch; cache: keys and values of a --rollout_batch
sample ... step    the peaks of the parts of a step: of all that is there then
80 GB, 24 GB       does all of it fit
micro, rollout     the largest --micro_batch and --rollout_batch that fit 80 GB; 0: none does
With --gradient_checkpointing {not work.checkpointing}, 8B has activations of {other:.1f}.""")


def print_line(size, work, processes, shards):
    terms = memory(size, work, shards)
    cells = [f"{terms[name] / GIB:8.1f}" for name in TERMS]
    peak = max(terms[name] for name in PEAKS)
    fits = ["yes" if peak <= most * GIB else "no" for most in CARDS.values()]
    micro, rolled_out = largest(size, work, shards, "80 GB")
    if work.kind == "sft":  # stage 2b counts them over all processes
        rolled_out *= processes
    kind = "sharded" if shards > 1 else "replica"
    print(f"{size.name:8}{processes:2} {kind}{''.join(cells)}  {fits[0]:5} {fits[1]:5} "
          f"{micro:5} {rolled_out if work.rolled_out else '-':>7}")
