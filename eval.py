"""
Score, judge, rank: the field's benchmarks by explicit rules, with or without a model.

    python eval.py --model runs/stage1_text_grpo --data toy/heldout_text.jsonl [--votes 8]
    python eval.py --model hub/id --benchmark vl_rewardbench --data VL-RewardBench/ --out preds.jsonl
    python eval.py --score preds.jsonl --benchmark vl_rewardbench --data data.json --json
    python eval.py --score ours.jsonl theirs.jsonl --benchmark rm_bench --data total_dataset.json
    python eval.py --model runs/stage1_text_grpo --rank candidates.jsonl --rounds 2 --out best.jsonl
    python eval.py --table runs/*                    # checkpoints by tasks, as a Markdown table

The rules, the same for every benchmark:
  order       a model judges every row as A, B and as B, A; a row counts the mean over its orders, so
              a judge that always says "A" gets exactly 50 %.
  frame       `pred` is in the data row's own frame, whatever was shown: A is the first response, left
              image, Output1, path_A, and `chosen` where a row has chosen and rejected.
  no verdict  an unparsable answer (pred null), a row without any prediction, and equal scores are
              wrong; none is left out or replaced by a coin.
  votes       the majority of the verdicts of an order; a tied vote counts one half.
  interval    95 %, Wilson's, on the effective number of independent questions: rows that share one,
              and unequal weights, make it smaller than n.
"""

import argparse
import ast
import base64
import csv
import hashlib
import html
import io
import json
import math
import os
import random
import re
import sys
from collections import Counter
from functools import lru_cache
from pathlib import Path
from types import SimpleNamespace

import torch
from tqdm import tqdm

import common
from common import BadRow
from stage1_text_grpo import sample_group

# ==================================================================================================
# 1. Scoring. A row is a preference row with "row", its index in the data file; "label", None where
# it does not count; "part", its column; "weight"; "cluster", the question it belongs to.

TIES = ("tie", "bothbad", "same")
BY_ROW = ("row", "i", "j")  # i, j: RM-Bench's styles of the chosen and of the rejected answer


def read_predictions(path, rows):
    """-> prediction rows, each with "at", the place of its row in `rows`. A row is found by "row",
    its index in the data file, or by its id if that occurs once."""
    place = {tuple(r.get(k) for k in BY_ROW): at for at, r in enumerate(rows)}
    ids, indices = {r["row"]: r["id"] for r in rows}, {}
    for r in rows:
        indices.setdefault(r["id"], set()).add(r["row"])
    preds, seen = [], {}
    for where, raw in common.file_rows(Path(path)):
        try:
            if not isinstance(raw, dict):
                raise raw if isinstance(raw, BadRow) else BadRow("is not a JSON object")
            for p in verdicts(raw):
                p["row"] = found_row(p, ids, indices)
                key = tuple(p.get(k) for k in BY_ROW)
                if key not in place:
                    raise BadRow("needs 'i' and 'j' in 0-2, or 'chosen' and 'rejected' scores")
                p["at"] = place[key]
                once = (p["at"], p["order"], p["sample"])
                if once in seen:
                    raise BadRow(f"is a second verdict on what {seen[once]} judges; number the "
                                 "votes of an order in 'sample', rows of one id in 'row'")
                seen[once] = where
                preds.append(p)
        except BadRow as e:
            raise SystemExit(f"{where}: prediction {e}.")
    if not preds:
        raise SystemExit(f"{path}: holds no predictions.")
    return preds


def found_row(p, ids, indices):
    """The index of the data row that a prediction is about."""
    if "row" in p:
        if p["row"] not in ids or "id" in p and str(p["id"]) != ids[p["row"]]:
            raise BadRow(f"has row {p['row']} and id {p.get('id')!r}, but in --data that row is "
                         f"{ids.get(p['row'], 'missing')!r}; score against the file that was judged")
        return p["row"]
    at = indices.get(str(p.get("id")), ())
    if len(at) != 1:
        raise BadRow(f"has id {p.get('id')!r}, which occurs {len(at)} times in --data" + (
            '; add "row", the index in the data file' if at else ""))
    return min(at)


def verdicts(raw):
    """One line of a prediction file -> its verdicts: nine for RM-Bench's scores, else one."""
    p = {**raw, "order": raw.get("order") or "AB", "sample": raw.get("sample") or 0}
    if p["order"] not in ("AB", "BA"):
        raise BadRow(f"has order {p['order']!r}, which is neither 'AB' nor 'BA'")
    try:
        if "chosen" in p:
            better, worse = p.pop("chosen"), p.pop("rejected")
            return [{**p, "i": i, "j": j, "pred": larger(a, b), "score_a": a, "score_b": b}
                    for i, a in enumerate(better) for j, b in enumerate(worse)]
        if p.get("score_a") is not None:
            p.setdefault("pred", larger(p["score_a"], p["score_b"]))
    except (KeyError, TypeError):
        raise BadRow("has scores that are no numbers, or only one of the two")
    if "pred" not in p or p["pred"] not in ("A", "B", *TIES, None):
        raise BadRow(f"has pred {p.get('pred', 'missing')!r}; write 'A', 'B' or null (also 'tie', "
                     "'bothbad' for GenAI-Bench), or score_a and score_b")
    return [p]


def larger(a, b):
    """Strictly: equal scores are no verdict, and so count as wrong."""
    return "A" if a > b else "B" if b > a else None


def majority(votes):
    """-> the verdicts that most votes name (two in a tied vote, none if no vote has a verdict)."""
    counts = Counter(v for v in votes if v is not None)
    return [v for v, n in counts.items() if n == max(counts.values())]


def points(label, votes):
    """What one order of a row earns: 1, 0, or a share where the vote is tied."""
    named = {label if agrees(v, label) else v for v in majority(votes)}
    return (label in named) / max(1, len(named))


def agrees(verdict, label):
    """GenAI-Bench: 'tie' is [[A=B=Good]], 'bothbad' [[A=B=Bad]], and 'same' an unspecified tie that
    its script accepts for either. VideoGen-RewardBench knows only 'same'."""
    return verdict == label or verdict in TIES and label in TIES and "same" in (verdict, label)


def soft_points(label, judged):
    """The answer tokens' probabilities (or the scores) of both orders and all votes, averaged: the
    larger side is the verdict. Equal within rounding is a tied vote."""
    margins = [p["score_a"] - p["score_b"] for p in judged if p.get("score_a") is not None]
    margin = sum(margins) / max(1, len(margins)) * (1 if label == "A" else -1)
    return (0.5 if abs(margin) < 1e-9 else float(margin > 0)) if margins else 0.0


def score(rows, preds, benchmark="rows"):
    """-> result as for --json, and what each row earned. `preds` as of read_predictions()."""
    judged = [{} for _ in rows]  # order -> predictions
    for p in sorted(preds, key=lambda p: p["sample"]):
        judged[p["at"]].setdefault(p["order"], []).append(p)
    earned = [{o: points(r["label"], [p["pred"] for p in some]) for o, some in orders.items()}
              for r, orders in zip(rows, judged)]
    x = [sum(e.values()) / len(e) if e else 0.0 for e in earned]
    counted = [k for k, r in enumerate(rows) if r["weight"] > 0]
    if not counted:
        raise SystemExit("no row of --data has a label that counts.")
    overall = mean(rows, x, counted)
    parts = by_part(rows, counted)
    groups = {part: mean(rows, x, some) for part, some in parts.items()}
    macro = sum(groups.values()) / len(groups) if groups else overall
    more = more_columns(benchmark, rows, x, earned, judged, counted)
    sides = [[m[0] for o in j.values() if len(m := majority([p["pred"] for p in o])) == 1]
             for j in judged]
    both = [s for s in sides if len(s) == 2]
    said = [p for p in preds if p["pred"] in ("A", "B")]
    questions = lambda some: len({rows[k]["row"] for k in some})
    result = {
        "overall": overall, "macro": macro,
        "groups": groups | {name: value for name, (value, _) in more.items()},
        "n": questions(counted),
        "group_n": {part: questions(some) for part, some in parts.items()}
        | {name: n for name, (_, n) in more.items()},
        "unparsable": sum(p["pred"] is None for p in preds) / len(preds),
        "missing": sum(not judged[k] for k in counted),
        "order_flips": sum(a != b for a, b in both) / len(both) if both else 0.0,
        "interval": wilson(overall, effective_n(rows, x, counted)), "accuracy": overall,
        "share_a": sum((p["pred"] == "A") == (p["order"] == "AB") for p in said) / max(1, len(said)),
        "format": sum(common.parse(p.get("text") or "").well_formed for p in preds) / len(preds)}
    if any(p.get("score_a") is not None for p in preds):
        soft = [soft_points(r["label"], sum(j.values(), [])) for r, j in zip(rows, judged)]
        result["soft"] = mean(rows, soft, counted)
    votes = max(len(some) for j in judged for some in j.values())
    if votes > 1:
        result |= vote_curves(rows, judged, counted, votes)
    if benchmark == "rm_bench":
        cells = [[[k for k in counted if (rows[k]["i"], rows[k]["j"]) == (i, j)] for j in range(3)]
                 for i in range(3)]
        result["matrix"] = [[mean(rows, x, cell) for cell in line] for line in cells]
    return result, x


