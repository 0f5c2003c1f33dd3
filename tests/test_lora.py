"""
--lora_rank: an adapter is trained instead of the weights, the KL's reference is the model without
it, and what is saved is an ordinary checkpoint. Real classes at a tiny size with random weights.
The oracle is a model without peft whose weights are W + 2 B A, written out here.
"""

import copy
import json
import sys
from types import SimpleNamespace

import pytest
import toy_world
import torch
import transformers
from helpers import (
    ROOT, flags, lines, picture, run_here, run_there, same_weights, small_world, text_only_model,
    torchrun, weights_of)
from safetensors.torch import load_file
from tokenizers import AddedToken
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

import bt_reward
import common
import stage0_sft
import stage1_text_grpo as stage1
import stage2_caption_grpo as stage2
import stage2b_cmkd as cmkd
import stage3_mm_grpo as stage3

pytestmark = pytest.mark.usefixtures("cpu_only")

RANK, G = 3, 3
LENGTHS = ((4, 1, 6), (2, 7, 3), (5, 2, 2))  # tokens of each answer
QWEN_TOKENS = {"vision_start_token_id": "<|vision_start|>", "vision_end_token_id": "<|vision_end|>",
               "image_token_id": "<|image_pad|>", "video_token_id": "<|video_pad|>"}

# What has to get an adapter, from the configuration alone: all of them in all layers.
ATTENTION = [f"self_attn.{part}_proj" for part in "qkvo"]
LANGUAGE = [*ATTENTION, "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj"]
VISION = {
    "internvl": [f"vision_tower.encoder.layer.{k}.{part}" for k in range(2) for part in (
        "attention.q_proj", "attention.k_proj", "attention.v_proj", "attention.projection_layer",
        "mlp.fc1", "mlp.fc2")] + ["multi_modal_projector.linear_1",
                                  "multi_modal_projector.linear_2"],
    "qwen2_5_vl": [f"visual.blocks.{k}.{part}" for k in range(2) for part in (
        "attn.qkv", "attn.proj", "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj")] + [
            "visual.merger.mlp.0", "visual.merger.mlp.2"],
    "qwen3_vl": [f"visual.blocks.{k}.{part}" for k in range(2) for part in (
        "attn.qkv", "attn.proj", "mlp.linear_fc1", "mlp.linear_fc2")] + [
            f"visual.{merger}.linear_fc{n}" for n in (1, 2)
            for merger in ("merger", "deepstack_merger_list.0")],
    "tied text": []}


# ------------------------------------------------------------------------------------------- models
def qwen_vl(kind, tokenizer):
    """-> model, image processor"""
    ids = {name: tokenizer.convert_tokens_to_ids(token) for name, token in QWEN_TOKENS.items()}
    text = dict(vocab_size=len(tokenizer), hidden_size=64, intermediate_size=96,
                num_attention_heads=4, num_key_value_heads=2, num_hidden_layers=2,
                max_position_embeddings=4096)
    vision = dict(depth=2, num_heads=2, patch_size=4, spatial_merge_size=2, hidden_size=32,
                  intermediate_size=64, out_hidden_size=64)
    rope = {"rope_type": "default", "rope_theta": 1e4}
    if kind == "qwen3_vl":
        text |= {"head_dim": 16, "rope_parameters": rope | {"mrope_section": [4, 2, 2],
                                                            "mrope_interleaved": True}}
        vision |= dict(num_position_embeddings=64, deepstack_visual_indexes=[0])
        model = transformers.Qwen3VLForConditionalGeneration(transformers.Qwen3VLConfig(
            text_config=text, vision_config=vision, tie_word_embeddings=True, **ids))
    else:
        text |= {"rope_parameters": rope | {"mrope_section": [2, 3, 3]}}
        vision |= dict(window_size=16, fullatt_block_indexes=[1], tokens_per_second=2)
        model = transformers.Qwen2_5_VLForConditionalGeneration(transformers.Qwen2_5_VLConfig(
            text_config=text, vision_config=vision, tie_word_embeddings=False, **ids))
    model.generation_config = transformers.GenerationConfig(
        eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id)
    return model, Qwen2VLImageProcessorPil(patch_size=4, merge_size=2, min_pixels=256,
                                           max_pixels=4096)


