"""PPO with four models: the actor and the critic learn, the reward model and the reference are frozen.

One iteration: sample replies, score them, read them with actor, reference and critic, turn scores and KL into rewards
and those into advantages, then a few epochs of clipped updates (Schulman et al. 2017; Ziegler et al. 2019; Ouyang et
al. 2022). Old log-probabilities come from the training forward, not from the sampler. Response arrays are [B, T] and
already shifted: a value stands before its token, the score lands on the last token of the reply, its end is terminal.
The models are made in rl.models, what pays in reward.sources; rl.monitor tells when it goes wrong.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor, nn

from tetrad.data.loader import Mixture, Rows, batch_indices
from tetrad.data.source import Counts
from tetrad.distributed import collectives
from tetrad.distributed.device import Device, choose
from tetrad.errors import UserError
from tetrad.eval.text_metrics import reply_figures
from tetrad.inference.completions import Completion, EncodedPrompt, read_questions
from tetrad.model.lora import merged
from tetrad.model.safetensors_io import tensor_chunks
from tetrad.model.transformer import CausalLM, ScalarModel
from tetrad.objectives import ppo
from tetrad.objectives.calibration import spearman
from tetrad.registry import POLICY
from tetrad.report import outcome
from tetrad.reward import gate
from tetrad.reward.functions import python_function
from tetrad.reward.model import Reward
from tetrad.reward.sources import named
from tetrad.rl.experience import PPOBatch, PPOTokens, RunningStd, mean_variance, mini_batches, numbers_of, whitened
from tetrad.rl.models import ActorCritic, Models, four_models
from tetrad.rl.monitor import Monitor, idle
from tetrad.rl.rollout import Rollout, read_logprobs, read_values, roll_out
from tetrad.rl.samples import Samples
from tetrad.settings.base import REWARD_MODEL, model_pays
from tetrad.settings.common import Sampling
from tetrad.settings.ppo import Ppo
from tetrad.storage import Json
from tetrad.text.tokenizer import Tokenizer
from tetrad.training import adapters
from tetrad.training.batches import language_micros
from tetrad.training.context import StageContext
from tetrad.training.optimizer import lr_factor
from tetrad.training.prepare import first_parent, ptx
from tetrad.training.run_folder import StageRun
from tetrad.training.stage import finish, prepared, report_counts, start, template_for
from tetrad.training.step import Microbatch, Terms, update
from tetrad.types import MOST, StepStats, Term

SHOWN = ("score", "kl", "length", "ended")  # in the bar
Text = Callable[[int], list[Microbatch]]
"""Pre-training text beside PPO: the micro-batches of the n-th update of the actor."""


def run(ctx: StageContext) -> None:
    s, seed, micro_tokens = ctx.recipe.ppo, ctx.recipe.seed, ctx.recipe.run.micro_tokens
    device = choose(ctx.recipe.run)
    refuse_uneven(s)
    tokenizer = Tokenizer.load(first_parent(ctx, *POLICY))
    four = four_models(ctx, tokenizer, device)
    questions, mixture, failures = questions_of(ctx, four.actor, tokenizer)
    text = text_of(ctx, device)
    sampling = Sampling(temperature=s.temperature, max_new=s.max_new, slots=ctx.recipe.sampling.slots)
    kl = KLController(s.kl_coefficient, s.kl_target, s.kl_horizon)
    steered = PPOState(kl, Monitor(ctx.recipe.alarms, s.kl_target, s.critic_warmup, s.batch * s.replies), RunningStd())
    judges = judges_of(ctx)
    samples = Samples(ctx, four.actor, four.reference, questions, tokenizer, device)
    with (
        start(ctx, device, s.steps, four.parts(), steered.state, steered.restore, ctx.recipe.run.grace) as stage,
        ctx.console.progress("ppo", s.steps, stage.step) as bar,
    ):
        for step in stage.steps():
            asked = collectives.share(batch_indices(seed, mixture, s.batch, step).tolist())
            repeated = [questions[i] for i in asked for _ in range(s.replies)]
            numbers = numbers_of(s.batch, s.replies)
            rollout = roll_out(four.actor, repeated, numbers, (seed, "rollout", step), sampling, tokenizer, device)
            made = experience_of(four, rollout, s, steered, step, micro_tokens, device)
            if step == 0:
                gate.heed_first(ctx, made.parts.get(REWARD_MODEL, []))
            learned = learn(four, made, s, (seed, step), micro_tokens, device, text)
            judged = {name: judge(rollout.samples) for name, judge in judges.items()}
            figures = figures_of_step(made, kl.beta, device, four.seen, judged) | learned
            if step >= s.critic_warmup:  # before, the actor can't move and its KL is nothing
                kl.follow(figures["kl"], s.batch * s.replies)
            if four.average:
                four.average.follow()
            figures |= steered.watch.heed(ctx, step, figures)
            stage.log(step, **figures)
            if step == s.steps - 1 or (s.eval_every and step % s.eval_every == 0) or steered.watch.broken:
                samples.show(stage.sample, step, made)
            speed = stage.timing(step, figures["length"] * s.batch * s.replies)
            bar.advance(1, **{name: figures[name] for name in SHOWN}, **speed)
            steered.watch.stop()
        end(ctx, stage, four, tokenizer, outcome.notes(failures, [*steered.watch.spans.values()]))


@dataclass(frozen=True)
class PtxBatch:
    """Marks a micro-batch of text; its loss has this weight."""

    coefficient: float


# What one iteration hands to the next beside the weights


@dataclass
class KLController:
    """beta, fixed, or following a target in nats a reply (Ziegler et al. 2019, section 2.2)."""

    beta: float
    target: float
    horizon: float

    def follow(self, kl: float, replies: int) -> None:
        if self.target:
            self.beta = ppo.adaptive_kl(self.beta, kl, replies, self.target, self.horizon)


@dataclass(frozen=True)
class PPOState:
    """beta, what the alarms remember, and how scores have spread so far."""

    kl: KLController
    watch: Monitor
    spread: RunningStd

    def state(self) -> dict[str, Any]:
        return {"beta": self.kl.beta, **self.watch.state(), "scores": self.spread.state()}

    def restore(self, saved: Mapping[str, Any]) -> None:
        self.kl.beta = saved["beta"]
        self.watch.restore(saved)
        self.spread.restore(saved["scores"])


# From replies to advantages


def experience_of(
    four: Models, rollout: Rollout, s: Ppo, steered: PPOState, step: int, micro_tokens: int, device: Device
) -> PPOBatch:
    """Scores, what the three models read in the replies, rewards, advantages and returns."""
    parts = four.reward.parts(rollout.samples)
    scores = torch.tensor(four.reward.total(parts), dtype=torch.float32)
    old = read_logprobs(four.actor, rollout, micro_tokens, device, s.temperature)
    ref = read_logprobs(four.reference, rollout, micro_tokens, device, s.temperature)
    values, after_B = read_values(four.critic, rollout, micro_tokens, device)
    unit = steered.spread.follow(scores, device) if s.reward_scaling == "running" else 1.0
    rewards = shaped_rewards(s, scores / unit, old, ref, rollout, steered.kl.beta)
    if s.reward_scaling == "whiten":
        rewards = whitened(rewards, rollout.mask_BT, device, shift_mean=False)
    after_B = torch.where(rollout.ended_B, 0, after_B) if s.cut_value else torch.zeros_like(scores)
    lam = 1.0 if step < s.critic_warmup else s.lam
    advantages, returns = ppo.gae(rewards, values, rollout.mask_BT, s.gamma, lam, after_B)
    advantages = whitened(advantages, rollout.mask_BT, device, shift_mean=True)
    return PPOBatch(rollout, parts, scores, old, ref, values, after_B, rewards, advantages, returns)


def shaped_rewards(s: Ppo, scores: Tensor, old: Tensor, ref: Tensor, rollout: Rollout, beta: float) -> Tensor:
    """-beta (log pi - log pi_ref) at each token, and the clipped score at the last, less a penalty for a cut reply."""
    clips = s.reward_scaling == "running" or not s.rewards  # a reward model among `rewards` is cut before it is weighed
    clip = s.score_clip if clips and s.score_clip else None
    scores = ppo.normalize_scores(scores, 0.0, 1.0, clip, ~rollout.ended_B, s.missing_eos_penalty)
    kl = ppo.kl_tokens(old, ref, rollout.mask_BT)
    return ppo.shape_rewards(scores, kl, rollout.mask_BT, beta)


# Learning


def learn(
    four: Models,
    experience: PPOBatch,
    s: Ppo,
    key: tuple[int, int],
    micro_tokens: int,
    device: Device,
    text: Text | None = None,
) -> dict[str, float]:
    """Epochs of mini-batches: one step of the actor and one of the critic each. Returns the means over all steps."""
    step = key[1]
    warming, per_step = step < s.critic_warmup, s.epochs * s.mini_batches
    factor = lr_factor(step, s.steps, 0.0, s.schedule)
    go = partial(update, device=device, factor=factor, max_norm=s.max_norm)
    learned: list[tuple[str, StepStats]] = []
    stopped = False
    four.freeze_actor(warming)
    for number, micros in enumerate(mini_batches(experience, s, key, micro_tokens, device)):
        if not (warming or stopped):
            beside = text(step * per_step + number) if text else []
            stats = go(four.both or four.actor, four.actor_optimizer, micros + beside, policy_terms(s))
            stopped = bool(s.stop_kl) and stats.terms["approx_kl"] > s.stop_kl
            learned.append(("actor", stats))
        elif warming and four.both:
            learned.append(("critic", go(four.both, four.actor_optimizer, micros, value_terms(s, warming))))
        if four.critic_optimizer:
            learned.append(("critic", go(four.critic, four.critic_optimizer, micros, value_terms(s, warming))))
    four.freeze_actor(False)
    found: dict[str, list[float]] = {}
    for who, stats in learned:
        for name, value in (*stats.terms.items(), (f"{who}_grad_norm", stats.grad_norm)):
            found.setdefault(name, []).append(value)
    means = {name: math.fsum(values) / len(values) for name, values in found.items()}
    most = {"ratio_max": max(found["ratio_max"])} if "ratio_max" in found else {}
    rates = {"critic_lr": s.critic_lr * factor} | ({} if warming else {"actor_lr": s.actor_lr * factor})
    return means | most | rates | {"actor_updates": float(sum(who == "actor" for who, _ in learned))}


def policy_terms(s: Ppo) -> Terms:
    """The clipped policy objective and the entropy bonus; on a trunk of both, the critic's error beside them; of text
    beside PPO its language model's loss. What has no coefficient is reported only."""

    def terms(model: nn.Module, micro: Microbatch) -> list[Term]:
        actor = model.actor if isinstance(model, ActorCritic) else cast(CausalLM, model)
        if isinstance(micro.data, PtxBatch):
            return [Term("ptx_loss", actor(micro.packed, "nll"), "ptx_tokens", micro.data.coefficient)]
        hidden = actor.model(micro.packed)
        logprobs, entropy = actor.read(hidden, micro.packed, "logprobs", s.temperature)
        if not s.entropy_bonus:
            entropy = entropy.detach()  # a weight of 0 would still pay for its backward
        every, data = torch.ones_like(logprobs, dtype=torch.bool), micro.data
        how = (s.clip, s.clip, s.dual_clip or None, data.weights)
        sums = ppo.policy_loss_sum(logprobs, data.old, data.advantages, every, *how)
        found = [
            Term("policy_loss", sums.loss, "losses"),
            Term("entropy", entropy.sum(), "tokens", -s.entropy_bonus),
            Term("clip_fraction", sums.clipped, "tokens", 0.0),
            Term("approx_kl", sums.half_square, "tokens", 0.0),
            Term("ratio", sums.ratio, "tokens", 0.0),
            Term("ratio_max", sums.highest_ratio, MOST),
        ]
        if s.dual_clip:
            found.append(Term("dual_clip_fraction", sums.dual_clipped, "tokens", 0.0))
        if isinstance(model, ActorCritic):
            values = model.critic.read(hidden, micro.packed, "values")
            found += _value_parts(values, data, s.value_clip, s.value_coefficient)
        return found

    return terms


