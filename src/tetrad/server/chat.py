"""POST /v1/chat/completions."""

from collections.abc import Iterable, Sequence

from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from tetrad.data import fields
from tetrad.inference.engine import Likeliest
from tetrad.inference.policy import Frontend, check_text
from tetrad.server.generation import Choice, Form, Scored, answer, beside, prompts, read
from tetrad.server.guard import Refused
from tetrad.server.schema import Chat, Message
from tetrad.server.service import Service


def routes(service: Service) -> list[Route]:
    """The routes of this file."""

    async def chat(request: Request) -> Response:
        body, model = await read(request, service, Chat)
        if body.top_logprobs and not body.logprobs:
            raise Refused(400, "top_logprobs: needs logprobs = true", "top_logprobs", "invalid_value")
        model.worker.refuse_if_full()
        ids = await beside(
            lambda: conversation(model.frontend, body.messages), sum(len(m.content) for m in body.messages)
        )
        requests = prompts(model, body, [ids], body.top_logprobs, model.worker.positions)
        return await answer(request, body, model, requests, _Form(model.frontend.tokenizer, detailed=body.logprobs))

    return [Route("/v1/chat/completions", chat, methods=["POST"])]


def conversation(model: Frontend, messages: Sequence[Message]) -> list[int]:
    """Up to where the answer begins, or goes on if the last turn is the assistant's. What the model's template cannot
    express is refused: E-DATA-CHAT; Refused where it has none."""
    if model.template is None:
        raise Refused(400, "this model has no chat template: use /v1/completions", "messages", "E-MODEL-TEMPLATE")
    turns = fields.turns([message.model_dump() for message in messages], "messages", "messages")
    for turn in turns:
        check_text(turn.text, "messages")
    return model.template.prompt(model.tokenizer, turns, "messages")


class _Form(Form):
    kinds = ("chatcmpl", "chat.completion", "chat.completion.chunk")

    def begin(self, index: int) -> list[Choice]:
        delta = {"role": "assistant", "content": ""}
        return [{"index": index, "delta": delta, "logprobs": None, "finish_reason": None}]

    def choice(self, index: int, text: str, tokens: Iterable[Scored], *, chunk: bool) -> Choice:
        delta = {"delta": {"content": text} if text else {}}
        content = delta if chunk else {"message": {"role": "assistant", "content": text}}
        scored = [self._scored(*one) for one in tokens if self.detailed]
        logprobs = {"content": scored, "refusal": None} if scored else None
        return {"index": index, **content, "logprobs": logprobs, "finish_reason": None}

    def _scored(self, number: int, logprob: float | None, top: Likeliest) -> Choice:
        likeliest = [self._entry(one, logprob if one == number else value) for one, value in top]
        return self._entry(number, logprob) | {"top_logprobs": likeliest}

    def _entry(self, number: int, logprob: float | None) -> Choice:
        return {"token": self.token(number), "logprob": logprob, "bytes": list(self.tokenizer.token_bytes(number))}
