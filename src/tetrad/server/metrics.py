"""What /metrics shows. Labels come from short fixed lists: routes, status codes, kinds of tokens."""

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, ProcessCollector, generate_latest
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

_REGISTRY = CollectorRegistry()
ProcessCollector(registry=_REGISTRY)
REQUESTS = Counter("tetrad_requests", "Answered requests.", ("route", "code"), registry=_REGISTRY)
QUEUE = Gauge("tetrad_requests_open", "Requests that wait or are worked on.", registry=_REGISTRY)
TOKENS = Counter("tetrad_tokens", "Tokens read (prompt) and written (response).", ("kind",), registry=_REGISTRY)
FIRST_TOKEN = Histogram("tetrad_first_token_seconds", "From a request to its first token.", registry=_REGISTRY)
REWARDS = Counter("tetrad_rewards", "Answers that the reward model scored.", registry=_REGISTRY)


async def _metrics(_: Request) -> Response:
    return Response(generate_latest(_REGISTRY), media_type="text/plain; version=0.0.4; charset=utf-8")


def routes(_: object) -> list[Route]:
    """The route of this file."""
    return [Route("/metrics", _metrics)]
