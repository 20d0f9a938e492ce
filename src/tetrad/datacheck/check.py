"""`tetrad check`: reads all that a recipe or files hold, trains nothing, and reports what would go wrong in training.

The same report is shown on the terminal, written as JSON and as one page of HTML. Bad rows are reported one by one and
can be set aside in a file. The first error is raised at the end, so that a script sees it in the exit status.
"""

import json
from collections.abc import Sequence
from dataclasses import asdict, replace
from itertools import groupby
from pathlib import Path
from typing import Any

from tetrad import storage
from tetrad.console import Console
from tetrad.data.records import refuse_unusable
from tetrad.data.source import Counts, sources
from tetrad.data.tokens import too_long
from tetrad.datacheck import cost, duplicates, findings, judgements, texts, vocabulary
from tetrad.datacheck.reading import SETTINGS, Encoder, Reading, read, settings_of, shortened, sniff
from tetrad.errors import UserError
from tetrad.inference.model_folder import small_folder
from tetrad.model.config import DecoderConfig, read_config
from tetrad.report.page import page
from tetrad.report.sections import Finding, RenderedSample, Report, Section, Span, Table, histogram, share
from tetrad.report.terminal import show
from tetrad.settings.use import Check
from tetrad.stages import ON_POLICY, Recipe
from tetrad.text.bpe import SMALLEST, learn
from tetrad.text.chat_template import choose, template
from tetrad.text.tokenizer import Tokenizer
from tetrad.training.context import renamed

SETTING_OF = {what: name for name, what in reversed(SETTINGS.items()) if name != "tokenizer.text"}
"""A file by itself is checked as if this setting named it, the first for its kind of records."""
_DOES = {"refuse": "stop the training", "truncate": "will be cut", "drop": "will be dropped"}


def check_recipe(recipe: Recipe, settings: Check, console: Console, pace: cost.Pace | None = None) -> None:
    """Checks everything that a recipe reads. pace: measures the time. Errors: the first that training would stop at."""
    folder = _tokenizer_folder(recipe)
    config = _config(recipe, folder)
    limit = config.max_positions
    rooms = {
        "sft": recipe.sft.max_tokens or limit,
        "reward": recipe.reward.max_tokens or limit,
        "dpo": recipe.dpo.max_tokens or limit,
        **{name: min((s := getattr(recipe, name)).max_prompt or limit, limit - s.max_new_tokens) for name in ON_POLICY},
        "evaluate": limit - recipe.evaluate.max_new_tokens,
    }
    base = encoder_of(recipe, folder, recipe.sft.template)
    readings = []
    for setting, what, given in settings_of(recipe):
        stage = setting.partition(".")[0]
        encoder = replace(base, limit=rooms.get(stage, 0), train_on_prompt=recipe.sft.train_on_prompt)
        readings.append(read(setting, what, given, encoder, recipe.reward.score_scale))
        readings[-1].overlong = getattr(getattr(recipe, stage), "overlong", "refuse")
    if not readings:
        hint = 'name files, as [sft] data = ["FILE"]'
        raise UserError("E-CONF-MISSING", "no stage of the recipe has files to check", where=recipe.name, hint=hint)
    if not base.stand_in:
        config = replace(config, vocab_size=max(config.vocab_size, base.tokenizer.size))
    report, error = examine(recipe.name, readings, base, recipe, config, pace)
    _keep(recipe, report, console)
    _deliver(report, error, readings, settings, console)


def check_files(paths: Sequence[str], settings: Check, console: Console) -> None:
    """Checks data files by themselves. Errors: the first that training would stop at."""
    given = sources(paths, rename=renamed(settings.rename))
    folder = small_folder(settings.tokenizer) if settings.tokenizer else None
    encoder = encoder_of(Recipe(), folder, settings.template, settings.max_tokens)
    kinds = {path: settings.kind or sniff(path, given) for path in given.paths}
    readings = [
        read(SETTING_OF[what], what, given.only(*(path for path in given.paths if kinds[path] == what)), encoder)
        for what in dict.fromkeys(kinds.values())
    ]
    report, error = examine(", ".join(paths), readings, encoder, None, None)
    _deliver(report, error, readings, settings, console)


def _tokenizer_folder(recipe: Recipe) -> Path | None:
    """Where the recipe's tokenizer is: in the folder it starts from, or trained already; None if not there yet."""
    start = recipe.model.from_
    folder = small_folder(start) if start else Path(recipe.run.out) / recipe.name / "tokenizer"
    if (folder / "model" / "tokenizer.json").is_file():
        return folder / "model"
    return folder if start else None


