"""
The whole curriculum on the toy world, as a user would run it, and the tables of what each stage
buys. Slow, so not part of the tests.

    python tests/curriculum.py                        # text -> captions -> distillation -> pixels
    python tests/curriculum.py --seeds 0 1 2          # mean and range over seeds
    python tests/curriculum.py --ablations 4 3 6 --seeds 0 1 2 --rows 100  # Tables 4, 6, Figure 3

Every command is printed before it runs; what is finished already is not run again.

Tables 4 and 6 and Figure 3 are made near the paper's proportions. It has 400k texts, about 20k
captions and 20k multimodal rows, 20 : 1 : 1; the curriculum above sees 1,440 : 800 : 960, and there
captions and pixels teach what text should have. So here stages 2 and 3 have 96 labelled rows each,
1,440 : 96 : 96 (15 : 1 : 1), and see none twice (stage 2 sees 80 of them, and 16 replayed texts). 4
steps of 24 prompts, as the stages take them, moved neither's training reward (seed 0: 1.91, 1.91,
1.83, 1.88 and 1.80, 1.84, 1.80, 1.85), so they take 8 steps of 12.

Distillation needs no labels, and Table 4 has it twice: with about as many rows as are labelled (the
first 90 of those 96 captions, 30 texts), and with 5 times as many, 450 captions and 150 texts. It
reads prompts, media and captions, never a label. Two of the three baselines get the labels of
stages 1 to 3.
"""

import argparse
import json
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
import bt_reward  # noqa: E402  (it is on the path only now)
import common  # noqa: E402  (as above)
from data import load_rows  # noqa: E402  (as above)
from stage1_text_grpo import sample_group  # noqa: E402  (as above)

SCRIPTS = {"0": "stage0_sft.py", "1": "stage1_text_grpo.py", "2": "stage2_caption_grpo.py",
           "2b": "stage2b_cmkd.py", "3": "stage3_mm_grpo.py"}
STAGES = ["0", "1", "2", "2b", "3"]
# A step of a run is a stage, or a stage with other flags: 1@360 is stage 1 on 360 prompts
SMALL = ["--batch_size", 12]
VARIANTS = {"1@360": ["--max_steps", 15, "--heldout", ""],
            "2@96": [*SMALL, "--data", "toy/caption_rl.jsonl:96", "--max_steps", 8],
            "2b@120": ["--data", "toy/caption_rl.jsonl:90,toy/text_rl.jsonl:30"],
            "2b@600": ["--data", "toy/caption_rl.jsonl:450,toy/text_rl.jsonl:150"],
            "3@96": [*SMALL, "--data", "toy/mm_rl.jsonl:96", "--max_steps", 8],
            "3@480": [*SMALL, "--data", "toy/mm_rl.jsonl:480", "--max_steps", 40],
            "2@800@1to0": ["--replay_ratio", "1:0"]}
VARIANTS |= {"2@96@1to0": [*VARIANTS["2@96"], "--replay_ratio", "1:0"],
             "2@96@1to1": [*VARIANTS["2@96"], "--replay_ratio", "1:1"],
             "2@96@2to1": [*VARIANTS["2@96"], "--replay_ratio", "2:1"]}
# The paper's "w/o stage 1" leaves out stage 0, too; a toy backbone without it never judges
TABLE_4 = {"all stages": ["0", "1", "2@96", "2b@600", "3@96"],
           "w/o stage 1": ["0", "2@96", "2b@600", "3@96"],
           "w/o stage 2 (captions)": ["0", "1", "2b@600", "3@96"],
           "w/o stage 2b (CMKD)": ["0", "1", "2@96", "3@96"],
           "w/o stage 3": ["0", "1", "2@96", "2b@600"],
           "all stages, 2b with 120 rows": ["0", "1", "2@96", "2b@120", "3@96"],
           "w/o stage 3, 2b with 120 rows": ["0", "1", "2@96", "2b@120"]}
TABLE_6 = {"1:0": ["0", "1", "2@96@1to0"], "1:1": ["0", "1", "2@96@1to1"],
           "2:1": ["0", "1", "2@96@2to1"], "5:1 (default)": ["0", "1", "2@96"],
           "800 captions, 40 steps, 1:0": ["0", "1", "2@800@1to0"],
           "800 captions, 40 steps, 5:1": ["0", "1", "2"]}
# Text prompts of stage 1 and multimodal rows of stage 3; the paper has 5k and 20k of those.
# (Stages 2 and 2b see some text, too: 16 replayed prompts, 150 distilled rows.)
FIGURE_3 = {"0 text, 96 rows": ["0", "2@96", "2b@600", "3@96"],
            "0 text, 480 rows": ["0", "2@96", "2b@600", "3@480"],
            "1440 text, 96 rows": ["0", "1", "2@96", "2b@600", "3@96"],
            "1440 text, 480 rows": ["0", "1", "2@96", "2b@600", "3@480"],
            "360 text, 96 rows": ["0", "1@360", "2@96", "2b@600", "3@96"],
            "360 text, 480 rows": ["0", "1@360", "2@96", "2b@600", "3@480"]}
