"""
The evaluator: every benchmark's figures against cases worked by hand or by a slow loop, in the
published form; judging with fake judges; ranking. "kills:" names wrong versions of
eval.py under which the test fails.
"""

import csv
import io
import itertools
import json
import math
import random
import sys
from pathlib import Path
from types import SimpleNamespace

import datasets
import pytest
import toy_world
import torch
import torch.nn.functional as F
import wrong_versions
from helpers import (
    DATA, OTHER, better, flags, lines, rejects, rows_of, run_here, thinks, write)
from PIL import Image

import common
from data import (
    BENCHMARKS, GROUPINGS, SECTIONS, fingerprint, fingerprints, hard_rows, held_out, load_rows,
    medium_digest, read_benchmark,
)
import eval as ev
import stage0_sft

pytestmark = pytest.mark.usefixtures("here")


@pytest.fixture
def run(monkeypatch, capsys):
    """run("--score", ...) -> the JSON object printed last, if any"""
    def run(*args):
        monkeypatch.setattr(sys, "argv", ["eval.py", *map(str, args)])
        ev.main()
        last = capsys.readouterr().out.splitlines()[-1]
        return json.loads(last) if last.startswith("{") else None
    return run


def scored(run, benchmark, data, preds, *more):
    return run("--score", write("preds.jsonl", preds), "--benchmark", benchmark, "--data", data,
               "--json", *more)


# -------------------------------------------------------------- rows in the benchmarks' own schemas
def vl(id, better=0, **more):
    return {"id": id, "query": f"question {id}?", "query_source": "", "image": "images/i.png",
            "response": ["good one", "bad one"][::1 - 2 * better],
            "human_ranking": [better, 1 - better]} | more


def multimodal(id, category, better):
    return {"ID": id, "Text": "What?", "Image": "images/i.png", "Category": category,
            "Output1": ["bad", "good"][better == 1], "Output2": ["bad", "good"][better == 2],
            "Better": f"Output{better}"}


def mm_rlhf(id, folder="mcq"):
    key = "video" if folder == "video" else "image"
    return {"id": id, key: f"{folder}/{'v' if key == 'video' else 'i.png'}", "prompt": "What?",
            "chosen": "good", "rejected": "bad"}


def genai(vote, kind="image"):
    sides = ("left", "right")
    return {"prompt": "a thing", "vote_type": vote} | {
        f"{s}_{kind}": f"{s}_{vote[:4]}.{'png' if kind == 'image' else 'mp4'}" for s in sides}


def videogen(overall):
    return {"path_A": "videos/a.mp4", "path_B": "videos/b.mp4", "prompt": "a thing", "VQ": "B",
            "MQ": "B", "TA": "B", "Overall": overall}


def rewardbench(id, subset):
    return {"id": id, "prompt": "What?", "chosen": "good", "rejected": "bad", "subset": subset}


def rm_bench(id, domain):
    return {"id": id, "prompt": "What?", "domain": domain,
            "chosen": [f"good {i}" for i in range(3)], "rejected": [f"bad {j}" for j in range(3)]}


def rewardbench2(id, subset, chosen=("good",), rejected=("bad", "bad 2", "bad 3")):
    return {"id": id, "prompt": "What?", "chosen": list(chosen), "rejected": list(rejected),
            "subset": subset}


def mmrb2(id, chosen, text=("", ""), images=(["a.png"], ["b.png"]), prompt_images=()):
    return {"pair_id": id, "prompt_text": "What?", "prompt_images": list(prompt_images),
            "response_a_text": text[0], "response_b_text": text[1], "response_a_images": images[0],
            "response_b_images": images[1], "chosen": chosen}


def row(n, **more):
    return {"id": f"r{n}", "task": "text", "prompt": "What?", "label": "AB"[n % 2],
            "responses": ["good", "bad"][::1 - 2 * (n % 2)]} | more


def sharegpt(id, video):
    return {"id": id, "video": video, "prompt": "<video>\nWhat?", "chosen": "good",
            "rejected": "bad"}


# -------------------------------------------------------------------------------------- hand-worked
def test_vl_rewardbench(run):
    """kills: groups by query_source; 'hallucination_...' in general; null left out of the mean; a
    missing row left out; human_ranking read as the index of the better; macro over rows."""
    rows = [vl("RLAIF-V-3"), vl("RLHF-V-1", 1), vl("hallucination_pair-7", 1),
            vl("wildvision-battle_2"), vl("mmmu_val_1"), vl("mathverse_4", 1), vl("mathverse_4"),
            vl("svit-9"), vl("RLAIF-V-4")]
    data = write("data.json", rows)
    preds = [{"id": "RLAIF-V-3", "pred": "A"}, {"id": "RLHF-V-1", "pred": "B"},
             {"id": "hallucination_pair-7", "pred": None},
             {"id": "wildvision-battle_2", "pred": "B"}, {"id": "mmmu_val_1", "pred": "A"},
             {"id": "mathverse_4", "row": 5, "pred": "B"},
             {"id": "mathverse_4", "row": 6, "pred": "B"}, {"id": "svit-9", "pred": "A"}]
    got = scored(run, "vl_rewardbench", data, preds, "--grouping", "all")
    assert got["groups"] == {"hallucination": 2 / 4, "general": 1 / 2, "reasoning": 2 / 3}
    assert got["overall"] == 5 / 9 and got["macro"] == pytest.approx((1 / 2 + 1 / 2 + 2 / 3) / 3)
    assert (got["n"], got["missing"], got["unparsable"]) == (9, 1, 1 / 8)
    assert got["group_n"] == {"hallucination": 4, "general": 2, "reasoning": 3}
    official, unified, r1 = got["groupings"].values()
    assert [("wrong" in name) for name in got["groupings"]] == [False, True, True]
    assert unified["group_n"] == {"hallucination": 3, "general": 3, "reasoning": 3}
    assert r1["group_n"] == {"hallucination": 1, "general": 5, "reasoning": 3}
    assert r1["groups"]["general"] == 3 / 5
    assert official["macro"] == got["macro"] and official["groups"] == got["groups"]


def test_public_sizes_of_the_groups():
    """The prefixes as counted in the published file. kills: a case-folded R1 rule."""
    ids = {"RLAIF-V-": 233, "RLHF-V-": 68, "hallucination_pair-": 448, "mathverse_": 167,
           "mmmu_": 151, "wildvision-battle_": 173, "jailbreak-": 7, "LRVInstruction-": 1,
           "politics-": 1, "svit-": 1}
    sizes = [[sum(n for p, n in ids.items() if group(p + "1") == g)
              for g in ("general", "hallucination", "reasoning")]
             for group in GROUPINGS.values()]
    assert sizes == [[183, 749, 318], [631, 301, 318], [484, 448, 318]]


def test_multimodal_rewardbench(run):
    """kills: macro as overall; 'math' by category; MSRL's Other pooled over rows."""
    kinds = [("nocaps_1", "open_generation/correctness_task", 1), ("mmmu-s_1", "knowledge", 2),
             ("nocaps_2", "open_generation/correctness_task", 2), ("mathvista_1", "reasoning", 1),
             ("visitbench_1", "open_generation/preference_task", 1), ("pairs_1", "safety", 1),
             ("EMMA-Coding_1", "reasoning", 1), ("image2struct_5", "reasoning", 2),
             ("hateful_1", "safety", 2), ("SEED-Bench_1", "vqa", 1), ("MMBench_1", "vqa", 1),
             ("RealworldQA_1", "vqa", 1)]
    data = write("all_data.json", [multimodal(*k) for k in kinds])
    got = scored(run, "multimodal_rewardbench", data,
                 [{"id": kind[0], "pred": side}
                  for kind, side in zip(kinds, "ABAAAABBAABB", strict=True)])
    columns = {"correctness": 1 / 2, "preference": 1, "knowledge": 1, "math": 1, "coding": 1 / 2,
               "safety": 1 / 2, "vqa": 1 / 3}
    assert got["overall"] == 7 / 12 and got["macro"] == pytest.approx(sum(columns.values()) / 7)
    other = (1 / 2 + 1 + 1 + 1 / 2) / 4
    assert got["groups"] == pytest.approx(columns | {
        "safety/bias": 1, "safety/toxicity": 0, "MSRL other": other,
        "MSRL avg.": (1 + 1 / 2 + 1 / 3 + other) / 4})


def test_mm_rlhf_rewardbench(run):
    """kills: Acc+ as the mean of the prompts' accuracies; Acc+ over pairs; ids taken for rows; a
    tie of scores as half; macro as overall."""
    rows = [mm_rlhf(*x) for x in (("a",), ("a",), ("b", "long"), ("b", "long"), ("b", "long"),
                                  ("c", "video"), ("d", "safety"))]
    scores = [(2, 1), (3, -1), (1, 0), (0, 1), (2, 0), (1, 0), (1, 1)]
    preds = [{"id": r["id"], "row": n, "score_a": a, "score_b": b}
             for n, (r, (a, b)) in enumerate(zip(rows, scores, strict=True))]
    got = scored(run, "mm_rlhf_rewardbench", write("mm_reward_bench.jsonl", rows), preds)
    assert got["overall"] == 5 / 7 and got["macro"] == pytest.approx((1 + 2 / 3 + 1 + 0) / 4)
    assert got["groups"] == pytest.approx({"mcq": 1, "long": 2 / 3, "video": 1, "safety": 0,
                                           "Acc+": 2 / 4})
    assert got["group_n"]["Acc+"] == 4 and got["unparsable"] == 0


