"""Pre-training text beside PPO."""

from tetrad.settings.base import Count, Files, NotNegative, settings


@settings
class Ptx:
    """PPO-ptx: a language modelling loss on text in every step of the actor, so that it doesn't forget how to write
    (Ouyang et al. 2022, eq. 2). On when `text` is given."""

    text: Files = ()
    """Files of documents, as in [pretrain]."""
    coef: NotNegative = 1.0
    """Weight of the loss, in nats per token, beside the policy's."""
    sequence_length: Count = 128
    """Length of a row of packed documents."""
    batch_tokens: Count = 1024
    """Tokens per optimizer step, on all machines together."""
