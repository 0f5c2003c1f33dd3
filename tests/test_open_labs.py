"""
Labs 11 to 13, which have no blanks: every bug of the hunt applies to today's scripts, runs to its
end and leaves its trace; ablations are compared as they should be; the checker of own rows finds
what is wrong with them. "kills:" names plausible wrong versions that make a test fail.
"""

import json
import re
import sys

import pytest
import toy_world
from helpers import ROOT, TESTS, flags, lines, run_here, run_there, small_world, text_row, write

import common
import stage0_sft
import stage1_text_grpo as stage1

sys.path.append(str(TESTS / "labs"))

import ablate  # noqa: E402  (it is on the path only now)
import bugs  # noqa: E402  (as above)
import lab  # noqa: E402  (as above)
import make_rows  # noqa: E402  (as above)
import own_rows  # noqa: E402  (as above)

MODULES = {"common.py": common, "stage1_text_grpo.py": stage1}
NAMES = [bug.name for bug in bugs.BUGS]
# Of a judge that knows nothing, accuracy cannot tell; batch_of() is asked instead.
IN_A_RUN = [bug for bug in bugs.BUGS if bug.name != "lost-label"]


def lab_py(*args, code=0):
    """lab.py -> what it prints"""
    done = run_there([TESTS / "labs" / "lab.py", *args], check=False)
    assert done.returncode == code, done.stderr[-2000:]
    assert "Traceback" not in done.stdout + done.stderr
    return done.stdout + done.stderr


# ------------------------------------------------------------------------------ 11: the bug hunt
@pytest.fixture(scope="module")
def beginner(tmp_path_factory):
    """A world, and a judge that stage 0 has taught for eight steps: half of its answers stumble."""
    folder = small_world(tmp_path_factory.mktemp("hunt"), sft=256, text_rl=24)
    run_here(stage0_sft.main, flags(
        model=toy_world.PREBUILT, data=folder / "sft.jsonl", heldout="", lr=5e-4, epochs=1,
        out=folder / "judge"))
    return folder


def train(folder, name):
    """Three steps of stage 1, with two updates each and two micro-batches. -> its figures()"""
    run_here(stage1.main, flags(
        model=folder / "judge", data=folder / "text_rl.jsonl", heldout="", out=folder / name,
        batch_size=4, micro_batch=2, group_size=4, updates_per_rollout=2, temperature=0.8,
        max_steps=3, lr=2e-5, log_rollouts_every=1))
    return bugs.figures(folder / name)


@pytest.fixture(scope="module")
def healthy(beginner):
    return train(beginner, "healthy")


def put_in(monkeypatch, bug):
    """The bug's function in place of today's, in this process, until the test ends."""
    module = MODULES[bug.file]
    source = bugs.planted((ROOT / bug.file).read_text(), bug)
    monkeypatch.setattr(module, bug.function, getattr(module, bug.function))
    exec(lab.text_of(source, bug.function), vars(module))


@pytest.mark.parametrize("bug", IN_A_RUN, ids=[bug.name for bug in IN_A_RUN])
def test_each_bug_trains_and_shows(bug, beginner, healthy, monkeypatch):
    """kills: a bug that changes nothing; a bound that the healthy run meets as well"""
    put_in(monkeypatch, bug)
    sick = train(beginner, bug.name)
    assert (beginner / bug.name / "stage.json").exists() and len(sick["reward"]) == 3
    before, after, shows = bugs.trace(bug, healthy, sick)
    assert shows, f"{bug.figure}, {bug.when}: {before} -> {after}"
    assert not bugs.trace(bug, healthy, healthy)[2]


def test_lost_labels_name_the_worse_response(monkeypatch):
    """Every response of a row is known by its text, whatever the order."""
    rows = [text_row(id=str(n)) for n in range(40)]
    bug, = [bug for bug in bugs.BUGS if bug.name == "lost-label"]

    def right():
        batch = common.batch_of(rows, 0, 40, 0)
        return sum(row["responses"]["AB".index(row["label"])] == "good one" for row in batch)
    assert right() == 40
    put_in(monkeypatch, bug)
    assert 10 <= right() <= 30


def test_the_bugs_are_twelve_and_their_numbers_say_nothing():
    """kills: the order of the file; another bug under a number than the one that is planted"""
    assert len(set(NAMES)) == len(NAMES) == 12
    for seed in range(3):
        order = [bug.name for bug in bugs.numbered(seed)]
        assert sorted(order) == sorted(NAMES) and order not in (NAMES, sorted(NAMES))
        assert order == [bug.name for bug in bugs.numbered(seed)]
    assert bugs.numbered(0) != bugs.numbered(1)


