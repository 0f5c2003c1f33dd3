"""
BaseReward's recipe in miniature: the reward head (Table 2), regularisers (Figure 1), balanced
lengths (Table 12), text for multimodal (Table 15) and ensembles (Table 7). Slow, so not part of
the tests.

    python tests/recipe.py                                 # seeds 0, 1, 2; after toy_world.py
    python tests/recipe.py --tables head --seeds 0         # a part of it
    python tests/recipe.py --pilot                         # the learning rates, on rows of no seed

All reward models start from one "reader", that of tests/curation.py: the toy backbone after 78,000
plain text rows, Bradley-Terry, which tells a right answer from a wrong one. Its head is not kept.
What it has not learned is the preference at hand: a flourish makes a right answer better and a
wrong one worse,

    right, flourished > right, plain > wrong, plain > wrong, flourished

so what a flourish is worth depends on the truth. Both answers of a row are drawn freely until they
differ in this: two thirds of the rows have a right and a wrong one, a sixth have two right ones, a
sixth two wrong ones, and the longer answer is the better one as often as not. Rows of image
generation have no answers; there the picture that fits is better (--t2i swap).

Fixed before any result: one epoch, batches of 32; a row is seen once, and none of them by the
reader. Every cell of a seed sees the same rows.

    text         2,000 of 4,000 rows; all of them only in Table 15's 1 : 2
    long         2,000 rows in 1,800 of which the better answer is the longer one (in characters,
                 as --balance_length counts), in 200 the shorter one
    mm           2,000 rows with pictures, half understanding, half generation
    validation   1,000 text and 1,000 mm rows about training's facts: the pilot's figures and the
                 ensembles' weights
    held-out     2,000 text rows and 500 for each of the two tasks with pictures, about held-out
                 facts, the same for every seed

The rates are the best of the pilot's three for one linear layer and two with SiLU together (text),
and for two with SiLU (mm); one for all cells of a table.
"""

import argparse
import json
import random
from itertools import combinations, product
from pathlib import Path
from statistics import fmean, pstdev

import curation
import toy_world
import torch
from curriculum import ROOT, bt_reward, common, lines, load_rows
from PIL import Image

HERE = Path("runs/recipe")
TEXT_RATE, MM_RATE = 5e-4, 1e-3
RATES = [2e-4, 5e-4, 1e-3]  # of the pilot
MM = ["image_understanding", "image_generation"]
HELDOUT = {"text": 2000, **dict.fromkeys(MM, 500)}

TEXT = "text.jsonl:2000"
# a run: its rows, in the seed's folder, and what differs from bt_reward's defaults
RUNS = {"1-none": (TEXT, {"head_layers": 1, "head_activation": "none"}),
        "2-none": (TEXT, {"head_activation": "none"}),
        "2-tanh": (TEXT, {"head_activation": "tanh"}),
        "2-relu": (TEXT, {"head_activation": "relu"}),
        "2-silu": (TEXT, {}),
        "3-silu": (TEXT, {"head_layers": 3}),
        "4-silu": (TEXT, {"head_layers": 4}),
        "5-silu": (TEXT, {"head_layers": 5}),
        "zero-0.001": (TEXT, {"zero_coefficient": 0.001}),
        "zero-0.01": (TEXT, {"zero_coefficient": 0.01}),
        "zero-0.1": (TEXT, {"zero_coefficient": 0.1}),
        "length-norm": (TEXT, {"length_norm": True}),
        "balanced": (TEXT, {"balance_length": True}),
        "long": ("long.jsonl", {}),
        "long-balanced": ("long.jsonl", {"balance_length": True}),
        "text-400": ("text.jsonl:400", {}),  # as many rows as are left of "long"
        "mix-0": ("mm.jsonl", {}),
        "mix-0.5": ("mm.jsonl,text.jsonl:1000", {}),
        "mix-1": ("mm.jsonl,text.jsonl:2000", {}),
        "mix-2": ("mm.jsonl,text.jsonl:4000", {})}
TABLES = {"head": {"1 layer": "1-none", "2, none": "2-none", "2, tanh": "2-tanh",
                   "2, relu": "2-relu", "2, silu": "2-silu", "3, silu": "3-silu",
                   "4, silu": "4-silu", "5, silu": "5-silu"},
          "regularisers": {"lambda 0": "2-silu", "lambda 0.001": "zero-0.001",
                           "lambda 0.01": "zero-0.01", "lambda 0.1": "zero-0.1",
                           "length norm": "length-norm"},
          "length": {"as drawn": "2-silu", "as drawn, balanced": "balanced",
                     "90 % long": "long", "90 % long, balanced": "long-balanced",
                     "as drawn, 400 rows": "text-400"},
          "mix": {"1 : 0": "mix-0", "1 : 0.5": "mix-0.5", "1 : 1": "mix-1", "1 : 2": "mix-2"},
          "ensemble": {}}  # of the head's runs
