"""
Judge preference rows with a checkpoint, in both orders.

    python eval.py --model runs/stage1_text_grpo --data toy/heldout_text.jsonl
    python eval.py --model runs/stage1_text_grpo --data toy/heldout_text.jsonl --votes 8
    python eval.py --table runs/*                    # checkpoints by tasks, as a Markdown table

Every row is shown as A, B and as B, A. Accuracy is the mean over rows of the mean over the two
orders, so a judge that always says "A" gets exactly 50 %. An answer without one clear verdict is
wrong.
"""

import argparse
import json
import os
import sys
from pathlib import Path

import common
from stage1_text_grpo import sample_group


def main():
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="checkpoint folder or hub id")
    parser.add_argument("--data", help="preference rows: .jsonl, or a published file (RM-Bench, "
                        "HelpSteer3, GRAM-RR); several separated by commas")
    parser.add_argument("--form", choices=["pixels", "caption"], default="pixels",
                        help="show images and videos, or their captions instead")
    parser.add_argument("--votes", type=int, default=1, help="K sampled answers an order, majority "
                        "wins (paper: voting@16); 1 = one greedy answer")
    parser.add_argument("--temperature", type=float, default=1.0, help="of the K sampled answers")
    parser.add_argument("--max_new_tokens", type=int, default=160, help="paper: 1024")
    parser.add_argument("--max_prompt_tokens", type=int, default=2048, help="longer prompts are "
                        "skipped and counted")
    parser.add_argument("--frames", type=int, default=8, help="frames a video (the paper's: 8)")
    parser.add_argument("--max_tiles", type=int, default=12, help="tiles an image (InternVL: 12)")
    parser.add_argument("--batch_size", type=int, default=64, help="prompts decoded together")
    parser.add_argument("--seed", type=int, default=0, help="of the sampled answers")
    parser.add_argument("--skip_bad_rows", action="store_true", help="leave bad rows out, counted")
    parser.add_argument("--out", help="write prediction rows to this .jsonl")
    parser.add_argument("--json", action="store_true", help="print one JSON object last")
    parser.add_argument("--table", nargs="+", metavar="CHECKPOINT", help="print a table of "
                        "checkpoints by the five tasks' held-out rows in --toy, and stop")
    parser.add_argument("--toy", default="toy", help="folder of heldout_<task>.jsonl for --table")
    args = parser.parse_args()
    if args.table:
        return table(args)
    if not (args.model and args.data):
        parser.error("give --model and --data, or --table; see --help")
    if args.out:
        check_writable(args.out)

    device = common.start_processes()
    rows, preds = judge_file(args.model, args.data, args.form, device, args)
    if common.rank() == 0:
        if args.out:
            with open(args.out, "w", encoding="utf-8") as f:
                f.writelines(json.dumps(p, ensure_ascii=False) + "\n" for p in preds)
        result = common.summarize(rows, preds)
        print(common.show(f"{args.model} on {args.data}", result))
        groups = sorted({r["task"] for r in rows} | {r["subset"] for r in rows if r.get("subset")})
        by_group = {g: common.summarize(rows, some)["accuracy"] for g in groups if (some := [
            p for p in preds if g in (rows[p["row"]]["task"], rows[p["row"]].get("subset"))])}
        if len(by_group) > 1:
            print("  " + ", ".join(f"{g} {a:.1%}" for g, a in by_group.items()))
        if args.json:
            print(json.dumps({**result, "groups": by_group, "model": args.model, "data": args.data,
                              "votes": args.votes, "form": args.form}))
    common.end_processes()


def judge_file(model_folder, data, form, device, args, loaded=None):
    """-> rows and prediction rows."""
    model, encoder = loaded or common.load(
        model_folder, device, made_by="python stage1_text_grpo.py", frames=args.frames,
        max_tiles=args.max_tiles)
    rows = common.load_rows(data, encoder, form, args.max_prompt_tokens, args.skip_bad_rows,
                            quiet=loaded is not None)
    return rows, common.judge(model, encoder, rows, sample_group, form, args.votes,
                              args.temperature, args.max_new_tokens, args.batch_size, args.seed)


def table(args):
    """Markdown: one line a checkpoint, one column a task; accuracy over both orders, per cent."""
    device = common.start_processes()
    lines = []
    for folder in args.table:
        if not Path(folder, "config.json").is_file():
            print(f"{folder}: no checkpoint, left out", file=sys.stderr)
            continue
        loaded = common.load(folder, device, frames=args.frames, max_tiles=args.max_tiles)
        cells = []
        for task in common.TASKS:
            if task != "text" and loaded[1].image_token_id is None and args.form == "pixels":
                cells.append("-")  # a text-only model
                continue
            file = str(Path(args.toy, f"heldout_{task}.jsonl"))
            rows, preds = judge_file(folder, file, args.form, device, args, loaded)
            cells.append(f"{100 * common.summarize(rows, preds)['accuracy']:.1f}")
        lines.append([folder, *cells])
    if common.rank() == 0:
        head = ["checkpoint", *(t.replace("_", " ") for t in common.TASKS)]
        print("\n" + "\n".join("| " + " | ".join(line) + " |" for line in
                               [head, ["---"] + ["--:"] * len(common.TASKS), *lines]))
    common.end_processes()


def check_writable(path):
    """Find out now, not after an hour of judging, that --out cannot be written."""
    folder = Path(path).parent
    if not folder.is_dir() or not os.access(folder, os.W_OK) or Path(path).is_dir():
        raise SystemExit(f"{path}: cannot be written; make the folder or choose another --out.")


if __name__ == "__main__":
    main()
