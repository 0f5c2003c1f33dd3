"""
Folders and rows of strangers: nothing in them is run, no row chooses which of your files are read,
and nothing small unpacks to something endless. "kills:" names wrong versions of the source under
which a test was seen to fail.
"""

import ast
import json
import os
import re
import shutil
import time
from pathlib import Path

import pytest
import torch
import toy_world
from helpers import ROOT, flags, picture, run_here, text_row, write, write_video
from PIL import Image

import api
import common
from data import convert, find_medium, load_rows, media_roots, read_benchmark
import eval
import stage2_caption_grpo as stage2

pytestmark = pytest.mark.usefixtures("cpu_only", "here")


@pytest.fixture
def house(here):
    """data/rows.jsonl is what a stranger wrote; secret.png is none of its business. -> folder"""
    for name in ("data/own.png", "secret.png", "secrets/1.png", "data/frames/1.png"):
        (here / name).parent.mkdir(parents=True, exist_ok=True)
        picture("red").save(here / name)
    (here / "data" / "link.png").symlink_to(here / "secret.png")
    (here / "data" / "linked").symlink_to(here / "secrets")
    (here / "data" / "frames" / "2.png").symlink_to(here / "secret.png")
    (here / "data-of-others").mkdir()
    picture("red").save(here / "data-of-others" / "x.png")
    return here


def image_row(*media, **change):
    return text_row(task="image_understanding", media=list(media), **change)


# ------------------------------------------------------------------------------------------- places
OUTSIDE = ["../secret.png", "{here}/secret.png", "link.png", "linked/1.png", "x/../../secret.png",
           "../data-of-others/x.png", "../../../../../../../../etc/passwd.png"]


@pytest.mark.parametrize("form", ["pixels", "caption"])
@pytest.mark.parametrize("medium", OUTSIDE)
def test_a_row_cannot_name_a_file_outside_of_its_folder(house, encoder, medium, form):
    # kills: places compared as texts ("data" begins "data-of-others", too); links not followed;
    # absolute paths let through; a look at pixels only, though captions.jsonl and pages follow
    (house / "data" / "x").mkdir()
    medium = medium.format(here=house)
    rows = [image_row("own.png", captions=["red"]), image_row(medium, id="bad", captions=["red"])]
    path = write(house / "data" / "rows.jsonl", rows)
    with pytest.raises(SystemExit) as stopped:
        load_rows(path, encoder, form)
    message = str(stopped.value)
    assert message.startswith(f"{path}:2: row medium ") and "--media_root" in message
    assert medium in message
    assert len(load_rows(path, encoder, form, skip_bad_rows=True)) == 1


@pytest.mark.parametrize("medium", OUTSIDE[:6])
def test_unless_media_root_says_so(house, encoder, medium):
    # kills: only the first of several roots, an empty one that stands for the working directory
    (house / "data" / "x").mkdir()
    path = write(house / "data" / "rows.jsonl", [image_row(medium.format(here=house))])
    assert len(load_rows(path, encoder, media_root=f"none,{house}")) == 1
    for root in (str(house / "none"), "", ","):
        with pytest.raises(SystemExit, match="lies outside"):
            load_rows(path, encoder, media_root=root)


def test_a_link_among_the_frames_of_a_video(house, encoder):
    # kills: the folder looked at and not what is in it
    row = text_row(task="video_understanding", media=["frames"])
    path = write(house / "data" / "rows.jsonl", [row])
    with pytest.raises(SystemExit, match=r"frames/2.png lies outside"):
        load_rows(path, encoder)
    (house / "data" / "frames" / "2.png").unlink()
    assert len(load_rows(path, encoder)) == 1


def test_a_folder_may_itself_be_a_link(house, encoder):
    # kills: only one of the two paths followed
    write(house / "data" / "rows.jsonl", [image_row("own.png")])
    (house / "short").symlink_to(house / "data")
    assert len(load_rows("short/rows.jsonl", encoder)) == 1
    os.chdir("data")
    assert len(load_rows("rows.jsonl", encoder)) == 1


