import math
from itertools import pairwise, permutations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.nn.functional import logsigmoid

from mean_losses import bt_loss, kwise_loss, pair_loss, plackett_luce_loss
from tetrad.objectives import preference

LISTS = st.lists(st.lists(st.integers(1, 4), min_size=1, max_size=6), min_size=1, max_size=5)


def flat(lists: list[list[int]]) -> tuple[torch.Tensor, torch.Tensor, list[int]]:
    """Scores, ranks and bounds."""
    ranks = torch.tensor([rank for ranks in lists for rank in ranks])
    bounds = [0]
    for ranks_of_list in lists:
        bounds.append(bounds[-1] + len(ranks_of_list))
    scores = torch.randn(len(ranks), generator=torch.Generator().manual_seed(len(ranks)), dtype=torch.float64)
    return scores * 2, ranks, bounds


def order_probability(scores: list[float], order: tuple[int, ...]) -> float:
    weights = [math.exp(scores[i]) for i in order]
    return math.prod(w / sum(weights[n:]) for n, w in enumerate(weights))


def exact_by_enumeration(scores: torch.Tensor, ranks: list[int]) -> float:
    orders = permutations(range(len(ranks)))
    agreeing = (o for o in orders if all(ranks[a] <= ranks[b] for a, b in pairwise(o)))
    return -math.log(sum(order_probability(scores.tolist(), order) for order in agreeing))


@given(LISTS, st.sampled_from(["skip", "half"]))
def test_pairs_are_all_pairs_and_weigh_one_a_list(lists, ties):
    _, ranks, bounds = flat(lists)
    winners, losers, weights = preference.pairs_of(ranks, bounds, ties)
    found = {(int(w), int(b)): float(x) for w, b, x in zip(winners, losers, weights, strict=True)}
    wanted = {}
    for start, stop in pairwise(bounds):
        pairs = [(a, b) for a in range(start, stop) for b in range(start, stop) if a != b]
        amounts = {(a, b): (ranks[a] < ranks[b]) + 0.5 * (ties == "half") * (ranks[a] == ranks[b]) for a, b in pairs}
        total = float(sum(amounts.values()))
        wanted |= {pair: float(amount) / total for pair, amount in amounts.items() if amount > 0}
    assert found == pytest.approx(wanted)


@given(LISTS)
def test_many_lists_at_once_are_each_list_alone(lists):
    scores, ranks, bounds = flat(lists)
    winners, losers, weights = preference.pairs_of(ranks, bounds, "half")
    pieces = [(scores[a:b], ranks[a:b]) for a, b in pairwise(bounds)]
    alone = sum((kwise_loss(s, r, "half") for s, r in pieces if len(s) > 1), torch.tensor(0.0))
    assert torch.allclose(preference.pair_loss_sum(scores, winners, losers, weights), alone.double())
    for ties in ("exact", "breslow"):
        wanted = torch.stack([plackett_luce_loss(s, r, ties) for s, r in pieces])
        assert torch.allclose(preference.plackett_luce_losses(scores, ranks, bounds, ties), wanted)


@given(st.lists(st.integers(1, 4), min_size=1, max_size=6))
def test_exact_ties_are_the_sum_over_orders(ranks):
    scores, rank_tensor, _ = flat([ranks])
    found = float(plackett_luce_loss(scores, rank_tensor, "exact"))
    assert found == pytest.approx(exact_by_enumeration(scores, ranks), abs=1e-12)


@pytest.mark.parametrize("ties", ["exact", "breslow"])
def test_order_gradients_by_finite_differences(ties):
    scores, ranks, bounds = flat([[9, 1, 1, 1, 2], [2, 2], [1, 2, 2, 3, 3], [1]])
    assert torch.autograd.gradcheck(
        lambda s: preference.plackett_luce_losses(s, ranks, bounds, ties), scores.requires_grad_()
    )


def test_a_tie_at_the_bottom_says_nothing_more_however_long():
    scores, ranks = torch.randn(64, dtype=torch.float64), torch.tensor([1] + [2] * 63)
    assert torch.allclose(plackett_luce_loss(scores, ranks), scores.logsumexp(0) - scores[0])
    assert float(plackett_luce_loss(scores, torch.ones(64))) == 0


def test_ten_tied_above_others_are_summed_and_eleven_are_refused():
    scores = torch.zeros(12, dtype=torch.float64)
    ten = plackett_luce_loss(scores[:11], torch.tensor([1] * 10 + [2]))
    assert float(ten) == pytest.approx(math.log(11))  # the last place is one of eleven
    with pytest.raises(ValueError, match="breslow"):
        plackett_luce_loss(scores, torch.tensor([1] * 11 + [2]))
    breslow = plackett_luce_loss(scores, torch.tensor([1] * 11 + [2]), "breslow")
    assert torch.equal(plackett_luce_loss(scores, torch.tensor([1] * 11 + [2]), "auto"), breslow)
    assert torch.equal(plackett_luce_loss(scores[:11], torch.tensor([1] * 10 + [2]), "auto"), ten)
    assert plackett_luce_loss(scores, torch.ones(12), "auto") == 0


