"""Starts the ranks of a run on this machine with torch's elastic agent, and exits like the rank that ended first."""

import logging
import math
import os
import signal
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from threading import Event, Thread
from typing import Any, cast

from torch.distributed import Store, TCPStore  # type: ignore[attr-defined]
from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs, SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.launcher.api import LaunchConfig, elastic_launch

from tetrad.distributed.watchdog import beats, claimed_code
from tetrad.errors import Stopped, UserError

_UNHEARD_SECONDS = 3.0  # from the report of why all end, for a rank that nobody has heard of
_SLACK_SECONDS = 30  # beyond `grace`, to end after a signal


def launch(words: Sequence[str], nproc: int, grace: float, patience: float) -> int:
    """Runs `tetrad WORDS` as `nproc` processes; returns the exit code that they agree on. Raises UserError E-RANK-LOST
    if one was killed and no other is left to report it; Stopped if all were before they could. patience: seconds for
    which a rank is waited for that no longer responds when another is done."""
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
        with _stragglers_ended(store, nproc, patience) as ended:
            elastic_launch(config, sys.executable)(*safe, "-m", "tetrad", *words)
        return 0
    except (ChildFailedError, SignalException) as error:
        failure = error
    if (code := claimed_code(store)) is not None:
        return code
    if all(beat and beat.finished for beat in beats(store, nproc)):  # one did not end by itself
        return 0
    if isinstance(failure, SignalException):
        if failure.sigval in (signal.SIGTERM, signal.SIGINT):
            raise Stopped("before a process could say where; the same command goes on from there")
        return 128 + failure.sigval
    rank, process = failure.get_first_failure()
    who, again = f"rank {rank} (process {process.pid})", "the same command goes on"
    if process.pid in ended:
        raise UserError("E-RANK-LOST", f"{who} no longer answers, others are done", hint=again)
    cause = process.signal_name() if process.exitcode < 0 else f"exit code {process.exitcode}"
    hint = f"was it killed for memory? {again.capitalize()}"
    raise UserError("E-RANK-LOST", f"{who} ended with {cause} and said nothing", hint=hint)


@contextmanager
def _stragglers_ended(store: Store, nproc: int, patience: float) -> Iterator[set[int]]:
    """Gives the processes that were ended."""
    over, ended = Event(), set[int]()
    own = cast(Any, store).clone()
    watch = Thread(target=_end_stragglers, args=(own, nproc, patience, over, ended), daemon=True)
    watch.start()
    try:
        yield ended
    finally:
        over.set()
        watch.join()


def _end_stragglers(store: Store, nproc: int, patience: float, over: Event, ended: set[int]) -> None:
    """Kills a rank whose heartbeat stands still for `patience` seconds once another is done or gone: no rank would miss
    it. And one that never had any, for which the others have no process: then, or soon after one has reported why all
    end."""
    last: dict[int, tuple[int, float]] = {}  # each rank's last beat, and when it was first seen
    ending = done = math.inf
    while not over.wait(1.0):
        now, known, children = time.monotonic(), beats(store, nproc), _children()
        if claimed_code(store) is not None:
            ending = min(ending, now)
        if any(beat and (beat.finished or beat.process not in children) for beat in known):
            done = min(done, now)
        if now - ending >= _UNHEARD_SECONDS or now - done >= patience:
            ended |= children - {beat.process for beat in known if beat}
        for rank, beat in enumerate(known):
            if beat and last.setdefault(rank, (beat.number, now))[0] != beat.number:
                last[rank] = beat.number, now
            if beat and done < math.inf and now - last[rank][1] >= patience:
                ended |= {beat.process} & children
        for process in ended & children:
            _kill(process)


def _children() -> set[int]:
    """Of this process' main thread, all of them ranks; empty where there is no /proc."""
    with suppress(OSError):
        return set(map(int, Path(f"/proc/self/task/{os.getpid()}/children").read_text().split()))
    return set()


def _kill(process: int) -> None:
    with suppress(ProcessLookupError):
        os.kill(process, signal.SIGKILL)
