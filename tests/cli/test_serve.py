"""`tetrad serve` as people start it: what it needs, what it refuses, and how it ends."""

import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from raw_http import ask, connect, is_closed, read_answer
from served import write_model
from serving import until
from tetrad.cli.main import main
from tetrad.server.service import model_ids

KEY = "a-key-of-twenty-four-signs"


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("served")
    write_model(folder / "sft", "chatml", seed=1, max_positions=1024)
    write_model(folder / "reward", "chatml", reward=True)
    return folder


@contextmanager
def served(*words: str | Path, **environment: str) -> Iterator[tuple[subprocess.Popen[str], int]]:
    """The process and its port."""
    command = [sys.executable, "-m", "tetrad", "serve", *map(str, words), "--port", "0"]
    pipe = subprocess.PIPE
    process = subprocess.Popen(
        command, stdout=pipe, stderr=pipe, text=True, env=os.environ | environment, start_new_session=True
    )
    try:
        assert process.stdout
        line = process.stdout.readline()
        if "http" not in line:
            process.kill()
        match = re.search(r"http://127.0.0.1:(\d+), (.*)", line)
        assert match, (line, process.communicate())
        yield process, int(match[1])
    finally:
        process.kill()
        process.communicate()


def test_it_serves_and_ends_in_order(models: Path, tmp_path: Path) -> None:
    key = tmp_path / "key"
    key.write_text(KEY + "\n")
    key.chmod(0o600)
    with served(models / "sft", "--reward", models / "reward", "--api-key-file", key) as (process, port):
        assert ask(port, "GET", "/health").status == 200
        assert ask(port, "GET", "/metrics").status == 401
        hostile = f"Bearer {KEY}\x1b[2J"
        assert ask(port, "GET", "/metrics?\x1b[2J", authorization=hostile).status in (400, 401)
        text = ask(port, "GET", "/metrics", authorization=f"Bearer {KEY}").body.decode()
        assert 'tetrad_requests_total{code="401",route="none"}' in text
        body = {"messages": [{"role": "user", "content": "a"}], "max_tokens": 3, "ignore_eos": True}
        assert ask(port, "POST", "/v1/chat/completions", body, authorization=f"Bearer {KEY}").status == 200
        text = ask(port, "GET", "/metrics", authorization=f"Bearer {KEY}").body.decode()
        assert 'tetrad_tokens_total{kind="response"} 3.0' in text and "tetrad_first_token_seconds_count 1.0" in text
        with connect(port) as idle:
            idle.sendall(b"GET /health HTTP/1.1\r\nHost: localhost\r\n\r\n")
            assert read_answer(idle).status == 200
            streams = [stream(port, tokens=600) for _ in range(8)]
            os.killpg(process.pid, signal.SIGTERM)  # all its processes, as a service manager does
            time.sleep(0.3)
            assert ask(port, "POST", "/v1/chat/completions", {}, authorization=f"Bearer {KEY}").status == 503
            for one in streams:
                answer = read_answer(one)
                assert answer.status == 200 and b'"length"' in answer.body and b"data: [DONE]" in answer.body
                one.close()
            assert is_closed(idle)
        assert process.wait(20) == 0
        assert process.communicate() == ("", "")  # nothing of a request is printed


def stream(port: int, tokens: int) -> socket.socket:
    """A response that has begun."""
    chat = {"messages": [{"role": "user", "content": "\x1b[2J\n"}], "stream": True, "ignore_eos": True}
    body = json.dumps(chat | {"max_tokens": tokens}).encode()
    head = (
        f"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nAuthorization: Bearer {KEY}\r\nConnection: close\r\n"
    )
    connection = connect(port)
    connection.sendall(f"{head}Content-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n".encode() + body)
    assert connection.recv(1, socket.MSG_PEEK)
    return connection


def test_no_engine_outlives_its_server(models: Path) -> None:
    with served(models / "sft") as (process, port):
        assert ask(port, "GET", "/health").status == 200
        children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
        assert children
        process.kill()
        process.wait(5)
        until(lambda: not any(Path("/proc", child).exists() for child in children))


def test_a_second_interrupt_ends_at_once(models: Path) -> None:
    head = "POST /v1/reward HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\nContent-Length: 9"
    with served("--reward", models / "reward") as (process, port), connect(port) as connection:
        connection.sendall(head.encode() + b"\r\n\r\n")  # its body never comes
        time.sleep(0.2)
        process.send_signal(signal.SIGINT)
        time.sleep(0.5)
        assert process.poll() is None
        assert ask(port, "GET", "/health").error["code"] == "stopping"
        process.send_signal(signal.SIGINT)
        assert process.wait(5) == 130


def fault(capsys: pytest.CaptureFixture[str], *words: str | Path) -> str:
    assert main(["serve", *map(str, words)]) == 2
    return capsys.readouterr().err


def test_a_key_that_others_can_read_is_refused(
    models: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    model, key = models / "sft", tmp_path / "key"
    assert "error[E-CONF-SECRET]" in fault(capsys, model, "--api-key-file", key)
    key.write_text(KEY)
    for mode in (0o644, 0o640, 0o601):
        key.chmod(mode)
        assert "chmod 600" in fault(capsys, model, "--api-key-file", key)
    key.chmod(0o600)
    for text in ("", "short", "with a space in the middle", "不是英文字母的很长很长的一个密钥呀"):
        key.write_text(text)
        assert "error[E-CONF-RANGE]" in fault(capsys, model, "--api-key-file", key)
    monkeypatch.setenv("TETRAD_API_KEY", "short")
    assert "error[E-CONF-RANGE] TETRAD_API_KEY" in fault(capsys, model)


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "192.0.2.1", "tetrad.example"])
def test_others_reach_it_with_a_key_only(models: Path, host: str, capsys: pytest.CaptureFixture[str]) -> None:
    text = fault(capsys, models / "sft", "--host", host)
    assert "error[E-CONF-MISSING] --host" in text and "--api-key-file" in text


def test_what_it_is_started_with(
    models: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert "MODEL is missing" in fault(capsys)
    assert "--api-key" in fault(capsys, models / "sft", "--api-key", KEY)  # a key on the command line is seen by all
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = str(other.getsockname()[1])
        assert f"127.0.0.1:{port} can't be listened at" in fault(capsys, models / "sft", "--port", port)
    assert main(["serve", str(models / "reward")]) == 4
    assert "E-CKPT-ROLE" in capsys.readouterr().err
    monkeypatch.setitem(sys.modules, "uvicorn", None)
    assert 'pip install -c constraints.txt -e ".[serve]"' in fault(capsys, models / "sft")


def test_models_are_called_by_their_folders() -> None:
    assert model_ids(["runs/a/sft", "runs/a/ppo/"]) == {"sft": "runs/a/sft", "ppo": "runs/a/ppo/"}
    assert model_ids(["runs/a/ppo", "runs/b/ppo"]) == {"a-ppo": "runs/a/ppo", "b-ppo": "runs/b/ppo"}
    assert model_ids(["org/name"]) == {"name": "org/name"} and model_ids([]) == {}
