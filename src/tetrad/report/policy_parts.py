"""The page's last parts: what a policy's training looked like, and what changed in the text."""

import json
from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

from tetrad.report.charts import Chart, Series
from tetrad.report.figures import Figures, by_run, grid
from tetrad.report.html import Html, foreign, table, term, word
from tetrad.report.records import RunRecords
from tetrad.report.verdict import name_of
from tetrad.stages import ALIGNED

_CURVES = ("score", "kl", "length", "finished", "entropy", "explained_variance", "clip_fraction", "actor_lr")
_MORE = ("distinct_2", "commonest_word", "ood_scores", "beta", "value_loss", "policy_loss", "sampler_gap")
_GLANCE = ("score", "kl", "length", "finished", "distinct_2", "commonest_word", "entropy", "ood_scores")
MOST_PROMPTS = 40
MOST_SAMPLES = 12
COLOURED = ("kl", "logprob", "reference", "reward", "value", "advantage", "return")
"""Columns of a token that the inspector can show as colour."""


def trained(run: RunRecords) -> list[str]:
    """The roles that this run trained towards a preference."""
    return [role for role in ALIGNED if role in run.stages]


def policy_part(figures: Figures) -> Html:
    """The frontier of all methods; for each role the first and the last figures beside its alarms, and the curves."""
    parts = []
    for role in (role for role in ALIGNED if any(role in run.stages for run in figures.runs)):
        runs = [run for run in figures.runs if role in run.stages]
        spans = sorted({span for run in runs for span in alarm_spans(run, role)})
        ends = [line for run in runs for line in (*run.stages[role].metrics[:1], *run.stages[role].metrics[-1:])]
        logged = dict.fromkeys(name for line in ends for name in line if name != "step")
        names = [name for name in (*_CURVES, *_MORE) if name in logged] if "score" in logged else list(logged)
        drawn = [figures.metric(role, name, [s[1:] for s in spans if s[0] == name]) for name in names]
        glance = by_run(runs, {run.name: at_a_glance(run, role) for run in runs})
        title = Html(f"<h3>{name_of(role)}</h3>")
        parts.append(Html(title + glance + grid([*drawn, figures.phases(role)])))
    return Html(grid([frontier(figures)]) + "".join(parts)) if parts else Html("")


def alarm_spans(run: RunRecords, role: str) -> list[tuple[str, float, float, int]]:
    """Figure, first and last step, level."""
    spans = run.stages[role].recorded.get("alarms", ())
    return [(span["figure"], span["first"], span["last"], span["level"]) for span in spans]


def at_a_glance(run: RunRecords, role: str) -> Html:
    """Did it collapse? What hacking would move, at the first and the last step, with the alarms of each."""
    lines, alarms = run.stages[role].metrics, alarm_spans(run, role)
    if not lines:
        return Html("")
    rows = []
    for name in dict.fromkeys([*_GLANCE, *(alarm[0] for alarm in alarms)]):
        raised = "; ".join(
            f"{first:g}{f'-{last:g}' if last > first else ''} ({'!' * level})"
            for figure, first, last, level in alarms
            if figure == name
        )
        if name in lines[0] or raised:
            rows.append([term(name), lines[0].get(name), lines[-1].get(name), raised])
    if not rows:
        return Html("")
    worst = max((alarm[3] for alarm in alarms), default=0)
    sentence = word(("no_alarm", "alarm_once", "alarm_twice")[worst])
    columns = [word("metric"), word("first", lines[0]["step"]), word("last", lines[-1]["step"]), word("alarm_steps")]
    return Html(f'<p class="{"bad" if worst == 2 else "note"}">{sentence}</p>' + table(columns, rows))


def frontier(figures: Figures) -> Html:
    """Reward against KL: the path of each training, best-of-N for growing N, and where the evaluation puts each."""
    series = []
    for run in figures.runs:
        for role in trained(run):
            lines = [line for line in run.stages[role].metrics if "kl" in line and "score" in line]
            path = tuple(line["kl"] for line in lines), tuple(line["score"] for line in lines)
            series.append(Series(figures.label(run, name_of(role)), *path))
        if points := run.report.get("frontier"):
            label = figures.label(run, f"best of {', '.join(str(n) for n, *_ in points)}")
            series.append(Series(label, tuple(kl for _, kl, _ in points), tuple(reward for *_, reward in points)))
        for name, metrics in run.report.get("systems", {}).items():
            if "reward" in metrics:
                at = (metrics["kl"],), (metrics["reward"]["mean"],)
                series.append(Series(figures.label(run, f"{name_of(name)}, held-out"), *at, mark=True))
    chart = Chart("frontier", tuple(series), x="KL, nats per response", y="reward")
    return figures.figure(chart, word("frontier"))


# --- side by side ---


def replies_part(figures: Figures) -> Html:
    """Held-out prompts with the responses of every system, those first that moved most."""
    parts = []
    for run in figures.runs:
        rows = chosen_replies(run)
        if rows:
            heading = f"<h3>{foreign(run.name)}</h3>" if len(figures.runs) > 1 else ""
            parts.append(heading + "".join(_reply(run, *row) for row in rows))
    if not parts:
        return Html("")
    search = f'<label>{word("search")} <input type="search" id="search"></label>'
    order = "".join(
        f'<button type="button" data-order="{key}">{word(key)}</button>' for key in ("rises", "falls", "given")
    )
    return Html(f'<div class="tools">{search}{order}<span id="count"></span></div>' + "".join(parts))


