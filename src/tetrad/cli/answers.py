"""Which of Tetrad's functions computes each name of a file of known answers (`known_answers` reads it).

Each takes the file's inputs by name and returns its outputs by name. What is checked is what training uses: chunked
heads, sums over tokens and ranks.
"""

import math
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from tetrad.data.pack import pack
from tetrad.model.attention import Plan, packed_attention, plan_for
from tetrad.objectives import calibration, dpo, grpo, language, ppo, preference
from tetrad.types import IGNORE, Tokens

Inputs = Mapping[str, Any]
AnswerFunction = Callable[[Inputs], dict[str, Tensor]]


def _next_logprobs(x: Inputs) -> dict[str, Tensor]:
    """Of each token from the logits before it."""
    mask = x["mask"][:, 1:]
    logprobs = torch.zeros(mask.shape, dtype=x["logits"].dtype)
    rows, targets = x["logits"][:, :-1][mask], x["ids"][:, 1:][mask]
    logprobs[mask] = language.token_logprobs(rows, _identity(rows), targets, x["temperature"], 3, entropy=False)[0]
    return {"logp": logprobs, "mask": mask}


def _entropy(x: Inputs) -> dict[str, Tensor]:
    entropies, rows = torch.zeros(x["mask"].shape, dtype=x["logits"].dtype), x["logits"][x["mask"]]
    targets = torch.zeros(len(rows), dtype=torch.int64)
    entropies[x["mask"]] = language.token_logprobs(rows, _identity(rows), targets, x["temperature"], chunk=3)[1]
    return {"entropy": entropies}


def _sft_loss(x: Inputs) -> dict[str, Tensor]:
    """Each row's sum, divided as the training step does: one count for all, or each row's own."""
    mask = x["loss_mask"][:, 1:]
    identity = _identity(x["logits"])
    sums = [
        language.nll_sum(logits[here], identity, ids[here], chunk=3)
        for logits, ids, here in zip(x["logits"][:, :-1], x["ids"][:, 1:], mask, strict=True)
    ]
    counts = mask.sum(1)
    _some(mask[mask])
    if x["how"] == "token":
        return {"loss": torch.stack(sums).sum() / counts.sum()}
    return {"loss": (torch.stack(sums) / counts.clamp(min=1)).sum() / (counts > 0).sum()}


def _adaptive_kl(x: Inputs) -> dict[str, Tensor]:
    kl = float(torch.where(x["mask"], x["kl_tok"], 0).sum(1).mean())
    beta, betas = x["beta"], []
    for factor in x["multiply_kl_by"].tolist():
        beta = ppo.adaptive_kl(beta, kl * factor, len(x["kl_tok"]), x["target"], x["horizon"])
        betas.append(beta)
    return {"betas": torch.tensor(betas, dtype=torch.float64)}


def _gae(x: Inputs) -> dict[str, Tensor]:
    advantages, returns = ppo.gae(x["rewards"], x["values"], x["mask"], x["gamma"], x["lam"], x.get("bootstrap"))
    return {"advantages": advantages, "returns": returns}


def _whiten(x: Inputs) -> dict[str, Tensor]:
    """As on two ranks: their moments are summed twice, the second time about the mean."""
    sides = [(x["x"][part::2], x["mask"][part::2]) for part in (0, 1)]
    mean, _ = ppo.mean_variance(sum((ppo.moments(*side) for side in sides), torch.zeros(3)))
    total = sum((ppo.moments(*side, mean) for side in sides), torch.zeros(3))
    known = ppo.mean_variance(total, mean, x["unbiased"])
    return {"whitened": ppo.whiten(x["x"], x["mask"], *known, x["shift_mean"])}


def _explained_variance(x: Inputs) -> dict[str, Tensor]:
    def mean_variance(values: Tensor) -> tuple[Tensor, Tensor]:
        mean, _ = ppo.mean_variance(ppo.moments(values, x["mask"]))
        return ppo.mean_variance(ppo.moments(values, x["mask"], mean), mean)

    _, residual = mean_variance(x["returns"] - x["values"])
    return {"ev": ppo.explained_variance(*mean_variance(x["returns"]), residual)}


