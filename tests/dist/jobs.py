"""The same training on one process or on two: what `test_gloo.py` runs here and in its workers.

Each job trains for five steps on the whole batch, of which `collectives.shard` gives each process its part (batches of
13: the parts differ in size), and returns every step's figures and the final weights. As a program: `jobs.py FOLDER`,
with the environment that torchrun sets.
"""

import math
import shutil
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path

import torch
from torch import nn

import grpo_toys
import ppo_toys
import toys
from tetrad.data.loader import batch_indices, whole
from tetrad.distributed import collectives, sharding
from tetrad.model.lora import ALL, add_adapters
from tetrad.model.transformer import CausalLM, ScalarModel
from tetrad.reward.batches import Examples, preference_micros
from tetrad.reward.ensemble import Latent
from tetrad.rl.rollout import Rollout, response_indices
from tetrad.seeds import seed_for
from tetrad.settings.common import Optim
from tetrad.settings.dpo import Dpo
from tetrad.settings.grpo import Grpo
from tetrad.settings.ppo import Ppo
from tetrad.settings.reward import Reward
from tetrad.train import grpo as train_grpo
from tetrad.train.dpo import dpo_micros, dpo_terms
from tetrad.train.ppo import learn
from tetrad.train.reward import preference_terms
from tetrad.training.batches import language_micros
from tetrad.training.optimizer import Optimizer
from tetrad.training.run_folder import StageRun, Stateful
from tetrad.training.stage import Weights
from tetrad.training.step import StepStats, language_terms, update
from tetrad.types import Comparison, Prompt, Score

Found = dict[str, torch.Tensor]
STEPS, BATCH, SEED = 5, 13, 3


def weights(*models: nn.Module) -> torch.Tensor:
    """All of them, of a sharded model too, on every process."""
    parameters = (p.detach() for model in models for p in model.parameters())
    return torch.cat([(p.full_tensor() if collectives.is_part(p) else p).flatten() for p in parameters])


def found(stats: list[StepStats], *models: nn.Module) -> Found:
    names = sorted({name for s in stats for name in s.terms})
    rows = [[s.loss, s.grad_norm, *(s.terms.get(name, -1.0) for name in names)] for s in stats]
    return {"figures": torch.tensor(rows, dtype=torch.float64), "weights": weights(*models)}


def loop(steps: int, parts: dict[str, Stateful]) -> Iterable[int]:
    """A job's steps. parts: what a checkpoint of it must hold."""
    return range(steps)


def sft(muon_lr: float = 0.0, model: CausalLM | None = None, steps: int = STEPS, batch: int = BATCH) -> Found:
    model = model or toys.causal(seed=1)
    optimizer = Optimizer(model, 1e-3, Optim(weight_decay=0.1), muon_lr=muon_lr)
    documents = toys.documents(31)
    stats = []
    for step in loop(steps, {"model": Weights(model), "optimizer": optimizer}):
        wanted = collectives.shard(batch_indices(SEED, whole(len(documents)), batch, step).tolist())
        micros = language_micros([documents[i] for i in wanted], 64, toys.CPU)
        stats.append(update(model, optimizer, micros, language_terms, toys.CPU, max_norm=0.5))
    return found(stats, model)


def reward(model: ScalarModel | None = None, steps: int = STEPS) -> Found:
    """Lists of one to four answers, with ties, and scores; the ranks get different numbers of each."""
    prompt = Prompt(())
    sizes = [1 + i % 4 for i in range(26)]
    ranks = [tuple(float((3 * i + j) % 3) for j in range(size)) for i, size in enumerate(sizes)]
    records = [
        Score(prompt, "", float(i % 5)) if size == 1 else Comparison(prompt, ("",) * size, ranks[i])
        for i, size in enumerate(sizes)
    ]
    answers = [
        [toys.document(toys.ids(3 + (5 * i + j) % 9, 10 * i + j)) for j in range(n)] for i, n in enumerate(sizes)
    ]
    latent = Latent(model or toys.scalar(seed=1), learn_rho=True).train()
    latent.reward.model.dropout, latent.reward.model.token_dropout = 0.2, 0.1
    optimizer = Optimizer(latent, 1e-3, Optim())
    stats = []
    for step in loop(steps, {"model": Weights(latent), "optimizer": optimizer}):
        wanted = collectives.shard(batch_indices(SEED, whole(len(records)), BATCH, step).tolist())
        chosen = [records[i] for i in wanted], [answers[i] for i in wanted]
        keys = [seed_for(SEED, "dropout", step, place) for place in collectives.shard(range(BATCH))]
        micros = preference_micros(*chosen, 48, 2.0, 1.5, toys.CPU, keys=keys)
        terms = preference_terms(Reward(center=0.01))
        stats.append(update(latent, optimizer, micros, terms, toys.CPU, max_norm=0.5))
    return found(stats, latent)


