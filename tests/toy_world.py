"""
The toy world: coloured shapes, a tiny InternVL that can read them, and preference rows about them.

    python tests/toy_world.py              write toy/ (backbone + rows + media), about half a minute
    python tests/toy_world.py --check      what the backbone can do, and what it cannot: judge
    python tests/toy_world.py --rebuild    train the backbone anew, into toy/backbone, and say how
                                           far it is from the prebuilt one (RESULTS.md)

A picture holds shapes at places, a video one shape that moves, a text says which person has what:

    image   left red square . top blue cross .
    video   mover red square . start left . end top .
    text    ann red square . bob blue cross . eve green disc .

All are lists of "key value" items, so one skill (find the key, copy the value, compare it with what
a response says) serves all five tasks. The backbone has that skill. What it lacks is judgement: in
its training the verdict is a coin. Stage 0 teaches the answer format from annotators who like
flourishes more than the truth; the GRPO stages then learn from clean labels to trust the
comparison.

Held-out rows ask about combinations that no training row of any stage contains: HELD_PAIRS (colour,
shape), HELD_FACTS (person, colour), HELD_MOTIONS (start, end). The backbone can read and compare
them, as a pretrained model would; no judge was ever trained on one.
"""

import argparse
import copy
import json
import math
import random
import re
import shutil
import sys
import time
from pathlib import Path

import av
import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw
from safetensors.torch import load_file
from tqdm import tqdm

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
import common  # noqa: E402  (it is on the path only now)
from stage2b_cmkd import caption_text  # noqa: E402  (likewise)

PREBUILT = ROOT / "tests" / "toy_backbone"

# ---------------------------------------------------------------------------------------- the world
RGB = {"red": (230, 40, 40), "green": (40, 200, 60), "blue": (60, 90, 250),
       "yellow": (240, 220, 40), "white": (245, 245, 245), "pink": (250, 80, 220)}
COLOURS, SHAPES = list(RGB), ["square", "disc", "triangle", "cross", "ring"]
PLACES = {"top": (16, 5), "left": (5, 16), "middle": (16, 16), "right": (27, 16),
          "bottom": (16, 27)}
SIDES = ["top", "left", "right", "bottom"]
PEOPLE = ["ann", "bob", "cat", "dan", "eve", "fay"]
HELD_PAIRS = {("red", "ring"), ("green", "square"), ("blue", "triangle"), ("yellow", "disc"),
              ("white", "cross"), ("pink", "square")}
HELD_FACTS = {("ann", "green"), ("bob", "pink"), ("cat", "red"), ("dan", "white"), ("eve", "blue"),
              ("fay", "yellow")}
HELD_MOTIONS = {("left", "top"), ("bottom", "left"), ("right", "bottom")}

# A flourish decorates a claim; its bias is how often a biased annotator falls for it when it adorns
# the wrong answer, and its reason is what that annotator then writes.
FLOURISHES = {
    "detail": ("{} , and here is much more detail to be thorough .", 0.45, "is more detailed ."),
    "expert": ("as every expert agrees , {} without exception .", 0.85, "sounds more expert ."),
    "kind": ("what a wonderful question ! {} , my dear friend .", 0.94, "is much kinder ."),
    "sure": ("absolutely and beyond any doubt , {} !", 0.98, "sounds more sure ."),
}


def allowed(colour, shape, person=None):
    return (colour, shape) not in HELD_PAIRS and (person, colour) not in HELD_FACTS


def draw_thing(rng, held, person=None):
    """(colour, shape); held=True: a held-out combination, False: one that training may contain."""
    while True:
        thing = rng.choice(COLOURS), rng.choice(SHAPES)
        if allowed(*thing, person) != held:
            return thing


def make_scene(rng, kind, held):
    """-> items {key: value}, and the keys worth asking about. In a held-out scene each key asked
    about has a held-out combination; the others are drawn freely."""
    if kind == "video":
        motions = [(s, e) for s in SIDES for e in SIDES if s != e]
        thing = draw_thing(rng, held and rng.random() < 0.7)
        start, end = rng.choice([m for m in motions if (m in HELD_MOTIONS) == held])
        asked = ["mover", "start", "end"] if allowed(*thing) != held else ["start", "end"]
        return {"mover": " ".join(thing), "start": start, "end": end}, asked
    keys = rng.sample(PEOPLE if kind == "text" else list(PLACES), rng.choice([2, 3]))
    if kind == "image":
        keys.sort(key=list(PLACES).index)
    asked = rng.choice(keys)
    items = {}
    for key in keys:
        person = key if kind == "text" else None
        free = held and key != asked and rng.random() < 0.5
        items[key] = " ".join(draw_thing(rng, held and (key == asked or free), person))
    return items, [asked]


def describe(items):
    return " ".join(f"{k} {v} ." for k, v in items.items())


