"""The models that learn from rollouts, and how they are built: PPO's four, a critic on the actor's trunk, adapters on
one base, or no critic.

Four full models are four times the weights and two optimizers. `critic = "shared"` is a scalar head on the actor's own
decoder. With `adapters` the SFT model is the base of all (Hydra-RLHF, Santacroce et al. 2023): the reference is that
base itself, actor, critic and reward model are adapters on it, the critic's a copy of the reward model's.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from typing import Any, cast

import torch
from torch import Tensor, nn

from tetrad.distributed.device import Device, choose
from tetrad.distributed.sharding import collected, local, part_of, place
from tetrad.inference.model_folder import refuse_other_tokenizer
from tetrad.model.huggingface import read_scalar
from tetrad.model.lora import adapter_tensors, merged, share_weights
from tetrad.model.safetensors_io import tensor_chunks
from tetrad.model.transformer import CausalLM, ScalarModel, frozen, give_head, narrowed
from tetrad.reward.model import reward_function, sample_tokenizer
from tetrad.reward.sources import RewardSources, reward_sources
from tetrad.seeds import seed_for
from tetrad.settings.base import uses_reward_model
from tetrad.settings.common import OnPolicy
from tetrad.settings.ppo import Ppo
from tetrad.stages import POLICY
from tetrad.storage import Json
from tetrad.text.tokenizer import Tokenizer
from tetrad.training import adapters
from tetrad.training.adapters import adapt, adapted_scalar_model, load_reward_adapter
from tetrad.training.context import StageContext
from tetrad.training.optimizer import Optimizer
from tetrad.training.prepare import first_parent
from tetrad.training.run_folder import StageRun
from tetrad.training.stage import Weights, finish, read_policy, recorded_metrics, template_for
from tetrad.types import Packed


class SharedActorCritic(nn.Module):
    """Actor and critic as one model, for one optimizer; their trunk is one, and computes as the actor's."""

    def __init__(self, actor: CausalLM, critic: ScalarModel) -> None:
        super().__init__()
        self.actor, self.critic = actor, critic

    def forward(self, packed: Packed, want: str) -> Tensor:
        """What the critic gives, as `ScalarModel.forward` does."""
        return self.critic.read(self.actor(packed, "hidden"), packed, want)


def actor_of(model: nn.Module) -> CausalLM:
    """The actor, alone or on one trunk with the critic."""
    return model.actor if isinstance(model, SharedActorCritic) else cast(CausalLM, model)


class EMA:
    """The moving average of a model's trained weights: a part of a checkpoint."""

    def __init__(self, model: nn.Module, decay: float) -> None:
        self.weights, self.decay = Weights(model), decay
        self.average = {name: tensor.clone() for name, tensor in self.weights.tensors().items()}

    def update(self) -> None:
        for name, tensor in self.weights.tensors().items():
            local(self.average[name]).lerp_(local(tensor), 1 - self.decay)

    def tensors(self) -> dict[str, Tensor]:
        return self.average

    def full_bytes(self) -> int:
        return self.weights.full_bytes()

    def load_tensors(self, tensors: dict[str, Tensor]) -> None:
        """Errors: E-CKPT-KEYS, E-CKPT-SHAPE."""
        self.weights.check(tensors)
        self.average = {name: part_of(tensor, self.average[name]) for name, tensor in tensors.items()}


@dataclass(frozen=True, kw_only=True)
class PolicyModels:
    """The actor is updated. reference: the actor before this stage; reward: completions in, scores out.
    train_score_p999: the 99.9 % quantile of the reward model's scores on its training answers. micro_batch_tokens:
    tokens of a forward pass."""

    actor: CausalLM
    reference: CausalLM
    reward: RewardSources
    actor_optimizer: Optimizer
    tokenizer: Tokenizer
    device: Device
    micro_batch_tokens: int
    ema: EMA | None = None
    train_score_p999: float = math.inf

    def parts(self) -> dict[str, Any]:
        """What a checkpoint must hold to resume exactly; the frozen models are read from their own stages."""
        parts: dict[str, Any] = {"actor": Weights(self.actor), "actor_optimizer": self.actor_optimizer}
        return parts | self.critic_parts() | ({"average": self.ema} if self.ema else {})

    def critic_parts(self) -> dict[str, Any]:
        """Those of a critic."""
        return {}


@dataclass(frozen=True, kw_only=True)
class Models(PolicyModels):
    """Those of PPO: the critic is updated too. actor_critic: actor and critic on one trunk, with actor_optimizer for
    the two."""

    critic: ScalarModel
    critic_optimizer: Optimizer | None
    actor_critic: SharedActorCritic | None = None

    @property
    def values(self) -> nn.Module:
        """What is called for the critic's values."""
        return self.actor_critic or self.critic

    def critic_parts(self) -> dict[str, Any]:
        """On the actor's trunk the head alone."""
        own_head = nn.ModuleDict({"score": self.critic.score}) if self.actor_critic else self.critic
        parts: dict[str, Any] = {"critic": Weights(own_head)}
        return parts | ({"critic_optimizer": self.critic_optimizer} if self.critic_optimizer else {})

    def freeze_shared_trunk(self, frozen: bool) -> None:
        """While the critic warms up on the actor's trunk, that trunk must not move; a separate critic needs nothing."""
        for name, parameter in self.actor_optimizer.names.items() if self.actor_critic else ():
            parameter.requires_grad_(not frozen or name.startswith("critic.score"))


