"""PPO with four models."""

from typing import Literal

from tetrad.settings.base import (
    Count,
    Files,
    Functions,
    NotNegative,
    Positive,
    Rate,
    Share,
    Weights,
    Whole,
    settings,
    unkeyed,
)


@settings
class Ppo:
    """Proximal policy optimisation with a critic and a penalty per token. Runs when `prompts` is given."""

    prompts: Files = ()
    """Files of prompts; SFT and RM files are legal, their answers are ignored."""
    weights: Weights = ()
    """How often an epoch reads the records of each entry of `prompts`, as [1, 0.5]; empty reads all once."""
    rewards: Functions = ()
    """Python functions `file.py:name` as the reward instead of the reward model; their sum."""
    critic: Literal["reward", "actor"] = "reward"
    """What the critic starts from."""
    steps: Count = 100
    """Iterations: sample, score, update."""
    batch: Count = 64
    """Prompts of an iteration, on all machines together."""
    max_new: Count = 64
    """Longest reply, in tokens; a longer one is cut and pays `missing_eos_penalty`."""
    max_prompt: Whole = 0
    """Longest prompt, in tokens; 0 is what the model leaves beside `max_new`. Longer prompts are an error."""
    temperature: Positive = 1.0
    """Of sampling, actor and reference alike."""
    epochs: Count = 4
    """Times an iteration's replies are learned from."""
    mini_batches: Count = 1
    """Optimizer steps an epoch; `batch` must divide by it."""
    actor_lr: Rate = 1e-5
    """Learning rate of the actor."""
    critic_lr: Rate = 1e-5
    """Learning rate of the critic."""
    schedule: Literal["linear", "constant"] = "linear"
    """How both learning rates fall; linear ends at 0."""
    critic_warmup: Whole = 0
    """First iterations in which only the critic learns."""
    adam_eps: Positive = 1e-5
    """AdamW: added to the root, for actor and critic."""
    kl_coefficient: NotNegative = 0.05
    """beta, the price of a nat of KL to the reference; the start of it when adaptive."""
    kl_target: NotNegative = 0.0
    """Nats a reply that an adaptive beta aims at; 0 keeps beta fixed."""
    kl_horizon: Positive = 10_000.0
    """Replies over which an adaptive beta moves."""
    gamma: Share = 1.0
    """Discount."""
    lam: Share = 0.95
    """lambda of generalised advantage estimation."""
    clip: Positive = 0.2
    """Range of the policy ratio, 1 - clip to 1 + clip."""
    value_clip: NotNegative = 0.2
    """Range of the value around the old one; 0 is off."""
    score_clip: NotNegative = 5.0
    """The reward model's scores are cut to this many standard deviations; 0 is off. Functions' scores are not cut."""
    doubt: NotNegative = 0.0
    """Of an ensemble (`reward.seeds`): standard deviations of its members' scores that are taken off their mean."""
    missing_eos_penalty: NotNegative = 1.0
    """Taken from the score of a cut reply, in standard deviations, after the clip."""
    whiten_rewards: bool = False
    """Divide rewards by their standard deviation (the mean stays)."""
    entropy_bonus: NotNegative = 0.0
    """Weight of the entropy in the actor's loss."""
    max_norm: NotNegative = 1.0
    """Gradients of actor and critic are scaled to at most this norm; 0 turns it off."""
    eval_every: Whole = unkeyed(20)
    """Iterations between samples on the log; 0 shows those of the last."""
