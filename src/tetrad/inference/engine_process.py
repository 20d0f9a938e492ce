"""A model's engine in a process of its own: requests come through a socket, tokens go back; who asks computes nothing.

A message is its length, 8 bytes, and JSON. Those to the process: {"job", "requests", "reads", "stream", "details"} and
{"cancel"}; from it: {"ready"} or {"refused"} once the model is loaded, then {"likelihoods"}, {"job", "parts"}, and
{"failed"} where a step broke. Tokens go back in bundles: at once if a first or a last one is among them, else the later
the more jobs there are, because each bundle is work for both sides. A fault of a step fails the requests that have no
token yet, or all, and then the next one finds a fresh engine. The process ends when the other end of its socket does.
"""

import atexit
import gc
import json
import logging
import multiprocessing
import os
import select
import signal
import socket
import time
from collections import deque
from collections.abc import Collection, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from multiprocessing import resource_tracker
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any, NamedTuple

from tetrad.errors import UserError
from tetrad.inference.engine import MAX_PREFILL_TOKENS, Engine, Event, Likeliest, Request
from tetrad.inference.likelihood import token_likelihoods
from tetrad.inference.policy import Policy, load
from tetrad.settings.common import Sampling

FLUSH = 0.003
"""Seconds for which tokens may wait for others to travel with, for each job that has some."""
HEAD = 8
"""Bytes of a message's length."""
_YIELD = 10  # of niceness: who asks is answered, or refused, before the next token
_LOG = logging.getLogger("tetrad.inference")
_SAMPLING = tuple(Sampling.__dataclass_fields__)


class Part(NamedTuple):
    """Tokens of a response that travel together: all of it, or the next of a stream. prompt: its number in the job;
    sample: which of its responses; text: what can be shown now; logprobs, top: empty unless asked for, else of each
    token; reason: why the response ended, as there; empty if it grows."""

    prompt: int
    sample: int
    text: str
    tokens: tuple[int, ...]
    logprobs: tuple[float, ...]
    top: tuple[Likeliest, ...]
    reason: str

    @property
    def finished(self) -> bool:
        """False if the response was cut."""
        return self.reason in ("end", "stop")


def start(folder: Path, slots: int, positions: int) -> tuple[socket.socket, BaseProcess]:
    """The process for the model of a folder, and the other end of its socket. Signals that stop a server reach all its
    processes; this one ends with its socket, or with the process that started it."""
    ours, theirs = socket.socketpair()
    spawn = multiprocessing.get_context("spawn")
    process = spawn.Process(target=_main, args=(theirs, folder, slots, positions), name="engine", daemon=True)
    resource_tracker.ensure_running()  # by itself it would start in between, and let the signals through
    before = signal.pthread_sigmask(signal.SIG_BLOCK, (signal.SIGINT, signal.SIGTERM))
    try:
        process.start()  # what is blocked here is blocked there
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
    atexit.register(process.kill)  # multiprocessing would ask, and wait for it
    theirs.close()
    return ours, process


def packed(message: Mapping[str, Any]) -> bytes:
    """As it goes through the socket."""
    data = json.dumps(message, separators=(",", ":")).encode()
    return len(data).to_bytes(HEAD) + data


def received(wire: socket.socket) -> Any:
    """The next message. Raises EOFError where the other end is closed."""
    return json.loads(_read(wire, int.from_bytes(_read(wire, HEAD))))


def _read(wire: socket.socket, size: int) -> bytes:
    data = bytearray()
    while len(data) < size:
        part = wire.recv(min(size - len(data), 1 << 20))
        if not part:
            raise EOFError
        data += part
    return bytes(data)


def request_json(request: Request) -> dict[str, Any]:
    """For `_request`."""
    sampling = {name: getattr(request.sampling, name) for name in _SAMPLING}
    return {**vars(request), "sampling": sampling, "bias": list(request.bias.items())}


def _request(given: dict[str, Any]) -> Request:
    keys = tuple((seed, purpose, one, other) for seed, purpose, one, other in given["keys"])
    ids, ends, stop = (tuple(given[name]) for name in ("ids", "ends", "stop"))
    return Request(ids, Sampling(**given["sampling"]), keys, ends, stop, dict(given["bias"]), given["top"])


def part_of(given: Sequence[Any]) -> Part:
    """From JSON."""
    prompt, sample, text, tokens, logprobs, top, reason = given
    return Part(prompt, sample, text, tuple(tokens), tuple(logprobs), tuple(map(likeliest, top)), reason)


def likeliest(given: Sequence[Sequence[Any]]) -> Likeliest:
    """From JSON."""
    return tuple((number, logprob) for number, logprob in given)


def _main(wire: socket.socket, folder: Path, slots: int, positions: int) -> None:
    os.nice(_YIELD)
    with suppress(EOFError, ConnectionError):
        serve(wire, folder, slots, positions)


def serve(wire: socket.socket, folder: Path, slots: int, positions: int) -> None:
    """What the process does. Raises EOFError or ConnectionError when the other end is closed."""
    try:
        steps = _Steps(wire, load(folder), slots, positions)
    except UserError as error:
        wire.sendall(packed({"refused": [error.code, error.what, error.where, error.hint]}))
        return
    gc.collect()
    gc.freeze()  # model and libraries stay: to walk through them held everything up for a tenth of a second
    wire.sendall(packed({"ready": True}))
    while True:
        steps.run()


