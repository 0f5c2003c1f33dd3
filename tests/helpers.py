"""
What several test files use: files of rows, running a script here or in a process of its own, small
worlds and small models. The fixtures that several files share are in conftest.py.
"""

import copy
import json
import os
import socket
import subprocess
import sys
from contextlib import nullcontext
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest
import torch
import toy_world
import transformers
from PIL import Image
from safetensors.torch import load_file

import common
import decoding
from data import load_rows

TESTS = Path(__file__).resolve().parent
ROOT = TESTS.parent
PROGRAMS = TESTS / "programs"  # what a test runs in a process of its own
DATA = ROOT.parent / "shared" / "data"  # public files beside this checkout
RM_BENCH = DATA / "rm_bench_chat.json"

OTHER = {"A": "B", "B": "A"}
VISUAL = common.TASKS[1:]
UNDERSTANDING = ("image_understanding", "video_understanding")

RANK_VARIABLES = ("RANK", "WORLD_SIZE", "LOCAL_RANK")
ENV = {name: value for name, value in os.environ.items() if name not in RANK_VARIABLES}
ENV |= {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "",
        "PYTHONPATH": f"{ROOT}{os.pathsep}{TESTS}"}


# ------------------------------------------------------------------------------------ files of rows
def write(path, rows):
    """Rows as dicts, or raw lines as strings, one per line; a .json file holds them as one value.
    -> the path as text"""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".json":
        path.write_text(json.dumps(rows))
        return str(path)
    with open(path, "w") as file:
        for row in rows:
            file.write((row if isinstance(row, str) else json.dumps(row)) + "\n")
    return str(path)


def lines(path):
    """The rows of a .jsonl file."""
    return [json.loads(line) for line in Path(path).read_text().splitlines()]


def text_row(**change):
    """A good text row; its better response is "good one"."""
    return {"id": "t", "task": "text", "prompt": "Why ?", "responses": ["good one", "bad one"],
            "label": "A", "media": [], "captions": []} | change


def better(row):
    """The better response of a row."""
    return row["responses"]["AB".index(row["label"])]


def rows_of(path, encoder, task, **more):
    """The rows of a file, all of this task; of many rows the better side is not always the same."""
    rows = load_rows(str(path), encoder, quiet=True, **more)
    assert {row["task"] for row in rows} == {task}
    assert len({row["id"] for row in rows}) == len(rows)
    assert len(rows) < 12 or {row["label"] for row in rows} == {"A", "B"}
    return rows


def thinks(verdict, reasoning="because"):
    """A well-formed answer."""
    return f"<think>\n{reasoning}\n</think>\n<answer>\n{verdict}\n</answer>"


def example(folder, task):
    """The first held-out row of a task, its media as absolute paths."""
    row = lines(folder / f"heldout_{task}.jsonl")[0]
    return row | {"media": [str(folder / medium) for medium in row["media"]]}


# -------------------------------------------------------------------------------------------- media
def picture(colour, size=(40, 30)):
    return Image.new("RGB", size, colour)


def noise(path, size, seed=0):
    """An image file of random pixels, of (width, height)."""
    levels = np.random.default_rng(seed).integers(0, 256, (*size[::-1], 3), np.uint8)
    path.parent.mkdir(exist_ok=True)
    Image.fromarray(levels).save(path)
    return str(path)


def write_video(path, n, size=(32, 32), format=None, codec="mpeg4", pixels="yuv420p", times=None):
    """n frames, the k-th of grey level 10 k; `times` in milliseconds."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with av.open(str(path), "w", format=format) as container:
        stream = container.add_stream(codec, rate=8)
        stream.width, stream.height, stream.pix_fmt = *size, pixels
        if times:
            stream.codec_context.time_base = Fraction(1, 1000)
        for k in range(n):
            grey = np.full((*size[::-1], 3), 10 * k, np.uint8)
            frame = av.VideoFrame.from_ndarray(grey, "rgb24")
            if times:
                frame.pts, frame.time_base = times[k], Fraction(1, 1000)
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return path


# ---------------------------------------------------------------------------------- running scripts
def flags(**arguments):
    """flags(lr=1e-3) -> ["--lr", 0.001]"""
    out = []
    for name, value in arguments.items():
        out += [f"--{name}", value]
    return out


def run_here(main, args):
    """main() in this process, with these arguments, on the CPU: sums in another order on a GPU
    would not be bit-equal."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.cuda, "is_available", lambda: False)
        patch.setattr(sys, "argv", ["stage.py", *map(str, args)])
        main()


