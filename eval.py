"""
Score, judge, rank: the field's benchmarks by explicit rules, with or without a model.

    python eval.py --model runs/stage1_text_grpo --data toy/heldout_text.jsonl [--votes 8]
    python eval.py --model hub/id --benchmark vl_rewardbench --data folder/ --out preds.jsonl
    python eval.py --score preds.jsonl --benchmark vl_rewardbench --data data.json --json
    python eval.py --score ours.jsonl theirs.jsonl --benchmark rm_bench --data total_dataset.json
    python eval.py --model runs/stage1_text_grpo --rank candidates.jsonl --rounds 2 --out best.jsonl
    python eval.py --table runs/*                    # checkpoints by tasks, as a Markdown table

The rules, the same for every benchmark:
  order       a model judges every row as A, B and as B, A; a row counts the mean over its orders,
              so a judge that always says "A" gets exactly 50 %.
  frame       `pred` is in the data row's own frame, whatever was shown: A is the first response,
              left image, Output1, path_A, and `chosen` where a row has chosen and rejected.
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

import bt_reward
import common
from common import BadRow
from stage1_text_grpo import sample_group

# ==================================================================================================
# 1. Scoring. A row is a preference row with "row", its index in the data file; "label"; "part", its
# column; "weight", 0 where it does not count; "cluster", the question it belongs to.

TIES = ("tie", "bothbad", "same")


def key_of(row):
    """What a prediction is about; i, j: RM-Bench's styles of the chosen and of the rejected."""
    return row["row"], row.get("i"), row.get("j")


def read_predictions(path, rows):
    """-> prediction rows, each with "at", the place of its row in `rows`."""
    place = {key_of(r): at for at, r in enumerate(rows)}
    of_id, preds, seen = {}, [], {}
    for r in rows:
        of_id.setdefault(r["id"], set()).add(r["row"])
    for where, raw in common.file_rows(Path(path)):
        try:
            for p in verdicts(raw):
                fits = of_id.get(str(p.get("id")), set())
                if p.get("row") is not None:
                    fits = fits & {p["row"]}
                if len(fits) != 1:
                    raise BadRow(f"with id {p.get('id')!r}, row {p.get('row')} fits {len(fits)} "
                                 'rows of --data; where ids repeat, "row" is their index there')
                p["row"], = fits
                if (p["row"], None, None) in place:  # no RM-Bench: their own "i" means nothing here
                    p.pop("i", None), p.pop("j", None)
                if key_of(p) not in place:
                    raise BadRow("needs 'i' and 'j' in 0-2, or 'chosen' and 'rejected' scores")
                p["at"] = place[key_of(p)]
                once = p["at"], p["order"], p["sample"]
                if once in seen:
                    raise BadRow(f"is a second verdict on what {seen[once]} judges; number the "
                                 "votes of an order in 'sample'")
                seen[once] = where
                preds.append(p)
        except (BadRow, TypeError) as e:
            raise SystemExit(f"{where}: prediction {e}.")
    if not preds:
        raise SystemExit(f"{path}: holds no predictions.")
    return preds


def verdicts(raw):
    """One line of a prediction file -> its verdicts: nine for RM-Bench's scores, else one."""
    if not isinstance(raw, dict):
        raise raw if isinstance(raw, BadRow) else BadRow("is not a JSON object")
    p = {**raw, "order": raw.get("order") or "AB", "sample": raw.get("sample") or 0}
    try:
        if "chosen" in p and "pred" not in p:
            better, worse = p.pop("chosen"), p.pop("rejected")
            if len(better) != 3 or len(worse) != 3:  # 10: RM-Bench's three styles
                raise ValueError
            return [verdict for i, a in enumerate(better) for j, b in enumerate(worse)
                    for verdict in verdicts({**p, "i": i, "j": j, "score_a": a, "score_b": b})]
        if p.get("score_a") is not None:
            p |= {"score_a": float(p["score_a"]), "score_b": float(p["score_b"])}
            if not math.isfinite(p["score_a"] + p["score_b"]):
                raise ValueError
            p.setdefault("pred", larger(p["score_a"], p["score_b"]))
    except (KeyError, TypeError, ValueError):
        raise BadRow("has scores that are no numbers, only one of the two, or not three of each")
    if p.get("pred", "missing") not in ("A", "B", *TIES, None):
        raise BadRow(f"has pred {p.get('pred', 'missing')!r}; write 'A', 'B' or null (also 'tie', "
                     "'bothbad' for GenAI-Bench), or score_a and score_b")
    if p["order"] not in ("AB", "BA"):
        raise BadRow(f"has order {p['order']!r}, which is neither 'AB' nor 'BA'")
    return [p]


def larger(a, b):
    """Strictly: equal scores are no verdict, and so count as wrong."""
    return "A" if a > b else "B" if b > a else None


def majority(votes):
    """-> the verdicts that most votes name: two in a tied vote, none if no vote has a verdict."""
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


def margin(judged):
    """Mean of score_a - score_b over both orders and all votes; None without scores. With answer
    tokens' probabilities its sign is the soft vote."""
    d = [p["score_a"] - p["score_b"] for p in judged if p.get("score_a") is not None]
    return sum(d) / len(d) if d else None


def soft_points(label, judged):
    m = margin(judged)
    if m is None or label not in ("A", "B"):
        return 0.0
    return 0.5 if abs(m) < 1e-9 else float((m > 0) == (label == "A"))  # equal: a tied vote


def score(rows, preds, benchmark="rows", style="msrl"):
    """`preds` as of read_predictions() -> result as for --json, and what each row earned."""
    judged = [{} for _ in rows]  # order -> predictions
    for p in preds:
        judged[p["at"]].setdefault(p["order"], []).append(p)
    earned = [{o: points(r["label"], [p["pred"] for p in some]) for o, some in orders.items()}
              for r, orders in zip(rows, judged)]
    x = [sum(e.values()) / len(e) if e else 0.0 for e in earned]
    counted = [k for k, r in enumerate(rows) if r["weight"] > 0]
    if not counted:
        raise SystemExit("no row of --data has a label that counts.")
    overall, parts = mean(rows, x, counted), by(rows, counted, "part")
    columns = {part: column(rows, x, some) for part, some in parts.items()}
    macro = sum(v for v, _ in columns.values()) / len(columns) if columns else overall
    columns |= more_columns(benchmark, rows, x, earned, judged, counted)
    sides = [[m[0] for o in j.values() if len(m := majority([p["pred"] for p in o])) == 1]
             for j in judged]
    both = [s for s in sides if len(s) == 2]
    said = [p for p in preds if p["pred"] in ("A", "B")]
    result = {
        "overall": overall, "macro": macro, "groups": {c: v for c, (v, _) in columns.items()},
        "n": column(rows, x, counted)[1], "group_n": {c: n for c, (_, n) in columns.items()},
        "unparsable": sum(p["pred"] is None and p.get("score_a") is None
                          for p in preds) / len(preds),
        "missing": sum(not judged[k] for k in counted),
        "order_flips": sum(a != b for a, b in both) / len(both) if both else 0.0,
        "interval": common.wilson(overall, effective_n(rows, x, counted)), "accuracy": overall,
        "share_a": sum((p["pred"] == "A") == (p["order"] == "AB")
                       for p in said) / max(1, len(said)),
        "format": sum(common.parse(str(p.get("text") or ""), style).well_formed
                      for p in preds) / len(preds)}
    if any(p.get("score_a") is not None for p in preds):
        soft = [soft_points(r["label"], sum(j.values(), [])) for r, j in zip(rows, judged)]
        result["soft"] = mean(rows, soft, counted)
    two = not any(p["pred"] in TIES for p in preds)  # the curves' sums know two verdicts
    if two and max(len(some) for j in judged for some in j.values()) > 1:
        result |= vote_curves(rows, judged, counted)
    if benchmark == "rm_bench":
        result["matrix"] = [[mean(rows, x, [k for k in counted if key_of(rows[k])[1:] == (i, j)])
                             for j in range(3)] for i in range(3)]
    return result, x


