"""A field is obeyed, or refused with 400 that names it; ignored is only what a list says."""

import json
from pathlib import Path
from typing import Any

import httpx
import pytest

import tetrad
from serving import ask

TALK, TEXT = "/v1/chat/completions", "/v1/completions"
ASK = [{"role": "user", "content": "the plot 电影"}]
BODIES: dict[str, dict[str, Any]] = {
    TALK: {"model": "chat", "messages": ASK, "max_tokens": 24, "seed": 7},
    TEXT: {"model": "sft", "prompt": "the plot", "max_tokens": 12, "seed": 7},
}
REFUSED: list[tuple[str, dict[str, Any], str]] = [
    (TALK, {"n": 0}, "n"),
    (TALK, {"n": 1_000_000}, "n"),
    (TALK, {"n": True}, "n"),
    (TALK, {"max_tokens": 0}, "max_tokens"),
    (TALK, {"max_tokens": -1}, "max_tokens"),
    (TALK, {"max_tokens": 1.5}, "max_tokens"),
    (TALK, {"max_tokens": "5"}, "max_tokens"),
    (TALK, {"max_tokens": 5, "max_completion_tokens": 6}, "max_completion_tokens"),
    (TALK, {"temperature": -0.1}, "temperature"),
    (TALK, {"temperature": "hot"}, "temperature"),
    (TALK, {"top_p": 1.1}, "top_p"),
    (TALK, {"seed": -1}, "seed"),
    (TALK, {"seed": 1.5}, "seed"),
    (TALK, {"stop": ["x"] * 17}, "stop"),
    (TALK, {"stop": ["x" * 257]}, "stop"),
    (TALK, {"stop": ""}, "stop"),
    (TALK, {"stop": [1]}, "stop"),
    (TALK, {"presence_penalty": 3}, "presence_penalty"),
    (TALK, {"logit_bias": {"a": 1}}, "logit_bias"),
    (TALK, {"logit_bias": {"3": 101}}, "logit_bias.3"),
    (TALK, {"logit_bias": {"99999": 1}}, "logit_bias"),
    (TALK, {"logprobs": 1}, "logprobs"),
    (TALK, {"logprobs": True, "top_logprobs": 21}, "top_logprobs"),
    (TALK, {"top_logprobs": 2}, "top_logprobs"),
    (TALK, {"tools": [{}]}, "tools"),
    (TALK, {"response_format": {"type": "json_object"}}, "response_format"),
    (TALK, {"chat_template": "{{ x }}"}, "chat_template"),
    (TALK, {"chat_template_kwargs": {}}, "chat_template_kwargs"),
    (TALK, {"extra_body": {}}, "extra_body"),
    (TALK, {"stream_options": {"x": 1}, "stream": True}, "stream_options.x"),
    (TALK, {"prompt": "a"}, "prompt"),
    (TALK, {"messages": []}, "messages"),
    (TALK, {"messages": "hello"}, "messages"),
    (TALK, {"messages": [{"role": "tool", "content": "a"}]}, "messages.0.role"),
    (TALK, {"messages": [{"role": "user", "content": None}]}, "messages.0.content"),
    (TALK, {"messages": [{"role": "user", "content": "a", "name": "kim"}]}, "messages.0.name"),
    (TALK, {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}]}, "messages.0"),
    (TALK, {"messages": [*ASK, *ASK]}, "messages"),
    (TALK, {"messages": [*ASK, {"role": "system", "content": "a"}]}, "messages"),
    (TEXT, {"suffix": "x"}, "suffix"),
    (TEXT, {"best_of": 2}, "best_of"),
    (TEXT, {"prompt": []}, "prompt"),
    (TEXT, {"prompt": [True]}, "prompt"),
    (TEXT, {"prompt": [[1], "a", 3]}, "prompt"),
    (TEXT, {"prompt": [-1]}, "prompt"),
    (TEXT, {"prompt": [300]}, "prompt"),
    (TEXT, {"prompt": ""}, "prompt"),
    (TEXT, {"prompt": ["a"] * 129}, "prompt"),
    (TEXT, {"prompt_embeds": "x"}, "prompt_embeds"),
    (TEXT, {"logprobs": True}, "logprobs"),
    (TEXT, {"max_completion_tokens": 5}, "max_completion_tokens"),
]
IGNORED: list[dict[str, Any]] = [
    {"user": "kim", "store": True, "metadata": {"a": "b"}},
    {"tools": [], "tool_choice": "none", "response_format": {"type": "text"}, "parallel_tool_calls": True},
    {"presence_penalty": 0, "frequency_penalty": 0.0, "n": 1, "logit_bias": {}, "top_logprobs": 0},
    {"stream_options": {"include_usage": True}},
    dict.fromkeys(("stop", "tools", "logprobs", "top_p", "nobody_knows", "functions", "top_logprobs", "n")),
    {"messages": [{**ASK[0], "name": None, "tool_calls": [], "refusal": None}]},
    {"messages": [{"role": "user", "content": [{"type": "text", "text": ASK[0]["content"]}]}]},
    {"max_tokens": None, "max_completion_tokens": 24},
]


def names(change: Any) -> str:
    return str(change)[:40]


