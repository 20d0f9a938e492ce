"""The folder of a finished run, written by hand: what a page shows, with texts of a hostile model everywhere."""

import gzip
import json
import math
from pathlib import Path
from typing import Any

from tetrad import storage

HOSTILE = (
    '</script><script>document.title="broken"</script>',
    '<img src=x onerror="document.title=1">',
    '"><svg onload=alert(1)>',
    "\u202eevil\u202c \x1b[31mred\x00 ' & </bdi></dd>",
    "javascript:alert(1) ]]> <!-- \\u003c $x^2$",
    "很好看，<b>真的</b>，" * 30,
    "https://example.org/" + "a" * 300,
)
STEPS = 30


def hostile(i: int) -> str:
    return HOSTILE[i % len(HOSTILE)]


def write_run(folder: Path, *, shift: float = 0.0) -> Path:
    """All stages. shift: moves PPO's figures, so that two runs differ."""
    key = {name: name[0] * 64 for name in ("tokenizer", "pretrain", "sft", "reward", "ppo", "evaluate")}
    parents = {"pretrain": ["tokenizer"], "sft": ["pretrain"], "reward": ["sft"], "ppo": ["sft", "reward"]}
    parents["evaluate"] = ["sft", "reward", "ppo"]
    for stage, own in key.items():
        lineage: dict[str, Any] = {"stage": stage, "key": own, "version": 1, "settings": {f"{stage}.seed_of": 1}}
        lineage["settings"] = {"ppo.steps": STEPS, "ppo.kl_coef": 0.5} if stage == "ppo" else {}
        lineage["data"] = {f"{stage}.data": [{"path": f"{hostile(1)}.jsonl", "sha256": "a" * 64}]}
        lineage["parents"] = {x: {"folder": str(folder / x / "model"), "key": key[x]} for x in parents.get(stage, ())}
        (folder / stage).mkdir(parents=True)
        (folder / stage / "lineage.json").write_text(json.dumps(lineage))
    for stage in ("pretrain", "sft", "reward"):
        logs(folder / stage, [{"loss": 5 / (step + 1) + 0.123456789012345, "lr": 1e-3} for step in range(STEPS)])
    (folder / "ppo" / "recipe.toml").write_text(f'name = "demo"\n[ppo]\nsteps = {STEPS}\n')
    logs(folder / "ppo", [ppo_line(step, shift) for step in range(STEPS)])
    model(folder, "pretrain", {"eval_loss": 3.5})
    model(folder, "sft", {"eval_loss": 3.1})
    model(folder, "reward", REWARD, assessed())
    alarms = [{"figure": "commonest_word", "level": 2, "first": 20, "last": 29}]
    model(folder, "ppo", {"gate": [f"the accuracy may be 0.4 {hostile(0)}"], "alarms": alarms})
    samples = [sample(step, i) for step in (0, 10, 29) for i in range(3)]
    (folder / "ppo" / "samples.jsonl").write_text("".join(json.dumps(line) + "\n" for line in samples))
    storage.write_folder(folder / "evaluate" / "report", evaluated(), {"key": key["evaluate"]})
    return folder


def logs(folder: Path, lines: list[dict[str, float]]) -> None:
    text = "".join(json.dumps({"step": step, **line}) + "\n" for step, line in enumerate(lines))
    (folder / "metrics.jsonl").write_text(text)
    timing = {"seconds": 2.0, "tokens_per_second": 812.5, "peak_mib": 700.25, "phases": {"update": 1.5, "other": 0.5}}
    rows = [json.dumps({"step": step, **timing}) + "\n" for step in range(len(lines))]
    (folder / "timing.jsonl").write_text("".join(rows))


def ppo_line(step: int, shift: float) -> dict[str, float]:
    kl = 0.3 * step + shift
    line = {"score": 1 - math.exp(-step / 9) + shift, "kl": kl, "length": 20 + step / 7, "finished": 0.98}
    line |= {"commonest_word": 0.05 + step / 50, "distinct_2": 0.9 - step / 90, "entropy": 3 - step / 20}
    line |= {"score_std": 1.0, "kl_k3": 1.0, "ratio": 1.0, "value_loss": 0.5}
    return line | {"explained_variance": 0.4, "clip_fraction": 0.1, "actor_lr": 1e-4, "beta": 0.1, "ood_scores": 0.0}


