"""What a GPU does with Tetrad, in calls of at most two minutes. None has been made yet: no machine had one.

    python benchmarks/gpu.py tests                    # tests/gpu but the recipe
    python benchmarks/gpu.py recipe                   # a tiny chain, whole and stopped; NCCL with one rank
    python benchmarks/gpu.py sft --tflops 989         # Qwen2.5-0.5B's shape: tokens/s, MFU, where an update waits
    python benchmarks/gpu.py decode --bandwidth 4.8   # 64 responses: tokens/s, share of the memory's limit, capture
    python benchmarks/gpu.py ppo                      # one iteration by phase, and one with what was kept

One JSON line each. Weights are random: time does not depend on them. `--small` takes a model of 128 x 4 layers and runs
on a CPU too, which shows that the calls work and nothing else.
"""

import argparse
import json
import os
import subprocess
import sys
import time
import warnings
from collections import Counter
from collections.abc import Callable
from copy import deepcopy
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from tetrad.data.loader import micro_batches
from tetrad.distributed.device import Device, choose, peak_bytes
from tetrad.inference.completions import EncodedPrompt
from tetrad.inference.engine import Request, generate
from tetrad.model.config import DecoderConfig
from tetrad.model.transformer import CausalLM, ScalarModel, frozen, give_head, initialise, narrowed
from tetrad.reward.model import reward_function
from tetrad.reward.sources import RewardSource, RewardSources
from tetrad.rl.models import Models
from tetrad.rl.monitor import Monitor
from tetrad.rl.rewards import KLController, RunningStd
from tetrad.rl.rollout import roll_out
from tetrad.settings.common import Optim, Run, Sampling
from tetrad.settings.ppo import Alarms, Ppo
from tetrad.text.tokenizer import Tokenizer
from tetrad.train.ppo import PPOState, learn, make_batch
from tetrad.training.batches import language_micros
from tetrad.training.optimizer import Optimizer
from tetrad.training.step import language_terms, timer, update
from tetrad.types import Prompt, Tokens, Turn

ROOT = Path(__file__).parents[1]
LARGE = {
    "hidden_size": 896,
    "layers": 24,
    "heads": 14,
    "kv_heads": 2,
    "head_dim": 64,
    "ff": 4864,
    "vocab_size": 151_936,
}
SMALL = {"hidden_size": 128, "layers": 4, "heads": 4, "kv_heads": 2, "head_dim": 32, "ff": 512, "vocab_size": 4096}
END, PAD = 1, 2


def config(small: bool) -> DecoderConfig:
    """Qwen2.5-0.5B's shape, or a small one."""
    rest: dict[str, Any] = {"family": "qwen2", "max_positions": 4096, "tied": True, "eos_ids": (END,), "pad_id": PAD}
    return DecoderConfig(**(SMALL if small else LARGE), **rest)


def policy(small: bool, device: Device) -> CausalLM:
    model = CausalLM(config(small))
    initialise(model, 0)
    return model.to(device.torch_device)


def tokenizer(size: int) -> Tokenizer:
    """Words w3, w4 ... and two controls."""
    controls = {"<|sep|>": 0, "<|endoftext|>": END, "<|pad|>": PAD}
    vocab = controls | {f"w{i}": i for i in range(3, size)}
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    added = [{"id": i, "content": name, "special": True, **flags} for name, i in controls.items()]
    model = {"type": "WordLevel", "vocab": vocab, "unk_token": "w3"}
    return Tokenizer(
        json.dumps({"version": "1.0", "added_tokens": added, "pre_tokenizer": {"type": "Whitespace"}, "model": model})
    )


def documents(count: int, shortest: int, longest: int, vocabulary: int) -> list[Tokens]:
    """Random ids; lengths as even in their logarithm. All but the first id are labels."""
    draw = np.random.default_rng(0)
    lengths = np.exp(draw.uniform(np.log(shortest), np.log(longest), count)).astype(int)
    return [Tokens(draw.integers(3, vocabulary, n, dtype=np.int32), np.arange(n) >= 1) for n in lengths]


def seconds(work: Callable[[], object]) -> float:
    start = time.perf_counter()
    work()
    if torch.cuda.is_initialized():
        torch.cuda.synchronize()
    return time.perf_counter() - start


def waits(work: Callable[[], object]) -> dict[str, int]:
    """Where the program waited for the GPU, by file and line; {} on a CPU."""
    if not torch.cuda.is_initialized():
        return {}
    torch.cuda.set_sync_debug_mode("warn")
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        work()
    torch.cuda.set_sync_debug_mode("default")
    return dict(Counter(f"{Path(w.filename).name}:{w.lineno}" for w in seen if "synchroniz" in str(w.message)))


def pytest(asked: argparse.Namespace) -> dict[str, Any]:
    """The tests of one file; their exit status and last line."""
    name = "tests/gpu/test_runs.py" if asked.what == "recipe" else "tests/gpu/test_numbers.py"
    given = {"TETRAD_GPU_TESTS": "cpu"} if asked.small else {}
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", name],
        cwd=ROOT,
        env={**os.environ, **given},
        capture_output=True,
        text=True,
    )
    return {"status": done.returncode, "said": done.stdout.strip().splitlines()[-8:]}


