"""
Where rows come from: files, samples of files, several sources, Parquet, videos; and which rows are
left out on purpose. "kills:" names plausible wrong versions of the source that make a test fail.
"""

import json
import re
from collections import Counter
from pathlib import Path

import av
import datasets
import pytest
import toy_world
from helpers import PROGRAMS, better, picture, rows_of, text_row, torchrun, write, write_video

import common
from data import hard_rows, load_rows

pytestmark = pytest.mark.usefixtures("here")  # media_cache/ is made in the working directory
N = 24  # rows per file: enough that a hash puts the better one on either side


# ----------------------------------------------------------------------------- which rows are taken
def test_long_prompts_are_skipped_and_counted(encoder, tmp_path, capsys):
    """A prompt cut in the middle is another question. kills: truncating; `>=`; not counting."""
    short = text_row(prompt="x" * 50)
    path = write(tmp_path / "rows.jsonl", [text_row(prompt="x" * 51), short,
                 text_row(prompt="x" * 999)])
    limit = len(encoder(common.check_row(short, tmp_path)).ids)
    rows = load_rows(path, encoder, max_prompt_tokens=limit)
    assert [r["prompt"] for r in rows] == ["x" * 50] and rows[0]["tokens"] == limit
    assert re.search(rf"\b2 skipped: .*over {limit} tokens", capsys.readouterr().out)


def test_samples_of_one_file_never_overlap(encoder, tmp_path):
    """`file:20` and `file:30@20` are the two parts of one shuffle, whatever each leaves out as too
    long or excluded. kills: two prefixes; an offset among the rows that are short enough"""
    rows = [text_row(id=i, prompt="x" * (9 if i % 3 else 99)) for i in range(50)]
    path = write(tmp_path / "rows.jsonl", rows)
    exclude = write(tmp_path / "benchmark.jsonl", [text_row(id="b", prompt="y")])
    limit = len(encoder(common.check_row(text_row(prompt="x" * 50), tmp_path)).ids)

    def ids(sample, **more):
        return [row["id"] for row in load_rows(f"{path}:{sample}", encoder, **more)]
    first, second = ids("20"), ids("30@20")
    assert sorted(map(int, first + second)) == list(range(50))
    short = ids("20", max_prompt_tokens=limit, exclude=exclude)
    assert 0 < len(short) < 20 and set(short) <= set(first)
    assert set(ids("30@20", max_prompt_tokens=limit)) <= set(second)


def test_sample_of_a_file(encoder, tmp_path):
    """`file:N` is N rows, the same in each run, from all over the file; files can be joined.
    kills: the first N; an unseeded sample; a sample of everything read so far."""
    path = write(tmp_path / "rows.jsonl", [text_row(id=i) for i in range(50)])
    more = write(tmp_path / "more.jsonl", [text_row(id="more")])
    first, again = (load_rows(f"{more},{path}:10", encoder) for _ in range(2))
    ids = [r["id"] for r in first]
    assert ids == [r["id"] for r in again] and ids[0] == "more" and len(set(ids)) == 11
    assert max(map(int, ids[1:])) > 10
    assert len(load_rows(f"{path}:99", encoder)) == 50


def test_hard_rows_only(capsys):
    rows = [{"id": i, "attempts": n} for i, n in enumerate((1, 2, 4, 1, 3))]
    assert hard_rows(rows, 0) is rows
    assert [r["id"] for r in hard_rows(rows, 2)] == [1, 2, 4]
    with pytest.raises(SystemExit, match="smaller"):
        hard_rows(rows, 5)
    with pytest.raises(SystemExit, match="eval.py --attempts"):
        hard_rows([*rows, {"id": 9}], 2)


