"""
Two rewards that are idle in the toy world, in experiments where they can act. Slow, so not part of
the tests.

    python tests/idle_rewards.py                              # both, seeds 0, 1, 2
    python tests/idle_rewards.py --rewards task --seeds 0     # one of them, one seed

task (MSRL 4.2, 0.2 for the right <type>): the toy model hardly ever writes a <type> after SFT on
text. A pretrained one follows the template part of the time, and for it stands a stage 0 on
captions whose answers name a type in a third of the rows; half of these are a wrong one, drawn at
random. Then stage 2 with the reward and without. MSRL has no such ablation.

consistency (R1-Reward 4.3): the toy verdict always follows from the toy reasoning. Here stage 0 is
taught on rows a quarter of which answer the opposite of what their reasoning concluded. Then stage
1 with R1-Reward's reward and with the same one without its consistency, as R1-Reward 5.2 leaves it
out.

Settings, chosen before the first run: stage 0 and learning rates as by default, STEPS steps of RL.
Types and contradictions are drawn without a look at the label. Held-out rows share no combination
with any training row (toy_world.py). Greedy answers hide what is said in a third of the cases, so
shares are of answers sampled at temperature 1; accuracy is greedy, in both orders. What is
finished already is not run again.
"""

import argparse
import json
import random
from pathlib import Path

import toy_world
from curriculum import ROOT, common, lines, load_rows, run, sample_group

STEPS = {"task": 20, "consistency": 30}
VISUAL = common.TASKS[1:]
TYPED, OPPOSITE = 1 / 3, 1 / 4  # shares of the rows of stage 0
OUT = Path("runs/idle_rewards")
SFT = {"task": ["--data", f"toy/sft.jsonl:2000,{OUT}/typed.jsonl", "--form", "caption"],
       "consistency": ["--data", f"{OUT}/opposite.jsonl"]}
RL = {"task": ("stage2_caption_grpo", "paper"), "consistency": ("stage1_text_grpo", "r1")}
FORM = {"task": "caption", "consistency": "pixels"}
HELDOUT = {"task": [f"toy/heldout_{task}.jsonl:100" for task in common.TASKS],
           "consistency": ["toy/heldout_text.jsonl"]}


# ------------------------------------------------------------------------------- rows for stage 0
def typed_rows(n, seed=0):
    """n rows with captions, tasks in turn, judged by the annotators of toy_world.py; TYPED of their
    rationales begin with a task type, which a coin makes a wrong one."""
    rng, rows = random.Random(f"{seed}:typed"), []
    for i in range(n):
        task = VISUAL[i % len(VISUAL)]
        row = toy_world.make_row(rng, task, held=False)
        row["label"], reason = toy_world.biased_verdict(rng, row)
        text = toy_world.rationale(row, row["label"], reason)
        if rng.random() < TYPED:
            others = [other for other in VISUAL if other != task]
            named = rng.choice([task, rng.choice(others)])
            text = f"<type>{named.replace('_', ' ')}</type>\n{text}"
        captions = [toy_world.describe(scene) for scene in row["scenes"]]
        rows.append({"id": f"typed-{i}", "task": task, "prompt": row["prompt"], "media": [],
                     "responses": row["responses"], "captions": captions, "label": row["label"],
                     "rationale": text, "source": "toy"})
    return rows


def opposite_rows(rows, seed=0):
    """The rows, OPPOSITE of them with the other verdict and the same reasoning."""
    rng, changed = random.Random(f"{seed}:opposite"), []
    for row in rows:
        label = row["label"]
        if rng.random() < OPPOSITE:
            label = common.OTHER[label]
        changed.append({**row, "label": label})
    return changed


# --------------------------------------------------------------------------- training and judging
def train(script, out, *flags):
    if not (ROOT / out / "stage.json").exists():
        run(*script, "--out", out, "--heldout", "", *flags)
    return out


def trained(reward, seed):
    """-> {name: folder} of stage 0, and of RL from there without the reward and with it"""
    module, scheme = RL[reward]
    # the scripts have no flag for a scheme without one of its rewards, and need none
    without = (f"import {module} as stage; stage.SCHEMES[{scheme!r}][{reward!r}] = 0.0; "
               "stage.main()")
    folder = OUT / reward / f"seed{seed}"
    start = train(["stage0_sft.py"], folder / "0", "--seed", seed, *SFT[reward])
    flags = ["--model", start, "--seed", seed, "--reward", scheme, "--max_steps", STEPS[reward]]
    return {"stage 0": start,
            "RL without it": train(["-c", without], folder / "without", *flags),
            "RL with it": train([f"{module}.py"], folder / "with", *flags)}


