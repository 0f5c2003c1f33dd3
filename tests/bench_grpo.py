"""
Times a whole GRPO step of this project, the same step written naively, and TRL's. Slow, and wants
an idle machine, so not part of the tests.

    python tests/bench_grpo.py                            # this project and the naive step
    python tests/bench_grpo.py --trl venv-trl/bin/python  # and TRL, by an interpreter that has it
    python tests/bench_grpo.py --growth                   # with P, G and C, one at a time
    python tests/bench_grpo.py --smallest --steps 1       # the least memory each can do with
    python tests/bench_grpo.py --cases 1B --device cuda --steps 1 --repeats 1

For venv-trl: a virtual environment with the torch and transformers that run this file, and
`pip install --no-deps trl==1.16.0`.

Each process (programs/grpo_step.py) times one of them; they take turns, so that a busy minute meets
them all. The naive step must have our loss and gradient first. TRL is timed as it comes ("trl"):
without Triton its head runs over prompts, too; and with the head over answers only ("trl-answers"),
as on a GPU. On a CPU the step that warms up has its products of matrices counted.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
import transformers
from programs import grpo_step
from tqdm import tqdm

PROGRAM = Path(grpo_step.__file__)
TEXT = {"P": 512, "C": 96, "V": 8192, "G": 8, "tiles": 0, "layers": 6}
CASES = {"text": TEXT,
         "32k": TEXT | {"V": 32768},
         "long": TEXT | {"P": 1500, "C": 200},
         "tiles": TEXT | {"P": 768, "tiles": 8}}
# The language model of InternVL3.5-1B: Qwen3-0.6B with a head of its own. For a GPU of 80 GB; a
# forward with a gradient has one group, because 16 whole sequences would need more.
SIZE_1B = {"P": 1500, "C": 300, "V": 151_936, "G": 8, "tiles": 0, "layers": 28, "rows": 8,
           "widths": {"hidden_size": 1024, "intermediate_size": 3072, "head_dim": 128,
                      "num_attention_heads": 16, "num_key_value_heads": 8}}
GROWTH = [TEXT | change for change in (
    {"P": 256}, {}, {"P": 1024}, {"P": 2048}, {"G": 4}, {"G": 16}, {"C": 48}, {"C": 192})]


def check_same_step(tiles, **more):
    """Both steps on the same answers, B = 3: loss, norm and gradient must be equal. The policy is
    far from the reference, or the loss would be 0 whatever the step."""
    case = {"P": 71, "C": 7, "V": 83, "G": 5, "tiles": tiles, "layers": 2, **more}
    with tempfile.TemporaryDirectory() as folder:
        grpo_step.make(folder, case)
        model, _ = grpo_step.load(folder, case)
        reference, _ = grpo_step.load(folder, case)
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for head in (model.get_output_embeddings(), reference.get_output_embeddings()):
            head.weight.normal_(std=0.1, generator=generator)
    answers = torch.randint(1, case["V"] - 1, (3, case["G"], case["C"]), generator=generator)
    ours, naive = [one_update(competitor(case, prompts=3), model, reference, answers.tolist())
                   for competitor in (grpo_step.Ours, grpo_step.Naive)]
    assert ours["loss"] > 0.01
    for name in ours:
        torch.testing.assert_close(naive[name], ours[name], rtol=1e-4, atol=1e-6)


def one_update(competitor, model, reference, answers):
    """-> loss, norm and clipped gradients of an update that leaves the weights as they are"""
    gradients = {}

    class Optimizer:
        state = {0: {}}  # of steps before

        def step(self):
            for name, parameter in model.named_parameters():
                gradients[name] = parameter.grad

        def zero_grad(self, set_to_none):
            model.zero_grad(set_to_none)
    metrics = competitor.update(model, reference, Optimizer(), answers)
    return {"loss": metrics["loss"], "grad_norm": metrics["grad_norm"], **gradients}


def compare(cases, args):
    """-> [(case, {competitor: [what grpo_step.py prints, one object a process]})]"""
    pythons = {"ours": sys.executable, "naive": sys.executable}
    if args.trl:
        pythons["trl"] = args.trl
    if args.trl and args.device == "cpu":  # on a GPU the head runs over answers only as it comes
        pythons["trl-answers"] = args.trl
    if args.smallest:  # ours and its fair peer
        peer = "trl-answers" if args.device == "cpu" else "trl"
        pythons = {who: pythons[who] for who in ("ours", peer) if who in pythons}
    env = os.environ | {"OMP_NUM_THREADS": str(args.threads), "HF_HUB_OFFLINE": "1"}
    bar = tqdm(total=len(cases) * args.repeats * len(pythons), unit="process")
    results = []
    for case in cases:
        count = args.device == "cpu" and not args.smallest  # counting takes memory
        case = case | {"steps": args.steps, "device": args.device, "count": count}
        runs = {who: [] for who in pythons}
        with tempfile.TemporaryDirectory() as folder:
            grpo_step.make(folder, case)
            for who, python in list(pythons.items()) * args.repeats:
                bar.set_postfix_str(f"{describe(case)}: {who}")
                given = case
                if args.smallest:  # a forward with a gradient: TRL's of one answer, ours of a group
                    given = case | {"rows": case["G"] if who == "ours" else 1}
                command = [python, str(PROGRAM), who, json.dumps(given), folder]
                done = subprocess.run(command, env=env, capture_output=True, text=True)
                if done.returncode:
                    raise SystemExit(f"{' '.join(command)}\n{done.stderr[-2000:]}")
                runs[who].append(json.loads(done.stdout.splitlines()[-1]))
                bar.update()
        results.append((case, runs))
    bar.close()
    return results


def describe(case):
    text = "P {P}, C {C}, G {G}, V {V}".format(**case)
    return text + f", {case['tiles']} tiles" if case["tiles"] else text


def table(results):
    """Markdown: medians over all measured steps, in parentheses the fastest and the slowest step;
    products of a step in TFLOP, and those to ours; the largest peak."""
    titles = ["case", "step", "seconds (min-max)", "to ours", *grpo_step.PHASES, "products",
              "to ours", "peak GB"]
    lines = ["| " + " | ".join(titles) + " |", "|---|---|" + "--:|" * (len(titles) - 2)]
    for case, runs in results:
        ours = statistics.median(seconds(runs["ours"]))
        for who, processes in runs.items():
            times = seconds(processes)
            median = statistics.median(times)
            cells = [describe(case), who, f"{median:.2f} ({min(times):.2f}-{max(times):.2f})",
                     f"{median / ours:.2f}"]
            for phase in grpo_step.PHASES:
                cells.append(f"{statistics.median(seconds(processes, [phase])):.2f}")
            products = processes[0]["gflop"]
            if products:
                cells += [f"{products / 1e3:.3f}", f"{products / runs['ours'][0]['gflop']:.2f}"]
            else:  # not counted
                cells += ["-", "-"]
            cells.append(f"{max(process['peak_gb'] for process in processes):.2f}")
            lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def seconds(processes, phases=grpo_step.PHASES):
    """-> of all steps of these processes, what the phases took together"""
    return [sum(step[phase] for phase in phases)
            for process in processes for step in process["steps"]]


def main():
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", nargs="+", default=list(CASES), choices=[*CASES, "1B"])
    parser.add_argument("--growth", action="store_true", help="other lengths instead of --cases")
    parser.add_argument("--smallest", action="store_true", help="micro-batches as small as can be")
    parser.add_argument("--trl", help="a Python that has trl 1.16")
    parser.add_argument("--repeats", type=int, default=3, help="processes for each competitor")
    parser.add_argument("--steps", type=int, default=2, help="that a process measures")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    args = parser.parse_args()
    transformers.utils.logging.disable_progress_bar()
    check_same_step(tiles=0)
    check_same_step(tiles=1)
    cases = CASES | {"1B": SIZE_1B}
    results = compare(GROWTH if args.growth else [cases[name] for name in args.cases], args)
    where = f"fp32, {args.threads} threads"
    if args.device == "cuda":
        where = f"bf16 autocast, {torch.cuda.get_device_name()}"
    print(f"torch {torch.__version__}, {where}, {grpo_step.PROMPTS} prompts a step, beta "
          f"{grpo_step.BETA}; {args.repeats} processes of {args.steps} steps each\n\n"
          f"{table(results)}")


if __name__ == "__main__":
    main()
