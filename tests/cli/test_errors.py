"""Errors on the command line: printed once, on stderr, with their exit code; and what the other commands receive."""

import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

import tetrad.cli
from tetrad.cli.main import main
from tetrad.errors import Stopped, UserError
from tetrad.inference import model_folder
from tetrad.pipeline import runner
from tetrad.settings.use import Chat, Generate, ScoreFile

Capture = pytest.CaptureFixture[str]

SNAPSHOTS = [
    (
        ["train", "x.toml"],
        "error[E-CONF-UNKNOWN] tetrad: unknown command train. Fix: did you mean `tetrad pretrain`?\n",
    ),
    (["run"], "error[E-CONF-MISSING] run: no recipe is given. Fix: tetrad run RECIPE.toml\n"),
    (
        ["run", "none.toml"],
        "error[E-CONF-MISSING] none.toml: no such file. Fix: give the path of a recipe (a .toml file)\n",
    ),
    (
        ["ppo", "r.toml"],
        "error[E-CONF-UNKNOWN] r.toml:2: unknown setting ppo.actr_lr. Fix: did you mean ppo.actor_lr?\n",
    ),
    (
        ["run", "good.toml", "--ppo.actor-lr", "3"],
        "error[E-CONF-RANGE] --ppo.actor-lr: ppo.actor_lr = 3 must be a number, above 0 and at most 1. "
        "Fix: the default is 1e-05\n",
    ),
    (
        ["sft", "good.toml"],
        "error[E-CONF-MISSING] [sft]: the stage sft has no files to work on. "
        'Fix: add data = ["FILE"] to [sft]\n',
    ),
    (
        ["run", "good.toml"],
        "error[E-DATA-PATH] none.txt: No such file or directory.\n",
    ),
    (["generate"], "error[E-CONF-MISSING] generate: MODEL is missing. Fix: tetrad generate MODEL\n"),
    (
        ["score", "m"],
        "error[E-CONF-MISSING] score: --data FILE.jsonl is missing. Fix: tetrad score MODEL --data FILE.jsonl\n",
    ),
    (
        ["chat", "m", "n"],
        "error[E-CONF-SYNTAX] chat: unexpected argument 'n'. Fix: `tetrad chat --help` shows the settings\n",
    ),
    (
        ["chat", "m", "--temprature", "1"],
        "error[E-CONF-UNKNOWN] --temprature: unknown setting temprature. Fix: did you mean temperature?\n",
    ),
]  # fmt: skip


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "r.toml").write_text("[ppo]\nactr_lr = 1e-6\n")
    (tmp_path / "good.toml").write_text("[tokenizer]\ntext = ['none.txt']\n")
    return tmp_path


@pytest.mark.parametrize(("words", "message"), SNAPSHOTS, ids=lambda value: " ".join(value)[:40])
def test_snapshots(here: Path, words: list[str], message: str, capsys: Capture) -> None:
    code = main(words)
    out, err = capsys.readouterr()
    assert (err, out) == (message, "")
    assert code == (3 if "E-DATA" in message else 2)


def stopping(error: BaseException) -> Callable[..., None]:
    def run(*_: Any, **__: Any) -> None:
        raise error

    return run


@pytest.mark.parametrize(
    ("error", "code", "said"),
    [
        (UserError("E-DATA-TYPE", "no", where="x:1"), 3, "error[E-DATA-TYPE] x:1: no.\n"),
        (UserError("E-CKPT-HASH", "no."), 4, "error[E-CKPT-HASH] no.\n"),
        (UserError("E-NUM-REWARD", "no"), 5, "error[E-NUM-REWARD] no.\n"),
        (UserError("E-IO-SPACE", "no"), 6, "error[E-IO-SPACE] no.\n"),
        (UserError("E-RUN-LOCKED", "no", hint="wait"), 7, "error[E-RUN-LOCKED] no. Fix: wait\n"),
        (Stopped("after step 3"), 75, "stopped: after step 3\n"),
        (KeyboardInterrupt(), 130, "interrupted\n"),
        (KeyboardInterrupt("in score"), 130, "interrupted: in score\n"),
        (ValueError("odd"), 1, "ValueError: odd"),
    ],
)
def test_exit_codes(
    here: Path, error: BaseException, code: int, said: str, capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(runner, "run", stopping(error))
    assert main(["run", "good.toml"]) == code
    out, err = capsys.readouterr()
    assert said in err
    assert "Traceback" not in out + err
    assert err.count("\n") == 1


def test_debug_shows_the_traceback(here: Path, capsys: Capture) -> None:
    assert main(["run", "r.toml", "--debug"]) == 2
    assert "Traceback" in capsys.readouterr().err


def test_the_recipe_may_come_last(here: Path, capsys: Capture) -> None:
    assert main(["status", "--seed", "3", "good.toml"]) == 3
    assert "none.txt" in capsys.readouterr().err


def test_a_run_from_the_command_line(here: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch) -> None:
    (here / "none.txt").write_text("text")
    seen = []
    stage = ModuleType("tetrad.train.tokenizer")

    def run(context: Any) -> None:
        seen.append(context)
        raise Stopped("after step 1")

    stage.run = run  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "tetrad.train.tokenizer", stage)
    assert main(["run", "good.toml", "--tokenizer.vocab-size", "300"]) == 75
    assert seen[0].recipe.tokenizer.vocab_size == 300
    assert seen[0].folder == Path("runs/good/tokenizer")
    assert capsys.readouterr().out == "tokenizer  starts\n"
    assert main(["status", "good.toml", "--tokenizer.vocab-size", "300"]) == 0
    assert "tokenizer  stopped" in capsys.readouterr().out


