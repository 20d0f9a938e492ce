"""People put answers into an order: who gets which item, and the file that their judgements become. No HTTP, no torch.

`ranked.jsonl` is what the reward stage reads: a line per ranking, its choices in the order in which this person saw
them, and before it a line per score. The folder `ranked-beside` has the rest: items (what is asked, and which model
answered), taken (who was given what, and when), aside (skipped, all bad, too fast, controls), sft (edited answers), a
secret and the lock. Every line is on the disk before anyone hears that it is stored; a new process reads them again.
"""

import json
import random
import threading
import time
import unicodedata
from bisect import insort
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import cached_property
from hashlib import blake2b
from pathlib import Path
from statistics import median
from typing import Any, Self

import numpy as np

from tetrad.data.fields import fold
from tetrad.data.record_formats import asked
from tetrad.data.rows import rows
from tetrad.data.source import Counts
from tetrad.datacheck.judgements import Judgements, pair_agreement
from tetrad.journal import Journal, secret
from tetrad.settings.use import Rank
from tetrad.storage import RunLock
from tetrad.types import Comparison, Prompt

CONTROLS = 0.05  # share of what is asked whose order is known
LONGEST = {"name": 64, "comment": 2_000, "edited": 50_000}  # characters
RANKED, ALL_BAD, SKIP, FAST, CONTROL = "ranked", "all bad", "skip", "too fast", "control"
VERDICTS = (RANKED, ALL_BAD, SKIP)
Record = dict[str, Any]


class Invalid(ValueError):
    """An answer that cannot be stored. field: the part of it at fault."""

    def __init__(self, field: str, what: str) -> None:
        super().__init__(f"{field} {what}")
        self.field = field


class Stored(Exception):
    """This person has judged this item, and otherwise. record: what is on the disk."""

    def __init__(self, record: Record) -> None:
        super().__init__("another answer to this item is stored")
        self.record = record


@dataclass(frozen=True)
class Item:
    """A prompt with its answers. makers: the model of each; doubt: how unsure the reward model is of their order;
    ranks: their order, where it is known."""

    prompt: Prompt
    answers: tuple[str, ...]
    makers: tuple[str, ...] = ()
    doubt: float = 0.0
    ranks: tuple[float, ...] = ()

    @classmethod
    def of(cls, record: Record, where: str = "", doubt: float = 0.0) -> Self:
        """A record's prompt and choices, blank and repeated ones left out. Errors: E-DATA-*."""
        texts = {choice["text"]: choice for choice in record["choices"] if choice["text"].strip()}
        makers = tuple(choice.get("model", "") for choice in texts.values())
        ranks = tuple(choice["rank"] for choice in texts.values() if "rank" in choice)
        return cls(asked(fold(record, where), where, Counts()), tuple(texts), makers, doubt, ranks)

    @cached_property
    def id(self) -> str:
        """The same for the same prompt and answers, in whatever order."""
        content = [[(turn.role, turn.text) for turn in self.prompt.turns], sorted(self.answers)]
        return blake2b(json.dumps(content).encode(), digest_size=12).hexdigest()

    @property
    def fields(self) -> Record:
        """The prompt as a record has it: `input`, or Instruction and Input, or messages."""
        turns = self.prompt.turns
        if turns[0].role != "instruction":
            return {"messages": [{"role": turn.role, "content": turn.text} for turn in turns]}
        first, second = (turn.text for turn in turns)
        return {"Instruction": first, "Input": second} if first and second else {"input": first or second}

    def learned(self, answer: str) -> Record:
        """A record of SFT with this answer."""
        fields = self.fields
        if "messages" in fields:
            return {"messages": [*fields["messages"], {"role": "assistant", "content": answer}]}
        return {"Instruction": fields.pop("input", ""), **fields, "Output": answer}


