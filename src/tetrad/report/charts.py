"""Charts as SVG by matplotlib, whose texts stay texts and whose colours are the page's; none where it is missing.

No foreign text is drawn: names stand in the page's own legend, so that no font and no markup of theirs matters.
"""

import io
import re
from dataclasses import dataclass
from functools import lru_cache
from importlib.util import find_spec
from typing import Any

MOST_POINTS = 1000  # of a series, in the page's data too; a longer one is thinned
_INK, _LINE, _ALARM = "#00000a", "#00000b", "#00000c"
_COLOURS = 8
_VARIABLES = {_INK: "var(--soft)", _LINE: "var(--line)", _ALARM: "var(--bad)"}
_VARIABLES |= {f"#0000f{i}": f"var(--s{i})" for i in range(_COLOURS)}
Numbers = tuple[float, ...]


@dataclass(frozen=True)
class Series:
    """label: foreign text. mark: points instead of a line. low, high: the ends of intervals."""

    label: str
    x: Numbers
    y: Numbers
    mark: bool = False
    low: Numbers = ()
    high: Numbers = ()

    @property
    def thinned(self) -> "Series":
        """Every so many of its points, and the last."""
        step = -(-len(self.x) // MOST_POINTS)
        if step < 2:
            return self
        keep = sorted({*range(0, len(self.x), step), len(self.x) - 1})
        return Series(self.label, tuple(self.x[i] for i in keep), tuple(self.y[i] for i in keep), self.mark)


@dataclass(frozen=True)
class Chart:
    """name: the metric, also of its file. x: what the horizontal axis has. spans: from, to and level of alarms.
    diagonal: the line on which both axes agree."""

    name: str
    series: tuple[Series, ...]
    x: str = "step"
    y: str = ""
    spans: tuple[tuple[float, float, int], ...] = ()
    diagonal: bool = False


def available() -> bool:
    """Whether charts can be drawn: the extra `report` is installed."""
    return find_spec("matplotlib") is not None


@lru_cache(maxsize=512)  # a run writes its page after every stage; what did not change is not drawn again
def svg(chart: Chart) -> str:
    """The chart, without a name of its own: the page labels it."""
    import matplotlib
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure

    settings: Any = {"svg.fonttype": "none", "svg.hashsalt": chart.name, "text.parse_math": False}
    settings |= {"font.size": 9, "axes.edgecolor": _LINE, "text.color": _INK, "axes.labelcolor": _INK}
    settings |= {"xtick.color": _INK, "ytick.color": _INK, "axes.spines.top": False, "axes.spines.right": False}
    settings |= {"grid.color": _LINE, "axes.grid": True, "grid.linewidth": 0.6, "axes.unicode_minus": True}
    with matplotlib.rc_context(settings):
        figure = Figure(figsize=(4.8, 2.5), layout="constrained")
        figure.patch.set_visible(False)
        axes = figure.add_subplot()
        axes.patch.set_visible(False)
        axes.set_xlabel(chart.x)
        _draw(axes, chart)
        stream = io.StringIO()
        metadata = dict.fromkeys(("Date", "Creator", "Format", "Type"))
        canvas: Any = FigureCanvasSVG(figure)
        canvas.print_svg(stream, metadata=metadata)
    return _own(stream.getvalue(), chart.name)


def _draw(axes: Any, chart: Chart) -> None:
    for first, last, level in chart.spans:
        axes.axvspan(first - 0.5, last + 0.5, color=_ALARM, alpha=0.1 * level, linewidth=0)
    for number, one in enumerate(chart.series):
        colour = f"#0000f{number % _COLOURS}"
        if one.low:
            axes.vlines(one.x, one.low, one.high, color=colour, linewidth=1.2)
        style: dict[str, Any] = {"linestyle": "none", "marker": "os^Dv"[number % 5], "markersize": 5}
        style = style if one.mark or len(one.x) == 1 else {"linewidth": 1.4}
        axes.plot(one.x, one.y, color=colour, **style)
    if chart.diagonal:
        ends = [min(axes.get_xlim()[0], axes.get_ylim()[0]), max(axes.get_xlim()[1], axes.get_ylim()[1])]
        axes.plot(ends, ends, color=_INK, linewidth=0.8, linestyle=(0, (4, 3)))
    if chart.x == "step":
        axes.xaxis.get_major_locator().set_params(integer=True)
    if chart.y:
        axes.set_ylabel(chart.y)


def _own(drawn: str, name: str) -> str:
    """As a part of an HTML page: ids that nothing refers to go, the others are unique; colours follow the page."""
    drawn = drawn[drawn.index("<svg") :].strip()
    drawn = re.sub(r"<style.*?</style>|<metadata.*?</metadata>|<!--.*?-->", "", drawn, flags=re.DOTALL)
    used = set(re.findall(r"#([A-Za-z][\w.-]*)", drawn))
    prefix = re.sub(r"\W", "-", name)
    drawn = re.sub(r' id="([^"]*)"', lambda m: f' id="{prefix}-{m[1]}"' if m[1] in used else "", drawn)
    drawn = re.sub(r"(url\(#|href=\"#)", rf"\g<1>{prefix}-", drawn)
    for colour, variable in _VARIABLES.items():
        drawn = drawn.replace(colour, variable)
    drawn = re.sub(
        r"(<svg[^>]*?) (?:width|height)=\"[^\"]*\"( [^>]*?)(?:width|height)=\"[^\"]*\"", r"\1\2", drawn, count=1
    )
    drawn = re.sub(r"<svg", '<svg aria-hidden="true" focusable="false"', drawn, count=1)
    return re.sub(r"\s*\n\s*", "\n", drawn)
