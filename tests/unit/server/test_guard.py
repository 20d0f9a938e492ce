"""What is let in, by raw requests to a server on this computer: every case of the table of bad requests."""

import asyncio
import base64
import json
import logging
import os
import socket
import time
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path

import pytest
from starlette.requests import Request
from starlette.responses import JSONResponse, PlainTextResponse, StreamingResponse
from starlette.routing import Route

from raw_http import Answer, ask, connect, is_closed, listening, raw, read_answer
from tetrad.errors import UserError
from tetrad.server import listen
from tetrad.server.app import create_app
from tetrad.server.guard import Guard, Limits, Refused, Turnover, payload
from tetrad.server.service import Service
from tetrad.settings.use import Serve

KEY = "k" * 24
SMALL = Limits(body=1 << 16, seconds=0.6, requests=4)
JSON = {"content_type": "application/json"}


async def echo(request: Request) -> JSONResponse:
    return JSONResponse(await payload(request))


async def wait(request: Request) -> PlainTextResponse:
    await asyncio.sleep((await payload(request))["seconds"])
    return PlainTextResponse("done")


async def fails(request: Request) -> JSONResponse:
    fault = (await payload(request))["fault"]
    if fault == "user":
        raise UserError("E-DATA-LONG", "the prompt has 9 tokens; 8 fit", hint="shorten it")
    if fault == "refused":
        raise Refused(404, "there is no such model", "model", "model_not_found")
    raise ValueError("the secret of the traceback")


async def large(_: Request) -> StreamingResponse:
    async def parts():  # type: ignore[no-untyped-def]
        for _ in range(256):
            yield b"x" * 65536

    return StreamingResponse(parts())


ROUTES = [
    Route("/v1/echo", echo, methods=["POST"]),
    Route("/v1/wait", wait, methods=["POST"]),
    Route("/v1/fails", fails, methods=["POST"]),
    Route("/large", large),
]


def guard(limits: Limits) -> Guard:
    return create_app(Service({}, None, Serve()), limits, ROUTES)