def mean(rows, x, some):
    total = sum(rows[k]["weight"] for k in some)
    return sum(rows[k]["weight"] * x[k] for k in some) / total if total else 0.0


def by_part(rows, some, part="part"):
    """{column: places of its rows}"""
    parts = {}
    for k in some:
        parts.setdefault(rows[k][part], []).append(k)
    parts.pop(None, None)  # a benchmark without parts
    return parts


def effective_n(rows, x, some):
    """How many independent questions would give the figure's variance: that of the questions'
    totals around it, because rows of one question are not independent. Never more than Kish's
    (sum w)^2 / sum w^2, which is n for equal weights; without any variance, Kish's over questions."""
    p, total = mean(rows, x, some), sum(rows[k]["weight"] for k in some)
    questions = by_part(rows, some, "cluster").values()
    kish = lambda groups: total ** 2 / sum(sum(rows[k]["weight"] for k in g) ** 2 for g in groups)
    spread = sum(sum(rows[k]["weight"] * (x[k] - p) for k in q) ** 2 for q in questions) / total ** 2
    if spread < 1e-12:
        return kish(questions)
    return min(kish([k] for k in some), p * (1 - p) / spread)


def wilson(p, n, z=1.96):
    middle, half = p + z * z / (2 * n), z * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    return [max(0.0, (middle - half) / (1 + z * z / n)), min(1.0, (middle + half) / (1 + z * z / n))]


def vote_curves(rows, judged, counted, votes):
    """vote@k and any@k for k = 1..K: not one draw of k, but the mean over all subsets of k of an
    order's K samples. A sample that is missing votes for nobody."""
    curves = {"vote": {}, "any": {}}
    for k in range(1, votes + 1):
        for name, at in (("vote", vote_at), ("any", any_at)):
            x = [0.0] * len(rows)
            for n in counted:
                for some in judged[n].values():
                    right = sum(agrees(p["pred"], rows[n]["label"]) for p in some)
                    wrong = sum(p["pred"] is not None for p in some) - right
                    x[n] += at(right, wrong, votes, k) / len(judged[n])
            curves[name][str(k)] = mean(rows, x, counted)
    return curves


@lru_cache(maxsize=None)
def vote_at(right, wrong, n, k):
    """The chance that k of n samples have more right verdicts than wrong ones; even ones count half
    (if there is any verdict): a sum over the hypergeometric distribution."""
    total = 0.0
    for a in range(min(right, k) + 1):
        for b in range(min(wrong, k - a) + 1):
            ways = math.comb(right, a) * math.comb(wrong, b) * math.comb(n - right - wrong, k - a - b)
            total += ways * ((a > b) + 0.5 * (a == b > 0))
    return total / math.comb(n, k)


@lru_cache(maxsize=None)
def any_at(right, wrong, n, k):
    """The chance that at least one of k of n samples is right."""
    return 1 - math.comb(n - right, k) / math.comb(n, k)


def more_columns(benchmark, rows, x, earned, judged, counted):
    """What a benchmark's own table has besides the columns that make up the mean:
    {column: (value, n)}."""
    label = lambda k: rows[k]["label"]
    column = lambda some: (mean(rows, x, some), len({rows[k]["row"] for k in some}))
    sided = [k for k in counted if label(k) in ("A", "B")]
    if benchmark.startswith("genai"):
        three = [sum(points("same" if r["label"] in TIES else r["label"], [p["pred"] for p in o])
                     for o in j.values()) / max(1, len(j)) for r, j in zip(rows, judged)]
        return {"4-way": column(counted), "3-way": (mean(rows, three, counted), len(counted)),
                "no tie": column(sided)}
    if benchmark == "videogen_rewardbench":
        every = [k for k, r in enumerate(rows) if r["label"]]
        return {"no tie": column(sided), "with ties": (with_ties(rows, x, judged, every), len(every))}
    if benchmark == "multimodal_rewardbench":
        return multimodal_columns(rows, x, counted, column)
    if benchmark == "mm_rlhf_rewardbench":
        prompts = list(by_part(rows, counted, "cluster").values())
        return {"Acc+": (sum(map(lambda p: all_right(p, earned, x), prompts)) / len(prompts),
                         len(prompts))}
    if benchmark == "rm_bench":  # row: style of the chosen, column: of the rejected; 0 is concise
        cell = lambda test: column([k for k in counted if test(rows[k]["i"], rows[k]["j"])])
        return {"easy": cell(lambda i, j: i > j), "normal": cell(lambda i, j: i == j),
                "hard": cell(lambda i, j: i < j)}
    return {}


def all_right(prompt, earned, x):
    """Acc+ of one prompt: are all its pairs right? Each order is one pass over the benchmark, and
    the passes are averaged. A pair that was judged in one order only is the same in both."""
    return sum(math.prod(earned[k].get(o, x[k]) for k in prompt) for o in ("AB", "BA")) / 2


def with_ties(rows, x, judged, some):
    """VideoGen-RewardBench's 3-class accuracy: verdicts A, B, same as they are; scores with the best
    of all thresholds below which a difference is a tie ("Ties Matter", algorithm 1)."""
    margins = {k: [p["score_a"] - p["score_b"] for o in judged[k].values() for p in o
                   if p.get("score_a") is not None] for k in some}
    if not all(margins.values()):
        return sum(x[k] for k in some) / len(some)
    margin = {k: sum(m) / len(m) for k, m in margins.items()}
    right = best = sum((margin[k] > 0) - (margin[k] < 0) == {"A": 1, "B": -1, "same": 0}[
        rows[k]["label"]] for k in some)
    by_size = {}
    for k in some:
        by_size.setdefault(abs(margin[k]), []).append(k)
    for size in sorted(by_size.keys() - {0.0}):  # from now on these are ties
        for k in by_size[size]:
            right += rows[k]["label"] == "same"
            right -= rows[k]["label"] == ("A" if margin[k] > 0 else "B")
        best = max(best, right)
    return best / len(some)


def multimodal_columns(rows, x, counted, column):
    """Safety's two halves, and MSRL's Table 2: "Other" is the plain mean of the general and the
    reasoning columns, "Avg." that of its four columns (so its published rows add up)."""
    own = {part: column([k for k in counted if rows[k]["part"] == part])
           for part in dict.fromkeys(rows[k]["part"] for k in counted)}
    halves = {h: column(some) for h in ("safety/bias", "safety/toxicity") if (
        some := [k for k in counted if rows[k]["half"] == h])}
    other = [own[p] for p in ("correctness", "preference", "math", "coding") if p in own]
    if not other:
        return halves
    more = {"MSRL other": (sum(v for v, _ in other) / len(other), sum(n for _, n in other))}
    table = [own[p][0] for p in ("knowledge", "safety", "vqa") if p in own]
    table.append(more["MSRL other"][0])
    return halves | more | {"MSRL avg.": (sum(table) / len(table), len(counted))}


