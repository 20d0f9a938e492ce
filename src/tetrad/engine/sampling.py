"""From logits to one token a row: temperature, top-k, top-p, and one uniform number instead of a generator's state.

Inverse transform sampling: a row's token is where its own uniform number falls in its cumulative distribution, so a
reply depends on its seed and not on the batch around it.
"""

import torch
from torch import Tensor

from tetrad.settings.common import Sampling


def draw(logits_NV: Tensor, uniforms_N: Tensor, sampling: Sampling) -> tuple[Tensor, Tensor]:
    """ids [N] and their log-probabilities [N] under softmax(logits / temperature), before top-k and top-p.

    Temperature 0 takes the likeliest token (the first of equals), with its log-probability at temperature 1.
    """
    logits = logits_NV.float()
    if sampling.temperature == 0:
        ids = logits.argmax(-1)
        return ids, _at(torch.log_softmax(logits, -1), ids)
    logprobs = torch.log_softmax(logits / sampling.temperature, -1)
    chances = _filtered(logprobs, sampling).exp()
    cumulative = chances.cumsum(-1)
    point = uniforms_N[:, None] * cumulative[:, -1:]
    ids = (cumulative <= point).sum(-1).clamp_(max=logits.shape[-1] - 1)
    return ids, _at(logprobs, ids)


def _at(logprobs: Tensor, ids: Tensor) -> Tensor:
    return logprobs.gather(1, ids[:, None])[:, 0]


def _filtered(logprobs: Tensor, sampling: Sampling) -> Tensor:
    out = logprobs
    if 0 < sampling.top_k < logprobs.shape[-1]:
        least = torch.topk(out, sampling.top_k, -1).values[:, -1:]
        out = out.masked_fill(out < least, -torch.inf)
    if sampling.top_p < 1:
        ordered, place = out.sort(-1, descending=True)
        chances = ordered.softmax(-1)
        # A token stays while the share before it is below top_p: the likeliest always does.
        gone = (chances.cumsum(-1) - chances) >= max(sampling.top_p, 1e-9)
        out = out.masked_fill(torch.zeros_like(gone).scatter(1, place, gone), -torch.inf)
    return out
