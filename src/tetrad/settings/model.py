"""A new model's shape, or the model it comes from; and its tokenizer."""

from tetrad.settings.base import Count, Files, Positive, Whole, settings


@settings
class Model:
    """The decoder of a new run (Qwen2), or `from`: a Hugging Face folder, another run's stage, or a model by name."""

    from_: str = ""
    """A Hugging Face folder, a run's stage ("runs/other/sft") or a model of the hub ("org/name@revision"): its shape
    and tokenizer; the rest here is ignored."""
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


@settings
class Tokenizer:
    """Byte-level BPE learned from text; without `text` the tokenizer of `model.from` is used."""

    text: Files = ()
    """Files of text (txt, or jsonl with `text`) to learn from."""
    vocab_size: Count = 4096
    """Number of tokens, control tokens included."""
    min_frequency: Count = 2
    """Pairs seen less often are not merged."""
    max_bytes: Whole = 0
    """Read at most this much of the text; 0 reads all."""
