"""Training on several processes against one, for more sizes, models and methods than each change is tested with.

    PYTHONPATH=src:tests python tests/dist/matrix.py [N,N,...] [full|host|none] [CASE,...]

trains each case for 30 steps on one process and on N, with this `run.shard`, and prints by how much losses, other
figures and weights differ, whether processes that hold the same tensors hold the same bits after each step, and the
share of the bytes of parameters and optimizer state that a process holds. Exits 1 where something is beyond its limit.
"host" takes each half of the processes for a machine.

    PYTHONPATH=src:tests python tests/dist/matrix.py resume [full|none] [CASE,...]

saves after ten steps on 2, 3 and 4 processes and takes ten more, on as many (the same bits) and, of the two, on 1, 3
and 4 (announced, weights within 1e-6, exported files equal where they go on).
"""

import hashlib
import os
import shutil
import signal
import socket
import sys
import tempfile
import traceback
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import torch
import torch.distributed.fsdp  # before the forks
from torch import nn

import ppo_toys
import toys
from dist import jobs
from tetrad.distributed import collectives, sharding
from tetrad.distributed.device import release_memory
from tetrad.model.huggingface import model_files
from tetrad.model.lora import ALL, add_adapters, merged, share_weights
from tetrad.model.transformer import CausalLM, ScalarModel, give_head
from tetrad.rl.models import SharedActorCritic, _shared
from tetrad.settings.common import Optim
from tetrad.training.batches import language_micros
from tetrad.training.optimizer import Optimizer
from tetrad.training.run_folder import StageRun, Stateful
from tetrad.training.stage import Weights
from tetrad.training.step import language_terms, update

STEPS, LIMIT = 30, 1e-5
STATES: list[Optimizer] = []
CHECKSUMS: list[list[int]] = []
SMALL = replace(jobs.PPO, ppo_epochs=1, steps=100)
Build = Callable[[], jobs.Found]
Worker = Callable[[Path, str, list[str]], None]


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
    """Trains the cases in this process, one of several or alone."""
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


def resume(folder: Path, shard: str, names: list[str]) -> None:
    """The same with checkpoints in folder/NAME, from the one that is there."""
    for name in names:
        notes, files = list[str](), list[str]()
        jobs.loop = lambda steps, parts, n=name, k=notes, f=files: saved(folder / n, steps, parts, k, f)
        worker(folder, shard, [name])
        torch.save({"notes": notes, "files": files}, folder / f"{name}-{collectives.rank()}.more")


def saved(folder: Path, steps: int, parts: dict[str, Stateful], notes: list[str], files: list[str]) -> Iterator[int]:
    """Steps with a checkpoint after each ten. notes: of the resume; files: sha256 of the models as they are exported,
    after ten steps and at the end."""
    environment = {"processes": collectives.size()}
    with StageRun(folder, seed=jobs.SEED, total_steps=steps, save_every=10, environment=environment) as run:
        run.resume(parts)
        notes += run.notes
        for step in run.steps():
            if step == 10:
                files.append(exported(parts))
            yield step
        files.append(exported(parts))


def exported(parts: dict[str, Stateful]) -> str:
    """sha256 of the files of all models among the parts."""
    digest = hashlib.sha256()
    for part in (part for part in parts.values() if isinstance(part, Weights)):
        for model in (module for module in part.model.modules() if isinstance(module, CausalLM | ScalarModel)):
            plain = sharding.collected(model)
            for file, content in sorted(model_files(merged(plain)).items()) if collectives.is_main() else ():
                for chunk in [file.encode(), *([content] if isinstance(content, bytes) else content)]:
                    digest.update(chunk)
    return digest.hexdigest()


def train(folder: Path, size: int, shard: str, names: list[str], work: Worker = worker) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    here = size // 2 if shard == "host" and size > 1 else size
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
                work(folder, shard, names)
                collectives.stop()
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


