"""How near DPO, RLOO and GRPO come to an optimum that can be counted: the worlds of tests/learn, ten seeds of each.

    OMP_NUM_THREADS=1 python benchmarks/optimum.py >> benchmarks/results/optimum.jsonl       # four minutes of a core

A vocabulary of 6 and replies of 2 tokens: 36 replies. A line a method, distances in nats, seed by seed: `optimum` of
the learned policy to pi_ref exp(r / beta) / Z; `predicted` to where this very loss is still (for KL as a loss at each
token that is another place, `apart` from the first); `start` of the reference to the optimum.
"""

import json
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import torch

sys.path[:0] = [str(Path(__file__).parents[1] / "tests" / part) for part in ("", "learn")]

import test_dpo  # noqa: E402
import test_grpo  # noqa: E402

from tetrad.settings.grpo import Grpo  # noqa: E402

Row = tuple[float, float, float, float]
LONG = {"samples_per_prompt": 256, "steps": 100, "actor_lr": 1e-2}  # as in the tests, but with more replies


def dpo(seed: int) -> Row:
    reference, policy, rewards = test_dpo.learned(seed)
    goal = torch.log_softmax(reference + rewards, 0)
    gap = test_dpo.distance(policy, goal)
    return gap, gap, 0.0, test_dpo.distance(reference, goal)


def sampled(s: Grpo, seed: int) -> Row:
    spread = 0.4 if s.advantage == "normalised" else 1.0
    reference, actor, rewards = test_grpo.learned(s, seed, spread)
    price = test_grpo.predicted_std(reference, rewards) if s.advantage == "normalised" else 1.0
    optimum, goal = test_grpo.optimum(reference, rewards, 1.0), test_grpo.token_optimum(reference, rewards, price)
    goal = optimum if s.kl_in == "reward" else goal
    pairs = (actor, optimum), (actor, goal), (goal, optimum), (reference, optimum)
    return tuple(test_grpo.distance(*pair) for pair in pairs)  # type: ignore[return-value]


def methods() -> Iterator[tuple[str, Callable[[int], Row]]]:
    yield "DPO", dpo
    yield "RLOO", lambda seed: sampled(replace(test_grpo.RLOO, **LONG), seed)
    yield "GRPO, centred, k2", lambda seed: sampled(replace(test_grpo.SMALL, **LONG), seed)
    yield "GRPO, normalised, k2", lambda seed: sampled(replace(test_grpo.NORMALISED, **LONG), seed)


def main() -> None:
    for name, distances in methods():
        began = time.process_time()
        rows = [distances(seed) for seed in range(10)]
        columns = zip(("optimum", "predicted", "apart", "start"), zip(*rows, strict=True), strict=True)
        line = {each: [round(x, 4) for x in column] for each, column in columns}
        print(json.dumps({"method": name, **line, "seconds": round(time.process_time() - began)}), flush=True)


if __name__ == "__main__":
    main()