def test_only_the_order_of_ranks_and_differences_of_rewards_count():
    scores, ranks, _ = flat([[1, 2, 2, 4, 1]])
    for loss in (kwise_loss, plackett_luce_loss):
        wanted = loss(scores, ranks)
        assert torch.allclose(loss(scores + 100, ranks * 10 - 3), wanted)
        assert not torch.allclose(loss(scores, -ranks), wanted)


def test_lists_without_information():
    winners, losers, weights = preference.pairs_of(torch.tensor([1, 1, 1, 2, 1]), [0, 2, 3, 5])
    assert (winners.tolist(), losers.tolist(), weights.tolist()) == ([4], [3], [1])
    assert kwise_loss(torch.randn(3), torch.ones(3)) == 0
    with pytest.raises(ValueError, match="bounds"):
        preference.pairs_of(torch.tensor([1, 2]), [0, 0, 2])


def test_pair_losses():
    chosen, rejected = torch.tensor([2.0, 0.0]), torch.tensor([1.0, 3.0])
    plain = pair_loss(chosen, rejected)
    assert torch.allclose(plain, -logsigmoid(torch.tensor([1.0, -3.0])).mean())
    assert torch.allclose(pair_loss(chosen, rejected, label=torch.ones(2)), plain)
    half = pair_loss(chosen, rejected, label=torch.full((2,), 0.5))
    assert torch.allclose(half, (plain + pair_loss(rejected, chosen)) / 2)
    margin, label = torch.tensor([0.5, 0.0]), torch.tensor([0.9, 0.6])
    every = (chosen, rejected, margin, label)
    assert torch.allclose(pair_loss(*every), bt_loss(*every))
    assert torch.allclose(pair_loss(chosen, rejected, margin), pair_loss(chosen - margin, rejected))


def test_weighted_pairs_take_margins_labels_and_competence():
    rewards = torch.tensor([2.0, 1.0, 3.0], dtype=torch.float64)
    winners, losers, weights = torch.tensor([0, 0]), torch.tensor([1, 2]), torch.tensor([2.0, 1.0])
    margins = torch.tensor([0.5, 0.0])
    labels = torch.tensor([0.9, 0.6], dtype=torch.float64)
    found = preference.pair_loss_sum(rewards, winners, losers, weights, margins, labels)
    each = [bt_loss(rewards[:1], rewards[n : n + 1], margins[n - 1 : n], label=labels[n - 1 : n]) for n in (1, 2)]
    assert torch.allclose(found, 2 * each[0] + each[1])
    sure, unsure = (torch.full((2,), c, dtype=torch.float64) for c in (60.0, 0.0))
    assert torch.allclose(
        preference.pair_loss_sum(rewards, winners, losers, weights, margins, labels, sure), found, atol=1e-12
    )
    coin = preference.pair_loss_sum(rewards, winners, losers, weights, margins, labels, unsure)
    assert float(coin) == pytest.approx(3 * math.log(2))  # who throws a coin says nothing, whatever the label


def test_a_hopeless_gap_stays_finite():
    far = torch.tensor([-1e4], requires_grad=True)
    loss = pair_loss(far, -far.detach())
    assert loss.item() == pytest.approx(2e4) and torch.autograd.grad(loss, far)[0].item() == -1


def test_scores_are_regressed_on_the_share_of_their_scale():
    share = torch.tensor([0.0, 0.5, 1.0])
    assert preference.score_losses(share, share).tolist() == [0, 0, 0]
    assert preference.score_losses(torch.zeros(3), share, "bce").tolist() == pytest.approx([math.log(2)] * 3)
    assert preference.score_losses(torch.zeros(3), share).tolist() == [0, 0.25, 1]


def test_centring_draws_rewards_to_zero():
    first, second, weights = torch.tensor([0]), torch.tensor([1]), torch.tensor([0.5])
    assert float(preference.center_loss_sum(torch.tensor([3.0, -3.0]), first, second, weights)) == 0
    assert float(preference.center_loss_sum(torch.tensor([3.0, 3.0]), first, second, weights)) == 18


def test_a_reliable_annotator_is_bradley_terry_and_a_random_one_says_nothing():
    s = torch.tensor([1.0, -0.5], dtype=torch.float64, requires_grad=True)
    sure = preference.crowd_pair_losses(s[0] - s[1], torch.tensor(torch.inf, dtype=torch.float64))
    assert torch.allclose(sure, bt_loss(s[:1], s[1:]))
    random = preference.crowd_pair_losses(s[0] - s[1], torch.zeros((), dtype=torch.float64))
    assert torch.autograd.grad(random, s)[0].abs().max() < 1e-15


@pytest.mark.parametrize("logit", [-40.0, 0.0, 40.0])
def test_certain_annotators_and_far_items_keep_finite_gradients(logit):
    gaps = torch.tensor([401.0, -401.0, 0.3], dtype=torch.float64, requires_grad=True)
    competence = torch.full((3,), logit, dtype=torch.float64, requires_grad=True)
    losses = preference.crowd_pair_losses(gaps, competence)
    assert losses.isfinite().all()
    assert all(g.isfinite().all() for g in torch.autograd.grad(losses.sum(), (gaps, competence)))
    near = torch.tensor([0.3, -0.2], dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(preference.crowd_pair_losses, (near, near.detach().clone().requires_grad_()))
