"""The console: plain lines in a log, a bar on a terminal."""

from io import StringIO

import pytest

from tetrad.engine.console import Console


class Terminal(StringIO):
    """Claims to be a terminal."""

    def isatty(self) -> bool:
        return True


def test_lines_of_a_log() -> None:
    out, err = StringIO(), StringIO()
    console = Console(log_every=4, out=out, err=err)
    with console.progress("sft", 10) as bar:
        for step in range(10):
            bar.advance(loss=1 / (step + 1), note="x")
        console.say("between")
    lines = err.getvalue().splitlines()
    assert [line.partition("  ")[0] for line in lines] == ["sft 1/10", "sft 4/10", "sft 8/10", "sft 10/10"]
    assert "loss 0.25  note x" in lines[1]
    assert "left" in lines[0] and "took" in lines[-1]
    assert out.getvalue() == "between\n"


def test_resumed_progress_counts_its_own_pace() -> None:
    err = StringIO()
    with Console(log_every=100, out=StringIO(), err=err).progress("ppo", 60, start=40) as bar:
        for _ in range(20):
            bar.advance()
    assert [line.split()[1] for line in err.getvalue().splitlines()] == ["41/60", "60/60"]


def test_many_at_once() -> None:
    err = StringIO()
    with Console(log_every=10, out=StringIO(), err=err).progress("score", 100) as bar:
        for _ in range(4):
            bar.advance(25)
    assert [line.split()[1] for line in err.getvalue().splitlines()] == ["25/100", "50/100", "75/100", "100/100"]


def test_a_table_of_a_log() -> None:
    out = StringIO()
    Console(out=out, err=out).table("figures", ("name", "value"), [("中文", 0.123456), ("b", 3)])
    assert out.getvalue() == "figures\n  name  value\n  中文  0.1235\n  b     3\n"


def test_an_empty_table() -> None:
    out = StringIO()
    Console(out=out, err=out).table("figures", ("name", "value"), [])
    assert out.getvalue() == "figures\n  name  value\n"


def test_a_bar_of_a_terminal() -> None:
    out, err = Terminal(), Terminal()
    console = Console(out=out, err=err)
    with console.progress("[sft]", 3) as bar:
        bar.advance(loss=0.5)
        console.say("[bold]said above")
        console.table("[t]", ("a",), [("[b]",)])
        bar.advance(2, loss=0.25)
    assert "3/3" in err.getvalue() and "loss 0.25" in err.getvalue()
    assert "[bold]said above" in err.getvalue() and "[sft]" in err.getvalue()
    console.say("after")
    console.table("[t]", ("a",), [("[b]",)])
    assert out.getvalue().startswith("after\n") and "[b]" in out.getvalue()


def test_a_failing_stage_frees_the_bar() -> None:
    console = Console(out=Terminal(), err=Terminal())
    with pytest.raises(ValueError), console.progress("a", 3):
        raise ValueError
    with console.progress("b", 1) as bar:
        bar.advance()
