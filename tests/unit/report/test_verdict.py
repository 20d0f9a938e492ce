"""The verdict as a table of cases, its intervals against known quantiles and by their coverage."""

import random
from collections.abc import Mapping, Sequence
from itertools import permutations
from statistics import fmean

import pytest

from tetrad.report.verdict import (
    Difference,
    SystemMetrics,
    Verdict,
    failed_guards,
    is_better,
    t_quantile,
    unevaluated,
    verdict,
)
from tetrad.settings.evaluate import Evaluate

BEST = "best of 16"
COST = "best of 16 (an answer costs 16 responses and their rewards)"


def gains(means: Mapping[str, Mapping[str, float]], count: int = 256) -> dict[tuple[str, str], dict[str, Difference]]:
    """means: of each system by judge; a difference has a standard error of 0.05."""
    judges = next(iter(means.values()))
    return {
        (a, b): {j: Difference(means[a][j] - means[b][j], 0.05, count) for j in judges}
        for a, b in permutations(means, 2)
    }


def concluded(
    *means: Sequence[float],
    faults: Sequence[str] = (),
    guards: Mapping[str, Sequence[str]] | None = None,
    names: Sequence[str] = ("sft", BEST, "ppo"),
    count: int = 256,
) -> Verdict:
    """means: a row a system, a column a judge."""
    table = {name: {f"judge{i}": x for i, x in enumerate(row)} for name, row in zip(names, means, strict=True)}
    found = verdict(faults, dict.fromkeys(names, ()) | dict(guards or {}), gains(table, count))
    assert found
    return found


CASES = [
    ("PPO gains most", concluded([0], [0.5], [1.3]), "PPO is better", "PPO"),
    ("best of 16 gains more", concluded([0], [1.5], [1.3]), "PPO is better", COST),
    ("one judge of two", concluded([0, 0], [0, 0], [1, 0]), "PPO is better", "PPO"),
    ("nothing", concluded([0], [0], [0.05]), "no difference shown", "SFT"),
    ("best of 16 alone", concluded([0], [0.5], [0.05]), "no difference shown", COST),
    ("the judges disagree", concluded([0, 0], [0, 0], [1, -1]), "no difference shown", "SFT"),
    ("a judge that falls alone", concluded([0, 0], [0, 0], [1, -0.105]), "no difference shown", "SFT"),
    ("not at the level of both", concluded([0, 0], [0, 0], [0.105, 0]), "no difference shown", "SFT"),
    ("at the level of one", concluded([0], [0], [0.105]), "PPO is better", "PPO"),
    ("no judge", concluded([], [], []), "no difference shown", "SFT"),
    ("few prompts", concluded([0], [0], [9], count=7), "no difference shown", "SFT"),
    ("worse", concluded([0], [0], [-1]), "not to be trusted", "SFT"),
    ("gate", concluded([0], [0], [1], faults=["gate: x"]), "not to be trusted", "SFT"),
    ("gate, best of 16 gains", concluded([0], [1], [1], faults=["gate: x"]), "not to be trusted", COST),
    ("guard", concluded([0], [0], [1], guards={"ppo": ["kl"]}), "not to be trusted", "SFT"),
    ("best of 16's guard", concluded([0], [2], [1], guards={BEST: ["length"]}), "PPO is better", "PPO"),
    ("no PPO", concluded([0], [1], names=("sft", BEST)), "best of 16 is better", COST),
    ("no PPO, nothing", concluded([0], [0], names=("sft", BEST)), "no difference shown", "SFT"),
    ("no PPO, gate", concluded([0], [1], names=("sft", BEST), faults=["gate: x"]), "not to be trusted", "SFT"),
    ("no best of 16, nothing", concluded([0], [0], names=("sft", "ppo")), "no difference shown", "SFT"),
    ("no best of 16", concluded([0], [1], names=("sft", "ppo")), "PPO is better", "PPO"),
]


@pytest.mark.parametrize(("found", "outcome", "use"), [case[1:] for case in CASES], ids=[case[0] for case in CASES])
def test_each_case(found: Verdict, outcome: str, use: str) -> None:
    assert (found.outcome, found.use) == (outcome, use)
    assert found.lines()[-1] == f"verdict    {outcome}: use {use}"


