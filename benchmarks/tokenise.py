"""How fast files become tokens: Tetrad's store (read, parsed, encoded, marked, written) beside `tokenizers` alone.

    python benchmarks/tokenise.py --megabytes 100 --pairs 3 english=wiki.txt chinese=news.txt

Each text file (paragraphs between blank lines) is repeated in new orders up to the size and written as jsonl. A
byte-level BPE of 8,192 tokens is learned from it. Then, in turn: the peer encodes the texts, which it holds in memory
already, with `encode_batch_fast` on all cores; Tetrad builds its token store from the file. One JSON line a language
gives the seconds of each pair, the median ratio and the share of the processors that others took meanwhile.
"""

import argparse
import json
import os
import random
import statistics
import tempfile
from functools import partial
from pathlib import Path

from clock import measured

from tetrad import storage
from tetrad.data.records import read_documents
from tetrad.data.source import sources
from tetrad.data.store import Encoding, build
from tetrad.text.bpe import learn

CHUNK = 2048  # texts that the peer gets at once


def corpus(source: Path, size: int, seed: int = 0) -> list[str]:
    """The paragraphs in new orders again and again, up to `size` bytes."""
    texts, found, left, draw = [d.text for d in read_documents([source])], [], size, random.Random(seed)
    while left > 0:
        draw.shuffle(texts)
        for text in texts:
            found.append(text)
            left -= len(text.encode())
            if left <= 0:
                break
    return found


def run(name: str, source: Path, megabytes: int, pairs: int, workers: int) -> dict[str, object]:
    """The figures of one language."""
    texts = corpus(source, megabytes << 20)
    tokenizer = learn(texts, 8192, max_bytes=8 << 20)
    peer = tokenizer._twin

    def alone() -> None:
        for start in range(0, len(texts), CHUNK):
            peer.encode_batch_fast(texts[start : start + CHUNK], add_special_tokens=False)

    theirs, ours, foreign = [], [], []
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "texts.jsonl")
        with path.open("w", encoding="utf-8") as file:
            file.writelines(json.dumps({"text": text}, ensure_ascii=False) + "\n" for text in texts)
        digest = storage.sha256_file(path)
        encoding = Encoding(tokenizer.text, tokenizer.eos_ids)
        for number in range(pairs):
            seconds, others = measured(alone)
            theirs.append(seconds)
            foreign.append(others)
            target = Path(folder, f"store-{number}")
            seconds, others = measured(partial(build, target, encoding, sources([path]), [digest], workers))
            ours.append(seconds)
            foreign.append(others)
            storage.remove_folder(target)
    ratios = [a / b for a, b in zip(theirs, ours, strict=True)]
    return {
        "language": name,
        "megabytes": megabytes,
        "texts": len(texts),
        "tokenizers_seconds": [round(s, 2) for s in theirs],
        "tetrad_seconds": [round(s, 2) for s in ours],
        "ratio": round(statistics.median(ratios), 3),
        "tetrad_mb_per_second": round(megabytes / statistics.median(ours), 1),
        "workers": workers,
        "foreign_cpu": round(max(foreign), 3),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("texts", nargs="+", help="NAME=FILE.txt")
    parser.add_argument("--megabytes", type=int, default=100)
    parser.add_argument("--pairs", type=int, default=3)
    parser.add_argument("--workers", type=int, default=len(os.sched_getaffinity(0)))
    given = parser.parse_args()
    for text in given.texts:
        name, _, file = text.partition("=")
        print(json.dumps(run(name, Path(file), given.megabytes, given.pairs, given.workers)), flush=True)


if __name__ == "__main__":
    main()