REWARD = {"pair_accuracy": 0.81, "pair_accuracy_low": 0.79, "pair_accuracy_high": 0.83, "pairs": 2000.0}
REWARD |= {"spearman": 0.7, "spearman_low": 0.65, "spearman_high": 0.75, "length_accuracy": 0.55}
REWARD |= {"ridge_baseline_pair_accuracy": 0.77, "ridge_baseline_spearman": 0.6}


def assessed() -> dict[str, bytes]:
    """evaluation.json and annotators.json."""
    bins = [
        {"confidence": c, "accuracy": c - 0.03, "low": c - 0.06, "high": c, "pairs": 90.0} for c in (0.6, 0.75, 0.9)
    ]
    numbers = {"accuracy": 0.8, "accuracy_low": 0.7, "accuracy_high": 0.9, "confidence": 0.75, "pairs": 99}
    rest = {"scored": 0, "spearman": None, "spearman_low": None, "spearman_high": None}
    slices = [{"by": by, "value": hostile(i), **numbers, **rest} for i, by in enumerate(("source", "annotator"))]
    pairs = [{"prompt": hostile(i), "better": hostile(i + 1), "worse": hostile(i + 2), "gap": -1.5} for i in range(3)]
    people = [{"annotator": f"ann {hostile(1)}", "comparisons": 40, "right": 0.31, "low": 0.2, "high": 0.45}]
    people += [{"annotator": "bea", "comparisons": 50, "right": 0.93, "low": 0.85, "high": 0.98}]
    report = {"metrics": REWARD, "slices": slices, "reliability": bins, "pairs": pairs}
    files = {"evaluation.json": report, "annotators.json": {"annotators": people, "suspects": []}}
    return {name: json.dumps(value).encode() for name, value in files.items()}


def model(folder: Path, stage: str, metrics: dict[str, Any], files: dict[str, bytes] | None = None) -> None:
    lineage = json.loads((folder / stage / "lineage.json").read_text())
    content = {"weights.bin": b"", **(files or {})}
    storage.write_folder(folder / stage / "model", content, {"key": stage, "metrics": metrics, "lineage": lineage})


def sample(step: int, i: int) -> dict[str, Any]:
    """Sampled responses, and a greedy one."""
    if i == 2:
        return {"step": step, "prompt": hostile(i), "greedy": hostile(step), "before": hostile(3)}
    pieces = [hostile(n)[:24] for n in range(7)]
    numbers = [round(math.sin(step + n), 5) for n in range(7)]
    names = ("logprob", "reference", "kl", "value", "reward", "advantage", "return")
    tokens = {"ids": list(range(7)), "pieces": pieces, **dict.fromkeys(names, numbers)}
    line = {"step": step, "prompt": hostile(i), "text": "".join(pieces), "score": 0.12345678, "kl": 1.5}
    return {**line, "source_scores": {}, "finished": True, "after": 0.0, "tokens": tokens}


def evaluated() -> dict[str, bytes]:
    """report.json and all replies."""
    systems: dict[str, Any] = {}
    for name, gain in (("sft", 0.0), ("best of 16", 0.5), ("ppo", 0.9), ("other/ppo", 0.2)):
        ends = {"mean": gain, "low": gain - 0.1, "high": gain + 0.1}
        metrics = {"kl": 4 * gain, "length": 20.0, "finished": 0.99, "distinct_2": 0.8, "commonest_word": 0.1}
        systems[name] = metrics | {"reward": ends, "reward_gain": ends, "ridge": ends, "ridge_gain": ends}
    costs = {name: {"minutes": 1.25, "reward_minutes": 0.0, "peak_mib": 700.25} for name in systems}
    verdict = {"outcome": "PPO is better", "use": "PPO", "reasons": [hostile(0)], "methods": ["cheapest: PPO"]}
    replies = []
    for i in range(60):
        texts = {
            x: {"text": hostile(i + n), "finished": n != 2, "reward": 0.1, "ridge": i / 60 * n}
            for n, x in enumerate(systems)
        }
        replies.append({"prompt": f"prompt {i} {hostile(i)}", "replies": texts})
    frontier = [[1, 0.0, 0.0], [4, 0.64, 0.6], [16, 1.84, 1.1]]
    report = {"prompts": 60, "systems": systems, "costs": costs, "frontier": frontier, "verdict": verdict}
    lines = "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in replies).encode()
    return {"report.json": json.dumps(report).encode(), "replies.jsonl.gz": gzip.compress(lines, mtime=0)}
