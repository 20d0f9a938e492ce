"""One picture of all methods: what each earns for the KL that it spends, over the seeds of examples/worth.py.

    python benchmarks/frontier.py keep runs/reviews-en-worth-* >> benchmarks/results/worth.jsonl
    python benchmarks/frontier.py draw benchmarks/results/worth.jsonl docs/frontier.svg

`keep` prints a line for each system of each run that was evaluated (with `evaluate.others`, those of other runs too):
its figures on the held-out prompts, best-of-N for growing N, and, of those that sampled, KL and score of the training,
means of five iterations. Of `reviews-en-near-N`, the recipe at a beta of 0.33 (docs/ppo.md), only PPO's lines are kept
in worth.jsonl: the rest is that of `reviews-en-worth-N`. `draw` needs the extra `bench`; equal files give equal bytes
of SVG.
"""

import argparse
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

from ppo_run import STYLE

PATHS, FIVE = {"ppo": "PPO", "rloo": "RLOO", "grpo": "GRPO"}, 5
COLOURS = {"best of N": "#4878a8", "PPO": "#c44e52", "RLOO": "#dd8452", "GRPO": "#55a868", "DPO": "#8172b3"}
PLAIN = ("kl", "length", "finished", "distinct_2", "commonest_word", "external_nll")
Row = Mapping[str, Any]


def method_of(run: Path, system: str) -> str:
    return "rloo" if system == f"{run.name}-rloo/grpo" else system


def rows_of(run: Path) -> Iterator[Row]:
    report = json.loads((run / "evaluate/report/report.json").read_text(encoding="utf-8"))
    for system, figures in report["systems"].items():
        row = {"run": run.name, "method": method_of(run, system)}
        row |= {name: round(figures[name], 4) for name in PLAIN}
        gains = {name: value for name, value in figures.items() if name.endswith("_gain")}
        row |= {name: [round(value[end], 4) for end in ("mean", "low", "high")] for name, value in gains.items()}
        row |= {name: value and round(value, 2) for name, value in report["costs"][system].items()}
        stage = run.parent / system if "/" in system else run / system
        if system.startswith("best of"):
            base = report["frontier"][0][2]
            row["path"] = [[round(kl, 4), round(score - base, 4)] for _, kl, score in report["frontier"]]
        elif row["method"] in PATHS:
            row["path"] = trained(stage / "metrics.jsonl", report["systems"]["sft"]["reward"]["mean"])
        yield row


def trained(metrics: Path, base: float) -> list[list[float]]:
    """KL and score above SFT's, means of five iterations each."""
    lines = [json.loads(line) for line in metrics.read_text(encoding="utf-8").splitlines()]
    fives = [lines[at : at + FIVE] for at in range(0, len(lines), FIVE)]
    return [
        [round(fmean(x["kl"] for x in five), 4), round(fmean(x["score"] for x in five) - base, 4)] for five in fives
    ]


def draw(rows: Sequence[Row], target: Path, judge: str) -> None:
    import matplotlib

    matplotlib.use("svg")
    from matplotlib import pyplot

    with pyplot.rc_context(STYLE):
        figure, (left, right) = pyplot.subplots(1, 2, figsize=(8.2, 3.6), gridspec_kw={"wspace": 0.2})
        figure.subplots_adjust(left=0.06, right=0.985, top=0.9, bottom=0.14)
        for row in rows:
            name = "best of N" if row["method"].startswith("best of") else PATHS.get(row["method"], "DPO")
            points(left, row, "reward_gain", COLOURS[name])
            points(right, row, f"{judge}_gain", COLOURS[name])
            if "path" in row:
                left.plot(*zip(*row["path"], strict=True), color=COLOURS[name], linewidth=0.8, alpha=0.55)
        left.set_title("reward model's score, gained (what they are trained on)")
        right.set_title(f"judge “{judge}”, gained (no training sees it)")
        handles = [pyplot.Line2D([], [], color=c, marker="o", markersize=4) for c in COLOURS.values()]
        right.legend(handles, COLOURS, loc="lower right", frameon=False, fontsize=8)
        for axes in (left, right):
            axes.set_xlabel("KL to the SFT model, nats a response")
            axes.set_xlim(left=0)
            axes.axhline(0, color="black", linewidth=0.8)
        figure.savefig(target, metadata={"Date": None, "Creator": None}, facecolor="white")
        pyplot.close(figure)


def points(axes: Any, row: Row, name: str, colour: str) -> None:
    """The end of a run with its 95 % interval."""
    mean, low, high = row[name]
    axes.errorbar(
        [row["kl"]], [mean], [[mean - low], [high - mean]], fmt="o", color=colour, markersize=4, linewidth=0.9
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    verbs = parser.add_subparsers(dest="verb", required=True)
    verbs.add_parser("keep").add_argument("runs", nargs="+", type=Path)
    picture = verbs.add_parser("draw")
    picture.add_argument("results", type=Path)
    picture.add_argument("target", type=Path)
    picture.add_argument("--example", default="reviews-en")
    picture.add_argument("--judge", default="ridge")
    given = parser.parse_args()
    if given.verb == "keep":
        for run in given.runs:
            if (run / "evaluate/report/report.json").is_file():
                print("\n".join(json.dumps(row) for row in rows_of(run)))
        return
    rows = [json.loads(line) for line in given.results.read_text(encoding="utf-8").splitlines()]
    chosen = [row for row in rows if row["run"].startswith(given.example) and row["method"] != "sft"]
    draw(chosen, given.target, given.judge)


if __name__ == "__main__":
    main()
