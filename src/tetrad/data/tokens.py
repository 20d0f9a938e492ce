"""Records to tokens, and tokens to a memory-mapped store that a stage reads in any order.

Encoding goes in chunks on all cores and gives the ids of the one-by-one path. The store holds ids as uint16 or uint32,
one bit per token for what the loss reads, int64 offsets and each record's place; a corpus is never held in memory.
"""

import tempfile
from array import array
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any, Literal, Self

import numpy as np

from tetrad import storage
from tetrad.data.source import Counts
from tetrad.errors import UserError
from tetrad.text.template import Piece, Template
from tetrad.text.tokenizer import Tokenizer
from tetrad.types import Conversation, Document, Prompt, Tokens

CHUNK_RECORDS = 512
CHUNK_CHARACTERS = 1 << 20
SPOOL_TOKENS = 1 << 18  # tokens moved at once from the spool to the store; a multiple of 8
OnLong = Literal["refuse", "cut", "drop"]
Cut = tuple[list[Piece], str]  # a record's pieces and its place


def tokenize(
    template: Template,
    tokenizer: Tokenizer,
    records: Iterable[Conversation | Prompt],
    *,
    train_on_prompt: bool = False,
    counts: Counts | None = None,
) -> Iterator[Tokens]:
    """The tokens of each conversation (`train` marks answers and their end tokens) or prompt (nothing marked).

    counts: gets the control strings in user text. Errors: E-DATA-CHAT, E-MODEL-TEMPLATE, E-MODEL-TOKENIZER.
    """
    cut = ((template.pieces(tokenizer, record.turns, record.where), record.where) for record in records)
    for tokens in _encode(tokenizer, cut, counts):
        yield Tokens(tokens.ids, np.ones_like(tokens.train), tokens.where) if train_on_prompt else tokens


def tokenize_documents(
    tokenizer: Tokenizer, documents: Iterable[Document], counts: Counts | None = None
) -> Iterator[Tokens]:
    """The tokens of each document with the end-of-text token after it, all of them trained on."""
    end: Piece = (tokenizer.document_end, True)
    return _encode(tokenizer, (([(d.text, True), end], d.where) for d in documents), counts)


def fit(
    stream: Iterable[Tokens],
    max_tokens: int,
    on_long: OnLong,
    counts: Counts,
    *,
    side: Literal["left", "right"] = "right",
) -> Iterator[Tokens]:
    """Records of at most `max_tokens` tokens.

    on_long: refuse (E-DATA-LONG once all are seen, with the figures), cut (tokens of `side` go), drop; both counted.
    A cut record that has nothing left to learn from, though it had, is dropped. Errors: E-DATA-LONG.
    """
    seen = longer = longest = kept = 0
    first = ""
    for tokens in stream:
        seen, length = seen + 1, len(tokens.ids)
        if length <= max_tokens:
            kept += 1
            yield tokens
            continue
        longer, longest, first = longer + 1, max(longest, length), first or tokens.where
        if on_long == "cut":
            part = slice(0, max_tokens) if side == "right" else slice(length - max_tokens, length)
            short = Tokens(tokens.ids[part], tokens.train[part], tokens.where)
            if short.train.any() or not tokens.train.any():
                counts.cut += 1
                kept += 1
                yield short
                continue
        counts.dropped += on_long != "refuse"
    if longer and (on_long == "refuse" or not kept):
        what = f"{longer} of {seen} records are too long: the longest has {longest} tokens, the limit is {max_tokens}"
        hint = 'raise max_tokens, or set on_long = "cut" or "drop"' if on_long == "refuse" else "raise max_tokens"
        raise UserError("E-DATA-LONG", what, where=first, hint=hint)


