"""Time a piece of work, and tell what share of the processors others took meanwhile."""

import os
import time
from collections.abc import Callable
from pathlib import Path


def busy() -> tuple[float, float]:
    """Processor seconds of the whole machine, and of this process with its children."""
    fields = [float(x) for x in Path("/proc/stat").read_text().split("\n")[0].split()[1:]]
    times = os.times()
    tick = os.sysconf("SC_CLK_TCK")
    return (sum(fields[:3]) + sum(fields[5:8])) / tick, sum(times[:4])


def measured(work: Callable[[], object]) -> tuple[float, float]:
    """Seconds, and the share of the processors' time that others took."""
    before, began = busy(), time.perf_counter()
    work()
    seconds, after = time.perf_counter() - began, busy()
    others = max(0.0, (after[0] - before[0]) - (after[1] - before[1]))
    return seconds, others / (seconds * (os.cpu_count() or 1))