@dataclass(frozen=True)
class Verdict:
    """What a person says of an item. ranks, scores: of the answers in the order shown; 1 is best, None is no score."""

    kind: str
    ranks: tuple[int, ...] = ()
    scores: tuple[float | None, ...] = ()
    comment: str = ""
    edited: str = ""

    def check(self, size: int, scale: Sequence[float]) -> None:
        """Raises Invalid for a verdict on `size` answers that cannot be stored."""
        if self.kind not in VERDICTS:
            raise Invalid("verdict", f"must be one of {', '.join(VERDICTS)}")
        if self.kind == RANKED and (len(self.ranks) != size or not all(1 <= rank <= size for rank in self.ranks)):
            raise Invalid("ranks", f"must be {size} whole numbers from 1 to {size}")
        if self.scores and not (scale and len(self.scores) == size):
            raise Invalid("scores", f"must be {size} numbers or nulls" if scale else "are not asked for")
        if not all(score is None or scale[0] <= score <= scale[1] for score in self.scores):
            raise Invalid("scores", f"must lie between {scale[0]:g} and {scale[1]:g}")
        for name, text in (("comment", self.comment), ("edited", self.edited)):
            if len(text) > LONGEST[name] or any(c == "\0" or "\ud800" <= c <= "\udfff" for c in text):
                raise Invalid(name, f"must be text of at most {LONGEST[name]} characters, without NUL")


def clean_name(name: str) -> str:
    """A name as it is stored. Raises Invalid."""
    name = unicodedata.normalize("NFC", name[:1000]).strip()
    if not 1 <= len(name) <= LONGEST["name"] or not name.isprintable():
        raise Invalid("name", f"must have 1 to {LONGEST['name']} visible characters")
    return name


def doubt(scores: np.ndarray[Any, np.dtype[np.float64]]) -> float:
    """How unsure a reward model is of an order. scores [members, answers]: of an ensemble the members' standard
    deviation, their common offset apart; of a single model the smallest margin between two answers, negated."""
    if len(scores) > 1:
        return float((scores - scores.mean(1, keepdims=True)).std(0).mean())
    return -float(np.diff(np.sort(scores[0])).min())


