"""
What this project takes on one GPU at real size: InternVL3.5-1B with random weights, P 1500 (texts)
or 3500 (images), C 300, G 8, fp32 weights and bf16 by autocast. About six minutes on an H100.

    python tests/gpu_steps.py --trl python3             # if this Python has trl 1.16
    python tests/gpu_steps.py --size tiny               # the same on a CPU, to try the program

    stages    a step of each script's own main(): seconds, tokens/s, and its peaks of memory beside
              what --dry_run says for the same settings
    decode    ms per token of sample_group(), beside the floor: bytes of weights and cache over the
              measured bandwidth; kernels per token
    packed    packed_logps(), forward and backward, beside the floor: operations over the measured
              rate of a large product
    attention of packed answers, a layer's, forward and backward, in three ways: in one call with a
              mask, in two (decoding.py), by FlexAttention
    graphs    the tests of CUDA graphs of tokens, here with real ones
    ours, naive, trl   bench_grpo.py's comparison, a process each
    tests     those that prove packed = one by one and greedy = generate, on the CPU, meanwhile

Each part is a process of its own that prints its results at once; one that fails, or takes more
than --budget has left, does not stop the others. Parts are run in the order of PARTS. Results are
also written to --results, one JSON object a line.
"""

import argparse
import importlib
import json
import math
import os
import random
import re
import shutil
import statistics
import subprocess
import sys
import time
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import torch
import torch.nn.functional as F
import transformers
from torch.nn.attention.flex_attention import create_block_mask, flex_attention

TESTS = Path(__file__).resolve().parent
ROOT = TESTS.parent
sys.path[:0] = [str(ROOT), str(TESTS)]

import bench_grpo  # noqa: E402  (it is on the path only now)
import internvl_folder  # noqa: E402  (as above)
from programs import grpo_step  # noqa: E402  (as above)

import bt_reward  # noqa: E402  (as above)
import common  # noqa: E402  (as above)
import decoding  # noqa: E402  (as above)
import dry_run  # noqa: E402  (as above)
import stage1_text_grpo as stage1  # noqa: E402  (as above)

# Lengths: P of texts and with an image, C, G; image: its (width, height) and what it becomes
SIZES = {
    "1B": {"text": 1500, "image": 3500, "pair": 3200, "C": 300, "G": 8, "prompts": 8,
           "picture": (1344, 1344), "tiles": 10, "rows": (16, 64, 128), "tokens": 40,
           "product": 8192, "copied": 2 ** 32},
    "tiny": {"text": 900, "image": 1100, "pair": 400, "C": 50, "G": 2, "prompts": 2,
             "picture": (448, 448), "tiles": 1, "rows": (2, 4), "tokens": 4, "product": 256,
             "copied": 2 ** 20}}
TINY_TEXT = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "head_dim": 8,
             "num_attention_heads": 4, "num_key_value_heads": 2}
TINY_VISION = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1,
               "num_attention_heads": 2}
WORDS = ("red", "green", "blue", "square", "circle", "left", "right", "above", "below", "large",
         "small", "bright", "dark", "near", "far")
SEED = 0
MARK = "made_by_gpu_steps"  # a file in --folder


# ------------------------------------------------------------------------------- clock and memory
def cuda():
    return torch.cuda.is_available()


def device_name():
    return "cuda" if cuda() else "cpu"


def clock():
    """Seconds, when all that was asked of the GPU is done."""
    if cuda():
        torch.cuda.synchronize()
    return time.perf_counter()


def reset_peak():
    if cuda():
        torch.cuda.reset_peak_memory_stats()


def peak():
    """Bytes of tensors at most since reset_peak(); NaN without a GPU."""
    return torch.cuda.max_memory_allocated() if cuda() else math.nan


def seconds_of(function, repeats):
    """-> median, of so many calls after one that warms up"""
    function()
    times = []
    for _ in range(repeats):
        began = clock()
        function()
        times.append(clock() - began)
    return statistics.median(times)


