"""
README is short and true: two pages, one picture, and every file, function, test and flag that it
names exists. What was measured stands in tests/RESULTS.md, under the command that makes it; the
figure and the group of answers come from tests/reference_runs/.
"""

import argparse
import importlib
import json
import re
import shlex
import shutil
import statistics
import sys
from dataclasses import fields
from pathlib import Path

import figures
import pytest
from helpers import ROOT, TESTS, write

import common

README = (ROOT / "README.md").read_text("utf-8")
RESULTS = (TESTS / "RESULTS.md").read_text("utf-8")
FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)


# ------------------------------------------------------------------------------------ what is there
def blocks(text, language):
    """The fenced blocks of a language"""
    return [code for name, code in FENCE.findall(text) if name == language]


def spans(text):
    """What stands between single backticks, in one line each"""
    return [" ".join(span.split()) for span in re.findall(r"`([^`]+)`", FENCE.sub("", text))]


def section(text, title):
    return text.partition(f"\n## {title}\n")[2].partition("\n## ")[0]


def commands(text):
    """Every command with a script in it, in fenced blocks and between backticks -> [(script as
    written, its arguments)]"""
    written = []
    for block in blocks(text, "bash"):
        written += block.replace("&&\n", "\n").replace("&&", "\n").splitlines()
    for span in spans(text):
        if span.startswith(("python ", "torchrun ")):
            written += span.split("&&")
    found = []
    for line in written:
        words = shlex.split(line, comments=True)
        scripts = [word for word in words if word.endswith(".py")]
        if scripts:
            found.append((scripts[0], words[words.index(scripts[0]) + 1:]))
    return found


class Parsed(Exception):
    """A script has read its command line, and is to do no more."""


def parse(script, args):
    """main() of a script, until it has parsed its command line"""
    def stop_after(parse):
        def parse_and_stop(*args, **kwargs):
            parse(*args, **kwargs)
            raise Parsed
        return parse_and_stop

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", [script, *args])
        patch.syspath_prepend(ROOT / Path(script).parent)  # as Python itself does
        patch.setattr(common, "find_spec", lambda name: True)  # --lora_rank: peft may be missing
        patch.setattr(common, "parse_config", stop_after(common.parse_config))
        patch.setattr(argparse.ArgumentParser, "parse_args",
                      stop_after(argparse.ArgumentParser.parse_args))
        with pytest.raises(Parsed):
            importlib.import_module(script.rpartition("/")[2].removesuffix(".py")).main()


# ------------------------------------------------------------------------------------------- length
def test_it_is_two_pages():
    assert len(README.splitlines()) <= 200
    assert len(README.split()) <= 1900


def test_it_has_one_picture():
    pictures = re.findall(r"!\[[^\]]+\]\(([^)]+)\)", README)
    assert pictures == [str(figures.FIGURE.relative_to(ROOT))]
    for link in re.findall(r"\]\(([^)]+)\)", README):
        assert (ROOT / link).is_file(), link


# -------------------------------------------------------------------------------------------- names
def test_every_file_exists():
    for path in re.findall(r"\btests/[\w./]*\w", README) + re.findall(r"(?<![\w/])\w+\.py", README):
        assert (ROOT / path).exists(), path


def test_every_test_exists():
    tests = "".join(path.read_text("utf-8") for path in TESTS.glob("test_*.py"))
    named = re.findall(r"`(test_\w+)`", README)
    assert len(named) > 20
    for name in named:
        assert f"\ndef {name}(" in tests, name


def test_every_function_of_the_table_exists():
    rows = re.findall(r"^\| (.+) \| (.+) \| (.+) \|$", section(README, "From equation to test"),
                      re.MULTILINE)
    assert len(rows) > 18
    for equation, functions, tests in rows[1:]:
        assert re.fullmatch(r"`test_\w+`(, `test_\w+`)*", tests), equation
        for span in spans(functions):
            file, _, names = span.partition(".py: ")
            for name in names.split(", "):
                assert hasattr(importlib.import_module(file), name), f"{file}.{name}"


@pytest.mark.parametrize("text", [README, RESULTS], ids=["README", "RESULTS"])
def test_every_command_parses(text):
    # kills: a flag or a choice that was renamed, a needed one left out
    found = commands(text)
    assert len(found) > 10
    for script, args in found:
        parse(script, args)


def test_a_command_that_does_not_parse_is_noticed():
    for script, args in (("stage1_text_grpo.py", ["--learning_rate", "1"]),
                         ("eval.py", ["--json"]), ("tests/curriculum.py", ["--seed", "0.5"])):
        with pytest.raises(SystemExit):
            parse(script, args)


