"""Settings that several stages share: the optimizer, the run, sampling, and what PPO and GRPO have in common."""

from typing import Literal

from tetrad.settings.base import (
    Below1,
    Count,
    Files,
    NotNegative,
    Positive,
    Rate,
    Rewards,
    Share,
    Weights,
    Whole,
    settings,
    unkeyed,
)

TRACKERS = ("tensorboard", "wandb", "swanlab", "trackio", "mlflow")
"""Each a package of this name, and an extra of Tetrad's."""


@settings
class Run:
    """How and where stages run. Only `dtype` changes numbers."""

    out: str = unkeyed("runs")
    """Folder that holds runs/<name>/<stage>."""
    device: Literal["auto", "cpu", "cuda"] = unkeyed("auto")
    """Where to compute."""
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """Compute type: auto is bfloat16 on a GPU that supports it and float32 elsewhere; a CPU with AMX is up to twice as
    fast with bfloat16. Trained weights stay float32."""
    deterministic: bool = unkeyed(False)
    """On a GPU: only kernels that repeat bit for bit (slower). A CPU always repeats."""
    threads: Whole = unkeyed(0)
    """CPU threads; 0 leaves the choice to torch."""
    nproc: Count = unkeyed(1)
    """Processes on this machine that train together, also `--nproc`; no effect under torchrun."""
    shard: Literal["none", "full", "host"] = unkeyed("none")
    """What each of several processes holds of a model and its optimizer: all, its share ("full"), or its share among
    the processes of its machine ("host")."""
    patience: Positive = unkeyed(300.0)
    """Seconds that a process waits for one that does not arrive, before all end."""
    workers: Whole = unkeyed(0)
    """Processes that read and tokenise; 0 is one per core."""
    micro_batch_tokens: Count = unkeyed(4096)
    """Tokens per forward and backward pass: affects memory and speed; results differ by rounding."""
    activation_checkpointing: bool = unkeyed(False)
    """Keep only what enters each block of a model and compute the rest again in the backward pass: less memory, about a
    third more time, the same numbers."""
    save_every: Whole = unkeyed(0)
    """Steps between checkpoints; 0 saves about ten per stage."""
    keep: Count = unkeyed(2)
    """Checkpoints kept; never fewer than two."""
    log_every: Count = unkeyed(10)
    """Steps between log lines (metrics.jsonl has every step)."""
    report: bool = unkeyed(True)
    """Write runs/<name>/report.html, a page to look at, after each stage."""
    trackers: tuple[str, ...] = unkeyed(())
    """Where metrics and samples go too: tensorboard, wandb, swanlab, trackio, mlflow; offline in runs/NAME/trackers."""
    grace: NotNegative = unkeyed(60.0)
    """Seconds that an iteration of PPO or GRPO may still take after SIGTERM."""


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
    """AdamW: added to the square root (PPO and GRPO have their own, as `ppo.adam_eps`)."""
    weight_decay: NotNegative = 0.0
    """Decoupled decay of matrices, per step and unit of learning rate (norms and biases have none)."""
    max_grad_norm: NotNegative = 1.0
    """Gradients are scaled to at most this global norm; 0 turns it off."""
    muon_momentum: Below1 = 0.95
    """Muon: momentum."""


@settings
class Sampling:
    """How responses are sampled outside PPO (evaluate, generate, chat)."""

    temperature: NotNegative = 1.0
    """Logits are divided by it; 0 is greedy."""
    top_k: Whole = 0
    """Sample among the k most likely tokens; 0 is off."""
    top_p: Share = 1.0
    """Sample among the most likely tokens that reach this probability together; 1 is off."""
    min_p: Share = 0.0
    """Sample among the tokens with at least this share of the most likely one's probability; 0 is off."""
    repetition_penalty: Positive = 1.0
    """Makes tokens of prompt and response less likely: divides positive logits, multiplies negative ones; 1 is off."""
    presence_penalty: float = 0.0
    """Subtracted from the logit of each token that the response contains; below 0 rewards repeats."""
    frequency_penalty: float = 0.0
    """The same, once for each time that the response contains it."""
    max_new_tokens: Count = 256
    """Longest response, in tokens."""
    max_num_seqs: Count = unkeyed(64)
    """Responses sampled at once."""


