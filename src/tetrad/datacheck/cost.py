"""What a recipe will need: memory and time of each stage, estimated from the model's shape and the number of tokens.

Trained weights cost 12 bytes per parameter (float32 weights and Adam's two moments), frozen ones 4; adapters cost the
same for their own few parameters, on one frozen base. Activations kept for the backward pass are counted layer by layer
for `run.micro_batch_tokens`; gradients, 4 bytes per trained parameter, take their place as the backward pass proceeds.
While responses are sampled there is a second copy of the weights, with a KV cache (`benchmarks/memory.py` compares with
measured peaks). Work is 6 floating-point operations per token and parameter of the blocks (4 where they are frozen
under adapters, 2 where nothing is trained; Kaplan et al. 2020), and per parameter of the head and token whose logits
are needed, at a measured share of this machine's speed of matrix products: enough to tell minutes from hours. Who
asks for more (`tetrad check --measure true`) gets the time of real steps of a model of this shape instead, which knows
the processor and the computing type; not of a stage that needs more memory than there is.
"""

import math
import os
import timeit
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path

import numpy as np

from tetrad.datacheck.reading import HELD_OUT, Reading
from tetrad.model.config import DecoderConfig
from tetrad.model.inspect import parameter_count
from tetrad.report.sections import Section, Table
from tetrad.settings.base import uses_reward_model
from tetrad.settings.common import Lora, OnPolicy, Run
from tetrad.settings.ppo import Ppo
from tetrad.stages import ON_POLICY, Recipe
from tetrad.types import MOST_SCORED, Score, StageCost

TRAINED, GRADIENT, FROZEN, COPY = 12, 4, 4, 2  # bytes per parameter; the copy is that in bfloat16
BASE = 305 << 20  # bytes of a process with torch in it
COMPILED = 145 << 20  # kernels that oneDNN compiles, where it trains
VARIETY = {"pretrain": 1 / 8, "sft": 1 / 3}  # of sizes that it compiles for: micro-batches alike, or nearly
PAIR = 135  # bytes per pair of test answers, where they are compared
SLICE = 512 << 20  # of logits, and of probabilities, on a GPU
SHARE = 0.6  # of the speed of large matrix products that a whole step reaches
ANSWERED = 0.6  # of the longest response, an average one
DECODED = 0.2  # of it that sampling reaches, token by token


Pace = Callable[[Recipe, DecoderConfig, StageCost], float]
"""The seconds of a stage on this machine, by trying."""


def kept_bytes(config: DecoderConfig, micro_batch_tokens: int, run: Run | None = None) -> int:
    """Activations that one micro-batch keeps: inputs of norms, projections, attention, feed-forward. They are float32,
    on a GPU that computes in 16 bit the norms' alone; with activation checkpointing those inside one block."""
    c, run = config, run or Run()
    width = 8 * c.hidden_size + 3 * c.heads * c.head_dim + 3 * c.ff
    block = 2 * width + 4 * c.hidden_size if _half(run) else 4 * width
    blocks = block + 4 * c.layers * c.hidden_size if run.activation_checkpointing else c.layers * block
    return micro_batch_tokens * (blocks + 16 * c.hidden_size)


def _half(run: Run) -> bool:
    """Whether it is a GPU that computes in 16 bit."""
    return run.device == "cuda" and run.dtype != "float32"


def adapter_parameters(config: DecoderConfig, lora: Lora) -> int:
    """Parameters of one adapter."""
    c, inner, kv = config, config.heads * config.head_dim, config.kv_heads * config.head_dim
    sides = 2 * (c.hidden_size + inner) + 2 * (c.hidden_size + kv)
    sides += 3 * (c.hidden_size + c.ff) if lora.targets == "all" else 0
    return c.layers * lora.rank * sides


def memory(stage: StageCost, config: DecoderConfig, recipe: Recipe) -> int:
    """A stage's peak memory in each process, in bytes: of the machine's, or of a GPU's where `run.device` is "cuda".
    What sampling needs is freed before training, but seldom returned to the system; the merged model of adapters reuses
    it. Where sampling comes after training, that has freed what it needed."""
    run, n, half = recipe.run, parameter_count(config), _half(recipe.run)
    item, frozen = (2, FROZEN if stage.adapters else COPY) if half else (4, FROZEN)
    cache = 2 * item * config.layers * config.kv_heads * config.head_dim
    trained = n * stage.trained + adapter_parameters(config, recipe.lora) * stage.adapters
    slots = min(stage.slots, math.ceil(stage.responses / run.nproc)) if stage.name in ON_POLICY else stage.slots
    sampling = n * item + (slots + 1) * stage.positions * cache if stage.sampled else 0
    micro = min(run.micro_batch_tokens, math.ceil(stage.batch / run.nproc) or run.micro_batch_tokens)
    parts = 1 if run.shard == "none" else run.nproc
    held, gradients = (TRAINED * trained + n * stage.frozen * frozen) / parts, GRADIENT * trained / parts
    training = held + max(kept_bytes(config, micro, run), gradients)
    training += n * COPY * (half or run.dtype == "bfloat16")
    base = min(2 * SLICE, 8 * micro * config.vocab_size) if run.device == "cuda" else _base(stage)
    if stage.after:
        after = n * frozen * (stage.trained + stage.frozen + stage.after) + sampling
        return int(base + max(training, after, held + PAIR * stage.pairs))
    return int(base + training + sampling)


