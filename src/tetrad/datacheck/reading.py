"""Reads every record of a recipe or of files, trains nothing, and keeps what the other parts of a report need.

A bad row is set aside with its reason and reading continues. Records are kept; of documents, whose files may be
larger than memory, the first MOST_TEXTS, and of the others a hash and a length.
"""

from array import array
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, fields, is_dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from tetrad.data.records import Record, answers, asked, content_key, parts, reader, squeezed, text_key
from tetrad.data.rows import rows
from tetrad.data.similarity import LONGEST
from tetrad.data.source import Counts, DataFiles, kind, sources
from tetrad.data.tokens import chunked, tokenize, tokenize_documents
from tetrad.errors import UserError
from tetrad.stages import Recipe
from tetrad.text.chat_template import Template
from tetrad.text.tokenizer import Tokenizer
from tetrad.training.context import renamed
from tetrad.types import Comparison, Document, Score, Tokens

MOST_TEXTS = 50_000  # documents held in memory
MOST_REFUSED = 1_000  # bad rows reported one by one; the rest are counted
SETTINGS = {
    "tokenizer.text": "documents",
    "pretrain.text": "documents",
    "pretrain.validation": "documents",
    "sft.data": "conversations",
    "sft.validation": "conversations",
    "reward.data": "preferences",
    "reward.validation": "preferences",
    "reward.test": "preferences",
    "dpo.data": "preferences",
    "dpo.validation": "preferences",
    "ppo.prompts": "prompts",
    "grpo.prompts": "prompts",
    "ptx.text": "documents",
    "evaluate.prompts": "prompts",
}
"""The settings that name files, and what their records are."""
HELD_OUT = {
    "sft.data": ("sft.validation",),
    "reward.data": ("reward.validation", "reward.test"),
    "dpo.data": ("dpo.validation",),
}
"""Where training refuses a record that appears on both sides."""
_CHUNK = 512


@dataclass(frozen=True)
class Encoder:
    """What turns records into tokens: a tokenizer and a template. limit: the longest record, 0 for no limit.

    stand_in: bytes are the tokens, because the real tokenizer does not exist yet; lengths are then not in tokens.
    """

    tokenizer: Tokenizer
    template: Template
    limit: int = 0
    stand_in: bool = False
    train_on_prompt: bool = False

    def tokens(self, records: Sequence[Record], counts: Counts) -> Iterator[list[Tokens]]:
        """The documents of each record: one, or one per answer of a comparison."""
        if documents := [record for record in records if isinstance(record, Document)]:
            yield from ([tokens] for tokens in tokenize_documents(self.tokenizer, documents, counts))
            return
        groups: list[Any] = [answers(r) if isinstance(r, Comparison | Score) else [r] for r in records]
        flat = (conversation for group in groups for conversation in group)
        encoded = tokenize(self.template, self.tokenizer, flat, train_on_prompt=self.train_on_prompt, counts=counts)
        yield from ([next(encoded) for _ in group] for group in groups)


@dataclass
class FileReading:
    """What became of one file. refused: (error, the row's text) of the first rows; failed: why reading ended early."""

    path: Path
    counts: Counts = field(default_factory=Counts)
    refused: list[tuple[UserError, str]] = field(default_factory=list)
    codes: Counter[str] = field(default_factory=Counter)
    failed: UserError | None = None

    @property
    def errors(self) -> list[UserError]:
        """Those of the rows reported one by one, then what ended the reading."""
        return [error for error, _ in self.refused] + ([self.failed] if self.failed else [])

    def refuse(self, error: UserError, text: str) -> None:
        """Sets a row aside."""
        self.codes[error.code] += 1
        if len(self.refused) < MOST_REFUSED:
            self.refused.append((error, text))

    def until_failed(self, stream: Iterator[Record]) -> Iterator[Record]:
        """The records up to where the file as a whole turns out to be unreadable."""
        try:
            yield from stream
        except UserError as error:
            self.failed = error
            self.codes[error.code] += 1


@dataclass
class Reading:
    """The records of one setting. lengths: tokens (or characters) of each; trained: tokens in the loss.

    prompt_lengths, answer_lengths: tokens of each prompt and each (last) answer, estimated where there is no tokenizer.

    overlong: what becomes of a record that is too long; long: how many are.

    keys: a hash of each record's content, where Instruction and Input count as one text; prompt_keys: of its prompt.
    """

    setting: str
    kind: str
    overlong: str = "refuse"
    files: list[FileReading] = field(default_factory=list)
    records: list[Any] = field(default_factory=list)
    keys: "array[int]" = field(default_factory=partial(array, "Q"))
    prompt_keys: "array[int]" = field(default_factory=partial(array, "Q"))
    lengths: "array[int]" = field(default_factory=partial(array, "l"))
    prompt_lengths: "array[int]" = field(default_factory=partial(array, "l"))
    answer_lengths: "array[int]" = field(default_factory=partial(array, "l"))
    tokens: int = 0
    trained: int = 0
    long: int = 0
    first_long: str = ""

    def place(self, index: int) -> str:
        """A record's location, as far as records are held."""
        return str(self.records[index].where) if index < len(self.records) else self.setting

    def keep(self, chunk: Sequence[Record], encoder: Encoder, counts: Counts) -> None:
        """Adds records, and their lengths."""
        self.keys.extend(map(content_key, chunk))
        self.prompt_keys.extend(text_key(squeezed(asked(record))) for record in chunk)
        self.records += chunk[: MOST_TEXTS - len(self.records)] if self.kind == "documents" else chunk
        if encoder.stand_in:
            self._guess(chunk)
            counts.control_strings += encoder.tokenizer.control_strings([t for r in chunk for t in _texts(r)])
            return
        for record, docs in zip(chunk, encoder.tokens(chunk, counts), strict=True):
            lengths = [len(tokens.ids) for tokens in docs]
            self.lengths.append(max(lengths))
            self.tokens += sum(lengths)
            self.trained += sum(int(tokens.train.sum()) for tokens in docs)
            if self.kind == "documents":
                continue
            if not encoder.train_on_prompt:  # else no label shows where the answer begins
                rears = [tokens.train[::-1] for tokens in docs]  # some templates put a line end behind the answer
                ends = [int(rear[rear.argmax() :].argmin()) for rear in rears]
                self.prompt_lengths.append(lengths[0] - ends[0])
                self.answer_lengths.extend(ends if parts(record)[1] else ())
            if encoder.limit and max(lengths) > encoder.limit:
                self.long += 1
                self.first_long = self.first_long or record.where

    def _guess(self, chunk: Sequence[Record]) -> None:
        for record in chunk:
            texts = _texts(record)
            self.lengths.append(max(map(len, texts)))
            self.tokens += sum(map(guessed_tokens, texts))
            if self.kind != "documents":
                guessed = [guessed_tokens(text) for text in parts(record)[1]]
                self.trained += sum(guessed)
                self.prompt_lengths.append(guessed_tokens(asked(record)))
                self.answer_lengths.extend(guessed)


