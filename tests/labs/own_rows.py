"""
Lab 13: what is wrong with rows that somebody wrote, and what a judge could get right without
judging.

    python tests/labs/lab.py check 13 --dir my_labs/13       # its train.jsonl and heldout.jsonl
"""

import json
import re
from collections import Counter
from pathlib import Path

import diagnosis  # noqa: F401  (puts the repository on the path)
import toy_world

import common

ENOUGH = {"train": 150, "heldout": 50}
MOST = 12       # problems of one kind that are printed
TELLS = 0.9     # a word that stands on the better side in so many of its rows tells the label


# ---------------------------------------------------------------------------------- row by row
def read(path, problems):
    """-> the good rows of a file; what is wrong with the others goes to problems, each with its
    line"""
    if not path.exists():
        problems.append(f"{path.name} is not there; python tests/labs/make_rows.py writes one")
        return []
    rows = []
    for number, line in enumerate(path.read_text("utf-8").splitlines(), 1):
        try:
            row = common.check_row(json.loads(line), path.parent)
            if row["task"] != "text":
                raise common.BadRow("is no text row; this lab trains on texts")
            if row["responses"][0] == row["responses"][1]:
                raise common.BadRow("has twice the same response; there is nothing to prefer")
        except json.JSONDecodeError:
            problems.append(f"{path.name}:{number} is no JSON object")
        except common.BadRow as error:
            problems.append(f"{path.name}:{number} {error}")
        else:
            rows.append({**row, "where": f"{path.name}:{number}"})
    if len(rows) < ENOUGH[path.stem]:
        problems.append(f"{path.name}: {len(rows)} good rows, {ENOUGH[path.stem]} are needed")
    return rows


def pair_of(row):
    """What a row asks, whatever the order of its sides."""
    return row["prompt"].split(), sorted(response.split() for response in row["responses"])


def repeated(rows):
    """Rows that ask what an earlier one has asked. -> problems"""
    first, problems = {}, []
    for row in rows:
        key = json.dumps(pair_of(row))
        before = first.setdefault(key, row)
        if before is row:
            continue
        what = "repeats"
        if sides(before)[0].split() != sides(row)[0].split():
            what = "contradicts"
        elif before["where"].split(":")[0] != row["where"].split(":")[0]:
            what = "is held out, and stands in the training rows as"
        problems.append(f"{row['where']} {what} {before['where']}")
    return problems


def sides(row):
    """-> the better response, the worse one"""
    better = "AB".index(row["label"])
    return row["responses"][better], row["responses"][1 - better]


# ---------------------------------------------------------------------------- all rows together
def longer(row):
    """Is the better response longer? None if they are equally long."""
    better, worse = map(len, sides(row))
    return None if better == worse else better > worse


def telling_words(rows):
    """Words that only one response of a row has: {word: True for each row in which it is the better
    one, else False}."""
    told = {}
    for row in rows:
        better, worse = (set(text.split()) for text in sides(row))
        for word in better ^ worse:
            told.setdefault(word, []).append(word in better)
    return told


def uneven(name, outcomes, problems):
    """A problem if a coin would hardly give this share of True."""
    outcomes = [outcome for outcome in outcomes if outcome is not None]
    if not outcomes:
        return
    share = sum(outcomes) / len(outcomes)
    low, high = common.wilson(share, len(outcomes))
    if not low <= 0.5 <= high:
        problems.append(f"{name} in {share:.0%} of {len(outcomes)} rows; half is fair "
                        f"(interval {low:.0%} to {high:.0%})")


def unknown_words(rows):
    """-> {word: how often} of words that the toy tokenizer spells in bytes"""
    words = set(toy_world.make_tokenizer().get_vocab())
    counts = Counter()
    for row in rows:
        for text in (row["prompt"], *row["responses"], row.get("rationale") or ""):
            for word in re.findall(r"\w+|[^\w\s]", text):
                if not {word, f"Ġ{word}", f"{word}:"} & words:
                    counts[word] += 1
    return counts


def shortcuts(train, heldout):
    """-> {rule: its accuracy on held-out rows}: what a judge must beat. The rules look at the
    training rows for their direction; where one says nothing, a coin."""
    said = [longer(row) for row in train]
    right = "longer" if said.count(True) >= said.count(False) else "shorter"
    points = {f"the {right} one": [], "the first one": [], "the word that told most": []}
    told = telling_words(train)
    net = {word: sum(found) - len(found) / 2 for word, found in told.items()}
    word = max(net, key=lambda word: abs(net[word]), default="")
    for row in heldout:
        better_is_longer = longer(row)
        hit = None if better_is_longer is None else better_is_longer == (right == "longer")
        points[f"the {right} one"].append(hit)
        points["the first one"].append(row["label"] == "A")
        better, worse = (word in text.split() for text in sides(row))
        hit = None if better == worse else better == (net.get(word, 0) > 0)
        points["the word that told most"].append(hit)
    found = {}
    for rule, hits in points.items():
        name = f"{rule} ({word!r})" if rule.endswith("most") else rule
        found[name] = sum(0.5 if hit is None else hit for hit in hits) / max(1, len(hits))
    return found


def examine(folder):
    """-> {"passed", "lines"}. Problems must be mended; what follows them is to be thought about."""
    bad = []
    train, heldout = (read(Path(folder, f"{name}.jsonl"), bad) for name in ENOUGH)
    twice, biased = repeated(train + heldout), []
    for name, rows in (("train", train), ("heldout", heldout)):
        uneven(f"{name}: A is better", [row["label"] == "A" for row in rows], biased)
    uneven("the better one is longer", [longer(row) for row in train + heldout], biased)
    lines = []
    for problems in (bad, twice, biased):
        lines += [f"problem: {problem}" for problem in problems[:MOST]]
        if len(problems) > MOST:
            lines.append(f"problem: {len(problems) - MOST} more of this kind")
    lines.append(f"{len(train)} training rows, {len(heldout)} held out")
    for word, found in telling_words(train).items():
        share = sum(found) / len(found)
        if len(found) >= 20 and max(share, 1 - share) >= TELLS:
            where = "better" if share > 0.5 else "worse"
            lines.append(f"note: {word!r} stands in the {where} one in {max(share, 1 - share):.0%} "
                         f"of {len(found)} rows: is it your preference, or an accident?")
    unknown = unknown_words(train + heldout)
    if unknown:
        most = ", ".join(f"{word} {n}" for word, n in unknown.most_common(8))
        lines.append(f"note: {len(unknown)} words are new to the toy backbone, which reads them "
                     f"byte by byte: {most}")
    if train and heldout:
        for rule, share in shortcuts(train, heldout).items():
            lines.append(f"held-out rows right by '{rule}': {share:.0%}")
    return {"passed": not (bad or twice or biased), "lines": lines}