def value_terms(s: Ppo, warming: bool = False) -> Terms:
    """The clipped squared error of the critic; while it warms up it may move freely."""

    def terms(model: nn.Module, micro: Microbatch) -> list[Term]:
        critic = model.critic if isinstance(model, ActorCritic) else cast(ScalarModel, model)
        return _value_parts(critic(micro.packed, "values"), micro.data, 0.0 if warming else s.value_clip, 1.0)

    return terms


def _value_parts(values: Tensor, data: PPOTokens, clip: float, coefficient: float) -> list[Term]:
    every = torch.ones_like(values, dtype=torch.bool)
    sums = ppo.value_loss_sum(values, data.values, data.returns, every, clip or None, data.weights)
    return [
        Term("value_loss", sums.loss, "losses", coefficient),
        Term("value_clip_fraction", sums.clipped, "tokens", 0.0),
    ]


# What it works on, and what it leaves


def refuse_uneven(s: Ppo) -> None:
    """Errors: E-CONF-DIVIDE where processes can't have equal shares of a batch."""
    if s.batch % collectives.size():
        what = f"batch = {s.batch} can't be shared by {collectives.size()} processes"
        raise UserError("E-CONF-DIVIDE", what, where="ppo.batch", hint=f"use a multiple of {collectives.size()}")