def mean(rows, x, some):
    total = sum(rows[k]["weight"] for k in some)
    return sum(rows[k]["weight"] * x[k] for k in some) / total if total else 0.0


def column(rows, x, some):
    """-> (accuracy, rows of the data file)"""
    return mean(rows, x, some), len({rows[k]["row"] for k in some})


def by(rows, some, key):
    """{value: places of the rows that have it}; None is no value."""
    places = {}
    for k in some:
        places.setdefault(rows[k][key], []).append(k)
    places.pop(None, None)
    return places


def effective_n(rows, x, some):
    """How many independent questions would give the figure's variance: that of the questions'
    totals around it, because rows of one question are not independent. Never more than Kish's
    (sum w)^2 / sum w^2, which is n for equal weights; without a variance, Kish's over questions."""
    p, total = mean(rows, x, some), sum(rows[k]["weight"] for k in some)
    questions = by(rows, some, "cluster").values()
    squares = lambda f, groups: sum(sum(map(f, g)) ** 2 for g in groups) / total ** 2
    weight = lambda k: rows[k]["weight"]
    spread = squares(lambda k: weight(k) * (x[k] - p), questions)
    if spread < 1e-12:
        return 1 / squares(weight, questions)
    return min(1 / squares(weight, ([k] for k in some)), p * (1 - p) / spread)


def vote_curves(rows, judged, counted):
    """vote@k and any@k for k = 1..K: not one draw of k, but the mean over all subsets of k of an
    order's K samples. A sample that is missing votes for nobody."""
    votes = max(len(some) for j in judged for some in j.values())
    curves = {"vote": {}, "any": {}}
    for name, at in (("vote", vote_at), ("any", any_at)):
        for k in range(1, votes + 1):
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
    ways = lambda a, b: (math.comb(right, a) * math.comb(wrong, b)
                         * math.comb(n - right - wrong, k - a - b))
    return sum(ways(a, b) * (1 if a > b else 0.5) for a in range(1, min(right, k) + 1)
               for b in range(min(wrong, a, k - a) + 1)) / math.comb(n, k)


def any_at(right, wrong, n, k):
    """The chance that at least one of k of n samples is right."""
    return 1 - math.comb(n - right, k) / math.comb(n, k)


def more_columns(benchmark, rows, x, earned, judged, counted):
    """What a benchmark's own table has besides the columns that make up the mean."""
    some = lambda test: column(rows, x, [k for k in counted if test(rows[k])])
    no_tie = some(lambda r: r["label"] in ("A", "B"))
    if benchmark.startswith("genai"):  # 4-way: official; 3-way: UnifiedReward's, both ties are one
        one = lambda v: "same" if v in TIES else v
        three = [sum(points(one(r["label"]), [one(p["pred"]) for p in o])
                     for o in j.values()) / max(1, len(j)) for r, j in zip(rows, judged)]
        return {"4-way": column(rows, x, counted), "3-way": column(rows, three, counted),
                "no tie": no_tie}
    if benchmark == "videogen_rewardbench":
        every = [k for k, r in enumerate(rows) if r["label"]]
        return {"no tie": no_tie, "with ties": (with_ties(rows, x, judged, every), len(every))}
    if benchmark == "mm_rlhf_rewardbench":
        prompts = by(rows, counted, "cluster").values()
        right = sum(all_right(p, earned, x) for p in prompts)
        return {"Acc+": (right / len(prompts), len(prompts))}
    if benchmark == "rm_bench":  # 0, 1, 2: concise, detailed, detailed in Markdown
        return {"easy": some(lambda r: r["i"] > r["j"]), "normal": some(lambda r: r["i"] == r["j"]),
                "hard": some(lambda r: r["i"] < r["j"])}
    if benchmark == "multimodal_rewardbench":
        return multimodal_columns(some)
    return {}


def all_right(prompt, earned, x):
    """Acc+ of one prompt: are all its pairs right? Each order is one pass over the benchmark, and
    the passes are averaged. A pair that was judged in one order only is the same in both."""
    return sum(math.prod(earned[k].get(o, x[k]) for k in prompt) for o in ("AB", "BA")) / 2


def with_ties(rows, x, judged, every):
    """VideoGen-RewardBench's 3-class accuracy: verdicts A, B, same as they are; scores with the
    best of all thresholds below which a difference is a tie ("Ties Matter", algorithm 1)."""
    margins = [margin(sum(judged[k].values(), [])) for k in every]
    if None in margins:
        return sum(x[k] for k in every) / len(every)
    m = torch.tensor(margins, dtype=torch.float64)
    truth = torch.tensor([{"A": 1, "B": -1, "same": 0}[rows[k]["label"]] for k in every])
    size, order = m.abs().sort()
    as_tie, as_side = (truth == 0)[order].long(), (truth == m.sign())[order].long()
    right = as_side.sum() + torch.cat([as_tie.new_zeros(1), (as_tie - as_side).cumsum(0)])
    ends = torch.ones_like(right, dtype=torch.bool)
    ends[1:-1] = size[1:] != size[:-1]  # equal sizes are ties together
    return right[ends].max().item() / len(every)


def multimodal_columns(some):
    """Safety's halves, by the id, and MSRL's Table 2: its Other is the plain mean of four columns,
    its Avg. that of Knowledge, Safety, VQA and Other (so its published rows add up)."""
    part = lambda *names: [c for n in names if (c := some(lambda r: r["part"] == n))[1]]
    half = {f"safety/{h}": c for h in ("bias", "toxicity")
            if (c := some(lambda r: r["half"] == h))[1]}
    average = lambda cs: (sum(v for v, _ in cs) / max(1, len(cs)), sum(n for _, n in cs))
    other = part("correctness", "preference", "math", "coding")
    four = part("knowledge", "safety", "vqa") + [average(other)] * bool(other)
    return half | {"MSRL other": average(other), "MSRL avg.": average(four)}


def compare(rows, xa, xb):
    """Paired, because both judged the same rows: the difference first - second, its 95 % interval
    from the spread of the questions' differences, and McNemar's exact p (a sign test over the rows
    that one of the two judged better)."""
    counted = [k for k, r in enumerate(rows) if r["weight"] > 0]
    d = [a - b for a, b in zip(xa, xb)]
    total, difference = sum(rows[k]["weight"] for k in counted), mean(rows, d, counted)
    questions = by(rows, counted, "cluster").values()
    spread = sum(sum(rows[k]["weight"] * (d[k] - difference) for k in q) ** 2 for q in questions)
    n = len(questions)
    half = 1.96 * math.sqrt(spread * n / max(1, n - 1)) / total
    first, second = (sum(s * d[k] > 0 for k in counted) for s in (1, -1))
    ways = tail = 1  # binomial coefficients one from the other: exact, and fast for 20,000 rows
    for i in range(min(first, second)):
        ways = ways * (first + second - i) // (i + 1)
        tail += ways
    return {"difference": difference, "interval": [difference - half, difference + half],
            "first_better": first, "second_better": second, "n": len(counted),
            "questions": n,
            "mcnemar_p": min(1.0, 2 * tail / 2 ** (first + second))}


