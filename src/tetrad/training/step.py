"""THE step: the only place that calls backward and steps an optimizer.

Gradients add up exactly over micro-batches and ranks: each loss term is a sum with a denominator of the whole batch,
counted (and summed over ranks) before the first backward.
"""

import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from tetrad.console import counted
from tetrad.distributed import collectives, sharding
from tetrad.distributed.device import Device
from tetrad.errors import UserError
from tetrad.training.optimizer import Optimizer
from tetrad.types import Packed


@dataclass(frozen=True)
class Microbatch:
    """Input of one forward and backward pass. counts: what it adds to each denominator. data: further inputs of the
    terms."""

    packed: Packed
    counts: Mapping[str, float]
    data: Any = None


@dataclass(frozen=True, slots=True)
class Loss:
    """A part of the loss: coefficient * sum / (the whole batch's count named `per`). sum: a scalar with gradient."""

    name: str
    sum: Tensor
    per: str
    coefficient: float = 1.0


@dataclass(frozen=True, slots=True)
class Metric:
    """A metric besides the loss: sum / (the whole batch's count named `per`), or the maximum, per = MAX."""

    name: str
    sum: Tensor
    per: str
    coefficient: float = field(default=0.0, init=False)


Term = Loss | Metric
Terms = Callable[[nn.Module, Microbatch], list[Term]]
MAX = "max"


@dataclass(frozen=True, slots=True)
class StepStats:
    """The result of one optimizer step. terms: each term's mean over the batch of all ranks, before its coefficient;
    a term without data in the batch is absent. tokens: read by all ranks."""

    loss: float
    grad_norm: float
    lr: float
    terms: Mapping[str, float] = field(default_factory=dict)
    tokens: float = 0.0


_TOKENS_READ = "tokens read"  # a count that no loss is divided by


class StepTimer:
    """Seconds of the running step by phase; those outside every phase are `other`, so that all add up to the step."""

    def __init__(self) -> None:
        self.restart()

    def restart(self) -> None:
        self.seconds = {"other": 0.0}
        self._phase, self._since = "other", time.monotonic()

    def enter(self, phase: str) -> str:
        """Ends the current phase, and returns its name."""
        now, ended = time.monotonic(), self._phase
        self.seconds[ended] = self.seconds.get(ended, 0.0) + now - self._since
        self._phase, self._since = phase, now
        return ended


timer = StepTimer()


@contextmanager
def timed(phase: str) -> Iterator[None]:
    """Counts a block, or each call of a function that it decorates, as this phase of the step. Of nested phases the
    inner one counts; GPU work is charged to the phase that launched it."""
    outer = timer.enter(phase)
    try:
        yield
    finally:
        if torch.cuda.is_initialized() and phase != outer:
            torch.cuda.synchronize()
        timer.enter(outer)


@timed("update")
def update(
    model: nn.Module,
    optimizer: Optimizer,
    micros: Sequence[Microbatch],
    terms: Terms,
    device: Device,
    *,
    factor: float = 1.0,
    max_norm: float = 0.0,
    reads: Sequence[nn.Module] = (),
) -> StepStats:
    """One optimizer step, with gradient accumulation over the micro-batches. factor: multiplier of the peak learning
    rate; max_norm: 0 means no clipping; reads: further models that the terms read, before this one.

    Errors: E-NUM-NONFINITE before any weight changes, naming the batch's records.
    """
    models, counts = (*reads, model), collectives.sum_by_name(micro.counts for micro in micros)
    counts[_TOKENS_READ] = float(sum(len(micro.packed.ids_T) for micro in micros))
    totals = collectives.sum_counts(counts)
    optimizer.clear()
    sums, scales, largest = _accumulate(models, micros, terms, totals, device)
    norm = sharding.clip_gradients(model.parameters(), max_norm)
    summed, highest = _over_ranks(_numbers(sums), scales, _numbers(largest))
    means = {name: total / totals[scales[name][0]] for name, total in summed.items() if totals[scales[name][0]]}
    loss = math.fsum(means[name] * scales[name][1] for name in means)
    if not (math.isfinite(loss) and math.isfinite(norm)):
        alone = sharding.evenly(models, micros, device)
        _raise_nonfinite(loss, norm, micros, [m for m in alone if not _finite(model, terms, totals, device, m)])
    optimizer.step(factor)
    return StepStats(loss, norm, optimizer.lr * factor, means | highest, totals[_TOKENS_READ])


Scales = dict[str, tuple[str, float]]
"""Each term's `per` and coefficient."""


