"""How long a bad input takes and how much memory, from the start of a command to its error: by the clock, so it runs
when nothing else does.

One case of each code, one of each command and all with large inputs are held to it as a user starts them, with all that
the interpreter does before and after. `test_bad_inputs` holds every case to the same limits without the start, for
which half a second is left.
"""

import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from faults import cases_config, cases_data, cases_models
from faults.bad_inputs import Case, faults, remove_world, started

pytestmark = pytest.mark.faults
CASES = [*cases_config.CASES, *cases_models.CASES, *cases_data.CASES]


def verb(case: Case) -> str:
    return case.words.split()[0] if isinstance(case.words, str) else case.words[0]


FIRST = {**{verb(case): case for case in reversed(CASES)}, **{case.code: case for case in reversed(CASES)}}
LARGE = re.compile(r"huge|million|100000|mib|gib|over-long|many", re.IGNORECASE)
CHOSEN = {case.id: case for case in (*FIRST.values(), *(case for case in CASES if LARGE.search(case.id)))}


@pytest.fixture(scope="module", autouse=True)
def leave_nothing() -> Iterator[None]:
    yield
    cases_config.release()
    remove_world()


@pytest.mark.parametrize("name", CHOSEN)
def test_from_the_start_to_the_error(name: str, tmp_path: Path) -> None:
    wrong, outcome = faults(CHOSEN[name], tmp_path / "x", started)
    assert not wrong, outcome


def test_the_harness_finds_what_is_wrong(tmp_path: Path) -> None:
    """A case that promises too much is told in every point."""
    case = Case("x", lambda folder: (folder / "r.toml").write_text("x"), "run r.toml", "E-DATA-TYPE", "no", 0.001, 1)
    wrong, _ = faults(case, tmp_path / "x", started)
    for part in ("exit 2, not 3", "took ", "MiB", "not E-DATA-TYPE", "no 'no' in"):
        assert part in "; ".join(wrong)
