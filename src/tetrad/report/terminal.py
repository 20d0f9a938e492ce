"""A report on the terminal: what matters most, tables, samples with the trained part coloured, the other findings."""

from collections.abc import Iterable

from tetrad.console import Console
from tetrad.report.sections import Finding, Report

SAMPLE = 1500  # characters of a rendered sample


def show(report: Report, console: Console) -> None:
    """The findings that matter most with their fixes, then tables and samples, and last the other findings."""
    every, first = report.findings, report.first
    most = f"what matters most ({len(first)} of {len(every)} findings; the whole report follows)"
    console.say(most if first else "nothing that needs your attention")
    _list(first, console, numbered=True)
    for section in report.sections:
        tables = [table for table in section.tables if table.rows]
        for number, table in enumerate(tables):
            title = section.title if not table.title else f"{section.title}: {table.title}"
            console.table(title if number == 0 or table.title else "", table.columns, table.rows[: table.brief])
            if len(table.rows) > table.brief:
                console.say(f"  … and {len(table.rows) - table.brief} more, in the JSON and the page")
    if report.samples:
        console.say("Records as the model gets them; what the loss reads is marked")
    for sample in report.samples:
        console.marked(f"  {sample.where}: ", [(run.text, run.trained) for run in sample.beginning(SAMPLE)])
    if first and len(every) > len(first):
        console.say("the other findings")
    _list(every[len(first) :], console)


def _list(findings: Iterable[Finding], console: Console, *, numbered: bool = False) -> None:
    for number, finding in enumerate(findings, 1):
        where = f" (first: {finding.where})" if finding.where else ""
        console.say(f"{f'{number:2}. ' if numbered else ''}{finding.level}: {finding.text}{where}")
        if finding.fix:
            console.say(f"    Fix: {finding.fix}")
