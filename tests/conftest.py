"""What every test shares: no network, one thread, tests that repeat; a warning is an error (pyproject.toml).

The environment is set here, before any test imports torch, so that tests without torch stay quick and child processes
inherit it.
"""

import os

from hypothesis import settings

os.environ |= {
    "HF_HUB_OFFLINE": "1",
    "TRANSFORMERS_OFFLINE": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "OMP_NUM_THREADS": "1",  # the tests' models are small: a second thread costs more than it brings
    "NO_COLOR": "1",
    "COLUMNS": "120",
}

settings.register_profile("tetrad", deadline=None, derandomize=True, max_examples=50, database=None)
settings.load_profile("tetrad")
