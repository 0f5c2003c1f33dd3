"""
Runs that somebody ends, gradients that are no numbers, full disks, processes that die, states of
something else; and the short form of faults.py. "kills:" names wrong versions of the source under
which a test was seen to fail.
"""

import copy
import os
import pickle
import random
import resource
import signal
import time
from contextlib import contextmanager
from pathlib import Path

import faults
import pytest
import toy_world
import torch
from helpers import (
    PROGRAMS, TESTS, flags, lasting, lines, run_here, run_there, same_weights, small_world,
    text_only_model, torchrun)

import bt_reward
import common
import stage0_sft
import stage1_text_grpo as stage1

pytestmark = pytest.mark.usefixtures("cpu_only")
FULL = "/dev/full"  # whatever is written there fails as on a full disk


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    return small_world(tmp_path_factory.mktemp("world"), text_rl=12, mm_rl=6)


@pytest.fixture(autouse=True)
def rewards_differ(monkeypatch):
    """The model's answers are cut after 9 tokens; something is to be learned from them."""
    monkeypatch.setitem(stage1.REWARDS, "format", lambda text, row: float(len(text) % 3))


def settings_of(world, script):
    """A run of 4 steps that saves nothing in between."""
    tiny = {"model": toy_world.PREBUILT, "heldout": "", "lr": 1e-3, "batch_size": 3,
            "data": world / "text_rl.jsonl", "save_every": 9}
    if script is stage1:
        return tiny | {"group_size": 3, "micro_batch": 2, "max_steps": 4, "max_new_tokens": 9}
    if script is stage0_sft:
        return tiny | {"target": "label", "epochs": 1}
    return tiny | {"data": world / "mm_rl.jsonl", "epochs": 2}


def run(world, script, out, **more):
    run_here(script.main, flags(**settings_of(world, script) | more, out=out))


# ------------------------------------------------------------------------------------------ SIGTERM
@pytest.mark.parametrize("script", [stage0_sft, stage1, bt_reward],
                         ids=lambda script: script.__name__)
def test_sigterm_saves_and_the_same_command_goes_on(world, tmp_path, monkeypatch, capsys, script):
    # In the middle of the second of four steps. kills: no save, a save of the step before, exit
    # code 0 (`stage1 && stage2` would go on), a checkpoint of half a run, a handler left behind
    run(world, script, tmp_path / "unbroken")
    batch_of = common.batch_of

    def ended(rows, step, *settings):
        if step == 1:
            os.kill(os.getpid(), signal.SIGTERM)
        return batch_of(rows, step, *settings)
    monkeypatch.setattr(common, "batch_of", ended)
    capsys.readouterr()
    with pytest.raises(SystemExit) as stopped:
        run(world, script, tmp_path / "ended")
    assert stopped.value.code == 143
    assert "after step 2, which is saved; the same command goes on" in capsys.readouterr().out
    assert torch.load(tmp_path / "ended" / "state.pt")["step"] == 2
    assert [m["step"] for m in lines(tmp_path / "ended" / "metrics.jsonl")] == [1, 2]
    assert not (tmp_path / "ended" / "stage.json").exists()
    del stopped
    monkeypatch.setattr(common, "batch_of", batch_of)
    run(world, script, tmp_path / "ended")
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL
    ours, theirs = (lines(tmp_path / name / "metrics.jsonl") for name in ("ended", "unbroken"))
    assert len(ours) == 4 and list(map(lasting, ours)) == list(map(lasting, theirs))
    assert same_weights(tmp_path / "ended", tmp_path / "unbroken")
    assert not same_weights(tmp_path / "ended", toy_world.PREBUILT)


@pytest.mark.parametrize("seconds, ends", [(0, False), (4.9, False), (5.1, True)])
def test_the_second_sigterm_ends_at_once_unless_it_is_the_same(monkeypatch, seconds, ends):
    # SLURM sends it to all processes, and torchrun, which is one of them, passes it on to its own.
    # kills: a second one that ends the process in the middle of its save; one that is never heard
    now, sent = [100.0], []
    monkeypatch.setattr(common.time, "monotonic", lambda: now[0])
    monkeypatch.setattr(common.os, "kill", lambda *call: sent.append(call))
    steps = common.progress(0, 3, "x")
    for step in steps:
        if step == 0:
            signal.raise_signal(signal.SIGTERM)
            now[0] += seconds
            signal.raise_signal(signal.SIGTERM)
            assert sent == [(os.getpid(), signal.SIGTERM)] * ends
            assert steps.stop_asked()
            break
    signal.signal(signal.SIGTERM, signal.SIG_DFL)


