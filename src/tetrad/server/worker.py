"""The one thread that owns a model's engine: requests come from the event loop, tokens go back to it.

Whatever needs torch happens here, a step at a time; a request joins or leaves between two steps. Tokens go back in
bundles: at once if a first or a last one is among them, else the later the more jobs there are, because each bundle
holds up the engine. A fault of a step fails what is in flight, and the next request finds a fresh engine.
"""

import asyncio
import logging
import threading
import time
from collections import deque
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from queue import Empty, SimpleQueue
from typing import Any

from tetrad.errors import UserError
from tetrad.inference.engine import MAX_PREFILL_TOKENS, Engine, Event, Likeliest, Request
from tetrad.inference.likelihood import token_likelihoods
from tetrad.inference.model_folder import own_sampling
from tetrad.inference.policy import Policy
from tetrad.server import metrics
from tetrad.server.guard import Refused
from tetrad.settings.use import Sample

FLUSH = 0.003
"""Seconds for which tokens may wait for others to travel with, for each job that has some: handing over its bundle
takes a tenth of a millisecond."""
Item = tuple[int, Event]
"""The number of a prompt, and a token of one of its responses."""
_LOG = logging.getLogger("tetrad.server")


@dataclass(eq=False)
class Job:
    """The responses to all prompts of one HTTP request; iterated on the event loop, bundles of tokens.

    reads: how many of the most likely ids are noted in each place of the prompts, None for no reading; likelihoods: of
    each prompt, there before its first token is; left: incomplete responses, for the loop and for the thread.
    """

    requests: Sequence[Request]
    reads: int | None
    left: list[int]
    begun: bool = False
    likelihoods: dict[int, list[tuple[float, Likeliest]]] = field(default_factory=dict)
    inbox: asyncio.Queue[list[Item] | Refused] = field(default_factory=asyncio.Queue)
    since: float = field(default_factory=time.monotonic)

    async def __aiter__(self) -> AsyncIterator[list[Item]]:
        """Raises Refused where the engine failed."""
        while self.left[0]:
            items = await self.inbox.get()
            if isinstance(items, Refused):
                self.left[0] = 0
                raise items
            if not self.begun:
                metrics.FIRST_TOKEN.observe(time.monotonic() - self.since)
                metrics.TOKENS.labels("prompt").inc(sum(len(request.ids) for request in self.requests))
            metrics.TOKENS.labels("response").inc(len(items))
            self.begun = True
            self.left[0] -= sum(event.response is not None for _, event in items)
            yield items


