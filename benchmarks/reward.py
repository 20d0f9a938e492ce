"""What a reward model learns from lists, scores and pairs, on the rated sentences of `examples/reviews-en`.

    python examples/reviews-en/fetch.py
    python benchmarks/reward.py POLICY mixed lists trl --seeds 0 1 2 >> results.jsonl

POLICY: an SFT model of that example, as runs/reviews-en/sft. All arms start from it and read the same answers; one JSON
line an arm and seed has the figures on the test sentences.

mixed   half of the sentences as lists of four, the other half with their scores: lists alone, scores alone, and both
        in as many steps, each with what the two have in theirs
lists   lists of four, against the same lists as six pairs each: in one pass, and with as many answers read
trl     RewardTrainer of TRL and Tetrad on the same pairs, in the same order and batches, as TRL has them; Tetrad
        without dropout, as TRL trains, and with the loss at every token; Tetrad on the scores that the pairs come from
"""

import argparse
import json
import random
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any
from unittest import mock

import torch

from tetrad.console import Console
from tetrad.inference.model_folder import model_folder
from tetrad.pipeline import recipe, runner
from tetrad.reward.batches import Examples
from tetrad.reward.evaluation import Pairs
from tetrad.train import reward
from tetrad.types import Prompt, Score, Tokens, Turn

DATA = Path(__file__).parent.parent / "examples/reviews-en/data"
Row = dict[str, Any]
ANSWERS = 64  # of a step
COMMON = """\
seed = {seed}
name = "reward"
[run]
out = "{folder}"
[model]
from = "{policy}"
[reward]
data = {data}
validation = {validation}
test = {test}
score_scale = [-4, 4]
pair_gap = 0.5
lr = 2e-3
patience = 0
"""


def rows_of(split: str) -> list[Row]:
    return [json.loads(line) for line in (DATA / f"scores.{split}.jsonl").read_text(encoding="utf-8").splitlines()]


def whole(row: Row) -> str:
    return " ".join(f"{row['Input']} {row['Output']}".split())


def lists_of(rows: Sequence[Row], seed: int) -> list[Row]:
    """Lists of four whole sentences of one kind, ranked by their scores."""
    draw, kinds = random.Random(seed), {row["Instruction"] for row in rows}
    found = []
    for kind in sorted(kinds):
        mine = [row for row in rows if row["Instruction"] == kind]
        draw.shuffle(mine)
        for four in zip(*[iter(mine)] * 4, strict=False):
            choices = [{"text": whole(row), "rank": -row["score"]} for row in four]
            found.append({"Instruction": kind, "choices": choices})
    draw.shuffle(found)
    return found


def exploded(lists: Sequence[Row], seed: int) -> list[Row]:
    """Each pair of each list as a record of its own, in any order."""
    found = []
    for row in lists:
        ordered = sorted(row["choices"], key=lambda choice: choice["rank"])
        for i, better in enumerate(ordered):
            for worse in ordered[i + 1 :]:
                if better["rank"] < worse["rank"]:
                    pair = {"chosen": better["text"], "rejected": worse["text"]}
                    found.append({"Instruction": row["Instruction"], **pair})
    random.Random(seed).shuffle(found)
    return found


def scored(rows: Sequence[Row]) -> list[Row]:
    """Whole sentences with their scores."""
    return [{"Instruction": r["Instruction"], "Output": whole(r), "score": r["score"]} for r in rows]