@pytest.mark.parametrize(("path", "change", "name"), REFUSED, ids=names)
def test_refused_by_name(http: httpx.Client, path: str, change: dict[str, Any], name: str) -> None:
    answer = http.post(path, json=BODIES[path] | change)
    assert answer.status_code == 400, answer.text
    error = answer.json()["error"]
    assert error.keys() == {"message", "type", "param", "code"} and error["type"] == "invalid_request_error"
    assert error["param"] == name, error


@pytest.mark.parametrize("body", [{"messages": [{"role": "user", "content": "\ud800"}]}, {"stop": "\ud800"}], ids=names)
def test_half_of_a_pair_is_no_text(http: httpx.Client, body: dict[str, Any]) -> None:
    text = json.dumps(BODIES[TALK] | body).encode()
    assert http.post(TALK, content=text, headers={"Content-Type": "application/json"}).status_code == 400


@pytest.mark.parametrize("change", IGNORED, ids=names)
def test_what_asks_for_nothing_changes_nothing(http: httpx.Client, change: dict[str, Any]) -> None:
    assert ask(http, TALK, BODIES[TALK] | change)["choices"] == ask(http, TALK, BODIES[TALK])["choices"]


def test_each_sampling_field_is_obeyed(http: httpx.Client, served_models: Path) -> None:
    """As `tetrad.generate` obeys it, whose default is taken for what is not given."""

    def text(**changes: Any) -> str:
        found: str = ask(http, TALK, BODIES[TALK] | changes)["choices"][0]["message"]["content"]
        return found

    model = tetrad.load(served_models / "chat")
    changes = [
        {"temperature": 1.5, "top_p": 1.0},
        {"top_p": 0.3},
        {"top_k": 2},
        {"min_p": 0.5},
        {"presence_penalty": 1.5, "temperature": 0.2},
        {"frequency_penalty": 1.5, "temperature": 0.2},
        {"repetition_penalty": 1.5},
        {"seed": 8},
    ]
    texts = [text(**change) for change in changes]
    given: dict[str, Any] = {"max_new_tokens": 24, "seed": 7}
    assert texts == [tetrad.generate(model, [ASK], **(given | change))[0] for change in changes]
    greedy = tetrad.generate(model, [ASK], max_new_tokens=24, greedy=True)[0]
    assert len({text(), greedy, *texts}) == len(changes) + 2
    for cold in ({"temperature": 0}, {"temperature": 1e-12}, {"top_k": 1}, {"min_p": 1}, {"top_p": 0}):
        assert text(**cold) == greedy
    body = BODIES[TEXT] | {"logit_bias": {"70": 100}, "temperature": 0, "logprobs": 0}
    assert set(ask(http, TEXT, body)["choices"][0]["logprobs"]["tokens"]) == {model.tokenizer.decode([70])}
    long = ask(http, TALK, BODIES[TALK] | {"ignore_eos": True, "max_tokens": 300})
    assert long["usage"]["completion_tokens"] == 300


@pytest.mark.parametrize(("count", "new"), [(96, None), (90, 7), (1, 10**9)])
def test_too_long_is_refused_with_both_numbers(http: httpx.Client, count: int, new: int | None) -> None:
    answer = http.post(TEXT, json={"model": "sft", "prompt": [70] * count, "max_tokens": new})
    error = answer.json()["error"]
    assert (answer.status_code, error["code"]) == (400, "context_length_exceeded")
    assert "96 tokens" in error["message"] and f"has {count} " in error["message"]


def test_what_is_left_of_the_context_is_the_most(http: httpx.Client) -> None:
    assert ask(http, TEXT, {"model": "sft", "prompt": [70] * 95, "ignore_eos": True})["usage"]["completion_tokens"] == 1
    body = {"model": "sft", "messages": [{"role": "user", "content": "a"}], "ignore_eos": True}
    assert ask(http, TALK, body)["usage"]["total_tokens"] == 96


@pytest.mark.parametrize("name", ["other", "../../etc", "org/name", "x" * 100_000], ids=names)
def test_no_other_model_is_loaded(http: httpx.Client, name: str) -> None:
    answer = http.post(TALK, json=BODIES[TALK] | {"model": name})
    assert (answer.status_code, answer.json()["error"]["code"]) == (404, "model_not_found")
    assert len(answer.text) < 500
    assert http.post(TALK, json=BODIES[TALK] | {"model": ""}).status_code == 400  # there are several


def test_models_are_listed(http: httpx.Client) -> None:
    for path in ("/v1/models", "/models"):
        assert [model["id"] for model in http.get(path).json()["data"]] == ["chat", "sft", "pretrain"]
    assert http.get("/v1/models/sft").json()["max_model_len"] == 96
    assert http.get("/v1/models/none").status_code == 404


ODD = [
    "a" * 900_000,
    "e" + "\u0301" * 100_000,
    "z\u0335\u0321\u031b" * 20_000,
    "👩\u200d" * 20_000,
    "\u202e\u2066" * 30_000,
]


@pytest.mark.parametrize("text", ODD, ids=["letters", "marks", "zalgo", "joiners", "directions"])
def test_adversarial_text_is_tokenised_or_too_long(http: httpx.Client, text: str) -> None:
    count = ask(http, "/tokenize", {"model": "chat", "prompt": text})["count"]
    assert count > 1000
    answer = http.post(TALK, json=BODIES[TALK] | {"messages": [{"role": "user", "content": text}]})
    assert answer.status_code == 400 and answer.json()["error"]["code"] == "context_length_exceeded"
