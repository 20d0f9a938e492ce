"""A new model's shape, or the folder it comes from."""

from tetrad.settings.base import Count, Positive, Whole, settings


@settings
class Model:
    """The decoder of a new run (Qwen2), or `from`: a Hugging Face folder or another run's stage."""

    from_: str = ""
    """A Hugging Face folder or a run's stage ("runs/other/sft"): its shape and tokenizer; the rest here is ignored."""
    hidden_size: Count = 128
    """Width."""
    layers: Count = 4
    """Blocks."""
    heads: Count = 4
    """Query heads; the width must divide by it."""
    kv_heads: Count = 2
    """Key and value heads; `heads` must divide by it."""
    ff: Whole = 0
    """Width of the feed-forward layers; 0 is 3 times the width."""
    max_positions: Count = 1024
    """Longest sequence, in tokens."""
    rope_theta: Positive = 10_000.0
    """Base of the rotary position frequencies."""
    tied: bool = True
    """Input embedding and output head share one matrix."""
