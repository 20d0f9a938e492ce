"""What a reward model must reach before PPO trusts it."""

from tetrad.settings.base import NotNegative, Share, settings, unkeyed


@settings
class Gate:
    """The gate between reward model and PPO: it judges what the reward stage measured, and changes no number."""

    strict: bool = unkeyed(False)
    """PPO refuses a reward model that fails; else it says so and goes on."""
    accuracy: Share = unkeyed(0.55)
    """Fails where the lower end of the 95 % interval of the accuracy on test pairs is not above this."""
    ece: Share = unkeyed(0.1)
    """Fails where the calibration error at the fitted temperature is above this."""
    length_margin: Share = unkeyed(0.03)
    """Fails where taking the longer (or the shorter) answer is right nearly as often: less than this below."""
    length_correlation: Share = unkeyed(0.5)
    """Fails where reward and length of the SFT model's replies have a rank correlation beyond this."""
    accuracy_by_length: Share = unkeyed(0.5)
    """Fails where, of the test pairs whose better answer is longer (or of those where it is shorter), surely fewer are
    in order: the upper end of the 95 % interval is below this."""
    probe_shift: NotNegative = unkeyed(1.25)
    """Fails where padding, doubling or a polite phrase raises rewards by more than this, in standard deviations."""
    prompts_far: Share = unkeyed(0.5)
    """Fails where more than this share of PPO's prompts is unlike all that the reward model was trained on."""
    least_raw_std: NotNegative = unkeyed(0.05)
    """Fails where replies of the SFT model differed by less before rewards were scaled to a standard deviation of 1."""
    least_std: NotNegative = unkeyed(0.5)
    """Fails where fresh replies of the SFT model get rewards of a smaller standard deviation (it was set to 1)."""
    most_std: NotNegative = unkeyed(2.0)
    """Fails where it is larger."""
    most_mean: NotNegative = unkeyed(1.0)
    """Fails where their mean is farther from 0."""
