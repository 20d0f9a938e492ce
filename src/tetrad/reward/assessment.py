"""A trained reward model: its scale is set on the policy's responses, and it is evaluated on data that it never saw.

Metrics go into the model's manifest, where the gate reads them; evaluation.json next to the model has the rest: slices,
probes, baselines, and each member of an ensemble.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, astuple, dataclass, replace
from typing import Any

import numpy as np
import torch

from tetrad.data.loader import order
from tetrad.data.source import Counts
from tetrad.distributed.device import Device
from tetrad.inference.completions import Completion, complete, read_encoded_prompts
from tetrad.model.transformer import ScalarModel, frozen
from tetrad.objectives.calibration import spearman
from tetrad.reward.batches import Examples
from tetrad.reward.data import RewardData
from tetrad.reward.evaluation import BETTER_IS_LONGER, BETTER_IS_SHORTER, Pairs, Slice, slices
from tetrad.reward.metrics import RewardMetrics, ScaleMetrics
from tetrad.reward.model import Reward, RewardModel, sample_tokenizer
from tetrad.reward.probes import Probe, probes, worst_shift
from tetrad.settings.common import Sampling
from tetrad.stages import POLICY
from tetrad.text.tokenizer import Tokenizer
from tetrad.training.context import StageContext
from tetrad.training.prepare import first_parent
from tetrad.training.stage import read_policy, template_for

MOST_SEEN = 4096  # training answers whose rewards are looked at


def normalise(ctx: StageContext, model: RewardModel, train: Examples) -> ScaleMetrics:
    """Sets each member's gain and bias: mean 0, standard deviation 1 on the policy's responses to validation prompts.

    Measures the rewards before, and afterwards those of fresh responses to the same prompts and of training answers.
    """
    tokenizer = Tokenizer.load(first_parent(ctx, *POLICY))
    tokenize_samples = sample_tokenizer(ctx, model.folder, tokenizer)
    responses, fresh = _responses(ctx, tokenizer, model.device)
    before = model.scores(tokenize_samples(responses))
    for member, rewards in zip(model.members, before, strict=True):
        _rescale(member, float(rewards.mean()), float(rewards.std()))
    after = model.scores(tokenize_samples(fresh))
    lengths = torch.tensor([float(len(sample.response_ids)) for sample in fresh])
    correlation = spearman(torch.from_numpy(after.mean(0)), lengths)
    seen = train.tokens[:: max(1, math.ceil(len(train.tokens) / MOST_SEEN))]
    return ScaleMetrics(
        policy_mean=float(before[0].mean()),
        policy_std=float(before[0].std()),
        fresh_mean=float(after.mean()),
        fresh_std=float(after.mean(0).std()),
        disagreement=float(after.std(0).mean()) if len(model.members) > 1 else None,
        length_correlation=correlation if math.isfinite(correlation) else None,
        train_score_p999=float(np.quantile(model.scores(seen).mean(0), 0.999)),
    )


def _responses(ctx: StageContext, tokenizer: Tokenizer, device: Device) -> list[list[Completion]]:
    """The policy's to validation prompts, twice."""
    s, seed, folder = ctx.recipe.reward, ctx.recipe.seed, first_parent(ctx, *POLICY)
    template = template_for(ctx, folder)
    actor = frozen(read_policy(folder, tokenizer, template)).to(device.torch_device)
    files, limit = ctx.files(s.validation or s.data), actor.config.max_positions
    prompts = read_encoded_prompts(files, template, tokenizer, Counts(), limit, s.normalise_max_new_tokens)
    chosen = [prompts[i] for i in order(seed, 0, len(prompts))[: s.normalise]]
    sampling = Sampling(max_new_tokens=s.normalise_max_new_tokens, max_num_seqs=ctx.recipe.sampling.max_num_seqs)
    numbers, keys = range(len(chosen)), [(seed, purpose, 0) for purpose in ("normalise", "fresh")]
    return [complete(actor, chosen, numbers, key, sampling, tokenizer, device) for key in keys]


@torch.no_grad()
def _rescale(member: ScalarModel, mean: float, std: float) -> None:
    """A model that rates all responses alike keeps its scale: amplified rounding errors look like a preference."""
    gain = 1 / std if std > 1e-6 else 1.0
    member.score.weight *= gain
    member.bias.copy_((member.bias - mean) * gain)


@dataclass(frozen=True)
class Agreement:
    """With the judgements on test records; None where undefined."""

    pair_accuracy: float | None
    spearman: float | None

    @classmethod
    def of(cls, pairs: Pairs) -> "Agreement":
        return cls(pairs.accuracy(), pairs.rank_metrics().spearman)


@dataclass(frozen=True)
class Evaluation:
    """What evaluation.json has besides the metrics. members: each alone. reliability: the diagram, by bin. pairs: the
    most wrong and the most right, with their texts."""

    slices: Sequence[Slice]
    probes: Sequence[Probe]
    members: Sequence[Agreement]
    reliability: Sequence[Mapping[str, float]] = ()
    pairs: Sequence[Mapping[str, str | float]] = ()