def compare(rows, xa, xb):
    """Paired, because both judged the same rows: the difference first - second, its 95 % interval
    from the spread of the questions' differences, and McNemar's exact p (a sign test over the rows
    that one of the two judged better)."""
    counted = [k for k, r in enumerate(rows) if r["weight"] > 0]
    d = [a - b for a, b in zip(xa, xb)]
    total, difference = sum(rows[k]["weight"] for k in counted), mean(rows, d, counted)
    questions = by_part(rows, counted, "cluster").values()
    n = len(questions)
    spread = sum(sum(rows[k]["weight"] * (d[k] - difference) for k in q) ** 2 for q in questions)
    half = 1.96 * math.sqrt(spread * n / max(1, n - 1)) / total
    first, second = (sum(s * d[k] > 0 for k in counted) for s in (1, -1))
    tail = sum(math.comb(first + second, i) for i in range(min(first, second) + 1))
    return {"difference": difference, "interval": [difference - half, difference + half],
            "first_better": first, "second_better": second, "n": n,
            "mcnemar_p": min(1.0, tail / 2 ** (first + second - 1)) if first + second else 1.0}


def markdown(result):
    """The columns of the benchmark's table, per cent, and n under each."""
    names = ["overall", "macro", *result["groups"]]
    values = [result["overall"], result["macro"], *result["groups"].values()]
    ns = [result["n"], "", *result["group_n"].values()]
    lines = [names, ["--:"] * len(names), [f"{100 * v:.1f}" for v in values], [f"{n}" for n in ns]]
    heads = ["", "---", "accuracy", "n"]
    return "\n".join("| " + " | ".join([h, *line]) + " |" for h, line in zip(heads, lines))


def show(title, result):
    low, high = result["interval"]
    print(f"{title}: accuracy {result['overall']:.1%} [{low:.1%}, {high:.1%}] on {result['n']} rows, "
          f"flips with the order {result['order_flips']:.1%}, says A {result['share_a']:.1%}, "
          f"unparsable {result['unparsable']:.1%}, well-formed {result['format']:.1%}")
    if result["missing"]:
        print(f"  {result['missing']} without a prediction, counted as wrong")
    print(markdown(result))
    if "soft" in result:
        print(f"soft votes (mean probability of the answer, or score): {result['soft']:.1%}")
    for name, curve in (("vote", result.get("vote", {})), ("any", result.get("any", {}))):
        if curve:
            print(", ".join(f"{name}@{k} {v:.1%}" for k, v in curve.items()))
    if "matrix" in result:
        print("chosen (down: concise, detailed, markdown) against rejected (across):\n"
              + "\n".join("  " + "  ".join(f"{v:6.1%}" for v in line) for line in result["matrix"]))
    for name, other in result.get("groupings", {}).items():
        print(f"grouping {name}: macro {other['macro']:.1%}, " + ", ".join(
            f"{g} {v:.1%} (n {other['group_n'][g]})" for g, v in other["groups"].items()))


# ==================================================================================================
# 2. Benchmarks, read as published: each function turns one published row into {"id"?, "prompt",
# "responses", "media", "label", "part"...}. Media stay as they are until a model wants them.

def ab(first_is_better):
    return "A" if first_is_better else "B"


def vl_rewardbench(r, where):
    """MMInstruction/VL-RewardBench. human_ranking holds the rank of each response, 0 is the best.
    The group is the id up to its first "_" or "-", not query_source."""
    ranks = listed(r["human_ranking"])
    if sorted(ranks) != [0, 1]:
        raise BadRow(f"has human_ranking {ranks}, not [0, 1] or [1, 0]")
    yield {"task": "image_understanding", "prompt": r["query"], "responses": listed(r["response"]),
           "media": [r.get("image") or f"images/{r['id']}.png"], "label": ab(ranks[0] == 0),
           "part": GROUPINGS["official"](str(r["id"])), "cluster": str(r["id"])}


def grouping(hallucination):
    """An id -> its group, for these prefixes of hallucination items."""
    def group(id):
        prefix = re.split("[_-]", id)[0]
        return ("hallucination" if prefix in hallucination else
                "reasoning" if prefix in ("mathverse", "mmmu") else "general")
    return group


# General / Hallucination / Reasoning over 1,250 rows. Macro differs by up to 9 points between them.
GROUPINGS = {
    "official": grouping(("RLAIF", "RLHF", "hallucination")),                   # 183 / 749 / 318
    "of UnifiedReward's scripts (wrong: no POVID)": grouping(("RLAIF", "RLHF")),  # 631 / 301 / 318
    "of R1-Reward's get_acc.py (wrong: POVID only)": grouping(("hallucination",))}  # 484 / 448 / 318


def multimodal_rewardbench(r, where):
    """facebookresearch/multimodal_rewardbench, all_data.json (or its release without texts). Safety
    and reasoning are split by the id, as in its scorer; the mean is over all rows."""
    kind, id = r["Category"], r["ID"].lower()
    part = kind.rpartition("/")[2].removesuffix("_task")  # correctness, preference, knowledge, vqa
    if kind == "reasoning":
        part = "math" if id.startswith("math") else "coding"
    if r["Better"] not in ("Output1", "Output2"):
        raise BadRow(f"has Better {r['Better']!r}, not 'Output1' or 'Output2'")
    half = f"safety/{'bias' if id.startswith('pairs') else 'toxicity'}" if kind == "safety" else None
    yield {"task": "image_understanding", "prompt": r.get("Text"), "media": [r.get("Image")],
           "responses": [r["Output1"], r["Output2"]], "label": ab(r["Better"] == "Output1"),
           "part": part, "half": half}


def mm_rlhf_rewardbench(r, where):
    """yifanzhang114/MM-RLHF-RewardBench: 170 pairs of 46 prompts, which Acc+ counts whole. A: chosen.
    The category is the word in the path of the image, or of the folder of frames."""
    medium = r.get("video") or r["image"]
    path = medium["path"] if isinstance(medium, dict) else medium
    part = next((c for c in ("mcq", "long", "short", "safety", "video") if c in path), None)
    if part is None:
        raise BadRow(f"has its image at {path!r}, which names none of mcq, long, short, safety, video")
    yield {"task": f"{'video' if r.get('video') else 'image'}_understanding", "prompt": r["prompt"],
           "responses": [r["chosen"], r["rejected"]], "media": [medium], "label": "A", "part": part,
           "cluster": str(r["id"])}


VOTES = {"leftvote": "A", "rightvote": "B", "tievote": "tie", "bothbad_vote": "bothbad"}


def genai(r, where):
    """TIGER-Lab/GenAI-Bench, image_generation or video_generation. A: left. Also UnifiedReward's
    data.json, which says video_left. Videos are URLs as published: put the files in videos/."""
    kind = "image" if {"left_image", "image_left"} & r.keys() else "video"
    if r["vote_type"] not in VOTES:
        raise BadRow(f"has vote_type {r['vote_type']!r}, not one of {', '.join(VOTES)}")
    media = [r[f"{s}_{kind}"] if f"{s}_{kind}" in r else r[f"{kind}_{s}"] for s in ("left", "right")]
    yield {"task": f"{kind}_generation", "prompt": r["prompt"], "media": media,
           "label": VOTES[r["vote_type"]]}


def videogen_rewardbench(r, where):
    """KwaiVGI/VideoGen-RewardBench, by its Overall column, which may be missing (such rows do not
    count) or carry blanks. Ties count in the column "with ties" only."""
    label = str(r.get("Overall") or "").strip()
    if label not in ("A", "B", "same", "", "nan", "None"):
        raise BadRow(f"has Overall {label!r}, not 'A', 'B' or 'same'")
    yield {"task": "video_generation", "prompt": r["prompt"], "media": [r["path_A"], r["path_B"]],
           "label": label if label in ("A", "B", "same") else None, "weight": label in ("A", "B")}


def sharegpt_video(r, where):
    """ShareGPTVideo's sft_dpo_17k.jsonl. MSRL's test split is not published: this is a tenth of the
    videos, by a hash of their names, with all their pairs. Train on the others. A: chosen."""
    held = held_out(r["video"])
    yield {"task": "video_understanding", "prompt": r["prompt"], "media": [r["video"]],
           "responses": [r["chosen"], r["rejected"]], "label": "A" if held else None,
           "weight": held, "cluster": str(r["video"])}


def held_out(video):
    return hashlib.sha256(str(video).encode()).digest()[0] % 10 == 0


