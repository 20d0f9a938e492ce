"""A stage's tokens on disk: read in any order, never held in memory as a whole.

A store is a sequence of parts, each a folder with ids (uint16 or uint32), one loss-mask bit per token, int64 offsets
and each record's location. A part holds the records of a file, or of a few megabytes of one, under a name derived from
everything that determines its content: existing parts are reused, an interrupted build continues, and a new file costs
no more than itself. Parts are built in parallel by separate processes.
"""

import hashlib
import json
import multiprocessing
import os
import signal
import tempfile
import threading
import time
from array import array
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import suppress
from dataclasses import asdict, dataclass
from functools import cache
from itertools import accumulate
from pathlib import Path
from typing import IO, Any

import numpy as np

from tetrad import storage
from tetrad.data.records import conversations_of, documents_of
from tetrad.data.source import Counts, DataFiles, Span, refuse_none_learned, spans
from tetrad.data.tokens import OnLong, chunked, learned, limit_length, refuse_long, tokenize, tokenize_documents
from tetrad.errors import UserError
from tetrad.storage import Json
from tetrad.text.chat_template import Template
from tetrad.text.tokenizer import Tokenizer
from tetrad.types import Tokens

VERSION = 2  # raised when the same records would yield different tokens
PART_BYTES = 4 << 20  # a part's text, where a file can be split
MOST_PARTS = 512  # of one file, so that its folders stay few
ALONE_BYTES = 16 << 20  # less than this is built faster by one process
SPOOL_TOKENS = 1 << 18  # tokens moved at once to the spool, and from it to the part; a multiple of 8
HELD_RECORDS = 4096


@dataclass(frozen=True)
class Encoding:
    """How records become tokens: all that determines their ids and loss mask. template: None for documents.

    tokenizer: the text of tokenizer.json, eos_ids: its end tokens. max_tokens: 0 for no limit.
    """

    tokenizer: str
    eos_ids: tuple[int, ...]
    template: Template | None = None
    train_on_prompt: bool = False
    last_only: bool = False
    max_tokens: int = 0
    overlong: OnLong = "refuse"

    def key(self, given: DataFiles) -> str:
        """A hash of it, and of the aliases of fields."""
        settings = {**asdict(self), "rename": sorted(given.rename.items()), "version": VERSION}
        return hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()

    def stream(self, span: Span, given: DataFiles, counts: Counts) -> Iterator[Tokens]:
        """The tokens of a part's records. Errors: E-DATA-*, E-MODEL-*."""
        tokenizer = _tokenizer(self.tokenizer, self.eos_ids)
        if self.template is None:
            return tokenize_documents(tokenizer, documents_of(span, given, counts), counts)
        records = conversations_of(span, given, counts)
        options = {"train_on_prompt": self.train_on_prompt, "last_only": self.last_only}
        tokens = learned(tokenize(self.template, tokenizer, records, **options, counts=counts), counts)
        return limit_length(tokens, self.max_tokens, self.overlong, counts) if self.max_tokens else tokens


@cache
def _tokenizer(text: str, eos_ids: tuple[int, ...]) -> Tokenizer:
    return Tokenizer(text, eos_ids)


class TokenStore:
    """Records of tokens in folders. `lengths`: int64, tokens of each record; `total`: of all."""

    def __init__(self, parts: Sequence[Path]) -> None:
        """Opens what `build` wrote; the files stay closed. Errors: E-CKPT-MANIFEST, E-DATA-EMPTY."""
        self._parts = [part for part in map(_Part, parts) if part.records]
        if not self._parts:
            where = str(parts[0]) if parts else ""
            raise UserError("E-DATA-EMPTY", "there are no tokens", where=where, hint="give records that are not blank")
        self.lengths: np.ndarray[Any, np.dtype[np.int64]] = np.concatenate([p.lengths() for p in self._parts])
        self._first = np.concatenate([[0], np.cumsum([p.records for p in self._parts])])
        self.total = int(self.lengths.sum())

    def __len__(self) -> int:
        return len(self.lengths)

    def __getitem__(self, index: int) -> Tokens:
        """Record `index`: ids int32 [n], train bool [n]."""
        return self.piece(index, 0, int(self.lengths[index]))

    def piece(self, index: int, start: int, stop: int) -> Tokens:
        """Tokens start to stop of record `index`."""
        part, inner = self._place(index)
        return part.piece(inner, start, stop)

    def where(self, index: int) -> str:
        """`file:line` of record `index`."""
        part, inner = self._place(index)
        return next(part.places(inner, 1))

    def places(self) -> Iterator[str]:
        """`file:line` of every record."""
        return (place for part in self._parts for place in part.places())

    def _place(self, index: int) -> tuple["_Part", int]:
        number = int(np.searchsorted(self._first, index, side="right")) - 1
        return self._parts[number], index - int(self._first[number])


