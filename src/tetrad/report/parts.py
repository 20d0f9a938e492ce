"""The page's first parts: the verdict and the worth-it table, lineage, data, language models, the reward model."""

import platform
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from importlib.metadata import version
from typing import Any

from tetrad.report.charts import Chart, Series
from tetrad.report.figures import Figures, by_run, grid
from tetrad.report.html import Html, both, foreign, table, term, text, word
from tetrad.report.records import RunRecords
from tetrad.report.verdict import SFT, Verdict, name_of
from tetrad.report.worth import Cost
from tetrad.settings.base import options
from tetrad.settings.names import shown
from tetrad.stages import ALIGNED, Recipe

_OUTCOMES = {"no difference shown": "未显示出差别", "not to be trusted": "不可信", "not evaluated": "未评估"}
_COLUMNS = ("kl", "length", "finished", "distinct_2", "commonest_word", "external_nll")


def interval(value: Any, low: Any, high: Any, sign: str = "") -> Html:
    """A number with the ends of its interval below it."""
    if not isinstance(value, int | float):
        return Html("-")
    ends = f"[{low:{sign}.3g}, {high:{sign}.3g}]" if isinstance(low, float) and isinstance(high, float) else ""
    return Html(f'<span class="number">{value:{sign}.3g} <small>{ends}</small></span>')


# --- 1. verdict ---


def verdict_part(figures: Figures) -> Html:
    """The verdict of each run, its grounds, and one table of what was compared."""
    return Html(by_run(figures.runs, {run.name: _verdict(run) for run in figures.runs}) + worth_table(figures))


def _verdict(run: RunRecords) -> Html:
    if not (saved := run.report.get("verdict")):
        return Html(f"<p>{word('no_verdict')}</p>")
    verdict = Verdict.read(saved)
    chinese = _OUTCOMES.get(verdict.outcome, verdict.outcome.replace(" is better", " 更好"))
    use = Html(f" {word('use', verdict.use)}") if verdict.use else ""
    lines = "".join(f"<li>{foreign(line)}</li>" for line in (*verdict.reasons, *verdict.methods))
    return Html(f'<p class="verdict"><b>{both(verdict.outcome, chinese)}</b>{use}</p><ul>{lines}</ul>')


def worth_table(figures: Figures) -> Html:
    """A row a system of each run: gains with intervals, what guards look at, minutes and memory."""
    every = [(run, name, m) for run in figures.runs for name, m in run.report.get("systems", {}).items()]
    if not every:
        return Html("")
    judges = list(dict.fromkeys(name for *_, m in every for name in m if name.endswith("_gain")))
    others = [name for name in _COLUMNS if any(name in m for *_, m in every)]
    rows = []
    for run, name, m in every:
        gains = [Html("-") if name == SFT or judge not in m else _gain(m[judge]) for judge in judges]
        costs = asdict(cost_of(run, name)).values()
        rows.append([figures.label(run, name_of(name)), *gains, *(m.get(x) for x in others), *costs])
    columns = [word("system"), *map(term, (*judges, *others, *vars(Cost())))]
    prompts = " / ".join(str(run.report["prompts"]) for run in figures.runs if run.report)
    return table(columns, rows, word("worth", prompts))


def _gain(ends: Mapping[str, float]) -> Html:
    return interval(ends["mean"], ends["low"], ends["high"], "+")


def cost_of(run: RunRecords, system: str) -> Cost:
    """As the evaluation kept it; of an older one, from the stage's own log."""
    if saved := run.report.get("costs", {}).get(system):
        return Cost(**saved)
    if system in run.stages:
        return Cost.of(run.stages[system].result)
    return Cost(0.0, Cost.of(run.folder / "reward" / "model").minutes) if system.startswith("best of ") else Cost()


# --- 2. lineage, 3. data ---


