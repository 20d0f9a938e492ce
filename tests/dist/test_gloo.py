"""Two processes make the same steps as one, and only because they really speak to each other."""

import math
from contextlib import suppress
from functools import cache

import pytest
import torch

import toys
from dist.jobs import BATCH, JOBS, NARROW, STEPS, Found, Killed, collected, narrow, stage, weights
from dist.workers import ROOT, pair

pytestmark = pytest.mark.dist


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Found]]:
    """What both processes found."""
    folder = tmp_path_factory.mktemp("gloo")
    with suppress(Killed):
        stage(folder / "of one", kill=7)
    workers = pair(str(ROOT / "tests/dist/jobs.py"), str(folder))
    try:
        said = [worker.communicate(timeout=400)[1] for worker in workers]
    finally:
        for worker in workers:
            worker.kill()
    assert [worker.returncode for worker in workers] == [0, 0], said
    results = [torch.load(folder / f"{rank}.pt") for rank in range(2)]
    return [{**result, "one of two": stage(folder / "for one")} for result in results[:1]] + results[1:]


@cache
def of_one_process(job: str) -> Found:
    return JOBS[job]()


def relative(a: torch.Tensor, b: torch.Tensor) -> float:
    return float((a - b).norm() / b.norm())


@pytest.mark.parametrize("sharded", ["", ", sharded"])
@pytest.mark.parametrize("job", JOBS)
def test_two_are_one(ranks: list[dict[str, Found]], job: str, sharded: str) -> None:
    """Losses, terms and gradient norms of every step, and the weights after five: 1e-5 relative."""
    alone = of_one_process(job)
    job += sharded
    for found in ranks:
        together = found[job]
        assert together.keys() == alone.keys()
        assert relative(together["weights"], alone["weights"]) <= 1e-5
        if "figures" in alone:
            assert len(alone["figures"]) == STEPS
            torch.testing.assert_close(together["figures"], alone["figures"], rtol=1e-5, atol=1e-6)
        if "replies" in alone:
            assert torch.equal(together["replies"], alone["replies"])
    assert torch.equal(ranks[0][job]["weights"], ranks[1][job]["weights"])


@pytest.mark.parametrize("job", NARROW)
def test_bfloat16_travels(ranks: list[dict[str, Found]], job: str) -> None:
    """Blocks are gathered in 16 bit, weights and gradients stay in 32: two are one as far as that goes, and no
    farther."""
    with narrow():
        alone = JOBS[job]()
    for found in ranks:
        together, wide = found[f"{job}, sharded, narrow"], found[f"{job}, sharded"]
        assert relative(together["weights"], alone["weights"]) <= 5e-3
        torch.testing.assert_close(together["figures"][:, :2], alone["figures"][:, :2], rtol=0.03, atol=0)
        assert (together["figures"][0] - wide["figures"][0]).abs().max() > 1e-5
        assert found["gathered"]["bits"].tolist() == [16, 32, 32]
    assert torch.equal(ranks[0][f"{job}, sharded, narrow"]["weights"], ranks[1][f"{job}, sharded, narrow"]["weights"])


def test_five_steps_are_a_long_way(ranks: list[dict[str, Found]]) -> None:
    """The weights move by far more than the tolerance, else equality would say nothing."""
    assert relative(weights(toys.causal(seed=1)), ranks[0]["sft"]["weights"]) > 1e-2


def test_whitening_spans_the_ranks(ranks: list[dict[str, Found]]) -> None:
    """Advantages have mean 0 and variance 1 over the rows of both, not of each."""
    alone = of_one_process("ppo")["advantages"]
    assert alone.shape[:2] == (STEPS, BATCH)
    for found in ranks:
        torch.testing.assert_close(found["ppo"]["advantages"], alone, rtol=1e-4, atol=1e-5)
    mine = [alone[0, rank::2][alone[0, rank::2] != 0] for rank in range(2)]
    assert abs(float(torch.cat(mine).mean())) < 1e-6
    assert max(abs(float(part.mean())) for part in mine) > 1e-2
    apart = ranks[0]["ppo without sum_tensor"]["advantages"]
    assert (apart - alone).abs().max() > 1e-2


