"""PPO in miniature: four small models, prompts, and one iteration made of the stage's own functions."""

from collections.abc import Callable, Sequence
from copy import deepcopy
from dataclasses import replace
from functools import cache

import numpy as np
import torch

import toys
from tetrad.inference.completions import Completion, EncodedPrompt
from tetrad.model.transformer import CausalLM, ScalarModel
from tetrad.reward.model import Reward
from tetrad.reward.sources import RewardSource, RewardSources
from tetrad.rl.minibatches import PPOBatch
from tetrad.rl.models import Models
from tetrad.rl.monitor import Monitor
from tetrad.rl.rewards import KLController, RunningStd
from tetrad.rl.rollout import Rollout, roll_out
from tetrad.settings.common import Optim, Sampling
from tetrad.settings.ppo import Alarms, Ppo
from tetrad.train.ppo import PPOState, learn, make_batch
from tetrad.training.batches import language_micros
from tetrad.training.optimizer import Optimizer
from tetrad.training.step import language_terms, update
from tetrad.types import Prompt, Turn

TOKENIZER = toys.tokenizer()


def questions(count: int, size: int = 40) -> list[EncodedPrompt]:
    """Prompts of 1 to 9 tokens."""
    made = [tuple(toys.ids(1 + 4 * i % 9, i, 3, size)) for i in range(count)]
    return [EncodedPrompt(ids, Prompt((Turn("user", f"question {i}"),), f"{i}")) for i, ids in enumerate(made)]


def four_models(
    s: Ppo, actor: CausalLM, critic: ScalarModel, reward: Reward, reference: CausalLM | None = None
) -> Models:
    """The reference is the actor as it is now, unless one is given."""
    optim = replace(Optim(), eps=s.adam_eps)
    held = (reference or deepcopy(actor)).requires_grad_(False)
    optimizers = Optimizer(actor, s.actor_lr, optim), Optimizer(critic, s.critic_lr, optim)
    return Models(
        actor=actor,
        critic=critic,
        reference=held,
        reward=RewardSources({"reward": RewardSource(reward)}),
        actor_optimizer=optimizers[0],
        critic_optimizer=optimizers[1],
        tokenizer=TOKENIZER,
        device=toys.CPU,
        micro_batch_tokens=4096,
    )


def steered(s: Ppo, beta: float | None = None) -> PPOState:
    kl = KLController(s.kl_coef if beta is None else beta, s.kl_target, s.kl_horizon)
    return PPOState(kl, Monitor(Alarms(), s.kl_target, s.critic_warmup), RunningStd())


def by_ids(score: Callable[[tuple[int, ...]], float]) -> Reward:
    """A reward that reads a reply's ids."""

    def reward(samples: Sequence[Completion]) -> list[float]:
        return [score(sample.response_ids) for sample in samples]

    return reward


def sampled(
    four: Models, asked: Sequence[EncodedPrompt], s: Ppo, key: tuple[int, int], numbers: Sequence[int] | None = None
) -> Rollout:
    sampling = Sampling(temperature=s.temperature, max_new_tokens=s.max_new_tokens, max_num_seqs=len(asked))
    places = range(len(asked)) if numbers is None else numbers
    return roll_out(four.actor, asked, places, (key[0], "rollout", key[1]), sampling, TOKENIZER, toys.CPU)


def experience(
    four: Models, rollout: Rollout, s: Ppo, micro_batch_tokens: int = 4096, beta: float | None = None, step: int = 0
) -> tuple[PPOBatch, torch.Tensor]:
    """What the stage makes of a rollout, and its rewards."""
    made = make_batch(replace(four, micro_batch_tokens=micro_batch_tokens), rollout, s, steered(s, beta), step)
    return made, made.rewards


def iterate(
    four: Models, asked: Sequence[EncodedPrompt], s: Ppo, key: tuple[int, int], micro_batch_tokens: int = 4096
) -> tuple[PPOBatch, dict[str, float]]:
    """One iteration: sample, score, learn."""
    made, _ = experience(four, sampled(four, asked, s, key), s, micro_batch_tokens, step=key[1])
    return made, learn(replace(four, micro_batch_tokens=micro_batch_tokens), made, s, key)


LIKED = set(range(20, 30))


@cache
def speaker() -> CausalLM:
    """A model that has learned the language: words one after another, an eighth of them the last."""
    model = toys.causal(seed=1, std=0.05)
    optimizer, draw = Optimizer(model, 3e-3, Optim()), np.random.default_rng(0)
    for _ in range(150):
        texts = [[3, 4, *draw.integers(4, 40, draw.geometric(1 / 8)).tolist(), toys.EOS] for _ in range(32)]
        micros = language_micros([toys.document(text, 2) for text in texts], 4096, toys.CPU)
        model.train()
        update(model, optimizer, micros, language_terms, toys.CPU)
    return model


def liked(ids: tuple[int, ...]) -> float:
    """The share of liked words: the end token is none, so length doesn't pay."""
    words = [i for i in ids if i != toys.EOS]
    return 4.0 * sum(i in LIKED for i in words) / max(1, len(words))
