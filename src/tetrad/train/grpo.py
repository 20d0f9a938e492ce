"""RLOO, GRPO and their kin: PPO's rollout without a critic. Two models and a reward; the actor alone learns.

One iteration: sample a group of responses to each prompt, score them, and compare each with its group: its advantage is
the score minus the mean of the others (RLOO: Ahmadian et al. 2024), minus the mean (Dr. GRPO: Liu et al. 2025), or that
over the group's standard deviation (GRPO: Shao et al. 2024). All tokens of a response have its advantage. KL to the
reference is priced beside the policy's loss, token by token (GRPO), or for the whole response within its score (RLOO).
Then epochs of clipped updates as in PPO, upwards further if asked (DAPO: Yu et al. 2025); in one update of an iteration
every ratio is 1, and that is REINFORCE. Old log-probabilities come from the training forward, without dropout. A group
of equal scores has advantages of exactly 0 and counts in every mean, as any other. Arrays are [B, T] over response
tokens; the responses to one prompt are adjacent rows, on one process.
"""

import torch
from torch import Tensor, nn

from tetrad.objectives import grpo
from tetrad.reward import gate
from tetrad.rl.metrics import group_metrics, step_metrics, update_metrics
from tetrad.rl.minibatches import PolicyBatch, PolicyMicrobatch, entropy_term, minibatches, policy_terms
from tetrad.rl.models import PolicyModels, load_policy, save_models
from tetrad.rl.monitor import Monitor, judges_of, manifest_notes, warn_unused_settings
from tetrad.rl.prompts import read_policy_prompts
from tetrad.rl.rewards import token_rewards
from tetrad.rl.rollout import Rollout, read_logprobs, roll_out
from tetrad.rl.samples import Samples
from tetrad.settings.grpo import Grpo
from tetrad.training.context import StageContext
from tetrad.training.optimizer import lr_factor
from tetrad.training.stage import start
from tetrad.training.step import Loss, Microbatch, Term, Terms, timed, update

PROGRESS_METRICS = ("score", "kl", "length", "finished", "sampler_gap")  # in the progress bar


def run(ctx: StageContext) -> None:
    s, seed = ctx.recipe.grpo, ctx.recipe.seed
    models = load_policy(ctx, s)
    prompts = read_policy_prompts(ctx, s, models)
    warn_unused_settings(ctx)
    gate_failures = gate.before_training(ctx, s, [each.prompt for each in prompts.prompts])
    judges, responses = judges_of(ctx), s.batch_size * s.samples_per_prompt
    monitor = Monitor(ctx.recipe.alarms, 0.0, 0, responses, ctx.folder.name)
    samples = Samples(ctx, s, models, prompts.prompts)
    saved = monitor.state, monitor.restore
    with (
        start(ctx, models.device, s.steps, models.parts(), *saved, ctx.recipe.run.grace) as stage,
        ctx.console.progress("grpo", s.steps, stage.step) as bar,
    ):
        for step in stage.steps():
            sampling = s.sampling(ctx.recipe.sampling.max_num_seqs)
            key = (seed, "rollout", step)
            rollout = roll_out(models.actor, *prompts.batch(step), key, sampling, models.tokenizer, models.device)
            batch = make_batch(models, rollout, s)
            if step == 0:
                gate.warn_of_scale(ctx, batch.source_scores)
            judged = {name: judge(rollout.samples) for name, judge in judges.items()}
            losses = learn(models, batch, s, (seed, step))
            metrics = step_metrics(batch, s.kl_coef, models.device, models.train_score_p999, judged) | losses
            metrics |= group_metrics(batch.scores, s.samples_per_prompt)
            if models.ema:
                models.ema.update()
            metrics |= monitor.check(ctx, step, metrics)
            stage.log(step, **metrics)
            if step == s.steps - 1 or (s.eval_every and step % s.eval_every == 0) or monitor.abort_reason:
                samples.show(stage.sample, step, batch)
            speed = stage.timing(metrics["length"] * responses)
            bar.advance(1, **{name: metrics[name] for name in PROGRESS_METRICS}, **speed)
            monitor.raise_if_strict()
        save_models(ctx, stage, models, manifest_notes(gate_failures, monitor))


@timed("forward")
def make_batch(models: PolicyModels, rollout: Rollout, s: Grpo) -> PolicyBatch:
    """Scores, the log-probabilities of two models, rewards and advantages."""
    inputs = (rollout, models.micro_batch_tokens, models.device, s.temperature)
    by_source = models.reward.by_source(rollout.samples)
    scores = torch.tensor(models.reward.total(by_source), dtype=torch.float32)
    logprobs, ref_logprobs = read_logprobs(models.actor, *inputs), read_logprobs(models.reference, *inputs)
    beta = s.kl_coef if s.kl_in == "reward" else 0.0
    rewards = token_rewards(s, scores, logprobs, ref_logprobs, rollout, beta)
    groups = torch.arange(len(scores)) // s.samples_per_prompt
    advantages = grpo.group_advantages(rewards.sum(1), groups, s.advantage)[:, None] * rollout.mask_BT
    return PolicyBatch(rollout, by_source, scores, logprobs, ref_logprobs, rewards, advantages)


@timed("update")
def learn(models: PolicyModels, batch: PolicyBatch, s: Grpo, key: tuple[int, int]) -> dict[str, float]:
    """Epochs of mini-batches, each one update of the actor. key: seed and iteration."""
    factor, updates = lr_factor(key[1], s.steps, warmup=0.0, schedule=s.schedule), []
    for micros in minibatches(batch, s, key, models.micro_batch_tokens, models.device):
        optimizer, norm = models.actor_optimizer, s.max_grad_norm
        stats = update(models.actor, optimizer, micros, terms(s), models.device, factor=factor, max_norm=norm)
        updates.append(("actor", stats))
    return update_metrics(updates) | {"actor_lr": s.actor_lr * factor}


def terms(s: Grpo) -> Terms:
    """The clipped policy loss, KL to the reference if it is a loss, and the entropy bonus."""

    def of(model: nn.Module, micro: Microbatch) -> list[Term]:
        tokens: PolicyMicrobatch = micro.data
        logprobs, entropy = model(micro.packed, "logprobs", s.temperature)
        policy = policy_terms(logprobs, tokens, s.clip_range, s.clip_high or s.clip_range)
        return [*policy, *kl_terms(logprobs, tokens, s), entropy_term(entropy, s.entropy_coef)]

    return of


def kl_terms(logprobs: Tensor, tokens: PolicyMicrobatch, s: Grpo) -> list[Term]:
    """beta times an estimate of KL at each token, with the mean of the policy's loss."""
    if s.kl_in == "reward":
        return []
    return [
        Loss(
            "kl_loss",
            grpo.kl_loss_sum(logprobs, tokens.ref_logprobs, s.kl_estimator, tokens.weights),
            "losses",
            s.kl_coef,
        )
    ]
