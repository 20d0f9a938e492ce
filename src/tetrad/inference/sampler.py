"""From logits to one token per row: each row by its own settings and one uniform number, without a generator's state.

Inverse transform sampling: a row's token is where its own uniform number falls in its cumulative distribution, so a
response depends on its seed and not on the batch around it. Penalties and biases change the logits, temperature scales
them, then top-k, top-p (of what top-k left) and min-p each set a minimum probability; the highest counts, and tokens of
equal probability stay or go together.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from tetrad.settings.common import Sampling

History = tuple[Sampling, Sequence[int], Sequence[int]]
"""A row's settings, prompt and response so far."""
_FIRST = 1024  # most likely tokens that top-p examines before it sorts a whole vocabulary
_SHORT = 8192  # weights whose running sums are computed at once
_LESS = 1 - 2**-50  # a sum times this is below the sum: rounding must not go past the last weight


@dataclass(frozen=True)
class SamplingBatch:
    """What the rows of a batch request, [N, 1] each; None if no row requests it. most: the largest top-k.

    bias: rows, ids and what is added to their logits. penalised: rows whose logits depend on earlier tokens.
    """

    greedy: Tensor | None
    temperature: Tensor | None
    top_k: Tensor | None
    top_p: Tensor | None
    min_p: Tensor | None
    all_greedy: bool
    most: int
    bias: tuple[Tensor, Tensor, Tensor] | None
    penalised: tuple[int, ...]

    @classmethod
    def of(
        cls, rows: Sequence[Sampling], biases: Sequence[Mapping[int, float]], vocabulary: int, device: torch.device
    ) -> "SamplingBatch":
        def column(values: Sequence[float], off: float, dtype: torch.dtype = torch.float32) -> Tensor | None:
            return None if set(values) <= {off} else torch.tensor(values, dtype=dtype, device=device)[:, None]

        cold = [row.temperature == 0 for row in rows]
        ks = [row.top_k if 0 < row.top_k < vocabulary else vocabulary for row in rows]
        return cls(
            column(cold, False, torch.bool),
            column([row.temperature or 1.0 for row in rows], 1.0),
            column(ks, vocabulary, torch.int64),
            column([row.top_p for row in rows], 1.0),
            column([row.min_p for row in rows], 0.0),
            all(cold),
            max((k for k in ks if k < vocabulary), default=0),
            _bias(biases, device),
            tuple(
                number
                for number, s in enumerate(rows)
                if (s.repetition_penalty, s.presence_penalty, s.frequency_penalty) != (1.0, 0.0, 0.0)
            ),
        )


def _bias(biases: Sequence[Mapping[int, float]], device: torch.device) -> tuple[Tensor, Tensor, Tensor] | None:
    changes = [(row, token, value) for row, bias in enumerate(biases) for token, value in bias.items()]
    if not changes:
        return None
    rows, ids, values = torch.tensor(changes, dtype=torch.float64, device=device).T
    return rows.long(), ids.long(), values.float()


@dataclass(frozen=True)
class Sampled:
    """ids [N] and their log-probabilities under softmax(logits / temperature), before penalties, biases and filters
    (temperature 0: at 1). top: ids and log-probabilities [N, k] of the k most likely tokens by the same measure."""

    ids: Tensor
    logprobs: Tensor
    top: tuple[Tensor, Tensor] | None


def sample(
    logits_NV: Tensor, uniforms_N: Tensor, batch: SamplingBatch, histories: Sequence[History] = (), top: int = 0
) -> Sampled:
    """One token per row. histories: each row's prompt and response, if there are penalised rows."""
    logits = logits_NV.float()
    changed = _adjusted(logits, batch, histories)
    if batch.temperature is not None:
        logits = _scaled(logits, batch.temperature)
        changed = None if changed is None else _scaled(changed, batch.temperature)
    choice = (logits if changed is None else changed).softmax(-1)
    if batch.all_greedy:
        ids = choice.argmax(-1)
    else:
        ids = pick(_filtered(choice, batch), uniforms_N)
        if batch.greedy is not None:
            ids = torch.where(batch.greedy[:, 0], choice.argmax(-1), ids)
    if changed is None:
        logprobs = choice.gather(1, ids[:, None]).log_()[:, 0]
    else:  # what a bias forces may have probability 0 in float32
        logprobs = logits.log_softmax(-1).gather(1, ids[:, None])[:, 0]
    if not top:
        return Sampled(ids, logprobs, None)
    best = logits.log_softmax(-1).topk(min(top, logits.shape[-1]), -1)
    return Sampled(ids, logprobs, (best.indices, best.values))


def _scaled(logits: Tensor, temperature: Tensor) -> Tensor:
    """Divided by the temperature, the largest at 0: no temperature is small enough to produce infinities."""
    return (logits - logits.amax(-1, keepdim=True)) / temperature


