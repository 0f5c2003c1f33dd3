"""
Text models other than the toy world's: tied and untied embeddings, sliding windows, no chat
template. Each is a real class at a tiny size with random weights, judged by the naive forward.
"""

import copy
from types import SimpleNamespace

import pytest
import torch
import toy_world
import transformers
from helpers import check_recorded

import common
import decoding
import dry_run
import stage0_sft
import stage1_text_grpo as stage1

WINDOW = 16
SIZE = dict(hidden_size=32, intermediate_size=64, num_hidden_layers=3, num_attention_heads=4,
            num_key_value_heads=2, head_dim=8, max_position_embeddings=512)
KINDS = ["full_attention", "sliding_attention", "sliding_attention"]


def llama(**size):
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**size))


def mistral(**size):
    return transformers.MistralForCausalLM(transformers.MistralConfig(
        **size, sliding_window=WINDOW))


def qwen3(**size):
    return transformers.Qwen3ForCausalLM(transformers.Qwen3Config(
        **size, use_sliding_window=True, sliding_window=WINDOW, layer_types=KINDS,
        tie_word_embeddings=True))


def gemma3(**size):
    size["num_key_value_heads"] = 1  # as in 270M and 1B: keys [B, 1, L, dim]
    return transformers.Gemma3ForCausalLM(transformers.Gemma3TextConfig(
        **size, sliding_window=WINDOW, layer_types=KINDS))


MODELS = {"llama": llama, "mistral": mistral, "qwen3": qwen3, "gemma3": gemma3}


@pytest.fixture(scope="module", params=MODELS)
def world(request, tmp_path_factory):
    """Model, encoder, three prompts of unequal length, all longer than the window, and answers."""
    folder = tmp_path_factory.mktemp(request.param)
    tokenizer = toy_world.make_tokenizer()
    torch.manual_seed(0)
    model = MODELS[request.param](vocab_size=len(tokenizer), **SIZE,
                                  eos_token_id=tokenizer.eos_token_id,
                                  pad_token_id=tokenizer.pad_token_id)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.mul_(8)  # far from uniform: a wrong mask moves log-probs by tenths
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    model, encoder = common.load(folder)
    generator = torch.Generator().manual_seed(1)
    plain = [i for i in range(300) if i not in encoder.eos_ids]
    prompts, answers = [], []
    for length in (2 * WINDOW, 3 * WINDOW + 5, WINDOW + 3):
        places = torch.randint(len(plain), (length,), generator=generator)
        prompts.append(common.Prompt([plain[i] for i in places], None))
    for lengths in ((20, 3, 1, 7, 30), (2, 25, 4, 9, 5), (6, 1, 40, 3, 2)):
        group = []
        for n in lengths:
            places = torch.randint(len(plain), (n,), generator=generator)
            group.append([plain[i] for i in places])
        answers.append(group)
    return SimpleNamespace(model=model, encoder=encoder, prompts=prompts, answers=answers)


def naive(world):
    """Log-probs of each answer, one plain forward per answer: [B*G] tensors."""
    logps = []
    for prompt, group in zip(world.prompts, world.answers, strict=True):
        for answer in group:
            ids = torch.tensor([prompt.ids + answer])
            logits = world.model(input_ids=ids).logits[0, len(prompt.ids) - 1:-1].double()
            logps.append(logits.log_softmax(-1).gather(1, torch.tensor(answer)[:, None])[:, 0])
    return logps


def packed(world):
    logp, _, owner = stage1.packed_logps(world.model, world.encoder, world.prompts, world.answers,
                                         1.0)
    per_answer = []
    for row, owners in zip(logp, owner, strict=True):
        per_answer += [row[owners == g] for g in range(1, 6)]
    return per_answer


def largest_difference(got, want):
    return max((a - b).abs().max().item() for a, b in zip(got, want, strict=True))


@torch.no_grad()
def test_packed_log_probs_and_window(world, monkeypatch):
    # kills: one dense mask for all layers, which overrides the window in silence
    want = naive(world)
    assert largest_difference(packed(world), want) < 1e-4
    monkeypatch.setattr(decoding, "layer_masks", lambda model, sees, positions, **more: sees)
    windowed = getattr(world.model.config, "sliding_window", None) is not None
    assert (largest_difference(packed(world), want) > 0.05) == windowed


def test_packed_gradient(world):
    def gradient(logps):
        world.model.zero_grad()
        sum(logp.sum() for logp in logps).backward()
        return torch.cat([p.grad.flatten() for p in world.model.parameters()]).double()
    want, got = gradient(naive(world)), gradient(packed(world))
    assert (got - want).norm() / want.norm() < 1e-4


