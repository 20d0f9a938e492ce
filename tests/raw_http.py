"""Servers on a free port of this computer, in a thread, and raw requests to them."""

import json
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any, NamedTuple

import pytest

from tetrad.server import listen
from tetrad.server.guard import Guard


class Answer(NamedTuple):
    """What came back, until the server closed or the answer was whole."""

    status: int
    headers: dict[str, str]
    body: bytes

    @property
    def json(self) -> Any:
        return json.loads(self.body)

    @property
    def error(self) -> dict[str, Any]:
        """OpenAI's error object, which has these four fields and no others."""
        error: dict[str, Any] = self.json["error"]
        assert set(error) == {"message", "type", "param", "code"} and set(self.json) == {"error"}
        return error


@contextmanager
def listening(guard: Guard, *workers: Any) -> Iterator[int]:
    """The port of a server that ends with the block, and with it these workers."""
    ready, ports = threading.Event(), list[int]()

    def started(port: int) -> None:
        ports.append(port)
        ready.set()

    server = listen.Server(guard, "127.0.0.1", 0, started, workers)
    server.capture_signals = nullcontext  # type: ignore[method-assign, assignment]  # they reach the main thread only
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    assert ready.wait(20)
    try:
        yield ports[0]
    finally:
        server.should_exit = True
        thread.join(20)
        assert not thread.is_alive()


def connect(port: int, timeout: float = 20) -> socket.socket:
    return socket.create_connection(("127.0.0.1", port), timeout)


def read_answer(connection: socket.socket, method: str = "") -> Answer:
    """One answer and no byte more; without a length it ends with the connection."""
    head = b""
    while not head.endswith(b"\r\n\r\n"):
        if not (part := connection.recv(1)):
            pytest.fail(f"closed after {head!r}")
        head += part
    first, *lines = head.decode("latin-1").strip().split("\r\n")
    headers = {name.lower(): value for name, _, value in (line.partition(": ") for line in lines)}
    length, body = 0 if method == "HEAD" else int(headers.get("content-length", 1 << 40)), b""
    while len(body) < length and (part := connection.recv(min(65536, length - len(body)))):
        body += part
    return Answer(int(first.split()[1]), headers, body)


def is_closed(connection: socket.socket) -> bool:
    """Whether the other side ends the connection and sends nothing more."""
    try:
        return connection.recv(1000) == b""
    except ConnectionResetError:
        return True


def raw(port: int, data: bytes) -> Answer:
    """Sends bytes as they are and reads one answer."""
    with connect(port) as connection:
        connection.sendall(data)
        return read_answer(connection, data.split()[0].decode("latin-1") if data.split() else "")


def ask(port: int, method: str, path: str, body: Any = None, **headers: str) -> Answer:
    """body: bytes as they are, anything else as JSON. headers: with _ for -; of an empty value is left out."""
    data = b"" if body is None else body if isinstance(body, bytes) else json.dumps(body).encode()
    given = {"host": f"localhost:{port}", "connection": "close"}
    if body is not None:
        given |= {"content-type": "application/json", "content-length": str(len(data))}
    given |= {name.replace("_", "-"): value for name, value in headers.items()}
    lines = [f"{method} {path} HTTP/1.1", *(f"{name}: {value}" for name, value in given.items() if value)]
    return raw(port, "\r\n".join(lines).encode("latin-1") + b"\r\n\r\n" + data)
