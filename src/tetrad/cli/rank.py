"""`tetrad rank`: a page on which people rank answers, given or sampled while they rank, for `tetrad reward`."""

import socket
import threading
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import islice, product, zip_longest
from pathlib import Path

from tetrad.cli.serve import check_free
from tetrad.console import Console
from tetrad.data.fields import fold
from tetrad.data.record_formats import asked
from tetrad.data.records import preferences_of
from tetrad.data.rows import rows
from tetrad.data.source import Counts, sources
from tetrad.errors import UserError
from tetrad.inference.completions import Completion, too_long
from tetrad.inference.policy import Policy, completions, encode_prompt, load
from tetrad.reward.model import RewardModel, documents_from_text, load_reward, score_documents
from tetrad.seeds import seed_for
from tetrad.server import rank_app
from tetrad.server.app import create_app
from tetrad.server.guard import Limits, is_loopback
from tetrad.server.listen import Server
from tetrad.server.ranking import ALL_BAD, FAST, RANKED, SKIP, Item, Ranking, clean_name, doubt
from tetrad.server.service import Service, model_ids
from tetrad.settings.use import Rank, Serve
from tetrad.training.context import renamed
from tetrad.types import Comparison, Prompt

_AT_ONCE = 8  # prompts whose answers are sampled together
_TRIES = 3  # for answers that differ


def rank(models: Sequence[str], settings: Rank, console: Console) -> int:
    """Serves the page until SIGTERM or Ctrl-C. Errors: E-CONF-*, E-DATA-*, E-MODEL-*, E-RUN-LOCKED, E-IO-*."""
    names = read_names(settings.annotators) if settings.annotators else None
    loopback = is_loopback(settings.host)
    if names is None and not loopback:
        what = f"a page that others can reach needs personal links: {settings.host}"
        raise UserError("E-CONF-MISSING", what, where="--host", hint="add --annotators FILE")
    check_free(settings.host, settings.port)
    items, prompts = read_prompts(settings)
    if prompts and not models:
        what = f"{len(prompts)} prompts have no choices, and no model is named to answer them"
        raise UserError("E-CONF-MISSING", what, where=prompts[0].where, hint="tetrad rank MODEL --prompts FILE")
    loaded = {name: load(folder, settings.template) for name, folder in model_ids(models).items()} if prompts else {}
    check_room(loaded.values(), prompts, settings)
    judge = load_reward(settings.reward, settings.template) if settings.reward else None
    controls = read_controls(settings.controls) if settings.controls else ()
    with Ranking(settings, controls, ready=not (judge and prompts)) as ranking:
        for item in items:
            ranking.add(weighed(item, judge))
        known = {item.prompt.turns for item in ranking.items.values()}
        left = [prompt for prompt in prompts if prompt.turns not in known]
        work = threading.Thread(target=fill, args=(ranking, loaded, left, judge, console), daemon=True)

        def started(port: int) -> None:
            work.start()
            host = socket.gethostname() if settings.host in ("0.0.0.0", "::") else settings.host
            address = f"http://{f'[{host}]' if ':' in host else host}:{port}/rank"
            console.say(f"{len(ranking.items)} items, {len(left)} prompts to be answered: {address}")
            for name in names or ():
                console.say(f"  {name}: {address}#{people.token(name, 'link')}")

        people = rank_app.People(ranking.secret, names)
        app = create_app(Service({}, None, Serve()), Limits(loopback=loopback), rank_app.routes(ranking, people))
        Server(app, settings.host, settings.port, started).run()
        ranking.ending = True
        if work.is_alive():
            work.join()  # what it samples now is kept
        report(ranking, console)
    return 0


def read_names(path: str) -> list[str]:
    """A name a line. Errors: E-DATA-*."""
    try:
        names = [clean_name(line) for line in Path(path).read_text(encoding="utf-8").splitlines() if line.strip()]
    except (OSError, ValueError) as error:
        code = "E-DATA-PATH" if isinstance(error, OSError) else "E-DATA-SYNTAX"
        raise UserError(code, f"can't be read as a name a line: {error}", where=path) from None
    if not names or len(set(names)) < len(names):
        raise UserError("E-DATA-EMPTY" if not names else "E-DATA-OVERLAP", "needs different names", where=path)
    return names


