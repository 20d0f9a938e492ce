"""A trained reward model: its scale is set on the policy's responses, and it is evaluated on data that it never saw.

Metrics go into the model's manifest, where the gate reads them; evaluation.json next to the model has the rest: slices,
probes, baselines, and each member of an ensemble.
"""

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, astuple
from pathlib import Path
from typing import Any

import numpy as np
import torch

from tetrad.data.loader import order
from tetrad.data.source import Counts
from tetrad.distributed.device import Device
from tetrad.inference.completions import Completion, complete, read_encoded_prompts
from tetrad.model.transformer import ScalarModel, frozen
from tetrad.objectives.calibration import spearman
from tetrad.registry import POLICY
from tetrad.reward.batches import Examples
from tetrad.reward.evaluation import BETTER_IS_LONGER, BETTER_IS_SHORTER, Pairs, Slice, slices
from tetrad.reward.model import Reward, RewardModel, reader
from tetrad.reward.probes import Probe, probes, worst
from tetrad.settings.common import Sampling
from tetrad.storage import Content
from tetrad.text.chat_template import Template
from tetrad.text.tokenizer import Tokenizer
from tetrad.training.context import StageContext
from tetrad.training.prepare import first_parent
from tetrad.training.stage import read_policy, template_for

Json = dict[str, Any]
MOST_SEEN = 4096


def normalise(ctx: StageContext, reward_model: RewardModel) -> dict[str, float]:
    """Sets each member's gain and bias: mean 0, standard deviation 1 on the policy's responses to validation prompts.

    Returns the statistics before, and those of fresh responses to the same prompts afterwards.
    """
    folder = first_parent(ctx, *POLICY)
    tokenizer, template = Tokenizer.load(folder), template_for(ctx, folder)
    used, fresh = _responses(ctx, folder, tokenizer, template, reward_model.device)
    read = reader(ctx, reward_model.folder, tokenizer, template)

    def scores(samples: Sequence[Completion]) -> np.ndarray[Any, np.dtype[np.float64]]:
        return reward_model.scores(read(samples))

    before = scores(used)
    for member, row in zip(reward_model.members, before, strict=True):
        _rescale(member, float(row.mean()), float(row.std()))
    again = scores(fresh)
    metrics = {
        "policy_mean": float(before[0].mean()),
        "policy_std": float(before[0].std()),
        "fresh_mean": float(again.mean()),
        "fresh_std": float(again.mean(0).std()),
    }
    if len(reward_model.members) > 1:
        metrics["disagreement"] = float(again.std(0).mean())
    lengths = torch.tensor([float(len(sample.response_ids)) for sample in fresh])
    correlation = spearman(torch.from_numpy(again.mean(0)), lengths)
    return metrics | ({"length_correlation": correlation} if np.isfinite(correlation) else {})


def _responses(
    ctx: StageContext, folder: Path, tokenizer: Tokenizer, template: Template, device: Device
) -> Iterator[list[Completion]]:
    """The policy's to validation prompts, twice."""
    s, seed = ctx.recipe.reward, ctx.recipe.seed
    actor = frozen(read_policy(folder, tokenizer, template)).to(device.torch_device)
    files, limit = ctx.files(s.validation or s.data), actor.config.max_positions
    prompts = read_encoded_prompts(files, template, tokenizer, Counts(), limit, s.normalise_max_new_tokens)
    chosen = [prompts[i] for i in order(seed, 0, len(prompts))[: s.normalise]]
    sampling = Sampling(max_new_tokens=s.normalise_max_new_tokens, max_num_seqs=ctx.recipe.sampling.max_num_seqs)
    for name in ("normalise", "fresh"):
        key = (seed, name, 0)
        yield complete(actor, chosen, range(len(chosen)), key, sampling, tokenizer, device)


def highest_seen(reward_model: RewardModel, examples: Examples) -> float:
    """The 99.9 % quantile of the scores of (at most 4,096) training answers: higher scores were never seen."""
    documents = examples.tokens[:: max(1, math.ceil(len(examples.tokens) / MOST_SEEN))]
    scores = reward_model.scores(documents).mean(0)
    return float(np.quantile(scores, 0.999))


@torch.no_grad()
def _rescale(member: ScalarModel, mean: float, std: float) -> None:
    """A model that rates all responses alike keeps its scale: amplified rounding errors look like a preference."""
    gain = 1 / std if std > 1e-6 else 1.0
    member.score.weight *= gain
    member.bias.copy_((member.bias - mean) * gain)


