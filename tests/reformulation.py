"""
Pair against swap (DT2IT-MRM 3.2, Table 7) on a ground of its own. Slow, so not part of the tests.

    python tests/reformulation.py                  # seeds 0, 1, 2
    python tests/reformulation.py --seeds 0        # one seed; without a number: the backbone alone
    python tests/reformulation.py --controls       # relations that the backbone has compared by

The toy rows are no fair ground: swap puts to the toy backbone the lesson it learned to caption
with, and of pair's two numbered images it never saw a word. Here:

rows      A picture shows one thing at one of five places: 4 colours x 3 shapes. A row asks for a
          thing ("red disc .") and shows it and one that differs in colour or in shape, at places of
          their own. Each seed draws ROWS of them. HELD rows, the same for every seed, have one of
          three combinations of colour and shape that no training row has, as the right thing or, by
          a coin, as the wrong one.
backbone  toy/backbone, taught further for LESSON_STEPS steps of 64. 15 % of the lessons are old
          ones (describe an image, look something up in it), so it still can. In 75 % it compares
          two numbered images in one pass, never by what the reward is about, a thing named in
          words: whether their things have the same colour and the same shape; at which of some
          named places which image has its thing; which is higher or further left. In 10 % it says
          of one image at which of some named places it has a thing. Among these lessons are
          neither pair's prompt nor swap's. One backbone for all seeds.
swap      asks "<image> shows", which nobody taught, in place of bt_reward.py's "<image> describe"
untrained The backbone's own log-likelihood: of the words, given each image (swap); of "Image 1 is
          better than Image 2." and its opposite (pair).
training  bt_reward.py, one epoch, so that no row is seen twice; same rows, steps and rates.

Table 7 trains on such rows and measures on others: one image, two responses. So a column has rows
of that kind, about the held-out things.

Settings, chosen before the first run, but for the backbone's lessons. Those were changed once,
after a pilot on training rows (one seed, the first rate): swap went to 100 %, pair stayed at 50,
and so had, nearly, the lessons (400 steps, one question each): 62 % for "same colour ?". The
lessons above ask several things at once. What is finished already is not run again.

Controls, added after seed 0 was seen: pair had again learned nothing, so can it learn at all? The
same training (first rate, CONTROL_ROWS rows) with rewards that the backbone has compared by:
"place", the image whose thing is at the named place ("top ."), by two images and by one; "higher",
by two (swap cannot ask it). Figures are of the last fifth of the rows, before they are learned
from; their things are drawn from all combinations, as the lessons' are.
"""

import argparse
import json
import math
import random
import re
from dataclasses import asdict, replace
from pathlib import Path

import toy_world
import torch
import torch.nn.functional as F
from curriculum import ROOT, bt_reward, common, lines, run
from PIL import Image

from stage0_sft import collate

OUT = ROOT / "runs" / "reformulation"
COLOURS, SHAPES = ["red", "green", "blue", "yellow"], ["square", "disc", "triangle"]
ROWS, HELD = 6000, 600
RATES = (5e-4, 1.5e-3)  # bt_reward.py's default and three times it
CONTROL_ROWS = 1920
CONTROLS = [("place", "pair"), ("place", "swap"), ("higher", "pair")]
LESSON_STEPS, LESSON_RATE = 500, 8e-4
SWAP_PROMPT = "<image> shows"
UNDERSTANDING = "image_understanding"
MARK = re.compile(r"\b(?:same|unlike|1|2)\b")  # what a comparison comes to
old_lesson, old_texts = toy_world.lesson, bt_reward.as_texts


