"""Training on several processes against one, for more sizes, models and methods than each change is tested with.

    PYTHONPATH=src:tests python tests/dist/matrix.py [N,N,...] [full|host|none] [CASE,...]

trains each case for 30 steps on one process and on N, with this `run.shard`, and prints by how much losses, other
figures and weights differ, whether processes that hold the same tensors hold the same bits after each step, and the
share of the bytes of parameters and optimizer state that a process holds. Exits 1 where something is beyond its limit.
"host" takes each half of the processes for a machine.
"""

import hashlib
import os
import signal
import socket
import sys
import tempfile
import traceback
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch
import torch.distributed.fsdp  # before the forks
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
CHECKSUMS: list[list[int]] = []
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
        CHECKSUMS.append([checksum(self, True), checksum(self, False)])

    return stepping


def checksum(optimizer: Optimizer, parts: bool) -> int:
    """Of this process's rows, or of the tensors that it holds whole."""
    chosen = [sharding.local(p) for p in optimizer.names.values() if collectives.is_part(p) == parts]
    return int(hashlib.sha256(b"".join(p.detach().numpy().tobytes() for p in chosen)).hexdigest()[:15], 16)


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
        found["checksums"] = torch.tensor(CHECKSUMS)
        torch.save(found, folder / f"{name}-{collectives.size()}-{collectives.rank()}.pt")
    collectives.stop()


def train(folder: Path, size: int, shard: str, names: list[str]) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    here = size // 2 if shard == "host" else size
    given = {
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "WORLD_SIZE": str(size),
        "LOCAL_WORLD_SIZE": str(here),
    }
    ranks = {}
    for rank in range(size):
        if not (process := os.fork()):
            os.environ |= {**given, "RANK": str(rank)}
            try:
                worker(folder, shard, names)
                os._exit(0)
            finally:
                traceback.print_exc()
                os._exit(1)
        ranks[process] = rank
    while ranks:
        process, status = os.wait()
        rank = ranks.pop(process)
        if status:
            for other in ranks:
                os.kill(other, signal.SIGKILL)
            raise SystemExit(f"rank {rank} of {size} failed")


def report(folder: Path, name: str, size: int, shard: str) -> bool:
    alone = torch.load(folder / f"{name}-1-0.pt")
    ranks = [torch.load(folder / f"{name}-{size}-{rank}.pt") for rank in range(size)]
    right = alone["figures"]
    losses = max(float(((one["figures"] - right).abs() / right.abs().clamp(min=1.0)).max()) for one in ranks)
    apart = float((ranks[0]["weights"] - alone["weights"]).norm() / alone["weights"].norm())
    copies = {"full": size, "host": size // 2, "none": 1}[shard]  # every how many ranks hold the same rows
    parts, whole = zip(*(one["checksums"].unbind(-1) for one in ranks), strict=True)
    same = all(torch.equal(parts[i], parts[i % copies]) and torch.equal(whole[i], whole[0]) for i in range(size))
    same = same and all(torch.equal(one["weights"], ranks[0]["weights"]) for one in ranks)
    share = max(int(one["bytes"]) for one in ranks) / int(alone["bytes"])
    most = 0.4 if shard == "full" and size == 4 else 1.02  # of what one process holds, to rounding of rows
    good = losses <= LIMIT and apart <= LIMIT and same and share <= most
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
            results = [report(folder, each, size, shard) for each in chosen]
            good = good and all(results)
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
