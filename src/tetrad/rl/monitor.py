"""Alarms: what the metrics look like when a policy hacks its reward or fails, and what to do about it.

Every iteration is checked against limits, most of them relative to the first iterations: a policy that exploits its
reward changes length, endings, diversity or entropy long before anybody reads its texts.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import astuple, dataclass
from typing import Any

from tetrad.distributed import collectives
from tetrad.errors import UserError
from tetrad.report import outcome
from tetrad.report.verdict import AlarmSpan
from tetrad.reward.functions import python_function
from tetrad.reward.model import Reward
from tetrad.reward.sources import named
from tetrad.settings.base import uses_reward_model
from tetrad.settings.ppo import Alarms, Ppo
from tetrad.stages import Recipe
from tetrad.storage import Json
from tetrad.training.context import StageContext
from tetrad.training.step import timed

START, RECENT = 128, 192  # responses averaged for the start, and to compare with it: single lengths vary
WINDOW = 10  # iterations whose means are compared between score and judges


@dataclass(frozen=True)
class _Rule:
    """metric: its name, and that of its limits; above: whether high values are bad; relative: to the start; meaning:
    what it is a sign of, {0} being the stage; rare: a share too small to estimate from one iteration's responses."""

    metric: str
    above: bool
    relative: bool
    meaning: str
    rare: bool = False


_RULES = (
    _Rule("kl", True, False, "the actor is far from the reference: raise {0}.kl_coef or lower {0}.actor_lr"),
    _Rule("negative_kl", True, False, "log-probabilities of sampler and training differ: a temperature, or a bug"),
    _Rule("length", True, True, "responses grow: the reward may pay for length"),
    _Rule("finished", False, True, "responses no longer end: raise {0}.missing_eos_penalty or {0}.max_new_tokens"),
    _Rule("entropy", False, True, "the actor collapses onto few responses: lower {0}.actor_lr, raise {0}.entropy_coef"),
    _Rule("distinct_2", False, True, "responses repeat themselves: the reward may pay for a phrase"),
    _Rule("clip_fraction", True, False, "the updates are too large: lower {0}.actor_lr or the epochs"),
    _Rule("explained_variance", True, False, "the critic doesn't follow: raise {0}.critic_lr or {0}.critic_warmup"),
    _Rule("ood_scores", True, False, "scores are higher than the reward model ever gave: it may be fooled", True),
    _Rule("score_std", False, False, "the reward gives all responses the same score"),
    _Rule("judge_drops", True, False, "a judge falls while the score rises: the policy exploits the reward"),
)


@dataclass(frozen=True)
class Alarm:
    """One metric at a limit. level: 1 at the first, 2 at the second."""

    metric: str
    level: int
    text: str