# ----------------------------------------------------------------------------------- the backbone
def new_lesson(rng, kind, phase):
    """One lesson as toy_world.lesson() gives them: prompt, answer, scenes."""
    draw = rng.random()
    if draw < 0.15:
        lesson = old_lesson(rng, kind, phase)
        while not lesson[0].startswith("<image>"):  # the others are a judge's prompts
            lesson = old_lesson(rng, kind, phase)
        return lesson
    if draw < 0.55:
        question, answer, scenes = which_are_same(rng)
    elif draw < 0.75:
        question, answer, scenes = which_is_where(rng)
    elif draw < 0.85:
        question, answer, (scene, _) = which_is_where(rng)
        words = answer.replace("Image 1", "same").replace("Image 2", "unlike")
        return f"<image> {question}", words, [scene]
    else:
        question, answer, scenes = which_is_further(rng)
    return f"Image 1: <image>\nImage 2: <image>\n{question}", answer, scenes


def any_thing(rng):
    return f"{rng.choice(toy_world.COLOURS)} {rng.choice(toy_world.SHAPES)}"


def which_are_same(rng):
    """Of one thing in each image, at any places, or of 2 or 3, at the same places: colour, shape"""
    n, told = rng.choice([1, 2, 3]), []
    places = rng.sample(list(toy_world.PLACES), n)
    scenes = {}, {}
    for place in places:
        one, two = any_thing(rng).split(), any_thing(rng).split()
        for part in range(2):
            if rng.random() < 0.4:  # else they would mostly differ
                two[part] = one[part]
        scenes[0][place] = " ".join(one)
        scenes[1][place if n > 1 else rng.choice(list(toy_world.PLACES))] = " ".join(two)
        marks = ["same" if a == b else "unlike" for a, b in zip(one, two, strict=True)]
        told.append(f"{place if n > 1 else 'thing'} colour {marks[0]} shape {marks[1]} .")
    asked = " , ".join(places) if n > 1 else "thing"
    return f"same {asked} ?", " ".join(told), scenes


def which_is_where(rng):
    """Each of 2 to 5 places has its thing in the one image or in the other: in which?"""
    places = rng.sample(list(toy_world.PLACES), rng.choice([2, 3, 4, 5]))
    scenes, told = ({}, {}), []
    for place in places:
        side = rng.randrange(2)
        scenes[side][place] = any_thing(rng)
        told.append(f"{place} Image {side + 1} .")
    return f"{' , '.join(places)} ?", " ".join(told), scenes


def which_is_further(rng):
    """One thing in each image: which is higher, or further left?"""
    relation, axis = rng.choice([("further left", 0), ("higher", 1)])
    places = rng.sample(list(toy_world.PLACES), 2)
    where = [toy_world.PLACES[place][axis] for place in places]
    if where[0] == where[1]:
        return which_is_further(rng)
    first = 1 if where[0] < where[1] else 2
    scenes = [{place: any_thing(rng)} for place in places]
    return f"Which Image is {relation}?", f"Image {first} is {relation}.", scenes


def make_backbone(out):
    """toy/backbone, taught new_lesson()s. Prints how many of 400 new ones it answers right."""
    if (out / "config.json").exists():
        return
    reader = toy_world.Reader(ROOT / "toy" / "backbone")
    model, rng = reader.model.train(), random.Random("lessons")
    toy_world.lesson = new_lesson
    optimizer = torch.optim.AdamW(model.parameters(), betas=(0.9, 0.98), weight_decay=0.01)
    for step in range(LESSON_STEPS):
        rate = LESSON_RATE * min(1, (step + 1) / 20)
        rate *= 0.51 + 0.49 * math.cos(math.pi * step / LESSON_STEPS)
        for group in optimizer.param_groups:
            group["lr"] = rate
        ids, mask, labels, pixels = toy_world.lesson_batch(rng, reader.tok, "image", 64, 3, {})
        logits = model(input_ids=ids, attention_mask=mask, pixel_values=pixels).logits[:, :-1]
        loss = F.cross_entropy(logits.flatten(0, 1), labels[:, 1:].flatten())
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        if (step + 1) % 50 == 0:
            print(f"lessons, step {step + 1}: loss {loss.item():.3f}", flush=True)
    toy_world.save_backbone(model.eval(), reader.tok, reader.images, out)
    show_lessons(out, rng)


