"""
The toy world's promises, and a short run of the two stages as a user starts them. A stage that runs
but does not learn fails here.
"""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import toy_world

ROOT = Path(__file__).resolve().parent.parent


def run(*args):
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
    assert len(reading) == 12 and min(reading.values()) >= 95, reading
    judging = {k: v for k, v in got.items() if k.startswith("verdict")}
    assert len(judging) == 9 and 45 <= min(judging.values()) <= max(judging.values()) <= 55, got


VISUAL = ["image_understanding", "image_generation", "video_understanding", "video_generation"]


def test_the_curriculum_learns(world, tmp_path):
    """Text -> captions -> distillation -> pixels as the README runs them, with larger rates and
    fewer steps and rows, so that it fits into CI; what the whole of it measures is in the README."""
    every = ",".join(f"{world}/heldout_{t}.jsonl:60" for t in ("text", *VISUAL))

    def stage(script, model, data, heldout, *flags):
        out = tmp_path / script
        run(f"{script}.py", "--model", model, "--data", data, "--heldout", heldout, "--out", out,
            "--eval_every", "0", *flags)
        return out, json.loads((out / "stage.json").read_text())["heldout"]
def test_stages_0_and_1_learn(world, tmp_path):
    """The README's run with a larger rate and fewer steps; what it measures is in the README."""
    sft, rl = tmp_path / "sft", tmp_path / "rl"
    heldout = world / "heldout_text.jsonl"
    run("stage0_sft.py", "--model", world / "backbone", "--data", world / "sft.jsonl",
        "--heldout", heldout, "--out", sft)
    before = json.loads((sft / "stage.json").read_text())["heldout"]["after"]
    assert before["format"] >= 0.98
    assert 0.60 <= before["accuracy"] <= 0.85  # the annotators' bias
    run("stage1_text_grpo.py", "--model", sft, "--data", world / "text_rl.jsonl",
        "--heldout", heldout, "--out", rl, "--max_steps", "20", "--lr", "5e-5", "--eval_every", "0")
    after = json.loads((rl / "stage.json").read_text())["heldout"]["after"]
    assert after["accuracy"] >= before["accuracy"] + 0.06
    assert 0.4 <= after["share_a"] <= 0.6
    judged = json.loads(run("eval.py", "--model", rl, "--data", heldout, "--json").splitlines()[-1])
    assert judged["accuracy"] == pytest.approx(after["accuracy"])  # one evaluator, one number
