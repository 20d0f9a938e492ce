"""Duplicate records: exact, near (MinHash over short pieces of text), and across training and validation data.

Exact means the same except for case, punctuation and spaces in the prompt, where Instruction and Input count as one
text. Near means an estimated Jaccard similarity of at least 0.7 between the sets of five-letter shingles (Broder 1997)
of input and answer, under the same instruction. Signatures are rensa's; candidates share a band of them.
"""

import shlex
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import rensa

from tetrad.data.records import shared
from tetrad.datacheck.reading import HELD_OUT, Reading, near_text
from tetrad.report.sections import Section, Table, share

SIMILAR = 0.7
HASHES, BANDS = 128, 32  # two texts of similarity 0.7 share a band of 4 hashes with probability 0.9998
PIECE = 5
MOST = 200_000  # records compared for near duplicates
SHORTEST = 20  # letters; shorter texts are similar by chance
Ids = np.ndarray[Any, np.dtype[np.int64]]
PAIRS = (
    ("pretrain.text", "pretrain.validation"),
    ("sft.data", "sft.validation"),
    ("reward.data", "reward.validation"),
    ("reward.data", "reward.test"),
    ("reward.validation", "reward.test"),
    ("ppo.prompts", "evaluate.prompts"),
    ("grpo.prompts", "evaluate.prompts"),
)


@dataclass(frozen=True)
class Signed:
    """Signatures of the texts that are long enough. at_N: their indices among the records; groups_N: what else must be
    equal; values: [N, HASHES] uint32."""

    records: int
    at_N: Ids
    groups_N: np.ndarray[Any, np.dtype[np.uint64]]
    values: np.ndarray[Any, np.dtype[np.uint32]]

    @classmethod
    def of(cls, texts: Iterable[tuple[int, str]]) -> "Signed":
        """texts: each record's group and its letters."""
        given = list(texts)
        at = [i for i, (_, text) in enumerate(given) if len(text) >= SHORTEST]
        pieces = [list({given[i][1][j : j + PIECE] for j in range(len(given[i][1]) - PIECE + 1)}) for i in at]
        rows = rensa.RMinHash.digest_matrix_from_token_sets(pieces, HASHES, 42).to_rows() if at else []
        groups = np.array([given[i][0] for i in at], np.uint64)
        return cls(len(given), np.array(at, np.int64), groups, np.array(rows, np.uint32).reshape(len(at), HASHES))

    def followed_by(self, other: "Signed") -> "Signed":
        """These records and then others."""
        at = np.concatenate([self.at_N, other.at_N + self.records])
        groups = np.concatenate([self.groups_N, other.groups_N])
        return Signed(self.records + other.records, at, groups, np.concatenate([self.values, other.values]))

    def first(self) -> Ids:
        """For each record the first one that it nearly duplicates: itself where there is none before it."""
        first = np.arange(self.records)
        for band in np.split(self.values, BANDS, axis=1):
            keys = np.ascontiguousarray(np.column_stack([band, self.groups_N.view(np.uint32).reshape(-1, 2)]))
            _, of = np.unique(keys.view(f"V{keys.shape[1] * 4}").ravel(), return_inverse=True)
            order = np.argsort(of, kind="stable")
            starts = np.flatnonzero(np.diff(of[order], prepend=-1))
            leaders = np.repeat(order[starts], np.diff([*starts, len(order)]))
            same = (self.values[order] == self.values[leaders]).mean(1) >= SIMILAR
            mine, theirs = self.at_N[order[same]], self.at_N[leaders[same]]
            first[mine] = np.minimum(first[mine], first[theirs])
        return first[first]


def sections(readings: Sequence[Reading]) -> list[Section]:
    """Duplicates within each setting, and validation records among those trained on."""
    signed = {r.setting: Signed.of(map(near_text, r.records[:MOST])) for r in readings if len(r.keys)}
    return [_duplicates(readings, signed), _leakage(readings, signed)]


def _duplicates(readings: Sequence[Reading], signed: dict[str, Signed]) -> Section:
    section, rows = Section("duplicates", "Duplicates"), []
    for reading in readings:
        n = len(reading.keys)
        if not n:
            continue
        keys = np.frombuffer(reading.keys, np.uint64)
        _, first, counts = np.unique(keys, return_index=True, return_counts=True)
        exact, once = n - len(first), np.zeros(n, np.bool_)
        once[first] = True
        like = signed[reading.setting].first()
        near = int((once[: len(like)] & (like != np.arange(len(like)))).sum())
        where = reading.place(int(first[counts.argmax()])) if exact else ""
        most = f"{where} occurs {counts.max()} times" if exact else ""
        rows.append((reading.setting, n, exact, share(exact, n), near, share(near, n), most))
        stats = {"records": n, "exact": exact, "near": near, "compared_nearly": len(like)}
        section.metrics[reading.setting] = stats
        if exact + near > 0.005 * n:
            text = f"{reading.setting}: {exact} of {n} records are copies of an earlier one, {near} more nearly so"
            much = exact + (near if reading.kind != "prompts" else 0)  # questions are often generated from one pattern
            level = "warning" if much > 0.02 * n else "note"
            path = where.rpartition(":")[0]
            awk = f"keep the first of equal lines: awk '!seen[$0]++' {shlex.quote(path)} > NEW.jsonl"
            fix = awk if path.endswith(".jsonl") else ""
            section.add(level, "duplicates", text, where, fix)
    columns = ("setting", "records", "exact", "", "near", "", "most often")
    section.tables.append(Table("", columns, rows))
    return section


def _leakage(readings: Sequence[Reading], signed: dict[str, Signed]) -> Section:
    section, rows = Section("leakage", "Validation and test records that are trained on"), []
    by_name = {reading.setting: reading for reading in readings if len(reading.keys)}
    for names in PAIRS:
        train, held = map(by_name.get, names)
        if not train or not held:
            continue
        same = shared(held.keys, train.keys)
        split = signed[names[0]].records
        like = signed[names[0]].followed_by(signed[names[1]]).first()[split:] < split
        near = int((like & ~same[: len(like)]).sum())
        exact, n = int(same.sum()), len(held.keys)
        prompts = int(shared(held.prompt_keys, train.prompt_keys).sum()) if train.kind != "documents" else 0
        rows.append((names[1], names[0], n, exact, near, share(exact + near, n), prompts))
        stats = {"records": n, "exact": exact, "near": near, "prompts": prompts}
        section.metrics[f"{names[1]} in {names[0]}"] = stats
        if exact + near:
            same[: len(like)] |= like
            text = f"{exact} of {n} records of {names[1]} are in {names[0]} too, and {near} more nearly so"
            if not exact:
                text = f"{near} of {n} records of {names[1]} are nearly the same as one of {names[0]}"
            refused = exact and names[1] in HELD_OUT.get(names[0], ())
            level = "error" if refused else "warning" if exact + near > 0.005 * n else "note"
            section.add(level, "leakage", text, held.place(int(same.argmax())))
    columns = ("held out", "trained on", "records", "exact", "near", "leaked", "same prompt")
    section.tables.append(Table("", columns, rows))
    return section
