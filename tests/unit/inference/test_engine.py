"""The engine: where replies end, what they hold, who joins and leaves, and what is computed once."""

import weakref
from dataclasses import replace

import numpy as np
import pytest
import torch

import toys
from tetrad.errors import UserError
from tetrad.inference import engine as module
from tetrad.inference.cuda_graphs import rounded
from tetrad.inference.engine import Engine, generate, noise
from tetrad.inference.fused_model import Fused
from tetrad.seeds import generator_for

PROMPTS = [toys.ids(1 + i % 5, i) for i in range(9)]


def replies(model=None, prompts=PROMPTS, slots=64, **how):
    requests = [toys.request(prompt, i, **{"max_new_tokens": 6, **how}) for i, prompt in enumerate(prompts)]
    return generate(model or toys.causal(seed=1), requests, toys.CPU, slots)


def engine(slots=3, positions=40, model=None, **how):
    return Engine(Fused(model or toys.causal(seed=1), torch.float32), toys.CPU, slots, positions, **how)


def finished(events):
    return {(e.request_id, e.sample_index): e.response for e in events if e.response}


def test_noise_is_each_replys_own():
    row = noise((3, "rollout", 7, 2), 5)
    assert np.array_equal(row, generator_for(3, "rollout", 7, 2).random(5, dtype=np.float32))
    assert np.array_equal(noise((3, "rollout", 7, 2), 3), row[:3])
    for other in ((4, "rollout", 7, 2), (3, "x", 7, 2), (3, "rollout", 8, 2), (3, "rollout", 7, 1)):
        assert not np.array_equal(noise(other, 5), row)


def test_replies_end_at_an_end_token_or_at_their_longest():
    ends = (toys.EOS, 7, 9, 11, 13)
    found = replies(ends=ends)
    assert {reply.reason for reply in found} == {"end", "length"}
    for reply in found:
        assert reply.finished == (reply.reason == "end") == (reply.ids[-1] in ends)
        assert not set(reply.ids[:-1]) & set(ends)
        assert reply.finished or len(reply.ids) == 6
        assert len(reply.logprobs) == len(reply.ids)


@pytest.mark.parametrize("ends", [(), (999,)])
def test_without_an_end_token_all_are_longest(ends):
    assert {(len(reply.ids), reply.finished) for reply in replies(ends=ends)} == {(6, False)}


def test_every_token_ends():
    assert {(len(reply.ids), reply.finished) for reply in replies(ends=tuple(range(40)))} == {(1, True)}


@pytest.mark.parametrize("slots", [1, 2, 64])
def test_one_token(slots):
    found = replies(max_new_tokens=1, slots=slots)
    assert [reply.ids for reply in found] == [reply.ids[:1] for reply in replies()]


def test_no_requests():
    assert generate(toys.causal(), [], toys.CPU, 4) == []
    assert not engine().busy and list(engine().events()) == [] == engine().advance()


def test_room():
    """Prompt and reply fill the model's positions to the last; one more is refused before anything is computed."""
    model = toys.causal(seed=1, max_positions=12)
    whole = replies(model, [toys.ids(6, 1)], ends=())
    assert len(whole[0].ids) == 6
    assert [reply.ids for reply in whole] == [r.ids for r in replies(toys.causal(seed=1), [toys.ids(6, 1)], ends=())]
    with pytest.raises(UserError) as raised:
        replies(model, [toys.ids(3, 1), toys.ids(7, 1)])
    assert raised.value.code == "E-DATA-LONG"
    assert "12" in raised.value.what


def test_memory_is_told_before_it_is_taken(monkeypatch):
    monkeypatch.setattr(module, "free_bytes", lambda place: 1 << 15)
    with pytest.raises(UserError, match="2 slots with 100 positions needs") as raised:
        engine(slots=2, positions=100)
    assert raised.value.code == "E-MEM-FULL"
    assert engine(slots=2, positions=30).cache.kv.nbytes <= 1 << 15


def test_order_of_replies_is_that_of_prompts():
    model = toys.causal(seed=1)
    together = replies(model, temperature=0.0, slots=2)
    for prompt, reply in zip(PROMPTS, together, strict=True):
        assert replies(model, [prompt], temperature=0.0)[0].ids == reply.ids


def test_weights_are_left_alone():
    model = toys.causal(seed=1)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    replies(model)
    assert all(p.grad is None and torch.equal(p, before[name]) for name, p in model.named_parameters())


