"""The example's claim over several seeds: PPO raises the ridge judge, above best-of-16, within every guard at once.

    python examples/reviews-en/seeds.py 0 1 2

Trains the language model apart (guard.toml) and the recipe once per seed, skipping what is done, and prints one line a
claim. Exit 1 where a claim fails. An hour or less on two CPU cores for three seeds.
"""

import json
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
GUARD = "reviews-en-guard"


def tetrad(*words: str) -> None:
    subprocess.run([sys.executable, "-m", "tetrad", *words], check=True)


def report_of(seed: int) -> dict[str, Any]:
    """Runs the recipe with this seed and reads its report."""
    name = f"reviews-en-{seed}"
    referee = f"runs/{GUARD}/pretrain"
    overrides = ["--seed", str(seed), "--name", name, "--evaluate.referee", referee]
    tetrad("run", str(HERE / "recipe.toml"), *overrides)
    found: dict[str, Any] = json.loads(Path(f"runs/{name}/evaluate/report/report.json").read_text(encoding="utf-8"))
    return found


def claims(report: Mapping[str, Any]) -> dict[str, tuple[float, bool]]:
    """Each claim's figure, and whether it holds."""
    reward, systems = report["stages"]["reward"], report["systems"]
    sft, best, ppo = systems["sft"], systems["best of 16"], systems["ppo"]
    gain, distinct, length = ppo["ridge_gain"], ppo["distinct_2"] / sft["distinct_2"], ppo["length"] / sft["length"]
    nll = ppo["referee_nll"] / sft["referee_nll"]
    return {
        "RM Spearman >= 0.62": (reward["spearman"], reward["spearman"] >= 0.62),
        "RM pair accuracy >= 0.765": (reward["pair_accuracy"], reward["pair_accuracy"] >= 0.765),
        "RM calibration error <= 0.02": (reward["ece"], reward["ece"] <= 0.02),
        "ridge gain >= 0.9": (gain["mean"], gain["mean"] >= 0.9),
        "its lower bound > 0.6": (gain["low"], gain["low"] > 0.6),
        "above best-of-16's": (best["ridge_gain"]["mean"], gain["mean"] > best["ridge_gain"]["mean"]),
        "distinct-2 >= 0.85 of SFT's": (distinct, distinct >= 0.85),
        "length 0.75 to 1.25 of SFT's": (length, 0.75 <= length <= 1.25),
        "share ended not below SFT's": (ppo["ended"] - sft["ended"], ppo["ended"] >= sft["ended"]),
        "KL <= 7 nats": (ppo["kl"], ppo["kl"] <= 7),
        "commonest word in <= 0.2": (ppo["commonest_word"], ppo["commonest_word"] <= 0.2),
        "NLL apart <= 1.2 of SFT's": (nll, nll <= 1.2),
    }


def main() -> None:
    seeds = [int(word) for word in sys.argv[1:]] or [0, 1, 2]
    tetrad("run", str(HERE / "guard.toml"))
    found = {seed: claims(report_of(seed)) for seed in seeds}
    print(f"{'claim':<30}" + "".join(f"seed {seed:<9}" for seed in seeds))
    for name in found[seeds[0]]:
        shown = [f"{found[seed][name][0]:.3f} {'holds' if found[seed][name][1] else 'FAILS':<7}" for seed in seeds]
        print(f"{name:<30}" + " ".join(shown))
    sys.exit(not all(holds for table in found.values() for _, holds in table.values()))


if __name__ == "__main__":
    main()