def show_lessons(folder, rng):
    """Of the comparisons of 400 new lessons, by kind, how many come out right in greedy answers"""
    right, reader = {}, toy_world.Reader(folder)
    cases = [new_lesson(rng, "image", 3) for _ in range(400)]
    got = reader.answers([(prompt, scenes, "image") for prompt, _, scenes in cases])
    for (prompt, answer, _), text in zip(cases, got, strict=True):
        kind = re.sub(r"(top|left|middle|right|bottom)( ,)? ", "", prompt.replace("\n", " "))
        wanted, said = MARK.findall(answer), MARK.findall(text)
        if not wanted:  # an old lesson
            kind, wanted, said = "old", [answer], [text]
        said += [None] * len(wanted)
        right.setdefault(kind, []).extend(
            a == b for a, b in zip(wanted, said, strict=False))
    for kind, values in right.items():
        print(f"  {kind:60s} {100 * sum(values) / len(values):5.1f} % of {len(values)}", flush=True)


# ----------------------------------------------------------------------------------------- rows
def other_thing(rng, thing):
    """One attribute away."""
    colour, shape = thing
    if rng.random() < 0.5:
        return rng.choice([c for c in COLOURS if c != colour]), shape
    return colour, rng.choice([s for s in SHAPES if s != shape])


def draw_things(rng, held):
    """-> the thing asked for, and the other; combinations of training, or one of them held out."""
    while True:
        thing = rng.choice(COLOURS), rng.choice(SHAPES)
        other = other_thing(rng, thing)
        n_held = (not toy_world.allowed(*thing)) + (not toy_world.allowed(*other))
        if n_held == held:
            return " ".join(thing), " ".join(other)


def write_rows(name, task, n, held):
    """n rows to OUT/name.jsonl, their images beside it. Labels are coins."""
    path, rng, rows = OUT / f"{name}.jsonl", random.Random(name), []
    if path.exists():
        return path
    (OUT / name).mkdir(parents=True, exist_ok=True)
    for i in range(n):
        things, label = draw_things(rng, held), rng.choice("AB")
        sides = things if label == "A" else things[::-1]
        place = rng.choice(list(toy_world.PLACES))
        row = {"id": f"{name}-{i}", "task": task, "label": label, "source": "toy"}
        if task == UNDERSTANDING:
            scenes = [{place: things[0]}]
            row |= {"prompt": f"thing of {place} ?",
                    "responses": [f"it is {thing} ." for thing in sides]}
        else:
            scenes = [{rng.choice(list(toy_world.PLACES)): thing} for thing in sides]
            row |= {"prompt": f"{things[0]} .", "responses": None}
        row |= {"media": [], "captions": [toy_world.describe(scene) for scene in scenes]}
        for side, scene in zip("AB", scenes, strict=False):
            row["media"].append(f"{name}/{i}{side}.png")
            Image.fromarray(toy_world.paint(rng, scene)).save(OUT / row["media"][-1])
        rows.append(row)
    common.write_lines(path, rows)
    return path


def write_controls(name, relation):
    """CONTROL_ROWS rows to OUT/name.jsonl, as write_rows(), with another reward."""
    path, rng, rows = OUT / f"{name}.jsonl", random.Random(name), []
    (OUT / name).mkdir(parents=True, exist_ok=True)
    for i in range(CONTROL_ROWS):
        places = rng.sample(list(toy_world.PLACES), 2)  # the right one first
        height = [toy_world.PLACES[place][1] for place in places]
        while relation == "higher" and height[0] >= height[1]:
            places = rng.sample(list(toy_world.PLACES), 2)
            height = [toy_world.PLACES[place][1] for place in places]
        label, media = rng.choice("AB"), []
        for side, place in zip("AB", places if label == "A" else places[::-1], strict=True):
            media.append(f"{name}/{i}{side}.png")
            image = toy_world.paint(rng, {place: any_thing(rng)})
            Image.fromarray(image).save(OUT / media[-1])
        asked = places[0] if relation == "place" else relation
        rows.append({"id": f"{name}-{i}", "task": "image_generation", "prompt": f"{asked} .",
                     "media": media, "responses": None, "captions": [], "label": label,
                     "source": "toy"})
    common.write_lines(path, rows)
    return path