class Ranking:
    """The items, the people and the files, for one process at a time.

    controls: items of known order. ready: nothing new is asked before it is set; ending: nothing new is sampled.
    Errors: E-RUN-LOCKED, E-DATA-*, E-IO-*.
    """

    def __init__(
        self, settings: Rank, controls: Sequence[Item] = (), clock: Callable[[], float] = time.time, ready: bool = True
    ) -> None:
        self.settings, self.clock, self.ready, self.ending = settings, clock, ready, False
        self.out = Path(settings.out)
        self.folder = self.out.with_name(f"{self.out.stem}-beside")
        self.controls = {item.id: item for item in controls}
        self.items: dict[str, Item] = {}
        self.judged: dict[str, dict[str, Record]] = defaultdict(dict)  # what is on the disk, by item and person
        self._order: list[tuple[float, int, str]] = []  # (-doubt, number, id): the least certain first
        self._wanted: dict[str, int] = {}
        self._taken: dict[str, dict[str, float]] = defaultdict(dict)
        self._open: dict[str, str] = {}
        self._logs: dict[str, Journal] = {}
        self._agreement: tuple[int, tuple[int, float | None]] = (-1, (0, None))
        self._guard, self._stack = threading.RLock(), ExitStack()

    def __enter__(self) -> Self:
        with self._stack as stack:
            stack.enter_context(RunLock(self.folder / "lock"))
            self.secret = secret(self.folder / "secret")
            paths = {name: self.folder / f"{name}.jsonl" for name in ("items", "taken", "aside", "sft")}
            for name, path in {**paths, RANKED: self.out}.items():
                self._logs[name] = Journal(path)
                stack.callback(self._logs[name].close)
            self._restore()
            self._stack = stack.pop_all()
        return self

    def __exit__(self, *_: object) -> None:
        with self._guard:  # an answer that is being written
            self._stack.close()

    def _restore(self) -> None:
        """What the files say. Errors: E-DATA-* with the line."""
        for record, where in self._records("items"):
            self._put(Item.of(record, where, record["doubt"]))
        for record, _ in self._records("taken"):
            self._taken[record["item"]][record["annotator"]] = record["time"]
            self._open[record["annotator"]] = record["item"]
        for record, where in [*self._records("aside"), *self._records(RANKED)]:
            if "choices" in record and "annotator" in record:
                self.judged[Item.of(record, where).id][record["annotator"]] = record
        self._edited = [record for record, _ in self._records("sft")]

    def _records(self, name: str) -> Iterator[tuple[Record, str]]:
        log = self._logs[name]
        for row in rows(log.path, Counts()) if log.size() else ():
            yield row.read(), row.where

    # --- what is asked ---

    def add(self, item: Item) -> None:
        """Another item to ask about, unless it is there already. Errors: E-IO-*."""
        with self._guard:
            if item.id not in self.items:
                makers = item.makers or [""] * len(item.answers)
                choices = [{"text": text, "model": maker} for text, maker in zip(item.answers, makers, strict=True)]
                self._logs["items"].commit({**item.fields, "choices": choices, "doubt": item.doubt})
                self._put(item)

    def _put(self, item: Item) -> None:
        number, overlap = len(self.items), self.settings.overlap
        self.items[item.id] = item
        self._wanted[item.id] = 1 + int((number + 1) * overlap + 1e-9) - int(number * overlap + 1e-9)
        insort(self._order, (-item.doubt, number, item.id))

    def offer(self, name: str) -> Item | None:
        """What this person judges next: the item that they have open, or the first that is free. Errors: E-IO-*."""
        with self._guard:
            item_id = self._open.get(name)
            if item_id is None or not self._free(item_id, name):
                free = (one for _, _, one in self._order if self._free(one, name))
                item_id = (self._control(name) or next(free, None)) if self.ready else None
            if item_id is None:
                return None
            now = self.clock()
            if now - self._taken[item_id].get(name, 0) > 60 * self.settings.minutes:
                self._logs["taken"].commit({"item": item_id, "annotator": name, "time": now})
                self._taken[item_id][name], self._open[name] = now, item_id
            return self._item(item_id)

    def _item(self, item_id: str) -> Item:
        return self.controls.get(item_id) or self.items[item_id]

    def _free(self, item_id: str, name: str) -> bool:
        """Whether so few have judged it, or are about to, that this person may; a control is free for everyone."""
        judged, since = self.judged[item_id], self.clock() - 60 * self.settings.minutes
        if name in judged or item_id in self.controls:
            return name not in judged
        busy = sum(at >= since and one not in {*judged, name} for one, at in self._taken[item_id].items())
        return item_id in self.items and self._final(item_id) + busy < self._wanted[item_id]

    def _final(self, item_id: str) -> int:
        return sum(record.get("verdict", RANKED) in (RANKED, ALL_BAD) for record in self.judged[item_id].values())

    def _control(self, name: str) -> str | None:
        number = sum(name in judged for judged in self.judged.values())
        draw = random.Random(f"{self.settings.seed} control {name} {number}")
        left = [item_id for item_id in self.controls if self._free(item_id, name)]
        return draw.choice(left) if left and draw.random() < CONTROLS else None

    def shown(self, item: Item, name: str) -> list[str]:
        """The answers in this person's order, the same each time."""
        answers = sorted(item.answers)
        random.Random(f"{self.settings.seed} {name} {item.id}").shuffle(answers)
        return answers

    # --- what is answered ---

    def submit(self, name: str, item_id: str, verdict: Verdict) -> Record:
        """Stores a verdict and returns what is on the disk; the same again if it is there already.

        Raises LookupError for an item that this person was not given, Invalid, Stored; errors: E-IO-*.
        """
        with self._guard:
            if name not in self._taken.get(item_id, {}) or item_id not in {**self.items, **self.controls}:
                raise LookupError(item_id)
            item = self._item(item_id)
            verdict.check(len(item.answers), self.settings.scale)
            answers, seconds = self.shown(item, name), round(self.clock() - self._taken[item_id][name], 1)
            ranks = [{"rank": rank} for rank in verdict.ranks] if verdict.kind == RANKED else [{}] * len(answers)
            choices = [{"text": text, **rank} for text, rank in zip(answers, ranks, strict=True)]
            record: Record = {**item.fields, "choices": choices, "annotator": name}
            kind = CONTROL if item_id in self.controls else verdict.kind
            kind = FAST if kind == RANKED and seconds < self.settings.min_seconds else kind
            record |= {"comment": verdict.comment} if verdict.comment else {}
            record |= {"verdict": kind} if kind != RANKED else {}
            record["seconds"] = seconds
            if stored := self.judged[item_id].get(name):
                if any(stored.get(key) != record.get(key) for key in ("choices", "comment")):
                    raise Stored(stored)
                return stored
            self._write(item, kind, record, verdict)
            self.judged[item_id][name] = record
            return record

    def _write(self, item: Item, kind: str, record: Record, verdict: Verdict) -> None:
        """The ranking is written last and with its scores at once: one that is stored has all that belongs to it."""
        edited = item.learned(verdict.edited)
        if verdict.edited.strip() and edited not in self._edited:
            self._logs["sft"].commit(edited)
            self._edited.append(edited)
        if kind != RANKED:
            self._logs["aside"].commit(record)
            return
        base = {**item.fields, "annotator": record["annotator"]}
        scored = [(choice["text"], s) for choice, s in zip(record["choices"], verdict.scores, strict=False)]
        scores = [{**base, "output": text, "score": score} for text, score in scored if score is not None]
        self._logs[RANKED].commit(*scores, record)

    # --- how far it is ---

    def done(self) -> int:
        """Items that enough people have judged."""
        with self._guard:  # items are added meanwhile
            return sum(self._final(item_id) >= wanted for item_id, wanted in self._wanted.items())

    def people(self) -> dict[str, dict[str, Any]]:
        """Of each person the number of each verdict, `right`: the share of pairs of controls in the known order, and
        `flags`: what a program or a tired person would show."""
        records: dict[str, list[tuple[str, Record]]] = defaultdict(list)
        with self._guard:
            for item_id, judged in self.judged.items():
                for name, record in judged.items():
                    records[name].append((item_id, record))
        return {name: self._person(records[name]) for name in sorted(records)}

    def _person(self, records: Sequence[tuple[str, Record]]) -> dict[str, Any]:
        seconds = [record.get("seconds", 60.0) for _, record in records]
        ranks = [(item_id, {c["text"]: c["rank"] for c in r["choices"] if "rank" in c}) for item_id, r in records]
        firsts = Counter(list(given.values()).index(min(given.values())) for _, given in ranks if given)
        right = [
            bool(given) and given[a] < given[b]
            for item_id, given in ranks
            if (item := self.controls.get(item_id))
            for a, best in zip(item.answers, item.ranks, strict=True)
            for b, worse in zip(item.answers, item.ranks, strict=True)
            if best < worse
        ]
        flags = ["under a second for most items"] * (len(seconds) >= 10 and median(seconds) < 1)
        constant = firsts.total() >= 20 and max(firsts.values()) >= 0.9 * firsts.total()
        flags += ["nearly always the same place first"] * constant
        kinds = Counter(record.get("verdict", RANKED) for _, record in records)
        return {**kinds, "flags": flags, "right": sum(right) / len(right) if right else None}

    def agreement(self) -> tuple[int, float | None]:
        """Pairs that several people judged, and Krippendorff's alpha of them."""
        with self._guard:
            total = sum(map(len, self.judged.values()))
            if self._agreement[0] != total:
                self._agreement = total, pair_agreement(Judgements(self._comparisons()))
            return self._agreement[1]

    def _comparisons(self) -> Iterator[Comparison]:
        """Rankings of items that several people ranked."""
        for item_id, item in self.items.items():
            rankings = [(n, r["choices"]) for n, r in self.judged[item_id].items() if "verdict" not in r]
            for name, choices in rankings if len(rankings) > 1 else ():
                texts, ranks = (tuple(choice[key] for choice in choices) for key in ("text", "rank"))
                yield Comparison(item.prompt, texts, ranks, name)
