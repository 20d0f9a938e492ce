"""What a recipe will need: memory and time of each stage, worked out from the model's shape and the number of tokens.

Trained weights cost 16 bytes a parameter (float32 weights, gradients and Adam's two moments), frozen ones 4; what a
forward keeps for its backward is counted layer by layer for `run.micro_tokens`. Work is 6 floating-point operations a
trained parameter and token (2 where nothing is learned; Kaplan et al. 2020), at a measured share of this machine's
speed of matrix products. The figures are estimates: they tell minutes from hours.
"""

import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from tetrad.model.config import DecoderConfig
from tetrad.report.reading import Reading
from tetrad.report.sections import Section, Table
from tetrad.settings.recipe import Recipe

TRAINED, FROZEN = 16, 4  # bytes a parameter
BASE = 450 << 20  # bytes of a process with torch in it
SHARE = 0.6  # of the speed of large products that a whole step reaches
DECODED = 0.2  # of it that sampling reaches, token by token


@dataclass(frozen=True)
class Stage:
    """params: a model's. trained, frozen: how many such models. tokens: learned from, each `passes` times; read: read
    only; sampled: written."""

    name: str
    trained: float
    frozen: float
    tokens: float = 0.0
    read: float = 0.0
    sampled: float = 0.0


def parameters(config: DecoderConfig) -> int:
    """Of a decoder with its head."""
    c, inner = config, config.heads * config.head_dim
    kv = config.kv_heads * config.head_dim
    bias = (inner + 2 * kv) if c.qkv_bias else 2 * c.head_dim if c.qk_norm else 0
    layer = c.hidden_size * (2 * inner + 2 * kv) + bias + 3 * c.hidden_size * c.ff + 2 * c.hidden_size
    return c.layers * layer + c.hidden_size + c.vocab_size * c.hidden_size * (1 if c.tied else 2)


def kept_bytes(config: DecoderConfig, micro_tokens: int) -> int:
    """What one micro-batch keeps for its backward, float32: inputs of norms, projections, attention, feed-forward."""
    width = 8 * config.hidden_size + 3 * config.heads * config.head_dim + 4 * config.ff
    return 4 * micro_tokens * (config.layers * width + 4 * config.hidden_size)


def stages(recipe: Recipe, readings: Mapping[str, Reading]) -> list[Stage]:
    """What each stage of a recipe has to do; only those whose text could be counted."""
    found = []
    if (r := readings.get("pretrain.text")) and r.tokens:
        found.append(Stage("pretrain", 1, 0, recipe.pretrain.tokens or r.tokens))
    if (r := readings.get("sft.data")) and r.tokens:
        found.append(Stage("sft", 1, 0, r.tokens * recipe.sft.epochs))
    if (r := readings.get("reward.data")) and r.tokens:
        held = sum(readings[n].tokens for n in ("reward.held_out", "reward.test") if n in readings)
        sampled, members = recipe.reward.normalise * recipe.reward.normalise_max_new / 2, recipe.reward.seeds
        best = 1 if recipe.reward.patience else 0  # the weights that did best on held-out records
        learned = members * r.tokens * recipe.reward.epochs
        found.append(Stage("reward", members, 1 + best * members, learned, members * held, sampled))
    if (r := readings.get("ppo.prompts")) and r.tokens:
        s = recipe.ppo
        replies = s.steps * s.batch
        long = r.tokens / len(r.lengths) + s.max_new * 0.6
        frozen = 1 if s.rewards else 1 + recipe.reward.seeds
        learned, sampled = 2 * replies * long * s.epochs, replies * s.max_new * 0.6
        found.append(Stage("ppo", 2, frozen, learned, 4 * replies * long, sampled))
    return found


def speed() -> float:
    """Floating-point operations a second of a large float32 product on this machine's processors."""
    a = np.ones((1024, 1024), np.float32)
    a @ a
    best = 1e9
    for _ in range(4):
        began = time.perf_counter()
        a @ a
        best = min(best, time.perf_counter() - began)
    return 2 * 1024**3 / best


def section(
    recipe: Recipe, config: DecoderConfig, readings: Mapping[str, Reading], *, guessed: bool = False
) -> Section:
    """A row a stage: models, memory, work and time on this machine's processors. guessed: tokens are not counted."""
    found = stages(recipe, readings)
    if not found:
        return Section("cost", "What it will need")
    n, rate, kept = parameters(config), speed(), kept_bytes(config, recipe.run.micro_tokens)
    rows, figures = [], dict[str, Any]()
    for stage in found:
        copies = stage.frozen + bool(stage.sampled)  # sampling lays the weights out once more
        memory = BASE + n * (stage.trained * TRAINED + copies * FROZEN) + kept
        work = 6 * n * stage.tokens + 2 * n * stage.read
        seconds = work / (rate * SHARE) + 2 * n * stage.sampled / (rate * DECODED)
        figures[stage.name] = {"memory_bytes": int(memory), "flop": work, "seconds": seconds}
        models, room = f"{stage.trained:g} + {stage.frozen:g}", f"{memory / 2**30:.1f} GiB"
        rows.append((stage.name, models, f"{stage.tokens / 1e6:.2f} M", room, duration(seconds)))
    figures["parameters"] = n
    columns = ("stage", "models trained + frozen", "tokens learned from", "memory", "time on this CPU")
    title = f"{n / 1e6:.1f} million parameters, {rate / 1e9:.0f} GFLOP/s here, within a factor of two"
    title += "; tokens guessed from characters" if guessed else ""
    return Section("cost", "What it will need", figures, (Table(title, columns, tuple(rows)),))


def duration(seconds: float) -> str:
    """`40 s`, `12 min`, `3 h`, `5 days`."""
    for size, name in ((86_400.0, "days"), (3600.0, "h"), (60.0, "min")):
        if seconds >= 1.5 * size:
            return f"{seconds / size:.0f} {name}"
    return f"{seconds:.0f} s"
