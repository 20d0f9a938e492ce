"""The engine's process, seen through the server: faults, a full queue, clients that leave, an end."""

import asyncio
import os
import resource
import signal
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest

from serving import EngineThread, Running, ask, serving, stream, until
from tetrad.errors import UserError
from tetrad.inference.engine import Engine
from tetrad.inference.engine_process import _Steps
from tetrad.settings.use import Serve

PATH = "/v1/chat/completions"
BODY: dict[str, Any] = {"model": "", "messages": [{"role": "user", "content": "the plot"}], "max_tokens": 24, "seed": 7}
LONG = BODY | {"max_tokens": 1900, "ignore_eos": True}


@pytest.fixture
def steps(monkeypatch: pytest.MonkeyPatch) -> list[_Steps]:
    """Engines run in threads of this process, each step as slow as a model's whose answer takes ten seconds."""
    found: list[_Steps] = []

    class Seen(_Steps):
        def __init__(self, *given: Any) -> None:
            super().__init__(*given)
            found.append(self)

        def _step(self) -> None:
            time.sleep(0.005)
            super()._step()

    monkeypatch.setattr("tetrad.inference.engine_process._Steps", Seen)
    monkeypatch.setattr("tetrad.inference.engine_process.start", EngineThread.start)
    return found


def test_an_error_in_a_stream_ends_it(
    served_models: Path, steps: list[_Steps], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """With a mapping, and without [DONE]; before the first token the status says it. The next request is served."""
    with (
        serving([served_models / "chat"], Serve(max_num_seqs=4)) as server,
        httpx.Client(base_url=server.url, timeout=30) as http,
    ):
        good = ask(http, PATH, BODY)["choices"]
        (broken,) = steps
        advance: Callable[[Engine], Any] = Engine.advance

        def break_after(count: int) -> None:
            left = iter(range(count))

            def failing(engine: Engine) -> Any:
                if next(left, None) is None:
                    monkeypatch.setattr(Engine, "advance", advance)
                    raise RuntimeError("bad alloc: a secret")
                return advance(engine)

            monkeypatch.setattr(Engine, "advance", failing)

        before = broken.engine
        break_after(9)
        first, *_, error = stream(http, PATH, BODY)
        assert first["choices"][0]["delta"]["role"] == "assistant"
        assert error.keys() == {"error"} and error["error"].keys() == {"message", "type", "param", "code"}
        assert error["error"]["type"] == "server_error" and "secret" not in str(error)
        assert ask(http, PATH, BODY)["choices"] == good
        assert broken.engine is not before
        for form in (False, True):
            break_after(0)
            answer = http.post(PATH, json=BODY | {"stream": form})
            assert (answer.status_code, answer.json()["error"]["type"]) == (503, "server_error")
        assert ask(http, PATH, BODY)["choices"] == good
        assert caplog.text.count("the engine failed") == 3


def test_a_prompt_that_is_too_much_fails_alone(
    served_models: Path, steps: list[_Steps], monkeypatch: pytest.MonkeyPatch
) -> None:
    """503 for it, what grows goes on; a step that fails again ends that too."""
    with (
        serving([served_models / "chat"], Serve(max_num_seqs=4)) as server,
        httpx.Client(base_url=server.url, timeout=30) as http,
    ):
        whole = stream(http, PATH, LONG | {"max_tokens": 200})
        engine = steps[0].engine

        def too_much(*_: Any) -> Any:
            raise MemoryError

        for times in (1, 2):
            with http.stream("POST", PATH, json=LONG | {"max_tokens": 200, "stream": True}) as grows:
                lines = grows.iter_lines()
                next(lines)
                with monkeypatch.context() as planted:
                    planted.setattr(Engine, "_prefill", too_much)
                    if times == 2:
                        planted.setattr(Engine, "advance", too_much)
                    answer = http.post(PATH, json=BODY)
                assert (answer.status_code, answer.json()["error"]["message"]) == (503, "the model failed")
                last = [line for line in lines if line][-1]
            assert (last == "data: [DONE]") == (times == 1)
            assert (steps[0].engine is engine) == (times == 1)
        assert stream(http, PATH, LONG | {"max_tokens": 200})[-2]["choices"][0] == whole[-2]["choices"][0]


def test_out_of_memory_in_one_request(served_models: Path) -> None:
    """The engine's process may have no more than it has: what needs more is refused, what grows goes on."""
    with (
        serving([served_models / "chat"], Serve(max_num_seqs=4)) as server,
        httpx.Client(base_url=server.url, timeout=30) as http,
    ):
        process = server.service.models["chat"].worker.process
        pid = process.pid or 0
        with http.stream("POST", PATH, json=LONG | {"stream": True}) as grows:
            lines = grows.iter_lines()
            next(lines)
            size = int(Path(f"/proc/{pid}/statm").read_text().split()[0]) * os.sysconf("SC_PAGE_SIZE")
            before = resource.prlimit(pid, resource.RLIMIT_AS)
            resource.prlimit(pid, resource.RLIMIT_AS, (size, before[1]))
            large = {"model": "chat", "prompt": [[5] * 2000] * 4, "max_tokens": 1, "echo": True, "logprobs": 5}
            answer = http.post("/v1/completions", json=large)
            assert (answer.status_code, answer.json()["error"]["type"]) == (503, "server_error"), answer.text[:200]
            resource.prlimit(pid, resource.RLIMIT_AS, before)
            assert [line for line in lines if line][-1] == "data: [DONE]"
        assert process.pid == pid and process.is_alive()


def test_a_killed_process_ends_what_it_did_and_is_replaced(served_models: Path) -> None:
    """With kill -9: an event of an error ends the stream, 503 what waits; other requests never notice."""
    with (
        serving([served_models / "chat"], Serve(max_num_seqs=1)) as server,
        httpx.Client(base_url=server.url, timeout=60) as http,
        ThreadPoolExecutor(1) as threads,
    ):
        worker = server.service.models["chat"].worker
        good = ask(http, PATH, BODY)["choices"]
        with http.stream("POST", PATH, json=LONG | {"stream": True}) as grows:
            lines = grows.iter_lines()
            next(lines)
            waits = threads.submit(http.post, PATH, json=BODY)
            until(lambda: len(worker._open) == 2)
            first = worker.process.pid
            os.kill(first or 0, signal.SIGKILL)
            last = [line for line in lines if line][-1]
        assert '"type": "server_error"' in last and "[DONE]" not in last
        assert waits.result().json()["error"]["type"] == "server_error"
        assert ask(http, PATH, BODY)["choices"] == good
        second = worker.process.pid
        os.kill(second or 0, signal.SIGKILL)  # while nothing is asked
        until(lambda: worker.process.pid != second)
        assert ask(http, PATH, BODY)["choices"] == good
        assert len({first, second, worker.process.pid}) == 3
    assert not worker.process.is_alive()


def test_what_cannot_be_loaded_is_said_at_the_start(served_models: Path) -> None:
    with pytest.raises(UserError, match="E-MEM-FULL"), serving([served_models / "chat"], Serve(max_num_seqs=1 << 20)):
        pass


def test_a_full_queue_refuses_at_once(
    served_models: Path, steps: list[_Steps], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of one slot and a queue of two: the fourth is refused; those that wait are served once the slot is free."""
    with serving([served_models / "chat"], Serve(max_num_seqs=1)) as server:
        worker = server.service.models["chat"].worker
        monkeypatch.setattr(worker, "queue", 2)
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
def test_a_client_that_leaves_frees_its_rows(served_models: Path, steps: list[_Steps], form: str) -> None:
    body = LONG | {"n": 4, "stream": form == "stream"}
    path = PATH
    if form == "batch":
        path, body = "/v1/completions", {**body, "prompt": ["the plot"] * 8, "echo": True, "logprobs": 1}
        del body["messages"]
    with (
        serving([served_models / "chat"], Serve(max_num_seqs=4)) as server,
        httpx.Client(base_url=server.url, timeout=30) as http,
    ):
        worker, engine = server.service.models["chat"].worker, steps[0]
        if form == "stream":
            with http.stream("POST", path, json=body) as answer:
                lines = answer.iter_lines()
                next(lines)
                assert engine.growing
        else:
            with pytest.raises(httpx.ReadTimeout):
                http.post(path, json=body, timeout=0.1)
        assert until(lambda: not (worker._open or engine.jobs or engine.growing or engine.waiting)) < 0.5
        until(lambda: not (engine.engine and engine.engine.busy))
        assert ask(http, PATH, BODY)["choices"]


def test_an_idle_engine_sleeps(served_models: Path, steps: list[_Steps], monkeypatch: pytest.MonkeyPatch) -> None:
    with (
        serving([served_models / "chat"], Serve(max_num_seqs=4)) as server,
        httpx.Client(base_url=server.url, timeout=30) as http,
    ):
        ask(http, PATH, BODY)
        until(lambda: not steps[0].growing)
        taken: list[None] = []
        step = steps[0]._step
        monkeypatch.setattr(steps[0], "_step", lambda: (taken.append(None), step()))
        time.sleep(0.1)
        assert len(taken) <= 1
        ask(http, PATH, BODY | {"ignore_eos": True})
        assert 24 <= len(taken) <= 28


def test_a_stop_ends_what_is_in_flight(served_models: Path, steps: list[_Steps]) -> None:
    """New requests are refused at once, what is done within the grace is whole, the rest ends with an error."""
    with serving([served_models / "chat"], Serve(max_num_seqs=4)) as server:
        worker = server.service.models["chat"].worker
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
            assert not worker.process.is_alive()


def test_engines_in_a_running_server(running: Running) -> None:
    """One process a model."""
    workers = [served.worker for served in running.service.models.values()]
    assert len({worker.process.pid for worker in workers} | {os.getpid()}) == len(workers) + 1
