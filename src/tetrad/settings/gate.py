"""What a reward model must reach before PPO trusts it."""

from tetrad.settings.base import NotNegative, Share, settings, unkeyed


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
