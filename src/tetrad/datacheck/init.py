"""`tetrad init`: a short recipe from data files, by what reading every record shows.

What each file holds and how its fields are called, which files are held out, how long records are, the scale of the
scores, and what a base needs. Only what differs from the defaults is written, so that the recipe can be read at a
glance. A file of SFT or preference records without a held-out one is split by the hash of its prompts.
"""

import json
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tetrad import storage
from tetrad.console import Console
from tetrad.data.fields import fold, usual_names
from tetrad.data.parquet import plain
from tetrad.data.records import parts
from tetrad.data.rows import rows
from tetrad.data.source import Counts, DataFiles, kind, sources
from tetrad.datacheck.check import encoder_of, first_error
from tetrad.datacheck.reading import Encoder, Reading, read, sniff
from tetrad.errors import UserError
from tetrad.inference.model_folder import model_folder
from tetrad.model.config import read_config
from tetrad.model.inspect import parameter_count
from tetrad.settings.model import Model
from tetrad.settings.use import Init
from tetrad.stages import Recipe
from tetrad.text.tokenizer import SEPARATOR
from tetrad.training.context import renamed
from tetrad.types import Score

Part = tuple[str, str]
"""A kind of record, and a role: data | validation | test."""
_ROLE = re.compile(r"(?<![a-z])(validation|valid|val|dev|eval|test)(?![a-z])")
_TABLE = {"documents": ("pretrain", "text"), "conversations": ("sft", "data"), "preferences": ("reward", "data"),
          "prompts": ("ppo", "prompts")}  # fmt: skip
_FORMATS = (("text",), ("choices",), ("chosen", "rejected"), ("output", "score"), ("instruction", "output"),
            ("prompt", "completion"), ("messages",), ("conversations",))  # fmt: skip
_SCALES = ((0, 1), (1, 5), (-1, 1), (1, 7), (0, 5), (-3, 3), (-4, 4), (0, 10), (1, 10), (0, 100))
_LARGE = 500_000_000  # parameters from which on a base is trained by adapters
_BASE_RATES = {"sft": {"lr": 5e-5}, "reward": {"lr": 5e-5}, "ppo": {}}
_ADAPTER_RATES = {"sft": {"lr": 2e-4}, "reward": {"lr": 2e-4}, "ppo": {"actor_lr": 5e-5, "critic_lr": 5e-5}}
_SHORTEST, _STEP = 32, 16  # tokens of a response, and what its limit is a multiple of


@dataclass
class Draft:
    """The recipe's tables, and the remark behind a line, by "table.key"."""

    tables: dict[str, dict[str, Any]] = field(default_factory=dict)
    remarks: dict[str, str] = field(default_factory=dict)

    def put(self, table: str, key: str, value: Any, remark: str = "") -> None:
        self.tables.setdefault(table, {})[key] = value
        if remark:
            self.remarks[f"{table}.{key}"] = remark

    def lines(self) -> Iterator[str]:
        for table, values in self.tables.items():
            yield f"[{table}]"
            for key, value in values.items():
                remark = self.remarks.get(f"{table}.{key}", "")
                yield f"{key} = {json.dumps(value, ensure_ascii=False)}" + (f"    # {remark}" if remark else "")


def init(settings: Init, paths: Sequence[str], console: Console) -> Path:
    """Writes the recipe, and the two parts of files that are split; the recipe's path. Nothing is ever overwritten.

    Errors: E-CONF-CONFLICT, E-CONF-MISSING, E-DATA-* for the first record that training would refuse, E-MODEL-*.
    """
    out = Path(settings.out)
    _refuse_existing(out)
    rename = (*settings.rename, *_renames(sources(paths, rename=renamed(settings.rename))))
    given = sources(paths, rename=renamed(rename))
    base = model_folder(settings.from_, weights=False) if settings.from_ else None
    limit = read_config(base).max_positions if base else 0
    encoder = encoder_of(Recipe(), base, "", limit)
    readings = _read(given, encoder)
    if not base and not any(what == "documents" for what, _ in readings):
        hint = "give files of texts, or --from a model folder"
        raise UserError("E-CONF-MISSING", "a new model needs texts to learn from, and there are none", hint=hint)
    draft = Draft()
    if settings.from_:
        draft.put("model", "from", settings.from_)
    if rename:
        draft.put("data", "rename", list(rename))
    _files(draft, _names(readings, out.parent, settings.split, console))
    _shapes(draft, readings, encoder, base)
    text = "\n".join(draft.lines()) + "\n"
    storage.write_file(out, text.encode())
    console.say(f"{out}:\n\n{text}")
    console.say(f"next: tetrad check {out}, then tetrad run {out}")
    return out


