"""
Score, judge, rank: the field's benchmarks by explicit rules, with or without a model.

    python eval.py --model runs/stage1_text_grpo --data toy/heldout_text.jsonl [--votes 8]
    python eval.py --model hub/id --benchmark vl_rewardbench --data folder/ --out preds.jsonl
    python eval.py --score preds.jsonl --benchmark vl_rewardbench --data data.json --json
    python eval.py --score ours.jsonl theirs.jsonl --benchmark rm_bench --data total_dataset.json
    python eval.py --model runs/stage1_text_grpo --rank candidates.jsonl --rounds 2 --out best.jsonl
    python eval.py --api http://host:8000/v1 --model served-name --data ...   # see api.py
    python eval.py --table runs/*                    # checkpoints by tasks, as a Markdown table

The rules, the same for every benchmark:
  order       a model judges every row as A, B and as B, A; a row counts the mean over its orders,
              so a judge that always says "A" gets exactly 50 %.
  frame       `pred` is in the data row's own frame, whatever was shown: A is the first response,
              left image, Output1, path_A, and `chosen` where a row has chosen and rejected.
  no verdict  an unparsable answer (pred null), a row without any prediction, and equal scores are
              wrong; none is left out or replaced by a coin.
  votes       the majority of the verdicts of an order; a tied vote counts one half.
  best of 4   RewardBench 2: the chosen response meets each rejected one. A question earns 1 if it
              beats them all, 1 / (1 + k) if k of them tie with it (equal scores; a judge of pairs
              that says one thing in one order and another in the other), and 0 if one beats it.
  interval    95 %, Wilson's, on the effective number of independent questions: rows that share one,
              and unequal weights, make it smaller than n.
"""

import json
import math
import os
import random
import re
import statistics
import sys
from collections import Counter
from dataclasses import asdict, dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Literal

import torch
from tqdm import tqdm

import api
import bt_reward
import common
import report
from common import BadRow, knob, majority
from data import (
    BENCHMARKS, GROUPINGS, file_rows, find_medium, grouped, load_rows, media_roots, read_benchmark)
from stage1_text_grpo import sample_group

# ==================================================================================================
# 1. Predictions. A row is a preference row with "row", its index in the data file; "label"; "part",
# its column, and "also", another one; "weight", 0 where it does not count; "cluster", the question
# it belongs to; "i" and "j", which pair it is where a row of the file holds several. A prediction
# is one verdict on one row: "pred", "order" ("AB" or "BA"), "sample" (which vote of that order),
# and "at", the place of its row in the list of rows.

TIES = ("tie", "bothbad", "same")
ALSO = ("safety/bias", "safety/toxicity", "no tie", "easy", "normal", "hard")  # row["also"]
BAD_SCORES = ("has scores that are no numbers, only one of the two, or not one for each response "
              "of the row")


def key_of(row):
    """What a prediction is about; i, j: which of the row's chosen and of its rejected responses
    (RM-Bench, RewardBench 2)."""
    return row["row"], row.get("i"), row.get("j")


def places_of(rows):
    """-> {key_of(row): its place in the list}"""
    return {key_of(row): at for at, row in enumerate(rows)}


def read_predictions(path, rows):
    """A prediction file -> predictions, each with "at", the place of its row in `rows`. Raises
    SystemExit, with file and line, at a prediction that is malformed or does not fit one row."""
    places = places_of(rows)
    rows_with = {}  # id -> indices in the data file
    for row in rows:
        rows_with.setdefault(row["id"], set()).add(row["row"])
    preds, first_seen = [], {}
    for where, line in file_rows(Path(path)):
        try:
            for pred in predictions_in(line):
                locate(pred, rows_with, places)
                key = pred["at"], pred["order"], pred["sample"]
                if key in first_seen:
                    raise BadRow(f"is a second verdict on what {first_seen[key]} judges; number "
                                 "the votes of an order in 'sample'")
                first_seen[key] = where
                preds.append(pred)
        except (BadRow, TypeError) as e:
            raise SystemExit(f"{where}: prediction {e}.") from None
    if not preds:
        raise SystemExit(f"{path}: holds no predictions.")
    return preds


def predictions_in(line):
    """One line of a prediction file -> its predictions: one for each pair where it has the scores
    of all chosen and rejected responses, else one. Raises BadRow."""
    if isinstance(line, BadRow):  # file_rows() found no JSON there
        raise line
    if not isinstance(line, dict):
        raise BadRow("is not a JSON object")
    pred = {**line, "order": line.get("order") or "AB", "sample": line.get("sample") or 0}
    if "chosen" not in pred or "pred" in pred:
        return [checked(pred)]
    chosen, rejected = pred.pop("chosen"), pred.pop("rejected", None)
    pairs = []
    for scores in (chosen, rejected):
        if not isinstance(scores, list) or not scores or None in scores:
            raise BadRow(BAD_SCORES)
    for i, score_a in enumerate(chosen):
        for j, score_b in enumerate(rejected):
            pair = {"i": i, "j": j, "score_a": score_a, "score_b": score_b}
            pairs.append(checked({**pred, **pair, "shape": (len(chosen), len(rejected))}))
    return pairs


def checked(pred):
    """-> the prediction; its scores decide where it names no verdict. Raises BadRow."""
    if pred.get("score_a") is not None:
        try:
            a, b = float(pred["score_a"]), float(pred["score_b"])
        except (KeyError, TypeError, ValueError):
            raise BadRow(BAD_SCORES) from None
        if not math.isfinite(a + b):
            raise BadRow(BAD_SCORES)
        pred = {"pred": larger(a, b), **pred, "score_a": a, "score_b": b}
    verdict = pred.get("pred", "missing")
    if verdict not in ("A", "B", *TIES, None):
        raise BadRow(f"has pred {verdict!r}; write 'A', 'B' or null (also 'tie', 'bothbad' for "
                     "GenAI-Bench), or score_a and score_b")
    if pred["order"] not in ("AB", "BA"):
        raise BadRow(f"has order {pred['order']!r}, which is neither 'AB' nor 'BA'")
    return pred


def locate(pred, rows_with, places):
    """Find the row of a prediction and store its place as "at". Raises BadRow unless one fits."""
    fits = rows_with.get(str(pred.get("id")), set())
    if pred.get("row") is not None:
        fits = fits & {pred["row"]}
    if len(fits) != 1:
        raise BadRow(f"with id {pred.get('id')!r}, row {pred.get('row')} fits {len(fits)} rows of "
                     '--data; where ids repeat, "row" is their index there')
    pred["row"], = fits
    if "shape" in pred:  # scores of all responses: are there as many as the row has?
        n_chosen, n_rejected = pred.pop("shape")
        beyond = [(pred["row"], n_chosen, 0), (pred["row"], 0, n_rejected)]
        last = pred["row"], n_chosen - 1, n_rejected - 1
        if last not in places or any(key in places for key in beyond):
            raise BadRow(BAD_SCORES)
    if (pred["row"], None, None) in places:  # not RM-Bench: a user's own "i" means nothing here
        pred.pop("i", None)
        pred.pop("j", None)
    if key_of(pred) not in places:
        raise BadRow("needs 'i' and 'j' of a pair of its row, or 'chosen' and 'rejected' scores")
    pred["at"] = places[key_of(pred)]


