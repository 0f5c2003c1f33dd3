"""
--dry_run: settings, sources, and the memory a run takes.

The formulas for memory are compared with what torch does with the real classes at their real sizes.
Under FakeTensorMode a tensor has a shape and no content, so that a step of an 8B model runs here:
`Traced` adds up the storages that are alive, saved_tensors_hooks() shows what autograd keeps.
"kills:" names wrong versions of the source under which a test was seen to fail.
"""

import contextlib
import subprocess
import sys
import time
import weakref
from dataclasses import asdict, replace
from types import SimpleNamespace

import pytest
import torch
import transformers
from helpers import ENV, PROGRAMS, ROOT, flags, run_here, small_world, write
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import bt_reward
import common
import dry_run
import dt2it
import stage0_sft
import stage1_text_grpo as stage1
import stage2_caption_grpo as stage2
import stage2b_cmkd as cmkd
import stage3_mm_grpo as stage3

GIB = 2 ** 30
NOTHING = dict(prompt=0, answer=0, answers=1, prompts=1, micro=1, rolled_out=0, samples=0,
               judged=0, tiles=0, reference=False, checkpointing=False)


class Traced(TorchDispatchMode):
    """Inside it, .now is the bytes of all storages that are alive and were made here, .peak the
    most there have been."""

    def __init__(self):
        super().__init__()
        self.now = self.peak = 0
        self.alive = {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if isinstance(tensor, torch.Tensor):
                storage = tensor.untyped_storage()
                if storage._cdata not in self.alive:
                    self.alive[storage._cdata] = storage.nbytes()
                    self.now += storage.nbytes()
                    weakref.finalize(storage, self.freed, storage._cdata)
        self.peak = max(self.peak, self.now)
        return out

    def freed(self, key):
        self.now -= self.alive.pop(key)


@pytest.fixture
def in_bf16(monkeypatch):
    """-> a function that turns the autocast of a GPU on or off, here for the CPU."""
    def turn(mixed):
        monkeypatch.setattr(common, "autocast", lambda device: torch.autocast(
            "cpu", torch.bfloat16, enabled=mixed))
    return turn


def qwen3(name, **change):
    """The language model of InternVL3.5 in a size."""
    text = dry_run.internvl_config(name).text_config
    for key, value in change.items():
        setattr(text, key, value)
    return text


def kept_by(layer, *args, mixed=True, **kwargs):
    """Bytes that autograd keeps of the forward of a layer, but for weights and inputs that several
    layers share."""
    kept = {}

    def keep(tensor):
        kept[tensor.untyped_storage()._cdata] = tensor
        return tensor
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor), \
            torch.autocast("cpu", torch.bfloat16, enabled=mixed):
        layer(*args, **kwargs)
    shared = {tensor.untyped_storage()._cdata for tensor in tree_leaves(kwargs)}
    weights = {tuple(parameter.shape) for parameter in layer.parameters()}
    weights |= {shape[::-1] for shape in weights}
    total = 0
    for key, tensor in kept.items():
        if key not in shared and tuple(tensor.shape) not in weights:
            total += tensor.untyped_storage().nbytes()
    return total


def a_model(config):
    return transformers.AutoModelForCausalLM.from_config(config, attn_implementation="sdpa")


def work_with(**known):
    return dry_run.Work(**NOTHING | known)


# --------------------------------------------------------------------------------------- parameters
def test_parameters_of_internvl():
    # kills: a tied head, a vision tower without biases, a projector forgotten. 1B's three counts
    # were read from its published weights; of the others the model card gives one decimal
    size = dry_run.measure("1B", dry_run.internvl_config("1B"), stage1.Config(freeze_vision=True))
    assert size.parameters == 1_060_897_792
    assert size.parameters - size.trained == 304_012_288 + 5_253_120
    for name, billions in {"1B": 1.1, "2B": 2.3, "4B": 4.7, "8B": 8.5, "14B": 15.1}.items():
        size = dry_run.measure(name, dry_run.internvl_config(name))
        assert round(size.parameters / 1e9, 1) == billions and size.trained == size.parameters


@pytest.mark.parametrize("tied", [True, False])
def test_tied_embeddings_count_once(tied):
    # kills: head added to the sum; the copy of a tied head left out
    V, H, F, Q, K, D = 11, 8, 12, 24, 12, 6  # 4 heads, 2 of keys and values, of 6
    config = transformers.Qwen3Config(
        vocab_size=V, hidden_size=H, intermediate_size=F, num_hidden_layers=3,
        num_attention_heads=4, num_key_value_heads=2, head_dim=D, tie_word_embeddings=tied)
    size = dry_run.measure("tiny", config)
    linear = 2 * H * Q + 2 * H * K + 3 * H * F
    layer = linear + 2 * H + 2 * D
    assert (size.layer, size.head, size.tied) == (layer, V * H, tied)
    assert size.parameters == 3 * layer + H + V * H * (1 if tied else 2)
    assert size.linear == 3 * linear + V * H
    scored = dry_run.measure("tiny", config, bt_reward.Config(head_layers=2))
    head = H * H + H + H + 1
    assert scored.trained == 3 * layer + H + V * H + head  # no head, unless it is the embeddings
    assert scored.parameters == size.parameters + head


