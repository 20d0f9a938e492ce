"""The comparison at the end of a recipe."""

from tetrad.settings.base import Count, Files, Functions, Whole, settings


@settings
class Evaluate:
    """SFT, best-of-N and PPO on held-out prompts, scored by the reward model and by judges never seen in training."""

    prompts: Files = ()
    """Files of held-out prompts."""
    judges: Functions = ()
    """Python functions `file.py:name`: dicts with text, input, prompt in, a number each out. Only the file is keyed."""
    referee: str = ""
    """A language model trained apart ("runs/other/pretrain"): the replies' nats a token under it are reported."""
    samples: Count = 256
    """Prompts that are answered (the first of a fixed shuffle)."""
    best_of: Whole = 16
    """Replies among which best-of-N picks by reward; 0 is off."""
    max_new: Count = 64
    """Longest reply, in tokens."""
    side_by_side: Whole = 4
    """Prompts whose answers are printed."""
