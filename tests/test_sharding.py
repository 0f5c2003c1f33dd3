"""
--shard: one model split among the processes of torchrun. Two and three gloo processes must do what
one process does that holds all; programs/sharded.py is what they run. "kills:" names wrong versions
under which a test was seen to fail.
"""

import contextlib
import io
import runpy
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
import transformers
from helpers import (
    PROGRAMS, flags, lasting, lines, run_here, small_world, teach, torchrun, weights_of)
from safetensors.torch import load_file

import bt_reward
import common
import dry_run
import sharding
import stage0_sft
import stage1_text_grpo as stage1

pytestmark = pytest.mark.usefixtures("cpu_only")
PROCESSES = (2, 3)
RANKS = [(n, rank) for n in PROCESSES for rank in range(n)]


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """Six rows of text and six with media, a backbone, and a model that answers now A and now B."""
    folder = small_world(tmp_path_factory.mktemp("world"), text_rl=6, mm_rl=6, heldout=3)
    teach(folder, batch_size=6, micro_batch=6, epochs=12)
    return folder


@pytest.fixture(scope="module")
def out(world, tmp_path_factory):
    """What programs/sharded.py writes on 1, 2 and 3 processes."""
    out, script = tmp_path_factory.mktemp("out"), PROGRAMS / "sharded.py"
    with pytest.MonkeyPatch.context() as patch:  # it watches some functions
        patch.setattr(common, "end_processes", common.end_processes)
        run_here(lambda: runpy.run_path(str(script), run_name="__main__"), [world, out])
    for n in PROCESSES:
        torchrun([script, world, out], processes=n)
    return out


def seen(out, n, rank):
    """What one process saw of its updates; with one process nothing was sharded."""
    return torch.load(out / f"update-{n}-{rank}.pt")


def distance(one, other):
    """Of two dicts of tensors, relative to the length of the first."""
    assert one.keys() == other.keys()
    first, second = (torch.cat([d[name].double().flatten() for name in one]) for d in (one, other))
    return ((first - second).norm() / first.norm()).item()


def same_log(one, other, rel):
    one, other = lines(one / "metrics.jsonl"), lines(other / "metrics.jsonl")
    assert [m["step"] for m in one] == [m["step"] for m in other] and len(one) == 2
    for a, b in zip(one, other, strict=True):
        for metrics in (a, b):
            metrics.pop("tasks", None)  # of a reward model: dicts
        assert a.pop("changed_share", 0) == pytest.approx(b.pop("changed_share", 0), abs=0.01)
        assert lasting(b) == pytest.approx(lasting(a), rel=rel, abs=rel * 1e-2)


# ------------------------------------------------------------------------------------------ updates
@pytest.mark.parametrize("n, rank", RANKS)
def test_updates_are_those_of_one_process(out, n, rank):
    # Four steps, their clipped gradients and logs, and the weights behind them. The first process
    # has no image, answers are unequally long, and the reference weighs heavily.
    # kills: gradients averaged; the norm of one part only; a reference that is the policy; no zeros
    # for a tower that a process did not use (the program crashes)
    one, here = seen(out, 1, 0), seen(out, n, rank)
    assert len(one["gradients"]) == len(here["gradients"]) == 4
    assert distance(one["gradients"][0], here["gradients"][0]) < 1e-6
    for a, b in zip(one["gradients"], here["gradients"], strict=True):
        assert distance(a, b) < 2e-6  # AdamW's first steps make the most of a rounding
        norm = torch.stack([gradient.norm() for gradient in b.values()]).norm().item()
        assert norm == pytest.approx(0.1, rel=1e-4), "it was not clipped"
    assert any("vision_tower" in name and gradient.norm() > 1e-4
               for name, gradient in one["gradients"][0].items())
    assert distance(one["weights"], here["weights"]) < 1e-6
    for a, b in zip(one["metrics"], here["metrics"], strict=True):
        for metrics in (a, b):
            metrics.pop("changed_share", None)  # below
        assert a["kl"] > 0.01 and a["clip_ratio/low_mean"] > 0.05 and a["grad_norm"] > 0.3
        assert b == pytest.approx(a, rel=1e-6)


@pytest.mark.parametrize("n, rank", RANKS)
def test_the_share_that_changed_is_that_of_all_parts(out, n, rank):
    # Of a large tensor the parts have other samples. kills: the share of a process's own part
    first, second = (m.get("changed_share") for m in seen(out, n, rank)["metrics"])
    alone = seen(out, 1, 0)["metrics"][0]["changed_share"]
    assert first == pytest.approx(alone, abs=1e-4) and 0.9 < alone < 1 and second is None
    assert first == seen(out, n, 0)["metrics"][0]["changed_share"]


