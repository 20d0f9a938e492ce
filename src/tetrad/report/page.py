"""A report as one self-contained HTML page: no script, no link, no external font, all escaped.

Plots are SVG of rectangles and texts, drawn here.
"""

from collections.abc import Iterable, Sequence
from importlib import resources
from typing import Any

from tetrad.report.html import text as _text
from tetrad.report.sections import Finding, Plot, RenderedSample, Report, Section, Table

ROWS = 200
SAMPLE = 5_000
_POLICY = "default-src 'none'; style-src 'unsafe-inline'; base-uri 'none'; form-action 'none'"
_STYLE = resources.files("tetrad.report").joinpath("page.css").read_text("utf-8")


def page(report: Report) -> str:
    """The whole page."""
    title = f"tetrad check: {report.target}"
    parts = [
        "<!doctype html>",
        '<html lang="en"><head><meta charset="utf-8">',
        f'<meta http-equiv="Content-Security-Policy" content="{_POLICY}">',
        '<meta name="viewport" content="width=device-width, initial-scale=1">',
        '<meta name="referrer" content="no-referrer">',
        f"<title>{_text(title)}</title><style>\n{_STYLE}</style></head><body>",
        f"<h1>{_text(title)}</h1>",
        _findings(report.findings),
        *map(_section, report.sections),
        _samples(report.samples),
        "</body></html>",
    ]
    return "\n".join(part for part in parts if part) + "\n"


def _findings(findings: Sequence[Finding]) -> str:
    items = [
        f'<li class="{f.level}"><b>{f.level}</b> <bdi>{_text(f.text)}</bdi>'
        f' <span class="where"><bdi>{_text(f.where)}</bdi></span>'
        + (f'<br><span class="fix">Fix: <bdi>{_text(f.fix)}</bdi></span></li>' if f.fix else "</li>")
        for f in findings
    ]
    head = "" if any(f.level != "note" for f in findings) else "<p>Nothing that needs your attention.</p>"
    return head + (f'<ul class="findings">{"".join(items)}</ul>' if items else "")


def _section(section: Section) -> str:
    tables = [_table(table) for table in section.tables if table.rows]
    plots = "".join(map(_plot, section.plots))
    if not tables and not plots:
        return ""
    return f"<h2>{_text(section.title)}</h2>" + "".join(tables) + (f'<div class="plots">{plots}</div>' if plots else "")


def _table(table: Table) -> str:
    head = "".join(f"<th>{_text(column)}</th>" for column in table.columns)
    rows = "".join("<tr>" + "".join(map(_cell, row)) + "</tr>" for row in table.rows[:ROWS])
    more = f"<p>… and {len(table.rows) - ROWS} more</p>" if len(table.rows) > ROWS else ""
    title = f"<h3>{_text(table.title)}</h3>" if table.title else ""
    return f'{title}<div class="wide"><table><thead><tr>{head}</tr></thead><tbody>{rows}</tbody></table></div>{more}'


def _cell(value: Any) -> str:
    number = ' class="number"' if isinstance(value, int | float) else ""
    return f"<td{number}><bdi>{_text(value)}</bdi></td>"


def _plot(plot: Plot) -> str:
    """A histogram, 320 by 130."""
    width, height, top = 300.0, 100.0, max(*plot.counts, 1)
    step = width / len(plot.counts)
    bars = "".join(
        f'<rect x="{10 + i * step:.1f}" y="{10 + height * (1 - n / top):.1f}" width="{max(step - 1, 0.5):.1f}"'
        f' height="{height * n / top:.1f}"><title>{_text(f"{low:.4g} to {high:.4g}: {n}")}</title></rect>'
        for i, (n, low, high) in enumerate(zip(plot.counts, plot.edges, plot.edges[1:], strict=False))
    )
    ends = f'<text x="10" y="124">{plot.edges[0]:.4g}</text>'
    ends += f'<text x="310" y="124" text-anchor="end">{plot.edges[-1]:.4g}</text>'
    name = f"{plot.title} ({plot.unit})"
    svg = (
        f'<svg viewBox="0 0 320 130" width="320" height="130" role="img" aria-label="{_text(name)}">{bars}{ends}</svg>'
    )
    return f"<figure>{svg}<figcaption>{_text(name)}</figcaption></figure>"


def _samples(samples: Iterable[RenderedSample]) -> str:
    parts = []
    for sample in samples:
        runs = ((_text(run.text), run.trained) for run in sample.beginning(SAMPLE))
        marked = "".join(f"<mark>{text}</mark>" if trained else text for text, trained in runs)
        parts.append(f"<h3><bdi>{_text(sample.where)}</bdi></h3><pre><bdi>{marked}</bdi></pre>")
    head = "<h2>Records as the model gets them</h2><p>What the loss reads is marked.</p>"
    return head + "".join(parts) if parts else ""
