"""The fused model and its cache: token by token it is the decoder's packed forward; rows are copied whole."""

import os
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import toys
from tetrad.inference.fused_model import Fused
from tetrad.inference.kv_cache import Cache, cache_bytes
from tetrad.model.attention import plan_for
from tetrad.model.config import RopeScaling
from tetrad.model.transformer import CausalLM

PROMPTS = [toys.ids(5, 1), toys.ids(1, 2), toys.ids(9, 3)]
NEXT = [toys.ids(4, 10), toys.ids(4, 11), toys.ids(4, 12)]
CPU = torch.device("cpu")
LLAMA3 = RopeScaling(factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=16)


def fill(fused: Fused, cache: Cache, prompts: list[list[int]], slots: list[int]) -> torch.Tensor:
    """Each prompt into its slot; returns the logits after each."""
    packed = toys.packed([toys.document(p) for p in prompts])
    slots_T = torch.tensor(slots).repeat_interleave(torch.tensor([len(p) for p in prompts]))
    attend = cache.fill(slots_T, packed.positions_T, plan_for(packed.bounds, CPU))
    hidden = fused.hidden(packed.ids_T, packed.positions_T, attend)
    return fused.logits(hidden[torch.tensor(packed.bounds[1:]) - 1])


def step(fused: Fused, cache: Cache, rows: list[tuple[int, int]]) -> torch.Tensor:
    """Token t of each of these rows."""
    position = torch.tensor([len(PROMPTS[r]) + t for r, t in rows])
    ids = torch.tensor([NEXT[r][t] for r, t in rows])
    return fused.logits(fused.hidden(ids, position, cache.step(position, int(position.max()) + 1)))


def whole(model: CausalLM, row: int, t: int) -> torch.Tensor:
    """The same by one packed forward."""
    return model(toys.packed([toys.document([*PROMPTS[row], *NEXT[row][: t + 1]])]), "logits")[-1]


def made(**changes: object) -> tuple[CausalLM, Fused, Cache]:
    model = toys.causal(seed=1, **changes)
    return model, Fused(model, torch.float32), Cache(model.config, 3, 20, torch.float32, CPU)


@torch.no_grad()
@pytest.mark.parametrize(
    "changes",
    [
        {"family": "qwen2"},
        {"family": "qwen3", "head_dim": 16, "tied": False},
        {"family": "llama", "rope_scaling": LLAMA3},
        {"family": "qwen2", "heads": 2, "kv_heads": 2, "head_dim": 16, "norm_eps": 0.1},
    ],
    ids=str,
)
def test_token_by_token(changes):
    model, fused, cache = made(**changes)
    logits = fill(fused, cache, PROMPTS, [0, 1, 2])
    for t in range(-1, 4):
        if t >= 0:
            logits = step(fused, cache, [(0, t), (1, t), (2, t)])
        assert logits.dtype == torch.float32
        for row in range(3):
            torch.testing.assert_close(logits[row], whole(model, row, t), rtol=0, atol=2e-5)


@torch.no_grad()
def test_rows_leave_and_others_enter():
    model, fused, cache = made()
    fill(fused, cache, PROMPTS, [0, 1, 2])
    step(fused, cache, [(0, 0), (1, 0), (2, 0)])
    cache.copy(2, 1, len(PROMPTS[2]) + 1)  # the middle row leaves, the last takes its place
    logits = step(fused, cache, [(0, 1), (2, 1)])
    for place, row in enumerate((0, 2)):
        torch.testing.assert_close(logits[place], whole(model, row, 1), rtol=0, atol=2e-5)
    fill(fused, cache, [PROMPTS[1]], [2])  # and comes again, into a slot that holds an old row's numbers
    rows = [(0, 2), (2, 2), (1, 0)]
    for logits, (row, t) in zip(step(fused, cache, rows), rows, strict=True):
        torch.testing.assert_close(logits, whole(model, row, t), rtol=0, atol=2e-5)


def test_the_memory_is_as_told():
    model, _, cache = made()
    assert cache.kv.nbytes == cache_bytes(model.config, 3, 20, torch.float32)
    half = Cache(model.config, 3, 20, torch.bfloat16, CPU)
    assert half.kv.nbytes == cache_bytes(model.config, 3, 20, torch.bfloat16) == cache.kv.nbytes // 2


@torch.no_grad()
def test_bfloat16_is_near():
    model, _, _ = made()
    fused, cache = Fused(model, torch.bfloat16), Cache(model.config, 3, 20, torch.bfloat16, CPU)
    fill(fused, cache, PROMPTS, [0, 1, 2])
    logits = step(fused, cache, [(0, 0), (1, 0), (2, 0)])
    expected = torch.stack([whole(model, row, 0) for row in range(3)])
    assert (logits - expected).abs().max() < 0.1 * expected.std()


@torch.no_grad()
def test_the_model_is_left_alone_and_read_again():
    model, fused, cache = made()
    before = {name: p.clone() for name, p in model.named_parameters()}
    first = fill(fused, cache, PROMPTS, [0, 1, 2])
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())
    for parameter in model.parameters():
        parameter.mul_(1.1)
    again = fill(Fused(model, torch.float32), cache, PROMPTS, [0, 1, 2])
    torch.testing.assert_close(again[1], whole(model, 1, -1), rtol=0, atol=2e-5)
    assert not torch.allclose(first, again, atol=1e-3)


def test_positions_that_no_response_reaches_take_no_memory():
    def resident():
        return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")

    config = replace(toys.causal().config, layers=2)
    size, before = cache_bytes(config, 32, 1 << 15, torch.float32), resident()
    cache = Cache(config, 32, 1 << 15, torch.float32, torch.device("cpu"))
    assert size > 64 << 20 and cache.kv.nbytes == size and not cache.kv[..., :3, :].any()
    cache.kv[..., 5, :] = 1.0
    assert resident() - before < size / 10
