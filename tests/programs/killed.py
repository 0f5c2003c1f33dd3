"""
Stage 1, killed at a given moment, as a machine ends a process:

    killed.py "logged 3" FLAGS      after step 3 was logged, in the middle of the next line
    killed.py "saving 4" FLAGS      half-way through writing the state of step 4
"""

import os
import signal
import sys

import torch

import common
import stage1_text_grpo as stage1

when, *sys.argv[1:] = sys.argv[1:]
append, save = common.append, torch.save


def killed_after_logging(path, row):
    append(path, row)
    if when == "logged 3" and path.name == "metrics.jsonl" and row["step"] == 3:
        with open(path, "a") as file:
            file.write('{"step": 4, "rew')  # and in the middle of the next line
        os.kill(os.getpid(), signal.SIGKILL)


def killed_while_saving(state, file):
    if when == "saving 4" and state["step"] == 4:
        save(state, file)
        file.flush()
        file.truncate(file.tell() // 2)
        os.kill(os.getpid(), signal.SIGKILL)
    save(state, file)


common.append, torch.save = killed_after_logging, killed_while_saving
stage1.main()