SECTIONS = {  # subset -> how many rows it weighs in its section: math-prm as much as all the code
    "Chat": {"alpacaeval-easy": 100, "alpacaeval-length": 95, "alpacaeval-hard": 95,
             "mt-bench-easy": 28, "mt-bench-med": 40},
    "Chat Hard": {"mt-bench-hard": 37, "llmbar-natural": 100, "llmbar-adver-neighbor": 134,
                  "llmbar-adver-GPTInst": 92, "llmbar-adver-GPTOut": 47, "llmbar-adver-manual": 46},
    "Safety": {"refusals-dangerous": 100, "refusals-offensive": 100, "xstest-should-refuse": 154,
               "xstest-should-respond": 250, "donotanswer": 136},
    "Reasoning": {"math-prm": 984, "hep-cpp": 164, "hep-go": 164, "hep-java": 164, "hep-js": 164,
                  "hep-python": 164, "hep-rust": 164}}


def rewardbench(r, where):
    """allenai/reward-bench, split `filtered`. A: chosen. A section is the mean of its subsets by
    their published counts, the overall figure the mean of the four sections."""
    part = next((s for s, subsets in SECTIONS.items() if r["subset"] in subsets), None)
    if part is None:
        raise BadRow(f"has subset {r['subset']!r}, which is in none of the four sections; the split "
                     "to use is 'filtered'")
    yield {"task": "text", "prompt": r["prompt"], "responses": [r["chosen"], r["rejected"]],
           "label": "A", "part": part, "subset": r["subset"]}


def rm_bench(r, where):
    """THU-KEG/RM-Bench: three styles of a right and of a wrong answer, all nine pairs. A: chosen.
    The files of single domains name theirs in the file name only."""
    domain = str(r.get("domain") or next(
        (d for d in ("chat", "code", "math", "safety") if d in Path(where).name.lower()), "all"))
    if len(r["chosen"]) != 3 or len(r["rejected"]) != 3:
        raise BadRow("must have three styles in 'chosen' and three in 'rejected'")
    for i, better in enumerate(r["chosen"]):
        for j, worse in enumerate(r["rejected"]):
            yield {"task": "text", "prompt": r["prompt"], "responses": [better, worse], "label": "A",
                   "part": "safety" if domain.startswith("safety") else domain, "i": i, "j": j}


# name: (reader, rows as published, hub config, hub split, the files of a folder: the first match)
BENCHMARKS = {
    "vl_rewardbench": (vl_rewardbench, (1250, 1247), None, "test", ["data/test-*.parquet"]),
    "multimodal_rewardbench": (multimodal_rewardbench, (4711,), None, "test",
                               ["all_data.json", "data/all_data.json", "data/all_data_release.json"]),
    "mm_rlhf_rewardbench": (mm_rlhf_rewardbench, (170,), None, "train", ["mm_reward_bench.jsonl"]),
    "genai_image": (genai, (1735, 3192), "image_generation", "test_v1",
                    ["image_generation/{split}-*.parquet"]),
    "genai_video": (genai, (1069, 1889), "video_generation", "test_v1",
                    ["video_generation/{split}-*.parquet"]),
    "videogen_rewardbench": (videogen_rewardbench, range(26_000, 27_001), None, "eval",
                             ["videogen-rewardbench.csv"]),
    "sharegpt_video": (sharegpt_video, range(16_000, 18_001), None, "train",
                       ["**/sft_dpo_17k.jsonl"]),
    "rewardbench": (rewardbench, (2985,), None, "filtered", ["data/filtered-*.parquet"]),
    "rm_bench": (rm_bench, (1327, 129, 228, 284, 157, 529), None, "train", ["total_dataset.json"]),
    "rows": None}  # preference rows, or a training set that common.py knows


def listed(x):
    """A list, also if it was stored as the text of one."""
    return ast.literal_eval(x) if isinstance(x, str) else list(x)


def read_benchmark(name, source, split=None, media=False, skip_bad_rows=False):
    """-> all rows, those that do not count included, so that "row" is the index in the file."""
    if name == "rows":
        return plain_rows(source, skip_bad_rows)
    reader, published, config, default, patterns = BENCHMARKS[name]
    split, rows, n = split or default, [], 0
    for path in files_of(source, [p.format(split=split) for p in patterns]):
        for where, r in raw_rows(path, config, split):
            try:
                if not isinstance(r, dict):
                    raise r if isinstance(r, BadRow) else BadRow("is not an object")
                for row in reader(r, where):
                    row = {"id": next((str(r[k]) for k in ("id", "ID", "idx") if r.get(k) is not None),
                                      str(n)), "row": n, "part": None, "weight": 1,
                           "cluster": f"row {n}", "responses": None, **row}
                    row["prompt"] = re.sub(r"\s*<(image|video)>\s*", "", row["prompt"] or "")
                    row["media"] = [found(m, Path(path).parent) for m in row.get("media", ())] \
                        if media and row["label"] else []
                    rows.append(row)
            except BadRow as e:
                raise SystemExit(f"{where}: row {e}.")
            except (KeyError, TypeError, ValueError, AttributeError, IndexError, SyntaxError) as e:
                raise SystemExit(f"{where}: row does not have the published form of {name} "
                                 f"({type(e).__name__}: {e}).")
            n += 1
    if not rows:
        raise SystemExit(f"{source}: no rows.")
    if n not in published and common.rank() == 0:
        print(f"warning: {source} has {n} rows; {name} as published has " + (
            " or ".join(map(str, published)) if isinstance(published, tuple) else
            f"{published[0]} to {published[-1]}"), file=sys.stderr)
    return weighted(name, rows)


def weighted(name, rows):
    """Weights such that the overall figure is the benchmark's own mean of means."""
    count = Counter(r["subset" if name == "rewardbench" else "part"] for r in rows)
    for r in rows:
        if name == "rewardbench":  # subset by its published count, section by one
            section = {s: n for s, n in SECTIONS[r["part"]].items() if s in count}
            r["weight"] = section[r["subset"]] / sum(section.values()) / count[r["subset"]]
        elif name == "rm_bench":  # the mean of the domains' means
            r["weight"], r["cluster"] = 1 / count[r["part"]], f"row {r['row']}"
    return rows


def plain_rows(source, skip_bad_rows):
    """Preference rows; columns are the subsets (or the tasks). Reading needs no model: what a model
    cannot take is found when it is to judge."""
    nobody = SimpleNamespace(special_tokens=(), check=lambda row, form: 0)
    return [{"part": r.get("subset") or r["task"], **r, "row": n, "weight": 1,
             "cluster": f"row {n}"} for n, r in enumerate(common.load_rows(
                 source, nobody, skip_bad_rows=skip_bad_rows))]


def files_of(source, patterns):
    """The file itself, a hub id as it is, or what a folder holds in the published form."""
    folder = Path(source)
    if not folder.is_dir():
        return [source]
    patterns = patterns + ["*.jsonl", "*.json", "*.csv", "*.parquet", "data/*.parquet"]
    for pattern in patterns:
        if some := sorted(map(str, folder.glob(pattern))):
            if len(some) > 1 and not some[0].endswith(".parquet"):  # shards are read one by one
                raise SystemExit(f"{source}: holds {', '.join(some)}; name the one to read.")
            return some
    raise SystemExit(f"{source}: holds none of {', '.join(patterns)}.")


def raw_rows(path, config, split):
    if not str(path).endswith(".csv"):
        yield from common.raw_rows(str(path), config=config, split=split)
        return
    try:
        with open(path, newline="", encoding="utf-8") as f:
            for n, row in enumerate(csv.DictReader(f), 2):
                yield f"{path}:{n}", row
    except (OSError, UnicodeDecodeError, csv.Error) as e:
        raise SystemExit(f"{path}: cannot be read ({e}).")


def found(medium, folder):
    """An image or video of a row -> its path: beside the data, where the benchmarks' archives put
    it (images/ or videos/, by its last name: MM-RLHF's paths are not those of its archive), or in
    media_cache/ if it came inside the row."""
    medium = common.kept_medium(medium)
    names = [medium, f"images/{medium}", *(f"{d}{Path(medium).name}" for d in
                                           ("images/", "videos/", ""))]
    return next((str(folder / n) for n in names if (folder / n).exists()), str(folder / medium))


# ==================================================================================================
# 3. Judging with a model: one that writes a verdict, or Bradley-Terry reward models.

# R1-Reward, Table 1, image first as in its evaluation; the "######" are those of its data.
R1_PROMPT = """\
You are a highly skilled and impartial evaluator tasked with comparing two responses generated by \
a Large Multimodal Model for a given question.

- Start with a thorough, side-by-side comparative analysis enclosed within <think> and </think> \
tags. A tie is not permitted; you must choose a better option.

- Conclude with a single numeric choice enclosed within <answer> and </answer> tags:
  - Output "1" if Response 1 is better.
  - Output "2" if Response 2 is better.

###### **Input**
###### [Question]:
{prompt}

###### [Response 1]:
{a}

###### [Response 2]:
{b}

###### **Output Format (strictly follow)**
<think>Your detailed comparative analysis</think><answer>1/2</answer>"""