def _base(stage: StageCost) -> int:
    """Bytes of a process before it has a model, and of the kernels for the sizes of its micro-batches."""
    with suppress(OSError):
        if "avx512f" in Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace"):
            return BASE + int(COMPILED * VARIETY.get(stage.name, 1.0))
    return BASE


def stages(recipe: Recipe, readings: Mapping[str, Reading]) -> list[StageCost]:
    """The work of each stage of a recipe; only of those whose tokens could be counted."""
    costs = []
    if (r := readings.get("pretrain.text")) and r.tokens:
        s = recipe.pretrain
        tokens = s.tokens or r.tokens
        length = s.sequence_length
        costs.append(StageCost("pretrain", 1, 0, tokens, labels=tokens, batch=s.batch_tokens, length=length))
    if (r := readings.get("sft.data")) and r.tokens:
        on, epochs, length = recipe.sft.adapters, recipe.sft.epochs, r.tokens // len(r.lengths)
        labels, batch = r.trained * epochs, recipe.sft.batch_size * length
        costs.append(StageCost("sft", not on, on, r.tokens * epochs, labels, adapters=on, batch=batch, length=length))
    if (r := readings.get("reward.data")) and r.tokens:
        costs.append(_reward(recipe, r, [readings[name] for name in HELD_OUT["reward.data"] if name in readings]))
    if (r := readings.get("dpo.data")) and r.tokens:
        costs.append(_dpo(recipe, r, readings.get("dpo.validation")))
    for name in ON_POLICY:
        if (r := readings.get(f"{name}.prompts")) and r.tokens:
            costs.append(_on_policy(recipe, name, r, _answer_tokens(getattr(recipe, name).max_new_tokens, readings)))
    return costs


def _reward(recipe: Recipe, r: Reading, held: Sequence[Reading]) -> StageCost:
    s, members = recipe.reward, recipe.reward.ensemble_size
    best = members if s.patience and not s.adapters else 0  # the best weights on validation records
    trained, frozen = (0, 1) if s.adapters else (members, best)
    return StageCost(
        "reward",
        trained,
        frozen,
        tokens=members * r.tokens * s.epochs,
        read=members * sum(each.tokens for each in held),
        sampled=s.normalise * s.normalise_max_new_tokens / 2,
        adapters=members if s.adapters else 0,
        slots=min(s.normalise, recipe.sampling.max_num_seqs),
        positions=s.normalise_max_new_tokens + max(r.lengths),
        batch=s.batch_size * r.tokens // len(r.lengths),
        length=r.tokens // len(r.lengths),
        after=1,  # generates responses that set the scale
        pairs=_pairs(held[-1]) if held else 0.0,
        responses=s.normalise,
        new=s.normalise_max_new_tokens,
    )


def _pairs(test: Reading) -> float:
    """Of scored answers, about: each with each that has another score."""
    return min(MOST_SCORED, sum(isinstance(record, Score) for record in test.records)) ** 2 / 2


def _dpo(recipe: Recipe, r: Reading, held: Reading | None) -> StageCost:
    """The policy learns, or adapters on the reference do; the reference reads each step's tokens first."""
    s, length = recipe.dpo, r.tokens // len(r.lengths)
    tokens, labels = r.tokens * s.epochs, r.trained * s.epochs
    apart = (2 * held.tokens, 2 * held.trained) if held else (0, 0)
    read = tokens + apart[0], labels + apart[1]
    shape = {"adapters": s.adapters, "batch": s.batch_size * length, "length": length}
    return StageCost("dpo", not s.adapters, 1, tokens, labels, *read, **shape)


def _answer_tokens(most: int, readings: Mapping[str, Reading]) -> float:
    """Of a response: as the answers of SFT on average, without these a share of the longest."""
    if (r := readings.get("sft.data")) and r.answer_lengths:
        return min(most, sum(r.answer_lengths) / len(r.answer_lengths))
    return ANSWERED * most


