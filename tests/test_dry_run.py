"""
--dry_run: settings, sources, and the memory a run takes.

The formulas for memory are compared with what torch does with the real classes at their real sizes.
Under FakeTensorMode a tensor has a shape and no content, so that a step of an 8B model runs here:
`Traced` adds up the storages that are alive, saved_tensors_hooks() shows what autograd keeps.
"kills:" names wrong versions of the source under which a test was seen to fail.
"""

import math
import re
import time
import weakref
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import datasets
import pytest
import torch
import toy_world
import transformers
from helpers import PROGRAMS, ROOT, run_here, run_there, small_world, text_row, write
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import bt_reward
import common
import decoding
import dry_run
import dt2it
from data import load_rows
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
            "cpu", torch.bfloat16, enabled=mixed, cache_enabled=False))
    return turn


@pytest.fixture
def attends_in(monkeypatch):
    """-> a function that has packed answers attend in 1 or 2 calls: in the dry run, which knows
    that a GPU has few tokens in one, and in what is run here, on a CPU."""
    def choose(calls):
        # no values to look at
        monkeypatch.setattr(decoding, "is_more", lambda *inputs: False)
        monkeypatch.setattr(decoding, "is_causal", lambda sees, prompt: len(sees) == 1)
        monkeypatch.setattr(decoding, "TWO_CALLS_FROM", 0 if calls == 2 else math.inf)
        if calls == 1:
            monkeypatch.setattr(decoding, "answer_places", lambda answers, sees: ())
    return choose


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
    shared = set()
    for tensor in tree_leaves(kwargs):
        for given in (tensor, *getattr(tensor, "answers", ()), *getattr(tensor, "numbers", ())):
            if isinstance(given, torch.Tensor):
                shared.add(given.untyped_storage()._cdata)
    weights = {tuple(parameter.shape) for parameter in layer.parameters()}
    weights |= {shape[::-1] for shape in weights}
    total = 0
    for key, tensor in kept.items():
        if key not in shared and tuple(tensor.shape) not in weights:
            total += tensor.untyped_storage().nbytes()
    return total


def a_model(config):
    return transformers.AutoModelForCausalLM.from_config(config, attn_implementation="grouped")


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


@pytest.mark.parametrize("config, kv_heads, intermediate", [
    (transformers.GPT2Config(n_embd=60, n_layer=3, n_head=5), 5, 240),
    (transformers.GPTNeoXConfig(hidden_size=60, num_hidden_layers=3, num_attention_heads=5,
                                intermediate_size=77), 5, 77)])
def test_models_that_do_not_name_their_sizes_as_others_do(config, kv_heads, intermediate):
    # --shard auto asks for every model. kills: num_key_value_heads taken for granted
    size = dry_run.measure("old", config)
    assert (size.kv_heads, size.intermediate) == (kv_heads, intermediate)
    assert dry_run.cache_bytes(size, 2, 7) == 3 * 2 * 2 * 7 * 60 * 2
    assert dry_run.replica_gib(stage1.Config(), config) > 0


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
    assert dry_run.reference_bytes(size, work) == 0
    assert size.parameters == 4_732_489_216 + size.trained


