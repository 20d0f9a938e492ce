"""The page's figures: a chart with its legend, its first and last numbers, and its data for CSV. No torch."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from tetrad.report import charts
from tetrad.report.charts import Chart, Series
from tetrad.report.html import Html, both, foreign, term, text, word
from tetrad.report.records import RunRecords


@dataclass
class Figures:
    """Draws, and collects the numbers behind what is drawn; runs: whose they are."""

    runs: Sequence[RunRecords]
    data: dict[str, Any] = field(default_factory=dict)

    def figure(self, chart: Chart, title: Html | None = None) -> Html:
        """Empty where no series has a point. title: instead of the metric's name with its meaning."""
        series = tuple(one.thinned for one in chart.series if one.x)
        if not series:
            return Html("")
        chart = Chart(chart.name, series, chart.x, chart.y, chart.spans, chart.diagonal)
        name = f"chart-{len(self.data)}"
        rows = [[one.label, one.x, one.y, one.low, one.high] for one in series]
        self.data[name] = {"name": chart.name, "x": chart.x, "y": chart.y or chart.name, "series": rows}
        drawn = charts.svg(chart) if charts.available() else ""
        keys = "".join(map(_key, range(len(series)), series))
        alarms = Html(f'<li class="alarmed">{word("alarm_marked")}</li>') if chart.spans else ""
        button = f'<button type="button" class="quiet" data-csv="{name}">CSV</button>'
        caption = f"<figcaption>{title or term(chart.name)}{button}</figcaption>"
        return Html(f'<figure>{caption}{drawn}<ul class="keys">{keys}{alarms}</ul></figure>')

    def label(self, run: RunRecords, *more: str) -> str:
        """Of a series: the run's name only where there are several runs."""
        return " · ".join([*([run.name] if len(self.runs) > 1 else []), *more])

    def metric(self, stage: str, name: str, spans: Sequence[Any] = ()) -> Html:
        """A metric over the steps of a stage, of every run that logs it."""
        series = tuple(self.series(run, stage, name) for run in self.runs)
        return self.figure(Chart(f"{stage}.{name}", series, y=name, spans=tuple(spans)), term(name))

    def series(self, run: RunRecords, stage: str, name: str, *, timing: bool = False) -> Series:
        """A metric of metrics.jsonl, or of timing.jsonl."""
        records = run.stages.get(stage)
        lines = (records.timing if timing else records.metrics) if records else ()
        there = [line for line in lines if isinstance(line.get(name), int | float)]
        return Series(self.label(run), tuple(line["step"] for line in there), tuple(line[name] for line in there))

    def phases(self, stage: str) -> Html:
        """Seconds of a step by phase."""
        series = []
        for run in (run for run in self.runs if stage in run.stages):
            timing = run.stages[stage].timing
            for phase in dict.fromkeys(name for line in timing for name in line["phases"]):
                values = tuple(line["phases"].get(phase, 0.0) for line in timing)
                series.append(Series(self.label(run, phase), tuple(line["step"] for line in timing), values))
        return self.figure(Chart(f"{stage}.phases", tuple(series), y="seconds"), word("phases"))

    def rate(self, stage: str) -> Html:
        """Tokens per second."""
        series = tuple(self.series(run, stage, "tokens_per_second", timing=True) for run in self.runs)
        return self.figure(Chart(f"{stage}.tokens_per_second", series, y="tokens/s"), word("rate"))


def _key(number: int, one: Series) -> str:
    """A line of the legend: the mark in its colour, the name, the first and the last number as in the log."""
    ends = f"{text(one.y[0])} → {text(one.y[-1])}" if not one.mark and len(one.y) > 1 else text(one.y[-1])
    mark = "point" if one.mark else "line"
    return f'<li><span class="{mark} s{number % 8}"></span>{foreign(one.label)} <span class="number">{ends}</span></li>'


def grid(parts: Sequence[Html]) -> Html:
    """Figures beside each other."""
    return Html(f'<div class="figures">{"".join(parts)}</div>') if any(parts) else Html("")


def by_run(runs: Sequence[RunRecords], parts: Mapping[str, Html]) -> Html:
    """What is of one run alone, the runs side by side, each below its name where there are several."""
    if len(runs) == 1:
        return next(iter(parts.values()), Html(""))
    columns = (f"<div><h3>{foreign(name)}</h3>{part or both('-', '-')}</div>" for name, part in parts.items())
    return Html(f'<div class="beside">{"".join(columns)}</div>') if any(parts.values()) else Html("")