def resumes(shard: str = "full", names: str = "") -> int:
    """Twenty steps on 2, 3 and 4 processes, and the last ten of them again, on as many and on others."""
    global STEPS
    STEPS, good = 20, True
    chosen = names.split(",") if names else [name for name in cases() if "untied" not in name or "adapters" in name]
    with tempfile.TemporaryDirectory() as name:
        for saved_by, size in ((2, 0), (2, 2), (2, 1), (2, 3), (2, 4), (3, 0), (3, 3), (4, 0), (4, 4)):
            whole, again = Path(name, str(saved_by)), Path(name, f"{saved_by}-{size}")
            if not size:
                whole.mkdir()
                train(whole, saved_by, shard, chosen, resume)
                continue
            for case in chosen:
                shutil.copytree(whole / case, again / case)
                shutil.rmtree(again / case / "checkpoints/step-000020")
            train(again, size, shard, chosen, resume)
            results = [compare(whole, again, case, saved_by, size) for case in chosen]
            good = good and all(results)
    return 0 if good else 1


def compare(whole: Path, again: Path, name: str, saved_by: int, size: int) -> bool:
    one, other = (torch.load(p / f"{name}-{n}-0.pt")["weights"] for p, n in ((whole, saved_by), (again, size)))
    before, after = (torch.load(folder / f"{name}-0.more") for folder in (whole, again))
    apart, notes = (
        float((other - one).norm() / one.norm()),
        [note for note in after["notes"] if "processes was" in note],
    )
    middle = after["files"][0] == before["files"][0]
    if size == saved_by:
        good = torch.equal(one, other) and before["files"][1] == after["files"][1] and not after["notes"]
    else:
        good = apart <= 1e-6 and len(notes) == 1
    text = f"{name:22} saved by {saved_by}, resumed by {size}: weights {apart:.1e}, announced {len(notes)}"
    print(f"{text}, files {'equal' if middle else 'DIFFER'}" + ("" if good and middle else "  BEYOND"), flush=True)
    return good and middle


def memory(shard: str = "full") -> int:
    """What one process holds of a larger model, alone and as one of four."""
    with tempfile.TemporaryDirectory() as name:
        for size in (1, 4):
            train(Path(name), size, shard, [], large)
            for each in sorted(Path(name).glob(f"{size}-*")):
                print(each.name, each.read_text(), flush=True)
    return 0


def large(folder: Path, shard: str, _: list[str]) -> None:
    """Three steps of SFT; MiB of trained parameters and AdamW's state, of the process after them, and at most."""
    torch.set_num_threads(1)
    collectives.start("cpu")
    device = replace(toys.CPU, shard=shard if collectives.size() > 1 else "none")
    before = status("VmRSS")
    model = CausalLM(
        toys.config(vocab_size=8192, hidden_size=512, layers=18, heads=8, kv_heads=8, head_dim=64, ff=1536)
    )
    toys.randomise(model, 1, std=0.02)
    model = sharding.place(model, device)
    optimizer = Optimizer(model, 1e-4, Optim())
    documents = [toys.document(toys.ids(64, i)) for i in range(4)]
    for _ in range(3):
        micros = language_micros(list(collectives.shard(documents)), 64, device)
        update(model, optimizer, micros, language_terms, device)
    release_memory()
    STATES[:] = [optimizer]
    parameters = sum(p.numel() for p in model.parameters())
    numbers = [held() / 2**20, status("VmRSS") - before, status("VmHWM") - before, before]
    text = "of {:.1f} M: holds {:.0f}, grew by {:.0f} (at most {:.0f}) over {:.0f} MiB"
    (folder / f"{collectives.size()}-{collectives.rank()}").write_text(text.format(parameters / 1e6, *numbers))


def status(name: str) -> float:
    """MiB of this process, as the kernel counts them."""
    (line,) = (line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(name))
    return int(line.split()[1]) / 1024


MODES = {"resume": resumes, "memory": memory}

if __name__ == "__main__":
    mode = MODES.get(sys.argv[1] if sys.argv[1:] else "")
    sys.exit(mode(*sys.argv[2:]) if mode else main(*sys.argv[1:]))
