"""`tetrad check`: reads all that a recipe or files hold, trains nothing, and reports what would go wrong in training.

The same report is shown on the terminal, written as JSON and as one page of HTML. Bad rows are reported one by one and
can be set aside in a file. The first error is raised at the end, so that a script sees it in the exit status.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from tetrad import storage
from tetrad.console import Console
from tetrad.data.records import refuse_no_scale
from tetrad.data.source import Counts, sources
from tetrad.datacheck import cost, duplicates, findings, judgements, texts, vocabulary
from tetrad.datacheck.reading import Encoder, Reading, read, settings_of, shortened, sniff
from tetrad.errors import UserError
from tetrad.model.config import DecoderConfig, read_config
from tetrad.registry import Recipe
from tetrad.report.page import page
from tetrad.report.sections import Finding, Plot, RenderedSample, Report, Section, Span, Table, histogram, share
from tetrad.report.terminal import show
from tetrad.settings.use import Check
from tetrad.text.bpe import SMALLEST, learn
from tetrad.text.chat_template import choose, template
from tetrad.text.tokenizer import Tokenizer
from tetrad.training.context import renamed

SHOWN = 3  # rendered samples


def check_recipe(recipe: Recipe, settings: Check, console: Console) -> None:
    """Checks everything that a recipe reads. Errors: the first that training would stop at."""
    folder = _tokenizer_folder(recipe)
    config = _config(recipe, folder)
    limit = config.max_positions
    rooms = {
        "sft": recipe.sft.max_tokens or limit,
        "reward": recipe.reward.max_tokens or limit,
        "ppo": min(recipe.ppo.max_prompt or limit, limit - recipe.ppo.max_new_tokens),
        "evaluate": limit - recipe.evaluate.max_new_tokens,
    }
    base = _encoder(recipe, folder)
    readings = []
    for setting, what, given in settings_of(recipe):
        stage = setting.partition(".")[0]
        encoder = replace(base, limit=rooms.get(stage, 0))
        options = {"score_scale": recipe.reward.score_scale, "train_on_prompt": recipe.sft.train_on_prompt}
        readings.append(read(setting, what, given, encoder, **options))
    if not readings:
        hint = 'name files, as [sft] data = ["FILE"]'
        raise UserError("E-CONF-MISSING", "no stage of the recipe has files to check", where=recipe.name, hint=hint)
    if not base.stand_in:
        config = replace(config, vocab_size=max(config.vocab_size, base.tokenizer.size))
    report, error = examine(recipe.name, readings, base, recipe, config)
    _deliver(report, error, readings, settings, console)


def check_files(paths: Sequence[str], settings: Check, console: Console) -> None:
    """Checks data files by themselves. Errors: the first that training would stop at."""
    given = sources(paths, rename=renamed(settings.rename))
    encoder = _encoder(Recipe(), Path(settings.tokenizer) if settings.tokenizer else None, settings)
    readings: dict[str, Reading] = {}
    for number, path in enumerate(given.paths):
        try:
            what = settings.kind or sniff(path, given)
        except UserError:
            what = "conversations"
        reading = read(_role(what), what, given.only(number), encoder)
        if what in readings:
            _join(readings[what], reading)
        else:
            readings[what] = reading
    report, error = examine(", ".join(paths), list(readings.values()), encoder, None, None)
    _deliver(report, error, list(readings.values()), settings, console)


def _role(what: str) -> str:
    return {"documents": "pretrain.text", "conversations": "sft.data", "preferences": "reward.data"}.get(
        what, "ppo.prompts"
    )


def _join(reading: Reading, other: Reading) -> None:
    reading.files += other.files
    reading.records += other.records
    for name in ("keys", "prompt_keys", "lengths", "prompt_lengths", "answer_lengths"):
        getattr(reading, name).extend(getattr(other, name))
    reading.tokens, reading.trained = reading.tokens + other.tokens, reading.trained + other.trained
    reading.long, reading.first_long = reading.long + other.long, reading.first_long or other.first_long


def _tokenizer_folder(recipe: Recipe) -> Path | None:
    """Where the recipe's tokenizer is: in the folder it starts from, or trained already; None if not there yet."""
    if recipe.model.from_:
        folder = Path(recipe.model.from_)
        return folder / "model" if (folder / "model" / "tokenizer.json").is_file() else folder
    learned = Path(recipe.run.out) / recipe.name / "tokenizer" / "model"
    return learned if (learned / "tokenizer.json").is_file() else None


