"""What DPO earns for the KL that it spends, against the DPO of TRL at equal settings, on `examples/reviews-en`.

    python benchmarks/dpo_trl.py run RUN trl tetrad --seeds 0 1 2 >> results.jsonl     # with the extra `parity`
    python benchmarks/dpo_trl.py show results.jsonl

RUN: a run of the example, runs/reviews-en. Both start from its SFT model and read the same ids: the best and the worst
answer of each list that people ranked. Rate, schedule, batches and epochs are equal; each shuffles by itself. Every
beta is a training of its own. One sampler and one reward model then judge both: one JSON line a system, seed and beta
has the KL and the mean score of 4 responses to each of 128 held-out prompts. `show` prints the lines of each beta, and
the score by nats of KL, a straight line between the betas of a seed: the mean over seeds, the lowest and the highest.
"""

import argparse
import json
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from tetrad.console import Console
from tetrad.data.records import read_comparisons
from tetrad.data.source import Counts, DataFiles
from tetrad.inference.completions import read_encoded_prompts
from tetrad.inference.likelihood import token_likelihoods
from tetrad.inference.model_folder import model_folder
from tetrad.inference.policy import completions, load
from tetrad.pipeline import recipe, runner
from tetrad.reward.data import tokenized
from tetrad.reward.model import documents_from_ids, load_reward
from tetrad.settings.use import Sample
from tetrad.text.chat_template import choose
from tetrad.text.tokenizer import Tokenizer

DATA = Path(__file__).parent.parent / "examples/reviews-en/data"
BETAS, BATCH, EPOCHS, LR, WARMUP, BETA2 = (1.0, 0.3, 0.1, 0.03), 32, 3, 3e-4, 0.1, 0.95
PROMPTS, SAMPLES, LONGEST = 128, 4, 64
RECIPE = """\
name = "dpo"
seed = {seed}
[run]
out = "{out}"
[model]
from = "{policy}"
[optim]
beta2 = {beta2}
[dpo]
data = ["{pairs}"]
beta = {beta}
epochs = {epochs}
batch_size = {batch}
lr = {lr}
warmup = {warmup}
"""


def write_pairs(path: Path) -> None:
    """The best and the worst answer of each list; the first of those that people hold equal."""
    with path.open("w", encoding="utf-8") as file:
        for line in (DATA / "ranked.train.jsonl").read_text(encoding="utf-8").splitlines():
            record = json.loads(line)
            choices = sorted(record["choices"], key=lambda choice: choice["rank"])
            record["choices"] = [{**choices[0], "rank": 1}, {**choices[-1], "rank": 2}]
            print(json.dumps(record), file=file)


def tetrad(policy: Path, out: Path, pairs: Path, seed: int, beta: float) -> Path:
    given = {"seed": seed, "out": out, "policy": policy, "pairs": pairs, "beta": beta, "beta2": BETA2}
    given |= {"epochs": EPOCHS, "batch": BATCH, "lr": LR, "warmup": WARMUP}
    path = out / "recipe.toml"
    path.write_text(RECIPE.format(**given), encoding="utf-8")
    runner.run(recipe.read(path), Console())
    return out / "dpo/dpo/model"


