"""Prompts in, completions out: the prompts as ids, and the model's responses to them."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby
from operator import itemgetter

from tetrad.data.records import Paths, read_prompts
from tetrad.data.source import Counts
from tetrad.data.tokens import OnLong, tokenize
from tetrad.distributed.device import Device
from tetrad.errors import UserError
from tetrad.inference.engine import Request, generate
from tetrad.model.transformer import CausalLM
from tetrad.settings.common import Sampling
from tetrad.text.chat_template import Template
from tetrad.text.tokenizer import Tokenizer
from tetrad.types import Prompt, Response, Turn, lines


@dataclass(frozen=True)
class EncodedPrompt:
    """A prompt as ids, and as text."""

    ids: tuple[int, ...]
    prompt: Prompt


@dataclass(frozen=True, slots=True)
class Completion:
    """A response and its prompt: the sampled ids, the text they decode to, and whether it ended by itself.

    valid_utf8: false if sampled bytes form no characters and appear as U+FFFD in the text. logprobs: the sampler's own,
    of each id; top: for each id the most likely ids there with theirs, if requested.
    """

    prompt_ids: tuple[int, ...]
    response_ids: tuple[int, ...]
    turns: tuple[Turn, ...]
    text: str
    where: str = ""
    finished: bool = True
    valid_utf8: bool = True
    logprobs: tuple[float, ...] = ()
    top: tuple[tuple[tuple[int, float], ...], ...] = ()

    @classmethod
    def of(cls, encoded: EncodedPrompt, response: Response, text: str, tokenizer: Tokenizer) -> "Completion":
        """text: of the response, with or without what follows a stop text."""
        r, prompt, valid = response, encoded.prompt, tokenizer.is_utf8(response.ids, text)
        return cls(encoded.ids, r.ids, prompt.turns, text, prompt.where, r.finished, valid, r.logprobs, r.top)

    @property
    def input(self) -> str:
        """The Input or the last user turn; empty for an Instruction without Input."""
        return next((turn.text for turn in reversed(self.turns) if turn.role in ("input", "user")), "")

    @property
    def prompt(self) -> str:
        """The whole prompt, one line per turn."""
        return lines(self.turns)


def complete(
    model: CausalLM,
    prompts: Sequence[EncodedPrompt],
    numbers: Sequence[int],
    key: tuple[int, str, int],
    sampling: Sampling,
    tokenizer: Tokenizer,
    device: Device,
    keep: bool = False,
) -> list[Completion]:
    """One response per prompt. numbers: each prompt's index in the whole batch, which with key = (seed, purpose, step)
    determines its random numbers; a prompt that appears several times in a row is computed once.
    keep: as of `generate`."""
    model.eval()
    requests = []
    for prompt, group in groupby(zip(prompts, numbers, strict=True), itemgetter(0)):
        keys = tuple((*key, number) for _, number in group)
        requests.append(Request(prompt.ids, sampling, keys, model.config.eos_ids))
    responses = generate(model, requests, device, sampling.max_num_seqs, keep=keep)
    pairs = zip(prompts, responses, strict=True)
    return [Completion.of(prompt, r, tokenizer.decode(r.ids), tokenizer) for prompt, r in pairs]


def best(samples: Sequence[Completion], scores: Sequence[float]) -> int:
    """The index of the first sample with the highest score; one that is not valid UTF-8 only if none is."""
    return max(range(len(samples)), key=lambda i: (samples[i].valid_utf8, scores[i]))


def too_long(tokens: int, most: int, room: int, where: str) -> UserError:
    """The error for a prompt that leaves no room for its response."""
    what = f"the prompt has {tokens} tokens; {most} fit beside a response of {room}"
    return UserError("E-DATA-LONG", what, where=where, hint="shorten it, or lower max_new_tokens")


def read_encoded_prompts(
    paths: Paths,
    template: Template,
    tokenizer: Tokenizer,
    counts: Counts,
    limit: int,
    room: int,
    overlong: OnLong = "refuse",
) -> list[EncodedPrompt]:
    """The prompts of record files. limit: the model's positions; room: tokens that the response needs; overlong: what
    to do with a prompt that leaves too little; truncate removes tokens from its beginning.

    Errors: E-DATA-*; E-DATA-LONG names the first prompt that leaves too little room; E-DATA-EMPTY.
    """
    prompts, most = read_prompts(paths, counts), limit - room
    encoded = []
    for prompt, tokens in zip(prompts, tokenize(template, tokenizer, prompts, counts=counts), strict=True):
        long = len(tokens.ids) > most
        if long and (overlong == "refuse" or most < 1):
            raise too_long(len(tokens.ids), most, room, prompt.where)
        counts.cut += long and overlong == "truncate"
        counts.dropped += long and overlong == "drop"
        if not (long and overlong == "drop"):
            encoded.append(EncodedPrompt(tuple(tokens.ids[-most:].tolist()), prompt))
    if not encoded:
        what = f"no prompt leaves room for a response of {room} tokens"
        raise UserError("E-DATA-EMPTY", what, hint="shorten the prompts, or lower max_new_tokens")
    return encoded
