"""What the engine promises: the exact distribution for each sampler setting, each request its own reply whatever joins,
leaves or is cancelled beside it, and no slot lost."""

import random
from typing import Any

import numpy as np
import pytest
import torch

import toys
from tetrad.inference.engine import Engine, Request, generate
from tetrad.inference.fused_model import Fused
from tetrad.types import Response

MODEL = toys.causal(seed=5, std=0.2, vocab_size=60)
FUSED = Fused(MODEL, torch.float32)
PROMPT = [*toys.ids(9, 3, high=60), 7, 7, 7]
REPLIES = 20_000


def logits_after(ids: list[int]) -> np.ndarray:
    """By the training forward."""
    with torch.no_grad():
        return MODEL(toys.packed([toys.document(ids)]), "logits")[-1].double().numpy()


def exact(prompt: list[int], reply: list[int], **s: Any) -> np.ndarray:
    """The distribution of the next token by the definition of each setting, in float64, one token after another."""
    z = logits_after([*prompt, *reply])
    for token in set(prompt) | set(reply):
        penalty = s.get("repetition_penalty", 1.0)
        z[token] = z[token] / penalty if z[token] > 0 else z[token] * penalty
    for token in set(reply):
        z[token] -= s.get("presence_penalty", 0.0) + s.get("frequency_penalty", 0.0) * reply.count(token)
    for token, value in s.get("bias", {}).items():
        z[token] += value
    z = z / s.get("temperature", 1.0)
    p = np.exp(z - z.max())
    p /= p.sum()
    order = np.argsort(-p, kind="stable")
    kept = order[: s.get("top_k") or len(p)]
    share, chosen = 0.0, []
    for token in kept:
        if share >= s.get("top_p", 1.0):
            break
        chosen.append(token)
        share += p[token] / p[kept].sum()
    allowed = [token for token in chosen if p[token] >= s.get("min_p", 0.0) * p.max()]
    out = np.zeros_like(p)
    out[allowed] = p[allowed] / p[allowed].sum()
    return out


def chi_square(tokens: list[int], expected: np.ndarray) -> float:
    """In standard deviations above what is due (Wilson and Hilferty 1931); tokens that are due less than ten times are
    taken together. Fails where a token comes that must not."""
    counts = np.bincount(tokens, minlength=len(expected))
    assert not counts[expected == 0].any()
    due = expected * len(tokens)
    rare = due < 10
    seen = np.array([*counts[~rare], counts[rare].sum()])
    due = np.array([*due[~rare], due[rare].sum()])
    seen, due = seen[due > 1], due[due > 1]
    degrees = len(due) - 1
    if degrees < 1:
        return 0.0
    statistic = ((seen - due) ** 2 / due).sum()
    spread = 2 / (9 * degrees)
    return float(((statistic / degrees) ** (1 / 3) - (1 - spread)) / spread**0.5)


SETTINGS: list[dict[str, Any]] = [
    {},
    {"temperature": 0.5},
    {"temperature": 1.8},
    {"top_k": 5},
    {"top_p": 0.8},
    {"min_p": 0.1},
    {"top_k": 20, "top_p": 0.7},
    {"temperature": 1.4, "top_k": 30, "top_p": 0.9, "min_p": 0.03},
    {"repetition_penalty": 1.6},
    {"presence_penalty": 1.5},
    {"frequency_penalty": -1.0},
    {"bias": {7: 3.0, 20: -4.0}},
    {"temperature": 0.7, "repetition_penalty": 1.3, "presence_penalty": 0.5, "top_p": 0.95, "bias": {9: 1.0}},
]


