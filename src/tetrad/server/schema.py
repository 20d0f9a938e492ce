"""What clients may send: a field is obeyed, or refused with 400 naming it.

Ignored are the fields of `IGNORED`, nulls, `stream_options` without `stream`, and what `NEUTRAL` lists: other fields
at a value that asks for nothing.
"""

from collections.abc import Mapping
from dataclasses import replace
from typing import Annotated, Any, Literal, TypeVar

from pydantic import AliasChoices, BaseModel, BeforeValidator, ConfigDict, Field, PlainValidator, ValidationError

from tetrad.server.guard import Refused
from tetrad.settings.use import Sample

IGNORED = {"user", "store", "metadata", "safety_identifier", "prompt_cache_key", "prompt_cache_retention"}
"""They concern what a service keeps of a request; nothing is kept."""
NEUTRAL: Mapping[str, tuple[Any, ...]] = {
    **dict.fromkeys(("tools", "tool_calls", "functions", "annotations"), ([],)),
    **dict.fromkeys(("tool_choice", "function_call"), ("none", "auto")),
    "parallel_tool_calls": (True, False),
    "response_format": ({"type": "text"},),
    "modalities": (["text"],),
    "service_tier": ("auto", "default"),
    "suffix": ("",),
    "best_of": (1,),
    "add_special_tokens": (False,),
    "add_generation_prompt": (True,),
    "continue_final_message": (False,),
}
MOST_PROMPTS, MOST_STOPS, MOST_STOP_CHARS, MOST_ANSWERS = 128, 16, 256, 4096
SAMPLING = {"temperature", "top_p", "top_k", "min_p", "repetition_penalty", "presence_penalty", "frequency_penalty"}
COLDEST = 1e-4  # below, the quotients of float32 logits are no numbers
W = TypeVar("W", bound="Wire")


def _prompts(value: Any) -> list[str | list[int]]:
    """A text, texts, ids, or lists of ids: always as a list of prompts."""

    def is_ids(one: Any) -> bool:
        return isinstance(one, list) and all(type(i) is int for i in one)

    prompts = [value] if isinstance(value, str) or (value and is_ids(value)) else value
    if not isinstance(prompts, list) or not 1 <= len(prompts) <= MOST_PROMPTS:
        raise ValueError(f"give a text, ids, or a list of 1 to {MOST_PROMPTS} of either")
    if not all(isinstance(prompt, str) or is_ids(prompt) for prompt in prompts):
        raise ValueError("a prompt is a text or a list of whole numbers")
    return prompts


def _stops(value: Any) -> list[str]:
    stops = [value] if isinstance(value, str) else value
    good = isinstance(stops, list) and len(stops) <= MOST_STOPS
    if not good or not all(isinstance(stop, str) and 0 < len(stop) <= MOST_STOP_CHARS for stop in stops):
        raise ValueError(f"give up to {MOST_STOPS} texts of 1 to {MOST_STOP_CHARS} characters")
    "".join(stops).encode()  # refuses halves of surrogate pairs, by a ValueError
    return list(stops)


def _message(value: Any) -> Any:
    """One whose content is a text: that of parts has a line for each. `developer` is a newer name of `system`."""
    if not isinstance(value, dict):
        return value
    given, content = asking(value, Message), value.get("content")
    if given.get("role") == "developer":
        given["role"] = "system"
    if isinstance(content, list):
        parts = [part for part in content if isinstance(part, dict) and part.keys() == {"type", "text"}]
        texts = [part["text"] for part in parts if part["type"] == "text" and isinstance(part["text"], str)]
        if len(texts) < len(content):
            raise ValueError('content: only parts {"type": "text", "text": ...} are read')
        given["content"] = "\n".join(texts)
    return given


def _texts(value: Any) -> Any:
    """One text or several, each alone or as {"text": ...}."""
    many = value if isinstance(value, list) else [value]
    return [one["text"] if isinstance(one, dict) and one.keys() == {"text"} else one for one in many]


def _biases(value: Any) -> Any:
    return {int(key): one for key, one in value.items()} if isinstance(value, dict) else value


Prompts = Annotated[list[str | list[int]], PlainValidator(_prompts)]


class Wire(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)


class StreamOptions(Wire):
    include_usage: bool = False


class Message(Wire):
    role: Literal["system", "user", "assistant"]
    content: str


class Named(Wire):
    model: str = ""


Talk = Annotated[list[Annotated[Message, BeforeValidator(_message)]], Field(min_length=1)]


