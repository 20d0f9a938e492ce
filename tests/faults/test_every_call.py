"""Every storage call of a stage fails, is cut short, kills the process or sees the power go; nothing saved is lost.

After each the same command must go on from no earlier than the last save that had returned, and leave the very bytes of
the run that nothing happened to.
"""

import os
import shutil
from pathlib import Path

import pytest

from faults.doubles import FAULTS, Counting, Failing, Killing, PowerCut, PowerCutError, using
from faults.toy import EVERY, Stage, result
from tetrad import storage
from tetrad.errors import UserError

pytestmark = pytest.mark.faults


@pytest.fixture(scope="module")
def calm(tmp_path_factory: pytest.TempPathFactory) -> tuple[int, dict[str, str]]:
    """How many calls a stage makes, and what it leaves."""
    folder, calls = tmp_path_factory.mktemp("calm"), Counting()
    with using(calls):
        Stage(folder / "stage").run()
    return calls.count, result(folder / "stage")


def goes_on(folder: Path, begun: list[int], expected: dict[str, str]) -> None:
    """The stage is done, or its next run begins no earlier than the last save and ends as if nothing had been."""
    saved = max(begun, default=0) // EVERY * EVERY
    if (folder / "model").is_dir():
        assert result(folder) == expected
        return
    stage = Stage(folder)
    with using(Counting()):
        stage.run()
    assert stage.began >= saved
    assert result(folder) == expected
    left = sorted(path.name for path in folder.iterdir())
    assert left == ["lock", "metrics.jsonl", "model", "samples.jsonl", "timing.jsonl"]


@pytest.mark.parametrize(("fault", "for_good"), [*((fault, False) for fault in FAULTS), ("ENOSPC", True)])
def test_a_failing_call(fault: str, for_good: bool, calm: tuple[int, dict[str, str]], tmp_path: Path) -> None:
    count, expected = calm
    told = 0
    for k in range(1, count + 1):
        folder, begun = tmp_path / str(k), list[int]()
        try:
            with using(Failing(k, fault, for_good)):
                Stage(folder, begun.append).run()
        except UserError as error:
            told += 1
            assert error.code in ("E-IO-SPACE", "E-IO-WRITE", "E-IO-READ"), error
            assert fault != "short"
            assert error.exit_code == 6
        goes_on(folder, begun, expected)
        shutil.rmtree(folder)
    assert told > count / 2 or fault == "short"


def test_a_kill_at_each_call(calm: tuple[int, dict[str, str]], tmp_path: Path) -> None:
    count, expected = calm
    for k in range(1, count + 1):
        folder = tmp_path / str(k)
        goes_on(folder, killed_at(k, folder), expected)
        shutil.rmtree(folder)


def killed_at(k: int, folder: Path) -> list[int]:
    """A child runs the stage until call k; returns the steps it began."""
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            with using(Killing(k)):
                Stage(folder, lambda step: os.write(writer, bytes([step])) and None).run()
        finally:
            os._exit(1)  # not reached: the call kills
    os.close(writer)
    with os.fdopen(reader, "rb") as pipe:
        begun = list(pipe.read())
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 9
    return begun


@pytest.mark.parametrize("lose", ["data", "names", "both"])
def test_a_power_cut_at_each_call(lose: str, calm: tuple[int, dict[str, str]], tmp_path: Path) -> None:
    count, expected = calm
    for k in range(1, count + 1):
        folder, grave, begun = tmp_path / str(k), tmp_path / f"grave-{k}", list[int]()
        grave.mkdir()
        calls = PowerCut(k, lose, folder, grave)
        with using(calls), pytest.raises(PowerCutError):
            Stage(folder, begun.append).run()
        calls.settle()
        goes_on(folder, begun, expected)
        shutil.rmtree(folder, ignore_errors=True)


@pytest.mark.parametrize("fault", FAULTS)
@pytest.mark.parametrize("for_good", [False, True])
def test_replacing_a_folder(fault: str, for_good: bool, tmp_path: Path) -> None:
    counting = Counting()
    with using(counting):
        replace_in(tmp_path / "0", counting)
    for k in range(1, counting.count + 1):
        place, calls = tmp_path / str(k), Failing(k, fault, for_good)
        failed = False
        try:
            replace_in(place, calls)
        except UserError:
            failed = True
        if not for_good:
            storage.verify_folder(place / "model")  # at once, without the help of the next run
        storage.remove_leftovers(place)
        kept = storage.verify_folder(place / "model")["version_of_test"]
        assert kept in ("old", "new")
        assert failed or kept == "new"
        assert [path.name for path in place.iterdir()] == ["model"]


def replace_in(place: Path, calls: Counting) -> None:
    storage.write_folder(place / "model", {"a": b"old"}, {"version_of_test": "old"})
    with using(calls):
        storage.write_folder(place / "model", {"a": b"new", "b": [b"1", b"2"]}, {"version_of_test": "new"})
