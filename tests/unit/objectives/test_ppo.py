import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from mean_losses import policy_loss
from tetrad.objectives import ppo

NAN = float("nan")


def batch(seed: int = 0, rows: int = 4, width: int = 7) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    names = ("logprobs", "old_logprobs", "advantages", "values", "old_values", "returns")
    arrays = {n: torch.randn(rows, width, generator=generator, dtype=torch.float64) for n in names}
    arrays["mask"] = torch.rand(rows, width, generator=generator) < 0.6
    arrays["mask"][:, 0] = True
    return arrays


def test_kl_estimators():
    logprobs, ref = torch.tensor([[-1.0, -3.0, NAN]]), torch.tensor([[-2.0, -2.0, 1e6]])
    mask = torch.tensor([[True, True, False]])
    assert ppo.kl_tokens(logprobs, ref, mask, "k1").tolist() == [[1, -1, 0]]
    assert ppo.kl_tokens(logprobs, ref, mask, "k2").tolist() == [[0.5, 0.5, 0]]
    k3 = ppo.kl_tokens(logprobs, ref, mask, "k3")
    assert k3[0].tolist() == pytest.approx([math.exp(-1), math.e - 2, 0])


def test_estimators_average_to_the_exact_kl():
    logits, ref = torch.randn(1, 1, 6, dtype=torch.float64), torch.randn(1, 1, 6, dtype=torch.float64)
    ours, theirs = torch.log_softmax(logits, -1)[0], torch.log_softmax(ref, -1)[0]
    exact = float((ours.exp() * (ours - theirs)).sum())
    for kind in ("k1", "k3"):
        tokens = ppo.kl_tokens(ours, theirs, torch.ones(1, 6, dtype=torch.bool), kind)
        assert float((ours.exp() * tokens).sum()) == pytest.approx(exact, abs=1e-12)


def test_beta_moves_toward_the_target_and_never_faster_than_a_fifth():
    assert ppo.adaptive_kl(0.1, 6.0, 64, 6.0, 1e4) == 0.1
    assert ppo.adaptive_kl(0.1, 6.6, 100, 6.0, 1e4) == pytest.approx(0.1 * (1 + 0.1 * 0.01))
    assert ppo.adaptive_kl(0.1, 1e9, 100, 6.0, 1e4) == pytest.approx(0.1 * 1.002)
    assert ppo.adaptive_kl(0.1, -1e9, 100, 6.0, 1e4) == pytest.approx(0.1 * 0.998)
    for target, horizon in ((0.0, 1e4), (6.0, 0.0), (NAN, 1.0)):
        with pytest.raises(ValueError, match="greater than 0"):
            ppo.adaptive_kl(0.1, 1.0, 1, target, horizon)


def test_the_missing_end_costs_after_the_clip():
    cut = torch.tensor([True, False, True])
    scores = ppo.normalize_scores(torch.tensor([100.0, 100.0, -100.0]), 0.0, 1.0, 5.0, cut, 1.0)
    assert scores.tolist() == [4, 5, -6]
    assert ppo.normalize_scores(torch.tensor([9.0]), 1.0, 2.0, None, torch.tensor([False]), 1.0).tolist() == [4]


def test_the_score_lands_on_the_last_response_token():
    mask = torch.tensor([[True, True, False], [False, True, True]])
    kl = torch.tensor([[1.0, 2.0, NAN], [1e6, 1.0, 1.0]])
    rewards = ppo.shape_rewards(torch.tensor([10.0, 20.0]), kl, mask, 0.5)
    assert rewards.tolist() == [[-0.5, 9.0, 0.0], [0.0, -0.5, 19.5]]
    with pytest.raises(ValueError, match="without a token"):
        ppo.shape_rewards(torch.tensor([1.0, 2.0]), kl, torch.tensor([[True] * 3, [False] * 3]), 0.5)


def test_gae_without_discount_is_reward_to_go():
    rewards, values = torch.tensor([[1.0, 2.0, 3.0]]), torch.tensor([[0.5, 0.5, 0.5]])
    mask = torch.ones(1, 3, dtype=torch.bool)
    advantages, returns = ppo.gae(rewards, values, mask, 1.0, 1.0)
    assert returns.tolist() == [[6, 5, 3]] and advantages.tolist() == [[5.5, 4.5, 2.5]]
    assert ppo.gae(rewards, values, mask, 1.0, 1.0, torch.tensor([10.0]))[1].tolist() == [[16, 15, 13]]
    assert ppo.gae(rewards, values, mask, 0.5, 0.0)[0].tolist() == [[0.75, 1.75, 2.5]]
    assert ppo.gae(rewards, values, mask, 0.5, 0.5)[0].tolist() == [[0.75 + 0.25 * 2.375, 2.375, 2.5]]