def questions_of(
    ctx: StageContext, actor: CausalLM, tokenizer: Tokenizer
) -> tuple[list[EncodedPrompt], Mixture, tuple[str, ...]]:
    """The prompts, how often each is asked, and why the reward model fails its gate. Errors: E-DATA-*, E-NUM-GATE."""
    s, counts = ctx.recipe.ppo, Counts()
    form = template_for(ctx, first_parent(ctx, *POLICY))
    limit = min(s.max_prompt + s.max_new if s.max_prompt else math.inf, actor.config.max_positions)
    given = ctx.files(s.prompts, s.weights)
    questions = read_questions(given, form, tokenizer, counts, int(limit), s.max_new, s.on_long)
    report_counts(ctx, counts, len(questions))
    for note in idle(ctx.recipe):
        ctx.console.say(f"note: {note}")
    failures: tuple[str, ...] = ()
    if model_pays(s.rewards):
        failures = gate.heed(ctx, ctx.parents["reward"], [question.prompt for question in questions]).failures
    return questions, given.mixture(question.prompt.where for question in questions), failures


def judges_of(ctx: StageContext) -> dict[str, Reward]:
    """What watches beside the reward, each as a figure `judge_NAME`."""
    specs = ctx.recipe.alarms.judges
    return {f"judge_{name}": python_function(spec) for name, spec in zip(named(specs, ()), specs, strict=True)}


