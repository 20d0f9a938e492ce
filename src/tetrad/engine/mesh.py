"""The only collectives: what one process and many do alike. On one process every function is an identity.

Data parallel: each rank holds the whole model and its share of every batch; counts are summed first, gradients are
summed once an update, so that accumulation and ranks add up to the same step. No collective happens inside generation.
"""

import atexit
import os
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn

T = TypeVar("T")


def start(device: str) -> None:
    """Joins the group that torchrun announced; does nothing on one process."""
    if int(os.environ.get("WORLD_SIZE", "1")) > 1 and not dist.is_initialized():
        dist.init_process_group("nccl" if device == "cuda" else "gloo")
        atexit.register(stop)


def stop() -> None:
    if dist.is_initialized():
        dist.destroy_process_group()


def rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def size() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


def is_main() -> bool:
    return rank() == 0


def share(items: Sequence[T]) -> Sequence[T]:
    """This rank's part of a batch."""
    return items[rank() :: size()]


def sum_tensor(tensor: Tensor) -> Tensor:
    """The sum over ranks, on every rank."""
    if dist.is_initialized():
        dist.all_reduce(tensor)
    return tensor


def everyone(value: T) -> list[T]:
    """Each rank's value, in the order of ranks."""
    if not dist.is_initialized():
        return [value]
    found: list[Any] = [None] * size()
    dist.all_gather_object(found, value)
    return found


def sum_counts(counts: Mapping[str, float]) -> dict[str, float]:
    """Sums by name over ranks, in their order; a rank without work may lack names."""
    total: dict[str, float] = {}
    for part in everyone(dict(counts)):
        for name, count in part.items():
            total[name] = total.get(name, 0.0) + count
    return total


def sum_gradients(parameters: Iterable[nn.Parameter]) -> None:
    """Sums every gradient over ranks; a rank without work counts as zeros."""
    if not dist.is_initialized():
        return
    for parameter in parameters:
        if parameter.grad is None:
            parameter.grad = torch.zeros_like(parameter)
        dist.all_reduce(parameter.grad)


def same_weights(model: nn.Module) -> None:
    """Gives every rank the weights of rank 0."""
    if dist.is_initialized():
        for parameter in model.parameters():
            dist.broadcast(parameter.data, 0)


def gather(items: Sequence[T]) -> list[T]:
    """Every rank's items, undoing `share`: item i of the batch at place i."""
    parts = everyone(list(items))
    longest = max(map(len, parts))
    return [part[i] for i in range(longest) for part in parts if i < len(part)]


def on_any(flag: bool) -> bool:
    """Whether any rank says so."""
    if not dist.is_initialized():
        return flag
    device = torch.device("cuda") if dist.get_backend() == "nccl" else torch.device("cpu")
    return bool(sum_tensor(torch.tensor(float(flag), device=device)) > 0)


def wait() -> None:
    if dist.is_initialized():
        dist.barrier()
