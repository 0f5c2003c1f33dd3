"""
Whole runs: processes, resume after a kill, the copies of the GRPO block, the command line.

Runs are those of a user, in processes of their own where something is killed or several ranks are
at work, otherwise main() in this process, which saves the seconds of importing. "kills:" names
wrong versions of the source under which a test was seen to fail.
"""

import difflib
import itertools
import json
import pickle
import random
import re
import runpy
import signal
import subprocess
import sys
import time
from dataclasses import asdict, fields

import pytest
import toy_world
import torch
import transformers
from helpers import (
    ENV, PROGRAMS, RM_BENCH, ROOT, flags, lasting, lines, run_here, run_there, same_weights,
    small_world, teach, text_only_model, torchrun, weights_of)

import bt_reward
import common
import dt2it
from data import load_rows
import stage0_sft
import stage1_text_grpo as stage1
import stage2_caption_grpo as stage2
import stage2b_cmkd as cmkd
import stage3_mm_grpo as stage3

pytestmark = pytest.mark.usefixtures("cpu_only")


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """Rows, and a model that a few steps of stage 0 have taught to answer now A and now B and to
    stumble now and then: rewards differ within a group, and so do lengths."""
    folder = small_world(tmp_path_factory.mktemp("world"), sft=4, text_rl=40, heldout=3)
    teach(folder, batch_size=10, micro_batch=10, epochs=7)
    return folder


def stage1_flags(world, out, **more):
    """Arguments of a tiny stage 1."""
    tiny = {"model": world / "stage0", "data": world / "text_rl.jsonl", "heldout": "", "out": out,
            "batch_size": 4, "group_size": 5, "micro_batch": 2, "max_new_tokens": 9, "max_steps": 4,
            "save_every": 2, "log_rollouts_every": 1, "lr": 1e-3}
    return flags(**tiny | more)


# ---------------------------------------------------------------------------------------- processes
@pytest.fixture(scope="module")
def two_ranks(world, tmp_path_factory):
    """programs/two_ranks.py on 1 and on 2 processes."""
    out = tmp_path_factory.mktemp("ranks")
    script = PROGRAMS / "two_ranks.py"
    first = [world / "backbone", world, out]
    torchrun([script, *first, *stage1_flags(world, out / "run", max_steps=3, advantage="batch")])
    run_here(lambda: runpy.run_path(str(script), run_name="__main__"), first)
    return out


@pytest.mark.parametrize("normaliser", ["sequence", "token", "mini-batches"])
def test_one_gradient_on_one_and_two_processes(two_ranks, normaliser):
    # Ranks with unequal answers must share one denominator; a rank without an image has no gradient
    # of the vision tower and must still take part. kills: gradients averaged over ranks, count of
    # this rank alone, a parameter left out of the sum
    one, a, b = (torch.load(two_ranks / f"gradient-{name}.pt")[normaliser]
                 for name in ("1-0", "2-0", "2-1"))
    names = one["gradient"].keys()
    assert one["steps"] == a["steps"] == (2 if normaliser == "mini-batches" else 1)
    assert any("vision_tower" in k for k in names)
    assert names == a["gradient"].keys() == b["gradient"].keys()
    assert all(torch.equal(a["gradient"][k], b["gradient"][k]) for k in names)
    flat = [torch.cat([x["gradient"][k].flatten() for k in names]).double() for x in (one, a)]
    assert flat[0].norm() > 1e-3 and (flat[1] - flat[0]).norm() / flat[0].norm() < 1e-5
    # and the log tells of all processes, not of the first
    assert a["metrics"] == b["metrics"] and a["metrics"].keys() == one["metrics"].keys()
    for k, v in one["metrics"].items():
        assert a["metrics"][k] == pytest.approx(v, rel=1e-4, abs=1e-9), k


def test_ranks_hold_equal_weights(world, two_ranks):
    # kills: sum_gradients taken away, the step skipped on one rank, another normaliser
    a, b = (torch.load(two_ranks / f"run-{r}.pt") for r in (0, 1))
    assert len(a["lengths"]) == len(b["lengths"]) == 3
    assert a["lengths"] != b["lengths"], "lengths are to be uneven"
    assert a["weights"].keys() == b["weights"].keys()
    assert all(torch.equal(a["weights"][k], b["weights"][k]) for k in a["weights"])
    saved = common.load(two_ranks / "run")[0].state_dict()
    assert all(torch.equal(v, a["weights"][k]) for k, v in saved.items())
    assert not same_weights(two_ranks / "run", world / "stage0"), "nothing was learnt"
    total = [x + y for x, y in zip(a["lengths"], b["lengths"], strict=True)]
    assert [m["num_tokens"] for m in lines(two_ranks / "run" / "metrics.jsonl")] == total