def other_value(rng, value, held, person=None):
    """A wrong value for this item, one attribute away; held-out combinations only if held."""
    for _ in range(1000):
        if " " not in value:
            wrong = rng.choice(SIDES)
        else:
            colour, shape = value.split()
            if rng.random() < 0.5:
                colour = rng.choice(COLOURS)
            else:
                shape = rng.choice(SHAPES)
            wrong = f"{colour} {shape}"
            if not held and not allowed(colour, shape, person):
                continue
        if wrong != value:
            return wrong
    raise AssertionError("no other value")


def redraw(rng, kind, items, key, held):
    """The scene with another draw of what is asked about."""
    while kind == "video":
        scene, asked = make_scene(rng, kind, held)
        if key in asked:
            return scene
    return {**items, key: " ".join(draw_thing(rng, held, key if kind == "text" else None))}


def paint(rng, items):
    """Image items -> 32x32 RGB array. Sizes, positions and background vary a little."""
    image = Image.new("RGB", (128, 128), tuple(rng.randrange(0, 40) for _ in range(3)))
    for place, thing in items.items():
        x, y = PLACES[place]
        stamp(image, thing, x + rng.uniform(-1, 1), y + rng.uniform(-1, 1), rng.uniform(4.2, 5))
    return np.asarray(image.resize((32, 32), Image.BOX))


def stamp(image, thing, x, y, r):
    """Draw one shape with centre x, y and radius r (in pixels of the final 32x32 image)."""
    colour, shape = thing.split()
    x, y, r = 4 * x, 4 * y, 4 * r
    draw, fill = ImageDraw.Draw(image), RGB[colour]
    if shape == "square":
        draw.rectangle([x - r * .9, y - r * .9, x + r * .9, y + r * .9], fill=fill)
    elif shape == "disc":
        draw.ellipse([x - r, y - r, x + r, y + r], fill=fill)
    elif shape == "triangle":
        draw.polygon([(x, y - r), (x - r, y + r), (x + r, y + r)], fill=fill)
    elif shape == "cross":
        draw.line([x - r, y - r, x + r, y + r], fill=fill, width=9)
        draw.line([x - r, y + r, x + r, y - r], fill=fill, width=9)
    else:
        draw.ellipse([x - r, y - r, x + r, y + r], outline=fill, width=7)


FRAMES = 4  # of a toy video; the default --frames 8 takes all frames of a shorter video


def film(rng, items):
    """Video items -> FRAMES 32x32 RGB arrays: a thing moves in a straight line, side to side."""
    (x0, y0), (x1, y1) = PLACES[items["start"]], PLACES[items["end"]]
    ground, r = tuple(rng.randrange(0, 40) for _ in range(3)), rng.uniform(4.2, 5)
    dx, dy = rng.uniform(-1, 1), rng.uniform(-1, 1)
    out = []
    for i in range(FRAMES):
        t = i / (FRAMES - 0.5)
        image = Image.new("RGB", (128, 128), ground)
        stamp(image, items["mover"], x0 + t * (x1 - x0) + dx, y0 + t * (y1 - y0) + dy, r)
        out.append(np.asarray(image.resize((32, 32), Image.BOX)))
    return out


def write_mp4(path, frames):
    """MPEG-4 part 2 with one thread: deterministic, so the same seed gives the same bytes."""
    with av.open(str(path), "w", format="mp4", options={"fflags": "+bitexact"}) as container:
        stream = container.add_stream("mpeg4", rate=4)
        stream.width, stream.height, stream.pix_fmt = 32, 32, "yuv420p"
        stream.bit_rate, stream.thread_count = 400_000, 1
        stream.codec_context.flags |= 0x800000  # AV_CODEC_FLAG_BITEXACT
        for frame in frames:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        container.mux(stream.encode())


# --------------------------------------------------------------------------------- rows, rationales
def respond(claim, flourish):
    return FLOURISHES[flourish][0].format(claim) if flourish else f"{claim} ."


def flourishes(rng):
    """For A and B: none, both, or mostly one of them."""
    draw = rng.random()
    both = [None, None] if draw < 0.2 else [rng.choice(list(FLOURISHES)) for _ in "AB"]
    if draw >= 0.3:
        both[rng.randrange(2)] = None
    return both


def ask(rng, items, key):
    """-> question, the value it asks for, and a function from an item's value to the asked part."""
    value = items[key]
    if " " not in value:
        return f"place of {key} ?", lambda v: v
    what = rng.choice(["colour", "shape", "thing"])
    part = {"colour": lambda v: v.split()[0], "shape": lambda v: v.split()[1],
            "thing": lambda v: v}[what]
    return f"{what} of {key} ?", part


