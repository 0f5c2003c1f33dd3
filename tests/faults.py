"""
What goes wrong on real machines and with real data, often and at random. Slow, so the tests run a
short form of it.

    python tests/faults.py --kills 20

    kills    each training script is ended by SIGKILL at random moments of its run, and a few times
             by SIGTERM, and started again each time. In the end its weights, logs and held-out
             figures are those of a run that nobody ended, to the bit. One is a run of two
             processes with --shard yes, which are killed together.
    ranks    one of two processes dies; how long does the other wait for it?
    rows     JSON of wrong types, cut, forged, endless: it is used or refused, by its file and line
    media    cut and altered pictures and videos, and what only calls itself one: the same

A run is a process of its own, forked from this one, which has imported everything. So the moments
fall into the run and not into Python's start, and a kill costs a second.
"""

import argparse
import io
import json
import os
import random
import shutil
import signal
import socket
import sys
import tempfile
import time
import traceback
from collections import Counter
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import av  # noqa: E402  (the path is set above)
import numpy as np  # noqa: E402  (as above)
import torch  # noqa: E402  (as above)
from helpers import (  # noqa: E402  (as above)
    PROGRAMS, flags, lasting, lines, small_world, torchrun, write, write_video)
from PIL import Image  # noqa: E402  (as above)
from safetensors.torch import load_file  # noqa: E402  (as above)
from toy_world import PREBUILT  # noqa: E402  (as above)

import bt_reward  # noqa: E402  (as above)
import common  # noqa: E402  (as above)
import data  # noqa: E402  (as above)
import stage0_sft  # noqa: E402  (as above)
import stage1_text_grpo  # noqa: E402  (as above)
import stage2_caption_grpo  # noqa: E402  (as above)
import stage2b_cmkd  # noqa: E402  (as above)
import stage3_mm_grpo  # noqa: E402  (as above)


# ==================================================================================================
# 1. Kills

def runs_of(world):
    """-> {script: (main, its flags but --out)}: small runs of every script with all that it keeps
    on disk: looks at held-out rows, logged groups, captions, replayed rows, samples."""
    judge = world / "judge"
    sft = {"model": PREBUILT, "lr": 1e-3, "batch_size": 4, "save_every": 2, "max_new_tokens": 24,
           "heldout": world / "heldout_text.jsonl"}
    rl = {"model": judge, "lr": 1e-3, "group_size": 4, "micro_batch": 2, "max_steps": 12,
          "save_every": 2, "log_rollouts_every": 1, "eval_every": 5, "max_new_tokens": 24,
          "temperature": 1.5, "heldout": world / "heldout_text.jsonl"}
    return {
        "stage0_sft": (stage0_sft.main, {**sft, "data": world / "sft.jsonl", "epochs": 6}),
        "stage1_text_grpo": (stage1_text_grpo.main, {
            **rl, "data": world / "text_rl.jsonl", "batch_size": 4}),
        "stage1_sharded": (stage1_text_grpo.main, {
            **rl, "data": world / "text_rl.jsonl", "batch_size": 4, "shard": "yes"}),
        "stage2_caption_grpo": (stage2_caption_grpo.main, {
            **rl, "data": world / "bare.jsonl", "captioner": PREBUILT, "batch_size": 6,
            "replay": world / "text_rl.jsonl", "replay_candidates": 12}),
        "stage2b_cmkd": (stage2b_cmkd.main, {
            **sft, "model": judge, "data": world / "caption_rl.jsonl", "samples": 3,
            "rollout_batch": 4, "epochs": 8}),
        "stage3_mm_grpo": (stage3_mm_grpo.main, {
            **rl, "data": world / "mm_rl.jsonl", "batch_size": 4}),
        "bt_reward": (bt_reward.main, {
            "model": PREBUILT, "data": f"{world}/mm_rl.jsonl,{world}/text_rl.jsonl", "epochs": 5,
            "batch_size": 4, "save_every": 2, "lr": 1e-3,
            "heldout": world / "heldout_image_generation.jsonl"})}


