"""Checks human judgements of answers for consistency: contradictions, cycles, agreement, flips, and length.

Every comparison is split into pairs of a better and a worse answer to one prompt. Where several people judged one pair
they are compared with each other (Krippendorff 2011); where they did not, with a linear model of the texts that never
saw the prompt in question. People who contradict the others far more than the others do each other stand out.
"""

import math
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import krippendorff
import numpy as np

from tetrad.data.similarity import Texts
from tetrad.datacheck.reading import Reading, asked, squeezed
from tetrad.datacheck.texts import folds
from tetrad.report.sections import Finding, Plot, Section, Table, histogram, share
from tetrad.types import Comparison, Score

MOST_PAIRS = 40_000  # pairs that the linear model is trained on
SURE = 0.6  # a score this far on the other side of 0 is a suspected flip; stated orders are +1
PENALTY = 0.1  # of the linear model, in units of its features' mean square
SHOWN = 20
Key = tuple[str, str, str]  # a prompt and two answers in alphabetical order


@dataclass(frozen=True)
class Pair:
    """One answer above another, or tied. sign: 1 where the key's first answer is better, -1 where worse, 0 for ties."""

    key: Key
    sign: int
    annotator: str
    where: str
    record: int

    @property
    def better(self) -> str:
        return self.key[1] if self.sign > 0 else self.key[2]

    @property
    def worse(self) -> str:
        return self.key[2] if self.sign > 0 else self.key[1]


def pairs_of(records: Sequence[Comparison | Score]) -> list[Pair]:
    """All pairs of all comparisons, ties included."""
    pairs = []
    for number, record in enumerate(records):
        if isinstance(record, Comparison):
            prompt = squeezed(asked(record))
            for i in range(len(record.answers)):
                for j in range(i):
                    a, b = record.answers[i], record.answers[j]
                    sign = int(np.sign(record.ranks[j] - record.ranks[i]))
                    key, sign = ((prompt, a, b), sign) if a <= b else ((prompt, b, a), -sign)
                    pairs.append(Pair(key, sign, record.annotator, record.where, number))
    return pairs


def section(reading: Reading) -> Section:
    """The whole section for one setting of preferences."""
    pairs = pairs_of(reading.records)
    scores = [record for record in reading.records if isinstance(record, Score)]
    parts = [contradictions(reading, pairs, scores), agreement(pairs, scores), flips(pairs), lengths(pairs, scores)]
    figures: dict[str, Any] = {}
    for part in parts:
        figures |= part.figures
    rest = {name: tuple(x for part in parts for x in getattr(part, name)) for name in ("tables", "plots", "findings")}
    title = f"What was judged: {reading.setting}"
    return Section(reading.setting.replace(".", "_") + "_judged", title, figures, **rest)


# --- contradictions and cycles ---


def contradictions(reading: Reading, pairs: Sequence[Pair], scores: Sequence[Score]) -> Section:
    """Pairs judged both ways, texts scored differently, cyclic orders, ties."""
    seen: dict[Key, Counter[int]] = defaultdict(Counter)
    place: dict[Key, str] = {}
    for pair in pairs:
        seen[pair.key][pair.sign] += 1
        place.setdefault(pair.key, pair.where)
    by_text: dict[tuple[str, str], list[Score]] = defaultdict(list)
    for score in scores:
        by_text[squeezed(asked(score)), score.answer].append(score)
    both = [place[key] for key, signs in seen.items() if signs[1] and signs[-1]]
    first = {key[0]: where for key, where in reversed(place.items())}
    circles = [first[prompt] for prompt in _cycles(seen)]
    differing = [same[0].where for same in by_text.values() if _one_person_differs(same)]
    figures: dict[str, Any] = {
        "comparisons": len(reading.records) - len(scores),
        "pairs": len(pairs),
        "different_pairs": len(seen),
        "tied_pairs": sum(pair.sign == 0 for pair in pairs),
        "tied_comparisons": reading.counts.tied,
        "contradicting_pairs": len(both),
        "circular_prompts": len(circles),
        "scores": len(scores),
        "scored_texts": len(by_text),
        "contradicting_scored_texts": len(differing),
    }
    checks = (
        ("contradictions", both, len(seen), 0.02, "pairs are judged both ways"),
        (
            "contradicting scores",
            differing,
            len(by_text),
            0.001,
            "texts have several scores, and not of different annotators",
        ),
        ("circles", circles, len({key[0] for key in seen}), 0.0, "prompts have preferences that run in a circle"),
    )
    findings = tuple(_found(*row) for row in checks if row[1])
    return Section("", "", figures, (_order(figures),), (), findings)