# ==================================================================================================
# 2. Scoring. A scored row also has "orders" {order: its predictions}, "earned" {order: points},
# "points", their mean, from 0 to 1, "margin", "soft" and "flip".

def scored_rows(rows, preds):
    """Rows and predictions -> scored rows, in the same order"""
    scored = []
    for row, orders in zip(rows, common.by_row(rows, preds), strict=True):
        scored.append({**row, "orders": orders, "earned": {}})
    for row in scored:
        winners = []
        for order, answers in row["orders"].items():
            winners.append(majority([pred["pred"] for pred in answers]))
            row["earned"][order] = vote_points(row["label"], winners[-1])
        row["points"] = average(row["earned"].values())
        row["margin"] = margin(sum(row["orders"].values(), []))
        row["soft"] = soft_points(row["label"], row["margin"])
        row["flip"] = None  # unless both orders have one verdict
        if len(winners) == 2 and len(winners[0]) == len(winners[1]) == 1:
            row["flip"] = winners[0] != winners[1]
    return scored


def score_statistics(rows):
    """BaseReward's Table 13: mean and standard deviation of the scores of the better and of the
    worse candidates, and the gap of the means, over rows with scores. UNSPECIFIED: n - 1 divides
    the squares."""
    better, worse = [], []
    for row in rows:
        preds = [p for p in sum(row["orders"].values(), []) if p.get("score_a") is not None]
        if preds and row["label"] in ("A", "B"):
            a, b = [average([pred[side] for pred in preds]) for side in ("score_a", "score_b")]
            better.append(a if row["label"] == "A" else b)
            worse.append(b if row["label"] == "A" else a)
    figures = {"gap": average(better) - average(worse)}
    for name, values in (("better", better), ("worse", worse)):
        figures[name] = average(values)
        figures[f"{name}_std"] = statistics.stdev(values) if len(values) > 1 else 0.0
    return figures


def larger(a, b):
    """Strictly: equal scores are no verdict, and so count as wrong."""
    if a == b:
        return None
    return "A" if a > b else "B"


def agrees(verdict, label):
    """GenAI-Bench: 'tie' is [[A=B=Good]], 'bothbad' [[A=B=Bad]], and 'same' an unspecified tie that
    its script accepts for either. VideoGen-RewardBench knows only 'same'."""
    if verdict in TIES and label in TIES and "same" in (verdict, label):
        return True
    return verdict == label


def vote_points(label, winners):
    """What one order of a row earns: 1, 0, or a share where several verdicts win the vote."""
    named = {label if agrees(verdict, label) else verdict for verdict in winners}
    return 1 / len(named) if label in named else 0.0


def margin(preds):
    """Mean of score_a - score_b over both orders and all votes; None without scores. With answer
    tokens' probabilities its sign is the soft vote."""
    differences = []
    for pred in preds:
        if pred.get("score_a") is not None:
            differences.append(pred["score_a"] - pred["score_b"])
    return average(differences) if differences else None


def soft_points(label, difference):
    """What a row earns if the sign of its margin is its verdict: 1, 0, or 0.5 at equal scores."""
    if difference is None or label not in ("A", "B"):
        return 0.0
    if abs(difference) < 1e-9:
        return 0.5
    return float(larger(difference, 0) == label)


def average(values):
    """The plain mean; 0 of nothing"""
    return sum(values) / len(values) if values else 0.0


def mean(rows, figure="points"):
    """The mean of a figure of scored rows, each with its weight; 0 of nothing"""
    total = weighted = 0
    for row in rows:
        total += row["weight"]
        weighted += row["weight"] * row[figure]
    return weighted / total if total else 0.0


def column(rows):
    """-> (accuracy, rows of the data file)"""
    return mean(rows), len({row["row"] for row in rows})


def score(rows, preds, benchmark="rows", style="msrl"):
    """Predictions as of read_predictions() -> the result as --json prints it, figures as shares of
    1, and the scored rows. Raises SystemExit if no row counts."""
    scored = scored_rows(rows, preds)
    if benchmark == "rewardbench2":
        earn_by_question(scored)
    counted = [row for row in scored if row["weight"] > 0]
    if not counted:
        raise SystemExit("no row of --data has a label that counts.")
    overall, n = column(counted)
    columns = {part: column(some) for part, some in grouped(counted, "part").items()}
    macro = average_column(columns.values())[0] if columns else overall
    also = grouped(counted, "also")
    for name in ALSO:
        if name in also:
            columns[name] = column(also[name])
    columns |= more_columns(benchmark, columns, scored, preds)
    result = {"overall": overall, "macro": macro, "n": n, "accuracy": overall,
              "interval": common.wilson(min(max(overall, 0), 1), effective_n(counted)),
              "missing": len([row for row in counted if not row["orders"]]),
              **by_name(columns),
              **common.habits([row["orders"] for row in scored], style)}
    pairs_stand_alone = benchmark != "rewardbench2"  # there questions do
    if pairs_stand_alone and any(pred.get("score_a") is not None for pred in preds):
        result["soft"] = mean(counted, "soft")
        result["scores"] = score_statistics(counted)
    votes = max(Counter([(pred["at"], pred["order"]) for pred in preds]).values())
    ties = any(pred["pred"] in TIES for pred in preds)  # the curves' sums know two verdicts
    if votes > 1 and pairs_stand_alone and not ties:
        result |= vote_curves(counted, votes)
    if benchmark == "rm_bench":  # [3][3], down: the style of the chosen, across: of the rejected
        result["matrix"] = []
        for _, chosen in sorted(grouped(counted, "i").items()):
            cells = sorted(grouped(chosen, "j").items())
            result["matrix"].append([mean(cell) for _, cell in cells])
    return result, scored


def by_name(columns):
    """{name: (accuracy, n)} -> the two as --json prints them, each by name"""
    by_name = {"groups": {}, "group_n": {}}
    for name, (accuracy, n) in columns.items():
        by_name["groups"][name] = accuracy
        by_name["group_n"][name] = n
    return by_name


# ------------------------------------------------------------------------- intervals and comparison
def question_totals(rows, values):
    """values [rows] times the rows' weights, added up -> one number per question"""
    totals = {}
    for row, value in zip(rows, values, strict=True):
        totals[row["cluster"]] = totals.get(row["cluster"], 0) + row["weight"] * value
    return list(totals.values())


def sum_of_squares(values):
    return sum([value ** 2 for value in values])