@pytest.mark.parametrize("bug", bugs.BUGS, ids=NAMES)
def test_a_bug_changes_its_function_only(bug, monkeypatch):
    """kills: a line that stands elsewhere, too; one that is gone, so that nothing is planted"""
    source = (ROOT / bug.file).read_text()
    sick = bugs.planted(source, bug)
    changed = lab.text_of(sick, bug.function)
    assert changed != lab.text_of(source, bug.function)
    assert lab.replaced(sick, {bug.function: lab.text_of(source, bug.function)}) == source
    compile(sick, bug.file, "exec")
    empty = {bug.function: f"def {bug.function}():\n    pass"}
    twice = {bug.function: "\n".join([lab.text_of(source, bug.function), bug.old])}
    said = rf"'{bug.name}' changes a line of {bug.function}\(\) that stands there"
    with pytest.raises(SystemExit, match=f"{said} 0 times"):
        bugs.planted(lab.replaced(source, empty), bug)
    monkeypatch.setattr(bugs, "text_of", lambda *_: twice[bug.function])
    with pytest.raises(SystemExit, match=f"{said} 2 times"):
        bugs.planted(source, bug)


def test_a_hunt_from_plant_to_guess(tmp_path, beginner, healthy):
    """The planted scripts run from elsewhere with their own common.py.
    kills: today's common.py beside a planted stage 1; a guess that is always right"""
    numbers = {bug.name: k for k, bug in enumerate(bugs.numbered(2), 1)}
    k = numbers["no-zero-grad"]  # a bug of common.py
    folder = tmp_path / "sick"
    said = lab_py("plant", k, "--out", folder, "--seed", 2)
    assert not any(name in said for name in NAMES)
    assert "is there already" in lab_py("plant", k, "--out", folder, code=1)
    differ = [path.name for path in ROOT.glob("*.py")
              if path.read_text() != (folder / path.name).read_text()]
    assert differ == ["common.py"]
    run_there([folder / "stage1_text_grpo.py", *flags(
        model=beginner / "judge", data=beginner / "text_rl.jsonl", heldout="", out=tmp_path / "run",
        batch_size=2, group_size=2, max_steps=3, log_rollouts_every=1)], PYTHONPATH="")
    said = lab_py("compare", beginner / "healthy", tmp_path / "run")
    norms = [step["grad_norm"] for step in lines(tmp_path / "run" / "metrics.jsonl")]
    row, = [line for line in said.splitlines() if line.startswith("grad_norm")]
    assert [float(cell) for cell in row.split()[4:]] == pytest.approx(
        [norms[0], sum(norms) / 3, norms[2]], rel=6e-3)
    assert f"Right: bug {k} is no-zero-grad" in lab_py("guess", k, "No-Zero-Grad", "--seed", 2)
    assert f"bug {k} is not top-p" in lab_py("guess", k, "top-p", "--seed", 2, code=1)
    assert "no bug is called 'kl'; they are bf16" in lab_py("guess", k, "kl", code=1)
    assert "it is no run of a GRPO stage" in lab_py("compare", folder, folder, code=1)


def test_unfair_advantages_by_hand():
    """kills: all answers of a group compared, whatever they earned"""
    group = {"reward": [2.0, 1.0, 2.0, 1.0], "advantages": [1.0, -1.0, 1.0, -1.0]}
    assert bugs.unfairness(group) == 0
    assert bugs.unfairness(group | {"advantages": [1.0, -1.0, -0.5, -1.0]}) == 1.5


# ---------------------------------------------------------------------------------- 12: ablations
def scored(points):
    """Scored rows, each a question of its own."""
    return [{"weight": 1, "cluster": f"row {n}", "points": x} for n, x in enumerate(points)]


def test_rows_of_several_seeds_are_averaged():
    """Each row is one question however many seeds have judged it.
    kills: the seeds' rows one behind another, which counts a question three times"""
    rows = ablate.average_rows([scored([1, 0, 1]), scored([1, 0.5, 0]), scored([1, 1, 0.5])])
    assert [row["points"] for row in rows] == [1, 0.5, 0.5]
    assert [row["cluster"] for row in rows] == ["row 0", "row 1", "row 2"]


