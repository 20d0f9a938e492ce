"""What the values of a recipe mean for the data that it names: what is read how often, learned, cut off and judged.

Pure functions of what was read and of the recipe; nothing is read here.
"""

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from tetrad.report.reading import Reading
from tetrad.report.sections import Finding, Section, Table, share
from tetrad.settings.recipe import Recipe
from tetrad.types import Score

FEW = {"sft.data": 100, "reward.data": 200, "reward.held_out": 50, "ppo.prompts": 50, "evaluate.prompts": 30}
MOST_EPOCHS = (
    16.0  # repeated text teaches about as much as new text up to 4 times, hardly any after 16 (Muennighoff 2023)
)
LEAST_LEARNED = 0.05  # of the tokens of SFT
MOST_LONGER = 0.2  # of the answers to learn from that do not fit into max_new


def section(recipe: Recipe, readings: Mapping[str, Reading], positions: int, *, guessed: bool) -> Section:
    """Prompts against answers, epochs, judges and validation. positions: the model's longest sequence, in tokens;
    guessed: tokens are guessed from characters."""
    figures, rows = dict[str, Any](), []
    for reading in readings.values():
        if reading.prompt_lengths:
            sides = [_quantiles(lengths) for lengths in (reading.prompt_lengths, reading.answer_lengths)]
            learned = reading.trained / max(reading.tokens, 1)
            figures[reading.setting] = {"prompt": sides[0], "answer": sides[1], "learned": learned}
            cells = [cell for side in sides for cell in (side.values() or [""] * 3)]
            answers = share(reading.trained, reading.tokens) if reading.answer_lengths else ""
            rows.append((reading.setting, *cells, answers))
    columns = ("setting", "prompt: median", "95 %", "longest", "answer: median", "95 %", "longest", "in answers")
    tables = [Table("guessed from characters" if guessed else "", columns, tuple(rows))]
    if (text := readings.get("pretrain.text")) and text.tokens:
        tokens = recipe.pretrain.tokens or text.tokens
        epochs = tokens / text.tokens
        figures["pretrain.text"] = {"tokens": text.tokens, "epochs": epochs}
        tables.append(
            Table("pre-training", ("tokens read", "of a text of", "epochs"), ((tokens, text.tokens, epochs),))
        )
    parts = (_epochs, _learned, _cut_off, _judges, _validation, _few, _scale)
    findings = tuple(finding for part in parts for finding in part(recipe, readings, positions))
    return Section("recipe", "Tokens of prompts and answers", figures, tuple(tables), (), findings)


def _quantiles(lengths: Sequence[int]) -> dict[str, int]:
    if not lengths:
        return {}
    median, p95, longest = np.quantile(np.asarray(lengths), (0.5, 0.95, 1.0), method="higher").tolist()
    return {"median": median, "p95": p95, "longest": longest}


def _epochs(recipe: Recipe, readings: Mapping[str, Reading], _: int) -> Iterator[Finding]:
    tokens, text = recipe.pretrain.tokens, readings.get("pretrain.text")
    if not text or not text.tokens or not tokens:
        return
    epochs = tokens / text.tokens
    said = f"pretrain.tokens = {tokens} reads the text, {text.tokens} tokens, {epochs:.2g} times"
    if epochs > MOST_EPOCHS:
        fix = f"more text, or pretrain.tokens = {4 * text.tokens} or fewer"
        yield Finding("warning", "epochs", f"{said}: after {MOST_EPOCHS:.0f} hardly anything is learned", fix=fix)
    elif epochs < 0.5:
        yield Finding("note", "epochs", said, fix="pretrain.tokens = 0 reads all of it once")


def _learned(recipe: Recipe, readings: Mapping[str, Reading], _: int) -> Iterator[Finding]:
    sft = readings.get("sft.data")
    if sft and sft.tokens and sft.trained < LEAST_LEARNED * sft.tokens and not recipe.sft.train_on_prompt:
        text = f"{share(sft.trained, sft.tokens)} of the tokens of sft.data are learned: the rest is prompts"
        fix = "shorten the prompts, give longer answers, or count on more sft.epochs"
        yield Finding("warning", "learned share", text, fix=fix)


