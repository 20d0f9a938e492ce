"""A report on the terminal: tables, findings by weight, and rendered samples with the trained part coloured."""

import itertools

from tetrad.engine.console import Console
from tetrad.report.sections import Report

SAMPLE = 1500  # characters of a rendered sample


def show(report: Report, console: Console) -> None:
    """Tables first, then samples, and last what is to be mended."""
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
        left, runs = SAMPLE, []
        for run in sample.runs:
            runs.append((run.text[:left], run.trained))
            left = max(0, left - len(run.text))
        console.marked(f"  {sample.where}: ", runs)
    found = report.findings
    for level, group in itertools.groupby(found, key=lambda finding: finding.level):
        for finding in group:
            console.say(f"{level}: {finding.text}" + (f" (first: {finding.where})" if finding.where else ""))
    if not any(finding.level != "note" for finding in found):
        console.say("nothing to mend")