def text_of(ctx: StageContext, device: Device) -> Text | None:
    """The text that the actor reads beside its replies: rows in the order of pre-training, a batch an update."""
    s = ctx.recipe.ptx
    if not s.text:
        return None
    found = prepared(ctx, ptx)
    rows = Rows(found.store, s.row_tokens, ctx.recipe.seed, found.mixture)
    batch = s.batch_tokens // s.row_tokens

    def micros(update: int) -> list[Microbatch]:
        wanted = collectives.share(range(update * batch, (update + 1) * batch))
        made = language_micros(
            [piece for row in wanted for piece in rows.row(row)], ctx.recipe.run.micro_tokens, device
        )
        return [Microbatch(m.packed, {"ptx_tokens": m.counts["tokens"]}, PtxBatch(s.coefficient)) for m in made]

    return micros


def end(ctx: StageContext, stage: StageRun, four: Models, tokenizer: Tokenizer, notes: Mapping[str, Json]) -> None:
    """The result is the actor or its moving average; the critic, and then the actor itself, are kept beside it: whole
    models, whatever adapters or shares a trunk. notes: what the verdict reads in the manifest."""
    folder, critic = first_parent(ctx, *POLICY), merged(four.critic)
    beside = {"critic.safetensors": {**dict(critic.named_parameters()), "bias": critic.bias}}
    if four.average:
        beside["last.safetensors"] = dict(merged(four.actor).named_parameters())
        beside = {name: {k: v.detach().clone() for k, v in tensors.items()} for name, tensors in beside.items()}
        four.average.weights.load_tensors(four.average.kept)  # of a trunk that the critic shares too
    kept = {name: tensor_chunks(tensors) for name, tensors in beside.items()}
    adapters.keep(ctx, four.actor, folder)
    finish(ctx, stage, merged(four.actor), tokenizer, template_for(ctx, folder), notes, kept)


