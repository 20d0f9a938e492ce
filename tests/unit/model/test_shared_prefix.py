"""What documents have in common, computed once: the numbers of each document alone."""

from dataclasses import replace

import numpy as np
import pytest
import torch

import toys
from tetrad.data.pack import common_prefix, pack, pack_groups
from tetrad.model.attention import packed_attention, plan_for
from tetrad.types import Prefix

CPU = torch.device("cpu")
MODELS = {
    "groups": {},
    "every head its own": {"kv_heads": 4},
    "one group": {"kv_heads": 1},
    "normed heads": {"family": "qwen3", "head_dim": 6},
    "one head": {"heads": 1, "kv_heads": 1, "head_dim": 32},
}


def group(prompt, *answers):
    """Documents of one prompt; prompt and answers by their lengths and seeds."""
    first = toys.ids(*prompt)
    return [toys.document([*first, *toys.ids(*answer)], len(first)) for answer in answers]


def random_groups(seed):
    """Lists of one to six answers, some of one token, to prompts of no token and more, some of them alike."""
    draw = np.random.default_rng(seed)
    found = []
    for number in range(6):
        prompt = (int(draw.choice([0, 1, 2, 9, 30, 60])), int(draw.integers(3)))
        lengths = draw.choice([1, 1, 2, 5, 17, 40], int(draw.integers(1, 7)))
        found.append(group(prompt, *((int(n), 100 * number + i) for i, n in enumerate(lengths))))
    return found


ONE_INSIDE_ANOTHER = [
    [toys.document(toys.ids(n, 7)) for n in (9, 12, 10)],  # the first is what the others begin with
    [toys.document(toys.ids(n, 8)) for n in (12, 9, 9)],  # and two alike, shorter than the first
    [toys.document(toys.ids(1, 9)) for _ in range(3)],  # nothing can be shared
]
GROUPS = {
    "random 0": random_groups(0),
    "random 1": random_groups(1),
    "random 2": random_groups(2),
    "one record": [group((20, 1), (5, 2), (9, 3))],
    "one-token answers": [group((33, 1), *((1, i) for i in range(5)))],
    "like lengths": [group((8, i), (8, 10 + i), (8, 20 + i)) for i in range(4)],
    "one inside another": ONE_INSIDE_ANOTHER,
    "prompts alike": [group((25, 1), (4, i), (6, 10 + i)) for i in range(3)],
}


def shared(groups):
    """Everything that can be shared is."""
    return toys.CPU.put(pack_groups(groups, [common_prefix(documents) for documents in groups]))


def plain(groups):
    return toys.packed([document for documents in groups for document in documents])


def scores_and_gradients(model, packed):
    """Scores, a loss that weighs every one and every difference to the next, and the gradient of each parameter."""
    model.zero_grad()
    scores_D = model(packed, "scores")
    weights = torch.randn(len(scores_D), generator=torch.Generator().manual_seed(0), dtype=scores_D.dtype)
    loss = (scores_D * weights).sum() - torch.nn.functional.logsigmoid(scores_D[1:] - scores_D[:-1]).sum()
    loss.backward()
    return scores_D.detach(), loss.detach(), {name: p.grad.clone() for name, p in model.named_parameters()}


class Wide(torch.nn.Module):
    """The scalar model with scores in float64: its own are float32."""

    def __init__(self, **changes):
        super().__init__()
        self.inner = toys.scalar(seed=1, **changes).double()

    def forward(self, packed, want):
        hidden = self.inner.model(packed)
        return self.inner.score(hidden[torch.tensor(packed.bounds[1:]) - 1])[:, 0]


def assert_same(model, groups, tolerance):
    ours, theirs = scores_and_gradients(model, shared(groups)), scores_and_gradients(model, plain(groups))
    torch.testing.assert_close(ours[:2], theirs[:2], rtol=tolerance, atol=tolerance)
    assert theirs[0].std() > 1e-2 or len(theirs[0]) < 3  # else closeness would say nothing
    for name, gradient in theirs[2].items():
        scale = float(gradient.norm()) or 1.0
        assert float((ours[2][name] - gradient).norm()) <= tolerance * scale, name


@pytest.mark.parametrize("groups", GROUPS.values(), ids=GROUPS)
@pytest.mark.parametrize("changes", MODELS.values(), ids=MODELS)
def test_shared_is_plain(changes, groups):
    assert_same(Wide(**changes), groups, 1e-10)


@pytest.mark.parametrize("groups", GROUPS.values(), ids=GROUPS)
def test_shared_is_plain_in_float32(groups):
    assert_same(toys.scalar(seed=1, bias=0.5), groups, 1e-5)


