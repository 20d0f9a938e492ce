"""Sharded training against one process, for more sizes, models and methods than each change is tested with.

    PYTHONPATH=src:tests python tests/dist/matrix.py [N,N,...] [full|host] [CASE,...]

trains each case for 30 steps on one process and, sharded, on N, and prints by how much losses, other figures and
weights differ, whether all processes hold the same weights after each step, and the bytes of parameters and optimizer
state that a process holds. Exits 1 where something is beyond its limit.
"""

import hashlib
import os
import socket
import subprocess
import sys
import tempfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch
from torch import nn

import ppo_toys
import toys
from dist import jobs
from tetrad.distributed import collectives, sharding
from tetrad.model.lora import ALL, add_adapters, share_weights
from tetrad.model.transformer import CausalLM, ScalarModel, give_head
from tetrad.rl.models import SharedActorCritic, _shared
from tetrad.settings.common import Optim
from tetrad.training.optimizer import Optimizer

STEPS, LIMIT = 30, 1e-5
STATES: list[Optimizer] = []
CHECKSUMS: list[str] = []
SMALL = replace(jobs.PPO, ppo_epochs=1, steps=100)
Build = Callable[[], jobs.Found]


def adapters(kind: type, base: CausalLM, seed: int) -> nn.Module:
    model = share_weights(kind, base)
    if kind is ScalarModel:
        give_head(model, seed)
    add_adapters(model, 4, 8.0, ALL, seed)
    return model


def language_model(tied: bool, kind: str, size: int = 40) -> tuple[CausalLM, CausalLM]:
    """A policy and a reference; of adapters, the base beneath."""
    base = toys.causal(seed=1, tied=tied, vocab_size=size).requires_grad_(False)
    if kind != "adapters":
        return sharding.place(toys.causal(seed=2, tied=tied, vocab_size=size), toys.CPU), sharding.place(base, toys.CPU)
    policy = adapters(CausalLM, base, 3)
    sharding.place(base, toys.CPU)
    return sharding.place(policy, toys.CPU, base), base


def reward(tied: bool, kind: str) -> jobs.Found:
    base = toys.causal(seed=1, tied=tied).requires_grad_(False)
    model = adapters(ScalarModel, base, 3) if kind == "adapters" else toys.scalar(seed=1, tied=tied)
    return jobs.reward(sharding.place(model, toys.CPU), STEPS)


def ppo(tied: bool, kind: str) -> jobs.Found:
    reward = ppo_toys.by_ids(lambda ids: (sum(ids) % 7) / 2 - 1)
    base = toys.causal(seed=1, tied=tied, vocab_size=12).requires_grad_(False)
    if kind == "adapters":
        actor, critic = adapters(CausalLM, base, 3), adapters(ScalarModel, base, 4)
        sharding.place(base, toys.CPU)
        actor, critic = (sharding.place(model, toys.CPU, base) for model in (actor, critic))
    else:
        actor = sharding.place(toys.causal(seed=2, tied=tied, vocab_size=12), toys.CPU)
        critic = sharding.place(toys.scalar(seed=4, tied=tied, vocab_size=12), toys.CPU)
        sharding.place(base, toys.CPU)
    models = ppo_toys.four_models(SMALL, actor, critic, reward, base)
    if kind == "shared":
        critic = _shared(actor, 5)
        both = SharedActorCritic(actor, critic)
        optimizer = Optimizer(both, SMALL.actor_lr, Optim(), lr_overrides={"critic.score": SMALL.critic_lr})
        models = replace(models, critic=critic, actor_critic=both, actor_optimizer=optimizer, critic_optimizer=None)
    return jobs.ppo(SMALL, models, STEPS)


