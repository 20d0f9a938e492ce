"""What the two examples of reviews claim, over several seeds: PPO raises the judges, above best-of-16, in every guard.

    python examples/seeds.py reviews-en 0 1 2

Trains the language model apart (guard.toml) and the recipe once per seed, skipping what is done, and prints one line a
claim. Exit 1 where a claim fails. With one thread a seed of reviews-en takes 35 minutes.
"""

import json
import math
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
AT_LEAST = {  # of each example: the reward model's figures on its test records, and PPO's gain by each judge
    "reviews-en": {"spearman": 0.62, "pair_accuracy": 0.765, "ridge_gain": 0.9, "lexicon_gain": 0.0},
    "reviews-zh": {"pair_accuracy": 0.86, "linear_gain": 0.6},
}
AT_MOST = {"reviews-en": {"ece": 0.02, "commonest_word": 0.2}, "reviews-zh": {}}
LOWER_BOUND = 2 / 3  # of a gain's least: where its 95 % interval has to begin


def tetrad(*words: str) -> None:
    subprocess.run([sys.executable, "-m", "tetrad", *words], check=True)


def report_of(example: str, seed: int) -> dict[str, Any]:
    """Runs the recipe with this seed and reads its report; `alarms`: the iterations of PPO with one."""
    run = Path(f"runs/{example}-{seed}")
    overrides = ["--seed", str(seed), "--name", run.name, "--evaluate.external-lm", f"runs/{example}-guard/pretrain"]
    tetrad("run", str(HERE / example / "recipe.toml"), *overrides)
    found: dict[str, Any] = json.loads((run / "evaluate/report/report.json").read_text(encoding="utf-8"))
    iterations = (run / "ppo/metrics.jsonl").read_text(encoding="utf-8").splitlines()
    return found | {"alarms": sum(json.loads(line)["alarms"] > 0 for line in iterations)}


def claims(report: Mapping[str, Any], example: str) -> dict[str, tuple[float, bool]]:
    """Each claim's figure, and whether it holds."""
    reward, systems = report["stages"]["reward"], report["systems"]
    sft, best, ppo = systems["sft"], systems["best of 16"], systems["ppo"]
    found = {}
    for name, most in AT_MOST[example].items():
        figure = reward[name] if name in reward else ppo[name]
        found[f"{'RM' if name in reward else 'PPO'} {name} <= {most:g}"] = (figure, figure <= most)
    for name, least in AT_LEAST[example].items():
        if name in reward:
            found[f"RM {name} >= {least:g}"] = (reward[name], reward[name] >= least)
            continue
        gain, other = ppo[name], best[name]["mean"]
        found[f"{name} >= {least:g}"] = (gain["mean"], gain["mean"] >= least)
        found[f"{name}, lower bound > {LOWER_BOUND * least:.2g}"] = (gain["low"], gain["low"] > LOWER_BOUND * least)
        found[f"{name} above best of 16's"] = (other, gain["mean"] > other)
    distinct, length = ppo["distinct_2"] / sft["distinct_2"], ppo["length"] / sft["length"]
    perplexity, finished = math.exp(ppo["external_nll"] - sft["external_nll"]), ppo["finished"] - sft["finished"]
    return found | {
        "distinct-2 >= 0.85 of SFT's": (distinct, distinct >= 0.85),
        "length 0.75 to 1.25 of SFT's": (length, 0.75 <= length <= 1.25),
        "share ended not below SFT's": (finished, finished >= 0),
        "perplexity apart <= 1.5 of SFT's": (perplexity, perplexity <= 1.5),
        "KL <= 7 nats": (ppo["kl"], ppo["kl"] <= 7),
        "alarms = 0": (report["alarms"], report["alarms"] == 0),
    }


def main() -> None:
    example, seeds = sys.argv[1], [int(word) for word in sys.argv[2:]] or [0, 1, 2]
    tetrad("run", str(HERE / example / "guard.toml"))
    found = {seed: claims(report_of(example, seed), example) for seed in seeds}
    print(f"{'claim':<36}" + "".join(f"seed {seed:<9}" for seed in seeds))
    for name in found[seeds[0]]:
        shown = [f"{found[seed][name][0]:.3f} {'holds' if found[seed][name][1] else 'FAILS':<7}" for seed in seeds]
        print(f"{name:<36}" + " ".join(shown))
    sys.exit(not all(holds for table in found.values() for _, holds in table.values()))


if __name__ == "__main__":
    main()