@pytest.fixture(scope="module", params=VISION)
def world(request, tmp_path_factory):
    """A checkpoint of one kind, three prompts (of text, of one image, of two), three answers to
    each, advantages, and which of the answers are kept."""
    pytest.importorskip("peft")
    kind, folder = request.param, tmp_path_factory.mktemp("world")
    tokenizer, images = toy_world.make_tokenizer(), None
    torch.manual_seed(0)
    if kind == "internvl":
        model, images = toy_world.make_model(tokenizer, hidden=32, layers=2)
    elif kind == "tied text":
        model = text_only_model(tokenizer, tie_word_embeddings=True)
    else:
        tokenizer.add_tokens([AddedToken(token, special=True) for token in QWEN_TOKENS.values()],
                             special_tokens=True)
        model, images = qwen_vl(kind, tokenizer)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.mul_(8)  # far from uniform
    common.save_checkpoint(folder / "made", model, SimpleNamespace(
        tokenizer=tokenizer, image_processor=images, video_settings=None))
    model, encoder = common.load(folder / "made")
    common.save_checkpoint(folder / "start", model, encoder)  # as a stage writes it

    media = [str(folder / "red.png"), str(folder / "blue.png")]
    picture("red").save(media[0])
    picture("blue", (24, 48)).save(media[1])
    prompts = [encoder.encode("what is red"), encoder.encode("is it red"), encoder.encode("or not")]
    if images is not None:
        prompts[1] = encoder.encode("<image> is it red", media[:1])
        prompts[2] = encoder.encode("<image> against <image> which is red", media)
    generator = torch.Generator().manual_seed(1)
    answers = [[torch.randint(300, (n,), generator=generator).tolist() for n in lengths]
               for lengths in LENGTHS]
    return SimpleNamespace(
        kind=kind, folder=folder, start=folder / "start", encoder=encoder, prompts=prompts,
        answers=answers, advantage=torch.randn(3, G, generator=generator, dtype=torch.float64),
        keep=torch.tensor([[1, 1, 1], [1, 0, 1], [0, 1, 1]]) > 0)


def adapted(world, freeze=False, random=True):
    """The starting model with an adapter, as the stages make it. `random`: as after many steps,
    which leave no B at zero."""
    model, _ = common.load(world.start)
    if freeze:
        common.freeze_vision(model)
    common.add_adapter(model, RANK, seed=0)
    generator = torch.Generator().manual_seed(2)
    for name, parameter in model.named_parameters():
        if random and "lora_B" in name:
            parameter.data.normal_(0.0, 0.1, generator=generator)
    return model


def linear_layers(world, freeze=False):
    """The places that have to get an adapter."""
    prefix = "model." if world.kind == "tied text" else "model.language_model."
    names = [f"{prefix}layers.{k}.{part}" for k in range(2) for part in LANGUAGE]
    return names + [f"model.{part}" for part in VISION[world.kind] if not freeze]


def adapters(world, model, freeze=False):
    """-> {place: (A, B)}, by the names of the parameters"""
    parameters = dict(model.named_parameters())
    return {name: (parameters[f"{name}.lora_A.default.weight"],
                   parameters[f"{name}.lora_B.default.weight"])
            for name in linear_layers(world, freeze)}


def plain(world, model):
    """The oracle: a model without peft, W + 2 B A for W."""
    merged, _ = common.load(world.start)
    with torch.no_grad():
        for name, (a, b) in adapters(world, model).items():
            merged.get_parameter(f"{name}.weight").add_(2 * b @ a)
    return merged


@torch.no_grad()
def logps_of(model, world):
    return stage1.packed_logps(model, world.encoder, world.prompts, world.answers, 1.0)[0]


def settings(**more):
    return stage1.Config(max_grad_norm=float("inf"), micro_batch=2, beta=0.3, temperature=0.7,
                         **more)


