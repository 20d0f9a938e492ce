"""What the engine does on a GPU, as far as it shows without one: what it keeps, captures and waits for."""

from contextlib import contextmanager
from types import SimpleNamespace

import pytest
import torch

import toys
from fake_cuda import CUDA, fake_cuda
from tetrad.distributed.device import Device
from tetrad.errors import UserError
from tetrad.inference import engine as module
from tetrad.inference.cuda_graphs import Replayed
from tetrad.inference.engine import generate
from tetrad.inference.kv_cache import Cache

BF16 = Device(torch.device("cpu"), torch.bfloat16)


@pytest.fixture
def caches(monkeypatch) -> list[Cache]:
    """Those that were made; models are kept as on a GPU, their weights in bfloat16 as there."""
    made, real = [], Cache.__init__

    def begin(self, *given):
        made.append(self)
        real(self, *given)

    monkeypatch.setattr(Cache, "__init__", begin)
    monkeypatch.setattr(module, "_can_be_kept", lambda model, _: True)
    return made


def replies(model, keep, count=5, length=4):
    requests = [toys.request(toys.ids(length + i, i), i, max_new_tokens=6) for i in range(count)]
    return generate(model, requests, BF16, 4, keep=keep)


@pytest.mark.parametrize("changes", [{}, {"tied": False}, {"family": "llama"}, {"family": "qwen3"}], ids=str)
def test_a_kept_engine_has_the_new_weights(caches, changes):
    """After each change of the weights: the replies of a fresh engine, from the cache of the first call."""
    model, fresh = (toys.causal(seed=1, **changes) for _ in range(2))
    found = []
    for step in range(3):
        toys.randomise(model, seed=step)
        before = len(caches)
        found.append(replies(model, keep=True, length=4 + step))
        assert len(caches) - before == (step == 0)
        fresh.load_state_dict(model.state_dict())
        assert found[-1] == replies(fresh, keep=False, length=4 + step)
    assert len({reply.ids for each in found for reply in each}) > 5


def test_a_kept_engine_grows(caches):
    """A call that needs more positions makes another one; later ones fit, those too that would not keep any."""
    model, made = toys.causal(seed=1, max_positions=600), []
    for length, keep in ((4, True), (300, True), (9, False), (5, True)):
        found = replies(model, keep, count=3, length=length)
        made.append(len(caches))
        assert found == replies(toys.causal(seed=1, max_positions=600), False, count=3, length=length)
        del caches[made[-1] :]
    assert made == [1, 2, 2, 2]


def test_what_an_error_leaves_is_not_kept(caches):
    model, fresh = toys.causal(seed=1), toys.causal(seed=1)
    replies(model, keep=True)
    with torch.no_grad():
        model.model.norm.weight.fill_(torch.nan)
    with pytest.raises(UserError, match="no numbers"):
        replies(model, keep=True)
    model.load_state_dict(fresh.state_dict())
    assert replies(model, keep=True) == replies(fresh, keep=False)
    assert len(caches) == 3


def test_an_engine_goes_with_its_model(caches):
    model = toys.causal(seed=1)
    replies(model, keep=True)
    assert len(module._kept) == 1
    del model
    assert not module._kept


def test_a_cpu_keeps_nothing():
    replies(toys.causal(seed=1), keep=True)
    assert not module._kept


class Graph:
    """A recorder in place of a captured graph."""

    def __init__(self):
        self.replays = 0

    def replay(self):
        self.replays += 1

    def pool(self):
        return "pool"


def test_steps_are_captured_once_for_each_size(monkeypatch):
    """Only this thread's calls may break a capture: NCCL's watchdog makes its own. Ids and positions travel from pinned
    memory, which is not waited for."""
    captures, pinned = [], []

    @contextmanager
    def graph(graph, **how):
        captures.append((graph, how))
        yield

    stream = SimpleNamespace(wait_stream=lambda _: None)
    monkeypatch.setattr(torch.cuda, "graph", graph)
    monkeypatch.setattr(torch.cuda, "CUDAGraph", Graph)
    monkeypatch.setattr(torch.cuda, "Stream", lambda _: stream)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda _: stream)
    monkeypatch.setattr(torch.cuda, "stream", lambda _: graph(None))
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda x: pinned.append(x.shape) or x)

    def compute(ids, positions, length, full):
        assert ids.is_cuda and not full
        return torch.empty(len(ids), 11, device=ids.device)

    with fake_cuda():
        step = Replayed(compute, 8, 300, Device(CUDA, torch.bfloat16))
        shapes = [step(list(range(n)), [at] * n).shape for n, at in ((3, 5), (4, 200), (3, 255), (2, 5), (3, 290))]
    assert shapes == [(3, 11), (4, 11), (3, 11), (2, 11), (3, 11)]
    made = [(graph, how) for graph, how in captures if graph]
    assert [graph.replays for graph, _ in made] == [3, 1, 1]
    assert [how for _, how in made] == [
        {"pool": pool, "capture_error_mode": "thread_local"} for pool in (None, "pool", "pool")
    ]
    assert pinned == [(2, n) for n in (3, 4, 3, 2, 3)]
