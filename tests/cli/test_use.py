"""generate, chat and score from the command line: words in, replies and exit codes out."""

import json
import os
import pty
import re
import select
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest

import tetrad
from served import write_model
from tetrad.cli.main import main

ROOT = Path(__file__).parents[2]
Capture = pytest.CaptureFixture[str]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("runs") / "tiny"
    write_model(folder / "sft", seed=1)
    write_model(folder / "reward", reward=True)
    write_model(folder / "pretrain", "")
    return folder


def test_one_prompt(run: Path, capsys: Capture) -> None:
    words = ["generate", str(run / "sft"), "--instruction", "Go on.", "--input", "这部电影", "--max-new-tokens", "9"]
    assert main(words) == 0
    first = capsys.readouterr().out
    assert main([*words, "--seed", "0"]) == 0
    assert capsys.readouterr().out == first
    assert main([*words, "--seed", "1"]) == 0
    assert capsys.readouterr().out != first


def test_generate_then_score(run: Path, tmp_path: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch) -> None:
    """The best of eight by the reward model has a higher mean than the first of one; both files can be scored."""
    monkeypatch.chdir(tmp_path)
    records = [{"Instruction": "Go on.", "Input": text} for text in ("the plot", "a film", "电影")]
    Path("p.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    sft, reward = str(run / "sft"), str(run / "reward")
    words = ["generate", sft, "--prompts", "p.jsonl", "--max-new-tokens", "8"]
    assert main([*words, "--out", "one.jsonl"]) == 0
    assert main([*words, "--out", "best.jsonl", "--best-of", "8", "--reward", reward]) == 0
    means = []
    for name in ("one.jsonl", "best.jsonl"):
        assert main(["score", reward, "--data", name, "--out", f"scored-{name}"]) == 0
        lines = [json.loads(line) for line in Path(f"scored-{name}").read_text().splitlines()]
        assert [{k: line[k] for k in ("Instruction", "Input")} for line in lines] == records
        means.append(sum(line["score"] for line in lines) / 3)
        best = [json.loads(line) for line in Path(name).read_text().splitlines()]
        for line, record in zip(lines, best, strict=True):
            assert line["score"] == pytest.approx(record.get("score", line["score"]), abs=1e-6)
    assert means[1] > means[0]
    said = capsys.readouterr().out
    broken = ["\ufffd" in json.loads(line)["response"] for line in Path("one.jsonl").read_text().splitlines()]
    first = f"the first answers p.jsonl:{broken.index(True) + 1}"
    assert re.search(rf"note: {sum(broken)} answers? (is|are) not valid UTF-8, .*; {first}", said)


@pytest.mark.parametrize("flag", ["--data.rename", "--rename"])
def test_a_file_with_other_names_is_read_as_the_hint_says(
    run: Path, tmp_path: Path, flag: str, capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By generate, score and check, which have no recipe: what the error shows can be typed."""
    monkeypatch.chdir(tmp_path)
    record = {"question": "Go on.", "answer": "a film"}
    Path("q.jsonl").write_text(json.dumps(record) + "\n")
    generate = ["generate", str(run / "sft"), "--prompts", "q.jsonl", "--max-new-tokens", "3"]
    score = ["score", str(run / "reward"), "--data", "q.jsonl"]
    hints = {}
    for words in (generate, score):
        assert main(words) == 3
        (hint,) = re.findall(r"\(--data.rename (.*) on the command line\)", capsys.readouterr().err)
        hints[words[0]] = hint.split()
        assert "question=instruction" in hints[words[0]]
    assert main([*generate, flag, *hints["generate"]]) == 0
    assert json.loads(capsys.readouterr().out).keys() == {*record, "response", "tokens", "finished"}
    assert main([*score, flag, "question=Instruction", "answer=Output"]) == 0
    assert json.loads(capsys.readouterr().out).keys() == {*record, "score"}
    assert main(["check", "q.jsonl", "--kind", "conversations", flag, "question=Instruction", "answer=Output"]) == 0


def test_a_folder_says_how_it_is_sampled(run: Path, tmp_path: Path, capsys: Capture) -> None:
    """generation_config.json stands between the defaults and what is typed; in Python too."""
    folder = shutil.copytree(run / "sft" / "model", tmp_path / "hf")
    (folder / "manifest.json").unlink()
    path = folder / "generation_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"do_sample": True, "temperature": 1.3, "top_k": 3}))

    def reply(place: Path, *words: str) -> str:
        assert main(["generate", str(place), "--instruction", "Go on.", "--max-new-tokens", "9", *words]) == 0
        return capsys.readouterr().out

    as_typed = reply(run / "sft", "--temperature", "1.3", "--top-k", "3")
    assert reply(folder) == as_typed != reply(run / "sft")
    assert reply(folder, "--top-k", "0", "--temperature", "0.7") == reply(run / "sft")
    assert reply(folder, "--greedy") == reply(run / "sft", "--greedy")
    model = tetrad.load(folder)
    assert tetrad.generate(model, ["Go on."], max_new_tokens=9) == [as_typed[:-1]]
    assert tetrad.generate(model, ["Go on."], max_new_tokens=9, top_k=0, temperature=0.7) == [reply(run / "sft")[:-1]]


@pytest.mark.parametrize(
    ("words", "status", "said"),
    [
        (["score", "sft", "--data", "s.jsonl"], 4, "E-CKPT-ROLE"),
        (["generate", "reward", "--instruction", "x"], 4, "E-CKPT-ROLE"),
        (["generate", "pretrain", "--instruction", "x"], 4, "choose --template instruction or --template chatml"),
        (["generate", "pretrain", "--instruction", "x", "--template", "alpaca"], 2, "E-CONF"),
        (["generate", "none", "--instruction", "x"], 4, "E-MODEL-MISSING"),
        (["chat", ".", "--system", "x"], 4, "its models are pretrain, reward, sft"),
        (["generate", "sft", "--prompts", "none.jsonl"], 3, "E-DATA-PATH"),
        (["generate", "sft", "--instruction", "x", "--max-new-tokens", "96"], 3, "E-DATA-LONG"),
        (["score", "reward", "--data", "s.jsonl", "--out", "s.jsonl"], 2, "E-CONF-CONFLICT"),
        (["score", "reward", "--data", "bad.jsonl"], 3, "bad.jsonl:2"),
    ],
)
def test_mistakes(
    run: Path, words: list[str], status: int, said: str, capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(run)
    Path("s.jsonl").write_text('{"input": "x", "output": "y"}\n')
    Path("bad.jsonl").write_text('{"input": "x", "output": "y"}\n{"input": "x", "output": 5}\n')
    assert main(words) == status
    out, err = capsys.readouterr()
    assert said in err
    assert (out, err.count("\n")) == ("", 1)


def test_chat_in_a_process_of_its_own(run: Path) -> None:
    """Exit 0 at the end of the input; wide characters in and out as UTF-8."""
    done = subprocess.run(
        [sys.executable, "-m", "tetrad", "chat", str(run / "sft"), "--max-new-tokens", "4"],
        input="这部电影\n/quit\nnever\n".encode(),
        capture_output=True,
        timeout=60,
        env={"PYTHONPATH": str(ROOT / "src"), "PATH": "/usr/bin:/bin", "PYTHONUTF8": "1"},
        check=False,
    )
    said = done.stdout.decode().splitlines()
    assert (done.returncode, done.stderr) == (0, b"")
    assert said[1].startswith("This model answers one question at a time")
    assert len(said) >= 3


class Screen:
    """What a terminal shows, read on from where it was read to."""

    def __init__(self, terminal: int) -> None:
        self.terminal, self.rest = terminal, b""

    def until(self, text: str, seconds: float = 60) -> str:
        """Up to and with this text."""
        end = time.monotonic() + seconds
        while (wanted := text.encode()) not in self.rest:
            assert time.monotonic() < end, self.rest.decode(errors="replace")
            if select.select([self.terminal], [], [], 0.2)[0]:
                self.rest += os.read(self.terminal, 4096)
        shown, _, self.rest = self.rest.partition(wanted)
        return shown.decode() + text


def test_chat_in_a_terminal(run: Path) -> None:
    """Chinese is typed and shown; backspace takes back a whole character that is two columns and three bytes wide."""
    terminal, its = pty.openpty()
    env = {"PYTHONPATH": str(ROOT / "src"), "PATH": "/usr/bin:/bin", "LANG": "C.UTF-8", "TERM": "xterm"}
    words = ["-m", "tetrad", "chat", str(run / "sft"), "--max-new-tokens", "5", "--reward", str(run / "reward")]
    process = subprocess.Popen([sys.executable, *words], stdin=its, stdout=its, stderr=its, env=env)
    os.close(its)
    screen = Screen(terminal)
    try:
        screen.until("> ")
        os.write(terminal, "这部电影\n".encode())
        assert "这部电影" in screen.until("[cut after 5 tokens]")
        screen.until("> ")
        os.write(terminal, b"/score\n")
        assert re.search(r"score [+-]\d+\.\d{3}", screen.until("> "))
        os.write(terminal, "/qu电\x7fit\n".encode())
        assert process.wait(30) == 0
    finally:
        process.kill()
        process.wait()
        os.close(terminal)


def test_public_names_are_lazy() -> None:
    script = (
        "import sys, tetrad\n"
        "print(sorted({'torch', 'numpy', 'tokenizers', 'rich', 'pydantic'} & set(sys.modules)), tetrad.__version__)\n"
        "tetrad.UserError, tetrad.Stopped, dir(tetrad)\n"
        "assert 'torch' not in sys.modules\n"
        "tetrad.objectives.ppo.gae, tetrad.load, tetrad.generate, tetrad.forward\n"
        "print('torch' in sys.modules)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", script],
        capture_output=True,
        text=True,
        timeout=60,
        env={"PYTHONPATH": str(ROOT / "src"), "PATH": "/usr/bin:/bin"},
        check=True,
    )
    first, second = done.stdout.splitlines()
    assert first.startswith("[] ")
    assert second == "True"
