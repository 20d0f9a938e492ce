"""PPO with four models: the actor and the critic learn, the reward model and the reference are frozen.

One iteration: sample replies, score them, read them with actor, reference and critic, turn scores and KL into rewards
and those into advantages, then a few epochs of clipped updates (Schulman et al. 2017; Ziegler et al. 2019; Ouyang et
al. 2022). Old log-probabilities come from the training forward, not from the sampler. Reply arrays are [B, T] and
already shifted: a value stands before its token, the score lands on the last token of the reply, its end is terminal.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from tetrad.data.loader import Mixture, batch_indices, micro_batches
from tetrad.data.pack import pack
from tetrad.data.source import Counts
from tetrad.engine import mesh
from tetrad.engine.context import StageContext
from tetrad.engine.device import Device, choose
from tetrad.engine.metrics import reply_figures
from tetrad.engine.optim import Optimizer, lr_factor
from tetrad.engine.prepare import first_parent
from tetrad.engine.rollout import Question, Rollout, read_logprobs, read_questions, read_values, roll_out
from tetrad.engine.scoring import Reward, python_function
from tetrad.engine.stage import (
    POLICY,
    Weights,
    figures_of,
    finish,
    frozen,
    read_policy,
    report_counts,
    require_tokenizer,
    reward_model,
    start,
    template_for,
)
from tetrad.engine.update import Micro, Terms, update
from tetrad.errors import UserError
from tetrad.model.decoder import CausalLM, ScalarModel
from tetrad.model.safetensors_io import tensor_chunks
from tetrad.model.weights import read_scalar
from tetrad.objectives import policy
from tetrad.seeds import generator_for, seed_for
from tetrad.settings.common import Sampling
from tetrad.settings.ppo import Ppo
from tetrad.text.tokenizer import Tokenizer
from tetrad.train import gate
from tetrad.train.alarms import Watch
from tetrad.types import StepStats, Term


def run(ctx: StageContext) -> None:
    s, seed, micro_tokens = ctx.recipe.ppo, ctx.recipe.seed, ctx.recipe.run.micro_tokens
    device = choose(ctx.recipe.run)
    refuse_uneven(s)
    tokenizer = Tokenizer.load(first_parent(ctx, *POLICY))
    four = four_models(ctx, tokenizer, device)
    questions, mixture = questions_of(ctx, four.actor, tokenizer)
    sampling = Sampling(temperature=s.temperature, max_new=s.max_new, slots=ctx.recipe.sampling.slots)
    kl = KLController(s.kl_coefficient, s.kl_target, s.kl_horizon)
    steered = Steered(kl, Watch(ctx.recipe.alarms, s.kl_target, s.critic_warmup))
    with (
        start(ctx, device, s.steps, four.parts(), steered.state, steered.restore, ctx.recipe.run.grace) as stage,
        ctx.console.progress("ppo", s.steps, stage.step) as bar,
    ):
        for step in stage.steps():
            asked = [questions[i] for i in mesh.share(batch_indices(seed, mixture, s.batch, step).tolist())]
            numbers = mesh.share(range(s.batch))
            rollout = roll_out(four.actor, asked, numbers, (seed, "rollout", step), sampling, tokenizer, device)
            scores = torch.tensor(four.reward(rollout.samples), dtype=torch.float32)
            old = read_logprobs(four.actor, rollout, micro_tokens, device, s.temperature)
            ref = read_logprobs(four.reference, rollout, micro_tokens, device, s.temperature)
            values = read_values(four.critic, rollout, micro_tokens, device)
            rewards = shaped_rewards(s, scores, old, ref, rollout, kl.beta)
            if s.whiten_rewards:
                rewards = whitened(rewards, rollout.mask_BT, device, shift_mean=False)
            advantages, returns = policy.gae(rewards, values, rollout.mask_BT, s.gamma, s.lam)
            advantages = whitened(advantages, rollout.mask_BT, device, shift_mean=True)
            experience = Experience(rollout, old, ref, values, advantages, returns)
            learned = learn(four, experience, s, (seed, step), micro_tokens, device)
            figures = figures_of_step(experience, scores, rewards, kl.beta, four.seen) | learned
            kl.follow(figures["kl"], s.batch)
            figures |= steered.watch.heed(ctx, step, figures)
            stage.log(step, **figures)
            if step == s.steps - 1 or (s.eval_every and step % s.eval_every == 0):
                show(ctx, stage.sample, step, experience, scores)
            bar.advance(1, **{name: figures[name] for name in ("score", "kl", "length", "ended")})
        form = template_for(ctx, first_parent(ctx, *POLICY))
        kept = {"critic.safetensors": tensor_chunks({**Weights(four.critic).tensors(), "bias": four.critic.bias})}
        finish(ctx, stage, four.actor, tokenizer, form, {}, kept)


@dataclass(frozen=True)
class FourModels:
    """Who is updated: actor and critic. reference: the actor before PPO; reward: samples in, scores out; seen: what a
    thousandth of the reward model's training answers got at least."""

    actor: CausalLM
    critic: ScalarModel
    reference: CausalLM
    reward: Reward
    actor_optimizer: Optimizer
    critic_optimizer: Optimizer
    seen: float = math.inf

    def parts(self) -> dict[str, Any]:
        """What a checkpoint must hold to go on exactly; the frozen models are read from their own stages."""
        return {
            "actor": Weights(self.actor),
            "actor_optimizer": self.actor_optimizer,
            "critic": Weights(self.critic),
            "critic_optimizer": self.critic_optimizer,
        }


