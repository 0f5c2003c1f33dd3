"""
What enters and leaves a judge: answers and rewards, preference rows good and bad, published formats,
the two orders, the scores, and the fairness of the toy rows. Each test names, after "kills:", a
plausible wrong version of the code that makes it fail. Nothing here needs a trained model.
"""

import gzip
import hashlib
import json
import os
import random
import re
import shutil
import subprocess
import sys
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

import av
import huggingface_hub
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

import toy_world  # first: it puts the repository on the path
import common
from eval import check_writable

VISUAL = common.TASKS[1:]
UNDERSTANDING = ("image_understanding", "video_understanding")
OTHER = {"A": "B", "B": "A"}
DROP = object()  # "remove this key" in the tables of bad rows


@pytest.fixture(scope="session")
def backbone(tmp_path_factory):
    """An untrained toy checkpoint: real classes and files, random weights."""
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("backbone")
    tokenizer = toy_world.make_tokenizer()
    model, images = toy_world.make_model(tokenizer, hidden=32, layers=1, vision=32)
    toy_world.save_backbone(model, tokenizer, images, folder)
    return folder


@pytest.fixture(scope="session")
def loaded(backbone):
    return common.load(backbone)


@pytest.fixture(scope="session")
def encoder(loaded):
    return loaded[1]


