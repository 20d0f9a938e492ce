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
    """A response as sampled: its ids, the text they decode to, its prompt, and whether it ended by itself.

    valid_utf8: false if sampled bytes form no characters and appear as U+FFFD in the text.
    """

    prompt_ids: tuple[int, ...]
    reply_ids: tuple[int, ...]
    turns: tuple[Turn, ...]
    text: str
    where: str = ""
    finished: bool = True
    valid_utf8: bool = True

    @property
    def asked(self) -> str:
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
) -> list[tuple[Completion, Response]]:
    """One response per prompt. numbers: each prompt's index in the whole batch, which with key = (seed, purpose, step)
    determines its random numbers; a prompt that appears several times in a row is computed once."""
    model.eval()
    requests = []
    for prompt, group in groupby(zip(prompts, numbers, strict=True), itemgetter(0)):
        keys = tuple((*key, number) for _, number in group)
        requests.append(Request(prompt.ids, sampling, keys, model.config.eos_ids))
    responses = generate(model, requests, device, sampling.max_num_seqs)
    return [(sampled(p, r, tokenizer), r) for p, r in zip(prompts, responses, strict=True)]


def sampled(encoded: EncodedPrompt, response: Response, tokenizer: Tokenizer) -> Completion:
    """The response beside its prompt, and its text."""
    text, prompt = tokenizer.decode(response.ids), encoded.prompt
    valid = tokenizer.is_utf8(response.ids, text)
    return Completion(encoded.ids, response.ids, prompt.turns, text, prompt.where, response.finished, valid)


def best(samples: Sequence[Completion], scores: Sequence[float]) -> int:
    """The index of the first sample with the highest score; one that is not valid UTF-8 only if none is."""
    return max(range(len(samples)), key=lambda i: (samples[i].valid_utf8, scores[i]))


def read_questions(
    paths: Paths,
    form: Template,
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
    for prompt, tokens in zip(prompts, tokenize(form, tokenizer, prompts, counts=counts), strict=True):
        long = len(tokens.ids) > most
        if long and (overlong == "refuse" or most < 1):
            what = f"the prompt has {len(tokens.ids)} tokens; {most} fit beside a reply of {room}"
            raise UserError("E-DATA-LONG", what, where=prompt.where, hint="shorten it, or lower max_new_tokens")
        counts.cut += long and overlong == "truncate"
        counts.dropped += long and overlong == "drop"
        if not (long and overlong == "drop"):
            encoded.append(EncodedPrompt(tuple(tokens.ids[-most:].tolist()), prompt))
    if not encoded:
        what = f"no prompt leaves room for a reply of {room} tokens"
        raise UserError("E-DATA-EMPTY", what, hint="shorten the prompts, or lower max_new_tokens")
    return encoded
