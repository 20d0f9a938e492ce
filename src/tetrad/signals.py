"""An orderly stop: SIGTERM and Ctrl-C are answered within a second, whatever the main thread is doing.

Python runs a signal's handler between two bytecodes of the main thread, so a handler alone is silent while a step is
inside one long C call. A thread reads the signals from a pipe: it reports what the stop waits for, unless that is over
by then, and ends the process if a second Ctrl-C finds the main thread still in such a call; the disk survives a kill.
"""

import math
import os
import select
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

from tetrad.errors import Stopped

_SAME_KEYPRESS_SECONDS = 0.3  # torchrun forwards the Ctrl-C that the terminal has already sent
_ANSWER_SECONDS = 0.5  # what ends sooner needs no answer
_LAST_SECONDS = 1.0  # for the main thread to end after a second Ctrl-C

on_stop_request: list[Callable[[], None]] = []
"""Callbacks, run from a thread, for when this process is requested to stop."""


class Stop:
    """What SIGTERM and SIGINT do while `listening`.

    until: what the stop waits for; if empty, the first signal ends the work with `end()`. lost: what a second Ctrl-C,
    an immediate KeyboardInterrupt, loses. message: set while a step runs, which is abandoned after `grace` seconds, if
    that is set. wanted: a signal arrived.
    """

    def __init__(self, say: Callable[[str], None], doing: Callable[[], str], end: Callable[[], BaseException]) -> None:
        """say: prints a line, from any thread. doing: what is running, for the answer if nothing is waited for."""
        self.say, self.doing, self.end = say, doing, end
        self.wanted, self.message, self.until, self.lost = False, "", "", ""
        self.grace: float | None = None
        self._interrupted = math.inf

    def on_signal(self, number: int, _: FrameType | None) -> None:
        now = time.monotonic()
        if number == signal.SIGINT:
            if now - self._interrupted > _SAME_KEYPRESS_SECONDS:
                raise KeyboardInterrupt
            self._interrupted = min(self._interrupted, now)
        if self.grace is not None and not self.wanted:
            signal.setitimer(signal.ITIMER_REAL, max(self.grace, 1e-3))
        again, self.wanted = self.wanted, True
        if not (self.until or again):
            raise self.end()

    def on_alarm(self, _: int, __: FrameType | None) -> None:
        if self.message:
            raise Stopped(self.message)

    def answer(self) -> str:
        """The message while the main thread has not ended yet."""
        what = f"stopping {self.until}" if self.until else f"stopping as soon as what runs allows it ({self.doing()})"
        return f"{what}; a second Ctrl-C stops at once" + (f" and loses {self.lost}" if self.lost else "")

    @contextmanager
    def listening(self) -> Iterator[None]:
        """Signals reach the main thread only; elsewhere there is nothing to listen to."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        reading, writing = os.pipe()
        os.set_blocking(writing, False)
        thread = threading.Thread(target=self._watch, args=(reading,), daemon=True)
        handlers = {signal.SIGTERM: self.on_signal, signal.SIGINT: self.on_signal, signal.SIGALRM: self.on_alarm}
        before = {number: signal.signal(number, handler) for number, handler in handlers.items()}
        pipe_before = signal.set_wakeup_fd(writing, warn_on_full_buffer=False)
        thread.start()
        try:
            yield
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0)
            signal.set_wakeup_fd(pipe_before, warn_on_full_buffer=False)
            for number, handler in before.items():
                signal.signal(number, handler)
            os.close(writing)
            thread.join()
            os.close(reading)

    def _watch(self, pipe: int) -> None:
        """Runs until the pipe is closed. The times are when something is due, unless the process ends first."""
        first = interrupted = answer_due = end_due = math.inf
        while True:
            due = min(answer_due, end_due)
            wait = None if due == math.inf else max(0.0, due - time.monotonic())
            ready, now = select.select([pipe], [], [], wait)[0], time.monotonic()
            if ready:
                raw = os.read(pipe, 1)
                if not raw:
                    return
                if raw[0] in (signal.SIGTERM, signal.SIGINT) and first == math.inf:
                    first, answer_due = now, now + _ANSWER_SECONDS
                    for tell in on_stop_request:
                        tell()
                if raw[0] == signal.SIGINT:
                    if now - interrupted > _SAME_KEYPRESS_SECONDS:
                        end_due = min(end_due, now + _LAST_SECONDS)
                    interrupted = min(interrupted, now)
            elif now >= end_due:
                self.say("interrupted" + (f": lost is {self.lost}" if self.lost else ""))
                os._exit(130)
            else:
                self.say(self.answer())
                answer_due = math.inf
