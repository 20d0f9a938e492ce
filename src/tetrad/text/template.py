"""How turns become ids: a table of templates, each with the Jinja twin that transformers runs.

`instruction`: Instruction <|sep|> Input <|sep|> Output <|endoftext|>, both separators always. `chatml`: each turn
between <|im_start|> and <|im_end|>, no default system prompt. Prompt and answer are encoded apart, as in generation, so
that a prompt's ids never depend on its answer. The template of a foreign folder is not guessed, and no Jinja runs here.
"""

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

import numpy as np

from tetrad.errors import UserError
from tetrad.text.tokenizer import END, IM_END, IM_START, SEPARATOR, Tokenizer
from tetrad.types import Tokens, Turn

Piece = tuple[str | int, bool]  # a text to encode or a control id; whether the loss reads it


@dataclass(frozen=True, slots=True)
class Template:
    """One row of the table.

    separator: between the parts of `instruction`, a control token or plain text. start: the control token before a
    role's name (chatml). end: the control token after an answer.
    """

    name: str = "instruction"
    separator: str = SEPARATOR
    start: str = ""
    end: str = END

    def pieces(self, tokenizer: Tokenizer, turns: Sequence[Turn], where: str = "") -> list[Piece]:
        """What a conversation, or a prompt that waits for its answer, is made of. Errors: E-DATA-CHAT, E-MODEL-*."""
        make = _chat_pieces if self.start else _instruction_pieces
        return list(make(self, tokenizer, turns, where))

    def prompt(self, tokenizer: Tokenizer, turns: Sequence[Turn], where: str = "") -> list[int]:
        """Ids up to where the answer begins."""
        return _encode(tokenizer, self.pieces(tokenizer, turns, where))[0]

    def conversation(self, tokenizer: Tokenizer, turns: Sequence[Turn], where: str = "") -> Tokens:
        """Ids of all turns; `train` marks each answer and its end token."""
        ids, train = _encode(tokenizer, self.pieces(tokenizer, turns, where))
        return Tokens(np.array(ids, np.int32), np.array(train, np.bool_), where)

    def answer(self, tokenizer: Tokenizer, text: str) -> list[int]:
        """Ids of an answer with its end token."""
        return [*tokenizer.encode(text), self.end_id(tokenizer)]

    def end_id(self, tokenizer: Tokenizer) -> int:
        """The id after an answer; a foreign tokenizer without <|endoftext|> lends `instruction` its own end token."""
        found = tokenizer.control(self.end)
        if found is None and self.start:
            _no_control(self, self.end)
        return tokenizer.eos_ids[0] if found is None else found

    def jinja(self, tokenizer: Tokenizer) -> str:
        """The chat template that gives the same ids in transformers."""
        end = tokenizer.name(self.end_id(tokenizer))
        names = {"separator": self.separator, "start": self.start, "end": end}
        given = "".join(f"{{% set {name} = {json.dumps(value)} %}}" for name, value in names.items() if value)
        return given + (_JINJA_CHATML if self.start else _JINJA_INSTRUCTION)

    def record(self) -> dict[str, str]:
        """What `of_folder` reads back from an exported tokenizer_config.json."""
        return {"template": self.name, "separator": self.separator}


TEMPLATES = {
    "instruction": Template(),
    "chatml": Template("chatml", separator="", start=IM_START, end=IM_END),
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
_JINJA_CHATML = (
    "{% for message in messages %}{{ '' if loop.first else '\\n' }}"
    "{{ start + message['role'] + '\\n' + message['content'] + end }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '\\n' + start + 'assistant\\n' }}{% endif %}"
)


def template(name: str, separator: str = SEPARATOR) -> Template:
    """A row of the table, `instruction` with another separator if wanted."""
    return Template(separator=separator) if name == "instruction" else TEMPLATES[name]


def of_folder(folder: Path) -> Template:
    """The template that a folder written by Tetrad names. Errors: E-MODEL-TEMPLATE."""
    path = folder / "tokenizer_config.json"
    try:
        noted = json.loads(path.read_text(encoding="utf-8")).get("tetrad")
        return template(noted["template"], noted["separator"])
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        hint = f"name one of {', '.join(TEMPLATES)}"
        raise UserError("E-MODEL-TEMPLATE", "the folder names no template", where=str(folder), hint=hint) from None


def _instruction_pieces(form: Template, tokenizer: Tokenizer, turns: Sequence[Turn], where: str) -> Iterator[Piece]:
    first, second, answer = _question(turns, where)
    separator = tokenizer.control(form.separator)
    if separator is None:
        if form.separator == SEPARATOR:
            hint = 'set sft.add_separator = true, or a plain text as sft.separator, such as "\\n\\n"'
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
    asked = turns[: len(turns) - (answer is not None)]
    roles = tuple(turn.role for turn in asked)
    if roles in (("instruction", "input"), ("system", "user")):
        return asked[0].text, asked[1].text, answer
    if roles in (("instruction",), ("user",)):
        return asked[0].text, "", answer
    what = f"the template instruction takes one question, not the turns {', '.join(roles) or 'none'}"
    raise UserError("E-DATA-CHAT", what, where=where, hint='use template = "chatml" for conversations')


def _chat_pieces(form: Template, tokenizer: Tokenizer, turns: Sequence[Turn], where: str) -> Iterator[Piece]:
    start, end = tokenizer.control(form.start), form.end_id(tokenizer)
    if start is None:
        _no_control(form, form.start)
    for number, turn in enumerate(_merged(turns, where)):
        if number:
            yield "\n", False
        yield start, False
        if turn.role == "assistant":
            yield "assistant\n", False
            yield turn.text, True
            yield end, True
        else:
            yield f"{turn.role}\n{turn.text}", False
            yield end, False
    if turns[-1].role != "assistant":
        yield from (("\n", False), (start, False), ("assistant\n", False))


def _merged(turns: Sequence[Turn], where: str) -> list[Turn]:
    """Instruction and Input as one user turn."""
    if not turns:
        raise UserError("E-DATA-CHAT", "there is no turn", where=where)
    if turns[0].role != "instruction":
        return list(turns)
    extra = turns[1].text if len(turns) > 1 and turns[1].role == "input" else ""
    rest = [turn for turn in turns[1:] if turn.role != "input"]
    return [Turn("user", turns[0].text + (f"\n{extra}" if extra else "")), *rest]


def _encode(tokenizer: Tokenizer, pieces: Sequence[Piece]) -> tuple[list[int], list[bool]]:
    ids: list[int] = []
    train: list[bool] = []
    for piece, trained in pieces:
        new = [piece] if isinstance(piece, int) else tokenizer.encode(piece)
        ids += new
        train += [trained] * len(new)
    return ids, train


def _no_control(form: Template, name: str) -> NoReturn:
    hint = "choose the template instruction, or a tokenizer that has it"
    raise UserError("E-MODEL-TEMPLATE", f"{form.name} needs the control token {name}", hint=hint)
