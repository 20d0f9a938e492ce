"""The sampler: greedy tokens are transformers' own, log-probabilities are the training forward's, and a reply depends
on its prompt and its noise, not on the rows beside it."""

from pathlib import Path
from typing import Any

import pytest
import torch

import toys
from tetrad.inference.engine import generate
from tetrad.model.config import RopeScaling
from tetrad.model.transformer import CausalLM
from tetrad.training.batches import response_logprobs
from tetrad.types import Response

transformers = pytest.importorskip("transformers")
pytestmark = pytest.mark.parity

NEW = 32
PROMPTS = [toys.ids(1 + (5 * i) % 23, 100 + i) for i in range(24)]
LLAMA3 = RopeScaling(factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=16)


def model_of(family: str, ends: tuple[int, ...] = (toys.EOS,)) -> CausalLM:
    """An end token is likely enough that some replies end early and some never."""
    rope = LLAMA3 if family == "llama" else None
    model = toys.causal(seed=11, std=0.25, family=family, eos_ids=ends, tied=False, vocab_size=60, rope_scaling=rope)
    with torch.no_grad():
        for token in ends:
            model.lm_head.weight[token] *= 1.5 if len(ends) == 1 else 1.1
    return model.eval()


def greedy(model: CausalLM, slots: int) -> list[Response]:
    requests = [
        toys.request(p, i, max_new_tokens=NEW, temperature=0.0, ends=model.config.eos_ids)
        for i, p in enumerate(PROMPTS)
    ]
    return generate(model, requests, toys.CPU, slots)


def sampled(model: CausalLM, slots: int, chosen: list[int] | None = None, **how: Any) -> list[Response]:
    numbers = list(range(24)) if chosen is None else chosen
    return generate(model, [toys.request(PROMPTS[i], i, max_new_tokens=NEW, **how) for i in numbers], toys.CPU, slots)


@pytest.mark.parametrize("family", ["qwen2", "qwen3", "llama", "mistral"])
def test_greedy_is_theirs(tmp_path: Path, family: str) -> None:
    """With one slot, with eight that rows leave and others enter, and with all at once."""
    ends = (toys.EOS, 7) if family == "llama" else (toys.EOS,)
    model = model_of(family, ends)
    read = transformers.AutoModelForCausalLM.from_pretrained(toys.saved(tmp_path, model), dtype=torch.float32).eval()
    expected = []
    for prompt in PROMPTS:
        ids = torch.tensor([prompt])
        out = read.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=NEW, do_sample=False)
        expected.append(out[0, len(prompt) :].tolist())
    lengths = {len(reply) for reply in expected}
    assert len(lengths) > 3  # rows leave at different times
    assert max(lengths) == NEW
    for slots in (1, 8, 64):
        replies = greedy(model, slots)
        assert [list(reply.ids) for reply in replies] == expected
        assert [reply.finished for reply in replies] == [ids[-1] in ends for ids in expected]


@pytest.mark.parametrize("temperature", [1.0, 0.7, 1.5])
def test_logprobs_are_the_training_forwards(temperature: float) -> None:
    model = model_of("qwen2")
    replies = sampled(model, 8, temperature=temperature)
    assert len({len(reply.ids) for reply in replies}) > 3
    documents = [toys.document([*p, *r.ids], len(p)) for p, r in zip(PROMPTS, replies, strict=True)]
    read = response_logprobs(model, documents, 256, toys.CPU, temperature)
    for reply, logprobs in zip(replies, read, strict=True):
        assert len(reply.logprobs) == len(reply.ids) == len(logprobs)
        assert (torch.tensor(reply.logprobs) - torch.from_numpy(logprobs)).abs().max() <= 1e-4
    hot = response_logprobs(model, documents, 256, toys.CPU, 2 * temperature)
    assert max(abs(float(b[0]) - r.logprobs[0]) for r, b in zip(replies, hot, strict=True)) > 1e-2


def test_greedy_logprobs_are_those_at_temperature_one() -> None:
    model = model_of("qwen2")
    replies = greedy(model, 8)
    documents = [toys.document([*p, *r.ids], len(p)) for p, r in zip(PROMPTS, replies, strict=True)]
    for reply, logprobs in zip(replies, response_logprobs(model, documents, 256, toys.CPU), strict=True):
        assert (torch.tensor(reply.logprobs) - torch.from_numpy(logprobs)).abs().max() <= 1e-4


@pytest.mark.parametrize("sampling", [{}, {"temperature": 0.8, "top_k": 10}, {"top_p": 0.7}], ids=str)
def test_a_reply_depends_on_its_own_noise_alone(sampling: dict[str, Any]) -> None:
    """Other prompts beside it, another order, other slots: the same tokens."""
    model = model_of("qwen2")

    def replies(chosen: list[int], slots: int) -> dict[int, tuple[int, ...]]:
        found = sampled(model, slots, chosen, **sampling)
        return {i: reply.ids for i, reply in zip(chosen, found, strict=True)}

    together = replies(list(range(24)), 64)
    assert len(set(together.values())) > 12
    for slots in (1, 3, 8):
        assert replies(list(range(24)), slots) == together
    backwards = list(reversed(range(24)))
    assert replies(backwards, 5) == together
    assert all(replies([i], 8)[i] == together[i] for i in (0, 7, 23))
    assert all(replies([i, 4], 8)[i] == together[i] for i in (9, 13))