def test_rows_of_a_benchmark_are_left_out(here, encoder, capsys):
    # The same question and responses under another id, order, case and spacing. kills: matching by
    # id or by question alone, order or punctuation that hide a copy
    picture("red").save(here / "x.png")
    bench = [{"id": f"RLAIF-V-{i}", "query": f"What is {i}?", "response": ["One.", f"Two {i}"],
              "image": "x.png", "human_ranking": [i % 2, 1 - i % 2], "judge": "human"}
             for i in range(5)]
    rows = [{"question": f"<image>what  IS {i}", "image": "x.png", "chosen": f"two {i}!",
             "rejected": "one" if i != 3 else "three", "ds_name": "d"} for i in range(8)]
    got = load_rows(write(here / "train.jsonl", rows), encoder,
                    exclude=write(here / "bench.jsonl", bench))
    assert [r["prompt"][-1] for r in got] == ["3", "5", "6", "7"]
    assert "4 left out: they are in" in capsys.readouterr().out
    for path in (write(here / "none.jsonl", [{"x": 1}]), write(here / "list.jsonl", [[1]])):
        with pytest.raises(SystemExit, match="exclude nothing"):
            load_rows(str(here / "train.jsonl"), encoder, exclude=path)
    read = rows_of(here / "bench.jsonl", encoder, "image_understanding")
    assert [better(r) for r in read] == ["One." if i % 2 == 0 else f"Two {i}" for i in range(5)]


def test_a_sample_of_several_sources(here, encoder):
    # `a:3,b` takes exactly 3 usable rows of a, always the same, spread over the file.
    # kills: the first 3, another sample each time, bad rows counted among the 3
    row = {"task": "text", "prompt": "q", "responses": ["x", "y"], "label": "A"}
    a = [{**row, "id": f"a{i}"} for i in range(50)]
    for r in a[::2]:
        r["label"] = "C"
    write(here / "a.jsonl", a)
    write(here / "b.jsonl", [{**row, "id": f"b{i}"} for i in range(4)])
    one, two = ([r["id"] for r in load_rows("a.jsonl:3,b.jsonl", encoder, quiet=True,
                                            skip_bad_rows=True)] for _ in "12")
    assert one == two and Counter(x[0] for x in one) == {"a": 3, "b": 4}
    assert len(set(one)) == 7 and max(int(x[1:]) for x in one[:3]) > 6


def test_a_parquet_file_with_images_inside(here, encoder):
    features = datasets.Features({k: datasets.Value("string") for k in (
        "ds_name", "question", "chosen", "rejected")} | {"image": datasets.Image()})
    datasets.Dataset.from_list([
        {"ds_name": "d", "question": f"What {i}?", "chosen": "good", "rejected": "bad",
         "image": picture("white")} for i in range(N)], features).to_parquet(here / "x.parquet")
    rows = rows_of(here / "x.parquet", encoder, "image_understanding")
    assert len(rows) == N and {better(r) for r in rows} == {"good"}
    assert common.open_image(rows[0]["media"][0]).getpixel((0, 0)) == (255, 255, 255)
    assert len(rows_of("x.parquet:5", encoder, "image_understanding")) == 5