def effective_n(rows):
    """How many independent questions would give the figure's variance: that of the questions'
    totals around it, because rows of one question are not independent. Never more than Kish's
    (sum w)^2 / sum w^2, which is n for equal weights; without a variance, Kish's over questions."""
    accuracy, weights = mean(rows), [row["weight"] for row in rows]
    deviations = [row["points"] - accuracy for row in rows]
    variance = sum_of_squares(question_totals(rows, deviations)) / sum(weights) ** 2
    if variance < 1e-12 or not 0 < accuracy < 1:  # the Ties score can be 1.01
        return sum(weights) ** 2 / sum_of_squares(question_totals(rows, [1] * len(rows)))
    kish = sum(weights) ** 2 / sum_of_squares(weights)
    return min(kish, accuracy * (1 - accuracy) / variance)


def compare(first, second):
    """Two judges' scored rows, paired, because both judged the same rows. -> the difference first -
    second, its 95 % interval from the spread of the questions' differences, and the exact p of a
    sign test over questions: of those on which one judge has more points than the other, half are
    the first's if the two are equal. With one row a question this is McNemar's test; rows that
    share a question are right or wrong together, and counted singly they would be no coins."""
    rows = []
    for a, b in zip(first, second, strict=True):
        if a["weight"] > 0:
            rows.append({**a, "difference": a["points"] - b["points"]})
    first_better = second_better = 0
    for more_points in question_totals(rows, [row["difference"] for row in rows]):
        first_better += more_points > 1e-9  # 0.1 + 0.2 - 0.3 is not 0
        second_better += more_points < -1e-9
    difference = mean(rows, "difference")
    deviations = [row["difference"] - difference for row in rows]
    totals = question_totals(rows, deviations)
    n = len(totals)
    spread = sum_of_squares(totals) * n / max(1, n - 1)
    half = 1.96 * math.sqrt(spread) / sum([row["weight"] for row in rows])
    unequal = first_better + second_better
    ways = tail = 1  # each binomial coefficient from the last: exact, and fast for 20,000 rows
    for i in range(min(first_better, second_better)):
        ways = ways * (unequal - i) // (i + 1)
        tail += ways
    return {"difference": difference, "interval": [difference - half, difference + half],
            "first_better": first_better, "second_better": second_better, "n": len(rows),
            "questions": n, "sign_test_p": min(1.0, 2 * tail / 2 ** unequal)}


# ------------------------------------------------------------------------ more votes, more correct?
def vote_curves(rows, samples):
    """vote@k and any@k for k = 1..K samples: not one draw of k, but the mean over all subsets of k
    of an order's K samples. A sample that is missing votes for nobody."""
    curves = {"vote": {}, "any": {}}
    for k in range(1, samples + 1):
        for row in rows:
            row["vote"] = row["any"] = 0.0
            for preds in row["orders"].values():
                right = sum([agrees(pred["pred"], row["label"]) for pred in preds])
                wrong = sum([pred["pred"] is not None for pred in preds]) - right
                row["vote"] += vote_at(right, wrong, samples, k) / len(row["orders"])
                row["any"] += any_at(right, wrong, samples, k) / len(row["orders"])
        for name, curve in curves.items():
            curve[str(k)] = mean(rows, name)
    return curves


@lru_cache(maxsize=None)
def vote_at(right, wrong, samples, k):
    """The chance that k of the samples have more right verdicts than wrong ones; equally many count
    half (if there are any): a sum over the hypergeometric distribution."""
    won = 0
    for n_right in range(1, min(right, k) + 1):
        for n_wrong in range(min(wrong, n_right, k - n_right) + 1):
            ways = math.comb(right, n_right) * math.comb(wrong, n_wrong)
            ways *= math.comb(samples - right - wrong, k - n_right - n_wrong)
            won += ways / 2 if n_right == n_wrong else ways
    return won / math.comb(samples, k)


def any_at(right, wrong, samples, k):
    """The chance that at least one of k of the samples is right."""
    return 1 - math.comb(samples - right, k) / math.comb(samples, k)


# --------------------------------------------------------------------- columns of single benchmarks
def more_columns(benchmark, columns, scored, preds):
    """What a benchmark's own table has besides the `columns` that its rows name.
    -> {name: (accuracy, n)}"""
    if benchmark in ("genai_image", "genai_video"):  # 4-way: official; 3-way: UnifiedReward's
        merged = []  # all ties are one
        for pred in preds:
            merged.append({**pred, "pred": "same"} if pred["pred"] in TIES else pred)
        named = [row for row in scored if row["label"] in ("A", "B")]
        return {"4-way": column(scored), "3-way": column(scored_rows(scored, merged)),
                "no tie": column(named)}
    if benchmark == "videogen_rewardbench":
        labelled = [row for row in scored if row["label"]]
        return {"with ties": (with_ties(labelled), len(labelled))}
    if benchmark == "mm_rlhf_rewardbench":
        prompts = grouped(scored, "cluster").values()
        return {"Acc+": (average([all_right(prompt) for prompt in prompts]), len(prompts))}
    if benchmark == "multimodal_rewardbench":  # MSRL's Table 2: plain means of columns
        other = columns_named(columns, "correctness", "preference", "math", "coding")
        four = columns_named(columns, "knowledge", "safety", "vqa")
        if other:
            four.append(average_column(other))
        return {"MSRL other": average_column(other), "MSRL avg.": average_column(four)}
    if benchmark.startswith("mmrb2"):  # its compute_accuracy.py pools the verdicts of both orders
        right = []
        for pred in preds:
            if pred["pred"] is not None:
                right.append(pred["pred"] == scored[pred["at"]]["label"])
        return {"official, without null verdicts": (average(right), len(right))}
    return {}


def earn_by_question(scored):
    """RewardBench 2: every pair of a question earns what the question earns."""
    for question in grouped(scored, "cluster").values():
        earned = ties_points(question) if question[0]["part"] == "Ties" else best_of(question)
        for row in question:
            row["points"] = earned


def best_of(pairs):
    """The chosen response against each rejected one -> 1 / (number tied at the maximum) if it is at
    the maximum, else 0. A pair without a verdict is lost."""
    at_maximum = 1
    for row in pairs:
        equal_scores = row["points"] == 0 and row["margin"] == 0
        if equal_scores or row["points"] == 0.5:
            at_maximum += 1
        elif row["points"] < 0.5:
            return 0.0
    return 1 / at_maximum


def ties_points(pairs):
    """The pairs of one question of Ties, of its rows "ref:n" (one correct answer) and "tied:n"
    (many) -> what it adds to the Ties score, at most 1.01; the score is the mean over questions."""
    gaps, spread = {}, 0.0
    for kind in ("ref", "tied"):
        correct, wrong = ratings([row for row in pairs if row["id"].startswith(kind)])
        gaps[kind] = -math.inf
        if correct:
            gaps[kind] = min(correct) - max(wrong)
            spread = max(correct) - min(correct)  # that of "tied" stays
    smaller = min(gaps.values())
    points = 0.3 * (gaps["tied"] > 1e-9) + 0.3 * (gaps["ref"] > 1e-9)
    points += 0.2 * (gaps["tied"] > spread + 1e-9) + 0.2 * (smaller > spread + 1e-9)
    # UNSPECIFIED: without a spread the quotient is infinite; 0 / 0 counts 0 here
    if spread > 1e-9:
        return points + 0.01 * math.tanh(smaller / spread - 1)
    return points + 0.01 * ((smaller > 1e-9) - (smaller < -1e-9))


