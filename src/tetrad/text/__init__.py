"""From strings to ids and back: tokenizers, byte-level BPE, templates. No torch."""