def pick(weights_NV: Tensor, uniforms_N: Tensor) -> Tensor:
    """Where each row's uniform number falls in the running sum of its weights (not negative; any total above 0).

    A weight of 0 is never picked. Running sums are float64, so that it makes no difference how they are computed: at
    once for few weights, else by blocks, without one over the whole vocabulary.
    """
    rows, size = weights_NV.shape
    point = uniforms_N.double()[:, None]
    if rows * size <= _SHORT:
        return _first_above(weights_NV, point)[:, 0]
    width = 128 if size > 8192 else 64
    if size % width:
        weights_NV = F.pad(weights_NV, (0, width - size % width))
    blocks = weights_NV.reshape(-1, width)
    sums = blocks.sum(-1).double().view(rows, -1)
    running = _running(sums)
    point = point * (running[:, -1:] * _LESS)
    block = torch.searchsorted(running, point, right=True).clamp_(max=sums.shape[1] - 1)
    share = (point - (running - sums).gather(1, block)) / sums.gather(1, block)
    starts = torch.arange(0, sums.numel(), sums.shape[1], device=sums.device)[:, None]
    inner = blocks.index_select(0, (block + starts).view(-1))
    return (block * width + _first_above(inner, share.clamp_(0, 1))).clamp_(max=size - 1)[:, 0]


def _first_above(weights: Tensor, share: Tensor) -> Tensor:
    """The first index [N, 1] whose running sum is above this share of the total."""
    running = _running(weights)
    indices = torch.searchsorted(running, share * (running[:, -1:] * _LESS), right=True)
    return indices.clamp_(max=weights.shape[1] - 1)  # in case the weights are NaN


def _running(weights: Tensor, dtype: torch.dtype = torch.float64) -> Tensor:
    """Running sums along the last dimension."""
    if weights.is_cuda and torch.are_deterministic_algorithms_enabled():
        return _exact(weights.double()).to(dtype)
    return weights.cumsum(-1, dtype=dtype)


def _exact(weights: Tensor) -> Tensor:
    """The same in whole multiples of 2^-52 of a row's total: a GPU has no deterministic kernel for running sums but of
    whole numbers. A weight of 0 adds nothing, and no sum is below the one before it."""
    unit = weights.sum(-1, keepdim=True) / 2**52
    return (weights / unit).long().cumsum(-1) * unit


def _filtered(chances: Tensor, batch: SamplingBatch) -> Tensor:
    """Probabilities, with 0 where a token has less than its row's minimum."""
    least = None
    if batch.top_k is not None or batch.top_p is not None:
        least = _least(chances, batch)
    if batch.min_p is not None:
        floor = batch.min_p * chances.amax(-1, keepdim=True)
        least = floor if least is None else torch.maximum(least, floor)
    return chances if least is None else chances * (chances >= least)


def _least(chances: Tensor, batch: SamplingBatch, first: int = _FIRST) -> Tensor:
    """The probability [N, 1] of the last token that top-k and then top-p keep; 0 if they keep all."""
    size = chances.shape[-1]
    one = torch.ones_like(chances[:, :1])
    ks = batch.top_k if batch.top_k is not None else (one * size).long()
    share = batch.top_p if batch.top_p is not None else one
    count = min(size, max(batch.most, first if batch.top_p is not None else 1))
    ordered = chances.topk(count, -1).values
    in_top_k = torch.arange(count, device=chances.device) < ks
    running = _running(ordered * in_top_k, ordered.dtype)
    enough = share * torch.where(ks < size, running[:, -1:], one)
    if count < size and bool(((share < 1) & (ks >= size) & (running[:, -1:] < enough)).any()):
        return _least(chances, batch, size)
    # A token stays while the share before it is below top_p: the most likely one always does.
    stays = in_top_k & ((running - ordered < enough) | (share >= 1))
    last = (stays.sum(-1, keepdim=True) - 1).clamp_(min=0)
    return torch.where((ks < size) | (share < 1), ordered.gather(1, last), 0.0)


def _adjusted(logits_NV: Tensor, batch: SamplingBatch, histories: Sequence[History]) -> Tensor | None:
    """A copy of the logits with penalties and biases; None if no row has any.

    The logit of a token of prompt or response is divided by the repetition penalty if positive, else multiplied (Keskar
    et al. 2019); for a token of the response the presence penalty and, for each time it appears, the frequency penalty
    are subtracted; then the bias is added.
    """
    if batch.bias is None and not batch.penalised:
        return None
    out, device = logits_NV.clone(), logits_NV.device
    if batch.penalised:
        parts = zip(*(_penalties(row, *histories[row]) for row in batch.penalised), strict=True)
        rows, ids, divisors, taken = (torch.from_numpy(np.concatenate(part)).to(device) for part in parts)
        z = out[rows, ids]
        out[rows, ids] = torch.where(z > 0, z / divisors, z * divisors) - taken
    if batch.bias is not None:
        rows, ids, added = batch.bias
        out.index_put_((rows, ids), added, accumulate=True)
    return out


def _penalties(row: int, s: Sampling, prompt: Sequence[int], response: Sequence[int]) -> tuple[np.ndarray, ...]:
    """Row, id, divisor and what is subtracted, for each token of prompt and response."""
    ids, inverse = np.unique(np.fromiter((*prompt, *response), np.int64), return_inverse=True)
    times = np.bincount(inverse[len(prompt) :], minlength=len(ids))
    taken = s.presence_penalty * (times > 0) + s.frequency_penalty * times
    divisors = np.full(len(ids), s.repetition_penalty, np.float32)
    return np.full(len(ids), row), ids, divisors, taken.astype(np.float32)
