"""Between the network and the routes: who may ask, what is read, and how a refusal looks.

Every route but /health needs the key, if there is one: `Authorization: Bearer KEY`, or Basic with the key as password,
which is how a browser asks for it. Refusals and errors have OpenAI's form.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from starlette.requests import Request
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Receive, Scope, Send

_TYPES = {401: "authentication_error", 403: "permission_error", 404: "not_found_error", 429: "rate_limit_error"}


class Refused(Exception):
    """A request that is not answered as asked. param: the field at fault; code: a word for programs."""

    def __init__(
        self,
        status: int,
        message: str,
        param: str | None = None,
        code: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status, self.message, self.param, self.code, self.headers = status, message, param, code, headers or {}

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
    """What is let in. keys: none lets everyone in; loopback: whether only this host can connect."""

    keys: frozenset[str] = frozenset()
    loopback: bool = True


class Guard:
    """Pure ASGI: no body is copied, streams pass as they come."""

    def __init__(self, app: ASGIApp, limits: Limits) -> None:
        self.app, self.limits = app, limits

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        await self.app(scope, receive, send)


async def payload(request: Request) -> dict[str, Any]:
    """The body, an object. Raises Refused."""
    value = json.loads(await request.body())
    if not isinstance(value, dict):
        raise Refused(400, "the body must be a JSON object", code="invalid_json")
    return value
