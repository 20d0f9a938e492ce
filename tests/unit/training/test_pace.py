"""Time from trial steps: the arithmetic by made-up times, and one real trial of each kind."""

import math
from dataclasses import replace

import pytest

from tetrad.model.config import DecoderConfig
from tetrad.stages import Recipe
from tetrad.training import pace
from tetrad.types import StageCost

CONFIG = DecoderConfig("qwen2", 300, 32, 9, 4, 2, 8, 64, 128)
SFT = StageCost("sft", 1, 0, tokens=1000, labels=600, batch=40, length=20)
PPO = StageCost(
    "ppo", 1, 1, 1000, 300, 2000, 600, sampled=480, slots=8, batch=40, length=20, rounds=5, responses=12, new=16
)


def seconds(monkeypatch: pytest.MonkeyPatch, stage: StageCost, step: float) -> float:
    """Of a machine on which a learning step takes this long, reading a tenth, the engine's start a fifth, a token of 4
    rows a hundredth and one of all slots twice that."""

    def timed(recipe: Recipe, config: DecoderConfig, load: StageCost, device: object) -> pace.Times:
        assert config is CONFIG  # the whole model
        return pace.Times(step, step / 10, step / 5, step / 100, step / 50)

    monkeypatch.setattr(pace, "_timed", timed)
    return pace.stage_seconds(Recipe(), CONFIG, stage)


def test_steps_of_learning_make_up_the_stage(monkeypatch: pytest.MonkeyPatch) -> None:
    assert seconds(monkeypatch, SFT, 2.75) == pytest.approx(2.75 * 1000 / 40)


def test_sampling_counts_steps_of_the_engine_and_its_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    """Five rounds of 12 responses with 8 tokens on average in 8 slots: 16 steps, and 4 more for those who waited."""
    step = 10.0
    row = (step / 50 - step / 100) / 4  # from 4 rows to 8
    sampled = (step / 5 + (step / 100 - 4 * row) * (16 + 4 * 8 / 8)) * 5 + row * 480
    whole = (step * 1000 + step / 10 * 2000) / 40 + sampled
    assert seconds(monkeypatch, PPO, step) == pytest.approx(whole)
    # shown three times: each time the engine starts, and few rows grow to the end
    shown = seconds(monkeypatch, replace(PPO, shown=3), step)
    assert shown == pytest.approx(whole + 3 * (step / 5 + 16 * step / 100))


@pytest.mark.parametrize(("each", "times"), [(1.0, 4), (8.0, 3), (90.0, 2)])
def test_a_slow_step_is_repeated_less_often(monkeypatch: pytest.MonkeyPatch, each: float, times: int) -> None:
    now, runs = 0.0, 0

    def action() -> None:
        nonlocal now, runs
        now, runs = now + each, runs + 1

    monkeypatch.setattr(pace.time, "perf_counter", lambda: now)
    assert pace._seconds(action) == each
    assert runs == times


@pytest.mark.parametrize("adapters", [False, True])
def test_a_real_trial_takes_every_part(adapters: bool) -> None:
    for stage in (SFT, PPO, StageCost("reward", 1, 0, tokens=1000, read=100, batch=40, length=20)):
        assert 0 < pace.stage_seconds(Recipe(), CONFIG, replace(stage, adapters=float(adapters))) < math.inf