TABLES = {"4": ("Table 4 in miniature", TABLE_4, "pixels"),
          "6": ("Table 6 in miniature (after stage 2)", TABLE_6, "caption"),
          "3": ("Figure 3 in miniature", FIGURE_3, "pixels")}
# The paper's two baselines train on multimodal labels alone. Here those are few, so both baselines
# get the text labels as well, and one is trained as the paper's
MULTIMODAL = "toy/caption_rl.jsonl:96,toy/mm_rl.jsonl:96"
EQ_2 = ["stage0_sft.py", "--target", "label", "--freeze_vision", "False", "--lr", "5e-4"]
BASELINES = {
    "discriminative baseline (Eq. 1)": [
        "bt_reward.py", "--data", f"toy/text_rl.jsonl:1440,{MULTIMODAL}", "--t2i", "swap"],
    "generative baseline (Eq. 2)": [*EQ_2, "--data", f"toy/text_rl.jsonl:1440,{MULTIMODAL}"],
    "generative baseline without texts": [*EQ_2, "--data", MULTIMODAL, "--epochs", 10]}
HABITS = ["format", "captioned", "unparsable", "share_a", "order_flips"]


def run(*command, check=True):
    """-> minutes"""
    print("$ python " + " ".join(map(str, command)), flush=True)
    start = time.time()
    subprocess.run([sys.executable, *map(str, command)], cwd=ROOT, check=check)
    return (time.time() - start) / 60


def lines(path):
    return [json.loads(line) for line in path.read_text("utf-8").splitlines()]


def train(steps, seed, folder, minutes):
    """Run these stages one after another, each from the one before. Runs that start alike share
    their folders. -> the folder of each step."""
    parent, name, folders = "toy/backbone", "", {}
    for step in steps:
        name += ("-" if name else "") + step
        out = folder / name
        if not (ROOT / out / "stage.json").exists():
            # stages 2 to 3 are judged below, and need not judge 2,000 rows twice themselves
            quiet = ["--heldout", ""] if step[0] in "23" else []
            minutes[name] = run(SCRIPTS[step.partition("@")[0]], "--model", parent, "--out", out,
                                "--seed", seed, *quiet, *VARIANTS.get(step, []))
        parent = folders[step] = out
    return folders


def last(*args):
    """The folder of the last step."""
    return list(train(*args).values())[-1]


def judge(folder, form, rows, files="heldout", blank=False):
    """Accuracy by task of one checkpoint, in per cent, both orders, greedy; kept beside it. blank:
    the model's own caption is empty, its answer begins with <caption></caption> and it goes on
    from there, still seeing the pixels."""
    kept = ROOT / folder / f"{files}_{form}_{rows}{'_blank' * blank}.json"
    if not kept.exists():
        print(f"judging {folder}, {form} of {files} rows{', its own caption blanked' * blank}",
              flush=True)
        scalar = (ROOT / folder / "reward_head.safetensors").exists()
        if scalar:
            model, encoder = bt_reward.load(str(ROOT / folder))
        else:  # asked as it was trained: for a <caption> from stage 2b on
            model, encoder = common.load(str(ROOT / folder),
                                         style=common.trained_style(ROOT / folder))
        ids = encoder.answer_ids("<caption>\n</caption>\n")[:-1]

        def sample(model, encoder, prompts, *args):
            begun = []
            for prompt in prompts:
                if blank and prompt.pixels is not None:
                    prompt = replace(prompt, ids=prompt.ids + ids, positions=None)
                begun.append(prompt)
            return sample_group(model, encoder, begun, *args)
        result, habits = {}, {}
        for task in common.TASKS:
            data = load_rows(f"{ROOT}/toy/{files}_{task}.jsonl:{rows}", encoder, form, quiet=True)
            if scalar:
                scores = bt_reward.score_rows(model, encoder, data)
                right = sum("BA"[a > b] == row["label"]
                            for row, (a, b) in zip(data, scores, strict=True))
                result[task] = 100 * right / len(data)
                continue
            preds = common.judge(model, encoder, data, sample, form, batch_size=128,
                                 max_new_tokens=160)
            summary = common.summarize(data, preds)
            result[task] = 100 * summary["accuracy"]
            captioned = sum(common.parse(p["text"]).captioned for p in preds)
            summary["captioned"] = captioned / len(preds)
            habits[task] = {name: 100 * summary[name] for name in HABITS}
        kept.write_text(json.dumps(result))
        if habits:
            kept.with_name(f"habits_{kept.name}").write_text(json.dumps(habits))
    return json.loads(kept.read_text())