class Generation(Named):
    """What chat and completions share. The default of what is not given is that of `tetrad generate`."""

    stream: bool = False
    stream_options: StreamOptions = Field(default_factory=StreamOptions)
    n: int = Field(1, ge=1, le=8)
    seed: int | None = Field(None, ge=0, lt=2**63)
    stop: Annotated[list[str], PlainValidator(_stops)] = []
    max_tokens: int | None = Field(None, ge=1)
    temperature: float | None = Field(None, ge=0, le=100)
    top_p: float | None = Field(None, ge=0, le=1)
    top_k: int | None = Field(None, ge=-1)
    min_p: float | None = Field(None, ge=0, le=1)
    repetition_penalty: float | None = Field(None, ge=0.1, le=10)
    presence_penalty: float | None = Field(None, ge=-2, le=2)
    frequency_penalty: float | None = Field(None, ge=-2, le=2)
    logit_bias: Annotated[
        dict[Annotated[int, Field(ge=0)], Annotated[float, Field(ge=-100, le=100)]],
        BeforeValidator(_biases),
        Field(max_length=1024),
    ] = {}
    ignore_eos: bool = False

    def sampling(self, defaults: Sample, new: int) -> Sample:
        """As the engine takes it. new: the longest response."""
        agreed = replace(defaults, **self.model_dump(include=SAMPLING, exclude_none=True))
        temperature, top_k = agreed.temperature * (agreed.temperature >= COLDEST), max(0, agreed.top_k)
        return replace(agreed, temperature=temperature, top_k=top_k, stop=tuple(self.stop), max_new_tokens=new)


class Chat(Generation):
    messages: Talk
    max_tokens: int | None = Field(None, ge=1, validation_alias=AliasChoices("max_tokens", "max_completion_tokens"))
    logprobs: bool = False
    top_logprobs: int = Field(0, ge=0, le=20)


class Completions(Generation):
    prompt: Prompts
    echo: bool = False
    logprobs: int | None = Field(None, ge=0, le=20)


class Tokenize(Named):
    prompt: str | None = None
    messages: Talk | None = None
    add_special_tokens: bool = True
    return_token_strs: bool = False


class Detokenize(Named):
    tokens: list[Annotated[int, Field(ge=0)]]


Texts = Annotated[list[str], BeforeValidator(_texts), Field(min_length=1, max_length=MOST_ANSWERS)]


class Scoring(Named):
    activation: bool = Field(False, validation_alias=AliasChoices("activation", "use_activation"))
    encoding_format: Literal["float"] = "float"


class Pairs(Scoring):
    text_1: Texts = Field(validation_alias=AliasChoices("text_1", "queries"))
    text_2: Texts = Field(validation_alias=AliasChoices("text_2", "documents"))


class Pooling(Scoring):
    input: Prompts = []
    messages: Talk | None = None


class Rerank(Scoring):
    query: str
    documents: Texts
    top_n: int | None = Field(None, ge=1)
    return_documents: bool = False


class TeiRerank(Wire):
    query: str
    texts: Texts
    raw_scores: bool = True
    return_text: bool = False
    truncate: Literal[False] = False


class GetReward(Wire):
    query: Texts
    prompts: Annotated[list[str], BeforeValidator(_texts)] = []
    labels: Any = None


class Spoken(Wire):
    role: Literal["system", "user", "assistant", "instruction", "input"]
    content: str


class Sampled(Wire):
    text: str
    prompt: str = ""
    messages: list[Spoken] = []
    input: str = ""
    prompt_ids: list[int] = []
    ids: list[int] = []
    finished: bool = True


class Samples(Named):
    samples: list[Sampled] = Field(max_length=MOST_ANSWERS)
    tokenizer: str = ""


def asking(value: dict[str, Any], kind: type[Wire]) -> dict[str, Any]:
    """A mapping without the fields that ask for nothing."""
    fields = kind.model_fields
    return {
        k: v
        for k, v in value.items()
        if v is not None and k not in IGNORED and (k in fields or v not in NEUTRAL.get(k, ()))
    }


def parsed(kind: type[W], body: dict[str, Any]) -> W:
    """Raises Refused 400 naming the field."""
    given = asking(body, kind)
    if not given.get("stream"):
        given.pop("stream_options", None)
    try:
        return kind.model_validate(given)
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False, include_context=False)[0]
    name, what = ".".join(map(str, first["loc"])), first["msg"].removeprefix("Value error, ")
    if first["type"] == "extra_forbidden":
        raise Refused(400, f"{name}: this field is not supported", name, "unknown_parameter")
    raise Refused(400, f"{name}: {what}", name, "invalid_value")
