"""Trackers of tests, for their process: what each was given is in the lines of its folder's file `seen`."""

import json
import os
import sys
import time
from collections.abc import Callable

from tetrad.tracking.sinks import Place, Sink


def note(place: Place, *words: object) -> None:
    with (place.folder / "seen").open("a") as file:
        file.write(json.dumps(words) + "\n")


def good(place: Place) -> Sink:
    note(place, "open", place.stage, place.step, os.getpid(), "torch" in sys.modules, os.nice(0))
    return Sink(
        lambda step, numbers: note(place, "metrics", step, numbers),
        lambda step, texts: note(place, "samples", step, [json.loads(text) for text in texts]),
        lambda finished: note(place, "close", place.stage, finished),
    )


def broken(_: Place) -> Sink:
    raise SystemExit("no network")


def hanging(_: Place) -> Sink:
    time.sleep(60)
    raise AssertionError


def breaking(_: Place) -> Sink:
    return Sink(lambda step, numbers: 1 / (step - 1), lambda *_: None, lambda _: None)


def dying(_: Place) -> Sink:
    print("Aaargh")
    os._exit(3)


def frozen(place: Place) -> Sink:
    """A long call that gives Python's lock to nobody."""
    note(place, "frozen")
    sum(range(10**10))
    raise AssertionError


def slow(seconds: float) -> Callable[[Place], Sink]:
    def open_run(place: Place) -> Sink:
        def metrics(step: int, numbers: dict[str, float]) -> None:
            time.sleep(seconds)
            note(place, "metrics", step, numbers)

        return Sink(metrics, lambda *_: None, lambda _: note(place, "close", place.stage))

    return open_run


def importing(place: Place) -> Sink:
    """Computes for a while, as imports do."""
    until = time.process_time() + 1.5
    while time.process_time() < until:
        pass
    return good(place)


SINKS = {
    "good": good,
    "other": good,
    "broken": broken,
    "hanging": hanging,
    "breaking": breaking,
    "dying": dying,
    "frozen": frozen,
    "slow": slow(0.1),
    "importing": importing,
}