TEXT_COLUMNS = ["all", "right or wrong", "both right", "both wrong", "longer is better",
                "shorter is better"]


# -------------------------------------------------------------------------------------------- rows
def quality(right, flourish):
    """0 to 3"""
    if right:
        return 3 if flourish else 2
    return 0 if flourish else 1


def draw_flourish(rng):
    return rng.choice(list(toy_world.FLOURISHES)) if rng.random() < 0.5 else None


def make_row(rng, task, held):
    """A row of toy_world.make_row() with two answers of unlike quality, if it has answers."""
    row = toy_world.make_row(rng, task, held)
    if task.endswith("generation"):
        return {**row, "subset": "generation"}
    if "facts" in row:
        claims = [f"it is {value}" for value in row["facts"]["claims"]]
    else:
        claims = [" , ".join(f"{k} {v}" for k, v in scene.items()) for scene in row["told"]]
    if row["label"] == "B":
        claims.reverse()  # the right one first
    a = b = 0
    while a == b:
        rights = [rng.random() < 0.5, rng.random() < 0.5]
        flourishes = [draw_flourish(rng), draw_flourish(rng)]
        a, b = map(quality, rights, flourishes)
    row["responses"] = [toy_world.respond(claims[not right], flourish)
                        for right, flourish in zip(rights, flourishes, strict=True)]
    row["label"] = "A" if a > b else "B"
    row["subset"] = ["both wrong", "right or wrong", "both right"][sum(rights)]
    return row


def draw(name, tasks, n, seen, held=False, longer=None):
    """n rows, as many of each task, none of which is in `seen` (which grows). Pictures are painted
    into the folder of this name. longer: of how many the better answer is the longer one, where
    it is the shorter one of all others."""
    rng, rows = random.Random(f"recipe:{name}"), []
    left = {True: longer, False: n - longer} if longer is not None else None
    while len(rows) < n:
        row = make_row(rng, tasks[len(rows) % len(tasks)], held)
        pictures = [toy_world.describe(scene) for scene in row["scenes"]]
        content = row["prompt"], *sorted((row["responses"] or []) + pictures)
        extra = bt_reward.extra_length(row)
        unwanted = left is not None and (extra == 0 or left[extra > 0] == 0)
        if content in seen or unwanted:
            continue
        seen.add(content)
        if left is not None:
            left[extra > 0] -= 1
        media = []
        for x, scene in enumerate(row["scenes"]):
            path = ROOT / HERE / name / f"{len(rows)}-{x}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(toy_world.paint(rng, scene)).save(path)
            media.append(f"{path.parent.name}/{path.name}")
        rows.append({"id": f"{name}-{len(rows)}", "task": row["task"], "prompt": row["prompt"],
                     "responses": row["responses"], "media": media, "captions": [],
                     "label": row["label"], "subset": row["subset"]})
    return rows


def write_rows(seeds):
    """The rows that judge, and those of these seeds, unless they are there."""
    wanted = [ROOT / HERE / f"seed{seed}/long.jsonl" for seed in seeds]  # the last one written
    if all(path.exists() for path in wanted):
        return
    seen = set()  # what the reader has seen, and the validation rows
    for name in curation.READERS:
        for row in lines(ROOT / curation.HERE / f"{name}.jsonl"):
            seen.add((row["prompt"], *sorted(row["responses"])))
    (ROOT / HERE).mkdir(parents=True, exist_ok=True)
    write("validation_text", draw("validation_text", ["text"], 1000, seen))
    write("validation_mm", draw("validation_mm", MM, 1000, seen))
    for task, n in HELDOUT.items():
        write(f"heldout_{task}", draw(f"heldout_{task}", [task], n, set(), held=True))
    for seed in seeds:
        ours = set(seen)
        for name, tasks, n, longer in (("text", ["text"], 4000, None), ("mm", MM, 2000, None),
                                       ("long", ["text"], 2000, 1800)):
            name = f"seed{seed}/{name}"
            write(name, draw(name, tasks, n, ours, longer=longer))


