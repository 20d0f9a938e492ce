"""Learning a tokenizer."""

from tetrad.settings.base import Count, Files, Whole, settings


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
