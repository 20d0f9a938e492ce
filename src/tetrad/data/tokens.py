"""Tokenizes records in chunks on all cores, with the same ids as one by one; and handles those that are too long."""

from collections.abc import Callable, Iterable, Iterator
from itertools import chain
from typing import Literal, TypeVar

import numpy as np

from tetrad.data.source import Counts
from tetrad.errors import UserError
from tetrad.text.chat_template import Piece, Template
from tetrad.text.tokenizer import Tokenizer
from tetrad.types import Conversation, Document, Prompt, Tokens

CHUNK_RECORDS = 512
CHUNK_CHARACTERS = 1 << 20
OnLong = Literal["refuse", "truncate", "drop"]
T = TypeVar("T")
Cut = tuple[list[Piece], str]  # a record's pieces and its location


def tokenize(
    template: Template,
    tokenizer: Tokenizer,
    records: Iterable[Conversation | Prompt],
    *,
    train_on_prompt: bool = False,
    last_only: bool = False,
    closed: bool = True,
    counts: Counts | None = None,
) -> Iterator[Tokens]:
    """The tokens of each conversation (`train` marks answers and their end tokens) or prompt (nothing marked).

    train_on_prompt: what is not an answer is marked too. last_only: only the last of several answers is. closed: false
    ends a record at its last end token.
    counts: counts the control strings in user text. Errors: E-DATA-CHAT, E-MODEL-TEMPLATE, E-MODEL-TOKENIZER.
    """
    which = {"last": last_only, "closed": closed, "prompt": train_on_prompt}
    pieces = ((template.pieces(tokenizer, r.turns, r.where, **which), r.where) for r in records)
    return _encode(tokenizer, pieces, counts)


def tokenize_documents(
    tokenizer: Tokenizer, documents: Iterable[Document], counts: Counts | None = None
) -> Iterator[Tokens]:
    """The tokens of each document with the end-of-text token after it, all of them trained on."""
    end: Piece = (tokenizer.document_end, True)
    return _encode(tokenizer, (([(d.text, True), end], d.where) for d in documents), counts)


def limit_length(stream: Iterable[Tokens], max_tokens: int, overlong: OnLong, counts: Counts) -> Iterator[Tokens]:
    """Records of at most `max_tokens` tokens.

    overlong: longer ones are refused (left out here; `refuse_long` raises once all are seen), truncated on
    the right, or dropped; all are counted. A cut record that loses all tokens to train on is dropped.
    """
    for tokens in stream:
        length = len(tokens.ids)
        if length <= max_tokens:
            yield tokens
            continue
        counts.long += 1
        counts.longest, counts.first_long = max(counts.longest, length), counts.first_long or tokens.where
        if overlong == "truncate":
            short = Tokens(tokens.ids[:max_tokens], tokens.train[:max_tokens], tokens.where)
            if short.train.any() or not tokens.train.any():
                counts.cut += 1
                yield short
                continue
        counts.dropped += overlong != "refuse"


def learned(stream: Iterable[Tokens], counts: Counts) -> Iterator[Tokens]:
    """Records with a token to train on; of others only the last answer counts, and it is marked as not trained on."""
    for tokens in stream:
        if tokens.train.any():
            yield tokens
        else:
            counts.excluded += 1


def refuse_long(counts: Counts, max_tokens: int, overlong: OnLong) -> None:
    """Errors: E-DATA-LONG where records that are too long are refused, or nothing is left without them."""
    if counts.long and (overlong == "refuse" or counts.dropped == counts.kept):
        numbers = (counts.long, counts.kept, counts.longest, max_tokens)
        raise too_long(*numbers, counts.first_long, refused=overlong == "refuse")


def too_long(long: int, of: int, longest: int, limit: int, where: str, *, refused: bool = True) -> UserError:
    """The error for `long` of so many records, with the longest one's tokens. limit: 0 where it differs by setting."""
    what = f"{long} of {of} records are too long: the longest has {longest} tokens"
    what += f", the limit is {limit}" if limit else ""
    hint = "raise max_tokens" + (', or set overlong = "truncate" or "drop"' if refused else "")
    return UserError("E-DATA-LONG", what, where=where, hint=hint)


def _encode(tokenizer: Tokenizer, stream: Iterable[Cut], counts: Counts | None) -> Iterator[Tokens]:
    """Each record's tokens; the texts of many records are encoded at once."""
    for chunk in chunked(stream, CHUNK_RECORDS, _characters, CHUNK_CHARACTERS):
        texts = [piece for pieces, _ in chunk for piece, _ in pieces if isinstance(piece, str)]
        if counts:
            counts.control_strings += tokenizer.control_strings(texts)
        encoded = iter(tokenizer.encode_batch(texts))
        id_lists = [next(encoded) if isinstance(piece, str) else (piece,) for pieces, _ in chunk for piece, _ in pieces]
        sizes = np.fromiter(map(len, id_lists), np.int64, len(id_lists))
        ids = np.fromiter(chain.from_iterable(id_lists), np.int32, int(sizes.sum()))
        train = np.repeat(np.array([trained for pieces, _ in chunk for _, trained in pieces], np.bool_), sizes)
        ends = np.cumsum(sizes)[np.cumsum([len(pieces) for pieces, _ in chunk]) - 1].tolist()
        start = 0
        for (_, where), end in zip(chunk, ends, strict=True):
            yield Tokens(ids[start:end], train[start:end], where)
            start = end


def _characters(cut: Cut) -> int:
    return sum([len(piece) for piece, _ in cut[0] if isinstance(piece, str)])


def chunked(
    items: Iterable[T], most: int, size: Callable[[T], int] = lambda _: 0, most_size: int = 1
) -> Iterator[list[T]]:
    """The items in lists; one is full with its item number `most`, or once their sizes add up to `most_size`."""
    chunk: list[T] = []
    total = 0
    for item in items:
        chunk.append(item)
        total += size(item)
        if len(chunk) >= most or total >= most_size:
            yield chunk
            chunk, total = [], 0
    if chunk:
        yield chunk