def evaluate(
    ctx: StageContext, model: RewardModel, data: RewardData, scale: ScaleMetrics
) -> tuple[RewardMetrics, dict[str, Any]]:
    """Metrics on test records at the temperature fitted on validation records, and all of evaluation.json; without such
    records the scale alone."""
    s, validation, test = ctx.recipe.reward, data.validation, data.test
    if validation is None or test is None:
        return RewardMetrics(**vars(scale)), {}
    on_validation = model.scores(validation.tokens)
    on_test = on_validation if test is validation else model.scores(test.tokens)
    temperature = Pairs.of(validation, on_validation.mean(0), s.pair_gap).temperature()
    pairs = Pairs.of(test, on_test.mean(0), s.pair_gap)
    members = [Agreement.of(Pairs.of(test, rewards, s.pair_gap)) for rewards in on_test]
    probed = probes(test.samples(), model.score_texts, s.probes)
    breakdown = slices(test, pairs, temperature)
    longer, shorter = (accuracy_by_length(breakdown, value) for value in (BETTER_IS_LONGER, BETTER_IS_SHORTER))
    metrics = RewardMetrics(
        **vars(pairs.metrics(temperature)),
        length_accuracy=_length_accuracy(test, s.pair_gap),
        baselines=_baselines(test, data.baselines, s.pair_gap),
        probe_padded=worst_shift(probed, "padded"),
        probe_duplicated=worst_shift(probed, "duplicated"),
        probe_phrase=worst_shift(probed, "phrase"),
        pair_accuracy_sd=_std(member.pair_accuracy for member in members),
        spearman_sd=_std(member.spearman for member in members),
        accuracy_longer=longer[0],
        accuracy_longer_high=longer[1],
        accuracy_shorter=shorter[0],
        accuracy_shorter_high=shorter[1],
    )
    _show(ctx, metrics, breakdown, probed)
    report = {
        "metrics": metrics.record(),
        **asdict(of_test(test, pairs, temperature, Evaluation(breakdown, probed, members))),
    }
    return replace(metrics, **vars(scale)), report


def of_test(test: Examples, pairs: Pairs, temperature: float, known: Evaluation) -> Evaluation:
    """With the diagram and the extreme pairs of the test records."""
    samples, shown = test.samples(), list[Mapping[str, str | float]]()
    for i in pairs.extremes():
        better, worse = (samples[int(numbers[i])] for numbers in (pairs.better_P, pairs.worse_P))
        texts = {"prompt": better.prompt, "better": better.text, "other_prompt": worse.prompt, "worse": worse.text}
        shown.append({**texts, "gap": float(pairs.gaps_P[i])})
    return replace(known, reliability=pairs.reliability(temperature), pairs=shown)


def _length_accuracy(test: Examples, gap: float) -> float | None:
    """Of choosing the longer answer or the shorter, whichever is right more often."""
    accuracy = Pairs.of(test, [float(len(sample.text)) for sample in test.samples()], gap).accuracy()
    return None if accuracy is None else max(accuracy, 1 - accuracy)


def _baselines(test: Examples, functions: Mapping[str, Reward], gap: float) -> dict[str, float]:
    metrics = {name: asdict(Agreement.of(Pairs.of(test, f(test.samples()), gap))) for name, f in functions.items()}
    return {f"{name}_{key}": x for name, each in metrics.items() for key, x in each.items() if x is not None}


def _std(values: Iterable[float | None]) -> float | None:
    """The standard deviation over the members of an ensemble; none of one."""
    known = [value for value in values if value is not None]
    return float(np.std(known, ddof=1)) if len(known) > 1 else None


def accuracy_by_length(breakdown: Sequence[Slice], value: str) -> tuple[float | None, float | None]:
    """The accuracy where the better answer is longer, or shorter, and the upper end of its interval; None for a slice
    that is too small."""
    return next(
        ((x.accuracy, x.accuracy_high) for x in breakdown if (x.by, x.value) == ("length", value)), (None, None)
    )


def _show(ctx: StageContext, metrics: RewardMetrics, breakdown: Sequence[Slice], probed: Sequence[Probe]) -> None:
    """The metrics in one line, and where the model is better and worse."""
    record = metrics.record()
    names = ("pair_accuracy", "spearman", "kendall", "raw_ece", "ece")
    summary = ", ".join(f"{name} {record[name]:.3f}" for name in names if name in record)
    ctx.console.say(f"reward     on {int(record['pairs'])} test pairs: {summary}")
    columns = ("by", "part", "pairs", "accuracy", "of the model's own", "scored", "spearman", "from", "to")
    rows = [
        (x.by, x.value, x.pairs, x.accuracy, x.confidence, x.scored, x.spearman, x.spearman_low, x.spearman_high)
        for x in breakdown
    ]
    if rows:
        ctx.console.table("Accuracy by part", columns, [["" if x is None else x for x in row] for row in rows])
    if probed:
        changes = ("changed", "by", "shift", "share raised")
        ctx.console.table("Answers changed, in standard deviations", changes, [astuple(p) for p in probed])
