"""
What is wrong with a student's function? It answers the lab's cases, and so do today's function and
every wrong version of the bank (wrong_versions.py). A wrong version that gives the student's
answers in all cases is the mistake; several can be. Then come the oracles of the tests.

    python tests/labs/diagnosis.py NUMBER FOLDER SEED LIMIT OUT      # lab.py starts it
"""

import copy
import faulthandler
import functools
import importlib.util
import json
import math
import sys
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

TESTS = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(TESTS.parent), str(TESTS), str(TESTS / "labs")]

import torch  # noqa: E402  (after the path, as the imports of exercises.py)
from lab import still_blank  # noqa: E402  (as above)


@dataclass(eq=False)
class Part:
    """One function that a lab asks for."""
    name: str          # the function; it stands in `file`
    file: str
    right: Callable    # today's
    frame: Callable    # the bank's right version; only where it gives today's answers is compared
    bank: dict         # {mistake: wrong version}
    cases: Callable    # seed -> {what the case is: arguments}
    answer: Callable   # (function, case) -> numbers, texts, tensors; nested in tuples
    oracle: Callable   # function -> None, or AssertionError
    tolerance: float = 1e-9


class Raised(str):
    """In place of an answer: the error that came."""


# ----------------------------------------------------------------------------------- answers
def answer_of(part, function, case):
    """What a function answers to a case; an error is an answer, too."""
    try:
        return part.answer(function, copy.deepcopy(case))
    except (Exception, SystemExit) as error:
        return Raised(described(error))


def described(error):
    """An error in one line, with the last line of the student's that it came through."""
    text = f"{type(error).__name__}: {error}".splitlines()[0][:160]
    mine = {module.__file__ for name, module in sys.modules.items() if name.startswith("student_")}
    for frame in reversed(traceback.extract_tb(error.__traceback__)):
        if frame.filename in mine:
            return f"{text} ({Path(frame.filename).name}:{frame.lineno})"
    return text


def same(a, b, tolerance):
    """Are two answers equal, up to rounding?"""
    if isinstance(a, Raised) or isinstance(b, Raised):
        return isinstance(a, Raised) and isinstance(b, Raised)
    if isinstance(a, tuple | list) and isinstance(b, tuple | list):
        return len(a) == len(b) and all(same(x, y, tolerance) for x, y in zip(a, b, strict=True))
    if isinstance(a, torch.Tensor) and isinstance(b, torch.Tensor):
        if a.shape != b.shape:
            return False
        return torch.allclose(a.detach().double(), b.detach().double(), rtol=tolerance,
                              atol=tolerance, equal_nan=True)
    if isinstance(a, float) and isinstance(b, float):
        equal_nan = math.isnan(a) and math.isnan(b)
        return equal_nan or math.isclose(a, b, rel_tol=tolerance, abs_tol=tolerance)
    return type(a) is type(b) and a == b


def difference(mine, right, tolerance):
    """Where two answers part, in words."""
    if isinstance(mine, Raised):
        return f"yours stops: {mine}"
    if isinstance(mine, tuple | list) and isinstance(right, tuple | list):
        if len(mine) != len(right):
            return f"yours has {len(mine)} values, ours {len(right)}"
        for x, y in zip(mine, right, strict=True):
            if not same(x, y, tolerance):
                return difference(x, y, tolerance)
    if isinstance(mine, torch.Tensor) and isinstance(right, torch.Tensor):
        if mine.shape != right.shape:
            return f"yours has the shape {list(mine.shape)}, ours {list(right.shape)}"
        gap = (mine.detach().double() - right.double()).abs().nan_to_num(math.inf)
        place = gap.argmax().item()
        index = [int(i) for i in torch.unravel_index(torch.tensor(place), mine.shape)]
        for digits in (6, 12, 17):  # as many as it takes to see that they are not the same
            values = [f"{x.flatten()[place].item():.{digits}g}" for x in (mine, right)]
            if values[0] != values[1]:
                break
        return f"at {index} yours is {values[0]}, ours {values[1]}"
    return f"yours is {str(mine)[:60]}, ours {str(right)[:60]}"


# ----------------------------------------------------------------------------------- a report
def examine(number, folder, seed=0):
    """-> {"passed", "parts": {function: {"state": "right" | "wrong" | "blank", "mistakes": names}},
    "lines": what to print}"""
    from exercises import PARTS
    report = {"passed": True, "parts": {}, "lines": []}
    for part in PARTS[number]:
        try:
            function = getattr(load(folder, part.file), part.name)
        except (Exception, SystemExit) as error:
            result, lines = unreadable(part, error)
        else:
            result, lines = judge(part, function, number, seed)
        report["parts"][part.name] = result
        report["lines"] += [f"{part.name}: {lines[0]}", *[f"    {line}" for line in lines[1:]]]
        report["passed"] &= result["state"] == "right"
    for name in still_blank(folder, number):
        if name not in report["parts"]:  # a function that another one of the lab should call
            report["parts"][name] = {"state": "blank", "mistakes": []}
            report["lines"].append(f"{name}: {name}() is still blank")
            report["passed"] = False
    return report