# ------------------------------------------------------------------------------------- two forms
def as_texts(row, t2i):
    """bt_reward.as_texts() with another swap prompt, for which it has no flag."""
    parts = old_texts(row, t2i)
    if t2i == "swap" and row["task"].endswith("generation"):
        return [(SWAP_PROMPT, media, answers) for _, media, answers in parts]
    return parts


def config(form, rate, data, seed):
    out = OUT / f"seed{seed}" / f"{form}-{rate:g}"
    return bt_reward.Config(model=str(OUT / "backbone"), data=str(data), out=str(out), lr=rate,
                            epochs=1, heldout="", t2i=form, seed=seed, micro_batch=32)


def train(seed):
    """Both forms at all rates on the seed's rows. -> {(form, rate): folder}"""
    path, folders, rows = OUT / f"rows{seed}.jsonl", {}, None
    for form in ("pair", "swap"):
        for rate in RATES:
            cfg = config(form, rate, path, seed)
            folders[form, rate] = Path(cfg.out)
            if Path(cfg.out, "stage.json").exists():
                continue
            if rows is None:  # once; "tokens" are of the first form and sort micro-batches only
                write_rows(path.stem, "image_generation", ROWS, held=False)
                _, encoder = common.load(cfg.model)
                rows = bt_reward.load_pairs(cfg.data, encoder, bt_reward.settings_of(asdict(cfg)),
                                            cfg)
            bt_reward.train(cfg, torch.device("cpu"), cfg.out, rows)
    return folders