def shuffle_media():
    """toy/shuffled_<task>.jsonl: each held-out row with the media of another; text rows have none
    and stay. A judge that looks falls to chance on the others."""
    for task in common.TASKS:
        rows = lines(ROOT / f"toy/heldout_{task}.jsonl")
        shuffled = []
        for row, neighbour in zip(rows, rows[1:] + rows[:1], strict=True):
            shuffled.append({**row, "media": neighbour["media"]})
        common.write_lines(ROOT / f"toy/shuffled_{task}.jsonl", shuffled)


def show(title, table):
    """table: {name: one {task: per cent} per seed} -> Markdown, mean and range over seeds."""
    print(f"\n{title}\n\n| | " + " | ".join(t.replace("_", " ") for t in common.TASKS)
          + " | visual mean |\n|---|" + "--:|" * 6)
    for name, seeds in table.items():
        columns = [[s[t] for s in seeds] for t in common.TASKS]
        columns.append([sum(s[t] for t in common.TASKS[1:]) / 4 for s in seeds])
        cells = [f"{sum(c) / len(c):.1f}" + (f" ({min(c):.0f}-{max(c):.0f})" if len(c) > 1 else "")
                 for c in columns]
        print(f"| {name} | " + " | ".join(cells) + " |", flush=True)


def habits_of(folder, form, rows):
    """How the judge of `folder` answers visual rows, mean over their tasks in per cent. A scalar
    judge writes nothing: {}."""
    kept = ROOT / folder / f"habits_heldout_{form}_{rows}.json"
    if not kept.exists():
        return {}
    tasks = json.loads(kept.read_text())
    return {name: sum(tasks[t][name] for t in common.TASKS[1:]) / 4 for name in HABITS}


def show_habits(table):
    """table: {name: one {habit: per cent} per seed} -> Markdown, mean over seeds."""
    print("\n| visual rows | " + " | ".join(HABITS) + " |\n|---|" + "--:|" * len(HABITS))
    for name, seeds in table.items():
        cells = [f"{sum(s[h] for s in seeds) / len(seeds):.1f}" for h in HABITS]
        print(f"| {name} | " + " | ".join(cells) + " |", flush=True)


def baseline(name, seed, folder, minutes):
    command = BASELINES[name]
    out = folder / name.partition(" (")[0].replace(" ", "_")
    if not (ROOT / out / "stage.json").exists():
        minutes[name] = run(*command, "--model", "toy/backbone", "--out", out, "--seed", seed,
                            "--heldout", "")
    return out


def ablations(args):
    """The tables of --ablations, one after another, each for all seeds."""
    for number in args.ablations or TABLES:
        title, rows, form = TABLES[number]
        table, habits = {}, {}
        names = [*rows, *BASELINES] if number == "4" else list(rows)
        for seed in args.seeds:
            folder, minutes = Path(args.out, f"seed{seed}"), {}
            for name in names:
                if name in rows:
                    out = last(rows[name], seed, folder, minutes)
                else:
                    out = baseline(name, seed, folder, minutes)
                table.setdefault(name, []).append(judge(out, form, args.rows))
                answers = habits_of(out, form, args.rows)
                if answers:
                    habits.setdefault(name, []).append(answers)
            print(f"seed {seed}: " + ", ".join(f"{n} {m:.1f} min" for n, m in minutes.items()))
        show(title, table)
        show_habits(habits)


def curriculum(args):
    """All stages, each judged, and whether the last one looks."""
    shuffle_media()
    forms = {form: {"backbone": [judge("toy/backbone", form, args.rows)]}
             for form in ("caption", "pixels")}
    looks = {"stage 3": [], "media of another row": [], "its own caption blanked": []}
    for seed in args.seeds:
        folder, minutes = Path(args.out, f"seed{seed}"), {}
        for stage, out in train(STAGES, seed, folder, minutes).items():
            for form, table in forms.items():
                table.setdefault(f"stage {stage}", []).append(judge(out, form, args.rows))
        looks["stage 3"].append(judge(out, "pixels", args.rows))
        looks["media of another row"].append(judge(out, "pixels", args.rows, "shuffled"))
        looks["its own caption blanked"].append(judge(out, "pixels", args.rows, blank=True))
        print(f"seed {seed}: " + ", ".join(f"{n} {m:.1f} min" for n, m in minutes.items()))
    for form, table in forms.items():
        show(f"Held-out accuracy, {form} shown", table)
    show("Does it look?", looks)


def main():
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--rows", type=int, default=200, help="held-out rows per task, both orders")
    parser.add_argument("--ablations", nargs="*", choices=list(TABLES),
                        help="instead: Table 4, Table 6 and Figure 3 in miniature, or those named")
    parser.add_argument("--out", default="runs", help="runs/seed<S>/... are written here")
    args = parser.parse_args()
    if not (ROOT / "toy" / "backbone").exists():
        run("tests/toy_world.py")
    if args.ablations is None:
        curriculum(args)
    else:
        ablations(args)


if __name__ == "__main__":
    main()