def train(policy: str, records: Mapping[str, Sequence[Row]], seed: int, **settings: Any) -> dict[str, Any]:
    """Trains a reward model on files of records; its figures on test sentences and lists of them."""
    with tempfile.TemporaryDirectory() as folder:
        tests = {"scores.test": scored(rows_of("test")), "lists.test": lists_of(rows_of("test"), 0)}
        tests["valid"] = scored(rows_of("valid"))
        for name, rows in {**records, **tests}.items():
            text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
            Path(folder, f"{name}.jsonl").write_text(text, encoding="utf-8")
        files = {name: json.dumps(f"{folder}/{name}.jsonl") for name in (*records, *tests)}
        given = {
            "seed": seed,
            "folder": f"{folder}/runs",
            "policy": policy,
            "data": f"[{', '.join(files[name] for name in records)}]",
            "validation": f"[{files['valid']}]",
            "test": f"[{files['scores.test']}, {files['lists.test']}]",
        }
        path = Path(folder, "recipe.toml")
        settings = {"dropout": 0.15, "token_dropout": 0.1, **settings}
        path.write_text(COMMON.format(**given) + "".join(f"{name} = {value}\n" for name, value in settings.items()))
        seconds = 0.0

        def timed(*given: Any) -> Any:
            nonlocal seconds
            began = time.process_time()
            stats = train_step(*given)
            seconds += time.process_time() - began
            return stats

        train_step = reward.train_step
        with mock.patch.object(reward, "train_step", timed):
            runner.run(recipe.read(path, []), Console())
        home = Path(folder, "runs/reward/reward")
        metrics = [json.loads(line) for line in (home / "metrics.jsonl").read_text().splitlines()]
        told = json.loads((home / "model/evaluation.json").read_text())
        return {"steps": len(metrics), **parts(told), "seconds": round(seconds, 1)}


def parts(told: Mapping[str, Any]) -> dict[str, float]:
    """Spearman of test scores, accuracy on pairs of them and on lists."""
    by_source = {part["value"]: part for part in told["slices"] if part["by"] == "source"}
    scores, lists = by_source["scores.test.jsonl"], by_source["lists.test.jsonl"]
    return {
        "spearman": scores["spearman"],
        "pair_accuracy": scores["accuracy"],
        "list_accuracy": lists["accuracy"],
        "list_low": lists["accuracy_low"],
        "list_high": lists["accuracy_high"],
    }


def mixed(policy: str, seed: int) -> Iterator[Row]:
    """Every arm reads its records four times, in the same number of steps."""
    rows = rows_of("train")
    random.Random(7).shuffle(rows)
    half = len(rows) // 2
    lists, scores = lists_of(rows[:half], seed), scored(rows[half:])
    four = ANSWERS // 4
    arms: dict[str, tuple[dict[str, Sequence[Row]], int, float]] = {
        "lists": ({"lists": lists}, four, 4),
        "scores": ({"scores": scores}, ANSWERS, 4),
        "both": ({"lists": lists, "scores": scores}, four + ANSWERS, 4),
    }
    for arm, (records, batch, epochs) in arms.items():
        yield {"case": "mixed", "arm": arm, **train(policy, records, seed, batch_size=batch, epochs=epochs)}


def lists(policy: str, seed: int) -> Iterator[Row]:
    """A pass over pairs reads each answer three times; all have the same steps. seconds: of a processor, training."""
    found = lists_of(rows_of("train"), seed)
    pairs = exploded(found, seed)
    for arm, records, batch, epochs in (
        ("lists", found, 16, 1),
        ("lists thrice", found, 48, 3),
        ("pairs", pairs, 96, 1),
    ):
        yield {"case": "lists", "arm": arm, **train(policy, {"train": records}, seed, batch_size=batch, epochs=epochs)}


def paired(rows: Sequence[Row], count: int, seed: int) -> list[Row]:
    """Pairs of sentences of one kind whose scores are half a point apart or more."""
    draw, found = random.Random(seed), []
    kinds = {kind: [row for row in rows if row["Instruction"] == kind] for kind in {r["Instruction"] for r in rows}}
    while len(found) < count:
        mine = kinds[draw.choice(rows)["Instruction"]]
        first, second = draw.choice(mine), draw.choice(mine)
        if first["score"] - second["score"] >= 0.5:
            pair = {"chosen": whole(first), "rejected": whole(second)}
            found.append({"Instruction": first["Instruction"], **pair})
    return found