def stage_of(setting: str) -> str:
    """The stage that reads a setting's files."""
    table = setting.partition(".")[0]
    return {"ptx": "ppo"}.get(table, table)


def settings_of(recipe: Recipe) -> list[tuple[str, str, DataFiles]]:
    """(setting, kind of record, files) of all that a recipe reads; a tokenizer's text only where pre-training doesn't.

    Errors: E-DATA-PATH, E-DATA-OVERLAP, E-DATA-HUB.
    """
    rename, settings = renamed(recipe.data.rename), list[tuple[str, str, DataFiles]]()
    for name, what in SETTINGS.items():
        table, _, key = name.partition(".")
        given = sources(getattr(getattr(recipe, table), key), rename=rename)
        if given.paths:
            settings.append((name, what, given))
    pretrain = {path for name, _, given in settings if name == "pretrain.text" for path in given.paths}
    return [f for f in settings if f[0] != "tokenizer.text" or not set(f[2].paths) <= pretrain]


def read(setting: str, what: str, given: DataFiles, encoder: Encoder, scale: Sequence[float] = ()) -> Reading:
    """All records of these files. Errors: E-MODEL-*."""
    reading = Reading(setting, what)
    for path in given.paths:
        file = FileReading(path)
        reading.files.append(file)
        stream = file.until_failed(reader(what, scale)(path, given, file.counts, file.refuse))
        for chunk in chunked(stream, _CHUNK):
            reading.keep(chunk, encoder, file.counts)
    return reading


def sniff(path: Path, given: DataFiles) -> str:
    """The kind of a file's records, inferred from its first rows."""
    if kind(path) == ".txt":
        return "documents"
    with suppress(UserError):  # whoever reads all of the file reports it
        for number, row in enumerate(rows(path, Counts(), given.rename)):
            try:
                value = row.read()
            except UserError:
                continue
            given_names = value if isinstance(value, dict) else {}
            names = {given.rename.get(name := str(n).lower(), name) for n, v in given_names.items() if v is not None}
            if names & {"choices", "chosen"} or names >= {"output", "score"}:
                return "preferences"
            if names & {"output", "completion"} or (names & {"messages", "conversations"} and _answered(value)):
                return "conversations"
            if "text" in names and not names & {"messages", "conversations"}:
                return "documents"
            if names & {"messages", "conversations", "instruction", "prompt", "input"}:
                return "prompts"
            if number >= 100:
                break
    return "conversations"


def _answered(value: dict[Any, Any]) -> bool:
    """Whether a conversation ends with an answer."""
    turns = next((v for k, v in value.items() if str(k).lower() in ("messages", "conversations")), None)
    last = turns[-1] if isinstance(turns, list) and turns and isinstance(turns[-1], dict) else {}
    return last.get("role", last.get("from")) not in ("user", "human", "system")


# --- texts of records ---


def content(record: Record) -> str:
    """All text of a record."""
    return record.text if isinstance(record, Document) else "\n".join([asked(record), *parts(record)[1]])


def near_text(record: Record) -> tuple[int, str]:
    """What must be equal (the hash of an Instruction that has an Input), and the text compared for similarity."""
    turns, texts = parts(record)
    if len(turns) == 2 and turns[0].role in ("instruction", "system") and turns[1].text:
        return text_key(turns[0].text), squeezed("".join([turns[1].text, *texts])[:LONGEST])
    return 0, squeezed(content(record)[:LONGEST])


def guessed_tokens(text: str) -> int:
    """About how many tokens a text will have, before there is a tokenizer: Han characters yield more than letters."""
    wide = (len(text.encode(errors="replace")) - len(text)) // 2
    return round(0.75 * wide + 0.27 * (len(text) - wide)) + 1


def shortened(value: Any) -> Any:
    """The same record with no text over LONGEST characters."""
    if isinstance(value, str):
        return value[:LONGEST]
    if isinstance(value, tuple):
        return tuple(map(shortened, value))
    if is_dataclass(value) and not isinstance(value, type):
        return replace(value, **{f.name: shortened(getattr(value, f.name)) for f in fields(value)})
    return value


def _texts(record: Record) -> list[str]:
    if isinstance(record, Document):
        return [record.text]
    start = asked(record)
    return [start + answer for answer in parts(record)[1]] or [start]