def make_judge(world):
    """A model that thinks one word and then says now A and now B, so that rewards differ, and rows
    without captions for a captioner."""
    taught = []
    for name in ("text_rl", "caption_rl"):
        for row in lines(world / f"{name}.jsonl"):
            taught.append({**row, "rationale": "match ."})
    write(world / "taught.jsonl", taught)
    bare = [{**row, "captions": []} for row in lines(world / "mm_rl.jsonl")]
    write(world / "bare.jsonl", bare)
    code = wait(start_all(stage0_sft.main, {
        "model": PREBUILT, "data": world / "taught.jsonl", "form": "caption", "heldout": "",
        "epochs": 30, "batch_size": 8, "micro_batch": 8, "lr": 2e-3}, world / "judge"))
    if code:
        raise SystemExit(Path(f"{world}/judge.log").read_text())


def start_all(main, settings, out):
    """-> the ids of the processes of a run: of two with --shard yes, in torchrun's variables."""
    if settings.get("shard") != "yes":
        return [start(main, settings, out, {})]
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    processes = []
    for rank in ("0", "1"):
        processes.append(start(main, settings, out, {
            "RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2",
            "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}))
    return processes


def start(main, settings, out, variables):
    """main() with these flags in a process of its own, which writes to OUT.log. -> its id"""
    process = os.fork()
    if process:
        return process
    code = 1
    try:
        os.environ.update(variables)
        torch.set_num_threads(1)  # makes torch's pool anew, before threads of ours race to do it
        log = os.open(f"{out}.log", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(log, 1)
        os.dup2(log, 2)
        sys.argv = ["script.py", *map(str, flags(**settings, out=out))]
        main()
        code = 0
    except SystemExit as e:
        code = e.code if isinstance(e.code, int) else 1
        print(e)
    except BaseException:
        traceback.print_exc()
    finally:  # not the end of this program, but that of the fork
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def wait(processes):
    """-> their exit code, 0 only if all have it, -9 for SIGKILL"""
    codes = [os.waitstatus_to_exitcode(os.waitpid(process, 0)[1]) for process in processes]
    return max(codes, key=abs)


def progress_of(out, steps):
    """Where a run was ended."""
    if not (out / "state.pt").exists():
        return "before the first save"
    done = torch.load(out / "state.pt", weights_only=True)["step"]
    return "after the last step" if done == steps else "in training"


def differences(out, unbroken):
    """-> what a run that was ended has otherwise than the unbroken one"""
    found = []
    for name in ("model.safetensors", "reward_head.safetensors"):
        if (unbroken / name).exists():
            ours, theirs = load_file(out / name), load_file(unbroken / name)
            same = ours.keys() == theirs.keys()
            if not same or not all(torch.equal(ours[key], theirs[key]) for key in theirs):
                found.append(name)
    for name in ("metrics.jsonl", "rollouts.jsonl", "cmkd.jsonl", "captions.jsonl",
                 "samples.jsonl"):
        if (unbroken / name).exists():
            ours, theirs = lines(out / name), lines(unbroken / name)
            if list(map(lasting_of, ours)) != list(map(lasting_of, theirs)):
                found.append(name)
    if stage_of(out)["heldout"] != stage_of(unbroken)["heldout"]:
        found.append("held-out figures")
    return found


def lasting_of(line):
    return lasting(line) if isinstance(line, dict) else line


def stage_of(folder):
    return json.loads((folder / "stage.json").read_text())


class Killed:
    """One script, ended again and again."""

    def __init__(self, name, main, settings, folder, rng):
        self.name, self.main, self.settings, self.rng = name, main, settings, rng
        self.unbroken, self.out = folder / f"{name}-unbroken", folder / f"{name}-killed"
        began = time.time()
        code = wait(start_all(main, settings, self.unbroken))
        self.seconds = time.time() - began
        if code:
            log = Path(f"{self.unbroken}.log").read_text()
            raise SystemExit(f"{name} ended with {code}: {log}")
        self.ended, self.problems, self.finished = Counter(), [], 0
        metrics = lines(self.unbroken / "metrics.jsonl")
        self.steps = len(metrics)
        if not any(line.get("reward_std", 1) for line in metrics):
            self.problems.append("learns nothing")

    def end_once(self, number):
        """Start it, or go on with it, and send the signal at a random moment. -> was it there?"""
        processes = start_all(self.main, self.settings, self.out)
        time.sleep(self.rng.uniform(0, self.seconds))
        for process in processes:
            os.kill(process, number)
        code = wait(processes)
        if code == 0:
            self.compare()
            return False
        self.ended[progress_of(self.out, self.steps)] += 1
        if code == 128 + signal.SIGTERM:
            self.ended["saved by SIGTERM"] += 1
            saved = torch.load(self.out / "state.pt", weights_only=True)["step"]
            if saved != lines(self.out / "metrics.jsonl")[-1]["step"]:
                self.problems.append(f"SIGTERM left step {saved}")
        elif code != -number:
            self.problems.append(f"ended with {code}")
        return True

    def compare(self):
        """Of a run that came to its end; the next one begins anew."""
        found = differences(self.out, self.unbroken)
        steps = [line["step"] for line in lines(self.out / "metrics.jsonl")]
        if steps != list(range(1, len(steps) + 1)):
            found.append("steps twice or not at all")
        self.problems += found
        self.finished += 1
        shutil.rmtree(self.out)

    def run(self, kills, terms):
        """-> a line of the table"""
        for number, wanted in ((signal.SIGKILL, kills), (signal.SIGTERM, terms)):
            there = 0
            while there < wanted:
                there += self.end_once(number)
        code = wait(start_all(self.main, self.settings, self.out))
        if code:
            self.problems.append(f"did not go on: {code}")
        else:
            self.compare()
        names = ("before the first save", "in training", "after the last step")
        where = " / ".join(str(self.ended[name]) for name in names)
        problems = "none" if not self.problems else ", ".join(self.problems)
        return (f"| {self.name} | {self.seconds:.1f} | {kills} | {terms} | "
                f"{self.ended['saved by SIGTERM']} | {where} | {self.finished} | {problems} |")


def kill_scripts(names, kills, terms, folder, rng):
    """-> how many runs differ"""
    world = small_world(folder / "world", sft=16, text_rl=12, caption_rl=12, mm_rl=8, heldout=2)
    print("| script | seconds unbroken | SIGKILL | SIGTERM | saved by it | ended before the first "
          "save / in training / after the last step | runs compared | differences |\n"
          "|---|--:|--:|--:|--:|--:|--:|---|")
    if set(names) - {"stage0_sft", "bt_reward"}:
        make_judge(world)
    wrong = 0
    for name, (main, settings) in runs_of(world).items():
        if name in names:
            killed = Killed(name, main, settings, folder, rng)
            # a SIGTERM that comes before both are in their loop ends them in several ways
            sharded = settings.get("shard") == "yes"
            print(killed.run(kills, 0 if sharded else terms), flush=True)
            wrong += len(killed.problems)
    return wrong


def kill_ranks(folder):
    """One of two processes of stage 1 dies in step 2. -> how many ends are wrong"""
    world = small_world(folder / "ranks", text_rl=8)
    print("| the second of two processes | seconds until both had ended | exit code | its "
          "traceback is shown |\n|---|--:|--:|---|")
    wrong = 0
    for fault in ("raise", "kill"):
        out = folder / f"rank-{fault}"
        out.mkdir()
        done = torchrun([PROGRAMS / "rank_fault.py", out, f"{fault}@2", "--", *flags(
            model=PREBUILT, data=world / "text_rl.jsonl", heldout="", out=out / "run", max_steps=3,
            batch_size=2, group_size=2, micro_batch=1, max_new_tokens=9)], check=False)
        seconds = time.time() - float((out / "died").read_text())
        shown = "the second process died here" in done.stderr
        print(f"| {fault} | {seconds:.1f} | {done.returncode} | "
              f"{'yes' if shown else 'there is none'} |", flush=True)
        wrong += seconds > 60 or done.returncode == 0 or shown != (fault == "raise")
    return wrong


# ==================================================================================================
# 2. Rows

JUNK = (None, True, 0, -1, 2**70, 1.5, float("nan"), float("inf"), "", " ", "A", "x", "\x00\x1b[2J",
        "\u202eabc", "\ud83d", "é" * 3, [], {}, [[]], [None], ["x"], ["x", 2], ["x", "y", "z"],
        [{"role": "user"}], {"a": {"b": [1]}}, {"bytes": None, "path": "x.png"}, "x" * 200_000,
        " " * 20_000, "../../../../etc/passwd", "/etc/passwd", "http://x/y.png", "y" * 300 + ".png")
TAGS = ("<think>", "</answer>", "<image>", "<IMG_CONTEXT>", "<|im_end|>", "[The End of ")

PUBLISHED = (  # a row of each form that data.py knows
    {"context": [{"role": "user", "content": "Why?"}], "response1": "a", "response2": "b",
     "overall_preference": -1, "individual_preference": [
         {"score": -1, "reasoning": "r", "feedback1": "f", "feedback2": "g"}]},
    {"instruction": "[User Question] q [The Start of Assistant A's Response] a [The End of "
     "Assistant A's Response] [The Start of Assistant B's Response] b [The End of Assistant B's "
     "Response]", "input": "", "output": "<answer>A</answer>"},
    {"id": 3, "query": "q", "response": ["a", "b"], "human_ranking": [0, 1], "image": "a.png"},
    {"message": [{"role": "user", "content": "[Question]: q ### [Response 1]: a ### [Response 2]: "
                  "b"}], "answer": ["<answer>1</answer>"], "image": "a.png"},
    {"prompt": "q", "left_image": "a.png", "right_image": "b.png", "vote_type": "leftvote"},
    {"conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}],
     "rejected_conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "b"}],
     "image": "a.png"},
    {"prompt": "q", "completions": [
        {"response": "a", "annotations": {"x": {"Rating": "3"}}},
        {"response": "b", "annotations": {"x": {"Rating": "1"}}}], "image": "a.png"},
    {"conversation_a": [{"content": "q"}, {"content": "a"}], "winner": "model_a", "image": "a.png",
     "conversation_b": [{"content": "q"}, {"content": "b"}]},
    {"prompt": "q", "file_path": ["a.png", "b.png"], "human_preference": [1, 0]},
    {"prompt": "q", "image1": "a.png", "image2": "b.png", "weighted_results_image1_preference": 0.7,
     "weighted_results_image2_preference": 0.3},
    {"video1": 2, "video2": 3, "frame_caption": ["q"]},
    {"prompt": "q", "chosen": "a", "rejected": "b", "image": "a.png"},
    {"id": "1", "prompt": "q", "chosen": ["a", "b", "c"], "rejected": ["d", "e", "f"]},
    {"chosen": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}],
     "rejected": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "b"}]})


