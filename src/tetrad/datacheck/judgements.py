"""Checks human judgements of answers for consistency: contradictions, cycles, agreement, flips, and length.

Every comparison is split into pairs of a better and a worse answer to one prompt. Where several people judged one pair
they are compared with each other (Krippendorff 2011); where they did not, with a linear model of the texts that never
saw the prompt in question. People who contradict the others far more than the others do each other stand out.
"""

import math
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal

import krippendorff
import numpy as np

from tetrad.data.records import asked, squeezed
from tetrad.data.similarity import Texts
from tetrad.datacheck.reading import Reading
from tetrad.datacheck.texts import folds, on_one_line
from tetrad.objectives.ranks import centred_ranks
from tetrad.report.sections import Section, Table, histogram, share
from tetrad.types import Comparison, Score

MOST_PAIRS = 40_000  # pairs that the linear model is trained on
SURE = 0.6  # a score this far on the other side of 0 is a suspected flip; stated orders are +1
PENALTY = 0.1  # of the linear model, in units of its features' mean square
SHOWN = 20
Key = tuple[str, str, str]  # a prompt and two answers in alphabetical order
Text = tuple[str, str]  # a prompt and an answer


@dataclass(frozen=True)
class Pair:
    """One answer above another, or tied. sign: 1 where the key's first answer is better, -1 where worse, 0 for ties."""

    key: Key
    sign: int
    annotator: str
    where: str

    @property
    def better(self) -> str:
        return self.key[1] if self.sign > 0 else self.key[2]

    @property
    def worse(self) -> str:
        return self.key[2] if self.sign > 0 else self.key[1]


def pairs_of(record: Comparison) -> Iterator[Pair]:
    """All pairs of a comparison, ties included."""
    prompt = squeezed(asked(record))
    for i, a in enumerate(record.answers):
        for j, b in enumerate(record.answers[:i]):
            sign = int(np.sign(record.ranks[j] - record.ranks[i]))
            key, sign = ((prompt, a, b), sign) if a <= b else ((prompt, b, a), -sign)
            yield Pair(key, sign, record.annotator, record.where)


class Judgements:
    """All pairs and scores, also grouped by what was judged; decided: the pairs that are no ties, as far as the linear
    model reads them."""

    def __init__(self, records: Iterable[Comparison | Score]) -> None:
        self.comparisons = 0
        self.pairs: list[Pair] = []
        self.scores: list[Score] = []
        self.by_key: dict[Key, list[Pair]] = defaultdict(list)
        self.by_text: dict[Text, list[Score]] = defaultdict(list)
        for record in records:
            if isinstance(record, Score):
                self.scores.append(record)
                self.by_text[squeezed(asked(record)), record.answer].append(record)
            else:
                self.comparisons += 1
                self.pairs += pairs_of(record)
        for pair in self.pairs:
            self.by_key[pair.key].append(pair)
        self.decided = [pair for pair in self.pairs if pair.sign][:MOST_PAIRS]

    @cached_property
    def opinions(self) -> np.ndarray[Any, np.dtype[np.float64]]:
        """A linear model's score of each decided order: about 1 where it agrees, below 0 where it does not.

        Ridge regression on the difference of two texts' features, in five folds by prompt (by pair where there are
        hardly any prompts): no pair is scored by a model trained on it.
        """
        texts = Texts([text for pair in self.decided for text in (pair.better, pair.worse)])
        difference = texts.rows[0::2] - texts.rows[1::2]
        several = len({pair.key[0] for pair in self.decided}) >= 50
        fold = folds([pair.key[0] if several else "\n".join(pair.key) for pair in self.decided])
        whole, sums = difference.T @ difference, difference.sum(0)
        scores = np.zeros(len(self.decided))
        for number in np.unique(fold):
            mine = difference[fold == number]
            gram, target = whole - mine.T @ mine, sums - mine.sum(0)
            penalty = np.eye(len(gram), dtype=gram.dtype) * (PENALTY * float(np.trace(gram)) / len(gram) + 1e-6)
            scores[fold == number] = mine @ np.linalg.solve(gram + penalty, target)
        typical = float(np.median(np.abs(scores))) or 1.0
        return scores / typical


