"""The only collectives: the same for one process and many. On one process every function is an identity.

Data parallel: each rank holds the whole model and its shard of every batch; counts are summed first, gradients are
summed once per update, so that accumulation and ranks add up to the same step. No collective happens in generation.
Anything but tensors travels as JSON, in which floats keep every bit. `distributed.watchdog` watches waiting ranks.
"""

import atexit
import json
import os
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import timedelta
from functools import partial
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed import PrefixStore  # type: ignore[attr-defined]

from tetrad.distributed import watchdog

T = TypeVar("T")
BUCKET_BYTES = 8 << 20
"""Of gradients that travel together: larger ones wait longer to be full, smaller ones cost calls."""
_NEVER = timedelta(days=30)  # the watchdog decides how long to wait, and for which rank


def start(device: str, phase: str = "") -> None:
    """Joins the group that torchrun announced; does nothing on one process. phase: the stage that begins, for the
    messages of a rank that waits in vain."""
    if int(os.environ.get("WORLD_SIZE", "1")) < 2:
        return
    dog = watchdog.join()
    dog.phase = phase or dog.phase
    if not dist.is_initialized():
        store = PrefixStore("collectives", dog.store)
        backend = "cpu:gloo,cuda:nccl" if device == "cuda" else "gloo"
        with dog.waiting("start"):
            dist.init_process_group(backend, store=store, rank=dog.rank, world_size=dog.size, timeout=_NEVER)
        atexit.register(stop)


def stop() -> None:
    """Leaves the group, together with the others unless this process ends by an uncaught error."""
    if dist.is_initialized():
        if not hasattr(sys, "last_value"):
            watchdog.join().end_together(dist.barrier)
        watchdog.join().stop()
        dist.destroy_process_group()


@contextmanager
def collective(name: str, *, computes: bool = False) -> Iterator[bool]:
    """Around a collective, or what holds some and computes; false on one process, which needs none."""
    if not dist.is_initialized():
        yield False
        return
    with watchdog.join().waiting(name, computes=computes):
        yield True


def rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def size() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


def is_main() -> bool:
    return rank() == 0


def shard(items: Sequence[T]) -> Sequence[T]:
    """This rank's part of a batch."""
    return items[rank() :: size()]


def sum_tensor(tensor: Tensor) -> Tensor:
    """The sum over ranks, on every rank."""
    with collective("sum of tensors") as many:
        if many:
            dist.all_reduce(tensor)
    return tensor


def all_gather(value: T) -> list[T]:
    """Each rank's value, in the order of ranks. A value is anything JSON can hold; tuples come back as lists."""
    with collective("exchange of values") as many:
        if not many:
            return [value]
        data = torch.frombuffer(bytearray(json.dumps(value).encode()), dtype=torch.uint8)
        lengths = [torch.zeros(1, dtype=torch.int64) for _ in range(size())]
        dist.all_gather(lengths, torch.tensor([len(data)]))
        longest = int(max(lengths))
        parts = [torch.zeros(longest, dtype=torch.uint8) for _ in lengths]
        dist.all_gather(parts, torch.nn.functional.pad(data, (0, longest - len(data))))
    texts = (bytes(part[: int(n)].tolist()) for part, n in zip(parts, lengths, strict=True))
    return [json.loads(text) for text in texts]


def from_main(value: T) -> T:
    """Rank 0's value, on every rank: what is decided once."""
    return all_gather(value)[0]


def sum_counts(counts: Mapping[str, float]) -> dict[str, float]:
    """Sums by name over ranks, in rank order; a rank without work may lack names."""
    return sum_by_name(all_gather(dict(counts)))


def sum_by_name(parts: Iterable[Mapping[str, float]]) -> dict[str, float]:
    """Sums over parts on this rank; a part may lack names."""
    total: dict[str, float] = {}
    for part in parts:
        for name, count in part.items():
            total[name] = total.get(name, 0.0) + count
    return total


