"""Alarms on figures: each limit has its alarm, a healthy course has none, and what is remembered survives a stop."""

import json
import random
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest

from tetrad.console import Console
from tetrad.errors import UserError
from tetrad.report.verdict import AlarmSpan
from tetrad.rl.monitor import Monitor, unused_settings
from tetrad.settings.ppo import Alarms, Ppo
from tetrad.stages import Recipe

HEALTHY = {
    "kl": 3.0,
    "length": 20.0,
    "finished": 0.95,
    "entropy": 3.0,
    "distinct_2": 0.8,
    "clip_fraction": 0.1,
    "explained_variance": 0.4,
    "ood_scores": 0.0,
    "score_std": 1.0,
}
CASES = [
    ("kl", {"kl": 21.0}, {"kl": 51.0}),
    ("negative_kl", {"kl": -0.6}, {"kl": -2.5}),
    ("length", {"length": 31.0}, {"length": 41.0}),
    ("finished", {"finished": 0.6}, {"finished": 0.3}),
    ("entropy", {"entropy": 0.8}, {"entropy": 0.2}),
    ("distinct_2", {"distinct_2": 0.3}, {"distinct_2": 0.1}),
    ("clip_fraction", {"clip_fraction": 0.5}, {"clip_fraction": 0.8}),
    ("ood_scores", {"ood_scores": 0.1}, {"ood_scores": 0.3}),
    ("score_std", {"score_std": 1e-7}, {"score_std": 0.0}),
]


def watch(**settings: Any) -> Monitor:
    """One that has seen how it began."""
    found = Monitor(Alarms(**settings), 0.0, warmup=2)
    assert [found.alarms(step, HEALTHY) for step in range(3)] == [[], [], []]
    return found


def levels(found: Monitor, step: int, **changes: float) -> dict[str, int]:
    return {alarm.metric: alarm.level for alarm in found.alarms(step, HEALTHY | changes)}


@pytest.mark.parametrize(("name", "first", "second"), CASES)
def test_each_figure_has_its_alarm(name: str, first: dict[str, float], second: dict[str, float]) -> None:
    found = watch()
    assert levels(found, 3) == {}
    assert levels(found, 4, **first) == {name: 1}
    assert levels(found, 5, **second) == {name: 2}
    assert levels(found, 6) == {}


def test_the_critic_must_fail_in_a_row_after_its_warm_up() -> None:
    found = Monitor(Alarms(), 0.0, warmup=2)
    assert [levels(found, step, explained_variance=-0.1) for step in range(6)] == [{}] * 6
    assert levels(found, 6, explained_variance=-0.1) == {"explained_variance": 1}
    assert levels(found, 7, explained_variance=0.1) == {}
    assert [levels(found, 8 + i, explained_variance=-1.0) for i in range(20)][-1] == {"explained_variance": 2}


def test_kl_is_held_against_its_target() -> None:
    found = Monitor(Alarms(), 4.0, warmup=0)
    assert levels(found, 0, kl=7.9) == {} and levels(found, 1, kl=8.1) == {"kl": 1}


def test_a_rare_share_is_told_by_enough_replies() -> None:
    """4 of 64 replies once are chance where one in a hundred is usual; in three iterations in a row they are not."""
    found = Monitor(Alarms(), 0.0, warmup=0, responses=64)
    shares = [0.0, 0.01, 0.0, 0.0625, 0.0, 0.0625, 0.0625, 0.0625, 0.0, 0.0]
    told = [levels(found, step, ood_scores=share).get("ood_scores", 0) for step, share in enumerate(shares)]
    assert told == [0, 0, 0, 0, 0, 0, 0, 1, 0, 0]


def test_limits_are_settings() -> None:
    assert levels(watch(length=(3.0, 4.0)), 3, length=41.0) == {}


@pytest.mark.parametrize("name", ["finished", "entropy", "distinct_2", "score_std"])
def test_a_lower_limit_of_nothing_is_off(name: str) -> None:
    """Of a rule that all responses keep, equal scores are no fault."""
    assert levels(watch(**{name: (0.0, 0.0)}), 4, **{name: 0.0}) == {}


def test_figures_that_are_missing_raise_nothing() -> None:
    assert watch().alarms(3, {"kl": 1.0}) == []


def test_the_start_survives_a_stop() -> None:
    before, after = watch(), Monitor(Alarms(), 0.0, warmup=2)
    before.alarms(3, HEALTHY | {"explained_variance": -1.0})
    after.restore(json.loads(json.dumps(before.state())))
    assert after.state() == before.state()
    assert levels(after, 4, length=31.0) == {"length": 1}


def test_the_first_and_last_step_of_each_level_is_remembered() -> None:
    found = watch()
    for step, length in enumerate((31.0, 45.0, 20.0, 45.0, 31.0), start=3):
        found.alarms(step, HEALTHY | {"length": length})
    assert list(found.spans.values()) == [AlarmSpan("length", 1, 3, 7), AlarmSpan("length", 2, 4, 6)]
    after = Monitor(Alarms(), 0.0, warmup=2)
    after.restore(json.loads(json.dumps(found.state())))
    after.alarms(8, HEALTHY | {"length": 45.0})
    assert after.spans["length", 2] == AlarmSpan("length", 2, 4, 8)


