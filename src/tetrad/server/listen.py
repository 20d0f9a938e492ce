"""How uvicorn is run: what it lacks against slow clients, and an orderly end."""

import asyncio
import gc
import os
import signal
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from types import FrameType
from typing import Any

import h11
import uvicorn
from uvicorn.protocols.http.h11_impl import H11Protocol

from tetrad.server.guard import Guard, Refused
from tetrad.server.worker import Worker

_HEADER_SECONDS = 10.0
_WRITE_SECONDS = 30.0  # for a client that reads too slowly
_LINGER_SECONDS = 2.0
_IDLE_SECONDS = 15  # clients keep connections for less
_DRAIN_SECONDS = 30
_CONNECTIONS = 4096
_SWITCH_SECONDS = (
    0.0005  # Python's own 5 ms, at each of a request's four turns, is how long the loop waits for a reward
)
_FAULTS = {400: "this is no HTTP request", 414: "the address is too long", 431: "the headers are too large"}


class _Transport:
    """Closes politely: what the other side still sends is read and dropped for a while, or it would see a reset in
    place of the answer."""

    def __init__(self, transport: asyncio.Transport, loop: asyncio.AbstractEventLoop) -> None:
        self._transport, self._loop, self._closing = transport, loop, False

    def __getattr__(self, name: str) -> Any:
        return getattr(self._transport, name)

    def is_closing(self) -> bool:
        return self._closing or self._transport.is_closing()

    def close(self) -> None:
        if not self.is_closing():
            seconds = _WRITE_SECONDS if self._transport.get_write_buffer_size() else _LINGER_SECONDS
            self._closing = True
            self._transport.write_eof()
            self._transport.resume_reading()
            self._loop.call_later(seconds, self._transport.abort)


class Connection(H11Protocol):
    """Cut are requests whose headers take too long, and clients that do not read."""

    _late: asyncio.TimerHandle | None = None
    _full: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(_Transport(transport, self.loop))  # type: ignore[arg-type]
        self._late = self.loop.call_later(_HEADER_SECONDS, transport.abort)
        if len(self.connections) > _CONNECTIONS:
            transport.abort()

    def data_received(self, data: bytes) -> None:
        if self.transport.is_closing():
            return
        super().data_received(data)
        begun = self.conn.their_state is h11.IDLE and (self.cycle is None or self.conn.trailing_data[0])
        if not begun and self._late:
            self._late.cancel()
        self._late = (self._late or self.loop.call_later(_HEADER_SECONDS, self.transport.abort)) if begun else None

    def pause_writing(self) -> None:
        super().pause_writing()
        self._full = self._full or self.loop.call_later(_WRITE_SECONDS, self.transport.abort)

    def resume_writing(self) -> None:
        super().resume_writing()
        if self._full:
            self._full.cancel()
        self._full = None

    def connection_lost(self, exc: Exception | None) -> None:
        super().connection_lost(exc)
        for timer in (self._late, self._full):
            if timer:
                timer.cancel()

    def send_400_response(self, msg: str) -> None:
        """uvicorn calls it for all that h11 refuses; the exception says what it is."""
        status = getattr(sys.exception(), "error_status_hint", 400)
        if status == 431 and b"\n" not in self.conn.trailing_data[0]:
            status = 414
        if self.conn.our_state not in (h11.IDLE, h11.SEND_RESPONSE):
            return self.transport.abort()
        response = Refused(status, _FAULTS.get(status, msg), code="invalid_request").response
        event = h11.Response(status_code=status, headers=[*response.raw_headers, (b"connection", b"close")])
        for part in (event, h11.Data(data=bytes(response.body)), h11.EndOfMessage()):
            self.transport.write(self.conn.send(part) or b"")
        self.transport.close()


class Server(uvicorn.Server):
    """The first signal lets open requests end and refuses new ones; a second Ctrl-C ends at once."""

    def __init__(
        self, guard: Guard, host: str, port: int, started: Callable[[int], None], workers: Sequence[Worker] = ()
    ) -> None:
        """started: is called with the port when requests can come; workers: end what is open when the time is over."""
        rest: dict[str, Any] = {
            "log_level": "error",
            "access_log": False,
            "server_header": False,
            "proxy_headers": False,
            "ws": "none",
        }
        rest |= {"timeout_keep_alive": _IDLE_SECONDS, "timeout_graceful_shutdown": 3, "http": Connection}
        super().__init__(uvicorn.Config(guard, host, port, h11_max_incomplete_event_size=guard.limits.header, **rest))
        self._guard, self._started, self._workers = guard, started, workers

    async def main_loop(self) -> None:
        """Until a signal, and then until nothing is open or the time for that is over."""
        sys.setswitchinterval(_SWITCH_SECONDS)
        gc.collect()
        gc.freeze()  # models and libraries stay: to walk through them held everything up for a sixth of a second
        self._started(self.servers[0].sockets[0].getsockname()[1])
        await super().main_loop()
        self._guard.draining = True
        for _ in range(_DRAIN_SECONDS * 10):
            if self._guard.open:
                await asyncio.sleep(0.1)
        for worker in self._workers:
            await worker.stop()

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Without uvicorn's second life of a signal, which would end the process with an error."""
        before = {number: signal.signal(number, self.handle_exit) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        if self.should_exit and sig == signal.SIGINT:
            os._exit(130)
        self.should_exit = True
