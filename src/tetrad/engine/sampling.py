"""From logits to one token a row: each row by its own rules, and by one uniform number instead of a generator's state.

Inverse transform sampling: a row's token is where its own uniform number falls in its cumulative distribution, so a
reply depends on its seed and not on the batch around it. Penalties and biases change the logits, temperature scales
them, then top-k, top-p (of what top-k left) and min-p each demand a least chance; the highest demand counts, and tokens
of equal chance stay or go together.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from tetrad.settings.common import Sampling

_FIRST = 1024  # likeliest tokens that top-p looks at before it sorts a whole vocabulary


@dataclass(frozen=True)
class Rules:
    """What the rows of a batch ask for, [N, 1] each; None where no row asks for it. most: the largest top-k."""

    greedy: Tensor | None
    temperature: Tensor | None
    top_k: Tensor | None
    top_p: Tensor | None
    min_p: Tensor | None
    all_greedy: bool
    most: int

    @classmethod
    def of(cls, rows: Sequence[Sampling], vocabulary: int, place: torch.device) -> "Rules":
        def column(values: Sequence[float], off: float, dtype: torch.dtype = torch.float32) -> Tensor | None:
            return None if set(values) <= {off} else torch.tensor(values, dtype=dtype, device=place)[:, None]

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
        )


@dataclass(frozen=True)
class Drawn:
    """ids [N] and their log-probabilities under softmax(logits / temperature), before penalties, biases and filters
    (temperature 0: at 1). top_ids, top_logprobs [N, k]: the k likeliest tokens by the same measure."""

    ids: Tensor
    logprobs: Tensor
    top_ids: Tensor
    top_logprobs: Tensor


def draw(logits_NV: Tensor, uniforms_N: Tensor, rules: Rules, adjusted_NV: Tensor | None = None, top: int = 0) -> Drawn:
    """One token a row. adjusted_NV: the logits to sample from, where rows have penalties or biases."""
    logits = logits_NV.float()
    if rules.temperature is not None:
        logits = logits / rules.temperature
    chances = logits.softmax(-1)
    choice = chances
    if adjusted_NV is not None:
        scaled = adjusted_NV if rules.temperature is None else adjusted_NV / rules.temperature
        choice = scaled.softmax(-1)
    ids = choice.argmax(-1) if rules.greedy is not None else None
    if ids is None or not rules.all_greedy:
        drawn = pick(_filtered(choice, rules), uniforms_N)
        ids = drawn if ids is None or rules.greedy is None else torch.where(rules.greedy[:, 0], ids, drawn)
    if adjusted_NV is None:
        logprobs = chances.gather(1, ids[:, None]).log_()[:, 0]
    else:  # what a bias forces may have no chance at all as float32
        logprobs = logits.gather(1, ids[:, None])[:, 0] - logits.logsumexp(-1)
    best = chances.topk(min(top, chances.shape[-1]), -1) if top else None
    nothing = chances[:, :0]
    return Drawn(ids, logprobs, best.indices if best else nothing.long(), best.values.log() if best else nothing)


def pick(weights_NV: Tensor, uniforms_N: Tensor) -> Tensor:
    """Where each row's uniform number falls in the running sum of its weights (not negative; any total above 0).

    Two levels, a block and a token in it: no running sum over the whole vocabulary. A weight of 0 is never picked.
    """
    rows, size = weights_NV.shape
    width = 128 if size > 8192 else 64
    if size % width:
        weights_NV = F.pad(weights_NV, (0, width - size % width))
    blocks = weights_NV.view(rows, -1, width)
    sums = blocks.sum(-1).cumsum(-1)
    point = _below(uniforms_N[:, None] * sums[:, -1:], sums[:, -1:])
    block = (sums <= point).sum(-1, keepdim=True)
    before = torch.where(block > 0, sums.gather(1, (block - 1).clamp_(min=0)), 0.0)
    inner = blocks[torch.arange(rows, device=block.device), block[:, 0]].cumsum(-1)
    rest = _below((point - before).clamp_(min=0), inner[:, -1:])
    return block[:, 0] * width + (inner <= rest).sum(-1)


def _below(point: Tensor, limit: Tensor) -> Tensor:
    """The point, or the last number below the limit: rounding must not lead past the last weight."""
    return torch.minimum(point, torch.nextafter(limit, torch.zeros_like(limit)))


def _filtered(chances: Tensor, rules: Rules) -> Tensor:
    """Chances with 0 where a token has less than its row demands."""
    least = None
    if rules.top_k is not None or rules.top_p is not None:
        least = _least(chances, rules)
    if rules.min_p is not None:
        floor = rules.min_p * chances.amax(-1, keepdim=True)
        least = floor if least is None else torch.maximum(least, floor)
    return chances if least is None else chances * (chances >= least)


def _least(chances: Tensor, rules: Rules, first: int = _FIRST) -> Tensor:
    """The chance [N, 1] of the last token that top-k and then top-p let stay; 0 where all do."""
    size = chances.shape[-1]
    one = torch.ones_like(chances[:, :1])
    ks = rules.top_k if rules.top_k is not None else (one * size).long()
    share = rules.top_p if rules.top_p is not None else one
    count = min(size, max(rules.most, first if rules.top_p is not None else 1))
    ordered = chances.topk(count, -1).values
    kept = torch.arange(count, device=chances.device) < ks
    running = (ordered * kept).cumsum(-1)
    enough = share * torch.where(ks < size, running[:, -1:], one)
    if count < size and bool(((share < 1) & (ks >= size) & (running[:, -1:] < enough)).any()):
        return _least(chances, rules, size)
    # A token stays while the share before it is below top_p: the likeliest always does.
    stays = kept & ((running - ordered < enough) | (share >= 1))
    last = (stays.sum(-1, keepdim=True) - 1).clamp_(min=0)
    return torch.where((ks < size) | (share < 1), ordered.gather(1, last), 0.0)


@dataclass(frozen=True)
class Heard:
    """What the penalties of a row look at. bias: what is added to the logits of these ids."""

    sampling: Sampling
    prompt: Sequence[int]
    reply: Sequence[int]
    bias: Mapping[int, float]


def adjusts(sampling: Sampling, bias: Mapping[int, float]) -> bool:
    """Whether a row's logits are changed before it is sampled."""
    s = sampling
    return bool(bias) or (s.repetition_penalty, s.presence_penalty, s.frequency_penalty) != (1.0, 0.0, 0.0)