@dataclass
class KLController:
    """beta, fixed, or following a target in nats a reply (Ziegler et al. 2019, section 2.2)."""

    beta: float
    target: float
    horizon: float

    def follow(self, kl: float, replies: int) -> None:
        if self.target:
            self.beta = policy.adaptive_kl(self.beta, kl, replies, self.target, self.horizon)


@dataclass(frozen=True)
class Steered:
    """What one iteration hands to the next beside the weights: beta, and what the alarms remember."""

    kl: KLController
    watch: Watch

    def state(self) -> dict[str, Any]:
        return {"beta": self.kl.beta, **self.watch.state()}

    def restore(self, saved: Mapping[str, Any]) -> None:
        self.kl.beta = saved["beta"]
        self.watch.restore(saved)


@dataclass(frozen=True)
class Experience:
    """What one iteration learns from; all [B, T], on the CPU. old, ref: log-probabilities of actor and reference."""

    rollout: Rollout
    old: Tensor
    ref: Tensor
    values: Tensor
    advantages: Tensor
    returns: Tensor


@dataclass(frozen=True)
class Replies:
    """The same for the N reply tokens of a micro-batch, on the device."""

    old: Tensor
    values: Tensor
    advantages: Tensor
    returns: Tensor


def four_models(ctx: StageContext, tokenizer: Tokenizer, device: Device) -> FourModels:
    """Actor and reference from the SFT model, critic and reward from the reward model (or as the recipe says)."""
    s, folder = ctx.recipe.ppo, first_parent(ctx, *POLICY)
    form = template_for(ctx, folder)
    actor = read_policy(folder, tokenizer, form).to(device.place)
    reference = frozen(read_policy(folder, tokenizer, form)).to(device.place)
    critic_folder = ctx.parents["reward"] if s.critic == "reward" else folder
    require_tokenizer(critic_folder, tokenizer)
    critic = read_scalar(critic_folder, seed_for(ctx.recipe.seed, "critic")).to(device.place)
    optim = replace(ctx.recipe.optim, eps=s.adam_eps)
    return FourModels(
        actor,
        critic,
        reference,
        reward_of(ctx, tokenizer, device),
        Optimizer(actor, s.actor_lr, optim),
        Optimizer(critic, s.critic_lr, optim),
        figures_of(ctx.parents["reward"]).get("train_high", math.inf) if not s.rewards else math.inf,
    )


def reward_of(ctx: StageContext, tokenizer: Tokenizer, device: Device) -> Reward:
    """The recipe's reward model, or the sum of its Python functions. Errors: E-CONF-FUNCTION."""
    if ctx.recipe.ppo.rewards:
        functions = [python_function(spec) for spec in ctx.recipe.ppo.rewards]
        return lambda samples: [math.fsum(parts) for parts in zip(*(f(samples) for f in functions), strict=True)]
    folder = ctx.parents["reward"]
    return reward_model(ctx, folder, tokenizer, device, ctx.recipe.ppo.doubt)