def resident() -> int:
    """Bytes in memory of this process, which is the server's too."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


@pytest.fixture(scope="module")
def own() -> Guard:
    """Without a key."""
    return guard(SMALL)


@pytest.fixture(scope="module")
def port(own: Guard) -> Iterator[int]:
    with listening(own) as port:
        yield port


@pytest.fixture(scope="module")
def locked() -> Iterator[int]:
    """With a key, as if other computers could connect."""
    with listening(guard(replace(SMALL, keys=frozenset({KEY.encode()}), loopback=False))) as port:
        yield port


@pytest.fixture(autouse=True)
def waits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(listen, "_HEADER_SECONDS", 0.6)
    monkeypatch.setattr(listen, "_WRITE_SECONDS", 0.6)


def refused(answer: Answer, status: int, code: str | None = None) -> Answer:
    assert answer.status == status, answer
    error = answer.error
    assert error["message"] and (code is None or error["code"] == code), error
    return answer


# Bodies: H001, H002, H004, H005, H006


@pytest.mark.parametrize("body", [None, b"", b"null", b"[]", b'"x"', b"0", b"true"])
def test_a_body_is_an_object(port: int, body: bytes | None) -> None:
    given = JSON if body is None else {}
    refused(ask(port, "POST", "/v1/echo", body, **given), 400, "invalid_json")


@pytest.mark.parametrize(
    ("body", "place"),
    [
        (b'{"a": ', "line 1 column 6"),
        (b'{"a": 1}x', "line 1 column 9"),
        (b'{"a": 1}{"b": 2}', "line 1 column 9"),
        (b'{\n"a": NaN}', "line 2 column 6"),
        (b'{"a": -Infinity}', "line 1 column 8"),
        (b'{"a": 1e999}', "1e999"),
        (b'{"a": 1, "a": 1}', "a is given twice"),
        (b'{"b": {"a": 1, "a": 2}}', "a is given twice"),
        (b'{"a": "\\ud800"}', "line 1 column"),
        (b'{"a": "\\ud800x"}', "line 1 column"),
        (b'{"a": "\xff"}', "position 7"),
        (b'{"a": "\xe4\xbd"}', "position 7"),
        (b'{"a": ' + b"[" * 32 + b"]" * 32 + b"}", "nests deeper than 32"),
        (b'{"a": ' + b"[" * 5000 + b"]" * 5000 + b"}", "line 1 column"),
        (b'{"a": ' + b"9" * 5000 + b"}", "line 1 column"),
    ],
)
def test_a_body_is_strict_json(port: int, body: bytes, place: str) -> None:
    answer = refused(ask(port, "POST", "/v1/echo", body), 400, "invalid_json")
    assert place in answer.error["message"]


@pytest.mark.parametrize("value", [{"a": "\u6f22\U0001f600\x00"}, {"a": [[]] * 3, "b": 1e300}, {}])
def test_what_is_json_arrives(port: int, value: dict[str, object]) -> None:
    assert ask(port, "POST", "/v1/echo", value).json == value
    deep = b'{"a": ' + b"[" * 31 + b"]" * 31 + b"}"
    assert ask(port, "POST", "/v1/echo", deep).status == 200


def test_a_large_body_is_refused_before_it_is_read(port: int) -> None:
    head = (
        f"POST /v1/echo HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\nContent-Length: {1 << 30}\r\n"
    )
    answer = refused(raw(port, head.encode() + b"\r\n"), 413)
    assert answer.headers["connection"] == "close"
    refused(raw(port, head.encode() + b"Expect: 100-continue\r\n\r\n"), 413)


def test_a_large_body_in_chunks_is_not_kept(port: int) -> None:
    head = b"POST /v1/echo HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
    chunk, before = b"8000\r\n" + b" " * 0x8000 + b"\r\n", resident()
    with connect(port) as connection:
        connection.sendall(head + b"Transfer-Encoding: chunked\r\n\r\n")
        for _ in range(512):  # 16 MiB, the client reads no answer before
            connection.sendall(chunk)
        answer = refused(read_answer(connection), 413)
        assert answer.headers["connection"] == "close" and is_closed(connection)
    assert resident() - before < 4 << 20
    with connect(port) as connection:
        connection.sendall(head + b"Transfer-Encoding: chunked\r\n\r\n" + b"10001\r\n" + b" " * 0x10001)
        refused(read_answer(connection), 413)  # before the end


@pytest.mark.parametrize(
    "kind",
    ["text/plain", "application/x-www-form-urlencoded", "multipart/form-data", "", "application/json; charset=gbk"],
)
def test_other_kinds_of_content_are_refused(port: int, kind: str) -> None:
    refused(ask(port, "POST", "/v1/echo", {}, content_type=kind), 415)


def test_json_in_other_letters_is_taken(port: int) -> None:
    assert ask(port, "POST", "/v1/echo", {}, content_type='Application/JSON; charset="UTF-8"').status == 200


# Framing: H007, H008, H037


@pytest.mark.parametrize(
    "fields",
    [
        "Content-Length: -1",
        "Content-Length: 2, 3",
        "Content-Length: 2\r\nContent-Length: 3",
        "Content-Length: 0x2",
        "Content-Length: 2\r\nTransfer-Encoding: chunked",
        "Transfer-Encoding: chunked\r\nContent-Length: 2",
        "Transfer-Encoding : chunked",
    ],
)
def test_ambiguous_lengths_end_the_connection(port: int, fields: str) -> None:
    head = f"POST /v1/echo HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n{fields}\r\n\r\n"
    smuggled = b"{}GET /health HTTP/1.1\r\nHost: localhost\r\n\r\n"
    with connect(port) as connection:
        connection.sendall(head.encode() + smuggled)
        refused(read_answer(connection), 400, "invalid_request")
        assert is_closed(connection)  # no answer to the second request


def test_a_length_beside_chunks_is_refused_even_where_both_would_do(port: int) -> None:
    head = b"POST /v1/echo HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\nContent-Length: 12\r\n"
    body = b"2\r\n{}\r\n0\r\n\r\n"
    refused(raw(port, head + b"Transfer-Encoding: chunked\r\n\r\n" + body), 400, "invalid_request")


def test_other_transfer_encodings_are_refused(port: int) -> None:
    head = b"POST /v1/echo HTTP/1.1\r\nHost: localhost\r\nTransfer-Encoding: gzip, chunked\r\n\r\n"
    refused(raw(port, head), 501)


def test_a_length_that_is_too_small_leaves_no_request(port: int) -> None:
    head = b"POST /v1/echo HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\nContent-Length: 2\r\n\r\n"
    with connect(port) as connection:
        connection.sendall(head + b"{}{}{}\r\n\r\n")
        assert read_answer(connection).status == 200
        refused(read_answer(connection), 400, "invalid_request")
        assert is_closed(connection)


def test_a_length_that_is_too_large_times_out(port: int) -> None:
    head = b"POST /v1/echo HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\nContent-Length: 9\r\n\r\n"
    began = time.monotonic()
    answer = refused(raw(port, head + b"{}"), 408)
    assert 0.5 < time.monotonic() - began < 3 and answer.headers["connection"] == "close"


@pytest.mark.parametrize("end", ["", "\r\n\r\n"])
def test_headers_have_a_limit(port: int, end: str) -> None:
    start = "GET /health HTTP/1.1\r\nHost: localhost\r\n"
    refused(raw(port, f"{start}X: {'x' * (1 << 16)}{end}".encode()), 431)
    refused(raw(port, (start + "".join(f"X{i}: {'y' * 16}\r\n" for i in range(1000)) + end).encode()), 431)
    refused(raw(port, f"GET /{'x' * (1 << 20)}{end and f' HTTP/1.1{end}'}".encode()), 414)


def test_headers_have_a_number(port: int) -> None:
    start = "GET /health HTTP/1.1\r\nHost: localhost\r\n"
    refused(raw(port, (start + "X: y\r\n" * 100 + "\r\n").encode()), 431)
    assert raw(port, (start + "X: y\r\n" * 99 + "\r\n").encode()).status == 200
    assert raw(port, f"{start}X: {'x' * 8000}\r\n\r\n".encode()).status == 200


def test_an_address_has_a_limit(port: int) -> None:
    refused(ask(port, "GET", "/" + "x" * 9000), 414)
    refused(ask(port, "GET", "/health?" + "x" * 9000), 414)


@pytest.mark.parametrize(
    "data", [b"\r\n\r\n\r\n", b"hello\r\n\r\n", b"\x16\x03\x01\x02\x00\x01\x00\r\n\r\n", b"GET / HTTP/1.1\r\n\r\n"]
)
def test_what_is_no_http_is_refused(port: int, data: bytes) -> None:
    refused(raw(port, data), 400)


def test_requests_one_after_another_on_one_connection(port: int) -> None:
    with connect(port) as connection:
        connection.sendall(b"GET /health HTTP/1.1\r\nHost: localhost\r\n\r\n" * 3)
        answered = b""
        while answered.count(b'{"status":"ok"}') < 3:
            part = connection.recv(65536)
            assert part
            answered += part


def test_other_versions_and_upgrades_do_not_hang(port: int) -> None:
    assert raw(port, b"GET /health HTTP/1.0\r\nHost: localhost\r\n\r\n").status == 200
    upgrade = b"GET /health HTTP/1.1\r\nHost: localhost\r\nConnection: Upgrade\r\nUpgrade: "
    assert raw(port, upgrade + b"websocket\r\n\r\n").status == 200
    assert raw(port, upgrade + b"h2c\r\nHTTP2-Settings: AAMAAABk\r\n\r\n").status == 200
    assert raw(port, b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n").status in (400, 403)


# Routes: H010, H038


def test_methods_and_paths(port: int) -> None:
    answer = refused(ask(port, "GET", "/v1/echo"), 405)
    assert answer.headers["allow"] == "POST"
    assert set(refused(ask(port, "POST", "/health", {}), 405).headers["allow"].split(", ")) == {"GET", "HEAD"}
    for method in ("TRACE", "OPTIONS", "PUT", "DELETE", "PATCH", "BREW"):
        refused(ask(port, method, "/health"), 405)
    refused(ask(port, "GET", "/nothing"), 404)
    assert ask(port, "HEAD", "/health")[::2] == (200, b"")


@pytest.mark.parametrize(
    "path",
    [
        "/static/../../etc/passwd",
        "/%2e%2e%2fetc/passwd",
        "/%252e%252e/etc/passwd",
        "/..\\..\\etc",
        "/health%00",
        "//evil.example/health",
        "http://evil.example/health",
        "/health/",
        "/v1/echo/",
        "/HEALTH",
        "*",
    ],
)
def test_paths_are_those_of_the_list(port: int, path: str) -> None:
    answer = refused(ask(port, "GET", path), 404)
    assert "location" not in answer.headers


# Who: H011, H013, H014, H016


def bearer(key: str) -> dict[str, str]:
    return {"authorization": f"Bearer {key}"}


@pytest.mark.parametrize(
    "value",
    [
        "",
        "Bearer",
        "Bearer ",
        f"Bearer {KEY[:-1]}",
        f"Bearer {KEY}k",
        f"Bearer {KEY.upper()}",
        f"Bearer {KEY} {KEY}",
        KEY,
        f"Token {KEY}",
        f"Bearer {KEY[:-1]}\xff",
        f"Bearer {KEY},",
        "Basic " + base64.b64encode(KEY.encode()).decode(),
        "Basic !!!",
        "Basic " + base64.b64encode(f"{KEY}:x".encode()).decode(),
    ],
)
def test_without_the_key_nothing_is_answered(locked: int, value: str) -> None:
    for method, path, body in (("POST", "/v1/echo", {}), ("GET", "/v1/echo", None), ("GET", "/nothing", None)):
        answer = refused(ask(locked, method, path, body, authorization=value), 401, "invalid_api_key")
        assert KEY[:8] not in answer.body.decode() and "Basic" in answer.headers["www-authenticate"]


def test_the_key_is_a_header_and_only_one(locked: int) -> None:
    refused(ask(locked, "POST", f"/v1/echo?key={KEY}&api_key={KEY}", {}), 401)
    twice = f"POST /v1/echo HTTP/1.1\r\nHost: a\r\nAuthorization: Bearer {KEY}\r\nAuthorization: Bearer {KEY}\r\n"
    refused(raw(locked, twice.encode() + b"Content-Length: 2\r\n\r\n{}"), 401)
    nul = b"GET / HTTP/1.1\r\nHost: a\r\nAuthorization: Bearer \x00" + KEY.encode() + b"\r\n\r\n"
    refused(raw(locked, nul), 400)


def test_with_the_key(locked: int) -> None:
    basic = "Basic " + base64.b64encode(f"anyone:{KEY}".encode()).decode()
    for value in (f"Bearer {KEY}", f"bearer {KEY}", f"BEARER  {KEY}", basic):
        assert ask(locked, "POST", "/v1/echo", {"a": 1}, authorization=value, host="tetrad.example").json == {"a": 1}


def test_without_a_key_only_health_answers_and_says_nothing(locked: int) -> None:
    for route in [*ROUTES, Route("/metrics", echo), Route("/", echo), Route("/health/x", echo)]:
        refused(ask(locked, "GET", route.path), 401)
    answer = ask(locked, "GET", "/health")
    assert answer.status == 200 and answer.json == {"status": "ok"}
    assert "server" not in answer.headers


def test_on_loopback_an_empty_key_is_no_fault(port: int) -> None:
    for value in ("Bearer", "Bearer ", "Bearer anything"):
        assert ask(port, "POST", "/v1/echo", {}, authorization=value).status == 200


@pytest.mark.parametrize(
    "host",
    [
        "evil.example",
        "evil.example:80",
        "localhost.evil.example",
        "127.0.0.1.evil.example",
        "[::ffff",
        "169.254.169.254",
        "127.1@evil.example",
        "0.0.0.0",
    ],
)
def test_other_hosts_are_refused_on_loopback(port: int, host: str) -> None:
    for path in ("/health", "/v1/echo"):
        refused(ask(port, "GET", path, host=host), 403, "host")


@pytest.mark.parametrize(
    "host", ["localhost", "LOCALHOST:1", "127.0.0.1", "127.0.0.1:9000", "127.0.0.2", "[::1]", "[::1]:80"]
)
def test_names_of_this_computer(port: int, host: str) -> None:
    assert ask(port, "GET", "/health", host=host).status == 200


@pytest.mark.parametrize("method", ["GET", "POST", "PUT", "DELETE", "PATCH", "OPTIONS"])
@pytest.mark.parametrize(
    "headers",
    [
        {"sec_fetch_site": "cross-site"},
        {"sec_fetch_site": "same-site"},
        {"origin": "http://evil.example"},
        {"origin": "null"},
        {"origin": "http://localhost:1"},
        {"origin": "http://localhost.evil.example"},
    ],
)
def test_other_sites_pages_are_refused(port: int, method: str, headers: dict[str, str]) -> None:
    answer = refused(ask(port, method, "/v1/echo", {} if method != "GET" else None, **headers), 403, "origin")
    assert not any(name.startswith("access-control") for name in answer.headers)


def test_own_pages_and_links_are_not(port: int) -> None:
    own = {"origin": f"http://localhost:{port}", "sec_fetch_site": "same-origin"}
    assert ask(port, "POST", "/v1/echo", {}, **own).status == 200
    link = {"sec_fetch_site": "cross-site", "sec_fetch_mode": "navigate"}
    assert ask(port, "GET", "/health", **link).status == 200
    refused(ask(port, "POST", "/v1/echo", {}, **link), 403)


def test_every_answer_has_the_headers(port: int) -> None:
    answers = [
        ask(port, "GET", "/health"),
        ask(port, "GET", "/nothing"),
        ask(port, "GET", "/", host="evil.example"),
        ask(port, "POST", "/v1/fails", {"fault": "other"}),
    ]
    for answer in answers:
        policy = answer.headers["content-security-policy"]
        assert "default-src 'none'" in policy and "frame-ancestors 'none'" in policy and "unsafe" not in policy
        assert answer.headers["x-content-type-options"] == "nosniff"
        assert answer.headers["referrer-policy"] == "no-referrer"
        assert answer.headers["cache-control"] == "no-store"


# Faults in a route


def test_faults_become_openai_errors(port: int, caplog: pytest.LogCaptureFixture) -> None:
    logging.getLogger("uvicorn.error").addHandler(caplog.handler)
    long = refused(ask(port, "POST", "/v1/fails", {"fault": "user"}), 400, "context_length_exceeded").error
    assert "9 tokens" in long["message"] and "shorten it" in long["message"]
    missing = refused(ask(port, "POST", "/v1/fails", {"fault": "refused"}), 404, "model_not_found").error
    assert missing["param"] == "model" and missing["type"] == "not_found_error"
    internal = refused(ask(port, "POST", "/v1/fails", {"fault": "other"}), 500)
    assert b"secret" not in internal.body and internal.error["type"] == "server_error"
    late = time.monotonic() + 5  # it is written after the answer
    while "ValueError" not in caplog.text and time.monotonic() < late:
        time.sleep(0.01)
    assert "ValueError" in caplog.text  # for those who run the server


# Slow clients: H032, H034, and the headers


def test_slow_headers_are_cut(port: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also while the clock is set back."""
    real, began = time.time, time.monotonic()
    monkeypatch.setattr(time, "time", lambda: real() - 3600)
    with connect(port) as connection:
        for byte in b"GET /health HTTP/1.1\r\nHost: localhost\r\nX: " + b"x" * 1000:
            try:
                connection.sendall(bytes([byte]))
            except (BrokenPipeError, ConnectionResetError):
                break
            time.sleep(0.05)
        else:
            pytest.fail("never cut")
    assert 0.5 < time.monotonic() - began < 3


