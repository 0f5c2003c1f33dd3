"""
The Bradley-Terry reward model: scores, loss, reformulations, curation, whole runs. The prebuilt
backbone is the model. "kills:" names wrong versions of the source under which a test was seen to
fail.
"""

import functools
import json
import math
import random
from types import SimpleNamespace

import pytest
import toy_world
import torch
import wrong_versions
from helpers import (
    OTHER, flags, lines, rejects, run_here, small_world, torchrun, weights_of)
from safetensors.torch import load_file

import bt_reward as bt
import common
import eval as ev

SETTINGS = {"head_layers": 2, "head_activation": "silu", "t2i": "pair", "length_norm": False,
            "max_response_tokens": 64}
pytestmark = pytest.mark.usefixtures("cpu_only")


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    return small_world(tmp_path_factory.mktemp("world"), text_rl=12, caption_rl=8, mm_rl=8,
                       heldout=2)


@pytest.fixture()
def reward_model():
    torch.manual_seed(3)
    model, encoder = common.load(toy_world.PREBUILT)
    bt.add_head(model, dict(SETTINGS))
    with torch.no_grad():  # larger scores, so that a wrong token is seen
        model.reward_head[-1].weight.mul_(20)
    return model, encoder


def rows_of(world, name, encoder, settings=SETTINGS):
    return bt.load_pairs(str(world / f"{name}.jsonl"), encoder, settings, bt.Config())


# ------------------------------------------------------------------------------------ loss and head
def check_loss(bt_loss):
    """Loss and gradient against a loop in float64."""
    chosen, rejected, lam = [2.5, -1.0, 0.3], [1.0, 3.5, 0.3], 0.07
    c, r = (torch.tensor(x, requires_grad=True) for x in (chosen, rejected))
    loss = bt_loss(c, r, lam)
    loss.sum().backward()
    for i, (a, b) in enumerate(zip(chosen, rejected, strict=True)):
        wrong = 1 / (1 + math.exp(a - b))  # the probability of the other order
        assert loss[i].item() == pytest.approx(-math.log(1 - wrong) + lam * (a + b) ** 2, rel=1e-5)
        assert c.grad[i].item() == pytest.approx(-wrong + 2 * lam * (a + b), rel=1e-4)
        assert r.grad[i].item() == pytest.approx(wrong + 2 * lam * (a + b), rel=1e-4)


def test_loss_and_gradient_against_a_float64_loop():
    check_loss(bt.bt_loss)


def test_the_frame_of_the_wrong_losses_is_right():
    check_loss(wrong_versions.bt_loss)


@pytest.mark.parametrize("name", wrong_versions.BT_LOSSES)
def test_wrong_losses_are_rejected(name):
    rejects(check_loss, wrong_versions.BT_LOSSES[name])


@pytest.mark.parametrize("layers, act, n", [(1, "silu", 7), (2, "tanh", 49), (5, "relu", 175)])
def test_head(layers, act, n):
    # kills: an activation after the last layer, a layer too many
    head = bt.reward_head(6, layers, act).double()
    assert sum(p.numel() for p in head.parameters()) == n
    x = torch.randn(3, 6, dtype=torch.float64)
    want = x
    linear = [part for part in head if isinstance(part, torch.nn.Linear)]
    f = {"silu": lambda v: v * v.sigmoid(), "tanh": torch.tanh, "relu": lambda v: v.clamp(min=0)}
    for i, part in enumerate(linear):
        want = want @ part.weight.T + part.bias
        want = f[act](want) if i < layers - 1 else want
    torch.testing.assert_close(head(x), want)


@pytest.mark.parametrize("length_norm", [False, True])
def test_packed_scores_equal_each_response_alone(world, reward_model, length_norm):
    # kills: last token off by one, padding's column, the neighbour seen, normalised by log(l)
    model, encoder = reward_model
    model.settings["length_norm"] = length_norm
    rows = rows_of(world, "mm_rl", encoder)[:4] + rows_of(world, "text_rl", encoder)[:2]
    rows[-1] = {**rows[-1], "responses": ["red .", "it is red and it is blue , my dear .", "no"]}
    rows[-2] = {**rows[-2], "responses": ["yes"]}
    got = bt.score_all(model, encoder, rows, batch_size=4)
    assert [len(s) for s in got] == [2, 2, 2, 2, 1, 3]
    for row, scores in zip(rows, got, strict=True):
        (prompt, answers), = bt.candidates(row, encoder, model.settings)
        for answer, score in zip(answers, scores, strict=True):
            media = {} if prompt.pixels is None else {"pixel_values": prompt.pixels}
            with torch.no_grad():
                hidden = model.model(input_ids=torch.tensor([prompt.ids + answer]),
                                     **media).last_hidden_state[0, -1]
                want = model.reward_head(hidden).item()
            want /= math.log(len(answer) + 1) if length_norm else 1
            assert score == pytest.approx(want, abs=2e-4) and answer[-1] == encoder.eos_id
    assert max(map(max, got)) - min(map(min, got)) > 0.1  # the tolerance is a small one