def _on_policy(recipe: Recipe, name: str, r: Reading, answer: float) -> StageCost:
    s: OnPolicy = getattr(recipe, name)
    batch = s.batch_size * s.samples_per_prompt
    long = r.tokens / len(r.lengths) + answer
    judges = recipe.reward.ensemble_size if uses_reward_model(s.rewards) else 0
    learners = 2 if isinstance(s, Ppo) and s.critic != "shared" else 1
    trained, frozen = (0, 1) if s.adapters else (learners, 1 + judges + bool(s.ema_decay))
    return StageCost(
        name,
        trained,
        frozen,
        tokens=learners * s.steps * batch * long * s.epochs,
        labels=s.steps * batch * answer * s.epochs,
        read=(3 + isinstance(s, Ppo)) * s.steps * batch * long,  # actor, reference, reward, critic
        read_labels=2 * s.steps * batch * answer,  # by actor and reference
        sampled=s.steps * batch * answer,
        adapters=learners + bool(judges) / 4 if s.adapters else 0,  # the reward model's is not trained
        slots=min(batch, recipe.sampling.max_num_seqs),
        positions=s.max_new_tokens + max(r.lengths),
        batch=int(batch / s.num_minibatches * long),
        length=int(long),
        rounds=s.steps,
        responses=batch,
        new=s.max_new_tokens,
        group=s.samples_per_prompt,
        shown=2 * (1 + (s.steps - 1) // s.eval_every if s.eval_every else 0) + 2,  # by actor and reference
    )


def work(stage: StageCost, config: DecoderConfig) -> float:
    """Floating-point operations of training and reading; those of sampling come on top."""
    head = config.vocab_size * config.hidden_size
    blocks = parameter_count(config) - head * (1 if config.tied else 2)
    per_token = 6 if stage.trained else 4
    learned, read = (blocks * t + head * n for t, n in ((stage.tokens, stage.labels), (stage.read, stage.read_labels)))
    return per_token * learned + 2 * read


def speed() -> float:
    """Floating-point operations per second of a large float32 matrix product on this machine's CPU."""
    a = np.ones((1024, 1024), np.float32)
    return 2 * 1024**3 / min(timeit.repeat(lambda: a @ a, number=1, repeat=5))


def section(
    recipe: Recipe,
    config: DecoderConfig,
    readings: Mapping[str, Reading],
    *,
    guessed: bool = False,
    pace: Pace | None = None,
) -> Section:
    """One row per stage: models, memory, work and time on this machine. guessed: tokens are estimated; pace: what
    measures the time, where an estimate is not enough."""
    section, costs = Section("cost", "What it will need"), stages(recipe, readings)
    if not costs:
        return section
    n, rate, there = parameter_count(config), speed(), machine_memory()
    rows = []
    for stage in costs:
        needed = memory(stage, config, recipe)
        every = needed * recipe.run.nproc
        if every > there and recipe.run.device != "cuda":
            text = f"the {stage.name} stage needs about {every / 2**30:.1f} GiB on a CPU"
            text += f", {recipe.run.nproc} processes together" if recipe.run.nproc > 1 else ""
            section.add("warning", "memory", f"{text}, and this machine has {there / 2**30:.1f} GiB")
        flop = work(stage, config)
        seconds = flop / (rate * SHARE) + 2 * n * stage.sampled / (rate * DECODED)
        seconds = pace(recipe, config, stage) if pace and every <= there else seconds
        section.metrics[stage.name] = {"memory_bytes": needed, "flop": flop, "seconds": seconds}
        models, room = f"{stage.trained:g} + {stage.frozen:g}", f"{needed / 2**30:.1f} GiB"
        models += f", {math.ceil(stage.adapters)} adapters" if stage.adapters else ""
        rows.append((stage.name, models, f"{stage.tokens / 1e6:.2f} M", room, duration(seconds)))
    section.metrics["parameters"] = n
    when, source = "time on this CPU", f"{rate / 1e9:.0f} GFLOP/s here, within a factor of two"
    if pace:
        when, source = "time here", "times from trial steps"
    per = "memory" if recipe.run.nproc == 1 else "memory a process"
    columns = ("stage", "models trained + frozen", "tokens learned from", per, when)
    title = f"{n / 1e6:.1f} million parameters; {source}"
    title += "; tokens guessed from characters" if guessed else ""
    section.tables.append(Table(title, columns, rows))
    return section


def machine_memory() -> int:
    """Bytes of memory of this machine, or of the container that we run in."""
    limits = [os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")]
    with suppress(OSError, ValueError):  # "max" means no limit
        limits.append(int(Path("/sys/fs/cgroup/memory.max").read_text(encoding="ascii")))
    return min(limits)


def duration(seconds: float) -> str:
    """`40 s`, `12 min`, `3 h`, `5 days`."""
    for size, name in ((86_400.0, "days"), (3600.0, "h"), (60.0, "min")):
        if seconds >= 1.5 * size:
            return f"{seconds / size:.0f} {name}"
    return f"{seconds:.0f} s"
