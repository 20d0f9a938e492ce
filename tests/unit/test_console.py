"""The console: plain lines in a log, a bar on a terminal."""

from io import StringIO

import pytest

from tetrad import console as module
from tetrad.console import Console, counted, phase


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


class Clock:
    """Seconds that pass when a test says so."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = 1000.0
        monkeypatch.setattr(module.time, "monotonic", lambda: self.now)

    def wait(self, console: Console, seconds: int) -> None:
        for _ in range(4 * seconds):
            self.now += 0.25
            console.tick()


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    return Clock(monkeypatch)


def logged(monkeypatch: pytest.MonkeyPatch) -> tuple[Console, StringIO]:
    """A console in use, without the thread that looks at the clock."""
    err = StringIO()
    console = Console(log_every=4, out=StringIO(), err=err)
    monkeypatch.setattr(module, "_in_use", module.ContextVar("test", default=console))
    return console, err


def test_a_short_phase_is_silent(clock: Clock, monkeypatch: pytest.MonkeyPatch) -> None:
    console, err = logged(monkeypatch)
    for _ in range(20):
        with phase("normalising"):
            clock.wait(console, 1)
    assert err.getvalue() == ""


def test_a_long_phase_has_a_line_after_two_seconds_and_then_every_ten(
    clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    console, err = logged(monkeypatch)
    with phase("reward"), phase("normalising"):
        for _ in counted("sampling", range(32), 32):
            clock.wait(console, 1)
    assert err.getvalue().splitlines() == [
        "reward: normalising: sampling 1/32  1 s each  31 s left",
        "reward: normalising: sampling 11/32  1 s each  21 s left",
        "reward: normalising: sampling 21/32  1 s each  11 s left",
        "reward: normalising: sampling 31/32  1 s each  1 s left",
    ]


def test_lines_of_hours_are_a_minute_apart(clock: Clock, monkeypatch: pytest.MonkeyPatch) -> None:
    console, err = logged(monkeypatch)
    with phase("evaluate"):
        clock.wait(console, 3600)
    lines = len(err.getvalue().splitlines())
    assert 60 <= lines <= 140


def test_a_step_that_takes_long_says_where_it_is(clock: Clock, monkeypatch: pytest.MonkeyPatch) -> None:
    console, err = logged(monkeypatch)
    with phase("ppo"), console.progress("ppo", 8) as bar:
        for _ in range(2):
            for _ in counted("sampling", range(25), 25):
                clock.wait(console, 1)
            bar.advance(score=0.5)
    places = [line.partition("  ")[0] for line in err.getvalue().splitlines()]
    assert places == [
        *("ppo 0/8: sampling 1/25", "ppo 0/8: sampling 11/25", "ppo 0/8: sampling 21/25", "ppo 1/8"),
        *("ppo 1/8: sampling 9/25", "ppo 1/8: sampling 19/25"),
    ]


def test_quick_steps_have_lines_by_their_number_alone(clock: Clock, monkeypatch: pytest.MonkeyPatch) -> None:
    console, err = logged(monkeypatch)
    with phase("sft"), console.progress("sft", 1000) as bar:
        for _ in range(40):
            clock.wait(console, 5)
            bar.advance()
    assert len(err.getvalue().splitlines()) == 12  # the first step took more than two seconds


def test_the_time_left_counts_evaluations(clock: Clock) -> None:
    """A hundred steps of one second, and after each ten a look of thirty."""
    err = StringIO()
    left = []
    with Console(log_every=1, out=StringIO(), err=err).progress("reward", 100, evaluations=10) as bar:
        for step in range(100):
            clock.now += 1
            bar.advance()
            left.append(err.getvalue().splitlines()[-1].partition("s/step")[2].split("  ")[1])
            if (step + 1) % 10 == 0:
                with bar.evaluation():
                    clock.now += 30
                    assert "90 s left" in bar.pace() or step != 9
    assert left[:10] == [f"over {left} s left" for left in range(99, 89, -1)]
    assert left[10] == "5 min left" and left[88] == "71 s left"  # 89 and 9 evaluations; 11 and 2
    assert left[-1] == "took 6 min"


def test_the_time_left_follows_the_pace(clock: Clock) -> None:
    """Steps of a tenth of a second become steps of ten; and one that hangs counts while it does."""
    with Console(log_every=1000, out=StringIO(), err=StringIO()).progress("sft", 1000) as bar:
        for seconds in [0.1] * 500 + [10.0] * 20:
            clock.now += seconds
            bar.advance()
        assert bar.pace() == "10 s/step  80 min left"
        clock.now += 1000
        assert bar.pace().startswith("109 s/step")


def test_a_phase_on_a_terminal(clock: Clock, monkeypatch: pytest.MonkeyPatch) -> None:
    out, err = Terminal(), Terminal()
    console = Console(out=out, err=err)
    monkeypatch.setattr(module, "_in_use", module.ContextVar("test", default=console))
    with phase("reward"):
        clock.wait(console, 3)
        with console.progress("reward", 2) as bar:
            bar.advance()
            with phase("held-out records", 7) as inner:
                inner.advance(3)
                clock.wait(console, 3)
        console.say("after")
    assert "held-out records" in err.getvalue() and "3/7" in err.getvalue() and "1/2" in err.getvalue()


def test_without_a_console_in_use_nothing_is_shown() -> None:
    assert list(counted("scoring", [1, 2], 2)) == [1, 2]


def test_a_console_in_use_looks_at_the_clock_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "PHASE_SECONDS", 0.1)
    err = StringIO()
    with Console(out=StringIO(), err=err).in_use(), phase("loading"):
        module.time.sleep(0.8)
    assert err.getvalue().startswith("loading  ")
