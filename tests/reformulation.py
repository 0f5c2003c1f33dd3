"""
Pair against swap (DT2IT-MRM 3.2, Table 7) on a ground of its own. Slow, so not part of the tests.

    python tests/reformulation.py                  # seeds 0, 1, 2
    python tests/reformulation.py --seeds 0        # one seed
    python tests/reformulation.py --pilot          # the backbone; both forms, the default rate, no
                                                   # held-out row: is there anything to see?

The toy rows are no fair ground: swap puts to the toy backbone the lesson it learned to caption
with, and of pair's two numbered images it never saw a word. Here:

rows      A picture shows one thing at one of five places: 4 colours x 3 shapes. A row asks for a
          thing ("red disc .") and shows it and one that differs in colour or in shape, at places of
          their own. Each seed draws ROWS of them. HELD rows, the same for every seed, have one of
          three combinations of colour and shape that no training row has, as the right thing or, by
          a coin, as the wrong one.
backbone  toy/backbone, taught further for LESSON_STEPS steps of 64. A quarter of the lessons are
          old ones (describe an image, look something up in it), so it still can. In the others it
          compares two numbered images in one pass, or one image with a word, and never by what the
          reward is about, a thing named in words: which is higher, which is further left, same
          colour, same shape, which is at a named place; and of one image, whether it is at a named
          place. Among these lessons are neither pair's prompt nor swap's. One backbone for all
          seeds.
swap      asks "<image> shows", which nobody taught, in place of bt_reward.py's "<image> describe"
untrained The backbone's own log-likelihood: of the words, given each image (swap); of "Image 1 is
          better than Image 2." and its opposite (pair).
training  bt_reward.py, one epoch, so that no row is seen twice; same rows, steps and rates.

Table 7 trains on such rows and measures on others: one image, two responses. So a column has rows
of that kind, about the held-out things.

Settings, chosen before the first run: those below. What is finished already is not run again.
"""

import argparse
import json
import math
import random
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
LESSON_STEPS, LESSON_RATE = 400, 8e-4
PILOT = 9  # the seed of the pilot's rows
SWAP_PROMPT = "<image> shows"
UNDERSTANDING = "image_understanding"
old_lesson, old_texts = toy_world.lesson, bt_reward.as_texts


# ----------------------------------------------------------------------------------- the backbone
def new_lesson(rng, kind, phase):
    """One lesson as toy_world.lesson() gives them: prompt, answer, scenes."""
    if rng.random() < 0.25:
        lesson = old_lesson(rng, kind, phase)
        while not lesson[0].startswith("<image>"):  # the others are a judge's prompts
            lesson = old_lesson(rng, kind, phase)
        return lesson
    places, things = [], []
    for _ in range(2):
        places.append(rng.choice(list(toy_world.PLACES)))
        things.append(f"{rng.choice(toy_world.COLOURS)} {rng.choice(toy_world.SHAPES)}")
    relation = rng.choice(["higher", "further left", "colour", "shape", "place", "one"])
    if relation == "one":
        named = places[rng.randrange(2)]
        answer = "same ." if named == places[0] else "unlike ."
        return f"<image> {named} ?", answer, [{places[0]: things[0]}]
    if relation in ("colour", "shape"):
        part = ("colour", "shape").index(relation)
        if rng.random() < 0.5:  # else they would mostly differ
            words = things[1].split()
            words[part] = things[0].split()[part]
            things[1] = " ".join(words)
        alike = things[0].split()[part] == things[1].split()[part]
        question, answer = f"same {relation} ?", "same ." if alike else "unlike ."
    else:
        sizes = [toy_world.PLACES[place][relation == "higher"] for place in places]  # x or y
        if relation == "place":
            sizes = [place != places[0] for place in places]
        if sizes[0] == sizes[1]:
            return new_lesson(rng, kind, phase)
        first, second = (1, 2) if sizes[0] < sizes[1] else (2, 1)
        if relation == "place":
            if rng.random() < 0.5:
                first, second = second, first
            relation = f"at {places[first - 1]}"
        question, answer = f"Which Image is {relation}?", f"Image {first} is {relation}."
    scenes = [{place: thing} for place, thing in zip(places, things, strict=True)]
    return f"Image 1: <image>\nImage 2: <image>\n{question}", answer, scenes


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
    """Greedy answers to 400 new lessons, by kind."""
    right, reader = {}, toy_world.Reader(folder)
    cases = [new_lesson(rng, "image", 3) for _ in range(400)]
    got = reader.answers([(prompt, scenes, "image") for prompt, _, scenes in cases])
    for (prompt, answer, _), text in zip(cases, got, strict=True):
        question = prompt.split("\n")[-1] if prompt.startswith("Image 1") else "other"
        kind = "at a place" if " at " in question else question
        if answer in ("same .", "unlike .") and question == "other":
            kind = "one image"
        right.setdefault(kind, []).append(text == answer)
    for kind, values in right.items():
        print(f"  {kind:28s} {100 * sum(values) / len(values):5.1f} % of {len(values)}", flush=True)


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


def train(form, rate, data, seed):
    cfg = config(form, rate, data, seed)
    if not Path(cfg.out, "stage.json").exists():
        bt_reward.train(cfg, torch.device("cpu"), cfg.out)
    return Path(cfg.out)


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
    """-> {name: [scores in the order of the file, scores with the candidates exchanged]}, A's first
    in both; kept beside the checkpoint."""
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
    """Per cent of the held-out rows; "seen" is of the last 1,500 training rows, each scored before
    the step that learned from it."""
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
            cells.append(f"{sum(values) / len(values):.1f} ({min(values):.0f}-{max(values):.0f})")
        print(f"| {name} | " + " | ".join(cells) + " |", flush=True)


def main():
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--pilot", action="store_true", help="no held-out row is looked at")
    args = parser.parse_args()
    if not (ROOT / "toy" / "backbone").exists():
        run("tests/toy_world.py")
    bt_reward.as_texts = as_texts
    make_backbone(OUT / "backbone")
    if args.pilot:
        data = write_rows(f"pilot{PILOT}", "image_generation", ROWS, held=False)
        for form in ("swap", "pair"):
            steps = lines(train(form, RATES[0], data, PILOT) / "metrics.jsonl")
            for at in range(0, len(steps), 24):
                print(f"{form}, to step {min(len(steps), at + 24)}: "
                      f"{mean([step['accuracy'] for step in steps[at:at + 24]]):.1f} %")
        return
    files = {"generation": write_rows("held_generation", "image_generation", HELD, held=True),
             "understanding": write_rows("held_understanding", UNDERSTANDING, HELD, held=True)}
    table = {}
    for seed in args.seeds:
        data = write_rows(f"rows{seed}", "image_generation", ROWS, held=False)
        for form in ("pair", "swap"):
            cells = {f"{form}, untrained": OUT / "backbone"}
            for rate in RATES:
                cells[f"{form}, {rate:g}"] = train(form, rate, data, seed)
            for name, folder in cells.items():
                table.setdefault(name, []).append(figures(folder, form, files))
                print(f"seed {seed}, {name}: " + ", ".join(
                    f"{key} {value:.1f}" for key, value in table[name][-1].items()), flush=True)
    show(table)


if __name__ == "__main__":
    main()
