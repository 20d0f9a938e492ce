"""The reward model's routes, in the shapes of vLLM, Cohere, Jina, TEI, OpenRLHF and of Tetrad itself.

One function scores for all of them: the calibrated reward that `tetrad score` gives, never a sigmoid of it unless that
is asked for, of the whole text or not at all.
"""

import asyncio
import math
import secrets
import time
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, TypeVar

from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from tetrad.data import fields
from tetrad.inference.completions import Completion
from tetrad.reward.model import RewardModel, documents_from_ids, documents_from_text, ids_meaning, score_documents
from tetrad.server import metrics
from tetrad.server.guard import Refused, payload
from tetrad.server.schema import (
    GetReward,
    Message,
    Named,
    Pairs,
    Pooling,
    Rerank,
    Sampled,
    Samples,
    Scoring,
    TeiRerank,
    Wire,
    parsed,
)
from tetrad.server.service import Service
from tetrad.types import Turn

T = TypeVar("T", bound=Wire)


async def scores(service: Service, samples: Sequence[Completion]) -> list[float]:
    """The reward of each sample's text, never of a part of it. Errors: E-DATA-LONG, E-NUM-NONFINITE; Refused without a
    reward model."""
    return (await _scored(service, samples))[0]


async def _scored(service: Service, samples: Sequence[Completion], *, by_ids: bool = False) -> tuple[list[float], int]:
    """The rewards, and the tokens that were read."""
    model = reward_of(service)

    def work() -> tuple[list[float], int]:
        text = documents_from_text
        documents = documents_from_ids(samples) if by_ids else text(model.template, model.tokenizer, samples)
        rewards = score_documents(model, documents).mean(0).tolist() if documents else []
        return rewards, sum(len(document.ids) for document in documents)

    rewards, tokens = await asyncio.get_running_loop().run_in_executor(service.scorer, work)
    metrics.REWARDS.inc(len(rewards))
    metrics.TOKENS.labels("scored").inc(tokens)
    return rewards, tokens


def reward_of(service: Service) -> RewardModel:
    """Raises Refused where none is served."""
    if service.reward is None:
        raise Refused(404, "no reward model is served: start with --reward", code="model_not_found")
    return service.reward


def routes(service: Service) -> list[Route]:
    """The routes of this file."""
    do = _Routes(service)
    calls = {"/v1/score": do.score, "/score": do.score, "/pooling": do.pooling, "/classify": do.classify}
    calls |= {"/rerank": do.rerank, "/v1/rerank": do.rerank, "/v2/rerank": do.rerank}
    calls |= {"/get_reward": do.get_reward, "/v1/reward": do.reward}
    return [Route(path, call, methods=["POST"]) for path, call in calls.items()]


