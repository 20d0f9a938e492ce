"""Reads every record of a recipe or of files, trains nothing, and keeps what the other parts of a report need.

A bad row is set aside with its reason and reading continues. Records are kept; of documents, whose files may be
larger than memory, the first MOST_TEXTS, and of the others a hash and a length.
"""

import hashlib
import re
import unicodedata
from array import array
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from tetrad.data.records import (
    Record,
    Refuse,
    answers,
    conversations_of,
    documents_of,
    preferences_of,
    prompts_of,
)
from tetrad.data.rows import rows
from tetrad.data.similarity import LONGEST
from tetrad.data.source import Counts, DataFiles, kind, sources
from tetrad.data.tokens import tokenize, tokenize_documents
from tetrad.errors import UserError
from tetrad.registry import Recipe
from tetrad.text.chat_template import Template
from tetrad.text.tokenizer import Tokenizer
from tetrad.training.context import renamed
from tetrad.types import Comparison, Conversation, Document, Prompt, Score, Tokens, Turn, lines

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
    "ppo.prompts": "prompts",
    "ptx.text": "documents",
    "evaluate.prompts": "prompts",
}
"""The settings that name files, and what their records are."""
_CHUNK = 512
_NO_LETTER = re.compile(r"[\W_]+")


@dataclass(frozen=True)
class Encoder:
    """What turns records into tokens: a tokenizer and a template. limit: the longest record, 0 for no limit.

    stand_in: bytes are the tokens, because the real tokenizer does not exist yet; lengths are then not in tokens.
    """

    tokenizer: Tokenizer
    template: Template
    limit: int = 0
    stand_in: bool = False

    def tokens(self, records: Sequence[Record], counts: Counts, *, train_on_prompt: bool) -> Iterator[list[Tokens]]:
        """The documents of each record: one, or one per answer of a comparison."""
        if records and isinstance(records[0], Document):
            stream = tokenize_documents(self.tokenizer, [r for r in records if isinstance(r, Document)], counts)
            yield from ([tokens] for tokens in stream)
            return
        parts = [_conversations(record) for record in records]
        flat = (conversation for part in parts for conversation in part)
        encoded = tokenize(self.template, self.tokenizer, flat, train_on_prompt=train_on_prompt, counts=counts)
        yield from ([next(encoded) for _ in part] for part in parts)


@dataclass
class FileReading:
    """What became of one file. refused: (error, the row's text) of the first rows; failed: why reading ended early."""

    path: Path
    counts: Counts = field(default_factory=Counts)
    refused: list[tuple[UserError, str]] = field(default_factory=list)
    codes: Counter[str] = field(default_factory=Counter)
    failed: UserError | None = None


@dataclass
class Reading:
    """The records of one setting. lengths: tokens (or characters) of each; trained: tokens in the loss.

    prompt_lengths, answer_lengths: tokens of each prompt and each (last) answer, estimated where there is no tokenizer.

    keys: a hash of each record's content, where Instruction and Input count as one text; prompt_keys: of its prompt.
    """

    setting: str
    kind: str
    files: list[FileReading] = field(default_factory=list)
    records: list[Any] = field(default_factory=list)
    keys: "array[int]" = field(default_factory=lambda: array("Q"))
    prompt_keys: "array[int]" = field(default_factory=lambda: array("Q"))
    lengths: "array[int]" = field(default_factory=lambda: array("l"))
    prompt_lengths: "array[int]" = field(default_factory=lambda: array("l"))
    answer_lengths: "array[int]" = field(default_factory=lambda: array("l"))
    tokens: int = 0
    trained: int = 0
    long: int = 0
    first_long: str = ""

    @property
    def counts(self) -> Counts:
        """The counts of all files."""
        total = Counts()
        for file in self.files:
            total.add(file.counts)
        return total

    def place(self, index: int) -> str:
        """A record's location, as far as records are held."""
        return str(self.records[index].where) if index < len(self.records) else self.setting

    @property
    def texts(self) -> list[str]:
        """The text of each held record, prompt and answers."""
        return [content(record) for record in self.records]


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


