"""
DT2IT-MRM's Table 7 (method 3) in miniature: does curation (3.3) clean labels whose errors have a
structure, and is a reward model better for it? Slow, so not part of the tests.

    python tests/curation.py --seeds 0 1 2   # after tests/curriculum.py of the same seeds
    python tests/curation.py --pilot         # how long to train, on rows of no seed

Text only. Fixed before any result of a seed. A pilot on rows of no seed changed READERS: after the
first, new rows of training were judged right in 87 %, and no more after clean labels had trained it
further, so there is a second. Then, for lack of time, all sets were made a third smaller.
Each seed draws its own rows and its own noise; no row stands in two sets of a seed, nor in what
judges and readers were trained on:

    initial    1,000   D_0. Its annotators fall for a wrong flourished answer a quarter as often as
                       the toy world's do, which is 45 to 98 % of the time
    open       2,000   D^open, half of it for each iteration. The toy world's own annotators: 8 of
                       10 labels of "conflict" rows (only the wrong answer is flourished) are wrong,
                       all others are right
    voters  2 x 1,000  for each of two further reward models. One's annotators fall for "detail" and
                       "expert" only, the other's for "kind" and "sure" only
    held-out   1,000   held-out facts, true labels, the same rows for every seed

Judges are the other two seeds' stage 0 after 15 steps of text RL (60 make a judge of 99 %), asked
in both orders. All reward models start from one "reader", the toy backbone after READERS: Bradley-
Terry on plain rows (neither answer flourished, or both), which cannot tell whom to follow when only
one is. From the backbone itself a head needs 16,000 rows to find the comparison; the paper's
backbone can compare from the start. DEVIATION: D_0 is drawn, not made by --construct.

Trained on: D_0 (iteration 0); D_0 and the open rows as they are (the paper's baseline); the loop's
iterations 1 and 2; all these rows with true labels ("clean").
"""

import argparse
import json
import random
from pathlib import Path

import toy_world
from curriculum import ROOT, bt_reward, common, lines, load_rows, run, sample_group

HERE = Path("runs/curation")
KINDS = ["overall", "plain", "helpful", "conflict"]
ALL = list(toy_world.FLOURISHES)
# rows; the flourishes their annotators fall for; how often, compared with the toy world's
SETS = {"initial": (1000, ALL, 0.25), "open": (2000, ALL, 1.0),
        "voter1": (1000, ["detail", "expert"], 1.0), "voter2": (1000, ["kind", "sure"], 1.0)}
READERS = {"reader": 30000, "reader2": 48000}  # rows, of one epoch each
READER = ["--lr", 1e-3, "--epochs", 1]
TRAINING = ["--lr", 5e-4, "--epochs", 2]
BATCH = ["--batch_size", 32, "--micro_batch", 32, "--heldout", ""]
JUDGE = "judge{seed}"  # their folder in HERE
JUDGED = 300  # held-out rows, both orders, for the judges' own accuracy


# -------------------------------------------------------------------------------------------- rows
def draw(name, n, seen, held=False, kinds=KINDS):
    """n text rows with true labels, of these kinds, none of which is in `seen` (which grows)."""
    rng, rows = random.Random(f"curation:{name}"), []
    while len(rows) < n:
        row = toy_world.make_row(rng, "text", held)
        row["subset"] = toy_world.kind_of(row)
        if row["subset"] in kinds and content(row) not in seen:
            seen.add(content(row))
            rows.append({"id": f"{name}-{len(rows)}", "task": "text", "prompt": row["prompt"],
                         "responses": row["responses"], "media": [], "captions": [],
                         "label": row["label"], "truth": row["label"], "subset": row["subset"],
                         "flourish": row["flourish"]})
    return rows


def content(row):
    return row["prompt"], frozenset(row["responses"])


def annotate(rows, name, fooled_by, share):
    """The rows with the labels of annotators who follow these flourishes."""
    rng, labelled = random.Random(f"noise:{name}"), []
    for row in rows:
        wrong = common.OTHER[row["truth"]]
        flourish = row["flourish"]["AB".index(wrong)]
        if row["subset"] == "conflict" and flourish in fooled_by:
            falls = rng.random() < share * toy_world.FLOURISHES[flourish][1]
            row = {**row, "label": wrong if falls else row["truth"]}
        labelled.append(row)
    return labelled


