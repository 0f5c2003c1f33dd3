"""
Labs: a function is cut out of today's scripts, you write it again, and the lab says which mistake
you made.

    python tests/labs/lab.py list
    python tests/labs/lab.py start 3        # copies the scripts to my_labs/3, the function blank
    python tests/labs/lab.py check 3        # right, wrong (which mistake?), or still blank
    python tests/labs/lab.py hint 3         # the first hint; "hint 3 2" is the second

Labs 11 to 13 have no blanks. Lab 11 hides bugs in the scripts:

    python tests/labs/lab.py plant 3        # copies the scripts to my_labs/bug_3, bug 3 in them
    python tests/labs/lab.py compare runs/healthy runs/bug_3
    python tests/labs/lab.py guess 3 top-p

Read the lab's page first: tests/labs/03_advantages.md. `check` runs your function in a process of
its own, beside the repository's own files: only the lab's functions are yours, so that a mistake
in one lab cannot spoil another. Write your helper functions into the same file.
"""

import argparse
import ast
import functools
import json
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

LABS_FOLDER = Path(__file__).resolve().parent
TESTS = LABS_FOLDER.parent
ROOT = TESTS.parent
STAGE_1 = "stage1_text_grpo.py"
# Stages 2 and 3 hold the same equations: what is cut out of stage 1 is cut out of them as well.
COPIES = {STAGE_1: ("stage2_caption_grpo.py", "stage3_mm_grpo.py")}
LABS = {  # number: its page, and what is cut out of which file
    1: ("01_parser", {"common.py": ("_WHOLE", "_VERDICT", "parse")}),
    2: ("02_sft_masks", {"stage0_sft.py": ("answer_nll", "collate")}),
    3: ("03_advantages", {STAGE_1: ("advantages",)}),
    4: ("04_loss", {STAGE_1: ("grpo_loss", "kl_penalty")}),
    5: ("05_sampling", {STAGE_1: ("sample_group", "scored_logits")}),
    6: ("06_packing", {STAGE_1: ("pack",)}),
    7: ("07_replay", {"stage2_caption_grpo.py": ("choose_replay", "mixed_batch")}),
    8: ("08_distillation", {"stage2b_cmkd.py": ("select",)}),
    9: ("09_bradley_terry", {"bt_reward.py": ("balanced", "bt_loss", "extra_length"),
                             "dt2it.py": ("to_flip",)}),
    10: ("10_evaluation", {"common.py": ("habits", "majority", "points", "summarize", "wilson"),
                           "eval.py": ("compare",)}),
}
NO_BLANKS = {11: "11_bug_hunt", 12: "12_ablation", 13: "13_own_preference"}
PAGES = {number: page for number, (page, _) in LABS.items()} | NO_BLANKS
# What a script needs to run in the student's folder.
FILES = ("*.py", "requirements.txt", "tests/toy_world.py", "tests/toy_backbone/*")


# ------------------------------------------------------------------------ cutting out, by name
@functools.cache
def definitions(source):
    """{name: its node} of the functions and constants at the top level of a file."""
    found = {}
    for node in ast.parse(source).body:
        if isinstance(node, ast.FunctionDef):
            found[node.name] = node
        elif isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name):
            found[node.targets[0].id] = node
    return found


def first_line(node):
    """Number of a definition's first line, decorators included."""
    decorators = getattr(node, "decorator_list", [])
    return min([node.lineno] + [decorator.lineno for decorator in decorators])


def text_of(source, name):
    """A definition as it is written. Raises KeyError if the file has none of this name."""
    node = definitions(source)[name]
    return "\n".join(source.splitlines()[first_line(node) - 1:node.end_lineno])


def replaced(source, new):
    """The source with other texts for these definitions: new is {name: text}."""
    lines, nodes = source.splitlines(), definitions(source)
    for name in sorted(new, key=lambda name: -nodes[name].lineno):  # the last first
        node = nodes[name]
        lines[first_line(node) - 1:node.end_lineno] = new[name].splitlines()
    return "\n".join(lines) + "\n"


def blank(source, name, number):
    """A definition's text without its solution: signature, docstring, and an error that says where
    to write. Of a constant its name is left."""
    node = definitions(source)[name]
    if isinstance(node, ast.Assign):
        return f"{name} = None  # lab {number}: yours, if you want it"
    if ast.get_docstring(node) is None:
        raise SystemExit(f"lab {number}: {name} has no docstring that could say what to write")
    lines = source.splitlines()[first_line(node) - 1:node.body[0].end_lineno]
    return "\n".join([*lines, f'    raise NotImplementedError("lab {number}: {name}")'])


