"""The models of PPO and how they are built: four of them, a critic on the actor's trunk, or adapters on one base.

Four full models are four times the weights and two optimizers. `critic = "shared"` is a scalar head on the actor's own
decoder. With `adapters` the SFT model is the base of all (Hydra-RLHF, Santacroce et al. 2023): the reference is that
base itself, actor, critic and reward model are adapters on it, the critic's a copy of the reward model's.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

from tetrad.distributed.device import Device, choose
from tetrad.inference.model_folder import refuse_other_tokenizer
from tetrad.model.huggingface import read_scalar
from tetrad.model.lora import adapter_tensors, merged, share_weights
from tetrad.model.safetensors_io import tensor_chunks
from tetrad.model.transformer import CausalLM, ScalarModel, frozen, give_head
from tetrad.reward.model import Reward, reward_function, sample_tokenizer
from tetrad.reward.sources import RewardSources, reward_sources
from tetrad.seeds import seed_for
from tetrad.settings.base import uses_reward_model
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


class SharedActorCritic(nn.Module):
    """Actor and critic as one model, for one optimizer; the trunk that they share is one."""

    def __init__(self, actor: CausalLM, critic: ScalarModel) -> None:
        super().__init__()
        self.actor, self.critic = actor, critic


def actor_of(model: nn.Module) -> CausalLM:
    """The actor, alone or on one trunk with the critic."""
    return model.actor if isinstance(model, SharedActorCritic) else cast(CausalLM, model)


def critic_of(model: nn.Module) -> ScalarModel:
    """The critic, alone or on one trunk with the actor."""
    return model.critic if isinstance(model, SharedActorCritic) else cast(ScalarModel, model)


class EMA:
    """The moving average of a model's trained weights: a part of a checkpoint."""

    def __init__(self, model: nn.Module, decay: float) -> None:
        self.weights, self.decay = Weights(model), decay
        self.average = {name: tensor.clone() for name, tensor in self.weights.tensors().items()}

    def update(self) -> None:
        for name, tensor in self.weights.tensors().items():
            self.average[name].lerp_(tensor, 1 - self.decay)

    def tensors(self) -> dict[str, Tensor]:
        return self.average

    def full_bytes(self) -> int:
        return self.weights.full_bytes()

    def load_tensors(self, tensors: dict[str, Tensor]) -> None:
        """Errors: E-CKPT-KEYS, E-CKPT-SHAPE."""
        self.weights.check(tensors)
        self.average = {name: tensor.to(self.average[name].device) for name, tensor in tensors.items()}


@dataclass(frozen=True)
class Models:
    """Actor and critic are updated. reference: the actor before PPO; reward: completions in, scores out. actor_critic:
    actor and critic on one trunk, with actor_optimizer for the two. train_score_p999: the 99.9 % quantile of the reward
    model's scores on its training answers. micro_batch_tokens: tokens of a forward pass."""

    actor: CausalLM
    critic: ScalarModel
    reference: CausalLM
    reward: RewardSources
    actor_optimizer: Optimizer
    critic_optimizer: Optimizer | None
    tokenizer: Tokenizer
    device: Device
    micro_batch_tokens: int
    actor_critic: SharedActorCritic | None = None
    ema: EMA | None = None
    train_score_p999: float = math.inf

    def parts(self) -> dict[str, Any]:
        """What a checkpoint must hold to resume exactly; the frozen models are read from their own stages."""
        own_head = nn.ModuleDict({"score": self.critic.score}) if self.actor_critic else self.critic
        parts: dict[str, Any] = {
            "actor": Weights(self.actor),
            "actor_optimizer": self.actor_optimizer,
            "critic": Weights(own_head),
        }
        parts |= {"critic_optimizer": self.critic_optimizer} if self.critic_optimizer else {}
        return parts | ({"average": self.ema} if self.ema else {})

    def freeze_shared_trunk(self, frozen: bool) -> None:
        """While the critic warms up on the actor's trunk, that trunk must not move; a separate critic needs nothing."""
        for name, parameter in self.actor_optimizer.names.items() if self.actor_critic else ():
            parameter.requires_grad_(not frozen or name.startswith("critic.score"))


