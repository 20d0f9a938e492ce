"""Starts the ranks of a run on this machine with torch's elastic agent, and exits like the rank that ended first."""

import logging
import math
import os
import signal
import sys
from collections.abc import Sequence

from torch.distributed import TCPStore  # type: ignore[attr-defined]
from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs, SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.launcher.api import LaunchConfig, elastic_launch

from tetrad.distributed.watchdog import claimed_code
from tetrad.errors import Stopped, UserError

_SLACK_SECONDS = 30  # beyond `grace`, to end after a signal


def launch(words: Sequence[str], nproc: int, grace: float) -> int:
    """Runs `tetrad WORDS` as `nproc` processes; returns the exit code that they agree on. Raises UserError E-RANK-LOST
    if one was killed and no other is left to report it; Stopped if all were before they could."""
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, len(os.sched_getaffinity(0)) // nproc)))
    logging.disable(logging.CRITICAL)  # the agent's: ranks report errors themselves
    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False, multi_tenant=True)
    config = LaunchConfig(
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=nproc,
        run_id="tetrad",
        rdzv_backend="static",
        rdzv_endpoint=f"127.0.0.1:{store.port}",
        rdzv_configs={"rank": 0, "timeout": 900},
        max_restarts=0,
        shutdown_timeout=math.ceil(grace) + _SLACK_SECONDS,
        logs_specs=DefaultLogsSpecs(log_dir=os.devnull),
    )
    safe = [] if os.path.basename(sys.argv[0]) == "__main__.py" else ["-P"]  # as it was started itself
    failure: ChildFailedError | SignalException
    try:
        elastic_launch(config, sys.executable)(*safe, "-m", "tetrad", *words)
        return 0
    except (ChildFailedError, SignalException) as error:
        failure = error
    if (code := claimed_code(store)) is not None:
        return code
    if isinstance(failure, SignalException):
        if failure.sigval in (signal.SIGTERM, signal.SIGINT):
            raise Stopped("before a process could say where; the same command goes on from there")
        return 128 + failure.sigval
    rank, process = failure.get_first_failure()
    cause = process.signal_name() if process.exitcode < 0 else f"exit code {process.exitcode}"
    what = f"rank {rank} (process {process.pid}) ended with {cause} and said nothing"
    raise UserError("E-RANK-LOST", what, hint="was it killed for memory? The same command goes on")