class _Routes:
    """One method a shape of requests."""

    def __init__(self, service: Service) -> None:
        self.service = service

    async def score(self, request: Request) -> Response:
        body = self._wire(Pairs, await payload(request))
        first, second = body.text_1, body.text_2
        if len(first) not in (1, len(second)):
            raise Refused(400, f"{len(first)} text_1 go with {len(second)} text_2", "text_1", "invalid_value")
        pairs = zip(first * (len(second) // len(first)), second, strict=True)
        samples = [_pair(prompt, text, f"text_2[{i}]") for i, (prompt, text) in enumerate(pairs)]
        values, tokens = await _scored(self.service, samples)
        return self._list([{"object": "score", "score": x} for x in _active(values, body)], tokens)

    async def pooling(self, request: Request) -> Response:
        values, tokens = await self._pooled(request)
        return self._list([{"object": "pooling", "data": [x]} for x in values], tokens)

    async def classify(self, request: Request) -> Response:
        values, tokens = await self._pooled(request)
        return self._list([{"label": "reward", "probs": [x], "num_classes": 1} for x in values], tokens)

    async def _pooled(self, request: Request) -> tuple[list[float], int]:
        body, model = self._wire(Pooling, await payload(request)), reward_of(self.service)
        texts = [one for one in body.input if isinstance(one, str)]
        ids = [tuple(one) for one in body.input if not isinstance(one, str)]
        if bool(texts) + bool(ids) + bool(body.messages) != 1:
            raise Refused(400, "input: give texts, or ids, or messages in its place", "input", "invalid_value")
        _check_ids(model, ids, "input")
        samples = [Completion(one, (), (), "") for one in ids] + [_written(model, one, "input") for one in texts]
        samples += [_spoken(body.messages)] if body.messages else []
        values, tokens = await _scored(self.service, samples, by_ids=bool(ids))
        return _active(values, body), tokens

    async def rerank(self, request: Request) -> Response:
        """TEI's where there are texts, else Cohere's and Jina's."""
        given = await payload(request)
        if "texts" in given and request.url.path == "/rerank":
            tei = self._wire(TeiRerank, given)
            values, _ = await _scored(self.service, _answers(tei.query, tei.texts, "texts"))
            values = values if tei.raw_scores else [*map(_sigmoid, values)]
            text = [{"text": one} if tei.return_text else {} for one in tei.texts]
            return JSONResponse([{"index": i, "score": values[i], **text[i]} for i in _best_first(values)])
        body = self._wire(Rerank, given)
        values, tokens = await _scored(self.service, _answers(body.query, body.documents, "documents"))
        values = _active(values, body)
        whole = [{"document": {"text": one}} if body.return_documents else {} for one in body.documents]
        results = [{"index": i, "relevance_score": values[i], **whole[i]} for i in _best_first(values)[: body.top_n]]
        head = {"id": f"rerank-{secrets.token_hex(12)}", "model": self.service.reward_name}
        return JSONResponse({**head, "results": results, "usage": {"total_tokens": tokens}})

    async def get_reward(self, request: Request) -> Response:
        body, model = self._wire(GetReward, await payload(request)), reward_of(self.service)
        if body.prompts and len(body.prompts) != len(body.query):
            raise Refused(400, "prompts and query differ in length", "prompts", "invalid_value")
        prompts = body.prompts or [""] * len(body.query)
        values = await scores(self.service, [_queried(model, *pair) for pair in zip(body.query, prompts, strict=True)])
        return JSONResponse({"rewards": values, "scores": values, "extra_logs": {}})

    async def reward(self, request: Request) -> Response:
        body, model = self._wire(Samples, await payload(request)), reward_of(self.service)
        samples = [_sampled(one, f"samples[{i}]") for i, one in enumerate(body.samples)]
        known = bool(body.tokenizer) and body.tokenizer == ids_meaning(model.tokenizer, model.template)
        by_ids = known and all(sample.prompt_ids and sample.response_ids for sample in samples)
        _check_ids(model, [sample.prompt_ids + sample.response_ids for sample in samples if by_ids], "samples")
        values, _ = await _scored(self.service, samples, by_ids=by_ids)
        return JSONResponse({"scores": values})

    def _wire(self, kind: type[T], given: dict[str, Any]) -> T:
        """Raises Refused, also where it names another model."""
        reward_of(self.service)
        wire, own = parsed(kind, given), self.service.reward_name
        if isinstance(wire, Named) and wire.model not in ("", own):
            what = f"there is no reward model {wire.model!a:.80}; there is {own}"
            raise Refused(404, what, "model", "model_not_found")
        return wire

    def _list(self, items: Sequence[dict[str, Any]], tokens: int) -> Response:
        head = {"id": f"score-{secrets.token_hex(12)}", "object": "list", "created": int(time.time())}
        data = [{"index": index, **item} for index, item in enumerate(items)]
        usage = {"prompt_tokens": tokens, "total_tokens": tokens}
        return JSONResponse({**head, "model": self.service.reward_name, "data": data, "usage": usage})


def _pair(prompt: str, text: str, where: str) -> Completion:
    """A prompt and its answer, both plain text."""
    if not prompt.strip():
        raise Refused(400, f"{where}: the prompt is empty", where, "invalid_value")
    return Completion((), (), (Turn("instruction", prompt), Turn("input", "")), text, where)


def _answers(query: str, texts: Sequence[str], where: str) -> list[Completion]:
    return [_pair(query, text, f"{where}[{i}]") for i, text in enumerate(texts)]


def _spoken(messages: Sequence[Message]) -> Completion:
    turns = fields.turns([message.model_dump() for message in messages], "messages", "messages")
    if len(turns) < 2 or turns[-1].role != "assistant":
        raise Refused(400, "messages: the last turn must be the answer to score", "messages", "invalid_value")
    return Completion((), (), turns[:-1], turns[-1].text, "messages")


def _written(model: RewardModel, text: str, where: str) -> Completion:
    """A conversation as text in the model's template."""
    turns, finished = model.template.read_back(model.tokenizer, text, where)
    return Completion((), (), turns[:-1], turns[-1].text, where, finished)


def _queried(model: RewardModel, query: str, prompt: str) -> Completion:
    """In the model's template, or plain text that begins with its prompt."""
    if (model.template.start or model.template.separator) in query or not prompt or not query.startswith(prompt):
        return _written(model, query, "query")
    end = model.tokenizer.name(model.template.end_id(model.tokenizer))
    return _pair(prompt, query.removeprefix(prompt).removesuffix(end), "query")


def _sampled(sample: Sampled, where: str) -> Completion:
    if not sample.messages:
        return replace(_pair(sample.prompt, sample.text, where), finished=sample.finished)
    turns = tuple(Turn(one.role, one.content) for one in sample.messages)
    return Completion(tuple(sample.prompt_ids), tuple(sample.ids), turns, sample.text, where, sample.finished)


def _check_ids(model: RewardModel, documents: Sequence[Sequence[int]], where: str) -> None:
    size = model.members[0].config.vocab_size
    if any(not ids or not 0 <= min(ids) <= max(ids) < size for ids in documents):
        raise Refused(400, f"{where}: ids are from 0 to {size - 1}", where, "invalid_value")


def _active(values: list[float], body: Scoring) -> list[float]:
    return [*map(_sigmoid, values)] if body.activation else values


def _sigmoid(x: float) -> float:
    return 1 / (1 + math.exp(-x)) if x > 0 else 1 - 1 / (1 + math.exp(x))


def _best_first(values: Sequence[float]) -> list[int]:
    return sorted(range(len(values)), key=lambda i: -values[i])
