"""
The whole curriculum on the toy world, as a user would run it, and the tables of what each stage
buys. Slow, so not part of the tests.

    python tests/curriculum.py                        # text -> captions -> distillation -> pixels
    python tests/curriculum.py --seeds 0 1 2          # mean and range over seeds
    python tests/curriculum.py --ablations            # Table 4, Table 6, Figure 3 in miniature

Every command is printed before it runs; what is finished already is not run again.
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
# A step of a run is a stage, or a stage with other flags: 1@15 is stage 1 of 15 steps
VARIANTS = {"1@15": ["--max_steps", 15], "3@10": ["--max_steps", 10],
            "2@1to0": ["--replay_ratio", "1:0"], "2@4to1": ["--replay_ratio", "4:1"],
            "2@2to1": ["--replay_ratio", "2:1"], "2@1to1": ["--replay_ratio", "1:1"]}
# The paper's "w/o stage 1" leaves out stage 0, too; what cannot judge has nothing to replay
TABLE_4 = {"w/o stages 0 and 1": ["2@1to0", "2b", "3"], "w/o stage 1": ["0", "2", "2b", "3"],
           "w/o stage 2 (captions)": ["0", "1", "2b", "3"],
           "w/o stage 2b (CMKD)": ["0", "1", "2", "3"], "w/o stage 3": ["0", "1", "2", "2b"]}
TABLE_6 = {"1:0": ["0", "1", "2@1to0"], "1:1": ["0", "1", "2@1to1"], "2:1": ["0", "1", "2@2to1"],
           "4:1": ["0", "1", "2@4to1"], "5:1 (default)": ["0", "1", "2"]}
# Text prompts of stage 1 and multimodal ones of stage 3, 24 per step; the paper has 5k and
# 20k of them. (Stages 2 and 2b see some text, too: 160 replayed prompts, 300 distilled rows.)
FIGURE_3 = {"0 text, 240 rows": ["0", "2", "2b", "3@10"],
            "0 text, 960 rows": ["0", "2", "2b", "3"],
            "360 text, 240 rows": ["0", "1@15", "2", "2b", "3@10"],
            "360 text, 960 rows": ["0", "1@15", "2", "2b", "3"],
            "1440 text, 240 rows": ["0", "1", "2", "2b", "3@10"],
            "1440 text, 960 rows": STAGES}
# The paper's two baselines train on the labels alone, of text and of multimodal rows at once
LABELS = ["--model", "toy/backbone", "--data", "toy/text_rl.jsonl:2000,toy/mm_rl.jsonl"]
BASELINES = {
    "discriminative baseline (Eq. 1)": ["bt_reward.py", *LABELS, "--t2i", "swap"],
    "generative baseline (Eq. 2)": ["stage0_sft.py", *LABELS, "--target", "label",
                                    "--freeze_vision", "False", "--lr", "5e-4"]}


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
        result = {}
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
            result[task] = 100 * common.summarize(data, preds)["accuracy"]
        kept.write_text(json.dumps(result))
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


def main():
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--rows", type=int, default=200, help="held-out rows per task, both orders")
    parser.add_argument("--ablations", action="store_true",
                        help="Table 4 with the baselines, Table 6 and Figure 3 in miniature")
    parser.add_argument("--out", default="runs", help="runs/seed<S>/... are written here")
    args = parser.parse_args()
    if not (ROOT / "toy" / "backbone").exists():
        run("tests/toy_world.py")
    shuffle_media()
    forms = {form: {"backbone": [judge("toy/backbone", form, args.rows)]}
             for form in ("caption", "pixels")}
    looks = {"stage 3": [], "media of another row": [], "its own caption blanked": []}
    four, six, three = {}, {}, {}
    for seed in args.seeds:
        folder, minutes = Path(args.out, f"seed{seed}"), {}
        for stage, out in train(STAGES, seed, folder, minutes).items():
            for form, table in forms.items():
                table.setdefault(f"stage {stage}", []).append(judge(out, form, args.rows))
        looks["stage 3"].append(judge(out, "pixels", args.rows))
        looks["media of another row"].append(judge(out, "pixels", args.rows, "shuffled"))
        looks["its own caption blanked"].append(judge(out, "pixels", args.rows, blank=True))
        if args.ablations:
            for name, steps in TABLE_4.items():
                out = last(steps, seed, folder, minutes)
                four.setdefault(name, []).append(judge(out, "pixels", args.rows))
            for name, command in BASELINES.items():
                out = folder / command[0].removesuffix(".py")
                if not (ROOT / out / "stage.json").exists():
                    minutes[name] = run(*command, "--out", out, "--seed", seed, "--heldout", "")
                four.setdefault(name, []).append(judge(out, "pixels", args.rows))
            for name, steps in TABLE_6.items():
                out = last(steps, seed, folder, minutes)
                six.setdefault(name, []).append(judge(out, "caption", args.rows))
            for name, steps in FIGURE_3.items():
                out = last(steps, seed, folder, minutes)
                three.setdefault(name, []).append(judge(out, "pixels", args.rows))
        print(f"seed {seed}: " + ", ".join(f"{n} {m:.1f} min" for n, m in minutes.items()))
    for form, table in forms.items():
        show(f"Held-out accuracy, {form} shown", table)
    show("Does it look?", looks)
    if args.ablations:
        show("Table 4 in miniature", {**four, "all stages": forms["pixels"]["stage 3"]})
        show("Table 6 in miniature (captions shown, after stage 2)", six)
        show("Figure 3 in miniature", three)


if __name__ == "__main__":
    main()