# --------------------------------------------------------------------------------------------- rows
def test_reformulated_generation_rows_are_label_true_and_balanced(world, reward_model):
    # kills: the texts exchanged, no swap of the media, labels left behind
    _, encoder = reward_model
    seen = []
    rows = [r for r in rows_of(world, "mm_rl", encoder) if r["task"] == "image_generation"]
    rows = [{**r, "label": "A", "media": r["media"][:: 1 if r["label"] == "A" else -1]}
            for r in rows]  # as published sets are: the better one always first
    better = {r["id"]: r["media"][0] for r in rows}

    def pixels(path):
        return encoder.encode("<image>", [path]).pixels[0]

    for step in range(100):
        for row in common.batch_of(rows, step, len(rows), seed=5):
            (prompt, answers), = bt.candidates(row, encoder, SETTINGS)
            says = encoder.decode(answers["AB".index(row["label"])])
            first = says.startswith("Image 1 is better than Image 2")
            assert first or says.startswith("Image 2 is better than Image 1")
            torch.testing.assert_close(prompt.pixels[0 if first else 1], pixels(better[row["id"]]))
            assert row["prompt"] in encoder.decode(prompt.ids)
            seen.append(first)
    assert 0.4 < sum(seen) / len(seen) < 0.6


def test_swapped_generation_rows_score_the_text_given_the_medium(world, reward_model):
    # kills: both media in one prompt, B's medium first
    _, encoder = reward_model
    row = [r for r in rows_of(world, "mm_rl", encoder) if r["task"] == "video_generation"][0]
    parts = bt.candidates(row, encoder, {**SETTINGS, "t2i": "swap"})
    for (prompt, answers), path in zip(parts, row["media"], strict=True):
        want = encoder.encode("<video>", [path], video=True).pixels
        torch.testing.assert_close(prompt.pixels, want)
        assert [encoder.decode(a) for a in answers] == [row["prompt"]]
    assert len(parts) == 2


def test_pairs_that_a_limit_makes_equal_are_left_out_and_counted(world, tmp_path, reward_model,
                                                                    capsys):
    # kills: compared before the cut, a cut that takes the end-of-sequence token
    _, encoder = reward_model
    rows = [{"id": str(i), "task": "text", "prompt": "say", "label": "A", "media": [],
             "responses": [a, b]}
            for i, (a, b) in enumerate([("it is red .", "it is red !"), ("red .", "blue ."),
                                        ("red", "red")])]
    common.write_lines(tmp_path / "rows.jsonl", rows)
    kept = bt.load_pairs(str(tmp_path / "rows.jsonl"), encoder,
                         {**SETTINGS, "max_response_tokens": 4}, bt.Config())
    assert [r["id"] for r in kept] == ["1"] and "2 rows left out" in capsys.readouterr().out
    # so short that "Image 1 is ..." and "Image 2 is ..." are the same; swapped, the media differ
    pairs = [r for r in rows_of(world, "mm_rl", encoder) if r["task"].endswith("generation")]
    for t2i, same in (("pair", True), ("swap", False)):
        settings = {**SETTINGS, "max_response_tokens": 2, "t2i": t2i}
        assert bt.candidates_are_equal(pairs[0], encoder, settings) == same
    (_, answers), = bt.candidates(rows[0], encoder, {**SETTINGS, "max_response_tokens": 4})
    assert len(answers[0]) == 4 and answers[0][-1] == encoder.eos_id


def test_rows_with_a_cut_response_are_counted(tmp_path, reward_model, capsys):
    # "red ." and its end are three tokens. kills: responses counted instead of rows, an answer that
    # just fits, the worse or the first response alone, a count for each chunk or order
    model, encoder = reward_model
    long, short = "it is red and blue .", "red ."
    assert len(encoder.answer_ids(short)) == 3
    pairs = [(long, short), (short, long), (long + " so .", long), (short, "blue .")]
    rows = [{"id": str(i), "task": "text", "prompt": "say", "label": "A", "media": [],
             "responses": list(pair)} for i, pair in enumerate(pairs)]
    common.write_lines(tmp_path / "rows.jsonl", rows)
    model.settings["max_response_tokens"] = 3
    source = str(tmp_path / "rows.jsonl")
    kept = bt.load_pairs(source, encoder, model.settings, bt.Config())
    cut = "{} of {} rows have a response cut at 3 tokens"
    assert len(kept) == 3 and f"{source}: {cut.format(2, 3)}" in capsys.readouterr().err
    bt.score_rows(model, encoder, rows, batch_size=1)
    assert capsys.readouterr().err.count(cut.format(3, 4)) == 1
    items = [{**row, "response": row["responses"][0]} for row in rows]
    bt.score_texts(model, encoder, items, batch_size=1)
    assert capsys.readouterr().err.count(cut.format(2, 4)) == 1
    model.settings["max_response_tokens"] = 64
    bt.score_rows(model, encoder, rows)
    assert "cut" not in capsys.readouterr().err


@pytest.mark.parametrize("change, complaint", [
    ({"iterations": -1}, "iterations is 0"), ({"iterations": 2}, "two voters"),
    ({"models": ["a"]}, "two voters"), ({"models": ["a", "a"]}, "two voters"),
    ({"models": ["a", "b"]}, None), ({"iterations": 2, "models": ["a"]}, None)])
def test_no_model_votes_on_itself_alone(change, complaint):
    # kills: the loop's model as the only voter, who then agrees with its own flips; one model
    # named twice; a negative number of iterations
    cfg = bt.Config(curate="rows.jsonl", **change)
    if complaint is None:
        cfg.check()
    else:
        with pytest.raises(ValueError, match=complaint):
            cfg.check()