def _config(recipe: Recipe, folder: Path | None) -> DecoderConfig:
    if recipe.model.from_ and folder:
        return read_config(folder)
    m = recipe.model
    shape: dict[str, Any] = {"vocab_size": recipe.tokenizer.vocab_size, "hidden_size": m.hidden_size}
    shape |= {"layers": m.layers, "heads": m.heads, "kv_heads": m.kv_heads, "head_dim": m.hidden_size // m.heads}
    return DecoderConfig("qwen2", **shape, ff=m.ff or 3 * m.hidden_size, max_positions=m.max_positions, tied=m.tied)


def _encoder(recipe: Recipe, folder: Path | None, settings: Check | None = None) -> Encoder:
    name, limit = (settings.template, settings.max_tokens) if settings else ("", 0)
    name, separator = name or recipe.sft.template, recipe.sft.separator
    form = choose(folder, name, separator, own=False) if folder else template(name or "instruction", separator)
    if folder is None:
        return Encoder(learn(["a"], SMALLEST), form, limit, stand_in=True)
    tokenizer = Tokenizer.load(folder)
    if recipe.sft.add_separator:
        tokenizer = tokenizer.with_control(form.separator)
    return Encoder(tokenizer, form, limit)


# --- the report ---


def examine(
    target: str,
    readings: Sequence[Reading],
    encoder: Encoder,
    recipe: Recipe | None,
    config: DecoderConfig | None,
) -> tuple[Report, UserError | None]:
    """All sections, and the error that training would stop at first."""
    by_name = {reading.setting: reading for reading in readings}
    overlong = {name: _on_long(recipe, name) for name in by_name}
    error = first_error(readings, encoder, overlong, None if recipe is None else recipe.reward.score_scale)
    sections = [files(readings, overlong), lengths(readings, encoder, overlong)]
    sections += [texts.scripts(readings), *duplicates.sections(readings)]
    sections.append(texts.prompts(readings))
    sections += [judgements.section(r) for r in readings if r.kind == "preferences" and r.records]
    if "ppo.prompts" in by_name and "reward.data" in by_name:
        sections.append(texts.coverage(by_name["ppo.prompts"], by_name["reward.data"]))
    if recipe and config:
        sections.append(cost.section(recipe, config, by_name, guessed=encoder.stand_in))
        sections.append(findings.section(recipe, by_name, guessed=encoder.stand_in))
        sections.append(vocabulary.section(recipe))
    if encoder.stand_in:
        text = "there is no tokenizer yet: lengths are in characters, and over-long records can't be found"
        sections.append(Section("tokenizer", "Tokenizer", findings=(Finding("note", "tokenizer", text),)))
    if error is None and (leaked := next((f for s in sections for f in s.findings if f.level == "error"), None)):
        error = UserError("E-DATA-OVERLAP", leaked.text, where=leaked.where, hint=leaked.fix)
    return Report(target, tuple(s for s in sections if s.title), rendered(readings, encoder)), error


def _on_long(recipe: Recipe | None, setting: str) -> str:
    table = getattr(recipe, setting.partition(".")[0], None) if recipe else None
    return str(getattr(table, "overlong", "refuse"))


def first_error(
    readings: Sequence[Reading], encoder: Encoder, overlong: Mapping[str, str], scale: Sequence[float] | None
) -> UserError | None:
    """Bad rows and files in their order, then what concerns all records of a setting."""
    errors = [e for r in readings for f in r.files for e in [*(e for e, _ in f.refused[:1]), f.failed] if e]
    total = sum(sum(f.codes.values()) for r in readings for f in r.files)
    if errors:
        first = errors[0]
        more = f" ({total - 1} more in the report)" if total > 1 else ""
        return UserError(first.code, first.what.rstrip(".") + more, where=first.where, hint=first.hint)
    for reading in readings:
        if reading.long and overlong[reading.setting] == "refuse":
            what = (
                f"{reading.long} of {len(reading.lengths)} records are too long: the longest has {max(reading.lengths)}"
            )
            what += f" tokens, the limit is {encoder.limit or 'the model'}" if encoder.limit else " tokens"
            hint = 'raise max_tokens, or set overlong = "truncate" or "drop"'
            return UserError("E-DATA-LONG", what, where=reading.first_long, hint=hint)
        if reading.kind == "preferences" and scale is not None:
            try:
                refuse_no_scale(reading.records, scale)
            except UserError as error:
                return error
    return None


def files(readings: Sequence[Reading], overlong: Mapping[str, str]) -> Section:
    """What became of each file's rows, how they were read, and each bad row with its reason and a fix."""
    rows, forms, bad, noticed, figures = [], [], [], list[Finding](), {}
    for reading in readings:
        for file in reading.files:
            c, refused = file.counts, sum(file.codes.values())
            rows.append((reading.setting, str(file.path), c.read, c.kept, refused, c.blank, c.tied, c.control_strings))
            forms += [(str(file.path), note) for note in c.notes]
            errors = [e for e, _ in file.refused] + ([file.failed] if file.failed else [])
            bad += [(e.where, e.code, e.what, e.hint) for e in errors]
            figures[f"{reading.setting}: {file.path}"] = {**c.told(), "refused": refused, "codes": dict(file.codes)}
            if refused:
                first = errors[0]
                text = f"{refused} rows of {file.path} are refused, the first: [{first.code}] {first.what}"
                noticed.append(Finding("error", "refused", text, first.where, first.hint))
            if c.control_strings:
                text = f"{file.path}: control tokens are spelt out {c.control_strings} times; they stay plain text"
                noticed.append(Finding("note", "control strings", text))
    columns = ("setting", "file", "read", "kept", "refused", "blank lines", "ties", "control strings")
    tables = [Table("", columns, tuple(rows))]
    if forms:
        tables.append(Table("How the rows were read", ("file", ""), tuple(dict.fromkeys(forms))))
    if bad:
        tables.append(Table("Refused rows", ("where", "code", "what", "fix"), tuple(bad)))
    return Section("files", "Files", figures, tuple(tables), (), tuple(noticed))


def lengths(readings: Sequence[Reading], encoder: Encoder, overlong: Mapping[str, str]) -> Section:
    """Lengths of the records, which are too long, and the share of tokens in the loss."""
    unit = "characters" if encoder.stand_in else "tokens"
    rows, plots, noticed, figures = [], list[Plot](), list[Finding](), {}
    for reading in readings:
        if not reading.lengths:
            continue
        n, ordered = len(reading.lengths), sorted(reading.lengths)
        at = [ordered[min(n - 1, int(n * q))] for q in (0.5, 0.95, 0.99)]
        has_labels = reading.kind in ("documents", "conversations") and not encoder.stand_in
        trained = share(reading.trained, reading.tokens) if has_labels else ""
        count = "" if encoder.stand_in else reading.tokens
        rows.append((reading.setting, n, *at, ordered[-1], reading.long, count, trained))
        stats = {"records": n, "unit": unit, "median": at[0], "p95": at[1], "p99": at[2], "longest": ordered[-1]}
        figures[reading.setting] = stats | {
            "over_long": reading.long,
            "tokens": reading.tokens,
            "trained": reading.trained,
        }
        plots.append(histogram(f"{reading.setting}: length of a record", unit, reading.lengths))
        if reading.long:
            does = {"truncate": "will be cut", "drop": "will be dropped"}.get(
                overlong[reading.setting], "stop the training"
            )
            text = f"{reading.setting}: {reading.long} of {n} records are too long and {does}"
            level = "error" if overlong[reading.setting] == "refuse" else "warning"
            table = reading.setting.partition(".")[0]
            fix = (
                f'split them, or set {table}.overlong = "drop" or "truncate"'
                if table in ("sft", "reward", "ppo")
                else ""
            )
            noticed.append(Finding(level, "length", text, reading.first_long, fix))
    columns = ("setting", "records", "median", "95 %", "99 %", "longest", "over-long", "tokens", "trained")
    return Section(
        "lengths", f"Lengths in {unit}", figures, (Table("", columns, tuple(rows)),), tuple(plots), tuple(noticed)
    )


def rendered(readings: Sequence[Reading], encoder: Encoder) -> tuple[RenderedSample, ...]:
    """Three records with control tokens, as the ids that the model would get, with the tokens in the loss marked."""
    order = ("sft.data", "reward.data", "ppo.prompts", "pretrain.text")
    chosen = min((r for r in readings if r.records), key=lambda r: (*order, r.setting).index(r.setting), default=None)
    if chosen is None:
        return ()
    n = len(chosen.records)
    samples = []
    for record in [chosen.records[i] for i in sorted({0, n // 2, n - 1})][:SHOWN]:
        try:
            (docs,) = encoder.tokens([shortened(record)], Counts(), train_on_prompt=False)
        except UserError as error:
            return (RenderedSample(error.where, (Span(str(error), trained=False),)),)
        tokens, runs = docs[0], list[Span]()
        start = 0
        for end in range(1, len(tokens.ids) + 1):
            if end == len(tokens.ids) or tokens.train[end] != tokens.train[start]:
                text = encoder.tokenizer.decode(tokens.ids[start:end].tolist(), keep_control=True)
                runs.append(Span(text, bool(tokens.train[start])))
                start = end
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


def as_json(report: Report) -> str:
    """The whole report for programs."""
    payload = {
        "target": report.target,
        "findings": [asdict(finding) for finding in report.findings],
        "sections": {
            s.name: {"title": s.title, "figures": s.figures, "tables": [asdict(t) for t in s.tables]}
            for s in report.sections
        },
        "samples": [asdict(sample) for sample in report.samples],
    }
    return json.dumps(payload, ensure_ascii=False, indent=1, default=str) + "\n"
