"""A model's engine, as the event loop sees it: requests go to its process, tokens come back.

Here nothing is computed: who asks is refused, or hears of a fault, as fast however busy the engine is. If the process
dies, what is in flight fails, and another is started; one that dies before its model is loaded, with the next request.
"""

import asyncio
import itertools
import json
import logging
import signal
import time
from collections.abc import AsyncIterator, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

from tetrad.errors import UserError
from tetrad.inference import engine_process
from tetrad.inference.engine import Likeliest, Request
from tetrad.inference.engine_process import HEAD, Part, likeliest, packed, part_of, received, request_json
from tetrad.inference.model_folder import own_sampling
from tetrad.inference.policy import Frontend
from tetrad.server import metrics
from tetrad.server.guard import Refused
from tetrad.settings.use import Sample

_LOG = logging.getLogger("tetrad.server")


@dataclass(eq=False)
class Job:
    """The responses to all prompts of one HTTP request; iterated, their parts as they come.

    reads: how many of the most likely ids are noted in each place of the prompts, None for no reading; left: incomplete
    responses; likelihoods: of each prompt, there before its first token is.
    """

    requests: Sequence[Request]
    reads: int | None
    left: int
    begun: bool = False
    likelihoods: dict[int, list[tuple[float, Likeliest]]] = field(default_factory=dict)
    inbox: asyncio.Queue[list[Part] | Refused] = field(default_factory=asyncio.Queue)
    since: float = field(default_factory=time.monotonic)

    async def __aiter__(self) -> AsyncIterator[list[Part]]:
        """Raises Refused where the engine failed."""
        while self.left:
            parts = await self.inbox.get()
            if isinstance(parts, Refused):
                raise parts
            if not self.begun:
                metrics.FIRST_TOKEN.observe(time.monotonic() - self.since)
                metrics.TOKENS.labels("prompt").inc(sum(len(request.ids) for request in self.requests))
            self.begun = True
            metrics.TOKENS.labels("response").inc(sum(len(part.tokens) for part in parts))
            self.left -= sum(part.reason != "" for part in parts)
            yield parts


