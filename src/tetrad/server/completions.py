"""POST /v1/completions: texts or ids go on, without a template; `echo` and `logprobs` tell how likely a text is."""

import codecs
from collections.abc import Iterable

from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from tetrad.inference.engine import Likeliest
from tetrad.inference.policy import Frontend, check_text
from tetrad.server.generation import Choice, Form, Scored, answer, beside, prompts, read
from tetrad.server.guard import Refused
from tetrad.server.schema import Completions
from tetrad.server.service import Service
from tetrad.text.tokenizer import Tokenizer

NEW_TOKENS = 16
"""Where the client names none, as in OpenAI's."""


def routes(service: Service) -> list[Route]:
    """The routes of this file."""

    async def completions(request: Request) -> Response:
        body, model = await read(request, service, Completions)
        model.worker.refuse_if_full()
        texts = await beside(lambda: _encoded(model.frontend, body), sum(map(len, body.prompt)))
        requests = prompts(model, body, texts, body.logprobs or 0, NEW_TOKENS)
        return await answer(request, body, model, requests, _Form(model.frontend.tokenizer, body))

    return [Route("/v1/completions", completions, methods=["POST"])]


def _encoded(model: Frontend, body: Completions) -> list[list[int]]:
    """Texts as ids, control tokens in them as text. Errors: E-DATA-ENCODING; Refused for ids that are none."""
    size, texts = model.config.vocab_size, []
    for prompt in body.prompt:
        if isinstance(prompt, str):
            check_text(prompt, "prompt")
            texts.append(model.tokenizer.encode(prompt))
        elif prompt and not 0 <= min(prompt) <= max(prompt) < size:
            raise Refused(400, f"prompt: ids are from 0 to {size - 1}", "prompt", "invalid_value")
        else:
            texts.append(prompt)
    return texts


class _Form(Form):
    kinds = ("cmpl", "text_completion", "text_completion")

    def __init__(self, tokenizer: Tokenizer, body: Completions) -> None:
        super().__init__(tokenizer, detailed=body.logprobs is not None)
        self.body, self.reads = body, body.logprobs if body.echo else None
        self.decoders = [codecs.getincrementaldecoder("utf-8")("replace") for _ in range(len(body.prompt) * body.n)]
        self.lengths = [0] * len(self.decoders)  # of the text of each choice so far

    def begin(self, index: int) -> list[Choice]:
        return [self._choice(index, *self._prompt(index))] if self.body.echo else []

    def choice(self, index: int, text: str, tokens: Iterable[Scored], *, chunk: bool) -> Choice:
        prompt, read = self._prompt(index) if self.body.echo and not chunk else ("", [])
        return self._choice(index, prompt + text, [*read, *tokens])

    def _prompt(self, index: int) -> tuple[str, list[Scored]]:
        """Its text, and its tokens; of the first nothing is known."""
        number = index // self.body.n
        given = self.body.prompt[number]
        text = given if isinstance(given, str) else self.tokenizer.decode(given, keep_control=True)
        first, *rest = self.job.requests[number].ids
        read = self.job.likelihoods.get(number, [(None, ())] * len(rest))
        return text, [(first, None, ()), *((i, *one) for i, one in zip(rest, read, strict=True))]

    def _choice(self, index: int, text: str, tokens: list[Scored]) -> Choice:
        logprobs, offsets = None, []
        if self.detailed and tokens:
            for number, _, _ in tokens:
                offsets.append(self.lengths[index])
                self.lengths[index] += len(self.decoders[index].decode(self.tokenizer.token_bytes(number)))
            logprobs = {
                "tokens": [self.token(number) for number, _, _ in tokens],
                "token_logprobs": [logprob for _, logprob, _ in tokens],
                "top_logprobs": [self._top(*one) for one in tokens],
                "text_offset": offsets,
            }
        return {"index": index, "text": text, "logprobs": logprobs, "finish_reason": None}

    def _top(self, number: int, logprob: float | None, top: Likeliest) -> dict[str, float] | None:
        """By token, the chosen one among them with the very float that it has by itself."""
        if logprob is None:
            return None
        named = {self.token(number): logprob}
        for one, value in top:
            if one != number:
                name = self.token(one)
                named[f"token_id:{one}" if name in named else name] = value
        return named
