"""
What enters and leaves a judge: answers and rewards, preference rows good and bad, published
formats, the two orders, the scores, and the fairness of the toy rows. Each test names, after
"kills:", plausible wrong versions of the code that make it fail. No trained model is needed.
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
    for task, suffix in (("image_understanding", "png"), ("video_understanding", "mp4")):
        whole = Path(example(out, task)["media"][0]).read_bytes()
        (out / f"whole.{suffix}").write_bytes(whole)
        (out / f"cut.{suffix}").write_bytes(whole[:len(whole) // 2])
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


# ----------------------------------------------------------------------------- answers and rewards
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
    "<think>is it <answer>A</answer>, or", "<think>x<answer>B</answer></think>",
    "</think>x<think><answer>A</answer>"])
def test_a_verdict_inside_the_thinking_is_none(text):
    """A guess while thinking, cut off or never confirmed, must earn no accuracy.
    BUG (common.py parse): verdict is "A" today. kills: the search over the whole text."""
    assert common.parse(text).verdict is None


def test_an_answer_before_the_thinking_is_malformed():
    """Reasoning after the verdict explains nothing. kills: well_formed = each tag once."""
    assert not common.parse("<answer>A</answer><think>x</think>").well_formed


@pytest.mark.parametrize("inside, type", [
    ("image understanding", "image understanding"),
    (" Image Understanding.\n", "image understanding"),
    ("IMAGE_UNDERSTANDING", "image understanding"),
    ("image-\nunderstanding", "image understanding"),
    ("video  generation", "video generation"),
    ("images understanding", "images understanding"),
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
    tag = f"<type>{task.replace('_', ' ')}</type>"
    for text, want in (
            (f"<think>{tag}x</think><answer>B</answer>", (1, 1, 0.2)),
            ("<think><type>audio</type>x</think><answer>B</answer>", (1, 1, 0)),
            (f"<think>{tag}x</think><answer>A</answer>", (1, 0, 0.2)),
            (f"<think>{tag}x</think><answer>B</answer>!", (0, 1, 0.2)),
            (f"<think>{tag}x</think>", (0, 0, 0.2)),
            (tag * 2, (0, 0, 0)),
            ("<answer>A</answer><answer>B</answer>", (0, 0, 0)),
            ("B", (0, 0, 0)),
            ("", (0, 0, 0))):
        got = [f(text, row) for f in
               (common.format_reward, common.accuracy_reward, common.task_reward)]
        assert tuple(got) == want, text


# --------------------------------------------------------------------------------------- bad input
BAD = [  # name, task, what is changed (or the raw line), what the message must say
    ("malformed", "text", '{"id": 1, "task": "text",', "JSON"),
    ("plain text", "text", "hello", "JSON"),
    ("endless number", "text", "1" * 5000, "JSON"),  # BUG (common.py raw_rows): ValueError today
    ("array", "text", "[1, 2]", "object"),
    ("null", "text", "null", "object"),
    ("no id", "text", {"id": DROP}, "'id'"),
    ("no task", "text", {"task": DROP}, "'task'"),
    ("no prompt", "text", {"prompt": DROP}, "'prompt'"),
    ("no label", "text", {"label": DROP}, "'label'"),
    ("no responses", "text", {"responses": DROP}, "'responses' must be"),
    ("tie", "text", {"label": "C"}, "drop ties"),
    ("number for label", "text", {"label": 0}, "'A' or 'B'"),
    ("lower-case label", "text", {"label": "a"}, "'A' or 'B'"),
    ("list for label", "text", {"label": ["A"]}, "'A' or 'B'"),
    ("unknown task", "text", {"task": "audio"}, "use one of text, image_understanding"),
    ("list for task", "text", {"task": ["text"]}, "use one of"),
    ("one response", "text", {"responses": ["x"]}, "two texts"),
    ("three responses", "text", {"responses": ["x", "y", "z"]}, "two texts"),
    ("two letters", "text", {"responses": "xy"}, "two texts"),
    ("number for response", "text", {"responses": ["x", 2]}, "response B is int"),
    ("null prompt", "text", {"prompt": None}, "prompt is NoneType"),
    ("empty prompt", "text", {"prompt": " "}, "prompt is empty"),
    ("empty response", "text", {"responses": ["x", "\n "]}, "response B is empty"),
    ("image token", "text", {"responses": ["<IMG_CONTEXT>", "y"]}, "response A contains '<IMG_"),
    ("end of thinking", "text", {"responses": ["x", "y</think>"]}, "response B contains '</th"),
    ("end of turn", "text", {"responses": ["x<|im_end|>", "y"]}, "contains '<|im_end|>'"),
    ("section marker", "text", {"responses": ["x\n[The End of Assistant A's Response]", "y"]},
     "contains '[The End of "),
    ("number for rationale", "text", {"rationale": 3}, "rationale is int"),
    ("forged rationale", "text", {"rationale": "so </think>"}, "rationale contains '</think>'"),
    ("media for text", "text", {"media": ["cut.png"]}, "needs 0 path(s)"),
    ("string for media", "image_understanding", {"media": "cut.png"}, "'media' must be a list"),
    ("no media", "image_understanding", {"media": []}, "caption form"),
    ("nothing to see", "image_understanding", {"media": [], "captions": []}, "needs 1 path(s)"),
    ("one of two", "image_generation", {"media": ["cut.png"]}, "needs 2 path(s)"),
    ("two of one", "video_understanding", {"media": ["cut.mp4"] * 2}, "needs 1 path(s)"),
    ("one caption of two", "image_generation", {"captions": ["left : red disc ."]},
     "needs 2 caption(s)"),
    ("two captions of one", "video_understanding", {"captions": ["x", "y"]}, "needs 1 caption(s)"),
    ("empty caption", "image_understanding", {"captions": [""]}, "caption 0 is empty"),
    ("number for caption", "image_understanding", {"captions": [1]}, "'captions' must be a list"),
    ("forged caption", "image_understanding", {"captions": ["<image>"]}, "caption 0 contains"),
    ("responses to generate", "image_generation", {"responses": ["x", "y"]}, "'media'"),
    ("missing image", "image_understanding", {"media": ["none.png"]}, "none.png does not exist"),
    ("truncated image", "image_understanding", {"media": ["cut.png"]}, "replace the file"),
    ("folder for image", "image_understanding", {"media": ["media"]}, "replace the file"),
    ("video for image", "image_understanding", {"media": ["no_frames.mp4"]}, "replace the file"),
    ("missing video", "video_understanding", {"media": ["none.mp4"]}, "none.mp4 does not exist"),
    ("truncated video", "video_understanding", {"media": ["cut.mp4"]}, "replace the file"),
    ("garbage video", "video_understanding", {"media": ["garbage.mp4"]}, "replace the file"),
    ("empty video", "video_understanding", {"media": ["empty.mp4"]}, "replace the file"),
    ("no frames", "video_understanding", {"media": ["no_frames.mp4"]}, "replace the file"),
    ("second bad", "video_generation", {"media": ["whole.mp4", "garbage.mp4"]}, "replace the file"),
]


def spoil(tiny, task, change):
    """-> the bad row as a line of text"""
    if isinstance(change, str):
        return change
    row = example(tiny, task) | change
    if isinstance(change.get("media"), list):
        row["media"] = [str(tiny / m) for m in change["media"]]
    return json.dumps({k: v for k, v in row.items() if v is not DROP})


@pytest.mark.parametrize("name, task, change, said", BAD, ids=[b[0] for b in BAD])
def test_bad_row(tiny, encoder, tmp_path, capsys, name, task, change, said):
    """Whoever made the file must find the line and know what to do, or choose to go on without it.
    The blank line is there because line numbers are those of an editor.
    kills: numbering the rows; not opening media; a missing check; skipping without counting."""
    path = write(tmp_path / "rows.jsonl", text_row(id="one"), "", spoil(tiny, task, change),
                 text_row(id="two"))
    with pytest.raises(SystemExit) as stop:
        common.load_rows(path, encoder)
    message = str(stop.value)
    assert message.startswith(f"{path}:3: ") and said in message and "--skip_bad_rows" in message
    rows = common.load_rows(path, encoder, skip_bad_rows=True)
    assert [r["id"] for r in rows] == ["one", "two"]
    out = capsys.readouterr().out
    assert "2 rows" in out and "1 bad rows skipped" in out


def test_every_bad_row_is_counted(tiny, encoder, tmp_path, capsys):
    """kills: a counter per kind that shows the number of kinds; stopping at the first one."""
    path = write(tmp_path / "rows.jsonl", text_row(), *(spoil(tiny, b[1], b[2]) for b in BAD))
    assert len(common.load_rows(path, encoder, skip_bad_rows=True)) == 1
    assert f"{len(BAD)} bad rows skipped" in capsys.readouterr().out


def test_only_bad_rows_is_no_data(encoder, tmp_path):
    """Zero rows would be a division by zero an hour later. kills: returning the empty list."""
    for name, lines in (("empty", []), ("bad", ["x", "y"])):
        with pytest.raises(SystemExit, match="no usable row left"):
            common.load_rows(write(tmp_path / f"{name}.jsonl", *lines), encoder, skip_bad_rows=True)


def test_undecodable_bytes(encoder, tmp_path):
    """A Latin-1 export is a common kind of malformed line.
    BUG (common.py raw_rows): a UnicodeDecodeError and no line today. kills: strict decoding."""
    path = tmp_path / "rows.jsonl"
    row = json.dumps(text_row(id="one"))
    path.write_bytes(f"{row}\n{row.replace('Why', 'Où')}\n{row}\n".encode("latin-1"))
    with pytest.raises(SystemExit) as stop:
        common.load_rows(str(path), encoder)
    assert str(stop.value).startswith(f"{path}:2: ")
    assert len(common.load_rows(str(path), encoder, skip_bad_rows=True)) == 2


def test_half_an_emoji(encoder, tmp_path):
    """A text cut by UTF-16 units ends in a lone surrogate: valid JSON, no valid Unicode.
    BUG (common.py check_row): a TypeError of the tokenizer today. kills: no check of the text."""
    path = write(tmp_path / "rows.jsonl", text_row(), text_row(responses=["good \ud83d", "bad"]))
    with pytest.raises(SystemExit) as stop:
        common.load_rows(path, encoder)
    assert str(stop.value).startswith(f"{path}:2: ") and "response A" in str(stop.value)


@pytest.mark.parametrize("spoil_gz", [lambda gz: b"no gzip", lambda gz: gz[:len(gz) // 2]],
                         ids=["none", "cut"])
def test_broken_gzip(encoder, tmp_path, spoil_gz):
    """An interrupted download. BUG (common.py raw_rows): BadGzipFile or EOFError today.
    kills: no except around reading."""
    path = tmp_path / "rows.jsonl.gz"
    lines = "".join(json.dumps(text_row(id=random.random())) + "\n" for _ in range(500))
    path.write_bytes(spoil_gz(gzip.compress(lines.encode())))
    with pytest.raises(SystemExit) as stop:
        common.load_rows(str(path), encoder)
    assert str(path) in str(stop.value)


def test_broken_json_array(encoder, tmp_path):
    """kills: json.load() without an except; an array read line by line."""
    path = write(tmp_path / "rows.json", "[", json.dumps(text_row()), "{")
    with pytest.raises(SystemExit) as stop:
        common.load_rows(path, encoder)
    assert str(stop.value).startswith(f"{path}:3: ") and ".jsonl" in str(stop.value)


def test_no_such_data(encoder, tmp_path, monkeypatch):
    """A missing input names the command that makes it, also when it looks like a hub id.
    BUG (common.py raw_rows): a traceback from the hub for "toy/rows" today.
    kills: open() or load_dataset() without an except."""
    def offline(*args, **kwargs):
        raise ConnectionError("offline")
    monkeypatch.setitem(sys.modules, "datasets", SimpleNamespace(load_dataset=offline))
    for source, said in ((str(tmp_path), "folder"), (str(tmp_path / "no.jsonl"), "toy_world.py"),
                         ("toy/no.jsonl", "toy_world.py"), ("toy/rows", "toy_world.py")):
        with pytest.raises(SystemExit) as stop:
            common.load_rows(source, encoder)
        assert str(stop.value).startswith(source) and said in str(stop.value)


def test_long_prompts_are_skipped_and_counted(encoder, tmp_path, capsys):
    """A prompt cut in the middle is another question. kills: truncating; `>=`; not counting."""
    short = text_row(prompt="x" * 50)
    path = write(tmp_path / "rows.jsonl", text_row(prompt="x" * 51), short,
                 text_row(prompt="x" * 999))
    limit = len(encoder(common.check_row(short, tmp_path)).ids)
    rows = common.load_rows(path, encoder, max_prompt_tokens=limit)
    assert [r["prompt"] for r in rows] == ["x" * 50] and rows[0]["tokens"] == limit
    assert re.search(rf"\b2 skipped: .*over {limit} tokens", capsys.readouterr().out)


def test_sample_of_a_file(encoder, tmp_path):
    """`file:N` is N rows, the same in each run, from all over the file; files can be joined.
    kills: the first N; an unseeded sample; a sample of everything read so far."""
    path = write(tmp_path / "rows.jsonl", *(text_row(id=i) for i in range(50)))
    more = write(tmp_path / "more.jsonl", text_row(id="more"))
    first, again = (common.load_rows(f"{more},{path}:10", encoder) for _ in range(2))
    ids = [r["id"] for r in first]
    assert ids == [r["id"] for r in again] and ids[0] == "more" and len(set(ids)) == 11
    assert max(map(int, ids[1:])) > 10
    assert len(common.load_rows(f"{path}:99", encoder)) == 50


def test_unwritable_run_folder(tmp_path):
    """Found at once, not after an hour. (Permissions do not bind root, a file in the way does.)
    kills: mkdir() without an except; checking only when --out is used."""
    @dataclass
    class Config:
        out: str = ""
    (tmp_path / "file").write_text("")
    for folder in (tmp_path / "file", tmp_path / "file" / "runs"):
        with pytest.raises(SystemExit) as stop:
            common.open_run(folder, Config())
        assert str(folder) in str(stop.value) and "--out" in str(stop.value)
    for path in (tmp_path / "file" / "p.jsonl", tmp_path / "none" / "p.jsonl", tmp_path):
        with pytest.raises(SystemExit) as stop:
            check_writable(str(path))
        assert str(path) in str(stop.value) and "--out" in str(stop.value)
    assert common.open_run(tmp_path / "new" / "run", Config()) is None
    check_writable(str(tmp_path / "p.jsonl"))


def test_garbage_for_a_saved_state(tmp_path):
    """A full disk leaves such files. BUG (common.py open_run): an UnpicklingError today.
    kills: torch.load() without an except."""
    @dataclass
    class Config:
        out: str = ""
    (tmp_path / "state.pt").write_bytes(b"garbage")
    with pytest.raises(SystemExit) as stop:
        common.open_run(tmp_path, Config())
    assert "state.pt" in str(stop.value)


def weights(change):
    """-> a function that rewrites the weights of a checkpoint folder"""
    def rewrite(folder):
        old = load_file(folder / "model.safetensors")
        save_file(change(old), folder / "model.safetensors", metadata={"format": "pt"})
    return rewrite


# BUG (common.py load): the last six escape today. Garbage and cut weights raise a SafetensorError;
# foreign or missing tensors load as random weights, silently; without tokenizer files transformers
# makes an empty tokenizer, and every prompt has zero tokens.
NO_CHECKPOINT = {
    "no folder": lambda f: shutil.rmtree(f),
    "a file": lambda f: (shutil.rmtree(f), f.write_text("")),
    "an empty folder": lambda f: [p.unlink() for p in f.iterdir()],
    "no config": lambda f: (f / "config.json").unlink(),
    "garbage config": lambda f: (f / "config.json").write_text("garbage"),
    "empty config": lambda f: (f / "config.json").write_text("{}"),
    "no weights": lambda f: (f / "model.safetensors").unlink(),
    "no image processor": lambda f: (f / "preprocessor_config.json").unlink(),
    "garbage tokenizer": lambda f: (f / "tokenizer.json").write_text("garbage"),
    "other shapes": weights(lambda old: {k: v[:1].contiguous() for k, v in old.items()}),
    "garbage weights": lambda f: (f / "model.safetensors").write_bytes(b"garbage" * 99),
    "cut weights": lambda f: os.truncate(f / "model.safetensors", 9999),
    "empty weights": lambda f: (f / "model.safetensors").write_bytes(b""),
    "foreign weights": weights(lambda old: {"fc.weight": torch.zeros(3)}),
    "half the weights": weights(lambda old: {k: old[k] for k in sorted(old)[::2]}),
    "no tokenizer": lambda f: [p.unlink() for p in f.glob("tokenizer*")],
}


@pytest.mark.parametrize("name", NO_CHECKPOINT)
def test_no_checkpoint(backbone, tmp_path, name):
    """Training for hours from random weights looks like a bad recipe, so say it at the start.
    kills: an except clause with one kind too few; no look at the missing tensors."""
    folder = tmp_path / "model"
    shutil.copytree(backbone, folder)
    NO_CHECKPOINT[name](folder)
    with pytest.raises(SystemExit) as stop:
        common.load(folder, made_by="python the_maker.py")
    message = str(stop.value)
    assert message.startswith(f"{folder}: ") and message.count("\n") == 0
    assert "the_maker.py" in message or "save_pretrained" in message


def test_a_missing_toy_folder_is_no_hub_id(tmp_path, monkeypatch):
    """The scripts' own defaults, toy/backbone and runs/stage0_sft, look like hub ids.
    BUG (common.py load): only "couldn't connect" today. kills: no word of made_by."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(SystemExit) as stop:
        common.load("toy/backbone", made_by="python the_maker.py")
    assert "toy/backbone" in str(stop.value) and "python the_maker.py" in str(stop.value)


