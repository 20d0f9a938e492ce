"""Knobs that several stages share: the optimizer, the run, sampling."""

from typing import Literal

from tetrad.settings.base import Below1, Count, NotNegative, Positive, Share, Whole, settings, unkeyed


@settings
class Run:
    """How and where stages run. Only `dtype` changes numbers."""

    out: str = unkeyed("runs")
    """Folder that holds runs/<name>/<stage>."""
    device: Literal["auto", "cpu", "cuda"] = unkeyed("auto")
    """Where to compute."""
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """Compute type: auto is bfloat16 on a GPU that has it and float32 elsewhere. Trained weights stay float32."""
    deterministic: bool = unkeyed(False)
    """On a GPU: only kernels that repeat bit for bit (slower). A CPU always repeats."""
    threads: Whole = unkeyed(0)
    """CPU threads; 0 leaves the choice to torch."""
    nproc: Count = unkeyed(1)
    """Processes on this machine that train together, as `--nproc` too; of no effect under torchrun."""
    patience: Positive = unkeyed(300.0)
    """Seconds that a process waits for another one that does not arrive, before all end."""
    workers: Whole = unkeyed(0)
    """Processes that read and tokenise; 0 is one a core."""
    micro_batch_tokens: Count = unkeyed(4096)
    """Tokens of one forward and backward: memory and speed; results differ by rounding."""
    save_every: Whole = unkeyed(0)
    """Steps between checkpoints; 0 picks about ten a stage."""
    keep: Count = unkeyed(2)
    """Checkpoints kept; never fewer than two."""
    log_every: Count = unkeyed(10)
    """Steps between lines on a log (metrics.jsonl holds every step)."""
    grace: NotNegative = unkeyed(60.0)
    """Seconds that a PPO iteration may still take after SIGTERM."""


@settings
class Data:
    """How records are read, in every stage."""

    rename: tuple[str, ...] = ()
    """Other names of fields, as ["question=Instruction", "answer=Output"]."""


@settings
class Optim:
    """The optimizer's constants; each stage has its own learning rate."""

    beta1: Below1 = 0.9
    """AdamW: decay of the mean."""
    beta2: Below1 = 0.95
    """AdamW: decay of the square."""
    eps: Positive = 1e-8
    """AdamW: added to the root (PPO has its own, `ppo.adam_eps`)."""
    weight_decay: NotNegative = 0.0
    """Decoupled decay of matrices, per step and unit of learning rate (norms and biases have none)."""
    max_grad_norm: NotNegative = 1.0
    """Gradients are scaled to at most this global norm; 0 turns it off."""
    muon_momentum: Below1 = 0.95
    """Muon: momentum."""


@settings
class Sampling:
    """How replies are sampled outside PPO (evaluate, generate, chat)."""

    temperature: NotNegative = 1.0
    """Logits are divided by it; 0 is greedy."""
    top_k: Whole = 0
    """Sample among the k likeliest tokens; 0 is off."""
    top_p: Share = 1.0
    """Sample among the likeliest tokens that reach this share; 1 is off."""
    min_p: Share = 0.0
    """Sample among the tokens that have at least this share of the likeliest one's chance; 0 is off."""
    repetition_penalty: Positive = 1.0
    """Makes tokens of prompt and reply less likely: divides a positive logit, multiplies another; 1 is off."""
    presence_penalty: float = 0.0
    """Taken from the logit of each token that the reply has; below 0 repeats are rewarded."""
    frequency_penalty: float = 0.0
    """The same, once for each time that the reply has it."""
    max_new_tokens: Count = 256
    """Longest reply, in tokens."""
    max_num_seqs: Count = unkeyed(64)
    """Responses sampled at once."""