def fuzzed_row(rng, rows):
    """-> (a line of a file, as bytes, must it be refused?)"""
    kind = rng.choice(("key", "key", "text", "place", "published", "published", "line", "bytes"))
    row = json.loads(json.dumps(rng.choice(rows)))
    if kind == "published":
        row = json.loads(json.dumps(rng.choice(PUBLISHED)))
        for _ in range(rng.randint(1, 2)):
            alter(rng, row)
        return json.dumps(row).encode(), False
    if kind == "key":
        key = rng.choice((*row, "new", "subset", "attempts"))
        if rng.random() < 0.3:
            row.pop(key, None)
            return json.dumps(row).encode(), key in ("id", "task", "prompt", "label")
        row[key] = rng.choice(JUNK)
        return json.dumps(row).encode(), False
    if kind == "text":
        field = rng.choice(("prompt", "rationale", "captions"))
        bad = rng.choice((*TAGS, "\ud83d"))
        text = f"so{bad}so"
        row[field] = [text] * len(row["captions"]) if field == "captions" else text
        return json.dumps(row).encode(), field != "captions" or bool(row["captions"])
    if kind == "place":
        path = rng.choice(("../../../../etc/passwd.png", "/etc/hostname", "/dev/zero", "..", "/",
                           "a" * 999, "\x00", "\ud83d.png", "media/../../../x.png"))
        row["media"] = [path] * len(row["media"])
        return json.dumps(row).encode(), bool(row["media"])
    line = bytearray(json.dumps(row).encode())
    if kind == "bytes":
        return one_line(rng.randbytes(rng.randint(1, 200))), True
    for _ in range(rng.randint(1, 5)):
        at = rng.randrange(len(line))
        line[at:at + rng.randint(0, 3)] = one_line(rng.randbytes(rng.randint(0, 2)))
    return bytes(line), False