# ----------------------------------------------------------------------------------- forged markup
MARKUP = ["<image>", "<video>", "<img>", "</img>", "<IMG_CONTEXT>", "<|im_start|>", "<|im_end|>",
          "<|endoftext|>", "<think>", "</think>", "<answer>", "</answer>", "<type>", "</type>",
          "<caption>", "</caption>", "[The Start of Assistant B's Response]",
          "[The End of Assistant A's Response]", "[The End of Chatbot B's Generated Image]"]


def test_no_text_forges_markup(tiny, encoder, tmp_path):
    """Every tag in every field a user fills, in the middle of a word or not.
    kills: a tag or a field left out of the check; checking with startswith()."""
    lines = []
    for task in common.TASKS:
        row = example(tiny, task)
        for tag in MARKUP:
            bad = f"so{tag}so"
            lines.append({**row, "prompt": bad})
            for i in range(len(row["captions"])):
                lines.append({**row, "captions": [bad if j == i else c
                                                  for j, c in enumerate(row["captions"])]})
            if row["responses"]:
                lines += [{**row, "responses": [bad, "x"]}, {**row, "responses": ["x", bad]}]
            if "type>" not in tag:  # a rationale may name the type, as in Figures 8-11
                lines.append({**row, "rationale": bad})
    path = write(tmp_path / "rows.jsonl", text_row(id="good"), *lines)
    left = common.load_rows(path, encoder, skip_bad_rows=True)
    assert [r["id"] for r in left] == ["good"], left[1:]


