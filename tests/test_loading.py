"""
Loading a checkpoint, and what its encoder makes of rows: placeholders, features, tiles. "kills:"
names plausible wrong versions of the source that make a test fail.
"""

import os
import re
import shutil

import huggingface_hub
import pytest
import torch
import toy_world
from helpers import text_row, weights_of, write
from PIL import Image
from safetensors.torch import save_file

import common
from data import load_rows


# -------------------------------------------------------------------------------------- checkpoints
def weights(change):
    """-> a function that rewrites the weights of a checkpoint folder"""
    def rewrite(folder):
        changed = change(weights_of(folder))
        save_file(changed, folder / "model.safetensors", metadata={"format": "pt"})
    return rewrite


# transformers alone loads some of these: foreign or missing tensors become random weights, in
# silence; without tokenizer files it makes an empty tokenizer, and every prompt has zero tokens.
NO_CHECKPOINT = {
    "no folder": lambda f: shutil.rmtree(f),
    "a file": lambda f: (shutil.rmtree(f), f.write_text("")),
    "an empty folder": lambda f: [p.unlink() for p in f.iterdir()],
    "no config": lambda f: (f / "config.json").unlink(),
    "garbage config": lambda f: (f / "config.json").write_text("garbage"),
    "empty config": lambda f: (f / "config.json").write_text("{}"),
    "no weights": lambda f: (f / "model.safetensors").unlink(),
    "no image processor": lambda f: (f / "preprocessor_config.json").unlink(),
    "garbage tokenizer": lambda f: (f / "tokenizer.json").write_text("garbage"),
    "other shapes": weights(lambda old: {k: v[:1].contiguous() for k, v in old.items()}),
    "garbage weights": lambda f: (f / "model.safetensors").write_bytes(b"garbage" * 99),
    "cut weights": lambda f: os.truncate(f / "model.safetensors", 9999),
    "empty weights": lambda f: (f / "model.safetensors").write_bytes(b""),
    "foreign weights": weights(lambda old: {"fc.weight": torch.zeros(3)}),
    "half the weights": weights(lambda old: {k: old[k] for k in sorted(old)[::2]}),
    "no tokenizer": lambda f: [p.unlink() for p in f.glob("tokenizer*")],
}


@pytest.mark.parametrize("name", NO_CHECKPOINT)
def test_no_checkpoint(tmp_path, name):
    """Training for hours from random weights looks like a bad recipe, so say it at the start.
    kills: an except clause with one kind too few; no look at the missing tensors."""
    folder = tmp_path / "model"
    shutil.copytree(toy_world.PREBUILT, folder)
    NO_CHECKPOINT[name](folder)
    with pytest.raises(SystemExit) as stop:
        common.load(folder, made_by="python the_maker.py")
    message = str(stop.value)
    assert message.startswith(f"{folder}: ") and message.count("\n") == 0
    assert "the_maker.py" in message or "save_pretrained" in message


def test_a_missing_toy_folder_is_no_hub_id(tmp_path, monkeypatch):
    """The scripts' own defaults, toy/backbone and runs/stage0_sft, look like hub ids.
    kills: no word of made_by."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(SystemExit) as stop:
        common.load("toy/backbone", made_by="python the_maker.py")
    assert "toy/backbone" in str(stop.value) and "python the_maker.py" in str(stop.value)


# -------------------------------------------------------------------------------------- the encoder
@pytest.mark.parametrize("task", common.TASKS)
def test_placeholders_are_features_of_real_media(eight_rows, loaded, task):
    """As many placeholders as the media have features, whatever the texts say, and the model takes
    them. Paths are relative to the rows' file, not to the current folder.
    kills: paths from the current folder; one image of two; a thumbnail not counted."""
    model, encoder = loaded
    rows = load_rows(str(eight_rows / f"heldout_{task}.jsonl"), encoder)
    expected = {"text": 0, "image_understanding": 1, "image_generation": 2,
                "video_understanding": toy_world.FRAMES, "video_generation": 2 * toy_world.FRAMES}
    odd = "{a} {media[0]} {} %s \\1 <IMG_CONTEXT <IMAGE> <img_context> image video < think >"
    for plain in rows[:3]:
        strange = {**plain, "prompt": odd, "responses": plain["responses"] and [odd, odd]}
        for raw in (plain, strange):
            row = common.check_row(dict(raw), "", common.FORBIDDEN + encoder.special_tokens)
            prompt = encoder(row)
            tiles = 0 if prompt.pixels is None else len(prompt.pixels)
            assert tiles == expected[task]
            assert prompt.ids.count(encoder.image_token_id) == tiles * encoder.tokens_per_tile
            assert row["prompt"] in encoder.decode(prompt.ids)
            media = {} if prompt.pixels is None else {"pixel_values": prompt.pixels}
            with torch.no_grad():
                model(input_ids=torch.tensor([prompt.ids]), **media)
            caption = encoder(row, "caption")
            assert caption.pixels is None and encoder.image_token_id not in caption.ids


def test_tiles_of_a_wide_image(encoder, tmp_path):
    """A wide image is several tiles and a thumbnail, a square one is one tile; each stands at its
    own place. kills: one block of placeholders per image; both places filled by the first."""
    Image.new("RGB", (128, 32)).save(tmp_path / "wide.png")
    Image.new("RGB", (32, 32)).save(tmp_path / "square.png")
    for names, tiles in (("wide square", [5, 1]), ("square wide", [1, 5])):
        media = [f"{name}.png" for name in names.split()]
        path = write(tmp_path / "rows.jsonl",
                     [text_row(task="image_generation", responses=None, media=media)])
        row, = load_rows(path, encoder)
        prompt = encoder(row)
        blocks = re.findall(r"<img>(.*?)</img>", encoder.decode(prompt.ids))
        placeholders = [block.count(common.IMAGE_TOKEN) for block in blocks]
        assert placeholders == [n * encoder.tokens_per_tile for n in tiles]
        assert len(prompt.pixels) == sum(tiles)