def ratings(pairs):
    """Pairs of one row of Ties -> a rating of each correct answer and of each wrong one: its score.
    UNSPECIFIED: a judge of pairs rates an answer by the (soft) share of its pairs that it won. Two
    empty lists if a pair has no prediction."""
    correct, wrong = {}, {}
    for row in pairs:
        if not row["orders"]:
            return [], []
        for pred in sum(row["orders"].values(), []):
            a, b = pred.get("score_a"), pred.get("score_b")
            if a is None:  # no verdict: lost
                a, b = (1, 0) if pred["pred"] == "A" else (0, 1)
            correct.setdefault(row["i"], []).append(a)
            wrong.setdefault(row["j"], []).append(b)
    return list(map(average, correct.values())), list(map(average, wrong.values()))


def all_right(prompt):
    """Acc+ of one prompt: are all its pairs right? Each order is one pass over the benchmark, and
    the passes are averaged. A pair that was judged in one order only is the same in both."""
    both_passes = 0
    for order in ("AB", "BA"):
        both_passes += math.prod([row["earned"].get(order, row["points"]) for row in prompt])
    return both_passes / 2


def with_ties(rows):
    """VideoGen-RewardBench's 3-class accuracy: scores with the best of all thresholds below which a
    difference is a tie ("Ties Matter", algorithm 1), and a row without a score is wrong; if no row
    has one, verdicts A, B, same as they are."""
    with_scores = [row for row in rows if row["margin"] is not None]
    if not with_scores:
        return average([row["points"] for row in rows])
    right, gain = 0, Counter()  # gain: |difference| -> right rows won if it becomes a tie
    for row in with_scores:
        right_without = row["label"] == (larger(row["margin"], 0) or "same")
        right += right_without
        gain[abs(row["margin"])] += (row["label"] == "same") - right_without
    best = right
    for size in sorted(gain):  # the threshold rises past one difference after the other
        right += gain[size]
        best = max(best, right)
    return best / len(rows)


def columns_named(columns, *names):
    return [columns[name] for name in names if name in columns]


def average_column(columns):
    """Columns (accuracy, n) -> their plain mean and all their rows"""
    accuracies = [accuracy for accuracy, n in columns]
    return average(accuracies), sum([n for accuracy, n in columns])


# ---------------------------------------------------------------------------------- printed figures
def columns_of(result):
    """-> [(name, per cent, n)] of the columns of the benchmark's table"""
    columns = [("overall", f"{100 * result['overall']:.1f}", result["n"]),
               ("macro", f"{100 * result['macro']:.1f}", "")]
    for name, accuracy in result["groups"].items():
        columns.append((name, f"{100 * accuracy:.1f}", result["group_n"][name]))
    return columns


def show(title, result):
    """Print the figures of score(), the columns as a Markdown table."""
    print(common.show(title, result))
    if result["missing"]:
        print(f"  {result['missing']} without a prediction, counted as wrong")
    names, accuracies, sizes = zip(*columns_of(result), strict=True)
    print("| |", " | ".join(names), "|")
    print("|---|", " | ".join(["--:"] * len(names)), "|")
    print("| accuracy |", " | ".join(accuracies), "|")
    print("| n |", " | ".join(map(str, sizes)), "|")
    if "soft" in result:
        print(f"soft votes (mean probability of the answer, or score): {result['soft']:.1%}")
        scores = result["scores"]
        print(f"scores: better {scores['better']:.3g} (standard deviation "
              f"{scores['better_std']:.3g}), worse {scores['worse']:.3g} "
              f"({scores['worse_std']:.3g}), gap {scores['gap']:.3g}")
    for name in ("vote", "any"):
        if name in result:
            print(", ".join([f"{name}@{k} {share:.1%}" for k, share in result[name].items()]))
    for line in result.get("matrix", ()):
        print("  chosen style (down) against rejected style (across): "
              + "  ".join([f"{accuracy:6.1%}" for accuracy in line]))
    for name, other in result.get("groupings", {}).items():
        groups = [f"{group} {accuracy:.1%} (n {other['group_n'][group]})"
                  for group, accuracy in other["groups"].items()]
        print(f"grouping {name}: macro {other['macro']:.1%}, {', '.join(groups)}")


# ==================================================================================================
# 3. Judging with a model: one that writes a verdict, or Bradley-Terry reward models.

def place_of(row):
    """What of a prediction tells its row in the data file"""
    return {key: row[key] for key in ("row", "i", "j") if key in row}


def reward_scores(loaded, rows, args):
    """-> predictions of Bradley-Terry models; the scores of several are averaged with the weights
    of --ensemble. Each response is scored alone (a pair of media in both orders, their mean), so
    there is one order."""
    totals = torch.zeros(len(rows), 2, dtype=torch.float64)
    weights = ensemble_weights(args.model, args.ensemble)
    for (model, encoder), weight in zip(loaded, weights, strict=True):
        scores = bt_reward.score_rows(model, encoder, rows, args.batch_size, "scoring")
        totals += weight * torch.tensor(scores, dtype=torch.float64)
    preds = []
    for at, (a, b) in enumerate((totals / sum(weights)).tolist()):
        preds.append({"id": rows[at]["id"], "at": at, "order": "AB", "sample": 0,
                      "pred": larger(a, b), "score_a": a, "score_b": b})
    return preds


def ensemble_weights(folders, ensemble):
    """BaseReward's ensembles (appendix B, Table 7) -> one weight for each reward model: 1, or its
    accuracy or its mean margin (chosen - rejected) on the held-out rows it was trained beside.
    UNSPECIFIED: scores enter on their own scales. DEVIATION: the paper takes one validation set of
    1,000 rows for all models; each checkpoint's own --heldout counts here. Raises SystemExit."""
    if ensemble == "mean" or len(folders) == 1:
        return [1.0] * len(folders)
    figure = {"accuracy": "accuracy", "confidence": "margin"}[ensemble]
    weights = []
    for folder in folders:
        after = (common.stage_of(folder).get("heldout") or {}).get("after") or {}
        weights.append(after.get(figure, 0.0))
        if weights[-1] <= 0:
            raise SystemExit(f"{folder}/stage.json: has no held-out {figure} above 0 to weigh the "
                             "model by; train it with --heldout, or take --ensemble mean.")
    return weights


def is_reward_model(folder):
    return common.stage_of(folder).get("stage") == "bt_reward"


def load_judge(folders, args, device):
    """-> [(model, encoder)], one, or several Bradley-Terry models. Raises SystemExit."""
    sees = {"frames": args.frames, "max_tiles": args.max_tiles}
    writers = [folder for folder in folders if not is_reward_model(folder)]
    if args.api and writers:
        return [(None, api.Served(args.api, folders[0], args.style, args.frames,
                                  args.api_workers))]
    if not writers:
        return [bt_reward.load(folder, device, **sees) for folder in folders]
    if len(folders) > 1:
        raise SystemExit("several --model are averaged if all are Bradley-Terry models; these "
                         f"are not: {', '.join(writers)}.")
    return [common.load(folders[0], device, made_by="runs/stage1_text_grpo", **sees,
                        style=args.style)]