def test_length_balance():
    # kills: longer by position instead of by label, nothing dropped, equals dropped
    text = {1: ["long text", "x"], -1: ["x", "long text"], 0: ["same", "size"]}
    sides = [1] * 7 + [-1] * 3 + [0] * 2
    rows = [{"id": i, "responses": text[s][:: 1 if i % 2 else -1], "label": "BA"[i % 2]}
            for i, s in enumerate(sides)]
    rows.append({"id": 12, "responses": None, "label": "A"})
    kept = bt.balanced(rows, seed=0)
    with pytest.raises(SystemExit, match="leaves no row"):
        bt.balanced([r for r in rows if r["id"] < 7], seed=0)
    assert sorted(sides[r["id"]] for r in kept if r["id"] < 12) == [-1] * 3 + [0] * 2 + [1] * 3
    assert len({r["id"] for r in kept}) == 9 and 12 in {r["id"] for r in kept}


# ----------------------------------------------------------------------------------------- curation
@pytest.mark.parametrize("strengths, want", [
    ([3, -1, -5, -2, 0, -4], {2, 5}), ([-1, -3, -2], {1}), ([-1], set()), ([1, 2, 0], set())])
def test_the_lower_half_of_the_negatives_is_flipped(strengths, want):
    # kills: the upper half, half of all rows, rounding up
    assert bt.to_flip(strengths) == want


def fake_models(monkeypatch, scores, verdicts):
    """scores {model: {id: (a, b)}} and verdicts {judge: {id: (pred in AB, pred in BA)}}."""
    monkeypatch.setattr(bt, "load", lambda folder, *_, **__: (
        SimpleNamespace(name=folder, settings=None), None))
    judge = SimpleNamespace(check=lambda row, form: 9 if row["id"] == "long" else 5)
    monkeypatch.setattr(common, "load", lambda folder, *_, **__: (folder, judge))
    monkeypatch.setattr(bt, "report_cut", lambda *_: None)
    monkeypatch.setattr(bt, "score_rows", lambda model, _, rows, *more, **kind: [
        scores[model.name][r["id"]] for r in rows])
    monkeypatch.setattr(common, "judge", lambda model, _, rows, *more, **kind: [
        {"at": i, "pred": p} for i, r in enumerate(rows) for p in verdicts[model][r["id"]]])


def test_curation_by_hand(tmp_path, monkeypatch):
    # kills: a flip by one model's score, over all sources at once, step 2 by the given label,
    # judges that see agreed rows or prompts over the limit, ties kept, None among the votes, the
    # majority's other side
    ids = ["flip", "weak", "fine", "other", "long", "worst", "none", "turn", "even", "also"]
    rows = [{"id": i, "task": "text", "label": "A", "media": [], "rationale": "A",
             "source": "two" if i in ("other", "long") else "one"} for i in ids]
    margins = {"own": {"flip": -4, "weak": -1, "fine": 2, "other": -9, "worst": -1, "none": -1.5,
                       "turn": -2, "even": -1, "also": -3, "long": -1},
               "peer": {"flip": -6, "weak": -1.5, "fine": -1, "other": -9, "worst": -2, "none": -1,
                        "turn": 1, "even": 0.3, "also": -3, "long": 2}}
    scores = {m: {i: (d + 7, 7) for i, d in of.items()} for m, of in margins.items()}
    verdicts = {"j1": {"weak": "AA", "other": "BB", "even": "AB", "none": [None, None],
                       "turn": ["B", None]},
                "j2": {"weak": "AB", "other": "AB", "even": "BA", "none": [None, None],
                       "turn": ["B", "A"]}}
    fake_models(monkeypatch, scores, verdicts)
    cfg = SimpleNamespace(frames=8, max_tiles=12, eval_batch=4, judge_tokens=9,
                          max_prompt_tokens=8)
    kept = bt.curate(rows, ["own", "peer"], "own", ["j1", "j2"], cfg, "cpu", tmp_path)
    # margins in source one: -5 -3 -1.5 | -1.25 -1.25 -.5 -.35: of seven negatives three are flipped
    fate = {r["id"]: (r["label"], r["curation"]["flipped"], r["curation"]["fate"])
            for r in kept + lines(tmp_path / "dropped.jsonl")}
    assert fate == {"flip": ("B", True, "agreed"), "fine": ("A", False, "agreed"),
                    "worst": ("B", True, "agreed"), "also": ("B", True, "agreed"),
                    "weak": ("A", False, "re-annotated"), "even": ("A", False, "dropped: tie"),
                    "other": ("B", False, "re-annotated"), "turn": ("B", False, "re-annotated"),
                    "none": ("A", False, "dropped: no verdict"),
                    "long": ("A", False, "dropped: no verdict")}
    assert {r["id"]: r["rationale"] for r in kept} == {
        i: "A" if i in ("weak", "fine") else None for i in ids if i not in ("none", "even", "long")}
    assert [r["curation"]["votes"] for r in kept if r["id"] == "turn"] == [{"B": 2, "A": 1}]
    summary = json.loads((tmp_path / "curation.json").read_text())
    assert (summary["rows"], summary["flipped"], summary["kept"]) == (10, 3, 7)
    # again: nothing is scored anew; other rows are refused
    monkeypatch.setattr(bt, "score_rows", None)
    monkeypatch.setattr(common, "judge", None)
    assert bt.curate(rows, ["own", "peer"], "own", ["j1", "j2"], cfg, "cpu", tmp_path) == kept
    with pytest.raises(SystemExit, match="other rows"):
        bt.curate(rows[1:], ["own", "peer"], "own", [], cfg, "cpu", tmp_path)
    cfg.frames = 4  # another look at the rows is another verdict; scores see what they always saw
    with pytest.raises(SystemExit, match="by-j1.jsonl.*frames 8 -> 4"):
        bt.curate(rows, ["own", "peer"], "own", ["j1"], cfg, "cpu", tmp_path)


