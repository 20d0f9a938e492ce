"""The reward model: one latent reward r from comparisons and scores, mixed in any proportion.

A comparison says P(i over j) = sigmoid(rho (r_i - r_j)), all pairs of a list averaged (Ouyang et al. 2022, eq. 1) or
the order as a whole (Plackett-Luce); a score says y = r in units of the scores' standard deviation. The likelihoods are
added, each divided by its own count. rho is learned where both kinds meet, so that neither forces its scale on the
other; who is named as annotator may err and has a scale of scores of its own (engine.annotators). Afterwards a
temperature is fitted on held-out pairs, and gain and bias give mean 0 and standard deviation 1 on replies of the policy
to held-out prompts (Ziegler et al. 2019). The figures go into the model's manifest, and the gate judges them.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import astuple
from pathlib import Path
from typing import cast

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import logsigmoid

from tetrad.data.loader import batch_indices, epoch_size, order, steps_for
from tetrad.data.records import answers, read_preferences, refuse_overlap
from tetrad.data.source import Counts
from tetrad.data.tokens import tokenize
from tetrad.engine import mesh
from tetrad.engine.annotators import LR as ANNOTATORS_LR
from tetrad.engine.annotators import Annotators, judged, numbers_of, written
from tetrad.engine.context import StageContext
from tetrad.engine.device import Device, choose
from tetrad.engine.optim import Optimizer, lr_factor
from tetrad.engine.preferences import Examples, Judgements, Pairs, Record, judgements, preference_micros
from tetrad.engine.prepare import first_parent
from tetrad.engine.rollout import read_questions, roll_out
from tetrad.engine.scoring import Reward as RewardFunction
from tetrad.engine.scoring import python_function, score_tokens, trained
from tetrad.engine.stage import (
    POLICY,
    Weights,
    finish,
    frozen,
    read_policy,
    report_counts,
    require_tokenizer,
    start,
    template_for,
)
from tetrad.engine.update import Micro, Terms, update
from tetrad.errors import UserError
from tetrad.model.decoder import ScalarModel
from tetrad.model.weights import read_scalar
from tetrad.objectives import preference
from tetrad.objectives.calibration import spearman
from tetrad.seeds import seed_for
from tetrad.settings.common import Sampling
from tetrad.settings.reward import Reward
from tetrad.text.template import Template
from tetrad.text.tokenizer import Tokenizer
from tetrad.train import gate
from tetrad.types import Score, Term


class Latent(nn.Module):
    """The reward model, rho and what is known of annotators, in one optimizer and one checkpoint."""

    def __init__(self, reward: ScalarModel, learn_rho: bool, annotators: Annotators | None = None) -> None:
        super().__init__()
        self.reward, self.annotators = reward, annotators
        self.log_rho = nn.Parameter(torch.zeros(()), requires_grad=learn_rho)


def run(ctx: StageContext) -> None:
    s, seed, micro_tokens = ctx.recipe.reward, ctx.recipe.seed, ctx.recipe.run.micro_tokens
    device = choose(ctx.recipe.run)
    policy, folder = first_parent(ctx, *POLICY, "from"), first_parent(ctx, "from", *POLICY)
    tokenizer, form = Tokenizer.load(folder), template_for(ctx, folder)
    require_tokenizer(policy, tokenizer)
    model = read_scalar(folder, seed_for(seed, "head"))
    counts = Counts()
    examples = read_examples(ctx, s.data, form, tokenizer, model, counts)
    report_counts(ctx, counts, len(examples.records))
    refuse_overlap(examples.records, read_preferences(ctx.files((*s.held_out, *s.test)), s.score_scale))
    tests = [read_examples(ctx, f, form, tokenizer, model, Counts()) for f in (s.held_out, s.test or s.held_out) if f]
    baselines = {spec.rpartition(":")[2]: python_function(spec) for spec in s.baselines}
    mean, std = score_moments(examples.records)
    numbers = numbers_of(examples.records) if s.annotators else {}
    annotators = Annotators(examples.records, numbers) if numbers else None
    latent = Latent(model, len({type(record) for record in examples.records}) > 1, annotators).to(device.place)
    model.model.dropout, model.model.token_dropout = s.dropout, s.token_dropout
    max_norm, muon_lr = ctx.recipe.optim.max_norm, s.muon_lr if s.optimizer == "muon" else 0.0
    optimizer = Optimizer(latent, s.lr, ctx.recipe.optim, muon_lr=muon_lr, quick={"annotators.": ANNOTATORS_LR})
    mixture = ctx.files(s.data, s.weights).mixture(record.where for record in examples.records)
    steps = steps_for(epoch_size(mixture), s.batch, s.epochs)
    terms = preference_terms(s)
    with start(ctx, device, steps, {"model": Weights(latent), "optimizer": optimizer}) as stage:
        with ctx.console.progress("reward", steps, stage.step) as bar:
            for step in stage.steps():
                wanted = mesh.share(batch_indices(seed, mixture, s.batch, step).tolist())
                records, documents = [examples.records[i] for i in wanted], [examples.documents(i) for i in wanted]
                micros = preference_micros(records, documents, micro_tokens, mean, std, device, numbers)
                factor = lr_factor(step, steps, s.warmup, s.schedule)
                latent.train()
                torch.manual_seed(seed_for(seed, "dropout", step, mesh.rank()))
                stats = update(latent, optimizer, micros, terms, device, factor=factor, max_norm=max_norm)
                stage.log(step, loss=stats.loss, grad_norm=stats.grad_norm, lr=stats.lr, **stats.terms)
                bar.advance(1, loss=stats.loss)
        told = report_annotators(ctx, latent, examples, numbers, device) if numbers else {}
        figures = normalise(ctx, model, policy, tokenizer, form, device)
        figures |= judge(ctx, model, tests, baselines, device) if tests else {}
        ctx.console.say(f"reward     {gate.verdict(figures, ctx.recipe.gate)}")
        finish(ctx, stage, model, tokenizer, form, figures, told)


def preference_terms(s: Reward) -> Terms:
    """The losses of a micro-batch of `preference_micros`, for a `Latent`."""

    def terms(model: nn.Module, micro: Micro) -> list[Term]:
        latent = cast(Latent, model)
        found: Judgements = micro.data
        r_D = latent.reward(micro.packed, "scores")
        sums = r_D[found.winners_P] + r_D[found.losers_P]
        parts = [
            Term("comparisons", _comparison_loss(s, latent, found, r_D), "comparisons", s.comparison_weight),
            Term("scores", _score_loss(latent, found, r_D), "scores", s.score_weight),
            Term("centre", (found.weights_P * sums.square()).sum(), "comparisons", s.center),
        ]
        if latent.annotators:
            of_lists, of_scores = latent.annotators.comparison_prior, latent.annotators.score_prior
            parts.append(Term("competence_prior", of_lists(found.by_L), "comparisons", s.comparison_weight))
            parts.append(Term("scale_prior", of_scores(found.by_S), "scores", s.score_weight))
        return parts

    return terms


def _comparison_loss(s: Reward, latent: Latent, found: Judgements, r_D: Tensor) -> Tensor:
    """Summed over lists: the mean over a list's pairs, or the whole order; who gave it may have it the wrong way."""
    scaled, who = r_D * latent.log_rho.exp(), latent.annotators
    if s.comparison_loss == "pairs" or not len(found.ranked_N):  # without lists, a sum of no pairs
        if who is None:
            pairs = (found.winners_P, found.losers_P, found.weights_P, found.margins_P)
            return preference.pair_loss_sum(scaled, *pairs)
        gaps = scaled[found.winners_P] - scaled[found.losers_P] - found.margins_P
        return (found.weights_P * preference.crowd_pair_losses(gaps, who.competence(found.by_P))).sum()
    ranked = scaled[found.ranked_N]
    losses = preference.plackett_luce_losses(ranked, found.ranks_N, found.bounds, "auto")
    if who is None:
        return losses.sum()
    back = preference.plackett_luce_losses(ranked, -found.ranks_N, found.bounds, "auto")
    c = who.competence(found.by_L)
    return -torch.logaddexp(logsigmoid(c) - losses, logsigmoid(-c) - back).sum()