@pytest.mark.parametrize("n, rank", RANKS)
def test_whole_samples_as_without_sharding(out, n, rank):
    # Each process as often and as long as it likes, and in stage 2b with nothing to do for one.
    # kills: no whole() at all (the processes wait for one another, or crash)
    here = seen(out, n, rank)
    assert len(here["tokens"]) == 2 * (1 + 2 * rank)
    assert here["tokens"][::2] == here["tokens"][1::2]
    sharded, plain = here["distilled"]
    assert sharded == plain and len(plain) == 2 * n - 1


@pytest.mark.parametrize("n", PROCESSES)
def test_a_process_holds_its_part(out, n):
    # kills: a reference that is whole on every process
    for name, copies in (("model", 1), ("ref", 1), ("moments", 2)):
        held = [seen(out, n, rank)["held"] for rank in range(n)]
        total = copies * held[0]["all"]
        assert sum(h[name] for h in held) == total
        assert max(h[name] for h in held) < 1.2 * total / n
    alone = seen(out, 1, 0)["held"]
    assert alone["model"] == alone["ref"] == alone["all"] == alone["moments"] / 2


@pytest.mark.parametrize("n, rank", RANKS)
def test_saving_holds_one_model_at_most(out, n, rank):
    # Bytes of gathered tensors that are alive at once. kills: all moments gathered before any is
    # written, the whole model on every process, a tied tensor gathered twice. On a loaded machine
    # gloo's threads let go of a tensor late, so that two or three are alive for a moment
    here = seen(out, n, rank)
    sizes = [4 * tensor.numel() for tensor in here["weights"].values()]
    room = max(sizes) * 1.1
    assert 0 < here["peak state"] < sum(sizes) / 4
    assert 0 < here["peak checkpoint"] < (sum(sizes) + room if rank == 0 else 2 * room)


@pytest.mark.parametrize("n", PROCESSES)
def test_a_checkpoint_is_that_of_plain_transformers(out, n):
    # kills: a head saved beside the embeddings it is tied to
    weights = seen(out, n, 0)["weights"]
    model = transformers.AutoModelForImageTextToText.from_pretrained(out / f"update-{n}")
    loaded = dict(model.named_parameters())
    assert loaded.keys() == weights.keys()
    assert all(torch.equal(loaded[name], weights[name]) for name in weights)
    assert weights_of(out / f"update-{n}").keys() == weights_of(out / "update-1").keys()
    assert model.config.architectures == ["InternVLForConditionalGeneration"]
    state = torch.load(out / f"update-{n}" / "state.pt", weights_only=True)
    assert all(torch.equal(state["model"][name], weights[name]) for name in weights)
    assert state["kept"] == ["some", None] and state["step"] == 4


# --------------------------------------------------------------------------------------------- runs
@pytest.fixture(scope="module")
def unbroken(world, out):
    """The supervised run in one go, on one process."""
    args = dict(model=world / "backbone", data=f"{world}/text_rl.jsonl,{world}/mm_rl.jsonl",
                heldout=world / "heldout_text.jsonl", target="label", batch_size=6, micro_batch=1,
                epochs=1, eval_batch=2, max_new_tokens=4, lr=1e-2, save_every=1,
                freeze_vision="false", max_grad_norm=0.5)
    run_here(stage0_sft.main, flags(out=out / "unbroken", **args))
    return out / "unbroken", args


@pytest.mark.parametrize("before, after", [(1, 2), (2, 3), (2, 1)])
def test_a_run_goes_on_with_another_number_of_processes(out, unbroken, before, after):
    # 1: not sharded. kills: moments left behind or in another order, weights of the start
    folder, args = unbroken
    resumed = out / f"sft-{before}-{after}"
    if after == 1:
        resumed = out / f"sft-stopped-{before}"
        assert torch.load(resumed / "state.pt")["step"] == 1
        run_here(stage0_sft.main, flags(out=resumed, **args))
    same_log(folder, resumed, rel=2e-6)
    assert distance(weights_of(folder), weights_of(resumed)) < 1e-6
    one, other = torch.load(folder / "state.pt"), torch.load(resumed / "state.pt")
    for i, values in one["optimizer"]["state"].items():
        assert other["optimizer"]["state"][i]["step"] == values["step"]
    moments = [{i: v["exp_avg"] for i, v in s["optimizer"]["state"].items()} for s in (one, other)]
    assert distance(*moments) < 3e-6


