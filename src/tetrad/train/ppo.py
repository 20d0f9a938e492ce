"""PPO with four models: the actor and the critic learn, the reward model and the reference are frozen.

One iteration: sample responses, score them, compute log-probabilities with actor and reference and values with the
critic, turn scores and KL into rewards and those into advantages, then a few epochs of clipped updates (Schulman et al.
2017; Ziegler et al. 2019; Ouyang et al. 2022). Old log-probabilities come from the training forward, not from the
sampler, and without dropout, as all of PPO. Arrays are [B, T] over response tokens: values[t] is the value before token
t, the score is added at the last one, and the end is terminal unless `bootstrap_truncated`.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn

from tetrad.objectives import ppo
from tetrad.reward import gate
from tetrad.rl.metrics import step_metrics, update_metrics
from tetrad.rl.minibatches import PPOBatch, PPOMicrobatch, entropy_term, minibatches, policy_terms
from tetrad.rl.models import Models, SharedActorCritic, actor_of, load_models, save_models
from tetrad.rl.monitor import Monitor, judges_of, manifest_notes, warn_unused_settings
from tetrad.rl.prompts import PtxBatch, PtxBatches, ptx_batches, read_policy_prompts
from tetrad.rl.rewards import KLController, RunningStd, token_rewards, whitened
from tetrad.rl.rollout import Rollout, read_logprobs, read_values, roll_out
from tetrad.rl.samples import Samples
from tetrad.settings.ppo import Ppo
from tetrad.training.context import StageContext
from tetrad.training.optimizer import lr_factor
from tetrad.training.stage import start
from tetrad.training.step import Loss, Metric, Microbatch, StepStats, Term, Terms, timed, update

PROGRESS_METRICS = ("score", "kl", "length", "finished")  # in the progress bar


@dataclass(frozen=True)
class PPOState:
    """What one iteration passes to the next besides the weights: beta, the monitor, the running std of scores."""

    kl: KLController
    monitor: Monitor
    running_std: RunningStd

    @classmethod
    def of(cls, ctx: StageContext) -> "PPOState":
        s = ctx.recipe.ppo
        monitor = Monitor(ctx.recipe.alarms, s.kl_target, s.critic_warmup, s.batch_size * s.samples_per_prompt)
        return cls(KLController(s.kl_coef, s.kl_target, s.kl_horizon), monitor, RunningStd())

    def state(self) -> dict[str, Any]:
        return {"beta": self.kl.beta, **self.monitor.state(), "scores": self.running_std.state()}

    def restore(self, saved: Mapping[str, Any]) -> None:
        self.kl.beta = saved["beta"]
        self.monitor.restore(saved)
        self.running_std.restore(saved["scores"])


def run(ctx: StageContext) -> None:
    s, seed = ctx.recipe.ppo, ctx.recipe.seed
    models = load_models(ctx, s)
    prompts = read_policy_prompts(ctx, s, models)
    warn_unused_settings(ctx)
    gate_failures = gate.before_training(ctx, s, [each.prompt for each in prompts.prompts])
    ptx, judges = ptx_batches(ctx, models.device), judges_of(ctx)
    state = PPOState.of(ctx)
    samples = Samples(ctx, s, models, prompts.prompts)
    with (
        start(ctx, models.device, s.steps, models.parts(), state.state, state.restore, ctx.recipe.run.grace) as stage,
        ctx.console.progress("ppo", s.steps, stage.step) as bar,
    ):
        for step in stage.steps():
            sampling = s.sampling(ctx.recipe.sampling.max_num_seqs)
            key = (seed, "rollout", step)
            rollout = roll_out(models.actor, *prompts.batch(step), key, sampling, models.tokenizer, models.device)
            batch = make_batch(models, rollout, s, state, step)
            if step == 0:
                gate.warn_of_scale(ctx, batch.source_scores)
            judged = {name: judge(rollout.samples) for name, judge in judges.items()}
            losses = learn(models, batch, s, (seed, step), ptx)
            metrics = step_metrics(batch, state.kl.beta, models.device, models.train_score_p999, judged) | losses
            if step >= s.critic_warmup:  # in warm-up there is no KL to react to
                state.kl.update(metrics["kl"], s.batch_size * s.samples_per_prompt)
            if models.ema:
                models.ema.update()
            metrics |= state.monitor.check(ctx, step, metrics)
            stage.log(step, **metrics)
            if step == s.steps - 1 or (s.eval_every and step % s.eval_every == 0) or state.monitor.abort_reason:
                samples.show(stage.sample, step, batch)
            speed = stage.timing(metrics["length"] * s.batch_size * s.samples_per_prompt)
            bar.advance(1, **{name: metrics[name] for name in PROGRESS_METRICS}, **speed)
            state.monitor.raise_if_strict()
        save_models(ctx, stage, models, manifest_notes(gate_failures, state.monitor))


@timed("forward")
def make_batch(models: Models, rollout: Rollout, s: Ppo, state: PPOState, step: int) -> PPOBatch:
    """Scores, the log-probabilities and values of three models, rewards, advantages and returns."""
    device, mask, inputs = models.device, rollout.mask_BT, (rollout, models.micro_batch_tokens, models.device)
    by_source = models.reward.by_source(rollout.samples)
    scores = torch.tensor(models.reward.total(by_source), dtype=torch.float32)
    logprobs = read_logprobs(models.actor, *inputs, s.temperature)
    ref_logprobs = read_logprobs(models.reference, *inputs, s.temperature)
    values, bootstrap = read_values(models.values, *inputs)
    score_std = state.running_std.update(scores, device) if s.reward_scaling == "running" else 1.0
    rewards = token_rewards(s, scores / score_std, logprobs, ref_logprobs, rollout, state.kl.beta)
    if s.reward_scaling == "whiten":
        rewards = whitened(rewards, mask, device, shift_mean=False)
    bootstrap = torch.where(rollout.finished_B, 0, bootstrap) if s.bootstrap_truncated else torch.zeros_like(scores)
    lam = 1.0 if step < s.critic_warmup else s.gae_lambda
    advantages, returns = ppo.gae(rewards, values, mask, s.gamma, lam, bootstrap)
    advantages = whitened(advantages, mask, device, shift_mean=True)
    return PPOBatch(rollout, by_source, scores, logprobs, ref_logprobs, rewards, advantages, values, bootstrap, returns)


@timed("update")
def learn(
    models: Models, batch: PPOBatch, s: Ppo, key: tuple[int, int], ptx: PtxBatches = lambda _: []
) -> dict[str, float]:
    """Epochs of mini-batches, each one update of the actor and one of the critic (a joint one on a shared trunk, whose
    value head has the critic's learning rate). key: seed and iteration."""
    iteration, per_iteration = key[1], s.ppo_epochs * s.num_minibatches
    factor = lr_factor(iteration, s.steps, warmup=0.0, schedule=s.schedule)
    warming = iteration < s.critic_warmup
    value_clip_range = 0.0 if warming else s.value_clip_range  # while the critic warms up it may move freely
    updates: list[tuple[str, StepStats]] = []
    actor_learns = not warming

    def train(role: str, model: nn.Module, micros: list[Microbatch], terms: Terms) -> StepStats:
        optimizer = models.critic_optimizer if model is models.critic else models.actor_optimizer
        assert optimizer
        stats = update(model, optimizer, micros, terms, models.device, factor=factor, max_norm=s.max_grad_norm)
        updates.append((role, stats))
        return stats

    models.freeze_shared_trunk(warming)
    for number, micros in enumerate(minibatches(batch, s, key, models.micro_batch_tokens, models.device)):
        if actor_learns:
            ptx_micros = ptx(iteration * per_iteration + number)
            stats = train("actor", models.actor_critic or models.actor, micros + ptx_micros, actor_terms(s))
            # on a shared trunk early stopping ends the updates of the critic too
            actor_learns = not s.early_stop_kl or stats.terms["approx_kl"] <= s.early_stop_kl
        elif warming and models.actor_critic:
            train("critic", models.actor_critic, micros, critic_terms(value_clip_range))
        if models.critic_optimizer:
            train("critic", models.critic, micros, critic_terms(value_clip_range))
    models.freeze_shared_trunk(False)
    rates = {"critic_lr": s.critic_lr * factor} | ({} if warming else {"actor_lr": s.actor_lr * factor})
    return update_metrics(updates) | rates


def actor_terms(s: Ppo) -> Terms:
    """The clipped policy loss and the entropy bonus; on a shared trunk, the value loss too; for pre-training text
    the language-model loss."""

    def terms(model: nn.Module, micro: Microbatch) -> list[Term]:
        actor = actor_of(model)
        if isinstance(micro.data, PtxBatch):
            return [Loss("ptx_loss", actor(micro.packed, "nll"), "ptx_tokens", micro.data.coefficient)]
        tokens = cast(PPOMicrobatch, micro.data)
        if isinstance(model, SharedActorCritic):
            hidden, (logprobs, entropy) = actor(micro.packed, "hidden, logprobs", s.temperature)
            values = model.critic.read(hidden, micro.packed, "values")
            shared = value_terms(values, tokens, s.value_clip_range, s.value_coef)
        else:
            (logprobs, entropy), shared = actor(micro.packed, "logprobs", s.temperature), []
        policy = policy_terms(logprobs, tokens, s.clip_range, s.clip_range, s.dual_clip)
        return [*policy, entropy_term(entropy, s.entropy_coef), *shared]

    return terms


def critic_terms(clip: float) -> Terms:
    """The value loss alone."""

    def terms(model: nn.Module, micro: Microbatch) -> list[Term]:
        return value_terms(model(micro.packed, "values"), micro.data, clip, 1.0)

    return terms


def value_terms(values: Tensor, tokens: PPOMicrobatch, clip: float, coefficient: float) -> list[Term]:
    """loss = max((V - R)^2, (clip(V, V_old - clip, V_old + clip) - R)^2) / 2."""
    sums = ppo.value_loss_sum(values, tokens.values, tokens.returns, clip or None, tokens.weights)
    return [
        Loss("value_loss", sums.loss, "losses", coefficient),
        Metric("value_clip_fraction", sums.clipped, "tokens"),
    ]
