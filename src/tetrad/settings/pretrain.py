"""Pre-training on documents."""

from typing import ClassVar, Literal

from tetrad.settings.base import Count, Files, Rate, Share, Weights, Whole, settings


@settings
class Pretrain:
    """Next-token prediction on packed rows without padding. Runs when `text` is given."""

    GROUPS: ClassVar = {
        "data": "weights",
        "optimizer": "optimizer muon_lr warmup schedule",
    }

    text: Files = ()
    """Files of documents: txt (one per paragraph between blank lines) or jsonl with `text`."""
    weights: Weights = ()
    """How often an epoch reads the records of each entry of `text`, as [1, 0.5]; empty reads all once."""
    validation: Files = ()
    """Documents for the validation perplexity; never trained on."""
    tokens: Whole = 0
    """Tokens to train on; 0 is one epoch."""
    sequence_length: Count = 512
    """Tokens per row; a longer document continues in the next row."""
    batch_tokens: Count = 16_384
    """Tokens per optimizer step, on all machines together; a multiple of `sequence_length`."""
    optimizer: Literal["adamw", "muon"] = "adamw"
    """muon: Muon on the matrices, AdamW on embeddings, head, norms and biases."""
    lr: Rate = 1e-3
    """Highest learning rate of AdamW."""
    muon_lr: Rate = 0.02
    """Highest learning rate of Muon."""
    warmup: Share = 0.05
    """Share of the steps in which the learning rate rises from 0."""
    schedule: Literal["linear", "cosine", "constant"] = "cosine"
    """How the learning rate decays afterwards; linear and cosine end at 0."""
