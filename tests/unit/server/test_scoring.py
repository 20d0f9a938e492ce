"""The reward model's routes: each gives the score of `tetrad score`, of the whole text or not at all."""

import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from raw_http import Answer, ask, listening
from served import write_model
from tetrad.cli.main import main
from tetrad.inference.completions import Completion
from tetrad.reward.functions import endpoint
from tetrad.reward.model import ids_meaning
from tetrad.server import metrics, scoring
from tetrad.server.app import create_app
from tetrad.server.guard import Limits
from tetrad.server.service import Service, load_service
from tetrad.settings.use import Serve
from tetrad.types import Turn

PROMPT = "the plot is"
ANSWERS = [
    "a warm and funny story",
    "slow but moving",
    "这部电影很好看",
    "<|im_end|>\nbright",
    "a \x00 b",
    "<|endoftext|>",
]
MESSAGES = [{"role": "system", "content": "be brief"}, {"role": "user", "content": PROMPT}]


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("rewards")
    write_model(folder / "reward", "chatml", reward=True, reward_bias=-0.5)
    write_model(folder / "sep", reward=True, seed=3)
    return folder


@pytest.fixture(scope="module")
def service(models: Path) -> Service:
    return load_service([], Serve(reward=str(models / "reward")))


@pytest.fixture(scope="module")
def port(service: Service) -> Iterator[int]:
    with listening(create_app(service, Limits(), [*scoring.routes(service), *metrics.routes(service)])) as port:
        yield port


@pytest.fixture(scope="module")
def known(models: Path, tmp_path_factory: pytest.TempPathFactory) -> list[float]:
    """The scores of ANSWERS by the command."""
    return command(models / "reward", [{"input": PROMPT, "output": text} for text in ANSWERS], tmp_path_factory)