def _found(name: str, bad: list[str], n: int, much: float, text: str) -> Finding:
    """bad: their locations; more of them than a share `much` of n is a warning."""
    return Finding("warning" if len(bad) > much * n else "note", name, f"{len(bad)} of {n} {text}", bad[0])


def _order(figures: dict[str, Any]) -> Table:
    """The figures of contradictions, as far as there are any."""
    rows: list[tuple[Any, ...]] = []
    f = figures
    if f["pairs"]:
        rows += [
            ("comparisons", f["comparisons"], f"{f['pairs']} pairs, {f['different_pairs']} different"),
            ("tied pairs", f["tied_pairs"], f"{f['tied_comparisons']} comparisons without an order"),
            ("pairs judged both ways", f["contradicting_pairs"], share(f["contradicting_pairs"], f["different_pairs"])),
            ("prompts with a circle (a over b over c over a)", f["circular_prompts"], ""),
        ]
    if f["scores"]:
        differing = f["contradicting_scored_texts"]
        rows += [
            ("scores", f["scores"], f"{f['scored_texts']} different texts"),
            ("texts with different scores", differing, share(differing, f["scored_texts"])),
        ]
    return Table("order", ("", "", ""), tuple(rows))


def _one_person_differs(scores: Sequence[Score]) -> bool:
    """Whether two of these differ although no two people gave them."""
    by_person: dict[str, set[float]] = defaultdict(set)
    for score in scores:
        by_person[score.annotator].add(score.score)
    return any(len(values) > 1 for values in by_person.values())


def _cycles(seen: dict[Key, Counter[int]]) -> Iterator[str]:
    """Prompts whose answers, by majority, cannot be put into one order."""
    edges: dict[str, list[tuple[str, str]]] = defaultdict(list)
    for (prompt, a, b), signs in seen.items():
        if signs[1] != signs[-1]:
            edges[prompt].append((a, b) if signs[1] > signs[-1] else (b, a))
    for prompt, pairs in edges.items():
        if len(pairs) > 2 and _has_cycle(pairs):
            yield prompt


def _has_cycle(edges: list[tuple[str, str]]) -> bool:
    """Whether there is a cycle of three nodes or more."""
    import networkx  # noqa: PLC0415 - a quarter of the time of a check of few records

    return any(len(part) > 2 for part in networkx.strongly_connected_components(networkx.DiGraph(edges)))


# --- people ---


def agreement(pairs: Sequence[Pair], scores: Sequence[Score]) -> Section:
    """Krippendorff's alpha of all who judged the same items, and each person's agreement with the others."""
    by_key: dict[Key, list[Pair]] = defaultdict(list)
    for pair in pairs:
        by_key[pair.key].append(pair)
    units = [Counter(p.sign for p in group) for group in by_key.values() if len(group) > 1]
    by_text: dict[tuple[str, str], list[float]] = defaultdict(list)
    for score in scores:
        by_text[squeezed(asked(score)), score.answer].append(score.score)
    scored = [Counter(values) for values in by_text.values() if len(values) > 1]
    figures: dict[str, Any] = {"alpha_pairs": _alpha(units, "nominal"), "alpha_scores": _alpha(scored, "interval")}
    figures |= {"pairs_judged_again": len(units), "texts_scored_again": len(scored)}
    rows = [("pairs judged more than once", len(units), figures["alpha_pairs"])] if units else []
    rows += [("texts scored more than once", len(scored), figures["alpha_scores"])] if scored else []
    title = "agreement (Krippendorff's alpha: 1 is perfect, 0 is chance)"
    tables = [Table(title, ("", "number", "alpha"), tuple(rows))]
    findings = [
        Finding("warning", "agreement", f"annotators hardly agree on the same {what}: alpha is {alpha:.2f}")
        for what, alpha in (("pair", figures["alpha_pairs"]), ("text", figures["alpha_scores"]))
        if alpha is not None and alpha < 0.2
    ]
    people, odd = _people(dict(_against_others(by_key)) or dict(_against_reader(pairs)))
    if people:
        figures["annotators"] = {name: {"judged": n, "agreement": rate} for name, n, rate, *_ in people}
        tables.append(_table_of(people))
    findings += odd
    return Section("", "", figures, tuple(tables), (), tuple(findings))


