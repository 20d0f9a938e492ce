"""DPO."""

from typing import ClassVar, Literal

from tetrad.settings.base import BelowHalf, Count, Files, NotNegative, Positive, Rate, Share, Weights, Whole, settings


@settings
class Dpo:
    """Preferences learned by the SFT model itself, without a reward model. Runs when `data` is given."""

    GROUPS: ClassVar = {
        "data": "weights score_gap max_tokens overlong",
        "loss": "label_smoothing sft_coef",
        "optimizer": "warmup schedule",
    }

    data: Files = ()
    """Files of comparisons: pairs, ranked lists, votes; the reward model's files serve."""
    weights: Weights = ()
    """How often an epoch reads the records of each entry of `data`, as [1, 0.5]; empty reads all once."""
    validation: Files = ()
    """Records for the reported loss and accuracy; never trained on."""
    score_gap: NotNegative = 0.0
    """Scores of one prompt become a ranked list: one lower by at least this makes an answer worse; 0 refuses scores."""
    loss: Literal["sigmoid", "ipo", "plackett-luce"] = "sigmoid"
    """sigmoid: DPO, all pairs of a list, averaged; ipo: a fixed difference of each pair; plackett-luce: a list's whole
    order, which is DPO for two answers."""
    beta: Positive = 0.1
    """How dearly distance from the SFT model is bought: the lower, the farther the policy goes."""
    label_smoothing: BelowHalf = 0.0
    """Assumed probability that a pair's stated order is wrong; 0 trusts people, or their votes."""
    sft_coef: NotNegative = 0.0
    """Weight of the best answers' cross-entropy (nats a token, the mean of each answer), which keeps them likely."""
    adapters: bool = False
    """Train low-rank adapters (see [lora]) on the SFT model, which is the reference too; the result is these."""
    max_tokens: Whole = 0
    """Longest prompt with answer; 0 is the model's."""
    overlong: Literal["refuse", "drop"] = "refuse"
    """What to do with a record that has a longer one; dropped ones are counted."""
    epochs: Positive = 1.0
    """Times the records are read."""
    batch_size: Count = 32
    """Records per optimizer step, on all machines together."""
    lr: Rate = 5e-6
    """Highest learning rate."""
    warmup: Share = 0.1
    """Share of the steps in which the learning rate rises from 0."""
    schedule: Literal["linear", "cosine", "constant"] = "linear"
    """How the learning rate decays afterwards."""