@pytest.mark.parametrize("n", PROCESSES)
def test_a_reward_model(out, n):
    # kills: a head and an encoder called one by one, held-out rows scored by a model that is not
    # whole (both crash)
    same_log(out / "bt-1", out / f"bt-{n}", rel=1e-5)
    assert distance(weights_of(out / "bt-1"), weights_of(out / f"bt-{n}")) < 1e-6
    heads = [load_file(out / f"bt-{k}" / "reward_head.safetensors") for k in (1, n)]
    assert distance(*heads) < 1e-6
    for when in ("before", "after"):
        one, other = (common.stage_of(out / f"bt-{k}")["heldout"][when] for k in (1, n))
        assert one.pop("tasks").keys() == other.pop("tasks").keys()
        assert other == pytest.approx(one, rel=1e-4)
    assert len(bt_reward.load(out / f"bt-{n}")[0].reward_head.state_dict()) == 4


def test_a_whole_stage_does_the_same(out):
    # Two processes with and without --shard: what is drawn, logged and learnt is the same.
    # kills: rollouts.jsonl with a forward of the first process alone, judging with a model that is
    # not whole (both crash), a gradient that is averaged
    one, other = out / "grpo-no", out / "grpo-yes"
    same_log(one, other, rel=5e-6)  # a gradient's norm is added up in another order
    assert distance(weights_of(one), weights_of(other)) < 1e-7
    assert lines(one / "rollouts.jsonl") == lines(other / "rollouts.jsonl")
    assert common.stage_of(one)["heldout"] == common.stage_of(other)["heldout"]
    assert max(m["reward_std"] for m in lines(one / "metrics.jsonl")) > 0, "nothing to learn"


# ----------------------------------------------------------------------------------------- the knob
CFG = stage1.Config(shard="auto", beta=0.04, freeze_vision=True, batch_size=8, micro_batch=1,
                    rollout_batch=1, heldout="", gradient_checkpointing=True)


@pytest.mark.parametrize("change", [
    {}, {"beta": 0.0}, {"freeze_vision": False}, {"micro_batch": 4}, {"rollout_batch": 8},
    {"heldout": "rows.jsonl", "eval_batch": 512}], ids=lambda change: "-".join(change) or "plain")
def test_auto_shards_what_does_not_fit(monkeypatch, change):
    # InternVL3.5 1B, on cards just above and below what --dry_run says of one of two replicas.
    # kills: an estimate of its own, one of the peaks instead of the largest, all prompts on one
    # process, another card's reserve
    blank = SimpleNamespace(config=dry_run.internvl_config("1B"))
    monkeypatch.setattr(common, "load", lambda folder, device, made_by: (blank, None))
    monkeypatch.setattr(common, "gather_list", list)
    monkeypatch.setenv("WORLD_SIZE", "2")
    cfg = replace(CFG, **change)
    answers, needed = [], most_of_a_replica(cfg)
    for room in (needed + 0.1, needed - 0.1):
        total = max(room + 2.5, (room + 1) * 79 / 76)  # with the reserve
        card = SimpleNamespace(total_memory=total * 2 ** 30)
        monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device, card=card: card)
        answers.append(sharding.wanted(cfg, torch.device("cuda")))
    assert answers == [False, True]
    for other in (replace(cfg, shard="no"), replace(cfg, lora_rank=4)):
        assert not sharding.wanted(other, torch.device("cuda"))
    monkeypatch.setenv("WORLD_SIZE", "1")
    assert not sharding.wanted(cfg, torch.device("cuda"))


def most_of_a_replica(cfg):
    """GiB, read off the table that --dry_run prints"""
    size = dry_run.measure("1B", dry_run.internvl_config("1B"), cfg)
    told = io.StringIO()
    with contextlib.redirect_stdout(told):
        dry_run.print_line(size, dry_run.work_of(cfg, 2, "pixels"), 2, 1)
    cells = told.getvalue().split()[3:]
    return max(map(float, cells[len(dry_run.TERMS) - len(dry_run.PEAKS):len(dry_run.TERMS)]))


def test_what_cannot_be_sharded_is_refused(world, tmp_path, monkeypatch):
    # kills: a run that is not sharded though it was told to be
    args = flags(model=world / "stage0", data=world / "text_rl.jsonl", out=tmp_path, shard="yes",
                 heldout="")
    with pytest.raises(SystemExit, match="torchrun --nproc_per_node"):
        run_here(stage1.main, args)
    monkeypatch.setenv("WORLD_SIZE", "2")
    pytest.importorskip("peft")
    with pytest.raises(SystemExit, match="--lora_rank"):
        sharding.wanted(replace(CFG, shard="yes", lora_rank=4), torch.device("cpu"))
    assert not sharding.wanted(CFG, torch.device("cpu"))