def load(folder, file):
    """A student's script as a module. Its imports are ours: one lab cannot spoil another."""
    name = f"student_{Path(file).stem}"
    spec = importlib.util.spec_from_file_location(name, Path(folder, file))
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # dataclasses look themselves up
    spec.loader.exec_module(module)
    return module


def unreadable(part, error):
    """For a file that Python cannot read or run."""
    if isinstance(error, SyntaxError):
        line = f"{part.file}:{error.lineno}: Python cannot read this line: {error.msg}"
    elif isinstance(error, FileNotFoundError):
        line = f"{part.file} is not in this folder"
    elif isinstance(error, AttributeError):
        line = f"{part.file} has no {part.name}() any more"
    else:
        line = f"{part.file} cannot be imported: {described(error)}"
    return {"state": "wrong", "mistakes": []}, [line]


def judge(part, function, number, seed):
    """-> one function's part of the report, and its lines."""
    cases = part.cases(seed)
    mine = {label: answer_of(part, function, case) for label, case in cases.items()}
    blanks = [a for a in mine.values() if isinstance(a, Raised) and f"lab {number}: " in a]
    if blanks:
        where = blanks[0].partition(f"lab {number}: ")[2].partition(" ")[0]
        return {"state": "blank", "mistakes": []}, [f"{where}() is still blank: write it, then "
                                                    "check again"]
    right = answers_of_right(part, seed)
    wrong = [label for label in cases if not same(mine[label], right[label], part.tolerance)]
    if not wrong:
        return verdict_of_the_oracle(part, function, len(cases))
    compared, bank = answers_of_bank(part, seed)
    agree = {}  # in how many of the compared cases a wrong version answers as the student does
    for name, answers in bank.items():
        agree[name] = sum(same(answers[label], mine[label], part.tolerance) for label in compared)
    wrong_compared = set(wrong) & set(compared)
    mistakes = [name for name, n in agree.items() if n == len(compared) and wrong_compared]
    lines = [f"wrong in {len(wrong)} of {len(cases)} cases"]
    for name in mistakes:
        lines.append(f"It is this mistake: {name}")
    if not mistakes:
        lines += nearest(agree, len(compared), len(compared) - len(wrong_compared))
    for label in wrong[:3]:
        lines.append(f"{label}: {difference(mine[label], right[label], part.tolerance)}")
    return {"state": "wrong", "mistakes": mistakes}, lines


@functools.cache
def answers_of_right(part, seed):
    return {label: answer_of(part, part.right, case) for label, case in part.cases(seed).items()}


@functools.cache
def answers_of_bank(part, seed):
    """-> the cases in which the bank's frame agrees with today's function, and what each wrong
    version answers to them."""
    cases, right, compared = part.cases(seed), answers_of_right(part, seed), []
    for label, case in cases.items():
        if same(answer_of(part, part.frame, case), right[label], part.tolerance):
            compared.append(label)
    bank = {}
    for name, version in part.bank.items():
        bank[name] = {label: answer_of(part, version, cases[label]) for label in compared}
    return compared, bank


def nearest(agree, compared, right):
    """No wrong version explains all: the one that agrees most, if more than the right one does."""
    name = max(agree, key=agree.get, default=None)
    if name is None or agree[name] <= right:
        return ["It is none of the mistakes that we know."]
    return [f"Of the mistakes that we know none is yours alone; nearest is: {name} (the same as "
            f"yours in {agree[name]} of {compared} cases)"]


def verdict_of_the_oracle(part, function, n):
    """All cases are right: what do the tests say?"""
    try:
        part.oracle(function)
    except (Exception, SystemExit) as error:
        frames = [frame.name for frame in traceback.extract_tb(error.__traceback__)]
        checks = [name for name in frames if name.startswith("check_")]
        what = described(error) if str(error) else "its assertion fails"
        return {"state": "wrong", "mistakes": []}, [
            f"right in all {n} cases, but not for the tests' {(checks or ['oracle'])[-1]}: {what}"]
    return {"state": "right", "mistakes": []}, [f"right in {n} cases, and for the tests' oracle"]


def main():
    number, folder, seed, limit, out = sys.argv[1:]
    import exercises  # noqa: F401  (slow to import, which is not the student's time)
    faulthandler.dump_traceback_later(int(limit), exit=True)
    torch.set_num_threads(1)
    report = examine(int(number), folder, int(seed))
    Path(out).write_text(json.dumps(report))


if __name__ == "__main__":
    main()
