"""Prompts in, completions out: what is asked, as ids, and what a model made of it."""

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
    """A prompt as ids, and what it says."""

    ids: tuple[int, ...]
    prompt: Prompt


@dataclass(frozen=True, slots=True)
class Completion:
    """A reply as it was sampled: its ids, the text they stand for, what was asked, and whether it ended by itself.

    valid_utf8: false where sampled bytes make no characters, and U+FFFD stands in the text for them.
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
        """The Input or the last user turn; empty where an Instruction stands alone."""
        return next((turn.text for turn in reversed(self.turns) if turn.role in ("input", "user")), "")

    @property
    def prompt(self) -> str:
        """All that was asked, a line a turn."""
        return lines(self.turns)


def complete(
    model: CausalLM,
    questions: Sequence[EncodedPrompt],
    numbers: Sequence[int],
    key: tuple[int, str, int],
    sampling: Sampling,
    tokenizer: Tokenizer,
    device: Device,
) -> list[tuple[Completion, Response]]:
    """One reply a question. numbers: each question's place in the whole batch, which with key = (seed, purpose, step)
    decides its random numbers; a question that stands several times in a row is computed once."""
    model.eval()
    requests = []
    for question, group in groupby(zip(questions, numbers, strict=True), itemgetter(0)):
        keys = tuple((*key, number) for _, number in group)
        requests.append(Request(question.ids, sampling, keys, model.config.eos_ids))
    replies = generate(model, requests, device, sampling.max_num_seqs)
    return [(sampled(q, reply, tokenizer), reply) for q, reply in zip(questions, replies, strict=True)]


def sampled(question: EncodedPrompt, reply: Response, tokenizer: Tokenizer) -> Completion:
    """The reply beside its prompt, and what it says."""
    text, prompt = tokenizer.decode(reply.ids), question.prompt
    valid = tokenizer.is_utf8(reply.ids, text)
    return Completion(question.ids, reply.ids, prompt.turns, text, prompt.where, reply.finished, valid)


def best(samples: Sequence[Completion], scores: Sequence[float]) -> int:
    """The index of the first sample with the highest score; one that is not valid UTF-8 only where none is."""
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
    """The prompts of record files. limit: the model's positions; room: tokens that the reply needs; overlong: what to
    do with a prompt that leaves too little, where cut takes tokens of its beginning.

    Errors: E-DATA-*; E-DATA-LONG names the first prompt that leaves too little room; E-DATA-EMPTY.
    """
    prompts, most = read_prompts(paths, counts), limit - room
    found = []
    for prompt, tokens in zip(prompts, tokenize(form, tokenizer, prompts, counts=counts), strict=True):
        long = len(tokens.ids) > most
        if long and (overlong == "refuse" or most < 1):
            what = f"the prompt has {len(tokens.ids)} tokens; {most} fit beside a reply of {room}"
            raise UserError("E-DATA-LONG", what, where=prompt.where, hint="shorten it, or lower max_new_tokens")
        counts.cut += long and overlong == "truncate"
        counts.dropped += long and overlong == "drop"
        if not (long and overlong == "drop"):
            found.append(EncodedPrompt(tuple(tokens.ids[-most:].tolist()), prompt))
    if not found:
        what = f"no prompt leaves room for a reply of {room} tokens"
        raise UserError("E-DATA-EMPTY", what, hint="shorten the prompts, or lower max_new_tokens")
    return found
