"""
Lab 13: your own preference, as rows. Change pair(): what stands here is an example, "of two right
answers I want the one that names the whole thing".

    python tests/labs/make_rows.py      # my_labs/13/train.jsonl, heldout.jsonl, candidates.jsonl

Use the toy world's words: others are spelled in bytes, which the toy backbone has never read.
"""

import argparse
import json
import random
from pathlib import Path

import diagnosis  # noqa: F401  (puts the repository on the path)
import toy_world


def pair(rng, held):
    """-> a prompt, the response that you prefer, one or more that you do not, and two texts for a
    rationale: what is true, and for each response what there is to say of it, or None.
    held: True for held-out rows, whose combinations no training row has."""
    items, (key,) = toy_world.make_scene(rng, "text", held)
    thing = items[key]                                                # "blue cross"
    wrong = toy_world.other_value(rng, thing, held, key)              # "red cross"
    others = [*thing.split(), wrong]                                  # "blue", "cross", "red cross"
    rng.shuffle(others)
    prompt = f"{toy_world.describe(items)} thing of {key} ?"
    # A flourish makes a response longer. The worse ones, whose claims are shorter, have it more
    # often: better is then longer as often as shorter, and length does not tell the label.
    better = toy_world.respond(f"it is {thing}", rng.choice([None] * 4 + [*toy_world.FLOURISHES]))
    worse = []
    for other in others:
        flourish = rng.choice([None, *toy_world.FLOURISHES])
        worse.append(toy_world.respond(f"it is {other}", flourish))
    says = {better: f"says {thing} against {thing} match ."}
    for other, text in zip(others, worse, strict=True):
        says[text] = f"says {other} against {thing} differ ."
    return prompt, better, worse, f"{key} {thing} .", says


def row_of(rng, name, i, held):
    """A preference row: the better one is A or B by a coin, the other the first of the worse."""
    prompt, better, worse, fact, says = pair(rng, held)
    label = rng.choice("AB")
    responses = [better, worse[0]] if label == "A" else [worse[0], better]
    row = {"id": f"{name}-{i}", "task": "text", "prompt": prompt, "label": label,
           "responses": responses}
    if says:
        row["rationale"] = (
            f"Feedback:\n{fact} Response A {says[responses[0]]} Response B {says[responses[1]]}\n"
            f"Comparision:\nResponse {label} is right .\n"
            f"Conclusion:\nResponse {label} is better .")
    return row


def candidates_of(rng, name, i, held):
    """A prompt with all its responses for eval.py --rank, the best one first."""
    prompt, better, worse, *_ = pair(rng, held)
    return {"id": f"{name}-{i}", "prompt": prompt, "candidates": [better, *worse]}


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")
    print(f"wrote {path}: {len(rows)} rows")


def main():
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("my_labs", "13"))
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    for name, n, make, held in (("train", 150, row_of, False), ("heldout", 50, row_of, True),
                                ("candidates", 20, candidates_of, True)):
        rng = random.Random(f"{args.seed} {name}")
        write(args.out / f"{name}.jsonl", [make(rng, name, i, held) for i in range(n)])


if __name__ == "__main__":
    main()
