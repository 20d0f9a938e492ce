"""Was PPO worth it? SFT, best of 16, DPO, RLOO, GRPO and PPO of an example of reviews in one table, over several seeds.

    python examples/worth.py reviews-en 0 1 2

Trains the language model apart (guard.toml) and, for each seed, the recipe with `[dpo]` and `[grpo]` beside its
`[ppo]`, and RLOO in a run of its own that begins with the same models; what is done is skipped. All answer the same
prompts in one evaluation. Prints a Markdown table: the mean over seeds, and each seed's figure of the judges.
"""

import json
import shutil
import sys
import tomllib
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

from seeds import HERE, tetrad

DPO = {
    "reviews-en": {"data": ["ranked.train.jsonl"], "loss": "plackett-luce", "epochs": 3, "lr": 3e-4},
    "reviews-zh": {"data": ["pairs.train.jsonl"], "epochs": 1, "lr": 1e-4},
}
SAMPLES_PER_PROMPT = 8
# Fixed, the rest is that of the recipe's PPO. RLOO has KL in the reward as PPO has it; in GRPO's loss k3's gradient is
# that of the forward KL, which hardly pulls where the policy has gone far: the same beta would let it go twice as far.
KL_COEF = {"reviews-en": {"grpo": 0.4, "rloo": 0.19}, "reviews-zh": {"grpo": 0.2, "rloo": 0.1}}
SHARED = ("steps", "num_minibatches", "actor_lr", "max_new_tokens", "missing_eos_penalty")
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


def group_settings(example: str, method: str) -> dict[str, Any]:
    """The table [grpo]: as many responses as PPO has, updates, and its rate."""
    ppo = tomllib.loads((HERE / example / "recipe.toml").read_text(encoding="utf-8"))["ppo"]
    table = {"prompts": ["prompts.train.jsonl"], **{name: ppo[name] for name in SHARED}}
    table |= {"batch_size": ppo["batch_size"] // SAMPLES_PER_PROMPT, "samples_per_prompt": SAMPLES_PER_PROMPT}
    table |= {"epochs": ppo["ppo_epochs"], "kl_coef": KL_COEF[example][method]}
    return table | RLOO if method == "rloo" else table


def systems_of(example: str, seed: int) -> dict[str, dict[str, Any]]:
    """Runs all methods with this seed; each system's figures, with its minutes and memory."""
    run = Path(f"runs/{example}-worth-{seed}")
    data, recipe = HERE / example / "data", str(HERE / example / "recipe.toml")
    base = ["--seed", str(seed), "--evaluate.external-lm", f"runs/{example}-guard/pretrain"]
    both = [*base, "--name", run.name, *flags("dpo", DPO[example], data)]
    both += flags("grpo", group_settings(example, "grpo"), data)
    for stage in (*BEFORE, "dpo", "grpo", "ppo"):
        tetrad(stage, recipe, *both)
    rloo = run.with_name(f"{run.name}-rloo")
    for stage in BEFORE:
        if not (rloo / stage).exists():
            shutil.copytree(run / stage, rloo / stage)
    tetrad("grpo", recipe, *base, "--name", rloo.name, *flags("grpo", group_settings(example, "rloo"), data))
    tetrad("evaluate", recipe, *both, "--evaluate.others", json.dumps([str((rloo / "grpo").resolve())]))
    report = json.loads((run / "evaluate/report/report.json").read_text(encoding="utf-8"))
    return named(report)


def named(report: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """Each system's figures with its costs; RLOO, of a run of its own for each seed, under one name for all."""
    names = {system: "rloo" if system.endswith("-rloo/grpo") else system for system in report["systems"]}
    return {names[system]: figures | report["costs"][system] for system, figures in report["systems"].items()}


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