def section(reading: Reading) -> Section:
    """The whole section for one setting of preferences."""
    section = Section(reading.setting.replace(".", "_") + "_judged", f"What was judged: {reading.setting}")
    judged = Judgements(reading.records)
    ties = sum(file.counts.tied for file in reading.files)
    contradictions(section, judged, ties)
    agreement(section, judged)
    flips(section, judged)
    lengths(section, judged)
    return section


# --- contradictions and cycles ---


def contradictions(section: Section, judged: Judgements, ties: int) -> None:
    """Pairs judged both ways, texts scored differently, cyclic orders, ties."""
    by_key, by_text = judged.by_key, judged.by_text
    seen = {key: Counter(pair.sign for pair in pairs) for key, pairs in by_key.items()}
    first = {key[0]: pairs[0].where for key, pairs in reversed(by_key.items())}
    both = [by_key[key][0].where for key, signs in seen.items() if signs[1] and signs[-1]]
    circles = [first[prompt] for prompt in _cycles(seen)]
    differing = [same[0].where for same in by_text.values() if _one_person_differs(same)]
    f = {
        "comparisons": judged.comparisons,
        "pairs": len(judged.pairs),
        "different_pairs": len(seen),
        "tied_pairs": sum(pair.sign == 0 for pair in judged.pairs),
        "tied_comparisons": ties,
        "contradicting_pairs": len(both),
        "circular_prompts": len(circles),
        "scores": len(judged.scores),
        "scored_texts": len(by_text),
        "contradicting_scored_texts": len(differing),
    }
    section.metrics |= f
    rows: list[tuple[Any, ...]] = []
    if f["pairs"]:
        rows += [
            ("comparisons", f["comparisons"], f"{f['pairs']} pairs, {f['different_pairs']} different"),
            ("tied pairs", f["tied_pairs"], f"{ties} comparisons without an order"),
            ("pairs judged both ways", len(both), share(len(both), len(seen))),
            ("prompts with a circle (a over b over c over a)", len(circles), ""),
        ]
    if f["scores"]:
        rows.append(("scores", f["scores"], f"{len(by_text)} different texts"))
        rows.append(("texts with different scores", len(differing), share(len(differing), len(by_text))))
    section.tables.append(Table("order", ("", "", ""), rows))
    several = "texts have several scores, and not of different annotators"
    _note(section, "contradictions", both, len(seen), 0.02, "pairs are judged both ways")
    _note(section, "contradicting scores", differing, len(by_text), 0.001, several)
    _note(section, "circles", circles, len(first), 0.0, "prompts have preferences that run in a circle")


def _note(section: Section, name: str, bad: list[str], n: int, much: float, text: str) -> None:
    """bad: their locations; more of them than a share `much` of n is a warning."""
    if bad:
        level = "warning" if len(bad) > much * n else "note"
        section.add(level, name, f"{len(bad)} of {n} {text}", bad[0])


def _one_person_differs(scores: Sequence[Score]) -> bool:
    """Whether two of these differ although no two people gave them."""
    return len({(score.annotator, score.score) for score in scores}) > len({score.annotator for score in scores})


def _cycles(seen: dict[Key, Counter[int]]) -> Iterator[str]:
    """Prompts whose answers, by majority, cannot be put into one order: there is a cycle of three nodes or more."""
    edges: dict[str, list[Text]] = defaultdict(list)
    for (prompt, a, b), signs in seen.items():
        if signs[1] != signs[-1]:
            edges[prompt].append((a, b) if signs[1] > signs[-1] else (b, a))
    for prompt, pairs in edges.items():
        if len(pairs) > 2:
            import networkx  # noqa: PLC0415 - a quarter of the time of a check of few records

            if any(len(part) > 2 for part in networkx.strongly_connected_components(networkx.DiGraph(pairs))):
                yield prompt


