"""The import law of pyproject.toml holds, and each of its contracts notices an import that breaks it."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
BREACHES = [
    ("text/tokenizer.py", "import torch", "files, text and settings know no torch"),
    ("settings/base.py", "import torch", "files, text and settings know no torch"),
    ("pipeline/runner.py", "import tetrad.distributed.device", "files, text and settings know no torch"),
    ("data/records.py", "import tetrad.model.transformer", "data knows neither model nor objectives"),
    ("model/transformer.py", "import tetrad.text.tokenizer", "floors: imports point down"),
    ("model/transformer.py", "import tetrad.data.records", "floors: imports point down"),
    ("training/step.py", "import tetrad.train.sft", "floors: imports point down"),
    ("inference/engine.py", "import tetrad.train.sft", "floors: imports point down"),
    ("server/app.py", "import tetrad.train.sft", "the server uses models and trains none"),
    ("storage.py", "import tetrad.distributed.device", "floors: imports point down"),
    ("newcomer.py", "", "floors: imports point down"),
    ("objectives/ppo.py", "import tetrad.storage", "objectives are pure functions"),
    ("train/reward.py", "import tetrad.train.ppo", "one algorithm, one file"),
    ("reward/functions.py", "import transformers", "transformers and its kin stay out"),
]


def lint(root: Path) -> subprocess.CompletedProcess[str]:
    program = Path(sys.executable).with_name("lint-imports")
    environment = os.environ | {"PYTHONPATH": str(root / "src")}
    return subprocess.run(
        [program, "--no-cache"], cwd=root, env=environment, capture_output=True, text=True, check=False
    )


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    shutil.copytree(ROOT / "src", tmp_path / "src", ignore=shutil.ignore_patterns("__pycache__", ".*"))
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    return tmp_path


def test_the_law_holds(tree: Path) -> None:
    done = lint(tree)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize(("name", "statement", "contract"), BREACHES)
def test_a_breach_is_noticed(tree: Path, name: str, statement: str, contract: str) -> None:
    path = tree / "src" / "tetrad" / name
    before = path.read_text(encoding="utf-8") if path.exists() else ""
    path.write_text(f"{before}\n{statement}\n", encoding="utf-8")
    done = lint(tree)
    output = done.stdout + done.stderr
    assert done.returncode == 1
    # A module without a floor is told without the contract's name.
    assert contract in output.split("Broken contracts")[-1] or (not statement and "newcomer" in output), output