def fit_to_judge(rows, loaded, args):
    """-> the rows that a model is to judge, checked, with the length of their prompts in "tokens".
    Ties are not shown to a judge whose prompt knows A and B; scores have use for them, as
    thresholds. What cannot be shown is left out, so it counts as wrong. Raises SystemExit at a bad
    row without --skip_bad_rows, and if no row is left."""
    fit, bad, too_long = [], Counter(), 0
    model, encoder = loaded[0]
    scored = is_reward_model(args.model[0])
    labels = ("A", "B", *TIES) if scored else ("A", "B")
    labelled = [row for row in rows if row["label"] in labels]
    for row in tqdm(labelled, desc="reading prompts", unit=" rows", disable=common.rank() > 0,
                    mininterval=1, leave=False):
        try:
            fitting = common.check_row({**row, "label": "A"}, "", encoder.forbidden)
            fitting["label"] = row["label"]  # check_row() knows no ties
            if scored:
                fitting["tokens"] = bt_reward.measure(fitting, encoder, model.settings)
            else:
                fitting["tokens"] = encoder.check(fitting, args.form)
        except BadRow as e:
            if not args.skip_bad_rows:
                raise SystemExit(f"{args.data or args.rank}, row {row['row']} ({row['id']}): {e}.\n"
                                 "Mend it, or pass --skip_bad_rows to count such rows as wrong."
                                 ) from None
            bad[str(e)[:60]] += 1
            continue
        if fitting["tokens"] > args.max_prompt_tokens:
            too_long += 1
        else:
            fit.append(fitting)
    if (bad or too_long) and common.rank() == 0:
        print(f"not judged: {bad.total()} bad rows {dict(bad.most_common(5))}, {too_long} prompts "
              f"over {args.max_prompt_tokens} tokens")
    if not fit:
        raise SystemExit("no row can be judged.")
    return fit


# What may change between a killed run and the next: it says what becomes of the predictions.
MAY_CHANGE = ("out", "json", "report", "report_rows", "runs", "batch_size", "aggregate", "grouping",
              "score", "table", "toy", "api_workers", "media_root")


def written_verdicts(loaded, rows, args, votes, orders, desc, **more):
    """-> predictions of a judge that writes its verdict, loaded or served"""
    model, encoder = loaded[0]
    if args.api:
        return api.judge(encoder, rows, args, votes, orders, desc)
    return common.judge(model, encoder, rows, sample_group, args.form, votes, args.temperature,
                        args.max_new_tokens, args.batch_size, args.seed, orders=orders, desc=desc,
                        **more)