def test_ranks_share_the_batch_but_not_the_seed(two_ranks):
    # kills: batch advantages from the rewards of one rank, the same generator on each rank
    a, b = (torch.load(two_ranks / f"run-{r}.pt") for r in (0, 1))
    assert len(set(a["seeds"] + b["seeds"])) == 6
    uneven = 0.0
    for x, y in zip(a["advantages"], b["advantages"], strict=True):
        assert x.shape == y.shape == (2, 5)
        assert abs(torch.cat([x, y]).mean().item()) < 1e-9
        uneven = max(uneven, abs(x.mean().item()))
    assert uneven > 0.01, "the case does not bite"


def test_torchrun_to_the_end(world, tmp_path):
    # The file itself, as the README says, with held-out rows dealt out to the processes.
    # kills: a rank that writes too, a gather of unequal shapes, rows judged twice or not at all
    out = tmp_path / "run"
    done = torchrun([ROOT / "stage1_text_grpo.py", *stage1_flags(
        world, out, max_steps=2, heldout=world / "heldout_text.jsonl", eval_batch=2)])
    assert [m["step"] for m in lines(out / "metrics.jsonl")] == [1, 2]
    assert done.stdout.count("wrote") == 1
    stage = json.loads((out / "stage.json").read_text())
    assert stage["step"] == 2 and stage["stage"] == "stage1_text_grpo"
    assert stage["heldout"]["before"]["n"] == stage["heldout"]["after"]["n"] == 3
    model, encoder = common.load(out)
    rows = load_rows(str(world / "heldout_text.jsonl"), encoder, quiet=True)
    preds = common.judge(model, encoder, rows, stage1.sample_group, max_new_tokens=9, batch_size=2)
    after = stage["heldout"]["after"]
    assert {**common.summarize(rows, preds), "tasks": {"text": after["accuracy"]}} == after


def test_a_batch_that_does_not_divide_is_refused(world, tmp_path, monkeypatch):
    # Uneven ranks would give groups of one rank more weight, or hang. kills: the check taken away
    monkeypatch.setenv("WORLD_SIZE", "3")
    with pytest.raises(SystemExit, match="4.*3 processes"):
        run_here(stage1.main, stage1_flags(world, tmp_path / "run"))


# ------------------------------------------------------------------------------------------- resume
@pytest.fixture(scope="module")
def unbroken(world, tmp_path_factory):
    """4 steps in one go."""
    out = tmp_path_factory.mktemp("unbroken") / "run"
    run_here(stage1.main, stage1_flags(world, out))
    metrics = lines(out / "metrics.jsonl")
    assert [m["step"] for m in metrics] == [1, 2, 3, 4]
    assert max(m["reward_std"] for m in metrics) > 0, "nothing to learn from: the tests are empty"
    assert not same_weights(out, world / "stage0")
    return out


def test_killed_twice_equals_unbroken(world, unbroken, tmp_path, capsys):
    # First after logging step 3 (only step 2 is saved), then half-way through writing the state of
    # step 4; then the same command. kills: state written in place, metrics not cut back, optimizer
    # state or step lost, sampling or data seeded by anything but the step
    script, out = PROGRAMS / "killed.py", tmp_path / "run"
    done = run_there([script, "logged 3", *stage1_flags(world, out)], False)
    assert done.returncode == -signal.SIGKILL
    assert len((out / "metrics.jsonl").read_text().splitlines()) == 4
    assert torch.load(out / "state.pt")["step"] == 2
    done = run_there([script, "saving 4", *stage1_flags(world, out)], False)
    assert done.returncode == -signal.SIGKILL and "after step 2" in done.stdout
    assert torch.load(out / "state.pt")["step"] == 2
    with pytest.raises((RuntimeError, EOFError, pickle.UnpicklingError)):
        torch.load(out / "state.pt.tmp")
    assert not (out / "stage.json").exists(), "an unfinished folder must not look like a checkpoint"
    capsys.readouterr()
    run_here(stage1.main, stage1_flags(world, out))
    assert "after step 2" in capsys.readouterr().out
    assert same_weights(out, unbroken)
    for name in ("metrics.jsonl", "rollouts.jsonl"):
        got, want = lines(out / name), lines(unbroken / name)
        assert [x["step"] for x in got] == [1, 2, 3, 4]
        assert [lasting(x) for x in got] == [lasting(x) for x in want]
    assert not (out / "state.pt.tmp").exists()


def test_a_smaller_rate_after_a_resume(world, tmp_path):
    # What the message about a broken gradient advises. kills: lr among the settings that must
    # agree, the old rate back from the optimizer's state
    rates, step = [], torch.optim.AdamW.step

    def watched(self, *args):
        rates.append(self.param_groups[0]["lr"])
        return step(self, *args)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.optim.AdamW, "step", watched)
        run_here(stage1.main, stage1_flags(world, tmp_path / "run", max_steps=2, lr=1e-3))
        run_here(stage1.main, stage1_flags(world, tmp_path / "run", max_steps=4, lr=1e-4))
    assert rates == [1e-3, 1e-3, 1e-4, 1e-4]


