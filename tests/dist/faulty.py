"""A rank that fails in one way or another, as a program: `faulty.py CASE RANK`, with the environment that torchrun
sets."""

import os
import signal
import sys
import time
from dataclasses import replace

import torch

import toys
from dist.workers import alive
from tetrad.cli.main import _report
from tetrad.distributed import collectives, sharding, watchdog
from tetrad.errors import Stopped
from tetrad.settings.common import Optim
from tetrad.training.batches import language_micros
from tetrad.training.optimizer import Optimizer
from tetrad.training.step import language_terms, update

PATIENCE = 6.0


def faulty() -> bool:
    return collectives.rank() == int(sys.argv[2])


def step(model, optimizer, documents):
    update(model, optimizer, language_micros(documents, 64, toys.CPU), language_terms, toys.CPU)


def not_finite(model, optimizer, documents):
    """A loss that is NaN on one rank alone, in its second micro-batch: ids of the last document meet a bad row."""
    if faulty():
        documents = [*documents[:1], toys.document([39, 39, 39], where="bad.jsonl:7"), *documents[2:]]
    step(model, optimizer, documents)


def one_step_more(model, optimizer, documents):
    """The faulty rank takes a step in which the other has no part; that one has waited longest, and says so."""
    step(model, optimizer, documents)
    if faulty():
        time.sleep(2)
        step(model, optimizer, documents)
    collectives.barrier()


def raises(model, optimizer, documents):
    """Neither a mistake of the user nor of a collective."""
    if faulty():
        raise KeyError("only here")
    step(model, optimizer, documents)


def killed(*_):
    """The faulty rank is gone; the other is asked to stop, as the launcher does then."""
    here = collectives.all_gather(os.getpid())
    if faulty():
        os.kill(os.getpid(), signal.SIGKILL)
    while alive(here[int(sys.argv[2])]):
        time.sleep(0.1)
    raise Stopped("in sft; the same command goes on from there")


def stopped(*_):
    """The faulty rank stops for good when the other is done."""
    collectives.barrier()
    if faulty():
        os.kill(os.getpid(), signal.SIGSTOP)


def main(case: str) -> int:
    torch.set_num_threads(1)
    watchdog.join(PATIENCE, _report)
    collectives.start("cpu", "sft")
    model = toys.causal(seed=1, tied=False)
    if case.startswith("nan"):
        with torch.no_grad():
            model.model.embed_tokens.weight[39] = torch.nan
    if case == "nan, sharded":
        toys.CPU = replace(toys.CPU, shard="full")
        sharding.place(model, toys.CPU)
    documents = [toys.document([5, 6, 7, 8], where=f"rank{collectives.rank()}.jsonl:{i}") for i in range(40)]
    try:
        cases = {
            "nan": not_finite,
            "nan, sharded": not_finite,
            "more": one_step_more,
            "raises": raises,
            "killed": killed,
            "stopped": stopped,
        }
        cases[case](model, Optimizer(model, 1e-3, Optim()), documents)
    except BaseException as error:
        return _report(error)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