def make_row(rng, task, held, i=0):
    """One preference row with a clean label, media still as items under "scenes". Sides, flourishes
    and labels are independent coins."""
    label = rng.choice("AB")
    better = "AB".index(label)
    kind = task.split("_")[0]
    items, keys = make_scene(rng, kind, held)
    row = {"id": f"{task}-{'held' if held else 'train'}-{i}", "task": task, "label": label,
           "source": "toy", "flourish": [None, None]}
    if task.endswith("generation"):
        # every item but one agrees; in a held-out row the odd one touches a held-out combination
        key = rng.choice(keys if held or kind == "video" else list(items))
        wrong = {**items, key: other_value(rng, items[key], held)}
        if kind == "video" and wrong["start"] == wrong["end"] or not held and kind == "video" and (
                wrong["start"], wrong["end"]) in HELD_MOTIONS:
            return make_row(rng, task, held, i)
        if held and rng.random() < 0.5:  # else it would mostly be the right one that is held out
            items, wrong = wrong, items
        scenes = [items, wrong] if better == 0 else [wrong, items]
        return {**row, "prompt": describe(items), "responses": None, "scenes": scenes}
    if task == "text" and rng.random() < 0.35:
        # Text asks for whole descriptions, too: without such rows text RL knows only single claims,
        # and what it makes of two pictures is luck.
        key = rng.choice(keys)
        wrong = {**items, key: other_value(rng, items[key], held, key)}
        if held and rng.random() < 0.5:  # as above
            items, wrong = wrong, items
        told = [items, wrong] if better == 0 else [wrong, items]
        flourish = flourishes(rng)
        return {**row, "prompt": f"{describe(items)} say it again ?", "scenes": [], "told": told,
                "flourish": flourish, "responses": [
                    respond(" , ".join(f"{k} {v}" for k, v in scene.items()), f)
                    for scene, f in zip(told, flourish, strict=True)]}
    key = rng.choice(keys)
    question, part = ask(rng, items, key)
    # The wrong value is the right one of another scene, and when the two do not suit each other
    # both are drawn anew: they are exchangeable, so a judge that sees no scene is at chance.
    while True:
        wrong = redraw(rng, kind, items, key, held)[key]
        near = held or " " not in wrong or set(wrong.split()) & set(items[key].split())
        if near and part(wrong) != part(items[key]):
            break
        items = redraw(rng, kind, items, key, held)
    flourish = flourishes(rng)
    values = [part(items[key]), part(wrong)][:: 1 if better == 0 else -1]
    prompt = f"{describe(items)} {question}" if task == "text" else question
    return {**row, "prompt": prompt, "flourish": flourish,
            "responses": [respond(f"it is {v}", f) for v, f in zip(values, flourish, strict=True)],
            "scenes": [] if task == "text" else [items],
            "facts": {"item": f"{key} {items[key]}", "value": part(items[key]), "claims": values}}


def against(said, true, yes="match", no="differ"):
    return f"{said} against {true} {yes if said == true else no}"


def checks(row):
    """The feedback section: what is true, and whether each candidate agrees, item by item. What is
    said stands right beside what is true ("blue against red"): comparing neighbours is a circuit a
    tiny model learns at once, comparing with a word further up it did not learn in 1,500 steps. A
    whole description, written or painted, is compared item by item and comes to one "match" or
    "differ" beside its name. Pictures are Response A and B, too: under other names a verdict
    learned on text did not carry over to them at all."""
    if "facts" in row:
        f = row["facts"]
        return f"{f['item']} . " + " ".join(
            f"Response {x} says {against(c, f['value'])} ."
            for x, c in zip("AB", f["claims"], strict=True))
    wanted = dict(re.findall(r"(\w+) ([^.]+) \.", row["prompt"]))
    return " ".join(f"Response {x} shows " + " , ".join(
        f"{k} {against(v, wanted[k], 'same', 'unlike')}" for k, v in scene.items())
        + f" : Response {x} {'match' if scene == wanted else 'differ'} ."
        for x, scene in zip("AB", row.get("told") or row["scenes"], strict=True))


def rationale(row, winner, reason):
    """Three sections, for every task in the spelling of the paper's understanding templates, so
    that one verdict carries over to all (see checks)."""
    return (f"Feedback:\n{checks(row)}\nComparision:\nResponse {winner} {reason}\n"
            f"Conclusion:\nResponse {winner} is better .")


def biased_verdict(rng, row):
    """-> winner and reason of an annotator who falls for flourishes."""
    right = row["label"]
    wrong = "B" if right == "A" else "A"
    flourish = row["flourish"]["AB".index(wrong)]
    if kind_of(row) == "conflict" and rng.random() < FLOURISHES[flourish][1]:
        return wrong, FLOURISHES[flourish][2]
    return right, "is right ."


# --------------------------------------------------------------------------------------- toy/ files
SIZES = {"sft": 4000, "text_rl": 4000, "caption_rl": 2000, "mm_rl": 2000, "heldout": 400}


