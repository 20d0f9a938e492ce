"""The table of methods: the words of its commands are settings of a recipe, and its cells are the seeds' figures."""

from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest

from tetrad.pipeline import recipe

HERE = Path(__file__).parents[3] / "examples"


@pytest.fixture
def worth(script: Callable[[str], ModuleType], monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(HERE)
    return script("worth")


@pytest.mark.parametrize("method", ["grpo", "rloo"])
@pytest.mark.parametrize("example", ["reviews-en", "reviews-zh"])
def test_each_method_has_as_many_responses_as_ppo(worth: ModuleType, example: str, method: str) -> None:
    data = HERE / example / "data"
    words = worth.flags("dpo", worth.DPO[example], data)
    words += worth.flags("grpo", worth.group_settings(example, method), data)
    read = recipe.read(str(HERE / example / "recipe.toml"), words)
    assert read.dpo.data[0].startswith(str(data))
    where = {"grpo": ("normalised", "loss"), "rloo": ("leave_one_out", "reward")}
    assert (read.grpo.advantage, read.grpo.kl_in) == where[method] and read.grpo.kl_coef > 0
    group, ppo = ((s.steps * s.batch_size * s.samples_per_prompt, s.epochs) for s in (read.grpo, read.ppo))
    assert group == ppo
    assert read.grpo.missing_eos_penalty == read.ppo.missing_eos_penalty


def test_rloo_of_each_seed_has_one_name(worth: ModuleType) -> None:
    for seed in (0, 1):
        systems = ("sft", "grpo", f"reviews-en-worth-{seed}-rloo/grpo")
        report = {"systems": {name: {"kl": seed} for name in systems}, "costs": {name: {} for name in systems}}
        assert worth.named(report) == {name: {"kl": seed} for name in ("sft", "grpo", "rloo")}


def test_a_row_has_the_mean_and_each_seed(worth: ModuleType) -> None:
    figures = dict.fromkeys(worth.FIGURES, 0.5) | {"minutes": 2.0, "peak_mib": None, "ridge": {"mean": 9.0}}
    seeds = [
        {
            "sft": figures | {"ridge_gain": {"mean": 0.0}},
            "ppo": figures | {"ridge_gain": {"mean": gain}, "peak_mib": mib},
        }
        for gain, mib in ((1.0, 700.0), (1.5, 800.0))
    ]
    head, rule, sft, ppo = worth.table(seeds)
    assert head.startswith("|  | ridge, gained | kl |") and rule.count("---") == head.count("|") - 1
    assert sft.startswith("| sft | +0.00 (+0.00, +0.00) | 0.5") and sft.endswith("| 2 | 0 |")
    assert ppo.startswith("| ppo | +1.25 (+1.00, +1.50) | 0.5") and ppo.endswith("| 2 | 800 |")
