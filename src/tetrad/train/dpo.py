"""DPO: the SFT model learns from comparisons what PPO learns from a reward model, without one and without sampling.

The policy's log-probabilities over the reference's, times beta, are the rewards of answers (`objectives.dpo`), and
these are fitted to people's order as the reward model's are: by pairs (Rafailov et al. 2023), by a fixed difference of
pairs (IPO, Azar et al. 2023), or by a list's whole order. The reference is the SFT model. It reads each micro-batch
just before the policy does, in the same packs and without dropout, which neither has: at the first step all rewards are
exactly 0, and a resumed run repeats them bit by bit. With adapters it is the very base that they lie on.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import cast

import torch
from torch import Tensor, nn

from tetrad.data.loader import batch_indices, epoch_size, steps_for
from tetrad.data.records import read_comparisons
from tetrad.data.source import Counts
from tetrad.distributed import collectives
from tetrad.distributed.device import Device, choose
from tetrad.distributed.sharding import place
from tetrad.model.config import read_config
from tetrad.model.lora import share_weights
from tetrad.model.transformer import CausalLM, frozen, narrowed
from tetrad.objectives import dpo, preference
from tetrad.reward.batches import Examples, PreferenceTargets, answer_tokens, preference_micros
from tetrad.reward.data import tokenized
from tetrad.seeds import seed_for
from tetrad.settings.dpo import Dpo
from tetrad.stages import POLICY
from tetrad.text.tokenizer import Tokenizer
from tetrad.training import adapters
from tetrad.training.context import StageContext
from tetrad.training.optimizer import Optimizer, lr_factor
from tetrad.training.prepare import first_parent
from tetrad.training.stage import Weights, finish, read_policy, report_counts, start, template_for
from tetrad.training.step import Loss, Metric, Microbatch, Term, Terms, mean_terms, timed, update
from tetrad.types import Packed

CHOSEN_DROP = 0.5  # of the chosen answers' log-probability under the reference, from which on a warning is due


def run(ctx: StageContext) -> None:
    s, data, max_norm = ctx.recipe.dpo, Comparisons(ctx), ctx.recipe.optim.max_grad_norm
    reference, policy = load_models(ctx, data)
    optimizer, terms, warned = Optimizer(policy, s.lr, ctx.recipe.optim), dpo_terms(s, reference), False
    with start(ctx, data.device, data.steps, {"model": Weights(policy), "optimizer": optimizer}) as stage:
        with ctx.console.progress("dpo", data.steps, stage.step) as bar:
            for step in stage.steps():
                micros, factor = data.batch(step), lr_factor(step, data.steps, s.warmup, s.schedule)
                limits = {"factor": factor, "max_norm": max_norm}
                stats = update(policy, optimizer, micros, terms, data.device, **limits, reads=(reference,))
                stage.log(step, loss=stats.loss, **stats.terms, grad_norm=stats.grad_norm, lr=stats.lr)
                warned = warned or warn_of_drop(ctx, stats.terms)
                shown = {name: stats.terms[name] for name in ("accuracy", "margin")}
                bar.advance(1, loss=stats.loss, **shown, **stage.timing(stats.tokens))
        metrics = evaluate(ctx, policy, data, terms)
        finish(ctx, stage, policy, data.tokenizer, data.template, metrics, parent=data.folder)


def load_models(ctx: StageContext, data: "Comparisons") -> tuple[CausalLM, CausalLM]:
    """The reference, frozen, and the policy: another copy of the SFT model, or adapters on the reference."""
    reference, shared = frozen(read_policy(data.folder, data.tokenizer, data.template)), None
    if ctx.recipe.dpo.adapters:
        policy = share_weights(CausalLM, reference)
        adapters.adapt(ctx, policy, seed_for(ctx.recipe.seed, "dpo"))
        shared = reference
    else:
        policy = read_policy(data.folder, data.tokenizer, data.template)
        narrowed(reference, data.device.frozen_dtype)
    return place(reference, data.device), place(policy, data.device, shared)


def warn_of_drop(ctx: StageContext, terms: Mapping[str, float]) -> bool:
    """Warns where the preferred answers have become far less likely, and says what to do."""
    now, shift = terms["logprob_chosen"], terms["reward_chosen"] / ctx.recipe.dpo.beta
    if shift >= CHOSEN_DROP * (now - shift):  # the reference's log-probability is below 0
        return False
    what = f"the chosen answers' log-probability is {now:.1f} nats, the SFT model's {now - shift:.1f}"
    ctx.console.warn(f"dpo: {what}: they are unlearned too; try sft_coef = 0.1, a higher beta or a lower lr")
    return True


def evaluate(ctx: StageContext, policy: CausalLM, data: "Comparisons", terms: Terms) -> dict[str, float]:
    """Loss and accuracy on records that were never trained on; empty without any."""
    held = data.validation
    if not held.records:
        return {}
    loss, means = mean_terms(policy, dpo_micros(held, range(len(held.records)), *data.packing), terms, data.device)
    text = f"held-out loss {loss:.3f}, accuracy {means['accuracy']:.1%}, margin {means['margin']:.3f}"
    ctx.console.say(f"dpo        {text}, {len(held.records)} comparisons")
    if means["accuracy"] <= 0.5:
        ctx.console.warn("dpo: on held-out comparisons the policy is no better than chance: more data, or a lower lr")
    return {"eval_loss": loss, "eval_accuracy": means["accuracy"], "eval_margin": means["margin"]}


# --- losses ---


def dpo_terms(s: Dpo, reference: CausalLM) -> Terms:
    """The losses of a micro-batch of `Comparisons`, and how its pairs stand, each list's pairs averaged."""

    def terms(model: nn.Module, micro: Microbatch) -> list[Term]:
        targets = cast(PreferenceTargets, micro.data)
        with torch.no_grad():
            ref_logprobs_D = answer_logprobs(reference, micro.packed)
        logprobs_D = answer_logprobs(cast(CausalLM, model), micro.packed)
        rewards_D = dpo.implicit_rewards(logprobs_D, ref_logprobs_D, s.beta)
        lengths_D, best_D = answer_tokens(micro.packed)[1], best_answers(targets, len(rewards_D))
        pairs = targets.winners_P, targets.losers_P, targets.weights_P
        accuracy, margin, *rewards = dpo.pair_sums(rewards_D, *pairs)
        logprobs = dpo.pair_sums(logprobs_D, *pairs)[2:]
        return [
            Loss("preference_loss", preference_loss(s, targets, rewards_D), "comparisons"),
            Loss("sft_loss", -(logprobs_D / lengths_D)[best_D].sum(), "best", s.sft_coef),
            Metric("accuracy", accuracy, "comparisons"),
            Metric("margin", margin, "comparisons"),
            Metric("reward_chosen", rewards[0], "comparisons"),
            Metric("reward_rejected", rewards[1], "comparisons"),
            Metric("logprob_chosen", logprobs[0], "comparisons"),
            Metric("logprob_rejected", logprobs[1], "comparisons"),
        ]

    return terms


