"""The only sampler: replies to many prompts at once, for rollouts, evaluation and chat alike.

Prompts are computed packed; replies grow together in the slots of one cache. A row leaves when it ends, and a waiting
prompt takes its place. There is no collective inside: ranks stop at different lengths.
"""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from tetrad.data.pack import pack
from tetrad.engine.device import Device
from tetrad.engine.sampling import draw
from tetrad.errors import UserError
from tetrad.model.attention import plan_for
from tetrad.model.cache import Cache
from tetrad.model.decoder import CausalLM
from tetrad.seeds import generator_for
from tetrad.settings.common import Sampling
from tetrad.types import Packed, Reply, Tokens


def noise(seed: int, purpose: str, step: int, requests: Sequence[int], max_new: int) -> Tensor:
    """Uniform numbers [requests, max_new]: each request has its own, whatever is sampled beside it."""
    rows = [generator_for(seed, purpose, step, r).random(max_new, dtype=np.float32) for r in requests]
    return torch.from_numpy(np.stack(rows)) if rows else torch.empty(0, max_new)


class _Rows:
    """The replies in the making: row i of the cache writes request owner[i], which has used[i] tokens."""

    def __init__(self, requests: int, max_new: int, place: torch.device) -> None:
        self.ids = torch.zeros(requests, max_new + 1, dtype=torch.int64, device=place)
        self.logprobs = torch.zeros(requests, max_new + 1, device=place)
        self.length = torch.zeros(requests, dtype=torch.int64, device=place)
        self.ended = torch.zeros(requests, dtype=torch.bool, device=place)
        self.owner = self.position = self.used = torch.empty(0, dtype=torch.int64, device=place)
        self.alive = torch.empty(0, dtype=torch.bool, device=place)
        self.max_new = max_new

    def join(self, requests: Tensor, positions: Tensor) -> None:
        self.owner = torch.cat((self.owner, requests))
        self.position = torch.cat((self.position, positions))
        self.used = torch.cat((self.used, torch.zeros_like(requests)))
        self.alive = torch.cat((self.alive, torch.ones_like(requests, dtype=torch.bool)))

    def keep(self, rows: Tensor) -> None:
        self.owner, self.position, self.used, self.alive = (
            x[rows] for x in (self.owner, self.position, self.used, self.alive)
        )

    def write(self, ids: Tensor, logprobs: Tensor, eos: Tensor) -> None:
        """Rows that have ended keep computing until they leave; what they say goes to the spare last column."""
        column = torch.where(self.alive, self.used, self.max_new)
        self.ids[self.owner, column] = ids
        self.logprobs[self.owner, column] = logprobs
        self.used = self.used + self.alive
        over = torch.isin(ids, eos) & self.alive
        self.length[self.owner] = self.used
        self.ended[self.owner] |= over
        self.alive = self.alive & ~over & (self.used < self.max_new)

    def replies(self) -> list[Reply]:
        ids, logprobs, length, ended = (x.tolist() for x in (self.ids, self.logprobs, self.length, self.ended))
        return [Reply(tuple(i[:n]), tuple(p[:n]), e) for i, p, n, e in zip(ids, logprobs, length, ended, strict=True)]


@torch.inference_mode()
def generate(
    model: CausalLM,
    prompts: Sequence[Sequence[int]],
    uniforms: Tensor,
    sampling: Sampling,
    eos_ids: Sequence[int],
    device: Device,
) -> list[Reply]:
    """One reply a prompt. uniforms: [prompts, max_new] from `noise` (unread when greedy).

    Errors: E-DATA-LONG where a prompt and its longest reply exceed the model's positions.
    """
    max_new = sampling.max_new
    longest = max(map(len, prompts), default=0) + max_new
    if longest > model.config.max_positions:
        what = f"the longest prompt and {max_new} new tokens need {longest} positions, the model has"
        raise UserError("E-DATA-LONG", f"{what} {model.config.max_positions}", hint="shorten the prompt or max_new")
    slots = min(sampling.slots, len(prompts))
    cache = Cache(model.config, slots, longest, device.dtype, device.place)
    rows = _Rows(len(prompts), max_new, device.place)
    uniforms, eos = uniforms.to(device.place), torch.tensor(list(eos_ids), device=device.place)
    waiting = 0
    logits = torch.empty(0, model.config.vocab_size, device=device.place)
    while True:
        waiting, logits = _admit(model, cache, rows, prompts, waiting, slots, logits, device)
        if not len(rows.owner):
            return rows.replies()
        point = uniforms[rows.owner, rows.used.clamp(max=max_new - 1)]
        ids, logprobs = draw(logits, point, sampling)
        rows.write(ids, logprobs, eos)
        ids = _leave(cache, rows, ids)
        logits = _step(model, cache, rows, ids, longest, device) if len(ids) else logits[:0]


def _leave(cache: Cache, rows: _Rows, ids: Tensor) -> Tensor:
    """Ended rows go when they are worth moving the cache for: an eighth of the rows, or all."""
    total, alive = len(rows.alive), int(rows.alive.sum())
    if total - alive < max(1, total // 8) and alive:
        return ids
    kept = rows.alive.nonzero()[:, 0]
    if alive:
        cache.keep(kept, int(rows.position.max()) + 1)
    rows.keep(kept)
    return ids[kept]


def _step(model: CausalLM, cache: Cache, rows: _Rows, ids: Tensor, limit: int, device: Device) -> Tensor:
    position = rows.position.clamp(max=limit - 1)
    with device.compute():
        hidden = model.model(ids, position, cache.step(position, int(position.max()) + 1))
        logits: Tensor = hidden @ model.head_weight.t()
    rows.position = rows.position + 1
    return logits


def _admit(
    model: CausalLM,
    cache: Cache,
    rows: _Rows,
    prompts: Sequence[Sequence[int]],
    waiting: int,
    slots: int,
    logits: Tensor,
    device: Device,
) -> tuple[int, Tensor]:
    """Waiting prompts take the free slots; returns the next waiting one and all rows' logits."""
    free = slots - len(rows.owner)
    new = range(waiting, min(waiting + free, len(prompts)))
    if not new:
        return waiting, logits
    packed = device.put(_packed([prompts[i] for i in new]))
    slots_D = torch.arange(len(new), device=device.place) + len(rows.owner)
    with device.compute():
        plan = plan_for(packed.bounds, device.place)
        hidden = model.model(packed.ids_T, packed.positions_T, cache.fill(packed, slots_D, plan))
        last = torch.tensor(packed.bounds[1:], device=device.place) - 1
        first = hidden[last] @ model.head_weight.t()
    rows.join(torch.tensor(list(new), device=device.place), packed.positions_T[last] + 1)
    return new.stop, torch.cat((logits, first.to(logits.dtype) if len(logits) else first))


def _packed(prompts: list[Sequence[int]]) -> Packed:
    return pack([Tokens(np.asarray(p, np.int32), np.zeros(len(p), np.bool_)) for p in prompts])
