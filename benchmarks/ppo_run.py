"""One picture of a run of PPO: score and KL over the iterations, and SFT, best-of-N and PPO by each judge.

    pip install -c constraints.txt -e ".[bench]"
    python benchmarks/ppo_run.py RUN docs/ppo-run.svg --judge ridge

RUN: the folder of a run that was evaluated, runs/reviews-en; read are ppo/metrics.jsonl and evaluate/report/report.json
(docs/output.md explains both). The bars' ends are the report's 95 % intervals. Equal files give equal bytes of SVG.
`keep RUN FOLDER` copies of the two files what the picture shows: benchmarks/results/reviews-en-0 is the run that README
shows, so `python benchmarks/ppo_run.py benchmarks/results/reviews-en-0 docs/ppo-run.svg --judge ridge` draws it again.
"""

import argparse
import json
import sys
from pathlib import Path
from typing import Any

METRICS, REPORT = "ppo/metrics.jsonl", "evaluate/report/report.json"
CURVES = {"score": "reward model's score", "kl": "KL to the SFT model, nats a response"}
COLOURS = ("#8c8c8c", "#4878a8", "#c44e52")  # SFT, best of N, PPO
STYLE = {
    "svg.hashsalt": "tetrad",
    "svg.fonttype": "none",
    "font.sans-serif": ["DejaVu Sans", "Verdana", "Arial"],
    "font.size": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.titlesize": 9,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": "#e6e6e6",
}


def read(run: Path) -> tuple[list[dict[str, float]], dict[str, dict[str, Any]]]:
    """Metrics of each iteration, and the systems of the report by name, in its order."""
    lines = (run / METRICS).read_text(encoding="utf-8").splitlines()
    report = json.loads((run / REPORT).read_text(encoding="utf-8"))
    return [json.loads(line) for line in lines], report["systems"]


def keep(run: Path, folder: Path, judges: list[str]) -> None:
    """Writes what `draw` reads of a run, and no more, into a folder of the same shape."""
    metrics, systems = read(run)
    rows = [json.dumps({name: row[name] for name in ("step", *CURVES)}) for row in metrics]
    names = ["kl", "reward", *judges, *(f"{judge}_gain" for judge in judges)]
    kept = {system: {name: figures[name] for name in names} for system, figures in systems.items()}
    for name, text in ((METRICS, "\n".join(rows)), (REPORT, json.dumps({"systems": kept}, indent=1))):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text + "\n", encoding="utf-8")


def draw(run: Path, target: Path, judge: str) -> None:
    import matplotlib

    matplotlib.use("svg")
    from matplotlib import pyplot
    from matplotlib.gridspec import GridSpec

    metrics, systems = read(run)
    with pyplot.rc_context(STYLE):
        figure = pyplot.figure(figsize=(8.2, 3.3))
        grid = GridSpec(2, 3, figure, width_ratios=(1.5, 1, 1), wspace=0.34, hspace=0.38)
        grid.update(left=0.05, right=0.985, top=0.87, bottom=0.14)
        for place, (name, label) in enumerate(CURVES.items()):
            curve(figure.add_subplot(grid[place, 0]), metrics, name, label, last=place == len(CURVES) - 1)
        titles = {"reward": "reward model\n(what PPO is trained on)", judge: f"judge “{judge}”\n(no training sees it)"}
        for place, (name, title) in enumerate(titles.items(), start=1):
            bars(figure.add_subplot(grid[:, place]), systems, name, title)
        figure.savefig(target, metadata={"Date": None, "Creator": None}, facecolor="white")
        pyplot.close(figure)


def curve(axes: Any, metrics: list[dict[str, float]], name: str, label: str, *, last: bool) -> None:
    axes.plot([row["step"] for row in metrics], [row[name] for row in metrics], color=COLOURS[2], linewidth=1.3)
    axes.set_title(label)
    axes.tick_params(labelbottom=last)
    axes.set_xlabel("iteration of PPO" if last else "")


def bars(axes: Any, systems: dict[str, dict[str, Any]], name: str, title: str) -> None:
    """A bar a system with the 95 % interval of its mean, and the mean above it."""
    means = [figures[name]["mean"] for figures in systems.values()]
    low, high = ([figures[name][end] for figures in systems.values()] for end in ("low", "high"))
    errors = [[m - x for m, x in zip(means, low, strict=True)], [x - m for m, x in zip(means, high, strict=True)]]
    places = range(len(means))
    axes.bar(places, means, yerr=errors, capsize=3, color=COLOURS[: len(means)], width=0.62, error_kw={"linewidth": 1})
    for place, mean, top in zip(places, means, high, strict=True):
        axes.annotate(f"{mean:.2f}", (place, top), (0, 3), textcoords="offset points", ha="center")
    axes.set_xticks(places, [name.upper() if len(name) == 3 else name.replace(" of ", "\nof ") for name in systems])
    axes.grid(visible=False, axis="x")
    axes.set_title(title)
    axes.axhline(0, color="black", linewidth=0.8)
    axes.margins(y=0.12)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path)
    parser.add_argument("target", type=Path)
    parser.add_argument("--judge", default="ridge")
    if sys.argv[1:2] == ["keep"]:
        given = parser.parse_args(sys.argv[2:])
        keep(given.run, given.target, [given.judge])
        return
    given = parser.parse_args()
    draw(given.run, given.target, given.judge)


if __name__ == "__main__":
    main()