def encoded(row, encoder, form, style):
    """Preference row -> Prompt, as shown."""
    if style == "msrl":
        return encoder(row, form)
    if row["responses"] is None:
        raise BadRow(f"is {row['task']}, for which R1-Reward has no prompt; use --style msrl")
    place = "<video>\n" if row["task"].startswith("video") else "<image>\n"
    shown = [c + "\n" for c in row["captions"]] if form == "caption" else [place] * len(row["media"])
    text = R1_PROMPT.format(prompt=row["prompt"], a=row["responses"][0], b=row["responses"][1])
    return encoder.encode("".join(shown) + text, row["media"] if form == "pixels" else [],
                          row["task"].startswith("video"))


def verdict(text, style):
    """The side that an answer names, as shown, or None. Strict as the stages' reward: one pair of
    <answer> tags after the thinking, and in them nothing but the letter (R1-Reward: the digit)."""
    if style == "r1":
        letters = {"1": "A", "2": "B", "A": "?", "B": "?"}
        text = re.sub(r"(?<=<answer>)(\s*)([12AB])(?=\s*</answer>)",
                      lambda m: m[1] + letters[m[2]], text)
    return common.parse(text).verdict


def answer_probability(text, ids, logps, encoder):
    """The probability that the model gave the token with the verdict, when it wrote it."""
    start = text.index("<answer>") + len("<answer>")
    start += len(text[start:]) - len(text[start:].lstrip())
    token = next(t for t in reversed(range(len(ids))) if len(encoder.decode(ids[:t])) <= start)
    return math.exp(logps[token])


