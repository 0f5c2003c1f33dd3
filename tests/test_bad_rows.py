"""
Bad input: every row, file or folder that cannot be used is named and the remedy with it, or it is
left out and counted. "kills:" names plausible wrong versions of the source that make a test fail.
"""

import gzip
import json
import random
import sys
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

import av
import pytest
from helpers import example, small_world, text_row, write

import common
from data import load_rows
from eval import check_writable

DROP = object()  # "remove this key" in the tables of bad rows


@pytest.fixture(scope="module")
def broken_media(tmp_path_factory):
    """A small world, and next to it every kind of broken image and video. -> folder"""
    out = small_world(tmp_path_factory.mktemp("broken"))
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


# ----------------------------------------------------------------------------------- rows and media
BAD = [  # name, task, what is changed (or the raw line), what the message must say
    ("malformed", "text", '{"id": 1, "task": "text",', "JSON"),
    ("plain text", "text", "hello", "JSON"),
    ("endless number", "text", "1" * 5000, "JSON"),  # Python reads no such integer
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
    ("half an emoji for id", "text", {"id": "\ud83d"}, "not valid Unicode"),
    ("half an emoji in a key of your own", "text", {"note": ["\ud83d"]}, "not valid Unicode"),
    ("list for subset", "text", {"subset": ["x"]}, "'subset' is list"),
    ("number with a point for group", "text", {"group": 0.5}, "'group' is float"),
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


def spoil(folder, task, change):
    """-> the bad row as a line of text"""
    if isinstance(change, str):
        return change
    row = example(folder, task) | change
    if isinstance(change.get("media"), list):
        row["media"] = [str(folder / medium) for medium in change["media"]]
    return json.dumps({key: value for key, value in row.items() if value is not DROP})


@pytest.mark.parametrize("task, change, complaint", [bad[1:] for bad in BAD],
                         ids=[bad[0] for bad in BAD])
def test_bad_row(broken_media, encoder, tmp_path, capsys, task, change, complaint):
    """Whoever made the file must find the line and know what to do, or choose to go on without it.
    The blank line is there because line numbers are those of an editor.
    kills: numbering the rows; not opening media; a missing check; skipping without counting."""
    bad = spoil(broken_media, task, change)
    path = write(tmp_path / "rows.jsonl", [text_row(id="one"), "", bad, text_row(id="two")])
    more = {"media_root": str(broken_media)}
    with pytest.raises(SystemExit) as stop:
        load_rows(path, encoder, **more)
    message = str(stop.value)
    assert message.startswith(f"{path}:3: ")
    assert complaint in message
    assert "--skip_bad_rows" in message
    rows = load_rows(path, encoder, skip_bad_rows=True, **more)
    assert [r["id"] for r in rows] == ["one", "two"]
    out = capsys.readouterr().out
    assert "2 rows" in out and "1 bad rows skipped" in out


def test_every_bad_row_is_counted(broken_media, encoder, tmp_path, capsys):
    """kills: a counter per kind that shows the number of kinds; stopping at the first one."""
    bad = [spoil(broken_media, task, change) for _, task, change, _ in BAD]
    path = write(tmp_path / "rows.jsonl", [text_row(), *bad])
    root = str(broken_media)
    assert len(load_rows(path, encoder, skip_bad_rows=True, media_root=root)) == 1
    assert f"{len(BAD)} bad rows skipped" in capsys.readouterr().out


def test_only_bad_rows_is_no_data(encoder, tmp_path):
    """Zero rows would be a division by zero an hour later. kills: returning the empty list."""
    for name, rows in (("empty", []), ("bad", ["x", "y"])):
        path = write(tmp_path / f"{name}.jsonl", rows)
        with pytest.raises(SystemExit, match="no usable row left"):
            load_rows(path, encoder, skip_bad_rows=True)


def test_undecodable_bytes(encoder, tmp_path):
    """A Latin-1 export is a common kind of malformed line. kills: strict decoding."""
    path = tmp_path / "rows.jsonl"
    row = json.dumps(text_row(id="one"))
    path.write_bytes(f"{row}\n{row.replace('Why', 'Où')}\n{row}\n".encode("latin-1"))
    with pytest.raises(SystemExit) as stop:
        load_rows(str(path), encoder)
    assert str(stop.value).startswith(f"{path}:2: ")
    assert len(load_rows(str(path), encoder, skip_bad_rows=True)) == 2


def test_half_an_emoji(encoder, tmp_path):
    """A text cut by UTF-16 units ends in a lone surrogate: valid JSON, no valid Unicode.
    kills: no check of the text."""
    path = write(tmp_path / "rows.jsonl", [text_row(), text_row(responses=["good \ud83d", "bad"])])
    with pytest.raises(SystemExit) as stop:
        load_rows(path, encoder)
    assert str(stop.value).startswith(f"{path}:2: ") and "response A" in str(stop.value)


@pytest.mark.parametrize("spoil_gz", [lambda gz: b"no gzip", lambda gz: gz[:len(gz) // 2]],
                         ids=["none", "cut"])
def test_broken_gzip(encoder, tmp_path, spoil_gz):
    """An interrupted download. kills: no except around reading."""
    path = tmp_path / "rows.jsonl.gz"
    rows = "".join(json.dumps(text_row(id=random.random())) + "\n" for _ in range(500))
    path.write_bytes(spoil_gz(gzip.compress(rows.encode())))
    with pytest.raises(SystemExit) as stop:
        load_rows(str(path), encoder)
    assert str(path) in str(stop.value)


def test_broken_json_array(encoder, tmp_path):
    """kills: json.load() without an except; an array read line by line."""
    path = tmp_path / "rows.json"
    path.write_text("[\n" + json.dumps(text_row()) + "\n{\n")
    with pytest.raises(SystemExit) as stop:
        load_rows(str(path), encoder)
    assert str(stop.value).startswith(f"{path}:3: ") and ".jsonl" in str(stop.value)


def test_no_such_data(encoder, tmp_path, monkeypatch):
    """A missing input names the command that makes it, also when it looks like a hub id.
    kills: open() or load_dataset() without an except."""
    def offline(*args, **kwargs):
        raise ConnectionError("offline")
    monkeypatch.setitem(sys.modules, "datasets", SimpleNamespace(load_dataset=offline))
    for source, complaint in (
                              (str(tmp_path), "folder"),
                              (str(tmp_path / "no.jsonl"), "toy_world.py"),
                              ("toy/no.jsonl", "toy_world.py"), ("toy/rows", "toy_world.py")):
        with pytest.raises(SystemExit) as stop:
            load_rows(source, encoder)
        assert str(stop.value).startswith(source) and complaint in str(stop.value)


# --------------------------------------------------------------------------------- folders of a run
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
    """A full disk leaves such files. kills: torch.load() without an except."""
    @dataclass
    class Config:
        out: str = ""
    (tmp_path / "state.pt").write_bytes(b"garbage")
    with pytest.raises(SystemExit) as stop:
        common.open_run(tmp_path, Config())
    assert "state.pt" in str(stop.value)


# ------------------------------------------------------------------------------------ forged markup
MARKUP = ["<image>", "<video>", "<img>", "</img>", "<IMG_CONTEXT>", "<|im_start|>", "<|im_end|>",
          "<|endoftext|>", "<think>", "</think>", "<answer>", "</answer>", "<type>", "</type>",
          "<caption>", "</caption>", "[The Start of Assistant B's Response]",
          "[The End of Assistant A's Response]", "[The End of Chatbot B's Generated Image]"]


def test_no_text_forges_markup(broken_media, encoder, tmp_path):
    """Every tag in every field a user fills, in the middle of a word or not.
    kills: a tag or a field left out of the check; checking with startswith()."""
    forged = []
    for task in common.TASKS:
        row = example(broken_media, task)
        for tag in MARKUP:
            bad = f"so{tag}so"
            forged.append({**row, "prompt": bad})
            for place in range(len(row["captions"])):
                captions = list(row["captions"])
                captions[place] = bad
                forged.append({**row, "captions": captions})
            if row["responses"]:
                forged.append({**row, "responses": [bad, "x"]})
                forged.append({**row, "responses": ["x", bad]})
            if "type>" not in tag:  # a rationale may name the type, as in Figures 8-11
                forged.append({**row, "rationale": bad})
    path = write(tmp_path / "rows.jsonl", [text_row(id="good"), *forged])
    left = load_rows(path, encoder, skip_bad_rows=True, media_root=str(broken_media))
    assert [r["id"] for r in left] == ["good"], left[1:]


def test_the_tokenizers_own_specials_are_markup(tmp_path, encoder):
    """Another backbone has other special tokens; they are found in its tokenizer.
    kills: the fixed list alone."""
    other = SimpleNamespace(forbidden=("<|turn|>",), kept_as=None, check=encoder.check)
    path = write(tmp_path / "rows.jsonl", [text_row(prompt="a <|turn|> b")])
    assert load_rows(path, encoder)
    with pytest.raises(SystemExit, match="turn"):
        load_rows(path, other)


def test_a_rationale_may_hold_a_type(tmp_path, encoder):
    """kills: the same list of tags for rationales as for user text."""
    path = write(tmp_path / "rows.jsonl", [text_row(rationale="<type>text</type> x")])
    assert len(load_rows(path, encoder)) == 1