def _renames(given: DataFiles) -> list[str]:
    """Aliases of fields, for files of no known format whose fields have usual names of other formats."""
    pairs: dict[str, None] = {}
    for path in given.paths:
        row = next(rows(path, Counts(), given.rename), None) if kind(path) != ".txt" else None
        value = row.read() if row else None
        names = fold(value, row.where, rename=given.rename).keys() if row and isinstance(value, dict) else set()
        if any(names >= set(form) for form in _FORMATS):
            continue
        usual = usual_names(names)
        for form in _FORMATS[2:5]:
            if all(name in names or name in usual for name in form):
                wanted = (*form, "instruction") if form[0] != "instruction" else form
                pairs |= {f"{usual[name]}={name.capitalize()}": None for name in wanted if name in usual}
                break
    return list(pairs)


def _read(given: DataFiles, encoder: Encoder) -> dict[Part, Reading]:
    """What the files hold by kind of record and role (data | validation | test); bad records are errors."""
    groups: dict[Part, list[Path]] = {}
    for path in given.paths:
        match = _ROLE.search(path.name.lower())
        role = "data" if not match else "test" if match[1] == "test" else "validation"
        groups.setdefault((sniff(path, given), role), []).append(path)
    readings = {}
    for (what, role), paths in groups.items():
        reading = readings[what, role] = read(".".join(_TABLE[what]), what, given.only(*paths), encoder)
        reading.overlong = "drop"  # which the recipe will say
        if error := first_error([reading], encoder, None):
            raise error
    return readings


def _names(readings: Mapping[Part, Reading], folder: Path, split: float, console: Console) -> dict[Part, list[str]]:
    """The files of each part, relative to the recipe's folder; split where nothing is held out."""
    names = {part: [_relative(file.path, folder) for file in reading.files] for part, reading in readings.items()}
    for what in ("conversations", "preferences"):
        if split and (what, "data") in names and (what, "validation") not in names:
            names[what, "data"], names[what, "validation"] = _split(readings[what, "data"], folder, split, console)
    return names


def _files(draft: Draft, names: Mapping[Part, list[str]]) -> None:
    """The settings that name files. PPO's prompts, and those of the evaluation, may be records of other stages."""
    if ("documents", "data") in names and "model" not in draft.tables:
        draft.put("tokenizer", "text", names["documents", "data"])
    for what in ("documents", "conversations", "preferences"):
        table, key = _TABLE[what]
        keys = {"data": key, "validation": "validation", **({"test": "test"} if what == "preferences" else {})}
        for role, own in keys.items():
            if (what, role) in names:
                draft.put(table, own, names[what, role])
    asks = ("prompts", "conversations", "preferences")
    trained = [names[what, "data"] for what in asks if (what, "data") in names]
    held = [names[what, role] for what in asks for role in ("test", "validation") if (what, role) in names]
    if ("preferences", "data") in names:
        draft.put("ppo", "prompts", trained[0])
        if held:
            draft.put("evaluate", "prompts", held[0])


