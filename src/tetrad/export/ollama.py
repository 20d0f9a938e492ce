"""A Modelfile for Ollama: where the GGUF lies, the chat template in Go's words, where responses end, how to sample."""

import json
from collections.abc import Mapping, Sequence
from typing import Any

from tetrad.text.chat_template import Template

_OPTIONS = ("temperature", "top_k", "top_p", "min_p", "repetition_penalty")
_LAST = "{{ range $i, $_ := .Messages }}{{ if eq (len (slice $.Messages $i)) 1 }}{{ .Content }}{{ end }}{{ end }}"


def modelfile(
    gguf: str, template: Template | None, ends: Sequence[str], sampling: Mapping[str, Any], *, add_bos: bool
) -> str:
    """The file's text. gguf: the file's name beside it. ends: the tokens that end a response, by name.

    add_bos: llama.cpp starts every prompt with the start token itself.
    """
    lines = [f"FROM ./{gguf}"]
    chat = template and f'TEMPLATE """{go_template(template, ends[0], add_bos=add_bos)}"""'
    lines += [chat or "# The model's folder names no template that Tetrad knows: write a TEMPLATE before you chat."]
    lines += [f"PARAMETER stop {json.dumps(end, ensure_ascii=False)}" for end in ends]
    lines += [f"PARAMETER {name.replace('repetition', 'repeat')} {sampling[name]}" for name in _OPTIONS]
    return "\n".join(lines) + "\n"


def go_template(form: Template, end: str, *, add_bos: bool) -> str:
    """The prompt of a conversation that ends with a question, as `Template.prompt` writes it. end: after each turn."""
    if not form.start:  # one question; of a longer conversation the last
        separator = _literal(form.separator)
        before = "{{ if .System }}{{ .System }}" + separator + "{{ end }}"
        return before + _LAST + separator + "{{ if not .System }}" + separator + "{{ end }}"
    head, after = _literal(form.head + form.gap), _literal(end + form.after)
    turn = _literal(form.start) + "{{ .Role }}" + head + "{{ .Content }}" + after
    default = _literal(form.start + "system" + form.head + form.gap + form.system + end + form.after)
    text = "" if add_bos else _literal(form.begin)
    text += '{{ if ne (index .Messages 0).Role "system" }}' + default + "{{ end }}" if form.system else ""
    answer = form.start + "assistant" + form.head + form.gap + ("<think>\n\n</think>\n\n" if form.thinks else "")
    return text + "{{ range .Messages }}" + turn + "{{ end }}" + _literal(answer)


def _literal(text: str) -> str:
    """Text that Go's templates and the Modelfile leave as it is."""
    return "{{ " + json.dumps(text, ensure_ascii=False) + " }}" if "{{" in text or '"' in text else text
