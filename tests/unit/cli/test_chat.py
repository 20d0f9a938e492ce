"""The plain terminal chat: what is remembered, its commands, and how it ends."""

import builtins
import sys
from collections.abc import Callable, Iterator
from io import BytesIO, StringIO, TextIOWrapper
from pathlib import Path
from typing import Any

import pytest

from served import completed
from tetrad.cli import chat as chat_module
from tetrad.cli.chat import chat, printable
from tetrad.console import Console
from tetrad.errors import UserError
from tetrad.inference.completions import EncodedPrompt
from tetrad.inference.engine import Engine, Request
from tetrad.inference.policy import Policy, encode_prompt, load, request
from tetrad.reward.model import load_reward, score_samples
from tetrad.settings import use
from tetrad.types import Prompt, Turn

Talk = Callable[..., list[str]]
Seen = list[tuple[Turn, ...]]


@pytest.fixture
def talk(run: Path, monkeypatch: pytest.MonkeyPatch) -> Talk:
    """Lines in, what was said after the opening lines."""

    def talk(stage: str, lines: str | bytes, **settings: Any) -> list[str]:
        raw = lines.encode() if isinstance(lines, str) else lines
        monkeypatch.setattr(sys, "stdin", TextIOWrapper(BytesIO(raw), encoding="utf-8"))
        out = StringIO()
        chat(use.Chat(model=str(run / stage), **{"max_new_tokens": 6, **settings}), Console(out=out, err=StringIO()))
        said = out.getvalue().splitlines(keepends=False) if "\n" in out.getvalue() else []
        return said[1 if stage == "chat" else 2 :]

    return talk


@pytest.fixture
def seen(monkeypatch: pytest.MonkeyPatch) -> Seen:
    """The turns of each question; replies come from the model."""
    turns: Seen = []

    def watched(model: Policy, asked: EncodedPrompt, *rest: Any) -> Request:
        turns.append(asked.prompt.turns)
        return request(model, asked, *rest)

    monkeypatch.setattr(chat_module, "request", watched)
    return turns


def users(turns: tuple[Turn, ...]) -> list[str]:
    return [f"{turn.role} {turn.text}" for turn in turns if turn.role != "assistant"]


def test_a_conversation_is_remembered(talk: Talk, seen: Seen) -> None:
    said = talk("chat", "the plot\n 这部电影\n\n/new\nslow\n", system="Be kind.")
    assert [users(turns) for turns in seen] == [
        ["system Be kind.", "user the plot"],
        ["system Be kind.", "user the plot", "user  这部电影"],
        ["system Be kind.", "user slow"],
    ]
    assert [turn.role for turn in seen[1]] == ["system", "user", "assistant", "user"]
    shown = "\n".join(said)
    assert printable(seen[1][2].text) in shown
    assert "A new conversation." in said


