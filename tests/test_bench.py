"""
tests/bench_grpo.py compares like with like: the naive step has our loss and gradient, its clock
gives the time to whom it belongs, and its ratios are those of medians.
"""

import bench_grpo
import gpu_steps
import pytest
import torch
from helpers import rejects, text_only_model
from programs import grpo_step
from torch.utils.flop_counter import FlopCounterMode

import common
import stage1_text_grpo as stage1

LOGPS, LOSS = grpo_step.Naive.logps, grpo_step.Naive.loss


# ------------------------------------------------------------------------------------ the same step
@pytest.mark.parametrize("tiles", [0, 1])
def test_the_naive_step_is_ours(tiles):
    bench_grpo.check_same_step(tiles)


@pytest.mark.parametrize("tiles, rows", [(0, 10), (1, 5)])
def test_a_naive_step_in_parts_is_ours(tiles, rows, monkeypatch):
    # kills: parts of which each counts as if it were all; images or prompts of the first part
    bench_grpo.check_same_step(tiles, rows=rows)
    part = grpo_step.Naive.part
    monkeypatch.setattr(grpo_step.Naive, "part", lambda naive, first, rows: part(naive, 0, rows))
    rejects(bench_grpo.check_same_step, tiles, rows=5)


def one_token_late(naive, model, answers):
    return scored_by(slice(71, None), naive, model, answers)


def placeholder_keeps_its_mass(naive, model, answers):
    return scored_by(slice(70, -1), naive, model, answers)


def scored_by(places, naive, model, answers):
    """Log-probs of the answers by the logits of these places"""
    logits = model(input_ids=torch.cat([naive.ids, answers], 1), **naive.media).logits
    return logits[:, places].log_softmax(-1).gather(-1, answers[..., None])[..., 0]


def prompts_in_turn(naive, model, answers):
    naive.ids = naive.ids.unflatten(0, (3, 5)).transpose(0, 1).flatten(0, 1)
    return LOGPS(naive, model, answers)


def first_image_for_all(naive, model, answers):
    pixels = naive.media["pixel_values"]
    naive.media["pixel_values"] = pixels[:1].expand_as(pixels)
    return LOGPS(naive, model, answers)


def no_reference(naive, logp, ref):
    return LOSS(naive, logp, logp.detach())


def kl_without_gradient(naive, logp, ref):
    return LOSS(naive, logp, ref + logp - logp.detach())


def no_advantage(naive, logp, ref):
    naive.rewards = 1e-9 * naive.rewards + torch.arange(5)
    return LOSS(naive, logp, ref)


WRONG = {one_token_late: ("logps", 0), prompts_in_turn: ("logps", 0),
         first_image_for_all: ("logps", 1), placeholder_keeps_its_mass: ("logps", 1),
         no_reference: ("loss", 0), kl_without_gradient: ("loss", 0), no_advantage: ("loss", 0)}


@pytest.mark.parametrize("wrong", WRONG)
def test_another_step_is_noticed(wrong, monkeypatch):
    name, tiles = WRONG[wrong]
    monkeypatch.setattr(grpo_step.Naive, name, wrong)
    rejects(bench_grpo.check_same_step, tiles)


# ---------------------------------------------------------------------------------------- the clock
def test_every_phase_gets_its_own_time(monkeypatch):
    """A step whose calls take 1, 2, 4, ... seconds, so that no two sums are the same.

    kills: a phase that ends where a call ends, not where the next begins (sampling counts with the
    prefill, the KL with the reference), or that starts with the second call of its kind"""
    clock = [0]
    for name in ("perf_counter", "process_time"):
        monkeypatch.setattr(grpo_step.time, name, lambda: clock[0])

    class Takes(torch.nn.Linear):
        def forward(self, seconds):
            clock[0] += seconds
            return super().forward(torch.ones(1))

    class Optimizer(torch.optim.SGD):
        def step(self):
            clock[0] += 512
    policy, reference = Takes(1, 1), Takes(1, 1)
    optimizer = Optimizer(policy.parameters())
    watch = grpo_step.Stopwatch(policy, reference)
    for _ in range(2):  # the second step starts from nothing
        watch.start()
        with torch.no_grad():
            policy(1)
            clock[0] += 2  # a token is drawn
            policy(4)
            reference(8)
            reference(16)
        clock[0] += 32     # log-probs of the reference
        policy(64)
        policy(128)
        clock[0] += 256    # backward
        optimizer.step()
        watch.stop()
    watch.handle.remove()
    assert watch.steps == 2 * [{"prefill": 1, "decode": 6, "reference": 56, "policy": 448,
                                "optimiser": 512}]


