"""Finished models by the name of a stage or folder: with their tokenizer and template, ready to answer or to score.

A reply's random numbers follow from (seed, number of the prompt, number of the copy): neither the batch around it nor
the count of copies changes it. A reward model reads what is written, as `tetrad score` does; a reply that was cut is
read without an end token.
"""

from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from tetrad.distributed.device import Device, choose
from tetrad.errors import UserError
from tetrad.inference.completions import Completion, EncodedPrompt
from tetrad.inference.engine import Engine, Request
from tetrad.inference.fused_model import Current, Fused
from tetrad.inference.kv_cache import cache_bytes
from tetrad.inference.model_folder import (
    folder_template,
    model_folder,
    needed_template,
    own_sampling,
    refuse_small_vocabulary,
)
from tetrad.model.huggingface import read_causal
from tetrad.model.transformer import CausalLM, frozen
from tetrad.settings import use
from tetrad.settings.check import build
from tetrad.settings.common import Run
from tetrad.text.chat_template import Template
from tetrad.text.tokenizer import Tokenizer
from tetrad.types import Prompt, Response, Turn


@dataclass(frozen=True)
class Policy:
    """A language model in use. template: None where the folder names none, as after pre-training."""

    model: CausalLM
    tokenizer: Tokenizer
    template: Template | None
    device: Device
    folder: Path

    @property
    def form(self) -> Template:
        """The template. Errors: E-MODEL-TEMPLATE."""
        return needed_template(self.template, self.folder)

    @property
    def at(self) -> Device:
        """Where the weights are now."""
        return replace(self.device, place=self.model.head_weight.device)

    @property
    def fused(self) -> Fused:
        """The model as the engine wants it: of the weights as they are now."""
        return self._current.fused()

    @cached_property
    def _current(self) -> Current:
        return Current(self.model, self.device.dtype)

    @property
    def ends(self) -> tuple[int, ...]:
        """All ids that end a reply."""
        named = (self.form.end_id(self.tokenizer), *self.tokenizer.eos_ids, *self.model.config.eos_ids)
        return tuple(dict.fromkeys(named))


@dataclass(frozen=True)
class Generated:
    """A sampled reply; sample: the same beside its prompt, as a reward reads it."""

    sample: Completion
    reply: Response

    @property
    def finished(self) -> bool:
        """False where it was cut at its longest length."""
        return self.reply.finished


def load(folder: str | Path, template: str = "") -> Policy:
    """The language model of a run's stage ("runs/NAME/ppo") or of a Hugging Face folder.

    template: "instruction" or "chatml", where the folder names none. Errors: E-MODEL-*, E-CKPT-*.
    """
    path = model_folder(folder)
    device = choose(Run())
    model, tokenizer = frozen(read_causal(path)).to(device.place), Tokenizer.load(path)
    refuse_small_vocabulary(model.config.vocab_size, tokenizer, path)
    return Policy(model, tokenizer, folder_template(path, template), device, path)


def question(model: Policy, prompt: Prompt) -> EncodedPrompt:
    """The prompt's ids. Errors: E-DATA-CHAT, E-DATA-ENCODING, E-MODEL-*."""
    for turn in prompt.turns:
        check_text(turn.text, prompt.where)
    return EncodedPrompt(tuple(model.form.prompt(model.tokenizer, prompt.turns, prompt.where)), prompt)


def check_text(text: str, where: str) -> None:
    """Refuses what Python makes of words and lines that are not UTF-8. Errors: E-DATA-ENCODING."""
    try:
        text.encode()
    except UnicodeEncodeError:
        raise UserError("E-DATA-ENCODING", "this is not UTF-8", where=where, hint="set a UTF-8 locale") from None


def answers(
    model: Policy, questions: Sequence[EncodedPrompt], first: int, settings: use.Sample, copies: int = 1
) -> list[Generated]:
    """`copies` replies to each question, one after another. first: the number of the first question, for its random
    numbers. Errors: E-DATA-LONG, E-MEM-FULL."""
    return [answer for group in answered(model, questions, settings, copies, first) for answer in group]


def answered(
    model: Policy, questions: Sequence[EncodedPrompt], settings: use.Sample, copies: int = 1, first: int = 0
) -> Iterator[list[Generated]]:
    """The same, question by question, each as soon as it and those before it are answered."""
    requests = [request(model, q, settings, number, copies) for number, q in enumerate(questions, first)]
    engine = Engine(model.fused, model.at, *cache_shape(questions, settings, copies), model.tokenizer)
    number_of = {engine.add(asked): number for number, asked in enumerate(requests)}
    found: dict[int, dict[int, Generated]] = defaultdict(dict)
    due = 0
    for event in engine.events():
        if event.reply:
            number = number_of[event.ticket]
            found[number][event.copy] = answer(model, questions[number], event.reply)
        while len(found.get(due, ())) == copies:
            yield [found[due][copy] for copy in range(copies)]
            del found[due]
            due += 1


def cache_shape(questions: Sequence[EncodedPrompt], settings: use.Sample, copies: int = 1) -> tuple[int, int]:
    """Slots beside the cache's spare one, and positions of each: the longest prompt with the longest reply."""
    longest = max((len(question.ids) for question in questions), default=1)
    return min(settings.max_num_seqs, max(1, copies * len(questions))), longest + settings.max_new_tokens


def cache_need(model: Policy, slots: int, positions: int) -> str:
    """The memory that a cache takes, in words."""
    mib = cache_bytes(model.model.config, slots + 1, positions, model.device.dtype) / 2**20
    return f"{slots} slot{'s' * (slots > 1)} and a spare one of {positions} positions, {mib:.3g} MiB"


def request(model: Policy, question: EncodedPrompt, settings: use.Sample, number: int, copies: int = 1) -> Request:
    """What the engine is asked."""
    keys = tuple((settings.seed, "generate", copy, number) for copy in range(copies))
    top = settings.top_logprobs if isinstance(settings, use.Generate) else 0
    return Request(question.ids, settings, keys, model.ends, settings.stop, top=top)


def answer(model: Policy, question: EncodedPrompt, reply: Response) -> Generated:
    """The reply beside its prompt."""
    prompt, valid = question.prompt, model.tokenizer.is_utf8(reply.ids, reply.text)
    return Generated(
        Completion(question.ids, reply.ids, prompt.turns, reply.text, prompt.where, reply.finished, valid), reply
    )


def generate(model: Policy, prompts: Sequence[str | tuple[str, str]], **settings: Any) -> list[str]:
    """Texts that answer these prompts, each an Instruction or (Instruction, Input): those of `tetrad generate`.

    settings: of `tetrad generate --help`, as `max_new_tokens`, `temperature` (0 is greedy), `top_k`, `top_p`, `min_p`,
    `stop`, `seed`. Errors: E-CONF-*, E-DATA-LONG, E-MODEL-TEMPLATE.
    """
    if "template" in settings:
        raise UserError("E-CONF-CONFLICT", "the template was chosen by `load`", where="template")
    values = own_sampling(model.folder) | settings
    checked = use.agreed(build(use.Sample, values, {name: name for name in settings}), set(settings))
    pairs = [(prompt, "") if isinstance(prompt, str) else prompt for prompt in prompts]
    questions = [question(model, asked(*pair, where=f"prompt {number}")) for number, pair in enumerate(pairs)]
    return [answer.sample.text for answer in answers(model, questions, 0, checked)] if questions else []


def asked(instruction: str, extra: str = "", *, where: str = "") -> Prompt:
    """A prompt of Instruction and Input."""
    return Prompt((Turn("instruction", instruction), Turn("input", extra)), where)
