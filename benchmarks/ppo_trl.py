"""What PPO earns for the KL that it spends, against the PPO of TRL at equal settings, on `examples/reviews-en`.

    python -m venv peer && peer/bin/pip install torch==2.13.0 -e . trl==1.12.0   # the last with PPO
    peer/bin/python benchmarks/ppo_trl.py run RUN trl tetrad --seeds 0 1 2 >> results.jsonl
    python benchmarks/ppo_trl.py show results.jsonl

RUN: a run of the example, runs/reviews-en. Both start from its SFT and reward model, with the same prompts, batches,
learning rates, beta, clips and penalty for a cut reply; what one of the two lacks (a clip of scores or of gradients) is
off. What still differs: TRL puts the score one place after the end token and learns a value there, and its value head
has a bias that is trained. One JSON line a system and seed: KL and mean score of the replies of each iteration, without
the penalty; the seconds hold what each does besides (checkpoints, loading) and compare nothing. `show` prints the score
by nats of KL, the mean over seeds and the lowest and highest of them, and where each seed ended (ten iterations).
"""

import argparse
import copy
import json
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import nn

from tetrad.console import Console
from tetrad.data.source import Counts
from tetrad.inference.completions import read_encoded_prompts
from tetrad.inference.model_folder import model_folder
from tetrad.model.huggingface import read_scalar
from tetrad.pipeline import recipe, runner
from tetrad.text.chat_template import choose
from tetrad.text.tokenizer import Tokenizer

PROMPTS = Path(__file__).parent.parent / "examples/reviews-en/data/prompts.train.jsonl"
BATCH, STEPS, EPOCHS, PARTS, LONGEST = 64, 75, 2, 2, 64
LR, BETA, PENALTY, BETA2, EPS = 3e-4, 0.12, 2.5, 0.95, 1e-5
RECIPE = """\
name = "ppo"
seed = {seed}
[run]
out = "{out}"
[model]
from = "{policy}"
[reward]
from = "{reward}"
[optim]
beta2 = {beta2}
[ppo]
prompts = ["{prompts}"]
steps = {steps}
batch_size = {batch}
max_new_tokens = {longest}
ppo_epochs = {epochs}
num_minibatches = {parts}
actor_lr = {lr}
critic_lr = {lr}
adam_eps = {eps}
kl_coef = {beta}
missing_eos_penalty = {penalty}
reward_clip = 0
max_grad_norm = 0
"""
Curve = dict[str, list[float]]


def tetrad(run: Path, seed: int, steps: int) -> Curve:
    given = {"lr": LR, "beta": BETA, "batch": BATCH, "epochs": EPOCHS, "parts": PARTS, "longest": LONGEST}
    given |= {"penalty": PENALTY, "beta2": BETA2, "eps": EPS, "seed": seed, "steps": steps}
    return trained(run, "ppo", RECIPE, given)


def trained(run: Path, stage: str, text: str, given: Mapping[str, float]) -> Curve:
    """The recipe with these values, named after the one stage that it runs."""
    with tempfile.TemporaryDirectory() as out:
        models = {"policy": model_folder(run / "sft"), "reward": model_folder(run / "reward")}
        path = Path(out, "recipe.toml")
        path.write_text(text.format(out=out, prompts=PROMPTS, **models, **given))
        runner.run(recipe.read(path), Console())
        lines = [json.loads(line) for line in Path(out, stage, stage, "metrics.jsonl").read_text().splitlines()]
    return {name: [round(line[name], 4) for line in lines] for name in ("kl", "score", "finished", "length")}


