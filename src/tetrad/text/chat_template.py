"""How turns become ids: a table of templates, each with its Jinja equivalent for transformers.

`instruction`: Instruction <|sep|> Input <|sep|> Output <|endoftext|>, always both separators. The others are chats: a
role header, the text, an end token; some begin with a default system prompt. Each gives the ids that the original
template of that family gives in transformers, with three intended differences: prompt and answer are encoded
separately, as in generation, so that a prompt's ids never depend on its answer (one that begins with white space may
differ); user text never becomes a control token; and `qwen3` is the non-thinking mode, so an answer to train on that
contains thoughts is refused; those of earlier answers are left out, as in transformers. A foreign folder's template is
recognised by its hash or not at all, and no Jinja runs here.
"""

import hashlib
import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from tetrad.errors import UserError
from tetrad.text.tokenizer import END, IM_END, IM_START, SEPARATOR, Tokenizer
from tetrad.types import Turn

Piece = tuple[str | int, bool]  # a text to encode or a control id; whether the loss reads it
THINK, THOUGHT = "<think>", "</think>"
NO_SYSTEM = (
    "the template instruction has no place for sft.system",
    'name a template of chats, as template = "chatml" under [sft], or remove system',
)
"""What is wrong, and what to do."""


@dataclass(frozen=True, slots=True)
class Template:
    """One row of the table.

    separator: between the parts of `instruction`, a control token or plain text. end: the control token after an
    answer. Of a chat: begin, the control token at the start; start and head, those around a role name; gap, the text
    between header and content; after, the text after an end token, `closes` if the last turn has it too; system, the
    prompt of conversations without a system turn; trims: white space around a text is stripped; thinks: the last
    answer, and a generation prompt, begins with an empty thought. known: sha256 of original templates of this family,
    16 digits of each.
    """

    name: str = "instruction"
    separator: str = SEPARATOR
    end: str = END
    begin: str = ""
    start: str = ""
    head: str = ""
    gap: str = "\n"
    after: str = "\n"
    closes: bool = True
    system: str = ""
    trims: bool = False
    thinks: bool = False
    known: tuple[str, ...] = ()

    def pieces(
        self,
        tokenizer: Tokenizer,
        turns: Sequence[Turn],
        where: str = "",
        *,
        last: bool = False,
        closed: bool = True,
        prompt: bool = False,
    ) -> list[Piece]:
        """The pieces of a conversation, or of a prompt to be answered. last: only the last answer is trained on.

        prompt: what is not an answer is trained on too. closed: false ends a conversation at its last end token, as a
        response ends. An answer that is marked as not trained on never is. Errors: E-DATA-CHAT, E-MODEL-*.
        """
        make = _chat_pieces if self.start else _instruction_pieces
        pieces = list(make(self, tokenizer, turns, where))
        learned = [i for i, (_, trained) in enumerate(pieces) if trained]
        if not closed and turns[-1].role == "assistant":
            pieces = pieces[: learned[-1] + 1]
        marks = [turn.train for turn in turns if turn.role == "assistant"]
        if last:
            marks = [mark and number == len(marks) for number, mark in enumerate(marks, 1)]
        answers = iter([mark for mark in marks for _ in ("text", "end token")])
        return [(piece, next(answers) if trained else prompt) for piece, trained in pieces]

    def prompt(self, tokenizer: Tokenizer, turns: Sequence[Turn], where: str = "") -> list[int]:
        """Ids up to where the answer begins; where the last turn is an answer, up to where that goes on."""
        pieces = [piece for piece, _ in self.pieces(tokenizer, turns, where, closed=False)]
        if turns[-1].role == "assistant":
            pieces.pop()  # its end token
        return [i for piece in pieces for i in (tokenizer.encode(piece) if isinstance(piece, str) else [piece])]

    def read_back(self, tokenizer: Tokenizer, text: str, where: str = "") -> tuple[tuple[Turn, ...], bool]:
        """The turns of a conversation that was written in this template, and whether its last answer has an end token.

        Errors: E-DATA-CHAT where it is not in this template, or ends with no answer; E-MODEL-*.
        """
        end, turns = tokenizer.name(self.end_id(tokenizer)), list[Turn]()
        finished = text.removesuffix(self.after).endswith(end) if self.start else text.endswith(end)
        if self.start:
            marks = [re.escape(mark) for mark in (self.start, self.head + self.gap, end, self.after)]
            turn = "{}(system|user|assistant){}(.*?)(?:{}(?:{})?|\\Z)".format(*marks)
            place, text = 0, text.removeprefix(self.begin)
            for match in re.finditer(turn, text, re.DOTALL):
                turns += [Turn(match[1], match[2])] if match.start() == place else []
                place = match.end() if match.start() == place else place
            turns = turns if place == len(text) else []
        elif len(parts := text.removesuffix(end).split(self.separator)) == 3:
            turns = [Turn(role, part) for role, part in zip(("instruction", "input", "assistant"), parts, strict=True)]
        if len(turns) < 2 or turns[-1].role != "assistant":
            what = f"this is no conversation in the template {self.name} that ends with an answer"
            raise UserError("E-DATA-CHAT", what, where=where, hint="send messages, or a prompt and an answer")
        answer = turns.pop().text.removeprefix(f"{THINK}\n\n{THOUGHT}\n\n" if self.thinks else "")
        return (*turns, Turn("assistant", answer)), finished

    def said(self, text: str) -> str:
        """The last answer as this template writes it."""
        return text.strip() if self.trims else text.lstrip("\n") if self.thinks else text

    def end_id(self, tokenizer: Tokenizer) -> int:
        """The id after an answer; `instruction` uses the first eos id of a foreign tokenizer without <|endoftext|>."""
        if not self.start and tokenizer.control(self.end) is None:
            return tokenizer.eos_ids[0]
        return _control(self, tokenizer, self.end)

    def jinja(self, tokenizer: Tokenizer) -> str:
        """The chat template that gives the same ids in transformers."""
        end = tokenizer.name(self.end_id(tokenizer))
        names: dict[str, Any] = {"separator": self.separator, "end": end}
        if self.start:
            kept = ("begin", "start", "head", "gap", "after", "closes", "system", "trims", "thinks")
            names = {"end": end, **{name: getattr(self, name) for name in kept}}
        given = "".join(f"{{% set {key} = {json.dumps(v, ensure_ascii=False)} %}}" for key, v in names.items())
        return given + (_JINJA_CHAT if self.start else _JINJA_INSTRUCTION)

    def record(self) -> dict[str, str]:
        """What `recorded` reads back from an exported tokenizer_config.json."""
        own = {"system": self.system} if self.system != TEMPLATES[self.name].system else {}
        return {"template": self.name, "separator": self.separator, **own}

    def with_system(self, system: str | None) -> "Template":
        """With another system prompt: None keeps its own, an empty text drops it. Errors: E-CONF-CONFLICT."""
        if system and not self.start:
            raise UserError("E-CONF-CONFLICT", NO_SYSTEM[0], where="sft.system", hint=NO_SYSTEM[1])
        return self if system is None else replace(self, system=system.strip() if self.trims else system)


