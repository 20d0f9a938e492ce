"""Was PPO worth it? SFT, best of 16, DPO, RLOO, GRPO and PPO of an example of reviews in one table, over several seeds.

    python examples/worth.py reviews-en 0 1 2

Trains the language model apart (guard.toml) and, for each seed, the recipe with `[dpo]` and `[grpo]` beside `[ppo]`,
whose settings stand here, and RLOO in a run of its own that begins with the same models; what is done is skipped. All
answer the same prompts in one evaluation. Prints a Markdown table: the mean over seeds, and each seed's figure of the
judges.
"""

import json
import shutil
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

from seeds import HERE, tetrad

DPO = {
    "reviews-en": {"data": ["ranked.train.jsonl"], "loss": "plackett-luce", "epochs": 3, "lr": 1e-4},
    "reviews-zh": {"data": ["pairs.train.jsonl"], "epochs": 1, "lr": 1e-4},
}
SAMPLED = {  # by PPO and by groups alike: as many responses, the same rate, the same beta
    "reviews-en": {"steps": 100, "actor_lr": 1e-3, "kl_coef": 0.28, "entropy_coef": 0.0, "num_minibatches": 4},
    "reviews-zh": {"steps": 100, "actor_lr": 1e-3, "kl_coef": 0.28, "entropy_coef": 0.0, "num_minibatches": 4},
}
PPO = {"batch_size": 256, "ppo_epochs": 1, "gae_lambda": 0.3, "kl_target": 0.0}
GROUP = {"batch_size": 32, "samples_per_prompt": 8, "epochs": 1, "max_new_tokens": 64}
UNFINISHED = {"reviews-en": 2.5, "reviews-zh": 0.5}  # as in the recipe's [ppo]
RLOO = {"advantage": "leave_one_out", "kl_in": "reward", "loss_mean": "token"}
BEFORE = ("tokenizer", "pretrain", "sft", "reward")
FIGURES = ("kl", "length", "finished", "distinct_2", "commonest_word", "external_nll")


def flags(table: str, settings: Mapping[str, Any], data: Path) -> list[str]:
    """A table of a recipe as words of a command. Files are those of the example."""
    words = []
    for name, value in settings.items():
        files = json.dumps([str(data / file) for file in value]) if isinstance(value, list) else str(value)
        words += [f"--{table}.{name.replace('_', '-')}", files]
    return words


def group_settings(example: str) -> dict[str, Any]:
    """The table [grpo]."""
    files = {"prompts": ["prompts.train.jsonl"], "missing_eos_penalty": UNFINISHED[example]}
    return {**files, **SAMPLED[example], **GROUP}


def systems_of(example: str, seed: int) -> dict[str, dict[str, Any]]:
    """Runs all methods with this seed; each system's figures, with its minutes and memory."""
    run, group = Path(f"runs/{example}-worth-{seed}"), group_settings(example)
    data, recipe = HERE / example / "data", str(HERE / example / "recipe.toml")
    base = ["--seed", str(seed), "--evaluate.external-lm", f"runs/{example}-guard/pretrain"]
    both = [*base, "--name", run.name, *flags("dpo", DPO[example], data), *flags("grpo", group, data)]
    both += flags("ppo", SAMPLED[example] | PPO, data)
    for stage in (*BEFORE, "dpo", "grpo", "ppo"):
        tetrad(stage, recipe, *both)
    rloo = run.with_name(f"{run.name}-rloo")
    for stage in BEFORE:
        if not (rloo / stage).exists():
            shutil.copytree(run / stage, rloo / stage)
    tetrad("grpo", recipe, *base, "--name", rloo.name, *flags("grpo", group | RLOO, data))
    tetrad("evaluate", recipe, *both, "--evaluate.others", json.dumps([str((rloo / "grpo").resolve())]))
    report = json.loads((run / "evaluate/report/report.json").read_text(encoding="utf-8"))
    return {name: figures | report["costs"][name] for name, figures in report["systems"].items()}


def table(seeds: Sequence[Mapping[str, Mapping[str, Any]]]) -> list[str]:
    """Lines of Markdown, a system each."""
    gains = [name for name in seeds[0]["sft"] if name.endswith("_gain")]
    head = ["", *(f"{name.removesuffix('_gain')}, gained" for name in gains), *FIGURES, "minutes", "MiB"]
    lines = [" | ".join(head), " | ".join("---" for _ in head)]
    for system in seeds[0]:
        rows = [seed[system] for seed in seeds]
        cells = [system]
        for gain in gains:
            each = ", ".join(f"{row[gain]['mean']:+.2f}" for row in rows)
            cells.append(f"{fmean(row[gain]['mean'] for row in rows):+.2f} ({each})")
        cells += [f"{fmean(row[name] for row in rows):.3g}" for name in (*FIGURES, "minutes")]
        lines.append(" | ".join([*cells, f"{max(row['peak_mib'] or 0 for row in rows):.0f}"]))
    return [f"| {line} |" for line in lines]


def main() -> None:
    example, seeds = sys.argv[1], [int(word) for word in sys.argv[2:]] or [0, 1, 2]
    tetrad("run", str(HERE / example / "guard.toml"))
    print("\n".join(table([systems_of(example, seed) for seed in seeds])))


if __name__ == "__main__":
    main()