def trl(run: Path, seed: int, steps: int) -> Curve:
    from datasets import Dataset
    from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer, set_seed
    from trl.experimental.ppo import PPOConfig, PPOTrainer

    set_seed(seed)  # its order of replies is numpy's
    policy, reward = model_folder(run / "sft"), model_folder(run / "reward")
    words = AutoTokenizer.from_pretrained(policy, padding_side="left")
    actor = AutoModelForCausalLM.from_pretrained(policy, dtype=torch.float32)
    judge = AutoModelForSequenceClassification.from_pretrained(reward, num_labels=1, dtype=torch.float32)
    head = nn.Linear(judge.config.hidden_size, 1)  # with the bias that the reward model's folder notes
    head.weight.data, head.bias.data = judge.score.weight.data, read_scalar(reward, 0).bias.reshape(1)
    judge.score = head
    form, tokenizer = choose(policy, "instruction", own=True), Tokenizer.load(policy)
    questions = read_encoded_prompts([PROMPTS], form, tokenizer, Counts(), 512, LONGEST)
    with tempfile.TemporaryDirectory() as out:
        how = PPOConfig(
            output_dir=out,
            per_device_train_batch_size=BATCH,
            gradient_accumulation_steps=1,
            num_mini_batches=PARTS,
            num_ppo_epochs=EPOCHS,
            local_rollout_forward_batch_size=BATCH,
            total_episodes=BATCH * steps,
            response_length=LONGEST,
            stop_token="eos",
            temperature=1.0,
            missing_eos_penalty=PENALTY,
            kl_coef=BETA,
            vf_coef=1.0,  # one optimizer for both: the critic's error as it is
            learning_rate=LR,
            lr_scheduler_type="linear",
            adam_beta2=BETA2,
            adam_epsilon=EPS,
            use_cpu=True,
            bf16=False,
            gradient_checkpointing=False,
            report_to="none",
            save_strategy="no",
            logging_steps=1,
            num_sample_generations=0,
            disable_tqdm=True,
            seed=seed,
        )
        rows = Dataset.from_list([{"input_ids": list(question.ids)} for question in questions])
        models = {"model": actor, "ref_model": copy.deepcopy(actor), "reward_model": judge}
        trainer = PPOTrainer(
            args=how,
            processing_class=words,
            **models,
            value_model=copy.deepcopy(judge),
            train_dataset=rows,
            eval_dataset=rows.select(range(BATCH)),
        )
        told: list[Mapping[str, float]] = []
        trainer.log = lambda logs, *_: told.append(logs)
        trainer.train()
    finished = [line["val/num_eos_tokens"] / BATCH for line in told]
    scores = [line["objective/scores"] + PENALTY * (1 - e) for line, e in zip(told, finished, strict=True)]
    found = {"kl": [line["objective/kl"] for line in told], "score": scores, "finished": finished}
    return {name: [round(x, 4) for x in column] for name, column in found.items()}


def by_nats(row: Mapping[str, Sequence[float]]) -> dict[int, float]:
    """The score at each whole number of nats: a straight line through the iterations within a nat of it, where there
    are six or more, on both sides. (Their plain mean belongs to their mean KL, which is another for each run.)"""
    kl, score = np.array(row["kl"]), np.array(row["score"])
    found = {}
    for nats in range(1, int(kl.max()) + 1):
        near = np.abs(kl - nats) <= 1
        if near.sum() >= 6 and kl[near].min() < nats < kl[near].max():
            found[nats] = float(np.polyfit(kl[near] - nats, score[near], 1)[1])
    return found


def show(path: Path) -> None:
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    for system in dict.fromkeys(row["system"] for row in rows):
        mine = [row for row in rows if row["system"] == system]
        curves = [by_nats(row) for row in mine]
        ends = ", ".join(f"{sum(r['score'][-10:]) / 10:+.2f} at {sum(r['kl'][-10:]) / 10:.1f} nats" for r in mine)
        print(f"{system}: {len(curves)} seeds, which ended with {ends}")
        for nats in sorted({nats for curve in curves for nats in curve}):
            scores = [curve[nats] for curve in curves if nats in curve]
            mean = sum(scores) / len(scores)
            print(f"  {nats} nats  {mean:+.3f}  [{min(scores):+.3f}, {max(scores):+.3f}]  of {len(scores)} seeds")


def main(systems: Mapping[str, Callable[[Path, int, int], Curve]], description: str | None) -> None:
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    verbs = parser.add_subparsers(dest="verb", required=True)
    run = verbs.add_parser("run")
    run.add_argument("run", type=Path)
    run.add_argument("systems", nargs="+", choices=systems)
    run.add_argument("--seeds", nargs="+", type=int, default=[0])
    run.add_argument("--steps", type=int, default=STEPS)
    verbs.add_parser("show").add_argument("results", type=Path)
    asked = parser.parse_args()
    if asked.verb == "show":
        show(asked.results)
        return
    for seed in asked.seeds:
        for system in asked.systems:
            began = time.perf_counter()
            curve = systems[system](asked.run, seed, asked.steps)
            seconds = round(time.perf_counter() - began, 1)
            row = {"system": system, "seed": seed, "seconds": seconds, "threads": torch.get_num_threads(), **curve}
            print(json.dumps(row), flush=True)


if __name__ == "__main__":
    main({"tetrad": tetrad, "trl": trl}, __doc__)
