"""The metrics of one iteration, over all ranks: scores, KL, the texts, and the critic if there is one."""

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from tetrad.distributed import collectives
from tetrad.distributed.device import Device
from tetrad.inference.completions import Completion
from tetrad.inference.text_metrics import response_metrics
from tetrad.objectives import ppo
from tetrad.objectives.calibration import spearman
from tetrad.rl.minibatches import PolicyBatch, PPOBatch
from tetrad.rl.rewards import mean_variance
from tetrad.rl.rollout import Rollout
from tetrad.settings.base import REWARD_MODEL
from tetrad.training.step import StepStats


def step_metrics(
    batch: PolicyBatch,
    beta: float,
    device: Device,
    train_score_p999: float = math.inf,
    judged: Mapping[str, Sequence[float]] | None = None,
) -> dict[str, float]:
    """Means over the responses of the iteration. kl: nats against the reference (k1, k3). train_score_p999: the
    score that a thousandth of the reward model's training responses exceed. judged: scores by other judges."""
    mask, scores = batch.rollout.mask_BT, batch.scores
    k1, k3 = (ppo.kl_tokens(batch.logprobs, batch.ref_logprobs, mask, kind) for kind in ("k1", "k3"))
    by_source = (
        {f"score_{name}": each for name, each in batch.source_scores.items()} if len(batch.source_scores) > 1 else {}
    )
    sums = {
        "score": float(scores.sum()),
        "ood_scores": float(sum(score > train_score_p999 for score in batch.source_scores.get(REWARD_MODEL, []))),
        "kl": float(k1.sum()),
        "kl_k3": float(k3.sum()),
        "reward": float(batch.rewards.sum()),
        **{name: math.fsum(values) for name, values in {**by_source, **(judged or {})}.items()},
    }
    total = collectives.sum_counts({**sums, "responses": float(len(scores))})
    responses = total.pop("responses")
    means = {name: value / responses for name, value in total.items()}
    gap = float((batch.logprobs - batch.rollout.sampler_logprobs_BT).abs()[mask].max())
    _, variance = mean_variance(scores, torch.ones_like(scores, dtype=torch.bool), device)
    return {
        **means,
        **texts_of_step(batch.rollout),
        "sampler_gap": max(collectives.all_gather(gap)),
        **(critic_metrics(batch, device) if isinstance(batch, PPOBatch) else {}),
        "score_std": float(variance) ** 0.5,
        "beta": beta,
    }


def texts_of_step(rollout: Rollout) -> dict[str, float]:
    """The responses of all ranks together: a share of different pairs is not a mean of shares."""
    own = [(sample.response_ids, sample.text, sample.finished, sample.valid_utf8) for sample in rollout.samples]
    gathered = collectives.gather(own)
    return response_metrics(
        [Completion((), tuple(ids), (), text, finished=end, valid_utf8=valid) for ids, text, end, valid in gathered]
    )


def critic_metrics(batch: PPOBatch, device: Device) -> dict[str, float]:
    """How much of the returns' variance the critic explains, and whether its last values rank responses as their scores
    do; undefined metrics are absent."""
    mask = batch.rollout.mask_BT
    mean, variance = mean_variance(batch.returns, mask, device)
    _, residual = mean_variance(batch.returns - batch.values, mask, device)
    last = batch.values.gather(1, mask.sum(1, keepdim=True) - 1)[:, 0]
    last, scores = (torch.tensor(collectives.gather(x.tolist())) for x in (last, batch.scores))
    metrics = {
        "explained_variance": float(ppo.explained_variance(mean, variance, residual)),
        "value_spearman": spearman(last, scores),
    }
    return {name: value for name, value in metrics.items() if math.isfinite(value)}


def group_metrics(scores: Tensor, size: int) -> dict[str, float]:
    """equal_groups: the share of prompts whose responses all have one score, so that nothing is learned from them.
    size: responses to a prompt."""
    groups = scores.view(-1, size)
    equal = float((groups.amax(1) == groups.amin(1)).sum())
    total = collectives.sum_counts({"equal": equal, "groups": float(len(groups))})
    return {"equal_groups": total["equal"] / total["groups"]}


def update_metrics(steps: Sequence[tuple[str, StepStats]]) -> dict[str, float]:
    """The means over all optimizer steps of an iteration, gradient norms by model; of ratio_max the largest."""
    values: dict[str, list[float]] = {}
    for who, stats in steps:
        for name, value in (*stats.terms.items(), (f"{who}_grad_norm", stats.grad_norm)):
            values.setdefault(name, []).append(value)
    metrics = {name: math.fsum(each) / len(each) for name, each in values.items()}
    most = {"ratio_max": max(values["ratio_max"])} if "ratio_max" in values else {}
    return metrics | most | {"actor_updates": float(sum(who == "actor" for who, _ in steps))}
