"""Terminals that can't show a text, that are full, closed or gone: a run goes on without its words, and a command whose
words are its result says by its code that they can't be written."""

import json
import os
import pty
import re
import shlex
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

import pytest

from served import write_model

ROOT = Path(__file__).parents[2]
C_LOCALE = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
POOR = [{"PYTHONIOENCODING": "ascii"}, {"PYTHONIOENCODING": "latin-1"}, C_LOCALE]
GONE = [">&-", ">/dev/full", "| true"]
TEXTS = ["the plot", "这部电影", "café 🦊"]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("runs")
    write_model(folder / "sft", seed=1)
    write_model(folder / "reward", reward=True)
    records = [{"Instruction": "Go on.", "Input": text, "response": text} for text in TEXTS]
    (folder / "p.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    (folder / "r.toml").write_text('[tokenizer]\ntext = ["t.txt"]\nvocab_size = 270\n')
    (folder / "t.txt").write_text("这部电影 is a film\n\n" * 40)
    return folder


def shell(
    folder: Path, words: str, after: str = "", more: Mapping[str, str] = {}
) -> subprocess.CompletedProcess[bytes]:
    """`tetrad WORDS AFTER` in a shell; after a pipe the status is still Tetrad's."""
    env = {"PATH": "/usr/bin:/bin", "PYTHONPATH": str(ROOT / "src"), **more}
    command = f"set -o pipefail; {shlex.quote(sys.executable)} -m tetrad {words} {after}"
    return subprocess.run(
        ["bash", "-c", command], cwd=folder, env=env, stdin=subprocess.DEVNULL, capture_output=True, timeout=120
    )


WRITTEN = ["generate sft --prompts p.jsonl --max-new-tokens 6", "score reward --data p.jsonl"]


@pytest.fixture(scope="module")
def whole(run: Path) -> "subprocess.CompletedProcess[bytes]":
    """What scoring says where all of it can be said."""
    return shell(run, WRITTEN[1])


@pytest.mark.parametrize("words", WRITTEN)
def test_lines_of_json_stay_lines_of_json(run: Path, words: str) -> None:
    said = []
    for more in ({"PYTHONUTF8": "1"}, *POOR):
        done = shell(run, words, more=more)
        assert done.returncode == 0, done
        text = done.stdout.decode(more.get("PYTHONIOENCODING", "utf-8"))
        said.append([json.loads(line) for line in text.splitlines()])
    assert all(lines == said[0] for lines in said)
    assert [line["Input"] for line in said[0]] == TEXTS


@pytest.mark.parametrize("words", [*WRITTEN, "--help", "chat sft"])
@pytest.mark.parametrize("after", GONE)
def test_a_result_that_cannot_be_written_is_no_success(run: Path, words: str, after: str) -> None:
    done = shell(run, words, after)
    said = [line for line in done.stderr.splitlines() if not re.match(rb"(generate|score)\b", line)]  # how far it is
    if after == "| true":
        assert (done.returncode, said) == (141, [])
    else:
        assert done.returncode == 6, done
        (error,) = said
        assert error.startswith(b"error[E-IO-WRITE] stdout: what was asked for can't be printed")


@pytest.mark.parametrize("after", ["2>&-", "2>/dev/full"])
def test_what_is_said_beside_a_result_may_be_lost(
    run: Path, whole: "subprocess.CompletedProcess[bytes]", after: str
) -> None:
    done = shell(run, WRITTEN[1], after)
    assert (done.returncode, done.stdout) == (0, whole.stdout)
    assert shell(run, "generate none --instruction a", after).returncode == 4


@pytest.mark.parametrize("after", [*GONE, ">/dev/full 2>&1", "<&- >&- 2>&-"])
def test_a_run_outlives_its_terminal(run: Path, tmp_path: Path, after: str) -> None:
    done = shell(run, f"run r.toml --run.out {tmp_path}", after)
    assert done.returncode == 0, done
    assert (tmp_path / "r/tokenizer/model/manifest.json").is_file()
    assert b"Exception ignored" not in done.stderr


@pytest.mark.parametrize("more", POOR, ids=str)
def test_a_bar_of_a_poor_terminal(run: Path, more: Mapping[str, str]) -> None:
    terminal, its = pty.openpty()
    env = {"PATH": "/usr/bin:/bin", "PYTHONPATH": str(ROOT / "src"), "TERM": "xterm", **more}
    words = [sys.executable, "-m", "tetrad", *WRITTEN[0].split()]
    process = subprocess.Popen(words, cwd=run, stdin=its, stdout=its, stderr=its, env=env)
    os.close(its)
    shown = b""
    while True:
        try:
            shown += os.read(terminal, 4096)
        except OSError:  # all of it has been read
            break
    os.close(terminal)
    assert process.wait(60) == 0, shown
    assert b"3/3" in shown