def _split(reading: Reading, folder: Path, share: float, console: Console) -> tuple[list[str], list[str]]:
    """The files of a reading as two: what is trained on, and `share` of it, held out by the hash of its prompts."""
    held = {
        str(record.where)
        for record, key in zip(reading.records, reading.prompt_keys, strict=True)
        if key % 10_000 < share * 10_000
    }
    result: tuple[list[str], list[str]] = ([], [])
    for file in reading.files:
        stem = file.path.name.partition(".")[0]
        places = [folder / f"{stem}.{part}.jsonl" for part in ("train", "valid")]
        for place in places:
            _refuse_existing(place, "move this one away, or keep the file whole with --split 0")
        sides: tuple[list[bytes], list[bytes]] = ([], [])
        for row in rows(file.path, Counts(), {}):
            line = json.dumps(plain(row.read()), ensure_ascii=False) + "\n"
            sides[row.where in held].append(line.encode(errors="surrogatepass"))
        for place, lines, names in zip(places, sides, result, strict=True):
            if lines:
                storage.write_file(place, lines)
                names.append(_relative(place, folder))
        console.say(f"{file.path} is split by its prompts: {len(sides[0])} to train on, {len(sides[1])} held out")
    return result


def _shapes(draft: Draft, readings: Mapping[Part, Reading], encoder: Encoder, base: Path | None) -> None:
    """The scale of scores, the template, and rates that suit a base."""
    scores = [r.score for reading in readings.values() for r in reading.records if isinstance(r, Score)]
    if scores:
        low, high = min(scores), max(scores)
        scale = next((s for s in _SCALES if s[0] <= low and high <= s[1]), (low, high))
        draft.put("reward", "score_scale", list(scale), f"seen: {low:g} to {high:g}")
    talks = [reading for (what, _), reading in readings.items() if what != "documents"]
    if talks:
        _template(draft, talks, encoder, base)
        _lengths(draft, readings, talks, base)
    if base:
        adapters = parameter_count(read_config(base)) >= _LARGE
        for table, rates in (_ADAPTER_RATES if adapters else _BASE_RATES).items():
            settings = {**({"adapters": True} if adapters else {}), **rates}
            for key, value in settings.items() if table in draft.tables else ():
                draft.put(table, key, value)


def _lengths(draft: Draft, readings: Mapping[Part, Reading], talks: Sequence[Reading], base: Path | None) -> None:
    """Room for the answers; what becomes of records that a base cannot read, or room for them in a new model."""
    answers = sorted(length for reading in talks for length in reading.answer_lengths)
    if answers and "ppo" in draft.tables:
        usual = answers[min(len(answers) - 1, int(0.95 * len(answers)))]
        draft.put(
            "ppo", "max_new_tokens", max(_SHORTEST, -(-usual // _STEP) * _STEP), "95 % of the answers are shorter"
        )
    reads = {"sft": ("conversations",), "reward": ("preferences",), "ppo": ("prompts", "conversations", "preferences")}
    for table, whats in reads.items():
        long = sum(reading.long for (what, _), reading in readings.items() if what in whats)
        if long and table in draft.tables:
            draft.put(table, "overlong", "drop", f"{long} records are longer than the base reads")
    sums = [sum(max(each, default=0) for each in (r.prompt_lengths, r.answer_lengths)) for r in talks]
    if not base and max(sums) > Model().max_positions:
        positions = 1 << max(sums).bit_length()
        draft.put("model", "max_positions", positions, f"the longest record has about {max(sums)} tokens")


def _template(draft: Draft, talks: Sequence[Reading], encoder: Encoder, base: Path | None) -> None:
    """A base's own template, if it has one; else `instruction` for single questions and `chatml` for conversations."""
    several = any(len(parts(record)[0]) > 2 for reading in talks for record in reading.records)
    if base and encoder.template.name != "instruction":
        draft.put("sft", "template", encoder.template.name, "the base's own")
    elif several:
        draft.put("sft", "template", "chatml", "some records are conversations")
    elif base and encoder.tokenizer.control(SEPARATOR) is None:
        draft.put("sft", "separator", "\n\n", "between Instruction, Input and Output")


def _relative(path: Path, folder: Path) -> str:
    return os.path.relpath(path, folder)


def _refuse_existing(path: Path, hint: str = "name another file with --out, or move this one away") -> None:
    if path.exists():
        raise UserError("E-CONF-CONFLICT", "this file is there already", where=str(path), hint=hint)