def _accumulate(
    models: Sequence[nn.Module],
    micros: Sequence[Microbatch],
    terms: Terms,
    totals: Mapping[str, float],
    device: Device,
) -> tuple[dict[str, Tensor], Scales, dict[str, Tensor]]:
    """The gradients of the last model, summed over micro-batches and ranks; the sums of the terms, what divides them,
    and the maxima. Of a sharded model, empty passes follow until all ranks have made as many."""
    empty = sharding.missing(models, len(micros))
    whole = [p for p in models[-1].parameters() if p.requires_grad and not collectives.is_part(p)]
    # Beside those that FSDP sends in a backward, other gradients must wait for its end.
    gradients = collectives.GradientSum(whole, len(micros) if device.shard == "none" else 0)
    sums, scales, largest = dict[str, Tensor](), Scales(), dict[str, Tensor]()
    for micro in counted("learning", micros, len(micros)):
        with device.compute():
            parts = terms(models[-1], micro)
        largest |= {t.name: torch.maximum(t.sum, largest.get(t.name, t.sum)).detach() for t in parts if t.per == MAX}
        parts = [t for t in parts if t.per != MAX]
        with gradients.one_pass():
            _backward(_loss(parts, totals), device)
        for t in parts:
            sums[t.name] = sums.get(t.name, 0) + t.sum.detach().double()
            scales[t.name] = (t.per, t.coefficient)
    for _ in range(empty):
        _backward(sharding.empty_pass(models, device), device)
    gradients.finish()
    return sums, scales, largest


def _numbers(tensors: Mapping[str, Tensor]) -> dict[str, float]:
    """Read together: a GPU is waited for once."""
    values = torch.stack([tensor.double() for tensor in tensors.values()]).tolist() if tensors else []
    return dict(zip(tensors, values, strict=True))


def mean_loss(model: nn.Module, micros: Sequence[Microbatch], terms: Terms, device: Device) -> float:
    """The loss of a batch as `update` would compute it, on this rank alone; no weight changes."""
    return mean_terms(model, micros, terms, device)[0]


@torch.no_grad()
def mean_terms(
    model: nn.Module, micros: Sequence[Microbatch], terms: Terms, device: Device
) -> tuple[float, dict[str, float]]:
    """The same, and the mean of each term."""
    counts = collectives.sum_by_name(micro.counts for micro in micros)
    loss, means = 0.0, dict[str, float]()
    for micro in counted("held-out records", micros, len(micros)):
        with device.compute():
            parts = [t for t in terms(model, micro) if counts.get(t.per)]
        loss += math.fsum(float(t.sum) * t.coefficient / counts[t.per] for t in parts)
        for t in parts:
            means[t.name] = means.get(t.name, 0.0) + float(t.sum) / counts[t.per]
    return loss, means


def _over_ranks(
    sums: dict[str, float], scales: Scales, most: dict[str, float]
) -> tuple[dict[str, float], dict[str, float]]:
    """The sums and maxima over all ranks. A rank without rows has no terms of its own: `scales` gets the others'."""
    highest: dict[str, float] = {}
    ranks = collectives.all_gather((sums, scales, most))
    for _, others, theirs in ranks:
        highest |= {name: max(value, highest.get(name, -math.inf)) for name, value in theirs.items()}
        scales |= {name: (per, coefficient) for name, (per, coefficient) in others.items()}
    return collectives.sum_by_name(part for part, _, _ in ranks), highest


def _loss(parts: Sequence[Term], totals: Mapping[str, float]) -> list[Tensor]:
    return [t.coefficient / totals[t.per] * t.sum for t in parts if t.per != MAX and t.coefficient and totals[t.per]]


def _backward(parts: list[Tensor], device: Device) -> None:
    with device.together("the backward of a sharded model"):
        if parts:
            torch.stack(parts).sum().backward()


def _raise_nonfinite(loss: float, norm: float, micros: Sequence[Microbatch], failing: Sequence[Microbatch]) -> None:
    """Raises E-NUM-NONFINITE, naming the records of the micro-batches that are not finite by themselves, on the rank
    that has them."""
    if collectives.any_rank(bool(failing)) and not failing:
        collectives.barrier()  # until a failing rank ends all
    records = [where for micro in failing or micros for where in micro.packed.where]
    named = ", ".join(records[:8]) + (f" and {len(records) - 8} more" if len(records) > 8 else "")
    what = f"loss {loss}, gradient norm {norm}; no weight was changed. The records: {named or 'unnamed'}"
    raise UserError("E-NUM-NONFINITE", what, hint="lower the learning rate, or look at these records")


def _finite(model: nn.Module, terms: Terms, totals: Mapping[str, float], device: Device, micro: Microbatch) -> bool:
    """Whether loss and gradient of this part alone are finite; of a sharded model, whose gradients are sums over ranks,
    the loss."""
    model.zero_grad(set_to_none=True)
    with device.compute():
        parts = _loss(terms(model, micro), totals)
    if device.shard == "none":
        _backward(parts, device)
    gradients = [p.grad for p in model.parameters() if p.grad is not None]
    return all(bool(torch.isfinite(tensor).all()) for tensor in (*parts, *gradients))


def language_terms(model: nn.Module, micro: Microbatch) -> list[Term]:
    """The language model's loss: the summed negative log-likelihood of the targets, per "tokens"."""
    return [Loss("nll", model(micro.packed, "nll"), "tokens")]