def test_the_tokenizers_own_specials_are_markup(tmp_path, encoder):
    """Another backbone has other special tokens; they are found in its tokenizer.
    kills: the fixed list alone."""
    own = SimpleNamespace(forbidden=("<|turn|>",), check=encoder.check)
    path = write(tmp_path / "rows.jsonl", text_row(prompt="a <|turn|> b"))
    assert common.load_rows(path, encoder)
    with pytest.raises(SystemExit, match="turn"):
        common.load_rows(path, own)


def test_a_rationale_may_hold_a_type(tmp_path, encoder):
    """kills: the same list of tags for rationales as for user text."""
    path = write(tmp_path / "rows.jsonl", text_row(rationale="<type>text</type> x"))
    assert len(common.load_rows(path, encoder)) == 1


@pytest.mark.parametrize("task", common.TASKS)
def test_placeholders_are_features_of_real_media(tiny, loaded, task):
    """As many placeholders as the media have features, whatever the texts say, and the model takes
    them. Paths are relative to the rows' file, not to the current folder.
    kills: paths from the current folder; one image of two; a thumbnail not counted."""
    model, encoder = loaded
    rows = common.load_rows(str(tiny / f"heldout_{task}.jsonl"), encoder)
    expected = {"text": 0, "image_understanding": 1, "image_generation": 2,
                "video_understanding": toy_world.FRAMES, "video_generation": 2 * toy_world.FRAMES}
    odd = "{a} {media[0]} {} %s \\1 <IMG_CONTEXT <IMAGE> <img_context> image video < think >"
    for row in rows[:3]:
        for row in (row, {**row, "prompt": odd, "responses": row["responses"] and [odd, odd]}):
            row = common.check_row(dict(row), "", common.FORBIDDEN + encoder.special_tokens)
            prompt = encoder(row)
            tiles = 0 if prompt.pixels is None else len(prompt.pixels)
            assert tiles == expected[task]
            assert prompt.ids.count(encoder.image_token_id) == tiles * encoder.tokens_per_tile
            assert row["prompt"] in encoder.decode(prompt.ids)
            media = {} if prompt.pixels is None else {"pixel_values": prompt.pixels}
            with torch.no_grad():
                model(input_ids=torch.tensor([prompt.ids]), **media)
            caption = encoder(row, "caption")
            assert caption.pixels is None and encoder.image_token_id not in caption.ids


def test_tiles_of_a_wide_image(encoder, tmp_path):
    """A wide image is several tiles and a thumbnail, a square one is one tile; each stands at its
    own place. kills: one block of placeholders an image; both places filled by the first."""
    Image.new("RGB", (128, 32)).save(tmp_path / "wide.png")
    Image.new("RGB", (32, 32)).save(tmp_path / "square.png")
    for names, tiles in (("wide square", [5, 1]), ("square wide", [1, 5])):
        media = [f"{name}.png" for name in names.split()]
        path = write(tmp_path / "rows.jsonl",
                     text_row(task="image_generation", responses=None, media=media))
        row, = common.load_rows(path, encoder)
        prompt = encoder(row)
        blocks = re.findall(r"<img>(.*?)</img>", encoder.decode(prompt.ids))
        assert [b.count(common.IMAGE_TOKEN) for b in blocks] == \
            [n * encoder.tokens_per_tile for n in tiles] and len(prompt.pixels) == sum(tiles)


# ----------------------------------------------------------------------------------- the two sides
def bare(row):
    """Without the path-free extras, and with the optional rationale made explicit."""
    return {**row, "rationale": row.get("rationale")}


@pytest.mark.parametrize("task", common.TASKS)
def test_swap(tiny, encoder, task):
    """Everything that belongs to a side moves with it, in the row, in the prompt and in the pixels.
    kills: label, media, captions or rationale left behind; a shared list changed in place."""
    row, = common.load_rows(str(tiny / f"heldout_{task}.jsonl") + ":1", encoder)
    noun = {"image_generation": "Image", "video_generation": "Video"}.get(task, "Response")
    row["prompt"] = "neither side's words"
    row["rationale"] = f"{noun} A is a mess, {noun} B's is not. {noun} B is better than {noun} A."
    before = json.dumps(row)
    other = common.swap(row)
    assert json.dumps(row) == before and common.swap(other) == row
    assert other["label"] == OTHER[row["label"]] and other["prompt"] == row["prompt"]
    assert other["rationale"] == (f"{noun} B is a mess, {noun} A's is not. "
                                  f"{noun} A is better than {noun} B.")
    for form in ("pixels", "caption"):
        if row["responses"]:
            sides = row["responses"]
        elif form == "caption":
            sides = row["captions"]
        else:
            sides = ["same", "same"]
        text = common.render(row, form).replace(sides[0], "\0").replace(sides[1], sides[0])
        assert common.render(other, form) == text.replace("\0", sides[1])
    if row["responses"]:
        assert common.render(row) != common.render(other)
        assert other["media"] == row["media"] and other["captions"] == row["captions"]
    else:
        first, second = encoder(row).pixels.chunk(2)
        assert not torch.equal(first, second)
        assert torch.equal(encoder(other).pixels, torch.cat([second, first]))
        assert common.render(row, "caption") != common.render(other, "caption")


def test_swap_without_a_rationale():
    """kills: re.sub on None; an empty rationale invented."""
    for row in (text_row(), text_row(rationale=None), text_row(task="image_generation",
                                                               responses=None, media=["x", "y"])):
        other = common.swap(row)
        assert bare(common.swap(other)) == bare(row) and not other.get("rationale")


def test_can_swap():
    """kills: always True; True as soon as any side is named; "B" matched inside words."""
    for text in (None, "", "Response A beats Response B.", "Assistant B's plan; Image A; Video B.",
                 "A better one would say more. Bob is no B2.", "Chatbot A is a Big success."):
        assert common.can_swap(text_row(rationale=text)), text
    for text in ("B is better.", "Responses A and B are fine.", "I prefer B", "(B)",
                 "Response A loses, so B.", "I prefer A", "A's plan.", "A: good.",
                 "Answer B is named by Response A.", "Response A is worse than the second one.",
                 "Of Response A and Response B the latter."):
        assert not common.can_swap(text_row(rationale=text)), text


