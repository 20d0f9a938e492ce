"""From a request of chat or completions to its answer, whole or as a stream; the two write choices differently."""

import asyncio
import json
import secrets
import time
from abc import abstractmethod
from collections.abc import AsyncIterator, Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any, TypeVar

from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.types import Receive, Scope, Send

from tetrad.errors import UserError
from tetrad.inference import engine
from tetrad.inference.engine import Likeliest
from tetrad.inference.engine_process import Part
from tetrad.server.guard import Refused, payload
from tetrad.server.schema import Generation, Named, parsed
from tetrad.server.service import Served, Service
from tetrad.server.worker import Job
from tetrad.text.tokenizer import Tokenizer

T = TypeVar("T")
R = TypeVar("R", bound=Named)
_AT_ONCE = 2000
Choice = dict[str, Any]
Scored = tuple[int, float | None, Likeliest]
"""A token, its log-probability and the most likely ones in its place."""


class Form:
    """How a route writes. kinds: the prefix of an id, the name of an answer, that of a chunk; detailed: with tokens;
    reads: as of a job; job: once there is one."""

    kinds: tuple[str, str, str]
    reads: int | None = None
    job: Job

    def __init__(self, tokenizer: Tokenizer, *, detailed: bool) -> None:
        self.tokenizer, self.detailed = tokenizer, detailed

    @abstractmethod
    def begin(self, index: int) -> list[Choice]:
        """The chunks of a choice before its first token."""

    @abstractmethod
    def choice(self, index: int, text: str, tokens: Iterable[Scored], *, chunk: bool) -> Choice:
        """Of an answer, or of a chunk."""

    def token(self, number: int) -> str:
        return spelt(self.tokenizer, number)


async def beside(work: Callable[[], T], size: int) -> T:
    """What takes a millisecond or less is done at once, a thread costs as much; the rest in one. size: characters."""
    return work() if size <= _AT_ONCE else await asyncio.to_thread(work)


def spelt(tokenizer: Tokenizer, number: int) -> str:
    """A token as a text of its own; one that is no character by its bytes."""
    raw = tokenizer.token_bytes(number)
    try:
        return raw.decode()
    except UnicodeDecodeError:
        return "bytes:" + "".join(f"\\x{byte:02x}" for byte in raw)


async def read(request: Request, service: Service, kind: type[R]) -> tuple[R, Served]:
    """The body, and the model that it names, or the only one. Raises Refused."""
    body = parsed(kind, await payload(request))
    return body, served(service, body.model)


def served(service: Service, name: str) -> Served:
    """Raises Refused 404, or 400 for no name where there are several."""
    if name in service.models:
        return service.models[name]
    if name or len(service.models) != 1:
        what = f"there is no model {name!a:.80}; there are: {', '.join(service.models)}"
        raise Refused(404 if name else 400, what, "model", "model_not_found")
    return next(iter(service.models.values()))


def prompts(
    model: Served, body: Generation, texts: Sequence[Sequence[int]], top: int, most: int
) -> list[engine.Request]:
    """For the engine. most: new tokens where the client names none. Errors: E-DATA-BLANK, E-DATA-LONG; Refused."""
    seed, limit = secrets.randbits(62) if body.seed is None else body.seed, model.worker.positions
    ends, size = () if body.ignore_eos else model.frontend.ends, model.frontend.config.vocab_size
    if any(number >= size for number in body.logit_bias):
        raise Refused(400, f"logit_bias: ids are below {size}", "logit_bias", "invalid_value")
    requests = []
    for number, ids in enumerate(texts):
        new = body.max_tokens or max(1, min(most, limit - len(ids)))
        if not ids:
            raise UserError("E-DATA-BLANK", "a prompt has no tokens", where="prompt")
        if len(ids) + new > limit:
            what = f"the context is {limit} tokens; the prompt has {len(ids)} and the response may have {new}"
            raise UserError("E-DATA-LONG", what, where="prompt", hint="shorten the prompt, or lower max_tokens")
        sampling = body.sampling(model.worker.defaults, new)
        keys = tuple((seed, "generate", index, number) for index in range(body.n))
        requests.append(engine.Request(tuple(ids), sampling, keys, ends, sampling.stop, body.logit_bias, top))
    return requests