def sft(asked: argparse.Namespace, device: Device) -> dict[str, Any]:
    """Steps of one micro-batch, the first two not counted. FLOPs of attention are those of causal attention."""
    model = policy(asked.small, device).train()
    c, optimizer = model.config, Optimizer(model, 1e-5, Optim())
    wanted = documents(4000, 64, 2048 if not asked.small else 256, c.vocab_size)
    groups = micro_batches(wanted, asked.micro_batch_tokens)[: asked.steps + 2]
    batches = [language_micros([wanted[i] for i in group], asked.micro_batch_tokens, device) for group in groups]
    times = [seconds(lambda b=b: update(model, optimizer, b, language_terms, device, max_norm=1.0)) for b in batches]
    blocks = sum(p.numel() for p in model.model.layers.parameters())
    lengths = [[len(wanted[i].ids) for i in group] for group in groups[2:]]
    tokens = sum(map(sum, lengths))
    squares = sum(n * n for group in lengths for n in group)
    flop = 6 * tokens * (blocks + c.vocab_size * c.hidden_size) + 6 * c.layers * c.heads * c.head_dim * squares
    spent = sum(times[2:])
    return {
        "tokens_per_s": round(tokens / spent),
        "tflops": round(flop / spent / 1e12, 3),
        "mfu": round(flop / spent / 1e12 / asked.tflops, 4) if asked.tflops else None,
        "waits": waits(lambda: update(model, optimizer, batches[-1], language_terms, device, max_norm=1.0)),
    }


def decode(asked: argparse.Namespace, device: Device) -> dict[str, Any]:
    """Responses of one length; the second call has what the first one captured. The limit: the weights read once and
    the cache so far once, a step."""
    model = frozen(policy(asked.small, device))
    rows, prompt, new = asked.rows, 128, 64 if asked.small else 256
    ids = tuple(np.random.default_rng(0).integers(3, model.config.vocab_size, prompt).tolist())
    requests = [Request(ids, Sampling(max_new_tokens=new), ((0, "gpu", 0, i),), ()) for i in range(rows)]
    first, second = (seconds(lambda: generate(model, requests, device, rows, keep=True)) for _ in range(2))
    c, item = model.config, device.dtype.itemsize
    cached = 2 * c.layers * c.kv_heads * c.head_dim * item * rows * (prompt + new / 2)
    read = new * (sum(p.numel() for p in model.parameters()) * item + cached)
    share = round(read / second / 1e12 / asked.bandwidth, 4) if asked.bandwidth else None
    found = waits(lambda: generate(model, requests[:4], device, rows))
    return {
        "tokens_per_s": round(rows * new / second),
        "capture_s": round(first - second, 2),
        "limit": share,
        "waits": found,
    }


def ppo(asked: argparse.Namespace, device: Device) -> dict[str, Any]:
    """Two iterations of four models, by phase."""
    s = Ppo(batch_size=asked.rows, max_new_tokens=32 if asked.small else 128, steps=10, num_minibatches=2, ppo_epochs=2)
    actor, c = policy(asked.small, device), config(asked.small)
    critic, judge = ScalarModel(c).to(device.torch_device), ScalarModel(c).to(device.torch_device)
    for model in (critic, judge):
        model.model.load_state_dict(actor.model.state_dict())
        give_head(model, 0)
    judge = narrowed(judge.requires_grad_(False), device.frozen_dtype)
    optim = replace(Optim(), eps=s.adam_eps)
    models = Models(
        actor=actor,
        critic=critic,
        reference=narrowed(frozen(deepcopy(actor)), device.frozen_dtype),
        reward=RewardSources({"reward": RewardSource(reward_function([judge], device, asked.micro_batch_tokens))}),
        actor_optimizer=Optimizer(actor, s.actor_lr, optim),
        critic_optimizer=Optimizer(critic, s.critic_lr, optim),
        tokenizer=tokenizer(c.vocab_size),
        device=device,
        micro_batch_tokens=asked.micro_batch_tokens,
    )
    state = PPOState(
        KLController(s.kl_coef, s.kl_target, s.kl_horizon), Monitor(Alarms(), s.kl_target, 0), RunningStd()
    )
    prompts = [
        EncodedPrompt(tuple(d.ids.tolist()), Prompt((Turn("user", "?"),)))
        for d in documents(asked.rows, 32, 256, c.vocab_size)
    ]
    iterations = []
    for step in range(2):
        timer.restart()
        rollout = roll_out(
            actor, prompts, range(asked.rows), (0, "rollout", step), s.sampling(asked.rows), models.tokenizer, device
        )
        learn(models, make_batch(models, rollout, s, state, step), s, (0, step))
        timer.enter("end")
        iterations.append({name: round(value, 3) for name, value in timer.seconds.items()})
    return {"phases": iterations}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["tests", "recipe", "sft", "decode", "ppo"])
    parser.add_argument("--small", action="store_true", help="a small model, on a CPU too")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--rows", type=int, default=64, help="responses at once")
    parser.add_argument("--micro-batch-tokens", type=int, default=16_384)
    parser.add_argument("--tflops", type=float, default=0.0, help="the GPU's dense bfloat16 limit, for MFU")
    parser.add_argument("--bandwidth", type=float, default=0.0, help="of its memory, TB/s")
    parser.add_argument("--activation-checkpointing", action="store_true")
    asked = parser.parse_args()
    if not (torch.cuda.is_available() or asked.small):
        raise SystemExit("no GPU is visible; --small runs on a CPU and shows that the calls work")
    if asked.what in ("tests", "recipe"):
        result = pytest(asked)
    else:
        device = choose(Run(activation_checkpointing=asked.activation_checkpointing))
        result = {"sft": sft, "decode": decode, "ppo": ppo}[asked.what](asked, device)
        result |= {"peak_mib": peak_bytes() >> 20, "dtype": str(device.dtype).removeprefix("torch.")}
    where = torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"
    print(json.dumps({"what": asked.what, "on": where, "small": asked.small, **result}))
    raise SystemExit(result.get("status", 0))


if __name__ == "__main__":
    main()
