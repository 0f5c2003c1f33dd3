"""
Labs: for every lab a solution passes, each wrong version of the bank is recognised by its name, and
a blank fails politely. "kills:" names plausible wrong versions of tests/labs/ that make a test
fail.
"""

import ast
import re
import sys

import pytest
from helpers import ROOT, TESTS, run_there

sys.path.append(str(TESTS / "labs"))

import diagnosis  # noqa: E402  (it is on the path only now)
import exercises  # noqa: E402  (as above)
import lab  # noqa: E402  (as above)

WRONG = [(number, part.name, name) for number, parts in exercises.PARTS.items() for part in parts
         for name in part.bank]


# One mistake under two names of the bank.
TWINS = {"k3 of the opposite log-ratio": ["log-ratio of the wrong sign (k1, k2)"],
         "log-ratio of the wrong sign (k1, k2)": ["k3 of the opposite log-ratio"]}


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """{lab: the folder that start makes}"""
    made = {}
    for number in lab.LABS:
        made[number] = tmp_path_factory.mktemp("labs") / str(number)
        lab.start(number, made[number])
    return made


@pytest.fixture
def student(folders, tmp_path):
    """A function that makes a folder to check: a lab's files, with these texts for the blanks."""
    def write(number, new):
        for file, names in lab.LABS[number][1].items():
            source = (folders[number] / file).read_text()
            texts = {name: new[name] for name in names if name in new}
            (tmp_path / file).write_text(lab.replaced(source, texts))
        return tmp_path
    return write


def solution(number):
    """{name: today's text} of all that a lab cuts out"""
    texts = {}
    for file, names in lab.LABS[number][1].items():
        for name in names:
            texts[name] = lab.text_of((ROOT / file).read_text(), name)
    return texts


def from_the_bank(number, function, mistake):
    """A function's text that calls the wrong version."""
    return (f"def {function}(*args, **more):\n"
            f"    from exercises import PARTS\n"
            f"    part, = [part for part in PARTS[{number}] if part.name == {function!r}]\n"
            f"    return part.bank[{mistake!r}](*args, **more)\n")


# --------------------------------------------------------------------------- solution, wrong, blank
@pytest.mark.parametrize("number", lab.LABS)
def test_the_solution_passes(student, number):
    """kills: a case without an answer of ours; blanks that the cut leaves in"""
    report = diagnosis.examine(number, student(number, solution(number)), seed=number % 3)
    assert report["passed"], report["lines"]
    assert {part["state"] for part in report["parts"].values()} == {"right"}


@pytest.mark.parametrize("number, function, mistake", WRONG)
def test_each_wrong_version_is_recognised(student, number, function, mistake):
    """By its name, in its function, and no other mistake but its twins is named.
    kills: compared in the first case only; the nearest named, whether or not it is equal"""
    texts = solution(number) | {function: from_the_bank(number, function, mistake)}
    report = diagnosis.examine(number, student(number, texts), seed=3)
    assert not report["passed"]
    assert mistake in report["parts"][function]["mistakes"], report["lines"]
    assert set(report["parts"][function]["mistakes"]) <= {mistake, *TWINS.get(mistake, ())}
    assert f"    It is this mistake: {mistake}" in report["lines"]
    others = {part["state"] for name, part in report["parts"].items() if name != function}
    assert others <= {"right"}


@pytest.mark.parametrize("number", lab.LABS)
def test_a_blank_fails_politely(folders, number):
    """kills: an error that ends the check; a blank taken for a mistake"""
    report = diagnosis.examine(number, folders[number])
    assert not report["passed"]
    for name, part in report["parts"].items():
        assert part == {"state": "blank", "mistakes": []}
        assert any(re.fullmatch(rf"{name}: \w+\(\) is still blank.*", line)
                   for line in report["lines"])


def test_a_helper_that_nobody_calls_is_blank_all_the_same(student):
    """balanced() without extra_length(), which other parts of the script may call.
    kills: only what is called is looked at"""
    texts = solution(9)
    del texts["extra_length"]
    texts["balanced"] = ("def balanced(rows, seed):\n    import wrong_versions\n"
                         "    return wrong_versions.balanced(rows, seed)\n")
    report = diagnosis.examine(9, student(9, texts))
    assert report["parts"]["balanced"]["state"] == "right" and not report["passed"]
    assert report["parts"]["extra_length"]["state"] == "blank"
    assert "extra_length: extra_length() is still blank" in report["lines"]