def test_what_a_judge_was_trained_to_say_is_what_it_is_asked(tmp_path):
    # kills: an R1 judge shown MSRL's prompt, a reward model asked for a verdict
    for name, stage in (("r1", {"stage": "stage1", "config": {"style": "r1"}}),
                        ("rm", {"stage": "bt_reward", "config": {}}), ("old", {"config": {}})):
        (tmp_path / name).mkdir()
        (tmp_path / name / "stage.json").write_text(json.dumps(stage))
    assert [bt.judge_style(tmp_path / x) for x in ("r1", "old", "hub")] == ["r1", "msrl", "msrl"]
    with pytest.raises(SystemExit, match="states no verdict"):
        bt.judge_style(tmp_path / "rm")


def test_killed_scoring_goes_on_where_it_was(tmp_path):
    # kills: done rows worked again, a torn line kept, a chunk that begins where another one would
    rows = [{"id": str(i)} for i in range(10)]
    worked, starts = [], []

    def work(chunk, at):
        starts.append(at)
        worked.extend(row["id"] for row in chunk)
        return [int(row["id"]) ** 2 for row in chunk]

    def killed(chunk, at):
        squares = work(chunk, at)
        if "6" in worked:
            raise KeyboardInterrupt
        return squares

    def square(work):
        return common.resumed(tmp_path / "x.jsonl", {"model": "m"}, rows, work, chunk=3)

    with pytest.raises(KeyboardInterrupt):
        square(killed)
    with open(tmp_path / "x.jsonl", "a") as f:
        f.write("36\n[3")  # killed while it wrote the third chunk
    worked.clear()
    starts.clear()
    assert square(work) == [i * i for i in range(10)]
    assert worked == ["6", "7", "8", "9"] and starts == [6, 9]
    assert square(killed) == [i * i for i in range(10)] and starts == [6, 9]


def test_planted_noise_is_found(tmp_path, monkeypatch):
    # kills: flips that change no label, judges' majority ignored
    rng = random.Random(1)
    true = {str(i): rng.choice("AB") for i in range(600)}
    rows = [{"id": i, "task": "text", "media": [],
             "label": OTHER[t] if rng.random() < 0.3 else t} for i, t in true.items()]

    def noisy_scores():
        return {i: (rng.gauss(1 if t == "A" else -1, 1.2), 0) for i, t in true.items()}
    scores = {model: noisy_scores() for model in ("a", "b", "c")}
    verdicts = {"j": {i: [t if rng.random() < 0.85 else OTHER[t] for _ in "12"]
                      for i, t in true.items()}}
    fake_models(monkeypatch, scores, verdicts)
    cfg = SimpleNamespace(frames=8, max_tiles=12, eval_batch=4, judge_tokens=9,
                          max_prompt_tokens=8)
    kept = bt.curate(rows, list("abc"), "a", ["j"], cfg, "cpu", tmp_path)

    def right(labelled):
        return sum(row["label"] == true[row["id"]] for row in labelled) / len(labelled)
    assert right(rows) < 0.75 and right(kept) > 0.9 and len(kept) > 500
    turned = [r for r in kept if r["curation"]["flipped"] and r["curation"]["fate"] == "agreed"]
    assert len(turned) > 50 and right(turned) > 0.9


# ------------------------------------------------------------------------------- rewards for others
def test_schemes_for_a_group(monkeypatch):
    # kills: hybrid without the sigmoid, a match scored by the model
    monkeypatch.setattr(bt, "score_batch", lambda m, e, rows: torch.tensor([4.0, -1.0, 0.5]))
    item = {"task": "text", "prompt": "p", "media": []}
    model, encoder = SimpleNamespace(reward_head=None), SimpleNamespace(forbidden=())

    def get(scheme, reference="red ."):
        return bt.group_rewards(model, encoder, item, ["a", " red .", "b"], scheme, reference)
    assert get("rule") == [0, 1, 0] and get("model") == [4, -1, 0.5]
    assert get("hybrid") == pytest.approx([0.9820138, 1.0, 0.6224593])
    assert get("hybrid", None) == pytest.approx([0.9820138, 0.2689414, 0.6224593])
    with pytest.raises(ValueError, match="image_generation"):
        bt.group_rewards(model, encoder, {**item, "task": "image_generation"}, ["a"])
    # kills: any other scheme taken for hybrid, zeros for a rule without a reference
    with pytest.raises(ValueError, match="'best'.*rule, model, hybrid"):
        get("best")
    with pytest.raises(ValueError, match="reference"):
        get("rule", None)


@pytest.mark.parametrize("task", ["text", "image_understanding"])
def test_an_ill_formed_answer_gets_the_least_reward(world, reward_model, task):
    # kills: a crash for an image token, a forged tag scored, the others' scores moved by one place,
    # 0 under "model" though all scores are below it
    model, encoder = reward_model
    with torch.no_grad():
        model.reward_head[-1].bias.sub_(50)
    rows = rows_of(world, "mm_rl", encoder) + rows_of(world, "text_rl", encoder)
    row = [r for r in rows if r["task"] == task][0]
    item = {key: row[key] for key in ("task", "prompt", "media")}
    answers = ["", "red .", "<IMG_CONTEXT>", "it is red .", " ", "<answer>A</answer>",
               f"blue {encoder.tokenizer.eos_token} ."]
    bad = [0, 2, 4, 5, 6]
    alone = bt.group_rewards(model, encoder, item, ["red .", "it is red ."], "model")
    assert max(alone) < 0
    got = bt.group_rewards(model, encoder, item, answers, "model")
    assert [got[1], got[3]] == pytest.approx(alone, abs=1e-4)
    assert [got[i] for i in bad] == [min(got[1], got[3])] * 5
    got = bt.group_rewards(model, encoder, item, answers, "hybrid", "it is red .")
    assert got[3] == 1 and got[1] > 0 and [got[i] for i in bad] == [0] * 5
    assert bt.group_rewards(model, encoder, item, answers, "rule", "red .") == [0, 1, 0, 0, 0, 0, 0]
    for scheme in ("model", "hybrid"):
        assert bt.group_rewards(model, encoder, item, ["", " "], scheme) == [0, 0]