@pytest.mark.parametrize("differences, interval, said", [
    ([1, 2, 3], (0.5, 3), "It shows: with it"), ([-1, -2, -3], (-3, -0.5), "It shows: without it"),
    ([5, -0.1, 0.0], (0.1, 3), "It does not show"), ([1, 2, 3], (-0.5, 4), "It does not show"),
    ([0, 2, 3], (0.5, 3), "It does not show")])
def test_the_rule_of_an_ablation(differences, interval, said):
    """kills: the interval alone; a difference of 0 taken for a sign"""
    assert ablate.verdict(differences, interval).startswith(said)


def test_an_ablation_from_flags_to_table(tmp_path, monkeypatch, capsys):
    """Trainings and judgements are made up: without it the first 2, 3, 4 of ten rows are lost.
    kills: the claim's flags in both runs; the columns exchanged; what is finished trained again"""
    rows = [text_row(id=str(n), prompt=f"Why {n} ?") for n in range(10)]
    data, trained = write(tmp_path / "rows.jsonl", rows), []

    def run(script, *args):
        options = dict(zip(args[::2], args[1::2], strict=True))
        if script == "stage1_text_grpo.py":
            out, without = options["--out"], "--clip_high" in options
            trained.append((options["--seed"], options.get("--clip_high")))
            write(out / "metrics.jsonl", [{"reward": 1.5 - without}, {"reward": 2.0 - without}])
            write(out / "stage.json", options["--seed"] + 2 if without else 0)
            return
        lost = json.loads((options["--model"] / "stage.json").read_text())
        pred = [{"id": str(n), "order": order, "pred": "B" if n < lost else "A"}
                for n in range(10) for order in ("AB", "BA")]
        write(options["--out"], pred)

    monkeypatch.setattr(ablate, "run", run)
    monkeypatch.setattr(sys, "argv", ["ablate.py", "mine", "--data", data, "--out",
                                      str(tmp_path / "runs"), "--flags", "--clip_high", "0.28"])
    for _ in range(2):
        ablate.main()
        said = capsys.readouterr().out
        assert "| 0 | 100.0 | 80.0 | +20.0 [" in said and "| 2 | 100.0 | 60.0 | +40.0 [" in said
        assert "| 1.750 | 0.750 |" in said
        assert "| all | | | +30.0 [" in said and "It shows: with it is better" in said
    assert trained == [(0, None), (0, "0.28"), (1, None), (1, "0.28"), (2, None), (2, "0.28")]
    monkeypatch.setattr(sys, "argv", ["ablate.py", "mine"])
    with pytest.raises(SystemExit):
        ablate.main()


# --------------------------------------------------------------------------------- 13: own rows
WORDS = [f"{colour} {shape}" for colour in toy_world.COLOURS for shape in toy_world.SHAPES]