@pytest.fixture(scope="session")
def tiny(tmp_path_factory):
    """A world of eight rows a file, and next to it every kind of broken image and video."""
    out = tmp_path_factory.mktemp("tiny")
    toy_world.write_world(out, sizes=dict.fromkeys(toy_world.SIZES, 8), quiet=True)
    for task, name in (("image_understanding", "cut.png"), ("video_understanding", "cut.mp4")):
        whole = Path(example(out, task)["media"][0]).read_bytes()
        (out / name).write_bytes(whole[:len(whole) // 2])
    (out / "garbage.mp4").write_bytes(b"no video " * 99)
    (out / "empty.mp4").write_bytes(b"")
    with av.open(str(out / "no_frames.mp4"), "w", format="mp4") as container:
        stream = container.add_stream("mpeg4", rate=4)
        stream.width, stream.height, stream.pix_fmt = 32, 32, "yuv420p"
        container.start_encoding()
    return out


@pytest.fixture(scope="session")
def world(tmp_path_factory):
    """A world large enough to count in. -> {file name: rows}"""
    out = tmp_path_factory.mktemp("world")
    sizes = {"sft": 1500, "text_rl": 1500, "caption_rl": 400, "mm_rl": 400, "heldout": 300}
    toy_world.write_world(out, sizes=sizes, quiet=True)
    return {p.stem: [json.loads(line) | {"folder": out} for line in p.read_text().splitlines()]
            for p in sorted(out.glob("*.jsonl"))}


def example(folder, task):
    """The first held-out row of a task, its media as absolute paths."""
    row = json.loads((folder / f"heldout_{task}.jsonl").read_text().splitlines()[0])
    return row | {"media": [str(folder / m) for m in row["media"]]}


def text_row(**change):
    return {"id": "t", "task": "text", "prompt": "Why ?", "responses": ["good one", "bad one"],
            "label": "A", "media": [], "captions": []} | change


def write(path, *lines):
    """Rows as dicts, or raw lines as strings. -> path as text"""
    path.write_text("".join((x if isinstance(x, str) else json.dumps(x)) + "\n" for x in lines))
    return str(path)


def thinks(verdict):
    return f"<think>because</think><answer>{verdict}</answer>"


def better(row):
    return row["responses"]["AB".index(row["label"])]


# ------------------------------------------------------------------------------ answers and rewards
PARSED = [  # text, verdict, well formed
    ("<think>\nx\n</think>\n<answer>\nA\n</answer>", "A", True),
    ("  <think>x\ny</think><answer> B </answer>\n", "B", True),
    ("<answer>A</answer>", "A", False),                                # --target label answers so
    ("<answer>A</answer><answer>B</answer>", None, False),
    ("<think>x</think><answer>A</answer><answer>A</answer>", None, False),
    ("<think>x</think><answer>A</answer>A", "A", False),
    ("Well. <think>x</think><answer>A</answer>", "A", False),
    ("<think>x</think> so <answer>A</answer>", "A", False),
    ("<think><think>x</think></think><answer>A</answer>", "A", False),
    ("<think>x</think><think>y</think><answer>B</answer>", "B", False),
    ("<think>x<think>y</think><answer>B</answer>", "B", False),
    ("<think>x</think><answer>Response A</answer>", None, False),
    ("<think>x</think><answer>A or B</answer>", None, False),          # the template's own words
    ("<think>x</think><answer>AB</answer>", None, False),
    ("<think>x</think><answer>a</answer>", None, False),
    ("<think>x</think><answer>\u0410</answer>", None, False),          # a Cyrillic A
    ("<THINK>x</THINK><ANSWER>A</ANSWER>", None, False),
    ("<think>x</think><answer></answer>", None, False),
    ("<think>x</think><answer>A", None, False),
    ("<think>x</think>", None, False),
    ("<think>A is better", None, False),
    ("<think>x</think>A", None, False),
    ("<think>x</think><answer><answer>A</answer></answer>", None, False),
    ("<think>x</think><answer><think>A</think></answer>", None, False),
    ("<think>x<answer></think>A</answer>", None, False),
    ("</think>x<think><answer>A</answer>", None, False),
    ("", None, False),
]


@pytest.mark.parametrize("text, verdict, well_formed", PARSED)
def test_parse(text, verdict, well_formed):
    """One clear verdict in its own tag, or none: a policy finds every way to be read two ways.
    kills: re.search("[AB]"); the last of several <answer>; IGNORECASE; match() for fullmatch();
    no check that each tag stands once."""
    answer = common.parse(text)
    assert (answer.verdict, answer.well_formed) == (verdict, well_formed)


@pytest.mark.parametrize("text", [
    "<think>is it <answer>A</answer>, or rather not</think>",
    "<think>is it <answer>A</answer>, or", "<think>x<answer>B</answer></think>"])
def test_a_verdict_inside_the_thinking_is_none(text):
    """A guess while thinking, cut off or never confirmed, must earn no accuracy.
    BUG (common.py parse): verdict is "A" today. kills: the search over the whole text."""
    assert common.parse(text).verdict is None


def test_an_answer_before_the_thinking_is_malformed():
    """Reasoning after the verdict explains nothing. kills: well_formed = each tag once."""
    assert not common.parse("<answer>A</answer><think>x</think>").well_formed


@pytest.mark.parametrize("inside, type", [
    ("image understanding", "image understanding"), (" Image Understanding.\n", "image understanding"),
    ("IMAGE_UNDERSTANDING", "image understanding"), ("image-\nunderstanding", "image understanding"),
    ("video  generation", "video generation"), ("images understanding", "images understanding"),
    ("image understanding</type><type>video generation", None),
    ("image understanding</type><type>image understanding", None)])
def test_type_tag(inside, type):
    """Spelling is forgiven, a second guess is not. kills: no lower(); no split at _ or -; the first
    of several tags."""
    assert common.parse(f"<think><type>{inside}</type>x</think><answer>A</answer>").type == type


@pytest.mark.parametrize("text", [
    "", "image understanding", "<type>image understanding", "image understanding</type>"])
def test_no_type_tag(text):
    """kills: `"image understanding" in text`."""
    assert common.parse(text).type is None


@pytest.mark.parametrize("text", [
    "<type>video generation<type>image understanding</type>",
    "<type>image understanding</type><type>video generation"])
def test_a_nested_type_tag_is_none(text):
    """Two opened tags are two guesses, the second merely not closed.
    BUG (common.py parse): read as "image understanding" today. kills: counting whole pairs only."""
    assert common.parse(text).type is None


@pytest.mark.parametrize("task", common.TASKS)
def test_rewards(task):
    """The three rewards are separate: each can be earned without the others.
    kills: accuracy needs the format; task reward 1.0; task compared with its underscore."""
    row = {"task": task, "label": "B"}
    rewards = common.format_reward, common.accuracy_reward, common.task_reward
    type = f"<type>{task.replace('_', ' ')}</type>"
    wrong = "<type>audio understanding</type>"
    for text, want in (
            (f"<think>{type}x</think><answer>B</answer>", (1, 1, 0.2)),
            (f"<think>{wrong}x</think><answer>B</answer>", (1, 1, 0)),
            (f"<think>{type}x</think><answer>A</answer>", (1, 0, 0.2)),
            (f"<think>{type}x</think><answer>B</answer>!", (0, 1, 0.2)),
            (f"<think>{type}x</think>", (0, 0, 0.2)),
            (type * 2, (0, 0, 0)),
            ("<answer>A</answer><answer>B</answer>", (0, 0, 0)), ("B", (0, 0, 0)), ("", (0, 0, 0))):
        assert tuple(f(text, row) for f in rewards) == want, text
        assert all(type(f(text, row)) is float for f in rewards[:2]) if callable(type) else True


# ---------------------------------------------------------------------------------------- bad input
