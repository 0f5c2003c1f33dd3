"""
What each process of a run holds, for the tests to compare: two_ranks.py MODEL DATA OUT [FLAGS]

Every process writes the gradient of one fixed GRPO update to OUT/gradient-WORLD-RANK.pt. With
flags it then runs the real stage 1 and writes what it saw there to OUT/run-RANK.pt.
"""

import copy
import sys
import types

import torch

import common
from data import load_rows
import stage1_text_grpo as stage1

G = 5  # answers per prompt


def fixed_rollout(encoder, data, generator):
    """4 fixed prompts with 5 answers each. The second process, which takes every other prompt from
    the second on, has the longer answers, the only image, and nearly nothing of it kept."""
    rows = load_rows(f"{data}/text_rl.jsonl", encoder, quiet=True)[:3]
    rows += load_rows(f"{data}/mm_rl.jsonl", encoder, quiet=True)
    lengths = torch.randint(1, 9, (4, G), generator=generator)
    lengths[1::2] += 7
    answers = []
    for group in lengths:
        answers.append([torch.randint(0, 400, (n,), generator=generator).tolist() for n in group])
    advantages = torch.randn(4, G, generator=generator).double()
    keep = torch.rand(4, G, generator=generator) < 0.7
    keep[1] = keep[3] = False
    keep[3, 2] = True
    return rows, answers, advantages, keep


def gradient(normaliser, micro_batch, mini_batch=0):
    """Gradient of the last step and metrics of one update; every process takes every other prompt,
    as in main(). A step moves the weights, so the second of two has ratios that are not 1."""
    model, encoder = common.load(model_folder)
    generator = torch.Generator().manual_seed(0)
    ref = copy.deepcopy(model)
    with torch.no_grad():
        for p in ref.parameters():
            p.mul_(1 + 0.1 * torch.randn(p.shape, generator=generator))
    rows, answers, advantages, keep = fixed_rollout(encoder, data, generator)
    gradients = []

    def step():
        gradients.append({name: p.grad.clone() for name, p in model.named_parameters()
                          if p.grad is not None})
        norm = torch.cat([g.flatten() for g in gradients[-1].values()]).norm()
        with torch.no_grad():
            for p in model.parameters():
                if p.grad is not None:
                    p -= 0.05 * p.grad / norm
    optimizer = types.SimpleNamespace(step=step, state={0: {}},  # of steps before
                                      zero_grad=lambda set_to_none: model.zero_grad())
    cfg = stage1.Config(normaliser=normaliser, micro_batch=micro_batch, mini_batch=mini_batch,
                        beta=0.1, max_grad_norm=float("inf"))
    mine = slice(common.rank(), None, common.world())
    metrics = stage1.grpo_update(model, ref, encoder, optimizer, [encoder(r) for r in rows[mine]],
                                 answers[mine], advantages[mine], keep[mine], cfg)
    return {"gradient": gradients[-1], "metrics": metrics, "steps": len(gradients)}


def watched_run(flags):
    """The real stage 1, looking over its shoulder."""
    update, sample, models = stage1.grpo_update, stage1.sample_group, []
    seen = {"lengths": [], "advantages": [], "seeds": []}

    def watched_update(model, ref, encoder, optimizer, prompts, answers, advantages, *rest):
        models.append(model)
        seen["lengths"].append(sum(len(answer) for group in answers for answer in group))
        seen["advantages"].append(advantages)
        return update(model, ref, encoder, optimizer, prompts, answers, advantages, *rest)

    def watched_sample(*args):
        seen["seeds"].append(args[-1].initial_seed())
        return sample(*args)

    stage1.grpo_update, stage1.sample_group = watched_update, watched_sample
    sys.argv[1:] = flags
    stage1.main()
    return {"weights": models[-1].state_dict(), **seen}


if __name__ == "__main__":
    model_folder, data, out, *flags = sys.argv[1:]
    common.start_processes()
    cases = {"sequence": gradient("sequence", 2), "token": gradient("token", 1),
             "mini-batches": gradient("sequence", 2, mini_batch=2)}
    torch.save(cases, f"{out}/gradient-{common.world()}-{common.rank()}.pt")
    if flags:
        seen = watched_run(flags)
        torch.save(seen, f"{out}/run-{common.rank()}.pt")