def read(setting: str, what: str, given: DataFiles, encoder: Encoder, **options: Any) -> Reading:
    """All records of these files. options: score_scale and train_on_prompt where they matter. Errors: E-MODEL-*."""
    reading = Reading(setting, what)
    for path in given.paths:
        file = FileReading(path)
        reading.files.append(file)
        stream = _stream(what, path, given, file, options.get("score_scale", ()))
        for chunk in _chunks(_until_failed(stream, file)):
            _keep(reading, file, chunk, encoder, train_on_prompt=bool(options.get("train_on_prompt")))
    return reading


def _stream(what: str, path: Path, given: DataFiles, file: FileReading, scale: Sequence[float]) -> Iterator[Record]:
    def refuse(error: UserError, text: str) -> None:
        file.codes[error.code] += 1
        if len(file.refused) < MOST_REFUSED:
            file.refused.append((error, text))

    return reader(what, scale)(path, given, file.counts, refuse)


def reader(what: str, scale: Sequence[float]) -> Callable[[Path, DataFiles, Counts, Refuse | None], Iterator[Record]]:
    """The function that reads a file of this kind of record."""
    if what == "preferences":
        return lambda path, given, counts, refuse: preferences_of(path, given, counts, refuse, scale)
    readers: dict[str, Callable[[Path, DataFiles, Counts, Refuse | None], Iterator[Record]]] = {
        "documents": documents_of,
        "conversations": conversations_of,
        "prompts": prompts_of,
    }
    return readers[what]


def _until_failed(stream: Iterator[Record], file: FileReading) -> Iterator[Record]:
    """The records up to where the file as a whole turns out to be unreadable."""
    try:
        yield from stream
    except UserError as error:
        file.failed = error
        file.codes[error.code] += 1


def _chunks(stream: Iterable[Record]) -> Iterator[list[Record]]:
    chunk: list[Record] = []
    for record in stream:
        chunk.append(record)
        if len(chunk) == _CHUNK:
            yield chunk
            chunk = []
    if chunk:
        yield chunk


def _keep(reading: Reading, file: FileReading, chunk: list[Record], encoder: Encoder, *, train_on_prompt: bool) -> None:
    for record in chunk:
        reading.keys.append(_hash(_identity(record)))
        reading.prompt_keys.append(_hash(squeezed(asked(record))))
    room = MOST_TEXTS - len(reading.records) if reading.kind == "documents" else len(chunk)
    reading.records += chunk[:room]
    if encoder.stand_in:
        for record in chunk:
            texts = _texts(record)
            reading.lengths.append(max(map(len, texts)))
            reading.tokens += sum(map(guessed_tokens, texts))
            if reading.kind != "documents":
                answers = [guessed_tokens(text) for text in replies(record)]
                reading.trained += sum(answers)
                reading.prompt_lengths.append(guessed_tokens(asked(record)))
                reading.answer_lengths.extend(answers)
            file.counts.control_strings += encoder.tokenizer.control_strings(texts)
        return
    for record, docs in zip(chunk, encoder.tokens(chunk, file.counts, train_on_prompt=train_on_prompt), strict=True):
        longest = max(len(tokens.ids) for tokens in docs)
        reading.lengths.append(longest)
        reading.tokens += sum(len(tokens.ids) for tokens in docs)
        reading.trained += sum(int(tokens.train.sum()) for tokens in docs)
        if reading.kind != "documents" and not train_on_prompt:  # else no label shows where the answer begins
            ends = [int(tokens.train[::-1].argmin()) for tokens in docs]
            reading.prompt_lengths.append(len(docs[0].ids) - ends[0])
            reading.answer_lengths.extend(ends if replies(record) else ())
        if encoder.limit and longest > encoder.limit and reading.kind != "documents":
            reading.long += 1
            reading.first_long = reading.first_long or record.where


def sniff(path: Path, given: DataFiles) -> str:
    """The kind of a file's records, inferred from its first rows. Errors: E-DATA-*."""
    if kind(path) == ".txt":
        return "documents"
    for number, row in enumerate(rows(path, Counts(), given.rename)):
        try:
            value = row.read()
        except UserError:
            continue
        fields = value if isinstance(value, dict) else {}
        names = {given.rename.get(name := str(n).lower(), name) for n in fields if fields[n] is not None}
        if names & {"choices", "chosen"} or names >= {"output", "score"}:
            return "preferences"
        if names & {"output", "completion"} or names & {"messages", "conversations"}:
            return "conversations" if names & {"output", "completion"} or _answered(value) else "prompts"
        if "text" in names:
            return "documents"
        if names & {"instruction", "prompt", "input"}:
            return "prompts"
        if number >= 100:
            break
    return "conversations"


