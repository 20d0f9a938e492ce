"""The reward model: one latent reward r from comparisons and scores, mixed in any proportion.

A comparison says P(i over j) = sigmoid(rho (r_i - r_j)), all pairs of a list averaged (Ouyang et al. 2022, eq. 1) or
the order as a whole (Plackett-Luce); a score says y = r in units of the scores' standard deviation, or of their scale.
The likelihoods are added, each divided by its own count. rho is learned where both kinds occur, so that neither
forces its scale on the other; a named annotator may err and has a score scale of its own (reward.annotators). Training
stops when the validation loss stops falling; several seeds make an ensemble. The evaluation afterwards is in
reward.assessment, and the gate judges it.
"""

import math
from collections.abc import Sequence
from dataclasses import astuple, dataclass
from pathlib import Path
from typing import Literal, cast

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import logsigmoid

from tetrad.data.loader import batch_indices, epoch_size, order, steps_for
from tetrad.data.records import answers, read_preferences
from tetrad.data.source import Counts
from tetrad.data.tokens import tokenize
from tetrad.distributed import collectives
from tetrad.distributed.device import Device, choose
from tetrad.model.huggingface import members_content, read_causal, read_scalar
from tetrad.model.lora import merged
from tetrad.model.transformer import ScalarModel, frozen, grow_vocabulary
from tetrad.objectives import preference
from tetrad.registry import POLICY
from tetrad.reward import gate
from tetrad.reward.annotators import LR as ANNOTATORS_LR
from tetrad.reward.annotators import Annotators, judged, numbers_of, written
from tetrad.reward.assessment import Json, as_files, assess, highest_seen, normalise
from tetrad.reward.batches import Examples, PreferenceTargets, Record, judgements, preference_micros
from tetrad.reward.functions import python_function
from tetrad.reward.model import Reward as RewardFunction
from tetrad.reward.model import RewardModel, score_tokens
from tetrad.seeds import seed_for
from tetrad.settings.reward import Reward
from tetrad.text.chat_template import Template
from tetrad.text.tokenizer import Tokenizer
from tetrad.training import adapters
from tetrad.training.context import StageContext
from tetrad.training.early_stopping import EarlyStopping
from tetrad.training.optimizer import Optimizer, OptimizerGroup, lr_factor
from tetrad.training.prepare import first_parent
from tetrad.training.run_folder import StageRun, Stateful
from tetrad.training.stage import Weights, finish, report_counts, start, template_for
from tetrad.training.step import Loss, Microbatch, StepStats, Term, Terms, measured, timed, update
from tetrad.types import IGNORE, Score

LOOKS = 10  # evaluations on validation records, where training may stop early
MOST_HELD_OUT = 1000  # records of such an evaluation


class Latent(nn.Module):
    """The reward model, rho and the parameters of annotators, in one optimizer and one checkpoint."""

    def __init__(self, reward: ScalarModel, learn_rho: bool, annotators: Annotators | None = None) -> None:
        super().__init__()
        self.reward, self.annotators = reward, annotators
        self.log_rho = nn.Parameter(torch.zeros(()), requires_grad=learn_rho)


@dataclass(frozen=True)
class Member:
    """One member of the ensemble. Its head, dropout and order of records follow from its seed."""

    latent: Latent
    optimizer: Optimizer
    seed: int


@dataclass(frozen=True)
class RewardData:
    """What a reward model learns from, what it is measured on (validation, then test), and what it is compared with."""

    train: Examples
    tests: list[Examples]
    baselines: dict[str, RewardFunction]


def run(ctx: StageContext) -> None:
    s, device = ctx.recipe.reward, choose(ctx.recipe.run)
    folder = first_parent(ctx, "from", *POLICY)
    tokenizer, template = Tokenizer.load(folder), template_for(ctx, folder)
    models = new_models(ctx, folder, device)
    data = read_data(ctx, template, tokenizer, s.max_tokens or models[0].config.max_positions)
    trainer = RewardTrainer(ctx, data.train, data.tests[0] if data.tests else None, device)
    members = [trainer.member(model, seed) for model, seed in zip(models, seeds(ctx), strict=True)]
    latents = nn.ModuleList(member.latent for member in members)
    best = EarlyStopping(latents, s.patience if data.tests else 0)
    optimizers = OptimizerGroup([member.optimizer for member in members])
    parts: dict[str, Stateful] = {"model": Weights(latents), "optimizer": optimizers, "best": best}
    with start(ctx, device, trainer.steps, parts) as stage:
        train(ctx, stage, trainer, members, best)
        best.restore_best()
        model = RewardModel(models, tokenizer, template, device, folder, ctx.recipe.run.micro_batch_tokens)
        save(ctx, stage, model, data, report_annotators(ctx, members[0].latent, trainer) if trainer.numbers else {})