def test_an_adapter_trains_little():
    # kills: trained weights of the whole model, a second model as reference, copies by autocast
    pytest.importorskip("peft")
    H, F, Q, K, R = 2560, 9728, 4096, 1024, 16
    size = dry_run.measure("4B", dry_run.internvl_config("4B"),
                           stage1.Config(lora_rank=R, freeze_vision=True))
    layer = R * (2 * (H + Q) + 2 * (H + K) + 3 * (H + F))
    work = work_with(kind="grpo", reference=True)
    assert size.trained == 36 * layer
    assert dry_run.adamw_bytes(size) == 8 * 36 * layer
    assert dry_run.weight_bytes(size) == 4 * size.parameters
    assert dry_run.reference_bytes(size, work) == 0 and dry_run.cast_bytes(size) == 0
    assert size.parameters == 4_732_489_216 + size.trained


# ------------------------------------------------------------------------------ what autograd keeps
@pytest.mark.parametrize("mixed", [True, False])
@pytest.mark.parametrize("name", ["1B", "4B", "8B"])
def test_activations_of_a_layer(name, mixed):
    # to the byte. kills: keys and values not repeated, one copy of a norm's output for q, k and v,
    # a mask shared by the layers, hidden size for that of q, 2 bytes for what is kept in fp32
    from transformers.models.internvl.modeling_internvl import InternVLVisionLayer
    from transformers.models.qwen3.modeling_qwen3 import Qwen3DecoderLayer
    size = dry_run.measure(name, dry_run.internvl_config(name))
    b, L, tiles = 2, 777, 3
    config = dry_run.internvl_config(name)
    config.text_config._attn_implementation = config.vision_config._attn_implementation = "sdpa"
    with FakeTensorMode():
        hidden = torch.empty(b, L, config.text_config.hidden_size, requires_grad=True)
        angles = torch.empty(b, L, 128), torch.empty(b, L, 128)
        kept = kept_by(Qwen3DecoderLayer(config.text_config, 0), hidden, mixed=mixed,
                       attention_mask=torch.empty(b, 1, L, L, dtype=torch.bool),
                       position_embeddings=angles)
        seen = kept_by(InternVLVisionLayer(config.vision_config), mixed=mixed,
                       hidden_states=torch.empty(tiles, 1025, 1024, requires_grad=True))
    assert dry_run.layer_activations(size, b, L, mixed) == kept
    inputs = 4 * tiles * 1025 * 1024  # kept_by() leaves out what was given by name
    assert dry_run.vision_activations(size, tiles, mixed) == seen + inputs


def test_activations_with_an_adapter():
    # kills: the input of A forgotten, or kept for a layer without one
    peft = pytest.importorskip("peft")
    from transformers.models.qwen3.modeling_qwen3 import Qwen3DecoderLayer
    size = dry_run.measure("1B", dry_run.internvl_config("1B"))
    config = qwen3("1B")
    config._attn_implementation = "sdpa"
    layer = Qwen3DecoderLayer(config, 0).requires_grad_(False)  # peft wants real weights
    peft.inject_adapter_in_model(peft.LoraConfig(r=8, target_modules="all-linear"), layer)
    for mixed in (True, False):
        kept = kept_by(layer, torch.zeros(1, 777, 1024, requires_grad=True), mixed=mixed,
                       attention_mask=torch.ones(1, 1, 777, 777, dtype=torch.bool),
                       position_embeddings=(torch.zeros(1, 777, 128), torch.zeros(1, 777, 128)))
        told = dry_run.layer_activations(replace(size, lora=True), 1, 777, mixed)
        assert told == pytest.approx(kept, rel=0.01)


# ---------------------------------------------------------------------------------- peaks of a step
def grpo_part(model, work):
    prompts = [common.Prompt([1] * work.prompt, None)] * work.micro
    answers = [[[1] * work.answer] * work.answers] * work.micro
    encoder = SimpleNamespace(pad_id=0, image_token_id=None)
    logp, _, _ = stage1.packed_logps(model, encoder, prompts, answers, 0.9)
    return (logp * torch.ones_like(logp)).sum()


def sft_part(model, work):
    """answer_nll() as it stands, but for a mask and a length that are read from numbers."""
    prompts = [common.Prompt([1] * work.prompt, None)] * work.micro
    ids, mask, positions, labels, media = stage0_sft.collate(
        prompts, [[1] * work.answer] * work.micro, 0, "cpu")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.Tensor, "nonzero", lambda tensor: [work.prompt])
        patch.setattr(torch.Tensor, "item", lambda tensor: 0)
        return stage0_sft.answer_nll(model, ids, mask[:, None, None].bool().expand(
            -1, 1, work.length, -1), positions, labels, media)[0]