def _table_of(people: Sequence[tuple[str, int, float, float, float]]) -> Table:
    rows = tuple((name, n, f"{rate:.2f} [{low:.2f}, {high:.2f}]") for name, n, rate, low, high in people[:SHOWN])
    return Table("agreement of each annotator, lowest first", ("annotator", "pairs", "agrees"), rows)


def _alpha(units: Sequence[Counter[Any]], level: Literal["nominal", "interval"]) -> float | None:
    """Krippendorff's alpha of units with the number of times that each value was given."""
    values = sorted({value for unit in units for value in unit})
    if len(values) > 200:  # scores of many decimals: rounded to a hundredth of their range
        low, width = values[0], (values[-1] - values[0]) / 100
        coarse = [Counter[Any]() for _ in units]
        for unit, new in zip(units, coarse, strict=True):
            for value, n in unit.items():
                new[low + round((value - low) / width) * width] += n
        return _alpha(coarse, level)
    if len(units) < 2 or len(values) < 2:
        return None
    counts = np.array([[unit[value] for value in values] for unit in units])
    domain = values if level == "interval" else [str(value) for value in values]
    return float(krippendorff.alpha(value_counts=counts, value_domain=domain, level_of_measurement=level))


def _against_others(by_key: dict[Key, list[Pair]]) -> Iterator[tuple[str, list[bool]]]:
    """Each person's pairs that others judged too: whether most of the others agreed."""
    verdicts: dict[str, list[bool]] = defaultdict(list)
    for group in by_key.values():
        total = Counter(pair.sign for pair in group)
        for pair in group:
            if pair.annotator and pair.sign:
                other = total[-pair.sign] - (total[pair.sign] - 1)
                if other:
                    verdicts[pair.annotator].append(other < 0)
    yield from ((name, agrees) for name, agrees in verdicts.items() if len(agrees) >= 20)


def _against_reader(pairs: Sequence[Pair]) -> Iterator[tuple[str, list[bool]]]:
    """The same against the linear model."""
    decided = [pair for pair in pairs if pair.sign][:MOST_PAIRS]
    if len({pair.annotator for pair in decided}) < 2:
        return
    verdicts: dict[str, list[bool]] = defaultdict(list)
    for pair, opinion in zip(decided, opinions(decided), strict=True):
        if pair.annotator:
            verdicts[pair.annotator].append(bool(opinion > 0))
    yield from ((name, agrees) for name, agrees in verdicts.items() if len(agrees) >= 50)


def _people(verdicts: dict[str, list[bool]]) -> tuple[list[tuple[str, int, float, float, float]], list[Finding]]:
    """(name, pairs, agreement, its 95 % interval) lowest first, and who agrees far less than the others do."""
    people, findings = [], []
    everyone = sum(len(agrees) for agrees in verdicts.values())
    agreed = sum(sum(agrees) for agrees in verdicts.values())
    for name, agrees in verdicts.items():
        n, yes = len(agrees), sum(agrees)
        low, high = wilson(yes, n)
        people.append((name, n, yes / n, low, high))
        if everyone > n:
            others = (agreed - yes) / (everyone - n)
            error = math.sqrt(max(others * (1 - others), 0.01) * (1 / n + 1 / (everyone - n)))
            if others - yes / n > max(0.05, 4 * error):
                text = f"annotator {name} agrees in {yes / n:.0%} of {n} pairs, the others in {others:.0%}"
                findings.append(Finding("warning", "annotator", text))
    return sorted(people, key=lambda row: row[2]), findings


def wilson(yes: int, n: int) -> tuple[float, float]:
    """The 95 % confidence interval of a share (Wilson 1927)."""
    z2 = 1.96**2
    middle, half = (yes + z2 / 2) / (n + z2), 1.96 / (n + z2) * math.sqrt(yes * (n - yes) / n + z2 / 4)
    return middle - half, middle + half


# --- flips ---