def test_slow_headers_of_a_second_request_are_cut_and_idle_is_none(port: int) -> None:
    with connect(port) as connection:
        connection.sendall(b"GET /health HTTP/1.1\r\nHost: localhost\r\n\r\n")
        assert read_answer(connection).status == 200
        time.sleep(0.8)  # longer than headers may take
        connection.sendall(b"GET /health HTTP/1.1\r\nHost: localhost\r\n\r\nGET")
        assert read_answer(connection).status == 200
        connection.sendall(b" /health HTT")
        began = time.monotonic()
        assert is_closed(connection)
        assert time.monotonic() - began < 3


def test_a_connection_that_says_nothing_is_cut(port: int) -> None:
    with connect(port) as connection:
        assert is_closed(connection)


def test_slow_bodies_are_cut_and_hold_no_place(port: int) -> None:
    head = b"POST /v1/echo HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\nContent-Length: 99\r\n\r\n"
    slow = [connect(port) for _ in range(2 * SMALL.requests)]
    for connection in slow:
        connection.sendall(head + b"{")
    assert ask(port, "POST", "/v1/echo", {}).status == 200
    for connection in slow:
        refused(read_answer(connection), 408)
        connection.close()


def test_a_client_that_does_not_read_is_cut(port: int, own: Guard) -> None:
    with connect(port) as connection:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        connection.sendall(b"GET /large HTTP/1.1\r\nHost: localhost\r\n\r\n")
        assert read_answer(connection, "HEAD").status == 200
        assert own.open == 1
        assert ask(port, "GET", "/health").status == 200
        time.sleep(1.2)
        assert own.open == 0


