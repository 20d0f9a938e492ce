"""What DPO promises (and known systems got wrong): read off the stage's own functions, on small random models."""

import math
from copy import deepcopy
from dataclasses import replace

import pytest
import torch

import families
import toys
from tetrad.data.records import answers
from tetrad.data.tokens import tokenize
from tetrad.model.lora import add_adapters, share_weights
from tetrad.model.transformer import CausalLM, frozen
from tetrad.objectives import dpo
from tetrad.reward.batches import Examples
from tetrad.settings.common import Optim
from tetrad.settings.dpo import Dpo
from tetrad.text.chat_template import TEMPLATES
from tetrad.train.dpo import answer_logprobs, dpo_micros, dpo_terms
from tetrad.training.optimizer import Optimizer
from tetrad.training.step import StepStats, mean_terms, update
from tetrad.types import Comparison, Prompt, Tokens, Turn

PROMPT = Prompt((Turn("user", "q"),))


def comparison(*ranks: float, votes: tuple[float, ...] = (), margin: float = 0.0) -> Comparison:
    return Comparison(PROMPT, ("",) * len(ranks), ranks, margin=margin, votes=votes)


PAIRS = [comparison(2, 1), comparison(1, 2), comparison(1, 2, votes=(3.0, 1.0)), comparison(1, 2, margin=0.5)]
LISTS = [comparison(1, 2, 3), comparison(2, 1, 2, 4), comparison(1, 1, 2)]


def examples(records: list[Comparison], seed: int = 0) -> Examples:
    """Answers of 1 to 6 tokens to prompts of 20, which are worth sharing."""
    prompts = [toys.ids(20, seed + n) for n in range(len(records))]
    documents: list[Tokens] = []
    for n, record in enumerate(records):
        replies = [[*toys.ids(1 + (3 * n + k) % 6, 100 * n + k), toys.EOS] for k in range(len(record.ranks))]
        documents += [toys.document([*prompts[n], *reply], 20, f"{n}") for reply in replies]
    return Examples.of(records, documents)


def stepped(
    s: Dpo,
    policy: CausalLM,
    reference: CausalLM,
    held: Examples,
    micro_batch_tokens: int = 4096,
    shared: str = "auto",
    lr: float = 0.0,
) -> StepStats:
    """One step; the gradients stay."""
    micros = dpo_micros(held, range(len(held.records)), micro_batch_tokens, toys.CPU, shared)
    return update(policy, Optimizer(policy, lr, Optim()), micros, dpo_terms(s, reference), toys.CPU)


def gradient(model: CausalLM) -> torch.Tensor:
    return torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])


@pytest.mark.parametrize("micro_batch_tokens", [1, 100, 4096])
def test_the_first_step(micro_batch_tokens):
    """Rewards are exactly 0: the loss is ln 2, a tie counts half, and there is something to learn all the same."""
    policy = toys.causal(seed=1)
    stats = stepped(Dpo(), policy, frozen(deepcopy(policy)), examples(PAIRS[:3]), micro_batch_tokens)
    assert stats.loss == pytest.approx(math.log(2), abs=1e-12)
    assert stats.terms["accuracy"] == 0.5
    assert stats.terms["margin"] == stats.terms["reward_chosen"] == stats.terms["reward_rejected"] == 0.0
    assert stats.terms["logprob_chosen"] < -1 and stats.grad_norm > 1e-2


LOSSES = [Dpo(), Dpo(loss="ipo"), Dpo(loss="plackett-luce"), Dpo(label_smoothing=0.2, sft_coef=0.3, beta=0.5)]