def one_line(content):
    return content.replace(b"\n", b"").replace(b"\r", b"")


def alter(rng, value):
    """Put junk at a random place of a nested value."""
    keys = list(value) if isinstance(value, dict) else list(range(len(value)))
    key = rng.choice(keys)
    if isinstance(value[key], (dict, list)) and value[key] and rng.random() < 0.6:
        alter(rng, value[key])
    elif isinstance(value, dict) and rng.random() < 0.2:
        del value[key]
    else:
        value[key] = rng.choice(JUNK)


def wrong_with(row, folder):
    """What a row that was taken must not have, told without the code that took it. -> text or ''"""
    texts = [row["prompt"], *(row["responses"] or ()), *row["captions"]]
    if row["task"] not in common.TASKS or row["label"] not in ("A", "B"):
        return "task or label"
    if row["task"].endswith("understanding") or row["task"] == "text":
        if len(row["responses"]) != 2:
            return "responses"
    elif row["responses"] or len(row["media"]) != 2:
        return "candidates"
    for text in texts:
        if not isinstance(text, str) or not text.strip() or any(tag in text for tag in TAGS):
            return "text"
    for medium in row["media"]:
        if not os.path.realpath(medium).startswith(os.path.realpath(folder) + os.sep):
            return "place"
    json.dumps(row, ensure_ascii=False).encode()  # it may have to be written
    return "" if row["tokens"] > 0 and isinstance(row["id"], str) else "length or id"


