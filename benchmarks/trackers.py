"""What each tracker costs a run, in seconds.

    python examples/reviews-en/fetch.py
    python benchmarks/trackers.py [--rounds 3] [--trackers wandb mlflow] >> results.jsonl

`tetrad run` of example A's quick recipe, in turn without a tracker and with each that is installed, each in a process
of its own. One JSON line each: the medians of the command's seconds and of the processor's seconds (all threads, and
the tracker's own processes), and what is more than without: each round's difference, and their median.
"""

import argparse
import importlib.util
import json
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import median

RECIPE = Path(__file__).parent.parent / "examples/reviews-en/quick.toml"
TRACKERS = ("tensorboard", "wandb", "swanlab", "trackio", "mlflow")


def processor() -> float:
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def run(tracker: str) -> tuple[float, float]:
    """The seconds of the whole command, and of processors."""
    names = f'["{tracker}"]' if tracker else "[]"
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "tetrad", "run", RECIPE, "--run.out", folder, "--run.trackers", names]
        began, used = time.monotonic(), processor()
        subprocess.run(list(map(str, command)), check=True, capture_output=True)
        return time.monotonic() - began, processor() - used


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    installed = [name for name in TRACKERS if importlib.util.find_spec(name)]
    parser.add_argument("--trackers", nargs="*", default=installed)
    given = parser.parse_args()
    ways = ["", *given.trackers]
    orders = [ways, ways[::-1]]  # in turn: the machine may get slower meanwhile
    rounds = [{way: run(way) for way in orders[number % 2]} for number in range(given.rounds)]
    for way in ways:
        line: dict[str, object] = {"tracker": way or "none", "rounds": given.rounds}
        for number, name in enumerate(("seconds", "processor")):
            line[name] = round(median(times[way][number] for times in rounds), 2)
            differences = [round(times[way][number] - times[""][number], 2) for times in rounds]
            line |= {f"more {name}": round(median(differences), 2), f"each {name}": differences}
        print(json.dumps(line), flush=True)


if __name__ == "__main__":
    main()