def _cut_off(recipe: Recipe, readings: Mapping[str, Reading], positions: int) -> Iterator[Finding]:
    """Replies are like the answers of SFT, or else those that the reward model reads: do they fit into max_new?"""
    like = next((r for n in ("sft.data", "reward.data") if (r := readings.get(n)) and r.answer_lengths), None)
    for name, most in (("ppo", recipe.ppo.max_new), ("evaluate", recipe.evaluate.max_new)):
        prompts = readings.get(f"{name}.prompts")
        if like is None or not prompts or not prompts.prompt_lengths:
            continue
        longer = float((np.asarray(like.answer_lengths) > most).mean())
        if longer > MOST_LONGER:
            text = (
                f"{longer:.0%} of the answers of {like.setting} are longer than {name}.max_new = {most}: replies will"
            )
            longest, room = _quantiles(like.answer_lengths)["p95"], positions - max(prompts.prompt_lengths)
            fix = f"{name}.max_new = {max(most, min(longest, room))}, or learn from shorter answers"
            yield Finding("warning", "answer length", f"{text} be cut off before they end", fix=fix)


def _judges(recipe: Recipe, readings: Mapping[str, Reading], _: int) -> Iterator[Finding]:
    if "ppo.prompts" not in readings:
        return
    judges = 'judges = ["FILE.py:FUNCTION"]'
    if "evaluate.prompts" not in readings:
        fix = f'add [evaluate] with prompts = ["FILE"] and {judges}'
        yield Finding("warning", "judge", "there is no [evaluate]: nothing will say whether PPO is better", fix=fix)
    elif not recipe.evaluate.judges:
        text = (
            "[evaluate] has no judge but the reward that PPO is trained on: that one rises even where replies get worse"
        )
        yield Finding("warning", "judge", text, fix=f"evaluate.{judges}")


def _validation(recipe: Recipe, readings: Mapping[str, Reading], _: int) -> Iterator[Finding]:
    for table, key, serves in (
        ("reward", "data", "early stopping, calibration and the gate before PPO"),
        ("sft", "data", "the held-out loss"),
        ("pretrain", "text", "the held-out perplexity"),
    ):
        if f"{table}.{key}" in readings and f"{table}.held_out" not in readings:
            level = "warning" if table == "reward" else "note"
            text = f"{table}.{key} has no validation files beside it: {serves} need them"
            fix = f'{table}.held_out = ["FILE"], with a tenth of the records, taken out of {table}.{key}'
            yield Finding(level, "validation", text, fix=fix)


def _few(recipe: Recipe, readings: Mapping[str, Reading], _: int) -> Iterator[Finding]:
    for setting, least in FEW.items():
        if setting in readings and len(readings[setting].keys) < least:
            text = f"{setting} has only {len(readings[setting].keys)} records"
            yield Finding("warning", "few records", text, fix=f"give it at least {least}; results on fewer are chance")


def _scale(recipe: Recipe, readings: Mapping[str, Reading], _: int) -> Iterator[Finding]:
    data, scale = readings.get("reward.data"), recipe.reward.score_scale
    scores = [record.score for record in data.records if isinstance(record, Score)] if data else []
    if len(scores) < 20 or not scale:
        return
    low, high = min(scores), max(scores)
    (most, times), *_rest = Counter(scores).most_common(1)
    if times > 0.9 * len(scores):
        text = f"{share(times, len(scores))} of the scores of reward.data are {most:g}: they tell answers hardly apart"
        yield Finding("warning", "score scale", text, fix="score on a finer scale, or give comparisons")
    elif high - low < 0.6 * (scale[1] - scale[0]):
        text = f"scores run from {low:g} to {high:g} and reward.score_scale from {scale[0]:g} to {scale[1]:g}"
        fix = f"reward.score_scale = [{low:g}, {high:g}], unless higher and lower scores were possible"
        yield Finding("warning", "score scale", text, fix=fix)
