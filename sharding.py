"""
One model split among the processes of torchrun: its weights, gradients, optimiser state and KL
reference, by FSDP2 (torch.distributed.fsdp.fully_shard). Without --shard every process holds all.

    load      the first process reads the checkpoint, all get it layer by layer       shard
    sample    all weights on every process, as without sharding                       whole
    train     a layer's weights are gathered when it is computed, its gradients       (FSDP2)
              summed and split again; the rest of the model is one more such unit     fill_gradients
    save      one tensor at a time to the first process                     full_state, write
    resume    each process takes its part of each tensor of state.pt                  cut

Both files are what an unsharded run writes, so either goes on where the other stopped, and on any
number of processes.

Weights are gathered in fp32: autocast computes in bf16 as without sharding, and no number changes
but by the order of sums. DEVIATION from what FSDP2 is usually told: gradients are summed, not
averaged, because the loss is already divided by what all processes have together.
"""

import os
from contextlib import contextmanager

import torch
import torch.distributed as dist
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.utils._pytree import tree_flatten, tree_leaves, tree_unflatten

import common  # which imports this file: its names are there when the functions run


# ------------------------------------------------------------------------------------- whether
def wanted(cfg, device):
    """Does --shard split the model? 'auto': if a replica with these settings, by the formulas of
    --dry_run, does not fit the memory of the card."""
    if cfg.shard == "yes" and common.world() == 1:
        raise SystemExit("--shard yes splits a model among processes, and this is one alone: "
                         "torchrun --nproc_per_node=N starts several")
    if cfg.shard == "yes" and cfg.lora_rank:
        raise SystemExit("--lora_rank with --shard yes is not supported; leave one of them out")
    if cfg.shard != "auto":
        return cfg.shard == "yes"
    if common.world() == 1 or cfg.lora_rank or device.type != "cuda":
        return False
    import dry_run  # here, because it imports stage 1, which imports this file
    blank, _ = common.load(cfg.model, "meta", type(cfg).model)
    needed = dry_run.replica_gib(cfg, blank.config)
    room = dry_run.room(torch.cuda.get_device_properties(device).total_memory / dry_run.GIB)
    tight = any(common.gather_list([needed > room]))  # all cards or none
    if tight and common.rank() == 0:
        print(f"--shard auto: yes, as a replica needs up to {needed:.0f} GiB of this card's "
              f"{room:.0f}")
    return tight


def is_sharded(model):
    return isinstance(model, FSDPModule)


# ---------------------------------------------------------------------------------- splitting it
def shard(model, cfg, device):
    """Split the model of common.load(..., shards=True), in place. The first process has it on the
    CPU, the others have none of its weights; no device holds more than the parts and one unit."""
    if cfg.freeze_vision:
        common.freeze_vision(model)  # before: what is trained is looked up here
    split(model, device, lambda name, tensor: dist.broadcast(tensor, 0))
    model.register_forward_hook(fill_gradients)


def twin(blank, model):
    """The KL reference of a sharded model, which refuses deepcopy(): `blank`, the same model
    without weights, gets its weights as they are now, and is split as it is."""
    tensors = dict(model.named_parameters()) | dict(model.named_buffers())
    split(blank.requires_grad_(False), model.device,
          lambda name, tensor: tensor.copy_(full(tensors[name].detach())))
    blank.set_reshard_after_forward(True, recurse=False)  # no backward will come to free the root
    return blank.eval()


def split(model, device, fill):
    """fully_shard() each layer of the language model, then all that is left as one unit. A vision
    tower of its own would make a process without an image wait for ever, and tied embeddings must
    be in one unit. fill(name, tensor) gives a tensor its values, the same on all processes."""
    mesh = init_device_mesh(device.type, (common.world(),))
    layers = set(model.get_decoder().layers)
    units = [(name, module) for name, module in model.named_modules() if module in layers]
    for path, unit in [*units, ("", model)]:
        for name, tensor in [*unit.named_parameters(path), *unit.named_buffers(path)]:
            if not isinstance(tensor, DTensor):
                to_device(tensor, device)
                fill(name, tensor.detach())
        fully_shard(unit, mesh=mesh)
        unit.set_gradient_divide_factor(1.0)  # sums
        unit.set_force_sum_reduction_for_comms(True)


def to_device(tensor, device):
    """In place, so that what is tied stays tied; without values if it has none (device "meta")."""
    new = tensor.detach()
    new = torch.empty_like(new, device=device) if new.is_meta else new.to(device)
    if isinstance(tensor, torch.nn.Parameter):
        new = torch.nn.Parameter(new, tensor.requires_grad)
    torch.utils.swap_tensors(tensor, new)


