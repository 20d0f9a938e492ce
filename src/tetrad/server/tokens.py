"""The models that are served, and their tokenizers: /v1/models, /tokenize, /detokenize, /tokenizer_info."""

import asyncio
import time

from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from tetrad.inference.policy import Frontend, check_text
from tetrad.server.chat import conversation
from tetrad.server.generation import read, served, spelt
from tetrad.server.guard import Refused
from tetrad.server.schema import Detokenize, Tokenize
from tetrad.server.service import Served, Service
from tetrad.text.chat_template import jinja_of
from tetrad.text.tokenizer import TOKENIZER_CLASS


def routes(service: Service) -> list[Route]:
    """The routes of this file."""
    began = int(time.time())

    def card(model: Served) -> dict[str, object]:
        own = {"id": model.name, "object": "model", "created": began, "owned_by": "tetrad"}
        return {**own, "max_model_len": model.worker.positions}

    async def models(_: Request) -> Response:
        return JSONResponse({"object": "list", "data": list(map(card, service.models.values()))})

    async def model(request: Request) -> Response:
        return JSONResponse(card(served(service, request.path_params["name"])))

    async def tokenize(request: Request) -> Response:
        body, chosen = await read(request, service, Tokenize)
        ids = await asyncio.to_thread(_ids, body, chosen.frontend)
        strings = [spelt(chosen.frontend.tokenizer, number) for number in ids] if body.return_token_strs else None
        most = chosen.worker.positions
        return JSONResponse({"count": len(ids), "max_model_len": most, "tokens": ids, "token_strs": strings})

    async def detokenize(request: Request) -> Response:
        body, chosen = await read(request, service, Detokenize)
        decode = chosen.frontend.tokenizer.decode
        return JSONResponse({"prompt": await asyncio.to_thread(decode, body.tokens, keep_control=True)})

    async def tokenizer_info(request: Request) -> Response:
        return JSONResponse(_info(served(service, request.query_params.get("model", "")).frontend))

    gets = {"/v1/models": models, "/models": models, "/v1/models/{name}": model, "/tokenizer_info": tokenizer_info}
    posts = {"/tokenize": tokenize, "/detokenize": detokenize}
    reads = [Route(path, call, methods=["GET"]) for path, call in gets.items()]
    return reads + [Route(path, call, methods=["POST"]) for path, call in posts.items()]


def _ids(body: Tokenize, model: Frontend) -> list[int]:
    if body.messages is not None and body.prompt is None:
        return conversation(model, body.messages)
    if body.prompt is None or body.messages is not None:
        raise Refused(400, "give either prompt or messages", "prompt", "invalid_value")
    check_text(body.prompt, "prompt")
    return model.tokenizer.encode_raw(body.prompt, special=body.add_special_tokens)


def _info(model: Frontend) -> dict[str, str | None]:
    """As lm-eval reads it: names of special tokens, and the template as transformers would run it."""
    tokenizer, form = model.tokenizer, model.template
    bos = tokenizer.config.get("bos_token")
    return {
        "tokenizer_class": TOKENIZER_CLASS,
        "eos_token": tokenizer.name(model.ends[0]),
        "bos_token": bos.get("content") if isinstance(bos, dict) else bos,
        "pad_token": None if tokenizer.pad_id is None else tokenizer.name(tokenizer.pad_id),
        "chat_template": form.jinja(tokenizer) if form else jinja_of(model.folder) or None,
    }
