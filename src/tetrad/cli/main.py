"""The command line: one verb per command, exit codes, and the only place where an error is printed.

Imports are local, so that `--help` is quick and only commands that train or sample import torch.
"""

import difflib
import io
import os
import re
import sys
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from tetrad import streams
from tetrad.cli.common import LOWER, flags, look_at, needs_extra, note, settings_of, with_console, with_words
from tetrad.errors import EXIT_LOST, EXIT_STOPPED, Stopped, UserError

_EXITS = """exit codes: 0 done, 2 configuration, 3 data, 4 checkpoint or model, 5 numbers, 6 disk or memory,
            7 the run folder is in use, 8 a process of several was lost, 75 stopped on request (run the same command to
            resume), 130 interrupted"""


def main(words: Sequence[str] | None = None) -> int:
    """Runs one command and returns its exit code."""
    given = list(sys.argv[1:] if words is None else words)
    debug = "--debug" in given
    streams.prepare()
    given = [word for word in given if word != "--debug"]
    try:
        return _dispatch(given)
    except BrokenPipeError:  # the reader of our output is gone (`tetrad status | head`)
        sys.stdout = io.StringIO()  # so that nothing is flushed into the closed pipe at exit
        return 141
    except BaseException as error:
        if debug and not isinstance(error, SystemExit):
            traceback.print_exc()
        return _report(error)


def _report(error: BaseException) -> int:
    """Prints an error, unless another process of this run ended first and reported it; the exit code of the first."""
    if _several():
        from tetrad.distributed import watchdog

        error = watchdog.cause(error)
    message, code = _told(error)
    if _several():
        first, code = watchdog.claim(code)
        if not first:
            return code
        if isinstance(error, Exception) and code not in (EXIT_STOPPED, EXIT_LOST):
            message += watchdog.label()
    note(message)
    return code


def _several() -> bool:
    """Whether this is one of several processes that train together."""
    return int(os.environ.get("WORLD_SIZE", "1")) > 1


def _told(error: BaseException) -> tuple[str, int]:
    """What is printed for an error, and the exit code."""
    match error:
        case UserError():
            place, fix = error.where and f" {error.where}:", error.hint and f" Fix: {error.hint}"
            end = "" if error.what.endswith((".", "?", "!")) else "."
            return _printable(f"error[{error.code}]{place} {error.what}{end}{fix}"), error.exit_code
        case Stopped():
            return f"stopped: {error}", EXIT_STOPPED
        case KeyboardInterrupt():
            return f"interrupted: {error}" if str(error) else "interrupted", 130
        case Exception():
            frames = traceback.extract_tb(error.__traceback__)
            place = f"{os.path.basename(frames[-1].filename)}:{frames[-1].lineno}" if frames else ""
            fault = f"{type(error).__name__}: {error}"
            message = f"error[internal] {place}: {fault} Fix: this is a fault of Tetrad; --debug shows where"
            return _printable(message), 1
    raise error


def _printable(text: str) -> str:
    """On one line, and without characters that control a terminal: names and data are foreign text."""
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in text)


def _dispatch(words: list[str]) -> int:
    if not words or words[0] in ("-h", "--help", "help"):
        _write(_overview())
        return 0 if words else 2
    verb, *rest = words
    if verb == "--version":
        from tetrad import __version__

        _write(f"tetrad {__version__}")
        return 0
    known = commands()
    if verb not in known:
        near = difflib.get_close_matches(verb, known, n=1)
        hint = f"did you mean `tetrad {near[0]}`?" if near else "`tetrad --help` lists the commands"
        raise UserError("E-CONF-UNKNOWN", f"unknown command {verb}", where="tetrad", hint=hint)
    if wanted := {"-h", "--help", "--help-all"}.intersection(rest):
        _write(_help(verb, everything="--help-all" in wanted))
        return 0
    if not known[verb].settings:
        return _recipe(verb, rest)
    if _several():
        what = f"{verb} is for one process: several would do the same and write the same file"
        raise UserError("E-CONF-CONFLICT", what, where=verb, hint=f"start `tetrad {verb}` without torchrun")
    return known[verb].run(rest)


