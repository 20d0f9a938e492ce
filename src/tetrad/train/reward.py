"""The reward model: one latent reward r from comparisons and scores, mixed in any proportion.

A comparison is modelled as P(i over j) = sigmoid(rho (r_i - r_j)), averaged over all pairs of a ranking (Ouyang et al.
2022, eq. 1), or by the order as a whole (Plackett-Luce); a rating y is modelled as r, in units of the scores' standard
deviation, or of their scale. The likelihoods are added, each divided by its own count. rho is learned where both kinds
occur, so that neither forces its scale on the other; a named annotator may err and has a score scale of its own
(reward.annotators). Training stops when the validation loss stops falling; several seeds make an ensemble.
"""

import math
from collections.abc import Sequence
from typing import Literal, cast

import torch
from torch import Tensor, nn

from tetrad.distributed import collectives
from tetrad.objectives import preference
from tetrad.reward import gate
from tetrad.reward.annotators import Annotators
from tetrad.reward.assessment import evaluate, normalise
from tetrad.reward.batches import PreferenceTargets, answer_tokens
from tetrad.reward.data import RewardData
from tetrad.reward.ensemble import Ensemble, Latent, Member, save
from tetrad.settings.reward import Reward
from tetrad.training.context import StageContext
from tetrad.training.early_stopping import EarlyStopping
from tetrad.training.optimizer import lr_factor
from tetrad.training.run_folder import StageRun
from tetrad.training.stage import start
from tetrad.training.step import Loss, Microbatch, StepStats, Term, Terms, mean_loss, timed, update

# Evaluations of the validation loss, at most: every ceil(steps / EVALUATIONS) steps, so that the last step may not be
# evaluated. After each one training may stop early.
EVALUATIONS = 10


def run(ctx: StageContext) -> None:
    s = ctx.recipe.reward
    data = RewardData(ctx)
    ensemble = Ensemble(ctx, data)
    best = EarlyStopping(ensemble.latents, s.patience if data.validation else 0)
    with start(ctx, data.device, data.steps, {**ensemble.parts(), "best": best}) as stage:
        train(ctx, stage, data, ensemble, best)
        best.restore_best()
        ensemble.trained()
        model = ensemble.model(data)
        annotators = ensemble.report_annotators(ctx, data)
        scale = normalise(ctx, model, data.train)
        metrics, evaluation = evaluate(ctx, model, data, scale)
        ctx.console.say(f"reward     {gate.apply(metrics, ctx.recipe.gate)}")
        save(ctx, stage, model, metrics, annotators=annotators, evaluation=evaluation)


def train(ctx: StageContext, stage: StageRun, data: RewardData, ensemble: Ensemble, best: EarlyStopping) -> None:
    """All steps, or those up to the evaluation that stops training early."""
    terms, validation_batch = preference_terms(ctx.recipe.reward), data.validation_batch()
    interval = math.ceil(data.steps / EVALUATIONS)
    eval_steps = [step for step in range(data.steps) if best.patience and (step + 1) % interval == 0]
    if best.should_stop:
        stage.end_early()
    with ctx.console.progress(
        "reward", data.steps, stage.step, evaluations=sum(s >= stage.step for s in eval_steps)
    ) as bar:
        for step in stage.steps():
            stats = [train_step(ctx, member, data, terms, step) for member in ensemble.members]
            metrics = mean_metrics(stats)
            stage.log(step, **metrics)
            bar.advance(1, loss=metrics["loss"], **stage.timing(sum(each.tokens for each in stats)))
            if step in eval_steps:
                with bar.evaluation():
                    best.update(eval_loss(ensemble.members, validation_batch, terms, data))
            if best.should_stop:
                ctx.console.say(f"reward     stops after {step + 1} steps: the validation loss stopped improving")
                stage.end_early()


def train_step(ctx: StageContext, member: Member, data: RewardData, terms: Terms, step: int) -> StepStats:
    """One optimizer step of one member."""
    s, max_norm = ctx.recipe.reward, ctx.recipe.optim.max_grad_norm
    micros = data.batch(member.seed, step)
    factor = lr_factor(step, data.steps, s.warmup, s.schedule)
    latent = member.latent.train()
    return update(latent, member.optimizer, micros, terms, data.device, factor=factor, max_norm=max_norm)


def mean_metrics(stats: Sequence[StepStats]) -> dict[str, float]:
    """Means over the members."""
    names = sorted({name for each in stats for name in each.terms})
    terms = {name: [each.terms[name] for each in stats if name in each.terms] for name in names}
    columns = {name: [getattr(each, name) for each in stats] for name in ("loss", "grad_norm", "lr")} | terms
    return {name: sum(values) / len(values) for name, values in columns.items()}


@timed("eval")
def eval_loss(members: Sequence[Member], micros: Sequence[Microbatch], terms: Terms, data: RewardData) -> float:
    """The mean over members, without dropout. All ranks use rank 0's value, so that all stop at the same step."""
    losses = [mean_loss(member.latent.eval(), micros, terms, data.device) for member in members]
    return collectives.from_main(sum(losses) / len(losses))


# --- losses ---