def dpo(models: tuple[CausalLM, CausalLM] | None = None, steps: int = STEPS) -> Found:
    """Lists of two to four answers with ties: the ranks get different numbers of pairs."""
    ranks = [tuple(float((3 * i + j) % 3) for j in range(2 + i % 3)) for i in range(26)]
    records = [Comparison(Prompt(()), ("",) * len(each), each) for each in ranks]
    documents = [toys.document(toys.ids(3 + i % 9, i)) for i in range(sum(map(len, ranks)))]
    policy, reference = models or (toys.causal(seed=1), toys.causal(seed=2))
    examples, optimizer, stats = Examples.of(records, documents), Optimizer(policy, 1e-3, Optim()), []
    terms = dpo_terms(Dpo(sft_coef=0.1), reference)
    for step in loop(steps, {"model": Weights(policy), "optimizer": optimizer}):
        wanted = collectives.shard(batch_indices(SEED, whole(len(records)), BATCH, step).tolist())
        micros = dpo_micros(examples, wanted, 48, toys.CPU)
        stats.append(update(policy, optimizer, micros, terms, toys.CPU, max_norm=0.5, reads=(reference,)))
    return found(stats, policy)


def own_rows(rollout: Rollout, samples_per_prompt: int = 1) -> Rollout:
    """This process's rows of a rollout that all have."""
    rows = response_indices(len(rollout.samples) // samples_per_prompt, samples_per_prompt)
    index = torch.tensor(rows)
    return Rollout(
        tuple(rollout.samples[i] for i in rows),
        tuple(rollout.documents[i] for i in rows),
        rollout.mask_BT[index],
        rollout.finished_B[index],
        rollout.sampler_logprobs_BT[index],
    )


def four(s: Ppo) -> ppo_toys.Models:
    reward = ppo_toys.by_ids(lambda ids: (sum(ids) % 7) / 2 - 1)
    models = toys.causal(seed=1, vocab_size=12), toys.scalar(seed=2, vocab_size=12)
    return ppo_toys.four_models(s, *models, reward, toys.causal(seed=3, vocab_size=12))


PPO = Ppo(
    batch_size=BATCH, max_new_tokens=6, ppo_epochs=2, actor_lr=1e-3, critic_lr=1e-3, steps=10, reward_scaling="whiten"
)


def ppo(s: Ppo = PPO, models: ppo_toys.Models | None = None, steps: int = STEPS) -> Found:
    """Iterations of two epochs on replies that a third model wrote: both sides learn from the same."""
    asked = ppo_toys.questions(BATCH, 12)
    models = models or four(s)
    writers = replace(models, actor=toys.causal(seed=5, vocab_size=12))
    figures, whitened = [], []
    for step in loop(steps, models.parts()):
        rollout = own_rows(ppo_toys.sampled(writers, asked, s, (SEED, step)))
        made, _ = ppo_toys.experience(models, rollout, s, 64)
        learned = learn(replace(models, micro_batch_tokens=64), made, s, (SEED, step))
        figures.append([learned[name] for name in sorted(learned)])
        whitened.append(made.advantages)
    found = {"figures": torch.tensor(figures, dtype=torch.float64), "weights": weights(models.actor, models.critic)}
    return found | {"advantages": torch.tensor([collectives.gather(part.tolist()) for part in whitened])}


def grpo(both: tuple[CausalLM, CausalLM] | None = None, steps: int = STEPS) -> Found:
    """Iterations on groups that a third model wrote; the mean is over the tokens of both processes."""
    s = Grpo(batch_size=BATCH, samples_per_prompt=2, max_new_tokens=6, actor_lr=1e-3, steps=10, loss_mean="token")
    reward = ppo_toys.by_ids(lambda ids: (sum(ids) % 7) / 2 - 1)
    actor, reference = both or (toys.causal(seed=1, vocab_size=12), toys.causal(seed=3, vocab_size=12))
    models = replace(grpo_toys.two_models(s, actor, reward, reference), micro_batch_tokens=64)
    writers = replace(models, actor=toys.causal(seed=5, vocab_size=12))
    figures = []
    for step in loop(steps, models.parts()):
        rollout = own_rows(grpo_toys.sampled(writers, ppo_toys.questions(BATCH, 12), s, (SEED, step)), 2)
        learned = train_grpo.learn(models, train_grpo.make_batch(models, rollout, s), s, (SEED, step))
        figures.append([learned[name] for name in sorted(learned)])
    return {"figures": torch.tensor(figures, dtype=torch.float64), "weights": weights(models.actor)}


def ppo_sampled(s: Ppo = PPO) -> Found:
    """Five iterations that write their own replies: each prompt keeps its random numbers wherever it is answered."""
    asked = ppo_toys.questions(BATCH, 12)
    models = four(s)
    replies = []
    for step in range(STEPS):
        mine, numbers = collectives.shard(asked), collectives.shard(range(BATCH))
        rollout = ppo_toys.sampled(models, mine, s, (SEED, step), numbers)
        made, _ = ppo_toys.experience(models, rollout, s, 64)
        learn(replace(models, micro_batch_tokens=64), made, s, (SEED, step))
        for ids in collectives.gather([sample.response_ids for sample in rollout.samples]):
            replies.append(torch.tensor([*ids, *[-1] * (s.max_new_tokens - len(ids))]))
    return {"replies": torch.stack(replies), "weights": weights(models.actor, models.critic)}


JOBS: dict[str, Callable[[], Found]] = {
    "sft": sft,
    "muon": lambda: sft(0.02),
    "single records": lambda: sft(batch=1),
    "reward": reward,
    "dpo": dpo,
    "ppo": ppo,
    "grpo": grpo,
    "ppo_sampled": ppo_sampled,
}

NARROW = ("sft", "reward")


class Unsummed(collectives.GradientSum):
    """Leaves each process its own gradients."""

    def __init__(self, *_: object) -> None:
        super().__init__([])

    def finish(self) -> None:
        pass


@contextmanager
def without(name: str) -> Iterator[None]:
    """`collectives` with one collective that does nothing."""
    kept = getattr(collectives, name)
    idle = {"sum_counts": dict, "sum_tensor": lambda given: given, "GradientSum": Unsummed}
    setattr(collectives, name, idle[name])
    try:
        yield
    finally:
        setattr(collectives, name, kept)


def in_buckets(rank: int) -> Found:
    """Gradients of two backwards on the first process and one on the other, in many small buckets, and the sums of all
    by themselves; how many buckets had been sent when the last backward ended."""
    packs = [toys.packed(toys.documents(4, seed=10 * rank + i)) for i in range(2 - rank)]
    model, size = toys.causal(seed=4), collectives.BUCKET_BYTES
    for packed in packs:
        model(packed).backward()
    alone = [collectives.sum_tensor(p.grad.clone()) for p in model.parameters() if p.grad is not None]
    model.zero_grad()
    collectives.BUCKET_BYTES = 4096
    gradients = collectives.GradientSum(model.parameters(), len(packs))
    sent = [len(gradients._buckets)]
    for packed in packs:
        with gradients.one_pass():
            model(packed).backward()
        sent.append(len(gradients._sent))
    gradients.finish()
    collectives.BUCKET_BYTES = size
    together = torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])
    return {"buckets": torch.tensor(sent), "summed": together, "one by one": torch.cat([x.flatten() for x in alone])}


