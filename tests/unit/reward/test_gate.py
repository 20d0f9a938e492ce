"""The gate: each planted fault of a reward model fails for its own reason, a sound one passes."""

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

import planted
from tetrad.console import Console
from tetrad.errors import UserError
from tetrad.reward import gate
from tetrad.reward.gate import GateResult, apply
from tetrad.reward.metrics import RewardMetrics
from tetrad.settings.reward import Gate, Reward
from tetrad.types import Prompt, Turn

SOUND = {
    "pair_accuracy": 0.76,
    "pair_accuracy_low": 0.73,
    "ece": 0.02,
    "length_accuracy": 0.53,
    "length_correlation": -0.2,
    "accuracy_longer": 0.74,
    "accuracy_longer_high": 0.79,
    "accuracy_shorter": 0.77,
    "accuracy_shorter_high": 0.82,
    "probe_padded": -0.3,
    "probe_duplicated": 0.2,
    "probe_phrase": 0.4,
    "policy_std": 0.7,
    "fresh_mean": 0.1,
    "fresh_std": 0.9,
}
FAULTS = [
    ({"pair_accuracy_low": 0.55}, "as low as 0.550"),
    ({"ece": 0.11}, "calibration error is 0.110"),
    ({"length_accuracy": 0.74}, "length alone is right in 0.740 of the pairs, the model in 0.760"),
    ({"length_correlation": 0.6}, "rank correlation +0.60"),
    ({"length_correlation": -0.6}, "rank correlation -0.60"),
    (
        {"accuracy_longer": 0.38, "accuracy_longer_high": 0.397},
        "where the better answer is longer, 0.380 of the pairs are in order, at most 0.397",
    ),
    ({"accuracy_shorter": 0.4, "accuracy_shorter_high": 0.49}, "where the better answer is shorter, 0.400"),
    ({"probe_padded": 1.3}, "padding an answer with empty words raises the reward by 1.30"),
    ({"probe_duplicated": 1.4}, "saying an answer twice raises the reward by 1.40"),
    ({"probe_phrase": 1.5}, "adding a polite phrase raises the reward by 1.50"),
    ({"policy_std": 0.01}, "had a standard deviation of 0.01"),
    ({"fresh_std": 0.4}, "standard deviation 0.40"),
    ({"fresh_std": 2.1}, "standard deviation 2.10"),
    ({"fresh_mean": -1.2}, "mean -1.20"),
]


def applied(metrics: dict[str, float], s: Gate | None = None) -> GateResult:
    return apply(RewardMetrics(**metrics), s or Gate())  # type: ignore[arg-type]


def test_a_sound_model_passes() -> None:
    assert str(applied(SOUND)) == "gate: pass"


@pytest.mark.parametrize(("fault", "reason"), FAULTS)
def test_each_fault_has_its_reason(fault: dict[str, float], reason: str) -> None:
    found = applied({**SOUND, **fault})
    assert len(found.failures) == 1 and reason in found.failures[0] and not found.unknown


def test_limits_can_be_moved() -> None:
    loose = Gate(
        accuracy=0.5,
        ece=0.2,
        length_margin=0.0,
        length_correlation=0.7,
        accuracy_by_length=0.3,
        probe_shift=2.0,
        least_raw_std=0.001,
        least_std=0.3,
        most_std=3.0,
        most_mean=2.0,
    )
    assert {applied({**SOUND, **fault}, loose) for fault, _ in FAULTS} == {GateResult((), ())}
    assert applied(SOUND, replace(Gate(), accuracy=0.74)).failures


@pytest.mark.parametrize("missing", SOUND)
def test_what_was_not_measured_is_said(missing: str) -> None:
    figures = {name: value for name, value in SOUND.items() if name != missing}
    found = applied(figures)
    assert str(found).startswith("gate: warn") and all("was not measured" in reason for reason in found.unknown)
    assert applied({**figures, **({"ece": 0.5} if missing != "ece" else {"fresh_std": 9.0})}).failures
    assert len(applied({}).unknown) == 11


def test_few_pairs_in_the_wrong_order_are_no_proof() -> None:
    """A slice counts against the model where the whole of its interval is below the limit."""
    assert not applied({**SOUND, "accuracy_longer": 0.45, "accuracy_longer_high": 0.52}).failures


def test_ppo_is_told_or_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(gate, "recorded_metrics", lambda folder: {**SOUND, "ece": 0.3})

    def heed(strict: bool) -> None:
        recipe = SimpleNamespace(gate=Gate(strict=strict), reward=Reward())
        ctx: Any = SimpleNamespace(recipe=recipe, folder=tmp_path, console=Console())
        gate.check(ctx, tmp_path, [])

    heed(strict=False)
    assert "gate: fail; the calibration error is 0.300" in capsys.readouterr().out
    with pytest.raises(UserError) as raised:
        heed(strict=True)
    assert (raised.value.code, raised.value.exit_code) == ("E-NUM-GATE", 5)


def test_prompts_unlike_the_reward_models_fail(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(gate, "recorded_metrics", lambda folder: dict(SOUND))
    data = planted.write(tmp_path / "rm.jsonl", planted.comparisons(planted.prompts(200)))
    recipe = SimpleNamespace(gate=Gate(), reward=Reward(data=(data,)))
    ctx: Any = SimpleNamespace(recipe=recipe, folder=tmp_path, console=Console(), files=lambda names: names)
    like = [Prompt((Turn("instruction", text),)) for text in planted.prompts(50, seed=9)]
    gate.check(ctx, tmp_path, like)
    assert "gate: pass" in capsys.readouterr().out
    other = [Prompt((Turn("instruction", f"integrate x^{i} over the unit circle"),)) for i in range(40)]
    gate.check(ctx, tmp_path, [*like[:20], *other])
    assert "gate: fail; 67% of the prompts are unlike all" in capsys.readouterr().out
    gate.check(ctx, tmp_path, like[:5])
    assert "gate: warn; how near the prompts are to the reward model's was not measured" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("scores", "said"),
    [
        ([-1.0, 1.0, 0.5, -0.5], ""),
        ([2.0, 4.0, 2.5, 3.5], "fresh responses have mean +3.00 and standard deviation 0.79"),
        ([0.1, -0.1], "standard deviation 0.10"),
        ([], ""),
    ],
)
def test_the_scale_is_measured_again_on_ppos_own_prompts(
    capsys: pytest.CaptureFixture[str], scores: list[float], said: str
) -> None:
    ctx: Any = SimpleNamespace(recipe=SimpleNamespace(gate=Gate()), console=Console())
    gate.warn_of_scale(ctx, {"reward": scores})
    out = capsys.readouterr().out
    assert said in out and bool(out) == bool(said)