# ------------------------------------------------------------------- mistakes that no bank can hold
def advantages_with(line):
    """Today's advantages(), this line before all others of its body"""
    text = solution(3)["advantages"]
    return {"advantages": text.replace("    if kind ==", f"    {line}\n    if kind ==", 1)}


def test_an_unknown_mistake_is_not_given_a_name(student):
    """kills: the nearest named as if it were the mistake"""
    report = diagnosis.examine(3, student(3, advantages_with("rewards = rewards ** 2")))
    assert report["parts"]["advantages"] == {"state": "wrong", "mistakes": []}
    assert "    It is none of the mistakes that we know." in report["lines"]
    # of two mistakes at once, one is near where the other does not show
    text = solution(3)["advantages"].replace("correction=0", "correction=1")
    text = text.replace("if sigma > 0", "if sigma > 2")
    report = diagnosis.examine(3, student(3, {"advantages": text}))
    assert report["parts"]["advantages"]["mistakes"] == []
    assert any("nearest is: unbiased standard deviation (" in line for line in report["lines"])


@pytest.mark.parametrize("line, said", [
    ("rewards += 1e-3 * rewards.sign() - 1e-3 * rewards.sign()", "right in"),
    ("1 / 0", r"yours stops: ZeroDivisionError: .+ \(stage1_text_grpo\.py:\d+\)"),
    ("raise SystemExit", "yours stops: SystemExit"),
    ("rewards = rewards.view(-1)", "yours stops: IndexError"),
    ("return rewards[:, :1], None", r"shape \[3, 1\], ours \[3, 5\]"),
    ("return None", "yours is None"),
    ("return rewards", "yours has 3 values, ours 2|yours is tensor")])
def test_other_ways_to_fail(student, line, said):
    """kills: an exception that ends the check; shapes compared by broadcasting"""
    report = diagnosis.examine(3, student(3, advantages_with(line)))
    assert re.search(said, "\n".join(report["lines"])), report["lines"]
    assert report["passed"] == (said == "right in")


def test_files_that_cannot_be_read(student, tmp_path):
    for text, said in (("def advantages(:\n", r"stage1_text_grpo\.py:\d+: Python cannot read"),
                       ("import no_such_module\n", "cannot be imported: ModuleNotFoundError"),
                       ("", r"has no advantages\(\) any more")):
        report = diagnosis.examine(3, student(3, {"advantages": text}))
        assert not report["passed"] and re.search(said, report["lines"][0])
    (tmp_path / "stage1_text_grpo.py").unlink()
    report = diagnosis.examine(3, tmp_path)
    assert report["lines"] == ["advantages: stage1_text_grpo.py is not in this folder"]


# ---------------------------------------------------------------------------------- as a student
def run(*args, code=0):
    """lab.py -> what it prints"""
    done = run_there([TESTS / "labs" / "lab.py", *args], check=False)
    assert done.returncode == code, done.stderr[-2000:]
    assert "Traceback" not in done.stdout + done.stderr
    return done.stdout + done.stderr


def test_a_lab_from_start_to_end(tmp_path):
    """start, an endless loop, a process that dies, the solution with a print, and the
    copies for stages 2 and 3. kills: no time limit; prints taken for the result"""
    folder = tmp_path / "mine"
    run("start", 3, "--out", folder)
    assert "is there already" in run("start", 3, "--out", folder, code=1)
    path = folder / "stage1_text_grpo.py"
    blank = path.read_text()
    for new, said in ((advantages_with("while True: pass"),
                       r"endless loop\? It was at stage1_text_grpo\.py:\d+, in advantages\(\)"),
                      (advantages_with("import os; os._exit(3)"), r"without a result \(code 3\)")):
        path.write_text(lab.replaced(blank, new))
        assert re.search(said, run("check", 3, "--dir", folder, "--limit", 8, code=1))
    path.write_text(lab.replaced(blank, advantages_with("print('hello')")))
    said = run("check", 3, "--dir", folder, "--seed", 5, "--share")
    assert "passed" in said and "the last: 'hello'" in said
    for copied in lab.COPIES["stage1_text_grpo.py"]:
        assert "print('hello')" in lab.text_of((folder / copied).read_text(), "advantages")
    said = run("check", 4, "--dir", tmp_path / "none", code=1)
    assert "is not there; first: python tests/labs/lab.py start 4" in said


def test_the_toy_world_runs_in_the_folder_of_a_lab(folders):
    """kills: the toy world left out of what start copies"""
    done = run_there([folders[3] / "tests/toy_world.py", "--help"], PYTHONPATH="")
    assert "usage" in done.stdout
    assert (folders[3] / "tests/toy_backbone/model.safetensors").stat().st_size > 1e6