def fuzz_rows(n, encoder, folder, rng):
    """n altered rows -> (Counter of refused, used, none: a tie, problems)"""
    folder = small_world(folder)
    good = []
    for name in ("text_rl", "mm_rl", "sft", *(f"heldout_{task}" for task in common.TASKS)):
        good += lines(folder / f"{name}.jsonl")
    for name, colour in (("a", "red"), ("b", "blue")):
        Image.new("RGB", (32, 32), colour).save(folder / f"{name}.png")
    made = [fuzzed_row(rng, good) for _ in range(n)]
    path = folder / "fuzzed.jsonl"
    path.write_bytes(b"".join(line + b"\n" for line, _ in made))
    must = {}  # line number -> must it be refused?
    for number, (_, refused) in enumerate(made, 1):
        must[number] = refused
    counts, problems, used = Counter(), [], 0
    roots = data.media_roots(str(path))
    for where, raw in data.file_rows(path):
        number = int(where.rpartition(":")[2])
        try:
            rows = list(data.checked(raw, where, folder, roots, encoder, "pixels", {}))
        except common.BadRow as e:
            counts["refused"] += 1
            if not str(e).strip():
                problems.append(f"{where}: no word why")
            continue
        except Exception as e:
            line = made[number - 1][0][:300]
            problems.append(f"{where}: {type(e).__name__}: {str(e)[:300]} of {line}")
            continue
        counts["used" if rows else "a tie"] += 1
        used += len(rows)
        wrong = [wrong_with(row, folder) for row in rows]
        if must[number] or any(wrong):
            problems.append(f"{where}: used in spite of {wrong}: {made[number - 1][0][:300]}")
    # and all of it through the door that users take
    if not problems and used != len(data.load_rows(str(path), encoder, skip_bad_rows=True,
                                                      quiet=True)):
        problems.append("load_rows() takes other rows")
    return counts, problems


