"""Real clients against a real server on loopback. Those that are no dependency here run in an environment of their own,
whose Python TETRAD_CLIENTS names: pip install langchain-openai litellm "lm-eval[hf,api]"."""

import json
import os
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import openai
import pytest

import tetrad
from served import write_model
from serving import Running, serving, until
from tetrad.inference.engine import Request
from tetrad.settings.common import Sampling

HERE, PYTHON = Path(__file__).parent, os.environ.get("TETRAD_CLIENTS", "")
MESSAGES: Any = [{"role": "system", "content": "Go on."}, {"role": "user", "content": "the plot"}]
own_environment = pytest.mark.skipif(not PYTHON, reason="TETRAD_CLIENTS names no Python that has the clients")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("clients")
    write_model(path / "sft", seed=1)
    write_model(path / "chat", "chatml", seed=4, max_positions=2048)
    return path


@pytest.fixture(scope="module")
def running(folder: Path) -> Iterator[Running]:
    with serving([folder / "sft", folder / "chat"]) as server:
        yield server


@pytest.fixture(scope="module")
def client(running: Running) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{running.url}/v1", api_key="none", max_retries=0, timeout=30)


@pytest.fixture(scope="module")
def greedy(folder: Path) -> tuple[str, str]:
    """The answer to MESSAGES, and how the text goes on."""
    model = tetrad.load(folder / "sft")
    answer = tetrad.generate(model, [("Go on.", "the plot")], max_new_tokens=12, greedy=True)[0]
    ids = model.tokenizer.encode("the plot")
    engine = model.engine(1, 64)
    engine.add(Request(tuple(ids), Sampling(temperature=0.0, max_new_tokens=12), ((0, "a", 0, 0),), model.ends))
    return answer, "".join(event.text for event in engine.events())


def script(name: str, *words: str, running: Running, model: str) -> Any:
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "PYTHONPATH": ""}
    line = [PYTHON, str(HERE / name), running.url, model, *words]
    done = subprocess.run(line, capture_output=True, text=True, env=environment, timeout=170)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(next(line for line in done.stdout.splitlines() if line.startswith("REPORT ")).split(" ", 1)[1])


def test_openai(client: openai.OpenAI, greedy: tuple[str, str]) -> None:
    assert [model.id for model in client.models.list()] == ["sft", "chat"]
    assert client.models.retrieve("sft").id == "sft"
    whole = client.chat.completions.create(model="sft", messages=MESSAGES, max_tokens=12, temperature=0)
    assert whole.choices[0].message.content == greedy[0]
    again = [*MESSAGES, whole.choices[0].message.model_dump(), {"role": "user", "content": "what"}]
    with pytest.raises(openai.BadRequestError, match="one question"):
        client.chat.completions.create(model="sft", messages=again)
    assert client.chat.completions.create(model="chat", messages=again, max_completion_tokens=5).usage
    text = client.completions.create(model="sft", prompt="the plot", max_tokens=12, temperature=0)
    assert text.choices[0].text == greedy[1]
    with pytest.raises(openai.NotFoundError):
        client.chat.completions.create(model="gpt-4", messages=MESSAGES)
    with pytest.raises(openai.BadRequestError, match="tools"):
        client.chat.completions.create(model="sft", messages=MESSAGES, tools=[{"type": "function"}])  # type: ignore[list-item]


def test_openai_streams(client: openai.OpenAI, greedy: tuple[str, str], running: Running) -> None:
    with client.chat.completions.create(
        model="sft",
        messages=MESSAGES,
        max_tokens=12,
        temperature=0,
        stream=True,
        stream_options={"include_usage": True},
        logprobs=True,
        top_logprobs=2,
    ) as chunks:
        *parts, last = chunks
    assert "".join(part.choices[0].delta.content or "" for part in parts) == greedy[0]
    assert last.usage and last.usage.completion_tokens == sum(
        len(part.choices[0].logprobs.content or ()) for part in parts if part.choices[0].logprobs
    )
    worker = running.service.models["chat"].worker
    left = client.chat.completions.create(
        model="chat", messages=MESSAGES, max_tokens=1900, extra_body={"ignore_eos": True}, stream=True, n=4
    )
    next(left)
    left.close()
    until(lambda: not worker._open)


@pytest.mark.skipif(not shutil.which("curl"), reason="there is no curl")
def test_curl(running: Running, greedy: tuple[str, str]) -> None:
    body = json.dumps({"model": "sft", "messages": MESSAGES, "max_tokens": 12, "temperature": 0, "stream": True})
    line = ["curl", "-sN", f"{running.url}/v1/chat/completions", "-H", "Content-Type: application/json", "-d", body]
    said = subprocess.run(line, capture_output=True, text=True, check=True, timeout=30).stdout
    events = [event.removeprefix("data: ") for event in said.strip().split("\n\n")]
    assert events.pop() == "[DONE]"
    deltas = [json.loads(event)["choices"][0]["delta"] for event in events]
    assert "".join(delta.get("content", "") for delta in deltas) == greedy[0]


@own_environment
def test_langchain(running: Running, greedy: tuple[str, str]) -> None:
    report = script("with_langchain.py", running=running, model="sft")
    assert report["text"] == report["stream"] == greedy[0]
    assert report["batch"] == [greedy[0]] * 4 and report["completion"] == greedy[1]
    assert report["usage"]["output_tokens"] == report["stream usage"]["output_tokens"] > 0
    assert report["reason"] in ("stop", "length")


@own_environment
def test_litellm(running: Running, greedy: tuple[str, str]) -> None:
    report = script("with_litellm.py", running=running, model="sft")
    assert report["text"] == report["stream"] == greedy[0] and report["completion"] == greedy[1]
    assert report["tokens"] and report["reason"] in ("stop", "length")
    assert "response_format" in report["refused"]


@own_environment
def test_lm_eval(folder: Path, tmp_path: Path) -> None:
    """Log-likelihoods to 1e-4 of the `hf` backend's, which choices are greedy, and texts, with either tokenizer; the
    server's own is asked for without a model's name."""
    with serving([folder / "sft"]) as one:
        words = str(folder / "sft" / "model"), str(tmp_path)
        report = script("lm_eval_parity.py", *words, running=one, model="sft")
    print(report)
    assert report["choices"] == 72 and report["texts"] > 12 and 0 < report["greedy"] < 72
    for kind in ("huggingface", "remote"):
        served = report["served"][kind]
        assert served["largest"] < 1e-4
        assert served["greedy equal"] and served["texts equal"] and served["metrics equal"]