# ----------------------------------------------------------------------------------- cutting out
@pytest.mark.parametrize("number", lab.LABS)
def test_only_the_functions_of_the_lab_are_cut_out(folders, number):
    """With the solution put back each file is today's again; a blank keeps signature and docstring.
    kills: the body of another function; stages 2 and 3 forgotten"""
    texts = solution(number)
    for file, names in lab.LABS[number][1].items():
        for copied in (file, *lab.COPIES.get(file, ())):
            today, cut = (ROOT / copied).read_text(), (folders[number] / copied).read_text()
            assert lab.replaced(cut, {name: texts[name] for name in names}) == today
            for name in names:
                node, whole = lab.definitions(cut)[name], lab.definitions(today)[name]
                if isinstance(node, ast.FunctionDef):
                    assert ast.dump(node.args) == ast.dump(whole.args)
                    assert ast.get_docstring(node) == ast.get_docstring(whole)
                    assert len(node.body) == 2 and isinstance(node.body[1], ast.Raise)
                    assert lab.text_of(cut, name).count("\n") < lab.text_of(today, name).count("\n")
        assert {path.name for path in folders[number].glob("*.py")} == {
            path.name for path in ROOT.glob("*.py")}


def test_comments_of_the_body_go_with_it():
    """kills: cut from the first statement after the docstring on"""
    source = 'def f(a):\n    """Doc."""\n    # the trick\n    return a\n'
    assert lab.blank(source, "f", 3) == (
        'def f(a):\n    """Doc."""\n    raise NotImplementedError("lab 3: f")')


def test_a_function_that_is_gone_is_named():
    with pytest.raises(SystemExit, match="stage1.py: lab 3 cuts out advantages, which is not"):
        lab.cut_out("def advantage():\n    pass\n", ["advantages"], 3, "stage1.py")


# ------------------------------------------------------------------------------------------- pages
SECTIONS = ("Task", "Look at", "CPU minutes", "Expect", "Questions")


@pytest.mark.parametrize("number", lab.PAGES)
def test_pages(number, capsys):
    """Each page is short and whole, its functions are those that are cut out, its questions have
    answers, and hints come one by one. kills: a page of another lab; answers that lack one"""
    page, files = lab.PAGES[number], lab.LABS.get(number, (None, {}))[1]
    text = (TESTS / "labs" / f"{page}.md").read_text()
    assert len(text.splitlines()) <= 120
    assert re.match(rf"# Lab {number}: ", text) and page.startswith(f"{number:02}_")
    for name in SECTIONS:
        assert text.count(f"\n## {name}\n") == 1, name
    for name in [name for names in files.values() for name in names if not name.startswith("_")]:
        assert f"`{name}" in text.partition("\n## Task\n")[2].partition("\n## ")[0], name
    questions = text.partition("\n## Questions\n")[2]
    solutions = (TESTS / "labs" / "solutions.md").read_text()
    answers = solutions.partition(f"\n## Lab {number}\n")[2].partition("\n## ")[0]
    for part in (questions, answers):
        assert re.findall(r"^(\d)\. ", part, re.MULTILINE) == ["1", "2", "3"]
    for function in re.findall(r"`(test_\w+)`", text):
        assert any(f"def {function}(" in path.read_text() for path in TESTS.glob("test_*.py"))
    for script in re.findall(r"(?:python|`) ?([\w/]+\.py)\b", text):
        script = re.sub(r"^my_labs/\w+/", "", script)
        assert (ROOT / script).exists() or (TESTS / script).exists(), script
    lab.hint(number, 1)
    assert re.search(r"\(\d more: lab.py hint \d+ 2\)", capsys.readouterr().out)
    with pytest.raises(SystemExit, match=f"lab {number} has [2-5] hints"):
        lab.hint(number, 9)
    lab.list_labs()
    assert f"Lab {number}: " in capsys.readouterr().out


@pytest.mark.parametrize("part", sum(exercises.PARTS.values(), []), ids=lambda part: part.name)
def test_a_hidden_seed_asks_something_else(part):
    """Answers learned by heart do not help: another seed has cases that this one has not.
    kills: cases that do not depend on the seed"""
    def answers(seed):
        return [answer for _, answer in sorted(diagnosis.answers_of_right(part, seed).items())]
    assert str(part.cases(0)) != str(part.cases(73021))
    assert str(part.cases(5)) == str(part.cases(5))
    if part.name not in ("sample_group", "mixed_batch"):  # asked what is true of every draw
        assert not diagnosis.same(answers(0), answers(73021), part.tolerance)
