"""
Qwen2-VL, Qwen2.5-VL and Qwen3-VL: real classes at a tiny size with random weights. The oracle is
plain transformers, which counts its positions itself, gets a video as a video (its own token and
arguments; here it is an image of several moments), and its texts and patches from Qwen's own
processors as far as they run without torchvision.
"""

import copy
import math
import runpy
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import toy_world
import transformers
from helpers import (
    PROGRAMS, ROOT, check_recorded, flags, lines, noise, rejects, run_here, small_world, torchrun,
    weights_of, write_video)
from PIL import Image
from tokenizers import AddedToken
from transformers.models.qwen2_5_vl.processing_qwen2_5_vl import Qwen2_5_VLProcessor
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import (
    Qwen2VLImageProcessorPil,
    smart_resize,
)
from transformers.models.qwen3_vl.processing_qwen3_vl import Qwen3VLProcessor
from transformers.models.qwen3_vl.video_processing_qwen3_vl import Qwen3VLVideoProcessor

import bt_reward
import common
import stage0_sft
import stage1_text_grpo as stage1

PATCH, MERGE, FRAMES = 4, 2, 5
TOKEN = (PATCH * MERGE) ** 2  # pixels per token
TOKENS = ("<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>")
LENGTHS = ((7, 1, 12), (3, 9, 2), (1, 6, 5), (8, 2, 4), (4, 4, 10))  # tokens of each answer
TEXT = dict(hidden_size=64, intermediate_size=96, num_attention_heads=4, num_key_value_heads=2,
            num_hidden_layers=3, max_position_embeddings=4096, tie_word_embeddings=False)
VISION = dict(depth=2, num_heads=2, patch_size=PATCH, spatial_merge_size=MERGE)


def qwen2_vl(text, tokens):
    rope = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 3, 3]}
    return transformers.Qwen2VLForConditionalGeneration(transformers.Qwen2VLConfig(
        text_config=text | {"rope_parameters": rope},
        vision_config=VISION | dict(embed_dim=32, hidden_size=64, mlp_ratio=2), **tokens))


def qwen2_5_vl(text, tokens):
    rope = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 3, 3]}
    return transformers.Qwen2_5_VLForConditionalGeneration(transformers.Qwen2_5_VLConfig(
        text_config=text | {"rope_parameters": rope},
        vision_config=VISION | dict(hidden_size=32, intermediate_size=64, out_hidden_size=64,
                                    window_size=16, fullatt_block_indexes=[1],
                                    tokens_per_second=2), **tokens))


def qwen3_vl(text, tokens):
    rope = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [4, 2, 2],
            "mrope_interleaved": True}
    return transformers.Qwen3VLForConditionalGeneration(transformers.Qwen3VLConfig(
        text_config=text | {"rope_parameters": rope, "head_dim": 16},
        vision_config=VISION | dict(hidden_size=32, intermediate_size=64, out_hidden_size=64,
                                    num_position_embeddings=64, deepstack_visual_indexes=[0, 1]),
        **tokens))


MODELS = {"qwen2_vl": qwen2_vl, "qwen2_5_vl": qwen2_5_vl, "qwen3_vl": qwen3_vl}