def bt_part(model, work):
    prompts = [common.Prompt([1] * work.prompt, None)] * work.micro
    answers = [[[1] * work.answer] * work.answers] * work.micro
    ids, positions, sees, *_ = stage1.pack(prompts, answers, 0, "cpu")
    with common.autocast("cpu"):
        hidden = model.model(input_ids=ids, attention_mask=sees, position_ids=positions,
                             use_cache=False).last_hidden_state
    return hidden[:, -1:].float().sum()


PARTS = {"grpo": grpo_part, "sft": sft_part, "bt": bt_part}


def peak_of_update(name, work, mixed, layers):
    """-> bytes: weights; gradients; the most that the second micro-batch adds to both."""
    with FakeTensorMode(), Traced() as traced:
        model = a_model(qwen3(name, num_hidden_layers=layers))
        weights = traced.now
        if work.checkpointing:
            model.gradient_checkpointing_enable()
            model.train()
        PARTS[work.kind](model, work).backward()
        held = traced.peak = traced.now
        PARTS[work.kind](model, work).backward()
    return weights, held - weights, traced.peak - held


@pytest.mark.parametrize("mixed", [True, False], ids=["bf16", "fp32"])
@pytest.mark.parametrize("checkpointing", [True, False], ids=["checkpointing", "all kept"])
@pytest.mark.parametrize("name, layers, work", [
    ("4B", 5, work_with(kind="grpo", prompt=2000, answer=200, answers=8)),  # logits in two parts
    ("8B", 3, work_with(kind="grpo", prompt=1000, answer=50, answers=3, micro=2)),
    ("1B", 6, work_with(kind="grpo", prompt=900, answer=9, answers=2, micro=3)),
    ("4B", 4, work_with(kind="sft", prompt=1500, answer=300, micro=2)),
    ("4B", 4, work_with(kind="bt", prompt=2000, answer=500, answers=2, micro=2))],
    ids=["grpo 4B", "grpo 8B", "grpo 1B", "sft 4B", "bt 4B"])
def test_peak_of_an_update(name, layers, work, checkpointing, mixed, in_bf16):
    # A step of the real code at real width, but of fewer layers. kills: gradients forgotten, logits
    # counted once, in full in place of parts, without the factor b, copies of weights forgotten or
    # kept with checkpointing, activations of all layers with it, of one layer without
    in_bf16(mixed)
    work = replace(work, checkpointing=checkpointing)
    cfg = bt_reward.Config() if work.kind == "bt" else None
    size = dry_run.measure(name, qwen3(name, num_hidden_layers=layers), cfg)
    weights, gradients, peak = peak_of_update(name, work, mixed, layers)
    assert dry_run.weight_bytes(size) == pytest.approx(weights, rel=0.01)  # bt: without its head
    assert dry_run.gradient_bytes(size) == pytest.approx(gradients, rel=0.02)
    within = 0.25 if work.kind == "bt" else 0.08
    assert dry_run.update_bytes(size, work, mixed) == pytest.approx(peak, rel=within)


@pytest.mark.parametrize("mixed", [True, False], ids=["bf16", "fp32"])
@pytest.mark.parametrize("name, B, G, P, C", [
    ("4B", 2, 8, 1000, 100), ("8B", 1, 16, 3000, 1000), ("1B", 64, 3, 50, 5),
    ("4B", 32, 1, 2000, 10)])
def test_peak_of_sampling(name, B, G, P, C, mixed, in_bf16):
    # The moments of sample_group() at which most is there, run by themselves. kills: G for N in the
    # cache, values without keys, all heads in the cache, prompts that take no memory, the sums of
    # draw() in fp32
    in_bf16(mixed)
    size = dry_run.measure(name, qwen3(name, num_hidden_layers=5))
    encoder = SimpleNamespace(image_token_id=None)

    def run(rows, new, past, cache):
        """`new` tokens of `rows` sequences behind `past` others -> logits of the last [rows, V]"""
        ones = torch.ones(rows, new, dtype=torch.long)
        mask = torch.ones(rows, 1, new, past + new, dtype=torch.bool)
        with common.autocast("cpu"):
            return model(input_ids=ones, attention_mask=mask, position_ids=ones, use_cache=True,
                         past_key_values=cache, logits_to_keep=1).logits[:, -1]

    with FakeTensorMode(), Traced() as traced, torch.no_grad():
        model = a_model(qwen3(name, num_hidden_layers=5))
        weights = traced.now
        run(B, P, 0, common.decoding_cache())
        prompts_run = traced.peak - weights
        cache = common.decoding_cache()
        logits = run(B * G, P + C - 1, 0, cache)
        traced.peak = traced.now
        logp = stage1.scored_logits(logits, encoder, 0.9).log_softmax(-1)
        stage1.draw(logp, None)
        run(B * G, 1, P + C - 1, cache)
        last_token = traced.peak - weights
    told = dry_run.sampling_bytes(size, work_with(kind="grpo", prompt=P, answer=C), B, G, mixed)
    repeated = 0  # not by transformers 5.23, and it is an upper bound
    if last_token > prompts_run:
        repeated = 2 * B * G * (P + C) * 128 * size.text.num_attention_heads * (2 if mixed else 4)
    actual = max(prompts_run, last_token)
    assert 0.92 * actual < told < 1.1 * actual + repeated