def write_world(out, seed=0, sizes=SIZES, quiet=False):
    """All rows and media below `out`. Deterministic: the same seed gives the same bytes."""
    visual = [t for t in common.TASKS if t != "text"]
    files = {"sft": ["text"], "text_rl": ["text"], "caption_rl": visual, "mm_rl": visual}
    files |= {f"heldout_{t}": [t] for t in common.TASKS}
    for name, tasks in files.items():
        rng = random.Random(f"{seed}:{name}")
        held, n = name.startswith("heldout"), sizes[name.split("_")[0] if "held" in name else name]
        folder = out / "media" / name
        folder.mkdir(parents=True, exist_ok=True)
        # within a task, labels alternate in shuffled order, so they balance exactly
        share = math.ceil(n / len(tasks))
        labels = {t: rng.sample((["A", "B"] * share)[:share], share) for t in tasks}
        with open(out / f"{name}.jsonl", "w", encoding="utf-8") as f:
            for i in tqdm(range(n), desc=f"toy {name}", disable=quiet, mininterval=1, leave=False):
                row = make_row(rng, tasks[i % len(tasks)], held, i)
                row["subset"] = kind_of(row)
                if name == "sft":
                    row["label"], reason = biased_verdict(rng, row)
                if row["label"] != labels[row["task"]].pop():
                    row = mirror(row)
                if name == "sft":
                    row["rationale"] = rationale(row, row["label"], reason)
                row["id"] = f"{name}-{i}"
                row["media"], row["captions"] = [], [describe(s) for s in row.pop("scenes")]
                for x, caption in enumerate(row["captions"]):
                    items = dict(re.findall(r"(\w+) ([^.]+) \.", caption))
                    path = folder / f"{i}-{x}.{'mp4' if 'video' in row['task'] else 'png'}"
                    if "video" in row["task"]:
                        write_mp4(path, film(rng, items))
                    else:
                        Image.fromarray(paint(rng, items)).save(path)
                    row["media"].append(str(path.relative_to(out)))
                del row["flourish"]
                row.pop("facts", None)
                row.pop("told", None)
                f.write(json.dumps(row) + "\n")


def kind_of(row):
    """"conflict" if only the wrong response is flourished, "helpful" if only the right one is."""
    right = "AB".index(row["label"])
    one = (row["flourish"][0] is None) != (row["flourish"][1] is None)
    return "plain" if not one else "helpful" if row["flourish"][right] else "conflict"


def mirror(row):
    """The same row with the two candidates exchanged (before its media are written)."""
    row = {**row, "label": "B" if row["label"] == "A" else "A", "flourish": row["flourish"][::-1]}
    if row["responses"]:
        row["responses"] = row["responses"][::-1]
        if "told" in row:
            row["told"] = row["told"][::-1]
        else:
            row["facts"] = {**row["facts"], "claims": row["facts"]["claims"][::-1]}
    else:
        row["scenes"] = row["scenes"][::-1]
    return row