def test_a_judge_as_the_reward_of_a_group(monkeypatch):
    # kills: one order, the share divided by all answers, no verdict as a loss, pred taken for i
    strength = {"a": 3, "b": 1, "c": 1, "d": 0}

    def judge(model, encoder, rows, *args, **kwargs):
        for row in rows:
            common.check_row(row, ".")
        preds = []
        for i, row in enumerate(rows):
            a, b = (strength[response] for response in row["responses"])
            stronger = None if a == b else "A" if a > b else "B"
            # in one order it prefers what stands first to d, or d
            first = "A" if "d" in row["responses"] else stronger
            preds += [{"at": i, "pred": first}, {"at": i, "pred": stronger}]
        return preds
    monkeypatch.setattr(common, "judge", judge)

    encoder = SimpleNamespace(forbidden=common.FORBIDDEN)

    def get(scheme, reference=None, answers=tuple("abdc")):
        item = {"task": "text", "prompt": "p", "media": []}
        return bt.group_rewards(None, encoder, item, answers, scheme, reference)
    # b and c tie; of d's three pairs it stands first in the one with c, and gets half of that
    assert get("model") == pytest.approx([1, 1.5 / 3, 0.5 / 3, (0.5 + 0.5) / 3])
    assert get("hybrid", "b") == pytest.approx([1, 1, 0.5 / 3, 1 / 3])
    # kills: a tag shown to the judge; an answer that beats nothing but ill-formed ones without a
    # reward. Of two others a wins against b and "<think>", b against "<think>"
    assert get("model", answers=("<think>", "a", "b")) == pytest.approx([0, 1, 0.5])
    assert get("hybrid", answers=("", "b")) == [0, 1] and get("model", answers=("b",)) == [0]


# ---------------------------------------------------------------------------- debiased construction
def scored(*scores, weights=(0.5, 0.1, 0.1, 0.1, 0.1, 0.1)):
    return "So: " + json.dumps([{"weights": weights, "scores": s} for s in scores]) + " ."


@pytest.mark.parametrize("text, n, want", [
    (scored([10, 0, 5, 5, 10, 10], [2, 2, 2, 2, 2, 2]), 2, [8.0, 2.0]),
    (scored([10, 0, 5, 5, 10, 10]), 2, None), (scored([10, 0, 5, 5, 10, 11]), 1, None),
    (scored([10, 0, 5, 5, 10]), 1, None), (scored([1.5] * 6), 1, None), ("no scores", 1, None),
    (scored([4, 4, 4, 4, 4, 4]).replace("[{", "[ \n {").replace("}]", "} \n]"), 1, [4.0]),
    (scored([1] * 6, weights=[0.2] * 6), 1, None), ('[{"weights": 3}]', 1, None)])
def test_overall_score_by_hand(text, n, want):
    # kills: unweighted mean, weights that do not sum to 1 taken, fractions taken
    assert bt.overall(text, n) == (want and pytest.approx(want))


def test_pairs_on_which_both_ways_of_scoring_agree():
    # kills: one of the two, ties taken, the order exchanged
    assert bt.agreed([3, 2, 2, 1], [5, 6, 4, 1]) == [(0, 2), (0, 3), (1, 3), (2, 3)]


CUT = "cut"  # an answer without its end


def construct_by_hand(monkeypatch, reward_model, row, quality, written):
    """bt.pairs_of() with a teacher that scores by `quality`, and a candidate whose first answers
    are `written`, and then "bad" from a noised image and "good" otherwise. -> pairs, outcomes, and
    for each replacement (image noised?, reference shown?)"""
    model, encoder = reward_model
    clean = encoder.encode("<image>", row["media"]).pixels
    quality = {**quality, "good": 7, "bad": 1}
    asked = []

    def place_of(asks, response):
        return asks.index(f":\n{response}")

    def sample(model, encoder, prompts, n, *_):
        texts = []
        for p in prompts:
            asks = encoder.decode(p.ids)
            shown = [q for q in quality if f":\n{q}" in asks]
            noised = not torch.equal(p.pixels, clean)
            if "Human-Generated" in asks:
                assert not noised and "it is red ." in asks and CUT not in shown
                order = sorted(shown, key=functools.partial(place_of, asks))
                texts.append("hm" if None in [quality[q] for q in order] else
                             scored(*[[quality[q]] * 6 for q in order]))
            elif written:
                assert n == len(written) and not noised and "it is red ." not in asks
                texts += written
                written.clear()
            else:
                asked.append((noised, "it is red ." in asks))
                texts += ["bad" if noised else "good"] * n
        return SimpleNamespace(ids=[[(text, -1 if text == CUT else encoder.eos_id)]
                                    for text in texts])

    monkeypatch.setattr(bt, "sample_group", sample)
    monkeypatch.setattr(encoder, "decode", lambda ids: ids[0] if isinstance(ids, tuple) else
                        encoder.tokenizer.decode(ids))
    cfg = SimpleNamespace(seed=0, candidates=["c"], teacher="t", samples=len(written),
                          judge_tokens=9, low=5, high=8, noise=1.0)
    pairs, outcomes = bt.pairs_of(row, {"c": reward_model, "t": reward_model}, cfg)
    for pair in pairs:
        better, worse = pair["responses"][:: 1 if pair["label"] == "A" else -1]
        assert quality[better] > quality[worse] and pair["media"] == row["media"]
        common.check_row(pair, ".")
    return pairs, dict(outcomes), asked