def judge_rows(loaded, rows, args, out=None, orders=("AB", "BA")):
    """-> predictions, each with what tells its row in the data file. They go to the file `out`;
    what is judged is in a file beside it as soon as it is, and is not judged again."""
    rows = sorted(rows, key=lambda row: row["tokens"])  # alike lengths together: less padding
    reward_model = is_reward_model(args.model[0])
    chunk = args.batch_size * common.world()  # whole batches for every process, also of two orders
    if reward_model:
        chunk = 16 * args.batch_size  # they make batches of their own

    def work(batch, at):
        if reward_model:
            preds = reward_scores(loaded, batch, args)
        else:
            preds = written_verdicts(loaded, batch, args, args.votes, orders,
                                     None if out else "judging", scores=True,
                                     first_batch=at * len(orders) // args.batch_size)
        of_row = [[] for _ in batch]
        for pred in preds:
            place = pred.pop("at")
            of_row[place].append({**pred, **place_of(batch[place])})
        return of_row

    if out:
        progress = progress_file(out)
        if args.api:
            loaded[0][1].keep_answers(progress)
        judged = common.resumed(progress, settings_of(args), rows, work, chunk, "judging")
    else:
        judged = work(rows, 0)
    preds = sum(judged, [])
    api.print_failures(preds)
    preds.sort(key=lambda p: (p["row"], p.get("i", 0), p.get("j", 0), p["order"], p["sample"]))
    if out and common.rank() == 0:
        common.write_lines(out, preds)
    return preds


def progress_file(out):
    """The file beside `out` that a killed run goes on from. Refuses an `out` that has none."""
    progress = Path(out).with_suffix(".progress.jsonl")
    if Path(out).exists() and not progress.exists():
        raise SystemExit(f"{out} exists, but no {progress.name} that tells how it was made. Take "
                         "another --out, or delete it.")
    return progress


def settings_of(args):
    """What predictions depend on. The same names may hold other files by now, or a judge that was
    trained further."""
    settings = {name: value for name, value in asdict(args).items() if name not in MAY_CHANGE}
    files = [path for path in (args.data, args.rank, *args.model) if path]
    return {**settings, "files": common.stamps(*files)}


def predictions_of(loaded, rows, args, out=None):
    """-> predictions of a judge, with "at", as score() takes them"""
    places, preds = places_of(rows), []
    for pred in judge_rows(loaded, fit_to_judge(rows, loaded, args), args, out):
        if key_of(pred) in places:
            preds.append({**pred, "at": places[key_of(pred)]})
    return preds


# ==================================================================================================
# 4. Ranking: a reward in [0, 1] for each of n candidates.

def read_candidates(path, media_root=""):
    """-> [{"id", "task", "prompt", "media", "candidates", "row"}]. The candidates of a *_generation
    task are paths. Raises SystemExit at a line that is none."""
    sets, folder, roots = [], Path(path).parent, media_roots(path, media_root)
    for where, line in file_rows(Path(path)):
        try:
            task = line.get("task") or guessed_task(line.get("media"))
            candidates = line["candidates"]
            if len(candidates) < 2:
                raise KeyError
            if task.endswith("generation"):
                candidates = [find_medium(file, folder, roots) for file in candidates]
            media = [find_medium(medium, folder, roots) for medium in line.get("media") or ()]
            sets.append({"id": line["id"], "task": task, "prompt": line["prompt"],
                         "row": len(sets), "media": media, "candidates": candidates})
        except BadRow as e:
            raise SystemExit(f"{where}: {e}.") from None
        except (AttributeError, KeyError, TypeError):
            raise SystemExit(f'{where}: needs "id", "prompt", "candidates" (two texts or paths, or '
                             'more) and, for images and videos, "media": [paths].') from None
    if not sets:
        raise SystemExit(f"{path}: no candidates.")
    return sets


def guessed_task(media):
    """Text without media, else understanding of what the first path's suffix names."""
    if not media:
        return "text"
    if media[0].lower().endswith((".png", ".jpg", ".jpeg", ".webp")):
        return "image_understanding"
    return "video_understanding"


def schedule(n, rounds, rng):
    """Pairs of n candidates. Without `rounds` each meets each. With: in every round each meets
    another opponent, drawn at random (for odd n one sits out): the circle method on a shuffled
    order, which never repeats a pair. -> [(i, j)], i < j"""
    circle = rng.sample(range(n), n)
    if n % 2:
        circle.append(None)  # whoever meets it sits out
    pairs = []
    for _ in range(min(rounds or n, len(circle) - 1)):
        for place in range(len(circle) // 2):
            pair = circle[place], circle[-1 - place]
            if None not in pair:
                pairs.append((min(pair), max(pair)))
        circle = [circle[0], circle[-1], *circle[1:-1]]
    return pairs


def win_rates(n, games):
    """games [(i, j, i's share of wins)] -> rewards [n] and their standard errors [n]. The opponents
    are the sample (both orders of a pair are one): the mean of what i won, and the standard
    deviation of Beta(1 + won, 1 + lost), which is not 0 after three wins of three."""
    won, met = [0.0] * n, [0] * n
    for i, j, share in games:
        won[i] += share
        won[j] += 1 - share
        met[i] += 1
        met[j] += 1
    rewards, errors = [], []
    for wins, opponents in zip(won, met, strict=True):
        rewards.append(wins / opponents if opponents else 0.5)
        a, b = 1 + wins, 1 + opponents - wins
        errors.append(math.sqrt(a * b / (a + b + 1)) / (a + b))
    return rewards, errors


def bradley_terry(n, games, prior=0.1):
    """games [(i, j, i's share of wins)] -> rewards [n] and their standard errors [n], from
    log-strengths s with P(i beats j) = sigmoid(s_i - s_j) (Eq. 1), by Newton's method; `prior` is
    the precision of a normal around 0, without which a candidate that won all would run away.
    The reward allows for whom i happened to meet; after a full round robin it is the win rate (but
    for the prior). Standard errors from the inverse Hessian."""
    s = torch.zeros(n, dtype=torch.float64)
    won = torch.tensor([share for i, j, share in games], dtype=torch.float64)     # [games]
    sides = torch.zeros(len(games), n, dtype=torch.float64)                       # [games, n]
    for game, (i, j, _) in enumerate(games):
        sides[game, i] = 1.0
        sides[game, j] = -1.0
    for _ in range(100):
        p = torch.sigmoid(sides @ s)
        hessian = sides.T @ ((p * (1 - p))[:, None] * sides) + prior * torch.eye(n)
        step = torch.linalg.solve(hessian, sides.T @ (won - p) - prior * s)
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
    """Every pair is judged in both orders (BaseReward, appendix C: all 56 ordered pairs of 8).
    -> for each set: rewards [n] and standard errors [n], None for who met nobody; judgements"""
    pairs, rows = [], []  # [sets] pairs; rows: two orders of each pair
    for candidates in sets:
        rng = random.Random(f"{args.seed}:{candidates['row']}")
        pairs.append(schedule(len(candidates["candidates"]), args.rounds, rng))
        for i, j in pairs[-1]:
            rows.append(pair_row(candidates, i, j))
            rows.append(pair_row(candidates, j, i))
    shares = shares_of(judge_rows(loaded, fit_to_judge(rows, loaded, args), args, out, ("AB",)))
    aggregate = win_rates if args.aggregate == "win_rate" else bradley_terry
    for candidates, its_pairs in zip(sets, pairs, strict=True):
        games, met = [], set()
        for i, j in its_pairs:
            share = shares.get((candidates["row"], i, j))
            if share is not None:
                games.append((i, j, share))
                met |= {i, j}
        rewards, errors = aggregate(len(candidates["candidates"]), games)
        for candidate in range(len(rewards)):
            if candidate not in met:
                rewards[candidate] = errors[candidate] = None
        yield rewards, errors, 2 * len(games) * args.votes


def pair_row(candidates, i, j):
    """-> the row that shows candidate i as A and candidate j as B"""
    pair = [candidates["candidates"][i], candidates["candidates"][j]]
    key = "media" if candidates["task"].endswith("generation") else "responses"
    return {**candidates, "id": str(candidates["id"]), "i": i, "j": j, "label": "A", key: pair}


def shares_of(preds):
    """-> {(set, i, j), i < j: i's share of the verdicts of the pair}. No verdict: half to each
    (UNSPECIFIED)."""
    wins = {}
    for pred in preds:
        i, j = pred["i"], pred["j"]
        won = {"A": 1.0, "B": 0.0, None: 0.5}[pred["pred"]]
        if i > j:
            i, j, won = j, i, 1 - won
        wins.setdefault((pred["row"], i, j), []).append(won)
    return {pair: average(won) for pair, won in wins.items()}


def ranked_by_score(sets, loaded, args):
    """Bradley-Terry models score each candidate once. The standard error is that of the mean over
    several models; one model is a function, without a spread to see: None. -> as above"""
    items = []
    for candidates in sets:
        item = {key: candidates[key] for key in ("id", "task", "prompt", "media")}
        for candidate in candidates["candidates"]:
            if item["task"].endswith("generation"):
                items.append({**item, "media": [candidate], "response": None})
            else:
                items.append({**item, "response": candidate})
    scores = [bt_reward.score_texts(model, encoder, items, args.batch_size, "scoring")
              for model, encoder in loaded]
    scores = torch.tensor(scores, dtype=torch.float64)                            # [models, items]
    weights = torch.tensor(ensemble_weights(args.model, args.ensemble), dtype=torch.float64)
    sizes = [len(candidates["candidates"]) for candidates in sets]
    for of_set in scores.split(sizes, 1):                                         # [models, n]
        rewards = chances(weights @ of_set / weights.sum()).tolist()
        errors = [None] * len(rewards)
        if len(loaded) > 1:
            errors = (chances(of_set).std(0) / math.sqrt(len(loaded))).tolist()
        yield rewards, errors, len(rewards)


def rank_candidates(args):
    """--rank: print or write one line per set of candidates."""
    device = common.start_processes()
    sets = read_candidates(args.rank, args.media_root)
    loaded = load_judge(args.model, args, device)
    if is_reward_model(args.model[0]):
        ranked = ranked_by_score(sets, loaded, args)
    else:
        judged = Path(args.out).with_suffix(".judged.jsonl") if args.out else None
        ranked = ranked_pairwise(sets, loaded, args, judged)
    lines, total = [], 0
    for candidates, (rewards, errors, n) in zip(sets, ranked, strict=True):
        known = [-1 if reward is None else reward for reward in rewards]  # never judged: last
        ranking = sorted(range(len(known)), key=known.__getitem__, reverse=True)  # equal: in order
        lines.append({"id": candidates["id"], "rewards": rewards, "standard_errors": errors,
                      "ranking": ranking, "best": ranking[0], "judgements": n})
        total += n
    if common.rank() == 0:
        print(f"{args.rank}: {len(lines)} sets, {total} judgements")
        if args.out:
            common.write_lines(args.out, lines)
        else:
            print("\n".join(map(json.dumps, lines)))
    common.end_processes()


# ==================================================================================================
# 5. Command line

@dataclass
class Config:
    # what to judge, score or rank
    model: list[str] = knob([], "checkpoint folder or hub id of a judge that writes its verdict, "
                            "or a bt_reward.py checkpoint; several of the latter are averaged",
                            action="extend")
    api: str | None = knob(None, "ask an OpenAI-compatible server, which serves --model under this "
                           "name; its key, if it wants one, is in OPENAI_API_KEY", metavar="URL")
    api_workers: int = knob(8, "--api: requests at a time")
    ensemble: Literal["mean", "accuracy", "confidence"] = knob(
        "mean", "weights of several reward models' scores: equal, or by the accuracy or the mean "
        "margin on held-out rows in their stage.json (BaseReward, Table 7)")
    data: str | None = knob(None, "a benchmark as published, as a file, a folder or a hub id; or "
                            "preference rows: .jsonl, or a training set that common.py knows, "
                            "several separated by commas")
    benchmark: Literal[tuple(BENCHMARKS)] = knob("rows", "what --data is")
    split: str | None = knob(None, "of a hub id or a folder of parquet files. GenAI-Bench: test_v1 "
                             "(official, default) or test (larger, UnifiedReward's)")
    score: list[str] = knob(
        [], 'score this file of predictions, without a model; of two, also compare. A line: {"id", '
        '"pred": "A"|"B"|null}, optionally "row" (the index in the data file, needed where ids '
        'repeat), "order", "sample", "score_a", "score_b"; GenAI-Bench: also "tie", "bothbad"; '
        'RM-Bench, RewardBench 2: {"id", "i", "j", "pred"} for each pair, or the scores of all '
        'responses {"id", "chosen": [...], "rejected": [...]}',
        metavar="PREDS")
    table: list[str] = knob([], "print a table of checkpoints by the five tasks' held-out rows in "
                            "--toy, and stop", metavar="CHECKPOINT")
    toy: str = knob("toy", "folder of heldout_<task>.jsonl for --table")
    rows: int = knob(100, "--table: held-out rows per task, each in both orders; 0 = all of them")
    media_root: str = knob("", "folders, separated by commas, where rows' media may lie, too; else "
                           "in that of their file")
    skip_bad_rows: bool = knob(False, "malformed preference rows are left out; rows that cannot be "
                               "shown (a broken image...) count as wrong. Both are printed")

    # how a row is shown to the judge
    form: Literal["pixels", "caption"] = knob("pixels", "show images and videos, or their captions "
                                              "instead")
    style: Literal["msrl", "caption", "r1"] | None = knob(
        None, "prompt and answer: A/B (MSRL, Figures 4-7; 'caption': with the <caption> first), or "
        "1/2 (R1-Reward, Table 1); default: the one the judge was trained with, else msrl")
    max_prompt_tokens: int = knob(16_384, "longer prompts are not judged, which counts as wrong; "
                                  "never cut")
    frames: int | None = knob(None, "frames per video; default: those that a reward model was "
                              "trained with, 8 for a judge (the paper's)")
    max_tiles: int | None = knob(None, "tiles per image; default: as above, 12 (InternVL's)")

    # sampling and votes
    votes: int = knob(1, "K sampled answers per order, majority wins (paper: voting@16), with "
                      "vote@k and any@k for k = 1..K; 1 = one greedy answer")
    attempts: int = knob(0, "write --data to --out with the number of sampled answers until one is "
                         "right, K + 1 if none of K is (R1-Reward: 3), and the first right one's "
                         "reasoning as rationale, for stage 0", metavar="K")
    temperature: float = knob(1.0, "of the K sampled answers")
    max_new_tokens: int | None = knob(None, "default: what the judge was trained with, by its "
                                      "stage.json, else 1024 (paper)")
    batch_size: int = knob(64, "prompts decoded together")
    seed: int = knob(0, "of the sampled answers and of --rounds")

    # ranking
    rank: str | None = knob(None, 'lines of {"id", "prompt", "media", "candidates": [...]}: reward '
                            "each candidate, in [0, 1] with a standard error", metavar="CANDIDATES")
    rounds: int | None = knob(None, "--rank: opponents a candidate meets, in both orders; default "
                              "all (BaseReward, appendix C). Of 8: 8 judgements per round, 56 in "
                              "all")
    aggregate: Literal["win_rate", "bradley_terry"] = knob(
        "win_rate", "--rank: 'bradley_terry' allows for whom a candidate met, which matters with "
        "few --rounds")

    # output and page
    out: str | None = knob(None, "predictions or rankings, .jsonl. The same command goes on from "
                           "what is there; nothing is judged twice")
    json: bool = knob(False, "print one JSON object last")
    grouping: Literal["official", "all"] = knob(
        "official", "VL-RewardBench: 'all' also prints the two wrong groupings of public code, "
        "under which papers report")
    report: str | None = knob(None, "write one self-contained page: tables, and rows with pictures "
                              "and answers, flips and failures first", metavar="PAGE.html")
    report_rows: int = knob(200, "rows on that page")
    runs: list[str] = knob([], "run folders whose groups and learning curves go on that page")

    def check(self):
        with_data = self.data and (self.model or self.score)
        if not (self.table or with_data or self.rank and self.model):
            raise ValueError("give --model and --data, --score and --data, --model and --rank, or "
                             "--table; see --help")
        if self.votes < 1 or (self.rounds or 1) < 1:
            raise ValueError("--votes and --rounds must be at least 1")
        if self.score and self.skip_bad_rows:
            raise ValueError('--score needs every row: "row" counts them all')
        if self.attempts and not (self.model and self.data and self.out):
            raise ValueError("--attempts needs --model, --data and --out")
        if self.api and (not self.api.startswith("http") or len(self.model) != 1 or self.table
                         or self.api_workers < 1 or common.world() > 1):
            raise ValueError("--api takes a URL, http://..., one --model and --api_workers of at "
                             "least 1, and neither --table nor torchrun")
        if len(self.score) > 2:
            raise ValueError("--score takes one file, or two to compare")


def main():
    args = common.parse_config(Config, __doc__)
    for path in filter(None, (args.out, args.report)):
        check_writable(path)
    if args.table:
        return table(args)
    args = as_trained(args)
    if args.rank:
        return rank_candidates(args)
    device = common.start_processes()
    if args.attempts:
        return attempts(args, device)
    media = "if there" if args.report else None
    if args.model:
        media = "all"
    rows = read_benchmark(args.benchmark, args.data, args.split, media, args.skip_bad_rows,
                          args.media_root)
    if args.score:
        files = {path: read_predictions(path, rows) for path in args.score}
    else:
        loaded = load_judge(args.model, args, device)
        files = {", ".join(args.model): predictions_of(loaded, rows, args, args.out)}
    if common.rank() == 0:
        finish(args, rows, files)
    common.end_processes()


def as_trained(args):
    """-> the settings; style and longest answer, if not given, are those the judge was trained
    with."""
    config = common.stage_of(args.model[0]).get("config", {}) if args.model else {}
    style = args.style or config.get("style", "msrl")
    tokens = args.max_new_tokens or config.get("max_new_tokens", 1024)
    return replace(args, style=style, max_new_tokens=tokens)


def finish(args, rows, files):
    """Score, print, write the page. files: {name: predictions}, one, or two to compare."""
    results, judges = {}, []
    for name, preds in files.items():
        result, scored = score(rows, preds, args.benchmark, args.style)
        if args.grouping == "all" and args.benchmark == "vl_rewardbench":
            result["groupings"] = regrouped(scored)
        show(f"{name} on {args.data}", result)
        results[name] = result
        judges.append(scored)
    if len(results) == 2:
        first, second = results.values()
        result = {**compare(*judges), "first": first, "second": second}
        low, high = result["interval"]
        print(f"first - second: {result['difference']:+.1%} [{low:+.1%}, {high:+.1%}]; "
              f"questions that the first judges better {result['first_better']}, the second "
              f"{result['second_better']}; sign test over questions p {result['sign_test_p']:.3g}")
    if args.report:
        sections = [report.groups_section(args.runs)]
        for name, figures in results.items():
            sections.append(report.result_section(name, figures, columns_of(figures)))
        sections.append(report.curves_section(args.runs))
        sections.append(report.rows_section(judges[0], args.report_rows))
        report.write_page(args.report, f"{args.benchmark}: {args.data}", sections)
    if args.json:
        print(json.dumps({**result, "model": ", ".join(files), "benchmark": args.benchmark,
                          "data": args.data, "votes": args.votes, "form": args.form,
                          "style": args.style}))


def regrouped(scored):
    """VL-RewardBench's figures by each of GROUPINGS"""
    groupings = {}
    for name, group_of in GROUPINGS.items():
        for row in scored:
            row["group"] = group_of(row["id"])
        columns = {group: column(rows) for group, rows in grouped(scored, "group").items()}
        macro, _ = average_column(columns.values())
        groupings[name] = {"macro": macro, **by_name(columns)}
    return groupings


def table(args):
    """--table: Markdown, one line per checkpoint, one column per task; accuracy, per cent."""
    device = common.start_processes()
    names = [task.replace("_", " ") for task in common.TASKS]
    lines = [["checkpoint", *names], ["---"] + ["--:"] * len(names)]
    for folder in args.table:
        if not Path(folder, "config.json").is_file():
            print(f"{folder}: no checkpoint, left out", file=sys.stderr)
            continue
        judge = as_trained(replace(args, model=[folder]))
        loaded = load_judge(judge.model, judge, device)
        text_only = loaded[0][1].image_token_id is None and args.form == "pixels"
        cells = []
        for task in common.TASKS:
            if text_only and task != "text":
                cells.append("-")
                continue
            judge.data = str(Path(args.toy, f"heldout_{task}.jsonl"))
            if args.rows:
                judge.data += f":{args.rows}"
            rows = read_benchmark("rows", judge.data, skip_bad_rows=args.skip_bad_rows,
                                  media_root=args.media_root)
            result, _ = score(rows, predictions_of(loaded, rows, judge))
            cells.append(f"{100 * result['overall']:.1f}")
        lines.append([folder, *cells])
    if common.rank() == 0:
        print()
        for line in lines:
            print("| " + " | ".join(line) + " |")
    common.end_processes()


def attempts(args, device):
    """--attempts, R1-Reward's difficulty and cold start: rows with "attempts", how many answers it
    took until one was right, K + 1 if none of K is (for --min_attempts of the stages), and with
    the reasoning of the first right answer as "rationale" (for stage 0). The order shown is a coin;
    a row with a new rationale is written in that order, so that no name in it has to change.
    DEVIATION: R1-Reward samples at temperature 0, where a second try is the first."""
    loaded = load_judge(args.model, args, device)
    encoder = loaded[0][1]
    rows = load_rows(args.data, encoder, args.form, args.max_prompt_tokens,
                     args.skip_bad_rows, args.media_root)

    def as_shown(row):
        return common.swap(row) if common.coin("attempts", args.seed, row["id"]) else row

    def attempts_needed(chunk, at):
        shown = [as_shown(row) for row in chunk]
        preds = written_verdicts(loaded, shown, args, args.attempts, ("AB",), "attempts")
        api.print_failures(preds)
        found = [{"attempts": args.attempts + 1} for _ in chunk]
        for n in reversed(range(len(preds))):  # the first right answer has the last word
            at, attempt = divmod(n, args.attempts)
            if preds[n]["pred"] == shown[at]["label"]:
                found[at]["attempts"] = attempt + 1
                reasoning = reasoning_of(preds[n].get("text") or "", args.style, encoder.forbidden)
                if reasoning:
                    found[at]["rationale"] = reasoning
        return found

    names = ("attempts", "temperature", "max_new_tokens", "seed", "form", "style", "batch_size",
             "frames", "max_tiles", "api")
    made_by = {name: getattr(args, name) for name in names}
    made_by["model"] = common.stamps(*args.model)
    progress = Path(args.out).with_suffix(".attempts.jsonl")
    if args.api:
        encoder.keep_answers(progress)
    answers = common.resumed(progress, made_by, rows, attempts_needed, chunk=8 * args.batch_size)
    written, needed = [], Counter()
    for row, found in zip(rows, answers, strict=True):
        if "rationale" in found:
            row = as_shown(row)
        media = [os.path.abspath(path) for path in row["media"]]
        written.append({**row, **found, "media": media})
        needed[found["attempts"]] += 1
    if common.rank() == 0:
        common.write_lines(args.out, written)
        counts = [f"{n}: {count} rows" for n, count in sorted(needed.items())]
        print(f"{args.out}: attempts needed {', '.join(counts)}")
    common.end_processes()


def reasoning_of(text, style, forbidden):
    """What a well-formed answer thinks, as a rationale that stage 0 can learn, else None. In
    rationales candidates are named A and B, from which stage 0 makes the 1 and 2 of style "r1"."""
    if not common.parse(text, style).well_formed:
        return None
    reasoning = text.partition("<think>")[2].partition("</think>")[0].strip()

    def with_letters(match):
        return re.sub(r"\b[12]\b", lambda side: {"1": "A", "2": "B"}[side[0]], match[0])
    if style == "r1":
        named = r"\b(?i:response|answer|assistant|chatbot)s? [12]\b(?: (?:and|or) [12]\b)?"
        reasoning = re.sub(named, with_letters, reasoning)
    if any(tag in reasoning for tag in forbidden if tag not in ("<type>", "</type>")):
        return None  # the row would be refused
    return reasoning or None


def check_writable(path):
    """Find out now, not after an hour of judging, that a file cannot be written."""
    folder = Path(path).parent
    if not folder.is_dir() or not os.access(folder, os.W_OK) or Path(path).is_dir():
        raise SystemExit(f"{path}: cannot be written; make the folder or choose another --out.")


if __name__ == "__main__":
    main()