@pytest.fixture
def received(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """What the commands that use a model are called with."""
    seen: list[Any] = []
    monkeypatch.setattr(model_folder, "usable", lambda *_, **__: SimpleNamespace(note=""))
    for module, names in (("generate", ["generate_file"]), ("score", ["score_file"]), ("chat", ["chat"])):
        fake = ModuleType(f"tetrad.cli.{module}")
        for name in names:
            setattr(fake, name, lambda settings, console: seen.append(settings))
        monkeypatch.setitem(sys.modules, f"tetrad.cli.{module}", fake)
    return seen


def test_arguments_reach_the_commands(received: list[Any]) -> None:
    assert main(["generate", "m", "--instruction", "Say - hi", "--greedy", "--max-new-tokens", "30", "--seed=4"]) == 0
    assert main(["generate", "--prompts", "p.jsonl", "m", "--best-of", "4", "--reward", "r", "--out", "o.jsonl"]) == 0
    assert main(["chat", "m", "--system", "Be kind", "--temperature", "0.7"]) == 0
    assert main(["score", "m", "--data", "d.jsonl"]) == 0
    assert received == [
        Generate(model="m", instruction="Say - hi", greedy=True, temperature=0.0, max_new_tokens=30, seed=4),
        Generate(model="m", prompts="p.jsonl", best_of=4, reward="r", out="o.jsonl"),
        Chat(model="m", system="Be kind", temperature=0.7),
        ScoreFile(model="m", data="d.jsonl"),
    ]


@pytest.mark.parametrize(
    ("words", "code"),
    [
        (["--instruction", "x", "--prompts", "y"], "E-CONF-CONFLICT"),
        ([], "E-CONF-MISSING"),
        (["--input", "x", "--prompts", "y"], "E-CONF-CONFLICT"),
        (["--instruction", "x", "--best-of", "4"], "E-CONF-MISSING"),
        (["--instruction", "x", "--reward", "r"], "E-CONF-MISSING"),
        (["--instruction", "x", "--greedy", "--best-of", "4", "--reward", "r"], "E-CONF-CONFLICT"),
        (["--instruction", "x", "--greedy", "--temperature", "1"], "E-CONF-CONFLICT"),
        (["--instruction", "x", "--temperature", "-1"], "E-CONF-RANGE"),
        (["--instruction", "x", "--max-new-tokens", "0"], "E-CONF-RANGE"),
    ],
)
def test_options_that_do_not_go_together(words: list[str], code: str, received: list[Any], capsys: Capture) -> None:
    assert main(["generate", "m", *words]) == 2
    assert code in capsys.readouterr().err
    assert received == []


def test_memory_of_other_commands_is_explained(capsys: Capture, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(model_folder, "usable", lambda *_, **__: SimpleNamespace(note=""))
    fake = ModuleType("tetrad.cli.chat")
    fake.chat = stopping(MemoryError())  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "tetrad.cli.chat", fake)
    assert main(["chat", "m"]) == 6
    error = capsys.readouterr().err
    assert "error[E-MEM-FULL] chat:" in error
    assert "Fix: lower --max-new-tokens" in error
    assert "run.micro_batch_tokens" not in error  # a setting of recipes


@pytest.mark.parametrize(("ok", "code"), [(True, 0), (False, 5)])
def test_doctor(ok: bool, code: int, capsys: Capture, monkeypatch: pytest.MonkeyPatch) -> None:
    row = SimpleNamespace(function="gae", cases=3, error64=1e-12, error32=1e-6, grad64=0.0, grad32=0.0, ok=ok)
    fake = SimpleNamespace(check_vectors=lambda path: [row], environment=lambda: [("device", "cpu")])
    monkeypatch.setitem(sys.modules, "tetrad.cli.doctor", fake)
    monkeypatch.setattr(tetrad.cli, "doctor", fake, raising=False)
    assert main(["doctor"]) == 0
    assert "device" in capsys.readouterr().out
    assert main(["doctor", "--vectors", "v"]) == code
    out = capsys.readouterr().out
    assert "numeric self-test, v\n" in out
    assert "1e-12" in out
