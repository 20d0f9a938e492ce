"""Every row of the table against the Jinja that its family ships, and against the Jinja that we export.

On small learned tokenizers with trl's files (always there), and on the families' own tokenizers where they can be had.
"""

import json
from functools import cache
from pathlib import Path
from typing import Any

import pytest

import families
import fetched
from families import Chat, conversation
from tetrad.errors import UserError
from tetrad.text.chat_template import TEMPLATES, Template, recognised, recorded, template
from tetrad.text.tokenizer import Tokenizer
from tetrad.types import Turn

transformers = pytest.importorskip("transformers")
pytestmark = pytest.mark.parity

CHATS = families.chats(300)
SHORT = [c for c in families.chats(900, longest=2) if c[-1].role == "assistant" or len(c) < 3]
VOCABULARY = {
    "qwen2": "qwen3",
    "qwen2.5": "qwen3",
    "qwen3": "qwen3",
    "llama3": "llama3",
}
BEGIN = "<|begin_of_text|>"


def loaded(folder: Path, row: str, vocabulary: str) -> tuple[Tokenizer, Any]:
    """Our tokenizer and theirs. vocabulary: learned, or real for the family's own."""
    if vocabulary == "learned":
        ours = families.learned()
        for name, content in ours.files(TEMPLATES[row]).items():
            (folder / name).write_bytes(content)
        return ours, transformers.AutoTokenizer.from_pretrained(folder, bos_token=BEGIN)
    return real(VOCABULARY.get(row, row))


@cache
def real(name: str) -> tuple[Tokenizer, Any]:
    """Once each: these are files of ten megabytes."""
    source = fetched.smollm2() if name == "smollm2" else fetched.words(name)
    return Tokenizer.load(source), transformers.AutoTokenizer.from_pretrained(source)


def theirs_of(theirs: Any, chat: Chat, jinja: str | None = None) -> list[int]:
    messages = [{"role": turn.role, "content": turn.text} for turn in chat]
    waits = chat[-1].role != "assistant"
    ids: list[int] = theirs.apply_chat_template(
        messages,
        chat_template=jinja,
        tokenize=True,
        add_generation_prompt=waits,
        return_dict=False,
        enable_thinking=False,
    )
    return ids


def ours_of(form: Template, tokenizer: Tokenizer, chat: Chat) -> list[int]:
    ids = conversation(form, tokenizer, chat).ids.tolist()
    assert chat[-1].role == "assistant" or ids == form.prompt(tokenizer, chat)
    return [int(i) for i in ids]


def differing(form: Template, ours: Tokenizer, theirs: Any, chats: list[Chat], jinja: str | None) -> list[Chat]:
    return [chat for chat in chats if ours_of(form, ours, chat) != theirs_of(theirs, chat, jinja)]


def test_the_corpus() -> None:
    assert len(CHATS) >= 200 and {len([t for t in c if t.role != "system"]) for c in CHATS} == set(range(1, 7))
    assert len(SHORT) >= 200
    assert sum(c[-1].role == "assistant" for c in CHATS) == sum(c[-1].role == "user" for c in CHATS)


CASES = [(row, "installed", "learned") for row in fetched.INSTALLED]
CASES += [(row, "installed", "real") for row in fetched.INSTALLED]
CASES += [(row, "fetched", kind) for row in ("smollm2", "qwen2", "qwen3") for kind in ("learned", "real")]


@pytest.mark.parametrize(("row", "source", "vocabulary"), CASES)
@pytest.mark.timeout(600)
def test_the_real_template(tmp_path: Path, row: str, source: str, vocabulary: str) -> None:
    jinja = fetched.installed_jinja(row) if source == "installed" else fetched.fetched_jinja(row)
    ours, theirs = loaded(tmp_path, row, vocabulary)
    assert not differing(TEMPLATES[row], ours, theirs, CHATS, jinja)


@pytest.mark.parametrize("row", TEMPLATES)
@pytest.mark.parametrize("vocabulary", ["learned", "real"])
def test_the_exported_template(tmp_path: Path, row: str, vocabulary: str) -> None:
    """A folder that we write: transformers' ids are ours, and its own begin token is not put twice."""
    if vocabulary == "real" and row in ("instruction", "chatml"):
        pytest.skip("these rows have no tokenizer of their own")
    ours, _ = loaded(tmp_path, row, vocabulary)
    if row.startswith("llama"):
        ours = beginning(ours)
    written = tmp_path / "written"
    written.mkdir()
    for name, content in ours.files(TEMPLATES[row]).items():
        (written / name).write_bytes(content)
    theirs = transformers.AutoTokenizer.from_pretrained(written)
    chats = SHORT[:300] if row == "instruction" else CHATS
    assert not differing(TEMPLATES[row], ours, theirs, chats, None)
    assert theirs.eos_token_id == TEMPLATES[row].end_id(ours)
    assert recorded(written) == TEMPLATES[row]
    if row.startswith("llama"):
        begin = ours.control(BEGIN)
        assert theirs("x")["input_ids"][0] == begin
        assert all(theirs_of(theirs, chat).count(begin) == 1 for chat in chats)


SYSTEM = 'You are "terse", it\'s 🦊 \\n {{ x }} %} {% raw %} {# y #}\n\n好。 '