def columns_of(result):
    """-> (name, per cent, n) of each column of the benchmark's table"""
    return [(name, f"{100 * value:.1f}", n) for name, value, n in [
        ("overall", result["overall"], result["n"]), ("macro", result["macro"], ""),
        *((g, v, result["group_n"][g]) for g, v in result["groups"].items())]]


def show(title, result):
    print(f"{title}: accuracy {result['overall']:.1%} [{result['interval'][0]:.1%}, "
          f"{result['interval'][1]:.1%}] on {result['n']} rows, flips with the order "
          f"{result['order_flips']:.1%}, says A {result['share_a']:.1%}, unparsable "
          f"{result['unparsable']:.1%}, well-formed {result['format']:.1%}")
    if result["missing"]:
        print(f"  {result['missing']} without a prediction, counted as wrong")
    for head, line in zip(("| |", "|---|", "| accuracy |", "| n |"), zip(*(
            (name, "--:", value, str(n)) for name, value, n in columns_of(result)))):
        print(head, " | ".join(line), "|")
    if "soft" in result:
        print(f"soft votes (mean probability of the answer, or score): {result['soft']:.1%}")
    for name in ("vote", "any"):
        if name in result:
            print(", ".join(f"{name}@{k} {v:.1%}" for k, v in result[name].items()))
    for line in result.get("matrix", ()):
        print("  chosen style (down) against rejected style (across): "
              + "  ".join(f"{v:6.1%}" for v in line))
    for name, other in result.get("groupings", {}).items():
        print(f"grouping {name}: macro {other['macro']:.1%}, " + ", ".join(
            f"{g} {v:.1%} (n {other['group_n'][g]})" for g, v in other["groups"].items()))


# ==================================================================================================
# 2. Benchmarks, read as published: each function turns one published row into preference rows.

def ab(first_is_better):
    return "A" if first_is_better else "B"


def vl_rewardbench(r, where):
    """MMInstruction/VL-RewardBench: human_ranking holds ranks, 0 is the best. Ids repeat."""
    ranks, responses = (ast.literal_eval(x) if isinstance(x, str) else list(x)
                        for x in (r["human_ranking"], r["response"]))
    if sorted(ranks) != [0, 1]:
        raise BadRow(f"has human_ranking {ranks}, not [0, 1] or [1, 0]")
    yield {"task": "image_understanding", "prompt": r["query"], "responses": responses,
           "media": [r.get("image") or f"images/{r['id']}.png"], "label": ab(ranks[0] == 0),
           "part": GROUPINGS["official"](str(r["id"])), "cluster": str(r["id"])}


def grouping(*hallucination):
    """id -> group, by what stands before its first "_" or "-" (not by query_source)."""
    def group(id):
        prefix = re.split("[_-]", id)[0]
        return "hallucination" if prefix in hallucination else (
            "reasoning" if prefix in ("mathverse", "mmmu") else "general")
    return group


# The same predictions, other macro means. Rows: general / hallucination / reasoning of 1,250.
GROUPINGS = {
    "official": grouping("RLAIF", "RLHF", "hallucination"),                      # 183 / 749 / 318
    "of UnifiedReward's scripts (wrong: no POVID)": grouping("RLAIF", "RLHF"),   # 631 / 301 / 318
    "of R1-Reward's get_acc.py (wrong: POVID only)": grouping("hallucination")}  # 484 / 448 / 318


def multimodal_rewardbench(r, where):
    """facebookresearch/multimodal_rewardbench: safety and reasoning are split by the id. Its scorer
    tosses a coin for unparsable answers; here they are wrong."""
    part, id = r["Category"].rpartition("/")[2].removesuffix("_task"), r["ID"].lower()
    if r["Better"] not in ("Output1", "Output2"):
        raise BadRow(f"has Better {r['Better']!r}, not 'Output1' or 'Output2'")
    half = ("bias" if id.startswith("pairs") else "toxicity") if part == "safety" else None
    if part == "reasoning":
        part = "math" if id.startswith("math") else "coding"
    yield {"task": "image_understanding", "prompt": r.get("Text"), "media": [r.get("Image")],
           "responses": [r["Output1"], r["Output2"]], "label": ab(r["Better"] == "Output1"),
           "part": part, "half": half}


def mm_rlhf_rewardbench(r, where):
    """yifanzhang114/MM-RLHF-RewardBench: 170 pairs of 46 prompts. A: chosen. The category is the
    word in the path of the image, or of the video's folder of frames."""
    medium = r.get("video") or r["image"]
    path = medium["path"] if isinstance(medium, dict) else medium
    part = next((c for c in ("mcq", "long", "short", "safety", "video") if c in path), None)
    if part is None:
        raise BadRow(f"has its image at {path!r}: no mcq, long, short, safety or video in it")
    yield {"task": f"{'video' if r.get('video') else 'image'}_understanding", "prompt": r["prompt"],
           "responses": [r["chosen"], r["rejected"]], "media": [medium], "label": "A", "part": part,
           "cluster": str(r["id"])}


def genai(r, where):
    """TIGER-Lab/GenAI-Bench (videos are URLs: put the files in videos/), and UnifiedReward's
    data.json, which says video_left for left_video. A: left. Judges of ours never say tie, so
    their 4-way accuracy is at most the share of rows without one."""
    labels = {"leftvote": "A", "rightvote": "B", "tievote": "tie", "bothbad_vote": "bothbad"}
    if r["vote_type"] not in labels:
        raise BadRow(f"has vote_type {r['vote_type']!r}, not one of {', '.join(labels)}")
    kind = "image" if {"left_image", "image_left"} & r.keys() else "video"
    media = [r.get(f"{side}_{kind}") or r[f"{kind}_{side}"] for side in ("left", "right")]
    yield {"task": f"{kind}_generation", "prompt": r["prompt"], "media": media,
           "label": labels[r["vote_type"]]}


def videogen_rewardbench(r, where):
    """KwaiVGI/VideoGen-RewardBench, its Overall column, which may carry blanks or be missing: such
    rows do not count. Ties count in the column "with ties" only."""
    label = str(r.get("Overall") or "").strip()
    if label not in ("A", "B", "same", "", "nan", "None"):
        raise BadRow(f"has Overall {label!r}, not 'A', 'B' or 'same'")
    yield {"task": "video_generation", "prompt": r["prompt"], "media": [r["path_A"], r["path_B"]],
           "label": label if label in ("A", "B", "same") else None, "weight": label in ("A", "B")}


