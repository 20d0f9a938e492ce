"""Language modelling objectives: log-probabilities, entropy and cross-entropy of chosen tokens.

They read the last hidden states and the head's matrix in chunks, so that the full [N, V] matrix of logits never exists.
Log-softmax is taken in float32 (float64 for float64 inputs).

- `nll_sum` is linear in the log-probabilities, so its gradient is computed in the forward, with each chunk's logits;
- `token_logprobs` receives an arbitrary gradient (PPO), so the backward recomputes each chunk's logits.

Shapes: V vocabulary, N chosen tokens, H hidden size.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from tetrad.kernels.onednn import linear, pieces, widened

CHUNK_BYTES = {"cpu": 4 << 20, "cuda": 512 << 20}  # of float32 logits at a time; on a CPU more is no faster
CHUNK_ROWS = 256  # at least, or the matrix products are inefficient


def nll_sum(hidden_NH: Tensor, weight_VH: Tensor, targets_N: Tensor, chunk: int = 0) -> Tensor:
    """Sum of -log softmax(hidden @ weight.T)[target], a scalar; every target counts (select before calling).

    The forward computes the gradients too, unless neither input needs one. chunk: rows at a time; 0 chooses.
    Products are taken in `hidden`'s dtype or autocast's; the gradient of `weight` is summed in at least float32.
    """
    sizes = _chunks(hidden_NH, weight_VH, targets_N, chunk)
    if not torch.is_grad_enabled():  # a Function can't see that, and would compute unused gradients
        weight_VH = weight_VH.detach()
        hidden_NH = hidden_NH.detach()
    with _own_precision(hidden_NH) as hidden:
        return _apply_nll(hidden, weight_VH, targets_N, sizes)


def token_logprobs(
    hidden_NH: Tensor,
    weight_VH: Tensor,
    targets_N: Tensor,
    temperature: float = 1.0,
    chunk: int = 0,
    entropy: bool = True,
) -> tuple[Tensor, Tensor]:
    """Log-probability of each target under softmax(hidden @ weight.T / temperature), and the entropy in nats; both [N].

    Differentiable in `hidden` and `weight`, once, through either result. entropy = False skips it and returns NaN.
    """
    sizes = _chunks(hidden_NH, weight_VH, targets_N, chunk)
    with _own_precision(hidden_NH) as hidden:
        return _apply_token_logprobs(hidden, weight_VH, targets_N, temperature, sizes, entropy)


@contextmanager
def _own_precision(hidden: Tensor) -> Iterator[Tensor]:
    """Under autocast `hidden` in its dtype, and autocast off: it does not affect products with a given output."""
    kind = hidden.device.type
    compute = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else hidden.dtype
    with torch.autocast(kind, enabled=False):
        yield hidden.to(compute)


def _accumulator(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def _chunks(hidden: Tensor, weight: Tensor, targets: Tensor, chunk: int) -> list[slice]:
    if hidden.ndim != 2 or weight.ndim != 2 or hidden.shape[1] != weight.shape[1] or targets.shape != hidden.shape[:1]:
        raise ValueError(f"shapes do not fit: {tuple(hidden.shape)}, {tuple(weight.shape)}, {tuple(targets.shape)}")
    budget = CHUNK_BYTES.get(hidden.device.type, CHUNK_BYTES["cuda"])
    rows = chunk or max(CHUNK_ROWS, budget // (4 * weight.shape[0]))
    return pieces(len(hidden), rows, hidden.device)


class _Head:
    """hidden @ weight.T, chunk by chunk. One buffer holds the probabilities of all: fresh memory costs page faults."""

    def __init__(self, hidden: Tensor, weight: Tensor, sizes: list[slice], temperature: float = 1.0) -> None:
        self.hidden, self.weight, self.temperature = hidden, weight.to(hidden.dtype), temperature
        self.wide = _accumulator(hidden.dtype)
        rows = sizes[0].stop if sizes else 0
        self.probs = hidden.new_empty(rows, len(weight), dtype=self.wide)

    def softmax(self, rows: slice) -> tuple[Tensor, Tensor, Tensor]:
        """The chunk's logits, probabilities (which the next call overwrites), and log of the normaliser [n, 1]."""
        probs = self.probs[: rows.stop - rows.start]
        part = self.hidden[rows]
        logits = widened(part, self.weight.t()) if part.is_cuda else linear(part, self.weight).to(self.wide)
        if self.temperature != 1.0:
            logits /= self.temperature
        torch.softmax(logits, 1, out=probs)
        # The largest probability is at least 1 / V, so its logarithm is exact where a target's own may underflow.
        return logits, probs, logits.amax(1, keepdim=True) - probs.amax(1, keepdim=True).log()


