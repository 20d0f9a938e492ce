"""What the values of a recipe mean for its data: how often it is read, and what is trained on, cut off and judged.

Pure functions of what was read and of the recipe; nothing is read here.
"""

from collections.abc import Iterator, Mapping, Sequence

import numpy as np

from tetrad.datacheck.reading import Reading
from tetrad.report.sections import Finding, Section, Table, share
from tetrad.stages import ON_POLICY, Recipe
from tetrad.types import Score

FEW = {
    "sft.data": 100,
    "reward.data": 200,
    "reward.validation": 50,
    "dpo.data": 200,
    "ppo.prompts": 50,
    "grpo.prompts": 50,
    "evaluate.prompts": 30,
}
MOST_EPOCHS = 16.0  # repeated text teaches nearly like new text up to 4 times, hardly after 16 (Muennighoff 2023)
LEAST_LEARNED = 0.05  # of the tokens of SFT
MOST_LONGER = 0.2  # of the training answers that do not fit into max_new_tokens


def section(recipe: Recipe, readings: Mapping[str, Reading], *, guessed: bool) -> Section:
    """Prompts against answers, epochs, judges and validation. guessed: tokens are estimated from characters."""
    section, rows = Section("recipe", "Tokens of prompts and answers"), []
    for reading in readings.values():
        if reading.prompt_lengths:
            sides = [_quantiles(lengths) for lengths in (reading.prompt_lengths, reading.answer_lengths)]
            learned = reading.trained / max(reading.tokens, 1)
            section.metrics[reading.setting] = {"prompt": sides[0], "answer": sides[1], "learned": learned}
            cells = [cell for side in sides for cell in (side.values() or [""] * 3)]
            rows.append((reading.setting, *cells, share(reading.trained, reading.tokens)))
    columns = ("setting", "prompt: median", "95 %", "longest", "answer: median", "95 %", "longest", "in answers")
    section.tables.append(Table("guessed from characters" if guessed else "", columns, rows))
    if (text := readings.get("pretrain.text")) and text.tokens:
        epochs = (recipe.pretrain.tokens or text.tokens) / text.tokens
        section.metrics["pretrain.text"] = {"tokens": text.tokens, "epochs": epochs}
        section.tables.append(Table("pre-training", ("tokens of the text", "times read"), [(text.tokens, epochs)]))
    for part in (_epochs, _learned, _cut_off, _judges, _validation, _few, _scale):
        section.findings += part(recipe, readings)
    return section


def _quantiles(lengths: Sequence[int]) -> dict[str, int]:
    if not lengths:
        return {}
    median, p95, longest = np.quantile(np.asarray(lengths), (0.5, 0.95, 1.0), method="higher").tolist()
    return {"median": median, "p95": p95, "longest": longest}


def _epochs(recipe: Recipe, readings: Mapping[str, Reading]) -> Iterator[Finding]:
    tokens, text = recipe.pretrain.tokens, readings.get("pretrain.text")
    if text and text.tokens and tokens:
        epochs = tokens / text.tokens
        usage = f"pretrain.tokens = {tokens} reads the text, {text.tokens} tokens, {epochs:.2g} times"
        if epochs > MOST_EPOCHS:
            fix = f"more text, or pretrain.tokens = {4 * text.tokens} or fewer"
            yield Finding("warning", "epochs", f"{usage}: after {MOST_EPOCHS:.0f} hardly anything is learned", fix=fix)
        elif epochs < 0.5:
            yield Finding("note", "epochs", usage, fix="pretrain.tokens = 0 reads all of it once")


def _learned(recipe: Recipe, readings: Mapping[str, Reading]) -> Iterator[Finding]:
    sft = readings.get("sft.data")
    if sft and sft.trained < LEAST_LEARNED * sft.tokens and not recipe.sft.train_on_prompt:
        text = f"{share(sft.trained, sft.tokens)} of the tokens of sft.data are learned: the rest is prompts"
        yield Finding("warning", "learned share", text)


def _cut_off(recipe: Recipe, readings: Mapping[str, Reading]) -> Iterator[Finding]:
    """Responses resemble the answers of SFT, or else of the reward model: do they fit into max_new_tokens?"""
    like = next((r for n in ("sft.data", "reward.data") if (r := readings.get(n)) and r.answer_lengths), None)
    for name in (*ON_POLICY, "evaluate"):
        most = getattr(recipe, name).max_new_tokens
        longer = float((np.asarray(like.answer_lengths) > most).mean()) if like and f"{name}.prompts" in readings else 0
        if like and longer > MOST_LONGER:
            text = f"{longer:.0%} of the answers of {like.setting} are longer than {name}.max_new_tokens = {most}:"
            fix = f"{name}.max_new_tokens = {_quantiles(like.answer_lengths)['p95']}, or learn from shorter answers"
            yield Finding("warning", "answer length", f"{text} responses will be cut off before they end", fix=fix)


def _judges(recipe: Recipe, readings: Mapping[str, Reading]) -> Iterator[Finding]:
    trained = [name.upper() for name in ON_POLICY if f"{name}.prompts" in readings]
    if trained and "evaluate.prompts" not in readings:
        yield Finding("warning", "judge", f"there is no [evaluate]: nothing will say whether {trained[-1]} is better")
    elif trained and not recipe.evaluate.judges:
        text = f"[evaluate] has no judge but the reward of {trained[-1]} itself, which rises even where responses get"
        text += " worse"
        yield Finding("warning", "judge", text, fix='evaluate.judges = ["FILE.py:FUNCTION"]')


def _validation(_: Recipe, readings: Mapping[str, Reading]) -> Iterator[Finding]:
    levels = {"reward.data": "warning", "dpo.data": "warning", "sft.data": "note", "pretrain.text": "note"}
    for setting, level in levels.items():
        validation = setting.partition(".")[0] + ".validation"
        if setting in readings and validation not in readings:
            text = f"{setting} has no validation files: nothing will say how well it was learned"
            yield Finding(level, "validation", text, fix=f'{validation} = ["FILE"], a tenth of the records set apart')


def _few(_: Recipe, readings: Mapping[str, Reading]) -> Iterator[Finding]:
    for setting, least in FEW.items():
        if setting in readings and (n := len(readings[setting].keys)) < least:
            yield Finding("warning", "few records", f"{setting} has only {n} records, fewer than {least}")


def _scale(recipe: Recipe, readings: Mapping[str, Reading]) -> Iterator[Finding]:
    data, scale = readings.get("reward.data"), recipe.reward.score_scale
    scores = [record.score for record in data.records if isinstance(record, Score)] if data else []
    if len(scores) >= 20 and scale and (high := max(scores)) - (low := min(scores)) < 0.6 * (scale[1] - scale[0]):
        text = f"scores run from {low:g} to {high:g} and reward.score_scale from {scale[0]:g} to {scale[1]:g}"
        fix = f"reward.score_scale = [{low:g}, {high:g}], unless higher and lower scores were possible"
        yield Finding("warning", "score scale", text, fix=fix)
