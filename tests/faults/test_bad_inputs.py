"""Bad input of every kind ends as a real command with its code, its place and its exit status, and nothing is lost.

Each command is a process of its own, but a fork of one that has done the imports: its time counts from there, by the
clock. `test_bad_inputs_timed` holds some of them to it from their very start.
"""

import os
import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from faults import cases_config, cases_data, cases_models
from faults.bad_inputs import ROOT, Case, faults, remove_world
from tetrad.errors import CODES
from tiny import write_tiny

pytestmark = pytest.mark.faults
TABLES = [*cases_config.CASES, *cases_models.CASES, *cases_data.CASES]
CASES = {case.id: case for case in TABLES}


def test_ids_are_unique() -> None:
    assert len(CASES) == len(TABLES)


def test_every_code_of_these_tables_has_a_case() -> None:
    """Codes of recipes, checkpoints and model folders; those that only torch can tell are tested beside their stage."""
    families = ("E-CONF-", "E-CKPT-", "E-MODEL-", "E-DATA-")
    told_later = {"E-CONF-DEVICE", "E-CONF-DTYPE", "E-CONF-FUNCTION"}
    wanted = {code for code in CODES if code.startswith(families)} - told_later
    assert wanted <= {case.code for case in TABLES}


@pytest.fixture(scope="module", autouse=True)
def leave_nothing() -> Iterator[None]:
    yield
    cases_config.release()
    remove_world()


@pytest.mark.parametrize("name", CASES)
def test_a_bad_input(name: str, tmp_path: Path) -> None:
    wrong, outcome = faults(CASES[name], tmp_path / "x")
    assert not wrong, outcome


def test_a_disk_with_room_for_one_checkpoint_and_a_half(tmp_path: Path) -> None:
    """Told before the first step, with both figures. A small file system of its own is the run's place."""
    write_tiny(tmp_path)
    (tmp_path / "runs").mkdir()
    command = shlex.join([sys.executable, "-m", "tetrad", "run", "recipe.toml", "--model.hidden-size", "256"])
    inside = f"mount -t tmpfs -o size=10m none runs && exec {command} --model.layers 2"
    done = subprocess.run(
        ["unshare", "-rm", "sh", "-c", inside],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(ROOT / "src")},
        capture_output=True,
        text=True,
        check=False,
    )
    if "unshare" in done.stderr or "mount:" in done.stderr:
        pytest.skip("no file system of its own can be made here")
    assert done.returncode == 6, done
    (error,) = [line for line in done.stderr.splitlines() if not line.startswith("tokenizer  ")]  # how far it is
    assert "error[E-IO-SPACE]" in error
    assert "needs" in done.stderr
    assert "has" in done.stderr
    assert "pretrain   done" not in done.stdout


def test_the_harness_finds_what_is_wrong(tmp_path: Path) -> None:
    """A case that promises too much is told in every point."""
    case = Case("x", lambda folder: (folder / "r.toml").write_text("x"), "run r.toml", "E-DATA-TYPE", "no", 0.001, 1)
    wrong, _ = faults(case, tmp_path / "x")
    for part in ("exit 2, not 3", "took ", "MiB", "not E-DATA-TYPE", "no 'no' in"):
        assert part in "; ".join(wrong)