@pytest.mark.parametrize("text", ["I prefer response A.", "response A is right",
                                  "The answer A wins.", "RESPONSE A is better."])
def test_a_side_in_lower_case_is_a_side(text):
    """After a swap the rationale must not praise the loser.
    BUG (common.py _SIDES): stays "A" and can_swap() says yes today. kills: matching "Response"."""
    row = text_row(rationale=text)
    changed = re.sub(r"\bA\b", "B", text)
    assert not common.can_swap(row) or common.swap(row)["rationale"] == changed


def epochs(rows, batch_size, n, seed=0):
    """The stream of batch_of(), cut into n epochs."""
    steps = n * len(rows) // batch_size
    stream = [r for s in range(steps) for r in common.batch_of(rows, s, batch_size, seed)]
    return [stream[i:i + len(rows)] for i in range(0, len(stream), len(rows))]


@pytest.mark.parametrize("batch_size", [1, 4, 10, 25])
def test_every_row_once_an_epoch(batch_size):
    """Also when a batch straddles epochs or is longer than the data.
    kills: a sample with replacement; the tail of an epoch dropped; one order for all epochs."""
    rows = [text_row(id=i) for i in range(10)]
    order = [[r["id"] for r in epoch] for epoch in epochs(rows, batch_size, 20)]
    assert all(sorted(ids) == list(range(10)) for ids in order)
    assert len(set(map(tuple, order))) > 15
    assert order != [[r["id"] for r in epoch] for epoch in epochs(rows, batch_size, 20, seed=1)]


def test_batches_do_not_depend_on_the_past():
    """A resumed run, and each rank, must see what an unbroken run would.
    kills: one generator that runs along; a cache that is changed."""
    rows = [text_row(id=i) for i in range(10)]
    forward = [common.batch_of(rows, s, 4, 3) for s in range(10)]
    common._permutation.cache_clear()
    random.seed(9)
    assert [common.batch_of(rows, s, 4, 3) for s in reversed(range(10))] == forward[::-1]


def test_sides_are_balanced_and_labels_true():
    """Over the epochs each row shows its better response on each side half of the time.
    kills: no coin; a coin without the epoch or without the id; a label that stays."""
    rows = [text_row(id=i) for i in range(10)]
    seen = epochs(rows, 5, 200)
    assert all(better(r) == "good one" for epoch in seen for r in epoch)
    first = Counter(r["id"] for epoch in seen for r in epoch if r["label"] == "A")
    assert all(abs(first[i] / 200 - 0.5) < 4 * 0.5 / 200 ** 0.5 for i in range(10)), first
    together = [len({r["label"] for r in epoch}) for epoch in seen]
    assert sum(n == 2 for n in together) > 190
    assert rows == [text_row(id=i) for i in range(10)]


def test_what_cannot_be_swapped_is_not():
    """Only where the rationale is shown. kills: swapping without asking may_swap(); a policy that
    says A is always right on rows whose unused rationale cannot be swapped."""
    rows = [text_row(id=i, rationale="B is worse.") for i in range(10)]
    shown = common.batch_of(rows, 0, 50, 3, common.can_swap)
    assert {r["label"] for r in shown} == {"A"}
    assert 10 <= sum(r["label"] == "A" for r in common.batch_of(rows, 0, 50, 3)) <= 40


# ---------------------------------------------------------------------------------- published data
def helpsteer(preference, **change):
    """A row as published: a negative preference means that response 1 is better."""
    one_wins = preference < 0
    return {"domain": "general", "language": "english",
            "context": [{"role": "user", "content": "Why?"}],
            "response1": "good one" if one_wins else "bad one",
            "response2": "bad one" if one_wins else "good one",
            "overall_preference": preference, "individual_preference": [
                {"score": -preference, "reasoning": "dissent", "feedback1": "x", "feedback2": "y"},
                {"score": preference, "reasoning": "@Response 1 and response 2 differ. "
                 "Responses 2 and 1 are short.",
                 "feedback1": "@Response 1 is " + ("fine" if one_wins else "poor"),
                 "feedback2": "Response 2 is " + ("poor" if one_wins else "fine")}]} | change


@pytest.mark.parametrize("preference", [-3, -2, -1, 1, 2, 3])
def test_helpsteer3(encoder, tmp_path, preference):
    """Sign, side and feedback, on both sides that the hash can choose.
    kills: the sign turned round; feedback1 always for Response A; "Response 1" left in the text;
    the first annotator instead of one who agrees; the better one always on the same side."""
    path = write(tmp_path / "train.jsonl", *[helpsteer(preference)] * 20)
    rows = common.load_rows(path, encoder)
    assert {r["label"] for r in rows} == {"A", "B"} and len({r["id"] for r in rows}) == 20
    for row in rows:
        good, bad = row["label"], OTHER[row["label"]]
        one, two = (good, bad) if preference < 0 else (bad, good)
        assert better(row) == "good one" and row["prompt"] == "Why?" and row["task"] == "text"
        text = row["rationale"]
        assert f"Response {good}: Response {good} is fine\n" in text
        assert f"Response {bad}: Response {bad} is poor\n" in text
        assert f"Response {one} and Response {two} differ. Response {two} and Response {one} are " \
            in text and "dissent" not in text
        assert text.endswith(f"Response {good} is better.") and common.can_swap(row)
        assert common.swap(row)["rationale"].endswith(f"Response {bad} is better.")


def test_helpsteer3_ties_and_gaps(encoder, tmp_path):
    """kills: a tie kept (as one published loader does); a rationale required or made up; the last
    annotator instead of the surest."""
    sure = [{"score": s, "reasoning": f"sure {s}", "feedback1": "f", "feedback2": None}
            for s in (1, 3, 2)]
    path = write(tmp_path / "train.jsonl", helpsteer(0), helpsteer(1, individual_preference=[]),
                 helpsteer(1, individual_preference=None), helpsteer(2, individual_preference=sure))
    rows = common.load_rows(path, encoder)
    assert len(rows) == 3 and not rows[0].get("rationale") and not rows[1].get("rationale")
    assert "sure 3" in rows[2]["rationale"] and "None" not in rows[2]["rationale"]


def test_helpsteer3_context(encoder, tmp_path):
    """A list of one turn, of several, or a plain string. kills: only the last or the first turn."""
    turns = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"},
             {"role": "user", "content": "Why?"}]
    path = write(tmp_path / "train.jsonl", helpsteer(1, context=turns[:1]),
                 helpsteer(1, context=turns), helpsteer(1, context="Why?"))
    prompts = [r["prompt"] for r in common.load_rows(path, encoder)]
    assert prompts[0] == "Hi" and prompts[2] == "Why?"
    assert re.fullmatch(r"User: Hi\s+Assistant: Hello\s+User: Why\?", prompts[1])


@pytest.mark.parametrize("change", [
    {"context": None}, {"context": []}, {"context": [{}]}, {"overall_preference": None},
    {"overall_preference": "1"}, {"individual_preference": [{"score": 1}]}, {"response1": None}])
def test_helpsteer3_malformed(encoder, tmp_path, change):
    """kills: a KeyError, TypeError or IndexError that escapes the adapter."""
    path = write(tmp_path / "train.jsonl", helpsteer(1), helpsteer(1, **change))
    with pytest.raises(SystemExit) as stop:
        common.load_rows(path, encoder)
    assert str(stop.value).startswith(f"{path}:2: ")
    assert len(common.load_rows(path, encoder, skip_bad_rows=True)) == 1


def test_helpsteer3_from_the_hub(encoder, monkeypatch):
    """Streamed, from the config that has labels. kills: the default config; no streaming."""
    asked = []
    def load_dataset(name, config, **more):
        asked.append((name, config, more["split"], more["streaming"]))
        return iter([helpsteer(1), helpsteer(-1)])
    monkeypatch.setitem(sys.modules, "datasets", SimpleNamespace(load_dataset=load_dataset))
    rows = common.load_rows("nvidia/HelpSteer3", encoder)
    assert [better(r) for r in rows] == ["good one"] * 2
    assert asked == [("nvidia/HelpSteer3", "preference", "train", True)]


def gram(label, word="Response", question="Why?", output=None):
    a, b = ("good one", "bad one") if label == "A" else ("bad one", "good one")
    return {"instruction": "You are a helpful assistant in evaluating ...\n\n"
            f"[User Question]\n{question}\n\n"
            f"[The Start of Assistant A's {word}]\n{a}\n[The End of Assistant A's {word}]\n\n"
            f"[The Start of Assistant B's {word}]\n{b}\n[The End of Assistant B's {word}]",
            "input": "", "output": output if output is not None else
            f"<think> Feedback: A or B? Conclusion: ... </think>\n<answer> {label} </answer>"}


