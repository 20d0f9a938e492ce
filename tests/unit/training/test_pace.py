"""Time from trial steps: the arithmetic by made-up times, and one real trial of each kind."""

import math
from dataclasses import replace

import numpy as np
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


def seconds(monkeypatch: pytest.MonkeyPatch, stage: StageCost, fixed: float, layer: float) -> float:
    """Of a machine on which a learning step takes `fixed` + `layer` per block, reading a tenth, a token of 4 rows a
    hundredth and one of all slots twice that."""

    def timed(recipe: Recipe, config: DecoderConfig, load: StageCost, device: object) -> np.ndarray:
        learn = fixed + layer * config.layers
        return np.array([learn, learn / 10, learn / 100, learn / 50])

    monkeypatch.setattr(pace, "_timed", timed)
    return pace.stage_seconds(Recipe(), CONFIG, stage)


def test_all_blocks_are_counted_from_two_depths(monkeypatch: pytest.MonkeyPatch) -> None:
    assert seconds(monkeypatch, SFT, 0.5, 0.25) == pytest.approx((0.5 + 9 * 0.25) * 1000 / 40)


def test_sampling_counts_steps_of_the_engine_and_its_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    """Five rounds of 12 responses with 8 tokens on average in 8 slots: 16 steps, and 4 more for those who waited."""
    step = 1.0 + 9 * 1.0
    row = (step / 50 - step / 100) / 4  # from 4 rows to 8
    decoded = (step / 100 - 4 * row) * 5 * (16 + 4 * 8 / 8) + row * 480
    assert seconds(monkeypatch, PPO, 1.0, 1.0) == pytest.approx((step * 1000 + step / 10 * 2000) / 40 + decoded)


@pytest.mark.parametrize("adapters", [False, True])
def test_a_real_trial_takes_every_part(adapters: bool) -> None:
    for stage in (SFT, PPO, StageCost("reward", 1, 0, tokens=1000, read=100, batch=40, length=20)):
        assert 0 < pace.stage_seconds(Recipe(), CONFIG, replace(stage, adapters=float(adapters))) < math.inf