def _config(recipe: Recipe, folder: Path | None) -> DecoderConfig:
    if recipe.model.from_ and folder:
        return read_config(folder)
    m = recipe.model
    shape: dict[str, Any] = {"vocab_size": recipe.tokenizer.vocab_size, "hidden_size": m.hidden_size}
    shape |= {"layers": m.layers, "heads": m.heads, "kv_heads": m.kv_heads, "head_dim": m.hidden_size // m.heads}
    return DecoderConfig("qwen2", **shape, ff=m.ff or 3 * m.hidden_size, max_positions=m.max_positions, tied=m.tied)


def encoder_of(recipe: Recipe, folder: Path | None, name: str, limit: int = 0) -> Encoder:
    """name: of a template, where one was chosen."""
    s = recipe.sft
    if folder is None:
        form = template(name or "instruction", s.separator, s.system)
        return Encoder(learn(["a"], SMALLEST), form, limit, stand_in=True)
    form = choose(folder, name, s.separator, s.system, own=False)
    tokenizer = Tokenizer.load(folder)
    if s.add_separator:
        tokenizer = tokenizer.with_control(form.separator)
    return Encoder(tokenizer, form, limit)


# --- the report ---


def examine(
    target: str,
    readings: Sequence[Reading],
    encoder: Encoder,
    recipe: Recipe | None,
    config: DecoderConfig | None,
    pace: cost.Pace | None = None,
) -> tuple[Report, UserError | None]:
    """All sections, and the error that training would stop at first."""
    by_name = {reading.setting: reading for reading in readings}
    error = first_error(readings, encoder, recipe)
    sections = [files(readings), lengths(readings, encoder), texts.scripts(readings)]
    sections += [*duplicates.sections(readings), texts.prompts(readings)]
    sections += [judgements.section(r) for r in readings if r.kind == "preferences" and r.records]
    asks = [by_name[f"{name}.prompts"] for name in ON_POLICY if f"{name}.prompts" in by_name]
    if asks and "reward.data" in by_name:
        sections.append(texts.coverage(asks[-1], by_name["reward.data"]))
    if recipe and config:
        sections.append(cost.section(recipe, config, by_name, guessed=encoder.stand_in, pace=pace))
        sections.append(findings.section(recipe, by_name, guessed=encoder.stand_in))
        sections.append(vocabulary.section(recipe))
    if encoder.stand_in:
        text = "there is no tokenizer yet: lengths are in characters, and over-long records can't be found"
        sections.append(Section("tokenizer", "Tokenizer", findings=[Finding("note", "tokenizer", text)]))
    if error is None and (leaked := next((f for s in sections for f in s.findings if f.level == "error"), None)):
        error = UserError("E-DATA-OVERLAP", leaked.text, where=leaked.where, hint=leaked.fix)
    return Report(target, tuple(s for s in sections if s.title), rendered(readings, encoder)), error


def first_error(readings: Sequence[Reading], encoder: Encoder, recipe: Recipe | None) -> UserError | None:
    """Bad rows and files in their order, then what concerns all records of a setting."""
    read_files = [file for reading in readings for file in reading.files]
    if first := next((error for file in read_files for error in file.errors), None):
        total = sum(file.codes.total() for file in read_files)
        more = f" ({total - 1} more in the report)" if total > 1 else ""
        return UserError(first.code, first.what.rstrip(".") + more, where=first.where, hint=first.hint)
    for reading in readings:
        if reading.long and reading.overlong == "refuse":
            records = reading.lengths
            return too_long(reading.long, len(records), max(records), encoder.limit, reading.first_long)
        if reading.kind == "preferences" and recipe:
            try:
                refuse_unusable(reading.setting, reading.records, recipe.reward.score_scale, recipe.dpo.score_gap)
            except UserError as error:
                return error
    return None


def files(readings: Sequence[Reading]) -> Section:
    """What became of each file's rows, how they were read, and each bad row with its reason and a fix."""
    section = Section("files", "Files")
    rows, forms, bad = [], [], []
    for reading in readings:
        for file in reading.files:
            c, refused = file.counts, file.codes.total()
            rows.append((reading.setting, str(file.path), c.read, c.kept, refused, c.blank, c.tied, c.control_strings))
            forms += [(str(file.path), note) for note in c.notes]
            bad += [(e.where, e.code, e.what, e.hint) for e in file.errors]
            metrics = {**c.told(), "refused": refused, "codes": dict(file.codes)}
            section.metrics[f"{reading.setting}: {file.path}"] = metrics
            if refused:
                first = file.errors[0]
                text = f"{refused} rows of {file.path} are refused, the first: [{first.code}] {first.what}"
                section.add("error", "refused", text, first.where, first.hint)
            if c.control_strings:
                text = f"{file.path}: control tokens are spelt out {c.control_strings} times; they stay plain text"
                section.add("note", "control strings", text)
    columns = ("setting", "file", "read", "kept", "refused", "blank lines", "ties", "control strings")
    section.tables.append(Table("", columns, rows))
    if forms:
        section.tables.append(Table("How the rows were read", ("file", ""), list(dict.fromkeys(forms))))
    if bad:
        section.tables.append(Table("Refused rows", ("where", "code", "what", "fix"), bad))
    return section


def lengths(readings: Sequence[Reading], encoder: Encoder) -> Section:
    """Lengths of the records, which are too long, and the share of tokens in the loss."""
    unit = "characters" if encoder.stand_in else "tokens"
    section, rows = Section("lengths", f"Lengths in {unit}"), []
    for reading in readings:
        if not reading.lengths:
            continue
        n, ordered = len(reading.lengths), sorted(reading.lengths)
        median, p95, p99 = (ordered[min(n - 1, int(n * q))] for q in (0.5, 0.95, 0.99))
        has_labels = reading.kind in ("documents", "conversations") and not encoder.stand_in
        trained = share(reading.trained, reading.tokens) if has_labels else ""
        count = "" if encoder.stand_in else reading.tokens
        rows.append((reading.setting, n, median, p95, p99, ordered[-1], reading.long, count, trained))
        stats = {"records": n, "unit": unit, "median": median, "p95": p95, "p99": p99, "longest": ordered[-1]}
        stats |= {"over_long": reading.long, "tokens": reading.tokens, "trained": reading.trained}
        section.metrics[reading.setting] = stats
        section.plots.append(histogram(f"{reading.setting}: length of a record", unit, reading.lengths))
        if reading.long:
            text = f"{reading.setting}: {reading.long} of {n} records are too long and {_DOES[reading.overlong]}"
            level = "error" if reading.overlong == "refuse" else "warning"
            table = reading.setting.partition(".")[0]
            fix = f'split them, or set {table}.overlong = "drop"' + (' or "truncate"' if table != "dpo" else "")
            fix = fix if table in ("sft", "reward", "dpo", *ON_POLICY) else ""
            section.add(level, "length", text, reading.first_long, fix)
    columns = ("setting", "records", "median", "95 %", "99 %", "longest", "over-long", "tokens", "trained")
    section.tables.append(Table("", columns, rows))
    return section


def rendered(readings: Sequence[Reading], encoder: Encoder) -> tuple[RenderedSample, ...]:
    """Three records with control tokens, as the ids that the model would get, with the tokens in the loss marked."""
    order = ("sft.data", "reward.data", "dpo.data", "ppo.prompts", "grpo.prompts", "pretrain.text")
    chosen = min((r for r in readings if r.records), key=lambda r: (*order, r.setting).index(r.setting), default=None)
    if chosen is None:
        return ()
    last = len(chosen.records) - 1
    samples = []
    for record in [chosen.records[i] for i in sorted({0, (last + 1) // 2, last})]:
        try:
            (docs,) = encoder.tokens([shortened(record)], Counts())
        except UserError as error:
            return (RenderedSample(error.where, (Span(str(error), trained=False),)),)
        runs = []
        for trained, run in groupby(zip(docs[0].ids.tolist(), docs[0].train.tolist(), strict=True), lambda t: t[1]):
            text = encoder.tokenizer.decode([token for token, _ in run], keep_control=True)
            runs.append(Span(text, trained))
        samples.append(RenderedSample(record.where, tuple(runs)))
    return tuple(samples)


# --- output ---


def _deliver(
    report: Report, error: UserError | None, readings: Sequence[Reading], settings: Check, console: Console
) -> None:
    show(report, console)
    for name, text in (("json", as_json(report)), ("html", page(report) if settings.html else "")):
        if target := getattr(settings, name):
            storage.write_file(Path(target), text.encode(errors="replace"))
            console.say(f"{name}: {target}")
    if settings.quarantine:
        aside = [(e, text) for r in readings for f in r.files for e, text in f.refused]
        rows = [{"where": e.where, "code": e.code, "why": e.what, "fix": e.hint, "row": text} for e, text in aside]
        lines = (json.dumps(line, ensure_ascii=False).encode(errors="replace") + b"\n" for line in rows)
        storage.write_file(Path(settings.quarantine), lines)
        console.say(f"quarantine: {len(rows)} rows in {settings.quarantine}")
    if error:
        raise error


def _keep(recipe: Recipe, report: Report, console: Console) -> None:
    """For the page of the run. A folder that can't be written is a note: nothing but that page needs it."""
    try:
        storage.write_file(Path(recipe.run.out) / recipe.name / "check.json", as_json(report).encode(errors="replace"))
    except UserError as error:
        console.say(f"note: the page of the run will not show this: {error.what}")


def as_json(report: Report) -> str:
    """The whole report for programs."""
    payload = {
        "target": report.target,
        "findings": [asdict(finding) for finding in report.findings],
        "sections": {
            s.name: {"title": s.title, "figures": s.metrics, "tables": [asdict(t) for t in s.tables]}
            for s in report.sections
        },
        "samples": [asdict(sample) for sample in report.samples],
    }
    return json.dumps(payload, ensure_ascii=False, indent=1, default=str) + "\n"