def test_a_model_that_samples_otherwise_than_it_trains_is_stopped(world, tmp_path, monkeypatch):
    # kills: training on log-probs that are nats off, as with a window that the mask overrides
    real = stage1.packed_logps

    def off(*args, **more):
        logp, *rest = real(*args, **more)
        return logp - 4.6, *rest
    monkeypatch.setattr(stage1, "packed_logps", off)
    with pytest.raises(SystemExit, match="differ by 4.6 nats"):
        run_here(stage1.main, stage1_flags(world, tmp_path / "run"))


def test_stopping_early_and_going_on_equals_unbroken(world, unbroken, tmp_path):
    # --max_steps may grow: 2 steps, then 4. kills: max_steps among the settings that must agree
    out = tmp_path / "run"
    for steps in (2, 4):
        run_here(stage1.main, stage1_flags(world, out, max_steps=steps))
        assert [m["step"] for m in lines(out / "metrics.jsonl")] == list(range(1, steps + 1))
    assert [lasting(m) for m in lines(out / "metrics.jsonl")] == [
        lasting(m) for m in lines(unbroken / "metrics.jsonl")]
    assert same_weights(out, unbroken)


def test_killed_at_any_moment(world, tmp_path):
    # The moment is drawn anew each time: in a forward, in a save, between the two.
    # kills: start at 0 in spite of the state
    out, draw, n = tmp_path / "run", random.SystemRandom(), 20
    args = stage1_flags(world, out, max_steps=n, save_every=1)
    process = subprocess.Popen([sys.executable, ROOT / "stage1_text_grpo.py", *map(str, args)],
                               env=ENV, cwd=ROOT, stdout=subprocess.DEVNULL,
                               stderr=subprocess.DEVNULL)
    step, delay, began = draw.randrange(2, n - 5), draw.uniform(0, 0.03), time.time()
    log = out / "metrics.jsonl"
    while not (log.exists() and log.read_bytes().count(b"\n") >= step):
        assert time.time() - began < 120 and process.poll() is None
        time.sleep(0.002)
    time.sleep(delay)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    at = torch.load(out / "state.pt")["step"]
    print(f"killed {delay:.3f} s after logging step {step}; step {at} was saved")
    assert step - 1 <= at < n
    before = lines(log)[:at]
    run_here(stage1.main, args)
    assert [m["step"] for m in lines(log)] == list(range(1, n + 1)) and lines(log)[:at] == before
    assert (out / "stage.json").exists() and torch.load(out / "state.pt")["step"] == n


def test_killed_before_the_first_save(world, unbroken, tmp_path, monkeypatch):
    # Nothing is saved yet, but steps are logged already: the run begins anew, and so must its log.
    out, real = tmp_path / "run", common.append

    def stopped(path, row):
        real(path, row)
        if path.name == "metrics.jsonl" and row["step"] == 2:
            raise KeyboardInterrupt
    monkeypatch.setattr(common, "append", stopped)
    with pytest.raises(KeyboardInterrupt):
        run_here(stage1.main, stage1_flags(world, out, save_every=3))
    monkeypatch.setattr(common, "append", real)
    assert not (out / "state.pt").exists() and len(lines(out / "metrics.jsonl")) == 2
    run_here(stage1.main, stage1_flags(world, out, save_every=3))
    for name in ("metrics.jsonl", "rollouts.jsonl"):
        assert [x["step"] for x in lines(out / name)] == [1, 2, 3, 4]
    assert same_weights(out, unbroken)


def test_half_a_state_beside_a_good_one_is_ignored(world, unbroken, tmp_path):
    # kills: the side file read when it is there, a side file that blocks the next save
    out = tmp_path / "run"
    run_here(stage1.main, stage1_flags(world, out, max_steps=2))
    (out / "state.pt.tmp").write_bytes((out / "state.pt").read_bytes()[:1000])
    run_here(stage1.main, stage1_flags(world, out))
    assert same_weights(out, unbroken) and not (out / "state.pt.tmp").exists()


@pytest.mark.parametrize("more, complaint", [({"beta": 0.1}, "beta 0.04 -> 0.1"),
                                             ({"beta": 0.0}, "beta 0.04 -> 0.0"),
                                             ({"seed": 1}, "seed 0 -> 1")])
def test_other_settings_are_refused(world, unbroken, more, complaint):
    # Half a run of each would be a run of neither. kills: settings not compared, one of them in
    # MAY_CHANGE
    before = {p.name: p.read_bytes() for p in unbroken.iterdir()}
    with pytest.raises(SystemExit) as stopped:
        run_here(stage1.main, stage1_flags(world, unbroken, max_steps=6, **more))
    assert complaint in str(stopped.value) and "--out" in str(stopped.value)
    assert {p.name: p.read_bytes() for p in unbroken.iterdir()} == before