@pytest.mark.parametrize("broken", ["GradientSum", "sum_counts"])
@pytest.mark.parametrize("job", ["sft", "reward", "dpo", "ppo", "grpo"])
def test_without_its_collectives_it_goes_wrong(ranks: list[dict[str, Found]], job: str, broken: str) -> None:
    """The gradients are really summed: where they are not, the processes part, or leave the one process's way."""
    alone = of_one_process(job)["weights"]
    found = [rank[f"{job} without {broken}"]["weights"] for rank in ranks]
    assert max(relative(part, alone) for part in found) > 1e-4
    if broken == "GradientSum":
        assert relative(*found) > 1e-4


def test_gradients_travel_in_buckets(ranks: list[dict[str, Found]]) -> None:
    """All of them during the last backward, and the sums are those of tensors one by one, to the bit."""
    for found in (rank["collectives"] for rank in ranks):
        assert torch.equal(found["summed"], found["one by one"])
        buckets, *sent = found["buckets"].tolist()
        assert buckets > 5
        assert sent[:-1] == [0] * (len(sent) - 1)
        assert sent[-1] == buckets


def test_collectives(ranks: list[dict[str, Found]]) -> None:
    first, second = (rank["collectives"] for rank in ranks)
    assert first["rank"].tolist() == [0, 2, 1]
    assert second["rank"].tolist() == [1, 2, 0]
    assert first["share"].tolist() == [0, 2, 4]
    assert second["share"].tolist() == [1, 3]
    assert torch.equal(first["weights"], weights(toys.causal(seed=0)))
    for found in (first, second):
        assert found["gather"].tolist() == [0, 1, 2, 3, 4]
        assert found["counts"].tolist() == [2.0, 21.0]
        assert found["sum"].tolist() == [2.0, 1.0]
        assert found["any"].tolist() == [False, True, True]
        assert found["gradient"].tolist() == [[3.0, 4.0]]
        assert found["unused"].item()
        assert found["floats"].tolist() == [0.1, 1.1, 1 / 3, 1 / 3, math.inf, math.inf]  # to the bit
        assert found["first"].item() == 0
        assert torch.equal(found["weights"], first["weights"])


def test_checkpoints_of_a_sharded_model(ranks: list[dict[str, Found]]) -> None:
    """Killed and resumed, to the bit; saved by two and read by one, or the reverse, to 1e-6, and announced."""
    for found in ranks:
        assert (found["stage whole"]["begun"], found["stage resumed"]["begun"]) == (0, 5)
        assert torch.equal(found["stage resumed"]["weights"], found["stage whole"]["weights"])
        assert found["stage resumed"]["notes"] == 0
    for found, name in ((ranks[0], "one of two"), (ranks[0], "stage of one"), (ranks[1], "stage of one")):
        assert (found[name]["begun"], found[name]["notes"]) == (5, 1)
        assert relative(found[name]["weights"], ranks[0]["stage whole"]["weights"]) <= 1e-6


def test_a_process_holds_its_share(ranks: list[dict[str, Found]]) -> None:
    """Of parameters and optimizer state."""
    for found in ranks:
        assert found["stage whole"]["held"] <= 0.51 * ranks[0]["one of two"]["held"]


def test_collected(ranks: list[dict[str, Found]]) -> None:
    """What is exported is to the bit what was sharded, adapters included."""
    alone = collected()
    assert torch.equal(ranks[0]["collected"]["weights"], alone["weights"])
    assert torch.equal(ranks[0]["collected"]["outputs"], alone["outputs"])
    assert ranks[1]["collected"]["without memory"].all()