def still_blank(folder, number):
    """The functions of a lab that the student has not touched."""
    names = []
    for file, wanted in LABS[number][1].items():
        path = Path(folder, file)
        text = path.read_text("utf-8") if path.exists() else ""
        names += [name for name in wanted if f'"lab {number}: {name}")' in text]
    return names


def cut_out(source, names, number, path=""):
    """The source of a file with these definitions blanked. Raises SystemExit if one is missing."""
    gone = [name for name in names if name not in definitions(source)]
    if gone:
        raise SystemExit(f"{path}: lab {number} cuts out {', '.join(gone)}, which is not there any "
                         "more; mend LABS in tests/labs/lab.py")
    return replaced(source, {name: blank(source, name, number) for name in names})


# ---------------------------------------------------------------------------------- commands
def title(number):
    """The first line of a lab's page."""
    page = LABS_FOLDER / f"{PAGES[number]}.md"
    return page.read_text("utf-8").splitlines()[0].lstrip("# ")


def list_labs():
    for number, (page, files) in LABS.items():
        print(f"{title(number)}   tests/labs/{page}.md")
        for file, names in files.items():
            print(f"    {file}: {', '.join(names)}")
    for number, page in NO_BLANKS.items():
        print(f"{title(number)}   tests/labs/{page}.md")


def copy_scripts(folder):
    """Raises SystemExit if the folder is there: nobody's work is overwritten."""
    if folder.exists():
        raise SystemExit(f"{folder} is there already, and stays as it is; name another --out")
    for pattern in FILES:
        for path in sorted(ROOT.glob(pattern)):
            copy = folder / path.relative_to(ROOT)
            copy.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(path, copy)


def start(number, folder):
    """Copy the scripts, the lab's functions blanked."""
    if number in NO_BLANKS:
        raise SystemExit(f"lab {number} has no blanks; its page, tests/labs/{PAGES[number]}.md, "
                         "says what to run")
    copy_scripts(folder)
    page, files = LABS[number]
    for file, names in files.items():
        for copied in (file, *COPIES.get(file, ())):
            path = folder / copied
            source = path.read_text("utf-8")
            path.write_text(cut_out(source, names, number, copied), "utf-8")
        print(f"{folder / file}: write {', '.join(names)}")
    print(f"The page is tests/labs/{page}.md. Then: python tests/labs/lab.py check {number}")


def hint(number, which):
    """Print one of the lab's hints, the first is 1."""
    text = (LABS_FOLDER / "hints.md").read_text("utf-8")
    section = text.partition(f"\n## {number}\n")[2].partition("\n## ")[0]
    hints = re.findall(r"^\d+\. (.+(?:\n   .+)*)", section, re.MULTILINE)
    if not 1 <= which <= len(hints):
        raise SystemExit(f"lab {number} has {len(hints)} hints")
    print(re.sub(r"\s+", " ", hints[which - 1]))
    if which < len(hints):
        print(f"({len(hints) - which} more: lab.py hint {number} {which + 1})")


def check(number, folder, seed, limit):
    """-> the report on a student's folder, see diagnosis.py; what went wrong with the process
    itself is one of its lines."""
    if number in (11, 12):
        raise SystemExit(f"lab {number} has nothing to check here; see its page, "
                         f"tests/labs/{PAGES[number]}.md")
    if number == 13:
        import diagnosis  # noqa: F401  (puts the repository on the path)
        from own_rows import examine
        return examine(folder)
    if not folder.is_dir():
        raise SystemExit(f"{folder} is not there; first: python tests/labs/lab.py start {number}")
    with tempfile.TemporaryDirectory() as scratch:
        out = Path(scratch, "report.json")
        command = [sys.executable, str(LABS_FOLDER / "diagnosis.py"), str(number),
                   str(folder.resolve()), str(seed), str(limit), str(out)]
        try:
            done = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True,
                                  text=True, errors="replace", timeout=limit + 300, cwd=scratch)
        except subprocess.TimeoutExpired:
            return stopped(f"it did not end in {limit} seconds. Is there an endless loop?")
        report = json.loads(out.read_text()) if out.exists() else died(done, folder, limit)
    printed = done.stdout.splitlines()
    if printed:
        report["lines"].append(f"(Your files printed {len(printed)} lines, the last: "
                               f"{printed[-1][:80]!r})")
    return report


def died(done, folder, limit):
    """The report on a process that left none. Out of time, it leaves a traceback."""
    if "Timeout (" not in done.stderr:
        last = (done.stderr.strip().splitlines() or ["no message"])[-1]
        return stopped(f"the process ended without a result (code {done.returncode}): {last}")
    at = re.search(rf'File "{re.escape(str(folder.resolve()))}/(.+)", line (\d+) in (\w+)',
                   done.stderr)
    where = f" It was at {at[1]}:{at[2]}, in {at[3]}()." if at else ""
    return stopped(f"it did not end in {limit} seconds. Is there an endless loop?{where}")