def test_what_came_in_the_row_is_kept_and_may_be_read(house, encoder):
    # kills: media_cache/ refused, where images of a hub's rows are
    content = (house / "secret.png").read_bytes()
    pair = {"prompt": "q", "chosen": "a", "rejected": "b", "image": {"bytes": list(content)}}
    write(house / "data" / "rows.jsonl", [pair])
    with pytest.raises(SystemExit, match="lacks one of its images"):  # bytes are none in JSON
        load_rows("data/rows.jsonl", encoder)
    rows = [dict(pair, image={"bytes": content, "path": "../secret.png"})]
    datasets = pytest.importorskip("datasets")
    datasets.Dataset.from_list(rows).to_parquet("data/rows.parquet")
    row, = load_rows("data/rows.parquet", encoder)
    assert Path(row["media"][0]).parent == house / "media_cache"


def test_videos_beside_the_folder_of_a_parquet_file_alone(house):
    # as Rapidata publishes them. kills: the same for files that anybody writes by hand
    videos = house / "Videos"
    assert videos in media_roots("data/train.parquet")
    assert videos in media_roots("data/train.parquet:99@5")
    assert videos not in media_roots("data/rows.jsonl")
    assert media_roots("data/rows.jsonl,data/train.parquet:9", "a,b") == [
        house / name for name in ("media_cache", "a", "b", "data", "data", "Videos")]


def test_candidates_of_a_ranking_and_rows_of_a_benchmark(house):
    # kills: find_medium() without a look at the place, or a look at the first name it tries only
    roots = media_roots("data/rows.jsonl")
    assert find_medium("own.png", house / "data", roots) == str(house / "data" / "own.png")
    for medium in OUTSIDE[:4]:
        with pytest.raises(common.BadRow, match="lies outside"):
            find_medium(medium.format(here=house), house / "data", roots)
    with pytest.raises(common.BadRow, match="lies outside"):
        find_medium("../gone.png", house / "data", roots)
    # an author's own path, which is nowhere here, is looked for beside the data
    assert find_medium("/mnt/author/own.png", house / "data", roots) == str(
        house / "data" / "own.png")
    assert find_medium("/mnt/author/gone.png", house / "data", roots) == str(
        house / "data" / "gone.png")
    write(house / "data" / "sets.jsonl", [
        {"id": "a", "task": "image_generation", "prompt": "q",
         "candidates": ["own.png", "../secret.png"]}])
    with pytest.raises(SystemExit, match=r"sets.jsonl:1: medium .*secret.png lies outside"):
        eval.read_candidates("data/sets.jsonl")
    assert len(eval.read_candidates("data/sets.jsonl", str(house))) == 1
    pairs = {"ID": "x", "Text": "q", "Output1": "a", "Output2": "b", "Better": "Output1",
             "Category": "vqa", "Image": "../secret.png"}
    write(house / "data" / "all_data.json", [pairs])
    with pytest.raises(SystemExit, match=r"all_data.json:\[0\]: row medium .* lies outside"):
        read_benchmark("multimodal_rewardbench", "data/all_data.json", media="all")
    row, = read_benchmark("multimodal_rewardbench", "data/all_data.json", media="all",
                          media_root=str(house))
    assert Path(row["media"][0]).resolve() == house / "secret.png"


@pytest.mark.parametrize("more", [["--report", "page.html", "--score", "preds.jsonl"],
                                  ["--api", "http://127.0.0.1:9/v1", "--model", "served"]],
                         ids=["page", "server"])
def test_no_secret_is_shown_or_sent(house, monkeypatch, more):
    # A page that is published, a request to a server. kills: rows judged whose media nobody checked
    sent = []
    monkeypatch.setattr(api, "image_of", lambda path: sent.append(path))
    write(house / "preds.jsonl", [{"id": "t", "pred": "A"}])
    path = write(house / "data" / "rows.jsonl", [image_row("../secret.png")])
    with pytest.raises(SystemExit, match="lies outside"):
        run_here(eval.main, ["--data", path, *more])
    assert not sent and not (house / "page.html").exists()


def test_captions_keep_the_places_of_their_data(house, monkeypatch):
    # captioned.jsonl lies in the run folder and names media elsewhere: the stage that wrote it
    # reads it, the next one is told where. kills: origin left out of stage 2
    data = write(house / "data" / "rows.jsonl", [image_row("own.png") | {"captions": []}] * 2)
    seen = []

    def rows_only(sources, *args, **more):
        rows = load_rows(sources, *args, **more)
        seen.append(sources)
        if "captioned" in sources:
            raise KeyboardInterrupt  # they are read: the rest is not ours
        return rows
    monkeypatch.setattr(stage2, "load_rows", rows_only)
    with pytest.raises(KeyboardInterrupt):
        run_here(stage2.main, flags(
            model=toy_world.PREBUILT, data=data, captioner=toy_world.PREBUILT, heldout="",
            replay_ratio="1:0", batch_size=2, out="runs/two"))
    assert seen == ["runs/two/captioned.jsonl"]
    encoder = common.load(toy_world.PREBUILT)[1]
    with pytest.raises(SystemExit, match="lies outside"):
        load_rows(seen[0], encoder, "caption")
    assert len(load_rows(seen[0], encoder, "caption", media_root="data")) == 2


