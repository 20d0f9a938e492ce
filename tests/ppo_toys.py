"""PPO in miniature: four small models, prompts, and one iteration made of the stage's own functions."""

from collections.abc import Callable, Sequence
from copy import deepcopy
from dataclasses import replace

import torch

import toys
from tetrad.engine.optim import Optimizer
from tetrad.engine.rollout import Question, Rollout, read_logprobs, read_values, roll_out
from tetrad.engine.scoring import Reward, Sample
from tetrad.model.decoder import CausalLM, ScalarModel
from tetrad.objectives import policy
from tetrad.settings.common import Optim, Sampling
from tetrad.settings.ppo import Ppo
from tetrad.train.ppo import Experience, FourModels, learn, shaped_rewards, whitened
from tetrad.types import Prompt, Turn

TOKENIZER = toys.tokenizer()


def questions(count: int, size: int = 40) -> list[Question]:
    """Prompts of 1 to 9 tokens."""
    made = [tuple(toys.ids(1 + 4 * i % 9, i, 3, size)) for i in range(count)]
    return [Question(ids, Prompt((Turn("user", f"question {i}"),), f"{i}")) for i, ids in enumerate(made)]


def four_models(
    s: Ppo, actor: CausalLM, critic: ScalarModel, reward: Reward, reference: CausalLM | None = None
) -> FourModels:
    """The reference is the actor as it is now, unless one is given."""
    optim = replace(Optim(), eps=s.adam_eps)
    held = (reference or deepcopy(actor)).requires_grad_(False)
    optimizers = Optimizer(actor, s.actor_lr, optim), Optimizer(critic, s.critic_lr, optim)
    return FourModels(actor, critic, held, reward, *optimizers)


def by_ids(score: Callable[[tuple[int, ...]], float]) -> Reward:
    """A reward that reads a reply's ids."""

    def reward(samples: Sequence[Sample]) -> list[float]:
        return [score(sample.reply_ids) for sample in samples]

    return reward


def sampled(
    four: FourModels, asked: Sequence[Question], s: Ppo, key: tuple[int, int], numbers: Sequence[int] | None = None
) -> Rollout:
    sampling = Sampling(temperature=s.temperature, max_new=s.max_new, slots=len(asked))
    places = range(len(asked)) if numbers is None else numbers
    return roll_out(four.actor, asked, places, (key[0], "rollout", key[1]), sampling, TOKENIZER, toys.CPU)


def experience(
    four: FourModels, rollout: Rollout, s: Ppo, micro_tokens: int = 4096, beta: float | None = None
) -> tuple[Experience, torch.Tensor]:
    """What the stage makes of a rollout, and its rewards."""
    scores = torch.tensor(four.reward(rollout.samples), dtype=torch.float32)
    old = read_logprobs(four.actor, rollout, micro_tokens, toys.CPU, s.temperature)
    ref = read_logprobs(four.reference, rollout, micro_tokens, toys.CPU, s.temperature)
    values = read_values(four.critic, rollout, micro_tokens, toys.CPU)
    rewards = shaped_rewards(s, scores, old, ref, rollout, s.kl_coefficient if beta is None else beta)
    if s.whiten_rewards:
        rewards = whitened(rewards, rollout.mask_BT, toys.CPU, shift_mean=False)
    advantages, returns = policy.gae(rewards, values, rollout.mask_BT, s.gamma, s.lam)
    advantages = whitened(advantages, rollout.mask_BT, toys.CPU, shift_mean=True)
    return Experience(rollout, old, ref, values, advantages, returns), rewards


def iterate(
    four: FourModels, asked: Sequence[Question], s: Ppo, key: tuple[int, int], micro_tokens: int = 4096
) -> tuple[Experience, dict[str, float]]:
    """One iteration: sample, score, learn."""
    made, _ = experience(four, sampled(four, asked, s, key), s, micro_tokens)
    return made, learn(four, made, s, key, micro_tokens, toys.CPU)