@pytest.mark.parametrize("suffix", [".json", ".jsonl", ".jsonl.gz", ".json.gz"])
def test_gram(encoder, tmp_path, suffix):
    """Both spellings of the markers, both labels, every form the file may have; the order is drawn
    anew. kills: one spelling; the label read from <think>; gzip or an array not recognised."""
    raw = [gram(label, word, "Why?\nTell me.")
           for label in "AB" for word in ("Response", "Answer")] * 8
    text = json.dumps(raw) if ".json" in Path(f"x{suffix}").suffixes else \
        "".join(json.dumps(r) + "\n" for r in raw)
    path = tmp_path / f"train{suffix}"
    path.write_bytes(gzip.compress(text.encode()) if suffix.endswith("gz") else text.encode())
    rows = common.load_rows(str(path), encoder)
    assert len(rows) == 32 and len({r["id"] for r in rows}) == 32
    assert all(better(r) == "good one" and sorted(r["responses"]) == ["bad one", "good one"]
               and r["prompt"] == "Why?\nTell me." and not r.get("rationale") for r in rows)
    for some in (rows[0::4], rows[2::4]):  # one published label, both labels here
        assert {r["label"] for r in some} == {"A", "B"}


@pytest.mark.parametrize("change", [
    {"output": "A"}, {"output": "<answer>A</answer> <answer>B</answer>"}, {"output": ""},
    {"output": "<answer>C</answer>"}, {"output": None}, {"instruction": "Which is better?"},
    {"instruction": None}, {"instruction": gram("A")["instruction"].replace("[User Question]", "")},
    {"instruction": gram("A")["instruction"].replace("bad", "[The Start of Assistant A's ")}])
def test_gram_malformed(encoder, tmp_path, change):
    """kills: the first of two labels; a default label; a prompt with the markers inside."""
    path = write(tmp_path / "train.jsonl", gram("A"), gram("A") | change)
    with pytest.raises(SystemExit) as stop:
        common.load_rows(path, encoder)
    assert str(stop.value).startswith(f"{path}:2: ")
    assert len(common.load_rows(path, encoder, skip_bad_rows=True)) == 1


def rm_bench(**change):
    return {"id": 7, "prompt": "Why?", "chosen": ["c0", "c1", "c2"], "rejected": ["r0", "r1", "r2"],
            "subset": "alpacaeval", "error": "x"} | change


def test_rm_bench(encoder, tmp_path):
    """Nine pairs an item, with the styles in the id for the 3x3 matrix and the item as the group.
    kills: three pairs (zip); (i, j) turned round; the chosen one always first."""
    path = tmp_path / "total.json"
    path.write_text(json.dumps([rm_bench(), rm_bench(id="chat/8", domain="chat")]))
    rows = common.load_rows(str(path), encoder)
    assert len(rows) == 18 and {r["label"] for r in rows} == {"A", "B"}
    assert Counter(r["group"] for r in rows) == {"7": 9, "chat/8": 9}
    assert {r["subset"] for r in rows[:9]} == {"alpacaeval"}
    assert {r["subset"] for r in rows[9:]} == {"chat"}
    for k, row in enumerate(rows):
        i, j = row["id"].rpartition("/")[2].split("-")
        assert better(row) == f"c{i}" and common.swap(row)["label"] != row["label"]
        assert set(row["responses"]) == {f"c{i}", f"r{j}"} and 3 * int(i) + int(j) == k % 9


@pytest.mark.parametrize("change", [
    {"rejected": "xyz"}, {"rejected": None}, {"chosen": ["c", 1, "c"]}])
def test_rm_bench_malformed(encoder, tmp_path, change):
    """A string is a sequence too: its letters would be nine rows of one letter.
    BUG (common.py convert): "xyz" gives nine rows today. kills: looking at `chosen` only."""
    path = tmp_path / "rm.json"
    path.write_text(json.dumps([rm_bench(), rm_bench(**change)]))
    with pytest.raises(SystemExit) as stop:
        common.load_rows(str(path), encoder)
    assert str(stop.value).startswith(f"{path}:[1]: ")


RM_BENCH_CHAT = Path(common.__file__).parent.parent / "shared" / "data" / "rm_bench_chat.json"


@pytest.mark.skipif(not RM_BENCH_CHAT.exists(), reason="the public file is not here")
def test_rm_bench_as_published(encoder, capsys):
    """129 real items of real text through byte tokens. kills: an assumption about its columns."""
    raw = json.loads(RM_BENCH_CHAT.read_text(encoding="utf-8"))
    rows = common.load_rows(str(RM_BENCH_CHAT), encoder, max_prompt_tokens=2048)
    skipped = int(re.search(r"(\d+) skipped: .*over 2048", capsys.readouterr().out)[1])
    assert len(raw) == 129 and len(rows) + skipped == 9 * 129 and len(rows) > 100
    by_id = {str(r["id"]): r for r in raw}
    for row in rows:
        i, j = map(int, row["id"].rpartition("/")[2].split("-"))
        item = by_id[row["group"]]
        assert better(row) == item["chosen"][i] and row["tokens"] <= 2048
        assert common.swap(row)["responses"]["AB".index(row["label"])] == item["rejected"][j]
    assert abs(sum(r["label"] == "A" for r in rows) / len(rows) - 0.5) < 2 / len(rows) ** 0.5


def test_sides_of_published_rows_are_a_fair_coin():
    """Published sets list the better one first (VL-RewardBench: 99.6 %).
    kills: hash() (another side each run); one side for a run of ids; a biased bit."""
    labels = "".join(common.better_first(f"x/{i}", "p", "g", "b")["label"] for i in range(2000))
    assert abs(labels.count("A") / 2000 - 0.5) < 4 * 0.5 / 2000 ** 0.5
    changes = sum(a != b for a, b in zip(labels, labels[1:]))
    assert abs(changes / 1999 - 0.5) < 4 * 0.5 / 1999 ** 0.5
    assert labels.startswith("BBBBBBABBAAB")  # on every machine


# ----------------------------------------------------------------------------- judging and scoring
def pred(row, order, verdict, sample=0):
    return {"id": "x", "row": row, "order": order, "sample": sample, "pred": verdict,
            "text": thinks("A") if verdict else "?"}


def both(row, ab, ba):
    return [pred(row, "AB", ab), pred(row, "BA", ba)]


LABELS = [{"label": x} for x in "ABBA"]


def scores(preds, *names, rows=LABELS):
    s = common.summarize(rows, preds)
    return tuple(s[n] for n in names)


def test_a_judge_that_always_says_a():
    """Its verdict flips with the order, in the row's own frame: exactly one half, whatever the
    labels. kills: one order only; share_a in the row's frame; flips of the letter shown."""
    preds = [p for i in range(4) for p in both(i, "A", "B")]
    names = "accuracy", "order_flips", "share_a", "unparsable", "n"
    assert scores(preds, *names) == (0.5, 1, 1, 0, 4)
    preds = [p for i in range(4) for p in both(i, "B", "A")]
    assert scores(preds, "accuracy", "order_flips", "share_a") == (0.5, 1, 0)


def test_a_perfect_judge_and_its_opposite():
    """kills: label not used; flips counted as errors."""
    preds = [p for i, r in enumerate(LABELS) for p in both(i, r["label"], r["label"])]
    assert scores(preds, "accuracy", "order_flips", "share_a") == (1, 0, 0.5)
    preds = [p for i, r in enumerate(LABELS) for p in both(i, OTHER[r["label"]], OTHER[r["label"]])]
    assert scores(preds, "accuracy", "order_flips", "share_a") == (0, 0, 0.5)


def test_unparsable_answers_are_wrong():
    """kills: leaving them out of the mean; counting one half; a division by zero."""
    preds = both(0, "A", None) + both(1, None, None) + both(2, "B", "B")
    names = "accuracy", "order_flips", "unparsable", "share_a", "n", "format"
    assert scores(preds, *names) == (0.5, 0, 0.5, pytest.approx(2 / 3), 3, 0.5)
    assert scores(both(0, None, None), *names) == (0, 0, 1, 0, 1, 0)