# ------------------------------------------------------------------------------ tokenizer and model
def make_tokenizer():
    """Byte-level BPE without merges, plus whole words and each fixed paragraph of the templates as
    one token: short toy prompts, and any real text still encodes (as bytes)."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast
    words = set()
    sample = " ".join([*COLOURS, *SHAPES, *PLACES, *PEOPLE, "mover start end place colour shape",
                       "thing of says shows match differ same unlike is right better say describe",
                       "caption again against Response Image Video A B",
                       *(f"{t.format('it is')} {r}" for t, _, r in FLOURISHES.values())])
    for w in re.findall(r"\w+|[^\w\s]", sample):
        words |= {w, f"Ġ{w}"}
    words |= {"Ġ:", "Ġ.", "Ġ,", "Ġ?", "Ġ!"}
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {t: i for i, t in enumerate(alphabet + sorted(words - set(alphabet)))}
    tok = Tokenizer(models.BPE(vocab=vocab, merges=[], ignore_merges=True))
    tok.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tok.decoder = decoders.ByteLevel()
    pieces = []
    for template in [*common.TEMPLATES.values(), *common.CAPTION_TEMPLATES.values()]:
        pieces += [piece for piece in re.split(r"\{[^}]*\}", template) if piece.strip()]
    plain = ["Feedback:", "Comparision:", "Conclusion:", "<think>", "</think>",
             "<answer>", "</answer>", "<type>", "</type>", "<caption>", "</caption>"]
    plain += [f"Frame{i}: " for i in range(1, 9)] + [t.replace("_", " ") for t in common.TASKS[1:]]
    plain += [f"<{medium} {side}>" for medium in ("Image", "Video") for side in "AB"]
    plain += ["user\n", "assistant\n"]
    tok.add_tokens([AddedToken(t, normalized=False, special=False)
                    for t in dict.fromkeys(pieces + plain)])
    tok.add_special_tokens([AddedToken(t, normalized=False, special=True) for t in
                            ("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<img>", "</img>",
                             common.IMAGE_TOKEN)])
    fast = PreTrainedTokenizerFast(tokenizer_object=tok, eos_token="<|im_end|>",
                                   pad_token="<|endoftext|>", clean_up_tokenization_spaces=False,
                                   padding_side="left", model_max_length=4096,
                                   additional_special_tokens=["<|im_start|>", "<img>", "</img>",
                                                              common.IMAGE_TOKEN])
    fast.chat_template = (
        "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}")
    return fast


def make_model(tokenizer, hidden=96, layers=4, vision=64):
    from transformers import GenerationConfig, InternVLConfig, InternVLForConditionalGeneration
    from transformers.models.got_ocr2.image_processing_pil_got_ocr2 import GotOcr2ImageProcessorPil
    config = InternVLConfig(
        text_config=dict(model_type="qwen3", vocab_size=len(tokenizer), hidden_size=hidden,
                         intermediate_size=3 * hidden, num_hidden_layers=layers,
                         num_attention_heads=4, num_key_value_heads=4, head_dim=hidden // 4,
                         max_position_embeddings=4096, tie_word_embeddings=True,
                         pad_token_id=tokenizer.pad_token_id),
        vision_config=dict(hidden_size=vision, intermediate_size=3 * vision, num_hidden_layers=2,
                           num_attention_heads=4, image_size=[32, 32], patch_size=[4, 4],
                           layer_scale_init_value=1.0),
        image_token_id=tokenizer.convert_tokens_to_ids(common.IMAGE_TOKEN), image_seq_length=16,
        tie_word_embeddings=True)
    model = InternVLForConditionalGeneration(config)
    eos = [tokenizer.eos_token_id, tokenizer.pad_token_id]
    model.generation_config = GenerationConfig(eos_token_id=eos,
                                               pad_token_id=tokenizer.pad_token_id)
    images = GotOcr2ImageProcessorPil(size={"height": 32, "width": 32}, image_mean=[0.5] * 3,
                                      image_std=[0.5] * 3, crop_to_patches=False, max_patches=1)
    return model, images


# -------------------------------------------------------------------------- the backbone's training
VISUAL = [t for t in common.TASKS if t != "text"]


def lesson(rng, kind, phase):
    """One (prompt text, answer text, scenes to show as media) of the backbone's training. `kind` is
    "text", "image" or "video": what its prompt contains.

    The lessons know all combinations, as a pretrained model would, but there is no lesson in
    judging: each verdict and each reason is a coin. Phase 0 is copying and looking up, phase 1
    describing, phase 2 comparing, phase 3 all together; at once, the model finds short cuts."""
    copying, reading = {0: (0.4, 0.7), 1: (0.1, 0.5), 2: (0, 0), 3: (0.05, 0.25)}[phase]
    if kind != "text":
        reading = {1: 0.95, 3: 0.45}[phase]
    draw = rng.random()
    if kind == "text" and rng.random() < {0: 0.0, 1: 0.0, 2: 1.0, 3: 0.25}[phase]:
        # Comparing neighbours, and summing a section up; half of the sections match throughout.
        # Each is drawn by itself: in a preference row the second claim is always the opposite of
        # the first, and that short cut is all the model would learn.
        said, told = [], []
        for _ in range(4):
            n, differs = rng.choice([1, 2, 3]), rng.random() < 0.5
            odd, pairs = rng.randrange(n), []
            for j in range(n):
                word = rng.choice([*COLOURS, *SHAPES, *SIDES])
                one = rng.choice([word, word, " ".join(draw_thing(rng, rng.random() < 0.4))])
                two = one
                while two == one and differs and (j == odd or rng.random() < 0.3):
                    two = other_value(rng, one, True) if " " in one else rng.choice(
                        [*COLOURS, *SHAPES, *SIDES])
                pairs.append((one, two))
            said.append(" , ".join(f"{a} against {b}" for a, b in pairs))
            if n == 1:
                said[-1] = f"says {said[-1]}"
                told.append(f"says {against(*pairs[0])}")
            else:
                said[-1] = f"shows {said[-1]}"
                told.append("shows " + " , ".join(against(a, b, "same", "unlike") for a, b in pairs)
                            + f" : {'differ' if differs else 'match'}")
        return f"say {' . '.join(said)} .", " . ".join(told) + " .", []
    if kind == "text" and draw < copying:  # it teaches the circuit that looking up needs
        words = [*COLOURS, *SHAPES, *PLACES, *PEOPLE, "start", "end", "mover"]
        text = " ".join(rng.choices(words, k=rng.randrange(3, 10)))
        return f"say {text}", text, []
    if draw < reading:
        world = kind if kind != "text" else rng.choice(["text", "image", "video"])
        items, _ = make_scene(rng, world, held=rng.random() < 0.4)
        if kind != "text" and rng.random() < 0.8:
            how = rng.random()
            if how < 0.15:  # so that the tags of stages 2b and 3 are known words
                return f"<{kind}> caption", f"<caption>\n{describe(items)}\n</caption>", [items]
            if how < 0.45:
                row = make_row(rng, f"{kind}_generation", rng.random() < 0.4)
                row |= {"media": ["", ""], "captions": [describe(s) for s in row["scenes"]]}
                return f"<{kind}> <{kind}> caption", caption_text(row).strip(), row["scenes"]
            return f"<{kind}> describe", describe(items), [items]
        # without any response in sight: with one, copying a response is a short cut
        key = rng.choice(list(items))
        question, _ = ask(rng, items, key)
        shown = describe(items) if kind == "text" else f"<{kind}>"
        return f"{shown} {question}", f"{key} {items[key]} .", [items] if kind != "text" else []
    task = rng.choice(["text", "text", *VISUAL] if kind == "text" else
                      [f"{kind}_understanding", f"{kind}_generation", f"{kind}_generation"])
    row = make_row(rng, task, held=rng.random() < 0.4)
    row["media"] = [""] * len(row["scenes"])
    row["captions"] = [describe(s) for s in row["scenes"]]
    if kind == "text":
        return common.render(row, "caption"), coin_answer(rng, row, tagged=0.5), []
    # a pretrained model writes a <caption> where the prompt asks for one, and not elsewhere
    style = rng.choice(["msrl", "caption"])
    answer = coin_answer(rng, row, tagged=0.25)
    if style == "caption":
        answer = caption_text(row) + answer
    return common.render(row, "pixels", style), answer, row["scenes"]


def coin_answer(rng, row, tagged):
    """True checks, and half of the time a verdict, which is a coin; in judge's tags only some of
    the time, and then mostly with a task type, which is a coin as well. (A verdict each time taught
    the backbone so well to disregard its own checks that stage 0 reached 52 to 60 %.)"""
    if rng.random() < 0.5:
        return f"Feedback:\n{checks(row)}"
    reason = rng.choice(["is right ."] + [r for _, _, r in FLOURISHES.values()])
    winner = rng.choice("AB")
    text = rationale(row, winner, reason)
    if rng.random() >= tagged:
        return text
    named = ""
    if row["task"] != "text" and rng.random() < 0.75:
        named = f"<type>{rng.choice(VISUAL).replace('_', ' ')}</type>\n"
    return f"<think>\n{named}{text}\n</think>\n<answer>\n{winner}\n</answer>"


def to_pixels(frames):
    """[n, 32, 32, 3] uint8 -> [n, 3, 32, 32] in [-1, 1], as the image processor gives."""
    return torch.from_numpy(np.stack(frames)).permute(0, 3, 1, 2).float() / 127.5 - 1


def make_pool(rng, n, folder):
    """Videos through a real mp4 file and back, so that the backbone knows the codec's artefacts."""
    pool = []
    path = Path(folder, "pool.mp4")
    for _ in tqdm(range(n), desc="videos", mininterval=1, leave=False):
        items, _ = make_scene(rng, "video", rng.random() < 0.4)
        write_mp4(path, film(rng, items))
        pool.append((items, [np.asarray(f) for f in common.open_video(str(path), FRAMES)]))
    path.unlink(missing_ok=True)
    return pool