def trl(policy: str, seed: int) -> Iterator[Row]:
    """Two passes' worth of answers for each."""
    rows = rows_of("train")
    pairs = paired(rows, len(rows), seed)
    half = ANSWERS // 2
    yield {
        "case": "trl",
        "arm": "tetrad, scores",
        **train(policy, {"t": scored(rows)}, seed, batch_size=ANSWERS, epochs=2),
    }
    once = {"batch": half, "epochs": 1}
    yield {"case": "trl", "arm": "tetrad, pairs", **train(policy, {"t": pairs}, seed, **once)}
    plain = {**once, "dropout": 0.0, "token_dropout": 0.0}
    yield {"case": "trl", "arm": "tetrad, pairs, no dropout", **train(policy, {"t": pairs}, seed, **plain)}
    tokens = {**once, "token_weight": 1.0}
    yield {"case": "trl", "arm": "tetrad, pairs, every token", **train(policy, {"t": pairs}, seed, **tokens)}
    yield {"case": "trl", "arm": "trl", **trl_trained(policy, pairs, half, seed)}


def trl_trained(policy: str, pairs: Sequence[Row], batch: int, seed: int) -> dict[str, Any]:
    from datasets import Dataset
    from transformers import AutoModelForSequenceClassification, AutoTokenizer
    from trl import RewardConfig, RewardTrainer

    folder = str(model_folder(policy))
    words = AutoTokenizer.from_pretrained(folder)
    torch.manual_seed(seed)
    model = AutoModelForSequenceClassification.from_pretrained(folder, num_labels=1, dtype=torch.float32)
    model.config.pad_token_id = words.pad_token_id

    def ids(kind: str, text: str) -> list[int]:
        found: list[int] = words(f"{kind}<|sep|><|sep|>{text}<|endoftext|>")["input_ids"]
        return found

    rows = [{f"{which}_ids": ids(row["Instruction"], row[which]) for which in ("chosen", "rejected")} for row in pairs]
    with tempfile.TemporaryDirectory() as out:
        how = RewardConfig(
            output_dir=out,
            per_device_train_batch_size=batch,
            num_train_epochs=1,
            learning_rate=2e-3,
            adam_beta2=0.95,
            weight_decay=0.0,
            lr_scheduler_type="linear",
            warmup_steps=len(pairs) // batch // 20,
            max_length=512,
            use_cpu=True,
            report_to="none",
            save_strategy="no",
            logging_strategy="no",
            disable_tqdm=True,
            gradient_checkpointing=False,
            bf16=False,
            seed=seed,
        )
        began = time.process_time()
        RewardTrainer(model=model, args=how, train_dataset=Dataset.from_list(rows), processing_class=words).train()
        seconds = round(time.process_time() - began, 1)
    model.eval()
    test = rows_of("test")
    rewards = []
    with torch.no_grad():
        for row in test:
            rewards.append(float(model(torch.tensor([ids(row["Instruction"], whole(row))])).logits[0, 0]))
    records = [Score(Prompt((Turn("instruction", r["Instruction"]),)), whole(r), r["score"]) for r in test]
    nothing = Tokens([], [])
    found = Pairs.of(Examples.of(records, [nothing] * len(records)), torch.tensor(rewards), 0.5).metrics(1.0)
    return {"spearman": found.spearman, "pair_accuracy": found.pair_accuracy, "seconds": seconds}


CASES = {"mixed": mixed, "lists": lists, "trl": trl}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("policy")
    parser.add_argument("cases", nargs="+", choices=CASES)
    parser.add_argument("--seeds", nargs="+", type=int, default=[0])
    asked = parser.parse_args()
    for case in asked.cases:
        for seed in asked.seeds:
            for row in CASES[case](asked.policy, seed):
                print(json.dumps({**row, "seed": seed, "threads": torch.get_num_threads()}), flush=True)


if __name__ == "__main__":
    main()
