"""What every test shares: no network, one thread, checked types in the mathematics, tests that repeat.

The environment is set here, before any test imports torch, so that tests without torch stay quick and child processes
inherit it. A warning is an error (pyproject.toml).
"""

import os
from pathlib import Path

import pytest
from beartype import BeartypeConf
from beartype.claw import beartype_packages
from hypothesis import settings

os.environ |= {
    "HF_HUB_OFFLINE": "1",
    "TRANSFORMERS_OFFLINE": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "OMP_NUM_THREADS": "1",  # the tests' models are small: a second thread costs more than it brings
    "GLIBC_TUNABLES": "glibc.malloc.tcache_count=7",  # its own, or each of many commands would start itself anew
    "NO_COLOR": "1",
    "COLUMNS": "120",
}

settings.register_profile("tetrad", deadline=None, derandomize=True, max_examples=50, database=None)
settings.load_profile("tetrad")

# Arguments and results are held against their types while tests run; an int passes as a float.
beartype_packages(("tetrad.objectives", "tetrad.model"), conf=BeartypeConf(is_pep484_tower=True))

LONG_FIRST = ("learn", "dist", "faults", "parity", "cli", "conformance")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The folders with the longest files come first, so that no process is left with one at the end."""

    def rank(item: pytest.Item) -> int:
        folder = item.path.relative_to(Path(__file__).parent).parts[0]
        return LONG_FIRST.index(folder) if folder in LONG_FIRST else len(LONG_FIRST)

    items.sort(key=rank)