def load_policy(ctx: StageContext, s: OnPolicy, base: CausalLM | None = None) -> PolicyModels:
    """Actor and reference from the SFT model, and the sources of reward. base: the SFT model, if it has been read.

    Errors: E-MODEL-*, E-CKPT-*, E-CONF-{FUNCTION,CONFLICT}.
    """
    folder, used = first_parent(ctx, *POLICY), uses_reward_model(s.rewards)
    tokenizer, device = Tokenizer.load(folder), choose(ctx.recipe.run, ctx.folder.name)
    reference = frozen(base or _sft(ctx))
    actor, reward, members = share_weights(CausalLM, reference) if s.adapters else _sft(ctx), None, list[ScalarModel]()
    if s.adapters:
        adapt(ctx, actor, seed_for(ctx.recipe.seed, "actor"))
        members = [load_reward_adapter(ctx, reference).requires_grad_(False)] if used else []
    shared = reference if s.adapters else None
    if not shared:  # else its weights are the base that adapters are merged with
        narrowed(reference, device.frozen_dtype)
    place(reference, device)
    place(actor, device, shared)
    if members:
        tokenize_samples = sample_tokenizer(ctx, ctx.parents["reward"], tokenizer)
        members = [place(member, device, shared) for member in members]
        reward = reward_function(members, device, ctx.recipe.run.micro_batch_tokens, tokenize_samples)
    return PolicyModels(
        actor=actor,
        reference=reference,
        reward=reward_sources(ctx, s, tokenizer, device, reward),
        actor_optimizer=Optimizer(actor, s.actor_lr, replace(ctx.recipe.optim, eps=s.adam_eps)),
        tokenizer=tokenizer,
        device=device,
        micro_batch_tokens=ctx.recipe.run.micro_batch_tokens,
        ema=EMA(actor, s.ema_decay) if s.ema_decay else None,
        train_score_p999=recorded_metrics(ctx.parents["reward"]).get("train_score_p999", math.inf)
        if used
        else math.inf,
    )


def load_models(ctx: StageContext, s: Ppo) -> Models:
    """Those, and a critic from the reward model (or as the recipe says). Errors: as of `load_policy`."""
    seed, optim = seed_for(ctx.recipe.seed, "critic"), replace(ctx.recipe.optim, eps=s.adam_eps)
    if s.adapters and s.critic != "shared":  # on the base's tensors, while these are whole
        base = _sft(ctx)
        critic = load_reward_adapter(ctx, base) if s.critic == "reward" else adapted_scalar_model(ctx, base, seed)
        policy = load_policy(ctx, s, base)
        place(critic, policy.device, base)
    else:
        policy = load_policy(ctx, s)
        critic = _shared(policy.actor, seed) if s.critic == "shared" else _separate(ctx, s, policy, seed)
    actor_critic = SharedActorCritic(policy.actor, critic) if s.critic == "shared" else None
    both = {f.name: getattr(policy, f.name) for f in fields(policy)}
    if actor_critic:
        overrides = {"critic.score": s.critic_lr}
        both["actor_optimizer"] = Optimizer(actor_critic, s.actor_lr, optim, lr_overrides=overrides)
    own = None if actor_critic else Optimizer(critic, s.critic_lr, optim)
    return Models(**both, critic=critic, critic_optimizer=own, actor_critic=actor_critic)


def _sft(ctx: StageContext) -> CausalLM:
    folder = first_parent(ctx, *POLICY)
    return read_policy(folder, Tokenizer.load(folder), template_for(ctx, folder))


def _separate(ctx: StageContext, s: Ppo, policy: PolicyModels, seed: int) -> ScalarModel:
    """A model of its own."""
    folder = ctx.parents["reward"] if s.critic == "reward" else first_parent(ctx, *POLICY)
    refuse_other_tokenizer(folder, Tokenizer.load(folder), policy.tokenizer)
    return place(read_scalar(folder, seed), policy.device)


def _shared(actor: CausalLM, seed: int) -> ScalarModel:
    """A fresh head on the actor's own decoder."""
    with torch.device("meta"):
        critic = ScalarModel(actor.config)
    critic.model = actor.model
    give_head(critic, seed)
    return critic


def save_models(ctx: StageContext, stage: StageRun, models: PolicyModels, notes: Mapping[str, Json]) -> None:
    """The result is the actor or its moving average. A critic, and beside an average the actor itself, are saved too:
    as whole models even where they share a trunk; as adapters where the result is. notes: what the verdict reads in the
    manifest."""
    folder, extra = first_parent(ctx, *POLICY), dict[str, dict[str, Tensor]]()
    keep = adapters.keeps(ctx, models.actor, folder)
    if isinstance(models, Models):
        critic = collected(models.critic)
        saved = dict[str, Tensor](adapter_tensors(critic) if keep else merged(critic).named_parameters())
        extra["critic.safetensors"] = {**saved, "bias": critic.bias}
    if models.ema:
        actor = collected(models.actor)
        extra["last.safetensors"] = dict(adapter_tensors(actor) if keep else merged(actor).named_parameters())
        extra = {name: {k: v.detach().clone() for k, v in tensors.items()} for name, tensors in extra.items()}
        models.ema.weights.load_tensors(models.ema.average)  # also of a trunk that the critic shares
    files = {name: tensor_chunks(tensors) for name, tensors in extra.items()}
    finish(ctx, stage, models.actor, models.tokenizer, template_for(ctx, folder), notes, files, folder)