@given(st.integers(0, 1000))
def test_gae_steps_over_holes_and_ignores_what_is_in_them(seed):
    arrays = batch(seed)
    mask = arrays["mask"]
    rewards, values = (torch.where(mask, arrays[n], NAN) for n in ("returns", "values"))
    advantages, returns = ppo.gae(rewards, values, mask, 0.9, 0.8)
    assert advantages[~mask].eq(0).all() and returns[~mask].eq(0).all()
    for row in range(len(mask)):
        here = mask[row]
        dense = torch.ones(1, int(here.sum()), dtype=torch.bool)
        wanted = ppo.gae(rewards[row, here][None], values[row, here][None], dense, 0.9, 0.8)
        assert torch.equal(advantages[row, here], wanted[0][0]) and torch.equal(returns[row, here], wanted[1][0])


def test_gae_has_no_gradient():
    values = torch.randn(1, 3, requires_grad=True)
    advantages, returns = ppo.gae(torch.randn(1, 3), values, torch.ones(1, 3, dtype=torch.bool))
    assert not advantages.requires_grad and not returns.requires_grad


def test_moments_of_ranks_add_up():
    x, mask = 1e6 + batch()["values"], batch()["mask"]
    x = torch.where(mask, x, NAN)
    sides = [(x[:1], mask[:1]), (x[1:], mask[1:])]
    mean, _ = ppo.mean_variance(sum(ppo.moments(*side) for side in sides))
    mean, variance = ppo.mean_variance(sum(ppo.moments(*side, mean) for side in sides), mean)
    assert float(mean) == pytest.approx(float(x[mask].mean()), rel=1e-15)
    assert float(variance) == pytest.approx(float(x[mask].var(correction=0)), rel=1e-9)
    empty = ppo.moments(x, torch.zeros_like(mask))
    assert empty.tolist() == [0, 0, 0]
    with pytest.raises(ValueError, match="too few"):
        ppo.mean_variance(empty)


def test_whitening():
    arrays = batch()
    mask, x = arrays["mask"], torch.where(arrays["mask"], 5 + 3 * arrays["values"], NAN)
    moments = ppo.mean_variance(ppo.moments(x, mask))
    plain = ppo.whiten(x, mask, *moments)
    assert float(plain[mask].mean()) == pytest.approx(0, abs=1e-12)
    assert float(plain[mask].std(correction=0)) == pytest.approx(1)
    assert plain[~mask].eq(0).all()
    kept = ppo.whiten(x, mask, *moments, shift_mean=False)
    assert torch.allclose(kept[mask] - plain[mask], x[mask].mean())
    known = (torch.tensor(2.0, dtype=torch.float64), torch.tensor(4.0, dtype=torch.float64))
    assert torch.allclose(ppo.whiten(x, mask, *known)[mask], (x[mask] - 2) / 2)
    with pytest.raises(ValueError, match="too few"):
        ppo.mean_variance(ppo.moments(x, torch.zeros_like(mask)))
    with pytest.raises(ValueError, match="too few"):
        ppo.mean_variance(ppo.moments(x[:1, :1], torch.ones(1, 1, dtype=torch.bool)), unbiased=True)


def test_explained_variance_of_constant_returns_is_undefined():
    mask = torch.ones(1, 7, dtype=torch.bool)
    constant = torch.full((1, 7), 0.1)
    assert constant.var(correction=0) != 0  # rounding; a test of "variance is 0" would miss it
    rough = ppo.mean_variance(ppo.moments(constant, mask, 0.1 + 1e-18), 0.1 + 1e-18)
    assert ppo.explained_variance(*rough, 2.0).isnan() and ppo.explained_variance(0.1, 1e-36, 2.0).isnan()
    assert ppo.explained_variance(0.0, 0.0, 0.0).isnan()
    assert float(ppo.explained_variance(2.0, 2 / 3, 0.0)) == 1
    assert float(ppo.explained_variance(2.0, 2 / 3, 2 / 3)) == 0
    assert float(ppo.explained_variance(1e6, 1e-9, 0.5e-9)) == 0.5  # small beside the mean, and no rounding


