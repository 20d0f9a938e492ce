"""Whether to trust the result of a run, and which of its models to use: pure functions of the measurements.

Only judges that were not PPO's reward decide. A failed gate, an alarm at its second limit or a guard of the evaluation
outweighs any gain. Intervals are Student's t of differences paired by prompt: on few prompts the bootstrap's are too
narrow. With several judges the gain must hold at the level of all together (Bonferroni), and none may fall.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from statistics import NormalDist, fmean, stdev
from typing import Any

from tetrad.settings.evaluate import Evaluate
from tetrad.settings.names import shown
from tetrad.stages import ALIGNED

SFT, PPO = "sft", "ppo"
FEWEST_PROMPTS = 8  # the mean of fewer differences may be far from normal
LEVEL = 0.05  # probability of a false difference
UNTRUSTED = "not to be trusted"


@dataclass(frozen=True)
class AlarmSpan:
    """An alarm of PPO. level: 2 at the second limit. first, last: steps at which it was raised."""

    figure: str
    level: int
    first: int
    last: int


@dataclass(frozen=True)
class Difference:
    """The mean of differences paired by prompt, its standard error, the number of prompts."""

    mean: float
    error: float
    count: int

    @classmethod
    def of(cls, scores: Sequence[float], others: Sequence[float]) -> "Difference":
        """scores minus others, prompt by prompt."""
        pairs = [a - b for a, b in zip(scores, others, strict=True)]
        return cls(fmean(pairs), stdev(pairs) / math.sqrt(len(pairs)) if len(pairs) > 1 else 0.0, len(pairs))

    def interval(self, judges: int = 1) -> tuple[float, float]:
        """The 95 % interval for this many judges together; unbounded for fewer than FEWEST_PROMPTS."""
        if self.count < FEWEST_PROMPTS:
            return -math.inf, math.inf
        width = self.error * t_quantile(1 - LEVEL / judges / 2, self.count - 1)
        return self.mean - width, self.mean + width


Differences = Mapping[str, Difference]
"""By judge."""


@dataclass(frozen=True)
class Verdict:
    """outcome: "PPO is better", "no difference shown", "not to be trusted", "not evaluated". use: the system to use and
    what it costs; empty if nothing was evaluated. reasons: the grounds for it. methods: each trained policy against SFT
    and best-of-N, and the cheapest of those that are not shown to be worse."""

    outcome: str
    use: str
    reasons: tuple[str, ...]
    methods: tuple[str, ...] = ()

    @classmethod
    def read(cls, record: Mapping[str, Any]) -> "Verdict":
        """From report.json."""
        lists = {name: tuple(value) for name, value in record.items() if isinstance(value, list)}
        return cls(**{**record, **lists})

    def __str__(self) -> str:
        return self.outcome + (f": use {self.use}" if self.use else "")

    def lines(self) -> list[str]:
        """For the terminal: the reasons, the methods, and the verdict as the last line."""
        methods = [f"method     {method}" for method in self.methods]
        return [*(f"because    {reason}" for reason in self.reasons), *methods, f"verdict    {self}"]


def verdict(
    faults: Sequence[str], guards: Mapping[str, Sequence[str]], gains: Mapping[tuple[str, str], Differences]
) -> Verdict | None:
    """faults: of the gate and of PPO's alarms. guards: those that each system failed; SFT's first, those of the system
    in question last. gains: of each system over every other. None if there is only the SFT model."""
    subject, best = list(guards)[-1], next((name for name in guards if name not in (SFT, PPO)), SFT)
    if subject == SFT:
        return None
    own, usable = gains[subject, SFT], best not in (SFT, subject) and not guards[best]
    reasons = [*faults, *(f"{name_of(subject)}: {guard}" for guard in guards[subject])]
    reasons += [f"the judges put {name_of(subject)} below SFT"] if is_better(gains[SFT, subject]) else []
    better = not reasons and is_better(own)
    outcome = UNTRUSTED if reasons else f"{name_of(subject)} is better" if better else "no difference shown"
    reasons += ["the judges disagree"] if not better and _rises(own) and _rises(gains[SFT, subject], alone=True) else []
    second = subject if better else SFT
    use = best if usable and is_better(gains[best, second]) else second
    reasons += _evidence(own, subject, SFT) + (_evidence(gains[best, second], best, second) if use != second else [])
    return Verdict(outcome, name_of(use) + cost_of_answer(use), tuple(reasons))


def unevaluated(faults: Sequence[str], hint: str) -> Verdict:
    """PPO's verdict before its evaluation. hint: what to do about that."""
    return Verdict(UNTRUSTED if faults else "not evaluated", "SFT" if faults else "", (*faults, hint))


