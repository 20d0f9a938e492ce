"""`tetrad score`: records in, the same records with the reward model's scores out, and how far it agrees with people
where the records say what they prefer.

A record has one answer, or several in an order of preference (ranked choices, pairs, a benchmark's lists of chosen and
rejected answers); it keeps all its fields, as with `tetrad generate`.
"""

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path

import numpy as np

from tetrad.cli.generate import ANSWERS, GENERATED, Fields, check_out, deliver, extended, json_record
from tetrad.console import Console
from tetrad.data.fields import Fields as Folded
from tetrad.data.fields import fold, null
from tetrad.data.record_formats import asked, comparison, is_comparison
from tetrad.data.rows import Row, rows
from tetrad.data.source import Counts, sources
from tetrad.errors import UserError
from tetrad.inference.completions import Completion
from tetrad.reward.batches import Examples, Record
from tetrad.reward.evaluation import Pairs, by_value
from tetrad.reward.linear import fit, training_records
from tetrad.reward.model import SCORES_AT_ONCE, RewardModel, documents_from_text, load_reward, score_documents
from tetrad.settings.use import ScoreFile
from tetrad.storage import write_file
from tetrad.training.context import renamed
from tetrad.types import Comparison, Prompt, Score

ALL = "all"


@dataclass(frozen=True)
class Given:
    """A record of the file, the answers to score, and what people say of them, if anything."""

    record: Fields
    where: str
    samples: Sequence[Completion]
    judged: Record | None
    subset: str = ""


@dataclass(frozen=True)
class Agreement:
    """With the judgements of a file, or of one of its subsets.

    accuracy: the share of pairs in order, with its 95 % interval (low, high); best_first: the share of records whose
    best answer has the highest score; longer, linear: the accuracy of choosing the longer answer, and of a linear model
    of the words of the reward model's training data. None where undefined.
    """

    subset: str
    records: int
    pairs: int
    accuracy: float | None = None
    low: float | None = None
    high: float | None = None
    best_first: float | None = None
    spearman: float | None = None
    spearman_low: float | None = None
    spearman_high: float | None = None
    longer: float | None = None
    linear: float | None = None


def score_file(settings: ScoreFile, console: Console) -> None:
    """Scores the answers of each record of a file. Errors: E-CONF-CONFLICT, E-DATA-*, E-MODEL-*, E-CKPT-*, E-IO-*."""
    check_out(settings.out, settings.data)
    check_out(settings.json, settings.data)
    given = sources([settings.data], rename=renamed(settings.rename))
    each = [_given(row, given.rename, settings.by) for path in given.paths for row in rows(path, Counts())]
    reward_model, scores = load_reward(settings.model, settings.template), list[float]()
    lines = _scored(reward_model, each, scores, console)
    judged = any(one.judged for one in each)
    if settings.out or not judged:
        deliver(lines, settings.out, console)
    else:
        list(lines)
    if settings.out:
        low, mean, high = min(scores), float(np.mean(scores)), max(scores)
        console.say(f"{len(scores)} scores, mean {mean:+.3f}, from {low:+.3f} to {high:+.3f}: {settings.out}")
    if judged:
        _report(settings, reward_model.folder, each, scores, console)


def _scored(
    reward_model: RewardModel, each: Sequence[Given], scores: list[float], console: Console
) -> Iterator[Fields]:
    """Each record with its scores; all of them are appended to `scores`."""
    samples = [sample for one in each for sample in one.samples]
    documents = documents_from_text(reward_model.template, reward_model.tokenizer, samples)
    several = len(reward_model.members) > 1

    def means_and_stds() -> Iterator[tuple[float, float]]:
        for start in range(0, len(documents), SCORES_AT_ONCE):
            rewards = score_documents(reward_model, documents[start : start + SCORES_AT_ONCE])
            scores.extend(rewards.mean(0).tolist())
            bar.advance(rewards.shape[1], mean=float(np.mean(scores)))
            yield from zip(rewards.mean(0).tolist(), rewards.std(0).tolist(), strict=True)

    with console.progress("score", len(documents)) as bar:
        results = means_and_stds()
        for one in each:
            means, stds = zip(*islice(results, len(one.samples)), strict=True)
            if not isinstance(one.judged, Comparison):
                yield extended(one.record, {"score": means[0]} | ({"score_std": stds[0]} if several else {}))
                continue
            accuracy = Pairs.of(Examples.of([one.judged], ()), means, 0.0).accuracy()
            new = {"scores": list(means), **({"score_stds": list(stds)} if several else {}), "accuracy": accuracy}
            yield extended(one.record, new)


def _given(row: Row, rename: Mapping[str, str], by: str) -> Given:
    """A comparison's answers in its own order (chosen before rejected), else the one answer."""
    record, where = json_record(row), row.where
    fields = fold(record, where, rename=rename)
    subset = str(fields.get(by.lower(), ""))
    if is_comparison(fields):
        judged = comparison(fields, where)
        samples = [Completion((), (), judged.prompt.turns, text, where) for text in judged.answers]
        return Given(record, where, samples, judged, subset)
    prompt, score = asked(fields, where, Counts()), fields.get("score")
    sample = _answered(fields, prompt, record)
    if "output" not in fields or not isinstance(score, int | float) or isinstance(score, bool):
        return Given(record, where, [sample], None, subset)
    return Given(record, where, [sample], Score(prompt, sample.text, score, "", where), subset)


