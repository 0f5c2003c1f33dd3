"""
Judging and scoring: both orders, votes, and the figures that summarize() makes of verdicts.
"kills:" names plausible wrong versions of the source that make a test fail.
"""

import itertools
import random
from types import SimpleNamespace

import pytest
import torch
import wrong_versions
from helpers import OTHER, rejects, text_row, thinks

import common


# ------------------------------------------------------------------------------ summing verdicts up
def pred(row, order, verdict, sample=0):
    return {"id": "x", "at": row, "order": order, "sample": sample, "pred": verdict,
            "text": thinks("A") if verdict else "?"}


def both(row, ab, ba):
    return [pred(row, "AB", ab), pred(row, "BA", ba)]


LABELS = [{"label": label} for label in "ABBA"]


def always(ab, ba):
    """The same two verdicts on every row of LABELS."""
    preds = []
    for place in range(len(LABELS)):
        preds += both(place, ab, ba)
    return preds


def figures(summarize, preds, *names, rows=LABELS):
    summary = summarize(rows, preds)
    return tuple(summary[name] for name in names)


def check_a_judge_that_always_says_a(summarize):
    """Its verdict flips with the order, in the row's own frame: exactly one half, whatever the
    labels."""
    names = "accuracy", "order_flips", "share_a", "unparsable", "n"
    assert figures(summarize, always("A", "B"), *names) == (0.5, 1, 1, 0, 4)
    assert figures(summarize, always("B", "A"), *names[:3]) == (0.5, 1, 0)


def check_a_perfect_judge_and_its_opposite(summarize):
    """Flips are no errors, nor is there an error without a flip."""
    names = "accuracy", "order_flips", "share_a"
    perfect, opposite = [], []
    for place, row in enumerate(LABELS):
        label = row["label"]
        perfect += both(place, label, label)
        opposite += both(place, OTHER[label], OTHER[label])
    assert figures(summarize, perfect, *names) == (1, 0, 0.5)
    assert figures(summarize, opposite, *names) == (0, 0, 0.5)


def check_unparsable_answers_are_wrong(summarize):
    """Neither left out nor one half; and no division by zero where nothing else is there."""
    preds = both(0, "A", None) + both(1, None, None) + both(2, "B", "B")
    names = "accuracy", "order_flips", "unparsable", "share_a", "n", "format"
    assert figures(summarize, preds, *names) == (0.5, 0, 0.5, pytest.approx(2 / 3), 3, 0.5)
    assert figures(summarize, both(0, None, None), *names) == (0, 0, 1, 0, 1, 0)


def check_votes(summarize):
    """The majority of an order's votes that state a verdict; a tie is one half, and no flip."""
    for ab, ba, accuracy, flips in ((["A", "A", "B"], ["A", "B", "A"], 1, 0),
                                    (["A", "B", "B"], ["A", "A", "B"], 0.5, 1),
                                    (["A", "B"], ["A", "A"], 0.75, 0),
                                    (["A", "B", None], ["B", None, "A"], 0.5, 0),
                                    (["A", None, None], ["A", None, None], 1, 0),
                                    ([None, None], ["A", "A"], 0.5, 0)):
        preds = [pred(0, "AB", vote, sample) for sample, vote in enumerate(ab)]
        preds += [pred(0, "BA", vote, sample) for sample, vote in enumerate(ba)]
        got = figures(summarize, preds, "accuracy", "order_flips")
        assert got == (accuracy, flips), (ab, ba)


def check_flips_are_a_share_of_rows_judged_twice(summarize):
    preds = both(0, "A", "B") + both(1, "B", "B") + both(2, None, "B") + [pred(3, "AB", "A")]
    assert figures(summarize, preds, "order_flips", "n") == (0.5, 4)


def check_interval(summarize, n, right):
    """Wilson's interval is the set of true rates e with |p - e| <= z sqrt(e (1 - e) / n): both ends
    solve that equation."""
    rows = [{"label": "A"}] * n
    preds = []
    for place in range(n):
        verdict = "A" if place < right else "B"
        preds += both(place, verdict, verdict)
    (low, high), p = figures(summarize, preds, "interval", "accuracy", rows=rows)
    assert p == right / n
    assert 0 <= low < high <= 1
    assert low - 1e-9 < p < high + 1e-9
    for end in (low, high):
        assert abs(p - end) == pytest.approx(1.96 * (end * (1 - end) / n) ** 0.5, abs=1e-6)
    if right in (0, n):
        assert (low if right == 0 else 1 - high) == pytest.approx(0, abs=1e-12)