def test_scores_without_gradients_are_the_same():
    model, groups = toys.scalar(seed=1, bias=0.5), GROUPS["random 0"]
    with torch.no_grad():
        torch.testing.assert_close(model(shared(groups)), model(plain(groups)))


def test_gradient_is_the_difference():
    """Of the attention alone, in every input: prefix, tails of unlike length, a document without a prefix."""
    bounds, prefixes = (0, 6, 9, 10, 14, 16, 21), (Prefix(0, 4, 2), Prefix(4, 2, 5))
    plan = plan_for(bounds, CPU, prefixes)
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(21, heads, 3, generator=generator, dtype=torch.float64) for heads in (4, 2, 2))
    inputs = tuple(x.requires_grad_() for x in (q, k, v))
    assert torch.autograd.gradcheck(lambda q, k, v: packed_attention(q, k, v, plan), inputs)


@pytest.mark.parametrize("length", [1, 30])
def test_a_record_changes_no_other(length):
    """Scores and gradients of one record's embeddings beside another's: none comes, whatever the padding holds."""
    one, other, third = group((30, 1), (3, 2), (20, 3)), group((29, 4), (length, 5), (18, 6)), group((9, 7), (5, 8))
    model = toys.scalar(seed=1).double()
    seen = []
    for middle in (other, group((29, 14), (length, 15), (18, 16))):
        packed = shared([one, middle, third])
        embedded = []
        handle = model.model.embed_tokens.register_forward_hook(lambda *given, to=embedded: to.append(given[2]))
        scores = model(packed)
        handle.remove()
        (gradient,) = torch.autograd.grad(scores[[0, 1, 4]].sum(), embedded)
        start, stop = packed.bounds[2], packed.bounds[4]
        assert not gradient[start:stop].any()
        assert gradient[:start].any(1).all()
        assert gradient[stop:].any(1).all()
        seen.append((scores[[0, 1, 4]], gradient[:start]))
    torch.testing.assert_close(seen[0], seen[1], rtol=0, atol=1e-12)


def test_the_later_answers_are_not_seen_by_the_first():
    """A prefix lies in the first document: what the others add must not come back to it."""
    model = toys.scalar(seed=1)
    packed = shared([group((12, 1), (6, 2), (7, 3), (8, 4))])
    changed = replace(packed, ids_T=torch.cat((packed.ids_T[:18], packed.ids_T[18:].roll(3))))
    before, after = model(packed), model(changed)
    assert torch.equal(before[0], after[0])
    assert (before[1:] - after[1:]).abs().min() > 1e-4


def test_what_is_shared_is_stored_once():
    first, second = group((5, 1), (2, 2), (1, 3), (3, 4)), group((4, 5), (2, 6))
    packed = pack_groups([first, second], [5, 0])
    whole = pack([*first, *second])
    assert packed.bounds == (0, 7, 8, 11, 17)
    assert packed.prefixes == (Prefix(0, 5, 2),)
    assert (
        packed.ids_T.tolist()
        == np.concatenate((whole.ids_T[:7], whole.ids_T[[12, 18, 19, 20]], whole.ids_T[21:])).tolist()
    )
    assert packed.positions_T.tolist() == [0, 1, 2, 3, 4, 5, 6, 5, 5, 6, 7, 0, 1, 2, 3, 4, 5]
    assert toys.CPU.put(packed).prefixes == packed.prefixes
    with pytest.raises(ValueError, match="nothing to pack"):
        pack_groups([ONE_INSIDE_ANOTHER[0]], [10])


def test_common_prefix():
    assert common_prefix(group((5, 1), (2, 2))) == 0
    assert common_prefix([toys.document([3, 4, 5, 6]), toys.document([3, 4, 7]), toys.document([3, 4, 5, 9])]) == 2
    assert [common_prefix(documents) for documents in ONE_INSIDE_ANOTHER] == [9, 8, 0]
    assert common_prefix([toys.document([3, 4]), toys.document([4, 4])]) == 0


def test_documents_that_share_nothing_are_packed_as_ever():
    groups = GROUPS["random 0"]
    ours, theirs = pack_groups(groups, [0] * len(groups)), pack([d for documents in groups for d in documents])
    assert ours.prefixes == theirs.prefixes == ()
    assert (ours.bounds, ours.where) == (theirs.bounds, theirs.where)
    for name in ("ids_T", "positions_T", "targets_T"):
        assert np.array_equal(getattr(ours, name), getattr(theirs, name))
    assert all(part.causal for part in plan_for(theirs.bounds, CPU).parts)
