"""The claims of the examples of reviews: each figure at its bound holds, and past it fails."""

import math
import tomllib
from collections.abc import Callable
from copy import deepcopy
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

HERE = Path(__file__).parents[3] / "examples"


@pytest.fixture(scope="module")
def seeds(script: Callable[[str], ModuleType]) -> ModuleType:
    return script("seeds")


def gain(mean: float, low: float) -> dict[str, float]:
    return {"mean": mean, "low": low, "high": mean + 0.1}


SFT = {"distinct_2": 0.8, "length": 20.0, "finished": 0.95, "external_nll": 5.0}
PPO = SFT | {"kl": 7.0, "commonest_word": 0.2, "distinct_2": 0.68, "ridge_gain": gain(0.9, 0.61)}
REPORT: dict[str, Any] = {
    "stages": {"reward": {"spearman": 0.62, "pair_accuracy": 0.765, "ece": 0.02}},
    "systems": {
        "sft": SFT,
        "best of 16": {"ridge_gain": gain(0.5, 0.4), "lexicon_gain": gain(0.1, 0.05)},
        "ppo": PPO | {"lexicon_gain": gain(0.2, 0.1)},
    },
    "alarms": 0,
}
BROKEN: list[tuple[str, Any, str]] = [
    ("stages.reward.spearman", 0.61, "RM spearman"),
    ("stages.reward.pair_accuracy", 0.76, "RM pair_accuracy"),
    ("stages.reward.ece", 0.021, "RM ece"),
    ("systems.ppo.commonest_word", 0.21, "PPO commonest_word"),
    ("systems.ppo.ridge_gain", gain(0.89, 0.61), "ridge_gain >= 0.9"),
    ("systems.ppo.ridge_gain", gain(0.9, 0.6), "ridge_gain, lower bound > 0.6"),
    ("systems.ppo.lexicon_gain", gain(0.2, -0.01), "lexicon_gain, lower bound > 0"),
    ("systems.best of 16.ridge_gain", gain(0.9, 0.4), "ridge_gain above best of 16's"),
    ("systems.ppo.distinct_2", 0.67, "distinct-2"),
    ("systems.ppo.length", 14.9, "length"),
    ("systems.ppo.length", 25.1, "length"),
    ("systems.ppo.finished", 0.94, "share ended"),
    ("systems.ppo.external_nll", 5.0 + math.log(1.51), "perplexity"),
    ("systems.ppo.kl", 7.01, "KL"),
    ("alarms", 1, "alarms"),
]


def test_every_figure_at_its_bound_holds(seeds: ModuleType) -> None:
    assert all(holds for _, holds in seeds.claims(REPORT, "reviews-en").values())


@pytest.mark.parametrize(("place", "value", "claim"), BROKEN)
def test_past_its_bound_one_claim_fails(seeds: ModuleType, place: str, value: Any, claim: str) -> None:
    report = deepcopy(REPORT)
    *path, last = place.split(".")
    inside = report
    for name in path:
        inside = inside[name]
    inside[last] = value
    (failed,) = (name for name, (_, holds) in seeds.claims(report, "reviews-en").items() if not holds)
    assert failed.startswith(claim)


@pytest.mark.parametrize("example", ["reviews-en", "reviews-zh"])
def test_claims_name_judges_of_the_recipe_and_the_guard_reads_other_text(seeds: ModuleType, example: str) -> None:
    recipe, guard = (tomllib.loads((HERE / example / f"{name}.toml").read_text()) for name in ("recipe", "guard"))
    judges = {judge.rpartition(":")[2] for judge in recipe["evaluate"]["judges"]}
    assert {name.removesuffix("_gain") for name in seeds.AT_LEAST[example] if name.endswith("_gain")} == judges
    assert guard["tokenizer"]["text"] == guard["pretrain"]["text"] == ["data/human.txt"]
    assert guard["seed"] != recipe["seed"] and guard["name"] == f"{example}-guard"