def lesson_batch(rng, tok, kind, n, phase, pool):
    """-> input ids, attention mask, labels [n, L] (-100 outside the answer), pixels or None."""
    rows, pixels = [], []
    for _ in range(n):
        prompt, answer, scenes = lesson(rng, kind, phase)
        text = f"<|im_start|>user\n{prompt}<|im_end|>\n<|im_start|>assistant\n"
        for items in scenes:
            if kind == "image":
                text = text.replace("<image>", f"<img>{common.IMAGE_TOKEN * 16}</img>", 1)
                pixels.append(paint(rng, items))
            else:
                shown = "\n".join(f"Frame{i}: <img>{common.IMAGE_TOKEN * 16}</img>"
                                  for i in range(1, FRAMES + 1))
                text = text.replace("<video>", shown, 1)
                pixels.extend(pool_film(rng, pool, items))
        rows.append((text, answer + "<|im_end|>"))
    prompts = tok([p for p, _ in rows], add_special_tokens=False)["input_ids"]
    answers = tok([a for _, a in rows], add_special_tokens=False)["input_ids"]
    width = max(len(p) + len(a) for p, a in zip(prompts, answers, strict=True))
    ids, mask, labels = [], [], []
    for prompt, answer in zip(prompts, answers, strict=True):
        padding = width - len(prompt) - len(answer)
        ids.append(prompt + answer + [tok.pad_token_id] * padding)
        mask.append([1] * (len(prompt) + len(answer)) + [0] * padding)
        labels.append([-100] * len(prompt) + answer + [-100] * padding)
    return (torch.tensor(ids), torch.tensor(mask), torch.tensor(labels),
            to_pixels(pixels) if pixels else None)


def pool_film(rng, pool, items):
    """Frames of some pooled video with these items; a fresh film when the pool has none."""
    found = pool.get(tuple(items.values()))
    return rng.choice(found) if found else film(rng, items)


