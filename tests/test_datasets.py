"""
Published datasets: rows built in each set's own schema, with all its label encodings, ties and
missing media, must become the right preference rows. "kills:" names wrong versions of the source
under which a test was seen to fail.
"""

import base64
import io
import json
from collections import Counter
from fractions import Fraction

import av
import numpy as np
import pytest
import toy_world
from PIL import Image

import common

N = 24  # rows a set: enough that a hash puts the better one on either side


@pytest.fixture(scope="module")
def encoder():
    return common.load(toy_world.PREBUILT)[1]


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # media_cache/ is made in the working directory
    return tmp_path


def picture(colour, size=(40, 30)):
    return Image.new("RGB", size, colour)


def write(path, rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(r) + "\n" for r in rows))
    return path


def write_video(path, n, size=(32, 32), format=None, codec="mpeg4", pixels="yuv420p", times=None):
    """n frames, the k-th of grey level 10 k."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with av.open(str(path), "w", format=format) as container:
        stream = container.add_stream(codec, rate=8)
        stream.width, stream.height, stream.pix_fmt = *size, pixels
        if times:
            stream.codec_context.time_base = Fraction(1, 1000)
        for k in range(n):
            frame = av.VideoFrame.from_ndarray(np.full((*size[::-1], 3), 10 * k, np.uint8), "rgb24")
            if times:
                frame.pts, frame.time_base = times[k], Fraction(1, 1000)
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return path


def better(row):
    """The text of the better candidate, or the grey level of the better medium's first pixel."""
    k = "AB".index(row["label"])
    if row["responses"]:
        return row["responses"][k]
    path = row["media"][k]
    images = common.open_video(path, 1) if path.endswith("mp4") else [common.open_image(path)]
    return images[0].getpixel((3, 3))[0]


def rows_of(path, encoder, task, **more):
    rows = common.load_rows(str(path), encoder, quiet=True, **more)
    assert {r["task"] for r in rows} == {task} and len({r["id"] for r in rows}) == len(rows)
    assert len(rows) < 12 or {r["label"] for r in rows} == {"A", "B"}
    return rows


def test_vision_feedback(here, encoder):
    # S1. kills: the better one always A, <image> left in the prompt
    picture("red").save(here / "x.png")
    turns = [{"from": "human", "value": "<image>\nWhat is it?"},
             {"from": "gpt", "preference_values": ["good", "bad"]}]
    rows = rows_of(write(here / "s1.jsonl", [
        {"id": i, "origin_pre_dataset": "POVID", "image": "x.png", "image_path": "p",
         "conversations": json.dumps(turns) if i % 2 else turns} for i in range(N)]), encoder,
        "image_understanding")
    assert {better(r) for r in rows} == {"good"} and rows[0]["prompt"] == "What is it?"
    for bad in (turns * 2, [], "{", [turns[0], {"preference_values": ["one"]}]):
        with pytest.raises(common.BadRow):
            list(common.convert({"id": 1, "image": "x.png", "conversations": bad}, 0))
    assert rows[0]["subset"] == "POVID" and rows[0]["media"] == [str(here / "x.png")]


@pytest.mark.parametrize("form", ["path", "bytes", "base64"])
def test_open_image_preferences(here, encoder, form):
    # S2, with images as paths, as a dataset's bytes and as base64 text. kills: both images under
    # one name, chosen always first
    def image(level):
        noise = np.random.default_rng(level).integers(0, 255, (20, 20, 3), np.uint8)
        noise[:8, :8] = level
        buffer = io.BytesIO()
        Image.fromarray(noise).save(buffer, "PNG")
        (here / f"{level}.png").write_bytes(buffer.getvalue())
        return {"path": f"{level}.png", "bytes": {"bytes": buffer.getvalue(), "path": None},
                "base64": base64.b64encode(buffer.getvalue()).decode()}[form]
    raws = [{"id": f"{i}-quality", "prompt": "a dot", "chosen": image(255), "rejected": image(0),
             "chosen_model": "m", "rejected_model": "n", "evolution": "quality"} for i in range(N)]
    rows = [common.check_row(row, here) for i, raw in enumerate(raws)
            for row in common.convert(raw, i)]
    assert {better(r) for r in rows} == {255} and {r["label"] for r in rows} == {"A", "B"}
    assert len(rows) == N and {r["task"] for r in rows} == {"image_generation"}
    if form != "path":
        assert len(list((here / "media_cache").iterdir())) == 2