def stopped(line):
    return {"passed": False, "parts": {}, "lines": [line]}


def share(number, folder):
    """Copy the student's functions of stage 1 into stages 2 and 3, which hold the same block."""
    for file, names in LABS[number][1].items():
        mine = (folder / file).read_text("utf-8")
        for copied in COPIES.get(file, ()):
            path = folder / copied
            new = {name: text_of(mine, name) for name in names}
            path.write_text(replaced(path.read_text("utf-8"), new), "utf-8")
            print(f"{path}: has your {', '.join(names)} now")


# -------------------------------------------------------------------------- lab 11: the bug hunt
def plant(k, folder, seed):
    """Copy the scripts, bug k in them."""
    from bugs import numbered, planted
    bug = numbered(seed)[k - 1]
    copy_scripts(folder)
    path = folder / bug.file
    path.write_text(planted(path.read_text("utf-8"), bug), "utf-8")
    print(f"{folder}: the scripts, bug {k} in one of them. Run {folder / STAGE_1} from here; the "
          "page is tests/labs/11_bug_hunt.md")


def compare(healthy, other):
    """Two runs side by side: each figure in the first step, on average, and in the last one."""
    from bugs import WHEN, figures
    found = figures(healthy), figures(other)
    columns = ("first", "mean", "last")
    print(f"{'':42}{str(healthy)[-30:]:>30}{str(other)[-30:]:>33}")
    print(f"{'':42}" + "   ".join("".join(f"{name:>10}" for name in columns) for _ in found))
    for name in found[0]:
        if name == "step" or name not in found[1]:
            continue
        cells = []
        for values in (run[name] for run in found):
            cells.append("".join(f"{WHEN[column](values):10.3g}" for column in columns))
        print(f"{name:42}" + "   ".join(cells))


def guess(k, name, seed):
    """Say whether bug k is the one of this name."""
    from bugs import BUGS, numbered
    names = sorted(bug.name for bug in BUGS)
    name = name.lower()
    if name not in names:
        raise SystemExit(f"no bug is called {name!r}; they are {', '.join(names)}")
    bug = numbered(seed)[k - 1]
    if bug.name != name:
        raise SystemExit(f"bug {k} is not {name}. Which figure pointed there? Look at what else "
                         "would move it.")
    print(f"Right: bug {k} is {name}. It is in {bug.function}() of {bug.file}.")


def main():
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("list", help="the labs, and what each cuts out")
    for name, option in (("start", "--out"), ("check", "--dir"), ("hint", None)):
        one = commands.add_parser(name)
        one.add_argument("number", type=int, choices=PAGES)
        if option:
            one.add_argument(option, dest="folder", type=Path, help="default: my_labs/NUMBER")
        if name == "check":
            one.add_argument("--seed", type=int, default=0, help="other cases, for grading")
            one.add_argument("--limit", type=int, default=300, help="seconds")
            one.add_argument("--share", action="store_true",
                             help="if all is right, copy it from stage 1 to stages 2 and 3")
        if name == "hint":
            one.add_argument("which", type=int, nargs="?", default=1)
    for name in ("plant", "guess"):
        one = commands.add_parser(name)
        one.add_argument("bug", type=int, choices=range(1, 13), metavar="1..12")
        if name == "plant":
            one.add_argument("--out", dest="folder", type=Path, help="default: my_labs/bug_NUMBER")
        else:
            one.add_argument("name")
        one.add_argument("--seed", type=int, default=0, help="other numbers, for grading")
    one = commands.add_parser("compare", help="two runs of stage 1 side by side")
    one.add_argument("runs", type=Path, nargs=2, metavar="RUN")
    args = parser.parse_args()
    if args.command == "list":
        return list_labs()
    if args.command == "hint":
        return hint(args.number, args.which)
    if args.command == "plant":
        return plant(args.bug, args.folder or Path("my_labs", f"bug_{args.bug}"), args.seed)
    if args.command == "guess":
        return guess(args.bug, args.name, args.seed)
    if args.command == "compare":
        return compare(*args.runs)
    folder = args.folder or Path("my_labs", str(args.number))
    if args.command == "start":
        return start(args.number, folder)
    report = check(args.number, folder, args.seed, args.limit)
    print(f"lab {args.number}, {folder}, seed {args.seed}")
    for line in report["lines"]:
        print(f"  {line}")
    if not report["passed"]:
        raise SystemExit("not yet")
    print("passed")
    if args.share:
        share(args.number, folder)


if __name__ == "__main__":
    main()