def test_an_alarm_is_said_once_and_stops_under_strict(capsys: pytest.CaptureFixture[str]) -> None:
    ctx: Any = SimpleNamespace(console=Console())
    found = watch()
    assert found.check(ctx, 3, HEALTHY | {"length": 31.0}) == {"alarms": 1.0}
    assert "alarm      step 3: length is 1.55 of the start, the limit is 1.5" in capsys.readouterr().out
    found.check(ctx, 4, HEALTHY | {"length": 32.0})
    assert capsys.readouterr().out == ""
    found.check(ctx, 5, HEALTHY | {"length": 45.0})
    assert "the limit is 2" in capsys.readouterr().out
    assert found.check(ctx, 6, HEALTHY) == {"alarms": 0.0}
    strict = watch(strict=True)
    strict.check(ctx, 3, HEALTHY | {"length": 31.0})
    strict.raise_if_strict()
    strict.check(ctx, 4, HEALTHY | {"length": 45.0})
    with pytest.raises(UserError, match="step 4: length") as raised:
        strict.raise_if_strict()
    assert (raised.value.code, raised.value.exit_code) == ("E-NUM-ALARM", 5)


def test_what_began_at_nothing_can_not_fall() -> None:
    found, never = Monitor(Alarms(), 0.0, warmup=2), {"finished": 0.0, "distinct_2": 0.0}
    assert [levels(found, step, **never) for step in range(6)] == [{}] * 6
    assert levels(found, 6, **never, length=31.0) == {"length": 1}


def falls(score: float, judge: float, noise: float = 0.05, steps: int = 70) -> list[int]:
    """Levels of the alarm when score and judge move by so much an iteration."""
    found, draw = watch(), random.Random(1)

    def near(x: float) -> float:
        return x + draw.gauss(0, noise)

    told = [
        levels(found, step, score=near(score * step), judge_x=near(judge * step), judge_y=near(0.0))
        for step in range(3, 3 + steps)
    ]
    return [one.get("judge_drops", 0) for one in told]


def test_a_judge_that_falls_while_the_score_rises() -> None:
    found = falls(0.02, -0.02)
    assert found.index(1) == 39  # three falls from window to window of ten
    assert found[-1] == 2
    assert not any(falls(0.02, 0.02))
    assert not any(falls(-0.02, -0.02))  # both fall: nothing is fooled
    assert not any(any(falls(0.02, 0.0, noise)) for noise in (0.01, 0.1, 1.0))  # chance alone


def test_the_judges_memory_survives_a_stop() -> None:
    whole, first, second = watch(), watch(), Monitor(Alarms(), 0.0, warmup=2)
    figures = [HEALTHY | {"score": 0.1 * step, "judge_x": -0.1 * step} for step in range(60)]
    expected = [[a.metric for a in whole.alarms(step + 3, one)] for step, one in enumerate(figures)]
    assert ["judge_drops"] in expected
    found = [[a.metric for a in first.alarms(step + 3, one)] for step, one in enumerate(figures[:27])]
    second.restore(json.loads(json.dumps(first.state())))
    found += [[a.metric for a in second.alarms(step + 30, one)] for step, one in enumerate(figures[27:])]
    assert found == expected


def test_other_judges_after_a_stop_are_watched_anew() -> None:
    """One is added in the middle of a window, and the one that fell is gone."""
    found = watch()
    steps = [HEALTHY | {"score": 0.1 * step, "judge_x": -0.1 * step} for step in range(59)]
    told = [{a.metric for a in found.alarms(step + 3, one)} for step, one in enumerate(steps)]
    assert "judge_drops" in told[-1]
    found.restore(json.loads(json.dumps(found.state())))
    for step in range(59, 100):
        assert found.alarms(step + 3, HEALTHY | {"score": 0.1 * step, "judge_y": 0.1 * step}) == []
    for step in range(100, 140):
        figures = HEALTHY | {"score": 0.1 * step, "judge_x": -0.1 * step, "judge_y": 0.1 * step}
        told.append({a.metric for a in found.alarms(step + 3, figures)})
    assert [figures for figures in told[-40:] if figures] == [{"judge_drops"}]  # at its third window
    assert found.alarms(200, HEALTHY) == []


@pytest.mark.parametrize(
    ("settings", "name"),
    [
        ({"kl_horizon": 9.0}, "kl_horizon"),
        ({"value_coef": 0.5}, "value_coef"),
        ({"critic_warmup": 100, "actor_lr": 1e-4}, "actor_lr"),
        ({"kl_coef": 0.0}, "kl_coef"),
        ({"rewards": ("f.py:f",), "reward_clip": 3.0}, "reward_clip"),
        ({"rewards": ("f.py:f",), "uncertainty_penalty": 1.0}, "uncertainty_penalty"),
    ],
)
def test_settings_without_an_effect_are_told(settings: dict[str, Any], name: str) -> None:
    assert unused_settings(Recipe()) == []
    found = unused_settings(replace(Recipe(), ppo=Ppo(**settings)))
    assert len(found) == 1
    assert f"ppo.{name}" in found[0]
