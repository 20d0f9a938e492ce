"""A batch in transformers' format, rows padded to one length on either side, through the packed decoder.

Padding is not computed at all: the tokens that the mask keeps are packed row by row, each row from position 0. A hole
in the mask is skipped. The numbers are transformers', with two differences where its own are only noise: logits at
padding are 0, and no loss is taken where the predicting position or the label is padding.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from tetrad.model.transformer import CausalLM
from tetrad.types import IGNORE, Packed


def forward(
    model: CausalLM,
    input_ids_BL: Tensor,
    attention_mask_BL: Tensor | None = None,
    labels_BL: Tensor | None = None,
) -> tuple[Tensor | None, Tensor]:
    """Loss (None without labels) and logits [B, L, V], both float32 and differentiable.

    attention_mask_BL: 1 (or true) at tokens, 0 at padding; None: all are tokens. labels_BL: the ids themselves,
    not shifted; the loss is the mean cross-entropy of position t against label t + 1 over the labels that aren't -100,
    and NaN where there are none. Raises ValueError where the shapes differ or a row has no token.
    """
    mask = torch.ones_like(input_ids_BL) if attention_mask_BL is None else attention_mask_BL
    for name, given in (("attention_mask", mask), ("labels", labels_BL)):
        if given is not None and given.shape != input_ids_BL.shape:
            raise ValueError(f"{name} is {list(given.shape)}, input_ids is {list(input_ids_BL.shape)}")
    mask = mask.bool()
    if input_ids_BL.dim() != 2 or not len(mask) or not bool(mask.any(1).all()):
        raise ValueError("input_ids must be [B, L] with a token in every row")
    packed = _packed(input_ids_BL, mask, mask.sum(1), labels_BL)
    logits_TV = model(packed, "logits")
    logits = logits_TV.new_zeros((*mask.shape, logits_TV.shape[-1]))
    logits[mask] = logits_TV
    if labels_BL is None:
        return None, logits
    return F.cross_entropy(logits_TV, packed.targets_T, ignore_index=IGNORE), logits


def _packed(ids_BL: Tensor, mask_BL: Tensor, lengths_B: Tensor, labels_BL: Tensor | None) -> Packed:
    ends = lengths_B.cumsum(0)
    ids = ids_BL[mask_BL]
    starts = (ends - lengths_B).repeat_interleave(lengths_B)
    positions = torch.arange(len(ids), device=ids.device) - starts
    targets = torch.full_like(ids, IGNORE)
    if labels_BL is not None:
        targets[:-1] = labels_BL[mask_BL][1:]
        targets[ends - 1] = IGNORE
    return Packed(ids, positions, (0, *ends.tolist()), targets)
