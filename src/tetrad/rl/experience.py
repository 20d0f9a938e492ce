"""What an iteration of PPO learns from, and how it is dealt out: whitening over all ranks, epochs of mini-batches."""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from tetrad.data.loader import micro_batches
from tetrad.data.pack import pack
from tetrad.distributed import collectives
from tetrad.distributed.device import Device
from tetrad.objectives import ppo
from tetrad.rl.rollout import Rollout
from tetrad.seeds import generator_for
from tetrad.settings.ppo import Ppo
from tetrad.training.step import Microbatch


@dataclass(frozen=True)
class PPOBatch:
    """One iteration's replies as the models read them; [B, T] and on the CPU but for scores and after, [B]. parts: what
    each source of the score said; old, ref: log-probabilities of actor and reference; after: the value of what comes
    after the last token, 0 where nothing does."""

    rollout: Rollout
    parts: Mapping[str, Sequence[float]]
    scores: Tensor
    old: Tensor
    ref: Tensor
    values: Tensor
    after: Tensor
    rewards: Tensor
    advantages: Tensor
    returns: Tensor


@dataclass(frozen=True)
class PPOTokens:
    """The same for the N reply tokens of a micro-batch, on the device. weights: of each token's loss."""

    old: Tensor
    values: Tensor
    advantages: Tensor
    returns: Tensor
    weights: Tensor


@dataclass
class RunningStd:
    """The spread of all scores so far, over ranks (Chan et al. 1979)."""

    count: float = 0.0
    mean: float = 0.0
    squares: float = 0.0

    def follow(self, scores: Tensor, device: Device) -> float:
        """Takes these in; returns the standard deviation of all, 1 where they are all alike."""
        every = torch.ones_like(scores, dtype=torch.bool)
        mean, variance = (float(x) for x in mean_variance(scores, every, device))
        n = float(collectives.sum_counts({"n": float(len(scores))})["n"])
        total, apart = self.count + n, mean - self.mean
        self.squares += variance * n + apart * apart * self.count * n / total
        self.mean += apart * n / total
        self.count = total
        return math.sqrt(self.squares / self.count) or 1.0

    def state(self) -> list[float]:
        return [self.count, self.mean, self.squares]

    def restore(self, saved: Sequence[float]) -> None:
        self.count, self.mean, self.squares = saved


def mean_variance(x: Tensor, mask: Tensor, device: Device) -> tuple[Tensor, Tensor]:
    """Over the masked values of all ranks, float64."""

    def summed(about: Tensor | float) -> Tensor:
        return collectives.sum_tensor(ppo.moments(x, mask, about).to(device.place)).cpu()

    first, _ = ppo.mean_variance(summed(0.0))
    return ppo.mean_variance(summed(first), first)


def whitened(x: Tensor, mask: Tensor, device: Device, *, shift_mean: bool) -> Tensor:
    """Over the reply tokens of the whole batch on all ranks."""
    return ppo.whiten(x, mask, shift_mean, mean_and_variance=mean_variance(x, mask, device))


def numbers_of(prompts: int, replies: int) -> list[int]:
    """The places of this rank's replies in the whole batch: the replies to one prompt stand together."""
    return [n * replies + k for n in collectives.share(range(prompts)) for k in range(replies)]


def mini_batches(
    experience: PPOBatch, s: Ppo, key: tuple[int, int], micro_tokens: int, device: Device
) -> Iterator[list[Microbatch]]:
    """Each epoch's batch in a fresh permutation, in `mini_batches` equal parts; this rank's rows as micro-batches."""
    rollout = experience.rollout
    batch = len(rollout.documents) * collectives.size()
    row_of = {number: row for row, number in enumerate(numbers_of(batch // s.replies, s.replies))}
    for epoch in range(s.epochs):
        shuffled = generator_for(key[0], "mini-batches", key[1], epoch).permutation(batch)
        for part in range(s.mini_batches):
            chosen = sorted(row_of[n] for n in shuffled[part :: s.mini_batches].tolist() if n in row_of)
            groups = micro_batches([rollout.documents[i] for i in chosen], micro_tokens)
            yield [_micro(experience, [chosen[i] for i in group], s, device) for group in groups]


def _micro(experience: PPOBatch, rows: Sequence[int], s: Ppo, device: Device) -> Microbatch:
    """Its count "losses" is what a batch's losses are divided by: tokens, or replies."""
    rollout, index = experience.rollout, torch.tensor(rows)
    mask = rollout.mask_BT[index]
    arrays = (experience.old, experience.values, experience.advantages, experience.returns)
    weights = mask / mask.sum(1, keepdim=True) if s.reduction == "sequence" else mask.float()
    replies = PPOTokens(*(x[mask].to(device.place) for x in (*(x[index] for x in arrays), weights)))
    packed = device.put(pack([rollout.documents[i] for i in rows]))
    tokens = float(mask.sum())
    return Microbatch(packed, {"tokens": tokens, "losses": len(rows) if s.reduction == "sequence" else tokens}, replies)