class Monitor:
    """The state of the alarms: the start, how many iterations in a row have a negative explained variance, and when
    each alarm was raised."""

    def __init__(self, s: Alarms, expected_kl: float, warmup: int, responses: int = RECENT, stage: str = "ppo") -> None:
        """responses: per iteration."""
        self.s, self.warmup, self.stage = s, warmup, stage
        self.start_steps, self.recent_steps = math.ceil(START / responses), math.ceil(RECENT / responses)
        self.expected_kl = expected_kl or s.expected_kl
        self.start: dict[str, list[float]] = {}
        self.recent: dict[str, list[float]] = {}
        self.negative_ev_streak = 0.0
        self.reported: dict[str, int] = {}
        self.spans: dict[tuple[str, int], AlarmSpan] = {}
        self.abort_reason = ""
        self.windows: dict[str, list[list[float]]] = {}
        self.drops: dict[str, float] = {}

    def state(self) -> dict[str, Any]:
        saved = {"start": self.start, "recent": self.recent, "failing": self.negative_ev_streak, "told": self.reported}
        spans = [astuple(span) for span in self.spans.values()]
        return {"alarms": {**saved, "windows": self.windows, "falls": self.drops, "spans": spans}}

    def restore(self, state: Mapping[str, Any]) -> None:
        saved = state["alarms"]
        self.start, self.negative_ev_streak, self.reported = saved["start"], saved["failing"], saved["told"]
        self.windows, self.drops, self.recent = saved["windows"], saved["falls"], saved["recent"]
        self.spans = {(metric, level): AlarmSpan(metric, level, *steps) for metric, level, *steps in saved["spans"]}

    def alarms(self, step: int, metrics: Mapping[str, float]) -> list[Alarm]:
        """The alarms of this iteration."""
        if step >= self.warmup and "explained_variance" in metrics:
            self.negative_ev_streak = self.negative_ev_streak + 1 if metrics["explained_variance"] < 0 else 0.0
        measured = dict(metrics) | {
            "kl": metrics["kl"] / self.expected_kl,
            "negative_kl": -metrics["kl"],
            "explained_variance": self.negative_ev_streak,
            "judge_drops": self._judge_drops(metrics),
        }
        at_start = step <= self.warmup
        alarms = [
            alarm for rule in _RULES if rule.metric in measured and (alarm := self._alarm(rule, measured, at_start))
        ]
        for key in ((alarm.metric, alarm.level) for alarm in alarms):
            self.spans[key] = AlarmSpan(*key, self.spans[key].first if key in self.spans else step, step)
        return alarms

    def _judge_drops(self, metrics: Mapping[str, float]) -> float:
        """Consecutive windows in which the worst judge fell by more than chance while the score rose."""
        judges = [name for name in metrics if name.startswith("judge_")]
        if not judges:
            return 0.0
        if self.windows.keys() != {"score", *judges}:  # at first, or the judges changed since a stop
            self.windows, self.drops = {name: [[]] for name in ("score", *judges)}, {}
        for name, seen in self.windows.items():
            seen[-1].append(metrics[name])
        if len(self.windows["score"][-1]) < WINDOW:
            return max(self.drops.values(), default=0.0)
        rises = _z_score(self.windows["score"]) > 0
        for name in judges:
            fell = rises and _z_score(self.windows[name]) < -1
            self.drops[name] = self.drops.get(name, 0.0) + 1 if fell else 0.0
        self.windows = {name: [seen[-1], []] for name, seen in self.windows.items()}
        return max(self.drops.values())

    def _alarm(self, rule: _Rule, measured: Mapping[str, float], at_start: bool) -> Alarm | None:
        """at_start: the actor has not moved yet."""
        value = measured[rule.metric]
        if rule.relative:
            start = self.start.setdefault(rule.metric, [])
            if at_start or len(start) < self.start_steps:
                start.append(value)
                return None
            began = sum(start) / len(start)
            if not began and not rule.above:
                return None  # nothing is left that could fall
            value = self._recent_mean(rule.metric, value) / max(began, 1e-12)
        elif rule.rare:
            value = self._recent_mean(rule.metric, value)
        limits = getattr(self.s, rule.metric)
        sign = 1 if rule.above else -1
        level = sum(sign * value >= sign * limit for limit in limits if limit or rule.above)
        if not level:
            return None
        share = " of the start" if rule.relative else ""
        text = f"{rule.metric} is {value:.3g}{share}, the limit is {limits[level - 1]:g}"
        return Alarm(rule.metric, level, f"{text}: {rule.meaning.format(self.stage)}")

    def _recent_mean(self, metric: str, value: float) -> float:
        """The mean of the last iterations, as many as make RECENT responses."""
        recent = self.recent[metric] = [*self.recent.get(metric, []), value][-self.recent_steps :]
        return sum(recent) / len(recent)

    def check(self, ctx: StageContext, step: int, metrics: Mapping[str, float]) -> dict[str, float]:
        """Reports new alarms, and returns how many alarms there are."""
        alarms = self.alarms(step, metrics)
        now = {alarm.metric: alarm.level for alarm in alarms}
        for alarm in alarms:
            if alarm.level > self.reported.get(alarm.metric, 0):
                ctx.console.say(f"alarm      step {step}: {alarm.text}")
        self.reported = now
        worst = [alarm for alarm in alarms if alarm.level == 2]
        if self.s.strict and collectives.any_rank(bool(worst)):  # metrics differ between ranks: all stop, or none
            self.abort_reason = f"step {step}: " + ("; ".join(alarm.text for alarm in worst) or "on another process")
        return {"alarms": float(len(alarms))}

    def raise_if_strict(self) -> None:
        """Errors: E-NUM-ALARM where an alarm is at its second limit, under `strict`."""
        if self.abort_reason:
            hint = "look at samples.jsonl; after a change of the recipe this stage starts over"
            raise UserError("E-NUM-ALARM", self.abort_reason, where=self.stage, hint=hint)