def write_rows(seeds):
    """All rows of these seeds, the readers' and the held-out ones."""
    (ROOT / HERE).mkdir(parents=True, exist_ok=True)
    trained = set()  # what the judges have seen, then what the reader sees, too
    for name in ("sft", "text_rl"):
        trained.update(content(row) for row in lines(ROOT / f"toy/{name}.jsonl"))
    for name, n in READERS.items():
        rows = draw(name, n, trained, kinds=["plain"])
        common.write_lines(ROOT / HERE / f"{name}.jsonl", rows)
    common.write_lines(ROOT / HERE / "heldout.jsonl", draw("heldout", 1000, set(), held=True))
    for seed in seeds:
        folder, seen = ROOT / HERE / f"seed{seed}", set(trained)
        folder.mkdir(exist_ok=True)
        for name, (n, fooled_by, share) in SETS.items():
            rows = draw(f"{name}-{seed}", n, seen)
            common.write_lines(folder / f"{name}-clean.jsonl", rows)
            noisy = annotate(rows, f"{name}-{seed}", fooled_by, share)
            common.write_lines(folder / f"{name}.jsonl", noisy)
        if seed == "pilot":  # facts of training, as the held-out ones are not to choose with
            common.write_lines(folder / "validation.jsonl", draw("validation", 1000, seen))


# ---------------------------------------------------------------------------------------- accuracy
def by_kind(rows, points):
    """points: 0 to 1 for each row -> {kind: per cent}"""
    shares = {}
    for kind in KINDS:
        of_kind = [p for row, p in zip(rows, points, strict=True)
                   if kind in ("overall", row["subset"])]
        shares[kind] = 100 * sum(of_kind) / max(1, len(of_kind))
    return shares


def accuracy(folder, data=HERE / "heldout.jsonl"):
    """Of a reward model, or of a judge in both orders. Kept beside it."""
    kept = ROOT / folder / f"by_kind_{data.stem}.json"
    if not kept.exists():
        path, points = str(ROOT / folder), []
        if (ROOT / folder / "reward_head.safetensors").exists():
            model, encoder = bt_reward.load(path)
            rows = load_rows(str(ROOT / data), encoder, quiet=True)
            for row, (a, b) in zip(rows, bt_reward.score_rows(model, encoder, rows), strict=True):
                points.append("BA"[a > b] == row["label"])
        else:
            model, encoder = common.load(path, style=common.trained_style(path))
            rows = load_rows(f"{ROOT / data}:{JUDGED}", encoder, quiet=True)
            points = [0.0] * len(rows)
            for pred in common.judge(model, encoder, rows, sample_group, batch_size=128,
                                     max_new_tokens=160):
                points[pred["at"]] += 0.5 * (pred["pred"] == rows[pred["at"]]["label"])
        kept.write_text(json.dumps(by_kind(rows, points)))
    return json.loads(kept.read_text())


# --------------------------------------------------------------------------------------- trainings
def train(script, out, *flags):
    """-> `out`, trained if it is not there yet"""
    if not (ROOT / out / "stage.json").exists():
        run(script, "--out", out, *flags)
    return out


def reward_model(out, seed, *data):
    return train("bt_reward.py", out, "--model", HERE / "reader2", "--seed", seed,
                 *TRAINING, *BATCH, "--data", ",".join(map(str, data)))


def judge_of(seed):
    return train("stage1_text_grpo.py", HERE / JUDGE.format(seed=seed),
                 "--model", f"runs/seed{seed}/0", "--max_steps", 15, "--seed", seed,
                 "--heldout", "")


def models_of(seed, judges):
    """-> {what it was trained on: folder of a reward model}"""
    folder = HERE / f"seed{seed}"
    initial, opened = folder / "initial.jsonl", folder / "open.jsonl"
    voters = [reward_model(folder / f"by-{name}", seed, folder / f"{name}.jsonl")
              for name in ("voter1", "voter2")]
    loop = folder / "loop"
    if not (ROOT / loop / "2-model/stage.json").exists():
        run("dt2it.py", "--iterations", 2, "--data", initial, "--curate", opened, "--out", loop,
            "--model", HERE / "reader2", "--models", *voters, "--judges", *judges, "--seed", seed,
            *TRAINING, *BATCH)
    return {"voter 1": voters[0], "voter 2": voters[1], "D_0": loop / "0-model",
            "D_0 + uncurated": reward_model(folder / "uncurated", seed, initial, opened),
            "iteration 1": loop / "1-model", "iteration 2": loop / "2-model",
            "clean": reward_model(folder / "clean", seed, folder / "initial-clean.jsonl",
                                  folder / "open-clean.jsonl")}