def answers(folder, reward):
    """-> held-out rows; predictions, greedy in both orders; two sampled ones a row. Kept beside the
    checkpoint."""
    model, encoder = common.load(str(ROOT / folder))
    form = FORM[reward]
    rows = []
    for file in HELDOUT[reward]:
        rows += load_rows(f"{ROOT}/{file}", encoder, form, quiet=True)
    kept = ROOT / folder / "answers.json"
    if not kept.exists():
        settings = dict(form=form, batch_size=128, max_new_tokens=160)
        greedy = common.judge(model, encoder, rows, sample_group, **settings)
        sampled = common.judge(model, encoder, rows, sample_group, votes=2, orders=("AB",),
                               **settings)
        kept.write_text(json.dumps([greedy, sampled]))
    return rows, *json.loads(kept.read_text())


# ---------------------------------------------------------------------------------------- figures
def share(values):
    """Of booleans, in per cent; 0 of none"""
    return 100 * sum(values) / max(1, len(values))


def accuracies(rows, greedy, sampled):
    right = [p["pred"] == rows[p["at"]]["label"] for p in sampled]
    return {"accuracy, greedy": 100 * common.summarize(rows, greedy)["accuracy"],
            "sampled": share(right)}


def type_figures(rows, greedy, sampled):
    """Shares of the sampled answers to prompts that ask for a type; texts' do not."""
    right = {task: [] for task in VISUAL}
    typed, on_text = [], []
    for prediction in sampled:
        task = rows[prediction["at"]]["task"]
        named = common.parse(prediction["text"]).type
        if task == "text":
            on_text.append(named is not None)
        else:
            typed.append(named is not None)
            right[task].append(named == task.replace("_", " "))
    n_right = sum(map(sum, right.values()))
    by_task = {task.replace("_", " "): share(values) for task, values in right.items()}
    return {"writes a type": share(typed), "right type": 100 * n_right / len(typed),
            "right, of the types": 100 * n_right / max(1, sum(typed)), **by_task,
            "type on texts": share(on_text), **accuracies(rows, greedy, sampled)}


def consistency_figures(rows, greedy, sampled):
    """Shares of the sampled answers, all in order AB; one column of the greedy ones. Where the
    reasoning concluded the wrong side, accuracy pays for contradicting it, consistency does not."""
    follows, right_against, reasoned_right = [], [], []
    against = {"right": [], "wrong": []}  # by what the reasoning concluded
    for prediction in sampled:
        consistency = common.rule_consistency(prediction["text"])
        follows.append(consistency)
        right = prediction["pred"] == rows[prediction["at"]]["label"]
        if right:
            right_against.append(consistency == -1)
        if consistency:
            reasoned_right.append(right == (consistency == 1))
            against["right" if reasoned_right[-1] else "wrong"].append(consistency == -1)
    greedy_follows = [common.rule_consistency(p["text"]) == 1 for p in greedy]
    return {"consistent": share([value == 1 for value in follows]),
            "contradicts": share([value == -1 for value in follows]),
            "where the answer is right": share(right_against),
            "where the reasoning is right": share(against["right"]),
            "where the reasoning is wrong": share(against["wrong"]),
            "reasoning right": share(reasoned_right),
            "consistent, greedy": share(greedy_follows), **accuracies(rows, greedy, sampled)}


FIGURES = {"task": type_figures, "consistency": consistency_figures}


def show(reward, table):
    """table: {name: one {figure: per cent} per seed} -> Markdown, mean and range over seeds."""
    columns = list(table["stage 0"][0])
    print(f"\n{reward}\n\n| | " + " | ".join(columns) + " |\n|---|" + "--:|" * len(columns))
    for name, seeds in table.items():
        cells = []
        for column in columns:
            values = [figures[column] for figures in seeds]
            mean = sum(values) / len(values)
            cells.append(f"{mean:.1f} ({min(values):.1f}-{max(values):.1f})")
        print(f"| {name} | " + " | ".join(cells) + " |", flush=True)


def main():
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rewards", nargs="+", choices=list(RL), default=list(RL))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    args = parser.parse_args()
    if not (ROOT / "toy" / "backbone").exists():
        run("tests/toy_world.py")
    (ROOT / OUT).mkdir(parents=True, exist_ok=True)
    common.write_lines(ROOT / OUT / "typed.jsonl", typed_rows(2000))
    common.write_lines(ROOT / OUT / "opposite.jsonl", opposite_rows(lines(ROOT / "toy/sft.jsonl")))
    for reward in args.rewards:
        table = {}
        for seed in args.seeds:
            for name, folder in trained(reward, seed).items():
                figures = FIGURES[reward](*answers(folder, reward))
                table.setdefault(name, []).append(figures)
                print(f"{reward}, seed {seed}, {name}: "
                      + ", ".join(f"{key} {value:.1f}" for key, value in figures.items()))
        show(reward, table)


if __name__ == "__main__":
    main()