def bandwidth(size):
    """Bytes per second, read and written, of a copy on the device."""
    source = torch.empty(size["copied"], dtype=torch.uint8, device=device_name())
    target = torch.empty_like(source)
    return 2 * size["copied"] / seconds_of(lambda: target.copy_(source), 10)


def product_rate(size):
    """Floating-point operations per second of a large product in bf16."""
    n = size["product"]
    a, b = torch.randn(2, n, n, device=device_name()).bfloat16()
    return 2 * n ** 3 / seconds_of(lambda: a @ b, 10)


def tell(args, what, line, **values):
    """Print a result, and append it to --results."""
    print(f"{what}: {line}", flush=True)
    with open(args.results, "a") as file:
        file.write(json.dumps({"what": what, **values}) + "\n")


def gb(n):
    return "-" if math.isnan(n) else f"{n / 1e9:.1f} GB"


# ---------------------------------------------------------------------------- checkpoint and data
def make(args):
    """FOLDER/model with random weights, FOLDER/*.jsonl, and FOLDER/bench for bench_grpo.py."""
    size, folder = SIZES[args.size], args.folder
    config = dry_run.internvl_config("1B")
    if args.size == "tiny":
        for part, change in ((config.text_config, TINY_TEXT), (config.vision_config, TINY_VISION)):
            for name, value in change.items():
                setattr(part, name, value)
        config.text_config.layer_types = ["full_attention"] * TINY_TEXT["num_hidden_layers"]
    config.image_token_id = internvl_folder.CONTEXT
    torch.manual_seed(SEED)
    with torch.device(device_name()):
        model = transformers.AutoModelForImageTextToText.from_config(config, dtype=torch.bfloat16)
    model.save_pretrained(folder / "model")
    n = dry_run.count(model.parameters())
    written = json.loads((folder / "model" / "config.json").read_text())
    corpus = [*common.TEMPLATES.values(), *common.CAPTION_TEMPLATES.values(), " ".join(WORDS),
              *[" " + word for word in WORDS]]
    internvl_folder.publish(folder / "model", written, corpus)
    write_rows(size, folder)
    grpo_step.make(folder / "bench", bench_case(args))
    where = torch.cuda.get_device_name() if cuda() else "CPU"
    versions = f"torch {torch.__version__}, transformers {transformers.__version__}"
    tell(args, "model", f"{n:,} parameters; {where}, {versions}", parameters=n)


def write_rows(size, folder):
    """Rows whose prompts have the lengths of SIZES to the token."""
    from PIL import Image  # here, because only this part needs it
    levels = torch.randint(256, (*size["picture"][::-1], 3), dtype=torch.uint8)
    Image.fromarray(levels.numpy()).save(folder / "picture.png")
    config = transformers.AutoConfig.from_pretrained(folder / "model")
    encoder = common.Encoder(folder / "model", config)
    captioned = common.Encoder(folder / "model", config, style="caption")

    def shown_to_a_reward_model(row):
        return encoder.encode(bt_reward.after_media(row, row["prompt"]), row["media"])
    task = "image_understanding"
    files = {"text": ("text", size["text"], encoder),
             "caption": (task, size["text"], lambda row: encoder(row, "caption")),
             "image": (task, size["image"], captioned),
             "pair": (task, size["pair"], shown_to_a_reward_model)}
    for name, (task, wanted, encode) in files.items():
        row = fitted(task, wanted, encode, str(folder / "picture.png"), encoder, size["C"])
        with open(folder / f"{name}.jsonl", "w") as file:
            for number in range(2 * size["prompts"]):
                label = "AB"[number % 2]
                file.write(json.dumps(row | {"id": f"{name}-{number}", "label": label}) + "\n")


