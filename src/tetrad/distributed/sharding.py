"""A model of which each process holds a part of every tensor (FSDP2), and what else must know of it.

A block, and what is outside the blocks, is gathered when it is computed, forward and backward, and freed again; its
gradient is summed where its part lies. Parts are float32 rows: `run.shard = "full"` spreads them over all processes,
"host" over those of each machine, so that machines hold copies and only gradients travel between them. All processes
must make the same passes in the same order: whoever has fewer makes empty ones (`evenly`, `empty_pass`). On one process
nothing here does anything.
"""

import math
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from typing import Any, TypeVar, cast

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from tetrad.distributed import collectives
from tetrad.distributed.collectives import is_part
from tetrad.distributed.device import Device
from tetrad.errors import UserError
from tetrad.types import IGNORE, Packed

T = TypeVar("T")
M = TypeVar("M", bound=nn.Module)


def place(model: M, device: Device, base: nn.Module | None = None) -> M:
    """Moves a decoder with its head to the device, in parts if `run.shard` says so: then before an optimizer sees it.

    base: a model in parts whose frozen tensors, of the same names, this one shares. Errors: E-CONF-CONFLICT.
    """
    if device.shard == "none":
        return model.to(device.torch_device)
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard  # a second to import

    mesh, narrow = _mesh(device.torch_device.type, device.shard), device.dtype != torch.float32
    # What is added to the residual stream is computed in 16 bit, as by autocast; the stream itself is not.
    policy = MixedPrecisionPolicy(device.dtype, torch.float32, cast_forward_inputs=False)
    for block in model.get_submodule("model.layers").children():
        fully_shard(block, mesh=mesh, mp_policy=policy if narrow else MixedPrecisionPolicy())
    fully_shard(model, mesh=mesh, reshard_after_forward=True)  # embedding, last norm and head: tied or not, one unit
    for part in (part for part in model.modules() if _is_unit(part)):
        unit = cast(Any, part)
        unit.set_gradient_divide_factor(1.0)  # losses are sums over the batch of all
        unit.set_force_sum_reduction_for_comms(True)  # gloo has no other
    model.to(device.torch_device)
    if base:
        _share_frozen(model, base)
    if device.shard == "host":
        _same_on_hosts(model)
    with device.compute(), torch.no_grad():
        _read_nothing(model)  # FSDP sets up its state in the first pass
    return model