# ==================================================================================================
# 3. Media

class TooLong(BaseException):
    """Not an Exception, which a reader might take for a broken file."""


SECONDS = 20  # what no medium of a few kilobytes may take


def ring(*_):
    raise TooLong


def whole_media(folder):
    """-> {name: bytes} of good pictures and videos of several formats"""
    rng = np.random.default_rng(0)
    picture = Image.fromarray(rng.integers(0, 255, (48, 64, 3), dtype=np.uint8))
    media = {}
    for suffix in ("png", "jpg", "gif", "webp", "bmp", "tiff"):
        buffer = io.BytesIO()
        picture.save(buffer, {"jpg": "JPEG"}.get(suffix, suffix.upper()))
        media[f"whole.{suffix}"] = buffer.getvalue()
        (folder / f"whole.{suffix}").write_bytes(buffer.getvalue())
    for suffix, codec in (("mp4", "mpeg4"), ("mkv", "mpeg4"), ("avi", "mjpeg"), ("webm", "vp8")):
        pixels = "yuvj420p" if codec == "mjpeg" else "yuv420p"
        try:
            write_video(folder / f"whole.{suffix}", 9, codec=codec, pixels=pixels)
        except (av.FFmpegError, ValueError):  # a build without this codec
            continue
        media[f"whole.{suffix}"] = (folder / f"whole.{suffix}").read_bytes()
    return media


CUT_IS_SEEN = ("png", "jpg", "webp", "bmp", "tiff", "mp4")  # others have no length to miss