def test_reasons() -> None:
    """Faults first, then the evidence; who disagrees, what is missing and what makes best-of-N the choice is said."""
    found = concluded([0], [0.5], [0.2], faults=["gate: x"], guards={"ppo": ["kl is 31"]})
    assert found.reasons == (
        "gate: x",
        "PPO: kl is 31",
        "judge0: PPO less SFT is +0.20 [+0.10, +0.30]",
        "judge0: best of 16 less SFT is +0.50 [+0.40, +0.60]",
    )
    assert concluded([0, 0], [0, 0], [1, -1]).reasons[0] == "the judges disagree"
    assert concluded([0], [0], [-1]).reasons[0] == "the judges put PPO below SFT"
    assert "no independent judge" in concluded([], [], []).reasons[0]
    assert "7 prompts are too few" in concluded([0], [0], [9], count=7).reasons[0]
    assert verdict([], {"sft": ()}, {}) is None


def test_before_an_evaluation() -> None:
    assert str(unevaluated([], "add [evaluate]")) == "not evaluated"
    assert str(unevaluated(["gate: x"], "add [evaluate]")) == "not to be trusted: use SFT"


SOUND = {"kl": 5.9, "length": 21.8, "finished": 0.996, "distinct_2": 0.77, "commonest_word": 0.22, "external_nll": 5.41}
PLAIN = {
    "kl": 0.0,
    "length": 21.1,
    "finished": 0.996,
    "distinct_2": 0.855,
    "commonest_word": 0.07,
    "external_nll": 5.64,
}


def failed(system: Mapping[str, float | None], sft: Mapping[str, float | None], s: Evaluate | None = None) -> list[str]:
    return failed_guards(SystemMetrics.read(system), SystemMetrics.read(sft), s or Evaluate())


def test_the_examples_pass_the_guards() -> None:
    """The last row is the seed that comes closest to a limit, with more than half of its answers in one word."""
    assert failed(SOUND, PLAIN) == failed(PLAIN, PLAIN) == []
    assert failed({**SOUND, "commonest_word": 0.52}, {**PLAIN, "commonest_word": 0.06}) == []


@pytest.mark.parametrize(
    ("fault", "said"),
    [
        ({"kl": 20.1}, "kl is 20.1, SFT's 0 (evaluate.max_kl = 20.0)"),
        ({"length": 32.0}, "length is 32, SFT's 21.1 (evaluate.length_range = [0.5, 1.5])"),
        ({"length": 10.0}, "length is 10"),
        ({"finished": 0.6}, "finished is 0.6"),
        ({"distinct_2": 0.59}, "distinct_2 is 0.59"),
        ({"commonest_word": 0.6}, "commonest_word is 0.6"),
        ({"external_nll": 6.1}, "external_nll is 6.1, SFT's 5.64 (evaluate.max_perplexity = 1.5)"),
    ],
)
def test_each_guard(fault: dict[str, float], said: str) -> None:
    (found,) = failed({**SOUND, **fault}, PLAIN)
    assert found.startswith(said)
    loose = Evaluate(
        max_kl=99, length_range=(0, 9), min_finished=0, min_distinct_2=0, max_common_word=1, max_perplexity=9
    )
    assert failed({**SOUND, **fault}, PLAIN, loose) == []


def test_what_was_not_measured_fails_no_guard() -> None:
    without = {name: value for name, value in SOUND.items() if name != "external_nll"}
    assert failed(without, PLAIN) == []
    assert failed({**SOUND, "external_nll": 99.0}, {**PLAIN, "external_nll": None}) == []


def test_quantiles_of_t() -> None:
    """From published tables."""
    for share, freedom, expected in (
        (0.975, 7, 2.3646),
        (0.975, 30, 2.0423),
        (0.9875, 10, 2.6338),
        (0.995, 7, 3.4995),
        (0.999, 15, 3.7328),
    ):
        assert t_quantile(share, freedom) == pytest.approx(expected, rel=1e-3)


@pytest.mark.parametrize(("count", "judges"), [(8, 1), (16, 2), (64, 3)])
def test_where_there_is_no_difference_few_are_called_better(count: int, judges: int) -> None:
    """2.5 % of 2,000 evaluations, whatever the number of prompts and judges; scores are skewed, as counts of words."""
    draw = random.Random(count)

    def scores() -> list[float]:
        return [float(sum(draw.random() < 0.3 for _ in range(4))) for _ in range(count)]

    called = fmean(is_better({str(j): Difference.of(scores(), scores()) for j in range(judges)}) for _ in range(2000))
    assert called <= 0.035