# --- people ---


def agreement(section: Section, judged: Judgements) -> None:
    """Krippendorff's alpha of all who judged the same items, and each person's agreement with the others."""
    units, alpha = pair_agreement(judged)
    scored = [Counter(score.score for score in scores) for scores in judged.by_text.values() if len(scores) > 1]
    alphas = {"pair": alpha, "text": _alpha(scored, "interval")}
    section.metrics |= {"alpha_pairs": alphas["pair"], "alpha_scores": alphas["text"]}
    section.metrics |= {"pairs_judged_again": units, "texts_scored_again": len(scored)}
    rows = [("pairs judged more than once", units, alpha)] if units else []
    rows += [("texts scored more than once", len(scored), alphas["text"])] if scored else []
    title = "agreement (Krippendorff's alpha: 1 is perfect, 0 is chance)"
    section.tables.append(Table(title, ("", "number", "alpha"), rows))
    for what, value in alphas.items():
        if value is not None and value < 0.2:
            section.add("warning", "agreement", f"annotators hardly agree on the same {what}: alpha is {value:.2f}")
    _people(section, _verdicts(_against_others(judged), 20) or _verdicts(_against_reader(judged), 50))


def pair_agreement(judged: Judgements) -> tuple[int, float | None]:
    """How many pairs were judged more than once, and Krippendorff's alpha of them; None where it is undefined."""
    units = [Counter(pair.sign for pair in pairs) for pairs in judged.by_key.values() if len(pairs) > 1]
    return len(units), _alpha(units, "nominal")


def _alpha(units: Sequence[Counter[Any]], level: Literal["nominal", "interval"]) -> float | None:
    """Krippendorff's alpha of units with the number of times that each value was given."""
    values = sorted({value for unit in units for value in unit})
    if len(values) > 200:  # scores of many decimals: rounded to a hundredth of their range
        low, width = values[0], (values[-1] - values[0]) / 100
        return _alpha([Counter(low + round((v - low) / width) * width for v in u.elements()) for u in units], level)
    if len(units) < 2 or len(values) < 2:
        return None
    counts = np.array([[unit[value] for value in values] for unit in units])
    domain = values if level == "interval" else [str(value) for value in values]
    return float(krippendorff.alpha(value_counts=counts, value_domain=domain, level_of_measurement=level))


def _verdicts(judged: Iterable[tuple[str, bool]], least: int) -> dict[str, list[bool]]:
    """Whether each person's judgements were confirmed; of those with at least so many."""
    verdicts: dict[str, list[bool]] = defaultdict(list)
    for name, agrees in judged:
        if name:
            verdicts[name].append(agrees)
    return {name: agrees for name, agrees in verdicts.items() if len(agrees) >= least}


def _against_others(judged: Judgements) -> Iterator[tuple[str, bool]]:
    """Of pairs that others judged too, who judged and whether most of the others agreed."""
    for pairs in judged.by_key.values():
        total = Counter(pair.sign for pair in pairs)
        for pair in pairs:
            against = total[-pair.sign] - (total[pair.sign] - 1)
            if pair.sign and against:
                yield pair.annotator, against < 0


def _against_reader(judged: Judgements) -> Iterator[tuple[str, bool]]:
    """The same against the linear model."""
    if len({pair.annotator for pair in judged.decided}) > 1:
        yield from ((p.annotator, bool(o > 0)) for p, o in zip(judged.decided, judged.opinions, strict=True))


