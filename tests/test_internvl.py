"""
InternVL3.5-1B at its published configuration, with random weights: what its checkpoint folder makes
of texts, images and videos through our encoder, against transformers' own processor and the rule on
the model card; its size; and, at its true widths, the packed forward and decoding.

Facts and their sources: internvl_folder.py.
"""

import json
import math
import re
from contextlib import contextmanager
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import transformers
from helpers import noise, rejects, weights_of, write
from internvl_folder import (
    CHAT,
    CONFIG,
    CONTEXT,
    END_OF_TEXT,
    GENERATION,
    IM_END,
    IM_START,
    OF_INTERNVL,
    SPECIAL,
    TEXT,
    VISION,
    publish,
)
from PIL import Image
from safetensors.torch import save_file
from transformers.models.internvl.processing_internvl import InternVLProcessor
from transformers.processing_utils import ProcessorMixin

import common
import stage1_text_grpo as stage1

PARAMETERS = dict(vision_tower=304_012_288, multi_modal_projector=5_253_120,
                  language_model=751_632_384 - 151936 * 1024, lm_head=151936 * 1024)  # [audit]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return publish(tmp_path_factory.mktemp("internvl") / "InternVL3_5-1B-HF")


@pytest.fixture
def encoder(folder):
    """Made anew for each test, which may spoil it."""
    return read_encoder(folder)


def read_encoder(folder, **more):
    return common.Encoder(folder, transformers.AutoConfig.from_pretrained(folder), **more)


# ------------------------------------------------------------------------------------- the oracles
class Processor(InternVLProcessor):
    """transformers' own, less the video processor, which cannot be had without torchvision."""

    def __init__(self, image_processor=None, tokenizer=None, chat_template=None):
        ProcessorMixin.__init__(self, image_processor, tokenizer, chat_template=chat_template)
        self.image_seq_length = 256
        self.image_token = tokenizer.context_image_token
        self.image_token_id = tokenizer.context_image_token_id
        self.start_image_token = tokenizer.start_image_token
        self.end_image_token = tokenizer.end_image_token
        self.start_image_token_id = tokenizer.start_image_token_id
        self.end_image_token_id = tokenizer.end_image_token_id
        self.video_token = tokenizer.video_token
        self.multimodal_pattern = re.compile("(?P<image><IMG_CONTEXT>)|(?P<video><video>)")


@pytest.fixture(scope="module")
def official(folder):
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    images = common.AutoImageProcessor.from_pretrained(folder, backend="pil")
    return Processor(images, tokenizer, CHAT)


def officially(official, text, media, frames=None):
    """A text with media as messages with typed parts, through the processor -> ids, pixels. Of a
    video that many frames, which are given as its media."""
    kind = "image" if frames is None else "video"
    pieces = text.split(f"<{kind}>\n")
    content = [{"type": "text", "text": pieces[0]}]
    for piece in pieces[1:]:
        content += [{"type": kind}, {"type": "text", "text": piece}]
    prompt = official.apply_chat_template([{"role": "user", "content": content}], tokenize=False,
                                          add_generation_prompt=True)
    if frames is not None:
        shown = {"pixel_values_videos": [torch.zeros(frames, 1)]}
        prompt = prompt.replace("<video>", official.replace_video_token(shown, 0))
        return official.tokenizer(prompt)["input_ids"], None
    images = [Image.open(path).convert("RGB") for path in media] or None
    out = official(images=images, text=prompt, return_tensors="pt")
    return out["input_ids"][0].tolist(), out.get("pixel_values")


