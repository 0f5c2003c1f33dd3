"""
The Bradley-Terry reward model: scores, loss, reformulations, whole runs. The prebuilt backbone is
the model. "kills:" names wrong versions of the source under which a test was seen to fail.
"""

import json
import math
from types import SimpleNamespace

import pytest
import toy_world
import torch
import wrong_versions
from helpers import (
    check_stops, flags, lines, rejects, run_here, small_world, text_only_model, torchrun,
    weights_of)
from safetensors.torch import load_file

import bt_reward as bt
import common
import dry_run
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


@pytest.mark.parametrize("tied", [True, False])
def test_the_head_that_nothing_uses_is_frozen(encoder, tied):
    # And what is trained has a gradient. kills: a head of zeros and moments on several processes,
    # tied embeddings that do not learn, another count in --dry_run
    model = text_only_model(encoder.tokenizer, tied)
    bt.add_head(model, dict(SETTINGS))
    frozen = [name for name, p in model.named_parameters() if not p.requires_grad]
    assert frozen == [] if tied else frozen == ["lm_head.weight"]
    model(last=torch.ones(1, 5, dtype=torch.bool),
          input_ids=torch.arange(5)[None]).square().sum().backward()
    trained = common.trainable(model)
    assert all(parameter.grad.norm() > 0 for parameter in trained)
    size = dry_run.measure("toy", model.config, bt.Config())
    assert size.trained == sum(parameter.numel() for parameter in trained)


# ------------------------------------------------------------------------------------ loss and head
def check_loss(bt_loss):
    """Loss and gradient in fp32 against a loop in float64, differences of -100 and -200 included,
    whose sigmoid is 0 in fp32."""
    chosen, rejected, lam = [2.5, -1.0, 0.3, -60.0, 0.0], [1.0, 3.5, 0.3, 40.0, 200.0], 0.07
    c, r = (torch.tensor(x, requires_grad=True) for x in (chosen, rejected))
    loss = bt_loss(c, r, lam)
    loss.sum().backward()
    for i, (a, b) in enumerate(zip(chosen, rejected, strict=True)):
        wrong = 1 / (1 + math.exp(a - b))  # the probability of the other order
        first = math.log1p(math.exp(b - a))
        assert loss[i].item() == pytest.approx(first + lam * (a + b) ** 2, rel=1e-5)
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


def check_balance(balanced):
    text = {1: ["long-text", "x y"], -1: ["x y", "long-text"], 0: ["same", "s ze"]}
    sides = [1] * 7 + [-1] * 3 + [0] * 2
    rows = [{"id": i, "responses": text[s][:: 1 if i % 2 else -1], "label": "BA"[i % 2]}
            for i, s in enumerate(sides)]
    rows.append({"id": 12, "responses": None, "label": "A"})
    kept = balanced(rows, seed=0)
    assert sorted(sides[r["id"]] for r in kept if r["id"] < 12) == [-1] * 3 + [0] * 2 + [1] * 3
    assert len({r["id"] for r in kept}) == 9 and 12 in {r["id"] for r in kept}
    drawn = [sorted(r["id"] for r in balanced(rows, seed)) for seed in (0, 1, 2, 3, 4) * 2]
    assert drawn[:5] == drawn[5:], "one seed drops now these rows and now those"
    assert any(ids != drawn[0] for ids in drawn), "all seeds drop the same rows"
    check_stops(balanced, [{"id": 0, "responses": ["long", "x"], "label": "A"}], 0)


def test_length_balance():
    check_balance(bt.balanced)
    rows = [{"id": i, "responses": ["long", "x"], "label": "A"} for i in range(7)]
    with pytest.raises(SystemExit, match="leaves no row"):
        bt.balanced(rows, seed=0)


def test_the_frame_of_the_wrong_balances_is_right():
    check_balance(wrong_versions.balanced)


@pytest.mark.parametrize("name", wrong_versions.BALANCES)
def test_wrong_balances_are_rejected(name):
    rejects(check_balance, wrong_versions.BALANCES[name])


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
    cfg = bt.Config(model=str(toy_world.PREBUILT), batch_size=4, media_root=str(world), **more)
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
