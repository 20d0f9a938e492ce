"""The public functions of `tetrad`: sample, score, read log-probabilities with gradients, save, run a recipe.

Shapes: B responses, T tokens of the longest. Whatever a user can mend raises `tetrad.UserError`.
"""

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, overload

import numpy as np
import torch
from torch import Tensor

from tetrad import objectives
from tetrad.console import Console
from tetrad.data import fields
from tetrad.data.pack import pack
from tetrad.errors import Stopped, UserError
from tetrad.inference import policy
from tetrad.inference.completions import Completion, too_long
from tetrad.inference.model_folder import own_sampling
from tetrad.inference.policy import Policy, load
from tetrad.model.huggingface import model_files
from tetrad.model.padded import forward
from tetrad.pipeline import recipe as recipes
from tetrad.pipeline import runner
from tetrad.pipeline.runner import RunResult
from tetrad.reward.model import SCORES_AT_ONCE, RewardModel, load_reward, score_samples
from tetrad.settings import use
from tetrad.settings.check import build
from tetrad.storage import write_folder
from tetrad.types import Prompt, Tokens

__all__ = ["Generation", "Output", "Policy", "RewardModel", "RunResult", "forward", "generate", "load", "load_reward"]
__all__ += ["logprobs", "objectives", "prompt_ids", "run", "save", "score"]
PromptLike = str | tuple[str, str] | Sequence[Mapping[str, Any]]
"""An Instruction, (Instruction, Input), or messages: [{"role": "user", "content": "Hello"}], of which the last is the
user's."""
Prompts = Sequence[PromptLike]


@dataclass(frozen=True, slots=True)
class Output:
    """One response, as vLLM's CompletionOutput.

    text: without the end token, up to a stop text. ids: all that were sampled, the end token included. logprobs: of
    each id, in nats, under the model at this temperature (at 1, if that is 0), before penalties and filters.
    finish_reason: "stop" at an end token or stop text, "length" if it was cut at max_new_tokens. valid_utf8: False if
    sampled bytes form no characters and are U+FFFD in the text. top_logprobs: in the place of each id the most likely
    ids and their log-probabilities, the most likely first; empty unless `logprobs` asks for some.
    """

    text: str
    ids: tuple[int, ...]
    logprobs: tuple[float, ...]
    finish_reason: str
    valid_utf8: bool = True
    top_logprobs: tuple[tuple[tuple[int, float], ...], ...] = ()


@dataclass(frozen=True, slots=True)
class Generation:
    """A prompt as the model read it, and its n responses: vLLM's RequestOutput."""

    prompt_ids: tuple[int, ...]
    outputs: tuple[Output, ...]


@overload
def generate(
    model: Policy, prompts: Prompts, *, n: None = None, logprobs: None = None, **settings: Any
) -> list[str]: ...
@overload
def generate(
    model: Policy, prompts: Prompts, *, n: int, logprobs: int | None = None, **settings: Any
) -> list[Generation]: ...
@overload
def generate(model: Policy, prompts: Prompts, *, logprobs: int, **settings: Any) -> list[Generation]: ...
def generate(
    model: Policy, prompts: Prompts, *, n: int | None = None, logprobs: int | None = None, **settings: Any
) -> list[str] | list[Generation]:
    """The responses of `tetrad generate`, by the weights as they are now: a text for each prompt or, with `n` or
    `logprobs`, a Generation.

    n: responses to each prompt. logprobs: the number of most likely ids that are noted in each place; those of the
    sampled ids always are. settings: of `tetrad generate --help`, as `max_new_tokens`, `temperature` (0 is greedy),
    `top_k`, `top_p`, `min_p`, `stop`, `seed`. A response follows from the seed, the number of its prompt and its own
    number. Errors: E-CONF-*, E-DATA-*, E-MODEL-TEMPLATE, E-MEM-FULL.
    """
    if "template" in settings:
        raise UserError("E-CONF-CONFLICT", "the template was chosen by `load`", where="template")
    values = own_sampling(model.folder) | settings
    sampling = use.agreed(build(use.Sample, values, {name: name for name in settings}), set(settings))
    for name, count, least in (("n", n, 1), ("logprobs", logprobs, 0)):
        if count is not None and count < least:
            raise UserError("E-CONF-RANGE", f"{name} = {count}", where=name, hint=f"{least} is the least")
    encoded = [policy.encode_prompt(model, prompt) for prompt in _prompts(prompts)]
    room, limit = sampling.max_new_tokens, model.model.config.max_positions
    for one in encoded:
        if len(one.ids) > limit - room:
            raise too_long(len(one.ids), limit - room, room, one.prompt.where)
    groups = list(policy.completions(model, encoded, sampling, n or 1, logprobs or 0)) if encoded else []
    if n is None and logprobs is None:
        return [group[0].text for group in groups]
    return [Generation(group[0].prompt_ids, tuple(map(_output, group))) for group in groups]


def prompt_ids(model: Policy, prompt: PromptLike) -> list[int]:
    """The token ids of a prompt by the model's template, up to where the response begins. Errors: E-DATA-*,
    E-MODEL-TEMPLATE."""
    return list(policy.encode_prompt(model, *_prompts([prompt])).ids)


