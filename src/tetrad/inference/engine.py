"""The only generation engine: rollouts, evaluation, chat and serving all sample here.

Responses grow together in the slots of one cache; rows join and leave at every step. Each is sampled by its own rules
and its own random numbers, so a response does not depend on its neighbours (but for the last bits of a matrix product,
which change with the number of rows). A prompt is computed once for all its responses. There is no collective inside:
ranks stop at different lengths.
"""

import math
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import NamedTuple
from weakref import WeakKeyDictionary

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from tetrad.console import phase
from tetrad.distributed.device import Device, free_bytes
from tetrad.errors import UserError
from tetrad.inference.cuda_graphs import Replayed, rounded
from tetrad.inference.fused_model import Fused
from tetrad.inference.kv_cache import Cache, cache_bytes
from tetrad.inference.sampler import SamplingBatch, sample
from tetrad.kernels.onednn import padded
from tetrad.model.attention import plan_for
from tetrad.model.transformer import CausalLM
from tetrad.seeds import generator_for
from tetrad.settings.common import Sampling
from tetrad.text.stream import TextStream
from tetrad.text.tokenizer import Tokenizer
from tetrad.types import Response

MAX_PREFILL_TOKENS = 8192
"""Most prompt tokens of one step: responses in progress wait for no more."""
MAX_WAIT_STEPS = 8
"""Steps for which a request waits for others to share a prefill with."""
Key = tuple[int, str, int, int]
"""(seed, purpose, number, number): what determines a response's random numbers."""
Likeliest = tuple[tuple[int, float], ...]
"""Ids with their log-probabilities."""


@dataclass(frozen=True)
class Request:
    """A prompt and how to respond to it, once for each of `keys`. ends, stop: ids and texts that end a response.

    bias: what is added to the logits of some ids. top: how many of the most likely ids are returned at each token.
    """

    ids: tuple[int, ...]
    sampling: Sampling
    keys: tuple[Key, ...]
    ends: tuple[int, ...]
    stop: tuple[str, ...] = ()
    bias: Mapping[int, float] = field(default_factory=dict)
    top: int = 0


class Event(NamedTuple):
    """A token of a response. request_id: of the request; sample_index: which of its responses; text: what can be shown
    now; response: the whole one, with its last token; top: the most likely ids there, if requested."""

    request_id: int
    sample_index: int
    token: int
    logprob: float
    text: str
    response: Response | None
    top: Likeliest = ()


@dataclass(eq=False)
class _Row:
    """A response that waits or grows."""

    request: Request
    request_id: int
    sample_index: int
    uniforms: list[float] = field(default_factory=list)
    stream: TextStream | None = None
    ids: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    texts: list[str] = field(default_factory=list)
    top: list[Likeliest] = field(default_factory=list)

    @property
    def position(self) -> int:
        """Of its last id."""
        return len(self.request.ids) + len(self.ids) - 1

    def begin(self, tokenizer: Tokenizer | None) -> None:
        """Allocates what a growing row needs; waiting rows hold nothing."""
        s, key = self.request.sampling, self.request.keys[self.sample_index]
        self.uniforms = noise(key, s.max_new_tokens).tolist() if s.temperature else [0.0] * s.max_new_tokens
        self.stream = TextStream(tokenizer, self.request.stop) if tokenizer else None

    def response(self, reason: str) -> Response:
        return Response(tuple(self.ids), tuple(self.logprobs), reason, "".join(self.texts), tuple(self.top))


class _CachedPrefill(NamedTuple):
    """A computed prompt with responses that still wait for a slot: it stays in the cache's spare row."""

    request_id: int
    logits: Tensor