# What is told


def figures_of_step(
    made: PPOBatch,
    beta: float,
    device: Device,
    seen: float = math.inf,
    judged: Mapping[str, list[float]] | None = None,
) -> dict[str, float]:
    """What the iteration sampled, a reply on average over all ranks. kl: nats against the reference (k1, k3)."""
    rollout, mask, scores = made.rollout, made.rollout.mask_BT, made.scores
    k1, k3 = (ppo.kl_tokens(made.old, made.ref, mask, kind) for kind in ("k1", "k3"))
    parts = {f"score_{name}": part for name, part in made.parts.items()} if len(made.parts) > 1 else {}
    model = made.parts.get(REWARD_MODEL, [])
    n = len(scores)
    sums = {
        "score": float(scores.sum()),
        "unseen_scores": float(sum(score > seen for score in model)),
        "kl": float(k1.sum()),
        "kl_k3": float(k3.sum()),
        "reward": float(made.rewards.sum()),
        **{name: math.fsum(values) for name, values in {**parts, **(judged or {})}.items()},
    }
    total = collectives.sum_counts({**sums, "replies": float(n)})
    replies = total.pop("replies")
    found = {name: value / replies for name, value in total.items()} | texts_of_step(rollout)
    found["sampler_gap"] = max(collectives.everyone(float((made.old - rollout.sampled_BT).abs()[mask].max())))
    _, variance = mean_variance(scores, torch.ones_like(scores, dtype=torch.bool), device)
    return found | critic_figures(made, device) | {"score_std": float(variance) ** 0.5, "beta": beta}


def texts_of_step(rollout: Rollout) -> dict[str, float]:
    """What is said about the replies of all ranks together: a share of different pairs is no mean of shares."""
    own = [(sample.reply_ids, sample.text) for sample in rollout.samples]
    samples = [Completion((), tuple(ids), (), text) for ids, text in collectives.gather(own)]
    return reply_figures(samples, collectives.gather(rollout.ended_B.tolist()))


def critic_figures(made: PPOBatch, device: Device) -> dict[str, float]:
    """How much of the returns the critic explains, and whether its last values rank replies as their scores do; not
    what is undefined."""
    mask = made.rollout.mask_BT
    whole, left = (float(mean_variance(x, mask, device)[1]) for x in (made.returns, made.returns - made.values))
    last = made.values.gather(1, mask.sum(1, keepdim=True) - 1)[:, 0]
    rank = spearman(
        torch.tensor(collectives.gather(last.tolist())), torch.tensor(collectives.gather(made.scores.tolist()))
    )
    found = {"explained_variance": 1 - left / whole if whole else math.nan, "value_rank": rank}
    return {name: value for name, value in found.items() if math.isfinite(value)}