@cache
def _mesh(kind: str, shard: str) -> Any:
    from torch.distributed.device_mesh import init_device_mesh

    size = collectives.size()
    here = int(os.environ.get("LOCAL_WORLD_SIZE", size)) if shard == "host" else size
    if size % here:
        what = f'shard = "host" needs the same number of processes on each machine: {here} here, {size} in all'
        raise UserError("E-CONF-CONFLICT", what, where="run.shard", hint='write shard = "full"')
    if here == size:
        return init_device_mesh(kind, (size,), mesh_dim_names=("rank",))
    return init_device_mesh(kind, (size // here, here), mesh_dim_names=("host", "rank"))


def _share_frozen(model: nn.Module, base: nn.Module) -> None:
    """The frozen parts of a model on a base are the base's own, not copies."""
    given = dict(base.named_parameters())
    for name, own in list(model.named_parameters()):
        if not own.requires_grad and name in given:
            owner, _, key = name.rpartition(".")
            setattr(model.get_submodule(owner), key, given[name])


def _same_on_hosts(model: nn.Module) -> None:
    """Copies are those of the first machine, bit for bit."""
    with collectives.collective("broadcast of parts"):
        for parameter in model.parameters():
            mesh = cast(Any, parameter).device_mesh
            if mesh.ndim == 2:
                dist.broadcast(local(parameter), group=mesh.get_group(0), group_src=0)


# --- tensors ---


@torch.no_grad()
def local(tensor: Tensor) -> Tensor:
    """This process's rows, without a copy; any other tensor itself."""
    return cast(Tensor, cast(Any, tensor).to_local()) if is_part(tensor) else tensor


def _group(tensor: Tensor) -> Any:
    """The processes that together hold one whole tensor."""
    return cast(Any, tensor).device_mesh.get_group(-1)


def _rows_each(tensor: Tensor) -> int:
    """Rows that each process holds; the last ones may hold fewer or none."""
    return -(-len(tensor) // cast(int, _group(tensor).size()))


def part_of(whole: Tensor, like: Tensor) -> Tensor:
    """What `like` would be with the numbers of `whole`: on its device, of a tensor in parts this process's rows."""
    if not is_part(like) or is_part(whole) or whole.shape != like.shape:
        return whole.to(like.device)
    from torch.distributed.tensor import DTensor

    example, own = cast(Any, like), local(like)
    begin = _rows_each(like) * example.device_mesh.get_local_rank(-1)
    rows = whole[begin : begin + len(own)].to(own.device, copy=True)
    mesh, placements = example.device_mesh, example.placements
    return DTensor.from_local(rows, mesh, placements, run_check=False, shape=like.shape, stride=like.stride())


@torch.no_grad()
def whole(tensor: Tensor) -> Tensor:
    """A tensor in parts on rank 0's CPU; elsewhere its form without memory ("meta"). Any other tensor itself.

    All processes must call it with the same tensors in the same order.
    """
    if not is_part(tensor):
        return tensor
    with collectives.collective("gather of a tensor"):
        own, each, group = local(tensor), _rows_each(tensor), _group(tensor)
        ranks = dist.get_process_group_ranks(group)
        if ranks[0] == 0:
            padded = F.pad(own, (0, 0) * (own.dim() - 1) + (0, each - len(own)))
            parts = [torch.empty_like(padded) for _ in ranks] if collectives.is_main() else None
            dist.gather(padded, parts, dst=0, group=group)
            if parts:
                return torch.cat([part.cpu() for part in parts])[: len(tensor)]
    return torch.empty(tensor.shape, dtype=tensor.dtype, device="meta")


def by_owner(like: Sequence[Tensor], parts: list[Tensor], function: Callable[[Tensor], Tensor]) -> list[Tensor]:
    """A function of a stack of whole matrices [n, rows, columns], of which each process computes some for all. like:
    the matrices, of one shape; parts: this process's rows of what is given, and so is the result."""
    if not is_part(like[0]):
        return list(function(torch.stack(parts)).unbind())
    (rows, columns), each, group = like[0].shape, _rows_each(like[0]), _group(like[0])
    size, rank = group.size(), group.rank()
    slots = -(-len(parts) // size)
    sent = parts[0].new_zeros(size, slots, each, columns)  # [owner, slot, rows, columns]
    for number, part in enumerate(parts):
        sent[number % size, number // size, : len(part)] = part
    matrices = _exchanged(sent, group).transpose(0, 1).reshape(slots, size * each, columns)
    own = len(range(rank, len(parts), size))
    if own:
        matrices[:own, :rows] = function(matrices[:own, :rows])
    back = _exchanged(matrices.view(slots, size, each, columns).transpose(0, 1).contiguous(), group)
    return [back[number % size, number // size, : len(part)] for number, part in enumerate(parts)]


def _exchanged(sent: Tensor, group: Any) -> Tensor:
    """sent[i] goes to the i-th process; the result holds what each has sent here."""
    received = torch.empty_like(sent)
    with collectives.collective("exchange of matrices"):
        dist.all_to_all_single(received, sent, group=group)
    return received


@torch.no_grad()
def clip_gradients(parameters: Iterable[nn.Parameter], max_norm: float) -> float:
    """The norm of all gradients, which are scaled to at most `max_norm`; 0 scales nothing."""
    trained = [p for p in parameters if p.grad is not None]
    if not any(map(is_part, trained)):
        return float(nn.utils.clip_grad_norm_(trained, max_norm or math.inf))
    gradients = [local(cast(Tensor, p.grad)) for p in trained]
    squares = [torch.linalg.vector_norm(gradient, dtype=torch.float64) ** 2 for gradient in gradients]
    in_parts = torch.stack([square for square, p in zip(squares, trained, strict=True) if is_part(p)]).sum()
    with collectives.collective("norm of the gradient"):
        dist.all_reduce(in_parts, group=_group(next(filter(is_part, trained))))
    norm = math.sqrt(in_parts + sum(square for square, p in zip(squares, trained, strict=True) if not is_part(p)))
    if max_norm and not norm <= max_norm:
        torch._foreach_mul_(gradients, max_norm / (norm + 1e-6))
    return norm


# --- modules ---


def _is_unit(module: nn.Module) -> bool:
    """Whether its tensors are gathered by a call of it."""
    return hasattr(module, "unshard")


def _roots(model: nn.Module) -> list[nn.Module]:
    """The sharded models in a module."""
    roots, inside = list[nn.Module](), set[nn.Module]()
    for module in model.modules():  # an outer one before its own
        if _is_unit(module) and module not in inside:
            roots.append(module)
            inside.update(module.modules())
    return roots


@contextmanager
def gathered(module: nn.Module) -> Iterator[bool]:
    """Around reading a sharded block's tensors, or those of a model outside its blocks; false if it isn't sharded.
    They are gone afterwards: whoever keeps one must copy it."""
    unit = cast(Any, module)
    if _is_unit(module):
        unit.unshard()
    try:
        yield _is_unit(module)
    finally:
        if _is_unit(module):
            unit.reshard()


def collected(model: M) -> M:
    """A sharded model with ordinary tensors: whole on rank 0's CPU, elsewhere without memory; any other itself."""
    if not any(map(is_part, model.parameters())):
        return model
    tensors = {name: whole(parameter.detach()) for name, parameter in model.named_parameters()}
    plain = cast(M, _ordinary(model))
    for name, tensor in tensors.items():
        owner, _, key = name.rpartition(".")
        setattr(plain.get_submodule(owner), key, nn.Parameter(tensor, requires_grad=False))
    return plain


def _ordinary(module: nn.Module) -> nn.Module:
    """A module of the same parts, without FSDP; its parameters are still to be set."""
    kind = next(kind for kind in type(module).__mro__ if not hasattr(kind, "unshard"))  # FSDP derives its own from it
    plain = cast(nn.Module, object.__new__(kind))
    nn.Module.__init__(plain)
    plain.__dict__ |= {name: value for name, value in module.__dict__.items() if not name.startswith("_")}
    for name, buffer in module.named_buffers(recurse=False):
        plain.register_buffer(name, buffer.cpu(), persistent=False)
    for name in module._parameters:  # also of a bias that there is none of
        plain.register_parameter(name, None)
    for name, child in module.named_children():
        plain.add_module(name, _ordinary(child))
    return plain


# --- passes ---


def missing(models: Sequence[nn.Module], passes: int) -> int:
    """Passes that this process makes less than another one; 0 unless a model is sharded."""
    if not any(map(_roots, models)):
        return 0
    return max(collectives.all_gather(passes)) - passes


def evenly(models: Sequence[nn.Module], items: Sequence[T], device: Device) -> Iterator[T]:
    """The items, for a pass of the models with each; then as many empty passes as others have more items."""
    short = missing(models, len(items))
    yield from items
    for _ in range(short):
        empty_pass(models, device)


def empty_pass(models: Sequence[nn.Module], device: Device) -> list[Tensor]:
    """What a pass without data adds to the loss of the last model: 0, with gradients of 0. The others are read too."""
    with device.compute():
        for model in models[:-1]:
            with torch.no_grad():
                _read_nothing(model)
        return [0.0 * output for output in _read_nothing(models[-1]) if output.requires_grad]


def _read_nothing(model: nn.Module) -> list[Tensor]:
    """A pass of one token without a label."""
    outputs = []
    for root in _roots(model):
        zero = torch.zeros(1, dtype=torch.int64, device=next(root.parameters()).device)
        outputs.append(root(Packed(zero, zero, (0, 1), zero + IGNORE, keys_T=zero)).sum())
    return outputs