def test_a_sigterm_after_the_last_question_is_not_lost(monkeypatch):
    # kills: one that is noted and forgotten, so that minutes of held-out rows follow
    sent = []
    monkeypatch.setattr(common.os, "kill", lambda *call: sent.append(
        (*call, signal.getsignal(signal.SIGTERM))))
    steps = common.progress(0, 2, "x")
    for step in steps:
        assert not steps.stop_asked()
        if step == 1:
            signal.raise_signal(signal.SIGTERM)
    assert sent == [(os.getpid(), signal.SIGTERM, signal.SIG_DFL)]


# -------------------------------------------------------------------------------- several processes
def rank_fault(world, out, *what, **more):
    """programs/rank_fault.py -> how it ended"""
    settings = settings_of(world, stage1) | {"batch_size": 2, "micro_batch": 1} | more
    return torchrun([PROGRAMS / "rank_fault.py", out, *what, "--",
                     *flags(**settings, out=out / "run")], check=False)


def weights_before(out, step):
    """-> what each of the two processes had before a step"""
    return [lines(out / f"weights-{rank}.jsonl")[step - 1] for rank in (0, 1)]


def test_sigterm_to_one_process_ends_both_after_the_same_step(world, tmp_path):
    # kills: the question asked of oneself, so that the other waits for ever
    done = rank_fault(world, tmp_path, "term@2")
    assert done.returncode != 0
    assert done.stdout.count("stopped by SIGTERM after step 2") == 1
    assert torch.load(tmp_path / "run" / "state.pt")["step"] == 2
    assert [m["step"] for m in lines(tmp_path / "run" / "metrics.jsonl")] == [1, 2]
    assert "exitcode  : 143" in done.stderr and not (tmp_path / "run" / "stage.json").exists()


def test_a_broken_gradient_skips_the_step_of_all_and_a_death_ends_all(world, tmp_path):
    # In step 2 the second process has a gradient that is no number, in step 4 it dies.
    # kills: the look at one's own gradient, so that the processes part; a step into NaN; a count
    # of the first process alone; a process that waits an hour for a dead one
    done = rank_fault(world, tmp_path, "nan@2", "raise@4", save_every=1)
    seconds = time.time() - float((tmp_path / "died").read_text())
    assert done.returncode != 0 and seconds < 60, seconds
    assert "RuntimeError: the second process died here" in done.stderr
    metrics = lines(tmp_path / "run" / "metrics.jsonl")
    assert [m["skipped_steps"] for m in metrics] == [0, 1, 0]
    before = [weights_before(tmp_path, step) for step in (1, 2, 3, 4)]
    assert all(a == b for a, b in before)
    first, second, third, fourth = [a["sums"] for a, b in before]
    assert first != second == third != fourth
    assert torch.load(tmp_path / "run" / "state.pt")["step"] == 3


# -------------------------------------------------------------------------------- broken gradients
def test_skipped_steps_leave_no_trace():
    # Against AdamW that is never shown the broken gradients. kills: moments spoiled or counted on,
    # gradients kept for the next step, a count that good steps do not set back
    torch.manual_seed(0)
    model = torch.nn.Linear(7, 5)
    oracle = copy.deepcopy(model)
    optimizer, plain = common.make_optimizer(model, 1e-2), common.make_optimizer(oracle, 1e-2)
    broken = [None, torch.inf, torch.nan, None, torch.nan, -torch.inf, None]
    for bad in broken:
        x = torch.randn(3, 7)
        for one in (model, oracle):
            one(x).square().sum().backward()
        if bad is None:
            torch.nn.utils.clip_grad_norm_(oracle.parameters(), 1.0)
            plain.step()
        else:
            model.bias.grad[2] = bad
        plain.zero_grad()
        norm = common.optimizer_step(optimizer, list(model.parameters()), 1.0)
        assert torch.isfinite(torch.tensor(norm)) == (bad is None)
        assert torch.equal(model.weight, oracle.weight) and torch.equal(model.bias, oracle.bias)
        assert model.weight.grad is None


