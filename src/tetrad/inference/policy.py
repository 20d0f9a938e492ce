"""Finished models by the name of a stage or folder: with their tokenizer and template, ready to respond or to score.

A response's random numbers are determined by (seed, number of the prompt, index of the sample): neither the batch
around it nor the count of samples changes it. A reward model reads what is written, as `tetrad score` does; a response
that was cut is read without an end token.
"""

from collections import defaultdict, deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

from tetrad.distributed.device import Device, chosen_device
from tetrad.errors import UserError
from tetrad.inference.completions import Completion, EncodedPrompt
from tetrad.inference.engine import Engine, Request
from tetrad.inference.fused_model import Current, Fused
from tetrad.inference.kv_cache import cache_bytes
from tetrad.inference.model_folder import (
    folder_template,
    model_folder,
    needed_template,
    refuse_small_vocabulary,
)
from tetrad.model.config import DecoderConfig, read_config
from tetrad.model.huggingface import read_causal
from tetrad.model.transformer import CausalLM, frozen
from tetrad.settings import use
from tetrad.text.chat_template import Template
from tetrad.text.tokenizer import Tokenizer
from tetrad.types import Prompt, Response, Turn


@dataclass(frozen=True)
class Frontend:
    """How a language model is asked, without its weights. template: None if the folder names none, as after
    pre-training."""

    config: DecoderConfig
    tokenizer: Tokenizer
    template: Template | None
    folder: Path

    @property
    def form(self) -> Template:
        """The template. Errors: E-MODEL-TEMPLATE."""
        return needed_template(self.template, self.folder)

    @property
    def ends(self) -> tuple[int, ...]:
        """All ids that end a response: the template's, if there is one, and those of tokenizer and model."""
        own = (self.template.end_id(self.tokenizer),) if self.template else ()
        return tuple(dict.fromkeys((*own, *self.tokenizer.eos_ids, *self.config.eos_ids)))


@dataclass(frozen=True)
class Policy(Frontend):
    """A language model in use."""

    model: CausalLM
    device: Device

    @property
    def fused(self) -> Fused:
        """The model in the engine's form, for the current weights."""
        return self._current.fused()

    def engine(self, slots: int, positions: int) -> Engine:
        """An engine where the weights are now. Errors: E-MEM-FULL."""
        return Engine(self.fused, self.placed, slots, positions, self.tokenizer)

    @property
    def placed(self) -> Device:
        """The device where the weights are now."""
        return replace(self.device, torch_device=self.model.head_weight.device)

    @cached_property
    def _current(self) -> Current:
        return Current(self.model, self.device.dtype)


def load_frontend(folder: str | Path, template: str = "") -> Frontend:
    """As `load`, without the weights. Errors: E-MODEL-*."""
    path = model_folder(folder)
    config, tokenizer = read_config(path), Tokenizer.load(path)
    refuse_small_vocabulary(config.vocab_size, tokenizer, path)
    return Frontend(config, tokenizer, folder_template(path, template), path)


def load(folder: str | Path, template: str = "", *, device: str = "auto", dtype: str = "auto") -> Policy:
    """The language model of a run's stage ("runs/NAME/ppo") or of a Hugging Face folder, without gradients.

    template: of `tetrad generate --help`, if the folder names none. device: "cpu", "cuda", or "auto", a GPU if there is
    one. dtype: what is computed in, "float32", "bfloat16" or "auto", as `run.dtype`; weights are float32. The model
    itself is `.model`, a torch module. Errors: E-MODEL-*, E-CKPT-*, E-CONF-{DEVICE,DTYPE,RANGE}.
    """
    path, place = model_folder(folder), chosen_device(device, dtype)
    model = frozen(read_causal(path)).to(place.torch_device)  # first: what is wrong with it says more
    return Policy(**vars(load_frontend(path, template)), model=model, device=place)


def encode_prompt(model: Policy, prompt: Prompt) -> EncodedPrompt:
    """The prompt's ids. Errors: E-DATA-CHAT, E-DATA-ENCODING, E-MODEL-*."""
    for turn in prompt.turns:
        check_text(turn.text, prompt.where)
    return EncodedPrompt(tuple(model.form.prompt(model.tokenizer, prompt.turns, prompt.where)), prompt)


def check_text(text: str, where: str) -> None:
    """Refuses Python's surrogates for input that is not UTF-8. Errors: E-DATA-ENCODING."""
    try:
        text.encode()
    except UnicodeEncodeError:
        raise UserError("E-DATA-ENCODING", "this is not UTF-8", where=where, hint="set a UTF-8 locale") from None


def completions(
    model: Policy, prompts: Sequence[EncodedPrompt], settings: use.Sample, samples_per_prompt: int = 1, top: int = 0
) -> Iterator[list[Completion]]:
    """The completions of each prompt, in order, as soon as they and those before them are done. top: so many of the
    most likely ids in each place are noted. Errors: E-DATA-LONG, E-MEM-FULL."""
    engine = model.engine(*cache_shape(prompts, settings, samples_per_prompt))
    waiting = deque(
        (engine.add(request(model, prompt, settings, number, samples_per_prompt, top)), prompt)
        for number, prompt in enumerate(prompts)
    )
    responses: dict[int, dict[int, Response]] = defaultdict(dict)
    for event in engine.events():
        if event.response:
            responses[event.request_id][event.sample_index] = event.response
        while waiting and len(responses[waiting[0][0]]) == samples_per_prompt:
            request_id, prompt = waiting.popleft()
            group = responses.pop(request_id)
            yield [completion(model, prompt, group[index]) for index in range(samples_per_prompt)]


def cache_shape(prompts: Sequence[EncodedPrompt], settings: use.Sample, samples_per_prompt: int = 1) -> tuple[int, int]:
    """Slots beside the cache's spare one, and positions of each: the longest prompt with the longest response."""
    longest = max((len(prompt.ids) for prompt in prompts), default=1)
    return min(settings.max_num_seqs, max(1, samples_per_prompt * len(prompts))), longest + settings.max_new_tokens


def cache_need(model: Policy, slots: int, positions: int) -> str:
    """The memory of a cache, as text."""
    mib = cache_bytes(model.model.config, slots + 1, positions, model.device.dtype) / 2**20
    return f"{slots} slot{'s' * (slots > 1)} and a spare one of {positions} positions, {mib:.3g} MiB"


def request(
    model: Policy, prompt: EncodedPrompt, settings: use.Sample, number: int, samples: int = 1, top: int = 0
) -> Request:
    """The engine's request. number: of the prompt, for its random numbers."""
    keys = tuple((settings.seed, "generate", index, number) for index in range(samples))
    return Request(prompt.ids, settings, keys, model.ends, settings.stop, top=top)


def completion(model: Policy, prompt: EncodedPrompt, response: Response) -> Completion:
    """The response, with the engine's text, and its prompt."""
    return Completion.of(prompt, response, response.text, model.tokenizer)


def instruction_prompt(instruction: str, extra: str = "", *, where: str = "") -> Prompt:
    """A prompt of Instruction and Input."""
    return Prompt((Turn("instruction", instruction), Turn("input", extra)), where)