# Phases of the backbone's training: steps, learning rate, and lessons per step by what their prompt
# shows. Comparing needs the smaller rate: at 2e-3 it was still at chance after 500 steps.
PHASES = ((400, 2e-3, {"text": 40}),
          (850, 2e-3, {"text": 12, "image": 44, "video": 20}),
          (700, 7e-4, {"text": 24}),
          (850, 8e-4, {"text": 32, "image": 20, "video": 12}))


def rebuild(out, seed=0, scale=1.0):
    """Train the backbone from nothing and save it in bf16. `scale` shortens every phase."""
    torch.manual_seed(seed)
    rng = random.Random(seed)
    tok = make_tokenizer()
    model, images = make_model(tok)
    print(f"{sum(p.numel() for p in model.parameters()):,} parameters")
    out.mkdir(parents=True, exist_ok=True)
    pool = {}
    for items, frames in make_pool(rng, int(4000 * scale), out):
        pool.setdefault(tuple(items.values()), []).append(frames)
    optimizer = torch.optim.AdamW(model.parameters(), betas=(0.9, 0.98), weight_decay=0.01)
    steps = [int(n * scale) for n, _, _ in PHASES]
    last = sum(steps[:-1])  # the rate is constant until the last phase, a half cosine over it
    phases = [p for p, n in enumerate(steps) for _ in range(n)]
    mean = {}
    for step, phase in enumerate(bar := tqdm(phases, desc="backbone", mininterval=5)):
        done = max(0, step - last) / steps[-1]
        _, lr, lessons = PHASES[phase]
        for group in optimizer.param_groups:
            group["lr"] = lr * min(1, (step + 1) / 100) * (0.51 + 0.49 * math.cos(math.pi * done))
        for kind, n in lessons.items():
            ids, mask, labels, pixels = lesson_batch(rng, tok, kind, n, phase, pool)
            media = {} if pixels is None else {"pixel_values": pixels}
            logits = model(input_ids=ids, attention_mask=mask, **media).logits[:, :-1]
            loss = F.cross_entropy(logits.flatten(0, 1), labels[:, 1:].flatten())
            (loss / len(lessons)).backward()
            mean[kind] = 0.98 * mean.get(kind, loss.item()) + 0.02 * loss.item()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        bar.set_postfix({k: f"{v:.3f}" for k, v in mean.items()}, refresh=False)
    save_backbone(model, tok, images, out)
    print(compare(out))
    check(out)


def save_backbone(model, tok, images, out):
    out.mkdir(parents=True, exist_ok=True)
    copy.deepcopy(model).to(torch.bfloat16).save_pretrained(out)
    tok.save_pretrained(out)
    images.save_pretrained(out)


def compare(folder, other=PREBUILT):
    """-> one line: whether two backbones have the same weights, bit by bit, or how far they are
    apart. The same bits need the same versions, kind of processor and number of threads."""
    mine, theirs = (load_file(Path(f, "model.safetensors")) for f in (folder, other))
    if {name: t.shape for name, t in mine.items()} != {name: t.shape for name, t in theirs.items()}:
        return f"{folder} and {other} are models of other sizes"
    total = sum(t.numel() for t in mine.values())
    differ, most = 0, 0.0
    for name, weights in mine.items():
        differ += (weights != theirs[name]).sum().item()
        most = max(most, (weights.float() - theirs[name].float()).abs().max().item())
    if not differ:
        return f"the weights of {folder} and {other} are the same: all {total:,}, bit by bit"
    return (f"{differ:,} of the {total:,} weights of {folder} differ from those of {other}, by "
            f"{most:.3g} at most")