class Killed(Exception):
    """In a step."""


def stage(folder: Path, kill: int = -1) -> Found:
    """Ten steps in a run folder, with a checkpoint after five, from the one that is there; or killed in a step."""
    model = toys.causal(seed=1)
    optimizer = Optimizer(model, 1e-3, Optim(weight_decay=0.1), muon_lr=0.02)
    documents, parts = toys.documents(31), {"model": Weights(model), "optimizer": optimizer}
    conditions = {"processes": collectives.size()}
    with StageRun(folder, seed=SEED, total_steps=10, save_every=5, environment=conditions) as run:
        run.resume(parts)
        begun = run.step
        for step in run.steps():
            if step == kill:
                raise Killed
            wanted = collectives.shard(batch_indices(SEED, whole(len(documents)), BATCH, step).tolist())
            micros = language_micros([documents[i] for i in wanted], 64, toys.CPU)
            update(model, optimizer, micros, language_terms, toys.CPU, max_norm=0.5)
    held = sum(sharding.local(t).nbytes for part in parts.values() for t in part.tensors().values())
    notes = sum("numbers may differ: processes was" in note for note in run.notes)
    return {
        "weights": weights(model),
        "begun": torch.tensor(begun),
        "notes": torch.tensor(notes),
        "held": torch.tensor(held),
    }


def stages(folder: Path) -> dict[str, Found]:
    """Uninterrupted, killed and resumed, and resumed from what one process saved."""
    whole_run = stage(folder / "whole")
    with suppress(Killed):
        stage(folder / "killed", kill=7)
    collectives.barrier()
    if collectives.is_main():
        shutil.copytree(folder / "killed", folder / "for one")
    collectives.barrier()
    resumed, of_one = stage(folder / "killed"), stage(folder / "of one")
    return {"stage whole": whole_run, "stage resumed": resumed, "stage of one": of_one}