@pytest.mark.parametrize("s", LOSSES, ids=["sigmoid", "ipo", "plackett-luce", "smoothed"])
def test_the_size_of_micro_batches_changes_nothing(s):
    """Neither does what is packed beside a record, nor whether its prompt is computed once."""
    found = []
    held, reference = examples(PAIRS + LISTS), toys.causal(seed=2)
    for micro_batch_tokens, shared in ((4096, "never"), (1, "never"), (130, "always"), (4096, "always")):
        policy = toys.causal(seed=1)
        found.append((stepped(s, policy, reference, held, micro_batch_tokens, shared), gradient(policy)))
    (whole, slope), *others = found
    assert set(whole.terms) == {
        "preference_loss", "sft_loss", "accuracy", "margin", "reward_chosen", "reward_rejected", "logprob_chosen",
        "logprob_rejected",
    }  # fmt: skip
    for stats, other in others:
        assert stats.loss == pytest.approx(whole.loss, rel=1e-5)
        assert stats.terms == pytest.approx(whole.terms, rel=1e-5, abs=1e-5)
        assert float((other - slope).norm() / slope.norm()) < 1e-5
    tokens = [stats.tokens for stats, _ in found]
    assert tokens[0] == tokens[1] > tokens[2] == tokens[3]  # something was shared


@torch.no_grad()
def test_every_label_counts_once():
    """Log-probabilities of answers and their end tokens, as one by one: also where answers begin alike."""
    model, prompt = toys.causal(seed=1), toys.ids(20, 0)
    replies = [[9, 9, 9, toys.EOS], [9, 9, toys.EOS], [9, toys.EOS], [toys.EOS]]
    held = Examples.of([comparison(1, 2, 3, 4)], [toys.document(prompt + reply, 20) for reply in replies])
    (micro,) = dpo_micros(held, [0], 4096, toys.CPU, "always")
    assert micro.packed.prefixes[0].length == 19
    together = answer_logprobs(model, micro.packed)
    for n, document in enumerate(held.tokens):
        alone = -model(toys.packed([document]), "nll")
        assert float(together[n]) == pytest.approx(float(alone), abs=1e-4)


def test_means_over_pairs_and_lists():
    """By hand: a list's pairs are averaged, each record counts once; the best answers are those below none."""
    held, policy, reference = examples(LISTS), toys.causal(seed=1), toys.causal(seed=2)
    s = Dpo(beta=0.5, sft_coef=2.0)
    stats = stepped(s, policy, reference, held)
    logprobs = torch.stack([-policy(toys.packed([d]), "nll") for d in held.tokens]).detach().double()
    ref_logprobs = torch.stack([-reference(toys.packed([d]), "nll") for d in held.tokens]).detach().double()
    rewards = 0.5 * (logprobs - ref_logprobs)
    pairs = [[(0, 1), (0, 2), (1, 2)], [(4, 3), (4, 5), (4, 6), (3, 6), (5, 6)], [(7, 9), (8, 9)]]
    losses = [sum(math.log1p(math.exp(rewards[b] - rewards[a])) for a, b in some) / len(some) for some in pairs]
    lengths = [float(d.train.sum()) for d in held.tokens]
    nll = sum(-float(logprobs[i]) / lengths[i] for i in (0, 4, 7, 8)) / 4
    assert stats.terms["preference_loss"] == pytest.approx(sum(losses) / 3, rel=1e-5)
    assert stats.terms["sft_loss"] == pytest.approx(nll, rel=1e-5)
    assert stats.loss == pytest.approx(sum(losses) / 3 + 2.0 * nll, rel=1e-5)
    chosen = [sum(float(rewards[a]) for a, _ in some) / len(some) for some in pairs]
    assert stats.terms["reward_chosen"] == pytest.approx(sum(chosen) / 3, rel=1e-4)


def test_ranked_is_dpo_for_two():
    held, policy, reference = examples(PAIRS[:2]), toys.causal(seed=1), toys.causal(seed=2)
    one = stepped(Dpo(), policy, reference, held), gradient(policy)
    other = stepped(Dpo(loss="plackett-luce"), policy, reference, held), gradient(policy)
    assert one[0].loss == pytest.approx(other[0].loss, abs=1e-9)
    torch.testing.assert_close(one[1], other[1], rtol=1e-5, atol=1e-8)


