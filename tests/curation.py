"""
Curation (DT2IT 3.3) on the toy world: 30 % of the labels of text_rl.jsonl are flipped, a reward
model is trained on them for every seed, all of them vote, and each is trained anew on what its own
curation leaves. Slow, so not part of the tests.

    python tests/curation.py --seeds 0 1 2 --judges runs/stage0_sft

Stage 0 is a poor judge (about 70 %), which is the point: a good one needs no curation.
"""

import argparse
import json
import random
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
import common  # noqa: E402

HELDOUT = "toy/heldout_text.jsonl"


def run(*command):
    print("$ python " + " ".join(map(str, command)), flush=True)
    subprocess.run([sys.executable, *map(str, command)], cwd=ROOT, check=True)


def train(data, out, seed, more):
    if not (ROOT / out / "stage.json").exists():
        run("bt_reward.py", "--data", data, "--heldout", HELDOUT, "--out", out, "--seed", seed,
            *more)
    return json.loads((ROOT / out / "stage.json").read_text())["heldout"]["after"]["accuracy"]


def main():
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--judges", nargs="+", default=["runs/stage0_sft"])
    parser.add_argument("--noise", type=float, default=0.3, help="share of labels flipped")
    parser.add_argument("--rows", type=int, default=4000)
    parser.add_argument("--out", default="runs/curation")
    args, more = parser.parse_known_args()  # what is left over goes to every training
    out = Path(args.out)
    (ROOT / out).mkdir(parents=True, exist_ok=True)
    clean = [json.loads(line) for line in open(ROOT / "toy/text_rl.jsonl")][:args.rows]
    true, rng = {r["id"]: r["label"] for r in clean}, random.Random(0)
    wrong = set(rng.sample(sorted(true), round(args.noise * len(true))))
    common.write_lines(ROOT / out / "noisy.jsonl", [
        {**r, "label": "BA"["AB".index(r["label"])] if r["id"] in wrong else r["label"]}
        for r in clean])
    models = [out / f"noisy{seed}" for seed in args.seeds]
    before = [train(out / "noisy.jsonl", m, s, more) for m, s in zip(models, args.seeds)]
    print("| seed | labels right | rows kept | trained on noisy | on curated |\n"
          "|---|--:|--:|--:|--:|")
    for seed, own, accuracy in zip(args.seeds, models, before):
        folder = out / f"curated{seed}"
        run("bt_reward.py", "--curate", out / "noisy.jsonl", "--out", folder, "--judges",
            *args.judges, "--models", own, *(m for m in models if m != own))
        kept = [json.loads(line) for line in open(ROOT / folder / "curated.jsonl")]
        right = sum(r["label"] == true[r["id"]] for r in kept) / len(kept)
        after = train(folder / "curated.jsonl", out / f"after{seed}", seed, more)
        print(f"| {seed} | {1 - args.noise:.1%} -> {right:.1%} | {len(kept)} of {len(clean)} | "
              f"{accuracy:.1%} | {after:.1%} |", flush=True)


if __name__ == "__main__":
    main()
