"""Records with faults of a known size in them, for the report that must find them."""

import json
import random
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

TOPICS = "film book hotel camera phone song meal museum train novel laptop garden restaurant concert lecture".split()
PLACES = "Paris London Rome Berlin Madrid Vienna Lisbon Athens Oslo Dublin Prague Warsaw".split()
GOOD = "moving funny wonderful superb warm clever bright charming generous fresh".split()
BAD = "drab silly wearisome dreadful dull damp stale monotonous lifeless feeble".split()
SYLLABLES = "ka lo mi ter vas ren du po shi gal nor be tu war fen".split()
FILLER = [a + b for a in SYLLABLES for b in SYLLABLES]  # words that mean nothing


def prompts(count: int, seed: int = 0) -> list[str]:
    """Different questions."""
    draw = random.Random(seed)
    return [
        f"What do you think of the {draw.choice(TOPICS)} number {i} in {draw.choice(PLACES)}?" for i in range(count)
    ]


def answer(draw: random.Random, *, good: bool, sentences: int = 1) -> str:
    """One that a reader of words can tell to be good or bad, with an irrelevant tail."""
    words = draw.sample(GOOD if good else BAD, 2)
    start = f"It was {words[0]} and {words[1]}, case {draw.randrange(10**6)}."
    return " ".join([start, *(" ".join(draw.choices(FILLER, k=14)) + "." for _ in range(sentences))])


def comparisons(asked: Iterable[str], seed: int = 0, **fields: Any) -> list[dict[str, Any]]:
    """A good and a bad answer to each, in any order."""
    draw, found = random.Random(seed), []
    for prompt in asked:
        choices = [{"text": answer(draw, good=True), "rank": 1}, {"text": answer(draw, good=False), "rank": 2}]
        draw.shuffle(choices)
        found.append({"input": prompt, "choices": choices, **fields})
    return found


def flipped(record: Mapping[str, Any]) -> dict[str, Any]:
    return {**record, "choices": [{**choice, "rank": 3 - choice["rank"]} for choice in record["choices"]]}


def edited(text: str, draw: random.Random) -> str:
    """The same text with a word more."""
    words = text.split()
    words.insert(draw.randrange(len(words)), "really")
    return " ".join(words)


def instructions(count: int, seed: int = 0) -> list[dict[str, Any]]:
    """Different records of SFT."""
    draw = random.Random(seed)
    return [
        {"Instruction": prompt, "Output": answer(draw, good=draw.random() < 0.5, sentences=2)}
        for prompt in prompts(count, seed)
    ]


def write(path: Path, records: Iterable[Mapping[str, Any]]) -> str:
    path.write_text("".join(json.dumps(r, ensure_ascii=False) + "\n" for r in records), encoding="utf-8")
    return str(path)
