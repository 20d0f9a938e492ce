"""Poor terminals, and none: what can not be shown is written as escapes, a run outlives its window, and a result that
can not be printed is an error with a code."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from served import write_model

ASCII = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
PROMPT = ("generate", "sft", "--instruction", "请翻译", "--max-new", "3", "--greedy")


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("streams")
    write_model(folder / "sft", seed=1)
    (folder / "data.jsonl").write_text('{"Instruction": "说", "Output": "你好"}\n{"Instruction": "b", "Output": "c"}\n')
    return folder


def tetrad(folder: Path, *words: str, shell: str = "", **environment: str) -> "subprocess.CompletedProcess[bytes]":
    """The command in that folder; shell: redirections after it."""
    line = f'"$0" -m tetrad "$@" {shell}'
    env = os.environ | environment
    return subprocess.run(["bash", "-c", line, sys.executable, *words], cwd=folder, env=env, capture_output=True)


@pytest.mark.parametrize("environment", [ASCII, {"PYTHONIOENCODING": "ascii"}, {"PYTHONIOENCODING": "latin-1"}])
@pytest.mark.parametrize("words", [PROMPT, ("check", "data.jsonl", "--tokenizer", "sft/model"), ("status", "说.toml")])
def test_a_terminal_without_chinese(run: Path, words: tuple[str, ...], environment: dict[str, str]) -> None:
    plain, poor = tetrad(run, *words, PYTHONUTF8="1"), tetrad(run, *words, **environment)
    assert poor.returncode == plain.returncode
    assert b"Traceback" not in poor.stderr and b"internal" not in poor.stderr
    for rich, shown in ((plain.stdout, poor.stdout), (plain.stderr, poor.stderr)):
        text = rich.decode()
        encoding = environment.get("PYTHONIOENCODING", "ascii")
        assert shown.decode(encoding).split() == text.encode(encoding, "backslashreplace").decode(encoding).split()


@pytest.mark.parametrize(
    ("shell", "code"), [(">&-", 6), (">/dev/full", 6), ("2>&-", 0), ("2>/dev/full", 0), ("<&-", 0)]
)
def test_a_result_that_can_not_be_printed(run: Path, shell: str, code: int) -> None:
    done = tetrad(run, *PROMPT, shell=shell)
    assert done.returncode == code
    assert (b"error[E-IO-" in done.stderr) == (code == 6) and b"Traceback" not in done.stderr
    assert bool(done.stdout) == (code == 0)


@pytest.mark.parametrize("shell", [">&-", ">/dev/full", ">&- 2>&-", "2>/dev/full"])
def test_a_run_outlives_its_terminal(run: Path, tmp_path: Path, shell: str) -> None:
    recipe = 'name = "r"\n[tokenizer]\ntext = ["t.txt"]\nvocab_size = 300\n'
    (tmp_path / "r.toml").write_text(recipe)
    (tmp_path / "t.txt").write_text("海边的小镇在清晨醒来。\n\n" * 20)
    done = tetrad(tmp_path, "run", "r.toml", shell=shell)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "runs/r/tokenizer/model/manifest.json").is_file()


def test_a_run_whose_reader_has_gone_is_finished(tmp_path: Path) -> None:
    (tmp_path / "r.toml").write_text('name = "r"\n[tokenizer]\ntext = ["t.txt"]\nvocab_size = 300\n')
    (tmp_path / "t.txt").write_text("the plot is a warm and funny story\n\n" * 20)
    done = tetrad(tmp_path, "run", "r.toml", shell="| true; exit ${PIPESTATUS[0]}")
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "runs/r/tokenizer/model/manifest.json").is_file()


def test_what_was_asked_for_and_has_no_reader(run: Path) -> None:
    assert tetrad(run, "--help", shell="| true; exit ${PIPESTATUS[0]}").returncode in (0, 141)
    done = tetrad(run, *PROMPT, shell="| true; exit ${PIPESTATUS[0]}")
    assert done.returncode == 141 and not done.stderr


@pytest.mark.parametrize("shell", ["<&-", "</dev/null", "< lines"])
def test_chat_without_a_terminal(run: Path, shell: str) -> None:
    (run / "lines").write_bytes(b"/help\n/bogus\n\xff\xfe bad\n/quit\nnever\n")
    done = tetrad(run, "chat", "sft", "--max-new", "3", shell=shell)
    assert done.returncode == 0, done.stderr
    if "lines" in shell:
        said = done.stdout.decode()
        assert said.count("/quit ends") == 3 and "There is no /bogus" in said and "never" not in said