def generated(model, encoder, batch, generator, args):
    """[(row, order)] -> prediction rows. The K votes of one prompt share its forward; its answer's
    probability p is the soft vote: p for the named side, 1 - p for the other."""
    shown = [row if order == "AB" else common.swap(row) for row, order in batch]
    rollout = sample_group(model, encoder, [encoded(r, encoder, args.form, args.style) for r in shown],
                           args.votes, args.temperature if args.votes > 1 else 0.0,
                           args.max_new_tokens, generator)
    preds = []
    for n, (ids, logps) in enumerate(zip(rollout.ids, rollout.logp)):
        row, order = batch[n // args.votes]
        text = encoder.decode(ids)
        side = verdict(text, args.style)
        soft = {}
        if side:
            p = answer_probability(text, ids, logps, encoder)
            own = side if order == "AB" else {"A": "B", "B": "A"}[side]
            soft = {"score_a": p if own == "A" else 1 - p, "score_b": p if own == "B" else 1 - p}
        preds.append({"order": order, "sample": n % args.votes, "pred": own if side else None,
                      **soft, "text": text})
    return preds


def reward_scores(loaded, batch, args):
    """[(row, order)] -> prediction rows of Bradley-Terry models; the scores of several are averaged
    (BaseReward's ensemble). Each response is scored alone, so there is one order."""
    import bt_reward
    rows = [row for row, _ in batch]
    each = [bt_reward.score_rows(model, encoder, rows, args.batch_size, "scoring")
            for model, encoder in loaded]
    a, b = ([sum(s[side] for s in some) / len(some) for some in zip(*each)] for side in (0, 1))
    return [{"order": "AB", "sample": 0, "pred": larger(x, y), "score_a": x, "score_b": y}
            for x, y in zip(a, b)]


def is_reward_model(folder):
    stage = Path(folder, "stage.json")
    return stage.is_file() and json.loads(stage.read_text()).get("stage") == "bt_reward"


def load_judge(folders, args, device):
    """-> [(model, encoder)], one, or several Bradley-Terry models."""
    if all(map(is_reward_model, folders)):
        import bt_reward
        return [bt_reward.load(f, device, frames=args.frames, max_tiles=args.max_tiles)
                for f in folders]
    if len(folders) > 1:
        raise SystemExit("several --model average the scores of Bradley-Terry checkpoints; of "
                         f"{', '.join(folders)} not all are such.")
    return [common.load(folders[0], device, made_by="python stage1_text_grpo.py",
                        frames=args.frames, max_tiles=args.max_tiles)]


def fit_to_judge(rows, encoder, args, pairwise=True):
    """-> the rows that a model is to judge, checked, each with the length of its prompt. Ties are
    not shown: our prompts know A and B. What cannot be shown counts as wrong, and is counted."""
    fit, bad, long = [], Counter(), 0
    forbidden = tuple(dict.fromkeys(common.FORBIDDEN + encoder.special_tokens))
    for row in tqdm([r for r in rows if r["label"] in ("A", "B")], desc="reading prompts",
                    unit=" rows", disable=common.rank() > 0, mininterval=1, leave=False):
        try:
            row = common.check_row({**row}, "", forbidden)
            row["tokens"] = encoder.check(row, args.form) if pairwise else 0
            if pairwise and args.style == "r1":
                row["tokens"] = len(encoded(row, encoder, args.form, "r1").ids)
            if row["tokens"] > args.max_prompt_tokens:
                long += 1
            else:
                fit.append(row)
        except BadRow as e:
            if not args.skip_bad_rows:
                raise SystemExit(f"{args.data or args.rank}, row {row['row']} ({row['id']}): {e}.\n"
                                 "Mend it, or pass --skip_bad_rows to count such rows as wrong.")
            bad[str(e)[:60]] += 1
    if (bad or long) and common.rank() == 0:
        print(f"{bad.total()} bad rows {dict(bad.most_common(5))} and {long} prompts over "
              f"{args.max_prompt_tokens} tokens are not judged; they count as wrong")
    if not fit:
        raise SystemExit("no row can be judged.")
    return fit


def judge_rows(loaded, rows, args, out=None, orders=("AB", "BA")):
    """Judge rows batch by batch, alike lengths together, so both orders of a row are mostly in one
    batch. -> prediction rows. Each batch is in the file `out` as soon as it is judged, and what is
    there already is not judged again."""
    device, reward = next(loaded[0][0].parameters()).device, is_reward_model(args.model[0])
    orders = ("AB",) if reward else orders
    todo = [(r, o) for r in rows for o in orders]
    todo.sort(key=lambda x: x[0]["tokens"])
    size = args.batch_size * (16 if reward else 1)  # these batch by themselves
    batches = [todo[k:k + size] for k in range(0, len(todo), size)]
    name = lambda p, order: (*(p.get(k) for k in BY_ROW), order)
    preds = opened(out, args) if out else []
    preds = [p for p in preds if p["sample"] == 0 or args.votes > 1]
    votes = Counter(name(p, p["order"]) for p in preds)
    preds = [p for p in preds if votes[name(p, p["order"])] == args.votes]  # killed within a row
    if out and common.rank() == 0:
        common.write_lines(out, preds)
    done = {name(p, p["order"]) for p in preds}
    for at in tqdm(range(0, len(batches), common.world()), desc="judging", unit="batch",
                   disable=common.rank() > 0, leave=False, mininterval=1):
        k, new = at + common.rank(), []
        batch = [x for x in batches[k] if name(*x) not in done] if k < len(batches) else []
        if batch and reward:
            new = reward_scores(loaded, batch, args)
        elif batch:
            generator = torch.Generator(device).manual_seed(args.seed * 1_000_003 + k)
            new = generated(*loaded[0], batch, generator, args)
        each = len(new) // max(1, len(batch))
        new = [{"id": r["id"], **{k: r[k] for k in BY_ROW if k in r}, **p}
               for p, (r, _) in zip(new, [x for x in batch for _ in range(each)])]
        new = common.gather_list(new)
        if out and common.rank() == 0:
            with open(out, "a", encoding="utf-8") as f:
                f.write("".join(json.dumps(p, ensure_ascii=False) + "\n" for p in new))
        preds += new
    preds.sort(key=lambda p: (*(p.get(k, 0) for k in BY_ROW), p["order"], p["sample"]))
    if out and common.rank() == 0:
        common.write_lines(out, preds)
    return preds


def opened(out, args):
    """The predictions that a killed run of the same settings left in `out`."""
    settings = {k: getattr(args, k) for k in (
        "model", "data", "rank", "rounds", "benchmark", "split", "form", "style", "votes",
        "temperature", "max_new_tokens", "max_prompt_tokens", "frames", "max_tiles", "seed")}
    beside = Path(out).with_suffix(".settings.json")
    if Path(out).exists():
        was = json.loads(beside.read_text()) if beside.exists() else {}
        changed = [f"{k} {was.get(k)!r} -> {v!r}" for k, v in settings.items() if was.get(k) != v]
        if changed:
            raise SystemExit(f"{out} holds the predictions of other settings ({'; '.join(changed)}). "
                             "Take another --out, or delete it.")
        return common.whole_lines(out)
    if common.rank() == 0:
        beside.write_text(json.dumps(settings))
    return []


def judged(args, loaded, rows, out=None):
    """-> prediction rows of a judge, with "at", as score() takes them."""
    fit = fit_to_judge(rows, loaded[0][1], args, not is_reward_model(args.model[0]))
    place = {tuple(r.get(k) for k in BY_ROW): at for at, r in enumerate(rows)}
    return [{**p, "at": place[tuple(p.get(k) for k in BY_ROW)]}
            for p in judge_rows(loaded, fit, args, out)]


# ==================================================================================================
# 4. Ranking: a reward in [0, 1] for each of n candidates.

def read_candidates(path):
    """-> [{"id", "task", "prompt", "media", "candidates", "row"}]; the candidates of a *_generation
    task are paths."""
    sets = []
    for where, r in common.file_rows(Path(path)):
        try:
            if not isinstance(r, dict) or not {"id", "prompt", "candidates"} <= r.keys():
                raise BadRow("needs 'id', 'prompt' and 'candidates'") if not isinstance(
                    r, BadRow) else r
            if not isinstance(r["candidates"], list) or len(r["candidates"]) < 2 or not all(
                    isinstance(c, str) for c in r["candidates"]):
                raise BadRow("needs at least two texts (or paths) in 'candidates'")
        except BadRow as e:
            raise SystemExit(f"{where}: row {e}.")
        media = [found(m, Path(path).parent) for m in r.get("media") or []]
        task = r.get("task") or ("text" if not media else "image_understanding" if Path(
            media[0]).suffix.lower() in (".png", ".jpg", ".jpeg", ".webp") else
            "video_understanding")
        candidates = r["candidates"] if not task.endswith("generation") else [
            found(c, Path(path).parent) for c in r["candidates"]]
        sets.append({**r, "task": task, "media": media, "candidates": candidates, "row": len(sets)})
    if not sets:
        raise SystemExit(f"{path}: no candidates.")
    return sets


def schedule(n, rounds, rng):
    """Pairs of n candidates. None or n - 1 rounds: each meets each. Fewer: in every round each meets
    another opponent, drawn at random (for odd n one sits out): the circle method on a shuffled
    order, which never repeats a pair."""
    circle = rng.sample(range(n), n) + [None] * (n % 2)
    pairs = []
    for _ in range(min(rounds or len(circle), len(circle) - 1)):
        pairs += [(a, b) for a, b in zip(circle[:len(circle) // 2], circle[::-1]) if None not in (a, b)]
        circle = [circle[0], circle[-1], *circle[1:-1]]
    return pairs


def pair_rows(s, pairs, i, j):
    """Candidate i as A against candidate j as B."""
    both = [s["candidates"][i], s["candidates"][j]]
    gen = s["task"].endswith("generation")
    return {"id": str(s["id"]), "row": s["row"], "i": i, "j": j, "task": s["task"], "label": "A",
            "prompt": s["prompt"], "responses": None if gen else both,
            "media": both if gen else s["media"], "captions": []}


def win_rates(n, games):
    """games [(i, j, i's share of wins)] -> rewards [n] and their standard errors. The opponents are
    the sample (both orders of a pair are one): the mean of what i won, and the standard deviation
    of Beta(1 + won, 1 + lost), which is not 0 after three wins of three."""
    won, met = [0.0] * n, [0] * n
    for i, j, w in games:
        won[i], won[j] = won[i] + w, won[j] + 1 - w
        met[i], met[j] = met[i] + 1, met[j] + 1
    beta = [(1 + w, 1 + m - w) for w, m in zip(won, met)]
    return ([w / m if m else 0.5 for w, m in zip(won, met)],
            [math.sqrt(a * b / (a + b + 1)) / (a + b) for a, b in beta])


def bradley_terry(n, games, prior=0.1):
    """Log-strengths s with P(i beats j) = sigmoid(s_i - s_j) (Eq. 1), by Newton's method; `prior`
    is the precision of a normal around 0, without which a candidate that won all would run away.
    The reward is the mean probability of beating each of the others: it allows for whom i happened
    to meet, and after a full round robin it is the win rate (but for the prior). Standard errors
    from the inverse Hessian."""
    s = torch.zeros(n, dtype=torch.float64)
    i, j = (torch.tensor([g[k] for g in games]) for k in (0, 1))
    w = torch.tensor([g[2] for g in games], dtype=torch.float64)
    sides = torch.zeros(len(games), n, dtype=torch.float64)                       # [games, n]
    sides[range(len(games)), i], sides[range(len(games)), j] = 1.0, -1.0
    for _ in range(100):
        p = torch.sigmoid(sides @ s)
        hessian = sides.T @ ((p * (1 - p))[:, None] * sides) + prior * torch.eye(n)
        step = torch.linalg.solve(hessian, sides.T @ (w - p) - prior * s)
        s += step.clamp(-2, 2)
        if step.abs().max() < 1e-10:
            break
    p = torch.sigmoid(s[:, None] - s[None])                                       # [n, n]
    slope = (p * (1 - p)).fill_diagonal_(0) / (n - 1)
    jacobian = slope.sum(1).diag() - slope
    covariance = jacobian @ torch.linalg.inv(hessian) @ jacobian.T
    rewards = (p.sum(1) - 0.5) / (n - 1)
    return rewards.tolist(), covariance.diag().sqrt().tolist()


def ranked_pairwise(sets, loaded, args, out):
    """Every pair is judged in both orders (BaseReward, appendix C: all 56 ordered pairs of 8)."""
    pairs = [schedule(len(s["candidates"]), args.rounds, random.Random(f"{args.seed}:{s['row']}"))
             for s in sets]
    rows = [pair_rows(s, some, *p) for s, some in zip(sets, pairs) for a, b in some
            for p in ((a, b), (b, a))]
    wins = {}  # (set, i, j), i < j -> what each verdict gave to i; no verdict: half to each
    for p in judge_rows(loaded, fit_to_judge(rows, loaded[0][1], args), args, out, ("AB",)):
        won, (i, j) = {"A": 1.0, "B": 0.0, None: 0.5}[p["pred"]], (p["i"], p["j"])
        wins.setdefault((p["row"], *sorted((i, j))), []).append(won if i < j else 1 - won)
    fit = win_rates if args.aggregate == "win_rate" else bradley_terry
    for s, some in zip(sets, pairs):
        games = [(*sorted(p), sum(w) / len(w)) for p in some
                 if (w := wins.get((s["row"], *sorted(p))))]
        yield s, *fit(len(s["candidates"]), games), 2 * len(some) * args.votes


def ranked_by_score(sets, loaded, args):
    """Bradley-Terry models score each candidate once. The reward is again the mean probability of
    beating each of the others; its standard error, that of the mean over the models (null for one:
    it is a function, with no spread to see)."""
    import bt_reward
    items = [{"task": s["task"], "prompt": s["prompt"],
              "media": [c] if s["task"].endswith("generation") else s["media"],
              "response": None if s["task"].endswith("generation") else c}
             for s in sets for c in s["candidates"]]
    each = [iter(bt_reward.score_texts(model, encoder, items, args.batch_size, "scoring"))
            for model, encoder in loaded]
    for s in sets:
        n = len(s["candidates"])
        scores = torch.tensor([[next(m) for _ in range(n)] for m in each], dtype=torch.float64)
        rate = lambda x: (torch.sigmoid(x[..., None] - x[..., None, :]).sum(-1) - 0.5) / (n - 1)
        errors = [None] * n if len(each) < 2 else \
            (rate(scores).std(0) / math.sqrt(len(each))).tolist()                 # [models, n]
        yield s, rate(scores.mean(0)).tolist(), errors, n


def rank_candidates(args):
    device = common.start_processes()
    sets = read_candidates(args.rank)
    loaded = load_judge(args.model, args, device)
    out = args.out and str(Path(args.out).with_suffix(".judged.jsonl"))
    found = ranked_by_score(sets, loaded, args) if is_reward_model(args.model[0]) else \
        ranked_pairwise(sets, loaded, args, out)
    lines, total = [], 0
    for s, rewards, errors, judgements in found:
        order = sorted(range(len(rewards)), key=lambda c: -rewards[c])  # equal: as in the file
        total += judgements
        lines.append({"id": s["id"], "rewards": rewards, "standard_errors": errors,
                      "ranking": order, "best": order[0], "judgements": judgements})
    if common.rank() == 0:
        if args.out:
            common.write_lines(args.out, lines)
        for line in lines if not args.out else ():
            print(json.dumps(line))
        print(f"{args.rank}: {len(lines)} sets ranked with {total} judgements"
              + (f", in {args.out}" if args.out else ""))
    common.end_processes()


# ==================================================================================================
# 5. A page to look at. Everything that comes from data goes through esc(), there is no script, and
# the page forbids itself any: text from data can never run, and nothing is fetched.

HEAD = """<!DOCTYPE html>
<html lang="en"><head><meta charset="utf-8"><title>{title}</title>
<meta http-equiv="Content-Security-Policy"
 content="default-src 'none'; img-src data:; style-src 'unsafe-inline'">
<style>
body {{ font: 15px/1.45 sans-serif; max-width: 70em; margin: 2em auto; padding: 0 1em }}
table {{ border-collapse: collapse }} td, th {{ border: 1px solid #ccc; padding: .2em .6em }}
pre {{ white-space: pre-wrap; background: #f5f5f5; padding: .5em; margin: .3em 0 }}
.two {{ display: flex; gap: 1em }} .two > div {{ flex: 1; min-width: 0 }}
summary {{ cursor: pointer; padding: .2em }} .flip {{ background: #ffe9b8 }}
.wrong {{ background: #ffd5d0 }} .right {{ background: #ddf3dd }} img {{ max-width: 100% }}
svg {{ border: 1px solid #ddd; margin: .3em }}
</style></head><body>
<h1>{title}</h1>
"""
INKS = ("#1f77b4", "#d62728", "#2ca02c", "#9467bd", "#ff7f0e", "#17becf")


def esc(x):
    return html.escape(str(x), quote=True)


def line_chart(title, lines, width=320, height=180):
    """{name: [(x, y)]} -> one SVG picture; not a number is left out."""
    lines = {n: [p for p in some if math.isfinite(p[1])] for n, some in lines.items()}
    xs, ys = ([p[k] for some in lines.values() for p in some] for k in (0, 1))
    if not xs:
        return ""
    (x0, x1), (y0, y1) = (min(xs), max(xs)), (min(ys), max(ys))
    to_x = lambda x: 45 + (width - 55) * (x - x0) / ((x1 - x0) or 1)
    to_y = lambda y: height - 20 - (height - 45) * (y - y0) / ((y1 - y0) or 1)
    text = lambda x, y, s, ink="#000": f'<text x="{x}" y="{y}" font-size="11" fill="{ink}">{esc(s)}</text>'
    out = [text(45, 12, title), text(2, to_y(y1) + 4, f"{y1:.3g}"), text(2, to_y(y0) + 4, f"{y0:.3g}"),
           text(45, height - 5, f"{x0:g}"), text(width - 40, height - 5, f"{x1:g}")]
    for n, (name, some) in enumerate(lines.items()):
        path = " ".join(f"{to_x(x):.1f},{to_y(y):.1f}" for x, y in some)
        ink = INKS[n % len(INKS)]
        out.append(f'<polyline points="{path}" fill="none" stroke="{ink}" stroke-width="1.5"/>')
        if len(lines) > 1:
            out.append(text(60, 26 + 12 * n, name, ink))
    return f'<svg width="{width}" height="{height}">{"".join(out)}</svg>'


def learning_curves(folders):
    """One picture a figure of metrics.jsonl, one line a run."""
    runs = {f: common.whole_lines(Path(f, "metrics.jsonl")) for f in folders}
    names = ("reward", "rewards/accuracy/mean", "loss", "kl", "entropy", "completions/mean_length",
             "share_a", "grad_norm")
    return "".join(line_chart(n, lines) for n in names if (lines := {
        f: [(s["step"], s[n]) for s in steps if isinstance(s.get(n), (int, float))]
        for f, steps in runs.items() if any(n in s for s in steps)}))


def picture(path, video):
    """An image, or four frames of a video, as small JPEGs inside the page."""
    try:
        images = common.open_video(path, 4) if video else [common.open_image(path)]
    except BadRow as e:
        return f"<p>[{esc(e)}]</p>"
    out = ""
    for image in images:
        image = image.convert("RGB")
        image.thumbnail((360, 360))
        buffer = io.BytesIO()
        image.save(buffer, "JPEG", quality=80)
        out += f'<img alt="" src="data:image/jpeg;base64,{base64.b64encode(buffer.getvalue()).decode()}">'
    return out


def judged_row(row, x, preds, flipped):
    """One row, folded: what was asked, both candidates, every answer and its verdict."""
    video, shown = row["task"].startswith("video"), [""] * 2
    media = [picture(m, video) for m in row["media"]]
    if row["responses"]:
        shown, media = [f"<pre>{esc(t)}</pre>" for t in row["responses"]], ["".join(media)]
    elif len(media) == 2:
        shown, media = media, [""]
    answers = "".join(f"<p>order {esc(p['order'])}, sample {esc(p['sample'])}: says "
                      f"<b>{esc(p['pred'])}</b></p><pre>{esc(p.get('text') or '')}</pre>" for p in preds)
    kind = "flip" if flipped else "right" if x == 1 else "wrong"
    where = ", ".join(f"{k} {row[k]}" for k in BY_ROW if row.get(k) is not None)
    return (f'<details class="{kind}"><summary>{esc(row["id"])} ({esc(where)}): {kind}, label '
            f'{esc(row["label"])}, {x:.2f} points, says '
            f'{esc(" ".join(str(p["pred"]) for p in preds)) or "nothing"}</summary>'
            f'<pre>{esc(row["prompt"])}</pre>{"".join(media)}<div class="two">'
            + "".join(f"<div><b>{s}</b>{t}</div>" for s, t in zip("AB", shown))
            + f"</div>{answers}</details>\n")


def write_report(path, title, results, rows, x, preds, runs, limit):
    """Flips first, then what was wrong, then the rest; at most `limit` rows."""
    by_row = [[] for _ in rows]
    for p in preds:
        by_row[p["at"]].append(p)
    flips = [len({p["pred"] for p in some if p["pred"]}) > 1 for some in by_row]
    page = HEAD.format(title=esc(title))
    for name, result in results.items():
        names = ["overall", "macro", *result["groups"]]
        values = [result["overall"], result["macro"], *result["groups"].values()]
        low, high = result["interval"]
        page += (f"<h2>{esc(name)}</h2><table><tr>" + "".join(f"<th>{esc(n)}</th>" for n in names)
                 + "</tr><tr>" + "".join(f"<td>{100 * v:.1f}</td>" for v in values) + "</tr></table>"
                 f"<p>n {result['n']}, 95 % interval {low:.1%} to {high:.1%}, flips with the order "
                 f"{result['order_flips']:.1%}, unparsable {result['unparsable']:.1%}, without a "
                 f"prediction {result['missing']}</p>")
        page += line_chart("accuracy of k votes (vote@k), of the best of k (any@k)", {
            c: [(int(k), v) for k, v in result[c].items()] for c in ("vote", "any") if c in result})
    if runs:
        page += "<h2>Learning curves</h2>" + learning_curves(runs)
    order = sorted((k for k, r in enumerate(rows) if r["label"]), key=lambda k: (not flips[k], x[k]))
    page += f"<h2>Rows: flips and failures first, {min(limit, len(order))} of {len(order)}</h2>\n"
    page += "".join(judged_row(rows[k], x[k], by_row[k], flips[k]) for k in order[:limit])
    Path(path).write_text(page + "</body></html>\n", "utf-8", errors="replace")


# ==================================================================================================
# 6. Command line

def main():
    args, parser = arguments()
    for path in (args.out, args.report):
        if path:
            check_writable(path)
    if args.table:
        return table(args)
    if args.rank and args.model:
        return rank_candidates(args)
    if args.score and args.data:
        return score_files(args)
    if not (args.model and args.data):
        parser.error("give --model and --data, --score and --data, --model and --rank, or --table; "
                     "see --help")
    device = common.start_processes()
    rows = read_benchmark(args.benchmark, args.data, args.split, True, args.skip_bad_rows)
    preds = judged(args, load_judge(args.model, args, device), rows, args.out)
    if common.rank() == 0:
        finish(args, rows, {", ".join(args.model): preds},
               {"model": ", ".join(args.model), "data": args.data, "votes": args.votes,
                "form": args.form, "style": args.style})
    common.end_processes()


def score_files(args):
    """Somebody's predictions; of two files also what lies between them."""
    rows = read_benchmark(args.benchmark, args.data, args.split, bool(args.report),
                          args.skip_bad_rows)
    finish(args, rows, {f: read_predictions(f, rows) for f in args.score}, {"data": args.data})


def finish(args, rows, files, more):
    """Print, and write the page. files: {name: predictions}, one or two."""
    results, xs = {}, []
    for name, preds in files.items():
        results[name], x = score(rows, preds, args.benchmark)
        xs.append(x)
        if args.grouping == "all" and args.benchmark == "vl_rewardbench":
            results[name]["groupings"] = regrouped(rows, x)
        show(f"{name} on {args.data}", results[name])
    result = next(iter(results.values()))
    if len(xs) == 2:
        result = compare(rows, *xs)
        result |= dict(zip(("first", "second"), results.values()))
        low, high = result["interval"]
        print(f"first - second: {result['difference']:+.1%} [{low:+.1%}, {high:+.1%}]; rows that only "
              f"the first judges better {result['first_better']}, only the second "
              f"{result['second_better']}, McNemar p {result['mcnemar_p']:.3g}")
    if args.report:
        write_report(args.report, f"{args.benchmark}: {args.data}", results, rows, xs[0],
                     next(iter(files.values())), args.runs, args.report_rows)
    if args.json:
        print(json.dumps({**result, "benchmark": args.benchmark, **more}))


def regrouped(rows, x):
    """VL-RewardBench under every public grouping, the wrong ones labelled so."""
    out = {}
    for name, group in GROUPINGS.items():
        parts = by_part([{"part": group(r["id"])} for r in rows], range(len(rows)))
        groups = {g: mean(rows, x, parts[g]) for g in sorted(parts)}
        out[name] = {"macro": sum(groups.values()) / len(groups), "groups": groups,
                     "group_n": {g: len(parts[g]) for g in groups}}
    return out


def table(args):
    """Markdown: one line a checkpoint, one column a task; accuracy over both orders, per cent."""
    device = common.start_processes()
    lines = []
    for folder in args.table:
        if not Path(folder, "config.json").is_file():
            print(f"{folder}: no checkpoint, left out", file=sys.stderr)
            continue
        args.model, cells = [folder], []
        loaded = load_judge(args.model, args, device)
        for task in common.TASKS:
            if task != "text" and loaded[0][1].image_token_id is None and args.form == "pixels":
                cells.append("-")  # a text-only model
                continue
            args.data = str(Path(args.toy, f"heldout_{task}.jsonl"))
            rows = read_benchmark("rows", args.data, skip_bad_rows=args.skip_bad_rows)
            cells.append(f"{100 * score(rows, judged(args, loaded, rows))[0]['overall']:.1f}")
        lines.append([folder, *cells])
    if common.rank() == 0:
        head = ["checkpoint", *(t.replace("_", " ") for t in common.TASKS)]
        print("\n" + "\n".join("| " + " | ".join(line) + " |" for line in
                               [head, ["---"] + ["--:"] * len(common.TASKS), *lines]))
    common.end_processes()


def check_writable(path):
    """Find out now, not after an hour of judging, that a file cannot be written."""
    folder = Path(path).parent
    if not folder.is_dir() or not os.access(folder, os.W_OK) or Path(path).is_dir():
        raise SystemExit(f"{path}: cannot be written; make the folder or choose another --out.")


def arguments():
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--model", action="append", help="checkpoint folder or hub id: any judge that writes its "
        "verdict, or a bt_reward.py checkpoint; several of the latter are averaged")
    add("--data", help="a published benchmark, as a file, a folder or a hub id; or preference rows: "
        ".jsonl, or a training set that common.py knows, several separated by commas")
    add("--benchmark", choices=list(BENCHMARKS), default="rows", help="what --data is")
    add("--split", help="of a hub id or folder; GenAI-Bench: test_v1 (the official one, default) or "
        "test (larger, UnifiedReward's)")
    add("--grouping", choices=["official", "all"], default="official", help="VL-RewardBench: 'all' "
        "also prints the two wrong groupings in public code, under which many papers report")
    add("--score", nargs="+", metavar="PREDS", help="score this file of predictions, no model; of "
        'two, also compare. A line: {"id", "pred": "A"|"B"|null}, optionally "row" (index in the '
        'data file, needed where ids repeat), "order", "sample", "score_a", "score_b"; GenAI-Bench '
        'also "tie", "bothbad"; RM-Bench {"id", "i", "j", "pred"} or {"id", "chosen": [3 scores], '
        '"rejected": [3]}')
    add("--rank", metavar="CANDIDATES", help='reward each candidate of {"id", "prompt", "media", '
        '"candidates": [...]} lines, in [0, 1] with a standard error')
    add("--rounds", type=int, help="--rank: opponents a candidate meets, in both orders; default: "
        "all (BaseReward, appendix C). 8 candidates: 8 judgements a round, 56 in all")
    add("--aggregate", choices=["win_rate", "bradley_terry"], default="win_rate", help="--rank: "
        "'bradley_terry' allows for whom a candidate met, which matters with few --rounds")
    add("--form", choices=["pixels", "caption"], default="pixels",
        help="show images and videos, or their captions instead")
    add("--style", choices=["msrl", "r1"], default="msrl", help="prompt and answer: A/B (MSRL, "
        "Figures 4-7), or 1/2 (R1-Reward, Table 1)")
    add("--votes", type=int, default=1, help="K sampled answers an order, majority wins (paper: "
        "voting@16), and vote@k, any@k for k = 1..K; 1 = one greedy answer")
    add("--temperature", type=float, default=1.0, help="of the K sampled answers")
    add("--max_new_tokens", type=int, default=160, help="paper: 1024")
    add("--max_prompt_tokens", type=int, default=16_384, help="longer prompts are not judged, which "
        "counts as wrong, and are counted; never cut")
    add("--frames", type=int, default=8, help="frames a video (the paper's: 8)")
    add("--max_tiles", type=int, default=12, help="tiles an image (InternVL: 12)")
    add("--batch_size", type=int, default=64, help="prompts decoded together")
    add("--seed", type=int, default=0, help="of the sampled answers and of --rounds")
    add("--skip_bad_rows", action="store_true", help="preference rows that are malformed are left "
        "out; rows that a model cannot be shown (a broken image...) are wrong. Both are counted")
    add("--out", help="predictions, or rankings, as .jsonl. The same command goes on from what is "
        "there; nothing is judged twice")
    add("--json", action="store_true", help="print one JSON object last")
    add("--report", metavar="PAGE.html", help="write one self-contained page: table, curves, rows "
        "with pictures and answers, flips and failures first")
    add("--report_rows", type=int, default=200, help="rows on that page")
    add("--runs", nargs="+", default=[], metavar="FOLDER", help="run folders whose learning curves "
        "go on that page")
    add("--table", nargs="+", metavar="CHECKPOINT", help="print a table of checkpoints by the five "
        "tasks' held-out rows in --toy, and stop")
    add("--toy", default="toy", help="folder of heldout_<task>.jsonl for --table")
    args = parser.parse_args()
    for name in ("votes", "batch_size", "max_new_tokens"):
        if getattr(args, name) < 1:
            parser.error(f"--{name} must be at least 1")
    if args.rounds is not None and args.rounds < 1:
        parser.error("--rounds must be at least 1")
    if args.score and len(args.score) > 2:
        parser.error("--score takes one file, or two to compare")
    return args, parser


if __name__ == "__main__":
    main()