def assess(
    ctx: StageContext, reward_model: RewardModel, tests: Sequence[Examples], baselines: Mapping[str, Reward]
) -> tuple[dict[str, float], Json]:
    """Metrics, and all of evaluation.json, on test records at the temperature fitted on validation records.

    tests: validation and test examples.
    """
    gap, test = ctx.recipe.reward.pair_gap, tests[1]
    scored = [reward_model.scores(e.tokens) for e in tests]
    validation, pairs = (Pairs.of(e, torch.from_numpy(r.mean(0)), gap) for e, r in zip(tests, scored, strict=True))
    temperature = validation.temperature()
    metrics = {"temperature": temperature, **pairs.figures(temperature)}
    of_length = _accuracy(Pairs.of(test, torch.tensor([float(len(c.text)) for c in test.samples()]), gap))
    metrics |= {"length_accuracy": max(of_length, 1 - of_length)} if of_length is not None else {}
    metrics |= _of_baselines(test, baselines, gap)
    probed = probes(test.samples(), reward_model.of_texts, ctx.recipe.reward.probes)
    for name in ("padded", "duplicated", "phrase"):
        metrics |= {f"probe_{name}": probe.shift} if (probe := worst(probed, name)) else {}
    members = [_both(Pairs.of(test, torch.from_numpy(row), gap)) for row in scored[1]]
    metrics |= _spread(members)
    parts = slices(test, pairs, temperature)
    metrics |= by_length(parts)
    show(ctx, metrics, parts, probed)
    details = {"slices": list(map(asdict, parts)), "probes": list(map(asdict, probed)), "members": members}
    return metrics, {"figures": metrics, **details}


def _of_baselines(test: Examples, baselines: Mapping[str, Reward], gap: float) -> dict[str, float]:
    metrics: dict[str, float] = {}
    for name, baseline in baselines.items():
        measured = _both(Pairs.of(test, torch.tensor(baseline(test.samples())), gap))
        metrics |= {f"{name}_{key}": value for key, value in measured.items() if value is not None}
    return metrics


def _both(pairs: Pairs) -> dict[str, float | None]:
    return {"pair_accuracy": _accuracy(pairs), "spearman": pairs.ranks().get("spearman")}


def _spread(members: Sequence[Mapping[str, float | None]]) -> dict[str, float]:
    """Standard deviations over the members of an ensemble; nothing of one."""
    metrics: dict[str, float] = {}
    for name in members[0]:
        known = [value for member in members if (value := member[name]) is not None]
        metrics |= {f"{name}_sd": float(np.std(known, ddof=1))} if len(known) > 1 else {}
    return metrics


def by_length(parts: Sequence[Slice]) -> dict[str, float]:
    """The accuracy where the better answer is longer and where it is shorter, each with the upper end of its interval;
    nothing for a slice that is too small."""
    sides = {BETTER_IS_LONGER: "longer", BETTER_IS_SHORTER: "shorter"}
    metrics: dict[str, float] = {}
    for part in parts:
        if part.by == "length" and part.value in sides and part.accuracy is not None and part.accuracy_high is not None:
            side = sides[part.value]
            metrics |= {f"accuracy_{side}": part.accuracy, f"accuracy_{side}_high": part.accuracy_high}
    return metrics


def _accuracy(pairs: Pairs) -> float | None:
    return float(pairs.correct().mean()) if len(pairs) else None


def show(ctx: StageContext, metrics: Mapping[str, float], parts: Sequence[Slice], probed: Sequence[Probe]) -> None:
    """The metrics in one line, and where the model is better and worse."""
    names = ("pair_accuracy", "spearman", "kendall", "raw_ece", "ece")
    summary = ", ".join(f"{name} {metrics[name]:.3f}" for name in names if name in metrics)
    ctx.console.say(f"reward     on {int(metrics['pairs'])} test pairs: {summary}")
    columns = ("by", "part", "pairs", "accuracy", "of the model's own", "scored", "spearman", "from", "to")
    rows = [
        (p.by, p.value, p.pairs, p.accuracy, p.confidence, p.scored, p.spearman, p.spearman_low, p.spearman_high)
        for p in parts
    ]
    if rows:
        ctx.console.table("Accuracy by part", columns, [["" if x is None else x for x in row] for row in rows])
    if probed:
        changes = ("changed", "by", "shift", "share raised")
        ctx.console.table("Answers changed, in standard deviations", changes, [astuple(p) for p in probed])


def as_files(contents: Mapping[str, Json]) -> dict[str, Content]:
    """JSON files to store next to the model; none for empty contents."""
    texts = {name: json.dumps(value, ensure_ascii=False, indent=1, allow_nan=False) for name, value in contents.items()}
    return {f"{name}.json": (text + "\n").encode() for name, text in texts.items() if contents[name]}
