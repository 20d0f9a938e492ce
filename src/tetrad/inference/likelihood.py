"""How likely a model holds a given text, token by token, by the weights and kernels that the engine samples with."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from tetrad.distributed.device import Device
from tetrad.inference.engine import Likeliest
from tetrad.inference.fused_model import Fused
from tetrad.kernels.onednn import padded
from tetrad.model.attention import packed_attention, plan_for

ROWS = 128  # whose logits exist at once


@torch.inference_mode()
def token_likelihoods(
    model: Fused, ids: Sequence[int], device: Device, top: int, temperature: float = 1.0
) -> list[tuple[float, Likeliest]]:
    """For each id but the first: its log-probability after those before it, in nats, and the `top` most likely ids in
    its place with theirs; an id has the same float in both. temperature: logits are divided by it."""
    count, groups, place = len(ids), model.config.kv_heads, device.torch_device
    plan = plan_for((0, count), place)

    def attend(_: int, q_THD: Tensor, kv_T2GD: Tensor) -> Tensor:
        return packed_attention(q_THD, kv_T2GD[:, :groups], kv_T2GD[:, groups:], plan)

    ids_T = torch.tensor(ids, device=place)
    room = (0, padded(count, place) - count)
    hidden = model.hidden(F.pad(ids_T, room), F.pad(torch.arange(count, device=place), room), attend)
    likelihoods: list[tuple[float, Likeliest]] = []
    for targets, rows in zip(ids_T[1:].split(ROWS), hidden[: count - 1].split(ROWS), strict=True):
        scores = (model.logits(rows) / temperature).log_softmax(-1)
        best = scores.topk(min(top, scores.shape[-1]), -1)
        pairs = zip(best.indices.tolist(), best.values.tolist(), strict=True)
        own = scores.gather(1, targets[:, None])[:, 0].tolist()
        likelihoods += zip(own, (tuple(zip(*pair, strict=True)) for pair in pairs), strict=True)
    return likelihoods
