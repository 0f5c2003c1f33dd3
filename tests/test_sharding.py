"""
Sharding on 2 and 3 processes (gloo, CPU) against one process that is not sharded: sharding.py.
"kills:" names wrong versions under which a test was seen to fail, or would have to.
"""

import runpy

import pytest
import toy_world
import torch
import transformers
from helpers import PROGRAMS, flags, lines, run_here, small_world, torchrun
from safetensors.torch import load_file

import common
import sharding
import stage0_sft

pytestmark = pytest.mark.usefixtures("cpu_only")
PROCESSES = (2, 3)


@pytest.fixture(scope="module")
def out(tmp_path_factory):
    """What programs/sharded.py leaves of 1, 2 and 3 processes"""
    world = small_world(tmp_path_factory.mktemp("world"), text_rl=8, mm_rl=4, heldout=3)
    tokenizer = toy_world.make_tokenizer()
    torch.manual_seed(0)
    model, images = toy_world.make_model(tokenizer, hidden=32, layers=2)
    toy_world.save_backbone(model, tokenizer, images, world / "backbone")
    run_here(stage0_sft.main, flags(
        model=world / "backbone", data=world / "text_rl.jsonl", heldout="", target="label",
        batch_size=8, micro_batch=8, epochs=8, lr=1e-2, out=world / "stage0"))
    out = tmp_path_factory.mktemp("out")
    script = str(PROGRAMS / "sharded.py")
    run_here(lambda: runpy.run_path(script, run_name="__main__"), [world, out])
    for processes in PROCESSES:
        torchrun([script, world, out], processes=processes)
    return out


def seen(out, processes):
    """-> what each process saw of the two updates"""
    files = [out / f"update-{processes}-{rank}.pt" for rank in range(processes)]
    return [torch.load(file, weights_only=False) for file in files]


def distance(x, wanted):
    return ((x - wanted).norm() / wanted.norm()).item()


def flat(tensors):
    return torch.cat([tensors[name].double().flatten() for name in sorted(tensors)])


@pytest.mark.parametrize("processes", PROCESSES)
def test_updates_are_those_of_one_process(out, processes):
    # The first process has no image, another one longer answers. kills: gradients averaged instead
    # of summed, the norm of one part clipped, a reference that moves with the policy
    alone, = seen(out, 1)
    for one in seen(out, processes):
        for ours, wanted in zip(one["metrics"], alone["metrics"], strict=True):
            for name in ("loss", "grad_norm", "kl", "entropy"):
                assert ours[name] == pytest.approx(wanted[name], rel=1e-5, abs=1e-7), name
        assert len(one["gradients"]) == 4
        for ours, wanted in zip(one["gradients"], alone["gradients"], strict=True):
            assert ours.keys() == wanted.keys()
            assert distance(flat(ours), flat(wanted)) < 2e-5
        assert distance(flat(one["weights"]), flat(alone["weights"])) < 1e-5
    assert alone["metrics"][1]["kl"] > 1e-4  # the policy moved, and the reference did not


@pytest.mark.parametrize("processes", PROCESSES)
def test_each_process_holds_its_part(out, processes):
    # kills: a policy, a reference or moments that every process holds whole
    for one in seen(out, processes):
        held = one["held"]
        for name, share in (("model", 1), ("ref", 1), ("moments", 2)):
            assert held[name] < 1.1 * share * held["all"] / processes


@pytest.mark.parametrize("processes", PROCESSES)
def test_sampling_is_that_of_a_whole_model(out, processes):
    # Each process draws as often as it likes. kills: sampling from split weights, which hangs
    for rank, one in enumerate(seen(out, processes)):
        tokens = one["tokens"]
        assert len(tokens) == 2 * (1 + 2 * rank) and tokens[0::2] == tokens[1::2]
        sharded, plain = one["distilled"]
        assert sharded == plain


@pytest.mark.parametrize("processes", PROCESSES)
def test_saving_never_gathers_the_model_whole(out, processes):
    # The checkpoint is whole on the CPU of the first process, once. kills: a state dict that is
    # gathered as a whole, on every process
    alone, *_ = seen(out, processes)
    model = 4 * alone["held"]["all"]
    assert alone["peak state"] < 0.5 * model and alone["peak checkpoint"] < 1.2 * model


@pytest.mark.parametrize("processes", PROCESSES)
def test_the_checkpoint_is_an_ordinary_one(out, processes):
    # kills: names or parts of FSDP in the file, a head that is no longer tied
    auto = transformers.AutoModelForImageTextToText
    model = auto.from_pretrained(out / f"update-{processes}", dtype=torch.float32)
    weights = {name: p.detach() for name, p in model.named_parameters()}
    for one in seen(out, processes):
        assert one["weights"].keys() == weights.keys()
        assert all(torch.equal(one["weights"][name], weights[name]) for name in weights)


def test_resumed_on_another_number_of_processes(out):
    # From 1 to 2 and from 2 to 3. kills: moments that begin anew, parts of other processes
    first, second = (load_file(out / name / "model.safetensors") for name in ("sft-1-2", "sft-2-3"))
    assert distance(flat(first), flat(second)) < 1e-4


@pytest.mark.parametrize("processes", PROCESSES)
def test_a_reward_model_is_that_of_one_process(out, processes):
    # kills: a head that is not saved whole
    for file in ("model.safetensors", "reward_head.safetensors"):
        ours, wanted = (load_file(out / f"bt-{n}" / file) for n in (processes, 1))
        assert distance(flat(ours), flat(wanted)) < 1e-4


def test_a_run_of_stage_1_is_the_same_with_and_without(out):
    # kills: evaluation, logging of groups or resume that only some processes take part in
    runs = [load_file(out / f"grpo-{shard}" / "model.safetensors") for shard in ("no", "yes")]
    assert distance(flat(runs[0]), flat(runs[1])) < 1e-6
    first, second = (lines(out / f"grpo-{shard}" / "metrics.jsonl") for shard in ("no", "yes"))
    assert len(first) == 2
    for ours, wanted in zip(second, first, strict=True):
        assert ours["reward"] == wanted["reward"]
        assert ours["grad_norm"] == pytest.approx(wanted["grad_norm"], rel=1e-5)


def test_one_process_alone_is_refused(tmp_path):
    with pytest.raises(SystemExit, match="this is one alone"):
        run_here(stage0_sft.main, flags(shard="yes", out=tmp_path / "run"))


def test_bytes_of_a_replica():
    """By hand: 3 x 5 trained, 7 frozen. kills: no gradient, no reference, moments of the frozen"""
    model = torch.nn.Sequential(torch.nn.Linear(5, 3, bias=False), torch.nn.Linear(7, 1, False))
    model[1].requires_grad_(False)
    cfg = stage0_sft.Config()
    assert sharding.replica_bytes(model, cfg) == 4 * (22 + 3 * 15)
    cfg.beta = 0.04
    assert sharding.replica_bytes(model, cfg) == 4 * (22 + 22 + 3 * 15)
    assert not sharding.is_sharded(model) and common.world() == 1