def _z_score(windows: Sequence[Sequence[float]]) -> float:
    """How far the mean of the last window is from that of the one before, in standard errors of the difference."""
    if len(windows) < 2:
        return 0.0
    means = [sum(window) / len(window) for window in windows]
    squares = [sum((x - mean) ** 2 for x in window) for window, mean in zip(windows, means, strict=True)]
    variance = sum(s / (len(w) - 1) / len(w) for s, w in zip(squares, windows, strict=True))
    return (means[1] - means[0]) / max(math.sqrt(variance), 1e-12)


_UNUSED: tuple[tuple[str, Callable[[Recipe, Any], bool], str], ...] = (
    ("kl_horizon", lambda _, s: not s.kl_target, "beta is fixed: no kl_target is set"),
    ("value_coef", lambda _, s: s.critic != "shared", "the critic has a trunk of its own"),
    (
        "uncertainty_penalty",
        lambda r, _: r.reward.data != () and r.reward.ensemble_size == 1,
        "the reward model is no ensemble",
    ),
    ("uncertainty_penalty", lambda _, s: not uses_reward_model(s.rewards), "no reward model is used"),
    ("reward_clip", lambda _, s: not (uses_reward_model(s.rewards) or s.clips_sum), "no reward model is used"),
    (
        "actor_lr",
        lambda _, s: isinstance(s, Ppo) and s.critic_warmup >= s.steps,
        "the actor is frozen: critic_warmup takes all steps",
    ),
    ("kl_estimator", lambda _, s: s.kl_in == "reward", "in the reward KL is log pi - log pi_ref"),
    *(
        (name, lambda _, s: s.epochs * s.num_minibatches == 1, "one update an iteration: every ratio is 1")
        for name in ("clip_range", "clip_high")
    ),
)


def judges_of(ctx: StageContext) -> dict[str, Reward]:
    """The judges that watch besides the reward, each as a metric `judge_NAME`."""
    specs = ctx.recipe.alarms.judges
    return {
        f"judge_{name}": timed("eval")(python_function(spec))
        for name, spec in zip(named(specs, ()), specs, strict=True)
    }


def manifest_notes(failures: Sequence[str], monitor: Monitor) -> dict[str, Json]:
    """What the verdict reads in the manifest of the model. failures: of the gate."""
    return outcome.Notes(failures, [*monitor.spans.values()]).record()


def warn_unused_settings(ctx: StageContext) -> None:
    """Reports which settings have no effect."""
    for note in unused_settings(ctx.recipe, ctx.folder.name):
        ctx.console.say(f"note: {note}")


def unused_settings(recipe: Recipe, stage: str = "ppo") -> list[str]:
    """Settings of a stage that were changed and have no effect in this recipe, each with its reason."""
    s = getattr(recipe, stage)
    default = type(s)()
    changed = {n for n, _, _ in _UNUSED if hasattr(s, n) and getattr(s, n) != getattr(default, n)}
    notes = [f"{stage}.{n} has no effect: {why}" for n, holds, why in _UNUSED if n in changed and holds(recipe, s)]
    if s.kl_coef == 0:
        notes.append(f"{stage}.kl_coef = 0: nothing holds the actor near the SFT model")
    return notes