def fuzzed_medium(rng, media):
    """-> (suffix, bytes, must it be refused?)"""
    name = rng.choice(sorted(media))
    content, suffix = bytearray(media[name]), name.rpartition(".")[2]
    kind = rng.choice(("cut", "flipped", "zeros", "other name", "inside", "text"))
    at = rng.randrange(len(content))
    if kind == "cut":
        at = rng.randrange(len(content) * 9 // 10)
        return suffix, bytes(content[:at]), suffix in CUT_IS_SEEN or at < 20
    if kind == "flipped":
        for _ in range(rng.randint(1, 40)):
            content[rng.randrange(len(content))] ^= 1 << rng.randrange(8)
    if kind == "zeros":
        content[at:at + 500] = bytes(len(content[at:at + 500]))
    if kind == "other name":
        suffix = rng.choice(sorted(media)).rpartition(".")[2]
    if kind == "inside":
        content[at:at] = rng.randbytes(rng.randint(1, 300))
    if kind == "text":
        text = rng.choice(("", "hello", "<svg></svg>", "%!PS-Adobe-3.0 EPSF-3.0\nshowpage\n",
                           "#EXTM3U\n#EXTINF:1,\nwhole.mp4\n#EXT-X-ENDLIST\n",
                           "ffconcat version 1.0\nfile whole.mp4\n", "file:whole.mp4"))
        return suffix, text.encode(), True
    return suffix, bytes(content), False


def odd_files(folder):
    """-> paths of what is no file with a picture in it, though it has its name"""
    outside = folder.parent / "outside.png"
    Image.new("RGB", (9, 9)).save(outside)
    (folder / "folder.png").mkdir()
    os.mkfifo(folder / "pipe.png")
    os.mkfifo(folder / "pipe.mp4")
    for name, target in (("loop.png", "loop.png"), ("zero.png", "/dev/zero"),
                         ("zero.mp4", "/dev/zero"), ("out.png", outside), ("nothing.mp4", "none")):
        (folder / name).symlink_to(target)
    names = ("folder.png", "pipe.png", "pipe.mp4", "loop.png", "zero.png", "zero.mp4", "out.png",
             "nothing.mp4")
    return [folder / name for name in names]


def fuzz_media(n, encoder, folder, rng):
    """n altered media, and the odd files -> (Counter of refused and used, problems, seconds that
    the slowest took)"""
    folder.mkdir(parents=True, exist_ok=True)
    media = whole_media(folder)
    paths = []  # (path, must it be refused?)
    for k in range(n):
        suffix, content, must = fuzzed_medium(rng, media)
        (folder / f"{k}.{suffix}").write_bytes(content)
        paths.append((folder / f"{k}.{suffix}", must))
    paths += [(path, True) for path in odd_files(folder)]
    paths += [(folder / name, False) for name in media]
    counts, problems, slowest = Counter(), [], 0.0
    roots, before = data.media_roots(f"{folder}/rows.jsonl"), signal.signal(signal.SIGALRM, ring)
    for path, must in paths:
        video = path.suffix in (".mp4", ".mkv", ".avi", ".webm")
        row = {"id": path.name, "task": f"{'video' if video else 'image'}_understanding",
               "prompt": "Why ?", "responses": ["a", "b"], "label": "A", "media": [path.name]}
        began = time.time()
        signal.alarm(SECONDS)
        try:
            list(data.checked(row, f"{path}:1", folder, roots, encoder, "pixels", {}))
            counts["used"] += 1
            if must:
                problems.append(f"{path}: used")
        except common.BadRow as e:
            counts["refused"] += 1
            if path.name not in str(e):
                problems.append(f"{path} is not named: {e}")
            if path.name in media:
                problems.append(f"{path} is good: {e}")
        except TooLong:
            problems.append(f"{path}: more than {SECONDS} seconds")
        except Exception as e:
            problems.append(f"{path}: {type(e).__name__}: {e}")
        signal.alarm(0)
        slowest = max(slowest, time.time() - began)
    signal.signal(signal.SIGALRM, before)
    return counts, problems, slowest


# ==================================================================================================

def main():
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=20, help="SIGKILLs for each script")
    parser.add_argument("--terms", type=int, default=5, help="SIGTERMs for each script")
    parser.add_argument("--scripts", nargs="*", help="these only; without a name none is killed")
    parser.add_argument("--rows", type=int, default=1000, help="altered rows; 0: none")
    parser.add_argument("--media", type=int, default=300, help="altered media files; 0: none")
    parser.add_argument("--ranks", type=int, default=1, help="1: two processes, of which one dies")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    torch.set_num_threads(1)
    rng, began = random.Random(args.seed), time.time()
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        os.chdir(folder)  # media_cache/ is made here
        wrong = fuzz(args, folder, rng)
        if args.ranks:
            wrong += kill_ranks(folder)
        names = list(runs_of(folder)) if args.scripts is None else args.scripts
        if names:
            wrong += kill_scripts(names, args.kills, args.terms, folder, rng)
    print(f"{wrong} problems, {(time.time() - began) / 60:.1f} minutes")
    sys.exit(wrong > 0)


def fuzz(args, folder, rng):
    """Rows and media. -> number of problems"""
    encoder, wrong = common.load(PREBUILT)[1], 0
    print("| altered | refused | used | a tie | problems | slowest, seconds |\n"
          "|---|--:|--:|--:|--:|--:|")
    for name, n, fuzz_them in (("rows", args.rows, fuzz_rows), ("media", args.media, fuzz_media)):
        if n:
            counts, problems, *slowest = fuzz_them(n, encoder, folder / name, rng)
            print(f"| {name} | {counts['refused']} | {counts['used']} | {counts['a tie']} | "
                  f"{len(problems)} | {f'{slowest[0]:.2f}' if slowest else '-'} |", flush=True)
            for problem in problems:
                print(problem, file=sys.stderr)
            wrong += len(problems)
    return wrong


if __name__ == "__main__":
    main()