@dataclass(eq=False)
class _Job:
    """reads: how many of the most likely ids are noted in each place of the prompts, None for no reading; stream: with
    every token, not only with whole responses; details: with log-probabilities; left: responses that are not complete;
    grown: by prompt and sample, since the last message."""

    requests: list[Request]
    reads: int | None
    stream: bool
    details: bool
    left: int
    begun: bool = False
    grown: dict[tuple[int, int], list[Event]] = field(default_factory=dict)

    def parts(self) -> list[Part]:
        """What has grown, once."""
        grown, self.grown = self.grown, {}
        return [self._part(prompt, sample, events) for (prompt, sample), events in grown.items()]

    def _part(self, prompt: int, sample: int, events: list[Event]) -> Part:
        response = events[-1].response
        reason = response.reason if response else ""
        if response and not self.stream:
            text, ids, logprobs, top = response.text, response.ids, response.logprobs, response.top
        else:
            _, _, ids, logprobs, texts, _, top = zip(*events, strict=True)
            text, top = "".join(texts), top if self.requests[prompt].top else ()
        return Part(prompt, sample, text, ids, logprobs if self.details else (), top, reason)


class _Steps:
    """Jobs by the number that the other end gave them."""

    def __init__(self, wire: socket.socket, policy: Policy, slots: int, positions: int) -> None:
        self.wire, self.policy, self.shape = wire, policy, (slots, positions)
        self.engine: Engine | None = policy.engine(*self.shape)
        self.jobs: dict[int, _Job] = {}
        self.waiting: deque[tuple[int, int]] = deque()  # a job and the number of one of its prompts
        self.growing: dict[int, tuple[int, int]] = {}  # by the engine's id
        self.grown: set[int] = set()  # jobs
        self.flushed, self.failed = 0.0, False

    def run(self) -> None:
        """All messages that are there, and a step."""
        try:
            while self._heard():
                self._take(received(self.wire))
            self._step()
            self.failed = False
        except (EOFError, ConnectionError):
            raise
        except Exception as error:
            _LOG.error("the engine failed", exc_info=error)
            self._fail(error)

    def _fail(self, error: Exception) -> None:
        """Ends what has no token yet, which may have been too much; at the second time in a row, or if that is all,
        everything: the engine too, whatever its state, before another's memory is taken."""
        self._flush(tuple(self.grown))
        fresh = [number for number, job in self.jobs.items() if not job.begun]
        everything = self.failed or len(fresh) in (0, len(self.jobs))
        self.failed = not everything
        ended = list(self.jobs) if everything else fresh
        if everything:
            self.engine = None
        for number in ended:
            self._cancel(number)
        what, code = (error.what, error.code) if isinstance(error, UserError) else ("the model failed", None)
        self.wire.sendall(packed({"failed": [what, code], "jobs": ended}))

    def _heard(self) -> bool:
        """Whether there is a message; waits for one where there is nothing else to do."""
        idle = not (self.waiting or self.growing)
        return bool(select.select([self.wire], [], [], None if idle else 0)[0])

    def _take(self, message: dict[str, Any]) -> None:
        if "cancel" in message:
            return self._cancel(message["cancel"])
        number, requests = message["job"], [_request(request) for request in message["requests"]]
        left = sum(len(request.keys) for request in requests)
        self.jobs[number] = _Job(requests, message["reads"], message["stream"], message["details"], left)
        self.waiting.extend((number, index) for index in range(len(requests)))

    def _cancel(self, number: int) -> None:
        if not self.jobs.pop(number, None):
            return
        self.waiting = deque(one for one in self.waiting if one[0] != number)
        self.grown.discard(number)
        for request_id in [key for key, one in self.growing.items() if one[0] == number]:
            del self.growing[request_id]
            if self.engine:
                self.engine.cancel(request_id)

    def _step(self) -> None:
        """A token for each response that grows."""
        engine = self.engine = self.engine or self.policy.engine(*self.shape)
        self._admit(engine)
        urgent: set[int] = set()
        for event in engine.advance() if self.growing else ():
            number, prompt = self.growing[event.request_id]
            job, ends = self.jobs[number], event.response is not None
            if ends or not job.begun:
                urgent.add(number)
            if ends or job.stream:
                job.grown.setdefault((prompt, event.sample_index), []).append(event)
                self.grown.add(number)
            job.begun, job.left = True, job.left - ends
        if time.monotonic() - self.flushed >= FLUSH * len(self.grown):
            urgent, self.flushed = urgent | self.grown, time.monotonic()
        self._flush(urgent)

    def _admit(self, engine: Engine) -> None:
        read = 0
        while self.waiting and read < MAX_PREFILL_TOKENS:
            number, index = self.waiting[0]
            job = self.jobs[number]
            request = job.requests[index]
            if job.reads is not None:
                temperature = request.sampling.temperature or 1.0
                likelihoods = token_likelihoods(engine.model, request.ids, engine.device, job.reads, temperature)
                self.wire.sendall(packed({"likelihoods": [number, index, likelihoods]}))
                read += len(request.ids)
            self.growing[engine.add(request)] = number, index
            self.waiting.popleft()

    def _flush(self, numbers: Collection[int]) -> None:
        if not numbers:
            return
        messages = [{"job": number, "parts": self.jobs[number].parts()} for number in numbers]
        self.grown.difference_update(numbers)
        self.wire.sendall(b"".join(map(packed, messages)))
        if ended := {number for number in numbers if not self.jobs[number].left}:
            self.jobs = {number: job for number, job in self.jobs.items() if number not in ended}
            self.growing = {key: one for key, one in self.growing.items() if one[0] not in ended}