def _chatml(name: str, system: str, known: tuple[str, ...] = (), **more: Any) -> Template:
    return Template(name, separator="", start=IM_START, end=IM_END, system=system, known=known, **more)


_SMOLLM2 = "You are a helpful AI assistant named SmolLM, trained by Hugging Face"
_QWEN = "You are Qwen, created by Alibaba Cloud. You are a helpful assistant."
TEMPLATES = {
    "instruction": Template(),
    "chatml": _chatml("chatml", "", closes=False),
    "qwen2": _chatml("qwen2", "You are a helpful assistant.", ("793202280c0910ab", "f0206845c9ebc3ab")),
    "qwen2.5": _chatml("qwen2.5", _QWEN, ("55b2f4a26ac9ee71",)),
    "qwen3": _chatml("qwen3", "", ("a55ee1b1660128b7", "87a2728cb8dc9fe4"), thinks=True),
    "smollm2": _chatml("smollm2", _SMOLLM2, ("872be49dbb638044",)),
    "llama3": Template(
        "llama3",
        separator="",
        end="<|eot_id|>",
        begin="<|begin_of_text|>",
        start="<|start_header_id|>",
        head="<|end_header_id|>",
        gap="\n\n",
        after="",
        trims=True,
        known=("ba03a121d097859c",),
    ),
}
_JINJA_INSTRUCTION = (
    "{% set answered = messages[-1]['role'] == 'assistant' %}"
    "{% set asked = messages[:-1] if answered else messages %}"
    "{% if asked | length == 0 or asked | length > 2 or asked[-1]['role'] != 'user'"
    " or (asked | length == 2 and asked[0]['role'] != 'system') %}"
    "{{ raise_exception('this template takes one question: user, or system and user') }}{% endif %}"
    "{{ asked[0]['content'] + separator + (asked[1]['content'] if asked | length == 2 else '') + separator }}"
    "{% if answered %}{{ messages[-1]['content'] + end }}{% endif %}"
)
_JINJA_CHAT = (
    "{% set thought = '<think>\\n\\n</think>\\n\\n' if thinks else '' %}{{ begin }}"
    "{% if system and messages[0]['role'] != 'system' %}"
    "{{ start + 'system' + head + gap + system + end + after }}{% endif %}"
    "{% for message in messages %}{% set text = message['content'] | trim if trims else message['content'] %}"
    "{% set final = loop.last and message['role'] == 'assistant' %}"
    "{% if thinks and message['role'] == 'assistant' and '</think>' in text %}"
    "{% if final and text.split('</think>')[0].rstrip('\\n').split('<think>')[-1].strip('\\n') %}"
    "{{ raise_exception('this template takes no thoughts in its last answer') }}{% endif %}"
    "{% set text = text.split('</think>')[-1].lstrip('\\n') %}{% endif %}"
    "{{ start + message['role'] + head + gap }}"
    "{% if final and thinks %}{{ thought + text.lstrip('\\n') }}{% else %}{{ text }}{% endif %}{{ end }}"
    "{% if closes or not loop.last %}{{ after }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}"
    "{{ ('' if closes else after) + start + 'assistant' + head + gap + thought }}{% endif %}"
)


