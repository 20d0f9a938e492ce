"""`tetrad chat`: a conversation line by line in the terminal; each reply is shown when it is whole.

Under `chatml` the conversation is remembered until /new. A model of the `instruction` template answers one question at
a time: the line is the Instruction or, where a system message is given, the Input.
"""

import importlib
import sys
import unicodedata
from contextlib import suppress
from dataclasses import replace

from tetrad.engine.console import Console
from tetrad.errors import UserError
from tetrad.serve.models import Model, answers, check_text, load, question
from tetrad.settings.use import Chat
from tetrad.types import Prompt, Turn

HELP = "/new forgets what was said, /quit ends"


def chat(settings: Chat, console: Console) -> None:
    """Talks until /quit, the end of the input, or Ctrl-C at the prompt. Errors: E-DATA-ENCODING, E-MODEL-*, E-CKPT-*.

    What goes wrong with one line is said, and the conversation goes on.
    """
    check_text(settings.system, "--system")
    model = load(settings.model, settings.template)
    remembers = bool(model.form.start)
    console.say(f"{model.folder}, template {model.form.name}. {HELP if remembers else '/quit ends'}.")
    if not remembers:
        console.say("This model answers one question at a time: it does not remember what was said before.")
    with suppress(ImportError):
        importlib.import_module("readline")  # gives input() its line editing and history
    opening = [Turn("system", settings.system)] if settings.system else []
    turns, number = list(opening), 0
    while (line := read_line(console)) is not None:
        word = line.strip()
        if word == "/quit":
            return
        if word == "/new":
            turns = list(opening)
            console.say("A new conversation.")
        elif word.startswith("/") and word[1:].isalpha():
            console.say(f"There is no {word}: {HELP}.")
        elif word:
            reply = answer(model, [*turns, Turn("user", line)], number, settings, console)
            number += 1
            if remembers and reply is not None:
                turns += [Turn("user", line), Turn("assistant", reply)]


def read_line(console: Console) -> str | None:
    """The next line; None where there is none."""
    shown = "> " if sys.stdin.isatty() else ""
    try:
        return input(shown)
    except (EOFError, KeyboardInterrupt):
        if shown:
            console.say("")
        return None
    except UnicodeDecodeError:
        console.say("That was not UTF-8; it was not sent.")
        return ""


def answer(model: Model, turns: list[Turn], number: int, settings: Chat, console: Console) -> str | None:
    """Shows the reply and returns it; None where there is none: the conversation is too long, or Ctrl-C."""
    try:
        asked = question(model, Prompt(tuple(turns), "chat"))
        room = model.model.config.max_positions - len(asked.ids)
        if room < 1:
            what = f"the conversation has {len(asked.ids)} tokens, the model reads {len(asked.ids) + room}"
            raise UserError("E-DATA-LONG", what, where="chat", hint="/new, or a shorter line")
        longest = min(settings.max_new, room)
        (found,) = answers(model, [asked], number, replace(settings, max_new=longest))
    except UserError as error:
        console.say(f"[{error.code}] {error.what}" + (f": {error.hint}" if error.hint else ""))
        return None
    except KeyboardInterrupt:
        console.say("(stopped)")
        return None
    text = found.sample.text
    console.say(printable(text) + ("" if found.ended else f" [cut after {longest} tokens]"))
    return text


def printable(text: str) -> str:
    """The text without control characters that could command the terminal."""
    return "".join(c if c in "\n\t" or unicodedata.category(c) != "Cc" else "\ufffd" for c in text)