def test_an_instruction_model_forgets(talk: Talk, seen: Seen, run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    talk("sft", "the plot\nslow\n")
    assert seen == [(Turn("user", "the plot"),), (Turn("user", "slow"),)]
    seen.clear()
    talk("sft", "the plot\n", system="Go on.")
    assert seen == [(Turn("system", "Go on."), Turn("user", "the plot"))]
    model = load(run / "sft")
    asked = model.form.prompt(model.tokenizer, (Turn("instruction", "Go on."), Turn("input", "the plot")))
    assert list(encode_prompt(model, Prompt(seen[0])).ids) == asked


def test_it_says_once_what_it_cannot_do(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for stage, count in (("sft", 1), ("chat", 0)):
        monkeypatch.setattr(sys, "stdin", StringIO("a\nb\n"))
        out = StringIO()
        chat(use.Chat(model=str(run / stage), max_new_tokens=2), Console(out=out, err=StringIO()))
        assert out.getvalue().count("does not remember") == count


def test_the_reply_is_that_of_generate(talk: Talk, run: Path) -> None:
    model = load(run / "sft")
    asked = encode_prompt(model, Prompt((Turn("user", "the plot"),)))
    (first,) = completed(model, [asked], use.Sample(max_new_tokens=6, seed=9))
    assert talk("sft", "the plot\n", seed=9) == [printable(first.text) + " [cut after 6 tokens]"]


@pytest.mark.parametrize("end", ["/quit\nthe plot\n", " /quit \n", ""])
def test_it_ends(talk: Talk, seen: Seen, end: str) -> None:
    talk("sft", "slow\n" + end)
    assert len(seen) == 1


def test_unknown_commands_are_not_sent(talk: Talk, seen: Seen) -> None:
    said = talk("sft", "/bogus\n/score\n/new\n/etc/hosts\n")
    assert said[:3] == [f"There is no /{name}: /help says this, /quit ends." for name in ("bogus", "score", "new")]
    assert users(seen[0]) == ["user /etc/hosts"]


@pytest.mark.parametrize(
    ("stage", "reward", "shown"),
    [
        ("sft", False, "/help says this, /quit ends."),
        ("chat", False, "/new forgets what was said, /help says this, /quit ends."),
        ("sft", True, "/score rates the last response, /help says this, /quit ends."),
    ],
)
def test_help_lists_the_commands_that_there_are(
    talk: Talk, seen: Seen, run: Path, stage: str, reward: bool, shown: str
) -> None:
    rated = {"reward": str(run / "reward")} if reward else {}
    assert talk(stage, "/help\n", **rated)[-1] == shown
    assert not seen


def test_a_full_memory_can_be_emptied(talk: Talk, seen: Seen, run: Path) -> None:
    """A reply takes what room there is; without room the line is not sent and the conversation goes on."""
    said = talk("chat", "plot " * 20 + "\n" + "plot " * 40 + "\n/new\nslow\n", max_new_tokens=50)
    assert len(seen) == 2
    assert any("[E-DATA-LONG]" in line and "/new" in line for line in said)
    model = load(run / "chat")
    room = 96 - len(encode_prompt(model, Prompt(seen[0])).ids)
    assert 0 < room < 50
    assert any(line.endswith(f"[cut after {room} tokens]") for line in said)


def test_bytes_that_are_no_text(talk: Talk, seen: Seen, monkeypatch: pytest.MonkeyPatch) -> None:
    assert talk("sft", b"a\xff\n") == ["That was not UTF-8; it was not sent."]
    monkeypatch.setattr(builtins, "input", iter_input(["a\udcffb", "slow"]))
    assert talk("sft", "")[0].startswith("[E-DATA-ENCODING]")
    assert [users(turns) for turns in seen] == [["user slow"]]


def iter_input(lines: list[str | type[BaseException]]) -> Callable[[str], str]:
    left: Iterator[str | type[BaseException]] = iter(lines)

    def fake(shown: str) -> str:
        line = next(left, EOFError)
        if isinstance(line, str):
            return line
        raise line

    return fake


def test_ctrl_c(talk: Talk, seen: Seen, monkeypatch: pytest.MonkeyPatch) -> None:
    """While a reply is written it ends that reply, of which the beginning is remembered; at the prompt it ends the
    chat."""
    monkeypatch.setattr(builtins, "input", iter_input(["slow", "the plot", KeyboardInterrupt, "never"]))
    plain, steps = Engine.advance, iter(range(99))

    def stopped(engine: Engine) -> Any:
        if next(steps) == 3:
            raise KeyboardInterrupt
        return plain(engine)

    monkeypatch.setattr(Engine, "advance", stopped)
    said = talk("chat", "")
    assert [users(turns) for turns in seen] == [["user slow"], ["user slow", "user the plot"]]
    begun = seen[1][1]
    assert begun.role == "assistant" and "\n".join(said).startswith(printable(begun.text) + " (stopped)\n")
    assert len(said[-1]) > len(" [cut after 6 tokens]")


def test_a_reply_that_is_stopped_before_it_begins_is_nothing(
    talk: Talk, seen: Seen, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stopped(engine: Engine) -> Any:
        raise KeyboardInterrupt

    monkeypatch.setattr(builtins, "input", iter_input(["slow", "the plot"]))
    monkeypatch.setattr(Engine, "advance", stopped)
    assert talk("chat", "") == [" (stopped)"] * 2
    assert users(seen[1]) == ["user the plot"]


def test_a_reply_is_shown_while_it_is_written(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each token's text at once, and never half a character."""
    monkeypatch.setattr(sys, "stdin", StringIO("这部电影\n"))
    pieces: list[str] = []

    class Shown(StringIO):
        def write(self, text: str) -> int:
            pieces.append(text)
            return len(text)

    chat(use.Chat(model=str(run / "sft"), max_new_tokens=40, seed=3), Console(out=Shown(), err=StringIO()))
    model = load(run / "sft")
    asked = encode_prompt(model, Prompt((Turn("user", "这部电影"),)))
    (whole,) = completed(model, [asked], use.Sample(max_new_tokens=40, seed=3))
    body = pieces[2:-1]
    assert "".join(body) == printable(whole.text) and len(body) == len(whole.response_ids)


def test_score(talk: Talk, run: Path) -> None:
    model, judge = load(run / "chat"), load_reward(run / "reward")
    said = talk("chat", "/score\nthe plot\n/score\n", reward=str(run / "reward"))
    found = completed(model, [encode_prompt(model, Prompt((Turn("user", "the plot"),)))], use.Sample(max_new_tokens=6))
    assert said[0] == "There is no response yet."
    assert said[-1] == f"score {score_samples(judge, [found[0]])[0]:+.3f}"
    assert talk("chat", "/score\n")[0].startswith("There is no /score")


def test_mistakes_before_the_first_line(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdin", StringIO("a\n"))
    for stage, settings, code in (
        ("pretrain", {}, "E-MODEL-TEMPLATE"),
        ("reward", {}, "E-CKPT-ROLE"),
        ("none", {}, "E-MODEL-MISSING"),
        ("sft", {"system": "\udcff"}, "E-DATA-ENCODING"),
    ):
        with pytest.raises(UserError, match=code):
            chat(use.Chat(model=str(run / stage), **settings), Console(out=StringIO(), err=StringIO()))  # type: ignore[arg-type]


def test_control_characters_are_shown_not_obeyed() -> None:
    assert printable("a\x1b[2J\u3000电影\t\n\x07") == "a\ufffd[2J\u3000电影\t\n\ufffd"