def test_a_sample_is_drawn_from_the_whole_file(here, encoder, capsys):
    # kills: the first thousand rows only, another sample each time, row numbers of the sample
    datasets.Dataset.from_list([{"prompt": f"What {i}?", "chosen": f"good {i}", "rejected": "bad"}
                                for i in range(3000)]).to_parquet(here / "x.parquet")
    rows = rows_of("x.parquet:60", encoder, "text")
    numbers = [int(r["prompt"].split()[1].strip("?")) for r in rows]
    assert len({n // 500 for n in numbers}) == 6
    assert rows_of("x.parquet:60", encoder, "text") == rows
    for row, number in zip(rows, numbers, strict=True):
        assert row["id"].endswith(f"/{number + 1}")
    load_rows("x.parquet:4000", encoder)
    assert "x.parquet:4000: only 3000 rows to give" in capsys.readouterr().out


# ------------------------------------------------------------------------------------------- videos
@pytest.mark.parametrize("name, codec, pixels", [
    ("a.mp4", "mpeg4", "yuv420p"), ("a.avi", "mjpeg", "yuvj444p"), ("a.mkv", "ffv1", "yuv420p10le"),
    ("a.webm", "libvpx-vp9", "yuv420p"), ("a.gif", "gif", "gray"), ("a.mov", "png", "rgb24"),
    ("a.ts", "mpeg2video", "yuv420p"), ("a.nut", "rawvideo", "bgr24")])
def test_containers_and_pixel_formats(here, name, codec, pixels):
    try:
        path = write_video(here / name, 12, (48, 32), None, codec, pixels)
    except (av.error.FFmpegError, ValueError) as e:
        pytest.skip(f"this PyAV cannot write {name}: {e}")
    frames = common.open_video(path, 4)
    assert [f.size for f in frames] == [(48, 32)] * 4 and frames[0].mode == "RGB"
    for k, frame in zip((1, 4, 7, 10), frames, strict=True):
        assert abs(frame.getpixel((20, 20))[0] - 10 * k) <= 12


def test_variable_frame_rate_and_short_videos(here):
    # kills: frames counted from the header, evenly spaced in time, or padded
    times = [0, 10, 20, 500, 510, 2000, 2010, 2020]
    path = write_video(here / "v.mkv", 8, codec="mjpeg", pixels="yuvj420p", times=times)
    levels = [f.getpixel((5, 5))[0] for f in common.open_video(path, 8)]
    assert len(levels) == 8 and all(abs(a - 10 * k) <= 6 for k, a in enumerate(levels))
    levels = [f.getpixel((5, 5))[0] for f in common.open_video(path, 4)]
    assert all(abs(a - b) <= 6 for a, b in zip(levels, (0, 20, 40, 60), strict=True))
    assert len(common.open_video(write_video(here / "one.mp4", 1), 8)) == 1
    assert len(common.open_video(write_video(here / "three.mp4", 3), 8)) == 3


def test_media_are_decoded_once_and_again_when_they_change(loaded, here, monkeypatch):
    """A resumed run on 100k videos must not decode them all before its first step. kills: no
    length kept; lengths kept by path alone, or without the settings that decide them; a bad row
    forgotten; a cut line that ends the list, or is read as a length."""
    folder, opened = toy_world.PREBUILT, []
    open_image = common.open_image

    def watched(path):
        opened.append(Path(path).name)
        return open_image(path)
    monkeypatch.setattr(common, "open_image", watched)

    def read(max_tiles=1):
        opened.clear()
        encoder = common.load(folder, max_tiles=max_tiles)[1]
        rows = load_rows("rows.jsonl", encoder, skip_bad_rows=True)
        return [row["tokens"] for row in rows]
    names = ["0.png", "1.png", "2.png"]
    picture("red").save(here / "0.png")
    picture("red").save(here / "1.png")
    (here / "2.png").write_bytes(b"no image")
    rows = [{"id": str(i), "task": "image_understanding", "prompt": "what ?", "media": [name],
             "responses": ["a", "b"], "label": "A"} for i, name in enumerate(names)]
    write(here / "rows.jsonl", rows)
    first = read()
    assert len(first) == 2 and opened == ["0.png", "1.png", "2.png"]
    assert read() == first and opened == ["2.png"]  # the bad row is bad each time
    picture("blue", (64, 32)).save(here / "1.png")  # another picture of the same name
    assert read() == first and opened == ["1.png", "2.png"]
    assert read(max_tiles=4) != first and opened == ["0.png", "1.png", "2.png"]
    kept, = Path("media_cache/lengths").iterdir()
    kept.write_bytes(kept.read_bytes().replace(b"]\n", b"\n", 1))
    assert read() == first and opened == ["0.png", "2.png"]


def test_each_process_reads_its_share_of_the_media(tmp_path):
    """Every row is checked by one process, and all hold the same rows in the same order, whichever
    they leave out. kills: every process reads all media; rows in the order of the processes"""
    rows = [text_row(id=i, prompt="x" * (9 if i % 3 else 99)) for i in range(150)]
    rows[70]["label"] = "C"
    path = write(tmp_path / "rows.jsonl", rows)
    torchrun([PROGRAMS / "shares.py", path, tmp_path])
    got = [json.loads((tmp_path / f"share-{rank}.json").read_text()) for rank in (0, 1)]
    assert got[0]["whole"] == got[1]["whole"] == [str(i) for i in range(150) if i != 70]
    assert got[0]["sample"] == got[1]["sample"] and len(got[0]["sample"]) == 90
    reads = [set(part["checked"]) for part in got]
    assert not reads[0] & reads[1] and len(reads[0] | reads[1]) == 149  # the bad row has no length
    assert got[0]["refused"] == got[1]["refused"] and "rows.jsonl:71" in got[0]["refused"]