def _score_loss(latent: Latent, found: Judgements, r_D: Tensor) -> Tensor:
    """Summed squared errors, each on its annotator's own scale."""
    rated = r_D[found.scored_S]
    if latent.annotators:
        rated = latent.annotators.rated(rated, found.by_S)
    return (rated - found.targets_S).square().sum()


def report_annotators(
    ctx: StageContext, latent: Latent, examples: Examples, numbers: Mapping[str, int], device: Device
) -> dict[str, bytes]:
    """Says who is how reliable; annotators.json has it all, with the records that look flipped."""
    rewards = torch.tensor(score_tokens(latent.reward, examples.tokens, device, ctx.recipe.run.micro_tokens))
    found = judgements(examples.records, 0.0, 1.0, torch.device("cpu"))
    scaled = rewards * latent.log_rho.detach().exp().cpu()
    reliabilities, suspects = judged(examples.records, found, scaled, numbers)
    if reliabilities:
        columns = ("annotator", "comparisons", "right", "from", "to")
        ctx.console.table("Annotators, the least reliable first", columns, [astuple(r) for r in reliabilities[:20]])
        ctx.console.say(f"reward     {len(suspects)} comparisons look given the wrong way round: annotators.json")
    return {"annotators.json": (json.dumps(written(reliabilities, suspects), ensure_ascii=False) + "\n").encode()}


