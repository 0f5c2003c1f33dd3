"""
The rows that tests/idle_rewards.py teaches stage 0, and how it counts the answers. "kills:" names
plausible wrong versions of it that make a test fail.
"""

import re
from collections import Counter

import idle_rewards
import pytest
from helpers import small_world, thinks
from toy_world import HELD_PAIRS

import common
import stage0_sft
from data import load_rows


def test_a_third_name_a_type_of_which_half_are_right_whatever_the_label(tmp_path, encoder):
    """Counted in the rationales; n = 4000, so three standard errors are 2 to 4 points.
    kills: a wrong type drawn among all four; no coin, always wrong; a type only where A is better;
    the type behind "Feedback:"; held-out scenes."""
    rows = idle_rewards.typed_rows(4000)
    counts = Counter()
    for row in rows:
        named = re.match(r"<type>(\w+ \w+)</type>\nFeedback:\n", row["rationale"])
        right = named and named[1] == row["task"].replace("_", " ")
        counts[row["label"], "typed"] += bool(named)
        counts[row["label"], "right"] += bool(right)
        counts[row["label"]] += 1
        counts["tags"] += row["rationale"].count("<type>") - bool(named)
        for colour, shape in HELD_PAIRS:
            assert f"{colour} {shape}" not in " ".join(row["captions"])
    assert counts["tags"] == 0
    for label in "AB":
        assert counts[label, "typed"] / counts[label] == pytest.approx(1 / 3, abs=0.035)
        assert counts[label, "right"] / counts[label, "typed"] == pytest.approx(1 / 2, abs=0.06)
    common.write_lines(tmp_path / "typed.jsonl", rows[:40])
    loaded = load_rows(f"{tmp_path}/typed.jsonl", encoder, "caption", quiet=True)
    assert {row["task"] for row in loaded} == set(common.TASKS[1:])


def test_a_quarter_of_the_verdicts_contradict_a_reasoning_that_stays(tmp_path):
    """kills: the rationale turned round with the label; half of the rows; only where A is named."""
    small_world(tmp_path, sft=1200)
    rows = idle_rewards.lines(tmp_path / "sft.jsonl")
    against = Counter()
    for row, changed in zip(rows, idle_rewards.opposite_rows(rows), strict=True):
        assert changed["rationale"] == row["rationale"]
        follows = common.rule_consistency(stage0_sft.target_text(changed, "rationale"))
        assert follows == (1 if changed["label"] == row["label"] else -1)
        against[row["label"]] += follows == -1
    for label in "AB":
        assert against[label] / (len(rows) / 2) == pytest.approx(1 / 4, abs=0.055)


# --------------------------------------------------------------------------------------- the counts
def prediction(at, text, pred):
    return {"id": str(at), "at": at, "order": "AB", "sample": 0, "pred": pred, "text": text}


def test_types_are_counted_where_a_type_is_asked_for():
    """kills: texts in the denominator; any type counts as right; right ones of all answers called
    right ones of the types."""
    rows = [{"task": task, "label": "A"} for task in common.TASKS]
    named = [None, "image understanding", "video generation", None, None]
    answers = []
    for at, name in enumerate(named):
        text = thinks("A", f"<type>{name}</type> because" if name else "because")
        answers.append(prediction(at, text, "A" if at < 3 else "B"))
    figures = idle_rewards.type_figures(rows, answers, answers)
    assert figures["writes a type"] == 50
    assert figures["right type"] == 25
    assert figures["right, of the types"] == 50
    assert figures["image understanding"] == 100
    assert figures["image generation"] == 0
    assert figures["type on texts"] == 0
    assert figures["sampled"] == figures["accuracy, greedy"] == 60


def test_consistent_answers_are_counted():
    """kills: what cannot be told counts as consistent; contradictions among all answers called
    those among the right ones; a right answer taken for a right reasoning."""
    cases = ["AA", "AA", "AB", "A?", "BA", "BA", "BB", "BB", "BB", "BB"]
    rows = [{"task": "text", "label": "A"}] * len(cases)
    answers = []
    for at, (verdict, concluded) in enumerate(cases):
        answers.append(prediction(at, thinks(verdict, f"Response {concluded} is better ."),
                                  verdict))
    figures = idle_rewards.consistency_figures(rows, answers, answers)
    assert figures["consistent"] == figures["consistent, greedy"] == 60
    assert figures["contradicts"] == 30
    assert figures["where the answer is right"] == 25  # AB of AA, AA, AB, A?
    assert figures["where the reasoning is right"] == 50  # BA and BA of AA, AA, BA, BA
    assert figures["where the reasoning is wrong"] == 20  # AB of AB, BB, BB, BB, BB
    assert figures["sampled"] == 40
    assert figures["reasoning right"] == pytest.approx(400 / 9)  # what cannot be told is left out
