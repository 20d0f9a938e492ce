"""Metrics are explained: in both languages, by name and by pattern, and as docs/output.md has it."""

import re
from pathlib import Path

import pytest

from tetrad.cli.main import main
from tetrad.errors import UserError
from tetrad.report.glossary import explain_metric, find, sections

HAN = re.compile("[\u4e00-\u9fff]")


def test_both_languages_say_the_same_names() -> None:
    english, chinese = sections("en"), sections("zh")
    assert {name: list(names) for name, names in english.items()} == {n: list(names) for n, names in chinese.items()}
    for section, names in english.items():
        for name, (meaning, look) in names.items():
            other = chinese[section][name]
            assert meaning and not HAN.search(meaning + look), name
            assert HAN.search(other.meaning) and bool(look) == bool(other.look), name


@pytest.mark.parametrize(
    ("name", "part"),
    [
        ("kl", "KL from the reference"),
        ("pair_accuracy_low", "lower end of the 95 % interval of pair_accuracy"),
        ("ridge_gain", "difference in a judge's mean"),
        ("length_baseline_spearman", "`spearman` of a baseline"),
        ("spearman_sd", "standard deviation of spearman over the members"),
        ("score_reward", "one of several sources"),
        ("score_std", "standard deviation of the iteration's scores"),
    ],
)
def test_own_names_come_before_patterns(name: str, part: str) -> None:
    entry = find(name)
    assert entry is not None and part in entry.meaning


def test_an_unknown_metric_is_an_error_that_names_the_nearest() -> None:
    with pytest.raises(UserError) as error:
        explain_metric("clip_frac")
    assert error.value.code == "E-CONF-UNKNOWN" and "clip_fraction" in error.value.hint
    assert find("nonsense") is None


def test_the_command(capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["explain", "explained_variance"]) == 0
    assert capsys.readouterr().out == (
        "explained_variance: share of the variance of returns that the critic explains\n"
        "  look for: towards 1; below 0 the critic is useless\n"
    )
    assert main(["explain", "kll"]) == 2
    assert "did you mean kl" in capsys.readouterr().err
    assert main(["explain", "runs/nowhere"]) == 4  # a path is a run
