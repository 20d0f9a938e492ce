"""How long a stage takes here: its own kind of step, timed with a model of its shape.

The whole model: a few of its layers stay in the caches, and their steps say too little of a deep one's. The weights are
random; time does not depend on them.
"""

import time
from collections.abc import Callable
from statistics import median
from typing import NamedTuple

import numpy as np
import torch

from tetrad.distributed.device import Device, choose
from tetrad.inference.engine import Request, generate
from tetrad.model.config import DecoderConfig
from tetrad.model.lora import ALL, ATTENTION, add_adapters
from tetrad.model.transformer import CausalLM, initialise
from tetrad.settings.common import Optim, Sampling
from tetrad.stages import Recipe
from tetrad.training.batches import language_micros
from tetrad.training.optimizer import Optimizer
from tetrad.training.step import Loss, Microbatch, Term, Terms, language_terms, mean_loss, update
from tetrad.types import StageCost, Tokens

REPEATS = 3
ENOUGH = 20.0  # seconds of one kind of step, after which it is not repeated
FEW = 4  # rows of a step of the engine that is nearly empty
DECODED = 16


class Times(NamedTuple):
    """Seconds of a step of learning and of one of reading; of the engine before its first token, and of one token of
    FEW responses and of `slots`."""

    learn: float
    read: float = 0.0
    begin: float = 0.0
    few: float = 0.0
    full: float = 0.0


def stage_seconds(recipe: Recipe, config: DecoderConfig, load: StageCost) -> float:
    """Seconds that the stage takes on this machine, as it is now. Errors: E-CONF-DEVICE, E-CONF-DTYPE, E-MEM-FULL."""
    times = _timed(recipe, config, load, choose(recipe.run))
    row = (times.full - times.few) / max(1, load.slots - FEW)
    sampled = 0.0
    if load.sampled:
        mean = load.sampled / (load.rounds * load.responses)
        steps = load.new + max(0, load.responses - load.slots) * mean / load.slots
        sampled = (times.begin + (times.few - FEW * row) * steps) * load.rounds + row * load.sampled
        sampled += (times.begin + times.few * load.new) * load.shown
    return (times.learn * load.tokens + times.read * load.read) / load.batch + sampled


def _timed(recipe: Recipe, config: DecoderConfig, load: StageCost, device: Device) -> Times:
    model = CausalLM(config)
    initialise(model, 0)
    model.to(device.torch_device)
    if load.adapters:
        add_adapters(model, recipe.lora.rank, recipe.lora.alpha, ALL if recipe.lora.targets == "all" else ATTENTION, 0)
    optimizer = Optimizer(model, 1e-6, Optim())

    def micros(labels: float) -> list[Microbatch]:
        documents = _documents(load, labels, config.vocab_size)
        return language_micros(documents, recipe.run.micro_batch_tokens, device)

    learned, read = micros(load.labels / load.tokens), micros(load.read_labels / max(load.read, 1.0))
    terms = _terms(load, load.labels)
    learn = _seconds(lambda: update(model, optimizer, learned, terms, device, max_norm=1.0))
    terms_read = _terms(load, load.read_labels)
    times = Times(learn, _seconds(lambda: mean_loss(model, read, terms_read, device)) if load.read else 0.0)
    if not load.sampled:
        return times
    (_, few), (begin, full) = (_sampling_seconds(model, load, rows, device) for rows in (FEW, load.slots))
    return times._replace(begin=begin, few=few, full=full)


def _terms(load: StageCost, labels: float) -> Terms:
    """What a model of this stage is read for: its likelihood, that of each token if responses are sampled, or the
    blocks alone."""
    return (_policy_terms if load.new else language_terms) if labels else _hidden_terms


def _policy_terms(model: torch.nn.Module, micro: Microbatch) -> list[Term]:
    logprobs, entropy = model(micro.packed, "logprobs")
    return [Loss("logprobs", logprobs.sum(), "tokens"), Loss("entropy", entropy.sum(), "tokens", -0.01)]


def _hidden_terms(model: torch.nn.Module, micro: Microbatch) -> list[Term]:
    """The blocks alone, as a scalar model reads them."""
    assert isinstance(model, CausalLM)
    return [Loss("hidden", model.model(micro.packed).float().mean(), "tokens")]


def _documents(load: StageCost, labels: float, vocab_size: int) -> list[Tokens]:
    """A batch of random ids, this share of them with a label."""
    ids = np.random.default_rng(0).integers(
        vocab_size, size=(max(1, load.batch // load.length), load.length), dtype=np.int32
    )
    train = np.arange(load.length) >= min(load.length - 1, round(load.length * (1 - labels)))
    return [Tokens(row, train) for row in ids]


def _sampling_seconds(model: CausalLM, load: StageCost, rows: int, device: Device) -> tuple[float, float]:
    """Of the engine before its first token, with its copy of the weights and the prompts, and of one token of each row:
    what the longer responses take beyond the shorter ones."""
    short, long = (Sampling(max_new_tokens=n) for n in (DECODED // 2, 2 * DECODED))
    ids, prompts = tuple(range(max(1, load.length - load.new // 2))), max(1, rows // load.group)

    def run(sampling: Sampling) -> Callable[[], object]:
        keys = [tuple((0, "pace", n, i) for i in range(n, rows, prompts)) for n in range(prompts)]
        requests = [Request(ids, sampling, each, ()) for each in keys]
        return lambda: generate(model, requests, device, rows)

    first, whole = _seconds(run(short)), _seconds(run(long))
    token = max(0.0, whole - first) / (long.max_new_tokens - short.max_new_tokens)
    return max(0.0, first - token * short.max_new_tokens), token


def _seconds(action: Callable[[], object]) -> float:
    """The median of a few, after one that compiles what it needs; of a slow one, fewer."""
    times: list[float] = []
    while not times or (len(times) <= REPEATS and (len(times) == 1 or sum(times) < ENOUGH)):
        start = time.perf_counter()
        action()
        if torch.cuda.is_initialized():
            torch.cuda.synchronize()
        times.append(time.perf_counter() - start)
    return median(times[1:])
