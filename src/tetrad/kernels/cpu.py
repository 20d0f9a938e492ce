"""What the processor can do, as the system tells it. No torch."""

from functools import cache
from pathlib import Path

CPUINFO = Path("/proc/cpuinfo")
NO_BFLOAT16 = "this CPU has no units for bfloat16 (AMX): it would be several times slower than float32"


@cache
def multiplies_bfloat16() -> bool:
    """Whether this CPU has units for products of bfloat16 matrices (AMX), about four times as fast as float32 ones;
    without them bfloat16 is the slower of the two."""
    try:
        return "amx_bf16" in CPUINFO.read_text().split()
    except OSError:
        return False