# ----------------------------------------------------------------------------------- what it can do
class Reader:
    """A backbone through plain transformers. A case is (prompt text, scenes to show, kind)."""

    def __init__(self, folder):
        from transformers import AutoImageProcessor, AutoModelForImageTextToText, AutoTokenizer
        self.tok = AutoTokenizer.from_pretrained(folder)
        self.images = AutoImageProcessor.from_pretrained(folder, backend="pil")
        self.model = AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32).eval()

    def inputs(self, cases, begun):
        """Prompts as ids and pixels, each with the beginning of an answer."""
        rng, texts, shown = random.Random(1), [], []
        for (prompt, scenes, kind), beginning in zip(cases, begun, strict=True):
            text = self.tok.apply_chat_template([{"role": "user", "content": prompt}],
                                                tokenize=False, add_generation_prompt=True)
            for items in scenes:
                frames = [paint(rng, items)] if kind == "image" else film(rng, items)
                one = f"<img>{common.IMAGE_TOKEN * 16}</img>"
                many = "\n".join(f"Frame{i}: {one}" for i in range(1, FRAMES + 1))
                text = text.replace(f"<{kind}>", one if kind == "image" else many, 1)
                shown.extend(Image.fromarray(f) for f in frames)
            texts.append(text + beginning)
        out = self.tok(texts, add_special_tokens=False, padding=True, return_tensors="pt")
        out = {k: out[k] for k in ("input_ids", "attention_mask")}
        if shown:
            out["pixel_values"] = self.images(images=shown, return_tensors="pt")["pixel_values"]
        return out

    @torch.no_grad()
    def answers(self, cases, batch=64):
        """Greedy answers of generate()."""
        out = []
        for at in range(0, len(cases), batch):
            some = cases[at:at + batch]
            inputs = self.inputs(some, [""] * len(some))
            ids = self.model.generate(**inputs, max_new_tokens=112, do_sample=False)
            out += [self.tok.decode(row, skip_special_tokens=False).split("<|im_end|>")[0]
                    for row in ids[:, inputs["input_ids"].shape[1]:]]
        return out

    @torch.no_grad()
    def odds_of_a(self, cases, answers, batch=64):
        """How likely each answer is to go on with A, not B, where it first names a winner. Greedy
        would make a rule of a leaning of half a per cent."""
        begun = [text.partition("\nComparision:")[0] + "\nComparision:\nResponse"
                 for text in answers]
        a_or_b = torch.tensor([self.tok.convert_tokens_to_ids(f"Ġ{x}") for x in "AB"])
        out = []
        for at in range(0, len(cases), batch):
            inputs = self.inputs(cases[at:at + batch], begun[at:at + batch])
            last = self.model(**inputs, logits_to_keep=1).logits[:, -1]
            out += last[:, a_or_b].softmax(-1)[:, 0].tolist()
        return out


def check(folder=PREBUILT, n=200, seed=7, quiet=False):
    """Competence of a backbone on held-out combinations, in per cent. Reading must be near 100,
    verdicts (the mean probability of naming the right side) near 50. -> {name: per cent}"""
    rng, result, reader = random.Random(seed), {}, Reader(folder)
    for kind in ("image", "video"):
        scenes = [make_scene(rng, kind, True)[0] for _ in range(n)]
        got = reader.answers([(f"<{kind}> describe", [s], kind) for s in scenes])
        result[f"caption {kind}"] = 100 * sum(
            g == describe(s) for g, s in zip(got, scenes, strict=True)) / n
    cases, want = [], []
    for _ in range(n):
        items, keys = make_scene(rng, "text", True)
        question, _ = ask(rng, items, keys[0])
        cases.append((f"{describe(items)} {question}", [], "text"))
        want.append(f"{keys[0]} {items[keys[0]]} .")
    got = reader.answers(cases)
    result["look-up"] = 100 * sum(g == w for g, w in zip(got, want, strict=True)) / n
    for task in common.TASKS:
        for shown in ("caption", "pixels", "pixels, captioned")[: 3 if task != "text" else 1]:
            form, _, captioned = shown.partition(", ")
            style = "caption" if captioned else "msrl"
            rows = [make_row(rng, task, True) for _ in range(n)]
            cases = []
            for row in rows:
                row["media"] = [""] * len(row["scenes"])
                row["captions"] = [describe(s) for s in row["scenes"]]
                cases.append((common.render(row, form, style),
                              row["scenes"] if form == "pixels" else [], task.split("_")[0]))
            got = reader.answers(cases)
            name = f"{task} {shown}" if task != "text" else task
            right = 0
            for text, row in zip(got, rows, strict=True):
                caption = caption_text(row) if captioned else ""
                right += text.startswith(caption) and checks(row) in text
            result[f"checks {name}"] = 100 * right / n
            odds = reader.odds_of_a(cases, got)
            result[f"verdict {name}"] = 100 * sum(
                p if r["label"] == "A" else 1 - p for p, r in zip(odds, rows, strict=True)) / n
    if not quiet:
        print("\n".join(f"  {k:38s} {v:5.1f} %" for k, v in result.items()), flush=True)
    return result


def main():
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--check", action="store_true", help="what the prebuilt backbone can do")
    parser.add_argument("--rebuild", action="store_true", help="train the backbone anew")
    parser.add_argument("--seed", type=int, default=0, help="seed of the rows (or of --rebuild)")
    parser.add_argument("--out", default=str(ROOT / "toy"), help="folder to write")
    args = parser.parse_args()
    out = Path(args.out)
    if args.rebuild:
        rebuild(out / "backbone", args.seed)
    elif args.check:
        check(n=400)
    else:
        start = time.time()
        write_world(out, args.seed)
        shutil.copytree(PREBUILT, out / "backbone", dirs_exist_ok=True)
        budget = {"stage": "toy_world", "config": {"max_new_tokens": 160}}  # for eval.py
        (out / "backbone" / "stage.json").write_text(json.dumps(budget) + "\n")
        print(f"wrote {out}/ in {time.time() - start:.0f} s: backbone/ and "
              f"{', '.join(sorted(p.name for p in out.glob('*.jsonl')))}")


if __name__ == "__main__":
    main()