def _paired(first: Tensor, second: Tensor, weight: float = 0.0) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Rewards, the first of each pair, the second, and their weights; by default those of a mean."""
    n = len(_some(first))
    weights = torch.full((n,), weight or 1 / n, dtype=torch.float64)
    return torch.cat([first, second]), torch.arange(n), torch.arange(n, 2 * n), weights


def _bt_loss(x: Inputs) -> dict[str, Tensor]:
    """smoothing: a label of 1 - smoothing."""
    if unknown := x.keys() - {"chosen", "rejected", "margin", "label", "smoothing"}:
        raise ValueError(f"unknown inputs {', '.join(sorted(unknown))}")
    chosen, label, smoothing = x["chosen"], x.get("label"), x.get("smoothing")
    if smoothing is not None and label is not None:
        raise ValueError("smoothing and label both set the target")
    if smoothing is not None:
        label = torch.full_like(chosen, 1 - smoothing)
    return {"loss": preference.pair_loss_sum(*_paired(chosen, x["rejected"]), x.get("margin"), label)}


def _kwise_loss(x: Inputs) -> dict[str, Tensor]:
    winners, losers, weights = preference.pairs_of(x["ranks"], (0, len(x["ranks"])), x["ties"])
    return {"loss": preference.pair_loss_sum(x["scores"], _some(winners), losers, weights)}


def _plackett_luce_loss(x: Inputs) -> dict[str, Tensor]:
    return {"loss": preference.plackett_luce_losses(x["scores"], x["ranks"], (0, len(x["ranks"])), x["ties"])[0]}


def _score_regression(x: Inputs) -> dict[str, Tensor]:
    if not x["lo"] < x["hi"]:
        raise ValueError(f"a scale must rise: {x['lo']} to {x['hi']}")
    share = (x["target"] - x["lo"]) / (x["hi"] - x["lo"])
    return {"loss": preference.score_losses(_some(x["pred"]), share, x["kind"]).mean()}


def _center_penalty(x: Inputs) -> dict[str, Tensor]:
    """Of pairs; `square` is that of each reward with one that is 0."""
    first, second = x["chosen"], x["rejected"]
    if x["kind"] == "square":
        first = torch.cat([first, second])
        second = torch.zeros_like(first)
    return {"loss": x["coef"] * preference.center_loss_sum(*_paired(first, second))}


def _crowd_bt_loss(x: Inputs) -> dict[str, Tensor]:
    """The prior is `lam` wins and as many defeats of every item against one whose reward is 0."""
    s, answers = x["s"], len(x["i"])
    losses = preference.crowd_pair_losses(s[x["i"]] - s[x["j"]], x["eta"][x["k"]].logit())
    pairs = _paired(s, torch.zeros_like(s), 2 * x["lam"])
    prior = preference.pair_loss_sum(*pairs, labels_P=torch.full_like(s, 0.5))
    return {"loss": (losses.sum() + prior) / answers}


def _dpo_loss(x: Inputs) -> dict[str, Tensor]:
    chosen, rejected = (dpo.implicit_rewards(x[side], x[f"ref_{side}"], x["beta"]) for side in ("chosen", "rejected"))
    pairs, labels = _paired(chosen, rejected), torch.full_like(chosen, 1 - x["smoothing"])
    if x["kind"] == "ipo":
        loss = dpo.ipo_loss_sum(*pairs, labels, x["beta"])
    else:
        loss = preference.pair_loss_sum(*pairs, labels_P=labels)
    stats = {"reward_chosen": chosen, "reward_rejected": rejected, "accuracy": dpo.pair_sums(*pairs)[0]}
    return {"loss": loss} | {f"stats.{name}": value for name, value in stats.items()}


def _tokens(x: Inputs) -> tuple[Tensor, Tensor, float]:
    """The mask, each token's weight, and what the sum of losses is divided by: tokens, or rows of each row's mean."""
    mask, lengths = x["mask"], x["mask"].sum(1, keepdim=True)
    if x["how"] == "token":
        return mask, torch.ones(len(_some(mask[mask]))), float(mask.sum())
    return mask, (1 / lengths.double()).expand(mask.shape)[mask], float((lengths > 0).sum())


def _policy_loss(x: Inputs) -> dict[str, Tensor]:
    mask, weights, count = _tokens(x)
    new, old, advantages = (x[name][mask] for name in ("logp", "old_logp", "adv"))
    sums = ppo.policy_loss_sum(new, old, advantages, x["eps_low"], x["eps_high"], x.get("dual_clip"), weights)
    stats = {
        "clipfrac": sums.clipped,
        "approx_kl": sums.half_square,
        "approx_kl_k1": ppo.kl_tokens(old, new, torch.ones_like(old, dtype=torch.bool), "k1").sum(),
        "approx_kl_k3": ppo.kl_tokens(old, new, torch.ones_like(old, dtype=torch.bool), "k3").sum(),
        "ratio_mean": sums.ratio,
        "dual_clipfrac": sums.dual_clipped,
    }
    return {"loss": sums.loss / count} | {f"stats.{name}": total / mask.sum() for name, total in stats.items()}


def _value_loss(x: Inputs) -> dict[str, Tensor]:
    mask, weights, count = _tokens(x)
    values, old, returns = (x[name][mask] for name in ("values", "old_values", "returns"))
    sums = ppo.value_loss_sum(values, old, returns, x["clip"], weights)
    return {"loss": sums.loss / count, "clipfrac": sums.clipped / mask.sum()}


def _group_advantages(x: Inputs) -> dict[str, Tensor]:
    kinds: dict[str, grpo.Advantage] = {"rloo": "leave_one_out", "grpo": "normalised", "centred": "centred"}
    return {
        "advantages": grpo.group_advantages(x["scores"], x["groups"], kinds[x["kind"]], x["eps"], x["unbiased"]),
    }


def _grpo_loss(x: Inputs) -> dict[str, Tensor]:
    """`how` has a further kind, constant: what would be the longest rows are what the sum is divided by."""
    mask = x["mask"]
    mask, weights, count = _tokens({**x, "how": "token"} if x["how"] == "constant" else x)
    count = len(mask) * x["length"] if x["how"] == "constant" else count
    new, old, ref = (x[name][mask] for name in ("logp", "old_logp", "ref_logp"))
    advantages = x["advantages"][:, None].expand(mask.shape)[mask]
    sums = ppo.policy_loss_sum(new, old, advantages, x["eps_low"], x["eps_high"], None, weights)
    kl = grpo.kl_loss_sum(new, ref, "k3", weights)
    plain = grpo.kl_loss_sum(new, ref, "k3")
    return {
        "loss": (sums.loss + x["beta"] * kl) / count,
        "stats.kl": plain / mask.sum(),
        "stats.clipfrac": sums.clipped / mask.sum(),
    }


def _attended(queries: Tensor, keys: Tensor, values: Tensor, plan: Plan) -> Tensor:
    """One head, in the width of the widest, as models have only one: zeros change only the scale of the scores."""
    own, wide = queries.shape[1], max(queries.shape[1], values.shape[1])
    queries, keys, padded = (torch.nn.functional.pad(x, (0, wide - x.shape[1])) for x in (queries, keys, values))
    scaled = queries * math.sqrt(wide / own)
    return packed_attention(scaled[:, None], keys[:, None], padded[:, None], plan)[:, 0, : values.shape[1]]


def _pack(x: Inputs) -> dict[str, Tensor]:
    """A file pads its rows with id 0 and document -1; Tetrad's have no padding, so it is added to compare."""
    pieces = np.split(x["flat"].numpy(), np.cumsum(x["lengths"].numpy())[:-1])
    packed = pack([Tokens(ids, np.ones(len(ids), dtype=bool)) for ids in pieces])
    ids, positions = torch.from_numpy(packed.ids_T), torch.from_numpy(packed.positions_T)
    targets = torch.from_numpy(packed.targets_T)
    size, room = len(ids), x["row_length"] - len(ids)
    state = x["par_tok"][ids] + x["par_pos"][positions]
    queries, keys, values = (state @ x[f"par_{name}"] for name in "qkv")
    plan = plan_for(packed.bounds, torch.device("cpu"))
    weights, mixed = (_attended(queries, keys, x, plan) for x in (torch.eye(size, dtype=values.dtype), values))
    logits = (state + mixed) @ x["par_out"]
    real = targets != IGNORE
    documents = torch.arange(len(pieces)).repeat_interleave(x["lengths"])
    pad = torch.nn.functional.pad
    return {
        "ids": pad(ids, (0, room)),
        "position_ids": pad(positions, (0, room)),
        "doc_ids": pad(documents, (0, room), value=-1),
        "allowed": pad(weights > 0, (0, room, 0, room)),
        "loss_mask": pad(real, (1, room))[: x["row_length"]],
        "logits": pad(logits, (0, 0, 0, room)),
        "sft_loss": language.nll_sum(logits[real], _identity(logits), targets[real]) / real.sum(),
    }