@dataclass(frozen=True)
class Command:
    """One command. settings: the class of its own settings; commands without one read these tables of a recipe."""

    argument: str
    summary: str
    run: Callable[[list[str]], int] = len
    settings: str = ""
    tables: tuple[str, ...] = ()


def commands() -> dict[str, Command]:
    """By name, in the order of the overview."""
    from tetrad.stages import STAGES

    recipe = "RECIPE.toml"
    stages = {n: Command(recipe, f"only this stage: {row.summary}", tables=row.tables) for n, row in STAGES.items()}
    every = "run all stages in order; finished ones are skipped, an interrupted one resumes"
    exports = "write a model for transformers, PEFT, llama.cpp or Ollama"
    reads = "read every record, train nothing, and report what would spoil the training"
    explains = "one step of PPO with its real numbers, token by token; or what a metric means"
    pages = "one page of a run, or of several side by side: verdict, curves, texts, tokens"
    shows = "which stages are done, stale or running, what each model was made from, and the verdict"
    return {
        "run": Command(recipe, every),
        **stages,
        "check": Command(f"{recipe} | FILE ...", reads, _check, "Check"),
        "init": Command("FILE ...", "write a short recipe for data files, from what their records show", _init, "Init"),
        "status": Command(recipe, shows),
        "generate": Command("MODEL", "answer one prompt or a file of prompts", _generate, "Generate"),
        "chat": Command("MODEL", "talk to a model", _chat, "Chat"),
        "score": Command("MODEL", "score answers with a reward model", _score, "ScoreFile"),
        "serve": Command(
            "MODEL ...", "a model over HTTP as OpenAI's API, a reward model, a chat page", _serve, "Serve"
        ),
        "rank": Command("MODEL ...", "a page on which people rank answers, for the reward model", _rank, "Rank"),
        "report": Command("RUN ...", pages, _page, "Page"),
        "explain": Command("RUN | METRIC", explains, _explain, "Explain"),
        "export": Command("MODEL", exports, _export, "Export"),
        "doctor": Command("", "versions, device, memory; with --vectors FILE the numeric self-test", _doctor, "Doctor"),
    }


def _write(text: str) -> None:
    streams.guarded(sys.stdout, outlives=False).write(text + "\n")


def _overview() -> str:
    lines = ["usage: tetrad COMMAND ...   (tetrad COMMAND --help shows its settings)", ""]
    lines += [f"  {verb + ' ' + one.argument:<27} {one.summary}" for verb, one in commands().items()]
    lines += ["", "Every setting of a recipe can be given as a flag: tetrad run recipe.toml --ppo.steps 50"]
    return "\n".join([*lines, "--debug shows the traceback of an error. --version shows the version.", _EXITS])


def _help(verb: str, *, everything: bool) -> str:
    from tetrad.settings import use
    from tetrad.settings.arguments import help_text
    from tetrad.stages import STAGES, Recipe

    command = commands()[verb]
    usage = f"usage: tetrad {verb} {command.argument} [--SETTING VALUE ...]".replace("  ", " ")
    usage += f"\n\n{command.summary}\n\n"
    more = "" if everything else f"\n\n`tetrad {verb} --help-all` explains what is only named here."
    if command.settings:
        text = help_text(getattr(use, command.settings), everything=everything)
        return usage + text + (more if "\n  sampling:" in text else "")
    first = command.tables[:1] or ("model", *STAGES)
    text = help_text(Recipe, command.tables, first, everything=everything)
    return f"{usage}Each setting is TABLE.KEY in the recipe too.\n{text}{more}"