def test_votes():
    """The majority of an order's votes that state a verdict; a tie is one half, and no flip.
    kills: the mean of the votes; the first vote; ties lost; unparsable votes as votes against."""
    for ab, ba, accuracy, flips in ((["A", "A", "B"], ["A", "B", "A"], 1, 0),
                                    (["A", "B", "B"], ["A", "A", "B"], 0.5, 1),
                                    (["A", "B"], ["A", "A"], 0.75, 0),
                                    (["A", "B", None], ["B", None, "A"], 0.5, 0),
                                    (["A", None, None], ["A", None, None], 1, 0),
                                    ([None, None], ["A", "A"], 0.5, 0)):
        preds = [pred(0, "AB", v, i) for i, v in enumerate(ab)]
        preds += [pred(0, "BA", v, i) for i, v in enumerate(ba)]
        assert scores(preds, "accuracy", "order_flips") == (accuracy, flips), (ab, ba)


def test_flips_are_a_share_of_rows_judged_twice():
    """kills: a share of all rows."""
    preds = both(0, "A", "B") + both(1, "B", "B") + both(2, None, "B") + [pred(3, "AB", "A")]
    assert scores(preds, "order_flips", "n") == (0.5, 4)


@pytest.mark.parametrize("n, right", [
    (1, 0), (1, 1), (20, 0), (20, 20), (20, 10), (200, 3), (999, 990)])
def test_interval(n, right):
    """Wilson's interval is the set of true rates e with |p - e| <= z sqrt(e (1 - e) / n): both ends
    solve that equation. kills: Wald's interval; n counted in judgements; no limits at 0 and 1."""
    rows = [{"label": "A"}] * n
    preds = [p for i in range(n) for p in both(i, *("AA" if i < right else "BB"))]
    (low, high), p = scores(preds, "interval", "accuracy", rows=rows)
    assert p == right / n and 0 <= low < high <= 1 and low - 1e-9 < p < high + 1e-9
    for end in (low, high):
        assert abs(p - end) == pytest.approx(1.96 * (end * (1 - end) / n) ** 0.5, abs=1e-6)
    if right in (0, n):
        assert (low if right == 0 else 1 - high) == pytest.approx(0, abs=1e-12)


def judge_with(say, rows, **more):
    """common.judge() with a fake model that answers say(prompt text, vote). -> preds, calls"""
    calls = []

    def sample(model, encoder, prompts, votes, temperature, max_new_tokens, generator):
        calls.append((len(prompts), votes, temperature, generator.initial_seed()))
        return SimpleNamespace(ids=[say(p, v) for p in prompts for v in range(votes)])

    def encoder(row, form):
        return common.render(row, form)
    encoder.decode, encoder.style = lambda ids: ids, "msrl"
    return common.judge(torch.nn.Linear(1, 1), encoder, rows, sample, **more), calls


def reads(prompt, vote):
    """A perfect judge: finds the good response in the text that it is shown."""
    first = prompt.partition("[The Start of Assistant A's Response]\n")[2]
    return thinks("A" if first.startswith("good") else "B")


def judged_rows():
    rng = random.Random(0)
    rows = [text_row(id=f"r{i}", tokens=rng.randrange(9)) for i in range(11)]
    return [common.swap(r) if i % 3 == 0 else r for i, r in enumerate(rows)]


@pytest.mark.parametrize("votes", [1, 3])
def test_judge_shows_both_orders(votes):
    """Batches are sorted by length, so answers must find their way back to row, order and vote.
    kills: the swapped prompt not shown; pred in the shown frame; answers given to other rows."""
    rows = judged_rows()
    preds, calls = judge_with(reads, rows, votes=votes, batch_size=4)
    assert [(p["row"], p["order"], p["sample"]) for p in preds] == \
        [(i, o, v) for i in range(11) for o in ("AB", "BA") for v in range(votes)]
    assert all(p["pred"] == rows[p["row"]]["label"] and p["id"] == f"r{p['row']}" for p in preds)
    assert scores(preds, "accuracy", "order_flips", "share_a", rows=rows) == (1, 0, 0.5)
    assert sum(c[0] for c in calls) == 22 and len({c[3] for c in calls}) == len(calls) == 6
    assert {c[1:3] for c in calls} == {(votes, 0.0 if votes == 1 else 1.0)}


def test_judge_gives_a_position_bias_one_half():
    """kills: pred taken as the letter that was said."""
    rows = judged_rows()
    preds, _ = judge_with(lambda prompt, vote: thinks("A"), rows)
    assert all(p["pred"] == ("A" if p["order"] == "AB" else "B") for p in preds)
    assert scores(preds, "accuracy", "order_flips", "share_a", rows=rows) == (0.5, 1, 1)


def test_judge_takes_the_majority():
    """Two of three votes right is right, one of three is wrong. kills: the last vote decides."""
    rows = judged_rows()

    def right_for(votes):
        def say(prompt, vote):
            verdict = common.parse(reads(prompt, 0)).verdict
            return thinks(verdict if vote in votes else OTHER[verdict])
        return common.summarize(rows, judge_with(say, rows, votes=3)[0])["accuracy"]
    assert right_for((0, 1)) == right_for((1, 2)) == 1
    assert right_for((0,)) == right_for((2,)) == 0


def test_judge_of_nonsense():
    """kills: a crash on an answer without a verdict; a guess in its place."""
    rows = judged_rows()
    preds, _ = judge_with(lambda prompt, vote: "Both are good.", rows)
    assert all(p["pred"] is None and p["text"] == "Both are good." for p in preds)
    assert scores(preds, "accuracy", "unparsable", "format", rows=rows) == (0, 1, 0)


# ------------------------------------------------------------------------ fairness of the toy rows
SHARP = ("text_rl", "caption_rl", "mm_rl", *(f"heldout_{t}" for t in common.TASKS))


def items_of(text):
    return dict(re.findall(r"(\w+) (?:: )?([^.]+) \.", text))


def claim_of(response):
    """-> what a response claims, and its flourish or None"""
    for name, (form, *_) in toy_world.FLOURISHES.items():
        before, after = form.split("{}")
        if response.startswith(before) and response.endswith(after):
            return response[len(before):len(response) - len(after)].removeprefix("it is "), name
    return response.removeprefix("it is ").removesuffix(" ."), None


def question_of(row):
    return row["prompt"].rpartition(" . ")[2]


def truth(row):
    """The right side, worked out from the scene alone."""
    if row["responses"] is None:
        return "AB"[[c == row["prompt"] for c in row["captions"]].index(True)]
    if row["prompt"].endswith("say it again ?"):
        right = [f"{told} say it again ?" == row["prompt"] for told in whole(row)]
        assert sum(right) == 1, row
        return "AB"[right.index(True)]
    what, key = re.fullmatch(r"(\w+) of (\w+) \?", question_of(row)).groups()
    value = items_of(row["captions"][0] if row["captions"] else row["prompt"])[key]
    value = {"colour": value.split()[0], "shape": value.split()[-1]}.get(what, value)
    right = [claim_of(r)[0] == value for r in row["responses"]]
    assert sum(right) == 1, row
    return "AB"[right.index(True)]


def accuracy(rows, score):
    """Of a judge that prefers the candidate with the higher score(row, 0 or 1); ties one half."""
    points = 0
    for row in rows:
        a, b = score(row, 0), score(row, 1)
        points += 0.5 if a == b else ("A" if a > b else "B") == row["label"]
    return points / len(rows)


def adorned(row, i):
    return claim_of(row["responses"][i])[1] is not None


def near(share, expected, n, sigmas=4):
    return abs(share - expected) <= sigmas * 0.5 / n ** 0.5


@pytest.mark.parametrize("name", SHARP)
def test_labels_are_true(world, name):
    """kills: mirror() that forgets responses, scenes or label; a wrong claim that is right."""
    assert all(truth(row) == row["label"] for row in world[name])
    tasks = {"text_rl": {"text"}, "caption_rl": set(VISUAL), "mm_rl": set(VISUAL)}
    assert {r["task"] for r in world[name]} == tasks.get(name, {name.removeprefix("heldout_")})


@pytest.mark.parametrize("name", ("sft", *SHARP))
def test_labels_are_balanced(world, name):
    """Within 2 %, so that a judge of position scores chance. kills: the better one always first;
    labels drawn one by one (only by chance, see the next test)."""
    rows = world[name]
    for task in {r["task"] for r in rows}:
        labels = [r["label"] for r in rows if r["task"] == task]
        assert abs(labels.count("A") / len(labels) - 0.5) <= 0.02, task
    assert len({r["id"] for r in rows}) == len(rows)