@pytest.fixture()
def prompt_row(world, reward_model):
    rows = rows_of(world, "mm_rl", reward_model[1])
    row = [r for r in rows if r["task"] == "image_understanding"][0]
    return {**row, "reference": "it is red .", "responses": []}


@pytest.mark.parametrize("quality, done, n", [
    ({"one": 9, "two": 3, "three": 6}, "as they were", 3), ({"one": 2, "two": 1}, "all low", 1),
    ({"one": 9, "two": 8}, "all high", 1), ({"one": 9, "two": None}, "malformed scores", 0)])
def test_construction_with_a_teacher_by_hand(monkeypatch, reward_model, prompt_row, quality, done,
                                             n):
    # kills: new answers not scored, noise for everybody, better and worse exchanged, the reference
    # given to the noised
    pairs, outcomes, asked = construct_by_hand(monkeypatch, reward_model, prompt_row, quality,
                                               list(quality))
    assert (outcomes, len(pairs)) == ({done: 1}, n)
    assert asked == {"all low": [(False, True)], "all high": [(True, False)]}.get(done, [])


@pytest.mark.parametrize("quality", [{"one": 2, "two": 1}, {"one": 10, "two": 9}])
def test_responses_that_came_with_a_row_stay_as_they_are(monkeypatch, reward_model, prompt_row,
                                                         quality):
    # kills: an answer of a candidate among those of an unknown writer: its style tells the label
    row = {**prompt_row, "responses": list(quality)}
    pairs, outcomes, asked = construct_by_hand(monkeypatch, reward_model, row, quality, [])
    assert asked == [] and outcomes == {"as they were": 1}
    assert [sorted(pair["responses"]) for pair in pairs] == [["one", "two"]]


@pytest.mark.parametrize("written, want, n", [
    (["one", CUT, "two", CUT], {"cut answers dropped": 2, "as they were": 1}, 1),
    (["one", CUT], {"cut answers dropped": 1, "too few whole answers": 1}, 0)])
def test_cut_answers_are_in_no_pair(monkeypatch, reward_model, prompt_row, written, want, n):
    # kills: an answer cut at --judge_tokens as the worse of a pair, dropped without a count, one
    # answer sent to the teacher
    quality = {"one": 9, "two": 3, CUT: 1}
    pairs, outcomes, asked = construct_by_hand(monkeypatch, reward_model, prompt_row, quality,
                                               written)
    assert (outcomes, len(pairs), asked) == (want, n, [])


def test_a_cut_replacement_replaces_nothing(monkeypatch, reward_model, prompt_row):
    # kills: None among the responses, an old answer lost for a new one that is not there
    real = bt.ask

    def cut_when_noised(*args, noise=0.0, **more):
        answers = real(*args, noise=noise, **more)
        return [None] * len(answers) if noise else answers
    monkeypatch.setattr(bt, "ask", cut_when_noised)
    pairs, outcomes, _ = construct_by_hand(monkeypatch, reward_model, prompt_row,
                                           {"one": 10, "two": 9}, ["one", "two"])
    assert outcomes == {"cut answers dropped": 1, "all high": 1}
    assert [sorted(pair["responses"]) for pair in pairs] == [["one", "two"]]


# --------------------------------------------------------------------------------------- whole runs
def bt_flags(world, out, **more):
    settings = {"model": toy_world.PREBUILT,
                "data": f"{world}/text_rl.jsonl,{world}/mm_rl.jsonl",
                "heldout": f"{world}/heldout_text.jsonl", "out": out, "batch_size": 4,
                "micro_batch": 2, "epochs": 1, "lr": 2e-4}
    return flags(**settings | more)


