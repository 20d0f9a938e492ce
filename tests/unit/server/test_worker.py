"""The engine's thread: faults, a full queue, clients that leave, an end."""

import asyncio
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest

from serving import Running, ask, serving, stream, until
from tetrad.settings.use import Serve

PATH = "/v1/chat/completions"
BODY: dict[str, Any] = {"model": "", "messages": [{"role": "user", "content": "the plot"}], "max_tokens": 24, "seed": 7}
LONG = BODY | {"model": "chat", "max_tokens": 1900, "ignore_eos": True}


def slowed(step: Callable[[], None]) -> Callable[[], None]:
    """As of a model whose answer takes ten seconds."""

    def slow() -> None:
        time.sleep(0.005)
        step()

    return slow


def test_an_error_in_a_stream_ends_it(
    http: httpx.Client, running: Running, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """With a mapping, and without [DONE]; before the first token the status says it. The next request is served."""
    worker, body = running.service.models["chat"].worker, BODY | {"model": "chat"}
    good = ask(http, PATH, body)["choices"]

    def break_after(steps: int) -> None:
        assert worker._engine
        advance, left = worker._engine.advance, iter(range(steps))

        def failing() -> Any:
            if next(left, None) is None:
                raise RuntimeError("bad alloc: a secret")
            return advance()

        monkeypatch.setattr(worker._engine, "advance", failing)

    break_after(9)
    first, *_, error = stream(http, PATH, body)
    assert first["choices"][0]["delta"]["role"] == "assistant"
    assert error.keys() == {"error"} and error["error"].keys() == {"message", "type", "param", "code"}
    assert error["error"]["type"] == "server_error" and "secret" not in str(error)
    assert ask(http, PATH, body)["choices"] == good
    for form in (False, True):
        ask(http, PATH, body)
        break_after(0)
        answer = http.post(PATH, json=body | {"stream": form})
        assert (answer.status_code, answer.json()["error"]["type"]) == (503, "server_error")
    assert ask(http, PATH, body)["choices"] == good
    assert caplog.text.count("the engine failed") == 3


def test_a_full_queue_refuses_at_once(served_models: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of one slot and a queue of two: the fourth is refused; those that wait are served once the slot is free."""
    with serving([served_models / "chat"], Serve(max_num_seqs=1)) as server:
        worker = server.service.models["chat"].worker
        monkeypatch.setattr(worker, "queue", 2)
        monkeypatch.setattr(worker, "_step", slowed(worker._step))
        with httpx.Client(base_url=server.url, timeout=30) as http, ThreadPoolExecutor(2) as threads:
            with http.stream("POST", PATH, json=LONG | {"stream": True}) as grows:
                lines = grows.iter_lines()  # closed with its answer once nothing names it
                next(lines)
                waiting = [threads.submit(http.post, PATH, json=BODY) for _ in range(2)]
                until(lambda: len(worker._open) == 3)
                began = time.perf_counter()
                answer = http.post(PATH, json=BODY)
                assert time.perf_counter() - began < 0.05
                assert (answer.status_code, answer.headers["retry-after"]) == (429, "1")
                assert answer.json()["error"] | {"message": ""} == {
                    "message": "",
                    "type": "rate_limit_error",
                    "param": None,
                    "code": "queue_full",
                }
            assert [future.result().status_code for future in waiting] == [200, 200]


@pytest.mark.parametrize("form", ["stream", "whole", "batch"])
def test_a_client_that_leaves_frees_its_rows(
    http: httpx.Client, running: Running, form: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    worker = running.service.models["chat"].worker
    monkeypatch.setattr(worker, "_step", slowed(worker._step))
    body = LONG | {"n": 4, "stream": form == "stream"}
    path = PATH
    if form == "batch":
        path, body = "/v1/completions", {**body, "prompt": ["the plot"] * 8, "echo": True, "logprobs": 1}
        del body["messages"]
    with httpx.Client(base_url=running.url, timeout=30) as client:
        if form == "stream":
            with client.stream("POST", path, json=body) as answer:
                lines = answer.iter_lines()
                next(lines)
                assert worker._growing
        else:
            with pytest.raises(httpx.ReadTimeout):
                client.post(path, json=body, timeout=0.1)
    assert until(lambda: not (worker._open or worker._growing or worker._waiting)) < 0.5
    until(lambda: not (worker._engine and worker._engine.busy))
    assert ask(http, PATH, BODY | {"model": "chat"})["choices"]


def test_an_idle_worker_sleeps(http: httpx.Client, running: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    worker = running.service.models["chat"].worker
    ask(http, PATH, BODY | {"model": "chat"})
    until(lambda: not worker._growing)
    steps: list[None] = []
    step = worker._step
    monkeypatch.setattr(worker, "_step", lambda: (steps.append(None), step()))
    time.sleep(0.1)
    assert len(steps) <= 1
    ask(http, PATH, BODY | {"model": "chat"})
    assert 24 <= len(steps) <= 28


def test_a_stop_ends_what_is_in_flight(served_models: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """New requests are refused at once, what is done within the grace is whole, the rest ends with an error."""
    with serving([served_models / "chat"], Serve(max_num_seqs=4)) as server:
        worker = server.service.models["chat"].worker
        monkeypatch.setattr(worker, "_step", slowed(worker._step))
        with httpx.Client(base_url=server.url, timeout=30) as http:
            with http.stream("POST", PATH, json=LONG | {"stream": True}) as grows:
                lines = grows.iter_lines()
                next(lines)
                stopping = asyncio.run_coroutine_threadsafe(worker.stop(0.1), server.loop)
                until(lambda: not worker._running)
                refused = http.post(PATH, json=BODY)
                assert (refused.status_code, refused.json()["error"]["code"]) == (503, "stopping")
                last = [line for line in lines if line][-1]
            stopping.result(10)
            assert '"code": "stopping"' in last
            assert not worker._thread.is_alive()
