"""Whether a change leaves every number as it was: the quick recipes of both reviews examples, frozen before and after.

    python tests/golden/golden.py freeze before.json      # on the old commit
    python tests/golden/golden.py freeze after.json       # on the new one, on the same machine
    python tests/golden/golden.py compare before.json after.json

One thread, fixed seeds, the data of examples/*/fetch.py. Frozen are each stage's metrics step by step, the sha256 of
every tensor of each model and of the tokenizer's files, the report's numbers, greedy replies, scores, and what `check`
counts. `compare` says "equal" or the first difference of every stage, and exits 1 where there is one. Processors differ
in their last bits: both must be frozen on one.
"""

import hashlib
import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import safe_open

ROOT = Path(__file__).parents[2]
EXAMPLES = ("reviews-en", "reviews-zh")
STAGES = ("pretrain", "sft", "reward", "ppo")
PROMPTS = 8
RENAMED: Mapping[str, str] = {  # words in names that changed since the older freeze: what it says, what is said now
    "ended": "finished",
    "held_out": "validation",
    "held_out_loss": "eval_loss",
    "held_out_perplexity": "eval_perplexity",
    "held_out_tokens": "eval_tokens",
    "referee_nll": "external_nll",
    "train_high": "train_score_p999",
    "unseen_scores": "ood_scores",
    "value_rank": "value_spearman",
}
RENAMED_IN_REWARD: Mapping[str, str] = {  # the same in the stage "reward" only: `check` counts comparisons and scores
    "centre": "center_loss",
    "comparisons": "comparison_loss",
    "comparisons_read": "comparison_loss_tokens",
    "competence_prior": "annotator_prior",
    "scores": "score_loss",
    "scores_read": "score_loss_tokens",
}
_WORD = re.compile(r"\w+")
ENVIRONMENT = {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false", "HF_HUB_OFFLINE": "1", "NO_COLOR": "1"}

Frozen = dict[str, dict[str, Any]]


def tetrad(*words: str | Path) -> None:
    command = [sys.executable, "-m", "tetrad", *map(str, words)]
    given = {**os.environ, **ENVIRONMENT, "PYTHONPATH": str(ROOT / "src")}
    done = subprocess.run(command, env=given, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"{' '.join(command)}\n{done.stderr}")


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def hashes(path: Path) -> dict[str, str]:
    """Of every tensor, with its type and shape."""
    digests = {}
    with safe_open(path, framework="np") as file:
        for name in file.keys():  # noqa: SIM118 - no mapping
            tensor = file.get_tensor(name)
            digest = hashlib.sha256(np.ascontiguousarray(tensor).tobytes()).hexdigest()
            digests[name] = f"{tensor.dtype} {list(tensor.shape)} {digest}"
    return digests


def models(stage: Path) -> dict[str, Any]:
    """By file: tensors of weights, and of the tokenizer the file itself."""
    weights = {path.name: hashes(path) for path in sorted((stage / "model").glob("*.safetensors"))}
    tokenizer = stage / "model/tokenizer.json"
    return weights | {tokenizer.name: hashlib.sha256(tokenizer.read_bytes()).hexdigest()}


def numbers(value: Any) -> Any:
    """The same tree without words: names of keys, numbers and lists of them."""
    if isinstance(value, dict):
        return {key: numbers(part) for key, part in value.items() if not isinstance(part, str)}
    return [numbers(part) for part in value if not isinstance(part, str)] if isinstance(value, list) else value


def counts(check: Mapping[str, Any]) -> Any:
    """The sections' numbers without times, which are measured, and without the place of the data."""
    text = json.dumps(check["sections"]).replace(f"{ROOT}/", "")
    sections = numbers(json.loads(text, object_hook=lambda d: {k: v for k, v in d.items() if k != "seconds"}))
    return {name: section["figures"] for name, section in sections.items()}


def columns(rows: list[dict[str, Any]]) -> dict[str, list[Any]]:
    """The curve of every metric, by step."""
    return {name: [row.get(name) for row in rows] for name in dict.fromkeys(key for row in rows for key in row)}


def freeze(example: str, folder: Path) -> Frozen:
    """Runs the recipe and reads what it left. By stage or command."""
    recipe, data = ROOT / f"examples/{example}/quick.toml", ROOT / f"examples/{example}/data"
    tetrad("run", recipe, "--run.out", folder)
    run = folder / f"{example}-quick"
    frozen = {s: {"metrics": columns(lines(run / s / "metrics.jsonl")), "model": models(run / s)} for s in STAGES}
    report = json.loads((run / "evaluate/report/report.json").read_text(encoding="utf-8"))
    frozen["evaluate"] = numbers(report)
    few = folder / "few.jsonl"
    asked = (data / "prompts.test.jsonl").read_text(encoding="utf-8").splitlines(keepends=True)[:PROMPTS]
    few.write_text("".join(asked), encoding="utf-8")
    tetrad("generate", run / "ppo", "--prompts", few, "--temperature", "0", "--out", folder / "replies.jsonl")
    replies = lines(folder / "replies.jsonl")
    tetrad("score", run / "reward", "--data", folder / "replies.jsonl", "--out", folder / "scored.jsonl")
    scored = lines(folder / "scored.jsonl")
    frozen["generate"] = {"replies": [list(row.values()) for row in replies]}
    frozen["score"] = {"scores": [[v for v in row.values() if isinstance(v, float)] for row in scored]}
    empty = ("--run.out", folder / "none")  # a tokenizer of an earlier run would count the tokens
    tetrad("check", recipe, *empty, "--json", folder / "check.json")
    frozen["check"] = counts(json.loads((folder / "check.json").read_text(encoding="utf-8")))
    return frozen


def renamed(value: Any, names: Mapping[str, str]) -> Any:
    """The same tree under the names of today."""
    if isinstance(value, dict):
        now = {_WORD.sub(lambda w: names.get(w[0], w[0]).replace("held_out", "validation"), key): key for key in value}
        return {new: renamed(value[old], names) for new, old in now.items()}
    return [renamed(part, names) for part in value] if isinstance(value, list) else value


def difference(old: Any, new: Any, place: str = "") -> str:
    """The first place where two trees differ, with both values; empty where they are equal. NaN equals itself."""
    both = old, new
    if all(isinstance(value, list) for value in both):
        old, new = (dict(enumerate(value)) for value in both)
    if not all(isinstance(value, dict) for value in (old, new)):
        return "" if old == new or (old != old and new != new) else f"{place}: {old} before, {new} after"
    for key in dict.fromkeys([*old, *new]):
        if key not in old or key not in new:
            return f"{place}/{key}: only {'after' if key in new else 'before'}"
        if inside := difference(old[key], new[key], f"{place}/{key}"):
            return inside
    return ""


def compare(before: Path, after: Path) -> int:
    old, new = (json.loads(path.read_text(encoding="utf-8")) for path in (before, after))
    wrong = 0
    for example in dict.fromkeys([*old, *new]):
        parts = old.get(example, {}), new.get(example, {})
        for stage in dict.fromkeys([*parts[0], *parts[1]]):
            names = {**RENAMED, **(RENAMED_IN_REWARD if stage == "reward" else {})}
            first = difference(renamed(parts[0].get(stage), names), parts[1].get(stage))
            wrong += bool(first)
            print(f"{example:<12}{stage:<10}{first or 'equal'}")
    return 1 if wrong else 0


def main() -> int:
    if sys.argv[1:2] == ["compare"] and len(sys.argv) == 4:
        return compare(Path(sys.argv[2]), Path(sys.argv[3]))
    if sys.argv[1:2] != ["freeze"] or len(sys.argv) != 3:
        raise SystemExit(__doc__)
    frozen = {}
    for example in EXAMPLES:
        with tempfile.TemporaryDirectory() as place:
            frozen[example] = freeze(example, Path(place))
    Path(sys.argv[2]).write_text(json.dumps(frozen, ensure_ascii=False), encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