def sharegpt_video(r, where):
    """ShareGPTVideo's sft_dpo_17k.jsonl. A: chosen. UNSPECIFIED: MSRL's test split is not public;
    this is a tenth of the videos with all their pairs, which no stage trains on."""
    held = common.held_out(r["video"])
    yield {"task": "video_understanding", "prompt": r["prompt"], "media": [r["video"]],
           "responses": [r["chosen"], r["rejected"]], "label": "A" if held else None,
           "weight": held, "cluster": str(r["video"])}


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
    """allenai/reward-bench. A: chosen. A section is the mean of its subsets by the counts above,
    the overall figure the mean of the four sections."""
    part = next((s for s, subsets in SECTIONS.items() if r["subset"] in subsets), None)
    if part is None:
        raise BadRow(f"has subset {r['subset']!r} of no section; the split to use is 'filtered'")
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
            yield {"task": "text", "prompt": r["prompt"], "responses": [better, worse], "i": i,
                   "j": j, "label": "A", "part": "safety" if "safety" in domain else domain}


# name: (reader, rows as published, hub config, hub split, its file in a folder)
BENCHMARKS = {
    "vl_rewardbench": (vl_rewardbench, (1250, 1247), None, "test", "data/test-*.parquet"),
    "multimodal_rewardbench": (multimodal_rewardbench, (4711,), None, "test", "**/all_data.json"),
    "mm_rlhf_rewardbench": (mm_rlhf_rewardbench, (170,), None, "train", "mm_reward_bench.jsonl"),
    "genai_image": (genai, (1735, 3192), "image_generation", "test_v1",
                    "{config}/{split}-*.parquet"),
    "genai_video": (genai, (1069, 1889), "video_generation", "test_v1",
                    "{config}/{split}-*.parquet"),
    "videogen_rewardbench": (videogen_rewardbench, range(26_000, 27_000), None, "eval",
                             "videogen-rewardbench.csv"),
    "sharegpt_video": (sharegpt_video, range(16_000, 18_000), None, "train",
                       "**/sft_dpo_17k.jsonl"),
    "rewardbench": (rewardbench, (2985,), None, "filtered", "data/filtered-*.parquet"),
    "rm_bench": (rm_bench, (1327, 129, 228, 284, 157, 529), None, "train", "total_dataset.json"),
    "rows": None}  # preference rows, or a training set that common.py knows


def read_benchmark(name, source, split=None, media=None, skip_bad_rows=False):
    """-> all rows, those that do not count included, so that "row" is the index in the file."""
    if name == "rows":  # their columns are the subsets, or the tasks. Reading needs no model yet
        nobody = SimpleNamespace(forbidden=(), check=lambda row, form: 0)
        loaded = common.load_rows(source, nobody, skip_bad_rows=skip_bad_rows)
        own = ("i", "j", "part", "row", "weight", "cluster")  # a user's keys of these names
        return [{**{k: v for k, v in r.items() if k not in own}, "part": r.get("subset")
                 or r["task"], "row": n, "weight": 1, "cluster": f"row {n}"}
                for n, r in enumerate(loaded)]
    reader, published, config, default, file = BENCHMARKS[name]
    split, rows, n = split or default, [], 0
    for path in files_of(source, file.format(config=config, split=split)):
        for where, r in raw_rows(path, config, split):
            try:
                if not isinstance(r, dict):
                    raise r if isinstance(r, BadRow) else BadRow("is not an object")
                id = next((str(r[k]) for k in ("id", "ID", "idx") if r.get(k) is not None), str(n))
                for row in reader(r, where):
                    row = {"id": id, "row": n, "part": None, "weight": 1, "cluster": f"row {n}",
                           "responses": None, "media": [], **row}
                    row["prompt"] = re.sub(r"\s*<(image|video)>\s*", "", row["prompt"] or "")
                    wanted = row["media"] if media and row["label"] else []
                    if media == "if there":  # for the page alone: what is missing is not shown
                        wanted = [m for m in wanted if m is not None]
                    row["media"] = [found(m, Path(path).parent) for m in wanted]
                    rows.append(row)
            except BadRow as e:
                raise SystemExit(f"{where}: row {e}.")
            except (KeyError, TypeError, ValueError, AttributeError, IndexError, SyntaxError) as e:
                raise SystemExit(f"{where}: row does not have the published form of {name} "
                                 f"({type(e).__name__}: {e}).")
            n += 1
    if n not in published and common.rank() == 0:
        print(f"warning: {source} has {n} rows; {name} as published has " + (
            " or ".join(map(str, published)) if isinstance(published, tuple) else
            f"about {published[len(published) // 2]}"), file=sys.stderr)
    count = Counter(r["subset" if name == "rewardbench" else "part"] for r in rows)
    for r in rows:  # such that the overall figure is the benchmark's own mean of means
        if name == "rewardbench":
            section = {s: weight for s, weight in SECTIONS[r["part"]].items() if s in count}
            r["weight"] = section[r["subset"]] / sum(section.values()) / count[r["subset"]]
        elif name == "rm_bench":
            r["weight"] = 1 / count[r["part"]]
    return rows


def files_of(source, pattern):
    """The file itself or a hub id as it is; of a folder what it holds in the published form."""
    folder = Path(source)
    if not folder.is_dir():
        return [str(source)]
    for p in (pattern, "*.jsonl", "*.json", "*.csv", "*.parquet", "*/*.parquet"):
        if some := sorted(map(str, folder.glob(p))):
            if len(some) > 1 and not some[0].endswith(".parquet"):  # whose shards are read in turn
                raise SystemExit(f"{source}: holds {', '.join(some)}; name the one to read.")
            return some
    raise SystemExit(f"{source}: holds no {pattern}, nor another file of rows.")


def raw_rows(path, config, split):
    if not path.endswith(".csv"):
        yield from common.raw_rows(path, config=config, split=split)
        return
    try:
        with open(path, newline="", encoding="utf-8-sig") as f:
            for n, row in enumerate(csv.DictReader(f), 2):
                yield f"{path}:{n}", row
    except (OSError, UnicodeDecodeError, csv.Error) as e:
        raise SystemExit(f"{path}: cannot be read ({e}).")


def found(medium, folder):
    """An image or video of a row -> its path: beside the data, where the benchmarks' archives put
    it (MM-RLHF's paths are not those of its archive), or in media_cache/ if it came in the row."""
    medium = common.kept_medium(medium)
    last = Path(medium).name
    return next((str(folder / n) for n in (medium, f"images/{medium}", f"images/{last}",
                                           f"videos/{last}", last) if (folder / n).exists()),
                str(folder / medium))


# ==================================================================================================
# 3. Judging with a model: one that writes a verdict, or Bradley-Terry reward models.

def answer_probability(text, ids, logps, encoder):
    """The probability that the model gave the token with the verdict, when it wrote it."""
    start = re.search(r"<answer>\s*", text).end()
    token = next(t for t in reversed(range(len(ids))) if len(encoder.decode(ids[:t])) <= start)
    return math.exp(logps[token])