def trl(policy: Path, out: Path, pairs: Path, seed: int, beta: float) -> Path:
    from datasets import Dataset
    from transformers import AutoModelForCausalLM, AutoTokenizer, set_seed
    from trl import DPOConfig, DPOTrainer

    set_seed(seed)
    form, tokenizer = choose(policy, "instruction", own=True), Tokenizer.load(policy)
    records = read_comparisons(DataFiles((pairs,)), 0.0, (), Counts())
    documents = tokenized(records, form, tokenizer, 1 << 20, "refuse", Counts(), last_only=True).tokens
    rows = []
    for chosen, rejected in zip(documents[::2], documents[1::2], strict=True):
        start = int(np.flatnonzero(chosen.train)[0])
        sides = {"chosen_ids": chosen.ids[start:].tolist(), "rejected_ids": rejected.ids[start:].tolist()}
        rows.append({"prompt_ids": chosen.ids[:start].tolist(), **sides})

    class Trainer(DPOTrainer):  # type: ignore[misc]
        def _prepare_dataset(self, dataset: Any, *_: Any) -> Any:
            return dataset

    steps = -(-EPOCHS * len(rows) // BATCH)
    how = DPOConfig(
        output_dir=str(out),
        per_device_train_batch_size=BATCH,
        max_steps=steps,
        beta=beta,
        learning_rate=LR,
        warmup_steps=round(WARMUP * steps),
        lr_scheduler_type="linear",
        adam_beta2=BETA2,
        max_grad_norm=1.0,
        use_cpu=True,
        bf16=False,
        gradient_checkpointing=False,
        report_to="none",
        save_strategy="no",
        disable_tqdm=True,
        logging_strategy="no",
        seed=seed,
    )
    models = [AutoModelForCausalLM.from_pretrained(policy, dtype=torch.float32) for _ in range(2)]
    words = AutoTokenizer.from_pretrained(policy)
    trainer = Trainer(
        models[0], ref_model=models[1], args=how, train_dataset=Dataset.from_list(rows), processing_class=words
    )
    trainer.train()
    trainer.model.save_pretrained(out / "model")
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        if (policy / name).is_file():
            (out / "model" / name).write_bytes((policy / name).read_bytes())
    return out / "model"


def judged(folder: Path, run: Path, seed: int) -> dict[str, float]:
    """The KL and the mean score of sampled responses; how many ended, and their tokens."""
    reference, policy = load(model_folder(run / "sft"), "instruction"), load(folder, "instruction")
    reward = load_reward(run / "reward")
    prompts = read_encoded_prompts(
        [DATA / "prompts.test.jsonl"], policy.form, policy.tokenizer, Counts(), 512, LONGEST
    )[:PROMPTS]
    how = Sample(temperature=1.0, top_p=1.0, max_new_tokens=LONGEST, seed=seed)
    samples = [one for group in completions(policy, prompts, how, SAMPLES) for one in group]
    nats = []
    for one in samples:
        text, start = one.prompt_ids + one.response_ids, len(one.prompt_ids) - 1
        own, theirs = (
            [logprob for logprob, _ in token_likelihoods(model.fused, text, model.placed, 0)]
            for model in (policy, reference)
        )
        nats.append(sum(own[start:]) - sum(theirs[start:]))
    scores = reward.scores(documents_from_ids(samples)).mean(0)
    means = {"kl": np.mean(nats), "score": scores.mean(), "finished": np.mean([one.finished for one in samples])}
    means["length"] = np.mean([len(one.response_ids) for one in samples])
    return {name: round(float(value), 4) for name, value in means.items()}


def show(path: Path) -> None:
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    for system in dict.fromkeys(row["system"] for row in rows):
        curves: dict[int, list[tuple[float, float]]] = {}
        for row in rows:
            if row["system"] == system:
                curves.setdefault(row["seed"], []).append((row["kl"], row["score"]))
        print(f"{system}: {len(curves)} seeds")
        for beta in dict.fromkeys(row["beta"] for row in rows):
            mine = [row for row in rows if (row["system"], row["beta"]) == (system, beta)]
            print(f"  beta {beta}: " + ", ".join(f"{row['score']:+.3f} at {row['kl']:.2f} nats" for row in mine))
        for nats in (0.25, 0.5, 1.0, 2.0, 4.0):
            lines = [np.array(sorted(curve)).T for curve in curves.values()]
            scores = [float(np.interp(nats, kl, score)) for kl, score in lines if kl[0] <= nats <= kl[-1]]
            if scores:
                spread = f"[{min(scores):+.3f}, {max(scores):+.3f}]"
                print(f"  {nats} nats  {np.mean(scores):+.3f}  {spread}  of {len(scores)} seeds")


def main(systems: dict[str, Callable[[Path, Path, Path, int, float], Path]]) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    verbs = parser.add_subparsers(dest="verb", required=True)
    run = verbs.add_parser("run")
    run.add_argument("run", type=Path)
    run.add_argument("systems", nargs="+", choices=systems)
    run.add_argument("--seeds", nargs="+", type=int, default=[0])
    run.add_argument("--betas", nargs="+", type=float, default=BETAS)
    verbs.add_parser("show").add_argument("results", type=Path)
    given = parser.parse_args()
    if given.verb == "show":
        show(given.results)
        return
    jobs: Sequence[tuple[int, str, float]] = [
        (seed, system, beta) for seed in given.seeds for system in given.systems for beta in given.betas
    ]
    for seed, system, beta in jobs:
        with tempfile.TemporaryDirectory() as name:
            write_pairs(pairs := Path(name, "pairs.jsonl"))
            began = time.perf_counter()
            folder = systems[system](model_folder(given.run / "sft"), Path(name), pairs, seed, beta)
            row = {"system": system, "seed": seed, "beta": beta, "seconds": round(time.perf_counter() - began, 1)}
            print(json.dumps(row | judged(folder, given.run, seed)), flush=True)


if __name__ == "__main__":
    main({"tetrad": tetrad, "trl": trl})