# -------------------------------------------------------------------------------------------- bombs
def refused(path, video=False):
    """-> why, within 10 seconds"""
    began = time.time()
    with pytest.raises(common.BadRow) as bad:
        common.open_video(path, 4) if video else common.open_image(path)
    assert time.time() - began < 10 and str(path) in str(bad.value)
    return str(bad.value)


@pytest.mark.parametrize("size", [(10_000, 9_000), (30_000, 30_000)])
@pytest.mark.parametrize("suffix", ["png", "webp"])
def test_an_image_that_unpacks_to_gigabytes_is_refused(here, monkeypatch, size, suffix):
    # Pillow warns at the first size and goes on. kills: its warning alone; a limit after decoding
    path = here / f"bomb.{suffix}"
    if suffix == "png":
        monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", None)
        Image.new("1", size).save(path)
        monkeypatch.undo()
        os.chdir(here)
        assert path.stat().st_size < 200_000
    else:  # a header is enough: this format ends at 16,383
        picture("red", (9, 9)).save(path, lossless=True)
        content = bytearray(path.read_bytes())
        at = content.index(b"VP8L") + 9
        width, height = min(size[0], 16_384) - 1, min(size[1], 16_384) - 1
        content[at:at + 4] = (width | height << 14).to_bytes(4, "little")
        path.write_bytes(content)
    monkeypatch.setattr(Image.Image, "convert", lambda *_: 1 / 0)
    assert re.search("pixels|decompression bomb", refused(path))


def test_the_limit_is_where_it_says(here, monkeypatch):
    # kills: one side alone, a limit that is off by one
    picture("red", (40, 30)).save("x.png")
    monkeypatch.setattr(common, "MAX_PIXELS", 1200)
    assert common.open_image("x.png").size == (40, 30)
    monkeypatch.setattr(common, "MAX_PIXELS", 1199)
    assert "40 x 30 pixels" in refused("x.png")


def test_a_picture_with_many_frames_is_its_first(here):
    # kills: all of them decoded
    frames = [picture((k % 256, 0, 0), (200, 200)) for k in range(200)]
    frames[0].save("x.gif", save_all=True, append_images=frames[1:])
    began = time.time()
    assert common.open_image("x.gif").getpixel((0, 0))[0] == 0
    assert time.time() - began < 0.5


def test_an_endless_video_is_refused(here, monkeypatch):
    # kills: no count; a count of frames alone, or of pixels alone; a container believed
    path = write_video(here / "v.mp4", 12, (64, 32))
    monkeypatch.setattr(common, "MAX_FRAMES", 12)
    monkeypatch.setattr(common, "MAX_VIDEO_PIXELS", 12 * 64 * 32)
    assert len(common.open_video(path, 4)) == 4
    monkeypatch.setattr(common, "MAX_FRAMES", 11)
    assert "too long" in refused(path, video=True)
    monkeypatch.setattr(common, "MAX_FRAMES", 12)
    monkeypatch.setattr(common, "MAX_VIDEO_PIXELS", 12 * 64 * 32 - 1)
    assert "too long" in refused(path, video=True)
    monkeypatch.undo()
    os.chdir(here)
    monkeypatch.setattr(common, "MAX_PIXELS", 64 * 32 - 1)
    assert "cannot be read" in refused(path, video=True)


@pytest.mark.parametrize("name, content", [
    ("list.mp4", "ffconcat version 1.0\nfile v.mp4\n"),
    ("stream.mp4", "#EXTM3U\n#EXT-X-TARGETDURATION:1\n#EXTINF:1,\nv.mp4\n#EXT-X-ENDLIST\n"),
    ("drawing.png", "%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\nshowpage\n")])
