"""The gate: is this reward model good enough to be optimised against?

It reads the metrics that the reward stage recorded. A failure has a reason that names the metric and its limit; a
model without any metrics neither passes nor fails, but the stage that uses it says so.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean, pstdev

from tetrad.data.records import read_prompts
from tetrad.data.similarity import covered
from tetrad.distributed import collectives
from tetrad.errors import UserError
from tetrad.reward.metrics import RewardMetrics
from tetrad.settings.base import REWARD_MODEL, uses_reward_model
from tetrad.settings.common import OnPolicy
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
class _Check:
    """values: metrics; fails: whether they are beyond the limit; reason: why, with the values in that order."""

    what: str
    values: tuple[float | None, ...]
    fails: Callable[..., bool]
    reason: str


def _accuracy_checks(m: RewardMetrics, s: Gate) -> Iterator[_Check]:
    """Against human judgements."""
    reason = "the accuracy on pairs may be as low as {:.3f}"
    yield _Check("accuracy on pairs", (m.pair_accuracy_low,), lambda low: low <= s.accuracy, reason)
    yield _Check("calibration", (m.ece,), lambda ece: ece > s.ece, "the calibration error is {:.3f}")
    reason = "length alone is right in {:.3f} of the pairs, the model in {:.3f}"
    both = (m.length_accuracy, m.pair_accuracy)
    yield _Check("length bias", both, lambda length, model: model - length < s.length_margin, reason)
    reason = "the reward follows the length of responses: rank correlation {:+.2f}"
    rho = m.length_correlation
    yield _Check("correlation with length", (rho,), lambda rho: abs(rho) > s.length_correlation, reason)
    for side, accuracy, high in (
        ("longer", m.accuracy_longer, m.accuracy_longer_high),
        ("shorter", m.accuracy_shorter, m.accuracy_shorter_high),
    ):
        where = f"where the better answer is {side}"
        reason = f"{where}, {{:.3f}} of the pairs are in order, at most {{:.3f}}"
        yield _Check(f"accuracy {where}", (accuracy, high), lambda _, high: high < s.accuracy_by_length, reason)


def _reward_checks(m: RewardMetrics, s: Gate) -> Iterator[_Check]:
    """Of the rewards themselves."""
    for name, shift, change in (
        ("padded", m.probe_padded, "padding an answer with empty words"),
        ("duplicated", m.probe_duplicated, "saying an answer twice"),
        ("phrase", m.probe_phrase, "adding a polite phrase"),
    ):
        reason = f"{change} raises the reward by {{:.2f}} standard deviations"
        yield _Check(f"the probe {name!r}", (shift,), lambda shift: shift > s.probe_shift, reason)
    hardly = "the model hardly tells responses apart: before it was scaled, their rewards had a standard deviation of"
    yield _Check(
        "standard deviation of rewards", (m.policy_std,), lambda std: std < s.least_raw_std, f"{hardly} {{:.2g}}"
    )
    yield _scale_check(m.fresh_mean, m.fresh_std, s)


def _scale_check(mean: float | None, std: float | None, s: Gate) -> _Check:
    def fails(mean: float, std: float) -> bool:
        return abs(mean) > s.most_mean or not s.least_std <= std <= s.most_std

    reason = "fresh responses have mean {:+.2f} and standard deviation {:.2f}"
    return _Check("scale on fresh responses", (mean, std), fails, reason)


def _coverage_check(far: float | None, s: Gate) -> _Check:
    reason = "{:.0%} of the prompts are unlike all that the reward model was trained on"
    return _Check("how near the prompts are to the reward model's", (far,), lambda far: far > s.prompts_far, reason)


def _result(checks: Sequence[_Check]) -> GateResult:
    known = [check for check in checks if None not in check.values]
    failures = (check.reason.format(*check.values) for check in known if check.fails(*check.values))
    return GateResult(tuple(failures), tuple(f"{c.what} was not measured" for c in checks if None in c.values))


def apply(metrics: RewardMetrics, s: Gate, *further: _Check) -> GateResult:
    """metrics: of the reward stage."""
    return _result([*_accuracy_checks(metrics, s), *_reward_checks(metrics, s), *further])


def check(ctx: StageContext, folder: Path, prompts: Sequence[Prompt]) -> GateResult:
    """Before a policy is trained on these prompts: reports what the gate finds, and returns it. Errors: E-NUM-GATE
    where it fails and `gate.strict` is set."""
    s, near = ctx.recipe.gate, None
    if ctx.recipe.reward.data:
        known = read_prompts(ctx.files(ctx.recipe.reward.data))
        near = covered([lines(prompt.turns) for prompt in prompts], [lines(prompt.turns) for prompt in known])
    result = apply(recorded(folder), s, _coverage_check(near.far if near else None, s))
    if result.failures and s.strict:
        hint = "train a better reward model, move the limit under [gate], or set gate.strict = false"
        raise UserError("E-NUM-GATE", "; ".join(result.failures), where=str(folder), hint=hint)
    ctx.console.say(f"{ctx.folder.name:<10} {result}")
    return result


def recorded(folder: Path) -> RewardMetrics:
    """The metrics of a reward model, from its manifest."""
    return RewardMetrics.read(recorded_metrics(folder))


def before_training(ctx: StageContext, s: OnPolicy, prompts: Sequence[Prompt]) -> tuple[str, ...]:
    """Why the reward model of this recipe fails, if it does and if the stage uses it. Errors: E-NUM-GATE."""
    return check(ctx, ctx.parents["reward"], prompts).failures if uses_reward_model(s.rewards) else ()


def warn_of_scale(ctx: StageContext, source_scores: Mapping[str, Sequence[float]]) -> None:
    """The first responses are the SFT model's to the stage's own prompts: warns where the reward model's scores of
    them, normalised to mean 0 and standard deviation 1 on other prompts, are on another scale. source_scores: by
    source."""
    scores = collectives.gather(list(source_scores.get(REWARD_MODEL, [])))
    if len(scores) < 2:
        return
    result = _result([_scale_check(fmean(scores), pstdev(scores), ctx.recipe.gate)])
    if result.failures:
        ctx.console.say(f"warning    these prompts are on another scale of the reward model: {result.failures[0]}")