def fitted(task, wanted, encode, picture, encoder, answer):
    """A row of this task whose prompt, encode(row), has `wanted` tokens, whose rationale makes an
    answer of `answer` tokens, and whose responses and caption have about half as many."""
    visual = task != "text"

    def row_of(words, thoughts):
        half = answer // 2
        return {"task": task, "prompt": words_of(words), "label": "A",
                "responses": [words_of(half, 1), words_of(half, 2)],
                "rationale": words_of(thoughts), "media": [picture] * visual,
                "captions": [words_of(half)] * visual}
    words, thoughts = 1, 1
    for _ in range(3):
        row = row_of(words, thoughts)
        missing = wanted - len(encode(row).ids)
        words += missing
        target = f"<think>\n{row['rationale']}\n</think>\n<answer>\nA\n</answer>"
        thoughts += answer - len(encoder.answer_ids(target))
        if words < 1 or thoughts < 1:
            raise SystemExit(f"{task}: the template alone has more than {wanted} tokens")
    if missing:
        raise SystemExit(f"{task}: {missing} of {wanted} tokens are missing")
    return row


def words_of(n, seed=0):
    return " ".join(random.Random(seed).choices(WORDS, k=n))


# ------------------------------------------------------------------------------------------ stages
# Name: script, file of rows, prompts per micro-batch, passes over as many rows as a batch has
STAGES = {
    "stage1": ("stage1_text_grpo", "text", 2, 2), "stage3": ("stage3_mm_grpo", "image", 1, 2),
    "stage0": ("stage0_sft", "text", 4, 4), "bt": ("bt_reward", "pair", 1, 4),
    "stage2b": ("stage2b_cmkd", "image", 1, 3), "stage2": ("stage2_caption_grpo", "caption", 2, 2)}
OF_GRPO = ("stage1", "stage2", "stage3")


def flags_of(name, args):
    """-> (script, command line) of a stage"""
    size = SIZES[args.size]
    script, file, micro, passes = STAGES[name]
    prompts = size["prompts"]
    flags = {"model": args.folder / "model", "data": f"{args.folder / file}.jsonl:{prompts}",
             "heldout": "", "out": args.folder / "runs" / name, "batch_size": prompts,
             "micro_batch": min(micro, prompts),
             "max_prompt_tokens": size.get(file, size["text"])}
    if name in OF_GRPO:
        flags |= {"group_size": size["G"], "max_steps": passes, "rollout_batch": prompts,
                  "log_rollouts_every": 0}
    else:
        flags["epochs"] = passes
    if name == "bt":
        flags["max_response_tokens"] = size["C"] // 2
    else:
        flags["max_new_tokens"] = size["C"]
    if name == "stage2":
        flags["replay"] = args.folder / "text.jsonl"
        flags["replay_ratio"] = "3:1" if prompts >= 4 else "1:1"
    if name == "stage2b":
        flags |= {"samples": size["G"], "rollout_batch": prompts}
    command = []
    for flag, value in flags.items():
        command += [f"--{flag}", str(value)]
    return script, command


class Watch:
    """Around functions of a stage: their seconds and peaks of memory, call by call."""

    def __init__(self):
        self.calls = {}

    def around(self, module, name):
        function = getattr(module, name)

        def measured(*args, **more):
            reset_peak()
            began = clock()
            result = function(*args, **more)
            call = {"seconds": clock() - began, "peak": peak()}
            self.calls.setdefault(name, []).append(call)
            return result
        setattr(module, name, measured)


def run_stage(name, args):
    """The script's own main(); what is replaced in it is said here."""
    script, command = flags_of(name, args)
    stage = importlib.import_module(script)
    size, watch, kept = SIZES[args.size], Watch(), {}

    def keep_config(folder, cfg):
        kept["cfg"] = cfg
    common.open_run = keep_config  # -> None: a new run
    # 17 GB a stage, whose writing is not what is measured
    common.save_state = common.save_checkpoint = lambda *_, **__: None
    Path(args.folder, "runs", name).mkdir(parents=True, exist_ok=True)
    log = []
    common.log_step = lambda folder, metrics, tracker: log.append(metrics)
    if name in OF_GRPO:
        replace_of_grpo(stage, watch, size)
    elif name == "stage2b":
        replace_of_cmkd(stage, watch, size)
        watch.around(stage, "finetune")
    sys.argv = [f"{script}.py", *command]
    stage.main()
    tell_stage(name, args, kept["cfg"], log, watch.calls)