def run_there(args, check=True, **variables):
    """python ARGS in a process of its own, with these variables in its environment."""
    done = subprocess.run([sys.executable, *map(str, args)], env=ENV | variables, cwd=ROOT,
                          timeout=300, capture_output=True, text=True)
    assert not check or done.returncode == 0, done.stderr[-3000:]
    return done


def torchrun(args, check=True, processes=2):
    """python -m torch.distributed.run with so many processes, gloo, on a free port."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    return run_there(["-m", "torch.distributed.run", f"--nproc_per_node={processes}",
                      "--master_addr=127.0.0.1", f"--master_port={port}", *args], check)


def rejects(check, *args, **more):
    """An oracle must fail on a wrong version. Only a failed assertion counts: a wrong version that
    crashes would show nothing."""
    with pytest.raises(AssertionError):
        check(*args, **more)


def check_stops(function, *args):
    """SystemExit with a line that says why. An AssertionError if not, as rejects() wants it."""
    try:
        function(*args)
    except SystemExit as error:
        assert isinstance(error.code, str) and error.code, "SystemExit does not say why"
    else:
        raise AssertionError("no SystemExit comes")


def check_recorded(model, encoder, prompts, group_size, temperature):
    """Under the fixture `recorded`: 40 tokens of each answer are those that are simply run. Where
    there is a GPU, on it, as real CUDA graphs, in fp32."""
    import stage1_text_grpo as stage1  # here, because few files need it
    device = "cuda" if torch.cuda.is_available() else "cpu"
    arguments = copy.deepcopy(model).to(device), encoder, prompts, group_size, temperature, 40
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(common, "autocast", lambda device: nullcontext())
        got = stage1.sample_group(*arguments, torch.Generator(device).manual_seed(3))
        patch.setattr(decoding.Decoder, "__call__", decoding.Decoder.run)
        want = stage1.sample_group(*arguments, torch.Generator(device).manual_seed(3))
    assert got.ids == want.ids
    for group in zip(got.logp, want.logp, strict=True):
        for mine, theirs in zip(*group, strict=True):
            assert torch.allclose(torch.tensor(mine), torch.tensor(theirs), atol=1e-5)


# ------------------------------------------------------------------------------------- small worlds
def small_world(folder, seed=0, **sizes):
    """toy_world's files with this many rows each; files that are not named have one row."""
    every = dict.fromkeys(toy_world.SIZES, 1) | sizes
    toy_world.write_world(folder, seed=seed, sizes=every, quiet=True)
    return folder


# ------------------------------------------------------------------------------------- small models
def text_only_model(tokenizer, tie_word_embeddings):
    """A causal language model without a vision tower, untrained."""
    return transformers.Qwen3ForCausalLM(transformers.Qwen3Config(
        vocab_size=len(tokenizer), hidden_size=32, intermediate_size=96, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, head_dim=8, max_position_embeddings=4096,
        tie_word_embeddings=tie_word_embeddings, eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id))


def lasting(metrics):
    """What a metrics line says of the run, without what it says of the machine."""
    machine = ("step_time", "sample_time", "tokens_per_second", "peak_memory_gb")
    return {name: value for name, value in metrics.items() if name not in machine}


def weights_of(folder):
    return load_file(Path(folder, "model.safetensors"))


def same_weights(a, b):
    """Do two checkpoint folders hold bit-equal weights?"""
    a, b = weights_of(a), weights_of(b)
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def teach(folder, **more):
    """FOLDER/backbone, untrained, and FOLDER/stage0, which a few steps on FOLDER/text_rl.jsonl have
    taught to answer now A and now B and to stumble now and then."""
    import stage0_sft  # here, because few files need it
    tokenizer = toy_world.make_tokenizer()
    torch.manual_seed(0)
    model, images = toy_world.make_model(tokenizer, hidden=32, layers=2)
    toy_world.save_backbone(model, tokenizer, images, folder / "backbone")
    run_here(stage0_sft.main, flags(
        model=folder / "backbone", data=folder / "text_rl.jsonl", heldout="", target="label",
        out=folder / "stage0", lr=1e-2, **more))