def test_settings_of_memory_and_pace_may_change(world, tmp_path):
    # kills: micro_batch among the settings that must agree, though it changes no gradient
    out = tmp_path / "run"
    run_here(stage1.main, stage1_flags(world, out, max_steps=1))
    run_here(stage1.main, stage1_flags(world, out, max_steps=2, micro_batch=1, save_every=5))
    assert [m["step"] for m in lines(out / "metrics.jsonl")] == [1, 2]


def test_a_finished_run_is_not_trained_again(world, unbroken, capsys):
    # kills: start at 0 in spite of the state, metrics appended or emptied
    weights = weights_of(unbroken)
    kept = {n: (unbroken / n).read_bytes() for n in ("metrics.jsonl", "rollouts.jsonl", "state.pt")}
    run_here(stage1.main, stage1_flags(world, unbroken))
    assert "resuming" in capsys.readouterr().out
    assert {n: (unbroken / n).read_bytes() for n in kept} == kept
    again = weights_of(unbroken)
    assert all(torch.equal(again[name], weights[name]) for name in weights)


def test_stage0_resumes(world, tmp_path, monkeypatch):
    # Stage 0 shares the plumbing but has its own loop and a rate that depends on the step.
    # kills: warm-up from the resumed step, step not restored
    args = ["--model", world / "backbone", "--data", world / "text_rl.jsonl", "--heldout", "",
            "--target", "label", "--batch_size", 10, "--epochs", 2, "--save_every", 3, "--out"]
    run_here(stage0_sft.main, [*args, tmp_path / "unbroken"])
    real = common.append

    def stopped(path, row):
        real(path, row)
        if row["step"] == 5:
            raise KeyboardInterrupt
    monkeypatch.setattr(common, "append", stopped)
    with pytest.raises(KeyboardInterrupt):
        run_here(stage0_sft.main, [*args, tmp_path / "broken"])
    monkeypatch.setattr(common, "append", real)
    run_here(stage0_sft.main, [*args, tmp_path / "broken"])
    a, b = (lines(tmp_path / x / "metrics.jsonl") for x in ("unbroken", "broken"))
    assert [m["step"] for m in a] == list(range(1, 9)) and a[-1]["loss"] < a[0]["loss"]
    assert [lasting(m) for m in a] == [lasting(m) for m in b]
    assert same_weights(tmp_path / "unbroken", tmp_path / "broken")


# ------------------------------------------------------------------------------------------- copies
STAGES = ("stage1_text_grpo.py", "stage2_caption_grpo.py", "stage3_mm_grpo.py")
START, END = b"# --- same in stages 1, 2, 3: ", b"# --- end of "


def blocks(source):
    """The bytes between the marker lines: the equations, and how tokens get there."""
    assert source.count(START) == source.count(END) == 2, "each marker is to stand there twice"
    _, equations, tokens = source.split(START)
    return [part.split(END)[0].partition(b"\n")[2] for part in (equations, tokens)]


def test_copies_of_the_grpo_block_are_identical():
    # A correction in one stage only would be a bug in the others.
    ours, *others = [blocks((ROOT / name).read_bytes()) for name in STAGES]
    for place, names in enumerate((("advantages", "grpo_loss", "per_token", "grpo_update"),
                                   ("sample_group", "pack", "packed_logps", "describe"))):
        for name in names:
            assert f"def {name}(".encode() in ours[place]
        assert len(ours[place].splitlines()) > 100
        for stage, copies in zip(STAGES[1:], others, strict=True):
            pairs = zip(ours[place].split(b"\n"), copies[place].split(b"\n"), strict=False)
            first = [f"{n}: {b.decode()}" for n, (a, b) in enumerate(pairs, 1) if a != b]
            assert copies[place] == ours[place], f"{stage} differs in line {first or 'the last'}"


def test_equations_come_before_the_loop_and_tokens_after():
    # A reader meets the four lines of the paper before the first cache.
    for name in STAGES:
        source = (ROOT / name).read_text()
        order = ["def advantages(", "def grpo_loss(", "def grpo_update(", "def main(",
                 "def sample_group(", "def pack("]
        assert sorted(order, key=source.index) == order


def test_what_differs_between_stages_fits_on_a_screen():
    # `diff stage1 stage2` is to be read as the paper's section.
    texts = [(ROOT / name).read_text().splitlines() for name in STAGES]
    for one, other in itertools.pairwise(texts):
        changed = [line for line in difflib.ndiff(one, other) if line[0] in "+-"]
        assert len(changed) <= 100, len(changed)


def test_the_comparison_of_copies_sees_a_byte():
    source = (ROOT / STAGES[0]).read_bytes()
    assert blocks(source.replace(b"correction=0", b"correction=1", 1)) != blocks(source)
    assert blocks(source.replace(b"right after", b"just after", 1)) != blocks(source)
    assert blocks(source.replace(b"stage 1", b"stage 2")) == blocks(source)  # what stands outside
    with pytest.raises(AssertionError):
        blocks(source.replace(END, b"# ---"))


