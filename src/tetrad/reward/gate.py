"""The gate: is this reward model good enough to be optimised against?

It reads the metrics that the reward stage recorded. A failure has a reason that names the metric and its limit; a
model without any metrics neither passes nor fails, but PPO says so.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean, pstdev
from typing import Any

from tetrad.data.records import read_prompts
from tetrad.data.similarity import covered
from tetrad.distributed import collectives
from tetrad.errors import UserError
from tetrad.settings.base import REWARD_MODEL, model_pays
from tetrad.settings.reward import Gate
from tetrad.training.context import StageContext
from tetrad.training.stage import recorded_metrics
from tetrad.types import Prompt, lines


@dataclass(frozen=True)
class GateResult:
    """failures: one per metric beyond its limit. unknown: what was not measured."""

    failures: tuple[str, ...]
    unknown: tuple[str, ...]

    def __str__(self) -> str:
        outcome = "fail" if self.failures else "warn" if self.unknown else "pass"
        return "; ".join([f"gate: {outcome}", *self.failures, *self.unknown])


@dataclass(frozen=True)
class _Rule:
    """needs: names of metrics; fails: whether they do; reason: in words, with the metrics in that order."""

    what: str
    needs: tuple[str, ...]
    fails: Callable[..., bool]
    reason: str


_SCALE = _Rule(
    "scale on fresh replies",
    ("fresh_mean", "fresh_std"),
    lambda s, mean, std: abs(mean) > s.most_mean or not s.least_std <= std <= s.most_std,
    "fresh replies have mean {:+.2f} and standard deviation {:.2f}",
)
_RULES = (
    _Rule(
        "accuracy on pairs",
        ("pair_accuracy_low",),
        lambda s, low: low <= s.accuracy,
        "the accuracy on pairs may be as low as {:.3f}",
    ),
    _Rule("calibration", ("ece",), lambda s, ece: ece > s.ece, "the calibration error is {:.3f}"),
    _Rule(
        "length bias",
        ("length_accuracy", "pair_accuracy"),
        lambda s, length, accuracy: accuracy - length < s.length_margin,
        "length alone is right in {:.3f} of the pairs, the model in {:.3f}",
    ),
    _Rule(
        "correlation with length",
        ("length_correlation",),
        lambda s, correlation: abs(correlation) > s.length_correlation,
        "the reward follows the length of replies: rank correlation {:+.2f}",
    ),
    *(
        _Rule(
            f"accuracy where the better answer is {side}",
            (f"accuracy_{side}", f"accuracy_{side}_high"),
            lambda s, _, high: high < s.accuracy_by_length,
            f"where the better answer is {side}, {{:.3f}} of the pairs are in order, at most {{:.3f}}",
        )
        for side in ("longer", "shorter")
    ),
    *(
        _Rule(
            f"the probe {name!r}",
            (f"probe_{name}",),
            lambda s, shift: shift > s.probe_shift,
            f"{change} raises the reward by {{:.2f}} standard deviations",
        )
        for name, change in (
            ("padded", "padding an answer with empty words"),
            ("duplicated", "saying an answer twice"),
            ("phrase", "adding a polite phrase"),
        )
    ),
    _Rule(
        "spread of rewards",
        ("policy_std",),
        lambda s, std: std < s.least_raw_std,
        "the model hardly tells replies apart: before it was scaled, their rewards had a standard deviation of {:.2g}",
    ),
    _SCALE,
)
_COVERAGE = _Rule(
    "how near PPO's prompts are to the reward model's",
    ("prompts_far",),
    lambda s, far: far > s.prompts_far,
    "{:.0%} of PPO's prompts are unlike all that the reward model was trained on",
)


def apply(metrics: Mapping[str, Any], s: Gate, rules: Sequence[_Rule] = _RULES) -> GateResult:
    """metrics: of the reward stage."""
    failed, unknown = list[str](), list[str]()
    for rule in rules:
        values = [metrics[name] for name in rule.needs if name in metrics]
        if len(values) < len(rule.needs):
            unknown.append(f"{rule.what} was not measured")
        elif rule.fails(s, *values):
            failed.append(rule.reason.format(*values))
    return GateResult(tuple(failed), tuple(unknown))


def check(ctx: StageContext, folder: Path, prompts: Sequence[Prompt]) -> GateResult:
    """Before PPO on these prompts: reports what the gate finds, and returns it. Errors: E-NUM-GATE where it fails and
    `gate.strict` is set."""
    metrics = recorded_metrics(folder)
    if ctx.recipe.reward.data:
        known = read_prompts(ctx.files(ctx.recipe.reward.data))
        near = covered([lines(prompt.turns) for prompt in prompts], [lines(prompt.turns) for prompt in known])
        metrics |= {"prompts_far": near.far} if near else {}
    result = apply(metrics, ctx.recipe.gate, (*_RULES, _COVERAGE))
    if result.failures and ctx.recipe.gate.strict:
        hint = "train a better reward model, move the limit under [gate], or set gate.strict = false"
        raise UserError("E-NUM-GATE", "; ".join(result.failures), where=str(folder), hint=hint)
    ctx.console.say(f"ppo        {result}")
    return result


def before_ppo(ctx: StageContext, prompts: Sequence[Prompt]) -> tuple[str, ...]:
    """Why the reward model of this recipe fails, if it does and if PPO uses it. Errors: E-NUM-GATE."""
    return check(ctx, ctx.parents["reward"], prompts).failures if model_pays(ctx.recipe.ppo.rewards) else ()


def check_scale(ctx: StageContext, parts: Mapping[str, Sequence[float]]) -> None:
    """PPO's first responses are the SFT model's to PPO's own prompts: warns where the reward model's scores of them,
    normalised to mean 0 and standard deviation 1 on other prompts, are on another scale."""
    scores = collectives.gather(list(parts.get(REWARD_MODEL, [])))
    if len(scores) < 2:
        return
    result = apply({"fresh_mean": fmean(scores), "fresh_std": pstdev(scores)}, ctx.recipe.gate, (_SCALE,))
    if result.failures:
        ctx.console.say(f"warning    PPO's own prompts are on another scale of the reward model: {result.failures[0]}")