def grid_of(width, height, most):
    """[card]'s tiles as (columns, rows). Of all grids of at most `most` tiles the one that is
    nearest in shape; of equally near ones the largest whose area the image fills by half and more,
    or the smallest."""
    grids = []
    for columns in range(1, most + 1):
        for rows in range(1, most // columns + 1):
            grids.append((columns, rows))
    nearest = min(abs(width / height - columns / rows) for columns, rows in grids)
    near = [grid for grid in grids if abs(width / height - grid[0] / grid[1]) == nearest]
    near.sort(key=math.prod)
    filled = [grid for grid in near if width * height > math.prod(grid) * 448 ** 2 / 2]
    return filled[-1] if filled else near[0]


def tiles_of(path, most):
    """[card]'s pixels of an image, by Pillow alone: [tiles, 3, 448, 448]"""
    image = Image.open(path).convert("RGB")
    columns, rows = grid_of(*image.size, most)
    whole = image.resize((448 * columns, 448 * rows), Image.Resampling.BICUBIC)
    tiles = []
    for row in range(rows):
        for column in range(columns):
            left, top = 448 * column, 448 * row
            tiles.append(whole.crop((left, top, left + 448, top + 448)))
    if len(tiles) > 1:
        tiles.append(image.resize((448, 448), Image.Resampling.BICUBIC))
    mean, std = np.array([0.485, 0.456, 0.406]), np.array([0.229, 0.224, 0.225])
    pixels = [(np.asarray(tile) / 255 - mean) / std for tile in tiles]
    return torch.tensor(np.stack(pixels)).permute(0, 3, 1, 2).float()


# ------------------------------------------------------------------------------------------ images
SIZES = {  # (width, height), --max_tiles -> tiles, the thumbnail among them
    "one tile": ((448, 448), 12, 1), "tiny": ((9, 9), 12, 1), "tiny and wide": ((20, 10), 12, 3),
    "wide": ((900, 450), 12, 3), "tall": ((150, 460), 12, 4), "photo": ((640, 480), 12, 13),
    "large and square": ((1300, 1300), 12, 10), "not so large": ((896, 896), 12, 5),
    "strip": ((1500, 50), 12, 13), "few tiles": ((640, 480), 6, 7), "no tiles": ((640, 480), 1, 1)}


def right_image(encoder, official, path, most, tiles):
    official.image_processor.max_patches = most
    prompt = encoder.encode("Look:\n<image>\nwhat is it?", [path])
    ids, pixels = officially(official, "Look:\n<image>\nwhat is it?", [path])
    assert prompt.ids == ids
    assert prompt.ids.count(CONTEXT) == 256 * tiles
    assert prompt.pixels.shape == (tiles, 3, 448, 448)
    assert torch.equal(prompt.pixels, pixels)
    torch.testing.assert_close(prompt.pixels, tiles_of(path, most), atol=1e-5, rtol=0)


@pytest.mark.parametrize("name", SIZES)
def test_tiles_are_the_processors_and_the_cards(folder, official, tmp_path, name):
    size, most, tiles = SIZES[name]
    encoder = read_encoder(folder, max_tiles=most)
    right_image(encoder, official, noise(tmp_path / "a.png", size), most, tiles)


def no_thumbnail(patch, encoder):
    """In the processor that ours and the official one share: the card's pixels tell."""
    kind = type(encoder.image_processor)
    real = kind.crop_image_to_patches
    patch.setattr(kind, "crop_image_to_patches",
                  lambda self, *args, **more: real(self, *args, **more | {"use_thumbnail": False}))


def tiles_only_if_the_file_says_so(patch, encoder):
    real = encoder.image_processor
    patch.setattr(encoder, "image_processor",
                  lambda images, **more: real(images, **more | {"crop_to_patches": False}))


def a_token_too_few(patch, encoder):
    patch.setattr(encoder, "tokens_per_tile", 255)


def thumbnail_not_counted(patch, encoder):
    real = encoder.image_processor

    def process(images, **more):
        out = real(images, **more)
        out["num_patches"] = [max(n - 1, 1) for n in out["num_patches"].tolist()]
        return out
    patch.setattr(encoder, "image_processor", process)


def tiles_of_the_file_not_of_the_flag(patch, encoder):
    patch.setattr(encoder, "max_tiles", 6)


@pytest.mark.parametrize("wrong", [
    no_thumbnail, tiles_only_if_the_file_says_so, a_token_too_few, thumbnail_not_counted,
    tiles_of_the_file_not_of_the_flag])
def test_wrong_tiles_are_rejected(encoder, official, tmp_path, monkeypatch, wrong):
    wrong(monkeypatch, encoder)
    rejects(right_image, encoder, official, noise(tmp_path / "a.png", (640, 480)), 12, 13)


# ------------------------------------------------------------------------------------------ videos
def right_video(encoder, official, path, shown):
    prompt = encoder.encode("See\n<video>\nwhat is it?", [path], video=True)
    ids, _ = officially(official, "See\n<video>\nwhat is it?", [], frames=len(shown))
    assert prompt.ids == ids
    assert prompt.ids.count(CONTEXT) == 256 * len(shown)
    want = torch.cat([tiles_of(frame, 1) for frame in shown])
    torch.testing.assert_close(prompt.pixels, want, atol=1e-5, rtol=0)


def cut_into_tiles(patch, encoder):
    real = encoder.as_tiles
    patch.setattr(encoder, "as_tiles", lambda images, video: real(images, False))


def without_titles(patch, encoder):
    real = encoder.as_tiles

    def as_tiles(images, video):
        shown, pixels = real(images, video)
        return re.sub(r"Frame\d+: ", "", shown), pixels
    patch.setattr(encoder, "as_tiles", as_tiles)


def counted_from_0(patch, encoder):
    real = encoder.as_tiles

    def as_tiles(images, video):
        shown, pixels = real(images, video)
        return re.sub(r"Frame(\d+)", lambda m: f"Frame{int(m[1]) - 1}", shown), pixels
    patch.setattr(encoder, "as_tiles", as_tiles)


def test_a_video_is_titled_frames_of_one_tile(folder, official, tmp_path):
    # Wide frames, which as images would be 3 tiles each.
    frames = [noise(tmp_path / "film" / f"{k}.png", (90, 45), seed=k) for k in range(11)]
    encoder = read_encoder(folder, frames=3)
    chosen = [frames[1], frames[5], frames[9]]
    right_video(encoder, official, tmp_path / "film", chosen)
    for wrong in (cut_into_tiles, without_titles, counted_from_0):
        with pytest.MonkeyPatch.context() as patch:
            wrong(patch, encoder)
            rejects(right_video, encoder, official, tmp_path / "film", chosen)


def frames_beside(choose):
    """How far the frames that choose(n, k) takes may lie beside those of both official ways, which
    do not agree: transformers' InternVLVideoProcessor, and [card]. -> (frames, frames)"""
    processor = card = 0
    for n in range(1, 200):
        for k in (1, 3, 8, 16):
            if k <= n:
                taken = np.array(choose(n, k))
                down = torch.arange(n / k / 2, n, n / k).int().numpy()
                share = (n - 1) / k
                twice = (share / 2 + np.round(share * np.arange(k))).astype(int)
                processor = max(processor, abs(taken - down).max())
                card = max(card, abs(taken - twice).max())
    return processor, card


def test_frames_lie_beside_those_of_both_official_ways():
    # kills: the first frame of each share, the ends of the video included
    processor, card = frames_beside(lambda n, k: common.spread(n, k, "film"))
    assert processor <= 1 and card <= 2
    processor, card = frames_beside(lambda n, k: np.arange(k) * n // k)
    assert processor > 2 and card > 2
    processor, card = frames_beside(lambda n, k: np.linspace(0, n - 1, k).round())
    assert processor > 2 and card > 2


# ----------------------------------------------------------------------------------------- prompts
@pytest.fixture(scope="module")
def rows(tmp_path_factory):
    """A row of each task."""
    folder = tmp_path_factory.mktemp("media")
    images = [noise(folder / f"{k}.png", (448, 448), seed=k) for k in range(2)]
    videos = []
    for name in "ab":
        for k in range(2):
            noise(folder / name / f"{k}.png", (60, 40), seed=k)
        videos.append(str(folder / name))
    every = []
    for task in common.TASKS:
        media = (videos if task.startswith("video") else images)[:common.N_MEDIA[task]]
        responses = None if task.endswith("generation") else ["one\n", "two <b>"]
        every.append({"id": task, "task": task, "prompt": "Why?\nWhat 12 & <x>", "label": "A",
                      "responses": responses, "media": media, "captions": []})
    return every


def right_prompts(encoder, official, rows):
    for row in rows:
        prompt = encoder(row)
        frames = 2 if row["task"].startswith("video") else None
        ids, _ = officially(official, common.render(row, style=encoder.style), row["media"], frames)
        assert prompt.ids == ids
        assert ids.count(IM_START) == 2 and ids.count(IM_END) == 1
        start, end = encoder.decode(ids[:6]), encoder.decode(ids[-11:])
        assert start == "<|im_start|>user\n" and end == "<|im_start|>assistant\n"


@pytest.mark.parametrize("style", ["msrl", "caption", "r1"])
def test_prompts_are_those_of_the_chat_template(folder, official, rows, style):
    # Our media stand in the text, those of the template are parts of a message.
    if style == "r1":
        rows = [row for row in rows if row["responses"]]
    right_prompts(read_encoder(folder, style=style), official, rows)


def a_system_prompt(patch, encoder):
    """That of the checkpoints in InternVL's own format, or of the thinking mode."""
    patch.setattr(encoder.tokenizer, "chat_template",
                  "<|im_start|>system\nYou are InternVL.<|im_end|>\n" + CHAT)


def no_generation_prompt(patch, encoder):
    patch.setattr(encoder, "chat", lambda text: encoder.tokenizer.apply_chat_template(
        [{"role": "user", "content": text}], tokenize=False))


def wrapped_twice(patch, encoder):
    real = encoder.chat
    patch.setattr(encoder, "chat", lambda text: real(real(text)))


def no_start_and_end_of_image(patch, encoder):
    real = encoder.as_tiles

    def as_tiles(images, video):
        shown, pixels = real(images, video)
        return re.sub("</?img>", "", shown), pixels
    patch.setattr(encoder, "as_tiles", as_tiles)


@pytest.mark.parametrize("wrong", [a_system_prompt, no_generation_prompt, wrapped_twice,
                                   no_start_and_end_of_image])
def test_wrong_prompts_are_rejected(encoder, official, rows, monkeypatch, wrong):
    wrong(monkeypatch, encoder)
    rejects(right_prompts, encoder, official, rows[1:2])


def test_users_cannot_write_the_special_tokens(encoder):
    # kills: those only that transformers lists (5.17 lists 6 of 23), or FORBIDDEN only
    for token in SPECIAL + OF_INTERNVL:
        with pytest.raises(common.BadRow, match="markup"):
            common.check_text("prompt", f"what is {token} here", encoder.forbidden)
    common.check_text("prompt", "what is <tool_call> here", encoder.forbidden)  # not special


# ------------------------------------------------------------------- end of sequence, tied weights
def small(change):
    """The published config with `change` for the sizes of both parts. -> config.json"""
    return CONFIG | {"text_config": TEXT | change, "vision_config": VISION | change}


@pytest.fixture
def narrow(tmp_path):
    """A checkpoint with the published vocabulary, but one narrow layer; its head and its embeddings
    are two weights. -> folder"""
    size = dict(hidden_size=32, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2,
                num_key_value_heads=2, head_dim=16)
    return with_weights(publish(tmp_path / "narrow", small(size)))


def with_weights(folder, dtype=torch.float32):
    """Random weights for a folder of publish(), under the names of [convert]. -> folder"""
    config = transformers.AutoConfig.from_pretrained(folder)
    config.tie_word_embeddings = False
    with torch.device("meta"):
        model = transformers.AutoModelForImageTextToText.from_config(config)
    generator, weights = torch.Generator().manual_seed(0), {}
    for name, parameter in model.named_parameters():
        shape = parameter.shape
        if len(shape) > 1:  # far from uniform: a wrong position moves log-probs by tenths
            weights[name] = torch.empty(shape, dtype=dtype).normal_(0, 0.1, generator=generator)
        else:
            weights[name] = torch.full(shape, 0.0 if "bias" in name else 1.0, dtype=dtype)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


@contextmanager
def always(model, token):
    """The model wants to say nothing but this token."""
    def hook(head, inputs, logits):
        logits[..., token] += 1e4
    handle = model.lm_head.register_forward_hook(hook)
    yield
    handle.remove()


def right_ends(model, encoder):
    """Answers end where those of generate() end, whose settings are the checkpoint's own."""
    prompt = encoder.encode("Why?")
    for token in (IM_END, END_OF_TEXT, 64):
        with always(model, token):
            got = stage1.sample_group(model, encoder, [prompt], 2, 0.0, 5, None)
            ids = torch.tensor([prompt.ids])
            want = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=5,
                                  do_sample=False)[0, len(prompt.ids):].tolist()
        assert got.ids == [[want, want]]


def test_answers_end_at_every_declared_id(narrow):
    # One id as published; two as its authors advise (InternVL issue 1015) and as Qwen3 declares.
    # kills: the tokenizer's only
    for declared in (IM_END, [IM_END, END_OF_TEXT]):
        write(narrow / "generation_config.json", GENERATION | {"eos_token_id": declared})
        model, encoder = common.load(narrow)
        assert encoder.eos_ids == sorted(declared if isinstance(declared, list) else [declared])
        assert (encoder.eos_id, encoder.pad_id) == (IM_END, END_OF_TEXT)
        right_ends(model, encoder)
    encoder.eos_ids = [encoder.tokenizer.eos_token_id]
    rejects(right_ends, model, encoder)


def right_head(model, encoder, weights, folder):
    """The head is what it was, in memory and in a new checkpoint, and the latter's config says so
    to all who read it."""
    common.save_checkpoint(folder, model, encoder)
    config = json.loads((folder / "config.json").read_text())
    assert config["text_config"]["tie_word_embeddings"] is False
    assert config["tie_word_embeddings"] is False
    model.tie_weights()
    assert torch.equal(model.lm_head.weight, weights["lm_head.weight"])
    again = transformers.AutoModelForImageTextToText.from_pretrained(folder)
    assert torch.equal(again.lm_head.weight, weights["lm_head.weight"])
    embeddings = again.get_input_embeddings().weight
    assert torch.equal(embeddings, weights["model.language_model.embed_tokens.weight"])


def test_a_head_of_its_own_is_saved_as_such(narrow, tmp_path, monkeypatch, loaded):
    # kills: config.json taken at its word, which is silence, and silence is "tied"
    weights = weights_of(narrow)
    right_head(*common.load(narrow), weights, tmp_path / "right")
    assert loaded[0].config.tie_word_embeddings  # and a tied one stays tied
    monkeypatch.setattr(common, "declare_tied", lambda model: None)
    rejects(right_head, *common.load(narrow), weights, tmp_path / "wrong")


# -------------------------------------------------------------------------------- the whole model
def size_of(module):
    return sum(parameter.numel() for parameter in module.parameters())


def on_paper(folder, tied):
    """The model of config.json without memory for its weights."""
    config = transformers.AutoConfig.from_pretrained(folder)
    config.tie_word_embeddings = tied
    with torch.device("meta"):
        return transformers.AutoModelForImageTextToText.from_config(config)


def right_sizes(model):
    parts = {name: size_of(getattr(model.model, name)) for name in PARAMETERS if name != "lm_head"}
    assert parts | {"lm_head": size_of(model.lm_head)} == PARAMETERS
    assert size_of(model) == 1_060_897_792


def test_the_published_number_of_parameters(folder):
    # kills: tied embeddings (905,315,328), attention without biases, another width
    right_sizes(on_paper(folder, tied=False))
    rejects(right_sizes, on_paper(folder, tied=True))


def right_freeze(model):
    trainable = sum(parameter.numel() for parameter in common.trainable(model))
    assert trainable == 751_632_384
    for name, parameter in model.named_parameters():
        seeing = "vision_tower" in name or "multi_modal_projector" in name
        assert parameter.requires_grad != seeing, name


def test_frozen_vision_leaves_the_language_model(folder):
    model = on_paper(folder, tied=False)
    common.freeze_vision(model)
    right_freeze(model)
    model.model.multi_modal_projector.requires_grad_(True)  # the tower only
    rejects(right_freeze, model)


# ----------------------------------------------------------------- two layers of each at full width
LENGTHS = ((4, 1), (2, 6), (5, 3))  # tokens of each answer


@pytest.fixture(scope="module")
def wide(tmp_path_factory):
    """Model and encoder, three prompts (text, an image of one tile, one of three), two answers to
    each and their log-probs."""
    folder = tmp_path_factory.mktemp("wide")
    checkpoint = publish(folder / "model", small({"num_hidden_layers": 2}))
    model, encoder = common.load(with_weights(checkpoint, torch.bfloat16))
    (checkpoint / "model.safetensors").unlink()  # 0.8 GB
    square, oblong = noise(folder / "a.png", (448, 448)), noise(folder / "b.png", (300, 150), 1)
    prompts = [encoder.encode("Why?"), encoder.encode("<image>\nWhy?", [square]),
               encoder.encode("Of\n<image>\nthis?", [oblong])]
    generator = torch.Generator().manual_seed(1)
    answers = []
    for lengths in LENGTHS:
        answers.append([torch.randint(256, (n,), generator=generator).tolist() for n in lengths])
    world = SimpleNamespace(model=model, encoder=encoder, prompts=prompts, answers=answers)
    world.wanted = one_by_one(world)
    return world


def media_of(prompt):
    return {} if prompt.pixels is None else {"pixel_values": prompt.pixels}


@torch.no_grad()
def one_by_one(world):
    """Log-probs of each answer, one plain forward per answer: B lists of G tensors."""
    logps = []
    for prompt, group in zip(world.prompts, world.answers, strict=True):
        of_group = []
        for answer in group:
            logits = world.model(input_ids=torch.tensor([prompt.ids + answer]),
                                 logits_to_keep=len(answer) + 1, **media_of(prompt)).logits[0]
            logits[:, CONTEXT] = -math.inf  # never sampled
            logp = logits[:-1].log_softmax(-1)
            of_group.append(logp.gather(1, torch.tensor(answer)[:, None])[:, 0])
        logps.append(of_group)
    return logps


@torch.no_grad()
def right_log_probs(world, prompts, answers, wanted):
    logp, _, owner = stage1.packed_logps(world.model, world.encoder, prompts, answers, 1.0)
    for row, owners, group in zip(logp, owner, wanted, strict=True):
        for g, plain in enumerate(group, 1):
            assert (row[owners == g] - plain).abs().max() < 1e-3


def test_packed_log_probs(wide):
    # kills: the thumbnail before the tiles
    right_log_probs(wide, wide.prompts, wide.answers, wide.wanted)
    turned = common.Prompt(wide.prompts[2].ids, wide.prompts[2].pixels.roll(1, 0))
    rejects(right_log_probs, wide, [turned], wide.answers[2:], wide.wanted[2:])


def right_greedy_answers(world, prompts, answers):
    got = stage1.sample_group(world.model, world.encoder, prompts, 1, 0.0, 6, None)
    assert got.ids == [[answer] for answer in answers]


def test_greedy_answers_are_those_of_generate(wide):
    # A mixed, padded batch against prompts by themselves. kills: the image of another row
    greedy = []
    for prompt in wide.prompts:
        ids = torch.tensor([prompt.ids])
        out = wide.model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=6,
                                  do_sample=False, suppress_tokens=[CONTEXT], **media_of(prompt))
        greedy.append(out[0, ids.shape[1]:].tolist())
    assert len({tuple(answer) for answer in greedy}) == len(wide.prompts)
    right_greedy_answers(wide, wide.prompts, greedy)
    other = common.Prompt(wide.prompts[1].ids, wide.prompts[2].pixels[:1])
    rejects(right_greedy_answers, wide, [other], greedy[1:2])
