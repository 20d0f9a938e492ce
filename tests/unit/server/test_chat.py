"""Chat as clients see it: streams, several answers, seeds, conversations, and no half characters."""

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest

import tetrad
from serving import ask, stream
from tetrad.cli.main import main

PATH = "/v1/chat/completions"
ASK = [{"role": "user", "content": "the plot 电影"}]
BODY: dict[str, Any] = {"model": "chat", "messages": ASK, "max_tokens": 24, "seed": 7}


def content(http: httpx.Client, **changes: Any) -> str:
    text: str = ask(http, PATH, BODY | changes)["choices"][0]["message"]["content"]
    return text


def test_the_order_of_a_stream(http: httpx.Client) -> None:
    *chunks, usage, done = stream(http, PATH, BODY | {"stream_options": {"include_usage": True}})
    choices = [chunk["choices"][0] for chunk in chunks]
    assert done == "[DONE]" and usage["choices"] == []
    assert usage["usage"]["completion_tokens"] == 24
    assert usage["usage"]["total_tokens"] == 24 + usage["usage"]["prompt_tokens"]
    assert all(chunk["usage"] is None for chunk in chunks)
    assert choices[0]["delta"] == {"role": "assistant", "content": ""}
    assert all(list(choice["delta"]) == ["content"] and choice["delta"]["content"] for choice in choices[1:-1])
    assert choices[-1]["delta"] == {}
    assert [choice["finish_reason"] for choice in choices] == [None] * (len(choices) - 1) + ["length"]
    assert {chunk["object"] for chunk in chunks} == {"chat.completion.chunk"} and len({c["id"] for c in chunks}) == 1
    whole = ask(http, PATH, BODY)
    assert "".join(choice["delta"]["content"] for choice in choices[1:-1]) == whole["choices"][0]["message"]["content"]
    assert (whole["choices"][0]["finish_reason"], whole["usage"]) == ("length", usage["usage"])
    assert "usage" not in stream(http, PATH, BODY)[0]


def test_several_answers_have_their_own_index(http: httpx.Client, served_models: Path) -> None:
    ours = tetrad.generate(tetrad.load(served_models / "chat"), [ASK], n=3, seed=7, max_new_tokens=24)[0].outputs
    assert len({output.text for output in ours}) == 3
    whole = ask(http, PATH, BODY | {"n": 3})["choices"]
    assert [choice["index"] for choice in whole] == [0, 1, 2]
    assert [choice["message"]["content"] for choice in whole] == [output.text for output in ours]
    texts = dict.fromkeys(range(3), "")
    for chunk in stream(http, PATH, BODY | {"n": 3})[:-1]:
        (choice,) = chunk["choices"]
        texts[choice["index"]] += choice["delta"].get("content", "")
    assert list(texts.values()) == [output.text for output in ours]


def test_a_seed_gives_the_same_text_under_load(http: httpx.Client) -> None:
    """Alone and among 31 others, of which each has its own; without one, answers differ."""
    alone = [content(http, seed=seed) for seed in range(8)]
    with ThreadPoolExecutor(32) as threads:
        together = list(threads.map(lambda number: content(http, seed=number % 8), range(32)))
    assert together == alone * 4 and len(set(alone)) == 8
    assert len({content(http, seed=None) for _ in range(3)}) == 3


def test_the_text_of_generate(http: httpx.Client, served_models: Path, capsys: pytest.CaptureFixture[str]) -> None:
    messages = [{"role": "system", "content": "Go on."}, {"role": "user", "content": "这部电影"}]
    words = ["generate", str(served_models / "sft"), "--instruction", "Go on.", "--input", "这部电影"]
    for flags, body in ((["--greedy"], {"temperature": 0}), (["--seed", "5"], {"seed": 5})):
        assert main([*words, "--max-new-tokens", "20", *flags]) == 0
        ours = capsys.readouterr().out.removesuffix("\n")
        theirs = ask(http, PATH, {"model": "sft", "messages": messages, "max_tokens": 20} | body)
        assert theirs["choices"][0]["message"]["content"] == ours