# ------------------------------------------------------------------------------------- command line
TRAINERS = (stage0_sft, stage1, stage2, cmkd, stage3, bt_reward, dt2it)


@pytest.mark.parametrize("wrong", [["--lrr", "1"], ["--max_step", "3"], ["--lr=1", "stray"],
                                   ["--no_such_flag"], ["--preset", "big"], ["--lr", "fast"]])
@pytest.mark.parametrize("script", TRAINERS)
def test_unknown_flags_are_errors(monkeypatch, capsys, script, wrong):
    # A flag that is mistyped and ignored wastes a night of training. kills: remaining strings
    # dropped, allow_abbrev (--max_step for --max_steps)
    monkeypatch.setattr(sys, "argv", ["stage.py", *wrong])
    with pytest.raises(SystemExit) as stopped:
        common.parse_config(script.Config, script.__doc__, script.PRESETS)
    assert stopped.value.code == 2
    message = capsys.readouterr().err
    assert wrong[0].split("=")[0] in message or wrong[-1] in message


@pytest.mark.parametrize("script, flag, choice", [
    (stage1, "advantage", "batch"), (stage1, "normaliser", "token"), (stage1, "reward", "script"),
    (stage0_sft, "target", "label"), (stage0_sft, "form", "caption"), (bt_reward, "t2i", "swap"),
    (bt_reward, "head_activation", "tanh")])
def test_mistyped_choices_are_errors(monkeypatch, capsys, script, flag, choice):
    # "--advantage Group" must not quietly train with batch advantages
    monkeypatch.setattr(sys, "argv", ["stage.py", f"--{flag}", choice])
    assert getattr(common.parse_config(script.Config, "", script.PRESETS), flag) == choice
    monkeypatch.setattr(sys, "argv", ["stage.py", f"--{flag}", choice.title()])
    with pytest.raises(SystemExit):
        common.parse_config(script.Config, "", script.PRESETS)
    assert choice in capsys.readouterr().err


@pytest.mark.parametrize("script, flag", [
    (stage0_sft, "epochs"), (stage2, "eval_rows"), (cmkd, "samples"), (cmkd, "frames"),
    (stage3, "frames"), (stage3, "max_tiles"), (bt_reward, "eval_batch"), (dt2it, "samples"),
    (dt2it, "frames")])
def test_nothing_of_it_is_an_error(monkeypatch, capsys, script, flag):
    # kills: videos of no frames, which a model judges without seeing anything
    monkeypatch.setattr(sys, "argv", ["stage.py", f"--{flag}", "0"])
    with pytest.raises(SystemExit):
        common.parse_config(script.Config, "", script.PRESETS)
    assert f"--{flag} must be at least 1" in capsys.readouterr().err


@pytest.mark.parametrize("target", ["rationale", "label"])
def test_stage_0_keeps_the_order_of_rationales_that_cannot_be_swapped(world, tmp_path, monkeypatch,
                                                                      target):
    # kills: swaps without can_swap() in stage 0, or no swaps where no rationale is shown
    asked, batch_of = [], common.batch_of
    monkeypatch.setattr(common, "batch_of", lambda *args: asked.append(args[4]) or batch_of(*args))
    run_here(stage0_sft.main, ["--model", world / "backbone", "--data", world / "sft.jsonl",
                               "--heldout", "", "--epochs", 1, "--batch_size", 2, "--target",
                               target, "--out", tmp_path / "run"])
    bare, named = {"rationale": "B is worse."}, {"rationale": "Response B is worse."}
    assert asked and (asked[0](bare), asked[0](named)) == (target == "label", True)


@pytest.mark.parametrize("script", TRAINERS)
def test_help_shows_defaults_and_the_papers_values(monkeypatch, capsys, script):
    # kills: a formatter without defaults, a bare % in a help text, a knob without a reason
    monkeypatch.setattr(sys, "argv", ["stage.py", "--help"])
    with pytest.raises(SystemExit) as stopped:
        common.parse_config(script.Config, script.__doc__, script.PRESETS)
    text = " ".join(capsys.readouterr().out.split())
    assert stopped.value.code == 0 and "%%" not in text
    for field in fields(script.Config):
        assert f"--{field.name} " in text and len(field.metadata["help"]) > 10
    assert f"(default: {script.Config().lr})" in text
    rate = f"{getattr(script, 'PAPER', bt_reward.DT2IT)['lr']:g}".replace("e-0", "e-")
    assert re.search(rf"paper: {rate}\b", text)


def test_paper_preset(monkeypatch):
    # kills: preset applied after the flags, or not at all
    def parse(*args):
        monkeypatch.setattr(sys, "argv", ["stage.py", *args])
        return common.parse_config(stage1.Config, "", stage1.PRESETS)
    toy, paper = parse(), parse("--preset", "paper")
    assert toy == stage1.Config() and parse("--preset", "toy") == toy
    assert paper.lr == 1e-6 and paper.group_size == 8 and paper.batch_size * paper.group_size == 128
    assert asdict(paper) == {**asdict(toy), **stage1.PAPER}
    for args in (["--preset", "paper", "--lr", "3e-4"], ["--lr", "3e-4", "--preset=paper"]):
        assert asdict(parse(*args)) == {**asdict(paper), "lr": 3e-4}
    assert parse("--scale_std", "false").scale_std is False