def lineage_part(figures: Figures) -> Html:
    """Stages, keys and parents; settings that differ from the defaults; versions and the machine."""
    parts = {}
    for run in figures.runs:
        rows = []
        for name, stage in run.stages.items():
            parents = ", ".join(f"{role} {parent['key'][:8]}" for role, parent in stage.lineage["parents"].items())
            state = word("done" if stage.manifest else "unfinished")
            rows.append([name, state, str(stage.lineage["key"])[:12], parents])
        stages = table([word("stage"), word("state"), word("key"), word("made_from")], rows)
        changed = table([word("setting"), word("value"), word("default")], _changes(run), word("changes"))
        parts[run.name] = Html(stages + changed)
    machine = table([word("what"), word("value")], machine_rows(), word("machine"))
    return Html(by_run(figures.runs, parts) + machine)


def _changes(run: RunRecords) -> list[list[str]]:
    """Settings of the run's stages that are not the default."""
    known = options(Recipe)
    used = {name: value for stage in run.stages.values() for name, value in stage.lineage["settings"].items()}
    pairs = [(name, value, known[name].default) for name, value in used.items() if name in known]
    lists = ((name, value, list(d) if isinstance(d, tuple) else d) for name, value, d in pairs)
    return [[name, shown(value), shown(default)] for name, value, default in lists if value != default]


def machine_rows() -> list[tuple[str, str]]:
    """Of the machine that writes the page."""
    rows = [(package, version(package)) for package in ("tetrad", "torch", "numpy")]
    return [*rows, ("python", platform.python_version()), ("system", platform.platform())]


def data_part(figures: Figures) -> Html:
    """The files of each stage with their sha256, and what `tetrad check` had to say."""
    parts = {}
    for run in figures.runs:
        rows = [
            [setting, item["path"], str(item["sha256"])[:12]]
            for stage in run.stages.values()
            for setting, items in stage.lineage["data"].items()
            for item in items
        ]
        files = table([word("setting"), word("file"), "sha256"], dict.fromkeys(map(tuple, rows)))
        listed = [
            [finding["level"], finding["text"], finding["where"], finding["fix"]] for finding in run.findings or ()
        ]
        checked = table([word("level"), word("finding"), word("where"), word("fix")], listed, word("check"))
        without = word("check_clean" if run.findings is not None else "no_check")
        parts[run.name] = Html(files + (checked or f"<p>{without}</p>"))
    return by_run(figures.runs, parts)


# --- 4. language models ---


def language_part(figures: Figures) -> Html:
    """Pre-training and SFT: loss and rate over the steps, and what was measured on held-out text at the end."""
    whole = []
    for stage in ("pretrain", "sft"):
        there = [run for run in figures.runs if stage in run.stages]
        if not there:
            continue
        curves = [figures.metric(stage, name) for name in ("loss", "eval_loss", "lr", "grad_norm")]
        drawn = grid([*curves, figures.rate(stage)])
        measured = {run.name: metrics_table(run, stage) for run in there}
        whole.append(f"<h3>{text(stage)}</h3>{drawn}{by_run(there, measured)}")
    return Html("".join(whole))


def metrics_table(run: RunRecords, stage: str) -> Html:
    """What a stage's manifest has."""
    metrics = run.stages[stage].recorded if stage in run.stages else {}
    rows = [[term(name), value] for name, value in metrics.items() if isinstance(value, int | float)]
    return table([word("metric"), word("value")], rows)


# --- 5. the reward model ---


def reward_part(figures: Figures) -> Html:
    """Accuracy beside its baselines, calibration, the gate, slices, annotators, and the worst and best pairs."""
    runs = [run for run in figures.runs if "reward" in run.stages]
    if not runs:
        return Html("")
    judged = by_run(runs, {run.name: Html(accuracy_table(run) + gate_line(run)) for run in runs})
    curves = [figures.metric("reward", name) for name in ("loss", "comparison_loss", "score_loss")]
    drawn = grid([reliability(figures, runs), *curves])
    people = by_run(runs, {run.name: annotators(run) for run in runs})
    rest = by_run(runs, {run.name: Html(slices(run) + pairs(run)) for run in runs})
    return Html(judged + people + drawn + rest)