def read_prompts(settings: Rank) -> tuple[list[Item], list[Prompt]]:
    """The items that the file gives whole, and the prompts without choices. Errors: E-DATA-*."""
    items, prompts = list[Item](), list[Prompt]()
    given, counts = sources([settings.prompts], rename=renamed(settings.rename)), Counts()
    for row in (row for path in given.paths for row in rows(path, counts)):
        fields = fold(row.read(), row.where, rename=given.rename)
        prompt = asked(fields, row.where, counts)
        if "choices" not in fields:
            prompts.append(prompt)
            continue
        choices = fields["choices"] if isinstance(fields["choices"], list) else []
        texts = [choice.get("text") if isinstance(choice, dict) else choice for choice in choices]
        answers = tuple(dict.fromkeys(text for text in texts if isinstance(text, str) and text.strip()))
        if not 2 <= len(answers) == len(texts) <= 26:
            hint = "write each answer once, as a text or with its text, at most 26"
            what = "choices must be two or more different answers"
            raise UserError("E-DATA-RANK", what, where=row.where, hint=hint)
        items.append(Item(prompt, answers))
    return items, prompts


def read_controls(path: str) -> list[Item]:
    """Ranked records, whose order is taken for true. Errors: E-DATA-*."""
    records = [record for file in sources([path]).paths for record in preferences_of(file, sources([path]), Counts())]
    ranked = [record for record in records if isinstance(record, Comparison)]
    return [Item(record.prompt, record.answers, ranks=record.ranks) for record in ranked]


def check_room(models: Iterable[Policy], prompts: Sequence[Prompt], settings: Rank) -> None:
    """Errors: E-DATA-LONG for a prompt that leaves a model no room for its answer."""
    for model in models:
        limit = model.model.config.max_positions
        for prompt in prompts:
            size, most = len(encode_prompt(model, prompt).ids), limit - settings.max_new_tokens
            if size > most:
                raise too_long(size, most, settings.max_new_tokens, prompt.where)


def weighed(item: Item, judge: RewardModel | None) -> Item:
    """With the reward model's doubt. Errors: E-DATA-LONG, E-NUM-NONFINITE."""
    if judge is None:
        return item
    samples = [Completion((), (), item.prompt.turns, text, item.prompt.where) for text in item.answers]
    documents = documents_from_text(judge.template, judge.tokenizer, samples)
    return replace(item, doubt=doubt(score_documents(judge, documents)))


def fill(
    ranking: Ranking,
    models: Mapping[str, Policy],
    prompts: Sequence[Prompt],
    judge: RewardModel | None,
    console: Console,
) -> None:
    """Adds an item for each prompt while people rank; then everything may be asked."""
    few = 0
    try:
        for prompt, answers in sampled(models, prompts, ranking.settings):
            if len(answers) > 1:
                ranking.add(weighed(Item(prompt, tuple(answers), tuple(answers.values())), judge))
            few += len(answers) < 2
            if ranking.ending:
                return
    except UserError as error:
        console.say(f"sampling has ended: {error}")
    if few:
        console.say(f"{few} prompts are left out: the models gave no two different answers")
    ranking.ready = True


def sampled(
    models: Mapping[str, Policy], prompts: Sequence[Prompt], settings: Rank
) -> Iterator[tuple[Prompt, dict[str, str]]]:
    """Of each prompt the different answers, by the model that gave each: at most `answers`, from the models in turn.

    Blank and repeated ones are sampled again, from other random numbers, and after three rounds missing."""
    share = -(-settings.answers // max(1, len(models)))
    for at in range(0, len(prompts), _AT_ONCE):
        chunk = prompts[at : at + _AT_ONCE]
        pools: list[dict[str, list[str]]] = [{name: [] for name in models} for _ in chunk]
        for attempt, (name, model) in product(range(_TRIES), models.items()):
            short = [i for i, pool in enumerate(pools) if len(pool[name]) < share]
            seeded = replace(settings, seed=seed_for(settings.seed, f"rank {name}", attempt, at))
            for i, group in zip(
                short, completions(model, [encode_prompt(model, chunk[i]) for i in short], seeded, share), strict=True
            ):
                others = {text for pool in pools[i].values() for text in pool}
                new = dict.fromkeys(one.text for one in group if one.text.strip() and one.text not in others)
                pools[i][name] = [*pools[i][name], *new][:share]
        for prompt, pool in zip(chunk, pools, strict=True):
            turns = zip_longest(*([(text, name) for text in texts] for name, texts in pool.items()))
            yield prompt, dict(islice((pair for turn in turns for pair in turn if pair), settings.answers))


def report(ranking: Ranking, console: Console) -> None:
    """What came of it: each person's counts and marks, and how far they agree."""
    for name, person in ranking.people().items():
        counts = ", ".join(f"{person[kind]} {kind}" for kind in (RANKED, ALL_BAD, SKIP, FAST) if kind in person)
        right = "" if person["right"] is None else f"; {person['right']:.0%} of the control pairs right"
        console.say(f"{name}: {counts}{right}{''.join(f'; note: {flag}' for flag in person['flags'])}")
    pairs, alpha = ranking.agreement()
    agree = f"; alpha {alpha:.2f} over {pairs} pairs that two people judged" if alpha is not None else ""
    console.say(f"{ranking.done()} of {len(ranking.items)} items done{agree}: {ranking.out}")