def score_moments(records: Sequence[Record]) -> tuple[float, float]:
    """Mean and standard deviation of the training scores; 0 and 1 without any (or where all are equal)."""
    scores = np.array([record.score for record in records if isinstance(record, Score)])
    spread = float(scores.std()) if len(scores) else 0.0
    return (float(scores.mean()) if len(scores) else 0.0), spread or 1.0


def read_examples(
    ctx: StageContext, files: Sequence[str], form: Template, tokenizer: Tokenizer, model: ScalarModel, counts: Counts
) -> Examples:
    """The records of these files and their documents; over-long ones as `on_long` says, whole records at a time."""
    s = ctx.recipe.reward
    records = read_preferences(ctx.files(files), s.score_scale, counts)
    conversations = (conversation for record in records for conversation in answers(record))
    documents = list(tokenize(form, tokenizer, conversations, closed=False, counts=counts))
    return Examples.of(records, documents).fitted(s.max_tokens or model.config.max_positions, s.on_long, counts)


def judge(
    ctx: StageContext,
    model: ScalarModel,
    read: Sequence[Examples],
    baselines: Mapping[str, RewardFunction],
    device: Device,
) -> dict[str, float]:
    """Figures on test records, at the temperature that fits held-out ones: accuracy, rank correlation, calibration.

    read: held-out and test examples. The baselines' accuracy stands beside.
    """
    s = ctx.recipe.reward
    scored = [score_tokens(model, e.tokens, device, ctx.recipe.run.micro_tokens) for e in read]
    held_out, test = (Pairs.of(e, torch.tensor(r), s.pair_gap) for e, r in zip(read, scored, strict=True))
    temperature = held_out.temperature()
    figures = {"temperature": temperature, **test.figures(temperature)}
    said = ", ".join(f"{name} {figures[name]:.3f}" for name in ("pair_accuracy", "spearman", "ece") if name in figures)
    ctx.console.say(f"reward     on {len(test.gaps_P)} test pairs: {said}")
    lengths = torch.tensor([float(len(sample.text)) for sample in read[1].samples()])
    if "pair_accuracy" in (by_length := Pairs.of(read[1], lengths, s.pair_gap).figures(1.0)):
        figures["length_accuracy"] = max(by_length["pair_accuracy"], 1 - by_length["pair_accuracy"])
    for name, function in baselines.items():
        rated = torch.tensor(function(read[1].samples()))
        beside = Pairs.of(read[1], rated, s.pair_gap).figures(1.0)
        figures |= {f"{name}_{key}": beside[key] for key in ("pair_accuracy", "spearman") if key in beside}
    return figures


def normalise(
    ctx: StageContext, model: ScalarModel, policy: Path, tokenizer: Tokenizer, form: Template, device: Device
) -> dict[str, float]:
    """Sets gain and bias: mean 0 and standard deviation 1 on the policy's replies to the RM's held-out prompts; returns
    what they were, and how fresh replies to the same prompts come out afterwards."""
    s, seed = ctx.recipe.reward, ctx.recipe.seed
    actor = frozen(read_policy(policy, tokenizer, form)).to(device.place)
    limit, files = actor.config.max_positions, ctx.files(s.held_out or s.data)
    questions = read_questions(files, form, tokenizer, Counts(), limit, s.normalise_max_new)
    chosen = [questions[i] for i in order(seed, 0, len(questions))[: s.normalise]]
    sampling = Sampling(max_new=s.normalise_max_new, slots=ctx.recipe.sampling.slots)
    rate = trained(model, device, ctx.recipe.run.micro_tokens)
    used, fresh = (
        roll_out(actor, chosen, range(len(chosen)), (seed, name, 0), sampling, tokenizer, device).samples
        for name in ("normalise", "fresh")
    )
    scores = np.array(rate(used))
    mean, std = float(scores.mean()), float(scores.std())
    if not std > 1e-6:
        what = f"the reward of {len(chosen)} replies has standard deviation {std:.2g}: it tells none apart"
        raise UserError("E-NUM-REWARD", what, where="reward", hint="train it longer, or look at its data with care")
    with torch.no_grad():
        model.score.weight /= std
        model.bias.copy_((model.bias - mean) / std)
    again = np.array(rate(fresh))
    figures = {
        "policy_mean": mean,
        "policy_std": std,
        "fresh_mean": float(again.mean()),
        "fresh_std": float(again.std()),
    }
    lengths = torch.tensor([float(len(sample.reply_ids)) for sample in fresh])
    correlation = spearman(torch.from_numpy(again), lengths)
    return figures | ({"length_correlation": correlation} if np.isfinite(correlation) else {})