def train_controls(seeds):
    for relation, form in CONTROLS:
        found = []
        for seed in seeds:
            name = f"{relation}{seed}"
            cfg = replace(config(form, RATES[0], OUT / f"{name}.jsonl", seed),
                          out=str(OUT / f"seed{seed}" / f"{relation}-{form}"))
            if not Path(cfg.out, "stage.json").exists():
                write_controls(name, relation)
                bt_reward.train(cfg, torch.device("cpu"), cfg.out)
            steps = lines(Path(cfg.out) / "metrics.jsonl")
            found.append(mean([step["accuracy"] for step in steps[-len(steps) // 5:]]))
        print(f"control, {relation}, {form}: " + ", ".join(f"{value:.1f}" for value in found),
              flush=True)


@torch.no_grad()
def log_likelihoods(model, encoder, rows):
    """The untrained backbone's scores, in the shape of bt_reward.score_all(): for every row the
    summed log-likelihood of A's answer and of B's."""
    parts, found = [], []
    for row in rows:
        for prompt, answers in bt_reward.candidates(row, encoder, model.settings):
            parts += [(prompt, answer) for answer in answers]
    for at in range(0, len(parts), 64):
        prompts, answers = zip(*parts[at:at + 64], strict=True)
        ids, mask, positions, labels, media = collate(prompts, answers, encoder.pad_id, "cpu")
        logits = model(input_ids=ids, attention_mask=mask, position_ids=positions, use_cache=False,
                       **media).logits[:, :-1].float()
        nll = F.cross_entropy(logits.transpose(1, 2), labels[:, 1:], ignore_index=-100,
                              reduction="none")                                       # [b, L-1]
        found += (-nll.sum(1)).tolist()
    return list(zip(found[::2], found[1::2], strict=True))


def judged(folder, form, files):
    """-> {name: [labels, scores in the order of the file, scores with the candidates exchanged]},
    A's score first in both; kept beside the checkpoint."""
    kept = folder / f"scores-{form}.json"
    if kept.exists():
        return json.loads(kept.read_text())
    if folder.name == "backbone":
        model, encoder = common.load(str(folder))
        model.settings, score = {"t2i": form, "max_response_tokens": 1024}, log_likelihoods
    else:
        model, encoder = bt_reward.load(str(folder))
        score = bt_reward.score_all
    cfg, result = config(form, RATES[0], "", 0), {}
    for name, path in files.items():
        rows = bt_reward.load_pairs(str(path), encoder, model.settings, cfg)
        rows.sort(key=lambda row: row["id"])
        labels = [row["label"] for row in rows]
        exchanged = score(model, encoder, [common.swap(row) for row in rows])
        result[name] = [labels, score(model, encoder, rows), [(a, b) for b, a in exchanged]]
    kept.write_text(json.dumps(result))
    return result


# ----------------------------------------------------------------------------------------- figures
def verdicts(scores, labels):
    """-> True for each row whose better candidate has the higher score"""
    return [(a > b) == (label == "A") and a != b
            for (a, b), label in zip(scores, labels, strict=True)]


def mean(values):
    return 100 * sum(values) / len(values)


def figures(folder, form, files):
    """Per cent of the held-out rows, "one image, two responses" in one order; "seen" is of the last
    1,500 training rows, each scored before the step that learned from it."""
    scores = judged(folder, form, files)
    labels, one, two = scores["generation"]
    one_right, two_right = verdicts(one, labels), verdicts(two, labels)
    both = [((a + c) / 2, (b + d) / 2) for (a, b), (c, d) in zip(one, two, strict=True)]
    result = {"right, each order": mean(one_right + two_right),
              "right, means of both": mean(verdicts(both, labels)),
              "verdict turns with the order": mean(
                  [x != y for x, y in zip(one_right, two_right, strict=True)])}
    labels, one, _ = scores["understanding"]
    result["one image, two responses"] = mean(verdicts(one, labels))
    log = folder / "metrics.jsonl"
    steps = lines(log)[-47:] if log.exists() else []  # 47 x 32 rows
    result["seen"] = mean([step["accuracy"] for step in steps]) if steps else math.nan
    return result


def show(table):
    columns = list(next(iter(table.values()))[0])
    print("\n| | " + " | ".join(columns) + " |\n|---|" + "--:|" * len(columns))
    for name, seeds in table.items():
        cells = []
        for column in columns:
            values = [row[column] for row in seeds]
            spread = f"{sum(values) / len(values):.1f} ({min(values):.0f}-{max(values):.0f})"
            cells.append("-" if math.isnan(values[0]) else spread)
        print(f"| {name} | " + " | ".join(cells) + " |", flush=True)


def main():
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="*", default=[0, 1, 2])
    parser.add_argument("--controls", action="store_true", help="only these")
    args = parser.parse_args()
    if not (ROOT / "toy" / "backbone").exists():
        run("tests/toy_world.py")
    bt_reward.as_texts = as_texts
    make_backbone(OUT / "backbone")
    if args.controls:
        train_controls(args.seeds)
        return
    files = {"generation": write_rows("held_generation", "image_generation", HELD, held=True),
             "understanding": write_rows("held_understanding", UNDERSTANDING, HELD, held=True)}
    table = {}
    for seed in args.seeds:
        for form in ("pair", "swap"):
            table.setdefault(f"{form}, untrained", []).append(
                figures(OUT / "backbone", form, files))
        for (form, rate), folder in train(seed).items():
            table.setdefault(f"{form}, {rate:g}", []).append(figures(folder, form, files))
        for name, seeds in table.items():
            print(f"seed {seed}, {name}: " + ", ".join(
                f"{key} {value:.1f}" for key, value in seeds[-1].items()), flush=True)
    if table:
        show(table)


if __name__ == "__main__":
    main()