@pytest.mark.parametrize("record", PAIRS[2:], ids=["votes", "margin"])
def test_votes_and_margins_as_in_the_reward_model(record):
    held, policy, reference = examples([record]), toys.causal(seed=1), toys.causal(seed=2)
    stats = stepped(Dpo(beta=1.0), policy, reference, held)
    gap, label = stats.terms["margin"] - record.margin, 0.75 if record.votes else 1.0
    expected = label * math.log1p(math.exp(-gap)) + (1 - label) * math.log1p(math.exp(gap))
    assert stats.loss == pytest.approx(expected, rel=1e-5)


def test_ipo_is_of_sums():
    rewards, pair = torch.tensor([0.7, 0.1]), (torch.tensor([0]), torch.tensor([1]), torch.ones(1))
    found = dpo.ipo_loss_sum(rewards, *pair, torch.ones(1), beta=0.1)
    assert float(found) == pytest.approx((6.0 - 5.0) ** 2, rel=1e-5)
    held, policy, reference = examples(PAIRS[:1]), toys.causal(seed=1), toys.causal(seed=2)
    stats = stepped(Dpo(loss="ipo"), policy, reference, held)
    assert stats.loss == pytest.approx((stats.terms["margin"] / 0.1 - 5.0) ** 2, rel=1e-5)


def test_adapters_move_and_the_reference_does_not():
    """The base beneath them is the reference, bit by bit, before and after."""
    base = frozen(toys.causal(seed=1))
    held, kept = examples(PAIRS + LISTS), deepcopy(base.state_dict())
    policy = share_weights(CausalLM, base)
    add_adapters(policy, 4, 8.0, ("q_proj", "v_proj"), 0)
    before = mean_terms(base, dpo_micros(held, range(7), 4096, toys.CPU), dpo_terms(Dpo(), base), toys.CPU)
    first = stepped(Dpo(), policy, base, held, lr=1e-2)
    assert first.terms["margin"] == 0.0 and first.grad_norm > 0
    second = stepped(Dpo(), policy, base, held, lr=1e-2)
    assert second.loss < first.loss and second.terms["margin"] > 0
    assert all(torch.equal(tensor, kept[name]) for name, tensor in base.state_dict().items())
    after = mean_terms(base, dpo_micros(held, range(7), 4096, toys.CPU), dpo_terms(Dpo(), base), toys.CPU)
    assert before == after


def test_dropout_is_off_in_both():
    policy, reference = toys.causal(seed=1), frozen(toys.causal(seed=1))
    policy.train()
    reference.train()
    assert policy.model.dropout == reference.model.dropout == 0.0
    assert stepped(Dpo(), policy, reference, examples(PAIRS[:2])).terms["margin"] == 0.0


@pytest.mark.parametrize("row", TEMPLATES)
def test_no_text_begins_twice_and_all_end(row):
    """One begin token at most, the end token last, and only the last answer's tokens are labels."""
    tokenizer, form = families.learned(), TEMPLATES[row]
    turns = (Turn("user", "q"), Turn("assistant", "old"), Turn("user", "r"))
    turns = (Turn("instruction", "q"), Turn("input", "r")) if row == "instruction" else turns
    record = Comparison(Prompt(turns), ("good", "bad"), (1, 2))
    for document, answer in zip(
        tokenize(form, tokenizer, answers(record), last_only=True, closed=False), ("good", "bad"), strict=True
    ):
        ids = document.ids.tolist()
        assert ids[-1] == form.end_id(tokenizer) and bool(document.train[-1])
        assert tokenizer.decode(document.ids[document.train].tolist()[:-1]).strip() == answer
        assert ids.count(tokenizer.control("<|begin_of_text|>")) == (row == "llama3")


def test_learns_what_it_is_given():
    held, policy = examples(PAIRS + LISTS), toys.causal(seed=1)
    reference, optimizer = frozen(deepcopy(policy)), Optimizer(policy, 3e-3, Optim())
    micros, terms = dpo_micros(held, range(7), 4096, toys.CPU), dpo_terms(replace(Dpo(), beta=0.5), reference)
    for _ in range(25):
        stats = update(policy, optimizer, micros, terms, toys.CPU)
    assert stats.terms["accuracy"] == pytest.approx(1.0) and stats.terms["margin"] > 1.0
