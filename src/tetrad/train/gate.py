"""The gate: is this reward model good enough to be optimised against?

It reads what the reward stage noted about its model. A failure has a reason that names the figure and its limit; a
model of which nothing was measured is neither passed nor failed, but PPO says so.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tetrad.engine.context import StageContext
from tetrad.engine.stage import figures_of
from tetrad.errors import UserError
from tetrad.settings.gate import Gate


@dataclass(frozen=True)
class Verdict:
    """outcome: "pass", "warn" where something could not be judged, "fail". reasons: one a failed or missing figure."""

    outcome: str
    reasons: tuple[str, ...]

    def __str__(self) -> str:
        return f"gate: {self.outcome}" + "".join(f"; {reason}" for reason in self.reasons)


@dataclass(frozen=True)
class _Rule:
    """needs: names of figures; fails: whether they do; reason: in words, with the figures in their order."""

    what: str
    needs: tuple[str, ...]
    fails: Callable[..., bool]
    reason: str


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
    _Rule(
        "scale on fresh replies",
        ("fresh_mean", "fresh_std"),
        lambda s, mean, std: abs(mean) > s.most_mean or not s.least_std <= std <= s.most_std,
        "fresh replies have mean {:+.2f} and standard deviation {:.2f}",
    ),
)


def verdict(figures: Mapping[str, Any], s: Gate) -> Verdict:
    """figures: of the reward stage."""
    failed, unknown = list[str](), list[str]()
    for rule in _RULES:
        values = [figures[name] for name in rule.needs if name in figures]
        if len(values) < len(rule.needs):
            unknown.append(f"{rule.what} was not measured")
        elif rule.fails(s, *values):
            failed.append(rule.reason.format(*values))
    return Verdict("fail" if failed else "warn" if unknown else "pass", (*failed, *unknown))


def heed(ctx: StageContext, folder: Path) -> None:
    """Before PPO: says what the gate finds. Errors: E-NUM-GATE where it fails and `gate.strict` is set."""
    found = verdict(figures_of(folder), ctx.recipe.gate)
    if found.outcome == "fail" and ctx.recipe.gate.strict:
        hint = "train a better reward model, move the limit under [gate], or set gate.strict = false"
        raise UserError("E-NUM-GATE", "; ".join(found.reasons), where=str(folder), hint=hint)
    ctx.console.say(f"ppo        {found}")
