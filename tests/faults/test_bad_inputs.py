"""Bad input of every kind ends as a real command with its code, its place and its exit status, and nothing is lost."""

from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import pytest

from faults import cases_config, cases_models
from faults.bad_inputs import Case, Outcome, faults, remove_world

pytestmark = pytest.mark.faults
TABLES = [*cases_config.CASES, *cases_models.CASES]
CASES = {case.id: case for case in TABLES}
Found = dict[str, "Future[tuple[list[str], Outcome]]"]


def test_ids_are_unique() -> None:
    assert len(CASES) == len(TABLES)


@pytest.fixture(scope="module")
def found(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Found]:
    """What became of the cases of this session, two of them at a time."""
    root = tmp_path_factory.mktemp("bad")
    chosen = [item.callspec.params["name"] for item in request.session.items if "callspec" in vars(item)]
    with ThreadPoolExecutor(2) as pool:
        yield {name: pool.submit(faults, CASES[name], root / name) for name in chosen if name in CASES}
        pool.shutdown(cancel_futures=True)
    cases_config.release()
    remove_world()


@pytest.mark.parametrize("name", CASES)
def test_a_bad_input(name: str, found: Found) -> None:
    wrong, outcome = found[name].result()
    assert not wrong, outcome


def test_the_harness_finds_what_is_wrong(tmp_path: Path) -> None:
    """A case that promises too much is told in every point."""
    case = Case("x", lambda folder: (folder / "r.toml").write_text("x"), "run r.toml", "E-DATA-TYPE", "no", 0.001, 1)
    wrong, _ = faults(case, tmp_path / "x")
    for part in ("exit 2, not 3", "took 0.", "MiB", "not E-DATA-TYPE", "no 'no' in"):
        assert part in "; ".join(wrong)