def replace_of_grpo(stage, watch, size):
    """Random weights name no verdict: every reward would be 0, and so would advantages and the
    gradient. A coin by the length of the answer takes its place. And no row would be good enough
    to be replayed: all are. The first rollout, which warms up, is a short one."""
    for name in stage.REWARDS:
        stage.REWARDS[name] = lambda text, row: float(len(text) % 2)
    stage.choose_replay = lambda model, encoder, rows, cfg: rows
    roll_out = stage.roll_out

    def first_short(model, encoder, prompts, cfg, generator):
        if not watch.calls.get("roll_out"):
            cfg = replace(cfg, max_new_tokens=max(2, size["C"] // 10))
        return roll_out(model, encoder, prompts, cfg, generator)
    stage.roll_out = first_short
    watch.around(stage, "roll_out")
    watch.around(stage, "grpo_update")


def replace_of_cmkd(stage, watch, size):
    """Random weights write no rationale: what is sampled is measured, then replaced by one."""
    watch.around(stage, "distill")
    distill = stage.distill
    think = f"<think>\n{words_of(max(1, size['C'] // 2 - 25))}\n</think>\n<answer>\nA\n</answer>"

    def well_formed(model, encoder, rows, cfg):
        samples = distill(model, encoder, rows, cfg)
        return [sample | {"texts": [think], "confidences": [0.0]} for sample in samples]
    stage.distill = well_formed


def tell_stage(name, args, cfg, log, calls):
    """A line: the last step, and each peak beside that of the dry run."""
    size = SIZES[args.size]
    tiles = size["tiles"] * (STAGES[name][1] in ("image", "pair"))
    work = replace(dry_run.work_of(cfg, 1, dry_run.form_of(cfg)), tiles=tiles, judged=0)
    config = transformers.AutoConfig.from_pretrained(cfg.model)
    told = dry_run.memory(dry_run.measure("--model", config, cfg), work)
    last = log[-1]
    ended = {function: of_it[-1] for function, of_it in calls.items()}  # their last calls
    parts, peaks = [f"step {last['step_time']:.2f} s"], {}
    if "roll_out" in ended:
        sampled, updated = ended["roll_out"], ended["grpo_update"]
        encoding = last["sample_time"] - sampled["seconds"]
        parts[0] += (f" (prompts {encoding:.2f}, sample {sampled['seconds']:.2f}, update "
                     f"{updated['seconds']:.2f})")
        peaks = {"sample": (sampled["peak"], told["sample"])}
    else:
        updated = ended.get("finetune", {"peak": peak()})
    if "distill" in ended:
        parts.append(f"sampling for {work.prompts} rows before it "
                     f"{ended['distill']['seconds']:.2f} s")
    peaks["update"] = updated["peak"], max(told["update"], told["step"])
    every, answers = work.prompts * work.length, last.get("num_tokens", 0)
    parts.append(f"{every / last['step_time']:,.0f} tokens/s")
    if answers:
        parts[-1] += f", {answers / last['step_time']:,.0f} of answers"
    gap = last.get("sampling/sampling_logp_difference/mean")
    if gap is not None:
        parts.append(f"sampler and packed forward {gap:.1e} nats a token apart")
    for phase, (measured, estimate) in peaks.items():
        parts.append(f"peak of {phase} {gb(measured)}, dry run {gb(estimate)}")
    shape = f"P {work.prompt}, C {work.answer}, G {work.answers}, {work.prompts} prompts, "
    shape += f"micro {work.micro}" + f", {tiles} tiles" * (tiles > 0)
    tell(args, name, f"{shape}: {'; '.join(parts)}", shape=shape, log=log, calls=calls,
         peaks=peaks, told=told)


# ------------------------------------------------------------------------------------------ decode
def random_prompts(n, size):
    generator = torch.Generator().manual_seed(SEED)
    ids = torch.randint(256, internvl_folder.FIRST, (n, size["text"]), generator=generator)
    return [common.Prompt(row, None) for row in ids.tolist()]


def decode(args):
    """ms of a token of all N answers, its kernels launched one by one and as a CUDA graph."""
    size = SIZES[args.size]
    model, encoder = common.load(args.folder / "model", device_name())
    encoder.eos_ids = [-1]  # so that no row ends
    speed = bandwidth(size)
    tell(args, "bandwidth", f"{speed / 1e12:.2f} TB/s of a copy, read and written", speed=speed)
    text = model.config.get_text_config()
    decoder = dry_run.count(model.get_decoder().parameters())
    weights = 2 * (decoder - model.get_input_embeddings().weight.numel()
                   + model.get_output_embeddings().weight.numel())
    per_token = 4 * text.num_hidden_layers * text.num_key_value_heads * text.head_dim
    record, recording = decoding.record, []

    def timed_record(function):
        began = clock()
        replay = record(function)
        recording.append(clock() - began)
        return replay
    decoding.record = timed_record
    for kind in ("one by one", "as a graph"):
        with launched(kind):
            for n in size["rows"]:
                prompts = random_prompts(n // size["G"], size)
                reset_peak()
                recording.clear()
                prefill, ms = decoding_times(model, encoder, prompts, size)
                cache = (n / size["G"] * size["text"] + n * size["tokens"] / 2) * per_token
                floor = 1e3 * (weights + cache) / speed
                tell(args, f"decode, {kind}, N {n}",
                     f"{ms:.2f} ms a token, floor {floor:.2f} ({gb(weights)} of weights, "
                     f"{gb(cache)} of cache), {ms / floor:.1f} times it; prefill {prefill:.3f} s; "
                     f"peak {gb(peak())}; {len(recording)} recordings of {sum(recording):.2f} s in "
                     f"3 runs of {size['tokens']} tokens", kind=kind, n=n, ms=ms, floor=floor,
                     prefill=prefill, recording=list(recording))
    try:
        if cuda():
            with launched("one by one"):
                count_kernels(args, model, encoder, size, "one by one")
    except Exception as e:  # a profiler that is not to be had must not end the timing
        print(f"kernels: {type(e).__name__}: {e}", flush=True)


@contextmanager
def launched(kind):
    """Kernels launched "one by one", or as on any GPU, "as a graph" """
    real = decoding.Decoder.__call__
    if kind == "one by one":
        decoding.Decoder.__call__ = decoding.Decoder.run
    try:
        yield
    finally:
        decoding.Decoder.__call__ = real


def decoding_times(model, encoder, prompts, size):
    """-> seconds of prefill and first token, ms of each further one."""
    def sampled(tokens):
        stage1.sample_group(model, encoder, prompts, size["G"], 1.0, tokens,
                            torch.Generator(device_name()).manual_seed(SEED))
    prefill = seconds_of(lambda: sampled(1), 3)
    both = seconds_of(lambda: sampled(1 + size["tokens"]), 2)
    return prefill, 1e3 * (both - prefill) / size["tokens"]


def count_kernels(args, model, encoder, size, kind, tokens=4):
    """Kernels of one token of the fewest rows: are they many and short, so that launching them is
    what takes the time? And which take most of it."""
    prompts = random_prompts(size["rows"][0] // size["G"], size)
    one = kernels(model, encoder, prompts, size, 1)
    several = kernels(model, encoder, prompts, size, 1 + tokens)
    count, spent = {}, {}
    for events, sign in ((several, 1), (one, -1)):
        for event in events:
            count[event.name] = count.get(event.name, 0) + sign
            spent[event.name] = spent.get(event.name, 0) + sign * event.time_range.elapsed_us()
    n, ms = sum(count.values()) / tokens, sum(spent.values()) / tokens / 1e3
    tell(args, f"kernels, {kind}, N {size['rows'][0]}",
         f"{n:.0f} a token, which work for {ms:.2f} ms", kernels=n, ms=ms)
    for name in sorted(spent, key=spent.get, reverse=True)[:8]:
        short = re.sub("void |at::native::", "", name)[:80]
        print(f"    {count[name] / tokens:6.1f} of them {spent[name] / tokens / 1e3:6.3f} ms  "
              f"{short}", flush=True)


def kernels(model, encoder, prompts, size, tokens):
    from torch.autograd import DeviceType
    from torch.profiler import ProfilerActivity, profile
    with profile(activities=[ProfilerActivity.CUDA]) as profiler:
        stage1.sample_group(model, encoder, prompts, size["G"], 1.0, tokens, None)
        torch.cuda.synchronize()
    return [event for event in profiler.events() if event.device_type == DeviceType.CUDA]


# ------------------------------------------------------------------------------------------ packed
def packed(args):
    """Seconds and operations per second of packed_logps(), without and with a gradient."""
    size = SIZES[args.size]
    rate = product_rate(size)
    tell(args, "product", f"{rate / 1e12:.0f} TFLOP/s of a bf16 product of {size['product']}^3",
         rate=rate)
    model, encoder = common.load(args.folder / "model", device_name())
    common.freeze_vision(model)
    generator = torch.Generator().manual_seed(SEED)
    for micro in (1, 2):
        prompts = random_prompts(micro, size)
        answers = torch.randint(256, internvl_folder.FIRST, (micro, size["G"], size["C"]),
                                generator=generator).tolist()

        @torch.no_grad()
        def forward(prompts=prompts, answers=answers):
            stage1.packed_logps(model, encoder, prompts, answers, 1.0, with_entropy=False)

        def both(prompts=prompts, answers=answers):
            stage1.packed_logps(model, encoder, prompts, answers, 1.0)[0].sum().backward()
        work = operations(model, size, micro)
        for what, function, times in (("forward", forward, 1), ("forward and backward", both, 3)):
            reset_peak()
            seconds = seconds_of(function, 3)
            done = times * work / seconds
            tell(args, f"packed {what}, micro {micro}",
                 f"{seconds:.3f} s, floor {times * work / rate:.3f}, {done / 1e12:.0f} TFLOP/s, "
                 f"{done / rate:.1%} of a product's; peak {gb(peak())}", seconds=seconds,
                 micro=micro, flops=times * work, peak=peak())
        model.zero_grad(set_to_none=True)


def operations(model, size, micro):
    """Needed by the packed forward: two for each weight and token, and four for each number of a
    head and each pair of tokens of which one sees the other."""
    text, p, c, g = model.config.get_text_config(), size["text"], size["C"], size["G"]
    embeddings = model.get_input_embeddings().weight.numel()
    layers = dry_run.count(model.get_decoder().parameters()) - embeddings
    head = model.get_output_embeddings().weight.numel()
    width = text.num_attention_heads * text.head_dim * text.num_hidden_layers
    attention = 4 * pairs_seen(p, c, g) * width
    return micro * (2 * layers * (p + g * c) + 2 * head * (1 + g * c) + attention)


def pairs_seen(p, c, g):
    """Of tokens of [prompt | answer 1 | ... | answer G], of which one sees the other."""
    return p * (p + 1) / 2 + g * c * (p + (c + 1) / 2)


# --------------------------------------------------------------------------------------- attention
def attention(args):
    """ms and memory of a layer's attention to one prompt's packed answers, of 1B's heads in bf16,
    with its gradient. What a mask or its blocks cost once a forward is not counted."""
    size = SIZES[args.size]
    for c in (size["C"], 3 * size["C"]):
        inputs, ways = ways_to_attend(size["text"], c, size["G"])

        def both(attend, inputs=inputs):
            torch.autograd.grad(attend(*inputs).float().square().sum(), inputs)
        first = ways["in one call"](*inputs).float().detach()
        for way, attend in ways.items():
            gap = (attend(*inputs).float() - first).abs().max().item()
            ms = 1e3 * seconds_of(partial(both, attend), 5)
            before = torch.cuda.memory_allocated() if cuda() else 0
            reset_peak()
            both(attend)
            tell(args, f"attention {way}, P {size['text']}, C {c}, G {size['G']}",
                 f"{ms:.2f} ms, {gb(peak() - before)}, {gap:.1e} from the first", way=way, c=c,
                 ms=ms, memory=peak() - before, gap=gap)


def ways_to_attend(p, c, group_size, heads=16, groups=8, dim=128):
    """-> query, keys, values; {way: function of them}"""
    answers, device = [[[1] * c] * group_size], device_name()
    packed = stage1.pack([common.Prompt([1] * p, None)], answers, 0, device)
    sees, owner = packed[2], F.pad(packed[5], (p, 0))[0]                          # [L]
    whole, length = sees.clone(), len(owner)
    sees.answers = decoding.answer_places(answers, sees)
    module = SimpleNamespace(num_key_value_groups=heads // groups, training=True, is_causal=True)
    inputs = [torch.randn(1, n, length, dim, device=device, dtype=torch.bfloat16,
                          requires_grad=True) for n in (heads, groups, groups)]
    ways = {"in one call": lambda *qkv: decoding.attention(module, *qkv, whole)[0],
            "in two calls": lambda *qkv: decoding.attention(module, *qkv, sees)[0]}
    if not cuda():  # it has no gradient on a CPU
        return inputs, ways

    def seen(b, h, q, k):
        return (q >= k) & ((owner[k] == 0) | (owner[k] == owner[q]))
    blocks = create_block_mask(seen, None, None, length, length, device)
    flex = torch.compile(flex_attention)
    ways["FlexAttention"] = lambda *qkv: flex(*qkv, block_mask=blocks,
                                              enable_gqa=True).transpose(1, 2)
    return inputs, ways


def graphs(args):
    """tests/ whose fixture `recorded` is real on a GPU: windows, Qwen-VL's positions, one head."""
    files = [str(TESTS / f"test_{name}.py") for name in ("models", "qwen_vl", "grpo")]
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-k", "recorded"]
    done = subprocess.run([*command, *files], cwd=ROOT, capture_output=True, text=True)
    lines = done.stdout.splitlines()
    tell(args, "graphs", "\n".join(lines[-1 if done.returncode == 0 else -60:]),
         status=done.returncode)


# -------------------------------------------------------------------------------------- comparison
def bench_case(args):
    case = bench_grpo.SIZE_1B
    if args.size == "tiny":
        case = bench_grpo.TEXT | {"P": 40, "C": 5, "V": 83, "G": 2, "layers": 2, "rows": 2}
    return case | {"steps": 1, "device": device_name()}


def bench(who, args):
    case = bench_case(args)
    result = grpo_step.measure(who, case, str(args.folder / "bench"))
    row = bench_grpo.table([(case, {"ours": [result], who: [result]})]).splitlines()[-1]
    phases = ", ".join(f"{name} {spent:.2f}" for name, spent in result["steps"][-1].items())
    tell(args, f"step of {who}", f"{sum(result['steps'][-1].values()):.2f} s ({phases}); peak "
         f"{result['peak_gb']:.1f} GB", case=case, row=row, **result)


# --------------------------------------------------------------------------------------- all parts
# In the order of what must be known most, with the seconds after which one is given up
PARTS = {"make": 150, "stage1": 120, "stage3": 120, "decode": 120, "packed": 90, "graphs": 90,
         "attention": 90, "ours": 90, "naive": 120, "trl": 120, "stage0": 60, "bt": 60,
         "stage2b": 90, "stage2": 120}
TEST_FILES = ("test_grpo.py", "test_internvl.py")


def run_part(args):
    transformers.utils.logging.set_verbosity_error()
    if args.part in STAGES:
        run_stage(args.part, args)
    elif args.part in ("ours", "naive", "trl"):
        bench(args.part, args)
    else:
        {"make": make, "decode": decode, "packed": packed, "attention": attention,
         "graphs": graphs}[args.part](args)


def start_tests(args):
    """pytest on the CPU, beside all else."""
    files = [str(TESTS / name) for name in TEST_FILES]
    if args.size == "tiny":
        files = [f"{files[0]}::test_packed_forward_equals_one_by_one"]
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *files]
    env = os.environ | {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    with open(args.folder / "tests.log", "w") as log:
        return subprocess.Popen(command, cwd=ROOT, env=env, stdout=log, stderr=log)


def end_tests(tests, args, seconds):
    try:
        tests.wait(timeout=seconds)
        ended = f"exit status {tests.returncode}"
    except subprocess.TimeoutExpired:
        tests.kill()
        ended = "given up for lack of time"
    lines = (args.folder / "tests.log").read_text().splitlines()
    tell(args, "tests", f"{ended}\n" + "\n".join(lines[-6 if tests.returncode == 0 else -60:]),
         ended=ended)


def drive(args):
    """All parts, each in a process of its own."""
    began = time.time()
    if args.folder.exists() and not (args.folder / MARK).exists():
        raise SystemExit(f"{args.folder} is not from this program, which would delete it: name "
                         "another --folder")
    shutil.rmtree(args.folder, ignore_errors=True)
    args.folder.mkdir(parents=True)
    (args.folder / MARK).touch()
    args.results.unlink(missing_ok=True)
    tests = start_tests(args) if args.parts is None or "tests" in args.parts else None
    for name, most in PARTS.items():
        left = args.budget - (time.time() - began)
        wanted = args.parts is None or name in args.parts or name == "make"
        if not wanted or (name == "trl" and not args.trl):
            continue
        if left < 20:
            print(f"{name}: left out, no time left", flush=True)
            continue
        start = time.time()
        error = run_process(name, args, min(most, left))
        print(f"    ({name} took {time.time() - start:.0f} s)", flush=True)
        if error:
            print(f"{name} FAILED: {error}", flush=True)
    if tests:
        end_tests(tests, args, max(1, args.budget - (time.time() - began)))
    print(f"{time.time() - began:.0f} s in all", flush=True)


def run_process(name, args, timeout):
    """-> '' or what went wrong"""
    python = args.trl if name == "trl" else sys.executable
    command = [python, __file__, "--part", name, "--size", args.size, "--folder", str(args.folder),
               "--results", str(args.results)]
    env = os.environ | {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_VERBOSITY": "error"}
    errors = args.folder / f"{name}.err"
    with open(errors, "w") as file:
        process = subprocess.Popen(command, cwd=args.folder, env=env, stderr=file)
        try:
            process.wait(timeout=timeout)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
            return f"took more than {timeout:.0f} s\n{errors.read_text()[-800:]}"
    if process.returncode:
        return f"exit status {process.returncode}\n{errors.read_text()[-2500:]}"
    return ""


def main():
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", default="1B", choices=list(SIZES))
    parser.add_argument("--folder", type=Path, default=Path("/tmp/gpu_steps"), help="made anew")
    parser.add_argument("--results", type=Path, default=Path("/tmp/gpu_steps.jsonl"))
    parser.add_argument("--trl", help="a Python that has trl 1.16")
    parser.add_argument("--budget", type=float, default=340, help="seconds for all parts")
    parser.add_argument("--parts", nargs="+", choices=[*PARTS, "tests"], help="these alone")
    parser.add_argument("--part", help="for its own processes")
    args = parser.parse_args()
    args.folder, args.results = args.folder.resolve(), args.results.resolve()
    if args.part:
        run_part(args)
    else:
        drive(args)


if __name__ == "__main__":
    main()