def write(name, rows):
    path = ROOT / HERE / f"{name}.jsonl"
    path.parent.mkdir(exist_ok=True)
    common.write_lines(path, rows)


# ------------------------------------------------------------------------------- runs and scores
def read_reader():
    """-> the folder of the backbone that all runs start from, trained if it is not there yet"""
    start = "toy/backbone"
    if not (ROOT / curation.HERE / "reader.jsonl").exists():
        curation.write_rows([])
    for name in curation.READERS:
        start = curation.train("bt_reward.py", curation.HERE / name, "--model", start, "--data",
                               curation.HERE / f"{name}.jsonl", *curation.READER, *curation.BATCH)
    return str(ROOT / start)


def train(out, seed, data, rate, flags):
    """-> `out`, trained if it is not there yet. data: files of the seed's folder"""
    if not (out / "stage.json").exists():
        sources = [str(out.parent / source) for source in data.split(",")]
        cfg = bt_reward.Config(model=read_reader(), data=",".join(sources), out=str(out), lr=rate,
                               epochs=1, heldout="", t2i="swap", seed=seed, batch_size=32,
                               micro_batch=32, **flags)
        print(f"{out.relative_to(ROOT)}: {data}, {flags}", flush=True)
        bt_reward.train(cfg, torch.device("cpu"), cfg.out)
    return out


def scores_of(out, name):
    """-> (score of A, score of B) for each row of this file. Kept beside the model."""
    kept = out / f"scores_{name}.json"
    if not kept.exists():
        model, encoder = bt_reward.load(str(out))
        rows = load_rows(str(ROOT / HERE / f"{name}.jsonl"), encoder, quiet=True)
        kept.write_text(json.dumps(bt_reward.score_rows(model, encoder, rows)))
    return json.loads(kept.read_text())


def scores(seed, run, name):
    """The same of a run of RUNS, which is trained if it is not there yet."""
    data, flags = RUNS[run]
    rate = MM_RATE if run.startswith("mix") else TEXT_RATE
    return scores_of(train(ROOT / HERE / f"seed{seed}" / run, seed, data, rate, flags), name)


def better_first(name, pairs):
    """Scores (of A, of B) of the rows of this file -> (of the better, of the worse one)."""
    rows = lines(ROOT / HERE / f"{name}.jsonl")
    return [(a, b) if row["label"] == "A" else (b, a)
            for row, (a, b) in zip(rows, pairs, strict=True)]


def accuracy(name, pairs):
    """-> {column: per cent right}"""
    rows = lines(ROOT / HERE / f"{name}.jsonl")
    right = {column: [] for column in TEXT_COLUMNS}
    for row, (chosen, rejected) in zip(rows, better_first(name, pairs), strict=True):
        extra = bt_reward.extra_length(row)
        columns = ["all", row["subset"]]
        if extra:
            columns.append("longer is better" if extra > 0 else "shorter is better")
        for column in columns:
            right.setdefault(column, []).append(chosen > rejected)
    return {column: 100 * fmean(found) for column, found in right.items() if found}


# ------------------------------------------------------------------------------------------ tables
def cell(values, digits=1):
    """Mean (lowest to highest) of the seeds."""
    return f"{fmean(values):.{digits}f} ({min(values):.{digits}f} to {max(values):.{digits}f})"


def table(name, columns, cells):
    """cells: {label: {column: a value for each seed}}"""
    print(f"\n| {name} | {' | '.join(columns)} |\n|---|{'--:|' * len(columns)}")
    for label, values in cells.items():
        print(f"| {label} | {' | '.join(cell(values[column]) for column in columns)} |")


def text_table(name, seeds):
    """A table of held-out texts: the heads, the regularisers, the lengths. The last two columns are
    points more than "2, silu" of the same seed has, and the share of rows that only one of the two
    gets right."""
    cells, default = {}, [points(seed, "2-silu") for seed in seeds]
    for label, run in TABLES[name].items():
        found = [accuracy("heldout_text", scores(seed, run, "heldout_text")) for seed in seeds]
        cells[label] = {column: [one[column] for one in found] for column in TEXT_COLUMNS}
        cells[label] |= {"more than 2, silu": [], "unlike it": []}
        for seed, theirs in zip(seeds, default, strict=True):
            gains = [ours - its for ours, its in zip(points(seed, run), theirs, strict=True)]
            cells[label]["more than 2, silu"].append(100 * fmean(gains))
            cells[label]["unlike it"].append(100 * fmean(map(abs, gains)))
    table(name, [*TEXT_COLUMNS, "more than 2, silu", "unlike it"], cells)