def update(world, model, ref, optimizer, cfg):
    return stage1.grpo_update(model, ref, world.encoder, optimizer, world.prompts, world.answers,
                              world.advantage, world.keep, cfg)


# ---------------------------------------------------------------------------------- what is trained
@pytest.mark.parametrize("freeze", [False, True])
def test_only_the_adapter_is_trained(world, freeze):
    # kills: an adapter on the head, on a frozen vision tower, on attention alone; a vision tower
    # that is trained as a whole beside it
    model = adapted(world, freeze, random=False)
    before = copy.deepcopy(model.state_dict())
    wanted = {f"{name}.lora_{part}.default.weight" for name in linear_layers(world, freeze)
              for part in "AB"}
    assert wanted == {name for name, p in model.named_parameters() if p.requires_grad}
    assert {a.shape[0] for a, _ in adapters(world, model, freeze).values()} == {RANK}
    optimizer = common.make_optimizer(model, 1e-2)
    for _ in range(2):  # in the first, B is zero and A has no gradient
        update(world, model, common.reference(model), optimizer, settings())
    after = model.state_dict()
    assert {name for name in before if not torch.equal(before[name], after[name])} == wanted


def test_the_adapter_changes_nothing_at_first_and_is_drawn_by_its_seed(world):
    # kills: B at random, A of whatever was drawn before
    start, _ = common.load(world.start)
    drawn = []
    for seed in (0, 0, 1):
        torch.rand(seed + 3)
        model, _ = common.load(world.start)
        common.add_adapter(model, RANK, seed)
        assert torch.equal(logps_of(model, world), logps_of(start, world))
        drawn.append(torch.cat([a.flatten() for a, _ in adapters(world, model).values()]))
    assert torch.equal(drawn[0], drawn[1]) and not torch.equal(drawn[0], drawn[2])


# ------------------------------------------------------------------------------- the KL's reference
def test_the_reference_is_the_starting_model(world):
    # Also after steps on images, and asking it leaves the adapter on, and to be trained.
    # kills: the model as its own reference, an adapter that stays off, one that is frozen from then
    # on, the adapter off in the language model alone, a vision tower trained as a whole
    start, _ = common.load(world.start)
    model = adapted(world, random=False)
    ref, optimizer = common.reference(model), common.make_optimizer(model, 1e-2)
    assert torch.equal(logps_of(ref, world), logps_of(start, world))
    kls = [update(world, model, ref, optimizer, settings())["kl"] for _ in range(3)]
    trained = logps_of(model, world)
    assert torch.equal(logps_of(ref, world), logps_of(start, world))
    assert torch.equal(logps_of(model, world), trained)
    assert (trained - logps_of(start, world)).abs().max() > 0.1
    assert kls[0] == 0 and kls[2] > 1e-3
    assert all(a.requires_grad and b.requires_grad for a, b in adapters(world, model).values())
    if world.kind != "tied text":  # the tower has moved, too
        a, b = adapters(world, model)[f"model.{VISION[world.kind][0]}"]
        assert b.abs().max() > 1e-3
    # no copy: what it holds is the model
    assert {id(p) for p in ref.parameters()} == {id(p) for p in model.parameters()}


def test_the_adapter_is_on_again_after_an_error(world):
    # kills: an adapter that is put on behind the call only
    model = adapted(world)
    before = logps_of(model, world)
    with pytest.raises(IndexError):
        common.reference(model)(input_ids=torch.tensor([[10 ** 6]]))  # no such token
    assert torch.equal(logps_of(model, world), before)


def test_without_an_adapter_the_reference_is_a_copy(world):
    model, _ = common.load(world.start)
    ref, before = common.reference(model), logps_of(model, world)
    model.get_input_embeddings().weight.data.mul_(2)
    assert not torch.equal(logps_of(model, world), before)
    assert torch.equal(logps_of(ref, world), before)
    assert not any(p.requires_grad for p in ref.parameters())