# The queue: H035


def test_who_is_refused_is_asked_to_wait_as_long_as_it_takes_to_answer_them() -> None:
    turnover = Turnover()
    assert turnover.seconds == 1
    turnover.count(429, 5.0)
    for status in [429] * 60 + [200] * 20 + [400] * 7:
        turnover.count(status, 5.9)
    assert turnover.seconds == 1  # the second is not over
    turnover.count(200, 6.0)
    assert turnover.seconds == 3  # 60 refused, 21 answered
    waits = [turnover.wait() for _ in range(300)]
    assert set(waits) == {1, 2, 3, 4, 5}  # 3 on average
    turnover.count(200, 7.5)
    assert turnover.seconds == 1
    for _ in range(100):
        turnover.count(429, 7.6)
    turnover.count(429, 9.0)
    assert turnover.seconds == 30


def test_beyond_the_queue_is_429_at_once(port: int) -> None:
    busy = [connect(port) for _ in range(SMALL.requests)]
    body = json.dumps({"seconds": 0.5}).encode()
    head = f"POST /v1/wait HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\nContent-Length: {len(body)}"
    for connection in busy:
        connection.sendall(head.encode() + b"\r\n\r\n" + body)
    time.sleep(0.2)
    began = time.monotonic()
    answer = refused(ask(port, "POST", "/v1/echo", {"a": "x" * 60000}), 429, "queue_full")
    assert time.monotonic() - began < 0.3 and answer.headers["retry-after"] == "1"
    assert ask(port, "GET", "/health").status == 200
    assert [read_answer(connection).status for connection in busy] == [200] * SMALL.requests
    for connection in busy:
        connection.close()
    assert ask(port, "POST", "/v1/echo", {}).status == 200


