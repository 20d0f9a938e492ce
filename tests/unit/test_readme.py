"""What both READMEs and docs/commands.md show is true: recipe, records, commands, exit codes, figures; both languages
say the same."""

import importlib.util
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tetrad import errors
from tetrad.cli.main import main
from tetrad.data import records
from tetrad.pipeline import recipe
from tetrad.stages import STAGES
from tetrad.types import Comparison, Score
from tiny import write_tiny

ROOT = Path(__file__).parents[2]
READMES = ("README.md", "README.zh-CN.md")
RECIPES = ("docs/recipe.md", "docs/zh/recipe.md")
COMMANDS = ("docs/commands.md", "docs/zh/commands.md")
RUN, PICTURE = ROOT / "benchmarks/results/reviews-en-0", ROOT / "docs/ppo-run.svg"
READERS: dict[str, Callable[[list[Path]], Any]] = {
    "pre-training": lambda paths: list(records.read_documents(paths)),
    "SFT": lambda paths: list(records.read_conversations(paths)),
    "reward: ranked": lambda paths: records.read_preferences(paths, ()),
    "reward: pair": lambda paths: records.read_preferences(paths, ()),
    "reward: score": lambda paths: records.read_preferences(paths, (1, 5)),
    "PPO, evaluate": records.read_prompts,
}
CHINESE = {
    "预训练": "pre-training",
    "奖励：排序": "reward: ranked",
    "奖励：成对": "reward: pair",
    "奖励：打分": "reward: score",
}
CHINESE |= {"PPO、评估": "PPO, evaluate"}


def text_of(name: str) -> str:
    return (ROOT / name).read_text(encoding="utf-8")