# ------------------------------------------------------------------------------------- the gradient
@pytest.mark.parametrize("checkpointing", [False, True])
def test_gradient_of_a_grpo_step_is_the_chain_rule(world, checkpointing):
    # W + 2 B A: what is G for the full weights is 2 G A^T for B and 2 B^T G for A.
    # kills: another scale, a reference with the adapter on, dropout, a graph that ends at frozen
    # embeddings when activations are recomputed
    model, gradients = adapted(world), {}
    merged = plain(world, model)

    def recorder(model):
        def step():
            gradients[model] = {name: p.grad.double() for name, p in model.named_parameters()
                                if p.grad is not None}
        return SimpleNamespace(step=step, state={0: {}},  # of steps before
                               zero_grad=lambda set_to_none: model.zero_grad())
    cfg = settings(gradient_checkpointing=checkpointing)
    if checkpointing:
        model.gradient_checkpointing_enable()
    got = update(world, model, common.reference(model), recorder(model), cfg)
    want = update(world, merged, common.load(world.start)[0], recorder(merged), settings())
    assert got["loss"] == pytest.approx(want["loss"], rel=1e-4)
    assert got["kl"] == pytest.approx(want["kl"], rel=1e-4) and got["kl"] > 0.01
    for name, (a, b) in adapters(world, model).items():
        full = gradients[merged][f"{name}.weight"]
        for part, rule in (("A", 2 * b.double().T @ full), ("B", 2 * full @ a.double().T)):
            grad = gradients[model][f"{name}.lora_{part}.default.weight"]
            assert rule.norm() > 1e-6, name
            assert (grad - rule).norm() / rule.norm() < 5e-5, (name, part)