def read_data(ctx: StageContext, template: Template, tokenizer: Tokenizer, longest: int) -> RewardData:
    """Errors: E-DATA-*, E-CONF-FUNCTION."""
    s, counts = ctx.recipe.reward, Counts()
    train = read_examples(ctx, s.data, template, tokenizer, longest, counts)
    report_counts(ctx, counts, len(train.records))
    files = [f for f in (s.validation, s.test or s.validation) if f]
    tests = [read_examples(ctx, f, template, tokenizer, longest, Counts()) for f in files]
    return RewardData(train, tests, {spec.rpartition(":")[2]: python_function(spec) for spec in s.baselines})


def save(ctx: StageContext, stage: StageRun, model: RewardModel, data: RewardData, annotators: Json) -> None:
    """Sets the scale, measures, asks the gate, and leaves a model that others load."""
    metrics, evaluation = normalise(ctx, model), Json()
    metrics["train_score_p999"] = highest_seen(model, data.train)
    if data.tests:
        test_metrics, evaluation = assess(ctx, model, data.tests, data.baselines)
        metrics |= test_metrics
    ctx.console.say(f"reward     {gate.apply(metrics, ctx.recipe.gate)}")
    adapters.keep(ctx, model.members[0], model.folder)
    whole, tokenizer = exported(model.members, model.tokenizer)
    extra = as_files({"annotators": annotators, "evaluation": evaluation}) | members_content(whole)
    finish(ctx, stage, whole[0], tokenizer, model.form, metrics, extra)


def train(
    ctx: StageContext, stage: StageRun, trainer: "RewardTrainer", members: Sequence[Member], best: EarlyStopping
) -> None:
    """All steps, or those up to the evaluation that stops training early."""
    if best.should_stop:
        stage.end_early()
    looks = sum(map(trainer.looks, range(stage.step, trainer.steps))) if best.patience else 0
    with ctx.console.progress("reward", trainer.steps, stage.step, looks=looks) as bar:
        for step in stage.steps():
            stats = [trainer.learn(member, step) for member in members]
            stage.log(step, **trainer.figures(stats))
            speed = stage.timing(sum(one.tokens for one in stats))
            bar.advance(1, loss=sum(one.loss for one in stats) / len(stats), **speed)
            if best.patience and trainer.looks(step):
                with bar.look():
                    best.update(trainer.eval_loss(members))
            if best.should_stop:
                ctx.console.say(f"reward     stops after {step + 1} steps: held-out records gain no more")
                stage.end_early()


def new_models(ctx: StageContext, folder: Path, device: Device) -> list[ScalarModel]:
    """One per seed: the folder's model with a fresh head, or adapters on one frozen copy of it. Errors: E-MODEL-*,
    E-CKPT-*."""
    if not ctx.recipe.reward.adapters:
        return [read_scalar(folder, seed_for(seed, "head")) for seed in seeds(ctx)]
    base = frozen(read_causal(folder)).to(device.torch_device)
    return [adapters.scalar_on(ctx, base, seed_for(seed, "head")) for seed in seeds(ctx)]


def exported(models: Sequence[ScalarModel], tokenizer: Tokenizer) -> tuple[list[ScalarModel], Tokenizer]:
    """Whole models, and a tokenizer with a padding token: transformers reads scores at the last non-padding token."""
    whole, tokenizer = [merged(model) for model in models], tokenizer.with_pad()
    for model in whole:
        grow_vocabulary(model, tokenizer.size)
    return whole, tokenizer


def seeds(ctx: StageContext) -> list[int]:
    """One per member; the first is the recipe's own."""
    own = ctx.recipe.seed
    return [own, *(seed_for(own, "member", k) for k in range(1, ctx.recipe.reward.ensemble_size))]