def refuse_uneven(s: Ppo) -> None:
    """Errors: E-CONF-DIVIDE where processes can't have equal shares of a batch."""
    if s.batch % mesh.size():
        what = f"batch = {s.batch} can't be shared by {mesh.size()} processes"
        raise UserError("E-CONF-DIVIDE", what, where="ppo.batch", hint=f"use a multiple of {mesh.size()}")


def questions_of(ctx: StageContext, actor: CausalLM, tokenizer: Tokenizer) -> tuple[list[Question], Mixture]:
    """The prompts, and how often each is asked. Errors: E-DATA-*, E-NUM-GATE."""
    s, counts = ctx.recipe.ppo, Counts()
    form = template_for(ctx, first_parent(ctx, *POLICY))
    limit = min(s.max_prompt + s.max_new if s.max_prompt else math.inf, actor.config.max_positions)
    given = ctx.files(s.prompts, s.weights)
    questions = read_questions(given, form, tokenizer, counts, int(limit), s.max_new)
    report_counts(ctx, counts, len(questions))
    if not s.rewards:
        gate.heed(ctx, ctx.parents["reward"], [question.prompt for question in questions])
    return questions, given.mixture(question.prompt.where for question in questions)


def shaped_rewards(s: Ppo, scores: Tensor, old: Tensor, ref: Tensor, rollout: Rollout, beta: float) -> Tensor:
    """-beta (log pi - log pi_ref) at each token, and the clipped score at the last, less a penalty for a cut reply."""
    scores = policy.normalize_scores(
        scores, 0.0, 1.0, None if s.rewards else s.score_clip or None, ~rollout.ended_B, s.missing_eos_penalty
    )
    kl = policy.kl_tokens(old, ref, rollout.mask_BT)
    return policy.shape_rewards(scores, kl, rollout.mask_BT, beta)


def whitened(x: Tensor, mask: Tensor, device: Device, *, shift_mean: bool) -> Tensor:
    """Over the reply tokens of the whole batch on all ranks."""

    def summed(about: Tensor | float) -> Tensor:
        return mesh.sum_tensor(policy.moments(x, mask, about).to(device.place)).cpu()

    first, _ = policy.mean_variance(summed(0.0))
    return policy.whiten(x, mask, shift_mean, mean_and_variance=policy.mean_variance(summed(first), first))


def learn(
    four: FourModels, experience: Experience, s: Ppo, key: tuple[int, int], micro_tokens: int, device: Device
) -> dict[str, float]:
    """Epochs of mini-batches: one step of the actor and one of the critic each. Returns the means over all steps."""
    factor = lr_factor(key[1], s.steps, 0.0, s.schedule)
    step = partial(update, device=device, factor=factor, max_norm=s.max_norm)
    learned: list[tuple[str, StepStats]] = []
    for micros in mini_batches(experience, s, key, micro_tokens, device):
        if key[1] >= s.critic_warmup:
            learned.append(("actor", step(four.actor, four.actor_optimizer, micros, policy_terms(s))))
        learned.append(("critic", step(four.critic, four.critic_optimizer, micros, value_terms(s))))
    found: dict[str, list[float]] = {}
    for who, stats in learned:
        for name, value in (*stats.terms.items(), (f"{who}_grad_norm", stats.grad_norm), (f"{who}_lr", stats.lr)):
            found.setdefault(name, []).append(value)
    return {name: math.fsum(values) / len(values) for name, values in found.items()}


def mini_batches(
    experience: Experience, s: Ppo, key: tuple[int, int], micro_tokens: int, device: Device
) -> Iterator[list[Micro]]:
    """Each epoch's batch in a fresh permutation, in `mini_batches` equal parts; this rank's rows as micro-batches."""
    rollout = experience.rollout
    batch = len(rollout.documents) * mesh.size()
    row_of = {number: row for row, number in enumerate(mesh.share(range(batch)))}
    for epoch in range(s.epochs):
        shuffled = generator_for(key[0], "mini-batches", key[1], epoch).permutation(batch)
        for part in range(s.mini_batches):
            chosen = sorted(row_of[n] for n in shuffled[part :: s.mini_batches].tolist() if n in row_of)
            groups = micro_batches([rollout.documents[i] for i in chosen], micro_tokens)
            yield [_micro(experience, [chosen[i] for i in group], device) for group in groups]


