"""The worth-it table's words: each method against SFT and best-of-N, the cheapest that holds the gain, what it took."""

import json
from collections.abc import Mapping, Sequence
from itertools import permutations
from pathlib import Path

import pytest

from tetrad import storage
from tetrad.report.verdict import Difference, Verdict
from tetrad.report.worth import Cost, compared
from tetrad.stages import names_of

BEST = "best of 16"
COSTS = {"sft": Cost(9.0), BEST: Cost(0.0, 5.0), "dpo": Cost(2.0), "grpo": Cost(8.0, 5.0), "ppo": Cost(20.0, 5.0)}


def sentences(
    means: Mapping[str, float], guards: Mapping[str, Sequence[str]] | None = None, costs: Mapping[str, Cost] = COSTS
) -> tuple[str, ...]:
    """means: of each system by its judge; a difference has a standard error of 0.05."""
    gains = {(a, b): {"ridge": Difference(means[a] - means[b], 0.05, 256)} for a, b in permutations(means, 2)}
    return compared(dict.fromkeys(means, ()) | dict(guards or {}), gains, costs)


ALL = {"sft": 0.0, BEST: 0.5, "dpo": 0.3, "grpo": 0.95, "ppo": 1.0}


def test_each_method_stands_against_sft_and_best_of_n() -> None:
    dpo, grpo, ppo, cheapest = sentences(ALL)
    assert dpo == (
        "DPO: better than SFT (ridge +0.30 [+0.20, +0.40]), worse than best of 16 (ridge -0.20 [-0.30, -0.10])"
    )
    assert grpo.startswith("GRPO: better than SFT (") and "better than best of 16" in grpo
    assert ppo.startswith("PPO: better than SFT (")
    assert cheapest == "cheapest that is not shown to be worse than another: GRPO, 13.0 minutes of training after SFT"


def test_the_cheapest_is_never_one_that_another_is_above() -> None:
    assert "another: PPO, 25.0 minutes" in sentences({**ALL, "grpo": 0.7})[-1]
    assert sentences({**ALL, "dpo": 0.96})[-1].endswith("DPO, 2.0 minutes of training after SFT")
    assert "DPO" not in sentences({**ALL, "dpo": 0.96}, {"dpo": ["kl is 31"]})[-1]


def test_best_of_n_costs_at_every_answer() -> None:
    last = sentences({**ALL, BEST: 0.98})[-1]
    assert "best of 16 (an answer costs 16 responses and their rewards), 5.0 minutes" in last
    assert last.endswith("; of those with one response an answer: GRPO, 13.0 minutes of training after SFT")


def test_nothing_gained_guards_and_what_is_not_known() -> None:
    assert sentences(dict.fromkeys(ALL, 0.0))[-1] == "no method is shown to be better than SFT"
    assert sentences(ALL, {"dpo": ["kl is 31", "x"]})[0].endswith("; not to be trusted: kl is 31")
    unknown = sentences(ALL, costs={**COSTS, "grpo": Cost(None), "ppo": Cost(20.0, None)})
    assert len(unknown) == 3 and not any("cheapest" in text for text in unknown)
    assert sentences({"sft": 0.0, "ppo": 1.0}) == ()  # one method: the verdict has said it


def test_what_a_stage_took(tmp_path: Path) -> None:
    """A step that a stop repeated counts once, a line that is being written not at all; the reward model is a cost."""
    rows = [{"step": 0, "seconds": 60, "peak_mib": 5}, {"step": 1, "seconds": 99, "peak_mib": 9}]
    rows += [{"step": 1, "seconds": 30, "peak_mib": 7}]
    for stage, lines in (("ppo", rows), ("reward", rows[:1])):
        lineage = {"parents": {"reward": {"folder": str(tmp_path / "reward/model")}} if stage == "ppo" else {}}
        storage.write_folder(tmp_path / stage / "model", {"a.bin": b""}, {"lineage": lineage})
        text = "".join(json.dumps(line) + "\n" for line in lines) + '{"step": 2, "sec'
        (tmp_path / stage / "timing.jsonl").write_text(text)
    assert Cost.of(tmp_path / "ppo/model") == Cost(1.5, 1.0, 7)
    assert Cost.of(tmp_path / "ppo/model").total == 2.5
    assert Cost.of(tmp_path / "reward/model") == Cost(1.0, 0.0, 5)
    assert Cost.of(tmp_path / "nowhere/model") == Cost(None, 0.0, None)


@pytest.mark.parametrize(
    ("folders", "names"),
    [
        (["runs/a/ppo", "./runs/b/ppo/"], ["a/ppo", "b/ppo"]),
        (["x/runs/a/ppo/model", "y/runs/a/ppo"], ["x/runs/a/ppo", "y/runs/a/ppo"]),
        (["ppo"], ["./ppo"]),  # not the role of this run
        ([], []),
    ],
)
def test_other_runs_are_named_by_the_end_of_their_path(folders: list[str], names: list[str]) -> None:
    assert list(names_of(folders)) == names and list(names_of(folders).values()) == folders


def test_a_report_from_before_the_methods_is_still_read() -> None:
    old = {"outcome": "PPO is better", "use": "PPO", "reasons": ["x"]}
    assert Verdict.read(old) == Verdict("PPO is better", "PPO", ("x",))
    assert Verdict.read({**old, "methods": ["m"]}).lines()[1] == "method     m"
