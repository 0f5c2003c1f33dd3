"""
Stage 1 on several processes, in whose second one something goes wrong: rank_fault.py OUT FAULT@STEP
[FAULT@STEP ...] -- FLAGS of stage 1

    raise   an exception of its own        kill   SIGKILL, as from a machine short of memory
    nan     a gradient that is no number   term   SIGTERM, as from whoever ends the job

Each process writes a checksum of its weights before each step to OUT/weights-RANK.jsonl; the second
one writes the time of its end to OUT/died.
"""

import os
import signal
import sys
import time
import zlib
from pathlib import Path

import torch

import common
import stage1_text_grpo as stage1

split = sys.argv.index("--")
out, *faults = sys.argv[1:split]
sys.argv[1:] = sys.argv[split + 1:]
faults = {int(step): fault for fault, step in (text.split("@") for text in faults)}
batch_of, sum_gradients, make_optimizer = (common.batch_of, common.sum_gradients,
                                           common.make_optimizer)
models, steps = [], []


def watched_optimizer(model, lr):
    models.append(model)
    return make_optimizer(model, lr)


def faulty_batch(rows, step, *settings):
    steps.append(step + 1)
    sums = [zlib.crc32(weight.numpy().tobytes()) for weight in models[0].state_dict().values()]
    common.append(Path(out, f"weights-{common.rank()}.jsonl"), {"step": step + 1, "sums": sums})
    fault = faults.get(step + 1) if common.rank() == 1 else None
    if fault in ("raise", "kill"):
        Path(out, "died").write_text(str(time.time()))
    if fault == "raise":
        raise RuntimeError("the second process died here")
    if fault in ("kill", "term"):
        os.kill(os.getpid(), signal.SIGKILL if fault == "kill" else signal.SIGTERM)
    return batch_of(rows, step, *settings)


def faulty_gradients(parameters):
    if common.rank() == 1 and faults.get(steps[-1]) == "nan":
        parameters[0].grad.view(-1)[0] = torch.nan
    sum_gradients(parameters)


common.make_optimizer, common.batch_of = watched_optimizer, faulty_batch
common.sum_gradients = faulty_gradients
stage1.REWARDS["format"] = lambda text, row: float(len(text) % 3)  # something to learn from
stage1.main()
