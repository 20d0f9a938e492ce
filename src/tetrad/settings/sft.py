"""Supervised fine-tuning."""

from typing import ClassVar, Literal

from tetrad.settings.base import Count, Escaped, Files, Positive, Rate, Share, TemplateName, Weights, Whole, settings


@settings
class Sft:
    """Cross-entropy on the answers and their end tokens. Runs when `data` is given."""

    GROUPS: ClassVar = {
        "data": "weights train_turns train_on_prompt max_tokens overlong",
        "template": "system separator add_separator",
        "optimizer": "optimizer muon_lr warmup schedule",
    }

    data: Files = ()
    """Files of Instruction, messages or prompt/completion records."""
    weights: Weights = ()
    """How often an epoch reads the records of each entry of `data`, as [1, 0.5]; empty reads all once."""
    validation: Files = ()
    """Records for the validation loss; never trained on."""
    template: TemplateName = ""
    """How a conversation becomes text; empty is the folder's own way, and `instruction` where it has none."""
    system: str | None = None
    """The system prompt of conversations without a system turn, instead of the template's own; "" drops that."""
    separator: Escaped = "<|sep|>"
    """Between the parts of `instruction`: a control token, or on a foreign tokenizer plain text such as "\\n\\n"."""
    add_separator: bool = False
    """Give a foreign tokenizer the control token <|sep|> (a spare embedding row first, else one more row)."""
    train_turns: Literal["all", "last"] = "all"
    """Train on every answer of a conversation, or the last one only."""
    train_on_prompt: bool = False
    """Include the prompt's tokens in the loss too."""
    max_tokens: Whole = 0
    """Longest record; 0 is the model's."""
    overlong: Literal["refuse", "truncate", "drop"] = "refuse"
    """What to do with a longer record; truncated and dropped ones are counted."""
    adapters: bool = False
    """Train low-rank adapters (see [lora]); the result is these, on the model beneath."""
    epochs: Positive = 1.0
    """Times the records are read."""
    batch_size: Count = 32
    """Records per optimizer step, on all machines together."""
    optimizer: Literal["adamw", "muon"] = "adamw"
    """muon: Muon on the matrices, AdamW on the rest."""
    lr: Rate = 5e-4
    """Highest learning rate of AdamW."""
    muon_lr: Rate = 0.02
    """Highest learning rate of Muon."""
    warmup: Share = 0.05
    """Share of the steps in which the learning rate rises from 0."""
    schedule: Literal["linear", "cosine", "constant"] = "linear"
    """How the learning rate decays afterwards."""