def _micro(experience: Experience, rows: Sequence[int], device: Device) -> Micro:
    rollout, index = experience.rollout, torch.tensor(rows)
    mask = rollout.mask_BT[index]
    arrays = (experience.old, experience.values, experience.advantages, experience.returns)
    replies = Replies(*(x[index][mask].to(device.place) for x in arrays))
    packed = device.put(pack([rollout.documents[i] for i in rows]))
    return Micro(packed, {"tokens": float(mask.sum())}, replies)


def policy_terms(s: Ppo) -> Terms:
    """The clipped policy objective and the entropy bonus; the rest is reported only."""

    def terms(actor: nn.Module, micro: Micro) -> list[Term]:
        logprobs, entropy = actor(micro.packed, "logprobs", s.temperature)
        if not s.entropy_bonus:
            entropy = entropy.detach()  # a weight of 0 would still pay for its backward
        every = torch.ones_like(logprobs, dtype=torch.bool)
        sums = policy.policy_loss_sum(logprobs, micro.data.old, micro.data.advantages, every, s.clip, s.clip)
        return [
            Term("policy_loss", sums.loss, "tokens"),
            Term("entropy", entropy.sum(), "tokens", -s.entropy_bonus),
            Term("clip_fraction", sums.clipped, "tokens", 0.0),
            Term("approx_kl", sums.half_square, "tokens", 0.0),
            Term("ratio", sums.ratio, "tokens", 0.0),
        ]

    return terms


def value_terms(s: Ppo) -> Terms:
    """The clipped squared error of the critic."""

    def terms(critic: nn.Module, micro: Micro) -> list[Term]:
        values = critic(micro.packed, "values")
        every = torch.ones_like(values, dtype=torch.bool)
        sums = policy.value_loss_sum(values, micro.data.values, micro.data.returns, every, s.value_clip or None)
        return [Term("value_loss", sums.loss, "tokens"), Term("value_clip_fraction", sums.clipped, "tokens", 0.0)]

    return terms


def figures_of_step(
    experience: Experience, scores: Tensor, rewards: Tensor, beta: float, seen: float = math.inf
) -> dict[str, float]:
    """What the iteration sampled, a reply on average over all ranks. kl: nats against the reference (k1, k3)."""
    rollout, mask = experience.rollout, experience.rollout.mask_BT
    k1, k3 = (policy.kl_tokens(experience.old, experience.ref, mask, kind) for kind in ("k1", "k3"))
    gap = (experience.old - rollout.sampled_BT).abs()[mask].max()
    variance = policy.explained_variance(experience.values, experience.returns, mask)
    n = len(scores)
    sums = {
        "score": float(scores.sum()),
        "unseen_scores": float((scores > seen).sum()),
        "kl": float(k1.sum()),
        "kl_k3": float(k3.sum()),
        "reward": float(rewards.sum()),
        "sampler_gap": float(gap) * n,
        **{name: value * n for name, value in reply_figures(rollout.samples, rollout.ended_B.tolist()).items()},
    }
    total = mesh.sum_counts({**sums, "replies": float(n)})
    replies = total.pop("replies")
    found = {name: value / replies for name, value in total.items()}
    defined = {"explained_variance": float(variance)} if math.isfinite(variance) else {}
    return {**found, **defined, "score_std": float(scores.std(correction=0)), "beta": beta}


def show(ctx: StageContext, keep: Any, step: int, experience: Experience, scores: Tensor) -> None:
    """Three samples with score and KL, on the terminal and in samples.jsonl."""
    kl = policy.kl_tokens(experience.old, experience.ref, experience.rollout.mask_BT).sum(-1).tolist()
    for sample, score, nats in list(zip(experience.rollout.samples, scores.tolist(), kl, strict=True))[:3]:
        keep({"step": step, "prompt": sample.prompt, "text": sample.text, "score": score, "kl": nats})
        ctx.console.say(f"  {sample.asked} |{sample.text}  (score {score:+.2f}, KL {nats:.1f})")