CHECKS = [check_a_judge_that_always_says_a, check_a_perfect_judge_and_its_opposite,
          check_unparsable_answers_are_wrong, check_votes,
          check_flips_are_a_share_of_rows_judged_twice]
COUNTS = [(1, 0), (1, 1), (20, 0), (20, 20), (20, 10), (200, 3), (999, 990)]


@pytest.mark.parametrize("check", CHECKS)
def test_summary(check):
    check(common.summarize)


@pytest.mark.parametrize("n, right", COUNTS)
def test_interval(n, right):
    """kills: Wald's interval; no limits at 0 and 1."""
    check_interval(common.summarize, n, right)


def check_summary(summarize):
    for check in CHECKS:
        check(summarize)
    for n, right in COUNTS:
        check_interval(summarize, n, right)


def test_the_frame_of_the_wrong_evaluations_is_right():
    check_summary(wrong_versions.summarize)


@pytest.mark.parametrize("name", wrong_versions.EVALUATIONS)
def test_wrong_evaluations_are_rejected(name):
    rejects(check_summary, wrong_versions.EVALUATIONS[name])


# ----------------------------------------------------------------------------------- asking a judge
def judge_with(say, rows, **more):
    """common.judge() with a fake model that answers say(prompt text, vote). -> preds, calls"""
    calls = []

    def sample(model, encoder, prompts, votes, temperature, max_new_tokens, generator):
        calls.append((len(prompts), votes, temperature, generator.initial_seed()))
        return SimpleNamespace(ids=[[say(p, v) for v in range(votes)] for p in prompts])

    def encoder(row, form):
        return common.render(row, form)
    encoder.decode, encoder.style = lambda ids: ids, "msrl"
    return common.judge(torch.nn.Linear(1, 1), encoder, rows, sample, **more), calls


def reads(prompt, vote):
    """A perfect judge: finds the good response in the text that it is shown."""
    first = prompt.partition("[The Start of Assistant A's Response]\n")[2]
    return thinks("A" if first.startswith("good") else "B")


def judged_rows():
    rng = random.Random(0)
    rows = [text_row(id=f"r{i}", tokens=rng.randrange(9)) for i in range(11)]
    return [common.swap(r) if i % 3 == 0 else r for i, r in enumerate(rows)]


@pytest.mark.parametrize("votes", [1, 3])
def test_judge_shows_both_orders(votes):
    """Batches are sorted by length, so answers must find their way back to row, order and vote.
    kills: the swapped prompt not shown; pred in the shown frame; answers given to other rows."""
    rows = judged_rows()
    preds, calls = judge_with(reads, rows, votes=votes, batch_size=4)
    places = [(p["at"], p["order"], p["sample"]) for p in preds]
    assert places == list(itertools.product(range(11), ("AB", "BA"), range(votes)))
    assert all(p["pred"] == rows[p["at"]]["label"] and p["id"] == f"r{p['at']}" for p in preds)
    got = figures(common.summarize, preds, "accuracy", "order_flips", "share_a", rows=rows)
    assert got == (1, 0, 0.5)
    assert sum(c[0] for c in calls) == 22 and len({c[3] for c in calls}) == len(calls) == 6
    assert {c[1:3] for c in calls} == {(votes, 0.0 if votes == 1 else 1.0)}


def test_judge_gives_a_position_bias_one_half():
    """kills: pred taken as the letter that was said."""
    rows = judged_rows()
    preds, _ = judge_with(lambda prompt, vote: thinks("A"), rows)
    assert all(p["pred"] == ("A" if p["order"] == "AB" else "B") for p in preds)
    got = figures(common.summarize, preds, "accuracy", "order_flips", "share_a", rows=rows)
    assert got == (0.5, 1, 1)


def test_judge_takes_the_majority():
    """Two of three votes right is right, one of three is wrong. kills: the last vote decides."""
    rows = judged_rows()

    def right_for(votes):
        def say(prompt, vote):
            verdict = common.parse(reads(prompt, 0)).verdict
            return thinks(verdict if vote in votes else OTHER[verdict])
        return common.summarize(rows, judge_with(say, rows, votes=3)[0])["accuracy"]
    assert right_for((0, 1)) == right_for((1, 2)) == 1
    assert right_for((0,)) == right_for((2,)) == 0


def test_judge_of_nonsense():
    """kills: a crash on an answer without a verdict; a guess in its place."""
    rows = judged_rows()
    preds, _ = judge_with(lambda prompt, vote: "Both are good.", rows)
    assert all(p["pred"] is None and p["text"] == "Both are good." for p in preds)
    got = figures(common.summarize, preds, "accuracy", "unparsable", "format", rows=rows)
    assert got == (0, 1, 0)