def _recipe(verb: str, words: list[str]) -> int:
    """run, status and the single stages. The recipe is the first word, or the last."""
    if not words or (words[0].startswith("--") and words[-1].startswith("--")):
        hint = f"tetrad {verb} RECIPE.toml"
        raise UserError("E-CONF-MISSING", "no recipe is given", where=verb, hint=hint)
    path = words.pop(-1 if words[0].startswith("--") else 0)
    from tetrad.pipeline.recipe import read

    recipe = read(path, words)  # before the rest is imported: a mistake in it is reported in half the time
    from tetrad.console import Console
    from tetrad.pipeline import runner

    if _several() and verb != "status":
        from tetrad.distributed import watchdog

        watchdog.join(recipe.run.patience, _report)
    elif recipe.run.nproc > 1 and verb != "status":
        from tetrad.distributed.launch import launch

        debug = ["--debug"] if "--debug" in sys.argv else []
        return launch([verb, path, *words, *debug], recipe.run.nproc, recipe.run.grace, recipe.run.patience)
    console = Console(recipe.run.log_every, quiet=not runner.is_first(), outlives=verb != "status")
    if verb == "status":
        runner.status(recipe, console)
        return 0
    with runner.stoppable(console, lambda doing: Stopped(f"in {doing}; the same command goes on from there")):
        runner.run(recipe, console, only="" if verb == "run" else verb)
    return 0


def _generate(words: list[str]) -> int:
    from tetrad.settings.use import Generate, agreed

    settings = agreed(*settings_of(Generate, "generate", words))
    look_at(settings.model, settings.template)
    if settings.reward:
        look_at(settings.reward, settings.template, reward=True)
    from tetrad.cli.generate import generate_file

    return with_console(generate_file, settings, "generate")


def _chat(words: list[str]) -> int:
    from tetrad.settings.use import Chat, agreed

    settings = agreed(*settings_of(Chat, "chat", words))
    look_at(settings.model, settings.template)
    from tetrad.cli.chat import chat
    from tetrad.console import Console
    from tetrad.pipeline.runner import explained

    with explained("chat", LOWER["chat"]):
        chat(settings, Console())  # Ctrl-C ends a response
    return 0


def _score(words: list[str]) -> int:
    from tetrad.settings.use import ScoreFile

    settings, _ = settings_of(ScoreFile, "score", words)
    look_at(settings.model, settings.template, reward=True)
    from tetrad.cli.score import score_file

    return with_console(score_file, settings, "score")


def _serve(words: list[str]) -> int:
    """The models are the words without a flag."""
    from tetrad.settings.use import Serve

    settings, models = with_words(Serve, "serve", words)
    if not models and not settings.reward:
        raise UserError("E-CONF-MISSING", "MODEL is missing", where="serve", hint="tetrad serve MODEL [--reward RM]")
    needs_extra("serve", "starlette", "uvicorn", "prometheus_client")
    for model in models:
        look_at(model, settings.template)
    if settings.reward:
        look_at(settings.reward, settings.template, reward=True)
    from tetrad.cli.serve import serve
    from tetrad.console import Console
    from tetrad.pipeline.runner import explained

    with explained("serve", LOWER["serve"]):
        return serve(models, settings, Console())  # which answers signals itself


def _rank(words: list[str]) -> int:
    """The models are the words without a flag."""
    from tetrad.settings.use import Rank, agreed

    settings, models = with_words(Rank, "rank", flags(words))
    settings = agreed(settings, {word.partition("=")[0].removeprefix("--") for word in words})
    for name in ("prompts", "out"):
        if not getattr(settings, name):
            hint = "tetrad rank MODEL --prompts PROMPTS.jsonl --out ranked.jsonl"
            raise UserError("E-CONF-MISSING", f"--{name} is missing", where="rank", hint=hint)
    needs_extra("serve", "starlette", "uvicorn", "prometheus_client")
    for model in models:
        look_at(model, settings.template)
    if settings.reward:
        look_at(settings.reward, settings.template, reward=True)
    from tetrad.cli.rank import rank
    from tetrad.console import Console
    from tetrad.pipeline.runner import explained

    with explained("rank", LOWER["generate"]):
        return rank(models, settings, Console())  # which answers signals itself


