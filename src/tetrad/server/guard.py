"""Between the network and the routes: who may ask, what is read, and how a refusal looks.

Every route but /health needs the key, if there is one: `Authorization: Bearer KEY`, or Basic with the key as password,
which is how a browser asks for it. Pages of other sites are kept out by Host, Origin and Sec-Fetch-Site, whatever they
know. Refusals have OpenAI's form. Nothing of a request is logged.
"""

import asyncio
import base64
import hmac
import ipaddress
import json
import math
import random
import time
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import urlsplit

from pydantic_core import from_json
from starlette.requests import Request
from starlette.responses import JSONResponse
from starlette.routing import Route
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from tetrad.server import metrics

_TYPES = {401: "authentication_error", 403: "permission_error", 404: "not_found_error", 429: "rate_limit_error"}
_POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; form-action 'self'; "
    "frame-ancestors 'none'; base-uri 'none'"
)
_HEADERS = [
    (b"content-security-policy", _POLICY.encode()),
    (b"x-content-type-options", b"nosniff"),
    (b"referrer-policy", b"no-referrer"),
    (b"cross-origin-resource-policy", b"same-origin"),
    (b"cache-control", b"no-store"),
]
_LONGEST_WAIT = 30
_LOGIN = {"WWW-Authenticate": 'Bearer, Basic realm="tetrad"'}


@dataclass(eq=False)
class Refused(Exception):
    """A request that is not answered as asked. param: the field at fault; code: a word for programs."""

    status: int
    message: str
    param: str | None = None
    code: str | None = None
    headers: Mapping[str, str] = field(default_factory=dict)

    @property
    def body(self) -> dict[str, Any]:
        """OpenAI's error object, which a stream sends too."""
        kind = _TYPES.get(self.status, "server_error" if self.status >= 500 else "invalid_request_error")
        return {"error": {"message": self.message, "type": kind, "param": self.param, "code": self.code}}

    @property
    def response(self) -> JSONResponse:
        return JSONResponse(self.body, self.status, dict(self.headers))


@dataclass(frozen=True)
class Limits:
    """What is let in. keys: none lets everyone in; loopback: only this host can connect; requests: so many are worked
    on or wait, beyond them is 429; header, url, body: bytes; nesting: of JSON; seconds: for the body to arrive."""

    keys: frozenset[bytes] = frozenset()
    loopback: bool = True
    requests: int = 64
    header: int = 16 << 10
    headers: int = 100
    url: int = 8 << 10
    body: int = 1 << 20
    nesting: int = 32
    seconds: float = 10.0


class Turnover:
    """How long who is refused should wait: as many seconds as it would take to answer those refused in the last one."""

    def __init__(self) -> None:
        self.seconds, self._refused, self._answered, self._since = 1, 0, 0, 0.0

    def wait(self) -> int:
        """For one of them: so long on average, and spread, that they do not all come back at once."""
        return random.randint(1, 2 * self.seconds - 1)

    def count(self, status: int, now: float) -> None:
        """An exchange that ended. now: in seconds, of any clock."""
        self._refused += status == 429
        self._answered += status < 300
        if now - self._since >= 1:
            self.seconds = min(max(1, math.ceil(self._refused / max(1, self._answered))), _LONGEST_WAIT)
            self._refused, self._answered, self._since = 0, 0, now


class Guard:
    """Pure ASGI. open: exchanges in progress; requests: those whose body was read, which `payload` counts; draining:
    everything new is refused."""

    def __init__(self, app: ASGIApp, limits: Limits) -> None:
        self.app, self.limits, self.turnover = app, limits, Turnover()
        self.open, self.requests, self.draining = 0, 0, False

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return await self.app(scope, receive, send)
        exchange = scope["exchange"] = Exchange(self, scope, receive, send)
        self.open += 1
        try:
            exchange.check()
            await self.app(scope, exchange.receive, exchange.send)
        except Refused as refused:
            await refused.response(scope, exchange.receive, exchange.send)
        finally:
            if scope["method"] == "POST":
                self.turnover.count(exchange.status, time.monotonic())
            self.open -= 1
            self.requests -= exchange.admitted
            metrics.QUEUE.set(self.requests)
            route = scope.get("route")
            metrics.REQUESTS.labels(route.path if isinstance(route, Route) else "none", exchange.status).inc()