def test_decoding_keeps_the_window(world):
    # Greedy answers are generate()'s, and sampled log-probs are the packed forward's.
    # kills: a cache that shows a sliding layer more than its window
    got = stage1.sample_group(world.model, world.encoder, world.prompts, 2, 0.0, 24, None)
    want = stage0_sft.generate_greedily(world.model, world.encoder, world.prompts,
                                        max_new_tokens=24)
    assert got.ids == [[answer, answer] for answer, in want.ids]
    rollout = stage1.sample_group(world.model, world.encoder, world.prompts, 5, 1.0, 24,
                                  torch.Generator().manual_seed(0))
    sampled = SimpleNamespace(**{**vars(world), "answers": rollout.ids})
    with torch.no_grad():
        scored = packed(sampled)
    flat = [torch.tensor(logp) for group in rollout.logp for logp in group]
    assert largest_difference(scored, flat) < 1e-4


def test_recorded_tokens_keep_the_window(world, recorded):
    # kills: masks of several kinds of layers that are not copied, or do not cover the room
    encoder = copy.copy(world.encoder)
    encoder.eos_ids = list(range(0, 300, 30))  # finished prompts leave the batch
    for group_size in (5, 1):
        check_recorded(world.model, encoder, world.prompts, group_size, 1.0)
    assert recorded["replays"] > recorded["recordings"] > 1


def test_a_kind_of_layer_that_is_not_known_is_refused(world):
    # kills: chunked attention taken for full attention
    model = copy.copy(world.model)
    model.config = copy.deepcopy(world.model.config)
    model.config.layer_types = ["chunked_attention"] * 3
    with pytest.raises(SystemExit, match="chunked_attention"):
        decoding.layer_masks(model, torch.ones(1, 1, 2, 2) > 0, torch.arange(2)[None])


def soft_capped(size):
    return transformers.Gemma2ForCausalLM(transformers.Gemma2Config(**size))


def with_sinks(size):
    config = transformers.GptOssConfig(**size, num_local_experts=5)
    return transformers.GptOssForCausalLM(config)


@pytest.mark.parametrize("make", [soft_capped, with_sinks])
def test_an_attention_that_is_not_pytorchs_is_refused(make, tmp_path):
    # kills: soft caps and sinks left out in silence
    tokenizer = toy_world.make_tokenizer()
    tokenizer.save_pretrained(tmp_path)
    model = make(SIZE | dict(vocab_size=len(tokenizer), eos_token_id=1, pad_token_id=0))
    model.save_pretrained(tmp_path)
    with pytest.raises(SystemExit, match="(gemma2|gpt_oss): its attention .* Take another model"):
        common.load(tmp_path)


def test_an_attention_inside_that_is_not_pytorchs_is_refused():
    # As in InternVL3.5's 20B. kills: the outermost model alone asked
    text = transformers.GptOssConfig(**SIZE, vocab_size=97, num_local_experts=5, pad_token_id=0)
    vision = dict(hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=2)
    config = transformers.InternVLConfig(text_config=text.to_dict(), vision_config=vision)
    with pytest.raises(SystemExit, match="gpt_oss: its attention"):
        dry_run.measure("20B", config)


def test_one_dtype_in_the_cache():
    # Under autocast keys come in fp32 from rotary positions, values in bf16: 27 GiB at 8B shape.
    cache = decoding.new_cache(9)
    keys, values = torch.rand(2, 3, 4, 8), torch.rand(2, 3, 4, 8).bfloat16()
    keys, values = cache.update(keys, values, 0)
    assert keys.dtype == values.dtype == torch.bfloat16


def test_a_base_model_gets_its_beginning_of_sequence(tmp_path):
    # kills: text + blank line without the token that Gemma cannot read without
    tokenizer = toy_world.make_tokenizer()
    tokenizer.chat_template = None
    tokenizer.bos_token = "<|endoftext|>"
    encoder = copy.copy(common.load(toy_world.PREBUILT)[1])
    encoder.tokenizer = tokenizer
    assert encoder.encode("ann").ids[0] == tokenizer.bos_token_id
    tokenizer.bos_token = None
    assert encoder.chat("ann") == "ann\n\n"


def test_a_hub_ids_end_of_sequence_ids(monkeypatch):
    # kills: generation_config.json looked for on the disk only
    encoder = common.load(toy_world.PREBUILT)[1]
    declared = transformers.GenerationConfig(eos_token_id=[5, 7])
    monkeypatch.setattr(transformers.GenerationConfig, "from_pretrained", lambda folder: declared)
    config = transformers.AutoConfig.from_pretrained(toy_world.PREBUILT)
    got = encoder._declared_eos_ids("some/hub-id", config)
    assert got == sorted({5, 7, encoder.tokenizer.eos_token_id})