@pytest.mark.parametrize("slots", [1, 2, 3, 5, 64])
def test_a_prompt_is_computed_once_for_its_replies(slots):
    """However few slots there are; and each reply is the one that it would be alone."""
    model = toys.causal(seed=1)
    requests = [toys.request(prompt, i, copies=1 + i % 5, max_new_tokens=6) for i, prompt in enumerate(PROMPTS)]
    worker = engine(slots, model=model)
    request_ids = [worker.add(request) for request in requests]
    found = finished(worker.events())
    assert worker.prefilled == sum(map(len, PROMPTS))
    for request_id, request in zip(request_ids, requests, strict=True):
        for index, key in enumerate(request.keys):
            alone = toys.request(request.ids, max_new_tokens=6)
            (expected,) = generate(model, [replace(alone, keys=(key,))], toys.CPU, 1)
            assert found[request_id, index].ids == expected.ids


def test_long_prompts_do_not_come_all_at_once(monkeypatch):
    monkeypatch.setattr(module, "MAX_PREFILL_TOKENS", 8)
    worker = engine(slots=9, positions=20)
    for i, prompt in enumerate([toys.ids(9, 1), *PROMPTS]):
        worker.add(toys.request(prompt, i, max_new_tokens=6, ends=()))
    met = [len({e.request_id for e in worker.advance()}) for _ in range(4)]
    assert met == [1, 4, 5, 8]  # 9 tokens alone; 1 + 2 + 3, for 4 more is too much; 4; 5 + 1 + 2
    assert sum(bool(e.response) for e in worker.events()) == 10


def test_events_tell_each_token_as_it_comes():
    tokenizer = toys.tokenizer()
    worker = engine(tokenizer=tokenizer)
    request_id = worker.add(toys.request(PROMPTS[3], copies=2, max_new_tokens=5, ends=(), top=2))
    said = {0: [], 1: []}
    for number, events in enumerate(iter(worker.advance, [])):
        assert {(e.request_id, e.sample_index) for e in events} == {(request_id, 0), (request_id, 1)}
        for event in events:
            said[event.sample_index].append(event)
            assert bool(event.response) == (number == 4)
    for events in said.values():
        reply = events[-1].response
        assert reply.ids == tuple(e.token for e in events)
        assert reply.logprobs == tuple(e.logprob for e in events)
        assert reply.text == "".join(e.text for e in events) == tokenizer.decode(reply.ids)
        assert [len(top) for top in reply.top] == [2] * 5
        assert all(
            top[0][1] >= top[1][1] and top[0][1] >= logprob - 1e-6
            for top, logprob in zip(reply.top, reply.logprobs, strict=True)
        )


def test_stop_texts_end_a_reply():
    tokenizer = toys.tokenizer()
    model = toys.causal(seed=1)
    whole = generate(model, [toys.request(PROMPTS[2], max_new_tokens=8, ends=())], toys.CPU, 1, tokenizer)[0]
    words = whole.text.split()
    stop = f"{words[3]} {words[4][:2]}"
    request = toys.request(PROMPTS[2], max_new_tokens=8, ends=(), stop=("nothing", stop))
    found = generate(model, [request], toys.CPU, 1, tokenizer)[0]
    assert (found.reason, found.finished) == ("stop", True)
    assert found.text == whole.text[: whole.text.index(stop)]
    assert found.ids == whole.ids[: len(found.ids)]
    assert stop in tokenizer.decode(found.ids) and stop not in tokenizer.decode(found.ids[:-1])


def test_bias_and_penalties_belong_to_their_request():
    model = toys.causal(seed=1)
    plain = [toys.request(p, i, max_new_tokens=6, ends=()) for i, p in enumerate(PROMPTS)]
    odd = toys.request(PROMPTS[0], 99, max_new_tokens=6, ends=(), bias={17: 100.0})
    varied = toys.request(PROMPTS[1], 98, max_new_tokens=20, ends=(), temperature=0.0, presence_penalty=50.0)
    found = generate(model, [*plain[:4], odd, varied, *plain[4:]], toys.CPU, 4)
    assert found[4].ids == (17,) * 6
    assert len(set(found[5].ids)) == 20
    assert [r.ids for r in (*found[:4], *found[6:])] == [r.ids for r in generate(model, plain, toys.CPU, 64)]


def test_cancelled_replies_leave_at_once():
    worker = engine(slots=2)
    first = worker.add(toys.request(PROMPTS[0], 0, copies=3, max_new_tokens=20, ends=()))
    second = worker.add(toys.request(PROMPTS[1], 1, max_new_tokens=4, ends=()))
    for _ in range(3):
        worker.advance()
    gone = worker.cancel(first)
    assert [len(reply.ids) for reply in gone] == [3, 3, 0]  # the third waited
    assert {reply.reason for reply in gone} == {"cancelled"} and not gone[0].finished
    assert worker.cancel(first) == [] == worker.cancel(77)
    events = list(worker.events())
    assert {e.request_id for e in events} == {second} and len(events) == 4
    assert finished(events)[second, 0].ids == replies(prompts=PROMPTS[:2], max_new_tokens=4, ends=())[1].ids


