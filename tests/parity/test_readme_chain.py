"""A recipe of all stages is run small, and what README and docs/commands.md say about the result is done to it, in
transformers too; for each language with its example."""

import io
import json
import re
import shlex
import time
from collections.abc import Iterator
from contextlib import redirect_stdout
from pathlib import Path
from random import Random
from typing import Any

import pytest

from tetrad.cli.main import main
from tetrad.report.glossary import find

pytestmark = pytest.mark.parity
ROOT = Path(__file__).parents[2]
DEMO = "examples/reviews-en/quick.toml"
INSTRUCTION, INPUT = "Continue this movie review.", "The plot is"
ASKED = {"docs/commands.md": (INSTRUCTION, INPUT), "docs/zh/commands.md": ("续写这条评论。", "房间很")}
RECIPE = """
model = { hidden_size = 32, layers = 2, heads = 4, kv_heads = 2, max_positions = 512 }
tokenizer = { text = ["text.txt"], vocab_size = 500 }
pretrain = { text = ["text.txt"], tokens = 2048, sequence_length = 32, batch_tokens = 256 }
sft = { data = ["sft.jsonl"], batch_size = 16, epochs = 1 }
reward = { data = ["ranked.jsonl", "scores.jsonl"], validation = ["validation.jsonl"], score_scale = [1, 5], \
batch_size = 16, normalise = 16, normalise_max_new_tokens = 8 }
ppo = { prompts = ["sft.jsonl"], steps = 2, batch_size = 8, max_new_tokens = 8, ppo_epochs = 1 }
evaluate = { prompts = ["validation.jsonl"], judges = ["judge.py:size"], samples = 8, best_of = 2, max_new_tokens = 8, \
side_by_side = 1 }
"""
JUDGE = "def size(samples):\n    return [len(sample['text']) for sample in samples]\n"


def write_data(folder: Path) -> None:
    """Reviews of random words: 'good' ones are rated high."""
    random = Random(0)
    words = "the plot is a good bad film with some dull bright actors and no story in it".split()

    def text(low: int = 4) -> str:
        return " ".join(random.choices(words, k=random.randint(low, 12)))

    def lines(name: str, records: list[dict[str, object]]) -> None:
        (folder / name).write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")

    (folder / "text.txt").write_text("\n\n".join(f"{INSTRUCTION} {text()}" for _ in range(300)), encoding="utf-8")
    (folder / "judge.py").write_text(JUDGE, encoding="utf-8")
    prompt = {"Instruction": INSTRUCTION}
    lines("sft.jsonl", [{**prompt, "Input": text(), "Output": text()} for _ in range(64)])
    ranked = [[{"text": f"good {text()}", "rank": 1}, {"text": f"bad {text()}", "rank": 2}] for _ in range(64)]
    lines("ranked.jsonl", [{"input": text(), "choices": choices} for choices in ranked])
    scored = [(value, word) for value, word in ((4.5, "good"), (1.5, "bad")) for _ in range(32)]
    lines("scores.jsonl", [{**prompt, "Input": text(), "output": f"{w} {text()}", "score": v} for v, w in scored])
    lines("validation.jsonl", [{**prompt, "Input": text(), "output": f"{w} {text()}", "score": v} for v, w in scored])


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The folder in which the chains have run, as `scripts/demo --quick` runs them: `runs/reviews-en-quick` and
    `runs/reviews-zh-quick` are below it."""
    path = tmp_path_factory.mktemp("chain")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(path)
        for example in ("reviews-en", "reviews-zh"):
            recipe = path / "examples" / example / "quick.toml"
            recipe.parent.mkdir(parents=True)
            write_data(recipe.parent)
            recipe.write_text(f'name = "{example}-quick"{RECIPE}', encoding="utf-8")
            assert main(["run", str(recipe.relative_to(path))]) == 0
        yield path


@pytest.mark.parametrize(
    ("name", "demo"),
    [("README.md", "scripts/demo --quick\n"), ("README.zh-CN.md", "scripts/demo --quick reviews-zh\n")],
)
def test_commands_run_in_their_order(folder: Path, monkeypatch: pytest.MonkeyPatch, name: str, demo: str) -> None:
    """Whoever runs the demo and then types README's lines one by one meets no error. Chat's input ends at once."""
    monkeypatch.chdir(folder)
    monkeypatch.setattr("sys.stdin", io.StringIO(""))
    text = (ROOT / name).read_text(encoding="utf-8")
    assert demo in text.partition(".venv/bin/tetrad")[0]
    commands = re.findall(r"^\.venv/bin/tetrad (.+)$", text, re.MULTILINE)
    assert len(commands) >= 4
    for command in commands:
        assert main(shlex.split(command, comments=True)) == 0, command


def run_python_block(page: str, word: str) -> tuple[dict[str, object], str]:
    """Runs the page's Python lines that hold this word: their names, and what they printed."""
    blocks = re.findall(r"^```python\n(.*?)^```", (ROOT / page).read_text(encoding="utf-8"), re.S | re.M)
    (block,) = (block for block in blocks if word in block)
    names: dict[str, object] = {}
    with redirect_stdout(io.StringIO()) as printed:
        exec(compile(block, page, "exec"), names)
    return names, printed.getvalue()