def test_every_flag_exists():
    scripts = {script for script, _ in commands(README) if "/" not in script} - {"report.py"}
    known = {"preset", "backbone", "dry_run", "help"}
    for script in scripts:
        config = importlib.import_module(script.removesuffix(".py")).Config
        known |= {field.name for field in fields(config)}
    flags = [flag for span in spans(README) if span.startswith("--")
             for flag in re.findall(r"--(\w+)", span)]
    assert len(flags) > 15
    assert set(flags) <= known


def test_the_first_command_ends_with_the_page():
    first, second = blocks(section(README, "Run it"), "bash")
    assert commands(f"```bash\n{first}```")[-1] == (
        "report.py", ["runs/*", "--out", "runs/report.html"])
    assert second.rstrip().endswith("python -m pytest -q tests")


def test_the_torch_of_the_text_is_the_required_one():
    version, = re.findall(r"pip install (torch==[\d.]+)", README)
    assert re.match(re.escape(version) + r"\s", (ROOT / "requirements.txt").read_text("utf-8"))


# ------------------------------------------------------------------------------- what was measured
def test_readmes_table_is_in_the_results():
    rows = [line for line in section(README, "What you should see").splitlines()
            if line.startswith("|")]
    assert len(rows) > 3
    for row in rows:
        assert row in RESULTS.splitlines(), row


def test_results_stand_under_their_command():
    parts = RESULTS.split("\n## ")[1:]
    assert len(parts) > 10
    for part in parts:
        title, made_by = part.split("\n")[:3:2]
        assert re.fullmatch(r"`python .+ · (seeds? .+|no seed) · commit ([0-9a-f]{7}|TODO_\d+) "
                            r"\((\d{4}-\d\d-\d\d|TODO_\d+)\)", made_by), title
        assert "\n|" in part, title


def test_no_figure_is_missing():
    assert "TODO" not in README + RESULTS


# ------------------------------------------------------------------------------------ the one group
def test_the_group_earned_what_is_written():
    group = json.loads((figures.REFERENCE / "group.json").read_text("utf-8"))
    block = blocks(section(README, "Watch one group"), "")[0]
    assert block == figures.group_text(group)
    rewards = []
    for answer in group["answers"]:
        verdict = re.fullmatch(r"<think>.*</think>\s*<answer>\s*([AB])\s*</answer>", answer,
                               re.DOTALL)
        format_reward = int(verdict is not None)
        rewards.append(format_reward + int(verdict is not None and verdict[1] == group["label"]))
    shown = re.findall(r"^   reward (\d)\+(\d), advantage (.+)$", block, re.MULTILINE)
    mean, std = statistics.fmean(rewards), statistics.pstdev(rewards)
    for reward, (formed, right, advantage) in zip(rewards, shown, strict=True):
        assert reward == int(formed) + int(right)
        assert abs(float(advantage) - (reward - mean) / std) < 0.0051


# --------------------------------------------------------------------------------------- the figure
def test_the_figure_shows_the_committed_runs():
    assert figures.draw() == figures.FIGURE.read_text("utf-8")


def test_another_run_is_another_figure(tmp_path):
    shutil.copytree(figures.REFERENCE, tmp_path, dirs_exist_ok=True)
    assert figures.draw(tmp_path) == figures.draw()
    path = tmp_path / "stage1_text_grpo" / "metrics.jsonl"
    steps = figures.lines(path)
    line = [line for line in steps if "reward" in line][1]
    line["reward"] += 0.05
    write(path, steps)
    assert figures.draw(tmp_path) != figures.draw()


@pytest.mark.parametrize("name", ["stage1_text_grpo", "0-1"])
def test_runs_are_thinned_to_what_is_drawn(tmp_path, name):
    # kills: the looks of other stages, whose held-out rows are of all tasks; a share for a per cent
    run = tmp_path / name
    write(run / "metrics.jsonl", [{"step": 1, "reward": 1.234567, "kl": 0.0},
                                  {"step": 2, "reward": 1.5, "eval_accuracy": 0.5},
                                  {"step": 3, "reward": 1.75}])
    stage = {"step": 3, "heldout": {"before": {"accuracy": 0.25}, "after": {"accuracy": 0.875}}}
    (run / "stage.json").write_text(json.dumps(stage))
    (run / f"heldout_pixels_{figures.ROWS}.json").write_text(json.dumps({"text": 87.512}))
    assert figures.folder_of("1", tmp_path) == run
    assert figures.folder_of("2", tmp_path) is None
    want = [{"step": 0, "eval_accuracy": 25.0}, {"step": 1, "reward": 1.2346},
            {"step": 2, "reward": 1.5, "eval_accuracy": 50.0},
            {"step": 3, "reward": 1.75, "eval_accuracy": 87.5},
            {"step": 3, "pixels": {"text": 87.5}}]
    assert figures.thinned(run, "1") == want
    of_stage_3 = [{key: value for key, value in line.items() if key != "eval_accuracy"}
                  for line in want[1:]]
    assert figures.thinned(run, "3") == of_stage_3
