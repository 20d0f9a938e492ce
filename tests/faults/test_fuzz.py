"""A short run of the fuzzer over every target; `python tests/faults/fuzz.py` runs one for long."""

from pathlib import Path

import pytest

from faults.fuzz import TARGETS, Target, findings, mutations

COUNT = 1000
SEED = 20


@pytest.mark.parametrize("name", TARGETS)
def test_a_value_or_an_error_for_the_user(name: str) -> None:
    assert not findings(TARGETS[name], SEED, COUNT)


@pytest.mark.parametrize("name", TARGETS)
def test_inputs_reach_both_ends(name: str, tmp_path: Path) -> None:
    """Some mutated inputs are still read and most are refused, so the fuzz is neither harmless nor noise."""
    target, read = TARGETS[name](tmp_path), 0
    for content in mutations(target, SEED, 300):
        try:
            target.read(content)
        except Exception:
            continue
        read += 1
    # A manifest vouches for itself: hardly a change goes unseen. Of plain text hardly a change is wrong.
    assert 0 < read < 200 or name in ("manifest", "txt")


def test_findings_are_found() -> None:
    def broken(_: Path) -> Target:
        return Target([b'{"a": 1}'], lambda content: {}["b"] if b"9" in content else None, "json")

    found = findings(broken, SEED, 200)
    assert found
    assert "KeyError" in found[0]


def test_inputs_repeat_by_their_seed(tmp_path: Path) -> None:
    target = TARGETS["recipe"](tmp_path)
    assert list(mutations(target, 1, 50)) == list(mutations(target, 1, 50))
    assert list(mutations(target, 1, 50)) != list(mutations(target, 2, 50))
