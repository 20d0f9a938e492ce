"""GRPO in miniature: two small models, a reward, and one iteration made of the stage's own functions."""

from collections.abc import Sequence
from copy import deepcopy
from dataclasses import replace

import ppo_toys
import toys
from tetrad.inference.completions import EncodedPrompt
from tetrad.model.transformer import CausalLM
from tetrad.reward.model import Reward
from tetrad.reward.sources import RewardSource, RewardSources
from tetrad.rl.minibatches import PolicyBatch
from tetrad.rl.models import PolicyModels
from tetrad.rl.rollout import Rollout, roll_out
from tetrad.settings.common import Optim
from tetrad.settings.grpo import Grpo
from tetrad.train.grpo import learn, make_batch
from tetrad.training.optimizer import Optimizer


def two_models(s: Grpo, actor: CausalLM, reward: Reward, reference: CausalLM | None = None) -> PolicyModels:
    """The reference is the actor as it is now, unless one is given."""
    return PolicyModels(
        actor=actor,
        reference=(reference or deepcopy(actor)).requires_grad_(False),
        reward=RewardSources({"reward": RewardSource(reward)}),
        actor_optimizer=Optimizer(actor, s.actor_lr, replace(Optim(), eps=s.adam_eps)),
        tokenizer=ppo_toys.TOKENIZER,
        device=toys.CPU,
        micro_batch_tokens=4096,
    )


def sampled(models: PolicyModels, asked: Sequence[EncodedPrompt], s: Grpo, key: tuple[int, int]) -> Rollout:
    """asked: the prompts, each of which is answered `samples_per_prompt` times."""
    each = [prompt for prompt in asked for _ in range(s.samples_per_prompt)]
    place = (key[0], "rollout", key[1])
    return roll_out(models.actor, each, range(len(each)), place, s.sampling(len(each)), models.tokenizer, toys.CPU)


def iterate(
    models: PolicyModels, asked: Sequence[EncodedPrompt], s: Grpo, key: tuple[int, int]
) -> tuple[PolicyBatch, dict[str, float]]:
    """One iteration: sample, score, learn."""
    batch = make_batch(models, sampled(models, asked, s, key), s)
    return batch, learn(models, batch, s, key)
