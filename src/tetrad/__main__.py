"""`tetrad` and `python -m tetrad`: the command line; training runs in a process whose freed memory stays together."""

import os
import sys

from tetrad.cli.main import main as command_line

_TRAIN = {"run", "pretrain", "sft", "reward", "dpo", "grpo", "ppo", "evaluate"}
_TUNABLES = "GLIBC_TUNABLES"


def main() -> int:
    """Runs the command that this process was started with and returns its exit code."""
    trains = _TRAIN.intersection(sys.argv[1:3]) or any(argument.startswith("--measure") for argument in sys.argv)
    if trains and _glibc() and _TUNABLES not in os.environ:
        _again("glibc.malloc.tcache_count=0:glibc.malloc.mxfast=0")
    return command_line()


def _glibc() -> bool:
    try:
        return os.confstr("CS_GNU_LIBC_VERSION") is not None
    except (AttributeError, ValueError):  # another system, another C library
        return False


def _again(tunables: str) -> None:
    """Restarts this process with settings that glibc reads only at process start.

    torch asks for aligned memory. glibc cuts it out of a larger piece, and keeps what it cuts off in caches for small
    requests: the piece that comes back is then too small for the same request. With tensors of ever-changing sizes,
    and oneDNN's compiled products among them, a process grew by half as much again (benchmarks/rss.py).
    """
    os.execve(sys.executable, sys.orig_argv, {**os.environ, _TUNABLES: tunables})


if __name__ == "__main__":
    sys.exit(main())