class Engine:
    """Requests in, events out. tokenizer: needed if events carry text, or requests have stop texts.

    Slots and positions (the longest prompt with its response) are fixed, and their memory is allocated at once. Errors:
    E-MEM-FULL before the allocation, if there isn't that much.
    """

    @torch.inference_mode()
    def __init__(
        self, model: Fused, device: Device, slots: int, positions: int, tokenizer: Tokenizer | None = None
    ) -> None:
        self.model, self.device, self.slots, self.tokenizer = model, device, slots, tokenizer
        self.positions = min(positions, len(model.rotations))
        needed, free = (
            cache_bytes(model.config, slots + 1, self.positions, model.dtype),
            free_bytes(device.torch_device),
        )
        if needed > free:
            need = f"a cache of {slots} slots with {self.positions} positions needs {needed >> 20} MiB"
            hint = "lower max_num_seqs or max_new_tokens"
            raise UserError("E-MEM-FULL", f"{need}, {free >> 20} MiB are free", hint=hint)
        self.cache = Cache(model.config, slots + 1, self.positions, model.dtype, device.torch_device)
        self.prefilled = 0  # prompt tokens computed
        self._rows: list[_Row] = []  # row i has slot i
        self._waiting: deque[_Row] = deque()
        self._steps_waited = 0  # steps for which rows have waited beside a free slot
        self._added = 0
        self._cancelled: set[int] = set()  # in this step
        self._cached: _CachedPrefill | None = None
        self._sampling: SamplingBatch | None = None
        # No reference to the engine, so that a released engine frees its cache at once.
        self._forward = Replayed(partial(_decode, model, self.cache), slots, self.positions, device)

    @property
    def busy(self) -> bool:
        """Whether any response waits or grows."""
        return bool(self._rows or self._waiting)

    def add(self, request: Request) -> int:
        """Queues a request and returns its id.

        Errors: E-DATA-BLANK without a prompt, E-DATA-LONG if prompt and response don't fit. Raises ValueError for
        stop texts without a tokenizer.
        """
        if request.stop and self.tokenizer is None:
            raise ValueError("stop texts need a tokenizer")
        if not request.ids:
            raise UserError("E-DATA-BLANK", "the prompt has no tokens", hint="ask something")
        new = request.sampling.max_new_tokens
        needed = len(request.ids) + new
        if needed > self.positions:
            what = f"the longest prompt and {new} new tokens need {needed} positions, there are {self.positions}"
            raise UserError("E-DATA-LONG", what, hint="shorten the prompt or max_new_tokens")
        self._added += 1
        self._waiting += [_Row(request, self._added, index) for index in range(len(request.keys))]
        return self._added

    @torch.inference_mode()
    def cancel(self, request_id: int) -> list[Response]:
        """Ends a request's responses where they are; returns those that waited or grew, as far as they were shown. No
        further event of it comes from `events`."""
        gone = [row for row in (*self._rows, *self._waiting) if row.request_id == request_id]
        self._leave([number for number, row in enumerate(self._rows) if row.request_id == request_id])
        self._waiting = deque(row for row in self._waiting if row.request_id != request_id)
        if self._is_cached(request_id):
            self._cached = None
        self._cancelled.add(request_id)
        return [row.response("cancelled") for row in sorted(gone, key=lambda row: row.sample_index)]

    def events(self) -> Iterator[Event]:
        """Everything that happens until all responses are complete; requests may be added and cancelled in between."""
        while self.busy:
            for event in self.advance():
                if event.request_id not in self._cancelled:
                    yield event

    @torch.inference_mode()
    def advance(self) -> list[Event]:
        """One token for each growing row, after waiting ones have taken free slots.

        Errors: E-NUM-NONFINITE if the logits are not finite. After any error the same step can be retried.
        """
        self._cancelled.clear()
        try:
            grown = [(row.ids[-1], row.position) for row in self._rows]
            logits = [self._forward(*map(list, zip(*grown, strict=True)))] if grown else []
            logits += self._admit()
            if not self._rows:
                return []
            events = self._sample(torch.cat(logits) if len(logits) > 1 else logits[0])
        except BaseException:  # an error, out of memory, Ctrl-C: rows without a token wait again
            fresh = [row for row in self._rows if not row.ids]
            del self._rows[len(self._rows) - len(fresh) :]
            self._waiting.extendleft(reversed(fresh))
            self._sampling = None
            raise
        self._leave([number for number, event in enumerate(events) if event.response])
        return events

    # Rows that join and leave

    def _admit(self) -> list[Tensor]:
        """Waiting rows take free slots; returns the logits after their prompts. If few are free they wait some steps
        for an eighth: one prompt costs nearly as much as several together."""
        free = self.slots - len(self._rows)
        if not self._waiting or not free:
            return []
        self._steps_waited += 1
        if self._rows and free < self.slots // 8 and self._steps_waited < MAX_WAIT_STEPS:
            return []
        first, tokens, self._steps_waited, self._sampling = len(self._rows), 0, 0, None
        prompts: dict[int, int] = {}  # request_id: slot where its prompt is computed
        while self._waiting and len(self._rows) < self.slots:
            row = self._waiting[0]
            if row.request_id not in prompts and not self._is_cached(row.request_id):
                tokens += len(row.request.ids)
                if prompts and tokens > MAX_PREFILL_TOKENS:
                    break
                prompts[row.request_id] = len(self._rows)
            row.begin(self.tokenizer)
            self._rows.append(self._waiting.popleft())
        return [self._prompts(first, prompts)]

    def _prompts(self, first: int, prompts: dict[int, int]) -> Tensor:
        """The prompts' keys and values in the slots of all rows from `first` on, and the logits after them, [rows, V].

        Responses of one request wait one after another: only the last prompt can have some still waiting, and is
        kept in the spare row for them.
        """
        logits = self._prefill(list(prompts.values())) if prompts else ()
        after, source = dict(zip(prompts, logits, strict=True)), dict(prompts)
        if self._cached:
            after[self._cached.request_id], source[self._cached.request_id] = self._cached.logits, self.slots
        for slot, row in enumerate(self._rows[first:], first):
            if source[row.request_id] != slot:
                self.cache.copy(source[row.request_id], slot, len(row.request.ids))
        last = self._rows[-1]
        if not self._waiting or self._waiting[0].request_id != last.request_id:
            self._cached = None
        elif not self._is_cached(last.request_id):
            self._cached = None
            self.cache.copy(len(self._rows) - 1, self.slots, len(last.request.ids))
            self._cached = _CachedPrefill(last.request_id, after[last.request_id].clone())
        return torch.stack([after[row.request_id] for row in self._rows[first:]])

    def _is_cached(self, request_id: int) -> bool:
        return self._cached is not None and self._cached.request_id == request_id

    def _prefill(self, slots: list[int]) -> Tensor:
        """Computes the prompts of these slots' rows, packed; returns the logits after each, [prompts, V]."""
        device, prompts = self.device.torch_device, [self._rows[slot].request.ids for slot in slots]
        lengths = torch.tensor([len(prompt) for prompt in prompts])
        ends = lengths.cumsum(0)
        total = int(ends[-1])
        positions_T = (torch.arange(total) - (ends - lengths).repeat_interleave(lengths)).to(device)
        slots_T = torch.tensor(slots).repeat_interleave(lengths).to(device)
        ids_T = torch.from_numpy(np.concatenate([np.asarray(prompt, np.int64) for prompt in prompts])).to(device)
        plan = plan_for((0, *ends.tolist()), device)
        attend = self.cache.fill(slots_T, positions_T, plan)
        self.prefilled += total
        ids_T, positions_T = (F.pad(x, (0, padded(total, device) - total)) for x in (ids_T, positions_T))
        return self.model.logits(self.model.hidden(ids_T, positions_T, attend, (ends - 1).to(device)))

    def _leave(self, slots: Sequence[int]) -> None:
        """Frees slots, the last rows moving into them, so that the rows in use stay the first ones."""
        for slot in sorted(slots, reverse=True):
            last = self._rows.pop()
            if slot < len(self._rows):
                self._rows[slot] = last
                self.cache.copy(len(self._rows), slot, last.position)
        if slots:
            self._sampling = None

    # Sampling

    def _sample(self, logits: Tensor) -> list[Event]:
        rows, device = self._rows, self.device.torch_device
        if self._sampling is None:
            requests = [row.request for row in rows]
            size, biases = logits.shape[-1], [request.bias for request in requests]
            self._sampling = SamplingBatch.of([request.sampling for request in requests], biases, size, device)
        uniforms = self.device.move(torch.tensor([row.uniforms[len(row.ids)] for row in rows]))
        histories = [(r.request.sampling, r.request.ids, r.ids) for r in rows] if self._sampling.penalised else ()
        top = max(row.request.top for row in rows)
        sampled = sample(logits, uniforms, self._sampling, histories, top)
        ids, logprobs = self.device.read(sampled.ids, sampled.logprobs)
        if not all(map(math.isfinite, logprobs)):
            what, hint = "the model's logits are no numbers", "it is damaged: train it again"
            raise UserError("E-NUM-NONFINITE", what, hint=hint)
        likeliest: list[Likeliest] = [()] * len(rows)
        if sampled.top:
            pairs = zip(*(part.tolist() for part in sampled.top), strict=True)
            likeliest = [tuple(zip(*pair, strict=True)) for pair in pairs]
        return list(map(_event, rows, map(int, ids), logprobs, likeliest))