# ------------------------------------------------------------------------------------------ tables
def cells(shares):
    return " | ".join(f"{share:.1f}" for share in shares.values())


def label_lines(seed):
    """Lines of the table of labels: what came in, and what each iteration left of it."""
    folder, table = ROOT / HERE / f"seed{seed}", []
    sources = {"D_0": "initial", "open": "open"}
    files = {"as given": None, "after iteration 1": "1-all", "after iteration 2": "2-all"}
    for source, name in sources.items():
        for when, part in files.items():
            path = folder / f"loop/{part}/curated.jsonl" if part else folder / f"{name}.jsonl"
            rows = [row for row in lines(path) if row["id"].startswith(name)]
            right = by_kind(rows, [row["label"] == row["truth"] for row in rows])
            table.append(f"| {seed} | {source}, {when} | {len(rows)} | {cells(right)} |")
    return table


def step_lines(seed):
    """Lines of the table of steps: how right the labels were that a step touched, before, after."""
    table = []
    for part in ("1-new", "1-all", "2-new", "2-all"):
        folder = ROOT / HERE / f"seed{seed}/loop" / part
        kept = lines(folder / "curated.jsonl")
        flipped, agreed, judged = [], [], []
        for row in kept + lines(folder / "dropped.jsonl"):
            if row["curation"]["flipped"]:  # to the label that was not given
                flipped.append(row["curation"]["given"] != row["truth"])
        for row in kept:
            group = agreed if row["curation"]["fate"] == "agreed" else judged
            group.append(row["label"] == row["truth"])
        counts = [f"{sum(group)} of {len(group)}" for group in (flipped, agreed, judged)]
        dropped = len(lines(folder / "dropped.jsonl"))
        table.append(f"| {seed} | {part} | {' | '.join(counts)} | {dropped} |")
    return table


def main():
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--judges", type=int, nargs="+", default=[0, 1, 2],
                        help="seeds of judges; a seed is not judged by its own")
    parser.add_argument("--pilot", action="store_true", help="train on clean rows of no seed")
    args = parser.parse_args()
    write_rows(["pilot"] if args.pilot else args.seeds)
    start = "toy/backbone"
    for name in READERS:
        start = train("bt_reward.py", HERE / name, "--model", start, "--data",
                      HERE / f"{name}.jsonl", *READER, *BATCH)
    if args.pilot:
        folder = HERE / "seedpilot"
        model = reward_model(folder / "clean", 0, folder / "initial-clean.jsonl",
                             folder / "open-clean.jsonl")
        for name in (start, model):
            print(f"{name}, validation: {accuracy(name, folder / 'validation.jsonl')}")
        return
    judges = {seed: judge_of(seed) for seed in args.judges}
    heldout, labels, steps = [], [], []
    for seed in args.seeds:
        others = [folder for other, folder in judges.items() if other != seed]
        for name, folder in models_of(seed, others).items():
            heldout.append(f"| {seed} | {name} | {cells(accuracy(folder))} |")
        labels += label_lines(seed)
        steps += step_lines(seed)
    kinds = " | ".join(KINDS) + " |\n|---|---|"
    print(f"\n| judge | | {kinds}" + "--:|" * 4)
    for seed, folder in judges.items():
        print(f"| {seed} | 15 steps | {cells(accuracy(folder))} |")
    print(f"\n| seed | labels right, % | rows | {kinds}" + "--:|" * 5, *labels, sep="\n")
    print("\n| seed | curation | right, of those flipped by the vote | of those the model agrees "
          "with | of those the judges decided | dropped |\n|---|---|--:|--:|--:|--:|", *steps,
          sep="\n")
    print(f"\n| seed | trained on | {kinds}" + "--:|" * 4, *heldout, sep="\n")


if __name__ == "__main__":
    main()
