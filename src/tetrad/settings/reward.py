"""The reward model."""

from typing import ClassVar, Literal

from tetrad.settings.base import (
    Below1,
    BelowHalf,
    Count,
    Files,
    Functions,
    NotNegative,
    Positive,
    Rate,
    Share,
    Weights,
    Whole,
    settings,
    unkeyed,
)


@settings
class Reward:
    """One latent reward from comparisons and scores, mixed in one run. Runs when `data` is given."""

    GROUPS: ClassVar = {
        "data": "weights test pair_gap max_tokens overlong shared_prefix",
        "loss": "label_smoothing score_loss comparison_weight score_weight token_weight annotators center",
        "regularisation": "dropout token_dropout ensemble_size patience",
        "optimizer": "optimizer muon_lr warmup schedule",
        "report": "baselines normalise normalise_max_new_tokens probes",
    }

    data: Files = ()
    """Files of comparisons and scores."""
    weights: Weights = ()
    """How often an epoch reads the records of each entry of `data`, as [1, 0.5]; empty reads all once."""
    validation: Files = ()
    """Records for the temperature, the prompts of the normalisation, and the report; never trained on."""
    test: Files = ()
    """Records read once, at the end, for the reported metrics; `validation` if none are given."""
    from_: str = ""
    """A folder, or a model of the hub, to start from ("from" in TOML); empty is the SFT model."""
    score_scale: tuple[float, float] | tuple[()] = ()
    """Lowest and highest possible score, as [1, 5]; required if any record has a score."""
    comparison_loss: Literal["pairs", "plackett-luce"] = "pairs"
    """pairs: all pairs of a list, averaged (Ouyang et al. 2022), minus the margin; plackett-luce: the whole order."""
    label_smoothing: BelowHalf = 0.0
    """Assumed probability that a pair's stated order is wrong; 0 trusts people, or their votes."""
    score_loss: Literal["gaussian", "mse", "bce"] = "gaussian"
    """gaussian: squared error in standard deviations of the training scores; mse, bce: the share of score_scale as a
    squared error, or as a logit by cross-entropy."""
    comparison_weight: NotNegative = 1.0
    """Weight of the mean loss of a batch's comparisons; if they are few, a low one limits their noise."""
    score_weight: NotNegative = 0.5
    """Weight of the mean loss of a batch's scores."""
    token_weight: NotNegative = 0.0
    """Weight of the same losses on token rewards (Cobbe et al. 2021): a score's at every token of its answer, a
    comparison's on the means over each answer's tokens; 0 is off."""
    annotators: bool = True
    """Learn how often each named annotator is right, and each one's offset and gain of scores; else all count alike."""
    center: NotNegative = 0.0
    """Weight of the centring penalty, mean of (r_chosen + r_rejected)^2."""
    baselines: Functions = ()
    """Python functions `file.py:name` evaluated on the test records beside the reward model."""
    pair_gap: NotNegative = 0.0
    """Reported accuracy on pairs of scored answers leaves out pairs whose scores are closer than this."""
    dropout: Below1 = 0.1
    """Dropout of the residual branches while the reward model trains."""
    token_dropout: Below1 = 0.0
    """Share of the input tokens whose embedding is zeroed while the reward model trains."""
    max_tokens: Whole = 0
    """Longest prompt with answer; 0 is the model's."""
    overlong: Literal["refuse", "truncate", "drop"] = "refuse"
    """What to do with a longer one; truncated (from the left) and dropped ones are counted."""
    shared_prefix: Literal["auto", "always", "never"] = unkeyed("auto")
    """Whether a list's answers are computed from one prompt, on a CPU; auto: if that is faster. Numbers change by
    rounding only: dropout drops the same of a prompt for all of its answers, shared or not."""
    adapters: bool = False
    """Train low-rank adapters (see [lora]) and the head on the frozen SFT model; `ppo.adapters` needs it."""
    epochs: Positive = 1.0
    """Times the records are read."""
    batch_size: Count = 32
    """Records per optimizer step, on all machines together."""
    ensemble_size: Count = 1
    """Reward models from as many seeds, averaged; the first is the folder's own. Their standard deviation is
    reported."""
    patience: Whole = 3
    """Training stops after this many of at most ten validation passes without improvement; 0 never stops. The weights
    of the best pass are kept."""
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
    normalise: Count = 256
    """Responses of the SFT model on which the output gets mean 0 and standard deviation 1."""
    normalise_max_new_tokens: Count = 64
    """Longest of those responses, in tokens."""
    probes: Whole = 256
    """Answers of the test records that are changed and scored again, to see what moves the reward; 0 skips this."""


@settings
class Gate:
    """The gate between reward model and PPO: it checks the reward stage's metrics, and changes no number."""

    strict: bool = unkeyed(False)
    """PPO refuses a reward model that fails; else it warns and continues."""
    accuracy: Share = unkeyed(0.55)
    """Fails if the lower end of the 95 % interval of the accuracy on test pairs is not above this."""
    ece: Share = unkeyed(0.1)
    """Fails if the calibration error at the fitted temperature is above this."""
    length_margin: Share = unkeyed(0.03)
    """Fails if choosing the longer (or the shorter) answer is right nearly as often: less than this below."""
    length_correlation: Share = unkeyed(0.5)
    """Fails if reward and length of the SFT model's responses have a rank correlation beyond this."""
    accuracy_by_length: Share = unkeyed(0.5)
    """Fails if, of the test pairs whose better answer is longer (or of those where it is shorter), significantly fewer
    are in order: the upper end of the 95 % interval is below this."""
    probe_shift: NotNegative = unkeyed(1.25)
    """Fails if padding, doubling or a polite phrase raises rewards by more than this, in standard deviations."""
    prompts_far: Share = unkeyed(0.5)
    """Fails if more than this share of PPO's prompts is unlike all that the reward model was trained on."""
    least_raw_std: NotNegative = unkeyed(0.05)
    """Fails if responses of the SFT model differed by less before rewards were scaled to a standard deviation of 1."""
    least_std: NotNegative = unkeyed(0.5)
    """Fails if fresh responses of the SFT model get rewards of a smaller standard deviation (it was set to 1)."""
    most_std: NotNegative = unkeyed(2.0)
    """Fails if it is larger."""
    most_mean: NotNegative = unkeyed(1.0)
    """Fails if their mean is farther from 0."""