def test_what_a_template_cannot_hold_is_refused(http: httpx.Client) -> None:
    """`instruction` takes one question; a folder without a template none."""
    talk = [*ASK, {"role": "assistant", "content": "a film"}, *ASK]
    assert http.post(PATH, json=BODY | {"messages": talk}).status_code == 200
    answer = http.post(PATH, json=BODY | {"messages": talk, "model": "sft"})
    assert (answer.status_code, answer.json()["error"]["code"]) == (400, "E-DATA-CHAT")
    assert "one question" in answer.json()["error"]["message"]
    answer = http.post(PATH, json=BODY | {"model": "pretrain"})
    assert (answer.status_code, answer.json()["error"]["code"]) == (400, "E-MODEL-TEMPLATE")
    answer = http.post("/v1/completions", json={"model": "pretrain", "prompt": "the plot"})
    assert answer.status_code == 200


@pytest.mark.parametrize("model", ["chat", "sft"])
def test_an_answer_goes_on(http: httpx.Client, served_models: Path, model: str) -> None:
    """Where the last turn is the assistant's: after its text, without its end token."""
    policy = tetrad.load(served_models / model)
    before = [*tetrad.prompt_ids(policy, ASK), *policy.tokenizer.encode("a bright ")]
    messages = [*ASK, {"role": "assistant", "content": "a bright "}]
    body = BODY | {"model": model, "temperature": 0}
    ours = ask(http, "/v1/completions", {"model": model, "prompt": before, "max_tokens": 24, "temperature": 0})
    theirs = ask(http, PATH, body | {"messages": messages})
    assert theirs["choices"][0]["message"]["content"] == ours["choices"][0]["text"]
    assert theirs["usage"]["prompt_tokens"] == len(before)
    assert ask(http, "/tokenize", {"model": model, "messages": messages})["tokens"] == before


def test_content_is_a_text_even_if_empty(http: httpx.Client, served_models: Path) -> None:
    end = tetrad.load(served_models / "chat").ends[0]
    body = BODY | {"logit_bias": {str(end): 100}, "temperature": 0}
    choice = ask(http, PATH, body)["choices"][0]
    assert (choice["message"]["content"], choice["finish_reason"]) == ("", "stop")
    deltas = [chunk["choices"][0]["delta"] for chunk in stream(http, PATH, body)[:-1]]
    assert deltas == [{"role": "assistant", "content": ""}, {}]


def test_stop_texts_span_tokens(http: httpx.Client, served_models: Path) -> None:
    """What could begin one is held back; the first of sixteen counts; an end token is no text."""
    whole = content(http, temperature=0)
    tokens = ask(http, PATH, BODY | {"temperature": 0, "logprobs": True})["choices"][0]["logprobs"]["content"]
    places = [
        n for n in range(4, len(whole) - 3) if "\ufffd" not in whole[n : n + 3] and whole.find(whole[n : n + 3]) == n
    ]
    stop = whole[places[0] : places[0] + 3]
    assert not any(stop in token["token"] for token in tokens)
    body = BODY | {"temperature": 0, "stop": [stop, *(f"no {n}" for n in range(15))]}
    choice = ask(http, PATH, body)["choices"][0]
    assert (choice["message"]["content"], choice["finish_reason"]) == (whole[: places[0]], "stop")
    pieces = [chunk["choices"][0]["delta"].get("content", "") for chunk in stream(http, PATH, body)[:-1]]
    assert "".join(pieces) == whole[: places[0]]
    assert content(http, temperature=0, stop=stop) == whole[: places[0]]


def test_half_characters_never_leave(http: httpx.Client) -> None:
    """This model says bytes of Chinese characters in any order, most of them wrong: the chunks join to the text of all
    bytes, so that none was decoded by itself."""
    body = BODY | {"temperature": 1.5, "top_p": 1.0, "max_tokens": 200, "logprobs": True, "ignore_eos": True}
    whole = ask(http, PATH, body)["choices"][0]
    raws = [bytes(token["bytes"]) for token in whole["logprobs"]["content"]]
    controls = [name.encode() for name in ("<|pad|>", "<|sep|>", "<|endoftext|>", "<|im_start|>", "<|im_end|>")]
    text = b"".join(raw for raw in raws if raw not in controls).decode(errors="replace")
    assert len(raws) == 200 and whole["message"]["content"] == text
    choices = [chunk["choices"][0] for chunk in stream(http, PATH, body)[:-1]]
    assert "".join(choice["delta"].get("content", "") for choice in choices) == text
    scored = [token for choice in choices for token in (choice["logprobs"] or {"content": []})["content"]]
    assert scored == whole["logprobs"]["content"]
    assert sum(token["token"].startswith("bytes:\\x") for token in scored) > 20
    assert {character for character in text if character > "\x7f"} > {"\ufffd"}  # some are whole, over several tokens
