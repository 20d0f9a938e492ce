"""PPO with four models, and the alarms that watch a policy."""

from typing import ClassVar, Literal

from tetrad.settings.base import (
    Count,
    Files,
    Functions,
    Limits,
    NotNegative,
    Positive,
    Rate,
    Share,
    Whole,
    settings,
    unkeyed,
)
from tetrad.settings.common import OnPolicy


@settings
class Ppo(OnPolicy):
    """Proximal policy optimisation with a critic and a penalty per token. Runs when `prompts` is given."""

    GROUPS: ClassVar = {
        "rollout": "weights samples_per_prompt max_prompt overlong temperature",
        "reward": "reward_weights reward_clip reward_scaling missing_eos_penalty uncertainty_penalty",
        "KL penalty": "kl_target kl_horizon",
        "advantages": "gamma gae_lambda bootstrap_truncated",
        "loss": "reduction clip_range dual_clip early_stop_kl entropy_coef",
        "critic": "critic_warmup value_coef value_clip_range",
        "optimizer": "num_minibatches schedule adam_eps max_grad_norm ema_decay",
        "log": "eval_every",
    }

    critic: Literal["reward", "actor", "shared"] = "reward"
    """What the critic starts from; shared is a head on the actor's own trunk, trained in one step with it."""
    adapters: bool = False
    """One frozen base for the four roles: actor, critic and reward model are adapters on it (see [lora])."""
    ppo_epochs: Count = 4
    """Passes over an iteration's responses."""
    critic_lr: Rate = 1e-5
    """Learning rate of the critic."""
    critic_warmup: Whole = 0
    """First iterations, in which the actor is frozen and the critic learns full returns (lambda 1, unclipped): value
    pre-training (Yuan et al. 2025)."""
    value_coef: NotNegative = 0.1
    """Weight of the value loss if actor and critic share a trunk."""
    kl_coef: NotNegative = 0.05
    """beta, the price of a nat of KL to the reference; the start of it when adaptive."""
    kl_target: NotNegative = 0.0
    """Nats per response that an adaptive beta aims at; 0 keeps beta fixed."""
    kl_horizon: Positive = 10_000.0
    """Responses over which an adaptive beta moves."""
    gamma: Share = 1.0
    """Discount."""
    gae_lambda: Share = 0.95
    """lambda of generalised advantage estimation."""
    bootstrap_truncated: bool = False
    """A truncated response is bootstrapped with the critic's value after its last token; else its end is terminal."""
    reduction: Literal["token", "sequence"] = "token"
    """A batch's losses are the mean over its tokens, or over its responses of each one's mean."""
    dual_clip: NotNegative = 0.0
    """Above 1: a token's loss is at most this many times its negative advantage (Ye et al. 2020); 0 is off."""
    early_stop_kl: NotNegative = 0.0
    """The actor, and what trains with it (a shared critic, text of [ptx]), stops learning from an iteration once its
    approximate KL from the old policy is above this, in nats per token; 0 is off."""
    value_clip_range: NotNegative = 0.2
    """Range of the value around the old one; 0 is off."""
    reward_clip: NotNegative = 5.0
    """The reward model's scores, and scaled ones, are clipped to this many standard deviations; 0 is off."""
    reward_scaling: Literal["none", "running", "whiten"] = "none"
    """running: scores are divided by the standard deviation of all so far, then clipped; whiten: the rewards of all
    tokens by their own in the batch (the mean is kept)."""

    @property
    def epochs(self) -> int:
        """Passes over an iteration's responses."""
        return self.ppo_epochs

    @property
    def loss_mean(self) -> Literal["response", "token", "constant"]:
        """What a batch's losses are the mean over."""
        return "response" if self.reduction == "sequence" else "token"

    @property
    def clips_sum(self) -> bool:
        """Scaled scores are clipped after their sum, whatever they come from."""
        return self.reward_scaling == "running" or super().clips_sum


@settings
class Alarms:
    """Alarms of PPO and GRPO. Each has two limits: at the first it warns, at the second it stops if `strict` is set.
    Shares and multiples are relative to the first iterations. A limit of 0 for what must not fall is off."""

    strict: bool = unkeyed(False)
    """Stop (exit 5) at the second limit; else every alarm is a warning."""
    judges: Functions = unkeyed(())
    """Python functions `file.py:name` that are not the reward: each is called at every iteration, and an alarm is
    raised when one falls while the score rises."""
    expected_kl: Positive = unkeyed(10.0)
    """Expected KL per response if no `ppo.kl_target` is set."""
    kl: Limits = unkeyed((2.0, 5.0))
    """Multiples of the expected KL per response."""
    negative_kl: Limits = unkeyed((0.5, 2.0))
    """Nats below 0 of the mean KL per response: the sampler and the log-probabilities disagree."""
    length: Limits = unkeyed((1.5, 2.0))
    """Multiples of the length of responses at the start."""
    finished: Limits = unkeyed((0.7, 0.4))
    """Share of finished responses, relative to the start."""
    entropy: Limits = unkeyed((0.3, 0.1))
    """Entropy per token, relative to the start."""
    distinct_2: Limits = unkeyed((0.5, 0.25))
    """Different pairs of neighbouring tokens, relative to the start."""
    clip_fraction: Limits = unkeyed((0.4, 0.7))
    """Share of tokens whose policy ratio is clipped."""
    explained_variance: Limits = unkeyed((5.0, 20.0))
    """Iterations in a row, after the critic's warm-up, in which the critic's explained variance is negative."""
    ood_scores: Limits = unkeyed((0.05, 0.25))
    """Share of scores above all but a thousandth of what the reward model gave to its training answers."""
    score_std: Limits = unkeyed((1e-6, 1e-9))
    """Standard deviation of an iteration's scores: the reward distinguishes nothing."""
    judge_drops: Limits = unkeyed((3.0, 6.0))
    """Windows of ten iterations in a row in which a judge fell while the score rose."""


@settings
class Ptx:
    """PPO-ptx: a language modelling loss on text in every step of the actor, so that it doesn't forget how to write
    (Ouyang et al. 2022, eq. 2). On when `text` is given."""

    text: Files = ()
    """Files of documents, as in [pretrain]."""
    coef: NotNegative = 1.0
    """Weight of the loss, in nats per token, beside the policy's."""
    sequence_length: Count = 128
    """Length of a row of packed documents."""
    batch_tokens: Count = 1024
    """Tokens per optimizer step, on all machines together."""