def generate(page: str, *words: str) -> dict[str, Any]:
    """What `tetrad generate` answers to the page's prompt with the page's model."""
    example = "reviews-zh" if "zh/" in page else "reviews-en"
    instruction, text = ASKED[page]
    asked = ["--instruction", instruction, "--input", text]
    assert main(["generate", f"runs/{example}-quick/ppo", *asked, *words, "--out", "one.jsonl"]) == 0
    (answer,) = map(json.loads, Path("one.jsonl").read_text(encoding="utf-8").splitlines())
    return dict(answer)


@pytest.mark.parametrize("page", ASKED)
def test_python_lines_answer(folder: Path, monkeypatch: pytest.MonkeyPatch, page: str) -> None:
    monkeypatch.chdir(folder)
    _, printed = run_python_block(page.replace("commands", "python"), "print(tetrad.generate(model")
    assert printed == f"{[generate(page, '--max-new-tokens', '40')['response']]}\n"


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.parametrize("page", ASKED)
def test_transformers_lines_give_what_tetrad_generates(
    folder: Path, monkeypatch: pytest.MonkeyPatch, page: str
) -> None:
    monkeypatch.chdir(folder)
    names, printed = run_python_block(page, "import AutoTokenizer")
    ids, prompt = names["output"][0].tolist(), names["inputs"]["input_ids"][0].tolist()  # type: ignore[index]
    assert ids[: len(prompt)] == prompt
    assert len(prompt) < len(ids) <= 60
    answer = generate(page, "--greedy", "--max-new-tokens", str(60 - len(prompt)))
    reply = names["tokenizer"].decode(ids[len(prompt) :], skip_special_tokens=True)  # type: ignore[attr-defined]
    assert (answer["response"], answer["tokens"]) == (reply, len(ids) - len(prompt))
    assert reply in printed


def test_every_metric_is_explained(folder: Path) -> None:
    """Of the logs, of the reward model and of the last table; `size` is the judge's own name."""
    run = folder / "runs/reviews-en-quick"
    logs = [
        json.loads(path.read_text().splitlines()[-1]) for path in run.glob("*/metrics.jsonl") if path.stat().st_size
    ]
    report = json.loads((run / "evaluate/report/report.json").read_text(encoding="utf-8"))
    metrics = {key for line in [*logs, *report["stages"].values(), *report["systems"].values()] for key in line}
    assert {"kl", "size_gain", "pair_accuracy_low"} <= metrics
    assert {metric for metric in metrics if find(metric) is None} == {"step", "size"}


def test_again_does_nothing(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(folder)
    before = {path: path.stat().st_mtime_ns for path in Path("runs/reviews-en-quick").rglob("model/*")}
    start = time.monotonic()
    assert main(["run", DEMO]) == 0
    assert time.monotonic() - start < 5
    assert {path: path.stat().st_mtime_ns for path in Path("runs/reviews-en-quick").rglob("model/*")} == before
    assert len({path.parents[1].name for path in before}) == 5


def test_score(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(folder)
    assert (
        main(
            [
                "score",
                "runs/reviews-en-quick/reward",
                "--data",
                "examples/reviews-en/validation.jsonl",
                "--out",
                "scores.out.jsonl",
            ]
        )
        == 0
    )
    assert len(Path("scores.out.jsonl").read_text(encoding="utf-8").splitlines()) == 64