def blocks(name: str, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", text_of(name), re.DOTALL | re.MULTILINE)


def table_records() -> list[tuple[str, str, str]]:
    """(file, what it is for, record) of every record in the tables."""
    found = []
    for name in READMES:
        for use, cell in re.findall(r"^\| ([^|`]+) \| (`\{.*) \|$", text_of(name), re.MULTILINE):
            found += [(name, CHINESE.get(use, use), text) for text in re.findall(r"`(\{.*?\})`", cell)]
    return found


@pytest.mark.parametrize("name", RECIPES)
def test_recipe_is_read(name: str, tmp_path: Path) -> None:
    (block,) = blocks(name, "toml")
    path = tmp_path / "recipe.toml"
    path.write_text(block, encoding="utf-8")
    read = recipe.read(path, ["--ppo.actor-lr", "1e-6", "--ppo.steps", "100"])
    values = (read.name, read.ppo.actor_lr, read.ppo.steps, read.reward.score_scale)
    assert values == ("reviews", 1e-6, 100, (-4.0, 4.0))
    assert read.evaluate.judges[0].endswith("judge.py:ridge")


def test_ten_lines_are_a_recipe(tmp_path: Path) -> None:
    """README's, as it is but for its sizes, from an empty folder to PPO."""
    (block,) = blocks("README.md", "toml")
    assert len(block.splitlines()) == 10
    write_tiny(tmp_path)
    for name, of in (("texts.txt", "text.txt"), ("sft.jsonl", "sft.jsonl"), ("ranked.jsonl", "ranked.jsonl")):
        (tmp_path / of).rename(tmp_path / name)
    (tmp_path / "ten.toml").write_text(block, encoding="utf-8")
    small = "--model.hidden-size 32 --model.layers 1 --ppo.steps 1 --ppo.batch-size 4 --ppo.max-new-tokens 4"
    words = ["run", str(tmp_path / "ten.toml"), "--run.out", str(tmp_path / "runs"), *small.split()]
    assert main([*words, "--reward.normalise", "4", "--reward.normalise-max-new-tokens", "4"]) == 0
    assert (tmp_path / "runs/ten/ppo/model/manifest.json").is_file()


def test_tables_hold_every_form() -> None:
    assert len(table_records()) == 2 * 10


@pytest.mark.parametrize(("name", "use", "text"), table_records())
def test_record_is_read(name: str, use: str, text: str, tmp_path: Path) -> None:
    path = tmp_path / "records.jsonl"
    if "[...]" in text:
        text = text.replace("[...]", '[{"role": "user", "content": "Hi"}]')
    assert isinstance(json.loads(text), dict)
    path.write_text(text + "\n", encoding="utf-8")
    (record,) = READERS[use]([path])
    if use.startswith("reward"):
        assert isinstance(record, Score if "score" in use else Comparison)


def commands(name: str, language: str) -> str:
    """The page's blocks without comments, placeholders and what is Chinese in them: the Chinese pages lead with the
    Chinese example, English is the demo's default."""
    text = re.sub(r"<.*?>|#.*", "", "\n".join(blocks(name, language)))
    return re.sub(r'"[^"]*"', '""', text.replace("--quick reviews-zh", "--quick").replace("reviews-zh", "reviews-en"))


def test_both_say_the_same() -> None:
    for pages in (READMES, COMMANDS):
        for language in ("bash", "python"):
            english, chinese = (commands(name, language) for name in pages)
            assert english == chinese
    for pages in (READMES, RECIPES):
        english, chinese = (re.sub(r"#.*", "", blocks(name, "toml")[0]) for name in pages)
        assert [line.rstrip() for line in english.splitlines()] == [line.rstrip() for line in chinese.splitlines()]
    first = (re.findall(r"^\| `(tetrad .*?)` \|", text_of(name), re.MULTILINE) for name in READMES)
    assert len({tuple(rows) for rows in first}) == 1
    (asked,) = re.findall(r'^INSTRUCTION = "(.*?)"', text_of("examples/reviews-zh/fetch.py"), re.MULTILINE)
    assert all(f'"{asked}"' in text_of(page) for page in (READMES[1], COMMANDS[1]))


def test_both_show_the_same_figures() -> None:
    """Those with two or three decimals: of the results, and of the comparison with TRL."""
    figures = [sorted(re.findall(r"(?<![\d.-])-?\d\.\d{2,3}(?!\d)", text_of(name))) for name in READMES]
    assert figures[0] == figures[1]


def test_the_picture_is_of_its_run() -> None:
    """The bars' means are written above them; the same means and gains stand in both READMEs."""
    systems = json.loads((RUN / "evaluate/report/report.json").read_text())["systems"]
    picture = PICTURE.read_text(encoding="utf-8")
    assert len(picture.encode()) < 60_000
    assert "<dc:date>" not in picture
    means = [f"{system[name]['mean']:.2f}" for name in ("reward", "ridge") for system in systems.values()]
    assert re.findall(r">(-?\d\.\d\d)</text>", picture) == means
    gain = systems["ppo"]["ridge_gain"]
    for name in READMES:
        text = text_of(name)
        assert "docs/ppo-run.svg)" in text
        assert " → ".join(means[3:]) in text
        assert all(f"{gain[end]:.2f}" in text for end in ("mean", "low", "high"))


def test_the_picture_is_what_the_script_draws(tmp_path: Path) -> None:
    """Twice the same bytes, of the kept files as of a run's own, and with the version of constraints.txt those kept."""
    matplotlib = pytest.importorskip("matplotlib")
    spec = importlib.util.spec_from_file_location("ppo_run", ROOT / "benchmarks/ppo_run.py")
    assert spec is not None and spec.loader is not None
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    script.keep(RUN, tmp_path, ["ridge"])
    for name, folder in (("a.svg", RUN), ("b.svg", tmp_path)):
        script.draw(folder, tmp_path / name, "ridge")
    assert (tmp_path / "a.svg").read_bytes() == (tmp_path / "b.svg").read_bytes()
    if matplotlib.__version__ == "3.11.2":
        assert (tmp_path / "a.svg").read_bytes() == PICTURE.read_bytes()


@pytest.mark.parametrize("name", READMES)
def test_twenty_minutes(name: str) -> None:
    rows = re.findall(r"^\| `([a-z_/]+\.py)` \| (\d+) \|", text_of(name), re.MULTILINE)
    assert len(rows) >= 5
    assert all((ROOT / "src/tetrad" / path).is_file() for path, _ in rows)
    assert sum(int(minutes) for _, minutes in rows) == 20


@pytest.mark.parametrize("name", COMMANDS)
def test_exit_codes(name: str) -> None:
    cells = re.findall(r"\| (\d+) \| ([^|]+)", text_of(name))
    codes = {int(code) for code, _ in cells}
    raised = {errors.UserError(code, "x").exit_code for code in errors.CODES}
    assert codes == raised | {0, errors.EXIT_STOPPED}


@pytest.mark.parametrize("name", READMES)
def test_commands(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--help"]) == 0
    helped = set(re.findall(r"^  ([a-z]+) ", capsys.readouterr().out, re.MULTILINE))
    rows = re.findall(r"^\| `tetrad ([a-z|\\]+).*?` \|", text_of(name), re.MULTILINE)
    assert {verb for row in rows for verb in row.replace("\\", "").split("|")} == helped


@pytest.mark.parametrize("name", READMES)
def test_stages(name: str) -> None:
    stages = re.search(r"`tetrad (tokenizer[a-z|\\]+) RECIPE.toml` \|", text_of(name))
    assert stages and stages[1].replace("\\", "").split("|") == list(STAGES)