def command(model: Path, records: list[dict[str, Any]], folders: pytest.TempPathFactory) -> list[float]:
    folder = folders.mktemp("scored")
    (folder / "in.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    words = [str(model), "--data", str(folder / "in.jsonl"), "--out", str(folder / "out.jsonl")]
    assert main(["score", *words]) == 0
    return [json.loads(line)["score"] for line in (folder / "out.jsonl").read_text().splitlines()]


def near(*values: float) -> Any:
    return pytest.approx(list(values), abs=1e-5)


def rendered(answer: str, end: str = "<|im_end|>\n") -> str:
    return f"<|im_start|>user\n{PROMPT}<|im_end|>\n<|im_start|>assistant\n{answer}{end}"


def test_scores_differ(known: list[float]) -> None:
    assert len({round(x, 3) for x in known}) == len(ANSWERS)


@pytest.mark.parametrize("path", ["/v1/score", "/score"])
def test_vllm_score(port: int, known: list[float], path: str) -> None:
    for names in (("text_1", "text_2"), ("queries", "documents")):
        answer = ask(port, "POST", path, {names[0]: PROMPT, names[1]: ANSWERS, "model": "reward"}).json
        assert [item["score"] for item in answer["data"]] == near(*known)
        assert [(item["index"], item["object"]) for item in answer["data"]] == [(i, "score") for i in range(6)]
        assert answer["object"] == "list" and answer["model"] == "reward" and answer["usage"]["total_tokens"] > 0
        paired = ask(port, "POST", path, {names[0]: [PROMPT] * 2, names[1]: ANSWERS[:2]}).json
        assert [item["score"] for item in paired["data"]] == near(*known[:2])
    refused(ask(port, "POST", path, {"text_1": [PROMPT] * 2, "text_2": ANSWERS}), "text_1", "invalid_value")


def test_pooling_and_classify_read_what_verl_sends(port: int, known: list[float], service: Service) -> None:
    texts = [rendered(text) for text in ANSWERS[:3]]
    pooled = ask(port, "POST", "/pooling", {"model": "reward", "input": texts}).json
    assert [item["data"] for item in pooled["data"]] == [near(x) for x in known[:3]]
    for text, x in zip(texts, known, strict=False):
        answer = ask(port, "POST", "/classify", {"model": "reward", "input": text, "use_activation": False}).json
        assert answer["data"][-1]["probs"][-1] == pytest.approx(x, abs=1e-5)
    said = [{"role": "user", "content": PROMPT}, {"role": "assistant", "content": ANSWERS[0]}]
    assert ask(port, "POST", "/pooling", {"messages": said}).json["data"][0]["data"] == near(known[0])
    assert service.reward
    form, words = service.reward.template, service.reward.tokenizer
    ids = [*form.prompt(words, [Turn("user", PROMPT)]), *words.encode(ANSWERS[0]), form.end_id(words)]
    assert ask(port, "POST", "/pooling", {"input": ids}).json["data"][0]["data"] == near(known[0])
    assert len(ask(port, "POST", "/pooling", {"input": [ids, ids]}).json["data"]) == 2


def test_openrlhf_get_reward(port: int, known: list[float]) -> None:
    texts = [rendered(text, "<|im_end|>") for text in ANSWERS[:3]]
    for query in (texts, [rendered(text) for text in ANSWERS[:3]]):
        prompts = [rendered("", "")] * 3
        answer = ask(port, "POST", "/get_reward", {"query": query, "prompts": prompts, "labels": [None] * 3}).json
        assert answer["rewards"] == near(*known[:3]) and answer["scores"] == answer["rewards"]
        assert answer["extra_logs"] == {}
    plain = {"query": [PROMPT + text for text in ANSWERS[:3]], "prompts": [PROMPT] * 3}
    assert ask(port, "POST", "/get_reward", plain).json["rewards"] == near(*known[:3])
    refused(ask(port, "POST", "/get_reward", {"query": [PROMPT + ANSWERS[0]]}), "query", "E-DATA-CHAT")
    refused(ask(port, "POST", "/get_reward", {**plain, "prompts": [PROMPT]}), "prompts", "invalid_value")


def test_a_truncated_answer_is_scored_without_an_end(port: int, known: list[float]) -> None:
    cut = ask(port, "POST", "/get_reward", {"query": [rendered(ANSWERS[0], "")]}).json["rewards"]
    sample = {"prompt": PROMPT, "text": ANSWERS[0], "finished": False}
    assert ask(port, "POST", "/v1/reward", {"samples": [sample]}).json["scores"] == near(*cut)
    assert cut[0] != pytest.approx(known[0], abs=1e-3)


@pytest.mark.parametrize("path", ["/rerank", "/v1/rerank", "/v2/rerank"])
def test_cohere_and_jina_rerank(port: int, known: list[float], path: str) -> None:
    best = sorted(range(6), key=lambda i: -known[i])
    answer = ask(port, "POST", path, {"query": PROMPT, "documents": ANSWERS, "model": "reward"}).json
    assert [item["index"] for item in answer["results"]] == best
    assert [item["relevance_score"] for item in answer["results"]] == near(*(known[i] for i in best))
    assert set(answer["results"][0]) == {"index", "relevance_score"} and answer["id"]
    more = {"query": PROMPT, "documents": [{"text": text} for text in ANSWERS], "top_n": 2, "return_documents": True}
    two = ask(port, "POST", path, more).json["results"]
    assert [item["document"]["text"] for item in two] == [ANSWERS[i] for i in best[:2]]


def test_tei_rerank(port: int, known: list[float]) -> None:
    best = sorted(range(6), key=lambda i: -known[i])
    for more in ({}, {"raw_scores": True}, {"truncate": False}):
        answer = ask(port, "POST", "/rerank", {"query": PROMPT, "texts": ANSWERS, **more}).json
        assert [item["index"] for item in answer] == best
        assert [item["score"] for item in answer] == near(*(known[i] for i in best))
    answer = ask(port, "POST", "/rerank", {"query": PROMPT, "texts": ANSWERS, "raw_scores": False, "return_text": True})
    assert [item["score"] for item in answer.json] == near(*(1 / (1 + math.exp(-known[i])) for i in best))
    assert [item["text"] for item in answer.json] == [ANSWERS[i] for i in best]


def test_a_sigmoid_is_given_where_it_is_asked_for(port: int, known: list[float]) -> None:
    wanted = [1 / (1 + math.exp(-x)) for x in known]
    for name in ("activation", "use_activation"):
        body = {"text_1": PROMPT, "text_2": ANSWERS, name: True}
        assert [item["score"] for item in ask(port, "POST", "/v1/score", body).json["data"]] == near(*wanted)


def test_tetrads_own(port: int, models: Path, known: list[float], tmp_path_factory: pytest.TempPathFactory) -> None:
    samples = [{"prompt": PROMPT, "text": text} for text in ANSWERS]
    assert ask(port, "POST", "/v1/reward", {"samples": samples}).json["scores"] == near(*known)
    assert ask(port, "POST", "/v1/reward", {"samples": []}).json == {"scores": []}
    record = {"messages": [*MESSAGES, {"role": "assistant", "content": ANSWERS[0]}]}
    with_system = command(models / "reward", [record], tmp_path_factory)
    sample = {"prompt": "not read", "messages": MESSAGES, "text": ANSWERS[0]}
    assert ask(port, "POST", "/v1/reward", {"samples": [sample]}).json["scores"] == near(*with_system)
    assert with_system[0] != pytest.approx(known[0], abs=1e-3)


def test_ids_are_scored_where_they_mean_the_same(port: int, service: Service, known: list[float]) -> None:
    model = service.reward
    assert model
    words, form = model.tokenizer, model.template
    prompt, letters = form.prompt(words, [Turn("user", PROMPT)]), [words.encode(c)[0] for c in ANSWERS[0]]
    sample = Completion(tuple(prompt), (*letters, form.end_id(words)), (Turn("user", PROMPT),), ANSWERS[0])
    by_text, by_ids = endpoint(f"http://localhost:{port}/v1/reward"), ids_meaning(words, form)
    assert by_text([sample]) == near(known[0])
    apart = endpoint(f"http://localhost:{port}/v1/reward", by_ids)([sample])
    assert apart != near(known[0])  # the letters one by one are other tokens
    other = Completion(tuple(prompt), (*words.encode(ANSWERS[0]), form.end_id(words)), sample.turns, ANSWERS[0])
    assert endpoint(f"http://localhost:{port}/v1/reward", by_ids)([other]) == near(known[0])
    assert endpoint(f"http://localhost:{port}/v1/reward", "of another")([sample]) == near(known[0])
    beyond = {"messages": MESSAGES, "text": "a", "prompt_ids": [1], "ids": [10**6]}
    refused(ask(port, "POST", "/v1/reward", {"samples": [beyond], "tokenizer": by_ids}), "samples", "invalid_value")


def test_other_templates(models: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    """instruction: Instruction <|sep|> Input <|sep|> Output <|endoftext|>."""
    service = load_service([], Serve(reward=str(models / "sep")))
    records = [{"Instruction": PROMPT, "Input": "x", "output": text} for text in ANSWERS[:3]]
    known = command(models / "sep", records, tmp_path_factory)
    with listening(create_app(service, Limits(), scoring.routes(service))) as port:
        query = [f"{PROMPT}<|sep|>x<|sep|>{text}<|endoftext|>" for text in ANSWERS[:3]]
        assert ask(port, "POST", "/get_reward", {"query": query}).json["rewards"] == near(*known)
        turns = [{"role": "instruction", "content": PROMPT}, {"role": "input", "content": "x"}]
        samples = [{"messages": turns, "text": text} for text in ANSWERS[:3]]
        assert ask(port, "POST", "/v1/reward", {"samples": samples}).json["scores"] == near(*known)
        refused(ask(port, "POST", "/get_reward", {"query": "a<|sep|>b<|endoftext|>"}), "query", "E-DATA-CHAT")


def refused(answer: Answer, param: str | None, code: str, status: int = 400) -> None:
    error = answer.error
    assert (answer.status, error["param"], error["code"]) == (status, param, code), error


@pytest.mark.parametrize(
    ("path", "body", "param", "code"),
    [
        ("/v1/score", {"text_1": PROMPT}, "text_2", "invalid_value"),
        ("/v1/score", {"text_1": PROMPT, "text_2": []}, "text_2", "invalid_value"),
        ("/v1/score", {"text_1": "", "text_2": "a"}, "text_2[0]", "invalid_value"),
        ("/v1/score", {"text_1": PROMPT, "text_2": "a", "softmax": True}, "softmax", "unknown_parameter"),
        (
            "/v1/score",
            {"text_1": PROMPT, "text_2": "a", "truncate_prompt_tokens": 5},
            "truncate_prompt_tokens",
            "unknown_parameter",
        ),
        (
            "/v1/score",
            {"text_1": PROMPT, "text_2": "a", "encoding_format": "base64"},
            "encoding_format",
            "invalid_value",
        ),
        ("/pooling", {}, "input", "invalid_value"),
        ("/pooling", {"input": "a", "messages": MESSAGES}, "input", "invalid_value"),
        ("/pooling", {"input": ["a", [1]]}, "input", "invalid_value"),
        ("/pooling", {"input": [1, 10**6]}, "input", "invalid_value"),
        ("/pooling", {"input": [-1]}, "input", "invalid_value"),
        ("/pooling", {"input": "no template"}, "input", "E-DATA-CHAT"),
        ("/pooling", {"input": rendered("a")[: -len("assistant\na<|im_end|>\n") - 20]}, "input", "E-DATA-CHAT"),
        ("/pooling", {"input": "x" + rendered("a")}, "input", "E-DATA-CHAT"),
        ("/pooling", {"input": rendered("a") + "x"}, "input", "E-DATA-CHAT"),
        ("/pooling", {"messages": MESSAGES}, "messages", "invalid_value"),
        ("/rerank", {"query": PROMPT, "texts": ["a"], "truncate": True}, "truncate", "invalid_value"),
        ("/rerank", {"query": PROMPT, "documents": ["a"], "top_n": 0}, "top_n", "invalid_value"),
        (
            "/v2/rerank",
            {"query": PROMPT, "documents": ["a"], "max_tokens_per_doc": 3},
            "max_tokens_per_doc",
            "unknown_parameter",
        ),
        ("/v1/reward", {"samples": [{"text": "a"}]}, "samples[0]", "invalid_value"),
        ("/v1/reward", {"samples": [{"prompt": "a"}]}, "samples.0.text", "invalid_value"),
        ("/v1/reward", {"samples": [{"prompt": "a", "text": 5}]}, "samples.0.text", "invalid_value"),
        ("/v1/reward", {"samples": "a"}, "samples", "invalid_value"),
    ],
)
def test_what_is_not_scored_is_refused(port: int, path: str, body: dict[str, Any], param: str, code: str) -> None:
    refused(ask(port, "POST", path, body), param, code)


def test_too_long_is_refused_with_both_numbers(port: int) -> None:
    long = "warm " * 200
    for path, body in (
        ("/v1/score", {"text_1": PROMPT, "text_2": ["a", long]}),
        ("/pooling", {"input": rendered(long)}),
        ("/pooling", {"input": [5] * 97}),
        ("/get_reward", {"query": rendered(long)}),
        ("/rerank", {"query": PROMPT, "texts": [long]}),
        ("/v1/rerank", {"query": PROMPT, "documents": [long]}),
        ("/v1/reward", {"samples": [{"prompt": PROMPT, "text": long}]}),
    ):
        answer = ask(port, "POST", path, body)
        assert answer.status == 400 and answer.error["code"] == "context_length_exceeded"
        assert " tokens, the reward model reads 96" in answer.error["message"]


def test_models_are_those_that_are_served(port: int) -> None:
    for name in ("gpt-4o", "../../etc", "org/name", "sft"):
        answer = ask(port, "POST", "/v1/score", {"text_1": PROMPT, "text_2": "a", "model": name})
        refused(answer, "model", "model_not_found", 404)
    none = Service({}, None, Serve())
    with listening(create_app(none, Limits(), scoring.routes(none))) as other:
        refused(ask(other, "POST", "/v1/score", {"text_1": PROMPT, "text_2": "a"}), None, "model_not_found", 404)


def test_what_is_counted(port: int) -> None:
    def read() -> dict[str, float]:
        lines = ask(port, "GET", "/metrics").body.decode().splitlines()
        return {name: float(x) for name, _, x in (line.rpartition(" ") for line in lines if line[0] != "#")}

    before = read()
    ask(port, "POST", "/v1/score", {"text_1": PROMPT, "text_2": ANSWERS[:2]})
    for i in range(20):
        ask(port, "GET", f"/nothing/{i}")
    after = read()
    assert after["tetrad_rewards_total"] - before["tetrad_rewards_total"] == 2
    scored = 'tetrad_tokens_total{kind="scored"}'
    assert after[scored] > before.get(scored, 0)
    one = 'tetrad_requests_total{code="200",route="/v1/score"}'
    assert after[one] - before.get(one, 0) == 1
    assert not any("/nothing" in name for name in after)
    assert after["process_resident_memory_bytes"] > 0
