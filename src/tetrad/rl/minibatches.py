"""The batch that an iteration of PPO learns from, and how it is split: epochs of mini-batches."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from tetrad.data.loader import micro_batches
from tetrad.data.pack import pack
from tetrad.distributed import collectives
from tetrad.distributed.device import Device
from tetrad.rl.rollout import Rollout, response_indices
from tetrad.seeds import generator_for
from tetrad.settings.ppo import Ppo
from tetrad.training.step import Microbatch


@dataclass(frozen=True)
class PPOBatch:
    """One iteration's responses as the models read them; on the CPU; all [B, T] but scores and bootstrap, [B].

    source_scores: of each source of reward; logprobs, ref_logprobs: of actor and reference, before any update;
    bootstrap: the value after the last token, 0 if the response ended or bootstrapping is off.
    """

    rollout: Rollout
    source_scores: Mapping[str, Sequence[float]]
    scores: Tensor
    logprobs: Tensor
    ref_logprobs: Tensor
    values: Tensor
    bootstrap: Tensor
    rewards: Tensor
    advantages: Tensor
    returns: Tensor


@dataclass(frozen=True)
class PPOMicrobatch:
    """The training targets of the N response tokens of a micro-batch, on the device. weights: of each token's loss."""

    old_logprobs: Tensor
    values: Tensor
    advantages: Tensor
    returns: Tensor
    weights: Tensor


def minibatches(
    ppo_batch: PPOBatch, s: Ppo, key: tuple[int, int], micro_batch_tokens: int, device: Device
) -> Iterator[list[Microbatch]]:
    """Each epoch's batch in a fresh permutation, in `num_minibatches` equal parts; this rank's micro-batches."""
    rollout = ppo_batch.rollout
    batch = len(rollout.documents) * collectives.size()
    row_of = {
        number: row for row, number in enumerate(response_indices(batch // s.samples_per_prompt, s.samples_per_prompt))
    }
    for epoch in range(s.ppo_epochs):
        shuffled = generator_for(key[0], "mini-batches", key[1], epoch).permutation(batch)
        for part in range(s.num_minibatches):
            chosen = sorted(row_of[n] for n in shuffled[part :: s.num_minibatches].tolist() if n in row_of)
            groups = micro_batches([rollout.documents[i] for i in chosen], micro_batch_tokens)
            yield [_micro(ppo_batch, [chosen[i] for i in group], s, device) for group in groups]


def _micro(batch: PPOBatch, rows: Sequence[int], s: Ppo, device: Device) -> Microbatch:
    """Its count "losses" is the denominator of the losses: tokens, or responses."""
    rollout, index = batch.rollout, torch.tensor(rows)
    mask = rollout.mask_BT[index]
    arrays = (batch.logprobs, batch.values, batch.advantages, batch.returns)
    weights = mask / mask.sum(1, keepdim=True) if s.reduction == "sequence" else mask.float()
    data = PPOMicrobatch(*(x[mask].to(device.torch_device) for x in (*(x[index] for x in arrays), weights)))
    packed = device.put(pack([rollout.documents[i] for i in rows]))
    tokens = float(mask.sum())
    return Microbatch(packed, {"tokens": tokens, "losses": len(rows) if s.reduction == "sequence" else tokens}, data)