class RewardTrainer:
    """What every member is trained on, and how: the training records, the order of batches, the losses."""

    def __init__(self, ctx: StageContext, examples: Examples, validation: Examples | None, device: Device) -> None:
        self.s, self.optim, self.run = ctx.recipe.reward, ctx.recipe.optim, ctx.recipe.run
        self.examples, self.device = examples, device
        self.zero, self.unit = score_unit(self.s, examples.records)
        self.numbers = numbers_of(examples.records) if self.s.annotators else {}
        self.mixture = ctx.files(self.s.data, self.s.weights).mixture(record.where for record in examples.records)
        self.steps = steps_for(epoch_size(self.mixture), self.s.batch_size, self.s.epochs)
        self.terms = preference_terms(self.s)
        self._held_out = validation and self._micros(
            validation, order(ctx.recipe.seed, 0, len(validation.records))[:MOST_HELD_OUT].tolist()
        )

    def member(self, model: ScalarModel, seed: int) -> Member:
        s = self.s
        annotators = Annotators(self.examples.records, self.numbers) if self.numbers else None
        both = len({type(record) for record in self.examples.records}) > 1
        latent = Latent(model, both, annotators).to(self.device.torch_device)
        model.model.dropout, model.model.token_dropout = s.dropout, s.token_dropout
        muon_lr = s.muon_lr if s.optimizer == "muon" else 0.0
        lr_overrides = {"annotators.": ANNOTATORS_LR}
        return Member(latent, Optimizer(latent, s.lr, self.optim, muon_lr=muon_lr, lr_overrides=lr_overrides), seed)

    def learn(self, member: Member, step: int) -> StepStats:
        """One optimizer step of one member."""
        wanted = collectives.shard(batch_indices(member.seed, self.mixture, self.s.batch_size, step).tolist())
        keys = [seed_for(member.seed, "dropout", step, place) for place in collectives.shard(range(self.s.batch_size))]
        factor = lr_factor(step, self.steps, self.s.warmup, self.s.schedule)
        member.latent.train()
        micros = self._micros(self.examples, wanted, keys)
        options = {"factor": factor, "max_norm": self.optim.max_grad_norm}
        return update(member.latent, member.optimizer, micros, self.terms, self.device, **options)

    def figures(self, stats: Sequence[StepStats]) -> dict[str, float]:
        """Means over the members."""
        names = {name for one in stats for name in one.terms}
        known = {name: [one.terms[name] for one in stats if name in one.terms] for name in sorted(names)}
        means = {name: sum(values) / len(values) for name, values in known.items()}
        rest = {name: sum(getattr(one, name) for one in stats) / len(stats) for name in ("loss", "grad_norm", "lr")}
        return {**rest, **means}

    def looks(self, step: int) -> bool:
        """Whether the validation loss is measured after this step."""
        return (step + 1) % math.ceil(self.steps / LOOKS) == 0

    @timed("eval")
    def eval_loss(self, members: Sequence[Member]) -> float:
        """The mean over members, without dropout. Rank 0's for all: ranks that differ would stop at different steps."""
        losses = [measured(m.latent.eval(), self._held_out or [], self.terms, self.device) for m in members]
        return collectives.from_main(sum(losses) / len(losses))

    @timed("data")
    def _micros(self, examples: Examples, wanted: Sequence[int], keys: Sequence[int] = ()) -> list[Microbatch]:
        records, documents = [examples.records[i] for i in wanted], [examples.documents(i) for i in wanted]
        # A shared prefix has no label after it but in the first answer, and every label counts here.
        shared = "never" if self.s.token_weight else self.s.shared_prefix
        args = (self.run.micro_batch_tokens, self.zero, self.unit, self.device, self.numbers, shared, keys)
        return preference_micros(records, documents, *args)


def preference_terms(s: Reward) -> Terms:
    """The losses of a micro-batch of `preference_micros`, for a `Latent`."""

    def terms(model: nn.Module, micro: Microbatch) -> list[Term]:
        latent = cast(Latent, model)
        targets: PreferenceTargets = micro.data
        every_S = torch.arange(len(targets.scored_S), device=targets.scored_S.device)
        r_D = latent.reward(micro.packed, "both" if s.token_weight else "scores")
        r_D, read_N = r_D[: len(micro.packed.bounds) - 1], r_D[len(micro.packed.bounds) - 1 :]
        centre = preference.center_loss_sum(r_D, targets.winners_P, targets.losers_P, targets.weights_P)
        lists = _comparison_loss(s, latent, targets, r_D)
        scores = _score_losses(s, latent, targets, r_D[targets.scored_S], every_S).sum()
        parts: list[Term] = [
            Loss("comparisons", lists, "comparisons", s.comparison_weight),
            Loss("scores", scores, "scores", s.score_weight),
            Loss("centre", centre, "comparisons", s.center),
        ]
        if s.token_weight:
            parts += token_terms(s, latent, micro, read_N)
        if latent.annotators:
            of_lists, of_scores = latent.annotators.comparison_prior, latent.annotators.score_prior
            parts.append(Loss("competence_prior", of_lists(targets.by_L), "comparisons", s.comparison_weight))
            parts.append(Loss("scale_prior", of_scores(targets.by_S), "scores", s.score_weight))
        return parts

    return terms