def _answered(value: dict[Any, Any]) -> bool:
    """Whether a conversation ends with an answer."""
    turns = next((v for k, v in value.items() if str(k).lower() in ("messages", "conversations")), None)
    last = turns[-1] if isinstance(turns, list) and turns and isinstance(turns[-1], dict) else {}
    return last.get("role", last.get("from")) not in ("user", "human", "system")


# --- contents of records ---


def asked(record: Record) -> str:
    """The prompt as one text; Instruction and Input joined. Empty for a document."""
    return lines(_turns(record))


def replies(record: Record) -> tuple[str, ...]:
    """The answers."""
    if isinstance(record, Comparison):
        return record.answers
    if isinstance(record, Score):
        return (record.answer,)
    return (record.turns[-1].text,) if isinstance(record, Conversation) else ()


def content(record: Record) -> str:
    """All text of a record."""
    return record.text if isinstance(record, Document) else "\n".join([asked(record), *replies(record)])


def near_text(record: Record) -> tuple[int, str]:
    """What must be equal (the hash of an Instruction that has an Input), and the text compared for similarity."""
    turns = _turns(record)
    if len(turns) == 2 and turns[0].role in ("instruction", "system") and turns[1].text:
        return _hash(turns[0].text), squeezed("".join([turns[1].text, *replies(record)])[:LONGEST])
    return 0, squeezed(content(record)[:LONGEST])


def squeezed(text: str) -> str:
    """Only letters and digits, in NFKC and case-folded: it stays the same when an Input moves into the
    Instruction ("Translate: hello" and "Translate", "hello"); a text without any letter stays as it is."""
    return _NO_LETTER.sub("", unicodedata.normalize("NFKC", text).casefold()) or text


def guessed_tokens(text: str) -> int:
    """About how many tokens a text will have, before there is a tokenizer: Han characters yield more than letters."""
    wide = (len(text.encode(errors="replace")) - len(text)) // 2
    return round(0.75 * wide + 0.27 * (len(text) - wide)) + 1


def shortened(record: Record) -> Record:
    """The same record with no text over LONGEST characters."""
    if isinstance(record, Document):
        return Document(record.text[:LONGEST], record.where)
    if isinstance(record, Comparison | Score):
        turns = tuple(Turn(turn.role, turn.text[:LONGEST]) for turn in record.prompt.turns)
        prompt = Prompt(turns, record.where)
        if isinstance(record, Comparison):
            return replace(record, prompt=prompt, answers=tuple(answer[:LONGEST] for answer in record.answers))
        return replace(record, prompt=prompt, answer=record.answer[:LONGEST])
    return replace(record, turns=tuple(replace(turn, text=turn.text[:LONGEST]) for turn in record.turns))


def _turns(record: Record) -> tuple[Turn, ...]:
    if isinstance(record, Document):
        return ()
    if isinstance(record, Conversation):
        return record.turns[:-1]
    return record.turns if isinstance(record, Prompt) else record.prompt.turns


def _texts(record: Record) -> list[str]:
    if isinstance(record, Document):
        return [record.text]
    start = asked(record)
    return [start + answer for answer in replies(record)] or [start]


def _conversations(record: Record) -> list[Conversation | Prompt]:
    if isinstance(record, Comparison | Score):
        return list(answers(record))
    return [record] if isinstance(record, Conversation | Prompt) else []


def _identity(record: Record) -> str:
    """What makes two records the same: the prompt squeezed, the answers verbatim, in the order of preference."""
    if isinstance(record, Document):
        return record.text
    texts = list(replies(record))
    if isinstance(record, Comparison):
        order = sorted(range(len(texts)), key=lambda i: (record.ranks[i], texts[i]))
        ranks = np.unique([record.ranks[i] for i in order], return_inverse=True)[1].tolist()
        return repr((squeezed(asked(record)), [texts[i] for i in order], ranks, record.annotator))
    if isinstance(record, Score):
        return repr((squeezed(asked(record)), texts, record.score, record.annotator))
    return repr((squeezed(asked(record)), texts))


def _hash(text: str) -> int:
    return int.from_bytes(hashlib.blake2b(text.encode(errors="surrogatepass"), digest_size=8).digest(), "little")
