"""The application: the routes of every door, behind the guard."""

from collections.abc import Sequence
from typing import Any

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response
from starlette.routing import BaseRoute, Route

from tetrad.errors import UserError
from tetrad.server.guard import Guard, Limits, Refused
from tetrad.server.service import Service

_STATUS = {"DATA": 400, "CONF": 400, "MEM": 503}


def create_app(service: Service, limits: Limits, routes: Sequence[BaseRoute]) -> Guard:
    """The routes and /health behind the guard; their `Refused` and `UserError` become answers. The handlers are
    coroutines, since Starlette runs plain functions in threads, which costs more than the answer."""
    app = Starlette(
        routes=[Route("/health", _health), *routes],
        exception_handlers={
            Refused: _refused,
            UserError: _user_error,
            HTTPException: _http_error,
            ClientDisconnect: _gone,
            Exception: _internal,
        },
    )
    app.router.redirect_slashes = False  # a redirect would name the host that the request claims
    app.state.service = service
    return Guard(app, limits)


async def _health(_: Request) -> Response:
    return JSONResponse({"status": "ok"})


async def _refused(_: Request, error: Any) -> Response:
    return error.response  # type: ignore[no-any-return]


async def _user_error(_: Request, error: Any) -> Response:
    return refusal(error).response


def refusal(error: UserError) -> Refused:
    """A fault that the user can mend, as an answer."""
    status = _STATUS.get(error.code.split("-")[1], 500)
    code = "context_length_exceeded" if error.code == "E-DATA-LONG" else error.code
    return Refused(status, f"{error.what}. {error.hint}".rstrip(". ") + ".", error.where or None, code)


async def _http_error(request: Request, error: Any) -> Response:
    path = request.scope["path"][:100]
    what = {404: f"there is no {path}", 405: f"{path} does not take {request.method[:20]}"}
    return Refused(error.status_code, what.get(error.status_code, error.detail), headers=error.headers or {}).response


async def _gone(_: Request, __: Exception) -> Response:
    return Refused(400, "the body ended early").response  # nobody reads it


async def _internal(_: Request, __: Exception) -> Response:
    return Refused(500, "a fault of the server", code="internal").response
