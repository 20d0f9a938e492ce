"""Help: quick, without torch, and complete."""

import re
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tetrad import __version__
from tetrad.cli.main import commands, main
from tetrad.settings import use
from tetrad.settings.base import options, tables
from tetrad.stages import Recipe

ROOT = Path(__file__).parents[2]


def python(*words: str) -> subprocess.CompletedProcess[str]:
    """A fresh interpreter on the sources of this checkout."""
    return subprocess.run(
        [sys.executable, *words],
        capture_output=True,
        text=True,
        timeout=60,
        env={"PYTHONPATH": str(ROOT / "src"), "COLUMNS": "100", "PATH": "/usr/bin:/bin"},
        check=False,
    )


@pytest.mark.parametrize(
    "words", [["--help"], ["run", "--help"], ["ppo", "--help"], ["generate", "--help"], ["run", "--help-all"]]
)
def test_help_is_quick(words: list[str]) -> None:
    seconds = []
    for _ in range(3):
        began = time.perf_counter()
        done = python("-m", "tetrad", *words)
        seconds.append(time.perf_counter() - began)
        assert (done.returncode, done.stderr) == (0, "")
    assert min(seconds) < 0.5


def test_what_is_imported() -> None:
    script = "import sys; sys.argv = ['tetrad', 'ppo', '--help']; from tetrad.cli.main import main; main()\n"
    script += "print('\\nloaded', sorted({'torch', 'rich', 'pydantic', 'numpy', 'tokenizers'} & set(sys.modules)))"
    assert python("-c", script).stdout.endswith("loaded []\n")


def test_importing_tetrad_costs_little() -> None:
    script = "import time; t = time.perf_counter(); import tetrad; print(time.perf_counter() - t)"
    assert min(float(python("-c", script).stdout) for _ in range(3)) < 0.05


def test_overview(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--help"]) == 0
    text = capsys.readouterr().out
    assert re.findall(r"^  (\w+)", text, re.MULTILINE) == list(commands())
    assert "75 stopped on request" in text
    assert main([]) == 2


def test_every_setting_has_its_meaning_and_default(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["run", "--help-all"]) == 0
    text = " ".join(capsys.readouterr().out.split())
    for option in options(Recipe).values():
        assert option.help, f"{option.name} has no docstring"
        assert f"{option.flag} {option.help}" in text
    assert "--ppo.actor-lr Learning rate of the actor. (a number, above 0 and at most 1) Default: 1e-05." in text
    assert "--model.from " in text


def test_a_stage_shows_its_own_tables(capsys: pytest.CaptureFixture[str]) -> None:
    main(["ppo", "--help-all"])
    everything = capsys.readouterr().out
    main(["ppo", "--help"])
    text = capsys.readouterr().out
    assert len(text) < len(everything) / 2
    named = set(re.findall(r"[a-z][\w-]*", text))
    for table in ("ppo", "ptx", "gate", "alarms", "run", "lora", "optim"):
        for option in options(tables(Recipe)[table], f"{table}."):
            assert f"--{option.replace('_', '-')} " in text or option.partition(".")[2].replace("_", "-") in named
    assert "--ppo.kl-coef " in text and "--ppo.clip-range" not in text and "tetrad ppo --help-all" in text
    assert re.findall(r"^\[(\w+)\]", text, re.MULTILINE) == ["ppo", "ptx", "gate", "alarms", "run", "lora", "optim"]


@pytest.mark.parametrize("cls", [use.Generate, use.Chat, use.ScoreFile, use.Explain, use.Doctor])
def test_arguments_of_the_other_commands(cls: type, capsys: pytest.CaptureFixture[str]) -> None:
    verb = {"ScoreFile": "score"}.get(cls.__name__, cls.__name__.lower())
    assert main([verb, "--help-all"]) == 0
    text = " ".join(capsys.readouterr().out.split())
    for option in options(cls).values():
        assert option.help
        assert option.name == "model" or f"{option.flag} {option.help}" in text


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"tetrad {__version__}\n"
    assert f'version = "{__version__}"' in (ROOT / "pyproject.toml").read_text()
