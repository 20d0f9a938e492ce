"""The pages, and the routes of the ranking page: who someone is, the next item, a verdict.

A person is known by a signed cookie: from a personal link, or by the name that they enter. Which model gave an answer
is nowhere in what is sent.
"""

import asyncio
import hashlib
import hmac
from base64 import urlsafe_b64decode, urlsafe_b64encode
from collections.abc import Collection, Mapping
from importlib.resources import files
from typing import Any

from pydantic import Field
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from tetrad.errors import UserError
from tetrad.server.guard import Refused, payload
from tetrad.server.ranking import LONGEST, Invalid, Item, Ranking, Stored, Verdict, clean_name
from tetrad.server.schema import Wire, parsed
from tetrad.server.service import Service

COOKIE = "tetrad-rank"
_TYPES = {"html": "text/html", "css": "text/css", "js": "text/javascript"}


class Enter(Wire):
    name: str = ""
    link: str = ""


class Submit(Wire):
    item: str
    verdict: str
    ranks: list[int] = Field([], max_length=26)
    scores: list[float | None] = Field([], max_length=26)
    comment: str = ""
    edited: str = ""


class People:
    """Who may rank. names: those with a link; None lets everyone enter a name."""

    def __init__(self, secret: bytes, names: Collection[str] | None) -> None:
        self._secret, self.names = secret, names

    def token(self, name: str, purpose: str) -> str:
        """The name and its signature; purpose: link, session or csrf."""
        signature = hmac.new(self._secret, f"{purpose}:{name}".encode(), hashlib.sha256).hexdigest()
        return f"{urlsafe_b64encode(name.encode()).decode()}.{signature}"

    def named(self, token: str, purpose: str) -> str:
        """Whose token it is; empty for one that is not signed here, or of a person who is no longer named."""
        try:
            name = urlsafe_b64decode(token.partition(".")[0]).decode()
        except ValueError:
            return ""
        known = self.names is None or name in self.names
        return name if known and self.matches(token, name, purpose) else ""

    def matches(self, token: str, name: str, purpose: str) -> bool:
        return hmac.compare_digest(token.encode(), self.token(name, purpose).encode())


def chat_routes(service: Service) -> list[Route]:
    """The chat page, and what it must know."""

    async def config(_: Request) -> Response:
        served = [(name, one.frontend.template) for name, one in service.models.items()]
        models = [{"id": name, "turns": bool(template and template.start)} for name, template in served]
        return JSONResponse({"models": models, "reward": service.reward is not None})

    return [*_pages({"/": "chat.html"}), Route("/pages/config", config)]


def routes(ranking: Ranking, people: People) -> list[Route]:
    """The ranking page and its routes."""

    async def enter(request: Request) -> Response:
        body = parsed(Enter, await payload(request))
        if people.names is not None or body.link:
            if not (name := people.named(body.link, "link")):
                raise Refused(403, "this is no valid personal link", "link", "link")
        else:
            name = _valid(clean_name, body.name)
        answer = JSONResponse({"name": name})
        answer.set_cookie(COOKIE, people.token(name, "session"), 30 * 86_400, httponly=True, samesite="strict")
        return answer

    async def item(request: Request) -> Response:
        name = people.named(request.cookies.get(COOKIE, ""), "session")
        if not name:
            return JSONResponse({"name": "", "links": people.names is not None})
        return JSONResponse(await asyncio.to_thread(_state, ranking, name) | {"csrf": people.token(name, "csrf")})

    async def submit(request: Request) -> Response:
        name = people.named(request.cookies.get(COOKIE, ""), "session")
        if not name or not people.matches(request.headers.get("x-csrf-token", ""), name, "csrf"):
            raise Refused(403, "the page's token is missing or someone else's: reload the page", code="csrf")
        body = parsed(Submit, await payload(request))
        verdict = Verdict(body.verdict, tuple(body.ranks), tuple(body.scores), body.comment, body.edited)
        return JSONResponse({"stored": await asyncio.to_thread(_valid, ranking.submit, name, body.item, verdict)})

    return [
        *_pages({"/": "rank.html", "/rank": "rank.html"}),
        Route("/rank/enter", enter, methods=["POST"]),
        Route("/rank/item", item),
        Route("/rank/submit", submit, methods=["POST"]),
    ]


def _pages(addresses: Mapping[str, str]) -> list[Route]:
    """These pages and all that they load, read once: no request names a path."""
    folder = files("tetrad.server") / "pages"
    contents = {f"/pages/{file.name}": file.read_bytes() for file in folder.iterdir() if "." in file.name}

    def route(address: str, content: bytes, kind: str) -> Route:
        async def page(_: Request) -> Response:
            return Response(content, media_type=kind)

        return Route(address, page)

    wanted = {**{name: name for name in contents}, **{at: f"/pages/{name}" for at, name in addresses.items()}}
    return [route(at, contents[name], _TYPES[name.rpartition(".")[2]]) for at, name in wanted.items()]


def _state(ranking: Ranking, name: str) -> dict[str, Any]:
    """What the page shows to this person. Errors: E-IO-*."""
    item, (pairs, alpha) = ranking.offer(name), ranking.agreement()
    mine = sum(name in judged for judged in list(ranking.judged.values()))
    progress = {"mine": mine, "done": ranking.done(), "items": len(ranking.items), "pairs": pairs, "alpha": alpha}
    shown = _shown(ranking, item, name) if item else None
    rules = {"scale": ranking.settings.scale, "longest": LONGEST, "ready": ranking.ready}
    return {"name": name, "item": shown, "progress": progress, **rules}


def _shown(ranking: Ranking, item: Item, name: str) -> dict[str, Any]:
    def cut(text: str) -> dict[str, Any]:
        return {"text": text[: LONGEST["edited"]], "cut": len(text) > LONGEST["edited"]}

    turns = [{"role": turn.role, **cut(turn.text)} for turn in item.prompt.turns if turn.text]
    return {"id": item.id, "turns": turns, "answers": [cut(text) for text in ranking.shown(item, name)]}


def _valid(function: Any, *arguments: Any) -> Any:
    """Its result; its faults as refusals."""
    try:
        return function(*arguments)
    except Invalid as error:
        raise Refused(400, str(error), error.field, "invalid_value") from None
    except LookupError:
        raise Refused(404, "this item is not yours", "item", "not_found") from None
    except Stored as error:
        raise _Conflict(error.record) from None
    except UserError as error:
        raise Refused(507, f"not stored: {error.what}", None, error.code) from None


class _Conflict(Refused):
    """With what is stored beside the error."""

    def __init__(self, record: dict[str, Any]) -> None:
        super().__init__(409, "another answer to this item is stored", "item", "stored")
        self.record = record

    @property
    def body(self) -> dict[str, Any]:
        return {**super().body, "stored": self.record}