class Worker:
    """slots: responses that grow at once; positions: of the longest prompt with its response, 0 for the model's own;
    queue: requests that may wait for their first token. Errors: E-MEM-FULL, E-CONF-*."""

    def __init__(self, policy: Policy, slots: int = 32, positions: int = 0, queue: int = 64) -> None:
        most = policy.model.config.max_positions
        self.policy, self.slots, self.positions, self.queue = policy, slots, min(positions or most, most), queue
        self.defaults = replace(Sample(), **own_sampling(policy.folder))  # as in `tetrad generate`
        self._engine: Engine | None = policy.engine(slots, self.positions)
        self._open: set[Job] = set()  # the loop's own
        self._running, self._thread = True, threading.Thread()
        self._loop: asyncio.AbstractEventLoop
        self._calls: SimpleQueue[Callable[[], None]] = SimpleQueue()
        self._waiting: deque[tuple[Job, int]] = deque()  # the thread's own, as all below: prompts by number
        self._growing: dict[int, tuple[Job, int]] = {}  # by the engine's id
        self._bundle: dict[Job, list[Item]] = {}
        self._flushed, self._ended = 0.0, False

    # On the event loop

    def refuse_if_full(self) -> None:
        """Before any work is done for a request. Raises Refused 429 or 503."""
        if not self._running:
            raise Refused(503, "the server is stopping", code="stopping")
        if sum(not job.begun for job in self._open) >= self.queue:
            what = f"{self.queue} requests wait already: try again in a moment"
            raise Refused(429, what, code="queue_full")

    @contextmanager
    def submit(self, requests: Sequence[Request], reads: int | None = None) -> Iterator[Job]:
        """Queues requests that fit into the engine. To leave the context cancels what is not complete: its rows are
        free within a token. reads: see Job. Raises Refused 429 or 503."""
        self.refuse_if_full()
        if not self._thread.is_alive():
            self._loop = asyncio.get_running_loop()
            self._thread = threading.Thread(target=self._run, name="engine", daemon=True)
            self._thread.start()
        job = Job(requests, reads, [sum(len(request.keys) for request in requests)] * 2)
        self._open.add(job)
        self._calls.put(lambda: self._waiting.extend((job, number) for number in range(len(requests))))
        try:
            yield job
        finally:
            self._open.discard(job)
            self._calls.put(lambda: self._cancel(job))

    async def stop(self, grace: float = 0.0) -> None:
        """Refuses what is new, waits up to `grace` seconds for what is in flight, and ends the rest with an error."""
        self._running, until = False, time.monotonic() + grace
        while self._open and time.monotonic() < until:
            await asyncio.sleep(0.02)
        if self._thread.is_alive():
            self._calls.put(lambda: self._fail(Refused(503, "the server is stopping", code="stopping"), end=True))
            await asyncio.to_thread(self._thread.join)

    # In the thread

    def _run(self) -> None:
        while not self._ended:
            try:
                idle = not self._waiting and not self._growing
                with suppress(Empty):
                    while True:
                        self._calls.get(idle and not self._ended)()
                        idle = False
                self._step()
            except Exception as error:
                self._engine = None  # whatever its state; its memory is free before another's is taken
                _LOG.error("the engine failed", exc_info=error)
                what, code = (error.what, error.code) if isinstance(error, UserError) else ("the model failed", None)
                self._fail(Refused(503, what, code=code))

    def _step(self) -> None:
        """A token for each response that grows."""
        engine = self._engine = self._engine or self.policy.engine(self.slots, self.positions)
        read = 0
        while self._waiting and read < MAX_PREFILL_TOKENS:
            job, number = self._waiting[0]
            request = job.requests[number]
            if job.reads is not None:
                temperature = request.sampling.temperature or 1.0
                likelihoods = token_likelihoods(engine.model, request.ids, engine.device, job.reads, temperature)
                job.likelihoods[number] = likelihoods
                read += len(request.ids)
            self._growing[engine.add(request)] = job, number
            self._waiting.popleft()
        urgent: set[Job] = set()
        for event in engine.advance() if self._growing else ():
            job, number = self._growing[event.request_id]
            self._bundle.setdefault(job, []).append((number, event))
            if event.response or not job.begun:
                urgent.add(job)
            job.left[1] -= event.response is not None
            if not job.left[1]:
                self._growing = {key: one for key, one in self._growing.items() if one[0] is not job}
        if time.monotonic() - self._flushed >= FLUSH * len(self._bundle):
            urgent, self._flushed = set(self._bundle), time.monotonic()
        self._flush(urgent)

    def _cancel(self, job: Job) -> None:
        if job.left[1]:
            self._waiting = deque(one for one in self._waiting if one[0] is not job)
            self._bundle.pop(job, None)
            for request_id in [key for key, one in self._growing.items() if one[0] is job]:
                del self._growing[request_id]
                if self._engine:
                    self._engine.cancel(request_id)

    def _fail(self, refused: Refused, *, end: bool = False) -> None:
        """Ends all jobs with an error, after the tokens that they have. end: the thread too."""
        self._flush(set(self._bundle))
        for job in {job for job, _ in (*self._waiting, *self._growing.values())}:
            self._cancel(job)
            self._post(job.inbox.put_nowait, refused)
        self._ended = end

    def _flush(self, jobs: set[Job]) -> None:
        if jobs:
            self._post(_deliver, {job: self._bundle.pop(job) for job in jobs})

    def _post(self, call: Callable[[Any], None], value: Any) -> None:
        with suppress(RuntimeError):  # the loop is closed: nobody waits any more
            self._loop.call_soon_threadsafe(call, value)


def _deliver(bundle: dict[Job, list[Item]]) -> None:
    for job, items in bundle.items():
        job.inbox.put_nowait(items)
