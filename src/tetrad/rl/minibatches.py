"""The batch that an iteration learns from, how it is split in mini-batches, and the policy's loss on a part of it."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import ClassVar

import torch
from torch import Tensor

from tetrad.data.loader import micro_batches
from tetrad.data.pack import pack
from tetrad.distributed import collectives
from tetrad.distributed.device import Device
from tetrad.objectives import ppo
from tetrad.rl.rollout import Rollout, response_indices
from tetrad.seeds import generator_for
from tetrad.settings.common import OnPolicy
from tetrad.training.step import MAX, Loss, Metric, Microbatch, Term


@dataclass(frozen=True)
class PolicyMicrobatch:
    """The training targets of the N response tokens of a micro-batch, on the device. weights: of each token's loss."""

    old_logprobs: Tensor
    ref_logprobs: Tensor
    advantages: Tensor
    weights: Tensor


@dataclass(frozen=True)
class PPOMicrobatch(PolicyMicrobatch):
    """Those of the critic too."""

    values: Tensor
    returns: Tensor


@dataclass(frozen=True)
class PolicyBatch:
    """One iteration's responses as the models read them; on the CPU; all [B, T] but scores, [B].

    source_scores: of each source of reward; logprobs, ref_logprobs: of actor and reference, before any update.
    """

    MICROBATCH: ClassVar[type[PolicyMicrobatch]] = PolicyMicrobatch
    rollout: Rollout
    source_scores: Mapping[str, Sequence[float]]
    scores: Tensor
    logprobs: Tensor
    ref_logprobs: Tensor
    rewards: Tensor
    advantages: Tensor

    @property
    def old_logprobs(self) -> Tensor:
        """The actor's, as the loss names them."""
        return self.logprobs


@dataclass(frozen=True)
class PPOBatch(PolicyBatch):
    """With the critic's numbers. bootstrap: the value after the last token, [B], 0 if the response ended or
    bootstrapping is off."""

    MICROBATCH: ClassVar[type[PolicyMicrobatch]] = PPOMicrobatch
    values: Tensor
    bootstrap: Tensor
    returns: Tensor


def minibatches(
    batch: PolicyBatch, s: OnPolicy, key: tuple[int, int], micro_batch_tokens: int, device: Device
) -> Iterator[list[Microbatch]]:
    """Each epoch's batch in a fresh permutation, in `num_minibatches` equal parts; this rank's micro-batches."""
    rollout = batch.rollout
    size = len(rollout.documents) * collectives.size()
    row_of = {
        number: row for row, number in enumerate(response_indices(size // s.samples_per_prompt, s.samples_per_prompt))
    }
    for epoch in range(s.epochs):
        shuffled = generator_for(key[0], "mini-batches", key[1], epoch).permutation(size)
        for part in range(s.num_minibatches):
            chosen = sorted(row_of[n] for n in shuffled[part :: s.num_minibatches].tolist() if n in row_of)
            groups = micro_batches([rollout.documents[i] for i in chosen], micro_batch_tokens)
            yield [_micro(batch, [chosen[i] for i in group], s, device) for group in groups]


def _micro(batch: PolicyBatch, rows: Sequence[int], s: OnPolicy, device: Device) -> Microbatch:
    """Its count "losses" is the denominator of the losses, summed over the whole mini-batch before it divides: tokens,
    responses, or the tokens that responses may have."""
    rollout, index = batch.rollout, torch.tensor(rows)
    mask = rollout.mask_BT[index]
    weights = mask / mask.sum(1, keepdim=True) if s.loss_mean == "response" else mask.float()
    targets = {
        f.name: weights if f.name == "weights" else getattr(batch, f.name)[index] for f in fields(batch.MICROBATCH)
    }
    data = batch.MICROBATCH(**{name: x[mask].to(device.torch_device) for name, x in targets.items()})
    packed = device.put(pack([rollout.documents[i] for i in rows]))
    tokens = float(mask.sum())
    losses = {"token": tokens, "response": float(len(rows)), "constant": float(len(rows) * s.max_new_tokens)}
    return Microbatch(packed, {"tokens": tokens, "losses": losses[s.loss_mean]}, data)


def policy_terms(
    logprobs: Tensor, tokens: PolicyMicrobatch, clip_low: float, clip_high: float, dual_clip: float = 0.0
) -> list[Term]:
    """ratio = exp(logprobs - old_logprobs); loss = max(-A ratio, -A clip(ratio, 1 - clip_low, 1 + clip_high))."""
    old, advantages = tokens.old_logprobs, tokens.advantages
    sums = ppo.policy_loss_sum(logprobs, old, advantages, clip_low, clip_high, dual_clip or None, tokens.weights)
    return [
        Loss("policy_loss", sums.loss, "losses"),
        Metric("clip_fraction", sums.clipped, "tokens"),
        Metric("approx_kl", sums.half_square, "tokens"),
        Metric("ratio", sums.ratio, "tokens"),
        Metric("ratio_max", sums.highest_ratio, MAX),
        *([Metric("dual_clip_fraction", sums.dual_clipped, "tokens")] if dual_clip else []),
    ]


def entropy_term(entropy: Tensor, coef: float) -> Term:
    """Entropy is maximised, so the bonus is a negative loss."""
    if not coef:
        return Metric("entropy", entropy.detach().sum(), "tokens")
    return Loss("entropy", entropy.sum(), "tokens", -coef)
