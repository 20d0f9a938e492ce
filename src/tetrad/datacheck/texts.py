"""What texts are about, by counting alone: scripts, languages, clusters of prompts, and how close two sets are.

A text's features are its words and its short runs of letters, hashed into signed buckets and weighted by rarity; no
model is used. Languages are py3langid's, of texts that are long enough.
"""

import re
import zlib
from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np
import py3langid

from tetrad.data.records import asked
from tetrad.data.similarity import LONGEST, MOST, Texts, covered, spread
from tetrad.datacheck.reading import Reading, content
from tetrad.report.sections import Section, Table, histogram, share

MOST_CLASSIFIED = 1_000
CLUSTERS = 12
GROUPED = ("sft.data", "reward.data", "ppo.prompts", "grpo.prompts")
TOLD = 20  # letters below which a language is a guess
_SCRIPTS = {
    "Han": "\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U0003ffff",
    "Latin": "A-Za-z\u00aa\u00ba\u00c0-\u024f\u1e00-\u1eff\uff21-\uff3a\uff41-\uff5a",
    "Kana": "\u3040-\u30ff\u31f0-\u31ff\uff66-\uff9f",
    "Hangul": "\u1100-\u11ff\u3130-\u318f\uac00-\ud7af",
    "Cyrillic": "\u0400-\u052f",
    "Greek": "\u0370-\u03ff",
    "Arabic": "\u0600-\u06ff\u0750-\u077f",
    "Hebrew": "\u0590-\u05ff",
    "Devanagari": "\u0900-\u097f",
    "Thai": "\u0e00-\u0e7f",
}
_PATTERNS = {name: re.compile(f"[{letters}]") for name, letters in _SCRIPTS.items()}
_LETTER = re.compile(r"[^\W\d_]")


def folds(names: Sequence[str], parts: int = 5) -> np.ndarray[Any, np.dtype[np.int64]]:
    """A fold for each name, the same for the same name."""
    return np.array([zlib.crc32(name.encode(errors="surrogatepass")) % parts for name in names])


# --- scripts and languages ---