@pytest.mark.parametrize("more", [
    {"sigma": 0}, {"pre_clip": 0}, {"beta": 0}, {"advantage": "batch"}, {"scale_std": "false"},
    {"normaliser": "token"}, {"reward": "script"}, {"updates_per_rollout": 2},
    {"gradient_checkpointing": "true"}, {"temperature": 0.6, "clip_high": 0.28}],
    ids=lambda more: " ".join(f"--{k} {v}" for k, v in more.items()))
def test_every_knob_runs(world, tmp_path, more):
    # What the papers ablate is at least carried through, and the log is complete and finite.
    # kills: a reference needed at --beta 0, a temperature forgotten by sampler or scorer
    out = tmp_path / "run"
    run_here(stage1.main, stage1_flags(world, out, max_steps=2, **more))
    for metrics in lines(out / "metrics.jsonl"):
        assert all(v == v and abs(v) < float("inf") for v in metrics.values())
        assert ("kl" in metrics) == (more.get("beta") != 0)
        assert metrics["sampling/sampling_logp_difference/mean"] < 1e-4
        assert {"reward", "reward_std", "rewards/format/mean", "rewards/accuracy/mean", "entropy",
                "rewards/format/std", "rewards/accuracy/std", "frac_reward_zero_std", "grad_norm",
                "clip_ratio/low_mean", "clip_ratio/high_mean", "pre_clip_ratio", "filter_ratio",
                "completions/mean_length", "completions/clipped_ratio", "share_a", "num_tokens",
                "tokens_per_second", "peak_memory_gb", "step_time", "loss"} <= metrics.keys()


def test_log_agrees_with_the_answers(world, unbroken, tmp_path, monkeypatch):
    # With one prompt per step rollouts.jsonl holds all that metrics.jsonl sums up. kills: rewards
    # of another row's answers, weights of the scheme lost, truncated and ended exchanged
    out, real, ended = tmp_path / "run", stage1.sample_group, []

    def watched(model, encoder, *args):
        rollout = real(model, encoder, *args)
        group, = rollout.ids
        ended.append([ids[-1] in encoder.eos_ids for ids in group])
        return rollout
    monkeypatch.setattr(stage1, "sample_group", watched)
    # this model never thinks, so let something else than <think> be the form
    monkeypatch.setitem(stage1.REWARDS, "format", lambda text, row: float("B" in text))
    run_here(stage1.main, stage1_flags(world, out, batch_size=1, max_steps=6, reward="script",
                                       max_new_tokens=6))
    rollouts, metrics = lines(out / "rollouts.jsonl"), lines(out / "metrics.jsonl")
    rows = {r["id"]: r for r in lines(world / "text_rl.jsonl")}
    assert len(rollouts) == len(metrics) == 6
    for r, m, end in zip(rollouts, metrics, ended, strict=True):
        row = rows[r["id"]]
        shown = row if row["label"] == r["label"] else common.swap({**row, "media": []})
        assert r["prompt"] == common.render(shown)  # the label follows the order that is shown
        right = [float(common.parse(t).verdict == r["label"]) for t in r["answers"]]
        form = [float("B" in t) for t in r["answers"]]
        assert r["rewards"] == {"format": form, "accuracy": right} and len(right) == 5
        total = [0.2 * f + a for f, a in zip(form, right, strict=True)]
        assert r["reward"] == pytest.approx(total)
        assert m["reward"] == pytest.approx(sum(total) / 5)
        assert m["rewards/accuracy/mean"] == pytest.approx(sum(right) / 5)
        assert m["frac_reward_zero_std"] == float(len(set(total)) == 1)
        want, _ = stage1.advantages(torch.tensor([total]).double(), None, "group", True, 3)
        assert r["advantages"] == pytest.approx(want[0].tolist(), abs=1e-6)
        assert m["completions/clipped_ratio"] == pytest.approx(end.count(False) / 5)
        verdicts = [common.parse(t).verdict for t in r["answers"]]
        stated = 5 - verdicts.count(None)
        assert m["share_a"] == pytest.approx(verdicts.count("A") / max(1, stated))
    for r in lines(unbroken / "rollouts.jsonl"):  # of 4 prompts per step
        right = [float(common.parse(t).verdict == r["label"]) for t in r["answers"]]
        assert r["rewards"]["accuracy"] == right
    assert len({m["reward"] for m in metrics}) > 1
    assert any(0.5 != m["completions/clipped_ratio"] > 0 for m in metrics)


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="elsewhere it may be inherited")
def test_peak_memory_is_that_of_this_process():
    # kills: ru_maxrss, which a process inherits from the one that started it; kilobytes for bytes
    filled = b"x" * 1_000_000_000  # this process, which starts the other one
    del filled
    script = ("import common; a = common.peak_memory_gb(); x = b'x' * 300_000_000; del x; "
              "print(a, common.peak_memory_gb())")
    before, after = map(float, run_there(["-c", script]).stdout.split())
    assert 0.1 < before < 0.9 and 0.1 < after - before < 0.35


