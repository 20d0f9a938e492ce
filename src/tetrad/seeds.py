"""Random numbers as a function of (seed, purpose, numbers): nothing to save, nothing to replay, nothing shared.

A run that resumes at step 400 requests the numbers of step 400 and gets those of an uninterrupted run.
"""

import hashlib

import numpy as np

STRIDE = -0x61C8864680B583EB  # 2^64 over the golden ratio, odd, as a signed number: multiples lie far apart


def seed_for(seed: int, purpose: str, *numbers: int) -> int:
    """A 63-bit seed that depends on every argument; the same on every machine and Python version."""
    name = ":".join([str(seed), purpose, *map(str, numbers)])
    return int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "little") >> 1


def generator_for(seed: int, purpose: str, *numbers: int) -> np.random.Generator:
    """A separate numpy generator for one purpose (`"order"`, `"sampling"` ...) and step."""
    return np.random.Generator(np.random.Philox(seed_for(seed, purpose, *numbers)))