def test_a_run_its_resumption_and_two_processes_agree(world, tmp_path, monkeypatch):
    # kills: mean over micro-batches instead of rows, head not in the saved state, no gather
    run_here(bt.main, bt_flags(world, tmp_path / "whole"))
    stop, real = 3, common.save_state

    def save_and_stop(out, model, optimizer, step, *args, **kind):
        real(out, model, optimizer, step, *args, **kind)
        if step == stop:
            raise KeyboardInterrupt

    monkeypatch.setattr(common, "save_state", save_and_stop)
    with pytest.raises(KeyboardInterrupt):
        run_here(bt.main, bt_flags(world, tmp_path / "parts", save_every=3))
    stop = -1
    run_here(bt.main, bt_flags(world, tmp_path / "parts", save_every=3))
    torchrun(["bt_reward.py", *bt_flags(world, tmp_path / "two")])
    for name in ("model.safetensors", "reward_head.safetensors"):
        want = load_file(tmp_path / "whole" / name)
        for other, tol in (("parts", 0), ("two", 1e-4)):
            got = load_file(tmp_path / other / name)
            assert got.keys() == want.keys() and not any("reward_head" in k for k in got)
            for k in want:
                torch.testing.assert_close(got[k], want[k], rtol=0, atol=tol)
    logs = [lines(tmp_path / x / "metrics.jsonl") for x in ("whole", "parts", "two")]
    for a, b, c in zip(*logs, strict=True):
        assert a["loss"] == b["loss"] == pytest.approx(c["loss"], abs=1e-5)
        assert a["grad_norm"] == pytest.approx(c["grad_norm"], rel=1e-3)  # Adam hides its scale
        assert sum(t["n"] for t in c["tasks"].values()) == 4

    info = json.loads((tmp_path / "whole" / "stage.json").read_text())
    assert info["stage"] == "bt_reward"
    args = ["--model", tmp_path / "whole", "--data", world / "mm_rl.jsonl", "--batch_size", 1]
    run_here(ev.main, [*args, "--out", tmp_path / "one.jsonl"])  # kills: scores of other rows
    torchrun(["eval.py", *args, "--out", tmp_path / "both.jsonl"])
    one, both = lines(tmp_path / "one.jsonl"), lines(tmp_path / "both.jsonl")
    assert len(one) == 8 and [p["id"] for p in one] == [p["id"] for p in both]
    assert [p["score_a"] for p in one] == pytest.approx([p["score_a"] for p in both], abs=1e-4)
    # plain transformers loads it, and its scores are those of the run
    model, encoder = bt.load(tmp_path / "whole")
    rows = rows_of(world, "heldout_text", encoder)
    scores = bt.score_rows(model, encoder, rows)
    for name in ("accuracy", "margin", "chosen", "rejected"):
        assert bt.describe(rows, scores)[name] == pytest.approx(info["heldout"]["after"][name],
                                                                abs=1e-5)
    items = [{**r, "response": r["responses"][1]} for r in rows]
    assert bt.score_texts(model, encoder, items) == pytest.approx([b for _, b in scores], abs=1e-4)
    with pytest.raises(SystemExit, match="swap"):
        bt.score_texts(model, encoder, [{"task": "image_generation", "prompt": "x", "media": []}])
    with pytest.raises(SystemExit, match="no reward model"):
        bt.load(toy_world.PREBUILT)


def test_a_reward_model_remembers_how_it_looks(world, tmp_path, monkeypatch):
    # kills: the defaults of the script that scores in place of what was trained with, a caller who
    # is not heard, a checkpoint without the two refused
    out = tmp_path / "run"
    run_here(bt.main, bt_flags(world, out, data=f"{world}/mm_rl.jsonl:4", heldout="", frames=2,
                               max_tiles=1))

    def sight(folder, **more):
        model, encoder = bt.load(folder, **more)
        assert (model.settings["frames"], model.settings["max_tiles"]) == (
            encoder.frames, encoder.max_tiles)
        return encoder.frames, encoder.max_tiles
    assert sight(out) == (2, 1) and sight(out, frames=5) == (5, 1)
    assert sight(out, max_tiles=3) == (2, 3)

    loaded = []
    real = ev.load_judge

    def load_judge(*args):
        judges = real(*args)
        loaded.extend(judges)
        return judges
    monkeypatch.setattr(ev, "load_judge", load_judge)
    args = ["--model", out, "--data", world / "heldout_text.jsonl"]
    run_here(ev.main, args)
    run_here(ev.main, [*args, "--frames", 8])
    assert [encoder.frames for _, encoder in loaded[:2]] == [2, 8]
    assert loaded[0][1].max_tiles == 1

    info = json.loads((out / "stage.json").read_text())
    del info["config"]["frames"], info["config"]["max_tiles"]
    (out / "stage.json").write_text(json.dumps(info))
    assert sight(out) == (8, 12)


def first_loss(world, cfg, source):
    """Of the first step, from the scores of a fresh model, with numbers of its own."""
    model, encoder = common.load(cfg.model)
    torch.manual_seed(cfg.seed)
    bt.add_head(model, bt.settings_of(vars(cfg)))
    rows = bt.load_pairs(source, encoder, model.settings, cfg)
    batch = common.batch_of(rows, 0, cfg.batch_size, cfg.seed)
    with torch.no_grad():
        pairs = bt.score_batch(model, encoder, batch).view(-1, 2).tolist()
    pairs = [p if r["label"] == "A" else p[::-1] for p, r in zip(pairs, batch, strict=True)]
    return sum(math.log1p(math.exp(b - a)) + cfg.zero_coefficient * (a + b) ** 2
               for a, b in pairs) / cfg.batch_size


def test_it_learns_the_label_at_the_rate_it_says(world, tmp_path):
    # kills: chosen and rejected exchanged, "A" always chosen, no warm-up, a rate above --lr
    source = f"{world}/text_rl.jsonl"
    args = bt_flags(world, tmp_path / "run", data=source, heldout="", epochs=20, lr=1e-3)
    run_here(bt.main, args)
    log = lines(tmp_path / "run" / "metrics.jsonl")
    cfg = bt.Config(model=str(toy_world.PREBUILT), data=source, batch_size=4)
    assert log[0]["loss"] == pytest.approx(first_loss(world, cfg, source), abs=1e-5)
    assert log[-1]["accuracy"] == 1 and log[-1]["margin"] > 1 > 0.5 > log[-1]["loss"]
    rates = [1e-3 * (k + 1) / 6 for k in range(6)]
    rates += [1e-3 * (1 + math.cos(math.pi * k / 54)) / 2 for k in range(54)]
    assert [x["lr"] for x in log] == pytest.approx(rates)


