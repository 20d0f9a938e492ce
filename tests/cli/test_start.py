"""How a command starts: what it loads (torch.compile, which nothing here uses, would cost two seconds each time), and
which ones start anew with what glibc reads only then."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tetrad import __main__
from tiny import write_tiny

PROGRAM = """\
import sys
from tetrad.cli.main import main
for line in sys.argv[1:]:
    assert main(line.split()) == 0
    loaded = [name for name in ("torch._dynamo", "torch._inductor", "sympy") if name in sys.modules]
    assert not loaded, (line, loaded)
"""


def test_no_stage_and_no_use_loads_the_compiler(tmp_path: Path) -> None:
    path = write_tiny(tmp_path)
    (tmp_path / "prompts.jsonl").write_text('{"prompt": "the film"}\n')
    lines = [
        f"run {path} --run.out {tmp_path}/runs --pretrain.tokens 1024 --sft.epochs 0.2 --reward.epochs 1 --ppo.steps 2",
        f"generate {tmp_path}/runs/tiny/ppo --prompts {tmp_path}/prompts.jsonl --max-new-tokens 4",
        f"score {tmp_path}/runs/tiny/reward --data {tmp_path}/validation.jsonl",
    ]
    done = subprocess.run([sys.executable, "-c", PROGRAM, *lines], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]


@pytest.mark.skipif(not __main__._glibc(), reason="this system's C library is another")
@pytest.mark.parametrize(
    ("words", "own", "anew"),
    [
        (["run", "r.toml"], None, True),
        (["--debug", "ppo", "r.toml"], None, True),
        (["run", "r.toml"], "glibc.malloc.perturb=1", False),
        (["status", "r.toml"], None, False),
        ([], None, False),
    ],
)
def test_what_trains_starts_anew_once(
    words: list[str], own: str | None, anew: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same command, and nothing but the tunables differs; not where the user has set some."""
    ran: list[tuple[str, list[str], dict[str, str]]] = []
    monkeypatch.setattr(os, "execve", lambda *given: ran.append(given))
    monkeypatch.setattr(__main__, "command_line", lambda: 3)
    monkeypatch.setattr(sys, "argv", ["tetrad", *words])
    monkeypatch.delenv("GLIBC_TUNABLES", raising=False)
    if own:
        monkeypatch.setenv("GLIBC_TUNABLES", own)
    assert __main__.main() == 3
    given = {"GLIBC_TUNABLES": "glibc.malloc.tcache_count=0:glibc.malloc.mxfast=0"}
    assert ran == ([(sys.executable, sys.orig_argv, {**os.environ, **given})] if anew else [])


@pytest.mark.skipif(not __main__._glibc(), reason="this system's C library is another")
def test_it_runs_with_them(tmp_path: Path) -> None:
    """Seen from inside a real process, by a rule that is loaded before anything is trained."""
    path, seen = write_tiny(tmp_path), tmp_path / "seen"
    (tmp_path / "rule.py").write_text(f"import os\nopen({str(seen)!r}, 'w').write(os.environ['GLIBC_TUNABLES'])\n")
    plain = {name: value for name, value in os.environ.items() if name != "GLIBC_TUNABLES"}
    command = [sys.executable, "-m", "tetrad", "run", str(path), "--ppo.rewards", f"{tmp_path}/rule.py:pays"]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=plain)
    assert "error[E-CONF-FUNCTION]" in done.stderr, done.stderr
    assert seen.read_text() == "glibc.malloc.tcache_count=0:glibc.malloc.mxfast=0"