async def answer(
    request: Request, body: Generation, model: Served, requests: Sequence[engine.Request], form: Form
) -> Response:
    """What the model gives to all requests of a body. A client that leaves ends it."""
    prefix, whole, chunk = form.kinds
    head = {"id": f"{prefix}-{secrets.token_hex(12)}", "created": int(time.time()), "model": model.name}
    with ExitStack() as stack:
        submitted = model.worker.submit(requests, form.reads, stream=body.stream, details=form.detailed)
        job = form.job = stack.enter_context(submitted)
        if body.stream:
            bundles = aiter(job)
            with _while_there(request, job):
                first = await anext(bundles)
            # a fault up to here has a status of its own, a later one ends the stream
            events = _stream(head | {"object": chunk}, body, form, first, bundles)
            return _EventStream(events, stack.pop_all())
        with _while_there(request, job):
            parts = sorted([part async for parts in job for part in parts])  # by prompt and sample
        choices = [_whole(form, index, part) for index, part in enumerate(parts)]
        usage = _usage(requests, sum(len(part.tokens) for part in parts))
        return JSONResponse({**head, "object": whole, "choices": choices, "usage": usage})


@contextmanager
def _while_there(request: Request, job: Job) -> Iterator[None]:
    """The job ends if the client leaves."""

    async def gone() -> None:
        while (await request.receive())["type"] != "http.disconnect":
            pass
        job.inbox.put_nowait(Refused(499, "the client left"))  # nobody reads it

    leaving = asyncio.ensure_future(gone())
    try:
        yield
    finally:
        leaving.cancel()


def _whole(form: Form, index: int, part: Part) -> Choice:
    return form.choice(index, part.text, _scored(form, [part]), chunk=False) | {"finish_reason": _reason(part)}


def _scored(form: Form, parts: Iterable[Part]) -> Iterator[Scored]:
    for part in parts if form.detailed else ():
        yield from zip(part.tokens, part.logprobs, part.top or ((),) * len(part.tokens), strict=True)


async def _stream(
    head: Choice, body: Generation, form: Form, parts: list[Part], bundles: AsyncIterator[list[Part]]
) -> AsyncIterator[str]:
    """Server-sent events. parts: the first ones."""
    shows_usage, count = body.stream_options.include_usage, 0
    held: dict[int, list[Part]] = {}  # tokens that are half a character, or could begin a stop text
    begun: set[int] = set()
    nothing = {"usage": None} if shows_usage else {}
    try:
        while True:
            choices: list[Choice] = []
            for part in parts:
                index, count = part.prompt * body.n + part.sample, count + len(part.tokens)
                choices += form.begin(index) if index not in begun else ()
                begun.add(index)
                held.setdefault(index, []).append(part)
                text = "".join(one.text for one in held[index])
                if text or part.reason:
                    tokens = _scored(form, held.pop(index))
                    choices += [form.choice(index, text, tokens, chunk=True)] * bool(text or form.detailed)
                if part.reason:
                    choices.append(form.choice(index, "", (), chunk=True) | {"finish_reason": _reason(part)})
            yield "".join(_event({**head, "choices": [choice], **nothing}) for choice in choices)
            parts = await anext(bundles)
    except StopAsyncIteration:
        if shows_usage:
            yield _event({**head, "choices": [], "usage": _usage(form.job.requests, count)})
        yield "data: [DONE]\n\n"
    except Refused as error:
        yield _event(error.body)


class _EventStream(StreamingResponse):
    """Whatever ends it, the client too, ends the job, which `held` holds."""

    def __init__(self, events: AsyncIterator[str], held: ExitStack) -> None:
        super().__init__(events, media_type="text/event-stream")
        self.held = held

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        with self.held:
            await super().__call__(scope, receive, send)


def _event(value: Choice) -> str:
    return f"data: {json.dumps(value)}\n\n"


def _reason(part: Part) -> str:
    return "stop" if part.finished else "length"


def _usage(requests: Sequence[engine.Request], new: int) -> dict[str, int]:
    given = sum(len(request.ids) for request in requests)
    return {"prompt_tokens": given, "completion_tokens": new, "total_tokens": given + new}