def own_row(n, label=None, **change):
    """The n-th of many different text rows; the better response is as long as the other, and says
    another thing in each row."""
    colour, other = WORDS[n % 30], WORDS[(n + 1 + n // 30) % 30]
    label = label or "AB"[n % 2]
    responses = [f"it is {colour} .", f"it is {other} ."]
    row = text_row(id=str(n), responses=responses[::1 if label == "A" else -1], label=label,
                   prompt=f"thing of {toy_world.PEOPLE[n % 6]} {'? ' * (n // 30 + 1)}")
    return row | change


@pytest.fixture
def own(tmp_path):
    """A function that writes rows as somebody's lab and has them examined. -> the report as text"""
    def examine(train=(), heldout=(), n=150):
        rows = [own_row(i) for i in range(200)]
        write(tmp_path / "train.jsonl", [*rows[:n], *train])
        write(tmp_path / "heldout.jsonl", [*rows[150:], *heldout])
        report = own_rows.examine(tmp_path)
        assert report["passed"] == ("problem" not in " ".join(report["lines"]))
        return "\n".join(report["lines"])
    return examine


def test_good_rows_pass(own):
    """kills: any alarm that rows without a fault set off"""
    said = own()
    assert "problem" not in said and "note" not in said, said
    assert "150 training rows, 50 held out" in said


@pytest.mark.parametrize("rows, said", [
    (["no row"], "train.jsonl:151 is no JSON object"),
    ([own_row(300, label="C")], "train.jsonl:151 label 'C' is not 'A' or 'B'"),
    ([own_row(300, responses=["one", "one"])], "151 has twice the same response"),
    ([own_row(300, responses=["one", "<answer>"])], "151 response B contains '<answer>'"),
    ([{"task": "image_generation", "id": "1", "prompt": "x", "label": "A",
       "media": ["a.png", "b.png"]}], "151 is no text row"),
    ([own_row(3)], "train.jsonl:151 repeats train.jsonl:4"),
    ([own_row(3, label="A")], "train.jsonl:151 repeats train.jsonl:4"),
    ([own_row(3) | {"label": "A"}], "train.jsonl:151 contradicts train.jsonl:4"),
    ([own_row(160)], "heldout.jsonl:11 is held out, and stands in the training rows as "
                     "train.jsonl:151"),
    ([own_row(160, label="B")], "heldout.jsonl:11 is held out"),
    ([own_row(300 + 2 * n) for n in range(40)], "train: A is better in 61% of 190 rows"),
    ([own_row(300 + n, responses=["long enough ?", "no"][::1 if n % 2 == 0 else -1])
      for n in range(30)], "the better one is longer in 60% of 208 rows")])
def test_each_problem_is_named(own, rows, said):
    """With the line it stands in. kills: a pair with its sides exchanged taken for another one; a
    repetition that contradicts counted as one that does not; equal lengths counted as shorter"""
    assert re.search(rf"problem: .*{re.escape(said)}", own(rows)), own(rows)


def test_too_few_rows_and_no_file(own, tmp_path):
    assert "problem: train.jsonl: 149 good rows, 150 are needed" in own(n=149)
    (tmp_path / "train.jsonl").unlink()
    said = lab_py("check", 13, "--dir", tmp_path, code=1)
    assert "train.jsonl is not there; python tests/labs/make_rows.py writes one" in said
    assert "not yet" in said


def test_words_that_tell_and_words_that_are_new(own):
    """kills: a word of both responses counted; the new words of the toy world's own sections"""
    polite = []
    for n in range(30):
        row = own_row(300 + n, rationale="Feedback:\nsays red\nConclusion:\nA")
        better = "AB".index(row["label"])
        row["responses"][better] = "please take the zebra !"
        row["responses"][1 - better] = "I take the zebra , no ?"
        polite.append(row)
    said = own(polite)
    assert "note: 'please' stands in the better one in 100% of 30 rows" in said
    assert "'zebra'" not in said and "'I' stands in the worse one in 100% of 30 rows" in said
    new = re.search(r"note: (\d+) words are new .+: (.+)", said)
    assert new[1] == "5" and "zebra 60" in new[2] and "Feedback" not in new[2]


def test_shortcuts_by_hand():
    """kills: a rule that looks at the held-out labels for its direction"""
    train = [text_row(responses=["much longer", "short"]), text_row(responses=["so long", "so"])]
    heldout = [text_row(responses=["it", "longer"]), text_row(responses=["longer so", "it"]),
               text_row(responses=["a", "bc"]), text_row(responses=["a", "b"], label="B")]
    found = own_rows.shortcuts(train, heldout)
    assert found["the longer one"] == pytest.approx((0 + 1 + 0 + 0.5) / 4)
    assert found["the first one"] == pytest.approx(3 / 4)


def test_the_example_passes_and_can_be_ranked(tmp_path):
    """Another seed gives other rows, the same seed the same.
    kills: a label without its coin; the best candidate not the first"""
    texts = {}
    for seed in (3, 3, 4):
        run_here(make_rows.main, flags(out=tmp_path, seed=seed))
        text = (tmp_path / "train.jsonl").read_text()
        assert texts.setdefault(seed, text) == text
    assert texts[3] != texts[4]
    assert own_rows.examine(tmp_path)["passed"]
    for row in lines(tmp_path / "train.jsonl"):
        person = re.search(r"thing of (\w+) \?", row["prompt"])[1]
        thing = re.search(rf"{person} (\w+ \w+) \.", row["prompt"])[1]
        right = [f"it is {thing} " in response for response in row["responses"]]
        assert right == [row["label"] == "A", row["label"] == "B"]
        assert f"Response {row['label']} says {thing} against {thing} match" in row["rationale"]
    for candidates in lines(tmp_path / "candidates.jsonl"):
        person = re.search(r"thing of (\w+) \?", candidates["prompt"])[1]
        thing = re.search(rf"{person} (\w+ \w+) \.", candidates["prompt"])[1]
        right = [f"it is {thing} " in text for text in candidates["candidates"]]
        assert right == [True, False, False, False]