def test_rapidata_images(here, encoder):
    # S3. Shares of votes; equal and missing ones are ties. kills: the smaller share, ties kept
    picture("white").save(here / "w.png"), picture("black").save(here / "b.png")
    make = [{"prompt": f"dot {i}", "image1": "w.png" if i % 2 else "b.png",
             "image2": "b.png" if i % 2 else "w.png", "model1": "x", "model2": "y",
             "weighted_results_image1_preference": 0.7 if i % 2 else 0.2,
             "weighted_results_image2_preference": 0.3 if i % 2 else 0.8,
             "weighted_results_image1_alignment": 0.1, "weighted_results_image2_alignment": 0.9}
            for i in range(N)]
    tie = {**make[0], "weighted_results_image1_preference": 0.8}
    void = {**make[0], "weighted_results_image1_preference": None}
    rows = rows_of(write(here / "s3.jsonl", [tie, *make, void]), encoder, "image_generation")
    assert len(rows) == N and {better(r) for r in rows} == {255}


def test_rapidata_videos(here, encoder):
    # S6. Capitalised columns; data/x.parquet and Videos/ side by side. kills: the columns of S3,
    # another folder
    write_video(here / "Videos" / "w.mp4", 3), write_video(here / "Videos" / "z.mp4", 9)
    make = [{"prompt": f"dot {i}", "video1": "https://x", "video2": "https://y",
             "file_name1": "w.mp4" if i % 2 else "z.mp4",
             "file_name2": "z.mp4" if i % 2 else "w.mp4",
             "weighted_results1_Preference": 0.6 if i % 2 else 0.4,
             "weighted_results2_Preference": 0.4 if i % 2 else 0.6,
             "weighted_results1_Alignment": 0.5, "weighted_results2_Alignment": 0.5}
            for i in range(N)]
    tie = {**make[0], "weighted_results1_Preference": 0.6}
    rows = rows_of(write(here / "data" / "s6.jsonl", [*make, tie]), encoder, "video_generation")
    assert len(rows) == N
    won = {r["media"]["AB".index(r["label"])] for r in rows}
    assert won == {str(here / "data" / ".." / "Videos" / "w.mp4")}


def test_sharegptvideo(here, encoder):
    # S4. A video is a folder of frames, sorted by number. kills: the order of names (10 before 9);
    # training on the videos that eval.py judges, or only where the scores are missing
    held = next(v for v in map(str, range(99)) if common.held_out(v))
    for k in range(11):
        path = here / "v" / f"c01_{k}.jpeg"
        path.parent.mkdir(exist_ok=True)
        picture((10 * k,) * 3).save(path)
    rows = rows_of(write(here / "sft_dpo_17k.jsonl", [
        {"id": f"v_{i}", "video": "v" if i > 1 else held, "prompt": "<video>\nWhat?",
         "chosen": "good", "rejected": "bad", **({"chosen_score": 5} if i % 2 else {})}
        for i in range(N + 2)]), encoder, "video_understanding")
    assert len(rows) == N and not common.held_out("v")
    assert {better(r) for r in rows} == {"good"} and rows[0]["prompt"] == "What?"
    levels = [f.getpixel((0, 0))[0] for f in common.open_video(rows[0]["media"][0], 11)]
    assert levels == sorted(levels) and len(levels) == 11
    (here / "empty").mkdir()
    with pytest.raises(common.BadRow, match="no frames"):
        common.open_video(here / "empty", 8)