def test_a_medium_that_is_a_programme_or_names_other_files(here, monkeypatch, name, content):
    # kills: any container that ffmpeg knows, any picture that Pillow knows
    write_video(here / "v.mp4", 3)
    (here / name).write_text(content)
    monkeypatch.setattr("PIL.EpsImagePlugin.Ghostscript", lambda *_, **__: picture("red").im)
    assert "replace the file" in refused(here / name, video=name.endswith("mp4"))


def test_a_path_is_no_instruction_to_ffmpeg(here):
    # kills: relative paths handed on as they are
    write_video(here / "v.mp4", 3)
    assert "does not exist" in refused("concat:v.mp4", video=True)
    (here / "concat:v.mp4").write_text("no video")
    assert "cannot be read" in refused("concat:v.mp4", video=True)


def test_a_pipe_is_not_waited_for(here):
    # kills: a medium opened because it is there
    os.mkfifo("pipe")
    assert "is no file" in refused("pipe")
    assert "is no file" in refused("pipe", video=True)


MARKS = ("[User Question]", "[The Start of Assistant A's Response]", "[The End of Assistant A's "
         "Response] [The Start of Assistant B's Answer]")


@pytest.mark.parametrize("text", ["[User Question]" + " " * 20_000,
                                  "".join(mark * 300 for mark in MARKS)], ids=["spaces", "marks"])
def test_a_row_of_gram_without_an_end_is_refused_at_once(text):
    # kills: one expression for all marks, which tries hours of ways to part them
    began = time.time()
    with pytest.raises(common.BadRow, match="section markers"):
        list(convert({"instruction": text, "output": "<answer>A</answer>"}, "x.jsonl:1"))
    assert time.time() - began < 2


# ---------------------------------------------------------------------------------- pickle and code
class Runs:
    """A pickle of this makes a folder when it is read."""

    def __reduce__(self):
        return os.mkdir, ("made",)


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.safetensors", "adapter_model.bin"])
def test_a_pickle_of_weights_is_not_read(here, name):
    # kills: from_pretrained() without use_safetensors
    shutil.copytree(toy_world.PREBUILT, "model")
    Path("model", "model.safetensors").unlink()
    torch.save({"lm_head.weight": Runs()}, f"model/{name}")
    with pytest.raises(SystemExit, match="cannot be loaded as a checkpoint"):
        common.load("model")
    assert not Path("made").exists()


def test_weights_in_a_pickle_are_refused_even_if_they_are_harmless(here):
    # kills: from_pretrained() without use_safetensors
    model, _ = common.load(toy_world.PREBUILT)
    shutil.copytree(toy_world.PREBUILT, "model")
    Path("model", "model.safetensors").unlink()
    torch.save(model.state_dict(), "model/pytorch_model.bin")
    with pytest.raises(SystemExit, match="safetensors"):
        common.load("model")


@pytest.mark.parametrize("name, entry", [
    ("config.json", {"AutoConfig": "code.C", "AutoModelForImageTextToText": "code.C"}),
    ("tokenizer_config.json", {"AutoTokenizer": ["code.C", "code.C"]}),
    ("preprocessor_config.json", {"AutoImageProcessor": "code.C"})])
@pytest.mark.parametrize("own_class", [True, False])
def test_code_of_a_folder_is_not_run(here, monkeypatch, name, entry, own_class):
    # Neither run nor asked about at the keyboard. kills: trust_remote_code=True; None, which asks
    shutil.copytree(toy_world.PREBUILT, "model")
    Path("model", "code.py").write_text("import os\nos.mkdir('made')\nclass C: pass\n")
    file = Path("model", name)
    config = json.loads(file.read_text()) | {"auto_map": entry}
    if not own_class:
        for key in ("tokenizer_class", "image_processor_type"):
            if key in config:
                config[key] = "C"
    file.write_text(json.dumps(config))
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("asked at the keyboard"))
    try:
        common.load("model")
    except SystemExit as e:
        assert "cannot be loaded" in str(e)
    assert not Path("made").exists()


def test_no_source_unpickles_or_trusts():
    # kills: a torch.load() that is added without a thought
    for path in ROOT.glob("*.py"):
        text = path.read_text()
        assert not re.search(r"^\s*(import|from) (pickle|dill|joblib)\b", text, re.MULTILINE), path
        assert not re.search(r"trust_remote_code\W+True", text), path
        assert not re.search(r"(?<![\w.])(eval|exec)\(", text), path
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.Call) and ast.unparse(node.func) == "torch.load":
                assert "weights_only=True" in ast.unparse(node), path
