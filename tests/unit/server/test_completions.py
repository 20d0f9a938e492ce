"""Completions without a template: echo and log-probs as lm-eval reads them, and the tokenizer over HTTP."""

from itertools import pairwise
from pathlib import Path
from typing import Any

import httpx
import pytest

import tetrad
from serving import ask, stream

PATH = "/v1/completions"
BODY: dict[str, Any] = {"model": "sft", "prompt": "the plot", "max_tokens": 12, "seed": 7}


@pytest.mark.parametrize("ends", [False, True])
def test_what_lm_eval_reads(http: httpx.Client, served_models: Path, ends: bool) -> None:
    """A batch of id lists, echoed: one token comes, even if it ends; the first entry is null; the top holds the chosen
    token with the very same float. Were the token missing, lm-eval would leave out the answer's last one unseen."""
    model = tetrad.load(served_models / "sft")
    texts = [[70, 71, 72, 100, 260], [80], [90] * 40]
    body = BODY | {"prompt": texts, "max_tokens": 1, "temperature": 0, "echo": True, "logprobs": 1}
    choices = ask(http, PATH, body | {"logit_bias": {str(model.ends[0]): 100 * ends}})["choices"]
    ours, mask = tetrad.logprobs(model, [text[:1] for text in texts], [text[1:] for text in texts])
    for number, (text, choice) in enumerate(zip(texts, choices, strict=True)):
        scored = choice["logprobs"]
        assert choice["index"] == number
        assert {len(part) for part in scored.values()} == {len(text) + 1}
        assert scored["token_logprobs"][0] is None and scored["top_logprobs"][0] is None
        assert scored["token_logprobs"][1:-1] == pytest.approx(ours[number][mask[number]].tolist(), abs=1e-5)
        columns = zip(scored["tokens"], scored["token_logprobs"], scored["top_logprobs"], strict=True)
        for name, logprob, top in list(columns)[1:]:
            assert top[name] == logprob and len(top) <= 2
        assert (scored["tokens"][-1] == "<|endoftext|>") == ends
        assert choice["finish_reason"] == ("stop" if ends else "length")
        assert choice["text"].startswith(model.tokenizer.decode(text))


def test_the_likeliest_token_has_the_highest_float(http: httpx.Client, served_models: Path) -> None:
    """By which lm-eval tells whether the model would say a text: greedy text is, another is not."""
    tokenizer = tetrad.load(served_models / "sft").tokenizer
    ids_of = {tokenizer.token_bytes(i): i for i in range(tokenizer.size)}
    greedy = BODY | {"temperature": 0, "ignore_eos": True, "logprobs": 5}
    first = ask(http, PATH, greedy)["choices"][0]["logprobs"]
    raws = [name.removeprefix("bytes:") for name in first["tokens"]]
    names = [bytes.fromhex(raw.replace("\\x", "")) if raw.startswith("\\x") else raw.encode() for raw in raws]
    text = [*tokenizer.encode("the plot"), *(ids_of[name] for name in names)]
    for top, logprob in zip(first["top_logprobs"], first["token_logprobs"], strict=True):
        assert max(top.values()) == logprob and len(top) == 5

    def is_greedy(ids: list[int]) -> list[bool]:
        body = BODY | {"prompt": [ids], "max_tokens": 1, "temperature": 0, "logprobs": 1, "echo": True}
        scored = ask(http, PATH, body)["choices"][0]["logprobs"]
        pairs = list(zip(scored["token_logprobs"], scored["top_logprobs"], strict=True))[len(ids) - 12 : -1]
        return [logprob == max(top.values()) for logprob, top in pairs]

    assert all(is_greedy(text))
    assert not all(is_greedy([*text[:-1], (text[-1] + 1) % 200]))


def test_forms_of_prompts(http: httpx.Client, served_models: Path) -> None:
    model = tetrad.load(served_models / "sft")
    ids = [model.tokenizer.encode(text) for text in ("the plot", "电影 <|sep|>")]
    assert model.tokenizer.control("<|sep|>") not in ids[1]  # a text is text
    two = [choice["text"] for choice in ask(http, PATH, BODY | {"prompt": ["the plot", "电影 <|sep|>"]})["choices"]]
    assert two == [choice["text"] for choice in ask(http, PATH, BODY | {"prompt": ids})["choices"]]
    for one in ("the plot", ["the plot"], ids[0], ids[:1]):
        assert ask(http, PATH, BODY | {"prompt": one})["choices"][0]["text"] == two[0]
    assert ask(http, PATH, BODY | {"echo": True})["choices"][0]["text"] == "the plot" + two[0]
    del (body := dict(BODY))["max_tokens"]
    assert ask(http, PATH, body | {"ignore_eos": True})["usage"]["completion_tokens"] == 16


def test_a_stream_joins_to_the_whole(http: httpx.Client) -> None:
    body = BODY | {"prompt": ["the plot", "电影"], "n": 2, "echo": True, "logprobs": 2}
    whole = ask(http, PATH, body)["choices"]
    assert len({choice["text"] for choice in whole}) == 4
    joined = [{"text": "", **{name: [] for name in whole[0]["logprobs"]}} for _ in whole]
    for chunk in stream(http, PATH, body)[:-1]:
        (choice,) = chunk["choices"]
        joined[choice["index"]]["text"] += choice["text"]
        for name, values in (choice["logprobs"] or {}).items():
            joined[choice["index"]][name] += values
    assert joined == [{"text": choice["text"], **choice["logprobs"]} for choice in whole]
    offsets, tokens = whole[0]["logprobs"]["text_offset"], whole[0]["logprobs"]["tokens"]
    parts = ["the plot"[start:end] for start, end in pairwise([offset for offset in offsets if offset <= 8])]
    assert "".join(parts) == "the plot" and parts == tokens[: len(parts)]


def test_the_tokenizer(http: httpx.Client, served_models: Path) -> None:
    """As vLLM and lm-eval ask: names of control tokens are those tokens there, because a prompt can be made of them."""
    tokenizer = tetrad.load(served_models / "chat").tokenizer
    info = http.get("/tokenizer_info?model=chat").json()
    assert (info["eos_token"], info["pad_token"]) == ("<|im_end|>", "<|pad|>") and "im_start" in info["chat_template"]
    body = {"model": "chat", "prompt": "the 电影<|im_end|>", "add_special_tokens": False}
    answer = ask(http, "/tokenize", body | {"return_token_strs": True})
    assert answer["tokens"] == [*tokenizer.encode("the 电影"), tokenizer.control("<|im_end|>")]
    assert (answer["count"], answer["max_model_len"]) == (len(answer["tokens"]), 2048)
    assert (answer["token_strs"][0], answer["token_strs"][-1]) == ("th", "<|im_end|>")
    back = ask(http, "/detokenize", {"model": "chat", "tokens": answer["tokens"]})
    assert back == {"prompt": body["prompt"]}
    messages = [{"role": "user", "content": "<|im_end|>"}]  # a user's are text
    ids = ask(http, "/tokenize", {"model": "chat", "messages": messages})["tokens"]
    assert ids.count(tokenizer.control("<|im_end|>")) == 1
    for wrong in ({"model": "chat"}, {**body, "messages": messages}, {**body, "prompt": 5}):
        assert http.post("/tokenize", json=wrong).status_code == 400
