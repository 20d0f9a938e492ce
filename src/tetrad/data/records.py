"""Reads files into the records of types.py: documents, conversations, prompts, comparisons and scores; what is refused,
what overlaps. A row's possible fields are defined in record_formats.py."""

import hashlib
import math
import re
import unicodedata
from array import array
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from tetrad.data import record_formats
from tetrad.data.fields import Fields, fold
from tetrad.data.rows import paragraphs, rows
from tetrad.data.source import Counts, DataFiles, Span, kind, refuse_none_learned, sources
from tetrad.errors import UserError
from tetrad.types import Comparison, Conversation, Document, Prompt, Score, Turn, lines

Paths = DataFiles | Iterable[str | Path]
Record = Document | Conversation | Prompt | Comparison | Score
Refuse = Callable[[UserError, str], None]
"""Called for each bad row, with the row's text; reading continues. Without it the first bad row's error is raised."""
R = TypeVar("R", bound=Record)
_NO_LETTER = re.compile(r"[\W_]+")


# --- reading ---


def read_documents(paths: Paths, counts: Counts | None = None, refuse: Refuse | None = None) -> Iterator[Document]:
    """Paragraphs of txt files and `text` of records, blank texts refused. Errors: E-DATA-*."""
    return _each(documents_of, paths, counts, refuse)


def read_conversations(paths: Paths, counts: Counts | None = None) -> Iterator[Conversation]:
    """SFT records; the last turn is the assistant's. Errors: E-DATA-*."""
    return _each(conversations_of, paths, counts)


def read_prompts(paths: Paths, counts: Counts | None = None) -> list[Prompt]:
    """The prompts of any record file; answers, ranks and scores are ignored. Errors: E-DATA-*."""
    return list(_each(prompts_of, paths, counts))


def read_preferences(
    paths: Paths, score_scale: Sequence[float] = (), counts: Counts | None = None
) -> list[Comparison | Score]:
    """Comparisons and scores in the order of the files; fully tied comparisons are kept and counted as `tied`.

    score_scale: the lowest and highest possible score; required as soon as a record has a score.
    Errors: E-DATA-SCALE (no scale; reports the range seen), E-DATA-NUMBER (outside it), E-DATA-RANK, other E-DATA-*.
    """
    records = list(_each(partial(preferences_of, score_scale=score_scale), paths, counts))
    refuse_no_scale(records, score_scale)
    return records


def _each(
    read: Callable[..., Iterator[R]], paths: Paths, counts: Counts | None, refuse: Refuse | None = None
) -> Iterator[R]:
    given = paths if isinstance(paths, DataFiles) else sources(paths)
    return (record for path in given.paths for record in read(path, given, counts or Counts(), refuse))


def reader(what: str, score_scale: Sequence[float] = ()) -> Callable[..., Iterator[Record]]:
    """The function below that reads a file, or a part of one: (part, files, counts, refuse) to records of this kind."""
    readers: dict[str, Callable[..., Iterator[Record]]] = {
        "documents": documents_of,
        "conversations": conversations_of,
        "prompts": prompts_of,
        "preferences": partial(preferences_of, score_scale=score_scale),
    }
    return readers[what]


def documents_of(
    part: Path | Span, given: DataFiles, counts: Counts, refuse: Refuse | None = None
) -> Iterator[Document]:
    path = part.path if isinstance(part, Span) else part
    if kind(path) != ".txt":
        yield from _records(record_formats.document, part, given, counts, refuse)
        return
    for where, text in paragraphs(part, counts):
        counts.kept += 1
        counts.forms["paragraphs"] += 1
        yield Document(text, where)


def preferences_of(
    part: Path | Span, given: DataFiles, counts: Counts, refuse: Refuse | None = None, score_scale: Sequence[float] = ()
) -> Iterator[Comparison | Score]:
    return _records(partial(record_formats.preference, scale=score_scale), part, given, counts, refuse)


def refuse_no_scale(records: Iterable[Record], score_scale: Sequence[float]) -> None:
    """Errors: E-DATA-SCALE where scores have no declared scale; reports the range seen."""
    scores = [(r.score, r.where) for r in records if isinstance(r, Score) and not score_scale]
    if scores:
        low, high = min(scores)[0], max(scores)[0]
        what = f"{len(scores)} records have a score (seen: {low:g} to {high:g}) and no scale is declared"
        hint = f"add to [reward]: score_scale = [{low:g}, {high:g}] (the lowest and highest possible score)"
        raise UserError("E-DATA-SCALE", what, where=scores[0][1], hint=hint)


def read_comparisons(
    paths: Paths, score_gap: float, score_scale: Sequence[float] = (), counts: Counts | None = None
) -> list[Comparison]:
    """The comparisons that have an order; and of scores, the answers to one prompt by one annotator as a ranked list.

    In that list an answer ranks below the next better one where its score is lower by at least `score_gap`, else the
    two tie; a text that was scored twice has its mean. The list stands where its first score does. What has no order
    says nothing and is counted as `tied`. Errors: E-CONF-MISSING as `refuse_scores`, E-DATA-EMPTY, other E-DATA-*.
    """
    counts = counts or Counts()
    records = list(_each(partial(preferences_of, score_scale=score_scale), paths, counts))
    refuse_scores(records, score_gap)
    given, scored = list[Comparison | list[Score]](), dict[tuple[Any, ...], list[Score]]()
    for record in records:
        if isinstance(record, Comparison):
            given.append(record)
        else:
            group = scored.setdefault((record.prompt.turns, record.annotator), [])
            given += [] if group else [group]
            group.append(record)
    lists = [each if isinstance(each, Comparison) else _listed(each, score_gap) for each in given]
    ordered = [each for each in lists if len(set(each.ranks)) > 1]
    counts.tied = len(lists) - len(ordered)
    if records and not ordered:
        hint = "give pairs or ranked lists" + (", or lower dpo.score_gap" if scored else "")
        raise UserError(
            "E-DATA-EMPTY", "no record makes one answer better than another", where=records[0].where, hint=hint
        )
    return ordered


