"""The page of a run, or of several side by side: one file that opens with the network off, in two languages.

Its only script is named by its hash in the page's policy, so that nothing that a model wrote can run. No torch.
"""

import base64
import hashlib
import json
from collections.abc import Sequence
from datetime import UTC, datetime
from importlib import resources
from pathlib import Path

from tetrad import storage
from tetrad.report import charts
from tetrad.report.figures import Figures
from tetrad.report.glossary import sections
from tetrad.report.html import Html, foreign, meaning_of, table, text, word
from tetrad.report.parts import data_part, language_part, lineage_part, reward_part, verdict_part
from tetrad.report.policy_parts import inspected, inspector_part, policy_part, replies_part, trained, where_kl_sums
from tetrad.report.records import RunRecords, read_runs
from tetrad.storage import Json

NAME = "report.html"
_SWITCH = '<button type="button" id="language">中文</button>'


def write_page(folders: Sequence[str], target: Path, *, going_on: bool = False) -> Path:
    """Writes the page of these runs' folders. going_on: further stages follow. Errors: E-CKPT-MISSING, E-IO-*."""
    storage.write_file(target, page(read_runs(folders), going_on=going_on).encode(errors="replace"))
    return target


def report(folders: Sequence[str], out: str) -> Path:
    """The page of `tetrad report`. out: its file; empty for one in the first run's folder. Errors: those of
    `write_page`."""
    name = NAME if len(folders) == 1 else f"report-{'-'.join(Path(folder).name for folder in folders[1:])}.html"
    return write_page(folders, Path(out or Path(folders[0]) / name))


def page(runs: Sequence[RunRecords], *, going_on: bool = False) -> str:
    """The whole page."""
    figures = Figures(runs)
    samples = inspected(figures)
    parts = {
        "verdict": verdict_part(figures),
        "lineage": lineage_part(figures),
        "data": data_part(figures),
        "language": language_part(figures),
        "reward": reward_part(figures),
        "policy": policy_part(figures),
        "replies": replies_part(figures),
        "inspector": inspector_part(figures, samples),
        "glossary": glossary_part(),
    }
    parts = {name: part for name, part in parts.items() if part}
    links = "".join(f'<a href="#{name}">{word(name)}</a>' for name in parts)
    body = "".join(f'<section id="{name}"><h2>{word(name)}</h2>{part}</section>' for name, part in parts.items())
    names = " · ".join(run.name for run in runs)
    heading = f'<span id="parts" class="seen">{word("sections")}</span>'
    notes = [word("written", datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"))]
    notes += [word("going_on")] if going_on else []
    notes += [] if charts.available() else [word("no_charts")]
    script, style = (
        resources.files("tetrad.report").joinpath(f"run.{kind}").read_text("utf-8") for kind in ("js", "css")
    )
    return "\n".join(
        [
            *_head(f"tetrad: {names}", style, script),
            f"<header><h1>{word('title')} {foreign(names)}</h1>{_SWITCH}</header>",
            f"<main><p class=note>{' '.join(notes)}</p>{answers(runs)}",
            f'<nav aria-labelledby="parts">{heading}{links}</nav>{body}</main>',
            f'<script type="application/json" id="numbers-of-charts">{_embedded(figures.data)}</script>',
            f"<script>{script}</script></body></html>\n",
        ]
    )


def _head(title: str, style: str, script: str) -> list[str]:
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    policy = f"default-src 'none'; style-src 'unsafe-inline'; script-src 'sha256-{digest}'; base-uri 'none'"
    return [
        "<!doctype html>",
        '<html lang="en"><head><meta charset="utf-8">',
        f'<meta http-equiv="Content-Security-Policy" content="{policy}; form-action \'none\'">',
        '<meta name="viewport" content="width=device-width, initial-scale=1">',
        '<meta name="referrer" content="no-referrer">',
        f"<title>{text(title)}</title><style>\n{style}</style></head><body>",
    ]


def _embedded(value: Json) -> str:
    """JSON that no browser reads as anything else."""
    return json.dumps(value, ensure_ascii=True, separators=(",", ":")).replace("<", "\\u003c")


def answers(runs: Sequence[RunRecords]) -> Html:
    """What people ask first, answered in a line, with the part that shows more."""
    rows = []
    for question, place, answer in (
        ("q_collapse", "policy", _collapse),
        ("q_reward", "reward", _reward),
        ("q_text", "replies", _replies),
        ("q_kl", "inspector", _kl),
        ("q_annotator", "reward", _annotator),
    ):
        names = [f"{foreign(run.name)}: " if len(runs) > 1 else "" for run in runs]
        each = zip(names, map(answer, runs), strict=True)
        lines = "".join(f"<dd>{name}{line}</dd>" for name, line in each if line)
        rows.append(f'<dt><a href="#{place}">{word(question)}</a></dt>{lines}' if lines else "")
    return Html(f'<dl class="answers">{"".join(rows)}</dl>') if any(rows) else Html("")


def _collapse(run: RunRecords) -> Html:
    for role in reversed(trained(run)):
        lines = run.stages[role].metrics
        if lines and "commonest_word" in lines[0]:
            values = (lines[at][name] for name in ("commonest_word", "finished") for at in (0, -1))
            return word("a_collapse", len(run.stages[role].recorded.get("alarms", ())), *values)
    return Html("")


def _reward(run: RunRecords) -> Html:
    m = run.stages["reward"].recorded if "reward" in run.stages else {}
    if "pair_accuracy" not in m:
        return Html("")
    names = ("pair_accuracy", "pairs", "pair_accuracy_low", "pair_accuracy_high")
    bases = (name for name in m if name.endswith("_baseline_pair_accuracy"))
    beside = (word("a_baseline", name.removesuffix("_baseline_pair_accuracy"), m[name]) for name in bases)
    return Html(word("a_reward", *(m[name] for name in names)) + "".join(beside))


def _replies(run: RunRecords) -> Html:
    return word("a_text", len(run.replies)) if run.replies else Html("")


def _kl(run: RunRecords) -> Html:
    top, roles = where_kl_sums(run), trained(run)
    lines = run.stages[roles[-1]].metrics if roles else ()
    return word("a_kl", lines[-1]["kl"], repr(top[0][0])) if top and lines and "kl" in lines[-1] else Html("")


def _annotator(run: RunRecords) -> Html:
    if run.annotators:
        least = run.annotators[0]
        return word("a_annotator", *(least[name] for name in ("annotator", "right", "low", "high")))
    return word("a_no_annotator") if "reward" in run.stages else Html("")


def glossary_part() -> Html:
    """Every metric with its meaning."""
    rows = [[name, meaning_of(name)] for names in sections().values() for name in names if name.islower()]
    return Html(f"<details><summary>{word('show')}</summary>{table([word('metric'), ''], rows)}</details>")