def _report(
    settings: ScoreFile, folder: Path, each: Sequence[Given], scores: Sequence[float], console: Console
) -> None:
    """The agreement with the file's judgements, overall and by subset, as a table and as JSON."""
    judged, scores = _judged(each, scores)
    subsets_D = [one.subset for one in judged for _ in one.samples]
    examples, trained_on = Examples.of([one.judged for one in judged if one.judged], ()), training_records(folder)
    rewards = {"": scores, "longer": [float(len(sample.text)) for sample in examples.samples()]}
    if trained_on:
        rewards["linear"] = fit(trained_on)(examples.samples())
    pairs = {name: Pairs.of(examples, each_scores, settings.pair_gap) for name, each_scores in rewards.items()}
    parts = {name: dict(by_value(each_pairs, subsets_D)) for name, each_pairs in pairs.items()}
    best = _best_first(judged, scores)
    rows = [_agreement(ALL, pairs, best, judged)]
    for value in parts[""]:
        of_value = {name: part[value] for name, part in parts.items()}
        rows.append(_agreement(value, of_value, best, [one for one in judged if one.subset == value]))
    _show(rows, console)
    if not trained_on:
        console.say("note: no linear baseline: the files that the reward model was trained on are gone or have changed")
    if settings.json:
        write_file(Path(settings.json), (json.dumps([asdict(row) for row in rows], indent=1) + "\n").encode())


def _judged(each: Sequence[Given], scores: Sequence[float]) -> tuple[list[Given], list[float]]:
    """The records of which people say something, and the scores of their answers."""
    of_D = (one for one in each for _ in one.samples)
    return [one for one in each if one.judged], [x for x, one in zip(scores, of_D, strict=True) if one.judged]


def _agreement(
    subset: str, by_rewards: Mapping[str, Pairs], best: Mapping[str, bool], judged: Sequence[Given]
) -> Agreement:
    """by_rewards: the pairs with the rewards of the model, under "", and with those of the baselines."""
    pairs, firsts = by_rewards[""], [best[one.where] for one in judged if one.where in best]
    low, high = pairs.interval(pairs.correct()) if len(pairs) else (None, None)
    ranks = pairs.rank_metrics()
    return Agreement(
        subset,
        records=len(judged),
        pairs=len(pairs),
        accuracy=pairs.accuracy(),
        low=low,
        high=high,
        best_first=sum(firsts) / len(firsts) if firsts else None,
        spearman=ranks.spearman,
        spearman_low=ranks.spearman_low,
        spearman_high=ranks.spearman_high,
        **{name: rival.accuracy() for name, rival in by_rewards.items() if name},
    )


def _best_first(judged: Sequence[Given], scores: Sequence[float]) -> dict[str, bool]:
    """By place, for comparisons with an order: whether an answer of the best rank has the highest score alone."""
    rest, result = iter(scores), dict[str, bool]()
    for one in judged:
        own = list(islice(rest, len(one.samples)))
        if isinstance(one.judged, Comparison) and len(set(one.judged.ranks)) > 1:
            tops = {rank for score, rank in zip(own, one.judged.ranks, strict=True) if score == max(own)}
            result[one.where] = tops == {min(one.judged.ranks)}
    return result


def _show(rows: Sequence[Agreement], console: Console) -> None:
    """Without the columns that no row has."""
    columns = [name for name in asdict(rows[0]) if any(getattr(row, name) is not None for row in rows)]
    cells = [["" if (x := getattr(row, name)) is None else x for name in columns] for row in rows]
    console.table("Agreement with the file's judgements", columns, cells)


def _answered(fields: Folded, prompt: Prompt, record: Fields) -> Completion:
    """The prompt and the text to score, which ends unless it is a response that `generate` marked as cut."""
    for name in ANSWERS:
        if fields.get(name) is not None:
            if not isinstance(fields[name], str):
                raise UserError(
                    "E-DATA-TYPE", f'"{name}" must be text', where=prompt.where, hint="write the answer as text"
                )
            finished = name not in GENERATED or fields.get("finished", fields.get("ended")) is not False
            return Completion((), (), prompt.turns, fields[name], prompt.where, finished)
    last = {name.lower(): value for name, value in (fields.get("messages") or [{}])[-1].items()}
    if last.get("role") == "assistant":
        return Completion((), (), prompt.turns, last["content"], prompt.where)
    if name := next((name for name in ANSWERS if name in fields.nulls), ""):
        null(name, prompt.where)
    what = f"there is no answer to score; fields seen: {', '.join(record)}"
    hint = f"name it one of {', '.join(ANSWERS)}; or give choices, or chosen and rejected"
    raise UserError("E-DATA-MISSING", what, where=prompt.where, hint=hint)
