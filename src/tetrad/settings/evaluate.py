"""The comparison at the end of a recipe."""

from tetrad.settings.base import Count, Files, Functions, Limits, NotNegative, Positive, Share, Whole, settings, unkeyed


@settings
class Evaluate:
    """SFT, best-of-N and PPO on held-out prompts, scored by the reward model and by judges never seen in training."""

    prompts: Files = ()
    """Files of held-out prompts."""
    judges: Functions = ()
    """Python functions `file.py:name`: dicts with text, input, prompt in, a number each out. Only the file is keyed."""
    external_lm: str = ""
    """A language model trained apart ("runs/other/pretrain"): the replies' nats a token under it are reported."""
    samples: Count = 256
    """Prompts that are answered (the first of a fixed shuffle)."""
    best_of: Whole = 16
    """Responses among which best-of-N picks by reward; 0 is off."""
    max_new_tokens: Count = 64
    """Longest reply, in tokens."""
    side_by_side: Whole = 4
    """Prompts whose answers are printed."""
    strict: bool = unkeyed(False)
    """Exit 5 where the verdict is that the result is not to be trusted; the report is kept."""
    max_kl: NotNegative = 20.0
    """Not to be trusted where answers are farther from the SFT model, in nats a reply."""
    min_finished: Share = 0.7
    """Not to be trusted where fewer answers end by themselves, as a share of the SFT model's."""
    length_range: Limits = (0.5, 1.5)
    """Not to be trusted where the mean length is outside, in multiples of the SFT model's."""
    min_distinct_2: Share = 0.7
    """Not to be trusted where fewer pairs of neighbouring tokens are different, as a share of the SFT model's."""
    max_common_word: Share = 0.5
    """Not to be trusted where the share of answers with the commonest word rises by more over the SFT model's."""
    max_perplexity: Positive = 1.5
    """Not to be trusted where the perplexity under `referee` is higher, in multiples of the SFT model's."""
