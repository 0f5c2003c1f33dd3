"""
The two sides: what moves when the candidates of a row are exchanged, which rows may be exchanged,
and the order of rows and sides in the batches of a run. "kills:" names plausible wrong versions of
the source that make a test fail.
"""

import json
import random
import re
from collections import Counter

import pytest
import torch
import wrong_versions
from helpers import OTHER, better, rejects, text_row

import common
from data import load_rows
import stage0_sft


# ------------------------------------------------------------------------------------- the exchange
def bare(row):
    """Without the path-free extras, and with the optional rationale made explicit."""
    return {**row, "rationale": row.get("rationale")}


def check_swap(swap, folder, encoder, task):
    """Everything that belongs to a side moves with it, in the row, in the prompt and in the
    pixels."""
    row, = load_rows(f"{folder}/heldout_{task}.jsonl:1", encoder)
    noun = {"image_generation": "Image", "video_generation": "Video"}.get(task, "Response")
    row["prompt"] = "neither side's words"
    row["rationale"] = f"{noun} A is a mess, {noun} B's is not. {noun} B is better than {noun} A."
    before = json.dumps(row)
    other = swap(row)
    assert json.dumps(row) == before
    assert swap(other) == row
    assert other["label"] == OTHER[row["label"]]
    assert other["prompt"] == row["prompt"]
    assert other["rationale"] == (f"{noun} B is a mess, {noun} A's is not. "
                                  f"{noun} A is better than {noun} B.")
    for form in ("pixels", "caption"):
        if row["responses"]:
            sides = row["responses"]
        elif form == "caption":
            sides = row["captions"]
        else:
            sides = ["same", "same"]
        text = common.render(row, form).replace(sides[0], "\0").replace(sides[1], sides[0])
        assert common.render(other, form) == text.replace("\0", sides[1])
    if row["responses"]:
        assert common.render(row) != common.render(other)
        assert other["media"] == row["media"] and other["captions"] == row["captions"]
    else:
        first, second = encoder(row).pixels.chunk(2)
        assert not torch.equal(first, second)
        assert torch.equal(encoder(other).pixels, torch.cat([second, first]))
        assert common.render(row, "caption") != common.render(other, "caption")


@pytest.mark.parametrize("task", common.TASKS)
def test_swap(eight_rows, encoder, task):
    check_swap(common.swap, eight_rows, encoder, task)


@pytest.mark.parametrize("task", common.TASKS)
def test_the_frame_of_the_wrong_swaps_is_right(eight_rows, encoder, task):
    check_swap(wrong_versions.swap, eight_rows, encoder, task)


@pytest.mark.parametrize("name", wrong_versions.SWAPS)
def test_wrong_swaps_are_rejected(eight_rows, encoder, name):
    def check():
        for task in common.TASKS:
            check_swap(wrong_versions.SWAPS[name], eight_rows, encoder, task)
    rejects(check)


def test_swap_without_a_rationale():
    """kills: re.sub on None; an empty rationale invented."""
    pair = text_row(task="image_generation", responses=None, media=["x", "y"])
    for row in (text_row(), text_row(rationale=None), pair):
        other = common.swap(row)
        assert bare(common.swap(other)) == bare(row) and not other.get("rationale")


def test_can_swap():
    """kills: always True; True as soon as any side is named; "B" matched inside words."""
    for text in (None, "", "Response A beats Response B.", "Assistant B's plan; Image A; Video B.",
                 "A better one would say more. Bob is no B2.", "Chatbot A is a Big success."):
        assert stage0_sft.can_swap(text_row(rationale=text)), text
    for text in ("B is better.", "Responses A and B are fine.", "I prefer B", "(B)",
                 "Response A loses, so B.", "I prefer A", "A's plan.", "A: good.",
                 "Answer B is named by Response A.", "Response A is worse than the second one.",
                 "Of Response A and Response B the latter."):
        assert not stage0_sft.can_swap(text_row(rationale=text)), text


@pytest.mark.parametrize("text", ["I prefer response A.", "response A is right",
                                  "The answer A wins.", "RESPONSE A is better."])
def test_a_side_in_lower_case_is_a_side(text):
    """After a swap the rationale must not praise the loser.
    kills: matching "Response" with a capital only."""
    row = text_row(rationale=text)
    changed = re.sub(r"\bA\b", "B", text)
    assert not stage0_sft.can_swap(row) or common.swap(row)["rationale"] == changed


# --------------------------------------------------------------------------------- rows and batches
def epochs(rows, batch_size, n, seed=0):
    """The stream of batch_of(), cut into n epochs."""
    steps = n * len(rows) // batch_size
    stream = [r for s in range(steps) for r in common.batch_of(rows, s, batch_size, seed)]
    return [stream[i:i + len(rows)] for i in range(0, len(stream), len(rows))]


@pytest.mark.parametrize("batch_size", [1, 4, 10, 25])
def test_every_row_once_per_epoch(batch_size):
    """In each epoch; also when a batch straddles epochs or is longer than the data.
    kills: a sample with replacement; the tail of an epoch dropped; one order for all epochs."""
    rows = [text_row(id=i) for i in range(10)]
    order = [[r["id"] for r in epoch] for epoch in epochs(rows, batch_size, 20)]
    assert all(sorted(ids) == list(range(10)) for ids in order)
    assert len(set(map(tuple, order))) > 15
    assert order != [[r["id"] for r in epoch] for epoch in epochs(rows, batch_size, 20, seed=1)]


def test_batches_do_not_depend_on_the_past():
    """A resumed run, and each rank, must see what an unbroken run would.
    kills: one generator that runs along; a cache that is changed."""
    rows = [text_row(id=i) for i in range(10)]
    forward = [common.batch_of(rows, s, 4, 3) for s in range(10)]
    common._permutation.cache_clear()
    random.seed(9)
    assert [common.batch_of(rows, s, 4, 3) for s in reversed(range(10))] == forward[::-1]


def test_sides_are_balanced_and_labels_true():
    """Over the epochs each row shows its better response on each side half of the time.
    kills: no coin; a coin without the epoch or without the id; a label that stays."""
    rows = [text_row(id=i) for i in range(10)]
    seen = epochs(rows, 5, 200)
    assert all(better(r) == "good one" for epoch in seen for r in epoch)
    first = Counter(r["id"] for epoch in seen for r in epoch if r["label"] == "A")
    assert all(abs(first[i] / 200 - 0.5) < 4 * 0.5 / 200 ** 0.5 for i in range(10)), first
    together = [len({r["label"] for r in epoch}) for epoch in seen]
    assert sum(n == 2 for n in together) > 190
    assert rows == [text_row(id=i) for i in range(10)]


def test_what_cannot_be_swapped_is_not():
    """Only where the rationale is shown. kills: swapping without asking may_swap(); a policy that
    says A is always right on rows whose unused rationale cannot be swapped."""
    rows = [text_row(id=i, rationale="B is worse.") for i in range(10)]
    shown = common.batch_of(rows, 0, 50, 3, stage0_sft.can_swap)
    assert {r["label"] for r in shown} == {"A"}
    assert 10 <= sum(r["label"] == "A" for r in common.batch_of(rows, 0, 50, 3)) <= 40