def opinions(pairs: Sequence[Pair]) -> np.ndarray[Any, np.dtype[np.float64]]:
    """A linear model's score of each stated order: about 1 where it agrees, below 0 where it does not.

    Ridge regression on the difference of two texts' features, in five folds by prompt (by pair where there are hardly
    any prompts): no pair is scored by a model trained on it.
    """
    texts = Texts([text for pair in pairs for text in (pair.better, pair.worse)])
    difference = texts.rows[0::2] - texts.rows[1::2]
    several = len({pair.key[0] for pair in pairs}) >= 50
    fold = folds([pair.key[0] if several else "\n".join(pair.key) for pair in pairs])
    whole, sums = difference.T @ difference, difference.sum(0)
    scores = np.zeros(len(pairs))
    for number in np.unique(fold):
        mine = difference[fold == number]
        gram, target = whole - mine.T @ mine, sums - mine.sum(0)
        penalty = np.eye(len(gram), dtype=gram.dtype) * (PENALTY * float(np.trace(gram)) / len(gram) + 1e-6)
        scores[fold == number] = mine @ np.linalg.solve(gram + penalty, target)
    typical = float(np.median(np.abs(scores))) or 1.0
    return scores / typical


def flips(pairs: Sequence[Pair]) -> Section:
    """Orders that the linear model is sure are the wrong way round."""
    decided = [pair for pair in pairs if pair.sign][:MOST_PAIRS]
    if len(decided) < 200:
        return Section("", "")
    scores = opinions(decided)
    right = float((scores > 0).mean())
    figures = {"reader_accuracy": right, "suspected_flips": int((scores < -SURE).sum())}
    if right < 0.6:  # it knows too little to accuse anyone
        text = (
            f"a linear reader of the texts finds the stated order in {right:.0%} of the pairs: too rarely to name flips"
        )
        return Section("", "", {"reader_accuracy": right}, (), (), (Finding("note", "flips", text),))
    worst = np.argsort(scores)[:SHOWN]
    rows = tuple(
        (decided[i].where, decided[i].annotator, _short(decided[i].better), _short(decided[i].worse))
        for i in worst
        if scores[i] < -SURE
    )
    title = f"suspected flips: a linear reader, right in {right:.0%}, is sure of the opposite"
    columns = ("where", "annotator", "stated better", "stated worse")
    return Section("", "", figures, (Table(title, columns, rows),) if rows else ())


def _short(text: str) -> str:
    line = " ".join(text.split())
    return line if len(line) <= 40 else line[:39] + "…"


# --- length ---


def lengths(pairs: Sequence[Pair], scores: Sequence[Score]) -> Section:
    """How often the longer answer wins: what a reward model would learn first."""
    gaps = np.array([len(pair.better) - len(pair.worse) for pair in pairs if pair.sign])
    figures: dict[str, Any] = {}
    findings: list[Finding] = []
    plots: list[Plot] = []
    rows: list[tuple[Any, ...]] = []
    if (n := int((gaps != 0).sum())) >= 20:
        longer = int((gaps > 0).sum())
        low, high = wilson(longer, n)
        figures |= {"longer_wins": longer / n, "longer_wins_low": low, "longer_wins_high": high}
        rows.append(("pairs in which the longer answer is better", f"{longer / n:.1%} [{low:.1%}, {high:.1%}]"))
        plots.append(histogram("Better less worse answer, characters", "characters", gaps))
        if low > 0.6 or high < 0.4:
            which = "longer" if low > 0.6 else "shorter"
            text = (
                f"the {which} answer wins in {max(longer, n - longer) / n:.0%} of {n} pairs: length alone predicts them"
            )
            findings.append(Finding("warning", "length bias", text))
    if len(scores) >= 20:
        figures["length_score_spearman"] = rho = _spearman([len(s.answer) for s in scores], [s.score for s in scores])
        rows.append(("Spearman of length and score", f"{rho:+.2f}"))
        if abs(rho) > 0.4:
            findings.append(Finding("warning", "length bias", f"scores follow length: Spearman is {rho:+.2f}"))
    table = (Table("length", ("", ""), tuple(rows)),) if rows else ()
    return Section("", "", figures, table, tuple(plots), tuple(findings))


def _spearman(a: Sequence[float], b: Sequence[float]) -> float:
    x, y = (_ranks(np.asarray(values, np.float64)) for values in (a, b))
    x, y = x - x.mean(), y - y.mean()
    norm = math.sqrt(float((x * x).sum()) * float((y * y).sum()))
    return float((x * y).sum()) / norm if norm else 0.0


def _ranks(values: np.ndarray[Any, np.dtype[np.float64]]) -> np.ndarray[Any, np.dtype[np.float64]]:
    """Mean ranks, equal for ties."""
    _, inverse, counts = np.unique(values, return_inverse=True, return_counts=True)
    ends = np.cumsum(counts)
    ranks: np.ndarray[Any, np.dtype[np.float64]] = (ends - (counts - 1) / 2)[inverse]
    return ranks