def collected() -> Found:
    """A model with adapters and one without, sharded and collected again: on rank 0 the tensors, elsewhere none."""
    models = toys.causal(seed=1), toys.scalar(seed=2), CausalLM(toys.config())
    toys.randomise(models[2], 3)
    add_adapters(models[2], 4, 8.0, ALL, seed=4)
    plain = [sharding.collected(sharding.place(model, toys.CPU) if model is models[2] else model) for model in models]
    parameters = [p for model in plain for p in model.parameters()]
    if not collectives.is_main():
        return {"without memory": torch.tensor([p.is_meta for p in parameters])}
    outputs = [model(toys.packed(toys.documents(3))) for model in plain]
    return {"weights": weights(*plain), "outputs": torch.cat([output.detach().flatten() for output in outputs])}


@contextmanager
def sharded(shard: str = "full") -> Iterator[None]:
    """Every toy is a sharded model."""
    kept = toys.CPU, toys.causal, toys.scalar

    def in_parts(make: Callable[..., nn.Module]) -> Callable[..., nn.Module]:
        return lambda *given, **how: sharding.place(make(*given, **how), toys.CPU)

    toys.CPU = replace(toys.CPU, shard=shard)
    toys.causal, toys.scalar = in_parts(toys.causal), in_parts(toys.scalar)
    try:
        yield
    finally:
        toys.CPU, toys.causal, toys.scalar = kept


@contextmanager
def narrow() -> Iterator[None]:
    """Computes in bfloat16, as on a GPU."""
    kept = toys.CPU
    toys.CPU = replace(toys.CPU, dtype=torch.bfloat16)
    try:
        yield
    finally:
        toys.CPU = kept


def gathered() -> Found:
    """Bits of what a pass of a sharded model in 16 bit has of its first block, and keeps: weights, gradients."""
    model, bits = toys.causal(seed=1), list[int]()

    def note(*tensors: torch.Tensor | None) -> None:
        bits.extend(8 * tensor.element_size() for tensor in tensors if tensor is not None)

    block = model.get_submodule("model.layers.0")
    block.register_forward_pre_hook(lambda *_: note(next(block.parameters())))
    with toys.CPU.compute():
        loss = model(toys.packed(toys.documents(4))).float().square().mean()
    loss.backward()
    first = next(block.parameters())
    note(first, first.grad)
    return {"bits": torch.tensor(bits)}


def every_collective() -> Found:
    """What each function of `collectives` gives on this process."""
    rank, model = collectives.rank(), toys.causal(seed=collectives.rank())
    counts = collectives.sum_counts({"b": 10.0 + rank, "a": 1.0})
    collectives.same_weights(model)
    collectives.barrier()
    missing = nn.Linear(2, 1, bias=False)
    if rank == 0:
        missing.weight.grad = torch.tensor([[3.0, 4.0]])
    collectives.GradientSum(missing.parameters()).finish()
    assert missing.weight.grad is not None
    unused = nn.Linear(2, 1, bias=False)
    collectives.GradientSum(unused.parameters()).finish()
    return {
        "share": torch.tensor(list(collectives.shard(range(5)))),
        "gather": torch.tensor(collectives.gather(collectives.shard(range(5)))),
        "counts": torch.tensor([counts["a"], counts["b"]]),
        "sum": collectives.sum_tensor(torch.tensor([1.0, float(rank)])),
        "any": torch.tensor([collectives.any_rank(False), collectives.any_rank(rank == 1), collectives.any_rank(True)]),
        "unused": torch.tensor([unused.weight.grad is None]),
        "floats": torch.tensor(collectives.gather([0.1 + rank, 1 / 3, math.inf]), dtype=torch.float64),
        "first": torch.tensor(collectives.from_main(rank)),
        "gradient": missing.weight.grad,
        "weights": weights(model),
        "rank": torch.tensor([rank, collectives.size(), int(collectives.is_main())]),
        **in_buckets(rank),
    }


def main(folder: Path) -> None:
    torch.set_num_threads(1)
    collectives.start("cpu")
    results = {name: job() for name, job in JOBS.items()} | {"collectives": every_collective()}
    for name in ("GradientSum", "sum_counts", "sum_tensor"):
        with without(name):
            broken = ("ppo",) if name == "sum_tensor" else ("sft", "reward", "dpo", "ppo", "grpo")
            results |= {f"{job} without {name}": JOBS[job]() for job in broken}
    with sharded():
        results |= {f"{name}, sharded": job() for name, job in JOBS.items()}
        results |= {**stages(folder), "collected": collected()}
    with narrow(), sharded():
        results |= {f"{name}, sharded, narrow": JOBS[name]() for name in NARROW} | {"gathered": gathered()}
    torch.save(results, folder / f"{collectives.rank()}.pt")
    collectives.stop()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
