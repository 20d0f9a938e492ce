"""A report as one self-contained HTML page: no script, no link, no external font, all escaped.

Plots are SVG of rectangles and texts, drawn here.
"""

from collections.abc import Iterable, Sequence
from html import escape
from typing import Any

from tetrad.report.sections import Finding, Plot, RenderedSample, Report, Section, Table

ROWS = 200
SAMPLE = 5_000
_POLICY = "default-src 'none'; style-src 'unsafe-inline'; base-uri 'none'; form-action 'none'"
_STYLE = """
:root { color-scheme: light dark; --ink: #1d2733; --soft: #5c6b7a; --line: #d8dee6; --paper: #fff; --fill: #eef2f6;
  --bar: #3d7ab8; --good: #d9f2e0; --error: #b3261e; --warning: #9a6700; --note: #4a5a6a; }
@media (prefers-color-scheme: dark) { :root { --ink: #e4e9ef; --soft: #9aa8b5; --line: #36414d; --paper: #14191f;
  --fill: #1e252d; --bar: #6ba6df; --good: #1d4a2c; --error: #ff8a80; --warning: #f0b64c; --note: #a9b8c6; } }
body { margin: 2rem auto; max-width: 76rem; padding: 0 1.2rem; background: var(--paper); color: var(--ink);
  font: 15px/1.5 system-ui, "Noto Sans CJK SC", sans-serif; }
h1 { font-size: 1.5rem; } h2 { font-size: 1.15rem; margin: 2.2rem 0 .5rem; border-bottom: 1px solid var(--line); }
h3 { font-size: .95rem; margin: 1.1rem 0 .3rem; color: var(--soft); font-weight: 600; }
.wide { overflow-x: auto; } table { border-collapse: collapse; font-size: .88rem; }
th, td { text-align: left; vertical-align: top; padding: .25rem .8rem .25rem 0; border-bottom: 1px solid var(--line); }
th { color: var(--soft); font-weight: 600; } td.number { text-align: right; font-variant-numeric: tabular-nums; }
ul.findings { list-style: none; padding: 0; } .findings li { padding: .3rem 0; }
.findings b { display: inline-block; min-width: 5.5rem; } .error b { color: var(--error); }
.warning b { color: var(--warning); } .note b { color: var(--note); } .where { color: var(--soft); }
.fix { margin-left: 5.75rem; }
.plots { display: flex; flex-wrap: wrap; gap: 1.2rem; } svg text { fill: var(--soft); font-size: 10px; }
svg rect { fill: var(--bar); } figure { margin: 0; } figcaption { font-size: .85rem; color: var(--soft); }
pre { white-space: pre-wrap; overflow-wrap: anywhere; background: var(--fill); padding: .8rem; border-radius: 6px; }
mark { background: var(--good); color: inherit; }
"""


def page(report: Report) -> str:
    """The whole page."""
    title = f"tetrad check: {report.target}"
    parts = [
        "<!doctype html>",
        '<html lang="en"><head><meta charset="utf-8">',
        f'<meta http-equiv="Content-Security-Policy" content="{_POLICY}">',
        '<meta name="viewport" content="width=device-width, initial-scale=1">',
        '<meta name="referrer" content="no-referrer">',
        f"<title>{_text(title)}</title><style>{_STYLE}</style></head><body>",
        f"<h1>{_text(title)}</h1>",
        _findings(report.findings),
        *map(_section, report.sections),
        _samples(report.samples),
        "</body></html>",
    ]
    return "\n".join(part for part in parts if part) + "\n"


def _text(value: Any) -> str:
    """A value as text that no browser interprets as anything else."""
    if value is None:
        return "-"
    shown = f"{value:.4g}" if isinstance(value, float) else str(value)
    return escape("".join(c if c.isprintable() or c in "\n\t" else "\ufffd" for c in shown))


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
        left, runs = SAMPLE, []
        for run in sample.runs:
            text = _text(run.text[:left])
            runs.append(f"<mark>{text}</mark>" if run.trained else text)
            left = max(0, left - len(run.text))
        parts.append(f"<h3><bdi>{_text(sample.where)}</bdi></h3><pre><bdi>{''.join(runs)}</bdi></pre>")
    head = "<h2>Records as the model gets them</h2><p>What the loss reads is marked.</p>"
    return head + "".join(parts) if parts else ""
