"""Advantages of groups by hand, and what a KL as a loss pulls at."""

import pytest
import torch

from tetrad.objectives import grpo

THREE_RIGHT = torch.tensor([1.0, 0, 0, 1, 0, 0, 1, 0])
ONE_GROUP = torch.zeros(8, dtype=torch.int64)


@pytest.mark.parametrize(
    ("kind", "right", "wrong"),
    [("normalised", 1.2076, -0.7246), ("centred", 0.6250, -0.3750), ("leave_one_out", 0.7143, -0.4286)],
)
def test_eight_responses_three_of_them_right(kind, right, wrong):
    advantages = grpo.group_advantages(THREE_RIGHT, ONE_GROUP, kind, eps=0.0)
    assert advantages[THREE_RIGHT == 1].tolist() == pytest.approx([right] * 3, abs=5e-5)
    assert advantages[THREE_RIGHT == 0].tolist() == pytest.approx([wrong] * 5, abs=5e-5)


@pytest.mark.parametrize("kind", ["normalised", "centred", "leave_one_out"])
@pytest.mark.parametrize("score", [0.1, 0.95, -1e8, 1e30])
def test_equal_scores_are_exactly_0(kind, score):
    """Their float32 mean is not the score itself, and a hair divided by the standard deviation is no longer one."""
    scores = torch.tensor([score, 1.0, score, 2.0, *[score] * 5, 4.0])
    advantages = grpo.group_advantages(scores, torch.tensor([7, 3, 7, 3, *[7] * 5, 3]), kind)
    assert advantages[[0, 2, 4, 5, 6, 7, 8]].tolist() == [0] * 7
    assert advantages[[1, 3, 9]].abs().min() > 0.1


@pytest.mark.parametrize("kind", ["normalised", "centred", "leave_one_out"])
def test_a_nearly_equal_group_does_not_cancel(kind):
    """[0, .95 x 7]: variances as E[x^2] - E[x]^2 gave advantages of -2075 elsewhere. An offset changes nothing."""
    scores = torch.tensor([0.0, *[0.95] * 7])
    exact = {"normalised": (-2.4742, 0.3535), "centred": (-0.83125, 0.11875), "leave_one_out": (-0.95, 0.95 / 7)}
    for offset, precision in ((0.0, 1e-6), (1000.0, 1e-3)):
        advantages = grpo.group_advantages(scores + offset, ONE_GROUP, kind)
        first, *others = advantages.tolist()
        assert [first, *others] == pytest.approx([exact[kind][0], *[exact[kind][1]] * 7], abs=1e-4 + precision)
    assert grpo.group_advantages(scores, ONE_GROUP, "leave_one_out")[0].item() == pytest.approx(-0.95, abs=1e-7)


def test_a_group_of_one_is_refused():
    for groups in ([0, 0, 1], []):
        scores = torch.zeros(len(groups))
        with pytest.raises(ValueError, match="at least 2"):
            grpo.group_advantages(scores, torch.tensor(groups, dtype=torch.int64), "centred")


def test_k1_as_a_loss_is_refused_and_this_is_why():
    """Averaged over the actor's own samples, k2's gradient is that of KL(actor || reference), k3's that of
    KL(reference || actor), and k1's is nothing."""
    generator = torch.Generator().manual_seed(0)
    logits, ref = (torch.randn(6, generator=generator, dtype=torch.float64) for _ in range(2))
    logits.requires_grad_()
    ref = ref.log_softmax(0)

    def gradient(loss: torch.Tensor) -> torch.Tensor:
        return torch.autograd.grad(loss, logits)[0]

    ours = logits.log_softmax(0)
    backward = gradient((ours.exp() * (ours - ref)).sum())
    ours = logits.log_softmax(0)
    forward = gradient((ref.exp() * (ref - ours)).sum())
    chances = logits.detach().softmax(0)
    for kind, exact in (("k2", backward), ("k3", forward)):
        ours = logits.log_softmax(0)
        torch.testing.assert_close(gradient(grpo.kl_loss_sum(ours, ref, kind, chances)), exact)
    ours = logits.log_softmax(0)
    torch.testing.assert_close(gradient((chances * (ours - ref)).sum()), torch.zeros_like(ref))
    with pytest.raises(ValueError, match="no gradient on average"):
        grpo.kl_loss_sum(ours, ref, "k1")