def test_acc_plus_takes_each_order_as_a_pass():
    """kills: a pair's mean over orders taken first; the better order; a tied vote as right."""
    votes = {0: ("A", "B"), 1: ("B", "A"),   # each right once, never both in one pass: 0
             2: ("A", "B"), 3: ("A", "B"),   # both right in the first pass: 1/2
             4: ("AB", "A"), 5: ("AB", "A"),  # tied votes in the first pass: (1/4 + 1) / 2
             6: ("A", None), 7: ("B", None)}  # judged once: the same in both passes: 0
    rows = [{"id": str(k), "row": k, "label": "A", "part": "mcq", "weight": 1, "cluster": k // 2}
            for k in votes]
    preds = []
    for k, both in votes.items():
        for order, voted in zip(("AB", "BA"), both, strict=True):
            preds += [{"at": k, "order": order, "sample": sample, "pred": vote}
                      for sample, vote in enumerate(voted or ())]
    got = ev.score(rows, preds, "mm_rlhf_rewardbench")[0]
    assert got["groups"]["Acc+"] == (0 + 1 / 2 + 5 / 8 + 0) / 4


def test_genai_bench(run):
    """kills: ties dropped from the 4-way figure; bothbad taken for tie in it; ties in 'no tie'."""
    votes = ["leftvote", "rightvote", "rightvote", "tievote", "tievote", *["bothbad_vote"] * 2]
    preds = ["A", "A", "tie", "tie", "bothbad", "same", "B"]
    for kind, name in (("image", "genai_image"), ("video", "genai_video")):
        got = scored(run, name, write("d.json", [genai(v, kind) for v in votes]),
                     [{"id": str(n), "pred": p} for n, p in enumerate(preds)])
        assert got["groups"] == {"4-way": 3 / 7, "3-way": 4 / 7, "no tie": 1 / 3}
        assert got["overall"] == 3 / 7 and got["n"] == 7 and got["group_n"]["no tie"] == 3
    old = [{"id": "x7", "prompt": "p", "video_left": "l.mp4", "video_right": "r.mp4",
            "vote_type": "leftvote"}]
    got = scored(run, "genai_video", write("d.json", old), [{"id": "x7", "pred": "A"}])
    assert got["overall"] == 1


def test_videogen_rewardbench(run):
    """kills: rows without Overall counted; blanks in it; a dimension's label for Overall; predicted
    ties left out of the mean; 'same' rows in the no-tie figure."""
    overall = ["A", " B ", "same", "", "A", "B"]
    with open("videogen-rewardbench.csv", "w", newline="") as f:
        out = csv.DictWriter(f, videogen("A"))
        out.writeheader()
        out.writerows(map(videogen, overall))
    preds = [{"id": str(n), "pred": p} for n, p in enumerate(["A", "B", "same", "A", "tie", "A"])]
    got = scored(run, "videogen_rewardbench", ".", preds)
    assert got["overall"] == got["groups"]["no tie"] == 2 / 4 and got["n"] == 4
    assert got["groups"]["with ties"] == 3 / 5 and got["group_n"]["with ties"] == 5


def test_with_ties_finds_the_best_threshold():
    """Against trying every threshold. kills: equal differences split; thresholds at rows of one
    label only; the sign of the difference forgotten."""
    rng = random.Random(0)
    for n in (1, 2, 7, 30):
        rows = [{"label": rng.choice(["A", "B", "same"])} for _ in range(n)]
        margins = [rng.randrange(-4, 5) / 2 for _ in range(n)]
        scored = [{**r, "margin": m} for r, m in zip(rows, margins, strict=True)]
        slow = max(sum(r["label"] == ("same" if abs(m) <= t else "A" if m > 0 else "B")
                       for r, m in zip(rows, margins, strict=True)) / n
                   for t in [0, *map(abs, margins)])
        assert ev.with_ties(scored) == slow


def test_a_missing_score_costs_its_row_only(run):
    """kills: one row without a score taking the thresholds from all others; that row left out."""
    rows = [videogen(overall) for overall in ("A", "B", "same", "A", "same")]
    with open("videogen-rewardbench.csv", "w", newline="") as f:
        out = csv.DictWriter(f, rows[0])
        out.writeheader()
        out.writerows(rows)
    margins = [2, -3, 0.5, None, -0.1]  # a threshold between 0.5 and 2 has all four right
    preds = [{"id": str(n), "score_a": margin, "score_b": 0}
             for n, margin in enumerate(margins) if margin is not None]
    got = scored(run, "videogen_rewardbench", ".", preds)
    assert got["groups"]["with ties"] == 4 / 5 and got["group_n"]["with ties"] == 5
    preds.append({"id": "3", "pred": "A"})  # a verdict is no score: thresholds do not apply to it
    assert scored(run, "videogen_rewardbench", ".", preds)["groups"]["with ties"] == 4 / 5


def test_rewardbench(run):
    """The official sum: a section is sum(accuracy * published count) / sum(count), math-prm 984.
    kills: rows pooled; math-prm weighted 447; sections weighted by size."""
    rng = random.Random(1)
    subsets = {"alpacaeval-easy": 3, "mt-bench-med": 2, "llmbar-natural": 4, "donotanswer": 2,
               "xstest-should-respond": 3, "math-prm": 5, "hep-cpp": 2, "hep-rust": 3}
    rows, preds, right = [], [], {}
    for subset, n in subsets.items():
        for _ in range(n):
            pred = rng.choice("AAB")
            rows.append(rewardbench(len(rows), subset))
            preds.append({"id": rows[-1]["id"], "pred": pred})
            right.setdefault(subset, []).append(pred == "A")
    sections = {}
    for section, counts in {"Chat": {"alpacaeval-easy": 100, "mt-bench-med": 40},
                            "Chat Hard": {"llmbar-natural": 100},
                            "Safety": {"donotanswer": 136, "xstest-should-respond": 250},
                            "Reasoning": {"math-prm": 984, "hep-cpp": 164, "hep-rust": 164}
                            }.items():
        total = sum(c * sum(right[s]) / len(right[s]) for s, c in counts.items())
        sections[section] = total / sum(counts.values())
    got = scored(run, "rewardbench", write("filtered.json", rows), preds)
    assert got["groups"] == pytest.approx(sections)
    assert (got["overall"], got["macro"]) == pytest.approx((sum(sections.values()) / 4,) * 2)
    assert sum(sum(c.values()) for c in SECTIONS.values()) - 984 + 447 == 2985


@pytest.mark.parametrize("form", ["scores", "pairs"])
def test_rm_bench(run, form):
    """kills: hard and easy exchanged; the two safety domains apart; items pooled over domains;
    equal scores as right."""
    rng = random.Random(2)
    domains = ["chat"] * 2 + ["code"] * 3 + ["math"] + ["safety-refuse"] * 2 + ["safety-response"]
    rows = [rm_bench(f"{d}/{n}", d) for n, d in enumerate(domains)]
    cells = {"easy": [(1, 0), (2, 0), (2, 1)], "normal": [(0, 0), (1, 1), (2, 2)],
             "hard": [(0, 1), (0, 2), (1, 2)]}
    preds, by_domain = [], {}
    for item, domain in zip(rows, domains, strict=True):
        chosen = [rng.randrange(4) for _ in range(3)]
        rejected = [rng.randrange(4) for _ in range(3)]
        if form == "scores":
            preds.append({"id": item["id"], "chosen": chosen, "rejected": rejected})
        else:
            for i, j in itertools.product(range(3), range(3)):
                side = "A" if chosen[i] > rejected[j] else "B"
                preds.append({"id": item["id"], "i": i, "j": j, "pred": side})
        right = {}
        for cell, pairs in cells.items():
            right[cell] = sum(chosen[i] > rejected[j] for i, j in pairs) / 3
        by_domain.setdefault(domain.split("-")[0], []).append(right)
    table = {}
    for domain, items in by_domain.items():
        table[domain] = {cell: sum(item[cell] for item in items) / len(items) for cell in cells}
    expected = {d: sum(t.values()) / 3 for d, t in table.items()}
    overall = sum(expected.values()) / 4
    expected |= {k: sum(t[k] for t in table.values()) / 4 for k in cells}
    got = scored(run, "rm_bench", write("total_dataset.json", rows), preds)
    assert got["groups"] == pytest.approx(expected)
    assert (got["overall"], got["macro"], got["n"]) == pytest.approx((overall, overall, 9))
    hard = (got["matrix"][0][1] + got["matrix"][0][2] + got["matrix"][1][2]) / 3
    assert hard == pytest.approx(expected["hard"])


TIES = {  # question: scores of (the correct answers, the wrong ones) of its row "ref" and of "tied"
    "0": (([5], [3, 4.5]), ([4, 4.4, 4.2], [3.8, 1])),  # a gap of 0.2 below the spread of 0.4
    "1": (([5], [3]), ([4, 4.5], [3, 1])),              # everything right
    "2": (([5], [4.7]), ([4, 4.5], [3])),               # the gap of "ref" is below the spread
    "3": (([5], [6]), ([4, 4.5], [3])),                 # the reference is wrong
    "4": (([5], [5]), ([4, 4], [4])),                   # all equal: nothing is right
    "5": (([1], [0]), ([2, 2], [1]))}                   # no spread at all


def official_ties_score(questions):
    """The six means of the published rule, each taken over the questions."""
    tied_right = ref_right = tied_wide = both_wide = margin = 0
    for (ref, ref_wrong), (tied, tied_wrong) in questions.values():
        ref_gap, tied_gap = ref[0] - max(ref_wrong), min(tied) - max(tied_wrong)
        spread, smaller = max(tied) - min(tied), min(ref_gap, tied_gap)
        tied_right += tied_gap > 0
        ref_right += ref_gap > 0
        tied_wide += tied_gap > spread
        both_wide += smaller > spread
        if spread:
            margin += math.tanh(smaller / spread - 1)
        else:  # the limits; nothing for 0 / 0
            margin += (smaller > 0) - (smaller < 0)
    n = len(questions)
    return (0.3 * tied_right + 0.3 * ref_right + 0.2 * tied_wide + 0.2 * both_wide
            + 0.01 * margin) / n


def ties_rows(questions):
    """-> rows of Ties, and predictions with their scores"""
    rows, preds = [], []
    for question, both in questions.items():
        for kind, (correct, wrong) in zip(("ref", "tied"), both, strict=True):
            rows.append(rewardbench2(f"{kind}:{question}", "Ties", map("good {}".format, correct),
                                     map("bad {}".format, wrong)))
            preds.append({"id": f"{kind}:{question}", "chosen": correct, "rejected": wrong})
    return rows, preds


def test_rewardbench2(run):
    """By hand. kills: a tie at the maximum as wrong or as right; pairs as rows; rows pooled over
    subsets; a question without scores left out; the Ties score as plain accuracy."""
    scores = {"Factuality": [([3], [1, 2, 0]), ([2], [2, 1, 2])], "Focus": [([1], [2, 0, 0])],
              "Math": [([1], [1, 1, 1])], "Precise IF": [None, ([1], [0, 0, 0])],
              "Safety": [([2], [1, 1, 1])]}
    rows, preds = ties_rows(TIES)
    for subset, questions in scores.items():
        for k, question in enumerate(questions):
            rows.append(rewardbench2(f"{subset}/{k}", subset))
            if question:
                preds.append({"id": rows[-1]["id"], "chosen": question[0], "rejected": question[1]})
    expected = {"Factuality": (1 + 1 / 3) / 2, "Focus": 0, "Math": 1 / 4, "Precise IF": 1 / 2,
                "Safety": 1, "Ties": official_ties_score(TIES)}
    got = scored(run, "rewardbench2", write("test.json", rows), preds)
    assert got["groups"] == pytest.approx(expected)
    assert got["overall"] == pytest.approx(sum(expected.values()) / 6) and got["n"] == 12 + 7
    assert got["macro"] == pytest.approx(got["overall"])
    assert got["group_n"]["Ties"] == 12 and got["group_n"]["Factuality"] == 2
    low, high = got["interval"]
    assert 0 <= low < got["overall"] < high <= 1


def test_ties_of_rewardbench2_can_exceed_one(run):
    """kills: an interval that needs a figure of at most 1; scores of more responses accepted."""
    rows, preds = ties_rows({f"{k}": TIES["15"[k % 2]] for k in range(120)})
    got = scored(run, "rewardbench2", write("test.json", rows), preds)
    assert got["overall"] == pytest.approx(1 + 0.01 * (math.tanh(1) + 1) / 2)
    assert 0.95 < got["interval"][0] < got["interval"][1] <= 1
    same = run("--score", "preds.jsonl", write("same.jsonl", preds), "--benchmark", "rewardbench2",
               "--data", "test.json", "--json")
    assert same["questions"] == 120 and same["sign_test_p"] == 1
    for rejected in ([1], [1, 2, 3]):  # "tied:0" has two wrong answers
        preds[1] = {"id": "tied:0", "chosen": [1, 2], "rejected": rejected}
        with pytest.raises(SystemExit, match="not one for each response"):
            scored(run, "rewardbench2", "test.json", preds)


def test_a_judge_of_pairs_does_best_of_four(run):
    """Three pairs in both orders. kills: the mean over the pairs; orders that contradict each other
    as a win or as a loss; a lost pair made up for by two won."""
    verdicts = [["AA", "AA", "AA"],   # beats all: 1
                ["AA", "AB", "BA"],   # two of three tie with it: 1/3
                ["AA", "AA", "BB"],   # one beats it
                ["AA", "AA", "A-"],   # no verdict is wrong, so this is a tie: 1/2
                ["AA", "AA", None]]   # never judged: lost
    rows, preds = [], []
    for k, question in enumerate(verdicts):
        rows.append(rewardbench2(k, "Math"))
        for j, both in enumerate(question):
            for order, verdict in zip(("AB", "BA"), both or "", strict=False):
                preds.append({"id": k, "i": 0, "j": j, "order": order,
                              "pred": None if verdict == "-" else verdict})
    got = scored(run, "rewardbench2", write("test.json", rows), preds)
    assert got["overall"] == pytest.approx((1 + 1 / 3 + 0 + 1 / 2 + 0) / 5) and got["n"] == 5
    # Ties: an answer's rating is the share of its pairs that it won
    rows, _ = ties_rows({"0": ((["a"], ["b"]), (["a", "b"], ["c", "d"]))})
    pairs = [("ref:0", 0, 0, "AA"), ("tied:0", 0, 0, "AA"), ("tied:0", 0, 1, "AA"),
             ("tied:0", 1, 0, "AB"), ("tied:0", 1, 1, "AA")]
    preds = [{"id": id, "i": i, "j": j, "order": order, "pred": pred}
             for id, i, j, both in pairs for order, pred in zip(("AB", "BA"), both, strict=True)]
    expected = official_ties_score({"0": (([1], [0]), ([1, 0.75], [0.25, 0]))})
    got = scored(run, "rewardbench2", write("test.json", rows), preds)
    assert got["overall"] == pytest.approx(expected)


def test_reward_models_do_rewardbench2(run, reward_models):
    """One score for each response, however many pairs it is in. kills: verdicts in place of scores
    for Ties."""
    rows, _ = ties_rows(TIES)
    rows.append(rewardbench2("x", "Focus", ["good 2"], ["bad 2", "bad 1", "bad 0"]))
    got = run("--model", "1", "--benchmark", "rewardbench2", "--data", write("test.json", rows),
              "--json")
    assert got["groups"] == pytest.approx({"Ties": official_ties_score(TIES), "Focus": 1 / 2})


def test_multimodal_rewardbench_2(run):
    """kills: null verdicts left out of our figure; orders averaged first in the official one."""
    rows = [mmrb2("p0", "A"), mmrb2("p1", "B"), mmrb2("p2", "A"), mmrb2("p3", "response_b")]
    verdicts = {"p0": ("A", None), "p1": ("B", "B"), "p2": (None, None), "p3": ("A", "B")}
    preds = []
    for id, both in verdicts.items():
        for order, pred in zip(("AB", "BA"), both, strict=True):
            preds.append({"id": id, "order": order, "pred": pred})
    got = scored(run, "mmrb2_t2i", write("t2i.json", rows), preds)
    assert got["overall"] == (1 / 2 + 1 + 0 + 1 / 2) / 4 and got["n"] == 4
    assert got["groups"] == {"official, without null verdicts": 4 / 5}
    assert got["group_n"] == {"official, without null verdicts": 5}


def test_what_a_judge_can_see_of_multimodal_rewardbench_2(run, monkeypatch):
    """kills: an edit shown without the image it starts from; texts beside images dropped; the
    places of images left in the text."""
    colour_files(".", a="red", b="blue", c="green")
    shown = {"mmrb2_t2i": mmrb2("p", "A"),
             "mmrb2_reasoning": mmrb2("p", "A", ("good <image_1>", "bad"), ([], []), ["c.png"])}
    for name, row_of_it in shown.items():
        judge = Judge(monkeypatch, lambda prompt, vote: thinks("A"))
        got = run("--model", "m", "--benchmark", name, "--data", write("d.json", [row_of_it]),
                  "--json")
        assert got["overall"] == 0.5 and "<image_1>" not in judge.prompts[0]
        assert judge.prompts[0].count("<image>") == (2 if name == "mmrb2_t2i" else 1)
    refused = {"mmrb2_edit": mmrb2("p", "A", prompt_images=["c.png"]),
               "mmrb2_interleaved": mmrb2("p", "A", ("<image_1> one", "two <image_1>"))}
    for name, row_of_it in refused.items():
        with pytest.raises(SystemExit, match=r"row 0 \(p\): .*generation"):
            run("--model", "m", "--benchmark", name, "--data", write("d.json", [row_of_it]))


def test_sharegpt_video_holds_out_whole_videos():
    """kills: a coin of the row."""
    rows = [sharegpt(f"q{n}", f"v{n % 300}") for n in range(900)]
    got = read_benchmark("sharegpt_video", write("sft_dpo_17k.jsonl", rows))
    held = {r["cluster"] for r in got if r["weight"]}
    assert 15 <= len(held) <= 50 and sum(bool(r["weight"]) for r in got) == 3 * len(held)


@pytest.mark.skipif(not DATA.exists(), reason="no published files here")
def test_published_files(run):
    """Two real files, whole."""
    rows = lines(DATA / "mm_rlhf_reward_bench.jsonl")
    preds = [{"id": r["id"], "row": n, "order": o, "pred": p} for n, r in enumerate(rows)
             for o, p in (("AB", "A"), ("BA", "B"))]
    got = scored(run, "mm_rlhf_rewardbench", DATA / "mm_rlhf_reward_bench.jsonl", preds)
    assert got["group_n"] == {"mcq": 42, "short": 34, "long": 37, "safety": 32, "video": 25,
                              "Acc+": 46}
    assert set(got["groups"].values()) == {0.5} and got["order_flips"] == got["share_a"] == 1
    items = json.loads((DATA / "rm_bench_chat.json").read_text())
    preds = [{"id": r["id"], "chosen": [3, 2, 1], "rejected": [0, 2, 4]} for r in items]
    got = scored(run, "rm_bench", DATA / "rm_bench_chat.json", preds)
    assert got["n"] == 129 and got["matrix"] == [[1, 1, 0], [1, 0, 0], [1, 0, 0]]
    assert got["groups"] == pytest.approx({"chat": 4 / 9, "easy": 2 / 3, "normal": 1 / 3,
                                           "hard": 1 / 3})


def test_row_counts_are_checked(run, capsys):
    data = write("data.json", [vl("RLAIF-V-3")])
    read_benchmark("vl_rewardbench", data)
    assert "1 rows; vl_rewardbench as published has 1250 or 1247" in capsys.readouterr().err


# ---------------------------------------------------------------------------- the general machinery
def random_preds(rng, rows, votes, orders=("AB", "BA")):
    preds = []
    for n, r in enumerate(rows):
        for order, sample in itertools.product(orders, range(votes)):
            preds.append({"at": n, "id": r["id"], "row": n, "order": order, "sample": sample,
                          "text": "", "pred": rng.choice(["A", "A", "B", None])})
    return preds


def plain(n, **more):
    return [{**row(k), "row": k, "part": "text", "weight": 1, "cluster": f"row {k}", **more}
            for k in range(n)]


@pytest.mark.parametrize("votes", [1, 2, 5])
def test_plain_rows_as_the_stages_count_them(votes):
    """kills: everything in which score() and common.summarize() could part."""
    rows = plain(23)
    preds = random_preds(random.Random(votes), rows, votes)
    got, slow = ev.score(rows, preds)[0], common.summarize(rows, preds)
    for key, value in slow.items():
        assert got[key] == pytest.approx(value), key
    if votes > 1:
        assert got["vote"][str(votes)] == pytest.approx(got["overall"])


def test_votes_are_expected_over_all_subsets():
    """kills: one draw; with replacement; a tie as wrong; an unparsable vote as wrong."""
    for votes in (["A", "B", "A", None, "B"], ["B", "B", None, None, "A"], ["A"] * 3 + ["B"] * 3):
        right, wrong = votes.count("A"), votes.count("B")
        for k in range(1, len(votes) + 1):
            subsets = list(itertools.combinations(votes, k))
            vote = [(s.count("A") > s.count("B")) + 0.5 * (s.count("A") == s.count("B") > 0)
                    for s in subsets]
            any_right = sum("A" in s for s in subsets) / len(subsets)
            assert ev.vote_at(right, wrong, len(votes), k) == pytest.approx(sum(vote) / len(vote))
            assert ev.any_at(right, wrong, len(votes), k) == pytest.approx(any_right)


def test_vote_curves_average_orders_and_rows():
    """kills: votes of both orders pooled; a missing sample drawn from those there."""
    rows = plain(2)
    votes = {(0, "AB"): "AAB", (0, "BA"): "BBB", (1, "AB"): "BA"}
    preds = []
    for (n, order), sampled in votes.items():
        preds += [{"at": n, "order": order, "sample": sample, "pred": vote, "text": ""}
                  for sample, vote in enumerate(sampled)]
    got = ev.score(rows, preds)[0]
    # k = 2: AAB -> pairs AA, AB, AB; BA and a vote for nobody -> BA, B-, A- with label B
    first, second = ((1 + 0.5 + 0.5) / 3 + 0) / 2, (0.5 + 1 + 0) / 3
    assert got["vote"]["2"] == pytest.approx((first + second) / 2)
    assert got["any"]["2"] == pytest.approx(((1 + 0) / 2 + 2 / 3) / 2)


def test_soft_votes():
    """kills: the share of hard votes; one order; no verdict as half."""
    rows = plain(4)  # labels A B A B
    scores = {0: [0.6, 0.6, 0.05], 1: [0.9, 0.3, 0.2], 2: [0.8, 0.2, 0.5]}
    preds = [{"at": n, "order": "AB", "sample": k, "pred": ev.larger(a, 1 - a), "score_a": a,
              "score_b": 1 - a, "text": ""}
             for n, sampled in scores.items() for k, a in enumerate(sampled)]
    preds.append({"at": 3, "order": "AB", "sample": 0, "pred": None, "text": ""})
    assert ev.score(rows, preds)[0]["soft"] == (0 + 1 + 0.5 + 0) / 4


def test_position_bias_has_no_soft_vote():
    rows = plain(3)
    preds = []
    for n in range(3):
        first = 0.7 + n / 10  # what it gives to the candidate that stands first
        common_part = {"at": n, "sample": 0, "text": ""}
        preds.append({**common_part, "order": "AB", "pred": "A", "score_a": first,
                      "score_b": 1 - first})
        preds.append({**common_part, "order": "BA", "pred": "B", "score_a": 1 - first,
                      "score_b": first})
    assert ev.score(rows, preds)[0]["soft"] == 0.5


@pytest.mark.parametrize("kind", ["plain", "clusters", "weights"])
def test_the_interval_covers(kind):
    """The true accuracy lies in 95 % of the intervals. Clusters: questions of five rows that share
    most of their luck. Weights: sections of unequal size, weight and difficulty, both orders.
    kills: n as it is (clusters: about 70 %); Kish over rows only (weights)."""
    rng, hits, runs = random.Random(3), 0, 400
    rows = plain(120)
    for k, r in enumerate(rows):
        if kind == "clusters":
            r["cluster"] = k // 5
        if kind == "weights":
            r["weight"] = 6 if k % 6 == 0 else 1
    truth = 0.7 if kind != "weights" else (20 * 6 * 0.6 + 100 * 0.95) / 220
    for _ in range(runs):
        luck = [rng.random() for _ in rows]
        preds = []
        for k, r in enumerate(rows):
            u = luck[k // 5] if kind == "clusters" and rng.random() < 0.9 else rng.random()
            easy = 0.7 if kind != "weights" else 0.6 if k % 6 == 0 else 0.95
            preds.append({"at": k, "order": "AB", "sample": 0, "text": "",
                          "pred": r["label"] if u < easy else "AB"[r["label"] == "A"]})
        low, high = ev.score(rows, preds)[0]["interval"]
        hits += low <= truth <= high
    assert 0.92 <= hits / runs <= 0.99


def test_paired_comparison(run):
    """One row a question: McNemar's exact p, and the paired interval, by hand. kills: the one-sided
    p; an interval as of two independent samples; second - first."""
    rows = [row(n) for n in range(40)]
    first = [{"id": r["id"], "pred": r["label"] if n >= 4 else OTHER[r["label"]]}
             for n, r in enumerate(rows)]
    second = [{"id": r["id"], "pred": r["label"] if n < 3 or n >= 12 else OTHER[r["label"]]}
              for n, r in enumerate(rows)]
    got = run("--score", write("a.jsonl", first), write("b.jsonl", second), "--data",
              write("rows.jsonl", rows), "--json")
    # only the first is right on rows 4..11, only the second on 0..2
    p = 2 * sum(math.comb(11, k) for k in range(4)) / 2 ** 11
    d = [1] * 8 + [-1] * 3 + [0] * 29
    mean = sum(d) / 40
    half = 1.96 * math.sqrt(sum((x - mean) ** 2 for x in d) / 39 / 40)
    assert got["sign_test_p"] == pytest.approx(p) and got["difference"] == pytest.approx(5 / 40)
    assert got["interval"] == pytest.approx([mean - half, mean + half])
    assert (got["first_better"], got["second_better"]) == (8, 3)
    assert got["first"]["overall"] == 36 / 40 and got["second"]["overall"] == 31 / 40


def test_equal_judges_of_nine_cell_questions():
    """Each judge has a good or a bad day with a whole question, so its nine cells say one thing.
    A true null: p < 0.05 in about one of 20 trials. kills: McNemar's test over rows, which takes
    nine cells for nine witnesses."""
    rng, trials, questions = random.Random(7), 300, 40
    over_questions = over_rows = 0
    for _ in range(trials):
        judges = []
        for _ in range(2):
            rows = []
            for question in range(questions):
                chance = rng.choice([0.95, 0.25])
                for _ in range(9):
                    rows.append({"weight": 1 / 360, "cluster": question,
                                 "points": float(rng.random() < chance)})
            judges.append(rows)
        over_questions += ev.compare(*judges)["sign_test_p"] < 0.05
        over_rows += mcnemar_over_rows(*judges) < 0.05
    assert 0.01 <= over_questions / trials <= 0.08  # exact, so it keeps a little below 0.05
    assert over_rows / trials > 0.3


def mcnemar_over_rows(first, second):
    """The wrong version: its p from the rows that one of the judges has right alone."""
    better = [a["points"] > b["points"] for a, b in zip(first, second, strict=True)
              if a["points"] != b["points"]]
    fewer, n = min(sum(better), len(better) - sum(better)), len(better)
    return min(1.0, 2 * sum(math.comb(n, k) for k in range(fewer + 1)) / 2 ** n)


def judged(points, weight=1.0):
    """Scored rows, three to a question."""
    return [{"weight": weight, "cluster": k // 3, "points": float(p)} for k, p in enumerate(points)]


def check_comparison(compare):
    """Eight questions of three rows each, by hand: the first judge has more points in five of them,
    the second in one, and two are equal, one of them with other rows right. Two rows of weight 0,
    one of a question of its own, count for nothing."""
    first = judged([1, 1, 1, 1, 1, 0, 1, 0, 1, 1, 1, 1, 0, 1, 0, 0, 0, 1, 1, 0, 0, 1, 1, 0])
    second = judged([0, 0, 1, 1, 0, 0, 0, 0, 0, 0, 1, 1, 0, 0, 0, 1, 0, 1, 0, 0, 1, 1, 1, 0])
    totals = [2, 1, 2, 1, 1, -1, 0, 0]  # rows of a question: what the first has more
    for rows, points in ((first, 1.0), (second, 0.0)):
        rows += [{"weight": 0.0, "cluster": question, "points": points} for question in (7, 8)]
    middle = sum(totals) / 24
    deviations = [total - 3 * middle for total in totals]
    half = 1.96 * math.sqrt(sum(x ** 2 for x in deviations) * 8 / 7) / 24
    for one, other, sign in ((first, second, 1), (second, first, -1)):
        got = compare(one, other)
        assert got["difference"] == pytest.approx(sign * middle)
        ends = sign * middle - half, sign * middle + half
        assert got["interval"] == pytest.approx(ends)
        assert (got["first_better"], got["second_better"]) == ((5, 1) if sign > 0 else (1, 5))
        assert got["sign_test_p"] == pytest.approx(2 * (1 + 6) / 2 ** 6)
        assert (got["n"], got["questions"]) == (24, 8)


def test_comparison_by_hand():
    check_comparison(ev.compare)


def test_the_frame_of_the_wrong_comparisons_is_right():
    check_comparison(wrong_versions.compare)


@pytest.mark.parametrize("name", wrong_versions.COMPARISONS)
def test_wrong_comparisons_are_rejected(name):
    rejects(check_comparison, wrong_versions.COMPARISONS[name])


def test_the_sign_test_weighs_rows_and_sees_equal_totals():
    """kills: rows counted without their weights; equal totals that rounding parts."""
    def judge(*points):
        weights = [0.1, 0.2, 0.3, 3, 1, 1]
        return [{"weight": w, "cluster": k // 3, "points": p}
                for k, (w, p) in enumerate(zip(weights, points, strict=True))]
    got = ev.compare(judge(1, 1, 0, 1, 0, 0), judge(0, 0, 1, 0, 1, 1))
    assert (got["first_better"], got["second_better"], got["questions"]) == (1, 0, 2)
    assert got["sign_test_p"] == 1


@pytest.mark.parametrize("preds, complaint", [
    ([{"id": "r0", "pred": "A"}, {"id": "zz", "pred": "A"}], "preds.jsonl:2: .*'zz'.* fits 0 rows"),
    ([{"id": "twin", "pred": "A"}], "fits 2 rows.*\"row\""),
    ([{"id": "r0", "row": 1, "pred": "A"}], "id 'r0', row 1 fits 0"),
    ([{"id": "r0", "pred": "A"}, {"id": "r0", "pred": "B"}], "second verdict.*preds.jsonl:1"),
    ([{"id": "r0", "pred": "C"}], "pred 'C'"), ([{"id": "r0"}], "pred 'missing'"),
    ([{"id": "r0", "order": "A", "pred": "A"}], "order 'A'"), (['"A"'], "not a JSON object"),
    ([{"id": "r0", "score_a": 1}], "only one of the two"), ([], "holds no predictions")])
def test_bad_predictions_are_named(run, preds, complaint):
    rows = [row(0), row(1), row(2, id="twin"), row(3, id="twin")]
    with pytest.raises(SystemExit, match=complaint):
        scored(run, "rows", write("rows.jsonl", rows), preds)


@pytest.mark.parametrize("benchmark, data, complaint", [
    ("vl_rewardbench", [vl("a", human_ranking=[1, 1])], "human_ranking"),
    ("vl_rewardbench", [{"id": "a"}], "published form.*KeyError"),
    ("genai_image", [genai("leftvote") | {"vote_type": "left"}], "vote_type 'left'"),
    ("rewardbench", [rewardbench(1, "pku-better")], "of no section"),
    ("rm_bench", [rm_bench("a", "chat") | {"chosen": ["a"]}], "three styles"),
    ("multimodal_rewardbench", [multimodal("a", "vqa", 3)], "Output3"),
    ("mm_rlhf_rewardbench", [mm_rlhf("a", "elsewhere")], "elsewhere"),
    ("rewardbench2", [rewardbench2("a", "Maths")], "subset 'Maths'"),
    ("rewardbench2", [rewardbench2("a", "Math", rejected=["b"])], "three in 'rejected'"),
    ("rewardbench2", [rewardbench2("a:1", "Ties")], "not 'ref:n' or 'tied:n'"),
    ("mmrb2_t2i", [mmrb2("a", "tie")], "chosen 'tie'")])
def test_bad_benchmark_rows_are_named(run, benchmark, data, complaint):
    with pytest.raises(SystemExit, match=complaint):
        scored(run, benchmark, write("data.json", data), [{"id": "a", "pred": "A"}])


# ----------------------------------------------------------- benchmarks kept out of training rows
def test_multimodal_rewardbench_is_kept_out(encoder):
    """kills: its columns unknown to --exclude; its image needed for its texts."""
    train = [row(k, responses=["good", "bad"], prompt=prompt, label="A")
             for k, prompt in enumerate(["What?", "What else?"])]
    bench = write("all_data.json", [multimodal("nocaps_1", "vqa", 2) | {"Image": None}])
    got = load_rows(write("train.jsonl", train), encoder, exclude=bench, quiet=True)
    assert [r["prompt"] for r in got] == ["What else?"]


def colour_files(folder, **colours):
    for name, colour in colours.items():
        path = Path(folder, f"{name}.png")
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (40, 30), colour).save(path)


def generation_row(k, prompt, *media):
    return {"id": f"g{k}", "task": "image_generation", "prompt": prompt, "media": list(media),
            "label": "A"}


@pytest.mark.parametrize("bench", ["rows", "published"])
def test_generation_rows_are_kept_out(bench, encoder):
    """The same two pictures under other paths, in the other order. kills: generation rows without
    a fingerprint; told by their paths; by the question alone; by the pictures alone."""
    colour_files("train", a="red", b="blue", c="green")
    colour_files("bench/images", x="blue", y="red", a="white", b="black")
    train = [generation_row(0, "A thing.", "a.png", "b.png"),
             generation_row(1, "A thing.", "a.png", "c.png"),
             generation_row(2, "Another.", "a.png", "b.png"),
             generation_row(3, "a THING", "b.png", "a.png")]
    pair = ["images/x.png", "images/y.png"]
    rows = [generation_row(9, "a thing", *pair)]
    if bench == "published":
        rows = [{"prompt": "a thing", "left_image": pair[0], "right_image": pair[1],
                 "vote_type": "rightvote"}]
    got = load_rows(write("train/rows.jsonl", train), encoder, quiet=True,
                    exclude=write("bench/rows.jsonl", rows))
    assert [r["id"] for r in got] == ["g1", "g2"]
    # the names are those of other pictures
    rows = [generation_row(9, "a thing", "images/a.png", "images/b.png")]
    got = load_rows("train/rows.jsonl", encoder, quiet=True,
                    exclude=write("bench/rows.jsonl", rows))
    assert len(got) == 4


def test_media_that_are_not_here_are_told_by_their_names():
    """kills: URLs compared whole; a folder of frames told by its name."""
    one = {"prompt": "A thing.", "media": ["videos/l.mp4", "videos/r.mp4"]}
    bench = write("b.jsonl", [{"prompt": "a thing", "left_video": "https://host/x/r.mp4",
                               "right_video": "https://host/x/l.mp4", "vote_type": "leftvote"}])
    assert fingerprint(one) in fingerprints(bench)
    colour_files("v/one", f0="red", f1="blue")
    colour_files("w/two", f0="red", f1="blue")
    colour_files("w/three", f0="red", f1="red")
    digests = [medium_digest(Path(folder)) for folder in ("v/one", "w/two", "w/three")]
    assert digests[0] == digests[1] != digests[2]


# ------------------------------------------------------------------------------------------ judging
class Judge:
    """Stands for model, encoder and sample_group: say(prompt, vote) -> answer text."""
    forbidden, image_token_id = common.FORBIDDEN, None

    def __init__(self, monkeypatch, say, stop_after=None):
        self.say, self.stop_after, self.prompts = say, stop_after, []
        def load(folders, args, device):
            self.style = args.style
            return [(torch.nn.Linear(1, 1), self)]
        monkeypatch.setattr(ev, "load_judge", load)
        monkeypatch.setattr(ev, "sample_group", self.sample)

    def check(self, row, form):
        for m in row["media"]:
            common.open_video(m, 2) if row["task"].startswith("video") else common.open_image(m)
        assert self(row, form)
        return len(row["prompt"])

    def __call__(self, row, form):
        return common.render(row, form, self.style)

    def sample(self, model, encoder, prompts, votes, temperature, max_new_tokens, generator):
        if self.stop_after is not None and len(self.prompts) >= self.stop_after:
            raise KeyboardInterrupt
        self.prompts += prompts
        texts, logps = [], []
        for prompt in prompts:
            texts.append([self.say(prompt, vote) for vote in range(votes)])
            logps.append([[math.log(0.9)] * len(text) for text in texts[-1]])
        return SimpleNamespace(ids=texts, logp=logps)

    def decode(self, ids):
        return ids


def finds_good(prompt, vote):
    """Anti-symmetric: it names the side on which "good" is, wherever shown."""
    return thinks("A" if prompt.rindex("good") < prompt.rindex("bad") else "B")


def picture(path):
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (40, 30), "red").save(path)


def publish(name):
    """A small benchmark in its published form, media included. -> folder"""
    folder = Path(name)
    picture(folder / "images" / "i.png")
    picture(folder / "images" / "v" / "c01_0001.png")
    if name == "vl_rewardbench":
        picture(folder / "images" / "RLHF-V-1.png")
        rows = [vl("mmmu_1", b) for b in (0, 1)] + [vl("RLHF-V-1"), vl("svit-1", 1)]
        del rows[2]["image"]
        write(folder / "data.json", rows)
    elif name == "multimodal_rewardbench":
        write(folder / "data" / "all_data.json", [multimodal(f"{k}_{b}", k, b) for k in
                                                  ("vqa", "safety", "reasoning") for b in (1, 2)])
        picture(folder / "data" / "images" / "i.png")
    elif name == "mm_rlhf_rewardbench":
        write(folder / "mm_reward_bench.jsonl", [mm_rlhf("a"), mm_rlhf("a"), mm_rlhf("b", "video")])
    elif name in ("genai_image", "genai_video"):
        kind, rows = name.removeprefix("genai_"), []
        for vote in ("leftvote", "rightvote", "tievote", "bothbad_vote"):
            rows.append(genai(vote, kind))
        (folder / f"{kind}_generation" / "videos").mkdir(parents=True)
        if kind == "image":  # the images are inside the rows, as on the hub
            for r in rows:
                for side in ("left", "right"):
                    buffer = io.BytesIO()
                    Image.new("RGB", (20, 10), "blue").save(buffer, "PNG")
                    r[f"{side}_image"] = {"bytes": buffer.getvalue(), "path": None}
        for r in rows if kind == "video" else ():
            for side in ("left", "right"):  # as URLs; the files lie in videos/
                toy_world.write_mp4(folder / "video_generation" / "videos" / r[f"{side}_video"],
                                    toy_world.film(random.Random(0), {
                                        "mover": "red disc", "start": "left", "end": "top"}))
                r[f"{side}_video"] = "https://host/x/" + r[f"{side}_video"]
        datasets.Dataset.from_list(rows).to_parquet(
            str(folder / f"{kind}_generation" / "test_v1-00000-of-00001.parquet"))
    elif name == "videogen_rewardbench":
        for p in "ab":
            picture(folder / "videos" / f"{p}.mp4" / "0.png")  # a folder of frames is a video too
        with open(folder / "videogen-rewardbench.csv", "w", newline="") as f:
            out = csv.DictWriter(f, videogen("A"))
            out.writeheader()
            out.writerows(map(videogen, ["A", "B", "same", "A", ""]))
    elif name == "sharegpt_video":
        picture(folder / "v5" / "0.png")
        videos = [video for video in map("v{}".format, range(99)) if held_out(video)][:2]
        for v in videos:
            picture(folder / v / "0.png")
        write(folder / "sft_dpo_17k.jsonl", [sharegpt(n, v) for n, v in enumerate(["zz", *videos])])
    elif name == "rewardbench":
        write(folder / "filtered.jsonl", [rewardbench(n, s) for n, s in enumerate(
            ["math-prm", "hep-cpp", "donotanswer", "mt-bench-hard"])])
    elif name == "rm_bench":
        write(folder / "total_dataset.json", [rm_bench(f"{d}/1", d) for d in ("chat", "math")])
    elif name == "rewardbench2":
        write(folder / "test.jsonl", [rewardbench2(1, "Math"), rewardbench2(2, "Focus")])
    elif name.startswith("mmrb2"):
        picture(folder / "b.png")
        picture(folder / "a.png")
        if name != "mmrb2_reasoning":  # what an edit starts from is shown by none of our prompts
            write(folder / "test.jsonl", [mmrb2("p0", "A"), mmrb2("p1", "B")])
        else:
            write(folder / "test.jsonl", [mmrb2("p0", "A", ("good", "bad"), ([], []), ["a.png"]),
                                          mmrb2("p1", "B", ("bad", "good"), ([], []))])
    else:
        folder = write("rows.jsonl", [row(n) for n in range(6)])
    return folder


JUDGED = {"vl_rewardbench": 4, "multimodal_rewardbench": 6, "mm_rlhf_rewardbench": 3,
          "genai_image": 2, "genai_video": 2, "videogen_rewardbench": 3, "sharegpt_video": 2,
          "rewardbench": 4, "rm_bench": 18, "rewardbench2": 6, "mmrb2_t2i": 2, "mmrb2_edit": 2,
          "mmrb2_interleaved": 2, "mmrb2_reasoning": 2, "rows": 6}


@pytest.mark.parametrize("name", list(BENCHMARKS))
def test_every_benchmark_is_judged_in_place(name, run, monkeypatch):
    """Both orders of every row, media found where the archives put them. A constant "A" gets 50 %
    in every column, and 25 % of the best of 4; a judge that finds the good one gets all of those
    that have it.
    kills: one order; the verdict taken as shown; the better one always first."""
    folder = publish(name)
    judge = Judge(monkeypatch, lambda prompt, vote: thinks("A"))
    got = run("--model", "m", "--benchmark", name, "--data", folder, "--json", "--out", "a.jsonl")
    assert len(judge.prompts) == 2 * JUDGED[name]
    columns = {k: v for k, v in got["groups"].items() if k not in ("4-way", "3-way", "with ties")}
    chance = 0.25 if name == "rewardbench2" else 0.5
    assert list(columns.values()) == pytest.approx([chance] * len(columns))
    assert got["order_flips"] == 1
    ties = name.startswith("genai")  # of four rows two are ties, which nobody who says A or B gets
    assert got["overall"] == (0.25 if ties else pytest.approx(chance))
    assert got["share_a"] == 1 and (got["macro"] == pytest.approx(got["overall"]))
    again = run("--score", "a.jsonl", "--benchmark", name, "--data", folder, "--json")
    assert again == {**got, "model": "a.jsonl"}  # one evaluator, one number
    if "gen" in name or name in ("mmrb2_t2i", "mmrb2_edit", "mmrb2_interleaved"):
        return  # the better image or video is told by no word
    Judge(monkeypatch, finds_good)
    got = run("--model", "m", "--benchmark", name, "--data", folder, "--json")
    assert (got["overall"], got["order_flips"], got["share_a"]) == (pytest.approx(1), 0, 0.5)


def test_table(monkeypatch, capsys):
    """A line for each checkpoint, a column for each task, --rows of its held-out rows in both
    orders. kills: all rows; one order; the columns of another task; one judge for all lines."""
    for task in common.TASKS:
        rows = [row(n, id=f"{task}-{n}") for n in range(5)]  # told apart by their ids alone
        write(f"toy/heldout_{task}.jsonl", rows)
    for name in ("right", "first"):
        write(f"{name}/config.json", {})
    asked = []

    def predictions_of(loaded, rows, args):
        asked.append((args.model[0], rows[0]["id"].split("-")[0], len(rows)))
        preds = []
        for at, shown in enumerate(rows):
            right = args.model == ["right"] and "video" not in shown["id"]
            for order in ("AB", "BA"):
                preds.append({"at": at, "id": shown["id"], "order": order, "sample": 0,
                              "pred": shown["label"] if right else order[0]})
        return preds
    judge = Judge(monkeypatch, finds_good)
    judge.image_token_id = 5
    monkeypatch.setattr(ev, "predictions_of", predictions_of)
    folders = ["right", "first", "none"]
    monkeypatch.setattr(sys, "argv", ["eval.py", "--table", *folders, "--rows", "4"])
    ev.main()
    printed = capsys.readouterr()
    table = printed.out.splitlines()[-4:]
    assert table[0].startswith("| checkpoint | text | image understanding |")
    assert table[2] == "| right | 100.0 | 100.0 | 100.0 | 50.0 | 50.0 |"
    assert table[3] == "| first | 50.0 | 50.0 | 50.0 | 50.0 | 50.0 |"
    assert asked == [(m, t, 4) for m in ("right", "first") for t in common.TASKS]
    assert "none: no checkpoint" in printed.err
    judge.image_token_id = None  # a text-only model
    monkeypatch.setattr(sys, "argv", ["eval.py", "--table", "right", "--rows", "0"])
    ev.main()
    assert asked[len(asked) - 1:] == [("right", "text", 5)]
    assert capsys.readouterr().out.splitlines()[-1] == "| right | 100.0 | - | - | - | - |"


def test_a_killed_run_goes_on(run, monkeypatch):
    """Nothing is judged twice, a line cut in the middle and votes of half a row are judged again.
    kills: --out overwritten; the cut line kept; rows of other settings mixed in."""
    data = write("rows.jsonl", [row(n, prompt="What?" * (n + 1)) for n in range(9)])
    command = ["--model", "m", "--data", data, "--out", "o.jsonl", "--json", "--batch_size", 2,
               "--votes", 3]

    def say(prompt, vote):
        return thinks("A" if vote else "B")
    first = Judge(monkeypatch, say, stop_after=8)
    with pytest.raises(KeyboardInterrupt):
        run(*command)
    written = Path("o.progress.jsonl").read_text().splitlines()  # how it is made, then the rows
    assert len(first.prompts) == 8 and len(written) == 1 + 4 and not Path("o.jsonl").exists()
    Path("o.progress.jsonl").write_text("\n".join(written[:-1]) + "\n" + written[-1][:20])
    second = Judge(monkeypatch, say)
    got = run(*command)
    assert len(second.prompts) == 18 - 4 and not set(second.prompts) & set(first.prompts[:4])
    assert len(Path("o.jsonl").read_text().splitlines()) == 54
    Judge(monkeypatch, say)
    whole = run(*command[:4], "--votes", 3, "--json")
    assert whole == got and got["overall"] == 0.5
    third = Judge(monkeypatch, say)
    assert run(*command) == got and not third.prompts
    with pytest.raises(SystemExit, match="style 'msrl' -> 'r1'"):
        run(*command, "--style", "r1")
    Path("o.progress.jsonl").unlink()  # a file of somebody else's is not written over
    with pytest.raises(SystemExit, match="o.jsonl exists, but no o.progress.jsonl"):
        run(*command)


def test_an_odd_batch_draws_the_same_answers_with_a_file(run):
    """kills: chunks of half a batch, whose seeds repeat"""
    data = write("rows.jsonl", [row(n, prompt="ann red disc . colour of ann ?") for n in range(4)])
    command = ["--model", toy_world.PREBUILT, "--data", data, "--votes", 2, "--json",
               "--max_new_tokens", 20, "--batch_size", 3]
    run(*command, "--out", "o.jsonl")
    texts = [p["text"] for p in lines("o.jsonl")]
    run(*command[:-1], 3, "--out", "same.jsonl")
    assert texts == [p["text"] for p in lines("same.jsonl")]
    model, encoder = common.load(toy_world.PREBUILT)
    rows = load_rows(data, encoder, quiet=True)
    whole = common.judge(model, encoder, rows, ev.sample_group, votes=2, max_new_tokens=20,
                         batch_size=3)
    assert texts == [p["text"] for p in whole]


def test_what_cannot_be_shown_is_wrong(run, monkeypatch):
    """kills: over-long or broken rows left out of n."""
    data = write("v/data.json", [vl("mmmu_1"), vl("mmmu_2", query="w" * 99),
                                 vl("mmmu_3", image="no.png")])
    picture("v/images/i.png")
    Judge(monkeypatch, finds_good)
    command = ["--model", "m", "--benchmark", "vl_rewardbench", "--data", data, "--json",
               "--max_prompt_tokens", 50]
    with pytest.raises(SystemExit, match=r"row 2 \(mmmu_3\).*no.png does not exist"):
        run(*command)
    got = run(*command, "--skip_bad_rows")
    assert (got["overall"], got["n"], got["missing"]) == (1 / 3, 3, 2)


def test_answers_may_be_as_long_as_in_training(run, monkeypatch):
    """kills: 160 tokens for a judge that was taught to write 2,048"""
    judge = Judge(monkeypatch, finds_good)
    budgets, sample = [], judge.sample

    def watched(*args):
        budgets.append(args[5])
        return sample(*args)
    monkeypatch.setattr(ev, "sample_group", watched)
    command = ["--model", "m", "--data", write("rows.jsonl", [row(0)])]
    run(*command, "--json")
    write("m/stage.json", {"config": {"max_new_tokens": 77}})
    run(*command, "--json")
    run(*command, "--max_new_tokens", 5, "--json")
    assert budgets == [1024, 77, 5]


def test_r1_style(run, monkeypatch):
    """Digits, strictly. kills: letters read as digits; 2 read as A; A/B prompts; MSRL's parser."""
    for text, side in (("1", "A"), (" 2\n", "B"), ("A", None), ("12", None), ("3", None)):
        answer = f"<think>x</think><answer>{text}</answer>"
        assert common.parse(answer, "r1").verdict == side
        assert common.parse(answer).verdict == ("A" if text == "A" else None)
    judge = Judge(monkeypatch, lambda prompt, vote: "<think>x</think><answer>" + (
        "1" if prompt.index("good") < prompt.index("bad\n") else "2") + "</answer>")
    data = write("rows.jsonl", [row(n) for n in range(4)])
    got = run("--model", "m", "--data", data, "--style", "r1", "--out", "o.jsonl", "--json")
    assert got["overall"] == got["format"] == 1
    assert {p["text"][-10:-9] for p in lines("o.jsonl")} == {"1", "2"}  # as it was written
    assert "[Response 2]:" in judge.prompts[0] and "Chatbot" not in judge.prompts[0]
    assert run("--model", "m", "--data", data, "--json")["overall"] == 0  # asked in the wrong style
    write("m/stage.json", {"config": {"style": "r1"}})
    assert run("--model", "m", "--data", data, "--json")["overall"] == 1  # what it was trained with
    with pytest.raises(SystemExit, match="has no prompt"):
        picture("g/l.png")
        run("--model", "m", "--style", "r1", "--data", write("g/rows.jsonl", [
            row(0, task="image_generation", responses=None, media=["l.png"] * 2)]))


def test_the_soft_vote_is_the_probability_of_the_letter():
    """With the real tokenizer: the log-prob of exactly the token that holds the verdict. kills: the
    token before or after; the first "A" of the text."""
    encoder = common.load(toy_world.PREBUILT)[1]
    for side in "AB":
        text = f"<think>\nResponse A is better .\n</think>\n<answer>\n{side}\n</answer>"
        ids = encoder.answer_ids(text)
        logps = [-0.001 * (t + 1) for t in range(len(ids))]
        at = [t for t in range(len(ids)) if encoder.decode(ids[:t]).endswith("<answer>\n")][0]
        assert encoder.tokenizer.decode(ids[at:at + 1]).strip() == side
        got = common.verdict_probability(encoder.decode(ids), ids, logps, encoder)
        assert got == pytest.approx(math.exp(logps[at]), rel=1e-6)


def test_votes_and_orders_of_a_real_model(run):
    """The toy backbone judges for real: K votes per order, probabilities beside the verdicts."""
    data = write("rows.jsonl", [row(n, prompt="ann red disc . colour of ann ?") for n in range(2)])
    got = run("--model", toy_world.PREBUILT, "--data", data, "--votes", 2, "--out", "o.jsonl",
              "--json", "--max_new_tokens", 120)
    preds = lines("o.jsonl")
    assert [(p["row"], p["order"], p["sample"]) for p in preds] == list(
        itertools.product(range(2), ("AB", "BA"), range(2)))
    for p in preds:
        assert (p["pred"] is None) == ("score_a" not in p)
        if p["pred"]:
            assert p["score_a"] + p["score_b"] == pytest.approx(1)
    assert got["vote"].keys() == {"1", "2"}


# ------------------------------------------------------------------------------------------ ranking
@pytest.fixture
def reward_models(monkeypatch):
    """Two Bradley-Terry checkpoints whose score is the number in the text, and ten times it."""
    def load(folder, device, frames=8, max_tiles=12):
        scale = float(Path(folder).name)
        model = SimpleNamespace(settings=None)
        return model, SimpleNamespace(forbidden=(), scale=scale)

    def number(encoder, text):
        return encoder.scale * float(text.split()[-1])

    module = SimpleNamespace(
        load=load, measure=lambda row, encoder, settings: 1,
        score_rows=lambda model, encoder, rows, batch_size, desc: [
            tuple(number(encoder, t) for t in r["responses"]) for r in rows],
        score_texts=lambda model, encoder, items, batch_size, desc: [
            number(encoder, i["response"]) for i in items])
    monkeypatch.setattr(ev, "bt_reward", module)
    for name in ("1", "-0.5", "10"):
        write(f"{name}/stage.json", {"stage": "bt_reward"})


def test_reward_models_are_averaged(run, reward_models):
    """kills: the last model alone; the sum of verdicts; equal scores as A."""
    numbers = [(1, 2), (3, -1), (5, 5), (0, 4)]
    rows = [row(0, id=f"r{n}", responses=[f"says {a}", f"says {b}"], label="B" if a < b else "A")
            for n, (a, b) in enumerate(numbers)]
    data = write("rows.jsonl", rows)
    got = run("--model", "1", "--model", "10", "--data", data, "--out", "o.jsonl", "--json")
    preds = lines("o.jsonl")
    assert [(p["pred"], p["score_a"], p["score_b"], p["order"]) for p in preds] == [
        (None if a == b else "AB"[a < b], 5.5 * a, 5.5 * b, "AB") for a, b in numbers]
    assert got["overall"] == 3 / 4 and got["unparsable"] == 0
    assert run("--model", "-0.5", "--data", data, "--json")["overall"] == 0


@pytest.mark.parametrize("ensemble, scale", [
    ("mean", 5.5), ("accuracy", (0.9 * 1 + 0.6 * 10) / 1.5), ("confidence", (3 + 10 * 2) / 5)])
def test_weights_of_an_ensemble(ensemble, scale, run, reward_models):
    """kills: weights that do not sum to 1; the figures from before training; equal weights in a
    ranking; the accuracy in place of the margin."""
    for name, accuracy, margin in (("1", 0.9, 3), ("10", 0.6, 2)):
        heldout = {"before": {"accuracy": 0.5, "margin": 0.1},
                   "after": {"accuracy": accuracy, "margin": margin}}
        write(f"{name}/stage.json", {"stage": "bt_reward", "heldout": heldout})
    numbers = [(1, 2), (4, -1), (0, 5)]
    rows = [row(0, id=f"r{n}", responses=[f"says {a}", f"says {b}"]) for n, (a, b) in
            enumerate(numbers)]
    models = "--model", "1", "--model", "10", "--ensemble", ensemble
    got = run(*models, "--data", write("rows.jsonl", rows), "--out", "o.jsonl", "--json")
    for pred, (a, b) in zip(lines("o.jsonl"), numbers, strict=True):
        assert (pred["score_a"], pred["score_b"]) == pytest.approx((scale * a, scale * b))
    spread = math.sqrt(((1 - 5 / 3) ** 2 + (4 - 5 / 3) ** 2 + (0 - 5 / 3) ** 2) / 2)
    assert got["scores"] == pytest.approx({
        "better": scale * 5 / 3, "worse": scale * 2, "gap": -scale / 3,
        "better_std": scale * spread, "worse_std": scale * 3})
    sets = write("c.jsonl", [{"id": 1, "prompt": "Which?", "candidates": ["x 0", "x 1"]}])
    assert run(*models, "--rank", sets)["rewards"][1] == pytest.approx(1 / (1 + math.exp(-scale)))


def test_an_ensemble_needs_held_out_figures(run, reward_models):
    """kills: a weight of 0 for a model that nobody measured; a negative margin as a weight."""
    data = write("rows.jsonl", [row(0, responses=["says 1", "says 2"])])
    for heldout in (None, {"after": None}, {"after": {"margin": -0.1}}):
        write("10/stage.json", {"stage": "bt_reward", "heldout": heldout})
        write("1/stage.json", {"stage": "bt_reward", "heldout": {"after": {"margin": 1}}})
        with pytest.raises(SystemExit, match="10/stage.json: has no held-out margin above 0"):
            run("--model", "1", "--model", "10", "--ensemble", "confidence", "--data", data)


@pytest.mark.parametrize("n", [2, 3, 5, 8])
def test_the_schedule_never_repeats_a_pair(n):
    """kills: independent random opponents; the wrong rotation; rounds as pairs."""
    for rounds in range(1, n + 2):
        pairs = ev.schedule(n, rounds, random.Random(rounds))
        met = [sum(k in p for p in pairs) for k in range(n)]
        assert len({frozenset(p) for p in pairs}) == len(pairs)
        if rounds >= n - 1 + n % 2:
            assert len(pairs) == n * (n - 1) // 2
        elif n % 2 == 0:
            assert met == [rounds] * n
        else:
            assert max(met) <= rounds and sum(met) == rounds * (n - 1)
    assert len(ev.schedule(n, None, random.Random(0))) == n * (n - 1) // 2


def check_win_rates(win_rates):
    rewards, errors = win_rates(4, [(0, 1, 1.0), (0, 2, 1.0), (1, 2, 0.5), (0, 3, 1.0)])
    assert rewards == [1, 0.25, 0.25, 0]
    assert errors[0] == pytest.approx(math.sqrt(4 * 1 / (5 ** 2 * 6)))
    assert errors[1] == pytest.approx(math.sqrt(1.5 * 2.5 / (4 ** 2 * 5)))
    assert errors[3] == pytest.approx(math.sqrt(1 * 2 / (3 ** 2 * 4)))


def test_win_rates():
    check_win_rates(ev.win_rates)


def test_the_frame_of_the_wrong_win_rates_is_right():
    check_win_rates(wrong_versions.win_rates)


@pytest.mark.parametrize("name", wrong_versions.WIN_RATES)
def test_wrong_win_rates_are_rejected(name):
    rejects(check_win_rates, wrong_versions.WIN_RATES[name])


def test_bradley_terry_fit():
    """After a round robin without a prior the fitted probabilities are the win rates; with few
    games they are those that plain gradient ascent finds, and allow for whom one met; errors agree
    with the spread over simulated tournaments. kills: the prior forgotten; the diagonal in the
    mean; the error of the strength in place of the reward's."""
    rng = random.Random(4)
    games = [(i, j, rng.random()) for i in range(5) for j in range(i + 1, 5)]
    assert ev.bradley_terry(5, games, 1e-9)[0] == pytest.approx(ev.win_rates(5, games)[0], abs=1e-6)
    few = [(0, 1, 1.0), (1, 2, 1.0), (3, 2, 0.5), (3, 4, 1.0)]
    s = torch.zeros(5, dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.SGD([s], lr=1.0)
    for _ in range(1500):
        loss = 0.1 * (s ** 2).sum() / 2 - sum(w * F.logsigmoid(s[i] - s[j])
                                              + (1 - w) * F.logsigmoid(s[j] - s[i])
                                              for i, j, w in few)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    p = torch.sigmoid(s[:, None] - s[None]).detach()
    slow = [(p[i].sum() - 0.5).item() / 4 for i in range(5)]
    assert ev.bradley_terry(5, few)[0] == pytest.approx(slow, abs=1e-4)
    assert slow[0] > slow[3] and ev.win_rates(5, few)[0][3] == 0.75  # 3 met the weak ones
    assert max(ev.bradley_terry(3, [(0, 1, 1.0)], prior=0.01)[1]) <= 0.5  # as in [0, 1]

    strengths, draws, errors = [0.8, 0.3, 0.0, -0.4], [], []
    for _ in range(150):
        games = []
        for i, j in list(itertools.combinations(range(4), 2)) * 20:
            chance = 1 / (1 + math.exp(strengths[j] - strengths[i]))
            games.append((i, j, float(rng.random() < chance)))
        rewards, standard_errors = ev.bradley_terry(4, games)
        draws.append(rewards)
        errors.append(standard_errors)
    spread = torch.tensor(draws).std(0)
    assert (torch.tensor(errors).mean(0) / spread - 1).abs().max() < 0.25


def number_judge(prompt, vote):
    """Names the larger of the two numbers that the responses say."""
    numbers = []
    for part in prompt.split("Response]")[1:]:
        if part.startswith("\nsays"):
            numbers.append(float(part.split("\n")[1].split()[-1]))
    return thinks("A" if numbers[0] > numbers[1] else "B")


@pytest.mark.parametrize("more, judgements", [
    ((), 56), (("--rounds", 2), 16), (("--rounds", 2, "--aggregate", "bradley_terry"), 16)])
def test_rank(run, monkeypatch, more, judgements):
    """Eight candidates: 56 ordered pairs, or 8 per round. kills: one order; the verdict given to
    the wrong candidate; the worst named best."""
    numbers = [[3, 1, 4, 15, 9, 2, 6, 5], [2, 7, 1, 8, 28, 18, 4, 5]]
    sets = write("c.jsonl", [
        {"id": k, "prompt": "Which?", "candidates": [f"says {number}" for number in candidates]}
        for k, candidates in enumerate(numbers)])
    judge = Judge(monkeypatch, number_judge)
    command = ["--model", "m", "--rank", sets, "--out", "r.jsonl", *more]
    run(*command)
    assert len(judge.prompts) == 2 * judgements
    for candidates, line in zip(numbers, lines("r.jsonl"), strict=True):
        assert line["judgements"] == judgements and line["best"] == line["ranking"][0]
        best = line["rewards"][candidates.index(max(candidates))]
        worst = line["rewards"][candidates.index(min(candidates))]
        assert best > worst and ("bradley_terry" in more or (best, worst) == (1, 0))
        assert min(line["rewards"]) >= 0 and max(line["rewards"]) <= 1
        assert min(line["standard_errors"]) > 0
        if not more:
            ranked = [candidates[k] for k in line["ranking"]]
            assert ranked == sorted(candidates, reverse=True)
            assert sorted(line["rewards"]) == pytest.approx([k / 7 for k in range(8)])
    again = Judge(monkeypatch, number_judge)
    run(*command)
    assert not again.prompts  # nothing is judged twice


def test_rank_of_a_position_bias_and_of_nonsense(run, monkeypatch):
    """No candidate gains from its place. kills: one order; no verdict as a loss."""
    preds = [{"row": 0, "i": 0, "j": 1, "pred": "A"}, {"row": 0, "i": 1, "j": 0, "pred": None},
             {"row": 0, "i": 2, "j": 1, "pred": "A"}]
    assert ev.shares_of(preds) == {(0, 0, 1): 0.75, (0, 1, 2): 0.0}
    sets = write("c.jsonl", [{"id": 1, "prompt": "Which?", "candidates": list("abc")}])
    def judge_says(text):
        Judge(monkeypatch, lambda prompt, vote: text)
        return run("--model", "m", "--rank", sets)  # without --out it is printed
    assert judge_says(thinks("A"))["rewards"] == [0.5] * 3
    assert judge_says("Both.")["rewards"] == [0.5] * 3


def test_rank_with_reward_models(run, reward_models):
    """The mean probability of beating each other candidate; its error from the models' spread."""
    sets = write("c.jsonl", [{"id": 1, "prompt": "Which?", "candidates": ["x 0", "x 1", "x -1"]}])
    got = run("--model", "1", "--model", "10", "--rank", sets)

    def win(difference):
        return 1 / (1 + math.exp(-difference))

    def rate(scale):
        return [(win(-scale) + win(scale)) / 2, (win(scale) + win(2 * scale)) / 2]
    assert got["rewards"][:2] == pytest.approx(rate(5.5)) and got["ranking"] == [1, 0, 2]
    spread = abs(rate(1)[1] - rate(10)[1]) / 2  # two models: std / sqrt(2) is half the distance
    assert got["standard_errors"][1] == pytest.approx(spread) and got["judgements"] == 3


# ----------------------------------------------------------------------------------------- attempts
def test_attempts_count_until_the_first_right_answer(tmp_path, monkeypatch):
    # kills: counted from 0, the last right one, K for never, labels of the unswapped row, the
    # swapped row written (its rationale names a bare B, which no swap follows), judged again
    rows = [{"id": f"r{i}", "task": "text", "prompt": f"p{i}", "responses": ["x", "y"],
             "label": "AB"[i % 2], "rationale": "Response A is right; B is not."} for i in range(6)]
    common.write_lines(tmp_path / "rows.jsonl", rows)
    tries = [[1, 0, 1], [0, 1, 1], [0, 0, 0], [0, 0, 1], [1, 1, 1], [0, 1, 0]]

    def judge(model, encoder, rows, *args, orders, **kwargs):
        assert orders == ("AB",) and len({r["label"] for r in rows}) == 2
        return [{"row": i, "pred": r["label"] if right else "AB"[r["label"] == "A"]}
                for i, r in enumerate(rows) for right in tries[i]]
    monkeypatch.setattr(common, "judge", judge)
    monkeypatch.setattr(sys, "argv", [
        "eval.py", "--model", str(toy_world.PREBUILT), "--data", str(tmp_path / "rows.jsonl"),
        "--attempts", "3", "--out", str(tmp_path / "out.jsonl")])
    ev.main()
    got = lines(tmp_path / "out.jsonl")
    assert [r["attempts"] for r in got] == [1, 2, 4, 3, 1, 2]
    assert [r["id"] for r in hard_rows(got, 2)] == ["r1", "r2", "r3", "r5"]
    assert [{k: r[k] for k in was} for r, was in zip(got, rows, strict=True)] == rows
    monkeypatch.setattr(common, "judge", None)
    ev.main()  # killed after the last verdict, say: nothing is judged again
    assert lines(tmp_path / "out.jsonl") == got


def says_where_red_is(encoder, bare, style="msrl"):
    """A sampler of three answers a prompt, [wrong, right, right otherwise]; its reasoning names the
    sides as shown, with `bare` also by a bare letter, which common.swap() cannot follow."""
    letters = {"A": "1", "B": "2"} if style == "r1" else {"A": "A", "B": "B"}

    def sample(model, encoder, prompts, votes, temperature, max_new_tokens, generator):
        texts = []
        for prompt in prompts:
            text = encoder.decode(prompt.ids)
            right = "A" if text.rindex("\nred\n") < text.rindex("\nblue\n") else "B"
            a, b = letters[right], letters[OTHER[right]]
            reasoning = f"Response {a} says red ."
            if bare:
                reasoning += f" So not {b} ."
            texts.append([thinks(b, "Nothing ."), thinks(a, reasoning), thinks(a, "Later .")])
        ids = [[encoder.answer_ids(text) for text in answers] for answers in texts]
        return SimpleNamespace(ids=ids, logp=None)
    return sample


@pytest.mark.parametrize("bare, style", [(False, "msrl"), (True, "msrl"), (False, "r1")])
def test_stage_0_learns_from_the_first_right_attempt(bare, style, encoder, monkeypatch, tmp_path):
    """R1-Reward's cold start, from sampled answers to what stage 0 learns and its checkpoint.
    kills: the sampled texts thrown away; the first answer's reasoning, or the last right one's; the
    reasoning of the order shown in a row of the other order; names changed but for a bare letter;
    1 and 2 left in a row that may be swapped."""
    rows = []
    for k in range(8):
        pair = ["red", "blue"][::1 - 2 * (k % 2)]
        rows.append(row(k, prompt="ann red disc . colour of ann ?", responses=pair))
    monkeypatch.setattr(ev, "sample_group", says_where_red_is(encoder, bare, style))
    run_here(ev.main, flags(model=toy_world.PREBUILT, data=write("rows.jsonl", rows), attempts=3,
                            out="cold.jsonl", style=style))
    got = rows_of("cold.jsonl", encoder, "text")
    assert {r["attempts"] for r in got} == {2} and [r["id"] for r in got] == [r["id"] for r in rows]
    turned = sum(was["label"] != now["label"] for was, now in zip(rows, got, strict=True))
    assert 0 < turned < 8
    for cold in got:
        assert better(cold) == "red"
        assert stage0_sft.can_swap(cold) == (not bare)
        for shown in [cold] if bare else [cold, common.swap(cold)]:
            side = shown["label"] if style == "msrl" else {"A": "1", "B": "2"}[shown["label"]]
            reasoning = f"Response {side} says red ."
            if bare:
                reasoning += f" So not {OTHER[side]} ."
            assert stage0_sft.target_text(shown, "rationale", style) == thinks(side, reasoning)
    run_here(stage0_sft.main, flags(model=toy_world.PREBUILT, data="cold.jsonl", heldout="",
                                    epochs=1, batch_size=4, style=style, out=tmp_path / "run"))
    assert len(lines(tmp_path / "run" / "metrics.jsonl")) == 2


@pytest.mark.parametrize("text, rationale", [
    (thinks("A", "The <type>text</type> is so ."), "The <type>text</type> is so ."),
    (thinks("A", "<caption>x</caption> so ."), None), (thinks("A", " "), None),
    ("So it is .\n<answer>\nA\n</answer>", None),
    ("<think>\nSo it is .\n</think>\nThat is\n<answer>\nA\n</answer>", None)])
def test_what_stage_0_cannot_learn_is_no_rationale(text, rationale):
    """kills: a rationale for which stage 0 refuses the row; an answer without a reasoning."""
    assert ev.reasoning_of(text, "msrl", common.FORBIDDEN) == rationale


def test_names_in_r1_answers_become_letters():
    """So that they can be swapped. kills: a bare number taken for a name; the second of two."""
    text = thinks("2", "Responses 1 and 2 differ in 2 ways . Answer 2 is right , 1 of 3 times .")
    assert ev.reasoning_of(text, "r1", common.FORBIDDEN) == (
        "Responses A and B differ in 2 ways . Answer B is right , 1 of 3 times .")


# ------------------------------------------------------------------- what a review of eval.py found
def test_ties_and_equal_scores_are_not_soft_points(run):
    # kills: m < 0 taken for "not A" where the label is a tie; equal scores called unparsable
    rows = [genai(vote) for vote in ("leftvote", "rightvote", "tievote", "bothbad_vote")]
    for a, b, soft in ((0.1, 0.9, 1 / 4), (0.5, 0.5, 1 / 4)):
        got = scored(run, "genai_image", write("g.jsonl", rows),
                     [{"id": str(i), "score_a": a, "score_b": b} for i in range(4)])
        assert got["overall"] == (1 / 4 if a < b else 0)
        assert got["soft"] == soft and got["unparsable"] == 0


def test_users_own_keys_are_nobodys_business(run):
    # kills: "chosen" taken for RM-Bench's scores, "i" for its styles, "part" for a column
    rows = [{"id": f"{k}", "task": "text", "prompt": "p", "responses": ["x", "y"], "label": "A",
             "i": 3, "part": "mine", "weight": 9} for k in range(2)]
    got = scored(run, "rows", write("rows.jsonl", rows), [
        {"id": "0", "pred": "A", "i": 7, "chosen": "x", "rejected": "y", "row": None},
        {"id": "1", "pred": "B", "text": 5}])
    assert got["overall"] == 1 / 2 and list(got["groups"]) == ["text"]
    for bad in ({"chosen": [3, 3], "rejected": [1, 2, 3]}, {"score_a": math.nan, "score_b": 1}):
        with pytest.raises(SystemExit, match="scores that are no numbers"):
            scored(run, "rows", write("rows.jsonl", rows), [{"id": "0", **bad}])


def test_the_sign_test_is_exact_and_fast():
    # kills: a tail that leaves out its last term; 60 seconds for 16,000 rows
    n, first = 20_000, 9_900
    def rows(points):
        return [{"weight": 1, "cluster": k, "points": float(p)} for k, p in enumerate(points)]
    one, other = rows(k < first for k in range(n)), rows(k >= first for k in range(n))
    p = ev.compare(one, other)["sign_test_p"]
    z = (n / 2 - first - 0.5) / math.sqrt(n / 4)  # the normal approximation
    assert p == pytest.approx(math.erfc(z / math.sqrt(2)), rel=1e-3)
    few = ev.compare(rows([1, 1, 1, 1, 0]), rows([0, 0, 0, 0, 1]))["sign_test_p"]
    assert few == pytest.approx(2 * (1 + 5) / 32)


def test_other_rows_under_the_same_name_are_judged_anew(run, monkeypatch):
    # kills: verdicts on rows that are no longer in the file, taken for verdicts on the new ones
    Judge(monkeypatch, finds_good)
    command = "--model", "m", "--data", "rows.jsonl", "--out", "o.jsonl", "--json"
    write("rows.jsonl", [row(0)])
    got = run(*command)
    assert run(*command) == got
    write("rows.jsonl", [row(0, prompt="Another one?")])
    with pytest.raises(SystemExit, match="other settings or of other rows"):
        run(*command)


@pytest.mark.parametrize("scores, want", [(True, ["A", "same", "B"]), (False, ["A", "B"])])
def test_ties_are_scored_but_not_judged(monkeypatch, scores, want):
    # VideoGen's threshold needs the scores of ties. kills: ties left out for all, or shown to all
    monkeypatch.setattr(ev, "is_reward_model", lambda folder: scores)
    rows = [{"id": x, "row": k, "task": "text", "prompt": "p", "responses": ["x", "y"], "media": [],
             "label": x} for k, x in enumerate(("A", "same", None, "B"))]
    args = SimpleNamespace(model=["m"], form="pixels", max_prompt_tokens=9, skip_bad_rows=False)
    encoder = SimpleNamespace(forbidden=(), kept_as=None, check=lambda row, form: 5)
    monkeypatch.setattr(ev.bt_reward, "measure", lambda row, encoder, settings: 5)
    loaded = [(SimpleNamespace(settings={}), encoder)]
    assert [r["label"] for r in ev.fit_to_judge(rows, loaded, args)] == want


def test_a_page_does_without_a_picture_that_is_null(run):
    # kills: --report refusing a file that --score reads
    data = write("mmrb.jsonl", [{**multimodal(str(k), "vqa", 1), "Image": None} for k in range(2)])
    ids = [{"id": str(k), "pred": "A"} for k in range(2)]
    got = scored(run, "multimodal_rewardbench", data, ids)
    assert got == scored(run, "multimodal_rewardbench", data, ids, "--report", "page.html")
    assert "vqa" in Path("page.html").read_text()
