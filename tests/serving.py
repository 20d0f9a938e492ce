"""The server of model folders, real and on loopback, in a thread of the tests' process."""

import asyncio
import json
import socket
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import uvicorn

from tetrad.inference import engine_process
from tetrad.server import chat, completions, tokens
from tetrad.server.app import create_app
from tetrad.server.guard import Limits
from tetrad.server.service import Service, load_service
from tetrad.settings.use import Serve


@dataclass(frozen=True)
class Running:
    url: str
    service: Service
    loop: asyncio.AbstractEventLoop


class EngineThread(threading.Thread):
    """The engine's process as a thread, which tests can look into."""

    exitcode, pid = 0, None

    def __init__(self, wire: socket.socket, *given: Any) -> None:
        super().__init__(daemon=True)
        self.wire, self.given = wire, given

    @classmethod
    def start(cls, *given: Any) -> tuple[socket.socket, "EngineThread"]:  # type: ignore[override]
        """As `engine_process.start`."""
        ours, theirs = socket.socketpair()
        thread = cls(theirs, *given)
        threading.Thread.start(thread)
        return ours, thread

    def run(self) -> None:
        with suppress(EOFError, ConnectionError), self.wire:
            engine_process.serve(self.wire, *self.given)

    def kill(self) -> None:
        """It ends with its socket."""


@contextmanager
def serving(models: Sequence[Path], settings: Serve = Serve()) -> Iterator[Running]:  # noqa: B008
    """At a free port, until the context is left."""
    service = load_service([str(model) for model in models], settings)
    routes = [route for part in (chat, completions, tokens) for route in part.routes(service)]
    config = uvicorn.Config(create_app(service, Limits(), routes), "127.0.0.1", 0, log_level="error", http="h11")
    server, ready = uvicorn.Server(config), threading.Event()
    loops: list[asyncio.AbstractEventLoop] = []

    async def run() -> None:
        loops.append(asyncio.get_running_loop())
        task = asyncio.create_task(server.serve())
        while not server.started and not task.done():
            await asyncio.sleep(0.005)
        ready.set()
        await task
        for served in service.models.values():
            await served.worker.stop()

    thread = threading.Thread(target=asyncio.run, args=(run(),), daemon=True)
    thread.start()
    try:
        assert ready.wait(30)
        port = server.servers[0].sockets[0].getsockname()[1]
        yield Running(f"http://127.0.0.1:{port}", service, loops[0])
    finally:
        server.should_exit = True
        thread.join(30)
        assert not thread.is_alive()


def ask(http: httpx.Client, path: str, body: dict[str, Any]) -> Any:
    """The answer, a good one."""
    answer = http.post(path, json=body)
    assert answer.status_code == 200, answer.text
    return answer.json()


def stream(http: httpx.Client, path: str, body: dict[str, Any]) -> list[Any]:
    """The events of a good answer; "[DONE]" as it stands."""
    answer = http.post(path, json=body | {"stream": True})
    assert answer.status_code == 200, answer.text
    assert answer.headers["content-type"].startswith("text/event-stream")
    assert answer.text.endswith("\n\n")
    events = [event.removeprefix("data: ") for event in answer.text.split("\n\n")[:-1]]
    return [event if event == "[DONE]" else json.loads(event) for event in events]


def until(holds: Callable[[], bool], seconds: float = 10.0) -> float:
    """Waits for it, not for ever; returns the seconds."""
    began = time.monotonic()
    while not holds():
        assert time.monotonic() < began + seconds
        time.sleep(0.002)
    return time.monotonic() - began