def generated(model, encoder, batch, generator, args):
    """[(row, order)] -> their prediction rows. The K votes of one prompt share its forward; its
    answer's probability p is the soft vote: p for the named side, 1 - p for the other."""
    shown = [row if order == "AB" else common.swap(row) for row, order in batch]
    rollout = sample_group(model, encoder, [encoder(r, args.form) for r in shown], args.votes,
                           args.temperature if args.votes > 1 else 0.0, args.max_new_tokens,
                           generator)
    preds = []
    for n, (ids, logps) in enumerate(zip(rollout.ids, rollout.logp)):
        row, order = batch[n // args.votes]
        text = encoder.decode(ids)
        side = common.parse(text, args.style).verdict
        p = {"id": row["id"], "order": order, "sample": n % args.votes, "pred": None}
        if side:
            p["pred"] = side if order == "AB" else {"A": "B", "B": "A"}[side]
            sure = answer_probability(text, ids, logps, encoder)
            p["score_a"], p["score_b"] = (sure, 1 - sure)[::1 if p["pred"] == "A" else -1]
        preds.append({**p, **place_of(row), "text": text})
    return preds


def place_of(row):
    return {k: row[k] for k in ("row", "i", "j") if k in row}


def reward_scores(loaded, batch, args):
    """[(row, order)] -> prediction rows of Bradley-Terry models; the scores of several are averaged
    (BaseReward's ensemble). Each response is scored alone (a pair of media in both orders, their
    mean), so there is one order."""
    rows = [row for row, _ in batch]
    each = [bt_reward.score_rows(*judge, rows, args.batch_size, "scoring") for judge in loaded]
    means = [[sum(side) / len(each) for side in zip(*some)] for some in zip(*each)]
    return [{"id": r["id"], "order": "AB", "sample": 0, "pred": larger(a, b), "score_a": a,
             "score_b": b, **place_of(r)} for r, (a, b) in zip(rows, means)]


def is_reward_model(folder):
    return common.stage_of(folder).get("stage") == "bt_reward"


def load_judge(folders, args, device):
    """-> [(model, encoder)], one, or several Bradley-Terry models."""
    sees = {"frames": args.frames, "max_tiles": args.max_tiles}
    if all(map(is_reward_model, folders)):
        return [bt_reward.load(f, device, **sees) for f in folders]
    if len(folders) > 1:
        raise SystemExit("several --model are averaged if all are Bradley-Terry models; these "
                         f"are not: {', '.join(f for f in folders if not is_reward_model(f))}.")
    return [common.load(folders[0], device, made_by="python stage1_text_grpo.py", **sees,
                        style=args.style)]


def fit_to_judge(rows, loaded, args):
    """-> the rows that a model is to judge, checked, with the length of their prompts. Ties are not
    shown to a judge whose prompt knows A and B; scores have use for them, as thresholds. What
    cannot be shown is left out, so it counts as wrong."""
    fit, bad, long = [], Counter(), 0
    model, encoder = loaded[0]
    scored = is_reward_model(args.model[0])
    labels = ("A", "B", *TIES) if scored else ("A", "B")
    for row in tqdm([r for r in rows if r["label"] in labels], desc="reading prompts",
                    unit=" rows", disable=common.rank() > 0, mininterval=1, leave=False):
        try:
            row = {**common.check_row({**row, "label": "A"}, "", encoder.forbidden),
                   "label": row["label"]}
            row["tokens"] = bt_reward.measure(row, encoder, model.settings) if scored else \
                encoder.check(row, args.form)
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
        print(f"not judged: {bad.total()} bad rows {dict(bad.most_common(5))}, {long} prompts over "
              f"{args.max_prompt_tokens} tokens")
    if not fit:
        raise SystemExit("no row can be judged.")
    return fit


def judge_rows(loaded, rows, args, out=None, orders=("AB", "BA")):
    """-> prediction rows. Alike lengths together, so both orders of a row are mostly in one batch.
    Each batch is in the file `out` as soon as it is judged; what is there is not judged again."""
    reward = is_reward_model(args.model[0])
    todo = [(r, o) for r in rows for o in (("AB",) if reward else orders)]
    todo.sort(key=lambda x: x[0]["tokens"])
    size = args.batch_size * (16 if reward else 1)  # reward models batch by themselves
    batches = [todo[k:k + size] for k in range(0, len(todo), size)]
    preds = opened(out, args) if out else []
    votes = Counter((*key_of(p), p["order"]) for p in preds)  # fewer: killed within a row
    done = {k for k, n in votes.items() if n == (1 if reward else args.votes)}
    preds = [p for p in preds if (*key_of(p), p["order"]) in done]
    if out and common.rank() == 0:
        common.write_lines(out, preds)
    # a reward model spreads each batch over the processes itself, a judge takes one batch on each
    width, mine = (1, 0) if reward else (common.world(), common.rank())
    for at in tqdm(range(0, len(batches), width), desc="judging", unit="batch",
                   disable=common.rank() > 0, leave=False, mininterval=1):
        k, new = at + mine, []
        batch = [(r, o) for r, o in (batches[k] if k < len(batches) else [])
                 if (*key_of(r), o) not in done]
        if batch and reward:
            new = reward_scores(loaded, batch, args)
        elif batch:
            model, encoder = loaded[0]
            generator = torch.Generator(next(model.parameters()).device)
            new = generated(model, encoder, batch, generator.manual_seed(args.seed * 1_000_003 + k),
                            args)
        new = new if reward else common.gather_list(new)
        if out and common.rank() == 0:
            with open(out, "a", encoding="utf-8") as f:
                f.writelines(json.dumps(p, ensure_ascii=False) + "\n" for p in new)
        preds += new
    preds.sort(key=lambda p: (p["row"], p.get("i", 0), p.get("j", 0), p["order"], p["sample"]))
    if out and common.rank() == 0:
        common.write_lines(out, preds)
    return preds


def opened(out, args):
    """-> what a killed run of the same settings left in `out`."""
    free = ("out", "json", "report", "report_rows", "runs", "batch_size", "aggregate", "grouping",
            "score", "table", "toy")
    settings = {k: v for k, v in vars(args).items() if k not in free}
    # the same names may hold other rows by now, or a judge that was trained further
    settings["files"] = common.stamps(*(p for p in (args.data, args.rank, *args.model) if p))
    beside = Path(out).with_suffix(".settings.json")
    if not Path(out).exists():
        if common.rank() == 0:
            beside.write_text(json.dumps(settings))
        return []
    was = json.loads(beside.read_text()) if beside.exists() else {}
    changed = [f"{k} {was.get(k)!r} -> {v!r}" for k, v in settings.items() if was.get(k) != v]
    if changed:
        raise SystemExit(f"{out} holds predictions of other settings ({'; '.join(changed)}). Take "
                         "another --out, or delete it.")
    return common.whole_lines(out)


def judged(args, loaded, rows, out=None):
    """-> prediction rows of a judge, with "at", as score() takes them."""
    place = {key_of(r): at for at, r in enumerate(rows)}
    fit = fit_to_judge(rows, loaded, args)
    return [{**p, "at": place[key_of(p)]} for p in judge_rows(loaded, fit, args, out)
            if key_of(p) in place]


# ==================================================================================================
# 4. Ranking: a reward in [0, 1] for each of n candidates.

def read_candidates(path):
    """-> [{"id", "task", "prompt", "media", "candidates", "row"}]; without "task" it is text or
    understanding. The candidates of a *_generation task are paths."""
    sets, folder = [], Path(path).parent
    for where, r in common.file_rows(Path(path)):
        try:
            media, candidates = r.get("media") or [], r["candidates"]
            task = r.get("task") or (
                "text" if not media else "image_understanding" if media[0].lower().endswith(
                    (".png", ".jpg", ".jpeg", ".webp")) else "video_understanding")
            if len(candidates) < 2:
                raise KeyError
            if task.endswith("generation"):
                candidates = [found(c, folder) for c in candidates]
            sets.append({"id": r["id"], "task": task, "prompt": r["prompt"], "row": len(sets),
                         "media": [found(m, folder) for m in media], "candidates": candidates})
        except (AttributeError, KeyError, TypeError, BadRow):
            raise SystemExit(f'{where}: needs "id", "prompt", "candidates" (two texts or paths, or '
                             'more) and, for images and videos, "media": [paths].')
    if not sets:
        raise SystemExit(f"{path}: no candidates.")
    return sets


def schedule(n, rounds, rng):
    """Pairs of n candidates. Without `rounds` each meets each. With: in every round each meets
    another opponent, drawn at random (for odd n one sits out): the circle method on a shuffled
    order, which never repeats a pair."""
    circle = rng.sample(range(n), n) + [None] * (n % 2)
    pairs = []
    for _ in range(min(rounds or n, len(circle) - 1)):
        pairs += zip(circle[:len(circle) // 2], circle[::-1])
        circle = [circle[0], circle[-1], *circle[1:-1]]
    return [tuple(sorted(p)) for p in pairs if None not in p]


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
    The reward allows for whom i happened to meet; after a full round robin it is the win rate (but
    for the prior). Standard errors from the inverse Hessian."""
    s = torch.zeros(n, dtype=torch.float64)
    w = torch.tensor([g[2] for g in games], dtype=torch.float64)
    sides = torch.zeros(len(games), n, dtype=torch.float64)                       # [games, n]
    for g, (i, j, _) in enumerate(games):
        sides[g, i], sides[g, j] = 1.0, -1.0
    for _ in range(100):
        p = torch.sigmoid(sides @ s)
        hessian = sides.T @ ((p * (1 - p))[:, None] * sides) + prior * torch.eye(n)
        step = torch.linalg.solve(hessian, sides.T @ (w - p) - prior * s)
        s += step.clamp(-2, 2)
        if step.abs().max() < 1e-10:
            break
    p = torch.sigmoid(s[:, None] - s)                                             # [n, n]
    slope = (p * (1 - p)).fill_diagonal_(0) / (n - 1)
    jacobian = slope.sum(1).diag() - slope
    errors = (jacobian @ hessian.inverse() @ jacobian.T).diag().sqrt()
    return chances(s).tolist(), errors.clamp(max=0.5).tolist()  # no std within [0, 1] is larger


def chances(s):
    """Scores [..., n] -> each candidate's mean probability of beating the others [..., n]."""
    return (torch.sigmoid(s[..., None] - s[..., None, :]).sum(-1) - 0.5) / (s.shape[-1] - 1)


def ranked_pairwise(sets, loaded, args, out):
    """Every pair is judged in both orders (BaseReward, appendix C: all 56 ordered pairs of 8)."""
    pairs = [schedule(len(s["candidates"]), args.rounds, random.Random(f"{args.seed}:{s['row']}"))
             for s in sets]
    rows = []
    for s, some in zip(sets, pairs):
        for i, j in [p for i, j in some for p in ((i, j), (j, i))]:
            both = [s["candidates"][i], s["candidates"][j]]
            shown = {"media": both} if s["task"].endswith("generation") else {"responses": both}
            rows.append({**s, "id": str(s["id"]), "i": i, "j": j, "label": "A", **shown})
    shares = shares_of(judge_rows(loaded, fit_to_judge(rows, loaded, args), args, out, ("AB",)))
    fit = win_rates if args.aggregate == "win_rate" else bradley_terry
    for s, some in zip(sets, pairs):
        games = [(*p, shares[s["row"], *p]) for p in some if (s["row"], *p) in shares]
        rewards, errors = fit(len(s["candidates"]), games)
        met = {k for i, j, _ in games for k in (i, j)}
        known = lambda x: [v if k in met else None for k, v in enumerate(x)]
        yield known(rewards), known(errors), 2 * len(games) * args.votes


def shares_of(preds):
    """-> {(set, i, j), i < j: i's share of the verdicts of the pair}. No verdict: half to each
    (UNSPECIFIED)."""
    wins = {}
    for p in preds:
        won, i, j = {"A": 1.0, "B": 0.0, None: 0.5}[p["pred"]], p["i"], p["j"]
        wins.setdefault((p["row"], min(i, j), max(i, j)), []).append(won if i < j else 1 - won)
    return {pair: sum(w) / len(w) for pair, w in wins.items()}


def ranked_by_score(sets, loaded, args):
    """Bradley-Terry models score each candidate once. The standard error is that of the mean over
    several models; one model is a function, without a spread to see: null."""
    items = [{"id": s["id"], "task": s["task"], "prompt": s["prompt"], **(
        {"media": [c], "response": None} if s["task"].endswith("generation") else
        {"media": s["media"], "response": c})} for s in sets for c in s["candidates"]]
    each = torch.tensor([bt_reward.score_texts(*judge, items, args.batch_size, "scoring")
                         for judge in loaded], dtype=torch.float64)               # [models, items]
    for scores in each.split([len(s["candidates"]) for s in sets], 1):
        errors = chances(scores).std(0) / math.sqrt(len(each)) if len(each) > 1 else None
        n = scores.shape[1]
        yield chances(scores.mean(0)).tolist(), [None] * n if errors is None else errors.tolist(), n


def rank_candidates(args):
    device = common.start_processes()
    sets = read_candidates(args.rank)
    loaded = load_judge(args.model, args, device)
    out = args.out and str(Path(args.out).with_suffix(".judged.jsonl"))
    lines = []
    for s, (rewards, errors, n) in zip(sets, ranked_by_score(sets, loaded, args) if is_reward_model(
            args.model[0]) else ranked_pairwise(sets, loaded, args, out)):
        best_first = sorted(range(len(rewards)), key=lambda c: (  # equal: as in the file
            rewards[c] is None, -(rewards[c] or 0)))              # never judged: last
        lines.append({"id": s["id"], "rewards": rewards, "standard_errors": errors,
                      "ranking": best_first, "best": best_first[0], "judgements": n})
    if common.rank() == 0:
        print(f"{args.rank}: {len(lines)} sets, {sum(r['judgements'] for r in lines)} judgements")
        if args.out:
            common.write_lines(args.out, lines)
        else:
            print("\n".join(map(json.dumps, lines)))
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
.two {{ display: flex; gap: 1em }} .two > div {{ flex: 1; min-width: 0 }} img {{ max-width: 100% }}
.flip {{ background: #ffe9b8 }} .wrong {{ background: #ffd5d0 }} .right {{ background: #ddf3dd }}
</style></head><body><h1>{title}</h1>
"""
INKS = ("#1f77b4", "#d62728", "#2ca02c", "#9467bd", "#ff7f0e", "#17becf")


def esc(x):
    return html.escape(str(x), quote=True)


def line_chart(title, lines, width=320, height=180):
    """{name: [(x, y)]} -> SVG"""
    lines = {n: [p for p in some if isinstance(p[1], (int, float)) and math.isfinite(p[1])]
             for n, some in lines.items()}
    xs, ys = ([p[k] for some in lines.values() for p in some] for k in (0, 1))
    if not xs:
        return ""
    to_x = lambda x: 45 + (width - 55) * (x - min(xs)) / (max(xs) - min(xs) or 1)
    to_y = lambda y: height - 20 - (height - 40) * (y - min(ys)) / (max(ys) - min(ys) or 1)
    words = [(45, 12, title, "#000"), (2, 24, f"{max(ys):.3g}", "#000"), (2, height - 16,
             f"{min(ys):.3g}", "#000"), (45, height - 4, f"{min(xs):g} to {max(xs):g}", "#000")]
    out = ""
    for n, (name, some) in enumerate(lines.items()):
        ink, path = INKS[n % len(INKS)], " ".join(f"{to_x(x):.1f},{to_y(y):.1f}" for x, y in some)
        out += f'<polyline points="{path}" fill="none" stroke="{ink}"/>'
        words.append((60, 26 + 12 * n, name, ink))
    out += "".join(f'<text x="{x}" y="{y}" font-size="11" fill="{ink}">{esc(word)}</text>'
                   for x, y, word, ink in words)
    return f'<svg width="{width}" height="{height}">{out}</svg>'


def learning_curves(folders):
    """One picture a figure of metrics.jsonl, one line a run."""
    runs = {f: common.whole_lines(Path(f, "metrics.jsonl")) for f in folders}
    return "".join(line_chart(name, {f: [(s["step"], s[name]) for s in steps if name in s]
                                     for f, steps in runs.items()})
                   for name in ("reward", "rewards/accuracy/mean", "loss", "kl", "entropy",
                                "share_a", "completions/mean_length", "grad_norm"))


def picture(path, video):
    """An image, or four frames of a video, as small JPEGs inside the page."""
    try:
        images = common.open_video(path, 4) if video else [common.open_image(path)]
    except BadRow as e:
        return f"<p>[{esc(e)}]</p>"
    out = ""
    for image in images:
        image.thumbnail((360, 360))
        image.convert("RGB").save(buffer := io.BytesIO(), "JPEG", quality=80)
        data = base64.b64encode(buffer.getvalue()).decode()
        out += f'<img alt="" src="data:image/jpeg;base64,{data}">'
    return out


def judged_row(row, x, preds, flipped):
    """One row, folded: what was asked, both candidates, every answer and its verdict."""
    media = [picture(m, row["task"].startswith("video")) for m in row["media"]]
    shown = [f"<pre>{esc(t)}</pre>" for t in row["responses"] or ()]
    shown, media = (shown, "".join(media)) if shown else (media or ["", ""], "")
    kind = "flip" if flipped else "right" if x == 1 else "wrong"
    says = " ".join(str(p["pred"]) for p in preds) or "nothing"
    return (f'<details class="{kind}"><summary>{kind}: {esc(row["id"])}, {esc(place_of(row))}, '
            f'label {esc(row["label"])}, says {esc(says)}: {x:.2f} points</summary>'
            f'<pre>{esc(row["prompt"])}</pre>{media}<div class="two">'
            + "".join(f"<div><b>{side}</b>{t}</div>" for side, t in zip("AB", shown)) + "</div>"
            + "".join(f"<p>order {esc(p['order'])}, sample {esc(p['sample'])}: "
                      f"<b>{esc(p['pred'])}</b></p><pre>{esc(p.get('text') or '')}</pre>"
                      for p in preds) + "</details>\n")


def write_report(path, title, results, rows, x, preds, runs, limit):
    """Rows: flips first, then what was wrong, then the rest; at most `limit`."""
    by_row = [[] for _ in rows]
    for p in preds:
        by_row[p["at"]].append(p)
    page = HEAD.format(title=esc(title))
    for name, result in results.items():
        cells = [(f"<th>{esc(c)}</th>", f"<td>{v}</td>", f"<td>{n}</td>")
                 for c, v, n in columns_of(result)]
        lines = "<tr>".join(map("".join, zip(*cells)))
        page += f"<h2>{esc(name)}</h2><table><tr>{lines}</table><p>" + ", ".join(
            f"{esc(k.replace('_', ' '))} {esc(result[k])}" for k in (
                "interval", "order_flips", "share_a", "unparsable", "missing", "soft")
        if k in result)
        page += "</p>" + line_chart("accuracy against the number of votes", {
            f"{c}@k": [(int(k), v) for k, v in result.get(c, {}).items()] for c in ("vote", "any")})
    page += "<h2>Learning curves</h2>" * bool(runs) + learning_curves(runs)
    said = [[majority([p["pred"] for p in some if p["order"] == o]) for o in ("AB", "BA")]
            for some in by_row]
    flips = [len(a) == len(b) == 1 and a != b for a, b in said]
    order = sorted((k for k, r in enumerate(rows) if r["label"]),
                   key=lambda k: (not flips[k], x[k]))
    page += f"<h2>Rows: flips and failures first, {min(limit, len(order))} of {len(order)}</h2>\n"
    page += "".join(judged_row(rows[k], x[k], by_row[k], flips[k]) for k in order[:limit])
    Path(path).write_text(page + "</body></html>\n", "utf-8", errors="replace")


# ==================================================================================================
# 6. Command line

def main():
    args = arguments()
    for path in filter(None, (args.out, args.report)):
        check_writable(path)
    if args.table:
        return table(args)
    args.style = args.style or (common.trained_style(args.model[0]) if args.model else "msrl")
    if args.rank:
        return rank_candidates(args)
    device = common.start_processes()
    if args.attempts:
        return attempts(args, device)
    media = "all" if args.model else args.report and "if there"
    rows = read_benchmark(args.benchmark, args.data, args.split, media, args.skip_bad_rows)
    if args.score:
        files = {f: read_predictions(f, rows) for f in args.score}
    else:
        files = {", ".join(args.model): judged(args, load_judge(args.model, args, device), rows,
                                               args.out)}
    if common.rank() == 0:
        finish(args, rows, files)
    common.end_processes()


def attempts(args, device):
    """R1-Reward's difficulty: preference rows with "attempts", the number of sampled answers until
    one is right, and K + 1 if none of K is (for --min_attempts of the stages). The order shown is a
    coin. DEVIATION: R1-Reward samples at temperature 0, where a second try is the first."""
    model, encoder = common.load(args.model[0], device, frames=args.frames,
                                 max_tiles=args.max_tiles, style=args.style)
    rows = common.load_rows(args.data, encoder, args.form, args.max_prompt_tokens,
                            args.skip_bad_rows)

    def needed(some):
        shown = [common.swap(r) if common.coin("attempts", args.seed, r["id"]) else r for r in some]
        preds = common.judge(model, encoder, shown, sample_group, args.form, args.attempts,
                             args.temperature, args.max_new_tokens, args.batch_size, args.seed,
                             orders=("AB",), desc="attempts")
        right = [p["pred"] == shown[p["row"]]["label"] for p in preds]
        return [[*right[k:k + args.attempts], True].index(True) + 1
                for k in range(0, len(right), args.attempts)]
    made_by = {k: getattr(args, k) for k in ("attempts", "temperature", "max_new_tokens", "seed",
                                             "form", "style", "batch_size", "frames", "max_tiles")}
    counts = common.resumed(Path(args.out).with_suffix(".attempts.jsonl"), {
        **made_by, "model": common.stamps(*args.model)}, rows, needed, chunk=8 * args.batch_size)
    rows = [{**row, "attempts": n, "media": [os.path.abspath(m) for m in row["media"]]}
            for row, n in zip(rows, counts)]
    if common.rank() == 0:
        common.write_lines(args.out, rows)
        print(f"{args.out}: attempts needed " + ", ".join(
            f"{n}: {c} rows" for n, c in sorted(Counter(r["attempts"] for r in rows).items())))
    common.end_processes()


def finish(args, rows, files):
    """Score, print, write the page. files: {name: predictions}, one, or two to compare."""
    results, xs = {}, []
    for name, preds in files.items():
        results[name], x = score(rows, preds, args.benchmark, args.style)
        xs.append(x)
        if args.grouping == "all" and args.benchmark == "vl_rewardbench":
            results[name]["groupings"] = {g: regrouped(rows, x, f) for g, f in GROUPINGS.items()}
        show(f"{name} on {args.data}", results[name])
    result = results[name]
    if len(xs) == 2:
        result = {**compare(rows, *xs), **dict(zip(("first", "second"), results.values()))}
        print("first - second: {difference:+.1%} [{low:+.1%}, {high:+.1%}]; rows that the first "
              "judges better {first_better}, the second {second_better}; McNemar p {mcnemar_p:.3g}"
              .format(low=result["interval"][0], high=result["interval"][1], **result))
    if args.report:
        write_report(args.report, f"{args.benchmark}: {args.data}", results, rows, xs[0],
                     next(iter(files.values())), args.runs, args.report_rows)
    if args.json:
        what = {k: getattr(args, k) for k in ("benchmark", "data", "votes", "form", "style")}
        print(json.dumps({**result, "model": ", ".join(files), **what}))


def regrouped(rows, x, group):
    parts = by([{"part": group(r["id"])} for r in rows], range(len(rows)), "part")
    groups = {g: mean(rows, x, some) for g, some in parts.items()}
    return {"macro": sum(groups.values()) / len(groups), "groups": groups,
            "group_n": {g: len(some) for g, some in parts.items()}}


def table(args):
    """Markdown: one line a checkpoint, one column a task; accuracy over both orders, per cent."""
    device, style = common.start_processes(), args.style
    lines = [["checkpoint", *(t.replace("_", " ") for t in common.TASKS)],
             ["---"] + ["--:"] * len(common.TASKS)]
    for folder in args.table:
        if not Path(folder, "config.json").is_file():
            print(f"{folder}: no checkpoint, left out", file=sys.stderr)
            continue
        args.model, args.style = [folder], style or common.trained_style(folder)
        loaded, cells = load_judge(args.model, args, device), []
        for task in common.TASKS:
            if task != "text" and loaded[0][1].image_token_id is None and args.form == "pixels":
                cells.append("-")  # a text-only model
                continue
            args.data = str(Path(args.toy, f"heldout_{task}.jsonl"))
            rows = read_benchmark("rows", args.data, skip_bad_rows=args.skip_bad_rows)
            cells.append(f"{100 * score(rows, judged(args, loaded, rows))[0]['overall']:.1f}")
        lines.append([folder, *cells])
    if common.rank() == 0:
        print("\n" + "\n".join("| " + " | ".join(line) + " |" for line in lines))
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
    add("--model", action="append", help="checkpoint folder or hub id of a judge that writes its "
        "verdict, or a bt_reward.py checkpoint; several of the latter are averaged")
    add("--data", help="a benchmark as published, as a file, a folder or a hub id; or preference "
        "rows: .jsonl, or a training set that common.py knows, several separated by commas")
    add("--benchmark", choices=list(BENCHMARKS), default="rows", help="what --data is")
    add("--split", help="of a hub id or a folder of parquet files. GenAI-Bench: test_v1 (official, "
        "default) or test (larger, UnifiedReward's)")
    add("--grouping", choices=["official", "all"], default="official", help="VL-RewardBench: 'all' "
        "also prints the two wrong groupings of public code, under which papers report")
    add("--score", nargs="+", metavar="PREDS", help="score this file of predictions, without a "
        'model; of two, also compare. A line: {"id", "pred": "A"|"B"|null}, optionally "row" (the '
        'index in the data file, needed where ids repeat), "order", "sample", "score_a", '
        '"score_b"; GenAI-Bench: also "tie", "bothbad"; RM-Bench: {"id", "i", "j", "pred"}, or '
        'scores {"id", "chosen": [3], "rejected": [3]}')
    add("--rank", metavar="CANDIDATES", help='lines of {"id", "prompt", "media", "candidates": '
        "[...]}: reward each candidate, in [0, 1] with a standard error")
    add("--rounds", type=int, help="--rank: opponents a candidate meets, in both orders; default "
        "all (BaseReward, appendix C). Of 8: 8 judgements a round, 56 in all")
    add("--aggregate", choices=["win_rate", "bradley_terry"], default="win_rate", help="--rank: "
        "'bradley_terry' allows for whom a candidate met, which matters with few --rounds")
    add("--form", choices=["pixels", "caption"], default="pixels",
        help="show images and videos, or their captions instead")
    add("--style", choices=["msrl", "r1"], help="prompt and answer: A/B (MSRL, Figures 4-7), or "
        "1/2 (R1-Reward, Table 1); default: the one the judge was trained with, else msrl")
    add("--votes", type=int, default=1, help="K sampled answers an order, majority wins (paper: "
        "voting@16), with vote@k and any@k for k = 1..K; 1 = one greedy answer")
    add("--attempts", type=int, default=0, metavar="K", help="write --data to --out with the "
        "number of sampled answers until one is right, K + 1 if none of K is (R1-Reward: 3)")
    add("--temperature", type=float, default=1.0, help="of the K sampled answers")
    add("--max_new_tokens", type=int, default=160, help="paper: 1024")
    add("--max_prompt_tokens", type=int, default=16_384, help="longer prompts are not judged, "
        "which counts as wrong; never cut")
    add("--frames", type=int, default=8, help="frames a video (the paper's: 8)")
    add("--max_tiles", type=int, default=12, help="tiles an image (InternVL: 12)")
    add("--batch_size", type=int, default=64, help="prompts decoded together")
    add("--seed", type=int, default=0, help="of the sampled answers and of --rounds")
    add("--skip_bad_rows", action="store_true", help="malformed preference rows are left out; rows "
        "that cannot be shown (a broken image...) count as wrong. Both are printed")
    add("--out", help="predictions or rankings, .jsonl. The same command goes on from what is "
        "there; nothing is judged twice")
    add("--json", action="store_true", help="print one JSON object last")
    add("--report", metavar="PAGE.html", help="write one self-contained page: table, curves, and "
        "rows with pictures and answers, flips and failures first")
    add("--report_rows", type=int, default=200, help="rows on that page")
    add("--runs", nargs="+", default=[], help="run folders whose learning curves go on that page")
    add("--table", nargs="+", metavar="CHECKPOINT", help="print a table of checkpoints by the five "
        "tasks' held-out rows in --toy, and stop")
    add("--toy", default="toy", help="folder of heldout_<task>.jsonl for --table")
    args = parser.parse_args()
    if not (args.table or args.rank and args.model or args.data and (args.model or args.score)):
        parser.error("give --model and --data, --score and --data, --model and --rank, or --table; "
                     "see --help")
    if min(args.votes, args.batch_size, args.max_new_tokens, args.rounds or 1) < 1:
        parser.error("--votes, --batch_size, --max_new_tokens and --rounds must be at least 1")
    if args.score and args.skip_bad_rows:
        parser.error("--score needs every row: \"row\" counts them all")
    if args.attempts and not (args.model and args.data and args.out):
        parser.error("--attempts needs --model, --data and --out")
    if len(args.score or ()) > 2:
        parser.error("--score takes one file, or two to compare")
    return args


if __name__ == "__main__":
    main()