def preference_loss(s: Dpo, targets: PreferenceTargets, rewards_D: Tensor) -> Tensor:
    """Summed over comparisons: of pairs the mean over a list's, with votes and smoothing as labels."""
    pairs, labels = (targets.winners_P, targets.losers_P, targets.weights_P), targets.smoothed(s.label_smoothing)
    if s.loss == "ipo":
        return dpo.ipo_loss_sum(rewards_D, *pairs, labels, s.beta)
    if s.loss == "sigmoid":
        return preference.pair_loss_sum(rewards_D, *pairs, targets.margins_P, labels)
    return preference.plackett_luce_losses(rewards_D[targets.ranked_N], targets.ranks_N, targets.bounds, "auto").sum()


def answer_logprobs(model: CausalLM, packed: Packed) -> Tensor:
    """The sum over each answer and its end token, float64 [D]."""
    documents_N, lengths_D = answer_tokens(packed)
    logprobs_N = model(packed, "logprobs")[0].double()
    return torch.zeros_like(lengths_D, dtype=torch.float64).index_add(0, documents_N, logprobs_N)


def best_answers(targets: PreferenceTargets, documents: int) -> Tensor:
    """Which documents are better than some other and worse than none, bool [D]."""
    best_D = torch.zeros(documents, dtype=torch.bool, device=targets.winners_P.device)
    best_D[targets.winners_P] = True
    best_D[targets.losers_P] = False
    return best_D


# --- data ---


class Comparisons:
    """The records, with a document for each answer in the SFT model's tokens; steps: of the whole training."""

    def __init__(self, ctx: StageContext) -> None:
        """Errors: E-DATA-*, E-CONF-MISSING, E-MODEL-*."""
        s = ctx.recipe.dpo
        self.ctx, self.device, self.folder = ctx, choose(ctx.recipe.run, ctx.folder.name), first_parent(ctx, *POLICY)
        self.tokenizer, self.template = Tokenizer.load(self.folder), template_for(ctx, self.folder)
        self.train, self.validation = self._read(s.data, ""), self._read(s.validation, "held-out ")
        self.mixture = ctx.files(s.data, s.weights).mixture(record.where for record in self.train.records)
        self.steps = steps_for(epoch_size(self.mixture), s.batch_size, s.epochs)
        self.packing = ctx.recipe.run.micro_batch_tokens, self.device

    def _read(self, names: tuple[str, ...], which: str) -> Examples:
        s, counts, scale = self.ctx.recipe.dpo, Counts(), self.ctx.recipe.reward.score_scale
        records = read_comparisons(self.ctx.files(names), s.score_gap, scale, counts)
        limit = s.max_tokens or read_config(self.folder).max_positions
        examples = tokenized(records, self.template, self.tokenizer, limit, s.overlong, counts, last_only=True)
        if names:
            report_counts(self.ctx, counts, len(examples.records), which)
        return examples

    @timed("data")
    def batch(self, step: int) -> list[Microbatch]:
        """This rank's micro-batches of a step."""
        indices = batch_indices(self.ctx.recipe.seed, self.mixture, self.ctx.recipe.dpo.batch_size, step).tolist()
        return dpo_micros(self.train, collectives.shard(indices), *self.packing)


def dpo_micros(
    examples: Examples, indices: Sequence[int], micro_batch_tokens: int, device: Device, shared_prefix: str = "auto"
) -> list[Microbatch]:
    """Whole records. Counts: "comparisons", and "best" answers."""
    records, documents = [examples.records[i] for i in indices], [examples.documents(i) for i in indices]
    micros = preference_micros(
        records, documents, micro_batch_tokens, 0.0, 1.0, device, shared_prefix=shared_prefix, every_label=True
    )
    best = [best_answers(micro.data, len(micro.packed.bounds) - 1) for micro in micros]
    return [replace(m, counts={**m.counts, "best": float(b.sum())}) for m, b in zip(micros, best, strict=True)]