def test_sft_labels_are_balanced_whatever_the_seed(tmp_path):
    """The annotators' labels too, and not by the law of large numbers only: 300 coins would pass
    here less than one time in two, for each seed. kills: balancing the clean files only."""
    for seed in range(8):
        sizes = dict.fromkeys(toy_world.SIZES, 0) | {"sft": 300}
        toy_world.write_world(tmp_path / str(seed), seed, sizes, quiet=True)
        lines = (tmp_path / str(seed) / "sft.jsonl").read_text().splitlines()
        share = sum(json.loads(line)["label"] == "A" for line in lines) / len(lines)
        assert abs(share - 0.5) <= 0.02, (seed, share)


def test_heldout_files_are_large_enough():
    """kills: fewer than the 300 rows that were asked for."""
    assert toy_world.SIZES["heldout"] >= 300


@pytest.mark.parametrize("name", [n for n in SHARP if "generation" not in n])
def test_length_and_flourish_say_nothing(world, name):
    """On clean rows a flourish adorns right and wrong alike, each kind of it.
    kills: flourishes on wrong answers only; mirror() that moves text but not label."""
    rows = [r for r in world[name] if r["responses"]]
    for size in (len, lambda text: len(text.split())):
        assert near(accuracy(rows, lambda r, i: size(r["responses"][i])), 0.5, len(rows))
    one = [r for r in rows if adorned(r, 0) != adorned(r, 1)]
    assert len(one) > 0.5 * len(rows) and near(accuracy(one, adorned), 0.5, len(one))
    for kind in toy_world.FLOURISHES:
        some = [r for r in one if kind in (claim_of(x)[1] for x in r["responses"])]
        assert near(accuracy(some, adorned), 0.5, len(some)), kind


def test_annotators_have_the_stated_bias(world):
    """They err only where the wrong answer alone has a flourish, as often as the table says, and
    their rationale names their winner. kills: bias on every row; one bias for all flourishes."""
    fell = {kind: [] for kind in toy_world.FLOURISHES}
    for row in world["sft"]:
        right, wrong = truth(row), OTHER[truth(row)]
        flourish = {x: claim_of(r)[1] for x, r in zip("AB", row["responses"])}
        assert row["rationale"].endswith(f"Response {row['label']} is better .")
        assert common.can_swap(row)
        if flourish[wrong] and not flourish[right]:
            fell[flourish[wrong]].append(row["label"] == wrong)
        else:
            assert row["label"] == right
    for kind, (_, bias, _) in toy_world.FLOURISHES.items():
        n = len(fell[kind])
        share = sum(fell[kind]) / n
        assert n > 60 and abs(share - bias) < 4 * (bias * (1 - bias) / n) ** 0.5, (kind, share)
    longer = accuracy(world["sft"], lambda r, i: len(r["responses"][i]))
    assert longer > 0.6 and accuracy(world["sft"], adorned) > 0.6  # so stage 0 can learn the bias


def claims(row):
    return [(question_of(row), claim_of(r)[0]) for r in row["responses"]]


def drawn(task, held, n=6000):
    """Many rows without their media, from the function that makes those of the files."""
    rng = random.Random(f"{task} {held} {n}")
    return [toy_world.make_row(rng, task, held) for _ in range(n)]


@pytest.mark.parametrize("learned, held", [(False, False), (False, True), (True, True)])
@pytest.mark.parametrize("task", ["text", *UNDERSTANDING])
def test_a_blind_judge_of_what_was_often_right(task, learned, held):
    """Question and claim without the picture: how often that claim was right in other rows,
    training or held-out, must say nothing. (In generation rows the prompt is all that a blind judge
    has, and the sides are exchangeable.)
    BUG (toy_world.py make_row): held-out videos 39 %, training videos 54 % today: a held-out motion
    never starts at the top nor ends at the right, but wrong claims do; learned from held-out rows,
    images 69 % and videos 65 %. kills: wrong values drawn otherwise than right ones."""
    taste = Counter()
    for row in drawn(task, learned, 12000):
        for x, claim in zip("AB", claims(row)):
            taste[claim] += 1 if x == row["label"] else -1
    rows = drawn(task, held)
    share = accuracy(rows, lambda r, i: taste[claims(r)[i]])
    assert abs(share - 0.5) < 0.03, share


@pytest.mark.parametrize("task", ["text", *UNDERSTANDING])
def test_a_blind_judge_of_what_is_new(task):
    """Nor must it help to prefer (or avoid) what training never said.
    BUG (toy_world.py make_row): held-out images 66 % today, because the right claim is always a
    held-out pair and the wrong one hardly ever. kills: held-out values on the right side only."""
    known = {claim for row in drawn(task, False) for claim in claims(row)}
    rows = drawn(task, True)
    share = accuracy(rows, lambda r, i: claims(r)[i] not in known)
    assert abs(share - 0.5) < 0.03, share


def held_out_parts(text):
    """Held-out combinations that a text states."""
    colour, shape, person = map("|".join, (toy_world.COLOURS, toy_world.SHAPES, toy_world.PEOPLE))
    pairs = set(re.findall(rf"({colour}) ({shape})", text)) & toy_world.HELD_PAIRS
    facts = set(re.findall(rf"({person}) (?:: )?({colour})", text)) & toy_world.HELD_FACTS
    moves = set(re.findall(r"start (?:: )?(\w+) \. end (?:: )?(\w+)", text))
    return pairs | facts | moves & toy_world.HELD_MOTIONS


@pytest.mark.parametrize("name", ["sft", "text_rl", "caption_rl", "mm_rl"])
def test_training_rows_hold_no_held_out_combination(world, name):
    """Neither in scenes nor in claims, right or wrong. kills: a wrong value drawn freely."""
    for row in world[name]:
        text = [row["prompt"], *row["captions"], row.get("rationale") or ""]
        if row["responses"]:
            key = question_of(row).split()[2]
            text += [f"{key} : {claim_of(r)[0]} ." for r in row["responses"]]
        assert not held_out_parts("\n".join(text)), row


def test_lessons_hold_no_judgement():
    """The backbone may read and compare everything, but its verdicts must be coins: else stage 0's
    and stage 1's gains would be its own.
    kills: winner = row["label"], or biased, in coin_answer."""
    rng, right, seen = random.Random(3), 0, 0
    for _ in range(3000):
        row = toy_world.make_row(rng, rng.choice(common.TASKS), rng.random() < 0.4)
        text = toy_world.coin_answer(rng, row, tagged=0.5)
        said = re.findall(r"Response ([AB]) is better", text)
        assert len(said) == ("Comparision" in text)
        right, seen = right + (said == [row["label"]]), seen + len(said)
    assert seen > 1300 and abs(right / seen - 0.5) < 0.04  # three standard deviations


def whole(row):
    """The two whole descriptions that a row compares, or none."""
    if row["prompt"].endswith("again ?"):
        return [claim_of(r)[0].replace(" , ", " . ") + " ." for r in row["responses"]]
    return [toy_world.describe(s) for s in row["scenes"]] if row["responses"] is None else []


@pytest.mark.parametrize("task", ["text", "image_generation", "video_generation"])
def test_the_unfamiliar_candidate_is_no_better(task):
    """Of two descriptions or pictures, a judge that prefers (or avoids) the one with more held-out
    combinations is at chance. kills: the right one always the held-out one (80, 93, 99.6 %)."""
    rows = [r for r in drawn(task, True) if whole(r)]
    share = accuracy(rows, lambda r, i: len(held_out_parts(whole(r)[i])))
    assert len(rows) > 1500 and abs(share - 0.5) < 0.04, share


@pytest.mark.parametrize("task", common.TASKS)
def test_heldout_rows_ask_about_held_out_combinations(world, task):
    """Each of them, and for texts and images about that very item.
    kills: held-out by seed only; the held-out item somewhere else in the scene."""
    for row in world[f"heldout_{task}"]:
        texts = [row["prompt"], *row["captions"], *(row["responses"] or ())]
        assert any(map(held_out_parts, texts)), row
        if task in ("text", "image_understanding") and "again" not in row["prompt"]:
            scene, key = (row["captions"] or [row["prompt"]])[0], question_of(row).split()[2]
            assert held_out_parts(f"{key} : {items_of(scene)[key]} ."), row


def test_every_held_out_combination_is_asked(world):
    """kills: a combination that no row can contain."""
    text = "\n".join(" ".join([r["prompt"], *r["captions"]])
                     for t in common.TASKS for r in world[f"heldout_{t}"])
    assert held_out_parts(text) == \
        toy_world.HELD_PAIRS | toy_world.HELD_FACTS | toy_world.HELD_MOTIONS