@pytest.mark.parametrize("who", [grpo_step.Ours, grpo_step.Naive])
def test_the_products_of_a_step(who, tmp_path):
    """By hand: two for each weight and token; sampling and the reference once, the policy's forward
    and backward thrice. The naive step has every prompt G times, and its head runs over it, too.

    kills: the measured steps counted, too; a step without its sampling"""
    case = {"P": 53, "C": 11, "V": 331, "G": 5, "tiles": 0, "layers": 3, "steps": 1,
            "count": True}
    grpo_step.make(tmp_path, case)
    counted = grpo_step.run(who(case), case, tmp_path).counter.get_total_flops()
    layer = 256 * (256 + 2 * 64) + 256 * 256 + 3 * 256 * 768
    prompts, last = 2, 2 * 5  # the last token of an answer is run by no sampler
    if who is grpo_step.Naive:
        prompts = 2 * 5
    sequences = prompts * 53 + 2 * 5 * 11
    scored = 2 * (1 + 5 * 11) if who is grpo_step.Ours else sequences
    drawn = prompts + 2 * 5 * 11 - last
    wanted = 2 * 3 * layer * (5 * sequences - last) + 2 * 256 * 331 * (4 * scored + drawn)
    assert counted == pytest.approx(wanted, rel=0.002)


def test_products_in_place_count():
    # kills: those of TRL's head left out
    watch = grpo_step.Stopwatch(torch.nn.Linear(1, 1), torch.nn.Linear(1, 1), count=True)
    watch.start()
    torch.zeros(3, 5).addmm_(torch.ones(3, 7), torch.ones(7, 5))
    watch.stop()
    watch.handle.remove()
    assert watch.counter.get_total_flops() == 2 * 3 * 7 * 5


# ---------------------------------------------------------------------------------------- the table
def process(peak, *steps, gflop=40.0):
    """What grpo_step.py prints"""
    return {"peak_gb": peak, "gflop": gflop,
            "steps": [dict(zip(grpo_step.PHASES, step, strict=True)) for step in steps]}


def test_the_table_is_made_of_medians():
    """By hand: steps of 4, 2 and 9 s, ours, median 4; of 10, 40 and 7 s, median 10.

    kills: means (5 and 19), the fastest (2 and 7), the median of one process, the sum of medians"""
    ours = [process(1.5, [1, 0, 1, 2, 0], [0, 1, 0, 1, 0]), process(1.25, [1, 1, 1, 5, 1])]
    naive = [process(3, [2, 2, 2, 2, 2], [20, 5, 5, 5, 5], gflop=130.0),
             process(2, [1, 1, 3, 1, 1], gflop=130.0)]
    uncounted = [process(1, [1, 0, 0, 0, 0], gflop=0)]
    case = {"P": 7, "C": 3, "G": 5, "V": 11, "tiles": 2}
    runs = {"ours": ours, "naive": naive, "trl": uncounted}
    _, _, ours, naive, trl = bench_grpo.table([(case, runs)]).splitlines()
    assert ours == ("| P 7, C 3, G 5, V 11, 2 tiles | ours | 4.00 (2.00-9.00) | 1.00 "
                    "| 1.00 | 1.00 | 1.00 | 2.00 | 0.00 | 0.040 | 1.00 | 1.50 |")
    assert naive == ("| P 7, C 3, G 5, V 11, 2 tiles | naive | 10.00 (7.00-40.00) | 2.50 "
                     "| 2.00 | 2.00 | 3.00 | 2.00 | 2.00 | 0.130 | 3.25 | 3.00 |")
    assert trl.endswith("| 0.00 | - | - | 1.00 |")


# --------------------------------------------------------------------------------- the GPU's floors
def right_operations(model, encoder):
    """Those of gpu_steps.py, of its linear layers and of its attention, against torch's counter of
    products and the mask of the packed forward."""
    size = {"text": 97, "C": 13, "G": 5}
    prompts = [common.Prompt(list(range(97)), None)] * 2
    answers = [[[1] * 13] * 5] * 2
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        stage1.packed_logps(model, encoder, prompts, answers, 1.0)
    counts = counter.get_flop_counts()["Global"]
    linear = counts[torch.ops.aten.mm] + counts.get(torch.ops.aten.addmm, 0)
    sees = stage1.pack(prompts, answers, 0, "cpu")[2]
    text = model.config
    width = text.num_attention_heads * text.head_dim * text.num_hidden_layers
    wanted = linear + 4 * sees.sum().item() * width
    assert gpu_steps.operations(model, size, micro=2) == pytest.approx(wanted, rel=0.01)


def test_needed_operations(encoder, monkeypatch):
    # kills: the head on the prompt, too; a mask that is taken for a full square
    model = text_only_model(encoder.tokenizer, tie_word_embeddings=False)
    right_operations(model, encoder)
    monkeypatch.setattr(gpu_steps, "pairs_seen", lambda p, c, g: (p + g * c) ** 2)
    rejects(right_operations, model, encoder)
