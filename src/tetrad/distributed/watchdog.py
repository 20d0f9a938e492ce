"""One process among several: its heartbeat, its last message, and its end if it waits in vain.

Every second a thread of each rank writes to the common store that it is alive and in which collective it waits. The
same thread is notified of signals (`tetrad.signals`) and checks on the other ranks while the main thread is inside a
collective, where no Python runs. The first rank to end, by an error or on request, leaves its exit code in the store
and is the only one that prints; the others end silently with the same code. A rank waits `patience` seconds for the
others; for rank 0, which alone prepares, writes and evaluates, as long as it is alive.
"""

import json
import math
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, NamedTuple, cast

from torch.distributed import PrefixStore, Store  # type: ignore[attr-defined]
from torch.distributed.rendezvous import rendezvous

from tetrad.errors import Stopped, UserError
from tetrad.signals import on_stop_request

_BEAT = 1.0  # seconds between heartbeats
_AFTER_STOP = 10.0  # seconds that a rank requested to stop waits for one that no longer responds
_CLAIM = "tetrad/end"


class Beat(NamedTuple):
    """A heartbeat. inside: the collective that the rank waits in; finished: it is done, and only has to end."""

    number: int = 0
    inside: str | None = None
    finished: bool = False
    host: str = ""
    process: int = 0


@dataclass(frozen=True)
class _Missing:
    """A rank that is waited for. silent: its heartbeat has stopped; gone: silent, or it has ended."""

    host: str
    process: int
    silent: bool = False
    gone: bool = False


class Watchdog:
    """This rank's watchdog. phase: the running stage. report: prints an error, unless another rank has, and returns
    the exit code."""

    def __init__(self, patience: float, report: Callable[[BaseException], int]) -> None:
        store, self.rank, self.size = next(rendezvous("env://", timeout=timedelta(seconds=max(patience, 60.0))))
        attempt = _attempt()
        self.store: Any = PrefixStore(attempt, store) if attempt else store
        self.patience, self.report, self.phase = patience, report, ""
        self._beats = self._number = 0
        self._inside: tuple[float, str] | None = None  # the collective that the main thread is in, and since when
        self._stop_requested = math.inf  # when a signal requested this process to stop
        self._last_beats: dict[int, tuple[int, float]] = {}  # each rank's last beat, and when it was first seen
        self._lost = False  # the store, and with it all communication
        self._reported = False  # this rank has reported why all end
        self._hosts = self.rank == 0 and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True"  # the store itself
        self._ends = threading.Event()
        on_stop_request.append(self._request_stop)
        self._own: Store = cast(Any, self.store).clone()  # a connection of its own: a wait on the other would block it
        self._beat()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    @contextmanager
    def waiting(self, name: str, *, computes: bool = False) -> Iterator[None]:
        """Around a collective. Raises UserError E-RANK-LOST if another rank is gone. computes: an error may be another
        one's fault."""
        self._number += 1
        self._inside = time.monotonic(), name
        try:
            yield
        except RuntimeError as error:
            self._missing(math.inf)
            time.sleep(4 * _BEAT)  # by then it shows whose heartbeat stopped, or the failed rank has reported why
            gone = [text for text, one in self._missing(3 * _BEAT).items() if one.gone]
            if computes and not gone:
                raise
            raise self._error(self._text(gone, f"lost its connection in {name}")) from error
        finally:
            self._inside, self._last_beats = None, {}

    def stop(self) -> None:
        """Ends the watchdog of a rank that is done."""
        self._ends.set()
        self._thread.join()
        self._announce_end()

    def end_together(self, barrier: Callable[[], object]) -> None:
        """Until all ranks are done, unless one has failed: nobody would miss one that stops responding after that."""
        with suppress(RuntimeError):
            if claimed_code(self._own) is not None:
                return
        try:
            with self.waiting("last barrier"):
                barrier()
        except UserError as error:
            self._exit(self.report(error))

    def claim(self, code: int) -> tuple[bool, int]:
        """Whether this rank is the first to end and has not reported it yet, and the exit code of the first."""
        before, first = self._reported, {"rank": self.rank, "code": code}
        if not self._lost:  # if it is, connecting again would take a minute
            first = json.loads(self.store.clone().compare_set(_CLAIM, "", json.dumps(first)))
        self._reported = first["rank"] == self.rank
        return self._reported and not before, first["code"]

    def killed(self) -> list[str]:
        """The ranks of this machine that are no more and said nothing."""
        here, killed = socket.gethostname(), []
        with suppress(RuntimeError):
            for rank, beat in self._others():
                if beat and beat.host == here and not beat.finished and not _runs(beat.process):
                    killed.append(f"rank {rank} ({here}, process {beat.process}) no longer answers")
        return killed

    def _request_stop(self) -> None:
        self._stop_requested = min(self._stop_requested, time.monotonic())

    def _run(self) -> None:
        failing = claimed = math.inf
        while not self._ends.wait(_BEAT):
            now = time.monotonic()
            try:
                self._beat()
                if (code := claimed_code(self._own)) is not None:
                    claimed = min(claimed, now)
                    if self._inside and now - claimed >= _BEAT:
                        self._exit(code)
                elif self._inside:
                    self._check_others(now)
                failing = math.inf
            except RuntimeError:  # the store is gone, and with it our launcher
                failing = min(failing, now)
                if now - failing > 5 * _BEAT:
                    self._lost = True
                    self._exit(self.report(self._error(self._text([], "lost the process that started it"))))

    def _beat(self) -> None:
        self._beats += 1
        inside = self._inside and f"{self._inside[1]}, collective {self._number}"
        beat = Beat(self._beats, inside, self._ends.is_set(), socket.gethostname(), os.getpid())
        self._own.set(f"tetrad/beat/{self.rank}", json.dumps(beat))

    def _others(self) -> Iterator[tuple[int, Beat | None]]:
        return ((rank, beat) for rank, beat in enumerate(beats(self._own, self.size)) if rank != self.rank)

    def _check_others(self, now: float) -> None:
        """Ends this process if it has waited long enough for another one."""
        since, name = self._inside or (now, "")
        stopping = self._stop_requested < math.inf
        limit = min(self.patience, _AFTER_STOP + self._stop_requested - since)
        missing = self._missing(min(self.patience, _AFTER_STOP) if stopping else self.patience - 2 * _BEAT)
        if now - since < limit or not missing:
            return
        text = self._text(list(missing), f"has waited {now - since:.0f} s in {name}")
        stopped = Stopped(f"{text}; the same command goes on from the last checkpoint")
        code = self.report(stopped if stopping else self._error(text))
        self._kill_silent(missing.values())
        self._exit(code)

    def _kill_silent(self, others: Iterable[_Missing]) -> None:
        """Those of this machine: stopped, they would not hear the launcher's SIGTERM."""
        for one in others:
            if one.silent and one.host == socket.gethostname():
                with suppress(OSError):
                    os.kill(one.process, signal.SIGKILL)

    def _missing(self, limit: float) -> dict[str, _Missing]:
        """Ranks not to wait for any longer, by a text that says why. limit: of seconds without a beat."""
        now, missing = time.monotonic(), dict[str, _Missing]()
        mine = self._inside and f"{self._inside[1]}, collective {self._number}"
        for rank, known in self._others():
            number, inside, finished, host, process = known or Beat()
            if self._last_beats.setdefault(rank, (number, now))[0] != number:
                self._last_beats[rank] = number, now
            who = f"rank {rank} ({host}, process {process})" if known else f"rank {rank}"
            silent = now - self._last_beats[rank][1] >= limit
            if finished or silent:
                state = "has ended" if finished else "no longer answers"
                missing[f"{who} {state}"] = _Missing(host, process, silent=silent and known is not None, gone=True)
            elif inside and inside != mine:
                missing[f"{who} waits in {inside}"] = _Missing(host, process)
            elif not inside and rank and self._stop_requested == math.inf:
                missing[f"{who} is still at work"] = _Missing(host, process)
        return missing

    def _text(self, others: Sequence[str], why: str) -> str:
        return "; ".join([*others, f"rank {self.rank} ({socket.gethostname()}) {why}"])

    def _error(self, text: str) -> UserError:
        hint = "see what became of it (killed for memory?); the same command goes on from the last checkpoint"
        return UserError("E-RANK-LOST", text, where=self.phase, hint=hint)

    def _announce_end(self) -> None:
        """Announces that this rank ends; if it hosts the store, waits for the others, so they can still read why."""
        self._ends.set()
        began, self._last_beats = time.monotonic(), {}
        with suppress(RuntimeError):
            self._beat()
            while self._hosts and time.monotonic() - began < _AFTER_STOP:
                if sum(one.gone for one in self._missing(3 * _BEAT).values()) == self.size - 1:
                    break
                time.sleep(_BEAT / 10)

    def _exit(self, code: int) -> None:
        self._announce_end()
        for stream in (sys.stdout, sys.stderr):
            stream.flush()
        os._exit(code)