def test_three_broken_gradients_in_a_row_stop_the_run(world, tmp_path, monkeypatch):
    # kills: steps skipped for ever, a stop at the first, a stop at three in all
    sums, bad = common.sum_gradients, {2, 4, 5, 6}
    step = iter(range(1, 99))

    def broken(parameters):
        if next(step) in bad:
            parameters[0].grad.fill_(torch.nan)
        sums(parameters)
    monkeypatch.setattr(common, "sum_gradients", broken)
    with pytest.raises(SystemExit, match="3 times in a row.*smaller --lr"):
        run(world, stage1, tmp_path / "run", max_steps=9, save_every=1)
    metrics = lines(tmp_path / "run" / "metrics.jsonl")
    assert [m["skipped_steps"] for m in metrics] == [0, 1, 0, 1, 1]
    weights = torch.load(tmp_path / "run" / "state.pt")["model"].values()
    assert all(torch.isfinite(weight).all() for weight in weights)


# -------------------------------------------------------------------------- steps without an effect
def stepped(weights, gradients, lr=1e-6):
    """One step on these tensors -> the share that first_change() tells; None: it tells none"""
    model = torch.nn.ParameterList(weights)
    optimizer = common.make_optimizer(model, lr)
    for parameter, gradient in zip(model, gradients, strict=True):
        parameter.grad = gradient
    common.optimizer_step(optimizer, list(model), 1.0)
    share = common.first_change(optimizer).get("changed_share")
    assert common.first_change(optimizer) == {}
    return share


def test_a_step_that_rounds_away_stops_the_run():
    # kills: fp32 copies that are compared, a norm of 0 that stops a run, a share of the samples
    torch.manual_seed(0)
    sizes = [(3, 5), (37, 5000), (7,)]  # the second is sampled
    weights = [0.01 + torch.rand(size) for size in sizes]
    gradients = [torch.randn(size) for size in sizes]
    assert stepped(weights, gradients) == 1.0
    halves = [weight.bfloat16() for weight in weights]
    with pytest.raises(SystemExit, match="changed no weight.*--lr 1e-06 .*bfloat16"):
        stepped(halves, [gradient.bfloat16() for gradient in gradients])
    assert stepped(halves, [gradient.bfloat16() for gradient in gradients], lr=1e-2) > 0.9
    assert stepped(weights, [torch.zeros(size) for size in sizes]) is None
    # the tensor of 15 alone has a gradient, and every other column of the large one
    gradients[2].zero_()
    gradients[1][:, ::2] = 0
    total = 15 + 37 * 5000 + 7
    assert stepped(weights, gradients) == pytest.approx((15 + 37 * 2500) / total, abs=0.001)
    assert stepped([weights[0], weights[2]], [gradients[0], gradients[2]]) == 15 / 22


def test_the_first_step_that_counts_is_told_once():
    # Steps without a gradient, or with one that is no number, are not the first. kills: a share in
    # every step, one of a step that was left out, one of a step without a gradient
    told = []
    model = torch.nn.Linear(7, 5)
    optimizer = common.make_optimizer(model, 1e-2)
    for factor in (torch.nan, 0.0, 0.0, torch.inf, 1.0, 1.0):
        model(torch.ones(3, 7)).sum().backward()
        for parameter in model.parameters():
            parameter.grad *= factor
        common.optimizer_step(optimizer, list(model.parameters()), 1.0)
        told.append(common.first_change(optimizer))
    assert told == [{}, {}, {}, {}, {"changed_share": 1.0}, {}]


@pytest.mark.parametrize("script", [stage0_sft, stage1, bt_reward],
                         ids=lambda script: script.__name__)