def _decode(model: Fused, cache: Cache, ids_N: Tensor, positions_N: Tensor, length: int, full: bool) -> Tensor:
    """The logits of a decoding step."""
    return model.logits(model.hidden(ids_N, positions_N, cache.step(positions_N, length, full=full)))


def _event(row: _Row, token: int, logprob: float, top: Likeliest) -> Event:
    """The row with one more token."""
    request = row.request
    row.ids.append(token)
    row.logprobs.append(logprob)
    top = top[: request.top]
    if request.top:
        row.top.append(top)
    text, reason = "", ""
    if token in request.ends:
        reason = "end"
    elif len(row.ids) == request.sampling.max_new_tokens:
        reason = "length"
    if row.stream:
        text = row.stream.push(token)
        if row.stream.stopped and reason != "end":
            reason = "stop"
        if reason:
            text += row.stream.close()
        row.texts.append(text)
    response = row.response(reason) if reason else None
    return Event(row.request_id, row.sample_index, token, logprob, text, response, top)


def noise(key: Key, max_new_tokens: int) -> np.ndarray:
    """A response's uniform numbers [max_new_tokens], float32, independent of what is sampled beside it."""
    return generator_for(*key).random(max_new_tokens, dtype=np.float32)


def generate(
    model: CausalLM | Fused,
    requests: Sequence[Request],
    device: Device,
    slots: int,
    tokenizer: Tokenizer | None = None,
    keep: bool = False,
) -> list[Response]:
    """The responses, request by request. tokenizer: if they carry text, or have stop texts. keep: this model will
    generate again, with other weights: on a GPU its cache and what was captured are kept for then.

    Errors: E-DATA-LONG if a prompt and its longest response exceed the model's positions; E-MEM-FULL.
    """
    if not requests:
        return []
    positions = padded(max(len(r.ids) + r.sampling.max_new_tokens for r in requests), device.torch_device)
    slots, keep = min(slots, sum(len(r.keys) for r in requests)), keep and _can_be_kept(model, device)
    if keep:  # the next prompts may be longer
        positions = rounded(positions, 256, model.config.max_positions)
    # Not in the store while it works: what an error leaves of it is of no use.
    engine = _kept.pop(model, None) if isinstance(model, CausalLM) else None
    if engine and isinstance(model, CausalLM) and engine.slots >= slots and engine.positions >= positions:
        with device.together("a copy for sampling"):
            engine.model.refill(model)
        engine.tokenizer, keep = tokenizer, True
    else:
        engine = None  # its memory first
        with device.together("a copy for sampling"):
            fused = model if isinstance(model, Fused) else Fused(model, device.dtype, positions)
        engine = Engine(fused, device, slots, positions, tokenizer)
    for request in requests:
        engine.add(request)
    responses: dict[tuple[int, int], Response] = {}
    with phase("sampling", sum(len(r.keys) for r in requests)) as bar:
        for tokens, event in enumerate(engine.events(), 1):
            if event.response:
                responses[event.request_id, event.sample_index] = event.response
            bar.advance(int(event.response is not None), tokens=tokens)
    if keep and isinstance(model, CausalLM):
        _kept[model] = engine
    return [responses[key] for key in sorted(responses)]


_kept: WeakKeyDictionary[CausalLM, Engine] = WeakKeyDictionary()


def _can_be_kept(model: CausalLM | Fused, device: Device) -> bool:
    """On a GPU, where all weights of the form for decoding are copies. A CPU captures nothing, and needs the memory."""
    gpu = device.torch_device.type == "cuda"
    return gpu and isinstance(model, CausalLM) and model.model.embed_tokens.weight.dtype != device.dtype