def preference_terms(s: Reward) -> Terms:
    """The losses of a micro-batch of `preference_micros`, for a `Latent`."""

    def terms(model: nn.Module, micro: Microbatch) -> list[Term]:
        latent, targets = cast(Latent, model), cast(PreferenceTargets, micro.data)
        all_scores_S = torch.arange(len(targets.scored_S), device=targets.scored_S.device)
        rewards = latent.reward(micro.packed, "both" if s.token_weight else "scores")
        rewards_D, token_rewards_N = rewards.tensor_split([len(micro.packed.bounds) - 1])
        scores = score_losses(s, latent, targets, rewards_D[targets.scored_S], all_scores_S).sum()
        center = preference.center_loss_sum(rewards_D, targets.winners_P, targets.losers_P, targets.weights_P)
        losses: list[Term] = [
            Loss("comparison_loss", comparison_loss(s, latent, targets, rewards_D), "comparisons", s.comparison_weight),
            Loss("score_loss", scores, "scores", s.score_weight),
            Loss("center_loss", center, "comparisons", s.center),
        ]
        losses += token_terms(s, latent, micro, token_rewards_N) if s.token_weight else []
        losses += prior_terms(s, latent.annotators, targets) if latent.annotators else []
        return losses

    return terms


def comparison_loss(s: Reward, latent: Latent, targets: PreferenceTargets, rewards_D: Tensor) -> Tensor:
    """The loss of all comparisons, summed over rankings; a ranking's annotator may have reversed it."""
    rewards_D = rewards_D * latent.log_rho.exp()
    if s.comparison_loss == "pairs" or not len(targets.ranked_N):  # without comparisons, the sum over no pairs: 0
        return pairwise_loss(rewards_D, targets, latent.annotators, s.label_smoothing)
    return listwise_loss(rewards_D, targets, latent.annotators)


def pairwise_loss(
    rewards_D: Tensor, targets: PreferenceTargets, annotators: Annotators | None, smoothing: float
) -> Tensor:
    """Bradley-Terry: -log sigmoid(r_winner - r_loser - margin), the mean over a ranking's pairs."""
    pairs = (targets.winners_P, targets.losers_P, targets.weights_P, targets.margins_P, targets.smoothed(smoothing))
    competence = annotators.competence(targets.annotators_L[targets.lists_P]) if annotators else None
    return preference.pair_loss_sum(rewards_D, *pairs, competence)


def listwise_loss(rewards_D: Tensor, targets: PreferenceTargets, annotators: Annotators | None) -> Tensor:
    """Plackett-Luce: -log probability of a ranking's whole order."""

    def losses(ranks_N: Tensor) -> Tensor:
        return preference.plackett_luce_losses(rewards_D[targets.ranked_N], ranks_N, targets.bounds, "auto")

    if annotators is None:
        return losses(targets.ranks_N).sum()
    competence = annotators.competence(targets.annotators_L)
    return preference.crowd_losses(losses(targets.ranks_N), losses(-targets.ranks_N), competence).sum()


def score_losses(s: Reward, latent: Latent, targets: PreferenceTargets, rewards_N: Tensor, indices_N: Tensor) -> Tensor:
    """Loss of each reward against its score, on the annotator's own scale; uncertain scores count less. [N]

    indices_N: which of the batch's scores each reward is compared with.
    """
    if latent.annotators:
        rewards_N = latent.annotators.predicted_rating(rewards_N, targets.annotators_S[indices_N])
    kind: Literal["mse", "bce"] = "bce" if s.score_loss == "bce" else "mse"
    return targets.weights_S[indices_N] * preference.score_losses(rewards_N, targets.targets_S[indices_N], kind)


def token_terms(s: Reward, latent: Latent, micro: Microbatch, rewards_N: Tensor) -> list[Term]:
    """The same losses on token rewards (Cobbe et al. 2021, section 4.2): of a score the mean of the losses at its
    answer's tokens, of a comparison one loss on each answer's mean token reward.

    rewards_N: the reward of the prefix before each token of the answers.
    """
    targets, (documents_N, lengths_D) = cast(PreferenceTargets, micro.data), answer_tokens(micro.packed)
    mean_D = torch.zeros_like(lengths_D).index_add(0, documents_N, rewards_N) / lengths_D.clamp(min=1)
    score_D = torch.full_like(lengths_D, -1, dtype=torch.int64)
    score_D[targets.scored_S] = torch.arange(len(targets.scored_S), device=score_D.device)
    has_score_N = score_D[documents_N] >= 0
    rewards_N, documents_N = rewards_N[has_score_N], documents_N[has_score_N]
    losses = score_losses(s, latent, targets, rewards_N, score_D[documents_N])
    comparisons, scores = comparison_loss(s, latent, targets, mean_D), (losses / lengths_D[documents_N]).sum()
    return [
        Loss("comparison_loss_tokens", comparisons, "comparisons", s.token_weight * s.comparison_weight),
        Loss("score_loss_tokens", scores, "scores", s.token_weight * s.score_weight),
    ]


def prior_terms(s: Reward, annotators: Annotators, targets: PreferenceTargets) -> list[Term]:
    """Negative log priors of the annotators' competences and of their score scales."""
    competence, scale = annotators.comparison_prior(targets.annotators_L), annotators.score_prior(targets.annotators_S)
    return [
        Loss("annotator_prior", competence, "comparisons", s.comparison_weight),
        Loss("scale_prior", scale, "scores", s.score_weight),
    ]