def fill_gradients(model, inputs, output):
    """A forward hook. Processes reduce the gradients of a unit in one piece, so they must have the
    same ones: a process without an image has zeros for the vision tower."""
    last = output if isinstance(output, torch.Tensor) else output.logits
    if not last.requires_grad:
        return
    # between forward and backward those outside the layers are whole, and the layers' are not
    outside = [p for p in model.parameters() if p.requires_grad and not isinstance(p, DTensor)]

    def fill(gradient):
        for parameter in outside:
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
    last.register_hook(fill)


@contextmanager
def whole(model):
    """Inside it every process holds all weights, and may run the model as often as it likes, or not
    at all. Without it, processes that decode different numbers of tokens wait for one another for
    ever. All processes come in together; nothing is trained in here."""
    units = [module for module in model.modules() if isinstance(module, FSDPModule)]
    for unit in units:
        unit.set_reshard_after_forward(False, recurse=False)
        unit.unshard()
    try:
        yield
    finally:
        for unit in units:
            unit.reshard()
            unit.set_reshard_after_forward(unit is not model, recurse=False)


# ----------------------------------------------------------------------------- saving, resuming
def full(tensor):
    """A tensor, whole if it is sharded. All processes call it together."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def full_state(model):
    """-> the state dict. Of a sharded model the first process gets it whole, on the CPU, the others
    get nothing; all of them call it."""
    if not any(isinstance(p, DTensor) for p in model.parameters()):
        return model.state_dict()
    found, state = {}, {}
    for name, tensor in model.state_dict(keep_vars=True).items():
        if id(tensor) not in found:  # else it is tied to one before, and is to stay so
            value = full(tensor.detach())
            found[id(tensor)] = value.cpu() if common.rank() == 0 else None
        state[name] = found[id(tensor)]
    return state if common.rank() == 0 else {}


def write(state, path):
    """torch.save() for sharded tensors, called by all processes: the first one writes whole tensors
    as an unsharded run would. It lays out the file with room for all of them, and then gathers and
    fills in one after another: nobody holds two. Raises OSError as torch.save() does."""
    values = [v for v in tree_leaves(state) if isinstance(v, torch.Tensor)]
    if common.rank() > 0:
        for value in values:
            full(value.detach())
        return
    failure = None
    with open(path, "w+b") as file:
        for value, place in zip(values, lay_out(state, file), strict=True):
            value = full(value.detach()).cpu().reshape(-1).view(torch.uint8)
            try:
                file.seek(place)
                file.write(value.numpy())
            except OSError as e:
                failure = e  # raised below: the others are still gathering
        file.flush()
        os.fsync(file.fileno())
    if failure:
        raise failure


def lay_out(state, file):
    """Write a state with its tensors whole but empty. -> for each tensor its place in the file."""
    values, structure = tree_flatten(state)
    with FakeTensorMode():
        blanks = [torch.empty(v.shape, dtype=v.dtype) if isinstance(v, torch.Tensor) else v
                  for v in values]
    with torch.serialization.skip_data(materialize_fake_tensors=True):
        torch.save(tree_unflatten(blanks, structure), file)
    file.seek(0)
    laid_out = tree_leaves(torch.load(file, map_location="meta", weights_only=True))
    return [v.untyped_storage()._checkpoint_offset for v in laid_out if isinstance(v, torch.Tensor)]


def cut(state, model, optimizer):
    """A state as torch.load() gives it -> one that the sharded model and its optimiser load: of
    every weight and every moment, the part of this process."""
    weights = model.state_dict(keep_vars=True)
    parts = {name: part_of(value, weights[name]) for name, value in state["model"].items()}
    parameters = []
    for group in optimizer.param_groups:
        parameters += group["params"]
    moments = {}
    for i, values in state["optimizer"]["state"].items():
        moments[i] = {name: part_of(value, parameters[i]) for name, value in values.items()}
    return {**state, "model": parts, "optimizer": {**state["optimizer"], "state": moments}}


def part_of(value, like):
    """The part of a whole tensor that this process has of `like`; a number of steps stays whole."""
    if not isinstance(like, DTensor) or value.shape != like.shape:
        return value
    return distribute_tensor(value.to(like.device), like.device_mesh, like.placements,
                             src_data_rank=None)  # each process cuts for itself