def test_the_first_step_of_a_run_tells_its_share(world, tmp_path, monkeypatch, script):
    # The real scripts, ended and resumed; the share against all weights before and after. kills: a
    # share in every line, or in none, or in the first line of a resumed run again
    shares, real = [], common.watched_step

    def watched(optimizer, parameters, norm):
        before = [parameter.detach().clone() for parameter in parameters]
        real(optimizer, parameters, norm)
        changed = [(p != b).flatten() for p, b in zip(parameters, before, strict=True)]
        shares.append(torch.cat(changed).double().mean().item())
    monkeypatch.setattr(common, "watched_step", watched)
    batch_of = common.batch_of

    def ended(rows, step, *settings):
        if step == 1:
            os.kill(os.getpid(), signal.SIGTERM)
        return batch_of(rows, step, *settings)
    monkeypatch.setattr(common, "batch_of", ended)
    with pytest.raises(SystemExit):
        run(world, script, tmp_path / "run")
    monkeypatch.setattr(common, "batch_of", batch_of)
    run(world, script, tmp_path / "run")
    first, *later = lines(tmp_path / "run" / "metrics.jsonl")
    assert first["changed_share"] == pytest.approx(shares[0], abs=0.01) and 0.1 < shares[0] <= 1
    assert len(later) == 3 and not any("changed_share" in metrics for metrics in later)
    assert len(shares) == 1


# ----------------------------------------------------------------------------------------- the disk
@pytest.mark.skipif(not Path(FULL).exists(), reason="no such device here")
def test_a_full_disk_leaves_the_old_state(world, tmp_path):
    # kills: a traceback of torch's, half a state where the whole one was, half a file left to fill
    # the disk
    out = tmp_path / "run"
    run(world, stage1, tmp_path / "unbroken")
    run(world, stage1, out, max_steps=2)
    before = (out / "state.pt").read_bytes()
    (out / "state.pt.tmp").symlink_to(FULL)
    with pytest.raises(SystemExit) as stopped:
        run(world, stage1, out)
    message = str(stopped.value)
    assert "state.pt.tmp: cannot be written (No space left on device)" in message
    assert "the same command goes on" in message and "\n" not in message
    assert (out / "state.pt").read_bytes() == before
    assert not os.path.lexists(out / "state.pt.tmp")
    run(world, stage1, out)
    assert same_weights(out, tmp_path / "unbroken")


def test_torchs_own_error_is_told_as_the_disks(tmp_path, monkeypatch):
    # Some versions try to end the file all the same. kills: their RuntimeError let through, or told
    def save(state, file):
        try:
            raise OSError(28, "No space left on device")
        finally:
            raise RuntimeError("[enforce fail at inline_container.cc:664] . unexpected pos 5 vs 4")
    monkeypatch.setattr(torch, "save", save)
    model = torch.nn.Linear(3, 2)
    with pytest.raises(SystemExit, match=r"cannot be written \(No space left on device\)"):
        common.save_state(tmp_path, model, common.make_optimizer(model, 1), 1, stage1.Config())
    assert not list(tmp_path.iterdir())


