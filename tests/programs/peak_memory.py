"""
A step of GRPO on a small Qwen3 in fp32, then two micro-batches of the next one, and what the
process took for it -> bytes on stdout, peak and baseline. Linux.
"""

import re
from pathlib import Path
from types import SimpleNamespace

import torch
import transformers

import common
import stage1_text_grpo as stage1

SMALL = dict(vocab_size=8192, hidden_size=512, intermediate_size=1536, num_hidden_layers=4,
             num_attention_heads=8, num_key_value_heads=4, head_dim=64)
P, C, G, B = 200, 30, 5, 2


def used():
    """The most memory this process has had so far, in bytes. Not getrusage(): that of a process is
    at least what its parent had."""
    return 1024 * int(re.search(r"VmHWM:\s+(\d+)", Path("/proc/self/status").read_text())[1])


def part(model):
    prompts = [common.Prompt([1] * P, None)] * B
    encoder = SimpleNamespace(pad_id=0, image_token_id=None)
    logp, _, _ = stage1.packed_logps(model, encoder, prompts, [[[1] * C] * G] * B, 0.9)
    logp.sum().backward()


def main():
    warm = torch.nn.Linear(64, 64)  # what torch sets up at its first product and step
    warm(torch.zeros(64, 64)).sum().backward()
    torch.optim.AdamW(warm.parameters()).step()
    baseline = used()
    model = transformers.Qwen3ForCausalLM._from_config(transformers.Qwen3Config(**SMALL),
                                                       attn_implementation="sdpa")
    optimizer = common.make_optimizer(model, 1e-6)
    part(model)
    common.optimizer_step(optimizer, common.trainable(model), 1.0)
    part(model)
    part(model)
    print(used(), baseline)


if __name__ == "__main__":
    main()
