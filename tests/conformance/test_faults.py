"""The faults that can be planted are still faults of this source: each place is there, once or first, and each test."""

import pytest

from planted_faults import FAULTS, ROOT, Fault


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.item)
def test_the_place_and_the_test_are_there(fault: Fault) -> None:
    assert fault.old in (ROOT / "src/tetrad" / fault.file).read_text()
    assert fault.old != fault.new
    file, _, name = fault.test.partition("::")
    assert f"def {name}(" in (ROOT / "tests" / file).read_text()


def test_every_point_of_the_checklist_has_one() -> None:
    points = {int(fault.item.split()[0]) for fault in FAULTS if fault.item[0].isdigit()}
    assert points == set(range(1, 37))
