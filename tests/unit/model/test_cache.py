"""Keys and values in slots: token by token it is the packed forward; rows move whole."""

import pytest
import torch

import toys
from tetrad.model.attention import plan_for
from tetrad.model.cache import Cache

PROMPTS = [toys.ids(5, 1), toys.ids(1, 2), toys.ids(9, 3)]
NEXT = [toys.ids(4, 10), toys.ids(4, 11), toys.ids(4, 12)]


def filled(model, slots=3, positions=20):
    """The cache after the prompts, and each prompt's last hidden state."""
    cache = Cache(model.config, slots, positions, torch.float32, torch.device("cpu"))
    packed = toys.packed([toys.document(p) for p in PROMPTS])
    attend = cache.fill(packed, torch.arange(3), plan_for(packed.bounds, torch.device("cpu")))
    hidden = model.model(packed.ids_T, packed.positions_T, attend)
    return cache, hidden[torch.tensor(packed.bounds[1:]) - 1]


def step(model, cache, rows, t):
    """One more token for each of these rows."""
    position = torch.tensor([len(PROMPTS[r]) + t for r in rows])
    ids = torch.tensor([NEXT[r][t] for r in rows])
    return model.model(ids, position, cache.step(position, int(position.max()) + 1))


def whole(model, row, t):
    """The same by one packed forward."""
    return model.model.packed(toys.packed([toys.document([*PROMPTS[row], *NEXT[row][: t + 1]])]))[-1]


@torch.no_grad()
@pytest.mark.parametrize("family", ["qwen2", "qwen3", "llama"])
def test_token_by_token(family):
    model = toys.causal(seed=1, family=family)
    cache, last = filled(model)
    for row in range(3):
        torch.testing.assert_close(last[row], whole(model, row, -1), rtol=0, atol=1e-5)
    for t in range(4):
        hidden = step(model, cache, [0, 1, 2], t)
        for row in range(3):
            torch.testing.assert_close(hidden[row], whole(model, row, t), rtol=0, atol=1e-5)


@torch.no_grad()
def test_rows_leave_and_others_enter():
    model = toys.causal(seed=1)
    cache, _ = filled(model, slots=3)
    step(model, cache, [0, 1, 2], 0)
    cache.keep(torch.tensor([0, 2]), 10)  # the middle row leaves
    hidden = step(model, cache, [0, 2], 1)
    for place, row in enumerate((0, 2)):
        torch.testing.assert_close(hidden[place], whole(model, row, 1), rtol=0, atol=1e-5)
    packed = toys.packed([toys.document(PROMPTS[1])])  # and comes again, into a slot that holds an old row's numbers
    attend = cache.fill(packed, torch.tensor([2]), plan_for(packed.bounds, torch.device("cpu")))
    model.model(packed.ids_T, packed.positions_T, attend)
    position = torch.tensor([len(PROMPTS[0]) + 2, len(PROMPTS[2]) + 2, len(PROMPTS[1])])
    ids = torch.tensor([NEXT[0][2], NEXT[2][2], NEXT[1][0]])
    hidden = model.model(ids, position, cache.step(position, int(position.max()) + 1))
    for place, (row, t) in enumerate(((0, 2), (2, 2), (1, 0))):
        torch.testing.assert_close(hidden[place], whole(model, row, t), rtol=0, atol=1e-5)