@pytest.mark.parametrize("system, told", [("darwin", 3.0), ("freebsd", 3072.0)])
def test_peak_memory_elsewhere(monkeypatch, system, told):
    # macOS tells bytes. kills: KiB everywhere
    class Usage:
        ru_maxrss = 3_000_000_000
    monkeypatch.setattr(common.Path, "exists", lambda path: False)
    monkeypatch.setattr(common.sys, "platform", system)
    monkeypatch.setattr("resource.getrusage", lambda whose: Usage)
    assert common.peak_memory_gb() == pytest.approx(told)


def test_a_tracker_is_told_what_metrics_jsonl_says(world, tmp_path):
    # kills: a tracker that replaces the file, one that is told another step, a name that is changed
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    out = tmp_path / "run"
    run_here(stage1.main, stage1_flags(world, out, max_steps=3, tracker="tensorboard"))
    events = accumulator.EventAccumulator(str(out / "tensorboard"))
    events.Reload()
    metrics = lines(out / "metrics.jsonl")
    assert set(events.Tags()["scalars"]) == set(metrics[0]) and len(metrics) == 3
    for name in metrics[0]:
        told = [(event.step, event.value) for event in events.Scalars(name)]
        in_file = [m for m in metrics if name in m]  # of the first step there is more
        assert told == [(m["step"], pytest.approx(m[name], rel=1e-6)) for m in in_file]


def test_a_tracker_that_is_not_installed_is_named(world, tmp_path, monkeypatch):
    # kills: a run that ends with ModuleNotFoundError after its first step
    monkeypatch.setattr(common, "find_spec", lambda name: None)
    with pytest.raises(SystemExit, match="pip install wandb"):
        run_here(stage1.main, stage1_flags(world, tmp_path / "run", tracker="wandb"))
    assert not (tmp_path / "run").exists()


def test_logging_groups_changes_nothing(world, unbroken, tmp_path):
    # kills: a draw of the sampler's generator, a gradient, or an update between rollout and log
    run_here(stage1.main, stage1_flags(world, tmp_path / "run", log_rollouts_every=0))
    assert not (tmp_path / "run" / "rollouts.jsonl").exists()
    assert same_weights(tmp_path / "run", unbroken)
    assert [lasting(m) for m in lines(tmp_path / "run" / "metrics.jsonl")] == [
        lasting(m) for m in lines(unbroken / "metrics.jsonl")]


def test_a_logged_group_tells_what_the_step_did_to_its_tokens(world, tmp_path, monkeypatch):
    # The model of each step, one answer at a time without packing, and what the sampler returned.
    # kills: log-probs before the step for those after it, or of another prompt; tokens of one
    # answer with the log-probs of the next; the sampler's temperature forgotten
    out, real, rollouts = tmp_path / "run", stage1.sample_group, []

    def watched(*args):
        rollouts.append(real(*args))
        return rollouts[-1]
    monkeypatch.setattr(stage1, "sample_group", watched)
    changed = 0.0
    for step in (1, 2):
        run_here(stage1.main, stage1_flags(world, out, max_steps=step, temperature=0.8))
        model, encoder = common.load(out)
        logged = lines(out / "rollouts.jsonl")[-1]
        prompt = encoder.encode(logged["prompt"]).ids
        texts = [[encoder.decode(ids) for ids in group] for group in rollouts[-1].ids]
        b = texts.index(logged["answers"])
        answers = rollouts[-1].ids[b]
        assert logged["step"] == step and len(answers) == 5
        for g, ids in enumerate(answers):
            whole = encoder.tokenizer.decode(ids, skip_special_tokens=False)
            assert "".join(logged["tokens"][g]) == whole and len(logged["tokens"][g]) == len(ids)
            assert logged["logp_sampled"][g] == pytest.approx(rollouts[-1].logp[b][g], abs=1e-5)
            with torch.no_grad():
                logits = model(input_ids=torch.tensor([prompt + ids])).logits[0].float() / 0.8
            logits[:, encoder.image_token_id] = -torch.inf
            logp = logits[len(prompt) - 1:-1].log_softmax(-1)
            after = [logp[t, token].item() for t, token in enumerate(ids)]
            assert logged["logp_after"][g] == pytest.approx(after, abs=1e-4)
            changes = zip(after, logged["logp_sampled"][g], strict=True)
            changed = max(changed, *[abs(a - b) for a, b in changes])
    assert changed > 0.01, "the case does not bite"