def _some(values: Tensor) -> Tensor:
    """Raises ValueError for none: their mean is undefined."""
    if not len(values):
        raise ValueError("no values: their mean is undefined")
    return values


def _identity(logits: Tensor) -> Tensor:
    """The head under which hidden states are their own logits."""
    return torch.eye(logits.shape[-1], dtype=logits.dtype)


def _direct(output: str, function: Callable[..., Tensor], names: str) -> AnswerFunction:
    """For a function with the file's inputs in this order and one output."""
    return lambda x: {output: function(*(x[name] for name in names.split()))}


ANSWERS: dict[str, AnswerFunction] = {
    "next_logprobs": _next_logprobs,
    "entropy": _entropy,
    "sft_loss": _sft_loss,
    "kl_tokens": _direct("kl", ppo.kl_tokens, "logp ref_logp mask kind"),
    "adaptive_kl": _adaptive_kl,
    "normalize_scores": _direct("scores", ppo.normalize_scores, "scores mean std clip missing_eos eos_penalty"),
    "shape_rewards": _direct("rewards", ppo.shape_rewards, "scores kl_tok mask beta"),
    "gae": _gae,
    "whiten": _whiten,
    "explained_variance": _explained_variance,
    "policy_loss": _policy_loss,
    "value_loss": _value_loss,
    "bt_loss": _bt_loss,
    "plackett_luce_loss": _plackett_luce_loss,
    "kwise_loss": _kwise_loss,
    "score_regression": _score_regression,
    "center_penalty": _center_penalty,
    "crowd_bt_loss": _crowd_bt_loss,
    "dpo_loss": _dpo_loss,
    "ece": _direct("ece", calibration.ece, "confidence correct bins"),
    "group_advantages": _group_advantages,
    "grpo_loss": _grpo_loss,
    "pack": _pack,
}
