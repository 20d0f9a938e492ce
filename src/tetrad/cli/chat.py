"""`tetrad chat`: a conversation line by line in the terminal; a response streams as it is written, and Ctrl-C ends it.

With `chatml` the conversation is remembered until /new. A model with the `instruction` template answers one prompt at a
time: the line is the Instruction or, if a system message is given, the Input.
"""

import importlib
import sys
import unicodedata
from contextlib import suppress
from dataclasses import dataclass, field, replace

from tetrad.console import Console
from tetrad.errors import UserError
from tetrad.inference.completions import Completion
from tetrad.inference.engine import Event
from tetrad.inference.policy import Policy, cache_need, check_text, completion, encode_prompt, load, request
from tetrad.reward.model import RewardModel, load_reward, score_samples
from tetrad.settings.use import Chat
from tetrad.types import Prompt, Response, Turn


@dataclass
class ChatSession:
    """The conversation. turns: with the system message; last: the last response; prompts: their number so far."""

    settings: Chat
    model: Policy
    reward_model: RewardModel | None
    console: Console
    turns: list[Turn] = field(default_factory=list)
    last: Completion | None = None
    prompts: int = 0

    @property
    def remembers(self) -> bool:
        return bool(self.model.form.start)

    @property
    def help(self) -> str:
        """The commands."""
        forget = "/new forgets what was said, " if self.remembers else ""
        return f"{forget}{'/score rates the last response, ' if self.reward_model else ''}/help says this, /quit ends"

    def reset(self) -> None:
        """Starts a new conversation."""
        self.turns, self.last = [Turn("system", self.settings.system)] if self.settings.system else [], None


def chat(settings: Chat, console: Console) -> None:
    """Talks until /quit, the end of the input, or Ctrl-C at the prompt. Errors: E-DATA-ENCODING, E-MODEL-*, E-CKPT-*.

    An error in one line is reported, and the conversation continues.
    """
    check_text(settings.system, "--system")
    reward_model = load_reward(settings.reward, settings.template) if settings.reward else None
    session = ChatSession(settings, load(settings.model, settings.template), reward_model, console)
    session.reset()
    model = session.model
    need = cache_need(model, 1, min(1024, model.model.config.max_positions))
    console.say(f"{model.folder}, template {model.form.name}, cache: {need}. {session.help}.")
    if not session.remembers:
        console.say("This model answers one question at a time: it does not remember what was said before.")
    with suppress(ImportError):
        importlib.import_module("readline")  # gives input() its line editing and history
    while (line := read_line(console)) is not None:
        if line.strip() == "/quit":
            return
        if line.strip():
            respond(session, line)


def respond(session: ChatSession, line: str) -> None:
    """Handles a line: a command, or a prompt."""
    word, console = line.strip(), session.console
    if word == "/new" and session.remembers:
        session.reset()
        console.say("A new conversation.")
    elif word == "/score" and session.reward_model:
        console.say(score(session, session.reward_model))
    elif word == "/help":
        console.say(f"{session.help}.")
    elif word.startswith("/") and word[1:].isalpha():
        console.say(f"There is no {word}: {session.help}.")
    else:
        turns = (*session.turns, Turn("user", line))
        session.last = stream_response(session, turns) or session.last
        if session.remembers and session.last and session.last.turns == turns:
            session.turns = [*turns, Turn("assistant", session.last.text)]


def read_line(console: Console) -> str | None:
    """The next line; None if there is none."""
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


def stream_response(session: ChatSession, turns: tuple[Turn, ...]) -> Completion | None:
    """Shows the response while it is written, until Ctrl-C; None if the conversation is too long, or nothing came."""
    model, console, settings = session.model, session.console, session.settings
    events: list[Event] = []
    try:
        prompt = encode_prompt(model, Prompt(turns, "chat"))
        room = model.model.config.max_positions - len(prompt.ids)
        if room < 1:
            what = f"the conversation has {len(prompt.ids)} tokens, the model reads {len(prompt.ids) + room}"
            raise UserError("E-DATA-LONG", what, where="chat", hint="/new, or a shorter line")
        settings = replace(settings, max_new_tokens=min(settings.max_new_tokens, room))
        engine = model.engine(1, len(prompt.ids) + settings.max_new_tokens)
        engine.add(request(model, prompt, settings, session.prompts))
        session.prompts += 1
        for event in engine.events():
            events.append(event)
            console.write(printable(event.text))
    except UserError as error:
        console.say(f"[{error.code}] {error.what}" + (f": {error.hint}" if error.hint else ""))
        return None
    except KeyboardInterrupt:
        console.say(" (stopped)")
        if not events:
            return None
        ids, logprobs = tuple(event.token for event in events), tuple(event.logprob for event in events)
        return completion(model, prompt, Response(ids, logprobs, "cancelled", "".join(event.text for event in events)))
    response = events[-1].response
    assert response
    console.say("" if response.finished else f" [cut after {settings.max_new_tokens} tokens]")
    return completion(model, prompt, response)


def score(session: ChatSession, reward_model: RewardModel) -> str:
    """The reward model's score of the last response, as text."""
    if session.last is None:
        return "There is no response yet."
    try:
        return f"score {score_samples(reward_model, [session.last])[0]:+.3f}"
    except UserError as error:
        return f"[{error.code}] {error.what}"
    except KeyboardInterrupt:
        return "(stopped)"


def printable(text: str) -> str:
    """The text without control characters that could control the terminal."""
    return "".join(c if c in "\n\t" or unicodedata.category(c) != "Cc" else "\ufffd" for c in text)