def chosen_replies(run: RunRecords) -> list[tuple[int, float, Mapping[str, Any]]]:
    """Numbers, gains of the last policy over SFT and records: the most that rose, the most that fell, and the first."""
    systems = list(run.report.get("systems", {}))
    subject = next((role for role in reversed(ALIGNED) if role in systems), systems[-1] if systems else "")
    judge = next((name for name in judges_of(run) if name != "reward"), "reward")
    rows = []
    for i, line in enumerate(run.replies):
        replies = line["replies"]
        rows.append((i, replies.get(subject, {}).get(judge, 0.0) - replies.get("sft", {}).get(judge, 0.0), line))
    ranked = sorted(rows, key=lambda row: row[1])
    third = MOST_PROMPTS // 3
    kept = {row[0]: row for row in (*ranked[::-1][:third], *ranked[:third], *rows[: MOST_PROMPTS - 2 * third])}
    return sorted(kept.values(), key=lambda row: -row[1])


def judges_of(run: RunRecords) -> list[str]:
    """The names of all that scored the responses."""
    first: Mapping[str, Any] = next(iter(run.report.get("systems", {}).values()), {})
    return [name.removesuffix("_gain") for name in first if name.endswith("_gain")]


def _reply(run: RunRecords, number: int, gain: float, line: Mapping[str, Any]) -> str:
    texts = []
    for name, reply in line["replies"].items():
        scores = " ".join(f"{judge} {reply[judge]:+.2f}" for judge in judges_of(run) if judge in reply)
        cut = word("cut") if reply.get("finished") is False else ""
        texts.append(
            f"<dt>{foreign(name_of(name))} <small>{foreign(scores)} {cut}</small></dt><dd>{foreign(reply['text'])}</dd>"
        )
    prompt = f"<h4>{foreign(line['prompt'])}</h4>"
    head = f'<article class="reply" data-gain="{gain:.6g}" data-number="{number}">'
    return f"{head}{prompt}<dl>{''.join(texts)}</dl></article>"


# --- token by token ---


def inspected(figures: Figures) -> list[dict[str, Any]]:
    """Sampled responses with the numbers of their tokens as samples.jsonl has them: of the first, some middle and the
    last recorded steps."""
    whole: list[dict[str, Any]] = []
    for run in figures.runs:
        for role in trained(run):
            records = [record for record in run.stages[role].samples if "tokens" in record]
            steps = sorted({record["step"] for record in records})
            near = {steps[round(i * (len(steps) - 1) / 3)] for i in range(4)} if steps else set()
            shown = [record for record in records if record["step"] in near][-MOST_SAMPLES:]
            whole += [{"run": figures.label(run, role), **record} for record in shown]
    return whole


def inspector_part(figures: Figures, samples: Sequence[Mapping[str, Any]]) -> Html:
    """The place that the page's script fills, the greedy responses before and now, and where the KL went."""
    if not samples:
        return Html("")
    known = [name for name in COLOURED if any(name in sample["tokens"] for sample in samples)]
    choices = "".join(f'<button type="button" data-column="{name}">{name}</button>' for name in known)
    meanings = "".join(f"<li><b>{name}</b>: {word(f'token_{name}')}</li>" for name in known)
    data = json.dumps(samples, ensure_ascii=True).replace("<", "\\u003c")
    tools = f'<div class="tools"><label>{word("sample")} <select id="sample"></select></label>{choices}</div>'
    place = (
        f'{tools}<p class="note">{word("inspect")}</p><div id="tokens"></div><p id="numbers" aria-live="polite"></p>'
    )
    most = by_run(figures.runs, {run.name: where_kl_went(run) for run in figures.runs})
    greedy = by_run(figures.runs, {run.name: over_time(run) for run in figures.runs})
    script = f'<script type="application/json" id="samples">{data}</script>'
    return Html(f"{place}<ul class=meanings>{meanings}</ul>{script}{most}{greedy}")


def where_kl_sums(run: RunRecords) -> list[tuple[str, list[float]]]:
    """The tokens with the most KL in the responses of the last recorded step, each with its KL at every place."""
    sums: dict[str, list[float]] = defaultdict(list)
    for role in trained(run)[-1:]:
        records = [record for record in run.stages[role].samples if "kl" in record.get("tokens", {})]
        for record in (record for record in records if record["step"] == records[-1]["step"]):
            for piece, kl in zip(record["tokens"]["pieces"], record["tokens"]["kl"], strict=True):
                sums[piece].append(kl)
    return sorted(sums.items(), key=lambda item: -sum(item[1]))[:12]


def where_kl_went(run: RunRecords) -> Html:
    """These tokens as a table."""
    rows = [[repr(piece)[1:-1], len(values), sum(values), max(values)] for piece, values in where_kl_sums(run)]
    return table([word("token"), word("times"), word("kl_sum"), word("kl_most")], rows, word("where_kl_went"))


def over_time(run: RunRecords) -> Html:
    """The greedy responses to the fixed prompts, at each recorded step."""
    rows = []
    for role in trained(run):
        records = [record for record in run.stages[role].samples if "greedy" in record]
        for prompt in dict.fromkeys(record["prompt"] for record in records):
            own = [record for record in records if record["prompt"] == prompt]
            rows.append([prompt, word("before"), own[0]["before"]])
            steps = sorted({0, len(own) // 2, len(own) - 1})
            rows += [["", word("at_step", own[i]["step"]), own[i]["greedy"]] for i in steps]
    return table([word("prompt"), word("when"), word("response")], rows, word("over_time"))