class _Gradients:
    """Of hidden and weight, summed from the gradients at each chunk's logits; None if not needed."""

    def __init__(self, hidden: Tensor, weight: Tensor, needed: tuple[bool, bool]) -> None:
        wide = _accumulator(hidden.dtype)
        self.hidden = torch.empty_like(hidden) if needed[0] else None
        self.weight = torch.zeros(weight.shape, dtype=wide, device=weight.device) if needed[1] else None
        self.needed = any(needed)

    def add(self, slopes: Tensor, head: _Head, rows: slice) -> None:
        part = head.hidden[rows]
        slopes = slopes.to(part.dtype)
        if self.hidden is not None:
            self.hidden[rows] = linear(slopes, head.weight.T)
        if self.weight is None:
            return
        if part.dtype == self.weight.dtype:
            self.weight.addmm_(slopes.T, part)
        else:
            self.weight += widened(slopes.T, part)


class _NllSum(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, targets: Tensor, sizes: list[slice]) -> Tensor:
        head = _Head(hidden, weight, sizes)
        gradients = _Gradients(hidden, weight, ctx.needs_input_grad[:2])
        total = torch.zeros((), dtype=head.wide, device=hidden.device)
        for rows in sizes:
            logits, probs, norms = head.softmax(rows)
            target = targets[rows, None]
            total += (norms - logits.gather(1, target)).sum()
            if gradients.needed:
                probs.scatter_add_(1, target, probs.new_full(target.shape, -1.0))
                gradients.add(probs, head, rows)
        ctx.made, ctx.weight_dtype = (gradients.hidden, gradients.weight), weight.dtype
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, None, None]:
        hidden, weight = ctx.made
        return (
            None if hidden is None else hidden * grad.to(hidden.dtype),
            None if weight is None else (weight * grad).to(ctx.weight_dtype),
            None,
            None,
        )


class _TokenLogprobs(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, targets: Tensor, temperature: float, sizes: list[slice], entropy: bool
    ) -> tuple[Tensor, Tensor]:
        head = _Head(hidden, weight, sizes, temperature)
        logprobs = hidden.new_empty(len(hidden), dtype=head.wide)
        entropies = torch.full_like(logprobs, float("nan"))
        for rows in sizes:
            logits, probs, norms = head.softmax(rows)
            logprobs[rows] = (logits.gather(1, targets[rows, None]) - norms).squeeze(1)
            if entropy:
                entropies[rows] = -torch.linalg.vecdot(probs, logits.sub_(norms))
        ctx.save_for_backward(hidden, weight, targets, entropies)
        ctx.temperature, ctx.sizes = temperature, sizes
        ctx.set_materialize_grads(False)
        if not entropy:
            ctx.mark_non_differentiable(entropies)
        return logprobs, entropies

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_logprobs: Tensor | None, grad_entropies: Tensor | None) -> tuple[Tensor | None, ...]:
        hidden, weight, targets, entropies = ctx.saved_tensors
        head = _Head(hidden, weight, ctx.sizes, ctx.temperature)
        gradients = _Gradients(hidden, weight, ctx.needs_input_grad[:2])
        for rows in ctx.sizes:
            logits, slopes, norms = head.softmax(rows)
            scale = (
                norms.new_zeros(norms.shape) if grad_logprobs is None else grad_logprobs[rows, None] / ctx.temperature
            )
            if grad_entropies is None:
                slopes *= -scale
            else:  # dH/dz_j = -p_j (log p_j + H), dlogp/dz_j = [j = target] - p_j
                pull = grad_entropies[rows, None] / ctx.temperature
                slopes *= (logits.sub_(norms).add_(entropies[rows, None])).mul_(pull).add_(scale).neg_()
            gradients.add(slopes.scatter_add_(1, targets[rows, None], scale), head, rows)
        grad_weight = None if gradients.weight is None else gradients.weight.to(weight.dtype)
        return gradients.hidden, grad_weight, None, None, None, None


_apply_nll: Callable[..., Tensor] = _NllSum.apply
_apply_token_logprobs: Callable[..., tuple[Tensor, Tensor]] = _TokenLogprobs.apply