@pytest.mark.parametrize("setting", SETTINGS, ids=str)
def test_tokens_follow_the_exact_distribution(setting: dict[str, Any]) -> None:
    """The first token, and the second after the commonest first one, which the penalties have to know."""
    request = toys.request(PROMPT, copies=REPLIES, ends=(), max_new_tokens=2, **setting)
    replies = [list(reply.ids) for reply in generate(FUSED, [request], toys.CPU, 512)]
    first = [ids[0] for ids in replies]
    assert chi_square(first, exact(PROMPT, [], **setting)) < 4
    commonest = max(set(first), key=first.count)
    second = [ids[1] for ids in replies if ids[0] == commonest]
    assert len(second) > 1000
    assert chi_square(second, exact(PROMPT, [commonest], **setting)) < 4


def test_a_small_fault_would_be_seen() -> None:
    """Three of a hundred draws that take the likeliest token instead of their own."""
    p, draw = exact(PROMPT, []), np.random.default_rng(0)
    wrong = 0.97 * p
    wrong[p.argmax()] += 0.03
    assert chi_square(draw.choice(len(p), REPLIES, p=wrong).tolist(), p) > 4
    assert chi_square(draw.choice(len(p), REPLIES, p=p).tolist(), p) < 4


TOKENIZER = toys.tokenizer(60)


def pool() -> list[Request]:
    """Requests of every kind."""
    chance, found = random.Random(0), []
    for number in range(40):
        how: dict[str, Any] = {
            "max_new_tokens": chance.randrange(1, 12),
            "temperature": chance.choice([0.0, 0.7, 1.0, 1.5]),
        }
        how |= chance.choice([{}, {}, {"top_k": 5}, {"top_p": 0.8}, {"min_p": 0.1}, {"repetition_penalty": 1.5}])
        how |= chance.choice([{}, {}, {"stop": ("w1", "w25")}, {"bias": {9: 4.0}}, {"top": 3}])
        prompt = toys.ids(chance.randrange(1, 30), number, high=60)
        ends = tuple(chance.sample(range(60), chance.choice([0, 1, 6])))
        found.append(toys.request(prompt, number, copies=chance.choice([1, 1, 2, 3, 7]), ends=ends, **how))
    return found


POOL = pool()


@pytest.fixture(scope="module")
def alone() -> list[list[Response]]:
    """What each request gets when nothing is beside it."""
    return [generate(FUSED, [request], toys.CPU, 1, TOKENIZER) for request in POOL]


def schedule(seed: int, alone: list[list[Response]]) -> int:
    """One random life of an engine: requests come, some are cancelled, all others get what they get alone. Returns the
    number of replies that were cancelled."""
    chance = random.Random(seed)
    engine = Engine(FUSED, toys.CPU, chance.randrange(1, 7), 48, TOKENIZER)
    wanted = [chance.randrange(len(POOL)) for _ in range(chance.randrange(1, 9))]
    running: dict[int, int] = {}
    texts: dict[tuple[int, int], str] = {}
    cancelled = 0
    while wanted or engine.busy:
        while wanted and (not engine.busy or chance.random() < 0.3):
            number = wanted.pop()
            running[engine.add(POOL[number])] = number
        for event in engine.advance():
            assert event.request_id in running
            key = event.request_id, event.sample_index
            texts[key] = texts.get(key, "") + event.text
            if event.response:
                expected = alone[running[event.request_id]][event.sample_index]
                assert (event.response.ids, event.response.reason) == (expected.ids, expected.reason)
                assert event.response.text == expected.text == texts[key]
        assert len(engine._rows) <= engine.slots
        if running and chance.random() < 0.1:
            request_id = chance.choice(list(running))
            number = running.pop(request_id)
            for reply in engine.cancel(request_id):
                cancelled += 1
                copies = [whole.ids[: len(reply.ids)] for whole in alone[number]]
                assert reply.ids in copies and reply.reason == "cancelled"
            assert engine.cancel(request_id) == []
    assert not engine._rows and not engine._waiting and engine._cached is None
    return cancelled


@pytest.mark.timeout(300)
def test_a_thousand_schedules(alone: list[list[Response]]) -> None:
    assert sum(schedule(seed, alone) for seed in range(1000)) > 500