def accuracy_table(run: RunRecords) -> Html:
    """The reward model, its linear baselines and the rule of length, on the same test pairs."""
    m = run.stages["reward"].recorded
    rows = []
    if "pair_accuracy" in m or "spearman" in m:
        ends = [interval(m.get(x), m.get(f"{x}_low"), m.get(f"{x}_high")) for x in ("pair_accuracy", "spearman")]
        rows.append([word("reward_model"), *ends])
    bases = dict.fromkeys(name.partition("_baseline_")[0] for name in m if "_baseline_" in name)
    for base in bases:
        values = [interval(m.get(f"{base}_baseline_{x}"), None, None) for x in ("pair_accuracy", "spearman")]
        rows.append([word("baseline", base), *values])
    if "length_accuracy" in m:
        rows.append([word("longer_is_better"), interval(m["length_accuracy"], None, None), Html("-")])
    columns = [word("who"), term("pair_accuracy"), term("spearman")]
    return table(columns, rows, word("right_order", f"{m.get('pairs', 0):,.0f}"))


def gate_line(run: RunRecords) -> Html:
    """What the gate said before the policy was trained against this model."""
    records = [run.stages[role].recorded for role in ALIGNED if role in run.stages]
    failures = next((recorded["gate"] for recorded in records if "gate" in recorded), None)
    if failures is None:
        return Html("")
    items = "".join(f"<li>{foreign(failure)}</li>" for failure in failures)
    return Html(
        f'<p class="bad">{word("gate_fail")}</p><ul>{items}</ul>' if failures else f"<p>{word('gate_pass')}</p>"
    )


def reliability(figures: Figures, runs: Sequence[RunRecords]) -> Html:
    """How often the model is right at each confidence; of an older evaluation, in thirds."""
    series = []
    for run in runs:
        rows = run.assessment.get("reliability") or [
            {**x, "low": x["accuracy_low"], "high": x["accuracy_high"]}
            for x in run.assessment.get("slices", ())
            if x["by"] == "sure" and x["confidence"] is not None
        ]
        x, y, low, high = (tuple(row[name] for row in rows) for name in ("confidence", "accuracy", "low", "high"))
        series.append(Series(figures.label(run), x, y, mark=True, low=low, high=high))
    chart = Chart("reliability", tuple(series), x="confidence", y="accuracy", diagonal=True)
    return figures.figure(chart, word("reliability"))


def annotators(run: RunRecords) -> Html:
    """Who judges unlike the others: those whom the model trusts least, and the accuracy on each one's records."""
    rows = [[x["annotator"], x["comparisons"], interval(x["right"], x["low"], x["high"])] for x in run.annotators[:20]]
    estimated = table([word("annotator"), word("comparisons"), word("right")], rows, word("annotators"))
    known = [x for x in run.assessment.get("slices", ()) if x["by"] == "annotator"]
    listed = table(_SLICES[1:], [_slice(x)[1:] for x in sorted(known, key=_worst)], word("by_annotator"))
    if estimated or listed:
        return Html(estimated + listed)
    return Html(f"<h3>{word('annotators')}</h3><p>{word('no_annotators')}</p>")


def _worst(x: Mapping[str, Any]) -> float:
    values = [x[name] for name in ("accuracy", "spearman") if x[name] is not None]
    return float(values[0]) if values else 2.0


_SLICES = [word("by"), word("part"), word("pairs"), term("pair_accuracy"), word("sure"), term("spearman")]


def _slice(x: Mapping[str, Any]) -> list[Any]:
    accuracy = interval(x["accuracy"], x["accuracy_low"], x["accuracy_high"])
    rank = interval(x["spearman"], x["spearman_low"], x["spearman_high"])
    return [x["by"], x["value"], x["pairs"], accuracy, x["confidence"], rank]


def slices(run: RunRecords) -> Html:
    """The parts of the test data but annotators, the worst of each kind first."""
    known = [x for x in run.assessment.get("slices", ()) if x["by"] != "annotator"]
    rows = [_slice(x) for x in sorted(known, key=lambda x: (x["by"], _worst(x)))]
    return table(_SLICES, rows, word("slices"))


def pairs(run: RunRecords) -> Html:
    """The most wrong and the most right pairs."""
    rows = [[f"{x['gap']:+.2f}", x["prompt"], x["better"], x["worse"]] for x in run.assessment.get("pairs", ())]
    return table([word("gap"), word("prompt"), word("judged_better"), word("judged_worse")], rows, word("extremes"))