@pytest.mark.parametrize("system", ["", SYSTEM], ids=["dropped", "another"])
@pytest.mark.parametrize("row", [row for row in TEMPLATES if row != "instruction"])
def test_another_system_prompt(tmp_path: Path, row: str, system: str) -> None:
    """Exported, it gives our ids; it is what the family's own template makes of a system turn, or the bare chat."""
    ours, form = families.learned(), template(row, system=system)
    for name, content in ours.files(form).items():
        (tmp_path / name).write_bytes(content)
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path, bos_token=BEGIN)
    chats = CHATS[:60]
    assert not differing(form, ours, theirs, chats, None)
    assert recorded(tmp_path) == form
    original = fetched.installed_jinja(row) if row in fetched.INSTALLED else TEMPLATES[row].jinja(ours)
    for chat in chats:
        turn = () if chat[0].role == "system" or not system else (Turn("system", system),)
        if turn or chat[0].role == "system":
            assert ours_of(form, ours, chat) == theirs_of(theirs, (*turn, *chat), original)
        else:
            assert theirs.decode(ours_of(form, ours, chat)).removeprefix(BEGIN).startswith(f"{form.start}user")


def beginning(tokenizer: Tokenizer) -> Tokenizer:
    """The same, whose tokenizer.json puts the begin token before every text, as Llama 3's does today."""
    spec = json.loads(tokenizer.text)
    begin = {"id": BEGIN, "ids": [tokenizer.control(BEGIN)], "tokens": [BEGIN]}
    first, text = {"SpecialToken": {"id": BEGIN, "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}
    pair = [first, text, {"Sequence": {"id": "B", "type_id": 1}}]
    spec["post_processor"] = {
        "type": "TemplateProcessing",
        "single": [first, text],
        "pair": pair,
        "special_tokens": {BEGIN: begin},
    }
    return Tokenizer(json.dumps(spec, ensure_ascii=False), tokenizer.eos_ids, tokenizer.pad_id)


@pytest.mark.parametrize("row", [*VOCABULARY, "smollm2"])
def test_user_text_adds_no_control_token_of_a_real_tokenizer(tmp_path: Path, row: str) -> None:
    ours, _ = loaded(tmp_path, row, "real")
    assert families.assert_no_control(TEMPLATES[row], ours, 2_000) == 2_000


def turns(*texts: str) -> Chat:
    return tuple(Turn(("user", "assistant")[i % 2], text) for i, text in enumerate(texts))


TRIMMED = [turns(" \n\u3000q\t", "\n\n a \x1f\n"), turns(" a\n", " b ", "\r\n c ", "\n"), turns("\n q \n")]
THOUGHTS = [
    turns("q", "\n\na"),
    turns("q", "\n\na", "q", " a"),
    turns("q", "<think>\nwhy\n</think>\n\na", "q", "b"),
    turns("q", "why</think>\n\n", "q"),
    turns("q", "<think>\n\n</think>\n\na"),
    turns("q", "</think>a</think>\n b", "q", "</think>\nc"),
    turns("q", "a", "<tool_response>\nx\n</tool_response>", "\nb"),
    turns("<tool_response>x</tool_response>"),
]


@pytest.mark.parametrize("row", ["llama3", "qwen3"])
def test_what_a_family_does_to_a_text(tmp_path: Path, row: str) -> None:
    """Trimmed turns and dropped thoughts. The learned tokenizer is read without <tool_response>, which is text here."""
    chats = THOUGHTS if row == "qwen3" else TRIMMED
    plain = Tokenizer(families.learned().text.replace("tool_response>", "tool_other>"))
    for name, content in plain.files(TEMPLATES[row]).items():
        (tmp_path / name).write_bytes(content)
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path, bos_token=BEGIN)
    for jinja in (None, fetched.installed_jinja(row)):
        for chat in chats:
            assert theirs.decode(ours_of(TEMPLATES[row], plain, chat)) == theirs.decode(theirs_of(theirs, chat, jinja))
            begins = (turn.text.startswith((" ", "\n")) for turn in chat if turn.role == "assistant")
            if row != "qwen3" or not any(begins):
                assert ours_of(TEMPLATES[row], plain, chat) == theirs_of(theirs, chat, jinja), chat


def test_thoughts_that_are_refused_there_too(tmp_path: Path) -> None:
    chat = turns("q", "<think>\nwhy\n</think>\n\na")
    ours, theirs = loaded(tmp_path, "qwen3", "learned")
    with pytest.raises(UserError, match="E-DATA-CHAT"):
        ours_of(TEMPLATES["qwen3"], ours, chat)
    with pytest.raises(Exception, match="no thoughts"):
        theirs_of(theirs, chat)


@pytest.mark.parametrize("source", ["installed", "fetched"])
def test_real_templates_are_recognised(tmp_path: Path, source: str) -> None:
    rows = ["smollm2", "qwen2", "qwen3"] if source == "fetched" else ["qwen2.5", "qwen3", "llama3"]
    for row in rows:
        jinja = (fetched.fetched_jinja if source == "fetched" else fetched.installed_jinja)(row)
        for text in (jinja, jinja.rstrip("\n"), jinja.rstrip("\n") + "\n"):
            for given in (text, [{"name": "tool_use", "template": "x"}, {"name": "default", "template": text}]):
                (tmp_path / "tokenizer_config.json").write_text(json.dumps({"chat_template": given}))
                assert recognised(tmp_path) == TEMPLATES[row]
            (tmp_path / "tokenizer_config.json").write_text("{}")
            (tmp_path / "chat_template.jinja").write_text(text)
            assert recognised(tmp_path) == TEMPLATES[row]
            (tmp_path / "chat_template.jinja").unlink()


def test_a_whole_folder(tmp_path: Path) -> None:
    assert recognised(fetched.smollm2()) == TEMPLATES["smollm2"]
    assert recognised(fetched.words("qwen3")) == TEMPLATES["qwen3"]
    with pytest.raises(UserError, match="E-MODEL-TEMPLATE"):
        recognised(fetched.words("llama3"))  # the first release's: it asks for an answer after every conversation