def test_a_client_that_leaves_leaves_the_queue(port: int) -> None:
    body = json.dumps({"seconds": 0.3}).encode()
    for _ in range(3 * SMALL.requests):
        with connect(port) as connection:
            connection.sendall(b"POST /v1/wait HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n")
            connection.sendall(f"Content-Length: {len(body)}\r\n\r\n".encode() + body[:-1])  # never whole
    time.sleep(0.1)
    assert ask(port, "POST", "/v1/echo", {}).status == 200


def test_what_is_open_when_the_time_is_over_is_ended_by_the_workers(monkeypatch: pytest.MonkeyPatch) -> None:
    """An open stream gets what `Worker.stop` gives it, and is not cut."""
    monkeypatch.setattr(listen, "_DRAIN_SECONDS", 0)
    ending = asyncio.Event()

    async def stream(_: Request) -> StreamingResponse:
        async def events():  # type: ignore[no-untyped-def]
            yield "data: 1\n\n"
            await ending.wait()
            yield "data: the end\n\n"

        return StreamingResponse(events())

    class Worker:
        async def stop(self) -> None:
            ending.set()

    app = create_app(Service({}, None, Serve()), Limits(), [Route("/stream", stream)])
    with ExitStack() as stack:
        with listening(app, Worker()) as port:
            connection = stack.enter_context(connect(port))
            connection.sendall(b"GET /stream HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n")
            assert connection.recv(12) == b"HTTP/1.1 200"
        assert b"the end" in b"".join(iter(lambda: connection.recv(1000), b""))