def points(seed, run):
    """-> for each held-out text 1 if it is right, else 0"""
    pairs = better_first("heldout_text", scores(seed, run, "heldout_text"))
    return [int(chosen > rejected) for chosen, rejected in pairs]


def reward_table(seeds):
    """BaseReward's Table 13: where a regulariser puts the rewards of held-out texts."""
    cells = {}
    columns = ["mean, better", "mean, worse", "gap", "std, better", "std, worse"]
    for label, run in TABLES["regularisers"].items():
        found = []
        for seed in seeds:
            pairs = better_first("heldout_text", scores(seed, run, "heldout_text"))
            chosen, rejected = zip(*pairs, strict=True)
            found.append([fmean(chosen), fmean(rejected), fmean(chosen) - fmean(rejected),
                          pstdev(chosen), pstdev(rejected)])
        cells[label] = dict(zip(columns, zip(*found, strict=True), strict=True))
    table("rewards", columns, cells)


def mix_table(seeds):
    cells = {}
    for label, run in TABLES["mix"].items():
        cells[label] = {}
        for task in [*MM, "text"]:
            name = f"heldout_{task}"
            found = [accuracy(name, scores(seed, run, name))["all"] for seed in seeds]
            cells[label][task] = found
        pairs = zip(*[cells[label][task] for task in MM], strict=True)
        cells[label]["pictures"] = [fmean(pair) for pair in pairs]
    table("pictures : text", [*MM, "pictures", "text"], cells)


def combine(members, weights):
    """Scores of n models, [n][rows] pairs -> their weighted mean."""
    share = [weight / sum(weights) for weight in weights]
    pairs = []
    for of_row in zip(*members, strict=True):
        a = sum(s * pair[0] for s, pair in zip(share, of_row, strict=True))
        b = sum(s * pair[1] for s, pair in zip(share, of_row, strict=True))
        pairs.append((a, b))
    return pairs


def ensemble_line(members):
    """members: (seed, run) -> figures of the line: alone, and by each weighting of appendix B."""
    tried = [scores(*member, "heldout_text") for member in members]
    valid = [scores(*member, "validation_text") for member in members]
    alone = [accuracy("heldout_text", pairs)["all"] for pairs in tried]
    pairs_of = [accuracy("heldout_text", combine(two, [1, 1]))["all"]
                for two in combinations(tried, 2)]
    right = [accuracy("validation_text", pairs)["all"] for pairs in valid]
    margins = [fmean(a - b for a, b in better_first("validation_text", pairs)) for pairs in valid]
    figures = [cell(alone), cell(pairs_of) if pairs_of else ""]
    for weights in ([1] * len(members), right, margins):
        figures.append(f"{accuracy('heldout_text', combine(tried, weights))['all']:.1f}")
    return figures


def ensemble_table(seeds):
    heads = TABLES["head"]
    members_of = {"all": list(product(seeds, heads.values()))}
    for label, run in heads.items():
        members_of[f"{label}; all seeds"] = list(product(seeds, [run]))
    for seed in seeds:
        members_of[f"all heads; seed {seed}"] = list(product([seed], heads.values()))
    print("\n| members | alone | pairs | mean | weighted by accuracy | by confidence |"
          "\n|---|--:|--:|--:|--:|--:|")
    for label, members in members_of.items():
        print(f"| {label} | {' | '.join(ensemble_line(members))} |")


def pilot():
    """The rates, on rows and an order of no seed, judged on the validation rows."""
    write_rows(["pilot"])
    folder = ROOT / HERE / "seedpilot"
    for rate in RATES:
        for run, name in (("1-none", "validation_text"), ("2-silu", "validation_text"),
                          ("mix-0", "validation_mm")):
            data, flags = RUNS[run]
            out = train(folder / f"{run}-{rate}", 0, data, rate, flags)
            print(f"{run}, {rate}: {accuracy(name, scores_of(out, name))}", flush=True)


def main():
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tables", nargs="+", default=list(TABLES), choices=list(TABLES))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--pilot", action="store_true", help="try the learning rates")
    args = parser.parse_args()
    read_reader()
    if args.pilot:
        pilot()
        return
    write_rows(args.seeds)
    for name in args.tables:
        if name in ("head", "regularisers", "length"):
            text_table(name, args.seeds)
        if name == "regularisers":
            reward_table(args.seeds)
        if name == "mix":
            mix_table(args.seeds)
        if name == "ensemble":
            ensemble_table(args.seeds)


if __name__ == "__main__":
    main()