def scripts(readings: Sequence[Reading]) -> Section:
    """Shares of letters by script and of texts by language."""
    section, rows = Section("languages", "Scripts and languages"), []
    for reading in readings:
        texts = [content(record)[:LONGEST] for record in spread(reading.records, MOST_CLASSIFIED)]
        if not texts:
            continue
        letters = Counter({name: sum(len(p.findall(text)) for text in texts) for name, p in _PATTERNS.items()})
        total = sum(len(_LETTER.findall(text)) for text in texts)
        letters["other"] = max(total - sum(letters.values()), 0)
        long = [text for text in texts if len(_LETTER.findall(text[:400])) >= (TOLD if _latin(text) else TOLD // 4)]
        languages = Counter(py3langid.classify(text[:2000])[0] for text in long)
        by_script = {name: n / max(total, 1) for name, n in letters.most_common() if n}
        by_language = {name: n / len(long) for name, n in languages.most_common(8)}
        section.metrics[reading.setting] = {"scripts": by_script, "languages": by_language, "texts": len(texts)}
        rows.append((reading.setting, len(texts), _listed(by_script), _listed(by_language)))
        strange = sum("\ufffd" in text for text in texts)
        if strange:
            text = f"{reading.setting}: {share(strange, len(texts))} of the texts contain U+FFFD"
            section.add("warning", "encoding", f"{text} (decoded wrongly before)")
    columns = ("setting", "texts", "scripts, share of letters", "languages, share of texts")
    section.tables.append(Table("", columns, rows))
    return section


def _latin(text: str) -> bool:
    return bool(_PATTERNS["Latin"].search(text[:400]))


def _listed(shares: dict[str, float]) -> str:
    return ", ".join(f"{name} {100 * value:.0f} %" for name, value in shares.items() if value >= 0.005) or "-"


# --- prompts ---


def prompts(readings: Sequence[Reading]) -> Section:
    """How many different prompts there are, and the groups that they fall into."""
    section, rows = Section("prompts", "Prompts"), list[tuple[Any, ...]]()
    section.tables.append(Table("", ("setting", "prompts", "different", ""), rows))
    for reading in readings:
        texts = [asked(record) for record in reading.records]
        if reading.kind == "documents" or not texts:
            continue
        different = len(np.unique(np.frombuffer(reading.prompt_keys, np.uint64)))
        counts: dict[str, Any] = {"prompts": len(reading.prompt_keys), "different": different}
        if different >= 5 * CLUSTERS and reading.setting in GROUPED:
            groups = clusters(list(dict.fromkeys(spread(texts, MOST))))
            counts |= {"clusters": [s for s, _ in groups], "effective_clusters": _effective([s for s, _ in groups])}
            lines = [(f"{100 * size:.1f} %", example) for size, example in groups]
            columns = ("share", "a prompt in the middle")
            section.tables.append(Table(f"groups in {reading.setting}", columns, lines, brief=4))
            if groups[0][0] > 0.5:
                text = f"{reading.setting}: {groups[0][0]:.0%} of the prompts are alike ({groups[0][1]})"
                section.add("warning", "diversity", text)
        section.metrics[reading.setting] = counts
        rows.append((reading.setting, len(texts), different, share(different, len(reading.prompt_keys))))
    return section


def clusters(texts: Sequence[str]) -> list[tuple[float, str]]:
    """(share, the text nearest to the centre) of each group, largest first: k-means on the sphere (Dhillon 2001)."""
    rows = Texts(texts).rows
    chosen = [0]
    nearest = rows @ rows[0]
    while len(chosen) < CLUSTERS:  # each start as far as possible from the others
        chosen.append(int(nearest.argmin()))
        nearest = np.maximum(nearest, rows @ rows[chosen[-1]])
    centres = rows[chosen]
    of = np.zeros(len(rows), np.int64)
    for _ in range(25):
        new = (rows @ centres.T).argmax(1)
        if (new == of).all():
            break
        of = new
        sums = np.stack([rows[of == k].sum(0) if (of == k).any() else centres[k] for k in range(CLUSTERS)])
        centres = sums / np.maximum(np.linalg.norm(sums, axis=1, keepdims=True), 1e-9)
    groups = []
    for k in range(CLUSTERS):
        mine = np.flatnonzero(of == k)
        if len(mine):
            middle = texts[mine[int((rows[mine] @ centres[k]).argmax())]]
            groups.append((len(mine) / len(rows), on_one_line(middle)))
    return sorted(groups, reverse=True)


def _effective(shares: Sequence[float]) -> float:
    """exp of the entropy: how many groups of equal size would be as diverse."""
    shares_K = np.array(shares)
    return float(np.exp(-(shares_K * np.log(shares_K)).sum()))


def on_one_line(text: str, width: int = 70) -> str:
    """The text without line ends, of at most so many characters."""
    line = " ".join(text.split())
    return line if len(line) <= width else line[: width - 1] + "…"


def coverage(asks: Reading, judged: Reading) -> Section:
    """Whether the prompts of a policy lie where the reward model was trained.

    Each prompt's similarity to its nearest among the reward model's; `usual` is how close those are to each other.
    """
    stage = asks.setting.partition(".")[0].upper()
    section = Section("coverage", f"{stage}'s prompts and the reward model's")
    cover = covered([asked(record) for record in asks.records], [asked(record) for record in judged.records])
    if cover is None:
        return section
    section.metrics |= {"nearest": cover.nearest, "usual": cover.usual, "limit": cover.limit, "far": cover.far}
    rows = (
        (f"likeness of a {stage} prompt to its nearest, median", f"{cover.nearest:.2f}"),
        ("the same among the reward model's own", f"{cover.usual:.2f}"),
        (f"{stage} prompts further away than 95 % of those", f"{cover.far:.1%}"),
    )
    section.tables.append(Table("", ("", ""), rows))
    if cover.far > 0.2:
        where = asks.records[0].where.rpartition(":")[0]
        text = f"{cover.far:.0%} of the {stage} prompts are unlike all that the reward model is trained on"
        text += f", as {on_one_line(cover.farthest)!r}"
        section.add("warning", "coverage", text, where)
    title = f"{stage} prompts: likeness to the nearest of the reward model's"
    section.plots.append(histogram(title, "cosine", cover.each))
    return section