@contextmanager
def files_of_at_most(size):
    """No file may become larger: what is written beyond fails as on a disk that fills up."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.mark.parametrize("size", [10, 5_000, 600_000, 2_900_000])
def test_a_disk_that_fills_up_while_a_state_is_written(world, tmp_path, size):
    # kills: written in place, a rest that fills the disk
    model, _ = common.load(toy_world.PREBUILT)
    optimizer = common.make_optimizer(model, 1e-3)
    for weight in model.parameters():
        weight.grad = torch.ones_like(weight)
    optimizer.step()
    common.save_state(tmp_path, model, optimizer, 1, stage1.Config())
    before = (tmp_path / "state.pt").read_bytes()
    assert len(before) > 2_900_000
    with files_of_at_most(size), pytest.raises(SystemExit, match="state.pt.tmp: cannot be written"):
        common.save_state(tmp_path, model, optimizer, 2, stage1.Config())
    assert [path.name for path in tmp_path.iterdir()] == ["state.pt"]
    assert (tmp_path / "state.pt").read_bytes() == before


@pytest.mark.skipif(not Path(FULL).exists(), reason="no such device here")
def test_a_full_disk_at_a_log_or_a_file_of_rows(tmp_path):
    # kills: a traceback; the old file lost; the log removed as a side file is
    with pytest.raises(SystemExit, match="No space left"):
        common.append(FULL, {"step": 1})
    assert Path(FULL).exists()
    path = tmp_path / "rows.jsonl"
    common.write_lines(path, [{"old": 1}])
    (tmp_path / "rows.tmp").symlink_to(FULL)
    with pytest.raises(SystemExit, match="No space left"):
        common.write_lines(path, [{"new": 1}])
    assert lines(path) == [{"old": 1}] and not os.path.lexists(tmp_path / "rows.tmp")


@pytest.mark.parametrize("script", [stage1, bt_reward], ids=lambda script: script.__name__)
def test_a_full_disk_at_the_last_checkpoint(world, tmp_path, script):
    # No file may have more than 0.6 MB, which is less than the weights in fp32; as nothing is to be
    # trained, no state is written. kills: safetensors' traceback, half a checkpoint in the folder
    out = tmp_path / "run"
    run(world, script, out)
    for name in ("stage.json", "model.safetensors"):
        (out / name).unlink()
    with files_of_at_most(600_000), pytest.raises(
            SystemExit, match=r"checkpoint.tmp: cannot be written \(.*large"):
        run(world, script, out)
    assert not (out / "checkpoint.tmp").exists() and not (out / "stage.json").exists()
    run(world, script, out)
    assert (out / "stage.json").exists() and (out / "model.safetensors").exists()


def test_a_full_disk_at_the_reward_head(world, tmp_path):
    # Its file has some 150 kB. kills: safetensors' traceback, half a head beside an old stage.json
    out = tmp_path / "run"
    run(world, bt_reward, out)
    head = out / "reward_head.safetensors"
    with files_of_at_most(head.stat().st_size // 2), pytest.raises(
            SystemExit, match="reward_head.safetensors: cannot be written"):
        run(world, bt_reward, out)
    assert not head.exists()


# ------------------------------------------------------------------------------ states of elsewhere
class Runs:
    """A pickle of this makes a folder when it is read."""

    def __init__(self, folder):
        self.folder = folder

    def __reduce__(self):
        return os.mkdir, (str(self.folder),)


@pytest.fixture(scope="module")
def saved(world, tmp_path_factory):
    """A run folder that was ended after 2 steps."""
    out = tmp_path_factory.mktemp("saved") / "run"
    run(world, stage1, out, max_steps=2)
    (out / "stage.json").unlink()
    return out


def changed(change):
    """-> a function that rewrites state.pt"""
    def rewrite(path):
        state = torch.load(path)
        torch.save(change(state), path)
    return rewrite


def other_model(state):
    tokenizer = toy_world.make_tokenizer()
    return state | {"model": text_only_model(tokenizer, True).state_dict()}


def other_shapes(state):
    for moments in state["optimizer"]["state"].values():
        moments["exp_avg"] = moments["exp_avg"].flatten()[:1]
    return state


def fewer_parameters(state):
    state["optimizer"]["param_groups"][0]["params"] = [0, 1]
    return state


STATES = {
    "cut": (lambda path: os.truncate(path, path.stat().st_size // 3), "is no saved state"),
    "empty": (lambda path: path.write_bytes(b""), "is no saved state"),
    "text": (lambda path: path.write_text("state"), "is no saved state"),
    "a folder": (lambda path: (path.unlink(), path.mkdir()), "is no saved state"),
    "a list": (changed(lambda state: [state]), "is no saved state"),
    "only weights": (changed(lambda state: state["model"]), "is no saved state"),
    "no optimiser": (changed(lambda state: {k: v for k, v in state.items() if k != "optimizer"}),
                     "is no saved state"),
    "a text for settings": (changed(lambda state: state | {"config": "lr 1"}), "is no saved state"),
    "half a step": (changed(lambda state: state | {"step": 1.5}), "is no saved state"),
    "another script": (changed(lambda state: state | {"config": {"epochs": 3}}),
                       "belongs to a run with other settings"),
    "another model": (changed(other_model), "does not fit the model"),
    "no model": (changed(lambda state: state | {"model": None}), "does not fit the model"),
    "fewer parameters": (changed(fewer_parameters), "does not fit the model"),
    "other shapes": (changed(other_shapes), "does not fit the model"),
    "an empty optimiser": (changed(lambda state: state | {"optimizer": {}}), "does not fit"),
}


@pytest.mark.parametrize("name", STATES)
def test_a_state_of_something_else_is_refused(world, saved, tmp_path, monkeypatch, name):
    # In one line, before a step is taken. kills: an except clause with one kind too few; weights
    # loaded with strict=False; moments that fail in the first step
    spoil, complaint = STATES[name]
    (tmp_path / "run").mkdir()
    path = tmp_path / "run" / "state.pt"
    path.write_bytes((saved / "state.pt").read_bytes())
    state = torch.load(path)
    state["config"]["out"] = str(tmp_path / "run")
    torch.save(state, path)
    spoil(path)
    monkeypatch.setattr(stage1, "roll_out", lambda *_: 1 / 0)
    with pytest.raises(SystemExit) as stopped:
        run(world, stage1, tmp_path / "run")
    message = str(stopped.value)
    assert message.startswith(str(path)) and complaint in message and "\n" not in message


def test_flipped_bits_in_a_state_are_seen_or_harmless(world, saved, tmp_path):
    # Whatever a byte does to the file, no traceback. kills: the three kinds of errors that were
    # caught before
    rng, whole = random.Random(0), (saved / "state.pt").read_bytes()
    refused = 0
    for _ in range(60):
        content = bytearray(whole)
        at = rng.choice((rng.randrange(len(whole)), rng.randrange(2000), -rng.randint(1, 5000)))
        content[at] ^= 1 << rng.randrange(8)
        (tmp_path / "state.pt").write_bytes(content)
        try:
            common.open_run(tmp_path, stage1.Config())
        except SystemExit as e:
            refused += 1
            assert "state.pt" in str(e)
    assert refused == 60, "the settings are others, too"


def test_a_state_is_read_and_not_run(tmp_path):
    # kills: weights_only=False
    for write in (torch.save, lambda thing, path: Path(path).write_bytes(pickle.dumps(thing))):
        write({"step": Runs(tmp_path / "made")}, tmp_path / "state.pt")
        with pytest.raises(SystemExit, match="is no saved state"):
            common.open_run(tmp_path, stage1.Config())
        assert not (tmp_path / "made").exists()


@pytest.mark.parametrize("content", ["", "{", "[1, 2]", "3", '"text"'])
def test_a_broken_stage_json_is_named(tmp_path, content):
    # kills: a traceback of json's where a checkpoint is only asked for its style
    (tmp_path / "stage.json").write_text(content)
    with pytest.raises(SystemExit, match=r"stage\.json: is not what our scripts write"):
        common.trained_style(tmp_path)


# ------------------------------------------------------------------------ faults.py, its short form
def test_altered_rows_are_used_or_refused(encoder, tmp_path, monkeypatch):
    # kills: a missing check of types or of places, and any exception that is not BadRow
    monkeypatch.chdir(tmp_path)
    counts, problems = faults.fuzz_rows(150, encoder, tmp_path / "rows", random.Random(5))
    assert not problems, problems[:3]
    assert counts["refused"] > 50 and counts["used"] > 20


def test_altered_media_are_used_or_refused(encoder, tmp_path, monkeypatch):
    # kills: a pipe opened, a list of files read as a video, an error of a library's own
    monkeypatch.chdir(tmp_path)
    counts, problems, slowest = faults.fuzz_media(40, encoder, tmp_path / "media", random.Random(5))
    assert not problems, problems[:3]
    assert counts["refused"] > 15 and counts["used"] > 10 and slowest < 10


def test_killed_runs_equal_an_unbroken_one(tmp_path):
    # kills: see test_runs.py; here the moments are drawn, and the run is that of another script
    done = run_there([TESTS / "faults.py", "--kills", 2, "--terms", 1, "--rows", 0, "--media", 0,
                      "--ranks", 0, "--scripts", "bt_reward", "--seed",
                      random.SystemRandom().randrange(10**6)], check=False, TMPDIR=str(tmp_path))
    assert done.returncode == 0, done.stdout + done.stderr[-2000:]
    assert "| bt_reward |" in done.stdout and done.stdout.count("| none |") == 1


def test_differing_runs_are_noticed(world, tmp_path):
    # kills: a comparison that finds nothing
    run(world, bt_reward, tmp_path / "a")
    run(world, bt_reward, tmp_path / "b")
    assert faults.differences(tmp_path / "a", tmp_path / "b") == []
    run(world, bt_reward, tmp_path / "c", seed=1)
    assert set(faults.differences(tmp_path / "a", tmp_path / "c")) == {
        "model.safetensors", "reward_head.safetensors", "metrics.jsonl"}