def _check(words: list[str]) -> int:
    """A recipe with its overrides, or data files; the flags of `check` itself are separated from the recipe's."""
    from tetrad.settings.arguments import nest, parse, split
    from tetrad.settings.base import options
    from tetrad.settings.check import build
    from tetrad.settings.use import Check

    words = words if any(word.endswith(".toml") for word in words) else flags(words)
    mine, rest = split(words, options(Check))
    _, values, places = parse(mine, options(Check))
    settings = build(Check, nest(values), places)
    targets = [word for word in rest if not word.startswith("--")]
    from tetrad.datacheck.check import check_files, check_recipe
    from tetrad.pipeline.recipe import read

    if targets and targets[0].endswith(".toml"):
        rest.remove(targets[0])
        recipe = read(targets[0], rest)
        pace = _pace if settings.measure else None
        return with_console(lambda _, console: check_recipe(recipe, settings, console, pace), settings, "check")
    if not targets or len(targets) < len(rest):
        what = (
            f"unexpected argument {next(w for w in rest if w not in targets)}"
            if targets
            else "nothing to check is given"
        )
        hint = "tetrad check RECIPE.toml, or tetrad check FILE ..."
        raise UserError("E-CONF-SYNTAX" if targets else "E-CONF-MISSING", what, where="check", hint=hint)
    return with_console(lambda _, console: check_files(targets, settings, console), settings, "check")


def _pace(*stage: Any) -> float:
    from tetrad.training.pace import stage_seconds

    return stage_seconds(*stage)


def _init(words: list[str]) -> int:
    """The files are the words without a flag."""
    from tetrad.settings.use import Init

    settings, files = with_words(Init, "init", flags(words))
    if not files:
        raise UserError("E-CONF-MISSING", "no data is given", where="init", hint="tetrad init FILE ... [--from MODEL]")
    from tetrad.datacheck.init import init
    from tetrad.pipeline.recipe import read

    def write(settings: Init, console: Any) -> None:
        read(init(settings, files, console))

    return with_console(write, settings, "init")


def _explain(words: list[str]) -> int:
    from tetrad.settings.use import Explain

    settings, _ = settings_of(Explain, "explain", words)
    if re.fullmatch(r"[\w.]+", settings.model) and not os.path.exists(settings.model):
        from tetrad.report.glossary import explain_metric

        _write(explain_metric(settings.model))
        return 0
    from tetrad.pipeline.recipe import read
    from tetrad.rl.explain import explain

    return with_console(lambda s, console: explain(s, console, read), settings, "explain")


def _page(words: list[str]) -> int:
    """The runs are the words without a flag."""
    from tetrad.settings.use import Page

    settings, runs = with_words(Page, "report", words)
    if not runs:
        raise UserError("E-CONF-MISSING", "RUN is missing", where="report", hint="tetrad report runs/NAME [runs/OTHER]")
    from tetrad.report.run_page import report

    return with_console(lambda s, console: console.say(f"report: {report(runs, s.out)}"), settings, "report")


def _export(words: list[str]) -> int:
    from tetrad.settings.use import Export, agreed_export

    settings = agreed_export(*settings_of(Export, "export", words))
    from tetrad.cli.export import export

    return with_console(export, settings, "export")


def _doctor(words: list[str]) -> int:
    from tetrad.settings.use import Doctor

    settings, _ = settings_of(Doctor, "doctor", words)
    from tetrad.cli import doctor
    from tetrad.console import Console

    console = Console()
    console.table("environment", ("what", "value"), doctor.environment())
    if not settings.vectors:
        return 0
    rows = doctor.check_vectors(settings.vectors)
    columns = ("function", "cases", "error64", "error32", "grad64", "grad32", "ok")
    console.table(
        f"numeric self-test, {settings.vectors}",
        columns,
        [[getattr(row, column) for column in columns] for row in rows],
    )
    return 0 if all(row.ok for row in rows) else 5