def test_requests_may_come_while_others_grow():
    worker = engine(slots=8)
    model = toys.causal(seed=1)
    found = {}
    for i, prompt in enumerate(PROMPTS):
        worker.add(toys.request(prompt, i, max_new_tokens=6))
        found |= finished(worker.advance())
    found |= finished(worker.events())
    assert [found[i + 1, 0].ids for i in range(9)] == [reply.ids for reply in replies(model)]


@pytest.mark.parametrize(("count", "expected"), [(1, 1), (2, 2), (3, 4), (5, 8), (33, 48), (48, 48)])
def test_rounded(count, expected):
    assert rounded(count, 1, 48) == expected
    assert rounded(count, 16, 48) == max(expected, 16)


def test_requests_that_cannot_be_served():
    worker = engine()
    with pytest.raises(UserError) as raised:
        worker.add(toys.request([], max_new_tokens=3))
    assert raised.value.code == "E-DATA-BLANK"
    with pytest.raises(ValueError, match="tokenizer"):
        worker.add(toys.request([5], max_new_tokens=3, stop=("x",)))
    short = Engine(Fused(toys.causal(), torch.float32, 10), toys.CPU, 1, 99)
    with pytest.raises(UserError, match="there are 10"):
        short.add(toys.request(toys.ids(8), max_new_tokens=3))
    assert not worker.busy


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_a_model_that_says_nan_is_an_error(temperature):
    for value in (float("nan"), float("inf")):
        model = toys.causal(seed=1)
        with torch.no_grad():
            model.model.norm.weight[0] = value
        with pytest.raises(UserError) as raised:
            replies(model, temperature=temperature)
        assert raised.value.code == "E-NUM-NONFINITE"


@pytest.mark.parametrize("sampling", [{"temperature": 1e-38}, {"temperature": 1e4}, {"frequency_penalty": 1e30}])
def test_extreme_settings_sample_on(sampling):
    found = replies(max_new_tokens=9, ends=(), **sampling)
    assert {len(reply.ids) for reply in found} == {9}


def test_an_error_loses_no_request(monkeypatch):
    """What failed in one step is done in the next: prompts that were not yet computed wait again."""
    expected = [reply.ids for reply in replies(slots=4)]
    worker = engine(slots=4, positions=20)
    for i, prompt in enumerate(PROMPTS):
        worker.add(toys.request(prompt, i, max_new_tokens=6))
    plain, calls = worker.model.logits, iter(range(99))

    def failing(hidden):
        if next(calls) % 3 == 1:
            raise MemoryError
        return plain(hidden)

    monkeypatch.setattr(worker.model, "logits", failing)
    found, failures = {}, 0
    while worker.busy:
        try:
            found |= finished(worker.advance())
        except MemoryError:
            failures += 1
    assert failures > 3
    assert [found[i + 1, 0].ids for i in range(9)] == expected


def test_a_late_request_waits_a_few_steps_only():
    worker = engine(slots=16)
    for i in range(15):
        worker.add(toys.request(PROMPTS[3], i, max_new_tokens=30, ends=()))
    worker.advance()
    late = worker.add(toys.request(PROMPTS[1], 99, max_new_tokens=2, ends=()))
    steps = next(n for n in range(99) if late in {event.request_id for event in worker.advance()})
    assert steps < module.MAX_WAIT_STEPS


def test_no_event_follows_a_cancel():
    """Also of the step in which it is cancelled."""
    worker = engine(slots=4)
    first = worker.add(toys.request(PROMPTS[0], 0, copies=3, max_new_tokens=9, ends=()))
    worker.add(toys.request(PROMPTS[1], 1, max_new_tokens=5, ends=()))
    seen = []
    for event in worker.events():
        seen.append(event.request_id)
        if len(seen) == 5:
            assert len(worker.cancel(first)) == 3
    assert seen[:5].count(first) == 4 and first not in seen[5:]
    assert seen.count(first + 1) == 5


def test_an_engine_that_is_let_go_frees_its_cache():
    worker = engine()
    worker.add(toys.request(PROMPTS[0], max_new_tokens=3))
    list(worker.events())
    cache = weakref.ref(worker.cache)
    del worker
    assert cache() is None