class GradientSum:
    """The sum of every gradient over ranks; a rank without work counts as zeros. A parameter without one on all ranks
    keeps none, so that the optimizer skips it as it does on one process.

    Gradients travel in buckets, each as soon as the last backward has filled it: from the last parameter to the first,
    in the same order on all ranks. A bucket replaces the gradients in it, as views. passes: backwards to come.
    """

    def __init__(self, parameters: Iterable[nn.Parameter], passes: int = 0) -> None:
        self._passes = passes
        self._buckets = _buckets([*parameters][::-1]) if dist.is_initialized() else []
        self._unfilled: list[set[nn.Parameter]] = []  # of the buckets that the running backward fills
        self._sent: list[dist.Work] = []
        self._lacking: list[bool] = []

    @contextmanager
    def one_pass(self) -> Iterator[None]:
        """Around each backward. In the last one buckets are sent."""
        hooks, self._passes = [], self._passes - 1
        if not self._passes:
            self._unfilled = list(map(set, self._buckets))
            owners = [(p, number) for number, bucket in enumerate(self._buckets) for p in bucket]
            hooks = [p.register_post_accumulate_grad_hook(partial(self._filled, number)) for p, number in owners]
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()

    def _filled(self, number: int, parameter: Tensor) -> None:
        self._unfilled[number].discard(parameter)
        while len(self._sent) < len(self._buckets) and not self._unfilled[len(self._sent)]:
            self._send()

    def _send(self) -> None:
        bucket = self._buckets[len(self._sent)]
        self._lacking += [p.grad is None for p in bucket]
        flat = torch.cat([torch.zeros_like(p).view(-1) if p.grad is None else p.grad.reshape(-1) for p in bucket])
        for parameter, part in zip(bucket, flat.split([p.numel() for p in bucket]), strict=True):
            parameter.grad = part.view_as(parameter)
        self._sent.append(dist.all_reduce(flat, async_op=True))

    def finish(self) -> None:
        """Sends what is left, and waits for all."""
        with collective("sum of gradients") as many:
            while many and len(self._sent) < len(self._buckets):
                self._send()
            for work in self._sent:
                work.wait()
            lacking = torch.tensor(self._lacking, dtype=torch.int32)
            if many:
                dist.all_reduce(lacking)
        for parameter, ranks in zip((p for bucket in self._buckets for p in bucket), lacking.tolist(), strict=True):
            if ranks == size():
                parameter.grad = None


def _buckets(parameters: Sequence[nn.Parameter]) -> list[list[nn.Parameter]]:
    """In this order, each of one kind and of at most BUCKET_BYTES, or one parameter."""
    buckets: list[list[nn.Parameter]] = []
    for parameter in parameters:
        kind, last = (parameter.dtype, parameter.device), buckets[-1] if buckets else []
        room = BUCKET_BYTES - sum(p.nbytes for p in last)
        if last and parameter.nbytes <= room and kind == (last[0].dtype, last[0].device):
            last.append(parameter)
        else:
            buckets.append([parameter])
    return buckets


def is_part(tensor: Tensor) -> bool:
    """Whether other ranks hold the rest of it (see `sharding`)."""
    return hasattr(tensor, "device_mesh")


def same_weights(model: nn.Module) -> None:
    """Gives every rank the weights of rank 0, but for those of which each has a part."""
    with collective("broadcast of weights") as many:
        for parameter in model.parameters() if many else ():
            if not is_part(parameter):
                dist.broadcast(parameter.data, 0)


def gather(items: Sequence[T]) -> list[T]:
    """Every rank's items, undoing `shard`: item i of the batch at index i."""
    parts = all_gather(list(items))
    longest = max(map(len, parts))
    return [part[i] for i in range(longest) for part in parts if i < len(part)]


def any_rank(flag: bool) -> bool:
    """Whether the flag is set on any rank."""
    return any(all_gather(flag))


def barrier() -> None:
    """Until every rank is here."""
    with collective("barrier") as many:
        if many:
            dist.barrier()
