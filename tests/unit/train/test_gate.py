"""The gate: each planted fault of a reward model fails for its own reason, a sound one passes."""

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from tetrad.engine.console import Console
from tetrad.errors import UserError
from tetrad.settings.gate import Gate
from tetrad.train import gate
from tetrad.train.gate import verdict

SOUND = {
    "pair_accuracy": 0.76,
    "pair_accuracy_low": 0.73,
    "ece": 0.02,
    "length_accuracy": 0.53,
    "length_correlation": -0.2,
    "fresh_mean": 0.1,
    "fresh_std": 0.9,
}
FAULTS = [
    ({"pair_accuracy_low": 0.55}, "as low as 0.550"),
    ({"ece": 0.11}, "calibration error is 0.110"),
    ({"length_accuracy": 0.74}, "length alone is right in 0.740 of the pairs, the model in 0.760"),
    ({"length_correlation": 0.6}, "rank correlation +0.60"),
    ({"length_correlation": -0.6}, "rank correlation -0.60"),
    ({"fresh_std": 0.4}, "standard deviation 0.40"),
    ({"fresh_std": 2.1}, "standard deviation 2.10"),
    ({"fresh_mean": -1.2}, "mean -1.20"),
]


def test_a_sound_model_passes() -> None:
    assert str(verdict(SOUND, Gate())) == "gate: pass"


@pytest.mark.parametrize(("fault", "reason"), FAULTS)
def test_each_fault_has_its_reason(fault: dict[str, float], reason: str) -> None:
    found = verdict({**SOUND, **fault}, Gate())
    assert found.outcome == "fail" and len(found.reasons) == 1 and reason in found.reasons[0]


def test_limits_can_be_moved() -> None:
    loose = Gate(
        accuracy=0.5, ece=0.2, length_margin=0.0, length_correlation=0.7, least_std=0.3, most_std=3.0, most_mean=2.0
    )
    assert {verdict({**SOUND, **fault}, loose).outcome for fault, _ in FAULTS} == {"pass"}
    assert verdict(SOUND, replace(Gate(), accuracy=0.74)).outcome == "fail"


@pytest.mark.parametrize("missing", SOUND)
def test_what_was_not_measured_is_said(missing: str) -> None:
    figures = {name: value for name, value in SOUND.items() if name != missing}
    found = verdict(figures, Gate())
    assert found.outcome == "warn" and all("was not measured" in reason for reason in found.reasons)
    assert verdict({**figures, **({"ece": 0.5} if missing != "ece" else {"fresh_std": 9.0})}, Gate()).outcome == "fail"
    assert len(verdict({}, Gate()).reasons) == 5


def test_ppo_is_told_or_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(gate, "figures_of", lambda folder: {**SOUND, "ece": 0.3})

    def heed(strict: bool) -> None:
        ctx: Any = SimpleNamespace(recipe=SimpleNamespace(gate=Gate(strict=strict)), console=Console())
        gate.heed(ctx, tmp_path)

    heed(strict=False)
    assert "gate: fail; the calibration error is 0.300" in capsys.readouterr().out
    with pytest.raises(UserError) as raised:
        heed(strict=True)
    assert (raised.value.code, raised.value.exit_code) == ("E-NUM-GATE", 5)
