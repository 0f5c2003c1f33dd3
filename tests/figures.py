"""
The README's figure and its group of four answers, from small files of reference runs.

    python tests/figures.py                       draw tests/figures/curves.svg
    python tests/figures.py --from runs/seed0     take the curves of these runs first
    python tests/figures.py --group runs/groups --step 3     take a group; print README's text

tests/reference_runs/ holds what is drawn and no more: <stage>/metrics.jsonl with the step, the mean
reward, the accuracy on held-out texts where the run looked, and in the last line "pixels", the
accuracy by task after the stage, both in per cent. made_by.json says whose curves they are;
group.json is one line of a rollouts.jsonl.
"""

import argparse
import json
import shutil
import subprocess
from pathlib import Path

from curriculum import ROOT, SCRIPTS, STAGES, common, judge, lines

from report import line_chart

REFERENCE = ROOT / "tests" / "reference_runs"
FIGURE = ROOT / "tests" / "figures" / "curves.svg"
ROWS = 100  # held-out rows per task, both orders
PLACES = {"0": 0, "1": 1, "2": 2, "2b": 2.5, "3": 3}  # of the stages on the axis
WIDTH, HEIGHT, LEGEND = 300, 200, 85


# ----------------------------------------------------------------------------------------- the runs
def folder_of(stage, runs):
    """Where README's commands put a stage's run, or tests/curriculum.py; None where neither did"""
    trained = "-".join(STAGES[:STAGES.index(stage) + 1])
    for name in (Path(SCRIPTS[stage]).stem, trained):
        if (runs / name / "stage.json").exists():
            return runs / name
    return None


def thinned(folder, stage):
    """A finished run -> the lines of its metrics.jsonl that are drawn"""
    info = json.loads((folder / "stage.json").read_text("utf-8"))
    looks = {}  # step: accuracy on held-out texts
    heldout = info["heldout"]
    if stage == "1" and heldout["after"]:
        looks = {0: heldout["before"]["accuracy"], info["step"]: heldout["after"]["accuracy"]}
    kept = []
    if 0 in looks:
        kept.append({"step": 0, "eval_accuracy": round(100 * looks[0], 1)})
    for step in lines(folder / "metrics.jsonl"):
        line = {"step": step["step"]}
        if "reward" in step:
            line["reward"] = round(step["reward"], 4)
        accuracy = step.get("eval_accuracy", looks.get(step["step"]))
        if stage == "1" and accuracy is not None:
            line["eval_accuracy"] = round(100 * accuracy, 1)
        if len(line) > 1:
            kept.append(line)
    pixels = judge(folder, "pixels", ROWS)
    kept.append({"step": info["step"], "pixels": {t: round(x, 1) for t, x in pixels.items()}})
    return kept


def take(runs):
    """The run folders of `runs` -> tests/reference_runs/"""
    for stage in STAGES:
        folder, out = folder_of(stage, runs), REFERENCE / Path(SCRIPTS[stage]).stem
        shutil.rmtree(out, ignore_errors=True)  # runs of two curricula are not to be mixed
        if folder is None:
            print(f"{runs}: no finished run of stage {stage}, left out")
            continue
        out.mkdir(parents=True)
        common.write_lines(out / "metrics.jsonl", thinned(folder, stage))
        seed = json.loads((folder / "stage.json").read_text("utf-8"))["config"]["seed"]
    commit = subprocess.run(["git", "log", "-1", "--format=%h %cs"], cwd=ROOT, check=True,
                            capture_output=True, text=True).stdout.split()
    made_by = {"commit": commit[0], "date": commit[1], "seed": seed, "rows": ROWS}
    (REFERENCE / "made_by.json").write_text(json.dumps(made_by) + "\n")