# ------------------------------------------------------------------------------ what autograd keeps
@pytest.mark.parametrize("mixed", [True, False])
@pytest.mark.parametrize("calls, micro", [(1, 2), (2, 2), (2, 1)])
@pytest.mark.parametrize("name", ["1B", "4B", "8B"])
def test_activations_of_a_layer(name, calls, micro, mixed, attends_in):
    # to the byte; one sequence has no padding. kills: keys and values not repeated, one copy of a
    # norm's output for q, k and v, one mask for all layers, or in packed_attention one for each,
    # hidden size for that of q, 2 bytes for what is kept in fp32, keys of the prompt once for all
    # its answers, gather() in packed_attention, which keeps its input
    from transformers.models.internvl.modeling_internvl import InternVLVisionLayer
    from transformers.models.qwen3.modeling_qwen3 import Qwen3DecoderLayer
    attends_in(calls)
    size = dry_run.measure(name, dry_run.internvl_config(name))
    work, tiles = work_with(kind="grpo", prompt=701, answer=33, answers=5, micro=micro), 3
    b, L = work.micro, work.length
    config = dry_run.internvl_config(name)
    config.text_config._attn_implementation = decoding.ATTENTION
    config.vision_config._attn_implementation = "sdpa"
    with FakeTensorMode():
        hidden = torch.empty(b, L, config.text_config.hidden_size, requires_grad=True)
        angles = torch.empty(b, L, 128), torch.empty(b, L, 128)
        mask = torch.empty(b, 1, L, L, dtype=torch.bool)
        mask.answers = decoding.answer_places([[[1] * 33] * 5] * b, mask)
        kept = kept_by(Qwen3DecoderLayer(config.text_config, 0), hidden, mixed=mixed,
                       attention_mask=mask, position_embeddings=angles)
        seen = kept_by(InternVLVisionLayer(config.vision_config), mixed=mixed,
                       hidden_states=torch.empty(tiles, 1025, 1024, requires_grad=True))
    assert dry_run.layer_activations(size, work, mixed) == kept
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
        work = work_with(kind="sft", prompt=777, answer=0, micro=1)
        told = dry_run.layer_activations(replace(size, lora=True), work, mixed)
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
    masks = decoding.layer_masks(model, sees, positions, answers=answers)
    with common.autocast("cpu"):
        hidden = model.model(input_ids=ids, attention_mask=masks, position_ids=positions,
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
@pytest.mark.parametrize("name, layers, work, calls", [
    # where the peak is: logits in two parts; copies of weights; inputs of layers; the head's weight
    ("4B", 3, work_with(kind="grpo", prompt=700, answer=200, answers=8, micro=2), 2),
    ("4B", 10, work_with(kind="grpo", prompt=300, answer=9, answers=2), 2),
    ("1B", 20, work_with(kind="grpo", prompt=5000, answer=9, answers=2), 2),
    ("8B", 2, work_with(kind="grpo", prompt=1000, answer=50, answers=3, micro=2), 2),
    ("4B", 3, work_with(kind="sft", prompt=500, answer=1000, micro=2), 2),
    ("4B", 3, work_with(kind="bt", prompt=2000, answer=500, answers=2, micro=2), 2),
    ("4B", 3, work_with(kind="grpo", prompt=700, answer=200, answers=8, micro=2), 1)],
    ids=["logits", "casts", "inputs", "head", "sft", "bt", "in one call"])
def test_peak_of_an_update(name, layers, work, calls, checkpointing, mixed, in_bf16, attends_in):
    # A step of the real code at real width, but of fewer layers; most are told to 1 %. kills: 2
    # bytes a gradient, logits counted once, all in fp32 at once, without the factor b, copies of
    # weights forgotten, or kept in a forward with checkpointing, inputs of layers in bf16, no layer
    # that is recomputed
    in_bf16(mixed)
    attends_in(calls)
    work = replace(work, checkpointing=checkpointing)
    cfg = bt_reward.Config() if work.kind == "bt" else None
    size = dry_run.measure(name, qwen3(name, num_hidden_layers=layers), cfg)
    weights, gradients, peak = peak_of_update(name, work, mixed, layers)
    assert dry_run.weight_bytes(size) == pytest.approx(weights, rel=0.01)  # bt: without its head
    assert dry_run.gradient_bytes(size) == pytest.approx(gradients, rel=0.02)
    told = dry_run.update_bytes(size, work, mixed)
    assert told == pytest.approx(peak, rel=0.1 if work.kind == "bt" else 0.03)


@pytest.mark.parametrize("mixed", [True, False], ids=["bf16", "fp32"])
@pytest.mark.parametrize("name, B, G, P, C", [
    ("4B", 2, 8, 1000, 100), ("8B", 1, 16, 3000, 1000), ("1B", 64, 3, 50, 5),
    ("4B", 32, 1, 2000, 10)])
def test_peak_of_sampling(name, B, G, P, C, mixed, in_bf16):
    # The moments of sample_group() at which most is there, run by themselves. kills: a prompt G
    # times in the cache, values without keys, all heads in the cache, prompts that take no memory,
    # the sums of draw() in fp32
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
        run(B, P, 0, decoding.new_cache(P + G * C))
        prompts_run = traced.peak - weights
        cache = decoding.new_cache(P + G * C)
        run(B, P + G * (C - 1), 0, cache)
        logits = torch.empty(B * G, size.text.vocab_size, dtype=torch.bfloat16 if mixed else None)
        traced.peak = traced.now
        logp = stage1.scored_logits(logits, encoder, 0.9).log_softmax(-1)
        stage1.draw(logp, None)
        run(B, G, P + G * (C - 1), cache)
        last_token = traced.peak - weights
    told = dry_run.sampling_bytes(size, work_with(kind="grpo", prompt=P, answer=C), B, G, mixed)
    actual = max(prompts_run, last_token)
    assert 0.92 * actual < told < 1.15 * actual


def test_peak_of_a_process():
    # Measured, fp32 on a CPU: a process that trains took 543 MB, 526 are told. kills: gradients,
    # AdamW's moments or activations forgotten
    if not Path("/proc/self/status").exists():
        pytest.skip("Linux says how much a process had")
    from programs import peak_memory as small
    frugal = {"MALLOC_ARENA_MAX": "1", "MALLOC_TRIM_THRESHOLD_": "100000",
              "MALLOC_MMAP_THRESHOLD_": "100000"}
    done = run_there([PROGRAMS / "peak_memory.py"], **frugal)
    peak, baseline = map(int, done.stdout.split())
    size = dry_run.measure("small", transformers.Qwen3Config(**small.SMALL))
    work = work_with(kind="grpo", prompt=small.P, answer=small.C, answers=small.G, micro=small.B)
    told = dry_run.weight_bytes(size) + dry_run.gradient_bytes(size) + dry_run.adamw_bytes(size)
    told += dry_run.update_bytes(size, work, mixed=False)
    assert told == pytest.approx(peak - baseline, rel=0.1)


# ------------------------------------------------------------------------------------ the optimiser
def test_what_adamw_takes():
    # kills: one moment; a step that is not fused, which takes the roots of the largest moments
    with FakeTensorMode(), Traced() as traced:
        model = a_model(qwen3("1B", num_hidden_layers=2))
        size = dry_run.measure("1B", qwen3("1B", num_hidden_layers=2))
        for parameter in model.parameters():
            parameter.grad = torch.zeros_like(parameter)
        before = traced.now
        optimizer = common.make_optimizer(model, 1e-3)
        optimizer.step()
        assert dry_run.adamw_bytes(size) == pytest.approx(traced.now - before, rel=1e-4)
        before = traced.peak = traced.now
        optimizer.step()
        assert traced.peak - before < 1e-3 * before


# ------------------------------------------------------------------------------------------- totals
def test_the_audits_figures():
    # 4B of stage 1 on one card: two audits counted 66.8 GiB static.
    # kills: a frozen vision tower with gradients, a reference at --beta 0
    cfg = stage1.Config(**stage1.PAPER | {"beta": 0})
    size = dry_run.measure("4B", dry_run.internvl_config("4B"), cfg)
    terms = dry_run.memory(size, dry_run.work_of(cfg, 1, "pixels"))
    static = terms["weights"] + terms["AdamW"] + terms["gradients"] + terms["reference"]
    assert static / GIB == pytest.approx(66.8, abs=0.2) and terms["reference"] == 0
    assert terms["step"] == static


def test_terms_by_hand():
    # 8B at --preset paper of stage 1, all numbers written out. kills: batch_size for rollout_batch,
    # a prompt G times in the cache, peaks without what is always there, gradients while it samples
    cfg = stage1.Config(**stage1.PAPER)
    work = dry_run.work_of(cfg, 8, "pixels")
    assert (work.prompts, work.micro, work.rolled_out, work.samples) == (2, 1, 2, 8)
    assert (work.length, work.scored, work.judged, work.tiles) == (12_288, 8_193, 0, 0)
    size = dry_run.measure("8B", dry_run.internvl_config("8B"), cfg)
    every, trained = 8_528_318_464, 8_190_735_360
    terms = dry_run.memory(size, work)
    assert terms["weights"] == terms["reference"] == 4 * every
    assert (terms["AdamW"], terms["gradients"]) == (8 * trained, 4 * trained)
    tokens = 2 * (4096 + 8 * 1024)
    assert terms["cache"] == 2 * 36 * tokens * 8 * 128 * 2
    block, part = 8_193 * 151_936, 1_024 * 151_936
    assert terms["logits"] == 2 * block + 2 * (block - part) + 12 * part
    always = 8 * every + 8 * trained
    linear = trained - 151_936 * 4096 - (2 * 36 + 1) * 4096 - 36 * 2 * 128  # no embeddings, norms
    assert size.linear == linear
    assert terms["sample"] == always + 2 * 151_936 * 4096 + terms["cache"]  # the head in bf16
    assert terms["update"] > always + 4 * trained + terms["logits"] + terms["activations"] - 1
    assert terms["step"] == always + 4 * trained


def test_sharded():
    # kills: activations divided, a reference that is not, weights that nobody gathers
    cfg = stage1.Config(**stage1.PAPER)
    size = dry_run.measure("8B", dry_run.internvl_config("8B"), cfg)
    work = dry_run.work_of(cfg, 8, "pixels")
    whole, part = dry_run.memory(size, work), dry_run.memory(size, work, 8)
    for name in ("weights", "AdamW", "reference", "gradients", "step"):
        assert part[name] == whole[name] / 8
    for name in ("cache", "logits", "activations"):
        assert part[name] == whole[name]
    always = whole["weights"] + whole["AdamW"] + whole["reference"]
    saved = always * 7 / 8
    assert whole["sample"] - part["sample"] == saved - 4 * size.parameters
    layer, outside = 192_946_432, 8_528_318_464 - 36 * 192_946_432
    assert size.layer == layer
    gathered = 4 * outside + 4 * 2 * layer + 4 * outside + 4 * layer  # weights; gradients
    saved += whole["gradients"] * 7 / 8
    assert whole["update"] - part["update"] == pytest.approx(saved - gathered)


@pytest.mark.parametrize("script, change", [
    (stage0_sft, {}), (stage0_sft, {"target": "label"}), (stage1, {}), (stage2, {}), (cmkd, {}),
    (stage3, {}), (bt_reward, {})],
    ids=lambda part: getattr(part, "__name__", "label" if part else "-"))
def test_the_papers_presets_fit(script, change):
    # 8B split among eight cards of 80 GB, also with rows to judge. kills: 32 rows sampled together
    # in stage 2b, 128 rows judged together, two prompts of stage 3 sampled together
    values = script.PRESETS["paper"]
    cfg = script.Config(**change)
    values = values(cfg) if callable(values) else values
    cfg = replace(cfg, **values | {"heldout": "rows.jsonl"})
    size = dry_run.measure("8B", dry_run.internvl_config("8B"), cfg)
    work = dry_run.work_of(cfg, 8, getattr(script, "FORM", "pixels"))
    terms = dry_run.memory(size, work, 8)
    assert (terms["judge"] > 0) == (script is not bt_reward)
    assert max(terms[name] for name in dry_run.PEAKS) < dry_run.CARDS["80 GB"] * GIB
    assert cfg.eval_batch <= 8


@pytest.mark.parametrize("total, left", [(79, 75), (23.5, 21), (39.5, 37), (140, 133.7)])
def test_room_on_a_card(total, left):
    # kills: the same reserve, or the same share, on all cards
    assert dry_run.room(total) == pytest.approx(left, abs=0.05)


def test_largest_batches():
    # kills: the first that does not fit, micro-batches of more prompts than there are
    cfg = stage1.Config(**stage1.PAPER | {"batch_size": 512})
    size = dry_run.measure("1B", dry_run.internvl_config("1B"), cfg)
    work = dry_run.work_of(cfg, 8, "pixels")
    micro, rolled_out = dry_run.largest(size, work, 1, "80 GB")
    room = dry_run.CARDS["80 GB"] * GIB
    assert 1 < micro < work.prompts and 1 < rolled_out < work.prompts
    for n, fits in ((micro, True), (micro + 1, False)):
        assert (dry_run.memory(size, replace(work, micro=n))["update"] <= room) == fits
    for n, fits in ((rolled_out, True), (rolled_out + 1, False)):
        assert (dry_run.memory(size, replace(work, rolled_out=n))["sample"] <= room) == fits
    assert dry_run.largest(size, replace(work, prompts=2), 1, "80 GB") == (2, 2)


@pytest.mark.parametrize("cfg, processes, form, known", [
    (stage1.Config(), 1, "pixels", dict(
        kind="grpo", prompts=24, micro=4, rolled_out=24, samples=8, judged=128, tiles=0,
        length=1024 + 8 * 112, reference=True)),
    (stage1.Config(beta=0, heldout="", mini_batch=8, batch_size=16), 4, "pixels", dict(
        prompts=4, micro=2, rolled_out=4, judged=0, reference=False)),
    (stage2.Config(heldout=""), 1, "caption", dict(tiles=0, judged=128)),  # --replay is judged
    (stage3.Config(max_prompt_tokens=8192), 8, "pixels", dict(prompts=3, micro=3, tiles=26)),
    (stage3.Config(max_prompt_tokens=1024), 8, "pixels", dict(tiles=4)),
    (stage0_sft.Config(heldout=""), 1, "pixels", dict(
        kind="sft", answers=1, rolled_out=0, judged=0, length=2048 + 112, scored=113)),
    (stage0_sft.Config(form="caption"), 1, "caption", dict(tiles=0, judged=128)),
    (cmkd.Config(), 3, "pixels", dict(kind="sft", prompts=10, rolled_out=11, samples=8, answers=1)),
    (bt_reward.Config(), 1, "pixels", dict(
        kind="bt", answers=2, length=2048 + 2 * 1024, rolled_out=0, judged=0))])
def test_work_of_a_script(cfg, processes, form, known):
    # kills: prompts of all processes, micro-batches beyond a mini-batch, pixels in caption form
    work = dry_run.work_of(cfg, processes, form)
    assert {name: getattr(work, name) for name in known} == known


# ------------------------------------------------------------------------------------ whole scripts
@pytest.fixture(autouse=True)
def offline(monkeypatch, tmp_path_factory):
    """No network, and an empty cache: nothing that somebody has downloaded is found."""
    import huggingface_hub.constants as hub
    monkeypatch.setattr(hub, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(hub, "HF_HUB_CACHE", str(tmp_path_factory.getbasetemp() / "no cache"))


def dry(module, *args):
    """main() with --dry_run"""
    with pytest.raises(SystemExit) as ended:
        run_here(module.main, [*args, "--dry_run"])
    assert ended.value.code == 0


SCRIPTS = {stage0_sft: [], stage1: [], stage2: [], cmkd: [], stage3: [], bt_reward: [],
           dt2it: ["--curate", "noisy.jsonl", "--models", "a", "b"]}


@pytest.mark.parametrize("module", SCRIPTS, ids=lambda module: module.__name__)
def test_every_script_and_preset(module, here, capsys):
    # In an empty folder, without network. kills: a run folder, a model that is loaded, a setting of
    # one script that another lacks, a preset whose values are not those that are told
    for preset in ("toy", *module.PRESETS):
        dry(module, "--preset", preset, *SCRIPTS[module])
        told = capsys.readouterr().out
        assert list(here.iterdir()) == []
        name = preset if preset != "toy" else next(iter(module.PRESETS))
        assert f"--preset {name}" in told and "memory of a process" in told
        assert "MISSING" in told or "on the hub" in told
        values = module.PRESETS[name]
        values = values(module.Config()) if callable(values) else values
        assert re.search(rf"^lr +\S+ +{module.Config.lr} +{values['lr']}$", told, re.MULTILINE)
        for size in dry_run.SHOWN:
            for kind in ("1 replica", "8 replica", "8 sharded", "16 replica", "16 sharded"):
                assert re.search(rf"^{size} +{kind} ", told, re.MULTILINE)


def test_as_a_user_calls_it(here):
    # kills: an import that is missing when the script is __main__, minutes
    began = time.time()
    done = run_there([ROOT / "stage3_mm_grpo.py", "--preset", "paper", "--dry_run", "--out",
                      here / "run"], HF_HUB_OFFLINE="1", HF_HOME=str(here / "home"))
    assert not (here / "run").exists() and "memory of a process" in done.stdout
    assert time.time() - began < 60


# ---------------------------------------------------------------------------- sources, checkpoints
def test_what_is_said_of_a_source(here):
    # kills: rows of a whole file for those of a sample, a download, a remedy that does not exist
    small_world(here / "toy", text_rl=7)
    write("array.json", [text_row(id=str(k)) for k in range(3)])
    datasets.Dataset.from_dict({"prompt": list("abcde")}).to_parquet("five.parquet")
    state = dry_run.source_state
    assert state("toy/text_rl.jsonl") == ("found, 7 of 7 rows", 7)
    assert state("toy/text_rl.jsonl:5") == ("found, 5 of 7 rows", 5)
    assert state("toy/text_rl.jsonl:5@4") == ("found, 3 of 7 rows", 3)
    assert state("array.json")[1] == 3 and state("five.parquet:2")[1] == 2
    assert "name a file in it" in state("toy")[0]
    for path in ("none.jsonl", "toy/none.jsonl", "data/VideoDPO/pair.json",
                 "runs/x/captioned.jsonl"):
        said, rows = state(path)
        assert said.startswith("MISSING: ") and rows is None
    assert "toy_world.py" in state("toy/none.jsonl")[0]
    assert "--captioner" in state("runs/x/captioned.jsonl")[0]
    assert dry_run.first_bad_row("toy/text_rl.jsonl:5") == dry_run.first_bad_row("none.jsonl") == ""
    write("bad.jsonl", [text_row(), text_row(label="C"), "{"])
    assert dry_run.first_bad_row("bad.jsonl").startswith("; bad.jsonl:2: row label 'C' is not")
    said, rows = state("nvidia/HelpSteer3:40")
    assert said.startswith("on the hub") and rows == 40
    Path(dry_run.hub_cache(), "datasets--nvidia--HelpSteer3").mkdir(parents=True)
    assert state("nvidia/HelpSteer3")[0] == "found in the hub's local cache"


def test_what_is_said_of_a_checkpoint(here):
    # kills: a folder without config.json that is found, "runs/x" as a hub id, another script's name
    state = dry_run.checkpoint_state
    (here / "runs" / "stage0_sft").mkdir(parents=True)
    for files, missing in (("config.json", "config.json"), ("model.safetensors", "weights"),
                           ("tokenizer.json", "tokenizer")):
        assert state("runs/stage0_sft").startswith(f"MISSING: no {missing} in it; `python stage0")
        Path("runs/stage0_sft", files).touch()
    assert state("runs/stage0_sft") == "found"
    for name, remedy in (("runs/stage2b_cmkd", "stage2b_cmkd.py"), ("toy/backbone", "toy_world.py"),
                         ("runs/mine", "no such"), ("/nowhere/at/all", "no such")):
        assert state(name).startswith("MISSING: ") and remedy in state(name)
    assert state("OpenGVLab/InternVL3_5-8B-HF").startswith("on the hub")
    assert state(str(toy_world.PREBUILT)).startswith("found")


def test_rows_steps_and_tokens(here, capsys):
    # With rows and a checkpoint at hand. kills: rows of the first source alone, prompts of another
    # form, the mean of one row, epochs or batches forgotten
    small_world(here / "toy", text_rl=11, caption_rl=9, sft=70)
    args = ["--model", str(toy_world.PREBUILT)]
    for module, form in ((stage1, "pixels"), (stage2, "caption")):
        dry(module, *args)
        told = capsys.readouterr().out
        rows = load_rows(module.Config.data, common.load(toy_world.PREBUILT)[1], form, quiet=True)
        mean = sum(row["tokens"] for row in rows) / len(rows)
        assert f"prompts have {mean:,.0f} on average ({len(rows)} rows of --data)" in told
        assert re.search(r"^--model +1 replica", told, re.MULTILINE)
    dry(stage0_sft, *args, "--epochs", 3, "--batch_size", 10, "--data",
        "toy/sft.jsonl:20@30,toy/text_rl.jsonl")
    told = capsys.readouterr().out
    assert "steps       9: 3 epochs of up to 31 rows, 10 a step" in told
    assert "up to 21,600: 10 x (2,048 of the prompt + 1 x 112)" in told


@pytest.mark.parametrize("kind, text, vision", [
    ("llama", {}, None), ("gemma3_text", dict(head_dim=8), None),
    ("qwen2_5_vl", {}, dict(depth=2, hidden_size=32, num_heads=4, intermediate_size=48,
                            out_hidden_size=32)),
    ("qwen3_vl", dict(head_dim=8), dict(depth=2, hidden_size=32, num_heads=4, intermediate_size=48,
                                        out_hidden_size=32))])
def test_other_models(kind, text, vision):
    # kills: layers of the vision tower for those of the language model, a config that has no vision
    text = dict(vocab_size=99, hidden_size=32, intermediate_size=64, num_hidden_layers=3,
                num_attention_heads=4, num_key_value_heads=2, **text)
    config = transformers.AutoConfig.for_model(kind, **text)
    if vision:
        config = transformers.AutoConfig.for_model(kind, text_config=text, vision_config=vision)
    size = dry_run.measure(kind, config, stage1.Config())
    assert size.text.num_hidden_layers == 3 and size.vision is None
    assert size.layer > 2 * 32 * 32 + 3 * 32 * 64  # q and o, and the MLP
    assert (size.parameters > size.trained) == (vision is not None)
    assert dry_run.memory(size, work_with(kind="grpo", prompt=9, answer=5))["update"] > 0