# --- which template ---


def template(name: str, separator: str = SEPARATOR, system: str | None = None) -> Template:
    """A row of the table, with another separator (`instruction` only) or system prompt. Errors: E-CONF-CONFLICT."""
    return (Template(separator=separator) if name == "instruction" else TEMPLATES[name]).with_system(system)


def choose(folder: Path, name: str, separator: str = SEPARATOR, system: str | None = None, *, own: bool) -> Template:
    """The template for the model of a folder. name: the user's choice, or empty; system: as in `with_system`.

    own: the model answers in the template that it was trained with, whatever the user's choice; else that comes first.
    Then that of a foreign folder, if it is known, and `instruction` where there is none. Errors: E-MODEL-TEMPLATE,
    E-CONF-CONFLICT.
    """
    noted = recorded(folder)
    if own and noted:
        return noted
    if name or separator != SEPARATOR:  # only `instruction` has a separator to choose
        row = template(name or "instruction", separator)
        return (noted if noted and noted.start and noted.name == row.name else row).with_system(system)
    return (noted or recognised(folder) or template("instruction")).with_system(system)


def recorded(folder: Path) -> Template | None:
    """The template that Tetrad recorded in a folder that it wrote."""
    noted = _config(folder).get("tetrad")
    if not isinstance(noted, dict) or noted.get("template") not in TEMPLATES:
        return None
    system = noted.get("system")  # not there, where it is the template's own
    form = template(str(noted["template"]), str(noted.get("separator", SEPARATOR)))
    return form.with_system(system if isinstance(system, str) else None)


def recognised(folder: Path) -> Template | None:
    """The row that matches a foreign folder's chat template; None where it has none. Errors: E-MODEL-TEMPLATE."""
    text = jinja_of(folder)
    if not text:
        return None
    digest = hashlib.sha256(text.strip().encode()).hexdigest()[:16]
    for form in TEMPLATES.values():
        if digest in form.known:
            return form
    what = f"the chat template of the folder (sha256 {digest}) is not one that Tetrad knows"
    names = ", ".join(TEMPLATES)
    hint = f'name the one that fits: template = "NAME" under [sft], or --template NAME; there are {names}'
    raise UserError("E-MODEL-TEMPLATE", what, where=str(folder), hint=hint)


def jinja_of(folder: Path) -> str:
    """A folder's Jinja, which is read as text only; empty where it has none."""
    path = folder / "chat_template.jinja"
    if path.is_file():
        return path.read_text(encoding="utf-8", errors="replace")
    value = _config(folder).get("chat_template")
    if isinstance(value, list):  # several by name
        named = [item for item in value if isinstance(item, dict) and item.get("name") == "default"]
        value = named[0].get("template") if named else None
    return value if isinstance(value, str) else ""


