"""Reads files into the records of types.py: documents, conversations, prompts, comparisons and scores; what is refused,
what overlaps. A row's possible fields are defined in record_formats.py."""

import hashlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import TypeVar

import numpy as np

from tetrad.data import record_formats
from tetrad.data.fields import Fields, fold
from tetrad.data.rows import paragraphs, rows
from tetrad.data.source import Counts, DataFiles, Span, kind, refuse_none_learned, sources
from tetrad.errors import UserError
from tetrad.types import Comparison, Conversation, Document, Prompt, Score, Turn

Paths = DataFiles | Iterable[str | Path]
Record = Document | Conversation | Prompt | Comparison | Score
Refuse = Callable[[UserError, str], None]
"""Called for each bad row, with the row's text; reading continues. Without it the first bad row's error is raised."""
R = TypeVar("R", bound=Record)


# --- reading ---


def read_documents(paths: Paths, counts: Counts | None = None, refuse: Refuse | None = None) -> Iterator[Document]:
    """Paragraphs of txt files and `text` of records, blank texts refused. Errors: E-DATA-*."""
    counts = counts or Counts()
    given = paths if isinstance(paths, DataFiles) else sources(paths)
    for path in given.paths:
        yield from documents_of(path, given, counts, refuse)


def documents_of(
    part: Path | Span, given: DataFiles, counts: Counts, refuse: Refuse | None = None
) -> Iterator[Document]:
    """The documents of one file, or of a part of one."""
    path = part.path if isinstance(part, Span) else part
    if kind(path) != ".txt":
        yield from _records(part, record_formats.document, given, counts, refuse)
        return
    for where, text in paragraphs(part, counts):
        counts.kept += 1
        counts.forms["paragraphs"] += 1
        yield Document(text, where)


def read_conversations(
    paths: Paths, counts: Counts | None = None, refuse: Refuse | None = None
) -> Iterator[Conversation]:
    """SFT records; the last turn is the assistant's. Errors: E-DATA-*."""
    counts = counts or Counts()
    given = paths if isinstance(paths, DataFiles) else sources(paths)
    for path in given.paths:
        yield from conversations_of(path, given, counts, refuse)


def conversations_of(
    part: Path | Span, given: DataFiles, counts: Counts, refuse: Refuse | None = None
) -> Iterator[Conversation]:
    """The conversations of one file, or of a part of one."""
    return _records(part, record_formats.conversation, given, counts, refuse)


def read_prompts(paths: Paths, counts: Counts | None = None, refuse: Refuse | None = None) -> list[Prompt]:
    """The prompts of any record file; answers, ranks and scores are ignored. Errors: E-DATA-*."""
    counts = counts or Counts()
    given = paths if isinstance(paths, DataFiles) else sources(paths)
    return [p for path in given.paths for p in prompts_of(path, given, counts, refuse)]


def prompts_of(part: Path | Span, given: DataFiles, counts: Counts, refuse: Refuse | None = None) -> Iterator[Prompt]:
    """The prompts of one file, or of a part of one."""
    return _records(part, record_formats.asked, given, counts, refuse)


def read_preferences(
    paths: Paths, score_scale: Sequence[float] = (), counts: Counts | None = None, refuse: Refuse | None = None
) -> list[Comparison | Score]:
    """Comparisons and scores in the order of the files; fully tied comparisons are kept and counted as `tied`.

    score_scale: the lowest and highest possible score; required as soon as a record has a score.
    Errors: E-DATA-SCALE (no scale; reports the range seen), E-DATA-NUMBER (outside it), E-DATA-RANK, other E-DATA-*.
    """
    counts = counts or Counts()
    given = paths if isinstance(paths, DataFiles) else sources(paths)
    records = [r for path in given.paths for r in preferences_of(path, given, counts, refuse, score_scale)]
    refuse_no_scale(records, score_scale)
    return records


def preferences_of(
    part: Path | Span, given: DataFiles, counts: Counts, refuse: Refuse | None = None, score_scale: Sequence[float] = ()
) -> Iterator[Comparison | Score]:
    """The comparisons and scores of one file, or of a part of one."""

    def make(fields: Fields, where: str, counts: Counts) -> Comparison | Score:
        record = record_formats.preference(fields, where, counts, score_scale)
        counts.tied += isinstance(record, Comparison) and len(set(record.ranks)) < 2
        return record

    return _records(part, make, given, counts, refuse)


def refuse_no_scale(records: Iterable[Record], score_scale: Sequence[float]) -> None:
    """Errors: E-DATA-SCALE where scores have no declared scale; reports the range seen."""
    scores = [(r.score, r.where) for r in records if isinstance(r, Score) and not score_scale]
    if scores:
        low, high = min(scores)[0], max(scores)[0]
        what = f"{len(scores)} records have a score (seen: {low:g} to {high:g}) and no scale is declared"
        hint = f"add to [reward]: score_scale = [{low:g}, {high:g}] (the lowest and highest possible score)"
        raise UserError("E-DATA-SCALE", what, where=scores[0][1], hint=hint)


def _records(
    part: Path | Span,
    make: Callable[[Fields, str, Counts], R | None],
    given: DataFiles,
    counts: Counts,
    refuse: Refuse | None,
) -> Iterator[R]:
    read, excluded = counts.read, counts.excluded
    for row in rows(part, counts, given.rename):
        try:
            record = make(fold(row.read(), row.where, rename=given.rename), row.where, counts)
        except UserError as error:
            if refuse is None:
                raise
            counts.refused += 1
            refuse(error, row.text())
            continue
        if record is not None:
            counts.kept += 1
            yield record
    if isinstance(part, Path):
        refuse_none_learned(counts.excluded - excluded, counts.read - read, str(part))


# --- contents of records ---


def answers(record: Comparison | Score) -> list[Conversation]:
    """Each answer of a record as a conversation of its prompt, in the record's order."""
    texts = record.answers if isinstance(record, Comparison) else (record.answer,)
    return [Conversation((*record.prompt.turns, Turn("assistant", answer)), record.where) for answer in texts]


def content_key(record: Record) -> bytes:
    """8 bytes of a hash of the record's content, wherever it appears."""
    content = [getattr(record, name) for name in record.__dataclass_fields__ if name not in ("where", "prompt")]
    prompt = getattr(record, "prompt", None)
    return hashlib.sha256(repr((type(record).__name__, prompt and prompt.turns, content)).encode()).digest()[:8]


def refuse_overlap(train: Iterable[Record], validation: Iterable[Record]) -> None:
    """Errors: E-DATA-OVERLAP where a validation record is also trained on. Memory: 8 bytes per training record."""
    held = [(int.from_bytes(content_key(record), "little"), record.where) for record in validation]
    if not held:
        return
    seen = np.fromiter((int.from_bytes(content_key(record), "little") for record in train), np.uint64)
    leaked = np.isin(np.array([key for key, _ in held], np.uint64), seen)
    if leaked.any():
        what = f"{int(leaked.sum())} of {len(held)} held-out records are also trained on"
        where = held[int(leaked.argmax())][1]
        raise UserError("E-DATA-OVERLAP", what, where=where, hint="split by a hash of the text")