# ----------------------------------------------------------------------------------- the checkpoint
def test_the_checkpoint_is_an_ordinary_one(world):
    # kills: adapter files in place of weights, names of peft, weights without the adapter or with
    # half of it, a model that goes on without its adapter or with it twice
    model = adapted(world)
    optimizer = common.make_optimizer(model, 1e-2)
    live, out = logps_of(model, world), world.folder / "saved"
    common.save_checkpoint(out, model, world.encoder)
    names = {path.name for path in world.start.iterdir()}
    assert {path.name for path in out.iterdir()} == names
    for name in names - {"model.safetensors"}:
        assert (out / name).read_bytes() == (world.start / name).read_bytes(), name
    before, after = weights_of(world.start), weights_of(out)
    assert before.keys() == after.keys()
    assert not [name for name in after if "lora" in name or "base_layer" in name]

    auto = transformers.AutoModelForCausalLM
    if world.kind != "tied text":
        auto = transformers.AutoModelForImageTextToText
    saved, info = auto.from_pretrained(out, dtype=torch.float32, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    saved.eval()
    want = plain(world, model)
    changed = {f"{name}.weight" for name in linear_layers(world)}
    for name, weight in saved.named_parameters():
        assert (weight - want.get_parameter(name)).abs().max() < 1e-6, name
        base = name.replace(".weight", ".base_layer.weight") if name in changed else name
        assert torch.equal(weight, model.get_parameter(base)) == (name not in changed), name
    for prompt in world.prompts:
        inputs = {"input_ids": torch.tensor([prompt.ids]), **common.media_of([prompt], "cpu")}
        inputs["position_ids"] = prompt.positions[..., None, :]
        with torch.no_grad():
            got, logits = saved(**inputs).logits, model(**inputs).logits
        assert (got - logits).abs().max() <= 1e-5 * logits.abs().max()
    # and training can go on
    assert (logps_of(model, world) - live).abs().max() < 1e-4
    update(world, model, common.reference(model), optimizer, settings())
    assert (logps_of(model, world) - live).abs().max() > 1e-2


# --------------------------------------------------------------------------------------- whole runs
@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Rows, and a tiny model that answers now A and now B."""
    pytest.importorskip("peft")
    folder = small_world(tmp_path_factory.mktemp("runs"), text_rl=40, caption_rl=8, mm_rl=8)
    tokenizer = toy_world.make_tokenizer()
    torch.manual_seed(0)
    model, images = toy_world.make_model(tokenizer, hidden=32, layers=2)
    toy_world.save_backbone(model, tokenizer, images, folder / "backbone")
    run_here(stage0_sft.main, flags(
        model=folder / "backbone", data=folder / "text_rl.jsonl", heldout="", target="label",
        batch_size=10, micro_batch=10, epochs=7, lr=1e-2, out=folder / "stage0"))
    return folder


def grpo_flags(runs, out, **more):
    return flags(**{"model": runs / "stage0", "data": runs / "text_rl.jsonl", "heldout": "",
                    "out": out, "batch_size": 4, "group_size": 5, "micro_batch": 2, "max_steps": 4,
                    "max_new_tokens": 9, "save_every": 1, "lr": 1e-2, "lora_rank": RANK} | more)


def log_of(out):
    machine = ("step_time", "sample_time", "tokens_per_second", "peak_memory_gb")
    return [{name: value for name, value in line.items() if name not in machine}
            for line in lines(out / "metrics.jsonl")]


def test_resumed_equals_unbroken(runs, tmp_path):
    # kills: a state of the weights without adapter or of the merged ones, an adapter that begins
    # anew; another rank goes on as if it were the same
    run_here(stage1.main, grpo_flags(runs, tmp_path / "whole"))
    for steps in (1, 3, 4):  # each time main() loads and adapts the model anew
        run_here(stage1.main, grpo_flags(runs, tmp_path / "parts", max_steps=steps))
    assert same_weights(tmp_path / "whole", tmp_path / "parts")
    assert not same_weights(tmp_path / "whole", runs / "stage0")
    assert log_of(tmp_path / "whole") == log_of(tmp_path / "parts")
    assert log_of(tmp_path / "whole")[-1]["kl"] > 0
    with pytest.raises(SystemExit, match="lora_rank 3 -> 4"):
        run_here(stage1.main, grpo_flags(runs, tmp_path / "parts", lora_rank=4))


def changes(folder, start):
    """-> {parameter: by how much it was trained}, in plain transformers' own names"""
    before = dict(common.load(start)[0].named_parameters())
    after = dict(common.load(folder)[0].named_parameters())
    assert before.keys() == after.keys()
    return {name: (after[name] - before[name]).detach().double() for name in before}


def check_low_rank(change, freeze):
    """Every linear layer was changed by a matrix of rank RANK or less, and nothing else was."""
    wanted = {f"{name}.weight" for name in linear_layers(SimpleNamespace(kind="internvl"), freeze)}
    assert {name for name, matrix in change.items() if matrix.any()} == wanted
    for name in wanted:
        sizes = torch.linalg.svdvals(change[name])
        assert sizes[RANK] < 1e-3 * sizes[0], name


def test_stage_0_and_processes(runs, tmp_path):
    # One process and two, of which one may have no image in its batch, do the same.
    # kills: another A in each process, adapters left out of the sum of gradients
    args = {"model": runs / "stage0", "data": runs / "mm_rl.jsonl", "heldout": "",
            "target": "label", "batch_size": 4, "micro_batch": 2, "epochs": 2, "lr": 1e-2,
            "freeze_vision": False, "lora_rank": RANK}
    torch.rand(7)
    run_here(stage0_sft.main, flags(**args, out=tmp_path / "one"))
    torchrun([ROOT / "stage0_sft.py", *flags(**args, out=tmp_path / "two")])
    one, two = (changes(tmp_path / name, runs / "stage0") for name in ("one", "two"))
    check_low_rank(one, freeze=False)
    for name in one:
        assert (one[name] - two[name]).norm() <= 1e-3 * one[name].norm(), name


@pytest.mark.parametrize("freeze", [True, False])
@pytest.mark.parametrize("stage", [stage2, cmkd, stage3])
def test_the_other_stages(runs, tmp_path, stage, freeze):
    # Stage 2 has captions only: a vision tower that is not frozen has nothing to learn from.
    # kills: a script that does not hand the rank on
    out, data = tmp_path / "run", {"data": runs / "caption_rl.jsonl"}
    if stage is stage2:
        data |= {"replay": runs / "text_rl.jsonl", "replay_ratio": "1:0"}
    if stage is stage3:
        data = {"data": runs / "mm_rl.jsonl", "style": "msrl"}
    if stage is cmkd:
        with pytest.MonkeyPatch.context() as patch:  # so small a model writes no rationale
            patch.setattr(cmkd, "distilled", lambda rows, samples: (
                [row | {"rationale": "because"} for row in rows], {}))
            run_here(cmkd.main, flags(
                model=runs / "stage0", heldout="", out=out, lr=1e-2, lora_rank=RANK, samples=1,
                batch_size=4, epochs=1, max_new_tokens=9, freeze_vision=freeze, **data))
    else:
        run_here(stage.main, grpo_flags(runs, out, freeze_vision=freeze, max_steps=2, **data))
        assert max(line["reward_std"] for line in lines(out / "metrics.jsonl")) > 0
    check_low_rank(changes(out, runs / "stage0"), freeze or stage is stage2)
    stage_json = json.loads((out / "stage.json").read_text())
    assert stage_json["config"]["lora_rank"] == RANK


def test_a_reward_model(runs, tmp_path):
    # The head is new, so it is trained as it is. kills: a frozen head, an adapter on it
    run_here(bt_reward.main, flags(
        model=runs / "stage0", data=runs / "mm_rl.jsonl", heldout=runs / "mm_rl.jsonl",
        batch_size=4, epochs=2, lr=1e-2, lora_rank=RANK, out=tmp_path / "run"))
    check_low_rank(changes(tmp_path / "run", runs / "stage0"), freeze=False)
    head = load_file(tmp_path / "run" / "reward_head.safetensors")
    assert not [name for name in head if "lora" in name]
    torch.manual_seed(0)
    first = bt_reward.reward_head(32, 2, "silu").state_dict()
    assert head.keys() == first.keys()
    weights = [name for name in first if name.endswith("weight")]
    assert not any(torch.equal(head[name], first[name]) for name in weights)
    # what was saved scores as what was trained
    model, encoder = bt_reward.load(tmp_path / "run")
    rows = bt_reward.load_pairs(str(runs / "mm_rl.jsonl"), encoder, model.settings,
                                bt_reward.Config(), "")
    saved = bt_reward.evaluate(model, encoder, rows, bt_reward.Config(), "saved")
    live = json.loads((tmp_path / "run" / "stage.json").read_text())["heldout"]["after"]
    for name in ("margin", "chosen", "rejected"):
        assert saved[name] == pytest.approx(live[name], abs=1e-4), name


# ------------------------------------------------------------------------------------- without peft
def parse(monkeypatch, *args):
    monkeypatch.setattr(sys, "argv", ["stage.py", *args])
    return common.parse_config(stage1.Config, stage1.__doc__, stage1.PRESETS)


def test_without_peft_one_line_says_how_to_get_it(monkeypatch):
    # kills: a traceback after minutes of loading, peft needed without --lora_rank
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(SystemExit) as stopped:
        parse(monkeypatch, "--lora_rank", "8")
    message = str(stopped.value)
    assert "--lora_rank 8" in message and "pip install peft" in message and "\n" not in message
    assert parse(monkeypatch).lora_rank == 0


def test_a_rank_below_zero_is_refused(monkeypatch, capsys):
    with pytest.raises(SystemExit):
        parse(monkeypatch, "--lora_rank", "-1")
    assert "--lora_rank must be at least 1, or 0 for off" in capsys.readouterr().err


def test_no_run_needs_peft(tmp_path):
    # kills: an import of peft at the top, or by the reference or the saving of any model
    folder = small_world(tmp_path, text_rl=4)
    program = ("import sys; sys.modules['peft'] = None; import stage1_text_grpo; "
               "stage1_text_grpo.main()")
    run_there(["-c", program, *flags(
        model=toy_world.PREBUILT, data=folder / "text_rl.jsonl", heldout="", batch_size=1,
        group_size=2, max_steps=1, max_new_tokens=3, max_prompt_tokens=3000,
        out=tmp_path / "run")])
    assert (tmp_path / "run" / "stage.json").exists()