@dataclass
class Exchange:
    """A request and its answer. read: bytes of the body so far; arrived: all of it is here; admitted: it is one of the
    guard's requests."""

    guard: Guard
    scope: Scope
    _receive: Receive
    _send: Send
    read: int = 0
    arrived: bool = False
    admitted: bool = False
    status: int = 0
    late: float = field(init=False)
    headers: dict[bytes, bytes] = field(init=False)

    def __post_init__(self) -> None:
        self.late = asyncio.get_running_loop().time() + self.guard.limits.seconds
        self.headers = dict(self.scope["headers"])
        self.arrived = not {b"content-length", b"transfer-encoding"}.intersection(self.headers)

    def check(self) -> None:
        """All that can be said before the body is read. Raises Refused."""
        limits, headers, pairs = self.guard.limits, self.headers, self.scope["headers"]
        host = headers.get(b"host", b"").decode("latin-1")
        length = headers.get(b"content-length", b"0")
        if {b"content-length", b"transfer-encoding"} <= headers.keys():
            raise Refused(400, "give Content-Length or Transfer-Encoding, not both", code="invalid_request")
        if len(pairs) > limits.headers or sum(len(name) + len(value) + 4 for name, value in pairs) > limits.header:
            raise Refused(431, f"the headers are too large: at most {limits.headers} with {limits.header} bytes")
        if len(self.scope["raw_path"]) + len(self.scope["query_string"]) > limits.url:
            raise Refused(414, f"the address is longer than {limits.url} bytes")
        if limits.loopback and not is_loopback(_name(host)):
            raise Refused(403, "this server answers to localhost only", code="host")
        if _foreign(self.scope["method"], headers, host):
            raise Refused(403, "requests of other sites' pages are refused", code="origin")
        if self.scope["path"] != "/health" and not self._has_key():
            raise Refused(
                401, "the key is missing or wrong: Authorization: Bearer KEY", None, "invalid_api_key", _LOGIN
            )
        if self.guard.draining:
            raise Refused(503, "the server is stopping", code="stopping", headers={"Retry-After": "5"})
        if not length.isdigit() or int(length) > limits.body:
            self._too_large()
        if self.scope["method"] == "POST":
            self._refuse_if_full()

    def _has_key(self) -> bool:
        """The keys are compared in constant time, all of them."""
        if not self.guard.limits.keys:
            return True
        given = [value for name, value in self.scope["headers"] if name == b"authorization"]
        scheme, _, key = (given[0] if len(given) == 1 else b"").partition(b" ")
        if scheme.lower() == b"basic":
            with suppress(ValueError):
                key = base64.b64decode(key, validate=True).partition(b":")[2]
        elif scheme.lower() != b"bearer":
            return False
        return sum(hmac.compare_digest(key.strip(), own) for own in self.guard.limits.keys) > 0

    def _too_large(self) -> None:
        raise Refused(413, f"the body is larger than {self.guard.limits.body} bytes")

    async def receive(self) -> Message:
        """Counts the body and waits for it only so long. Raises Refused."""
        if self.arrived:
            return await self._receive()
        try:
            async with asyncio.timeout_at(self.late):
                message = await self._receive()
        except TimeoutError:
            raise Refused(408, f"the body took longer than {self.guard.limits.seconds:.0f} s") from None
        self.read += len(message.get("body", b""))
        if self.read > self.guard.limits.body:
            self._too_large()
        self.arrived = not message.get("more_body", False)
        return message

    async def send(self, message: Message) -> None:
        """With the headers that every answer has. An answer before the end of the body ends the connection."""
        if message["type"] == "http.response.start":
            self.status = message["status"]
            more = [] if self.arrived else [(b"connection", b"close")]
            if self.status == 429:
                more.append((b"retry-after", str(self.guard.turnover.wait()).encode()))
            message["headers"] = [*message.get("headers", ()), *_HEADERS, *more]
        await self._send(message)

    def _refuse_if_full(self) -> None:
        if self.guard.requests >= self.guard.limits.requests:
            raise Refused(429, "too many requests wait", code="queue_full")

    def admit(self) -> None:
        """Makes this one of the guard's requests. Raises Refused where there are too many."""
        self._refuse_if_full()
        self.admitted = True
        self.guard.requests += 1
        metrics.QUEUE.set(self.guard.requests)


async def payload(request: Request) -> dict[str, Any]:
    """The body, a JSON object; the request counts as one of the guard's until it is answered. Raises Refused."""
    exchange: Exchange = request.scope["exchange"]
    kind, _, rest = request.headers.get("content-type", "").partition(";")
    charset = rest.strip().lower().removeprefix("charset=").strip('"')
    if kind.strip().lower() != "application/json" or charset not in ("", "utf-8"):
        raise Refused(415, "Content-Type must be application/json, in UTF-8")
    body = bytearray()
    async for chunk in request.stream():
        body += chunk
    exchange.admit()
    return parse(body, exchange.guard.limits.nesting)


def parse(body: bytearray, nesting: int) -> dict[str, Any]:
    """An object of strict JSON: UTF-8, finite numbers, each field once. Raises Refused, with the position."""
    try:
        value = from_json(body.decode(), allow_inf_nan=False)  # this one names the position of each fault
        json.loads(body, object_pairs_hook=_once, parse_float=_finite)
    except (ValueError, RecursionError) as error:
        raise Refused(400, f"the body is no JSON: {error}", code="invalid_json") from None
    if not isinstance(value, dict):
        raise Refused(400, "the body must be a JSON object", code="invalid_json")
    if _depth(value) > nesting:
        raise Refused(400, f"the body nests deeper than {nesting} levels", code="invalid_json")
    return value


def _depth(value: Any) -> int:
    """Levels of objects and lists; the parser has refused what is deeper than 200."""
    inner = value.values() if isinstance(value, dict) else value if isinstance(value, list) else None
    return 0 if inner is None else 1 + max(map(_depth, inner), default=0)


def _once(pairs: list[tuple[str, Any]]) -> None:
    names: set[str] = set()
    for name, _ in pairs:
        if name in names:
            raise Refused(400, f"{name[:80]} is given twice", name[:80], "invalid_json")
        names.add(name)


def _finite(text: str) -> None:
    if not math.isfinite(float(text)):
        raise Refused(400, f"{text[:20]} is too large for a number", code="invalid_json")


def is_loopback(host: str) -> bool:
    """Whether this name or address can only mean this host."""
    try:
        return host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def _foreign(method: str, headers: Mapping[bytes, bytes], host: str) -> bool:
    """Whether a browser says that another site's page asks. A link that is followed is no such request."""
    origin, mode = headers.get(b"origin"), headers.get(b"sec-fetch-mode")
    if origin is not None and origin.decode("latin-1").partition("://")[2] != host:
        return True
    followed = method in ("GET", "HEAD") and mode == b"navigate"
    return headers.get(b"sec-fetch-site", b"none") not in (b"same-origin", b"none") and not followed


def _name(host: str) -> str:
    """Of a Host header or an origin, without the port."""
    with suppress(ValueError):
        return urlsplit(f"//{host}").hostname or ""
    return ""