def score(reward_model: RewardModel, prompts: Prompts, responses: Sequence[str | Output]) -> list[float]:
    """The reward of each response to the prompt of the same number: that of its text, as `tetrad score` gives it.

    A text is read as ended by itself; an Output that was cut, without an end token. Of an ensemble, the mean.
    Errors: E-CONF-CONFLICT, E-DATA-*, E-NUM-NONFINITE.
    """
    _refuse_unequal(prompts, responses)
    samples = []
    for prompt, response in zip(_prompts(prompts), responses, strict=True):
        output = Output(response, (), (), "stop") if isinstance(response, str) else response
        finished = output.finish_reason == "stop"
        policy.check_text(output.text, prompt.where)
        samples.append(Completion((), (), prompt.turns, output.text, prompt.where, finished))
    groups = (samples[start : start + SCORES_AT_ONCE] for start in range(0, len(samples), SCORES_AT_ONCE))
    return [score for group in groups for score in score_samples(reward_model, group)]


def logprobs(
    model: Policy, prompt_ids: Sequence[Sequence[int]], response_ids: Sequence[Sequence[int]], temperature: float = 1.0
) -> tuple[Tensor, Tensor]:
    """The log-probability of each response token after its prompt, [B, T] float32, in nats, differentiable, 0 where a
    row has no token; and the mask of the tokens, [B, T] bool. One forward of all rows: B is what fits.

    temperature: logits are divided by it. Gradients need `model.model.requires_grad_(True)`. Errors: E-CONF-CONFLICT,
    E-DATA-LONG.
    """
    _refuse_unequal(prompt_ids, response_ids)
    documents, device, most = [], model.placed, model.model.config.max_positions
    for number, (prompt, response) in enumerate(zip(prompt_ids, response_ids, strict=True)):
        ids = np.asarray([*prompt, *response], np.int32)
        if not prompt or len(ids) > most:
            what = f"{len(prompt)} tokens of prompt and {len(response)} of response; the model reads 1 to {most}"
            raise UserError("E-DATA-LONG", what, where=f"prompt {number}")
        documents.append(Tokens(ids, np.arange(len(ids)) >= len(prompt)))
    with device.compute():
        flat, _ = model.model(device.put(pack(documents)), "logprobs", temperature)
    lengths = torch.tensor([len(ids) for ids in response_ids], device=flat.device)
    mask = torch.arange(int(lengths.max()), device=flat.device) < lengths[:, None]
    return flat.new_zeros(mask.shape).masked_scatter(mask, flat), mask


def save(model: Policy, folder: str | Path) -> Path:
    """Writes the model, its tokenizer and template as a Hugging Face folder with a manifest of sha256, which
    `tetrad.load`, a recipe's `from` and transformers read; whole or not at all. Errors: E-IO-*, E-IO-WRITE where
    something has that name."""
    path = Path(folder)
    if path.exists():
        raise UserError("E-IO-WRITE", "this is there already", where=str(path), hint="name a new folder")
    write_folder(path, {**model_files(model.model), **model.tokenizer.files(model.template)}, {})
    return path


def run(
    recipe: str | Path | Mapping[str, Any], overrides: Mapping[str, Any] | None = None, *, quiet: bool = False
) -> RunResult:
    """Runs a recipe as `tetrad run` does: what is done is skipped, what was stopped goes on.

    recipe: a TOML file, or its tables as a dict, whose paths are relative to the current folder. overrides: as
    {"ppo.steps": 50} or {"ppo": {"steps": 50}}. quiet: prints nothing. Errors: all of `tetrad run`, E-NUM-VERDICT under
    `evaluate.strict` among them. Ctrl-C or SIGTERM save the running step and raise `tetrad.Stopped`.
    """
    read = recipes.read(recipe, overrides or {})
    if read.run.nproc > 1 or int(os.environ.get("WORLD_SIZE", "1")) > 1:
        hint = "start several by `tetrad run RECIPE.toml --nproc 2`"
        raise UserError("E-CONF-CONFLICT", "`tetrad.run` is one process", where="run.nproc", hint=hint)
    console = Console(read.run.log_every, quiet=quiet, outlives=True)
    with runner.stoppable(console, lambda doing: Stopped(f"in {doing}; the same call goes on from there")):
        return runner.run(read, console)


def _prompts(prompts: Prompts) -> list[Prompt]:
    """Errors: E-DATA-TYPE, E-DATA-CHAT, with the number of the prompt."""
    if isinstance(prompts, str):
        raise UserError("E-DATA-TYPE", "prompts is one text", where="prompts", hint="give a list of prompts")
    return [_prompt(prompt, f"prompt {number}") for number, prompt in enumerate(prompts)]


def _prompt(prompt: PromptLike, where: str) -> Prompt:
    pair = (prompt, "") if isinstance(prompt, str) else prompt
    if isinstance(pair, tuple) and len(pair) == 2 and all(isinstance(part, str) for part in pair):
        return policy.instruction_prompt(*pair, where=where)
    turns = fields.turns(pair, "messages", where)
    if turns[-1].role != "user":
        fields.chat("the last turn must be the user's", len(turns), where)
    return Prompt(turns, where)


def _output(c: Completion) -> Output:
    return Output(c.text, c.response_ids, c.logprobs, "stop" if c.finished else "length", c.valid_utf8, c.top)


def _refuse_unequal(prompts: Sequence[Any], responses: Sequence[Any]) -> None:
    if isinstance(responses, str) or len(prompts) != len(responses):
        what = f"{len(prompts)} prompts and {1 if isinstance(responses, str) else len(responses)} responses"
        raise UserError("E-CONF-CONFLICT", what, where="responses", hint="give a list with one for each prompt")
