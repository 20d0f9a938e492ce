"""A reward behind HTTP: what is sent, what is taken, and what is told when it fails. The server is a real one."""

import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest

from tetrad.errors import UserError
from tetrad.inference.completions import Completion
from tetrad.reward import functions
from tetrad.reward.functions import endpoint
from tetrad.types import Turn

SAMPLES = [
    Completion((5, 6), (7, 1), (Turn("user", "1 + 1?"),), "二", "a.jsonl:1"),
    Completion((5,), (8,), (), "", "", False),
]


@contextmanager
def server(*answers: tuple[int, bytes]) -> Iterator[tuple[str, list[Any]]]:
    """Answers in turn, the last one for ever; the address, and what was asked."""
    asked: list[Any] = []

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            key = self.headers["Authorization"]
            asked.append(body | ({"authorization": key} if key else {}))
            status, body = answers[min(len(asked), len(answers)) - 1]
            self.send_response(status)
            if status == 302:
                self.send_header("Location", "http://127.0.0.1:9/elsewhere")
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_: object) -> None: ...

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as found:
        thread = threading.Thread(target=found.serve_forever)
        thread.start()
        try:
            yield f"http://127.0.0.1:{found.server_port}/score", asked
        finally:
            found.shutdown()
            thread.join()


@pytest.fixture(autouse=True)
def _hurry(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(functions, "_WAITS", (0.01, 0.01))


def test_samples_go_out_and_scores_come_back() -> None:
    with server((200, b'{"scores": [1, -0.5]}')) as (url, asked):
        assert endpoint(url)(SAMPLES) == [1.0, -0.5]
    turns = [{"role": "user", "content": "1 + 1?"}]
    first = {
        "prompt": "1 + 1?",
        "messages": turns,
        "input": "1 + 1?",
        "text": "二",
        "prompt_ids": [5, 6],
        "ids": [7, 1],
    }
    second = {"prompt": "", "messages": [], "input": "", "text": "", "prompt_ids": [5], "ids": [8], "finished": False}
    assert asked == [{"samples": [first | {"finished": True}, second], "tokenizer": ""}]


def test_a_key_goes_along(monkeypatch: pytest.MonkeyPatch) -> None:
    with server((200, b'{"scores": [1, -0.5]}')) as (url, asked):
        monkeypatch.setenv("TETRAD_REWARD_KEY", "secret")
        endpoint(url, "of a policy")(SAMPLES)
    assert asked[0]["tokenizer"] == "of a policy" and asked[0]["authorization"] == "Bearer secret"


def test_a_moments_trouble_is_waited_out() -> None:
    with server((503, b""), (500, b""), (200, b'{"scores": [1, 2]}')) as (url, asked):
        assert endpoint(url)(SAMPLES) == [1.0, 2.0]
    assert len(asked) == 3


@pytest.mark.parametrize(
    ("status", "body", "said"),
    [
        (500, b"", "500"),
        (302, b"", "302"),
        (200, b"not json", "JSONDecodeError"),
        (200, b'{"score": [1, 2]}', "KeyError"),
        (200, b'{"scores": [1]}', "2 samples went in, 1 numbers came out"),
        (200, b'{"scores": [1, NaN]}', "nan"),
        (200, b'{"scores": [1, "x"]}', "ValueError"),
        (200, b'{"scores": null}', "TypeError"),
    ],
)
def test_what_is_no_answer(status: int, body: bytes, said: str) -> None:
    with server((status, body)) as (url, _), pytest.raises(UserError) as caught:
        endpoint(url)(SAMPLES)
    assert caught.value.code == "E-NUM-REWARD"
    assert caught.value.where == url
    assert said in caught.value.what


def test_nobody_there() -> None:
    with server((200, b"")) as (url, _):
        pass
    with pytest.raises(UserError) as caught:
        endpoint(url)(SAMPLES)
    assert caught.value.code == "E-NUM-REWARD"
