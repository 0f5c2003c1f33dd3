"""
--dry_run: settings, sources, and the memory a run takes.

The formulas for memory are compared with what torch does with the real classes at their real sizes.
Under FakeTensorMode a tensor has a shape and no content, so that a step of an 8B model runs here:
`Traced` adds up the storages that are alive, saved_tensors_hooks() shows what autograd keeps.
"kills:" names wrong versions of the source under which a test was seen to fail.
"""

import contextlib
import subprocess
import sys
import time
import weakref
from dataclasses import asdict, replace
from types import SimpleNamespace

import pytest
import torch
import transformers
from helpers import ENV, PROGRAMS, ROOT, flags, run_here, small_world, write
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import bt_reward
import common
import dry_run
import dt2it
import stage0_sft
import stage1_text_grpo as stage1
import stage2_caption_grpo as stage2
import stage2b_cmkd as cmkd
import stage3_mm_grpo as stage3

GIB = 2 ** 30
NOTHING = dict(prompt=0, answer=0, answers=1, prompts=1, micro=1, rolled_out=0, samples=0,
               judged=0, tiles=0, reference=False, checkpointing=False)


class Traced(TorchDispatchMode):
    """Inside it, .now is the bytes of all storages that are alive and were made here, .peak the
    most there have been."""

    def __init__(self):
        super().__init__()
        self.now = self.peak = 0
        self.alive = {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if isinstance(tensor, torch.Tensor):
                storage = tensor.untyped_storage()
                if storage._cdata not in self.alive:
                    self.alive[storage._cdata] = storage.nbytes()
                    self.now += storage.nbytes()
                    weakref.finalize(storage, self.freed, storage._cdata)
        self.peak = max(self.peak, self.now)
        return out

    def freed(self, key):
        self.now -= self.alive.pop(key)


@pytest.fixture
def in_bf16(monkeypatch):
    """-> a function that turns the autocast of a GPU on or off, here for the CPU."""
    def turn(mixed):
        monkeypatch.setattr(common, "autocast", lambda device: torch.autocast(
            "cpu", torch.bfloat16, enabled=mixed))
    return turn


def qwen3(name, **change):
    """The language model of InternVL3.5 in a size."""
    text = dry_run.internvl_config(name).text_config
    for key, value in change.items():
        setattr(text, key, value)
    return text


def kept_by(layer, *args, mixed=True, **kwargs):
    """Bytes that autograd keeps of the forward of a layer, but for weights and inputs that several
    layers share."""
    kept = {}

    def keep(tensor):
        kept[tensor.untyped_storage()._cdata] = tensor
        return tensor
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor), \
            torch.autocast("cpu", torch.bfloat16, enabled=mixed):
        layer(*args, **kwargs)
    shared = {tensor.untyped_storage()._cdata for tensor in tree_leaves(kwargs)}
    weights = {tuple(parameter.shape) for parameter in layer.parameters()}
    weights |= {shape[::-1] for shape in weights}
    total = 0
    for key, tensor in kept.items():
        if key not in shared and tuple(tensor.shape) not in weights:
            total += tensor.untyped_storage().nbytes()
    return total