def test_flags_reach_the_run(world, tmp_path, capsys):
    # kills: any one of these flags ignored
    source = f"{world}/mm_rl.jsonl"
    more = {"zero_coefficient": 3.0, "length_norm": True, "t2i": "swap"}
    run_here(bt.main, bt_flags(world, tmp_path / "run", data=source, heldout="", freeze_vision=True,
                            balance_length=True, lr=1e-3, **more))
    assert "--balance_length" in capsys.readouterr().out
    cfg = bt.Config(model=str(toy_world.PREBUILT), batch_size=4, **more)
    _, encoder = common.load(cfg.model)
    kept = bt.balanced(bt.load_pairs(source, encoder, bt.settings_of(vars(cfg)), cfg), cfg.seed)
    common.write_lines(tmp_path / "kept.jsonl", kept)
    got = lines(tmp_path / "run" / "metrics.jsonl")[0]["loss"]
    assert got == pytest.approx(first_loss(world, cfg, str(tmp_path / "kept.jsonl")), abs=1e-5)
    was, now = weights_of(toy_world.PREBUILT), weights_of(tmp_path / "run")
    moved = {name for name in now if not torch.equal(now[name], was[name].float())}
    assert moved and all("language_model" in k for k in moved)


def test_a_pair_is_scored_in_both_orders(world, reward_model):
    # kills: one order only, sides exchanged in the second, text rows scored twice
    model, encoder = reward_model
    rows = rows_of(world, "mm_rl", encoder)
    row = [r for r in rows if r["task"] == "image_generation"][0]
    with torch.no_grad():
        a, b = bt.score_batch(model, encoder, [row]).tolist()
        turned_b, turned_a = bt.score_batch(model, encoder, [common.swap(row)]).tolist()
    assert abs(a - turned_a) > 1e-3
    (got, swapped) = bt.score_rows(model, encoder, [row, common.swap(row)])
    assert got == pytest.approx(((a + turned_a) / 2, (b + turned_b) / 2), abs=1e-4)
    assert swapped == pytest.approx(got[::-1], abs=1e-4)


def test_rows_it_cannot_read_are_named_or_counted(world, reward_model, monkeypatch, capsys):
    # kills: a row checked for judges only, so that scoring ends in a traceback
    monkeypatch.setattr(ev, "is_reward_model", lambda folder: True)
    row = lines(world / "mm_rl.jsonl")[0]
    row |= {"row": 0, "media": [str(world / m) for m in row["media"]]}
    rows = [row, {**row, "media": [m + ".gone" for m in row["media"]]},
            {**row, "media": [], "captions": ["red disc"] * len(row["media"])}]
    args = SimpleNamespace(model=["m"], data="rows.jsonl", max_prompt_tokens=9999,
                           skip_bad_rows=True)
    assert len(ev.fit_to_judge(rows, [reward_model], args)) == 1
    assert "2 bad rows" in capsys.readouterr().out
    args.skip_bad_rows = False
    with pytest.raises(SystemExit, match="rows.jsonl, row 0.*does not exist"):
        ev.fit_to_judge(rows[1:], [reward_model], args)
    args.max_prompt_tokens = 1
    with pytest.raises(SystemExit, match="no row"):
        ev.fit_to_judge(rows[:1], [reward_model], args)


def test_iterations_train_and_curate_in_turns(world, tmp_path, monkeypatch):
    # DT2IT 3.3's five steps, twice. kills: the old model re-annotating, all open rows in the first
    # iteration, the curated rows without those before, the voters used in step 4
    calls = []

    def train(cfg, device, out, rows):
        out.mkdir(parents=True)
        (out / "stage.json").write_text("{}")
        calls.append((out.name, len(rows)))

    def curate(rows, voters, own, judges, cfg, device, out):
        calls.append((out.name, len(rows), [getattr(v, "name", v) for v in voters], own.name))
        return rows[:-1]  # each curation drops a row
    monkeypatch.setattr(bt, "train", train)
    monkeypatch.setattr(bt, "curate", curate)
    cfg = bt.Config(model=str(toy_world.PREBUILT), data=str(world / "text_rl.jsonl:7"), heldout="",
                    curate=str(world / "text_rl.jsonl"), iterations=2, models=["other"],
                    out=str(tmp_path))
    bt.iterate(cfg, "cpu")
    assert calls == [("0-model", 7),
                     ("1-new", 6, ["0-model", "other"], "0-model"), ("1-first", 12),
                     ("1-all", 12, [], "1-first"), ("1-model", 11),
                     ("2-new", 6, ["1-model", "other"], "1-model"), ("2-first", 16),
                     ("2-all", 16, [], "2-first"), ("2-model", 15)]
    trained = [c for c in calls if len(c) == 2]
    cfg.iterations = 99
    with pytest.raises(SystemExit, match="too few"):
        bt.iterate(cfg, "cpu")
    cfg.iterations = 2
    bt.iterate(cfg, "cpu")  # what is trained already is not trained again
    assert [c for c in calls if len(c) == 2] == trained


def test_construction_runs_with_checkpoints(world, tmp_path):
    # The toy model cannot score, so every row ends as malformed: what is written says so.
    common.write_lines(tmp_path / "prompts.jsonl", [
        {"id": "q1", "task": "text", "prompt": "thing of ann ?", "media": [],
         "reference": "a disc"},
        {"id": "q2", "task": "image_understanding", "prompt": "thing of left ?",
         "media": [str(world / lines(world / "mm_rl.jsonl")[0]["media"][0])],
         "reference": "a disc", "responses": ["a ring", "a disc"]}])
    run_here(bt.main, ["--construct", tmp_path / "prompts.jsonl", "--teacher", toy_world.PREBUILT,
                       "--candidates", toy_world.PREBUILT, "--samples", 2, "--judge_tokens", 60,
                       "--out", tmp_path / "out"])
    assert lines(tmp_path / "out" / "pairs.jsonl") == []
    groups = lines(tmp_path / "out" / "groups.jsonl")[1:]
    assert [x[1] for x in groups] == [{"malformed scores": 1}] * 2