# --------------------------------------------------------------------------------------- the figure
def draw(reference=REFERENCE):
    """The files of a folder of reference runs -> the SVG, three charts side by side"""
    made_by = json.loads((reference / "made_by.json").read_text("utf-8"))
    reward, accuracy, pixels = [], [], {}
    for line in lines(reference / Path(SCRIPTS["1"]).stem / "metrics.jsonl"):
        if "reward" in line:
            reward.append((line["step"], line["reward"]))
        if "eval_accuracy" in line:
            accuracy.append((line["step"], line["eval_accuracy"]))
    for stage, script in SCRIPTS.items():
        path = reference / Path(script).stem / "metrics.jsonl"
        if path.exists():
            for task, share in lines(path)[-1]["pixels"].items():
                name = task.replace("_", " ")
                pixels.setdefault(name, []).append((PLACES[stage], share))
    whose = f"seed {made_by['seed']}, commit {made_by['commit']}"
    tall = HEIGHT + LEGEND
    charts = [
        line_chart("text RL: mean reward of a step", {whose: reward}, WIDTH, tall, legend=False),
        line_chart("text RL: held-out accuracy, %", {whose: accuracy}, WIDTH, tall, legend=False),
        line_chart("pixels: accuracy after stage, %", pixels, WIDTH, HEIGHT)]
    picture = (f'<svg xmlns="http://www.w3.org/2000/svg" width="{3 * WIDTH}" height="{tall}" '
               f'viewBox="0 0 {3 * WIDTH} {tall}" role="img" font-family="sans-serif">\n'
               f"<title>{whose}</title>\n")
    for n, chart in enumerate(charts):
        picture += chart.replace("<svg ", f'<svg x="{n * WIDTH}" ', 1) + "\n"
    return picture + "</svg>\n"


# ---------------------------------------------------------------------------------------- the group
def group_of(groups, step):
    """The group of a step, without what README does not show"""
    for group in groups:
        if group["step"] == step:
            names = ("step", "id", "label", "prompt", "answers", "rewards", "advantages")
            return {name: group[name] for name in names}
    raise SystemExit(f"no group of step {step} was logged")


def group_text(group):
    """A group as README shows it: question and responses, then of each answer what it compares,
    what it makes of it, its verdict, and what it earned (format + accuracy). Tags and the
    conclusion, which repeats the verdict, are left out."""
    question = group["prompt"].partition("[User Question]\n")[2].partition("\n\n[The Start")[0]
    text = f"{question}\n"
    for side in "AB":
        start = f"[The Start of Assistant {side}'s Response]\n"
        response = group["prompt"].partition(start)[2].partition("\n[The End")[0]
        text += f"{side}: {response}{'   <- better' * (side == group['label'])}\n"
    for n, answer in enumerate(group["answers"]):
        thought = answer.partition("Conclusion:")[0]
        for heading in ("<think>", "Feedback:", "Comparision:"):
            thought = thought.replace(heading, " ")
        rewards = [f"{values[n]:g}" for values in group["rewards"].values()]
        text += (f"{n + 1}  {' '.join(thought.split())} -> {common.parse(answer).verdict}\n"
                 f"   reward {'+'.join(rewards)}, advantage {group['advantages'][n]:+.2f}\n")
    return text


def main():
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--from", dest="runs", type=Path, metavar="FOLDER",
                        help="run folders of the stages: runs/, or runs/seed0/ of curriculum.py")
    parser.add_argument("--group", type=Path, metavar="RUN",
                        help="run folder of a stage 1 with --group_size 4")
    parser.add_argument("--step", type=int, default=1, help="of that group")
    args = parser.parse_args()
    if args.runs:
        take(args.runs.resolve())
    if args.group:
        group = group_of(lines(args.group / "rollouts.jsonl"), args.step)
        (REFERENCE / "group.json").write_text(json.dumps(group, indent=1) + "\n")
        print(group_text(group))
    FIGURE.parent.mkdir(exist_ok=True)
    FIGURE.write_text(draw(), "utf-8")
    print(f"wrote {FIGURE.relative_to(ROOT)}")


if __name__ == "__main__":
    main()