class _Part:
    """One folder of a store. Each read opens a file and closes it: parts may be many, and open files are limited."""

    def __init__(self, folder: Path) -> None:
        meta = storage.read_manifest(folder)
        if meta.get("kind") != "tokens":
            raise UserError("E-CKPT-MANIFEST", "this folder holds no tokens", where=str(folder), hint="remove it")
        self.records: int = meta["records"]
        self._folder, self._dtype = folder, str(meta["ids"])
        self._paths: list[str] = meta["paths"]

    def lengths(self) -> np.ndarray[Any, np.dtype[np.int64]]:
        return np.ediff1d(self._read("offsets.bin", "int64"))

    def piece(self, index: int, start: int, stop: int) -> Tokens:
        first = int(self._read("offsets.bin", "int64", index, 1)[0])
        low, high = first + start, first + stop
        packed = self._read("train.bin", "uint8", low // 8, (high + 7) // 8 - low // 8)
        train = np.unpackbits(packed, bitorder="little")[low % 8 : low % 8 + high - low].astype(np.bool_)
        ids = self._read("ids.bin", self._dtype, low, high - low).astype(np.int32)
        return Tokens(ids, train, next(self.places(index, 1)))

    def places(self, index: int = 0, count: int = -1) -> Iterator[str]:
        """`file:line` of `count` records from `index` on; -1 for all."""
        for path, line in self._read("places.bin", "uint32", 2 * index, 2 * count).reshape(-1, 2).tolist():
            yield f"{self._paths[path]}:{line}" if line else self._paths[path]

    def _read(self, name: str, dtype: str, start: int = 0, count: int = -1) -> np.ndarray[Any, Any]:
        width = np.dtype(dtype).itemsize
        with open(f"{self._folder}/{name}", "rb", buffering=0) as file:
            file.seek(start * width)
            return np.frombuffer(file.read(count * width if count >= 0 else -1), dtype)


# --- building ---


@dataclass(frozen=True)
class _Job:
    """One part to build. given: only its file."""

    folder: Path
    span: Span
    given: DataFiles


def build(
    folder: Path,
    encoding: Encoding,
    given: DataFiles,
    sha256: Sequence[str],
    workers: int = 1,
    progress: Callable[[int, int], None] = lambda done, parts: None,
) -> tuple[TokenStore, Counts]:
    """The tokens of all records of these files, in their order, and what became of the rows.

    folder: holds the parts; those no longer needed are removed. sha256: of each file. workers: processes.
    progress: called with the number of finished parts and of all. Errors: E-DATA-*, E-MODEL-*, E-IO-*, those of
    the first file first.
    """
    jobs = _jobs(folder, encoding, given, sha256)
    todo = [job for job in jobs if not _is_built(job.folder)]
    done = len(jobs) - len(todo)
    progress(done, len(jobs))
    for built, _ in enumerate(_run(encoding, todo, workers), done + 1):
        progress(built, len(jobs))
    counts = Counts()
    for job in jobs:
        counts.add(storage.read_manifest(job.folder)["counts"])
    refuse_none_learned(counts.excluded, counts.read, str(given.paths[0]))
    refuse_long(counts, encoding.max_tokens, encoding.overlong)
    names = {job.folder.name for job in jobs}
    for old in folder.iterdir():
        if old.name not in names:
            storage.remove_folder(old)
    return TokenStore([job.folder for job in jobs]), counts


def _jobs(folder: Path, encoding: Encoding, given: DataFiles, sha256: Sequence[str]) -> list[_Job]:
    key = encoding.key(given)
    jobs = []
    for path, digest in zip(given.paths, sha256, strict=True):
        for span in spans(path, max(PART_BYTES, path.stat().st_size // MOST_PARTS)):
            part_key = json.dumps([key, digest, str(path), span.start, span.stop])
            name = hashlib.sha256(part_key.encode()).hexdigest()[:24]
            jobs.append(_Job(folder / name, span, given.only(path)))
    return jobs


def _run(encoding: Encoding, jobs: Sequence[_Job], workers: int) -> Iterator[None]:
    """Builds the parts, and yields after each in their order. Errors: those of the first part first."""
    size = sum((job.span.stop or job.span.path.stat().st_size) - job.span.start for job in jobs)
    if workers < 2 or len(jobs) < 2 or size < ALONE_BYTES:
        for job in jobs:
            _build_part(job, encoding)
            yield
        return
    context = multiprocessing.get_context("spawn")
    pool = ProcessPoolExecutor(min(workers, len(jobs)), context, _begin_worker, (os.getpid(), encoding))
    try:
        for future in [pool.submit(_build_part, job) for job in jobs]:
            yield future.result()
    finally:
        pool.shutdown(cancel_futures=True)


_of_worker: dict[str, Encoding] = {}
_whole: set[Path] = set()


def _begin_worker(parent: int, encoding: Encoding) -> None:
    """One thread per process, a silent exit on Ctrl-C, and no process outlives its parent."""
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    _of_worker["encoding"] = encoding

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(0.5)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def _build_part(job: _Job, encoding: Encoding | None = None) -> None:
    """encoding: the worker's own, if it is one."""
    counts = Counts()
    write_part(job.folder, (encoding or _of_worker["encoding"]).stream(job.span, job.given, counts), counts)


def write_part(folder: Path, stream: Iterable[Tokens], counts: Counts) -> None:
    """Writes one part with these records, and what became of the rows. Errors: E-IO-*, and those of the stream.

    Ids and loss mask wait in unnamed files; a record takes 16 bytes of memory.
    """
    offsets, places, paths, largest = array("q", [0]), array("I"), dict[str, int](), 0
    with tempfile.TemporaryFile() as ids_file, tempfile.TemporaryFile() as train_file:
        for chunk in chunked(stream, HELD_RECORDS, lambda tokens: len(tokens.ids), SPOOL_TOKENS):
            lengths = [len(tokens.ids) for tokens in chunk]
            if not all(lengths):
                raise ValueError(f"a record without tokens: {chunk[lengths.index(0)].where}")
            ids = np.concatenate([tokens.ids for tokens in chunk])
            largest = max(largest, int(ids.max()))
            ids_file.write(ids.astype(np.uint32).data)
            train_file.write(np.concatenate([tokens.train for tokens in chunk]).astype(np.uint8).data)
            offsets.extend(accumulate(lengths, initial=offsets.pop()))
            for tokens in chunk:
                path, _, line = tokens.where.rpartition(":")
                if not line.isdecimal():
                    path, line = tokens.where, "0"
                places.extend((paths.setdefault(path, len(paths)), int(line)))
        records, dtype = len(offsets) - 1, "uint16" if largest < 1 << 16 else "uint32"
        files: dict[str, Iterable[bytes]] = {
            "ids.bin": (raw.astype(dtype).tobytes() for raw in _read(ids_file, np.uint32)),
            "train.bin": (np.packbits(raw, bitorder="little").tobytes() for raw in _read(train_file, np.uint8)),
            "offsets.bin": (offsets.tobytes(),),
            "places.bin": (np.array(places, np.uint32).tobytes(),),
        }
        meta: dict[str, Json] = {"kind": "tokens", "records": records, "ids": dtype, "paths": list(paths)}
        storage.write_folder(folder, files if records else {}, {**meta, "counts": counts.told()})


def _read(file: IO[bytes], dtype: type[np.generic]) -> Iterator[np.ndarray[Any, Any]]:
    file.seek(0)
    while raw := file.read(SPOOL_TOKENS * np.dtype(dtype).itemsize):
        yield np.frombuffer(raw, dtype)


def _is_built(folder: Path) -> bool:
    """Whether a part is there and intact: a damaged one is rebuilt from its file. A process checks once."""
    if folder not in _whole and folder.exists():
        with suppress(UserError):
            storage.verify_folder(folder)
            _whole.add(folder)
    return folder in _whole