def _attempt() -> str:
    """Names a restart by torchrun on one machine, where the store still has what the ranks before left; agents of
    several machines count for themselves, and make a new store each time."""
    count = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    return count if count != "0" and os.environ.get("GROUP_WORLD_SIZE") == "1" else ""


_watchdog: Watchdog | None = None


def label() -> str:
    """Where an error happened, if processes train together."""
    return f" [rank {_watchdog.rank} of {_watchdog.size}, {socket.gethostname()}]" if _watchdog else ""


def join(patience: float = 300.0, report: Callable[[BaseException], int] = lambda _: 1) -> Watchdog:
    """This process's watchdog, started if there is none."""
    global _watchdog
    _watchdog = _watchdog or Watchdog(patience, report)
    return _watchdog


def cause(error: BaseException) -> BaseException:
    """E-RANK-LOST instead of a stop that the launcher requested since another rank was killed."""
    if not (_watchdog and isinstance(error, Stopped) and (killed := _watchdog.killed())):
        return error
    stopped = str(error).partition(";")[0].removeprefix("stopped ")
    return _watchdog._error(_watchdog._text(killed, f"stopped {stopped}"))


def _runs(process: int) -> bool:
    """Whether it exists and is no zombie."""
    try:
        os.kill(process, 0)
        with open(f"/proc/{process}/stat") as stat:
            return not stat.read().rpartition(")")[2].startswith(" Z")
    except ProcessLookupError:
        return False
    except OSError:  # another user's, or a system without /proc
        return True


def claim(code: int) -> tuple[bool, int]:
    """Whether this process is the first of all to end, so that it must report why, and the exit code of the first."""
    if not (_watchdog or os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"):
        return os.environ["RANK"] == "0", code  # too early: there is no store
    try:
        return join().claim(code)
    except RuntimeError:  # nobody is left to agree with
        return True, code


def beats(store: Store, size: int) -> list[Beat | None]:
    """Each rank's last; None of one that never wrote any."""
    keys = [f"tetrad/beat/{rank}" for rank in range(size)]
    return [Beat(*json.loads(store.get(key))) if store.check([key]) else None for key in keys]


def claimed_code(store: Store) -> int | None:
    """The exit code of the rank that ended first, if one has."""
    return json.loads(store.get(_CLAIM))["code"] if store.check([_CLAIM]) else None
