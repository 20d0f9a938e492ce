"""`tetrad chat`: a conversation line by line in the terminal; a reply is shown as it is written, and Ctrl-C ends it.

Under `chatml` the conversation is remembered until /new. A model of the `instruction` template answers one question at
a time: the line is the Instruction or, where a system message is given, the Input.
"""

import importlib
import sys
import unicodedata
from contextlib import suppress
from dataclasses import dataclass, field, replace

from tetrad.console import Console
from tetrad.errors import UserError
from tetrad.inference.engine import Engine, Event
from tetrad.inference.policy import Generated, Policy, answer, cache_need, check_text, load, question, request
from tetrad.reward.model import RewardModel, load_reward, rate_samples
from tetrad.settings.use import Chat
from tetrad.types import Prompt, Response, Turn


@dataclass
class Talk:
    """What was said. turns: with the system message; last: the last answer; asked: the number of questions."""

    settings: Chat
    model: Policy
    judge: RewardModel | None
    console: Console
    turns: list[Turn] = field(default_factory=list)
    last: Generated | None = None
    asked: int = 0

    @property
    def remembers(self) -> bool:
        return bool(self.model.form.start)

    @property
    def help(self) -> str:
        """The commands."""
        forget = "/new forgets what was said, " if self.remembers else ""
        return f"{forget}{'/score rates the last reply, ' if self.judge else ''}/help says this, /quit ends"

    def renew(self) -> None:
        """Back to the beginning."""
        self.turns, self.last = [Turn("system", self.settings.system)] if self.settings.system else [], None


def chat(settings: Chat, console: Console) -> None:
    """Talks until /quit, the end of the input, or Ctrl-C at the prompt. Errors: E-DATA-ENCODING, E-MODEL-*, E-CKPT-*.

    What goes wrong with one line is said, and the conversation goes on.
    """
    check_text(settings.system, "--system")
    judge = load_reward(settings.reward, settings.template) if settings.reward else None
    talk = Talk(settings, load(settings.model, settings.template), judge, console)
    talk.renew()
    model = talk.model
    need = cache_need(model, 1, min(1024, model.model.config.max_positions))
    console.say(f"{model.folder}, template {model.form.name}, cache: {need}. {talk.help}.")
    if not talk.remembers:
        console.say("This model answers one question at a time: it does not remember what was said before.")
    with suppress(ImportError):
        importlib.import_module("readline")  # gives input() its line editing and history
    while (line := read_line(console)) is not None:
        if line.strip() == "/quit":
            return
        if line.strip():
            respond(talk, line)


def respond(talk: Talk, line: str) -> None:
    """What a line asks for: a command, or a reply."""
    word, console = line.strip(), talk.console
    if word == "/new" and talk.remembers:
        talk.renew()
        console.say("A new conversation.")
    elif word == "/score" and talk.judge:
        console.say(score(talk, talk.judge))
    elif word == "/help":
        console.say(f"{talk.help}.")
    elif word.startswith("/") and word[1:].isalpha():
        console.say(f"There is no {word}: {talk.help}.")
    else:
        turns = (*talk.turns, Turn("user", line))
        talk.last = reply(talk, turns) or talk.last
        if talk.remembers and talk.last and talk.last.sample.turns == turns:
            talk.turns = [*turns, Turn("assistant", talk.last.sample.text)]


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


def reply(talk: Talk, turns: tuple[Turn, ...]) -> Generated | None:
    """Shows the answer while it is written, until Ctrl-C; None where the conversation is too long, or nothing came."""
    model, console, settings = talk.model, talk.console, talk.settings
    said: list[Event] = []
    try:
        asked = question(model, Prompt(turns, "chat"))
        room = model.model.config.max_positions - len(asked.ids)
        if room < 1:
            what = f"the conversation has {len(asked.ids)} tokens, the model reads {len(asked.ids) + room}"
            raise UserError("E-DATA-LONG", what, where="chat", hint="/new, or a shorter line")
        settings = replace(settings, max_new_tokens=min(settings.max_new_tokens, room))
        engine = Engine(model.fused, model.at, 1, len(asked.ids) + settings.max_new_tokens, model.tokenizer)
        engine.add(request(model, asked, settings, talk.asked))
        talk.asked += 1
        for event in engine.events():
            said.append(event)
            console.write(printable(event.text))
    except UserError as error:
        console.say(f"[{error.code}] {error.what}" + (f": {error.hint}" if error.hint else ""))
        return None
    except KeyboardInterrupt:
        console.say(" (stopped)")
        if not said:
            return None
        ids, logprobs = tuple(event.token for event in said), tuple(event.logprob for event in said)
        return answer(model, asked, Response(ids, logprobs, "cancelled", "".join(event.text for event in said)))
    found = answer(model, asked, whole) if (whole := said[-1].reply) else None
    console.say("" if found and found.finished else f" [cut after {settings.max_new_tokens} tokens]")
    return found


def score(talk: Talk, judge: RewardModel) -> str:
    """What the reward model gives for the last answer."""
    if talk.last is None:
        return "There is no reply yet."
    try:
        return f"score {rate_samples(judge, [talk.last.sample])[0]:+.3f}"
    except UserError as error:
        return f"[{error.code}] {error.what}"
    except KeyboardInterrupt:
        return "(stopped)"


def printable(text: str) -> str:
    """The text without control characters that could command the terminal."""
    return "".join(c if c in "\n\t" or unicodedata.category(c) != "Cc" else "\ufffd" for c in text)
