"""The comparison at the end of a recipe."""

from typing import ClassVar

from tetrad.settings.base import Count, Files, Functions, Limits, NotNegative, Positive, Share, Whole, settings, unkeyed


@settings
class Evaluate:
    """SFT, best-of-N and PPO on validation prompts, scored by the reward model and by judges unseen in training."""

    GROUPS: ClassVar = {
        "report": "side_by_side",
        "limits": "strict max_kl min_finished length_range min_distinct_2 max_common_word max_perplexity",
    }

    prompts: Files = ()
    """Files of validation prompts."""
    judges: Functions = ()
    """Python functions `file.py:name`: dicts with text, input, prompt in, a number each out. Only the file is keyed."""
    others: tuple[str, ...] = unkeyed(())  # as every folder of a model, keyed by what is in it
    """Stages of other runs (["runs/other/ppo"]) that answer the same prompts; their tokenizer must be this run's."""
    external_lm: str = ""
    """A separately trained language model ("runs/other/pretrain"): responses' nats per token under it are reported."""
    samples: Count = 256
    """Prompts that are answered (the first of a fixed shuffle)."""
    best_of: Whole = 16
    """Responses that best-of-N picks from by reward; 0 is off."""
    max_new_tokens: Count = 64
    """Longest response, in tokens."""
    side_by_side: Whole = 4
    """Prompts whose answers are printed."""
    strict: bool = unkeyed(False)
    """Exit 5 if the verdict is that the result is not to be trusted; the report is kept."""
    max_kl: NotNegative = 20.0
    """Not to be trusted if answers are farther from the SFT model, in nats per response."""
    min_finished: Share = 0.7
    """Not to be trusted if fewer answers end by themselves, as a share of the SFT model's."""
    length_range: Limits = (0.5, 1.5)
    """Not to be trusted if the mean length is outside, in multiples of the SFT model's."""
    min_distinct_2: Share = 0.7
    """Not to be trusted if fewer pairs of neighbouring tokens are different, as a share of the SFT model's."""
    max_common_word: Share = 0.5
    """Not to be trusted if the share of answers with the commonest word exceeds the SFT model's by more."""
    max_perplexity: Positive = 1.5
    """Not to be trusted if the perplexity under `external_lm` is higher, in multiples of the SFT model's."""