def _listed(scores: Sequence[Score], score_gap: float) -> Comparison:
    """Scores of one prompt as a ranked list."""
    by_text: dict[str, list[float]] = {}
    for each in scores:
        by_text.setdefault(each.answer, []).append(each.score)
    means = {text: sum(values) / len(values) for text, values in by_text.items()}
    falling = sorted(means.values(), reverse=True)
    tops = [score for above, score in pairwise([math.inf, *falling]) if above - score >= score_gap]
    ranks = tuple(float(sum(score <= top for top in tops)) for score in means.values())
    return Comparison(scores[0].prompt, tuple(means), ranks, scores[0].annotator, where=scores[0].where)


def refuse_unusable(setting: str, records: Iterable[Record], score_scale: Sequence[float], score_gap: float) -> None:
    """Errors: where records have scores and what the setting's stage needs for them is not given: E-DATA-SCALE, of DPO
    E-CONF-MISSING."""
    if setting.startswith("dpo."):
        refuse_scores(records, score_gap)
    else:
        refuse_no_scale(records, score_scale)


def refuse_scores(records: Iterable[Record], score_gap: float) -> None:
    """Errors: E-CONF-MISSING where records have scores and nothing says how scores become comparisons."""
    places = [] if score_gap else [record.where for record in records if isinstance(record, Score)]
    if places:
        what = f"{len(places)} records of dpo.data have a score, and DPO learns from comparisons"
        hint = "add to [dpo]: score_gap = G; a score that is lower by G then makes an answer the worse one"
        raise UserError("E-CONF-MISSING", what, where=places[0], hint=hint)


def _records(
    make: Callable[[Fields, str, Counts], R | None],
    part: Path | Span,
    given: DataFiles,
    counts: Counts,
    refuse: Refuse | None = None,
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


conversations_of = partial(_records, record_formats.conversation)
prompts_of = partial(_records, record_formats.asked)


# --- contents of records ---


def parts(record: Record) -> tuple[tuple[Turn, ...], tuple[str, ...]]:
    """The turns of a record's prompt, and its answers."""
    match record:
        case Document():
            return (), ()
        case Prompt():
            return record.turns, ()
        case Conversation():
            return record.turns[:-1], (record.turns[-1].text,)
        case Comparison():
            return record.prompt.turns, record.answers
    return record.prompt.turns, (record.answer,)


def answers(record: Comparison | Score) -> list[Conversation]:
    """Each answer of a record as a conversation of its prompt, in the record's order."""
    turns, texts = parts(record)
    return [Conversation((*turns, Turn("assistant", text)), record.where) for text in texts]


def asked(record: Record) -> str:
    """The prompt as one text; Instruction and Input joined. Empty for a document."""
    return lines(parts(record)[0])


def squeezed(text: str) -> str:
    """Only letters and digits, in NFKC and case-folded: it stays the same when an Input moves into the
    Instruction ("Translate: hello" and "Translate", "hello"); a text without any letter stays as it is."""
    return _NO_LETTER.sub("", unicodedata.normalize("NFKC", text).casefold()) or text


# --- what is the same record ---


def text_key(text: str) -> int:
    """A 64-bit hash."""
    return int.from_bytes(hashlib.blake2b(text.encode(errors="surrogatepass"), digest_size=8).digest(), "little")


def content_key(record: Record) -> int:
    """A 64-bit hash of what makes two records the same, wherever they appear: the prompt squeezed, the answers verbatim
    in the order of preference, the score and the annotator."""
    if isinstance(record, Document):
        return text_key(record.text)
    texts = list(parts(record)[1])
    content: tuple[Any, ...] = (squeezed(asked(record)), texts)
    if isinstance(record, Comparison):
        order = sorted(range(len(texts)), key=lambda i: (record.ranks[i], texts[i]))
        ranks = np.unique([record.ranks[i] for i in order], return_inverse=True)[1].tolist()
        content = (content[0], [texts[i] for i in order], ranks, record.annotator)
    elif isinstance(record, Score):
        content = (*content, record.score, record.annotator)
    return text_key(repr(content))


def shared(keys: Sequence[int], others: Sequence[int]) -> np.ndarray[Any, np.dtype[np.bool_]]:
    """Which of these records, given by their keys, are among the others."""
    return np.isin(np.asarray(keys, np.uint64), np.asarray(others, np.uint64))


def refuse_overlap(train: Iterable[Record], validation: Iterable[Record]) -> None:
    """Errors: E-DATA-OVERLAP where a validation record is also trained on. Memory: 8 bytes per training record."""
    held = [(content_key(record), record.where) for record in validation]
    if not held:
        return
    leaked = shared([key for key, _ in held], array("Q", map(content_key, train)))
    if leaked.any():
        what = f"{int(leaked.sum())} of {len(held)} held-out records are also trained on"
        where = held[int(leaked.argmax())][1]
        raise UserError("E-DATA-OVERLAP", what, where=where, hint="split by a hash of the text")
