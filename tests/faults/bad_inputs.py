"""Bad input as a real command receives it: what a case is, how it is run, and what must hold of each.

    Case("empty", lambda folder: write(folder / "recipe.toml", ""), "run recipe.toml", "E-CONF-MISSING", place="[sft]")

`make` puts the bad input into an empty folder, in which `tetrad <words>` then runs as a process of its own; `faults`
says what was not as promised: the code, the place and the exit status, one line of error and no traceback, within 5 s
and 256 MiB, and no model or checkpoint that was not there before, or is no longer there. A case without a code must
end well, with `place` somewhere in what is printed.

The process is a fork of one that has done the imports (`forked`), and `START` seconds are added for what it did not do;
or it is started as a user does it (`started`). Both are held to the clock, so they run when nothing else does.
"""

import hashlib
import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import tiny
from forks import Fork

ROOT = Path(__file__).parents[2]
EXITS = {"CONF": 2, "DATA": 3, "CKPT": 4, "MODEL": 4, "NUM": 5, "IO": 6, "MEM": 6, "RUN": 7, "RANK": 8}
# A small process in between: the peak of a child begins with the memory of the process that it was forked from.
_MEASURE = """
import json, os, resource, sys
child = os.fork()
if not child:
    resource.setrlimit(resource.RLIMIT_AS, (int(sys.argv[1]),) * 2)
    os.execv(sys.argv[2], sys.argv[2:])
_, status, used = os.wait4(child, 0)
sys.stderr.write("\\n" + json.dumps([os.waitstatus_to_exitcode(status), used.ru_maxrss]))
"""
TIMEOUT, START = 60, 0.5
ADDRESS_SPACE = 1 << 34


Words = str | tuple[str, ...]


@dataclass(frozen=True)
class Case:
    """One bad input. words: of the command line, split as a shell would (or a list). place: text of the error line."""

    id: str
    make: Callable[[Path], object]
    words: Words
    code: str
    place: str = ""
    seconds: float = 5.0
    mib: int = 256

    @property
    def exit(self) -> int:
        return EXITS[self.code.split("-")[1]] if self.code else 0


@dataclass(frozen=True)
class Outcome:
    """What a command did."""

    status: int
    out: str
    err: str
    seconds: float
    mib: float


Run = Callable[[Words, Path], Outcome]


def forked(words: Words, folder: Path) -> Outcome:
    """`tetrad <words>` in `folder`, as a process; its memory is the peak, its time the clock's and `START`."""
    began = time.monotonic()
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "stdin": subprocess.DEVNULL}
    how = {"cwd": folder, "env": _environment(), "start_new_session": True, **pipes}
    with Fork(["-m", "tetrad", *_split(words)], light=True, address_space=ADDRESS_SPACE, **how) as process:
        out, err = _ended(process)
    seconds = max(process.seconds, time.monotonic() - began)
    return Outcome(process.returncode, out, err, seconds + START, process.mib)


def started(words: Words, folder: Path) -> Outcome:
    """The same from its very start, with the interpreter's own time and memory."""
    began = time.monotonic()
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "stdin": subprocess.DEVNULL}
    command = [sys.executable, "-ISc", _MEASURE, str(ADDRESS_SPACE), sys.executable, "-m", "tetrad", *_split(words)]
    with subprocess.Popen(command, cwd=folder, env=_environment(), start_new_session=True, **pipes) as process:
        out, raw = _ended(process)
    seconds = time.monotonic() - began
    err, _, measured = raw.rpartition("\n")
    status, peak = json.loads(measured) if process.returncode == 0 else (process.returncode, 0)
    return Outcome(status, out, err, seconds, peak / 1024)


def _split(words: Words) -> list[str]:
    return shlex.split(words) if isinstance(words, str) else list(words)


def _environment() -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": str(ROOT / "src"), "PYTHONDONTWRITEBYTECODE": "1", "RUST_BACKTRACE": "0"}


def _ended(process: "subprocess.Popen[bytes]") -> tuple[str, str]:
    """What it printed; kills it and all that it started after `TIMEOUT`."""
    try:
        out, err = process.communicate(timeout=TIMEOUT)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        out, err = b"", f"killed after {TIMEOUT} s\n".encode()
    return out.decode(errors="replace"), err.decode(errors="replace")


def faults(case: Case, folder: Path, run: Run = forked) -> tuple[list[str], Outcome]:
    """Makes the case in `folder`, runs it, and says what is not as it must be."""
    folder.mkdir(parents=True)
    case.make(folder)
    before = results(folder)
    found = run(case.words, folder)
    wrong = [f"exit {found.status}, not {case.exit}"] if found.status != case.exit else []
    wrong += [f"took {found.seconds:.1f} s"] if found.seconds > case.seconds else []
    wrong += [f"took {found.mib:.0f} MiB"] if found.mib > case.mib else []
    wrong += ["a traceback"] if "Traceback" in found.err + found.out else []
    lines = [line for line in found.err.splitlines() if line.startswith("error[")]
    if case.code:
        wrong += [f"{len(lines)} lines of error"] if len(lines) != 1 else []
        line = lines[0] if lines else ""
        wrong += [f"not {case.code}: {line}"] if not line.startswith(f"error[{case.code}] ") else []
        wrong += [f"no {case.place!r} in: {line}"] if case.place not in line else []
        wrong += ["models or checkpoints changed"] if results(folder) != before else []
    else:
        said = found.out + found.err
        wrong += [f"no {case.place!r} in: {said}"] if case.place not in said or lines else []
    return wrong, found


def results(folder: Path) -> dict[str, str]:
    """The weights and manifests of all models and checkpoints, wherever they were moved to."""
    found: dict[str, str] = {}
    for path in sorted(folder.rglob("*")):
        kept = path.suffix == ".safetensors" or path.name in ("manifest.json", "state.json")
        if (
            kept
            and ".cache" not in path.parts
            and path.is_file()
            and not path.is_symlink()
            and path.stat().st_size < 64 << 20
        ):
            found[str(path.relative_to(folder))] = hashlib.sha256(path.read_bytes()).hexdigest()
    return found


def write(path: Path, content: str | bytes) -> Path:
    """A file, and the folders above it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


@cache
def _trained() -> Path:
    """The tiny recipe with all its stages done but PPO, which was killed after two checkpoints."""
    folder = Path(tempfile.mkdtemp(prefix="bad-inputs-"))
    tiny.write_tiny(folder)
    env = {**os.environ, "PYTHONPATH": str(ROOT / "src")}
    words = [sys.executable, "-m", "tetrad", "run", "recipe.toml", "--ppo.steps", "40"]
    child = subprocess.Popen(words, cwd=folder, env=env, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    wanted = folder / "runs/tiny/ppo/checkpoints/step-000004"
    while not wanted.is_dir() and child.poll() is None:
        time.sleep(0.05)
    child.send_signal(signal.SIGKILL)
    child.wait()
    assert wanted.is_dir(), "the tiny run ended before its checkpoints"
    shutil.rmtree(folder / "runs/.cache", ignore_errors=True)
    return folder


def world(folder: Path) -> Path:
    """Fills `folder` with the tiny recipe, its data and its run, stopped in PPO (`run recipe.toml --ppo.steps 40`)."""
    shutil.copytree(_trained(), folder, dirs_exist_ok=True)
    return folder


def remove_world() -> None:
    """Deletes what `world` copies."""
    if _trained.cache_info().currsize:
        shutil.rmtree(_trained(), ignore_errors=True)
        _trained.cache_clear()