class TokenStore:
    """Records of tokens in a folder. `lengths`: int64, tokens of each record; `total`: of all."""

    def __init__(self, folder: Path) -> None:
        """Opens what `build` wrote; the files are mapped, not read. Errors: E-CKPT-MANIFEST."""
        meta = storage.read_manifest(folder)
        if meta.get("kind") != "tokens":
            raise UserError("E-CKPT-MANIFEST", "this folder holds no tokens", where=str(folder))
        self._ids = np.memmap(folder / "ids.bin", np.dtype(meta["ids"]), "r")
        self._bits = np.memmap(folder / "train.bin", np.uint8, "r")
        self._offsets = np.memmap(folder / "offsets.bin", np.int64, "r")
        self._places = np.memmap(folder / "places.bin", np.uint32, "r").reshape(-1, 2)
        self._paths: list[str] = meta["paths"]
        self.lengths: np.ndarray[Any, np.dtype[np.int64]] = np.diff(self._offsets)
        self.total = int(self._offsets[-1])

    @classmethod
    def build(cls, folder: Path, stream: Iterable[Tokens], key: str) -> Self:
        """The store of these records; one that is there, whole and with the same key, is used and nothing is read.

        Errors: E-DATA-EMPTY, E-IO-SPACE, E-IO-WRITE, and those of the stream.
        """
        if _is_built(folder, key):
            return cls(folder)
        with tempfile.TemporaryFile() as ids, tempfile.TemporaryFile() as train:
            spool = _Spool(ids, train)
            for tokens in stream:
                spool.append(tokens)
            if not spool.total:
                raise UserError("E-DATA-EMPTY", "there are no tokens", where=str(folder))
            meta = {"kind": "tokens", "key": key, "ids": spool.dtype, "paths": list(spool.paths)}
            storage.write_folder(folder, spool.files(), meta)
        return cls(folder)

    def __len__(self) -> int:
        return len(self.lengths)

    def __getitem__(self, index: int) -> Tokens:
        """Record `index`: ids int32 [n], train bool [n]."""
        return self.piece(index, 0, int(self.lengths[index]))

    def piece(self, index: int, start: int, stop: int) -> Tokens:
        """Tokens start to stop of record `index`."""
        low, high = int(self._offsets[index]) + start, int(self._offsets[index]) + stop
        bits = np.unpackbits(self._bits[low // 8 : (high + 7) // 8], bitorder="little")
        train = bits[low % 8 : low % 8 + high - low].astype(np.bool_)
        return Tokens(self._ids[low:high].astype(np.int32), train, self.where(index))

    def where(self, index: int) -> str:
        """`file:line` of record `index`."""
        path, line = self._places[index]
        return f"{self._paths[path]}:{line}" if line else self._paths[path]


@dataclass(slots=True)
class _Spool:
    """Tokens on their way to the store: ids and marks in unnamed files, 16 bytes a record in memory."""

    ids: IO[bytes]
    train: IO[bytes]
    total: int = 0
    largest: int = 0
    offsets: "array[int]" = field(default_factory=lambda: array("q", [0]))
    places: "array[int]" = field(default_factory=lambda: array("I"))
    paths: dict[str, int] = field(default_factory=dict)

    def append(self, tokens: Tokens) -> None:
        if not len(tokens.ids):
            raise ValueError(f"a record without tokens: {tokens.where}")
        self.ids.write(np.ascontiguousarray(tokens.ids, np.uint32).data)
        self.train.write(np.ascontiguousarray(tokens.train, np.uint8).data)
        self.total += len(tokens.ids)
        self.largest = max(self.largest, int(tokens.ids.max()))
        self.offsets.append(self.total)
        path, _, line = tokens.where.rpartition(":")
        if not line.isdecimal():
            path, line = tokens.where, "0"
        self.places.extend((self.paths.setdefault(path, len(self.paths)), int(line)))

    @property
    def dtype(self) -> str:
        return "uint16" if self.largest < 1 << 16 else "uint32"

    def files(self) -> dict[str, Iterable[bytes]]:
        return {
            "ids.bin": (np.frombuffer(raw, np.uint32).astype(self.dtype).tobytes() for raw in _read(self.ids, 4)),
            "train.bin": (
                np.packbits(np.frombuffer(raw, np.uint8), bitorder="little").tobytes() for raw in _read(self.train, 1)
            ),
            "offsets.bin": (self.offsets.tobytes(),),
            "places.bin": (np.array(self.places, np.uint32).tobytes(),),
        }


def _read(spool: IO[bytes], width: int) -> Iterator[bytes]:
    spool.seek(0)
    while raw := spool.read(SPOOL_TOKENS * width):
        yield raw


def _is_built(folder: Path, key: str) -> bool:
    """The store is a copy of what can be read again: a damaged one is built anew."""
    try:
        return folder.exists() and storage.verify_folder(folder).get("key") == key
    except UserError:
        return False


def _encode(tokenizer: Tokenizer, stream: Iterable[Cut], counts: Counts | None) -> Iterator[Tokens]:
    """Each record's tokens, the texts of many records encoded at once."""
    for chunk in _chunks(stream):
        texts = [piece for pieces, _ in chunk for piece, _ in pieces if isinstance(piece, str)]
        if counts:
            counts.control_strings += sum(map(tokenizer.control_strings, texts))
        encoded = iter(tokenizer.encode_batch(texts))
        for pieces, where in chunk:
            ids: list[int] = []
            train: list[bool] = []
            for piece, trained in pieces:
                new = next(encoded) if isinstance(piece, str) else [piece]
                ids += new
                train += [trained] * len(new)
            yield Tokens(np.array(ids, np.int32), np.array(train, np.bool_), where)


def _chunks(stream: Iterable[Cut]) -> Iterator[list[Cut]]:
    chunk: list[Cut] = []
    characters = 0
    for cut in stream:
        chunk.append(cut)
        characters += sum(len(piece) for piece, _ in cut[0] if isinstance(piece, str))
        if len(chunk) >= CHUNK_RECORDS or characters >= CHUNK_CHARACTERS:
            yield chunk
            chunk, characters = [], 0
    if chunk:
        yield chunk
