"""
What the processes of sharded runs hold, for test_sharding.py: sharded.py WORLD OUT

WORLD has a backbone and rows. With one process nothing is sharded: that is what the others are
compared with. Writes OUT/update-PROCESSES-RANK.pt, and run folders OUT/NAME-PROCESSES.
"""

import os
import shutil
import sys
import weakref
from pathlib import Path

import torch
from torch.distributed.tensor import DTensor

import bt_reward
import common
import sharding
from data import load_rows
import stage0_sft
import stage1_text_grpo as stage1
import stage2b_cmkd as cmkd

G = 5  # answers per prompt
STOP = 1  # the step after which a run is stopped


# ------------------------------------------------------------------------- one update, looked into
def fixed_rollout(encoder, data):
    """6 prompts with 5 answers each. Of 2 processes as of 3, the first has no image, and another
    one has the longer answers."""
    generator = torch.Generator().manual_seed(0)
    texts = load_rows(f"{data}/text_rl.jsonl", encoder, quiet=True)[:4]
    images = load_rows(f"{data}/mm_rl.jsonl", encoder, quiet=True)[:2]
    rows = [texts[0], images[0], texts[1], texts[2], texts[3], images[1]]
    lengths = torch.randint(1, 9, (6, G), generator=generator)
    lengths[1::2] += 7
    answers = []
    for group in lengths:
        answers.append([torch.randint(0, 400, (n,), generator=generator).tolist() for n in group])
    advantages = torch.randn(6, G, generator=generator).double()
    keep = torch.rand(6, G, generator=generator) < 0.7
    return [encoder(row) for row in rows], answers, advantages, keep


def held(parameters):
    """Numbers that this process holds of these tensors."""
    return sum((p.to_local() if isinstance(p, DTensor) else p).numel() for p in parameters)


class Watch:
    """How many bytes of gathered tensors are alive at most, while it is on."""

    def __init__(self):
        self.alive, self.most = {}, 0

    def __enter__(self):
        self.real = DTensor.full_tensor

        def watched(tensor):
            storage = self.real(tensor).untyped_storage()
            key = storage.data_ptr()
            self.alive[key] = storage.nbytes()
            weakref.finalize(storage, self.alive.pop, key, None)
            self.most = max(self.most, sum(self.alive.values()))
            return torch.empty(0, dtype=tensor.dtype).set_(storage, 0, tensor.shape)
        DTensor.full_tensor = watched
        return self

    def __exit__(self, *error):
        DTensor.full_tensor = self.real


def update(folder, data, out, device):
    """Two GRPO updates of two steps each, behind some sampling. -> what the process saw of them"""
    shards = common.world() > 1
    cfg = stage1.Config(micro_batch=1, beta=0.5, freeze_vision=False, updates_per_rollout=2,
                        lr=1e-2, max_grad_norm=0.1)
    model, encoder = common.load(folder, device, shards=shards)
    if shards:
        sharding.shard(model, cfg, device)
    ref = common.reference(model)
    optimizer = common.make_optimizer(model, cfg.lr)
    prompts, answers, advantages, keep = fixed_rollout(encoder, data)
    mine = slice(common.rank(), None, common.world())

    seen = {"gradients": [], "metrics": [], "tokens": []}
    plain, _ = common.load(folder)
    rows = load_rows(f"{data}/text_rl.jsonl", encoder, quiet=True)[:2 * common.world() - 1]
    seen["distilled"] = []
    for name, one in (("sharded", model), ("plain", plain)):  # with nothing left for the last one
        teaching = cmkd.Config(model=str(folder), out=str(out / name), samples=2, max_new_tokens=5,
                               rollout_batch=common.world())
        (out / name).mkdir(exist_ok=True)
        seen["distilled"].append(cmkd.distill(one, encoder, rows, teaching))
    with sharding.whole(model):
        for draw in range(1 + 2 * common.rank()):  # so many on this process, and fewer on others
            for one in (model, plain):
                rollout = stage1.sample_group(one, encoder, prompts[mine], 2, 1.0, 6 + draw,
                                              torch.Generator().manual_seed(draw))
                seen["tokens"].append(rollout.ids)

    step = optimizer.step

    def watched_step():
        seen["gradients"].append({name: sharding.full(p.grad).clone()
                                  for name, p in model.named_parameters()})
        step()
    optimizer.step = watched_step
    for _ in range(2):
        seen["metrics"].append(stage1.grpo_update(
            model, ref, encoder, optimizer, prompts[mine], answers[mine], advantages[mine],
            keep[mine], cfg))
    moments = [v for state in optimizer.state_dict()["state"].values() for v in state.values()]
    seen["held"] = {"all": sum(p.numel() for p in model.parameters()),
                    "model": held(model.parameters()), "ref": held(ref.parameters()),
                    "moments": held(m for m in moments if m.dim() > 0)}

    model.eval()
    with Watch() as watch:
        common.save_state(out, model, optimizer, 4, cfg, kept=["some", None])
    seen["peak state"] = watch.most
    with Watch() as watch:
        common.save_checkpoint(out, model, encoder, stage="made")
    seen["peak checkpoint"] = watch.most
    with sharding.whole(model):
        seen["weights"] = {name: p.detach().clone() for name, p in model.named_parameters()}
    sharding.full(next(model.parameters()))  # and it is sharded again
    return seen