def cases() -> dict[str, Build]:
    built: dict[str, Build] = {}
    for tied in (True, False):
        for kind in ("full", "adapters", "shared"):
            name = f"{'tied' if tied else 'untied'} {kind}"
            built[f"ppo {name}"] = lambda t=tied, k=kind: ppo(t, k)
            if kind == "shared":
                continue
            built[f"sft {name}"] = lambda t=tied, k=kind: jobs.sft(model=language_model(t, k)[0], steps=STEPS)
            built[f"reward {name}"] = lambda t=tied, k=kind: reward(t, k)
            built[f"dpo {name}"] = lambda t=tied, k=kind: jobs.dpo(language_model(t, k), STEPS)
            built[f"grpo {name}"] = lambda t=tied, k=kind: jobs.grpo(language_model(t, k, 12), STEPS)
        built[f"muon {'tied' if tied else 'untied'} full"] = lambda t=tied: jobs.sft(
            0.02, language_model(t, "full")[0], STEPS
        )
    return built


def watched(step: Callable[[Optimizer, float], None]) -> Callable[[Optimizer, float], None]:
    """An optimizer's step after which the weights' checksum is kept."""

    def stepping(self: Optimizer, factor: float) -> None:
        step(self, factor)
        if self not in STATES:
            STATES.append(self)
        whole = [p.full_tensor() if collectives.is_part(p) else p for p in self.names.values()]
        CHECKSUMS.append(hashlib.sha256(b"".join(p.detach().numpy().tobytes() for p in whole)).hexdigest())

    return stepping


def held() -> int:
    """Bytes of the trained parameters and their optimizer's state on this process."""
    tensors = [t for one in STATES for t in (*one.names.values(), *one.tensors().values())]
    return sum(sharding.local(tensor).nbytes for tensor in tensors)


def worker(folder: Path, shard: str, names: list[str]) -> None:
    torch.set_num_threads(1)
    collectives.start("cpu")
    toys.CPU = replace(toys.CPU, shard=shard if collectives.size() > 1 else "none")
    Optimizer.step = watched(Optimizer.step)  # type: ignore[method-assign]
    for name in names:
        STATES.clear()
        CHECKSUMS.clear()
        found = cases()[name]()
        found["bytes"] = torch.tensor(held())
        found["checksums"] = torch.tensor([int(text[:15], 16) for text in CHECKSUMS])
        torch.save(found, folder / f"{name}-{collectives.size()}-{collectives.rank()}.pt")
    collectives.stop()


def train(folder: Path, size: int, shard: str, names: list[str]) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    given = {**os.environ, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": str(size)}
    given |= {"LOCAL_WORLD_SIZE": str(size // 2 if shard == "host" else size), "OMP_NUM_THREADS": "1"}
    words = [sys.executable, __file__, "--worker", str(folder), shard, ",".join(names)]
    ranks = [subprocess.Popen(words, env={**given, "RANK": str(rank)}) for rank in range(size)]
    codes = [rank.wait() for rank in ranks]
    if any(codes):
        raise SystemExit(f"{size} processes failed")


def report(folder: Path, name: str, size: int) -> bool:
    alone = torch.load(folder / f"{name}-1-0.pt")
    ranks = [torch.load(folder / f"{name}-{size}-{rank}.pt") for rank in range(size)]
    losses = max(float((one["figures"] - alone["figures"]).abs().max()) for one in ranks)
    apart = float((ranks[0]["weights"] - alone["weights"]).norm() / alone["weights"].norm())
    same = all(torch.equal(one["checksums"], ranks[0]["checksums"]) for one in ranks)
    share = max(int(one["bytes"]) for one in ranks) / int(alone["bytes"])
    good = losses <= LIMIT * max(1.0, float(alone["figures"].abs().max())) and apart <= LIMIT and same
    text = f"{name:22} on {size}: figures {losses:.1e}, weights {apart:.1e}, same on all {same}, holds {share:.2f}"
    print(text if good else f"{text}  BEYOND", flush=True)
    return good


def main(sizes: str = "2,3,4", shard: str = "full", names: str = "") -> int:
    chosen, good = names.split(",") if names else list(cases()), True
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        train(folder, 1, shard, chosen)
        for size in map(int, sizes.split(",")):
            train(folder, size, shard, chosen)
            results = [report(folder, each, size) for each in chosen]
            good = good and all(results)
    return 0 if good else 1


if __name__ == "__main__":
    if sys.argv[1:2] == ["--worker"]:
        worker(Path(sys.argv[2]), sys.argv[3], sys.argv[4].split(","))
    else:
        sys.exit(main(*sys.argv[1:]))