def test_at_ratio_one_the_policy_gradient_is_the_advantage():
    arrays = batch()
    mask, advantages = arrays["mask"], arrays["advantages"]
    logprobs = arrays["logprobs"].requires_grad_()
    loss, stats = policy_loss((logprobs, logprobs.detach(), advantages), mask)
    (gradient,) = torch.autograd.grad(loss, logprobs)
    assert torch.allclose(gradient, torch.where(mask, -advantages, 0) / mask.sum())
    assert float(stats.ratio) == 1 and float(stats.clipped) == float(stats.half_square) == 0


def test_a_clipped_ratio_has_no_gradient_and_the_pessimistic_side_keeps_it():
    logprobs = torch.tensor([[1.0, 1.0, -1.0, -1.0]], requires_grad=True)
    advantages = torch.tensor([[1.0, -1.0, 1.0, -1.0]])
    mask = torch.ones(1, 4, dtype=torch.bool)
    loss, stats = policy_loss((logprobs, torch.zeros(1, 4), advantages), mask)
    (gradient,) = torch.autograd.grad(loss, logprobs)
    assert gradient[0].ne(0).tolist() == [False, True, True, False]
    assert float(stats.clipped) == 0.5
    loss, stats = policy_loss((logprobs, torch.zeros(1, 4), advantages), mask, dual_clip=2.0)
    (gradient,) = torch.autograd.grad(loss, logprobs)
    assert gradient[0].ne(0).tolist() == [False, False, True, False]
    assert float(stats.dual_clipped) == 0.25


@pytest.mark.parametrize("dual_clip", [None, 1.5])
def test_policy_sums_of_micro_batches_are_the_whole(dual_clip):
    arrays = batch()
    tokens = [arrays[n][arrays["mask"]] for n in ("logprobs", "old_logprobs", "advantages")]
    whole = ppo.policy_loss_sum(*tokens, dual_clip=dual_clip)
    parts = [
        ppo.policy_loss_sum(*(a[rows] for a in tokens), dual_clip=dual_clip) for rows in (slice(5), slice(5, None))
    ]
    for name in whole._fields[:-1]:
        assert torch.allclose(sum(getattr(part, name) for part in parts), getattr(whole, name))
    ratio = (tokens[0] - tokens[1]).exp()
    assert torch.equal(max(part.highest_ratio for part in parts), ratio.max())


def test_value_sums_of_micro_batches_are_the_whole():
    arrays = batch()
    tokens = [arrays[n][arrays["mask"]] for n in ("values", "old_values", "returns")]
    whole = ppo.value_loss_sum(*tokens)
    parts = [ppo.value_loss_sum(*(a[rows] for a in tokens)) for rows in (slice(5), slice(5, None))]
    assert torch.allclose(sum(part.loss for part in parts), whole.loss)
    assert torch.allclose(sum(part.clipped for part in parts), whole.clipped)
    assert 0 < float(whole.clipped) < len(tokens[0])


def test_a_value_that_ran_away_is_held_to_its_old_place():
    values = torch.tensor([3.0], requires_grad=True)
    old, returns = torch.tensor([0.0]), torch.tensor([5.0])
    loss, clipped = ppo.value_loss_sum(values, old, returns)
    assert loss.item() == pytest.approx(0.5 * 4.8**2) and float(clipped) == 1
    assert float(torch.autograd.grad(loss, values)[0]) == 0
    loss, clipped = ppo.value_loss_sum(values, old, returns, clip=None)
    assert loss.item() == 2 and float(clipped) == 0


def test_masked_garbage_reaches_no_result():
    """Rewards, advantages and whitening read response tokens only."""
    clean = batch()
    mask = clean["mask"]
    dirty = {
        n: torch.where(mask, a, (NAN, 1e6, -torch.inf)[k % 3]) for k, (n, a) in enumerate(clean.items()) if n != "mask"
    }
    results = []
    for arrays in (clean, dirty):
        kl = ppo.kl_tokens(arrays["logprobs"], arrays["old_logprobs"], mask)
        rewards = ppo.shape_rewards(torch.ones(len(mask)), arrays["returns"], mask, 0.1)
        advantages, returns = ppo.gae(arrays["advantages"], arrays["values"], mask)
        white = ppo.whiten(arrays["values"], mask, *ppo.mean_variance(ppo.moments(arrays["values"], mask)))
        results.append((kl, rewards, advantages, returns, white))
    for ours, theirs in zip(*results, strict=True):
        assert torch.equal(ours, theirs) and ours[~mask].eq(0).all()