@settings
class Lora:
    """Adapters on the decoder's matrices (Hu et al. 2021), for the stages that set `adapters`."""

    rank: Count = 16
    """Width of an adapter."""
    alpha: Positive = 32.0
    """An adapter's output is scaled by alpha / rank."""
    targets: Literal["all", "attention"] = "all"
    """Which matrices get one: all of the blocks, or attention's four."""
    merge: bool = unkeyed(False)
    """Write whole weights with the adapters merged, and the adapters beside them; else adapters alone, which need their
    base where it is."""


@settings
class OnPolicy:
    """What PPO and GRPO share: the policy samples responses, these are scored, and it learns from them."""

    prompts: Files = ()
    """Files of prompts; SFT and RM files are allowed, their answers are ignored."""
    weights: Weights = ()
    """How often an epoch reads the records of each entry of `prompts`, as [1, 0.5]; empty reads all once."""
    rewards: Rewards = ()
    """Sources of reward: "reward" (the reward model), Python functions `file.py:name`, addresses `https://...`; their
    weighted sum. Empty is the reward model alone."""
    reward_weights: Weights = ()
    """The weight of each entry of `rewards`, as [1, 0.5]; empty weights all 1."""
    adapters: bool = False
    """One frozen base for all roles: actor and reward model are adapters on it (see [lora])."""
    steps: Count = 100
    """Iterations: sample, score, update."""
    batch_size: Count = 64
    """Prompts of an iteration, on all machines together."""
    samples_per_prompt: Count = 1
    """Responses to each prompt of an iteration."""
    max_new_tokens: Count = 64
    """Longest response, in tokens; a longer one is cut and pays `missing_eos_penalty`."""
    max_prompt: Whole = 0
    """Longest prompt, in tokens; 0 is what `max_new_tokens` leaves of the model's positions."""
    overlong: Literal["refuse", "truncate", "drop"] = "refuse"
    """What to do with a longer prompt; truncated (on the left) and dropped ones are counted."""
    temperature: Positive = 1.0
    """Sampling temperature, of actor and reference alike."""
    num_minibatches: Count = 1
    """Optimizer steps per epoch; must divide `batch_size`."""
    actor_lr: Rate = 1e-5
    """Learning rate of the actor."""
    schedule: Literal["linear", "constant"] = "linear"
    """How learning rates decay; linear ends at 0."""
    adam_eps: Positive = 1e-5
    """AdamW: added to the square root."""
    kl_coef: NotNegative = 0.05
    """beta, the price of a nat of KL to the reference."""
    clip_range: Positive = 0.2
    """Range of the policy ratio, 1 - clip to 1 + clip."""
    reward_clip: NotNegative = 5.0
    """The reward model's scores are clipped to this many standard deviations; 0 is off."""
    uncertainty_penalty: NotNegative = 0.0
    """For an ensemble (`reward.ensemble_size`): standard deviations of its members' scores subtracted from
    their mean."""
    missing_eos_penalty: NotNegative = 1.0
    """Subtracted from the score of a truncated response, in standard deviations, after the clip."""
    entropy_coef: NotNegative = 0.0
    """Weight of the entropy, the mean over tokens, in the actor's loss."""
    ema_decay: Below1 = 0.0
    """The result is the moving average of the actor's trained weights (of adapters, each of their two matrices) over
    iterations with this decay; 0 is the actor itself."""
    max_grad_norm: NotNegative = 1.0
    """Gradients are scaled to at most this norm; 0 turns it off."""
    eval_every: Whole = unkeyed(20)
    """Iterations between samples in the log; 0 shows those of the last."""

    @property
    def epochs(self) -> int:
        """Passes over an iteration's responses."""
        raise NotImplementedError

    @property
    def loss_mean(self) -> Literal["response", "token", "constant"]:
        """What a batch's losses are the mean over."""
        raise NotImplementedError

    @property
    def clips_sum(self) -> bool:
        """Whether scores are clipped after their sum; among several sources the reward model is, before its weight."""
        return not self.rewards

    def sampling(self, slots: int) -> Sampling:
        """How responses are sampled. slots: how many at once."""
        return Sampling(temperature=self.temperature, max_new_tokens=self.max_new_tokens, max_num_seqs=slots)