# --------------------------------------------------------------------------------------- whole runs
def flags(**arguments):
    out = ["stage.py"]
    for name, value in arguments.items():
        out += [f"--{name}", str(value)]
    return out


class Stopped(Exception):
    pass


def run(main, stop=False, **arguments):
    """A script's main(), perhaps stopped when it has saved its first step."""
    save = common.save_state

    def stopping(folder, model, optimizer, step, *rest, **kept):
        save(folder, model, optimizer, step, *rest, **kept)
        common.gather_list([])
        if step == STOP:
            raise Stopped
    common.save_state = stopping if stop else save
    sys.argv = flags(**arguments)
    try:
        main()
    except Stopped:
        pass
    finally:
        common.save_state = save


def runs(world, out):
    n = common.world()
    shard = "no" if n == 1 else "yes"
    sft = dict(model=world / "backbone", data=f"{world}/text_rl.jsonl,{world}/mm_rl.jsonl",
               heldout=world / "heldout_text.jsonl", target="label", batch_size=6, micro_batch=1,
               epochs=1, eval_batch=2, max_new_tokens=4, lr=1e-2, save_every=1, shard=shard,
               freeze_vision="false", max_grad_norm=0.5)
    if n < 3:
        run(stage0_sft.main, stop=True, out=out / f"sft-stopped-{n}", **sft)
    for earlier in {1: (), 2: (1,), 3: (2,)}[n]:  # by another number of processes
        resumed = out / f"sft-{earlier}-{n}"
        if common.rank() == 0:
            shutil.copytree(out / f"sft-stopped-{earlier}", resumed)
        common.gather_list([])
        run(stage0_sft.main, out=resumed, **sft)
    run(bt_reward.main, model=world / "backbone", data=sft["data"], batch_size=6, micro_batch=1,
        heldout=sft["heldout"], epochs=1, eval_batch=2, lr=1e-2, shard=shard, out=out / f"bt-{n}")
    for shard in ("no", "yes") if n == 2 else ():  # as many processes: equal to the bit
        run(stage1.main, model=world / "stage0", data=world / "text_rl.jsonl", batch_size=4,
            heldout=world / "heldout_text.jsonl", eval_batch=2, eval_every=1, group_size=5,
            micro_batch=2, rollout_batch=1, max_new_tokens=9, max_steps=2, lr=1e-3, shard=shard,
            log_rollouts_every=1, out=out / f"grpo-{shard}")


if __name__ == "__main__":
    world, out = map(Path, sys.argv[1:])
    device = common.start_processes()
    end, common.end_processes = common.end_processes, lambda: None  # several runs in here
    folder = out / f"update-{common.world()}"
    folder.mkdir(exist_ok=True)
    seen = update(world / "backbone", world, folder, device)
    torch.save(seen, out / f"update-{common.world()}-{common.rank()}.pt")
    runs(world, out)
    common.end_processes = end
    end()
    if common.world() > 1:  # else the tests themselves run this
        # all is written. PyTorch's threads may abort an interpreter that ends (pytorch#179291)
        sys.stdout.flush()
        os._exit(0)
