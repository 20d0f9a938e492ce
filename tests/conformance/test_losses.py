"""What the language model's and the reward model's losses promise, through the stages' own micro-batches and update."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch

import families
import toys
from tetrad.reward.batches import preference_micros
from tetrad.reward.ensemble import Latent
from tetrad.settings.common import Optim
from tetrad.settings.reward import Reward
from tetrad.text.chat_template import TEMPLATES
from tetrad.train.reward import preference_terms
from tetrad.training.batches import language_micros, mean_nll
from tetrad.training.optimizer import Optimizer
from tetrad.training.step import language_terms, update
from tetrad.types import IGNORE, Comparison, Prompt, Score, Tokens, Turn

TOKENIZER = toys.tokenizer()
PROMPT = Prompt((Turn("instruction", "w5"),))


def weights(model: torch.nn.Module) -> torch.Tensor:
    return torch.cat([p.detach().flatten() for p in model.parameters()])


def conversation(answer: str = "w7 w8") -> Tokens:
    return families.conversation(TEMPLATES["instruction"], TOKENIZER, [*PROMPT.turns, Turn("assistant", answer)])


@pytest.mark.parametrize("pad", [toys.PAD, toys.EOS])
def test_the_end_token_is_learned_when_it_is_also_the_pad(pad):
    """Masks made of `ids != pad` lose it, and the model never learns to stop."""
    found = conversation()
    packed = toys.packed([found, found])
    assert (packed.targets_T == toys.EOS).sum() == 2
    model = toys.causal(seed=1, pad_id=pad)
    optimizer = Optimizer(model, 1e-2, Optim())
    micros = language_micros([found] * 4, 4096, toys.CPU)
    assert sum(micro.counts["tokens"] for micro in micros) == 4 * 3
    for _ in range(60):
        update(model, optimizer, micros, language_terms, toys.CPU)
    with torch.no_grad():
        last = model(toys.packed([Tokens(found.ids[:-1], found.train[:-1])]), "logits")[-1]
    assert int(last.argmax()) == toys.EOS


def test_prompts_are_not_learned():
    """Only the answer and its end are targets; the gradient of a prompt token's logits is nothing."""
    found = conversation()
    assert found.ids[found.train].tolist() == [7, 8, toys.EOS]
    targets = toys.packed([found]).targets_T
    assert targets[targets != IGNORE].tolist() == [7, 8, toys.EOS]
    assert targets[-1] == IGNORE


@pytest.mark.parametrize("micro_batch_tokens", [1, 30, 64])
def test_micro_batches_add_up(micro_batch_tokens):
    """The loss is a mean over all label tokens, not a mean of the micro-batches' means."""
    documents = toys.documents(12)
    found = []
    for size in (4096, micro_batch_tokens):
        model = toys.causal(seed=1)
        optimizer = Optimizer(model, 1e-3, Optim())
        micros = language_micros(documents, size, toys.CPU)
        stats = [update(model, optimizer, micros, language_terms, toys.CPU, max_norm=1.0) for _ in range(3)]
        found.append((stats, weights(model)))
    assert len(micros) > 1
    (whole, whole_weights), (parts, parts_weights) = found
    for a, b in zip(whole, parts, strict=True):
        assert b.loss == pytest.approx(a.loss, rel=1e-5)
        assert b.grad_norm == pytest.approx(a.grad_norm, rel=1e-5)
    assert float((whole_weights - parts_weights).norm() / whole_weights.norm()) <= 1e-5
    expected, _ = mean_nll(toys.causal(seed=1), documents, 4096, toys.CPU)
    assert whole[0].loss == pytest.approx(expected, rel=1e-6)
    alone = [mean_nll(toys.causal(seed=1), [d], 4096, toys.CPU)[0] for d in documents]
    assert abs(float(np.mean(alone)) - expected) > 1e-3  # the two means differ here, so the test can tell


def test_documents_of_a_pack_do_not_see_each_other():
    model = toys.causal(seed=1)
    documents = toys.documents(9)
    with torch.no_grad():
        together = model(toys.packed(documents), "logits").split([len(d.ids) for d in documents])
        for document, logits in zip(documents, together, strict=True):
            alone = model(toys.packed([document]), "logits")
            torch.testing.assert_close(logits, alone, rtol=0, atol=2e-6)


def test_tokens_do_not_see_the_future():
    model = toys.causal(seed=1)
    ids = toys.ids(20, 5)
    changed = [*ids[:-1], 3 + (ids[-1] - 2) % 37]
    with torch.no_grad():
        a, b = (model(toys.packed([toys.document(i)]), "logits") for i in (ids, changed))
    assert torch.equal(a[:-1], b[:-1])
    assert not torch.equal(a[-1], b[-1])


