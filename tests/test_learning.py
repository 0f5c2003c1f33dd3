"""
The toy world's promises, and a short run of all stages as a user starts them. Stages 0 to 2 must
learn what they are for, 2b the <caption>; so short a 2b and 3 must not lose the judgement.
"""

import json
import subprocess
import sys

import pytest
import toy_world
from helpers import ROOT, lines, write


def run(*args):
    """python ARGS as a user runs it, on all the threads and GPUs there are. -> what it printed"""
    done = subprocess.run([sys.executable, *map(str, args)], cwd=ROOT, text=True,
                          stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    assert done.returncode == 0, done.stdout[-3000:]
    return done.stdout


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    out = tmp_path_factory.mktemp("toy")
    run("tests/toy_world.py", "--out", out)
    return out


def test_the_prebuilt_backbone_reads_and_compares_but_does_not_judge():
    files = list(toy_world.PREBUILT.glob("*.safetensors"))
    assert len(files) == 1 and files[0].stat().st_size <= 2e6
    got = toy_world.check(n=100, quiet=True)
    reading = {k: v for k, v in got.items() if not k.startswith("verdict")}
    assert len(reading) == 16 and min(reading.values()) >= 90, reading
    described = [v for k, v in reading.items() if not k.endswith("pixels")]  # in words first
    assert len(described) == 12 and min(described) >= 95, reading
    judging = {k: v for k, v in got.items() if k.startswith("verdict")}
    assert len(judging) == 13 and 45 <= min(judging.values()) <= max(judging.values()) <= 55, got


def choose(path, key, wanted, out):
    """The first rows of a toy file with these values of a key, {value: how many}
    -> a file in the same folder, since paths of media are relative to it"""
    left, chosen = dict(wanted), []
    for row in lines(path):
        if left.get(row[key], 0) > 0:
            left[row[key]] -= 1
            chosen.append(row)
    assert not any(left.values()), left
    return write(path.parent / out, chosen)


def test_the_curriculum_learns(world, tmp_path):
    """Biased rationales -> text -> captions -> distillation -> pixels, as the README runs them but
    with larger rates, fewer rows and smaller batches. What the whole measures is in
    tests/RESULTS.md.

    Two choices of rows save time. Stage 0 reads all rows once, which teaches it to follow its
    checks, and then 1,400 of them at half the rate, of which every second one is a conflict: the
    annotators' bias is what it learns last. Stage 2 trains on pairs of pictures and of videos,
    where it is worst, and is judged on all four tasks. --micro_batch 2 is a fifth faster on a CPU.

    Seeds 0, 1, 2 passed (4aab1f7): bias 0.55, 0.57, 0.53; stage 1 from 0.73, 0.73, 0.65 to 0.91,
    0.97, 0.95, share of A 0.45, 0.51, 0.51; stage 2 +0.21, +0.10, +0.17; stage 3 +0.10, -0.01,
    -0.02: too short to learn, it must only do no harm.

    kills: advantages of the other sign (stage 1: 0.65 to 0.50, all B); a student that is not taught
    the caption (stage 3's first format: 0); a loss without its rewards (before = after)."""
    tasks = toy_world.common.TASKS

    def stage(script, start, data, heldout, *flags, name=None):
        """-> the run folder, held-out results before and after"""
        out = tmp_path / (name or script)
        run(f"{script}.py", "--model", start, "--data", data, "--heldout", heldout, "--out", out,
            *flags)
        result = json.loads((out / "stage.json").read_text())["heldout"]
        return out, result["before"], result["after"]

    def visual(result):
        return sum(result["tasks"][t] for t in tasks[1:]) / 4

    def heldout(n, of=tasks):
        return ",".join(f"{world}/heldout_{task}.jsonl:{n}" for task in of)

    rl = "--micro_batch", 2, "--eval_every", 0
    text = heldout(150, ["text"])
    biased = choose(world / "sft.jsonl", "subset",
                    {"conflict": 700, "helpful": 350, "plain": 350}, "biased.jsonl")
    taught, _, _ = stage("stage0_sft", world / "backbone", world / "sft.jsonl", "", "--epochs", 1,
                         "--batch_size", 16, "--lr", "4e-4", name="stage0_first")
    sft, _, _ = stage("stage0_sft", taught, biased, "", "--epochs", 1, "--batch_size", 16,
                      "--lr", "2e-4")

    rl_text, before, after = stage(
        "stage1_text_grpo", sft, f"{world}/text_rl.jsonl:500", text, *rl,
        "--batch_size", 16, "--max_steps", 18, "--lr", "1.2e-4")
    judged = json.loads(run("eval.py", "--model", sft, "--data", text, "--json").splitlines()[-1])
    assert judged["accuracy"] == pytest.approx(before["accuracy"])  # one evaluator, one number
    assert before["format"] >= 0.98 and 0.55 <= before["accuracy"] <= 0.80
    bias = judged["groups"]["helpful"] - judged["groups"]["conflict"]  # the annotators'
    assert bias >= 0.15  # which answer is flourished is all that tells the two apart
    assert after["accuracy"] >= before["accuracy"] + 0.10 and 0.4 <= after["share_a"] <= 0.6

    pairs = choose(world / "caption_rl.jsonl", "task",
                   {"image_generation": 100, "video_generation": 100}, "pairs.jsonl")
    captions, before, after = stage(
        "stage2_caption_grpo", rl_text, pairs, heldout(25, tasks[1:]), *rl, "--batch_size", 18,
        "--max_steps", 16, "--lr", "1e-4", "--replay", f"{world}/text_rl.jsonl:60")
    assert visual(after) >= visual(before) + 0.03

    student, _, _ = stage(
        "stage2b_cmkd", captions, f"{world}/caption_rl.jsonl:100,{world}/text_rl.jsonl:20", "",
        "--batch_size", 16, "--lr", "3e-4")

    pixels, before, after = stage(
        "stage3_mm_grpo", student, f"{world}/mm_rl.jsonl:200",
        f"{heldout(25, ['text'])},{heldout(15, tasks[1:])}", *rl, "--batch_size", 12,
        "--max_steps", 4, "--lr", "1e-4")
    first = lines(pixels / "metrics.jsonl")[0]
    assert first["rewards/format/mean"] >= 0.5  # the <caption>, asked for and taught
    assert visual(before) >= 0.65 and visual(after) >= visual(before) - 0.06
    assert after["tasks"]["text"] >= before["tasks"]["text"] - 0.08