def token_terms(s: Reward, latent: Latent, micro: Microbatch, read_N: Tensor) -> list[Term]:
    """The same losses on each prefix (Cobbe et al. 2021, section 4.2): for a scored answer the mean over its tokens,
    for a list on each answer's mean. read_N: the head's output before each token of the answers."""
    targets: PreferenceTargets = micro.data
    ends = torch.tensor(micro.packed.bounds[1:], device=read_N.device)
    of_N = torch.searchsorted(ends, (micro.packed.targets_T != IGNORE).nonzero()[:, 0], right=True)
    count_D = torch.zeros(len(ends), device=read_N.device).index_add_(0, of_N, torch.ones_like(read_N))
    mean_D = torch.zeros_like(count_D).index_add(0, of_N, read_N) / count_D.clamp(min=1)
    score_of_D = torch.full_like(ends, -1)
    score_of_D[targets.scored_S] = torch.arange(len(targets.scored_S), device=ends.device)
    rated = score_of_D[of_N] >= 0
    losses = _score_losses(s, latent, targets, read_N[rated], score_of_D[of_N[rated]])
    lists, scores = _comparison_loss(s, latent, targets, mean_D), (losses / count_D[of_N[rated]]).sum()
    return [
        Loss("comparisons_read", lists, "comparisons", s.token_weight * s.comparison_weight),
        Loss("scores_read", scores, "scores", s.token_weight * s.score_weight),
    ]


def _comparison_loss(s: Reward, latent: Latent, targets: PreferenceTargets, r_D: Tensor) -> Tensor:
    """Summed over lists: the mean over a list's pairs, or the whole order; its annotator may have flipped it."""
    scaled, who = r_D * latent.log_rho.exp(), latent.annotators
    if s.comparison_loss == "pairs" or not len(targets.ranked_N):  # without lists, an empty sum
        labels = targets.labels_P * (1 - s.label_smoothing) + (1 - targets.labels_P) * s.label_smoothing
        pairs = (targets.winners_P, targets.losers_P, targets.weights_P, targets.margins_P, labels)
        return preference.pair_loss_sum(scaled, *pairs, who.competence(targets.by_P) if who else None)
    ranked = scaled[targets.ranked_N]
    losses = preference.plackett_luce_losses(ranked, targets.ranks_N, targets.bounds, "auto")
    if who is None:
        return losses.sum()
    back = preference.plackett_luce_losses(ranked, -targets.ranks_N, targets.bounds, "auto")
    c = who.competence(targets.by_L)
    return -torch.logaddexp(logsigmoid(c) - losses, logsigmoid(-c) - back).sum()


def _score_losses(s: Reward, latent: Latent, targets: PreferenceTargets, rewards_N: Tensor, of_N: Tensor) -> Tensor:
    """The loss of each reward against score number of_N, on its annotator's own scale; uncertain scores count less."""
    if latent.annotators:
        rewards_N = latent.annotators.rated(rewards_N, targets.by_S[of_N])
    kind: Literal["mse", "bce"] = "bce" if s.score_loss == "bce" else "mse"
    return targets.weights_S[of_N] * preference.score_losses(rewards_N, targets.targets_S[of_N], kind)


def report_annotators(ctx: StageContext, latent: Latent, trainer: RewardTrainer) -> Json:
    """Reports how reliable each annotator is; annotators.json has all of it, with the records that look flipped."""
    examples = trainer.examples
    rewards = torch.tensor(
        score_tokens(latent.reward, examples.tokens, trainer.device, ctx.recipe.run.micro_batch_tokens)
    )
    targets = judgements(examples.records, 0.0, 1.0, torch.device("cpu"))
    scaled = rewards * latent.log_rho.detach().exp().cpu()
    reliabilities, suspects = judged(examples.records, targets, scaled, trainer.numbers)
    if reliabilities:
        columns = ("annotator", "comparisons", "right", "from", "to")
        ctx.console.table("Annotators, the least reliable first", columns, [astuple(r) for r in reliabilities[:20]])
        ctx.console.say(f"reward     {len(suspects)} comparisons look given the wrong way round: annotators.json")
    return written(reliabilities, suspects)


def score_unit(s: Reward, records: Sequence[Record]) -> tuple[float, float]:
    """The score whose target is 0, and the unit of targets: mean and standard deviation of the training scores (0
    and 1 without any), or the declared scale's lowest score and width."""
    if s.score_loss != "gaussian" and s.score_scale:
        low, high = s.score_scale
        return low, high - low
    scores = np.array([record.score for record in records if isinstance(record, Score)])
    spread = float(scores.std()) if len(scores) else 0.0
    return (float(scores.mean()) if len(scores) else 0.0), spread or 1.0


def read_examples(
    ctx: StageContext, files: Sequence[str], template: Template, tokenizer: Tokenizer, longest: int, counts: Counts
) -> Examples:
    """The records of these files and their documents; too long ones as `overlong` says, whole records at a time."""
    s = ctx.recipe.reward
    records = read_preferences(ctx.files(files), s.score_scale, counts)
    conversations = (conversation for record in records for conversation in answers(record))
    documents = list(tokenize(template, tokenizer, conversations, closed=False, counts=counts))
    return Examples.of(records, documents).fitted(longest, s.overlong, counts)
