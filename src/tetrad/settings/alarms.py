"""When PPO's own metrics show that it is going wrong."""

from tetrad.settings.base import Functions, Limits, Positive, settings, unkeyed


@settings
class Alarms:
    """Alarms of PPO. Each has two limits: at the first it warns, at the second it stops if `strict` is set.
    Shares and multiples are relative to the first iterations."""

    strict: bool = unkeyed(False)
    """Stop (exit 5) at the second limit; else every alarm is a warning."""
    judges: Functions = unkeyed(())
    """Python functions `file.py:name` that are not PPO's reward: each is called at every iteration, and an alarm is
    raised when one falls while the score rises."""
    nats: Positive = unkeyed(10.0)
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
    unseen_scores: Limits = unkeyed((0.05, 0.25))
    """Share of scores above all but a thousandth of what the reward model gave to its training answers."""
    score_std: Limits = unkeyed((1e-6, 1e-9))
    """Standard deviation of an iteration's scores: the reward distinguishes nothing."""
    falls: Limits = unkeyed((3.0, 6.0))
    """Windows of ten iterations in a row in which a judge fell while the score rose."""