def _people(section: Section, verdicts: dict[str, list[bool]]) -> None:
    """Each person's agreement and its 95 % interval, lowest first, and who agrees far less than the others do."""
    if not verdicts:
        return
    everyone = sum(map(len, verdicts.values()))
    agreed = sum(map(sum, verdicts.values()))
    people = [(name, len(agrees), sum(agrees)) for name, agrees in verdicts.items()]
    for name, n, yes in people:
        if everyone > n:
            others = (agreed - yes) / (everyone - n)
            error = math.sqrt(max(others * (1 - others), 0.01) * (1 / n + 1 / (everyone - n)))
            if others - yes / n > max(0.05, 4 * error):
                text = f"annotator {name} agrees in {yes / n:.0%} of {n} pairs, the others in {others:.0%}"
                section.add("warning", "annotator", text)
    people.sort(key=lambda person: person[2] / person[1])
    section.metrics["annotators"] = {name: {"judged": n, "agreement": yes / n} for name, n, yes in people}
    rows = [(name, n, "{:.2f} [{:.2f}, {:.2f}]".format(yes / n, *wilson(yes, n))) for name, n, yes in people[:SHOWN]]
    title = "agreement of each annotator, lowest first"
    section.tables.append(Table(title, ("annotator", "pairs", "agrees"), rows))


def wilson(yes: int, n: int) -> tuple[float, float]:
    """The 95 % confidence interval of a share (Wilson 1927)."""
    z2 = 1.96**2
    middle, half = (yes + z2 / 2) / (n + z2), 1.96 / (n + z2) * math.sqrt(yes * (n - yes) / n + z2 / 4)
    return middle - half, middle + half


# --- flips and length ---


def flips(section: Section, judged: Judgements) -> None:
    """Orders that the linear model is sure are the wrong way round."""
    if len(judged.decided) < 200:
        return
    scores = judged.opinions
    section.metrics["reader_accuracy"] = right = float((scores > 0).mean())
    if right < 0.6:  # it knows too little to accuse anyone
        text = f"a linear reader of the texts finds the stated order in {right:.0%} of the pairs: too rarely to name"
        section.add("note", "flips", f"{text} flips")
        return
    section.metrics["suspected_flips"] = int((scores < -SURE).sum())
    worst = [judged.decided[i] for i in np.argsort(scores)[:SHOWN] if scores[i] < -SURE]
    rows = [(p.where, p.annotator, on_one_line(p.better, 40), on_one_line(p.worse, 40)) for p in worst]
    title = f"suspected flips: a linear reader, right in {right:.0%}, is sure of the opposite"
    if rows:
        section.tables.append(Table(title, ("where", "annotator", "stated better", "stated worse"), rows))


def lengths(section: Section, judged: Judgements) -> None:
    """How often the longer answer wins: what a reward model would learn first."""
    gaps = np.array([len(pair.better) - len(pair.worse) for pair in judged.pairs if pair.sign])
    rows = []
    if (n := int((gaps != 0).sum())) >= 20:
        longer = int((gaps > 0).sum())
        low, high = wilson(longer, n)
        section.metrics |= {"longer_wins": longer / n, "longer_wins_low": low, "longer_wins_high": high}
        rows.append(("pairs in which the longer answer is better", f"{longer / n:.1%} [{low:.1%}, {high:.1%}]"))
        section.plots.append(histogram("Better less worse answer, characters", "characters", gaps))
        if low > 0.6 or high < 0.4:
            text = f"the {'longer' if low > 0.6 else 'shorter'} answer wins in {max(longer, n - longer) / n:.0%}"
            section.add("warning", "length bias", f"{text} of {n} pairs: length alone predicts them")
    if len(judged.scores) >= 20:
        x, y = centred_ranks([len(s.answer) for s in judged.scores]), centred_ranks([s.score for s in judged.scores])
        norm = math.sqrt(float(x @ x) * float(y @ y))
        section.metrics["length_score_spearman"] = rho = float(x @ y) / norm if norm else 0.0
        rows.append(("Spearman of length and score", f"{rho:+.2f}"))
        if abs(rho) > 0.4:
            section.add("warning", "length bias", f"scores follow length: Spearman is {rho:+.2f}")
    if rows:
        section.tables.append(Table("length", ("", ""), rows))