def adjusted(logits_NV: Tensor, rows: Mapping[int, Heard]) -> Tensor:
    """A copy of the logits with the penalties and biases of the given rows.

    The logit of a token of prompt or reply is divided by the repetition penalty where positive, else multiplied (Keskar
    et al. 2019); then the bias is added, and for a token of the reply the presence penalty and, as often as it stands
    there, the frequency penalty are taken away.
    """
    changes = [_changes(number, heard) for number, heard in rows.items()]
    numbers, ids, divisors, added = (torch.from_numpy(np.concatenate(part)) for part in zip(*changes, strict=True))
    place, out = logits_NV.device, logits_NV.float().clone()
    at, by = (numbers.to(place), ids.to(place)), divisors.to(place)
    z = out[at]
    out[at] = torch.where(z > 0, z / by, z * by) + added.to(place)
    return out


def _changes(number: int, heard: Heard) -> tuple[np.ndarray, ...]:
    """Row, id, divisor and addend of each logit that changes."""
    s, prompt, said = heard.sampling, len(heard.prompt), len(heard.prompt) + len(heard.reply)
    every = np.fromiter((*heard.prompt, *heard.reply, *heard.bias), np.int64)
    ids, place = np.unique(every, return_inverse=True)
    seen = np.bincount(place[:said], minlength=len(ids)) > 0
    times = np.bincount(place[prompt:said], minlength=len(ids))
    bias = np.bincount(place[said:], np.fromiter(heard.bias.values(), np.float64), len(ids))
    added = bias - s.presence_penalty * (times > 0) - s.frequency_penalty * times
    divisors = np.where(seen, s.repetition_penalty, 1.0)
    return np.full(len(ids), number), ids, divisors.astype(np.float32), added.astype(np.float32)