RECORDS = [
    Comparison(PROMPT, ("a", "b", "c", "d"), (1, 2, 2, 5)),
    Score(PROMPT, "a", 4.0),
    Comparison(PROMPT, ("a", "b"), (2, 1), margin=0.5),
    Comparison(PROMPT, ("a", "b"), (1, 1)),
    Score(PROMPT, "b", 1.0),
    Comparison(PROMPT, ("a", "b", "c"), (3, 1, 2)),
]
SIZES = [4, 1, 2, 2, 1, 3]
ANSWERS = [[toys.document(toys.ids(3 + 2 * i + j, 10 * i + j)) for j in range(n)] for i, n in enumerate(SIZES)]


def reward_step(settings: Reward, micro_batch_tokens: int, steps: int = 1):
    latent = Latent(toys.scalar(seed=1), learn_rho=True)
    optimizer = Optimizer(latent, 1e-3, Optim())
    micros = preference_micros(RECORDS, ANSWERS, micro_batch_tokens, 2.0, 1.5, toys.CPU)
    terms = preference_terms(settings)
    stats = [update(latent, optimizer, micros, terms, toys.CPU, max_norm=1.0) for _ in range(steps)]
    return stats, weights(latent), len(micros)


@pytest.mark.parametrize("loss", ["pairs", "plackett-luce"])
@pytest.mark.parametrize("micro_batch_tokens", [1, 40])
def test_reward_micro_batches_add_up(loss, micro_batch_tokens):
    settings = Reward(comparison_loss=loss, center=0.01)
    whole, whole_weights, one = reward_step(settings, 4096, 3)
    parts, parts_weights, many = reward_step(settings, micro_batch_tokens, 3)
    assert one == 1 < many
    for a, b in zip(whole, parts, strict=True):
        assert b.loss == pytest.approx(a.loss, rel=1e-5)
        assert b.grad_norm == pytest.approx(a.grad_norm, rel=1e-5)
        assert b.terms == pytest.approx(a.terms, rel=1e-5)
    assert float((whole_weights - parts_weights).norm() / whole_weights.norm()) <= 1e-5


def test_reward_loss_by_hand():
    """All pairs of a list averaged, lists averaged over those with an order, scores averaged over scores."""
    model = toys.scalar(seed=1)
    with torch.no_grad():
        r = [model(toys.packed(answers)).tolist() for answers in ANSWERS]
    ordered = ((0, [(0, 1), (0, 2), (0, 3), (1, 3), (2, 3)]), (2, [(1, 0)]), (5, [(1, 0), (1, 2), (2, 0)]))
    nll = [
        [-math.log(1 / (1 + math.exp(-(r[i][a] - r[i][b] - RECORDS[i].margin)))) for a, b in pairs]
        for i, pairs in ordered
    ]
    centre = float(np.mean([np.mean([(r[i][a] + r[i][b]) ** 2 for a, b in pairs]) for i, pairs in ordered]))
    comparisons = float(np.mean([np.mean(one) for one in nll]))
    scores = np.mean([(r[1][0] - (4 - 2) / 1.5) ** 2, (r[4][0] - (1 - 2) / 1.5) ** 2])
    (stats,), _, _ = reward_step(Reward(score_weight=0.5, center=0.2), 4096)
    assert stats.terms["comparison_loss"] == pytest.approx(comparisons, rel=1e-5)
    assert stats.terms["score_loss"] == pytest.approx(scores, rel=1e-5)
    assert stats.terms["center_loss"] == pytest.approx(centre, rel=1e-5)
    assert stats.loss == pytest.approx(comparisons + 0.5 * scores + 0.2 * centre, rel=1e-5)


@pytest.mark.parametrize("loss", ["pairs", "plackett-luce"])
def test_only_the_order_of_ranks_counts(loss):
    def gradient(ranks, mean=0.0):
        latent = Latent(toys.scalar(seed=1), learn_rho=False)
        records = [replace(RECORDS[0], ranks=ranks)]
        micros = preference_micros(records, ANSWERS[:1], 4096, mean, 1.0, toys.CPU)
        update(
            latent, Optimizer(latent, 0.0, Optim()), micros, preference_terms(Reward(comparison_loss=loss)), toys.CPU
        )
        return torch.cat([p.grad.flatten() for p in latent.reward.parameters() if p.grad is not None])

    assert torch.equal(gradient((1, 2, 2, 5)), gradient((-3, 0.5, 0.5, 0.75)))
    assert not torch.equal(gradient((1, 2, 2, 5)), gradient((1, 2, 3, 5)))


@pytest.mark.parametrize("loss", ["pairs", "plackett-luce"])
def test_a_list_of_equals_says_nothing(loss):
    latent = Latent(toys.scalar(seed=1), learn_rho=False)
    before = weights(latent)
    micros = preference_micros([RECORDS[3]], [ANSWERS[3]], 4096, 0.0, 1.0, toys.CPU)
    assert micros[0].counts["comparisons"] == 0
    terms = preference_terms(Reward(comparison_loss=loss, center=0.1))
    stats = update(latent, Optimizer(latent, 1e-2, Optim()), micros, terms, toys.CPU)
    assert stats.loss == 0
    assert torch.equal(weights(latent), before)