def is_better(gain: Differences) -> bool:
    """Whether the gain is above 0 for a judge, at the level of all together, and below 0 for none, each at its own."""
    return _rises(gain) and not any(difference.interval()[1] < 0 for difference in gain.values())


@dataclass(frozen=True)
class SystemMetrics:
    """Of a system's responses. kl: nats a response against SFT's. external_nll: None without such a model."""

    kl: float
    length: float
    finished: float
    distinct_2: float
    commonest_word: float
    external_nll: float | None = None

    @classmethod
    def read(cls, metrics: Mapping[str, Any]) -> "SystemMetrics":
        """From a system's metrics in report.json."""
        return cls(**{f.name: metrics[f.name] for f in fields(cls) if f.name in metrics})


def failed_guards(system: SystemMetrics, sft: SystemMetrics, s: Evaluate) -> list[str]:
    """What counts against a system whatever its scores, as text."""
    shortest, longest = s.length_range
    most_common = sft.commonest_word + s.max_common_word
    most_nll = math.inf if sft.external_nll is None else sft.external_nll + math.log(s.max_perplexity)
    bounds = (
        ("kl", system.kl, sft.kl, -math.inf, s.max_kl, "max_kl"),
        ("length", system.length, sft.length, shortest * sft.length, longest * sft.length, "length_range"),
        ("finished", system.finished, sft.finished, s.min_finished * sft.finished, math.inf, "min_finished"),
        (
            "distinct_2",
            system.distinct_2,
            sft.distinct_2,
            s.min_distinct_2 * sft.distinct_2,
            math.inf,
            "min_distinct_2",
        ),
        ("commonest_word", system.commonest_word, sft.commonest_word, 0.0, most_common, "max_common_word"),
        ("external_nll", system.external_nll, sft.external_nll, -math.inf, most_nll, "max_perplexity"),
    )
    return [
        f"{name} is {value:.3g}, SFT's {own:.3g} (evaluate.{setting} = {shown(getattr(s, setting))})"
        for name, value, own, low, high, setting in bounds
        if value is not None and not low <= value <= high
    ]


def t_quantile(share: float, freedom: int) -> float:
    """Student's t below which this share lies, by its expansion around the normal quantile (Abramowitz and Stegun
    26.7.5); from 7 degrees of freedom accurate to 1 in 1,000 for shares up to 0.999."""
    z, v = NormalDist().inv_cdf(share), freedom
    third = (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / 384
    fourth = (79 * z**9 + 776 * z**7 + 1482 * z**5 - 1920 * z**3 - 945 * z) / 92160
    return z + (z**3 + z) / (4 * v) + (5 * z**5 + 16 * z**3 + 3 * z) / (96 * v**2) + third / v**3 + fourth / v**4


def _rises(gain: Differences, *, alone: bool = False) -> bool:
    """Whether any judge rises, at the level of all together or (alone) at its own."""
    return any(difference.interval(1 if alone else len(gain))[0] > 0 for difference in gain.values())


def _evidence(gain: Differences, system: str, other: str) -> list[str]:
    """Each judge's difference with its interval, for all judges together."""
    prompts = next((difference.count for difference in gain.values()), FEWEST_PROMPTS)
    if not gain:
        return ["no independent judge: add one to evaluate.judges, by which PPO is not paid"]
    if prompts < FEWEST_PROMPTS:
        return [f"{prompts} prompts are too few to tell systems apart, {FEWEST_PROMPTS} are the least"]
    rows = [(judge, difference.mean, *difference.interval(len(gain))) for judge, difference in gain.items()]
    words = f"{name_of(system)} less {name_of(other)}"
    return [f"{judge}: {words} is {mean:+.2f} [{low:+.2f}, {high:+.2f}]" for judge, mean, low, high in rows]


def name_of(system: str) -> str:
    """As it is written for people: roles of this recipe in capitals."""
    return system.upper() if system in (SFT, *ALIGNED) else system


def cost_of_answer(system: str) -> str:
    """What an answer of best-of-N takes, in parentheses; empty for other systems."""
    copies = system.removeprefix("best of ")
    return f" (an answer costs {copies} responses and their rewards)" if copies != system else ""