class Worker:
    """slots: responses that grow at once; positions: of the longest prompt with its response, 0 for the model's own;
    queue: requests that may wait for their first token."""

    def __init__(self, model: Frontend, slots: int = 32, positions: int = 0, queue: int = 64) -> None:
        most = model.config.max_positions
        self.positions, self.queue = min(positions or most, most), queue
        self.defaults = replace(Sample(), **own_sampling(model.folder))  # as in `tetrad generate`
        self._given = model.folder, slots, self.positions
        self._open: dict[int, Job] = {}
        self._waiting: set[int] = set()  # those of them without a token
        self._numbers = itertools.count()
        self._outbox: asyncio.Queue[bytes] = asyncio.Queue()
        self._running, self._loaded = True, False
        self._attending: asyncio.Task[None] | None = None
        self._wire, self.process = engine_process.start(*self._given)

    def wait(self) -> None:
        """Until the model is loaded, before the loop runs. Errors: E-MODEL-*, E-CKPT-*, E-MEM-FULL."""
        try:
            self._hear(received(self._wire))
        except UserError:
            self._wire.close()
            raise
        except (EOFError, ConnectionError):
            self._wire.close()
            self.process.join()
            what = f"the process of {self._given[0]} ended while it loaded the model ({self.process.exitcode})"
            if self.process.exitcode != -signal.SIGKILL:
                raise RuntimeError(what) from None  # it has said why
            hint = "serve fewer models, or lower --max-num-seqs or --max-model-len"
            raise UserError("E-MEM-FULL", what, where="serve", hint=hint) from None

    def refuse_if_full(self) -> None:
        """Before any work is done for a request. Raises Refused 429 or 503."""
        if not self._running:
            raise Refused(503, "the server is stopping", code="stopping")
        if len(self._waiting) >= self.queue:
            what = f"{self.queue} requests wait already: try again in a moment"
            raise Refused(429, what, code="queue_full")

    @contextmanager
    def submit(
        self, requests: Sequence[Request], reads: int | None = None, *, stream: bool = False, details: bool = False
    ) -> Iterator[Job]:
        """Queues requests that fit into the engine. To leave the context cancels what is not complete: its rows are
        free within a token. reads: see Job; stream: parts as they grow, else whole responses; details: with
        log-probabilities. Raises Refused 429 or 503."""
        self.refuse_if_full()
        if self._attending is None or self._attending.done():
            self._attending = asyncio.get_running_loop().create_task(self._attend())
        number, left = next(self._numbers), sum(len(request.keys) for request in requests)
        job = Job(requests, reads, left)
        self._open[number] = job
        self._waiting.add(number)
        message = {"job": number, "requests": [*map(request_json, requests)]}
        self._outbox.put_nowait(packed(message | {"reads": reads, "stream": stream, "details": details}))
        try:
            yield job
        finally:
            del self._open[number]
            self._waiting.discard(number)
            if job.left:
                self._outbox.put_nowait(packed({"cancel": number}))

    async def stop(self, grace: float = 0.0) -> None:
        """Refuses what is new, waits up to `grace` seconds for what is in flight, and ends the rest with an error."""
        self._running, until = False, time.monotonic() + grace
        while self._open and time.monotonic() < until:
            await asyncio.sleep(0.02)
        self._fail(self._open, Refused(503, "the server is stopping", code="stopping"))
        if self._attending:
            self._attending.cancel()
            await asyncio.wait([self._attending])
        self._wire.close()
        self.process.kill()  # it keeps nothing
        await asyncio.to_thread(self.process.join)

    async def _attend(self) -> None:
        """Carries messages while there is a process."""
        while True:
            if not self.process.is_alive():
                self._wire, self.process = engine_process.start(*self._given)
            try:
                await self._carry()
            except (asyncio.IncompleteReadError, ConnectionError):  # it is dead
                pass
            except Exception as error:  # a fault of ours: the requests must hear of it too
                _LOG.error("a message of the engine", exc_info=error)
                self.process.kill()
            await asyncio.to_thread(self.process.join)
            _LOG.error("the engine's process ended (%s)", self.process.exitcode)
            self._fail(self._open, Refused(503, "the model failed"))
            while not self._outbox.empty():
                self._outbox.get_nowait()
            if not self._loaded:
                return
            self._loaded = False

    async def _carry(self) -> None:
        """To and from one process, until it ends."""
        reader, writer = await asyncio.open_unix_connection(sock=self._wire)

        async def send() -> None:
            while True:
                writer.write(await self._outbox.get())

        sending = asyncio.ensure_future(send())
        try:
            while True:
                size = int.from_bytes(await reader.readexactly(HEAD))
                self._hear(json.loads(await reader.readexactly(size)))
                await asyncio.sleep(0)  # many answers at once let others in between
        finally:
            sending.cancel()
            writer.close()

    def _hear(self, message: dict[str, Any]) -> None:
        if "parts" in message:
            self._waiting.discard(message["job"])
            if job := self._open.get(message["job"]):  # nobody waits for one that was cancelled
                job.inbox.put_nowait([*map(part_of, message["parts"])])
        elif "likelihoods" in message:
            number, prompt, likelihoods = message["likelihoods"]
            if number in self._open:
                self._open[number].likelihoods[prompt] = [(one, likeliest(top)) for one, top in likelihoods]
        elif "failed" in message:
            what, code = message["failed"]
            self._fail(message["jobs"], Refused(503, what, code=code))
        elif "refused" in message:
            code, what, where, hint = message["refused"]
            self._fail(self._open, Refused(503, what, code=code))
            if not self._attending:
                raise UserError(code, what, where=where, hint=hint)
        else:
            self._loaded = True

    def _fail(self, jobs: Iterable[int], refused: Refused) -> None:
        for number in jobs:
            if number in self._open:
                self._open[number].inbox.put_nowait(refused)