def load_models(ctx: StageContext) -> Models:
    """Actor and reference from the SFT model, critic and reward from the reward model (or as the recipe says).

    Errors: E-MODEL-*, E-CKPT-*, E-CONF-{FUNCTION,CONFLICT}.
    """
    s, folder = ctx.recipe.ppo, first_parent(ctx, *POLICY)
    tokenizer, device = Tokenizer.load(folder), choose(ctx.recipe.run)
    template, place = template_for(ctx, folder), device.torch_device
    reference = frozen(read_policy(folder, tokenizer, template)).to(place)
    if s.adapters:
        actor, critic, reward = _on_one_base(ctx, reference, tokenizer, device)
    else:
        actor, critic, reward = read_policy(folder, tokenizer, template).to(place), None, None
    if critic is None and s.critic == "shared":
        critic = _shared(actor, seed_for(ctx.recipe.seed, "critic"))
    elif critic is None:
        critic = _critic(ctx, folder, tokenizer).to(place)
    optim = replace(ctx.recipe.optim, eps=s.adam_eps)
    actor_critic = SharedActorCritic(actor, critic) if s.critic == "shared" else None
    lr_overrides = {"critic.score": s.critic_lr} if actor_critic else {}
    used = uses_reward_model(s.rewards)
    return Models(
        actor,
        critic,
        reference,
        reward_sources(ctx, tokenizer, device, reward),
        Optimizer(actor_critic or actor, s.actor_lr, optim, lr_overrides=lr_overrides),
        None if actor_critic else Optimizer(critic, s.critic_lr, optim),
        tokenizer,
        device,
        ctx.recipe.run.micro_batch_tokens,
        actor_critic,
        EMA(actor, s.ema_decay) if s.ema_decay else None,
        recorded_metrics(ctx.parents["reward"]).get("train_score_p999", math.inf) if used else math.inf,
    )


def _critic(ctx: StageContext, folder: Path, tokenizer: Tokenizer) -> ScalarModel:
    """A separate model."""
    place = ctx.parents["reward"] if ctx.recipe.ppo.critic == "reward" else folder
    refuse_other_tokenizer(place, Tokenizer.load(place), tokenizer)
    return read_scalar(place, seed_for(ctx.recipe.seed, "critic"))


def _shared(actor: CausalLM, seed: int) -> ScalarModel:
    """A fresh head on the actor's own decoder."""
    with torch.device("meta"):
        critic = ScalarModel(actor.config)
    critic.model = actor.model
    give_head(critic, seed)
    return critic


def _on_one_base(
    ctx: StageContext, base: CausalLM, tokenizer: Tokenizer, device: Device
) -> tuple[CausalLM, ScalarModel | None, Reward | None]:
    """Actor, critic (None where it shares the actor's trunk) and reward model as adapters on the reference."""
    s, seed = ctx.recipe.ppo, ctx.recipe.seed
    actor = share_weights(CausalLM, base)
    adapt(ctx, actor, seed_for(seed, "actor"))
    critic: ScalarModel | None = None
    reward: Reward | None = None
    if uses_reward_model(s.rewards) or s.critic == "reward":
        reward_model = load_reward_adapter(ctx, base)
        tokenize_samples = sample_tokenizer(ctx, ctx.parents["reward"], tokenizer)
        reward = reward_function(
            [reward_model.requires_grad_(False)], device, ctx.recipe.run.micro_batch_tokens, tokenize_samples
        )
        if s.critic == "reward":
            critic = load_reward_adapter(ctx, base)
    if s.critic == "actor":
        critic = adapted_scalar_model(ctx, base, seed_for(seed, "critic"))
    return actor, critic, reward


def save_models(ctx: StageContext, stage: StageRun, models: Models, notes: Mapping[str, Json]) -> None:
    """The result is the actor or its moving average. The critic, and beside an average the actor itself, are saved too:
    as whole models even where they share a trunk; as adapters where the result is. notes: what the verdict reads in the
    manifest."""
    folder = first_parent(ctx, *POLICY)
    keep, critic = adapters.keeps(ctx, models.actor, folder), models.critic
    saved = dict[str, Tensor](adapter_tensors(critic) if keep else merged(critic).named_parameters())
    extra = {"critic.safetensors": {**saved, "bias": critic.bias}}
    if models.ema:
        actor = models.actor
        extra["last.safetensors"] = dict(adapter_tensors(actor) if keep else merged(actor).named_parameters())
        extra = {name: {k: v.detach().clone() for k, v in tensors.items()} for name, tensors in extra.items()}
        models.ema.weights.load_tensors(models.ema.average)  # also of a trunk that the critic shares
    files = {name: tensor_chunks(tensors) for name, tensors in extra.items()}
    finish(ctx, stage, models.actor, models.tokenizer, template_for(ctx, folder), notes, files, folder)