def make_checkpoint(kind, folder):
    """A folder as Qwen publishes them, but for its size."""
    tokenizer = toy_world.make_tokenizer()
    tokenizer.add_tokens([AddedToken(token, special=True) for token in TOKENS],
                         special_tokens=True)
    names = ("vision_start_token_id", "vision_end_token_id", "image_token_id", "video_token_id")
    tokens = dict(zip(names, tokenizer.convert_tokens_to_ids(list(TOKENS)), strict=True))
    torch.manual_seed(0)
    model = MODELS[kind](TEXT | {"vocab_size": len(tokenizer)}, tokens)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.mul_(8)  # far from uniform: a wrong position moves log-probs by tenths
    model.generation_config = transformers.GenerationConfig(
        eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    images = Qwen2VLImageProcessorPil(patch_size=PATCH, merge_size=MERGE, min_pixels=4 * TOKEN,
                                      max_pixels=64 * TOKEN)
    images.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module", params=MODELS)
def world(request, tmp_path_factory):
    """Model, encoder, five prompts (text, an image, two images of other shapes, frames in a folder,
    a video file), the same as plain transformers wants them, and three answers to each."""
    kind, folder = request.param, tmp_path_factory.mktemp(request.param)
    make_checkpoint(kind, folder / "model")
    model, encoder = common.load(folder / "model", frames=FRAMES)
    wide, tall = noise(folder / "wide.png", (48, 16), 1), noise(folder / "tall.png", (24, 64), 2)
    for k in range(FRAMES):
        noise(folder / "frames" / f"{k}.png", (64, 40), 10 + k)
    film = write_video(folder / "film.mp4", 20, (64, 40))
    cases = [("what is red", (), False), ("<image> is it red", [wide], False),
             ("<image> against <image> which is red", [tall, wide], False),
             ("<video> where is it", [str(folder / "frames")], True),
             ("say <video> what is it", [str(film)], True)]
    prompts = [encoder.encode(*case) for case in cases]
    plain = [plain_inputs(encoder, kind, *case) for case in cases]
    generator = torch.Generator().manual_seed(1)
    answers = []
    for lengths in LENGTHS:
        group = []
        for n in lengths:
            group.append(torch.randint(300, (n,), generator=generator).tolist())
        answers.append(group)
    return SimpleNamespace(kind=kind, folder=folder, model=model, encoder=encoder, prompts=prompts,
                           plain=plain, answers=answers, cases=cases)


# -------------------------------------------------------------- the oracle: as transformers has it
def plain_inputs(encoder, kind, text, media, video):
    """A prompt as its own processor would put it to the model, without positions."""
    official = SimpleNamespace(
        image_token="<|image_pad|>", video_token="<|video_pad|>",
        vision_start_token="<|vision_start|>", vision_end_token="<|vision_end|>",
        image_processor=SimpleNamespace(merge_size=MERGE),
        video_processor=SimpleNamespace(merge_size=MERGE, temporal_patch_size=2),
        _calculate_timestamps=lambda *args: Qwen3VLProcessor._calculate_timestamps(None, *args))
    processor = Qwen3VLProcessor if kind == "qwen3_vl" else Qwen2_5_VLProcessor
    text, inputs = encoder.chat(text), {}
    for path in media:
        if video:
            pixels, grid, indices, fps, total = plain_video(path)
            inputs |= {"pixel_values_videos": pixels, "video_grid_thw": grid}
            if kind == "qwen2_5_vl":
                sampled = len(indices) / total * fps
                inputs["second_per_grid_ts"] = [2 / sampled]
            metadata = SimpleNamespace(fps=fps, frames_indices=list(indices))
            shown = processor.replace_video_token(
                official, {"video_grid_thw": grid, "video_metadata": [metadata]}, 0)
        else:
            out = encoder.image_processor(images=[Image.open(path)], return_tensors="pt")
            for name in ("pixel_values", "image_grid_thw"):
                inputs[name] = torch.cat([inputs[name], out[name]]) if name in inputs else out[name]
            shown = processor.replace_image_token(official, out, 0)
        if not video or kind != "qwen3_vl":
            shown = f"<|vision_start|>{shown}<|vision_end|>"
        text = text.replace("<video>" if video else "<image>", shown, 1)
    ids = torch.tensor([encoder.tokenizer(text, add_special_tokens=False)["input_ids"]])
    return inputs | {"input_ids": ids}


def plain_video(path):
    """-> patches, grid, indices of the frames, frames per second and frames of the whole video"""
    images = common.open_video(path, FRAMES)
    indices, fps, total = range(FRAMES), 2, FRAMES  # a folder
    if path.endswith(".mp4"):
        indices, fps, total = [2, 6, 10, 14, 18], 8, 20
    height, width = smart_resize(images[0].height, images[0].width, PATCH * MERGE,
                                 min_pixels=64 * TOKEN, max_pixels=64 * TOKEN)
    processor, frames = Qwen2VLImageProcessorPil(), []
    mean = torch.tensor(processor.image_mean)[:, None, None]
    std = torch.tensor(processor.image_std)[:, None, None]
    for image in images:
        image = image.resize((width, height), Image.Resampling.BICUBIC)
        frame = torch.tensor(np.array(image)).permute(2, 0, 1) / 255
        frames.append((frame - mean) / std)
    videos = torch.stack(frames)[None]
    patches, *grid = Qwen3VLVideoProcessor.patchify(None, videos, PATCH, MERGE, 2)
    return patches[0], torch.tensor([grid]), indices, fps, total


def kinds_of_tokens(world, ids):
    config = world.model.config
    return (ids == config.image_token_id).int() + 2 * (ids == config.video_token_id).int()


def plain_forward(world, case, answer=()):
    """Every logit of prompt + answer [L, V], by the model's own positions."""
    inputs = dict(world.plain[case])
    ids = torch.cat([inputs.pop("input_ids"), torch.tensor([answer], dtype=torch.long)], 1)
    return world.model(input_ids=ids, mm_token_type_ids=kinds_of_tokens(world, ids),
                       **inputs).logits[0]


def one_by_one(world):
    """Log-probs of each answer, one plain forward per answer: [B*G] tensors."""
    logps = []
    for case, group in enumerate(world.answers):
        for answer in group:
            logits = plain_forward(world, case, answer).double()
            logits[:, world.encoder.image_token_id] = -math.inf
            logits = logits[-len(answer) - 1:-1]
            logps.append(logits.log_softmax(-1).gather(1, torch.tensor(answer)[:, None])[:, 0])
    return logps


def packed(world, answers=None):
    answers = answers or world.answers
    logp, _, owner = stage1.packed_logps(world.model, world.encoder, world.prompts, answers, 1.0)
    per_answer = []
    for row, owners in zip(logp, owner, strict=True):
        per_answer += [row[owners == g] for g in range(1, len(answers[0]) + 1)]
    return per_answer


def largest_difference(got, want):
    return max((a - b).abs().max().item() for a, b in zip(got, want, strict=True))


# ----------------------------------------------------------------------------------------- encoding
def test_texts_and_pixels_are_the_processors(world):
    # kills: one frame per moment, the first frame of each pair twice, times of the frames and not
    # of the moments, a video that is not resized as a video
    config = world.model.config
    for prompt, plain in zip(world.prompts, world.plain, strict=True):
        ids = plain["input_ids"][0]
        ids = ids.where(ids != config.video_token_id, config.image_token_id)
        assert prompt.ids == ids.tolist()
        pixels = plain.get("pixel_values", plain.get("pixel_values_videos"))
        if pixels is None:
            assert prompt.pixels is None and prompt.grids is None
            continue
        torch.testing.assert_close(prompt.pixels, pixels, atol=1e-5, rtol=0)
        grids = plain.get("image_grid_thw", plain.get("video_grid_thw"))
        assert torch.equal(prompt.grids, grids)


def test_positions_are_the_models_own(world):
    # kills: one part for all, height before time, text that goes on at its place in the ids, still
    # images with the time of a video
    for prompt, plain in zip(world.prompts, world.plain, strict=True):
        if prompt.pixels is None:
            assert torch.equal(prompt.positions, torch.arange(len(prompt.ids)).expand(3, -1))
            continue
        inputs = {name: values for name, values in plain.items() if "pixel" not in name}
        want, delta = world.model.model.get_rope_index(
            mm_token_type_ids=kinds_of_tokens(world, plain["input_ids"]), **inputs)
        assert torch.equal(prompt.positions, want[:, 0])
        after = delta.item() + len(prompt.ids)
        assert prompt.following(3).tolist() == [after, after + 1, after + 2]


def test_positions_of_the_published_example():
    # By Qwen2.5-VL's authors, in the docstring of transformers 4.49: 3 moments of 2 x 2, 25
    # positions a second, a moment each 2 seconds. kills: text after rows and columns (at 2)
    ids = [9] * 12 + [1] * 5
    time, height, width = common.rotary_positions(ids, 9, [([0, 50, 100], 2, 2)]).tolist()
    assert time == [0] * 4 + [50] * 4 + [100] * 4 + [101, 102, 103, 104, 105]
    assert height == [0, 0, 1, 1] * 3 + [101, 102, 103, 104, 105]
    assert width == [0, 1] * 6 + [101, 102, 103, 104, 105]


def test_a_limit_of_pixels_is_remembered(world, tmp_path):
    # kills: a limit for images only, a limit that the checkpoint forgets
    folder = world.folder / "model"
    model, encoder = common.load(folder, max_pixels=16 * TOKEN, frames=FRAMES)
    for case, free in zip(world.cases[2:], world.prompts[2:], strict=True):  # the larger media
        prompt = encoder.encode(*case)
        assert (prompt.grids.prod(1) // prompt.grids[:, 0] <= 16 * MERGE ** 2).all()
        assert len(prompt.ids) < len(free.ids)
    common.save_checkpoint(tmp_path, model, encoder)
    again = common.load(tmp_path, frames=FRAMES)[1]
    assert again.encode(*world.cases[2]).ids == encoder.encode(*world.cases[2]).ids


def test_a_reward_model_remembers_its_limit_of_pixels(world, tmp_path):
    # kills: --max_pixels that does not reach the images, a reward model that forgets it
    rows = []
    for i in range(2):
        path = noise(tmp_path / f"{i}.png", (150, 200), i)
        rows.append({"id": str(i), "task": "image_understanding", "prompt": "a", "media": [path],
                     "responses": ["b", "c"], "label": "A"})
    common.write_lines(tmp_path / "rows.jsonl", rows)
    run_here(bt_reward.main, flags(
        model=world.folder / "model", data=tmp_path / "rows.jsonl", heldout="", epochs=1,
        batch_size=2, max_pixels=9 * TOKEN, max_prompt_tokens=4096, out=tmp_path / "run"))
    _, encoder = bt_reward.load(tmp_path / "run")
    grid = encoder.encode("<image> a", [rows[0]["media"][0]], False).grids[0]
    assert 4 * MERGE ** 2 <= grid.prod() <= 9 * MERGE ** 2


def test_a_medium_that_cannot_be_resized_is_a_bad_row(world, tmp_path):
    strip = noise(tmp_path / "strip.png", (900, 4), 0)
    with pytest.raises(common.BadRow, match="resized"):
        world.encoder.encode("<image>", [strip])


# ------------------------------------------------------------------- packed forward, sampling, loss
def right_log_probs(world):
    with torch.no_grad():
        assert largest_difference(packed(world), world.wanted) < 2e-5


@pytest.fixture(scope="module")
def wanted(world):
    with torch.no_grad():
        world.wanted = one_by_one(world)
    return world


def test_packed_log_probs(wanted):
    right_log_probs(wanted)


def answers_go_on_at_the_number_of_tokens(patch, world):
    patch.setattr(common.Prompt, "following",
                  lambda prompt, n: len(prompt.ids) + torch.arange(n))


def answers_go_on_after_one_another(patch, world):
    real = stage1.pack

    def pack(prompts, answers, *more):
        ids, positions, sees, source, target, owner, media = real(prompts, answers, *more)
        after = positions[..., -target.shape[1] - 1:][..., :1] + 1 + torch.arange(target.shape[1])
        positions = torch.cat([positions[..., :-target.shape[1]], after], -1)
        return ids, positions, sees, source, target, owner, media
    patch.setattr(stage1, "pack", pack)


def one_part_for_all(patch, world):
    for prompt in world.prompts:
        patch.setattr(prompt, "positions", torch.arange(len(prompt.ids)).expand(3, -1))


def height_and_width_exchanged(patch, world):
    for prompt in world.prompts:
        patch.setattr(prompt, "positions", prompt.positions[[0, 2, 1]])


def time_stands_still(patch, world):
    for case, prompt in zip(world.cases, world.prompts, strict=True):
        if case[2]:
            time, height, width = prompt.positions
            medium = (time != height) | (height != width)
            patch.setattr(prompt, "positions", torch.stack(
                [time.where(~medium, time[medium].min()), height, width]))


def images_in_another_order(patch, world):
    first, second = world.prompts[3].pixels, world.prompts[4].pixels
    assert first.shape == second.shape
    patch.setattr(world.prompts[3], "pixels", second)
    patch.setattr(world.prompts[4], "pixels", first)


def no_deepstack(patch, world):
    patch.setattr(type(world.model.model.language_model), "_deepstack_process",
                  lambda self, hidden, *features: hidden)


WRONG = {"qwen2_vl": [answers_go_on_at_the_number_of_tokens, answers_go_on_after_one_another,
                      one_part_for_all, height_and_width_exchanged, images_in_another_order],
         "qwen3_vl": [no_deepstack]}
WRONG["qwen3_vl"] += WRONG["qwen2_vl"]
WRONG["qwen2_5_vl"] = [time_stands_still, *WRONG["qwen2_vl"]]


def test_wrong_packings_are_rejected(wanted):
    for wrong in WRONG[wanted.kind]:
        with pytest.MonkeyPatch.context() as patch:
            wrong(patch, wanted)
            rejects(right_log_probs, wanted)
    right_log_probs(wanted)


def test_packed_gradient(world):
    # kills: features without a gradient, a vision tower left out
    def gradient(logps):
        world.model.zero_grad()
        sum(logp.sum() for logp in logps).backward()
        return {name: p.grad.double() for name, p in world.model.named_parameters()}
    want, got = gradient(one_by_one(world)), gradient(packed(world))
    total = sum(g.norm() ** 2 for g in want.values()) ** 0.5
    for name, right in want.items():
        assert (got[name] - right).norm() < 1e-5 * total, name
    assert want["model.visual.patch_embed.proj.weight"].norm() > 1e-3
    world.model.zero_grad()


def generated(world, n):
    """Greedy answers by plain generate() to each prompt by itself."""
    answers = []
    for inputs in world.plain:
        ids = inputs["input_ids"]
        out = world.model.generate(
            **inputs, attention_mask=torch.ones_like(ids), max_new_tokens=n, do_sample=False,
            mm_token_type_ids=kinds_of_tokens(world, ids),
            suppress_tokens=[world.encoder.image_token_id], eos_token_id=world.encoder.eos_ids,
            pad_token_id=world.encoder.pad_id)
        answers.append(out[0, ids.shape[1]:].tolist())
    return answers


def right_greedy_answers(world, sample):
    got = sample(world.model, world.encoder, world.prompts, 2, 0.0, 16, None)
    assert got.ids == [[answer, answer] for answer in world.greedy]


def test_greedy_answers_are_those_of_generate(world):
    # A mixed, padded batch against prompts by themselves. kills: decoding that goes on at the
    # number of tokens
    world.greedy = generated(world, 16)
    assert len({tuple(answer) for answer in world.greedy}) == len(world.prompts)
    right_greedy_answers(world, stage1.sample_group)
    got = stage0_sft.generate_greedily(world.model, world.encoder, world.prompts,
                                       max_new_tokens=16)
    assert got.ids == [[answer] for answer in world.greedy]
    for wrong in (answers_go_on_at_the_number_of_tokens_when_sampled, one_part_for_all):
        with pytest.MonkeyPatch.context() as patch:
            wrong(patch, world)
            rejects(right_greedy_answers, world, stage1.sample_group)


def test_recorded_tokens_are_those_that_are_run(world, recorded):
    # kills: positions in three parts that are not copied
    encoder = copy.copy(world.encoder)
    encoder.eos_ids = list(range(0, 300, 30))  # finished prompts leave the batch
    check_recorded(world.model, encoder, world.prompts, 3, 1.0)
    assert recorded["replays"] > recorded["recordings"] > 0


def answers_go_on_at_the_number_of_tokens_when_sampled(patch, world):
    """The last position of each prompt is all that decoding goes on from."""
    for prompt in world.prompts:
        positions = prompt.positions.clone()
        positions[:, -1] = len(prompt.ids) - 1
        patch.setattr(prompt, "positions", positions)


def test_sampled_log_probs_are_those_of_the_packed_forward(world):
    rollout = stage1.sample_group(world.model, world.encoder, world.prompts, 3, 1.0, 16,
                                  torch.Generator().manual_seed(0))
    flat = []
    for group in rollout.logp:
        flat += [torch.tensor(logps) for logps in group]
    with torch.no_grad():
        assert largest_difference(packed(world, rollout.ids), flat) < 2e-5
    every = [token for group in rollout.ids for answer in group for token in answer]
    assert world.encoder.image_token_id not in every


def test_loss_of_stage_0(world):
    # kills: answers that go on at the number of tokens, images of another row
    answers = [group[0] for group in world.answers]
    batch = stage0_sft.collate(world.prompts, answers, world.encoder.pad_id, "cpu")
    want = 0.0
    with torch.no_grad():
        nll, n = stage0_sft.answer_nll(world.model, *batch)
        for case, answer in enumerate(answers):
            logits = plain_forward(world, case, answer).double()[-len(answer) - 1:-1]
            want += F.cross_entropy(logits, torch.tensor(answer), reduction="sum").item()
    assert n == sum(map(len, answers)) and nll.item() == pytest.approx(want, rel=1e-6)


def test_scores_of_a_reward_model(world):
    # kills: hidden states of packed answers that go on at the number of tokens
    model = copy.deepcopy(world.model)  # its head is frozen
    bt_reward.add_head(model, {"head_layers": 1, "head_activation": "none", "length_norm": False})
    with torch.no_grad():
        got = bt_reward.score_group(model, world.encoder, world.prompts, world.answers)
        want = []
        for case, group in enumerate(world.answers):
            for answer in group:
                inputs = dict(world.plain[case])
                ids = torch.cat([inputs.pop("input_ids"), torch.tensor([answer])], 1)
                hidden = model.model(input_ids=ids, mm_token_type_ids=kinds_of_tokens(world, ids),
                                     **inputs).last_hidden_state[0, -1]
                want.append(model.reward_head(hidden))
    torch.testing.assert_close(got, torch.cat(want), atol=2e-5, rtol=0)


# ----------------------------------------------------------------------------- checkpoints and runs
def test_saved_checkpoints_load_in_plain_transformers(world, tmp_path):
    # kills: an image processor that is not saved, Qwen3-VL's limits for videos lost
    (world.folder / "model" / "video_preprocessor_config.json").write_text('{"max_frames": 7}')
    model, encoder = common.load(world.folder / "model")
    common.save_checkpoint(tmp_path, model, encoder)
    plain = transformers.AutoModelForImageTextToText.from_pretrained(tmp_path).eval()
    assert type(plain) is type(model)
    again = SimpleNamespace(model=plain, plain=world.plain)
    with torch.no_grad():
        for case in range(len(world.plain)):
            assert torch.equal(plain_forward(again, case), plain_forward(world, case))
    images = common.AutoImageProcessor.from_pretrained(tmp_path, backend="pil")
    assert images.to_dict() == encoder.image_processor.to_dict()
    assert (tmp_path / "video_preprocessor_config.json").read_text() == '{"max_frames": 7}'


def test_frozen_vision(world):
    # kills: names of InternVL's parts only
    model = copy.deepcopy(world.model)
    common.freeze_vision(model)
    for name, parameter in model.named_parameters():
        assert parameter.requires_grad == ("visual" not in name)


def test_one_gradient_on_one_and_two_processes(world, tmp_path):
    # One update with rewards by chance, three rows of text and one with an image or video. kills:
    # gradients averaged over processes, a vision tower that one of them leaves out
    small_world(tmp_path, text_rl=3, mm_rl=1)
    script, args = PROGRAMS / "two_ranks.py", [world.folder / "model", tmp_path, tmp_path]
    torchrun([script, *args])
    run_here(lambda: runpy.run_path(str(script), run_name="__main__"), args)
    one, a, b = (torch.load(tmp_path / f"gradient-{name}.pt")["token"]["gradient"]
                 for name in ("1-0", "2-0", "2-1"))
    assert one.keys() == a.keys() == b.keys()
    assert all(torch.equal(a[name], b[name]) for name in a)
    flat = [torch.cat([g.flatten() for g in x.values()]).double() for x in (one, a)]
    assert (flat[1] - flat[0]).norm() < 1e-5 * flat[0].norm()
    assert one["model.visual.patch_embed.proj.weight"].norm() > 1e-4 * flat[0].norm()


def test_stage_3_on_two_processes(world, tmp_path):
    # Text, images and videos, with gradient checkpointing, and a checkpoint that loads.
    # kills: processes that part where one has no image
    small_world(tmp_path / "world", text_rl=1, mm_rl=4)
    rows = lines(tmp_path / "world" / "mm_rl.jsonl") + lines(tmp_path / "world" / "text_rl.jsonl")
    rows += rows[:1]
    for row in rows:
        row["media"] = [str(tmp_path / "world" / path) for path in row["media"]]
    common.write_lines(tmp_path / "rows.jsonl", rows)
    torchrun([ROOT / "stage3_mm_grpo.py", *flags(
        model=world.folder / "model", data=tmp_path / "rows.jsonl", heldout="", batch_size=6,
        rollout_batch=3, micro_batch=2, group_size=3, max_new_tokens=6, max_steps=1, frames=2,
        max_prompt_tokens=4096, gradient_checkpointing=True, out=tmp_path / "run")])
    metrics, = lines(tmp_path / "run" / "metrics.jsonl")
    assert metrics["sampling/sampling_logp_difference/mean"] < 1e-4
    assert weights_of(world.folder / "model").keys() == weights_of(tmp_path / "run").keys()
    common.load(tmp_path / "run")


def test_an_unknown_architecture_is_one_line(tmp_path):
    # kills: a traceback from within, a message that names no way out
    for kind, more in (("llava", {}), ("foo", {}), ("gemma3", {"vision_config": {}})):
        common.write_lines(tmp_path / "config.json", [{"model_type": kind, **more}])
        with pytest.raises(SystemExit) as stop:
            common.load(tmp_path)
        message = str(stop.value)
        assert "\n" not in message and repr(kind) in message
        assert all(name in message for name in common.VISION_MODELS)