def test_the_logged_group_is_the_first_that_teaches(world, tmp_path, monkeypatch):
    # Of 4 prompts only the third has answers of unequal reward; in the second step none has.
    # kills: the first prompt, though its answers are alike, as most are late in a run
    asked, batches, batch_of = [], [], common.batch_of

    def reward(text, row):
        asked.append(row["id"])
        return float(len(asked) == 13)
    monkeypatch.setattr(stage1, "REWARDS", {"format": reward, "accuracy": lambda text, row: 0.0})
    monkeypatch.setattr(common, "batch_of", lambda *a: batches.append(batch_of(*a)) or batches[-1])
    run_here(stage1.main, stage1_flags(world, tmp_path / "run", max_steps=2))
    first, second = lines(tmp_path / "run" / "rollouts.jsonl")
    assert (first["id"], second["id"]) == (batches[0][2]["id"], batches[1][0]["id"])
    assert first["reward"] == first["rewards"]["format"] == [0, 0, 1, 0, 0]
    assert first["label"] == batches[0][2]["label"] and second["advantages"] == [0.0] * 5


def test_a_character_of_several_tokens_is_logged_once(loaded):
    # kills: each token decoded alone, so that an umlaut is two broken characters
    model, encoder = loaded
    text = "é 😀 blue"
    ids, prompt = encoder.answer_ids(text), encoder.encode("Why ?")
    assert len(ids) > len(text), "the tokenizer has to go byte by byte here"
    sampled = [[0.0] * len(ids), [0.0] * 4]
    log = stage1.logged_tokens(model, encoder, prompt, [ids, ids[:4]], sampled,
                               stage1.Config())
    end = encoder.tokenizer.decode(ids[-1:])
    assert "".join(log["tokens"][0]) == text + end and len(log["tokens"][0]) == len(ids)
    assert log["logp_after"][1] == pytest.approx(log["logp_after"][0][:4], abs=1e-4)
    assert "".join(log["tokens"][1]) == "é "  # and half a face is none


# ----------------------------------------------------------------------------- real models and data
def test_a_text_only_model_trains(world, tmp_path):
    # Any causal LM made by plain save_pretrained runs stages 0 and 1. kills: vision parts taken for
    # granted in freeze_vision, in the encoder, in the image token
    tok = toy_world.make_tokenizer()
    torch.manual_seed(0)
    model = text_only_model(tok, tie_word_embeddings=False)
    model.save_pretrained(tmp_path / "plain")
    tok.save_pretrained(tmp_path / "plain")
    run_here(stage0_sft.main, [
        "--model", tmp_path / "plain", "--data", world / "text_rl.jsonl", "--heldout", "", "--out",
        tmp_path / "stage0", "--target", "label", "--batch_size", 10, "--epochs", 6, "--lr", 1e-2])
    run_here(stage1.main, stage1_flags(world, tmp_path / "run", model=tmp_path / "stage0",
                                       max_steps=1))
    trained = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "run")
    assert type(trained).__name__ == "Qwen3ForCausalLM"
    assert not same_weights(tmp_path / "run", tmp_path / "stage0")
    assert lines(tmp_path / "run" / "metrics.jsonl")[0]["grad_norm"] > 0


@pytest.mark.skipif(not RM_BENCH.exists(), reason="the public file is not here")
def test_rm_bench_trains(world, tmp_path, capsys):
    # Real text as bytes; over-long prompts are skipped and counted, never cut. kills: prompts cut
    # at max_prompt_tokens, long ones kept, the three styles not paired
    items = json.loads(RM_BENCH.read_text())[:30]
    part = tmp_path / "rm_bench.json"
    part.write_text(json.dumps(items))
    _, encoder = common.load(world / "stage0")
    lengths = [r["tokens"] for r in load_rows(str(part), encoder, quiet=True)]
    short = sum(n <= 900 for n in lengths)
    assert len(lengths) == 9 * 30 and 2 <= short < len(lengths)
    capsys.readouterr()
    run_here(stage1.main, stage1_flags(world, tmp_path / "run", data=part, batch_size=2,
                                       max_steps=1, max_prompt_tokens=900, temperature=1.5))
    printed = capsys.readouterr().out
    assert f"{short} rows" in printed and f"{len(lengths) - short} skipped" in printed
    metrics, = lines(tmp_path / "run" / "metrics.jsonl")
    assert metrics["num_tokens"] >= 2 * 5 and (tmp_path / "run" / "stage.json").exists()


def test_missing_input_names_the_remedy(world, tmp_path):
    # kills: a stack trace where a newcomer has only forgotten the step before
    cases = [({"model": tmp_path / "none"}, "stage0_sft.py"),
             ({"data": tmp_path / "none.jsonl"}, "toy_world.py"),
             ({"out": world / "text_rl.jsonl" / "run"}, "--out")]
    for more, remedy in cases:
        args = {"out": tmp_path / "run", **more}
        with pytest.raises(SystemExit, match=re.escape(remedy)):
            run_here(stage1.main, stage1_flags(world, args.pop("out"), **args))