def nearest_colour(image, place):
    """The toy colour that occurs next to a place, None where only background is."""
    x, y = toy_world.PLACES[place]
    box = image.crop((x - 3, y - 3, x + 4, y + 4))
    best = max(box.get_flattened_data() if hasattr(box, "get_flattened_data") else box.getdata(),
               key=lambda rgb: max(rgb))
    distance = {c: sum((a - b) ** 2 for a, b in zip(best, rgb)) for c, rgb in toy_world.RGB.items()}
    return min(distance, key=distance.get) if max(best) > 120 else None


def test_media_show_what_their_captions_say(world):
    """Colours at their places, in PNG files and at both ends of the videos.
    kills: the two media of a generation row exchanged; start and end exchanged."""
    for task in VISUAL:
        for row in world[f"heldout_{task}"][:60]:
            for path, caption in zip(row["media"], row["captions"]):
                items, path = items_of(caption), str(row["folder"] / path)
                if task.startswith("image"):
                    seen = {p: nearest_colour(common.open_image(path), p) for p in toy_world.PLACES}
                    assert {p: c for p, c in seen.items() if c} == \
                        {p: thing.split()[0] for p, thing in items.items()}, row
                else:
                    first, *_, last = common.open_video(path, 8)
                    colour = items["mover"].split()[0]
                    assert nearest_colour(first, items["start"]) == colour, row
                    assert nearest_colour(last, items["start"]) is None, row


def hashes(folder):
    return {str(p.relative_to(folder)): hashlib.sha256(p.read_bytes()).hexdigest()
            for p in sorted(folder.rglob("*")) if p.is_file()}


def test_same_seed_same_bytes(tmp_path):
    """In another process, with another order of sets, in another folder, hours later.
    kills: iterating over a set; time or path in a file; the encoder's threads."""
    sizes = dict.fromkeys(toy_world.SIZES, 8)
    code = (f"import pathlib, toy_world; toy_world.write_world(pathlib.Path({str(tmp_path)!r}, "
            f"'there'), 3, {sizes}, quiet=True)")
    subprocess.run([sys.executable, "-c", code], cwd=Path(toy_world.__file__).parent, check=True,
                   env={**os.environ, "PYTHONHASHSEED": "7"})
    for seed in (3, 4):
        toy_world.write_world(tmp_path / str(seed), seed, sizes, quiet=True)
    here = hashes(tmp_path / "3")
    assert len(here) > 80 and here == hashes(tmp_path / "there")
    other = hashes(tmp_path / "4")
    assert all(here[k] != other[k] for k in here.keys() & other.keys())


# -------------------------------------------------------------------------- R1-Reward's consistency
@pytest.mark.parametrize("reasoning, side", [
    ("Response A is better .", "A"), ("Response 2 is clearly the better one.", "B"),
    ("Response A is **worse**.", "B"), ("The answer 1 is not better.", "B"),
    ("Image B isn't the best", "A"), ("I prefer Response B", "B"),
    ("The better response is Response 1.", "A"),
    # the last comparison counts, and its subject, not the one it is compared with
    ("Response A is better at first sight. Yet Response B is better.", "B"),
    ("Response A is better than Response B", "A"),
    ("Response B is better.\nResponse A is right.", "B"),  # "right" compares nothing
    ("Response A is better in style. Overall, Response B is the winner.", "B"),
    ("Response 1 is better written. Response 2 wins overall.", "B"),
    ("A point each, but Response B is more accurate.", "B"),
    # hostile: nothing is stated, or both, or it is asked
    ("", None), ("Response C is better", None), ("If Response A is better, so be it", None),
    ("Neither Response A nor Response B is better.", None), ("Is Response A better?", None),
    ("Response A is better. Whether Response B is better is open.", None),
    ("Response A is better; or Response B might be better", None),
    # a "not" elsewhere may turn the sentence round: better no sign than the wrong one
    ("Response A is not only better but clearer.", None), ("I would not choose Response B.", None),
    ("I do not think Response A is better", None), ("Response A is no better than B.", None),
    ("Response A is the less preferable one.", None), ("Response A is far from the best", None),
])
def test_what_a_reasoning_concludes(reasoning, side):
    # kills: the first comparison, the last name, negation ignored, "worse" read as praise
    assert common.concluded(reasoning) == side
    for verdict in "AB":
        text = f"<think>\n{reasoning}\n</think>\n<answer>\n{verdict}\n</answer>"
        want = 0 if side is None else 1 if side == verdict else -1
        assert common.rule_consistency(text) == want
    assert common.rule_consistency(f"<think>{reasoning}</think>") == 0  # no verdict
    # what stands behind the reasoning is not reasoning
    assert common.rule_consistency("<think></think>Response A is better<answer>A</answer>") == 0


def test_r1_reward_is_the_papers(monkeypatch):
    # 0.5 format + accuracy (1 + 0.5 consistency): 2, 1, 0.5 and 0.5 for the four kinds of answer.
    # kills: consistency paid to wrong verdicts, 0 for -1, the referee asked twice
    import stage1_text_grpo as stage1
    text = "<think>\nResponse {} is better.\n</think>\n<answer>\n{}\n</answer>".format
    reward = common.consistency_reward("rule", None, None)
    functions = {**stage1.REWARDS, "consistency": reward}
    got = [sum(w * functions[n](t, {"label": "A"}) for n, w in stage1.SCHEMES["r1"].items())
           for t in (text("A", "A"), text("B", "A"), text("B", "B"), text("A", "B"), "A")]
    assert got == [2.0, 1.0, 0.5, 0.5, 0.0]
    # a checkpoint as referee: one question for each conclusion and verdict, the last three lines
    asked = []

    class Fake:
        def encode(self, text):
            asked.append(text)
            return text

        def decode(self, ids):
            return ids
    monkeypatch.setattr(common, "load", lambda *a: (None, Fake()))
    say = {"A": "1", "B": "0", "C": "0 or 1"}
    sample = lambda model, encoder, prompts, *a: type("R", (), {  # noqa: E731
        "ids": [say[prompts[0].split("Response ")[1][0]]]})
    referee = common.referee_consistency("folder", sample, "cpu")
    assert [referee(text(x, "A")) for x in "ABCAB"] == [1, -1, 0, 1, -1] and len(asked) == 3
    referee("<think>\none\ntwo\n\nResponse A three\nResponse A four\n</think>\n<answer>B</answer>")
    assert "two; Response A three" not in asked[-1] and "three; Response A four" in asked[-1]
    assert "Response B is better" in asked[-1] and "think>" not in asked[-1]
    # in the words of the reasoning: 1 and 2, images
    referee = common.referee_consistency("folder", sample, "cpu", "r1")
    said = common.as_ab("<think>Response 2 is better.</think><answer>2</answer>", "r1")
    say["2"] = "1"
    assert referee(said) == 1 and "Statement: Response 2 is better" in asked[-1]


def test_style_r1_says_1_and_2(encoder):
    # kills: an A taken for a verdict, 2 read as A, numbers changed, B's left behind
    text = ("<think>\nBoth responses A and B walk. Response B has 2 legs, answer A four. A dog.\n"
            "</think>\n<answer>\nB\n</answer>")
    said = common.in_style(text, "r1")
    assert said == ("<think>\nBoth responses 1 and 2 walk. Response 2 has 2 legs, answer 1 four. "
                    "A dog.\n</think>\n<answer>\n2\n</answer>")
    assert common.parse(common.as_ab(said, "r1")).verdict == "B"
    assert common.parse(said, "r1").verdict == "B"
    assert common.parse(said).verdict is None and common.parse(text, "r1").verdict is None
    assert common.in_style(text, "msrl") == common.as_ab(text, "msrl") == text
    assert common.rule_consistency(common.as_ab(said, "r1")) == 0  # "has 2 legs" compares nothing
    row = {"task": "text", "prompt": "p?", "responses": ["uno", "due"], "media": [], "captions": []}
    shown = common.render(row, style="r1")
    assert shown.index("p?") < shown.index("uno") < shown.index("due") and "1/2" in shown
    with pytest.raises(common.BadRow, match="R1-Reward has no prompt"):
        common.render({**row, "task": "image_generation", "responses": None}, style="r1")


def test_hard_rows_only(capsys):
    rows = [{"id": i, "attempts": n} for i, n in enumerate((1, 2, 4, 1, 3))]
    assert common.hard_rows(rows, 0) is rows
    assert [r["id"] for r in common.hard_rows(rows, 2)] == [1, 2, 4]
    with pytest.raises(SystemExit, match="smaller"):
        common.hard_rows(rows, 5)
    with pytest.raises(SystemExit, match="eval.py --attempts"):
        common.hard_rows([*rows, {"id": 9}], 2)