def test_videodpo(here, encoder):
    # S5. video1 wins; even numbers lie in winvideos/, odd ones in losevideos/. kills: video2 wins,
    # the folder by winner instead of by number
    for k in range(3):
        write_video(here / "winvideos" / f"{k:06d}.mp4", 2)
        write_video(here / "losevideos" / f"{k:06d}.mp4", 2)
    pairs = [(i % 6, (i + 1 + i // 6) % 6) for i in range(N)]
    pairs = sorted({p for p in pairs if p[0] != p[1]})
    path = here / "pair.json"
    path.write_text(json.dumps([{"video1": a, "video2": b, "frame_caption": ["a dot"] if a else
                                 "a dot", "score": 0.1} for a, b in pairs]))
    rows = rows_of(path, encoder, "video_generation")
    wins = {str(here / f"{['winvideos', 'losevideos'][a % 2]}/{a // 2:06d}.mp4") for a, _ in pairs}
    assert len(rows) == len(pairs) and {r["prompt"] for r in rows} == {"a dot"}
    assert {r["media"]["AB".index(r["label"])] for r in rows} == wins


def test_r1_reward(here, encoder):
    # kills: 1 and 2 exchanged, the sections cut wrongly, the author's absolute path used
    text = ("You are an impartial evaluator.\n###### [Question]:\n<image>What?\n"
            "###### [Response 1]:\n{}\n###### [Response 2]:\n{}\n"
            "###### **Output Format (strictly follow):** \n<think>Your analysis"
            "</think><answer>1/2</answer>")
    picture("red").save(here / "x.png")
    make = [{"question": "q", "image": "x.png", "answer": [f"<answer>{1 + i % 2}</answer>"],
             "message": json.dumps([{"role": "user", "content": [
                 {"type": "text", "text": text.format(*(["good", "bad"][:: 1 - 2 * (i % 2)]))},
                 {"type": "image", "image": "/mmu/x.jpg"}]}])} for i in range(N)]
    rows = rows_of(write(here / "r1.jsonl", make), encoder, "image_understanding")
    assert {better(r) for r in rows} == {"good"} and {r["prompt"] for r in rows} == {"What?"}
    assert all(set(r["responses"]) == {"good", "bad"} for r in rows)
    for wrong in ({"answer": ["<answer>3</answer>"]}, {"answer": []}, {"message": "no JSON"},
                  {"message": json.dumps([{"role": "user", "content": "no sections"}])}):
        with pytest.raises(common.BadRow):
            list(common.convert({**make[0], **wrong}, 0))


@pytest.mark.parametrize("columns", [
    {"ds_name": "d", "question": "<image>What?", "origin_dataset": "VQAv2", "origin_split": "{}"},
    {"prompt": "What?", "chosen_reason": "it is", "rejected_reason": "it is not"}])
def test_rlaif_v_and_mm_rlhf(here, encoder, columns):
    picture("red").save(here / "x.png")
    make = [{**columns, "image": "x.png", "chosen": "good", "rejected": "bad"} for _ in range(N)]
    rows = rows_of(write(here / "x.jsonl", [*make, {**make[0], "is_tie": True}]), encoder,
                   "image_understanding")
    assert len(rows) == N and {better(r) for r in rows} == {"good"}
    assert {r["prompt"] for r in rows} == {"What?"}
    for image, said in (("y.png", "does not exist"), (None, "lacks")):
        with pytest.raises(SystemExit, match=f"lost.jsonl:1.*{said}"):
            rows_of(write(here / "lost.jsonl", [{**make[0], "image": image}]), encoder, "")


def test_videos_of_other_sets_are_not_held_out():
    # kills: a tenth of MM-RLHF's videos lost with ShareGPTVideo's
    held = next(v for v in map(str, range(99)) if common.held_out(v))
    raw = {"video": held, "prompt": "What?", "chosen": "good", "rejected": "bad"}
    assert not list(common.convert(raw, 0))
    row, = common.convert({**raw, "chosen_reason": "it is", "rejected_reason": "it is not"}, 0)
    assert row["task"] == "video_understanding" and row["media"] == [held]


def test_the_words_round_a_placeholder_stay_apart():
    # kills: "Look at" and "the sky" glued together, "C#" cut to "C"
    raw = {"ds_name": "d", "question": "Look at <image>\nthe sky.", "image": "x.png",
           "chosen": "a", "rejected": "b"}
    assert next(common.convert(raw, 0))["prompt"] == "Look at the sky."
    talk = [{"value": "USER: <image>\nWhy?"}, {"preference_values": ["a", "b"]}]
    raw = {"image": "x.png", "conversations": json.dumps(talk)}
    assert next(common.convert(raw, 0))["prompt"] == "USER: Why?"
    text = "[Question]:\n<image>Which?\n### [Response 1]:\nC#\n### [Response 2]:\nC\n### {}"
    for end in ("Output Format:", "**Output Format (strictly follow):**"):
        raw = {"image": "x.png", "answer": ["<answer>1</answer>"],
               "message": json.dumps([{"role": "user", "content": text.format(end)}])}
        assert sorted(next(common.convert(raw, 0))["responses"]) == ["C", "C#"]


def test_rows_of_a_benchmark_are_left_out(here, encoder, capsys):
    # The same question and responses under another id, order, case and spacing. kills: matching by
    # id or by question alone, order or punctuation that hide a copy
    picture("red").save(here / "x.png")
    bench = [{"id": f"RLAIF-V-{i}", "query": f"What is {i}?", "response": ["One.", f"Two {i}"],
              "image": "x.png", "human_ranking": [i % 2, 1 - i % 2], "judge": "human"}
             for i in range(5)]
    rows = [{"question": f"<image>what  IS {i}", "image": "x.png", "chosen": f"two {i}!",
             "rejected": "one" if i != 3 else "three", "ds_name": "d"} for i in range(8)]
    got = common.load_rows(str(write(here / "train.jsonl", rows)), encoder,
                           exclude=str(write(here / "bench.jsonl", bench)))
    assert [r["prompt"][-1] for r in got] == ["3", "5", "6", "7"]
    assert "4 left out: they are in" in capsys.readouterr().out
    for path in (write(here / "none.jsonl", [{"x": 1}]), write(here / "list.jsonl", [[1]])):
        with pytest.raises(SystemExit, match="exclude nothing"):
            common.load_rows(str(here / "train.jsonl"), encoder, exclude=str(path))
    read = rows_of(here / "bench.jsonl", encoder, "image_understanding")
    assert [better(r) for r in read] == ["One." if i % 2 == 0 else f"Two {i}" for i in range(5)]


def test_a_sample_of_several_sources(here, encoder):
    # `a:3,b` takes exactly 3 usable rows of a, always the same, spread over the file.
    # kills: the first 3, another sample each time, bad rows counted among the 3
    row = {"task": "text", "prompt": "q", "responses": ["x", "y"], "label": "A"}
    a = [{**row, "id": f"a{i}"} for i in range(50)]
    for r in a[::2]:
        r["label"] = "C"
    write(here / "a.jsonl", a), write(here / "b.jsonl", [{**row, "id": f"b{i}"} for i in range(4)])
    one, two = ([r["id"] for r in common.load_rows("a.jsonl:3,b.jsonl", encoder, quiet=True,
                                                   skip_bad_rows=True)] for _ in "12")
    assert one == two and Counter(x[0] for x in one) == {"a": 3, "b": 4}
    assert len(set(one)) == 7 and max(int(x[1:]) for x in one[:3]) > 6


def test_a_parquet_file_with_images_inside(here, encoder):
    import datasets
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
    import datasets
    datasets.Dataset.from_list([{"prompt": f"What {i}?", "chosen": f"good {i}", "rejected": "bad"}
                                for i in range(3000)]).to_parquet(here / "x.parquet")
    rows = rows_of("x.parquet:60", encoder, "text")
    numbers = [int(r["prompt"].split()[1].strip("?")) for r in rows]
    assert len({n // 500 for n in numbers}) == 6
    assert rows_of("x.parquet:60", encoder, "text") == rows
    assert all(r["id"].endswith(f"/{n + 1}") for r, n in zip(rows, numbers))
    common.load_rows("x.parquet:4000", encoder)
    assert "x.parquet has 3000 rows to give, not 4000" in capsys.readouterr().out


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
    for k, frame in zip((1, 4, 7, 10), frames):
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


# ------------------------------------------------------------------------------------------- paper
def test_table_5():
    # The counts of MSRL Table 5. kills: a digit
    import stage2_caption_grpo as stage2
    import stage3_mm_grpo as stage3
    for paper, want in ((stage2.PAPER, [5000, 2500, 2580, 4323, 2500, 2539]),
                        (stage3.PAPER, [8000, 2500, 2639, 2343, 2500, 2056])):
        counts = [int(s.rpartition(":")[2]) for s in paper["data"].split(",")]
        assert counts == want and sum(counts) in (19442, 20038)