def _config(folder: Path) -> dict[str, Any]:
    try:
        read = json.loads((folder / "tokenizer_config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}
    return read if isinstance(read, dict) else {}


# --- pieces ---


def _instruction_pieces(form: Template, tokenizer: Tokenizer, turns: Sequence[Turn], where: str) -> Iterator[Piece]:
    first, second, answer = _question(turns, where)
    separator = tokenizer.control(form.separator)
    if separator is None:
        if form.separator == SEPARATOR:
            hint = 'set sft.add_separator = true or sft.separator = "\\n\\n" in a recipe; elsewhere another --template'
            raise UserError("E-MODEL-TOKENIZER", f"the tokenizer has no control token {SEPARATOR}", hint=hint)
        yield first + form.separator + second + form.separator, False
    else:
        yield from ((first, False), (separator, False), (second, False), (separator, False))
    if answer is not None:
        yield answer, True
        yield form.end_id(tokenizer), True


def _question(turns: Sequence[Turn], where: str) -> tuple[str, str, str | None]:
    """Instruction, Input and the answer if there is one."""
    answer = turns[-1].text if turns and turns[-1].role == "assistant" else None
    prompt = turns[: len(turns) - (answer is not None)]
    roles = tuple(turn.role for turn in prompt)
    if roles in (("instruction", "input"), ("system", "user")):
        return prompt[0].text, prompt[1].text, answer
    if roles in (("instruction",), ("user",)):
        return prompt[0].text, "", answer
    what = f"the template instruction takes one question, not the turns {', '.join(roles) or 'none'}"
    raise UserError("E-DATA-CHAT", what, where=where, hint='use template = "chatml" for conversations')


def _chat_pieces(form: Template, tokenizer: Tokenizer, turns: Sequence[Turn], where: str) -> Iterator[Piece]:
    if form.begin:
        yield _control(form, tokenizer, form.begin), False
    messages = _merged(turns, where)
    if form.system and messages[0].role != "system":
        messages = [Turn("system", form.system), *messages]
    for number, turn in enumerate(messages):
        final = number == len(messages) - 1
        text = turn.text.strip() if form.trims else turn.text
        if turn.role != "assistant":
            yield from _header(form, tokenizer, turn.role, text)
        else:
            yield from _header(form, tokenizer, "assistant")
            if form.thinks:
                text = _without_thought(form, text, final, where)
                yield from _thought(form, tokenizer) if final else ()
            yield text, True
        yield form.end_id(tokenizer), turn.role == "assistant"
        if form.after and (form.closes or not final):
            yield form.after, False
    if turns[-1].role != "assistant":
        if form.after and not form.closes:
            yield form.after, False
        yield from _header(form, tokenizer, "assistant")
        yield from _thought(form, tokenizer) if form.thinks else ()


def _header(form: Template, tokenizer: Tokenizer, role: str, text: str = "") -> Iterator[Piece]:
    """A role name between its control tokens, and the text in one piece with what precedes it."""
    yield _control(form, tokenizer, form.start), False
    if form.head:
        yield role, False
        yield _control(form, tokenizer, form.head), False
        yield form.gap + text, False
    else:
        yield role + form.gap + text, False


def _thought(form: Template, tokenizer: Tokenizer) -> Iterator[Piece]:
    """The empty thought that turns thinking off."""
    yield _control(form, tokenizer, THINK), False
    yield "\n\n", False
    yield _control(form, tokenizer, THOUGHT), False
    yield "\n\n", False


def _without_thought(form: Template, text: str, final: bool, where: str) -> str:
    """An answer without its thought; the final one, to be trained on, must have none."""
    if final and THOUGHT in text and text.split(THOUGHT)[0].rstrip("\n").split(THINK)[-1].strip("\n"):
        what = f"an answer holds {THOUGHT}, and the template {form.name} is the one without thinking"
        hint = 'cut the thoughts out of the answers, or write template = "chatml"'
        raise UserError("E-DATA-CHAT", what, where=where, hint=hint)
    text = text.split(THOUGHT)[-1].lstrip("\n") if THOUGHT in text else text
    return form.said(text) if final else text


def _merged(turns: Sequence[Turn], where: str) -> list[Turn]:
    """Instruction and Input as one user turn."""
    if not turns:
        raise UserError("E-DATA-CHAT", "there is no turn", where=where, hint="delete the record")
    if turns[0].role != "instruction":
        return list(turns)
    extra = turns[1].text if len(turns) > 1 and turns[1].role == "input" else ""
    rest = [turn for turn in turns[1:] if turn.role != "input"]
    return [Turn("user", turns[0].text + (f"\n{extra}" if extra else "")), *rest]


def _control(form: Template, tokenizer: Tokenizer, name: str) -> int:
    token_id = tokenizer.control(name)
    if token_id is None:
        hint = "choose the template instruction, or a tokenizer that has it"
        raise UserError("E-MODEL-TEMPLATE", f"{form.name} needs the control token {name}", hint=hint)
    return token_id
