"""RLOO, GRPO and their kin: policy gradients without a critic."""

from typing import Annotated, ClassVar, Literal

from annotated_types import Ge

from tetrad.settings.base import Count, NotNegative, settings
from tetrad.settings.common import OnPolicy


@settings
class Grpo(OnPolicy):
    """RLOO, GRPO, DAPO's and Dr. GRPO's losses: no critic, each response is compared with the others to its prompt.
    Runs when `prompts` is given. The defaults are GRPO's."""

    GROUPS: ClassVar = {
        "rollout": "weights max_prompt overlong temperature",
        "reward": "reward_weights reward_clip missing_eos_penalty uncertainty_penalty",
        "KL penalty": "kl_in kl_estimator",
        "loss": "epochs clip_range clip_high entropy_coef",
        "optimizer": "num_minibatches schedule adam_eps max_grad_norm ema_decay",
        "log": "eval_every",
    }

    batch_size: Count = 16
    """Prompts of an iteration, on all machines together."""
    samples_per_prompt: Annotated[int, Ge(2)] = 8
    """Responses to each prompt of an iteration: the group in which they are compared."""
    kl_coef: NotNegative = 0.04
    """beta, the price of KL to the reference: of a nat per token in the loss, of a nat per response in the reward."""
    advantage: Literal["normalised", "centred", "leave_one_out"] = "normalised"
    """normalised: (score - mean of the group) / its standard deviation (GRPO; beta then counts in units of that);
    centred: score - mean (Dr. GRPO); leave_one_out: score - mean of the others (RLOO)."""
    loss_mean: Literal["response", "token", "constant"] = "response"
    """response: the mean over responses of each one's mean over tokens (GRPO); token: the mean over all tokens of the
    batch, on all machines (DAPO); constant: the sum over tokens / (responses * max_new_tokens) (Dr. GRPO, RLOO)."""
    kl_in: Literal["loss", "reward"] = "loss"
    """loss: beta * KL is a loss at each token (GRPO); reward: beta * (log pi - log pi_ref) of the whole response is
    subtracted from its score before responses are compared (RLOO)."""
    kl_estimator: Literal["k3", "k2", "k1"] = "k3"
    """Of KL as a loss: k3 (GRPO) has the gradient of KL(reference || actor), k2 that of KL(actor || reference) at each
    token; k1 is for `kl_in = "reward"`, where it is always the one."""
    epochs: Count = 1
    """Passes over an iteration's responses; with 1 and `num_minibatches = 1` nothing is clipped (REINFORCE)."""
    clip_high: NotNegative = 0.0
    """Upper range of the policy ratio, to 1 + clip_high; 0 is `clip_range`, DAPO's is 0.28."""
