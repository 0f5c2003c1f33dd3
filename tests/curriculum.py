"""
The whole curriculum on the toy world, as a user would run it, and the table of what each stage
buys. Slow, so not part of the tests.

    python tests/curriculum.py --seeds 0              # text -> captions -> distillation -> pixels
    python tests/curriculum.py --seeds 0 1 2          # mean and spread over seeds
    python tests/curriculum.py --seeds 0 --ablations  # and Table 4 in miniature

Every command is printed before it runs; what is finished already is not run again.
"""

import argparse
import json
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
TASKS = ("text", "image_understanding", "image_generation", "video_understanding",
         "video_generation")
SCRIPTS = {"stage 0": "stage0_sft.py", "stage 1": "stage1_text_grpo.py",
           "stage 2": "stage2_caption_grpo.py", "stage 2b": "stage2b_cmkd.py",
           "stage 3": "stage3_mm_grpo.py"}
# Table 4 of MSRL: the curriculum without one of its stages, and the generative baseline
ABLATIONS = {"w/o stage 1": ["stage 0", "stage 2", "stage 2b", "stage 3"],
             "w/o stage 2 (captions)": ["stage 0", "stage 1", "stage 2b", "stage 3"],
             "w/o stage 2b (CMKD)": ["stage 0", "stage 1", "stage 2", "stage 3"],
             "w/o stage 3": ["stage 0", "stage 1", "stage 2", "stage 2b"],
             "stages 0 and 3 only": ["stage 0", "stage 3"]}
BASELINE = ["--target", "label", "--data", "toy/caption_rl.jsonl,toy/mm_rl.jsonl",
            "--freeze_vision", "False", "--lr", "5e-4"]  # the same multimodal labels, 3 epochs


def run(*command):
    print("$ python " + " ".join(map(str, command)), flush=True)
    start = time.time()
    subprocess.run([sys.executable, *map(str, command)], cwd=ROOT, check=True)
    return time.time() - start


def train(stages, seed, folder, minutes):
    """Run these stages one after another, each from the one before. Runs that start alike share
    their folders. -> the folder of each stage."""
    parent, name, folders = "toy/backbone", "", {}
    for stage in stages:
        script = SCRIPTS[stage]
        name += ("-" if name else "") + stage.removeprefix("stage ")
        out = folder / name
        if not (ROOT / out / "stage.json").exists():
            minutes[name] = run(script, "--model", parent, "--out", out, "--seed", seed) / 60
        parent = folders[stage] = out
    return folders


def judge(folder, form, rows, files="heldout"):
    """Accuracy by task of one checkpoint, in per cent; kept beside it."""
    kept = ROOT / folder / f"{files}_{form}_{rows}.json"
    if not kept.exists():
        result = {}
        for task in TASKS:
            data, out = f"toy/{files}_{task}.jsonl", kept.with_suffix(f".{task}.jsonl")
            run("eval.py", "--model", folder, "--data", f"{data}:{rows}",
                "--form", form, "--max_new_tokens", 160, "--batch_size", 128, "--out", out)
            preds = [json.loads(line) for line in out.read_text().splitlines()]
            labels = {json.loads(line)["id"]: json.loads(line)["label"] for line in open(
                ROOT / data)}
            result[task] = 100 * sum(p["pred"] == labels[p["id"]] for p in preds) / len(preds)
        kept.write_text(json.dumps(result))
    return json.loads(kept.read_text())


def shuffle_media():
    """toy/shuffled_<task>.jsonl: each held-out row with the media of another. A judge that looks
    falls to chance on these."""
    for task in TASKS:
        rows = [json.loads(line) for line in open(ROOT / f"toy/heldout_{task}.jsonl")]
        for row, media in zip(rows, [r["media"] for r in rows[1:] + rows[:1]]):
            row["media"] = media
        (ROOT / f"toy/shuffled_{task}.jsonl").write_text(
            "".join(json.dumps(r) + "\n" for r in rows), "utf-8")


def show(title, table):
    """table: {name: one {task: per cent} a seed} -> Markdown, mean and range over seeds."""
    print(f"\n{title}\n\n| | " + " | ".join(t.replace("_", " ") for t in TASKS)
          + " | visual mean |\n|---|" + "--:|" * 6)
    for name, seeds in table.items():
        columns = [[s[t] for s in seeds] for t in TASKS]
        columns.append([sum(s[t] for t in TASKS[1:]) / 4 for s in seeds])
        cells = [f"{sum(c) / len(c):.1f}" + (f" ({min(c):.0f}-{max(c):.0f})" if len(c) > 1 else "")
                 for c in columns]
        print(f"| {name} | " + " | ".join(cells) + " |", flush=True)


def main():
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--rows", type=int, default=200, help="held-out rows a task, both orders")
    parser.add_argument("--captions", action="store_true", help="a second table: captions shown")
    parser.add_argument("--ablations", action="store_true", help="Table 4 in miniature")
    parser.add_argument("--out", default="runs", help="runs/seed<S>/... are written here")
    args = parser.parse_args()
    if not (ROOT / "toy" / "backbone").exists():
        run("tests/toy_world.py")
    tables = {form: {"backbone": [judge(Path("toy/backbone"), form, args.rows)]}
              for form in ["pixels"] + ["caption"] * args.captions}
    shuffle_media()
    ablations, blind = {}, []
    for seed in args.seeds:
        folder, minutes = Path(args.out, f"seed{seed}"), {}
        for stage, out in train(list(SCRIPTS), seed, folder, minutes).items():
            for form, table in tables.items():
                table.setdefault(stage, []).append(judge(out, form, args.rows))
        print(f"seed {seed}: " + ", ".join(f"{n} {m:.1f} min" for n, m in minutes.items()))
        blind.append(judge(out, "pixels", args.rows, "shuffled"))
        if args.ablations:
            for name, stages in ABLATIONS.items():
                last = list(train(stages, seed, folder, minutes).values())[-1]
                ablations.setdefault(name, []).append(judge(last, "pixels", args.rows))
            out = folder / "baseline"
            if not (ROOT / out / "stage.json").exists():
                run("stage0_sft.py", *BASELINE, "--out", out, "--seed", seed)
            ablations.setdefault("generative baseline (Eq. 2)", []).append(
                judge(out, "pixels", args.rows))
    for form, table in tables.items():
        show(f"Held-out accuracy, {form} shown", table)
    show("Does it look? Held-out rows with the media of another row", {"stage 3": blind})
    if ablations:
        show("Table 4 in miniature", {**ablations, "all stages": tables["pixels"]["stage 3"]})


if __name__ == "__main__":
    main()
