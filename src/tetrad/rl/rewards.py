"""From scores to token rewards: the KL coefficient, clip, penalty and scale of scores, and whitening over all ranks."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from tetrad.distributed import collectives
from tetrad.distributed.device import Device
from tetrad.objectives import ppo
from tetrad.rl.rollout import Rollout
from tetrad.settings.common import OnPolicy


@dataclass
class KLController:
    """beta, fixed, or following a target in nats per response (Ziegler et al. 2019, section 2.2)."""

    beta: float
    target: float
    horizon: float

    def update(self, kl: float, responses: int) -> None:
        if self.target:
            self.beta = ppo.adaptive_kl(self.beta, kl, responses, self.target, self.horizon)


@dataclass
class RunningStd:
    """The standard deviation of all scores so far, over ranks (Chan et al. 1979)."""

    count: float = 0.0
    mean: float = 0.0
    m2: float = 0.0

    def update(self, scores: Tensor, device: Device) -> float:
        """Adds these scores; returns the standard deviation of all so far, 1 where they are all equal."""
        every = torch.ones_like(scores, dtype=torch.bool)
        mean, variance = (float(x) for x in mean_variance(scores, every, device))
        n = float(collectives.sum_counts({"n": float(len(scores))})["n"])
        total, delta = self.count + n, mean - self.mean
        self.m2 += variance * n + delta * delta * self.count * n / total
        self.mean += delta * n / total
        self.count = total
        return math.sqrt(self.m2 / self.count) or 1.0

    def state(self) -> list[float]:
        return [self.count, self.mean, self.m2]

    def restore(self, saved: Sequence[float]) -> None:
        self.count, self.mean, self.m2 = saved


def token_rewards(
    s: OnPolicy, scores: Tensor, logprobs: Tensor, ref_logprobs: Tensor, rollout: Rollout, beta: float
) -> Tensor:
    """-beta (log pi - log pi_ref) at each token; at the last also the score, clipped to `reward_clip`, minus
    `missing_eos_penalty` for a truncated response. Among several sources the reward model is clipped before its
    weight instead (`reward.sources`)."""
    clip = s.reward_clip if s.clips_sum and s.reward_clip else None
    scores = ppo.normalize_scores(scores, 0.0, 1.0, clip, ~rollout.finished_B, s.missing_eos_penalty)
    kl = ppo.kl_tokens(logprobs, ref_logprobs, rollout.mask_BT)
    return ppo.shape_rewards(scores, kl, rollout.mask_BT, beta)


def mean_variance(x: Tensor, mask: Tensor, device: Device) -> tuple[Tensor, Tensor]:
    """Over the masked values of all ranks, float64."""

    def summed(about: Tensor | float) -> Tensor:
        return collectives.sum_tensor(ppo.moments(x, mask, about).to(device.torch_device)).cpu()

    first, _ = ppo.mean_variance(summed(0.0))
    return ppo.mean_variance(summed(first), first)


def whitened(x: Tensor, mask: Tensor, device: Device, *, shift_mean: bool) -> Tensor:
    """(x - mean) / std, plus the mean again unless shift_mean, over the response tokens of the batch on all ranks."""
    return ppo.whiten(x, mask, *mean_variance(x, mask, device), shift_mean)
