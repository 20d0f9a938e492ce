"""Every law of scripts/laws.py, broken on purpose in a tree of its own, is found; what looks like a breach is not."""

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).parents[2]


def load_laws() -> ModuleType:
    spec = importlib.util.spec_from_file_location("laws", ROOT / "scripts" / "laws.py")
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    sys.modules["laws"] = module
    spec.loader.exec_module(module)
    return module


laws = load_laws()

BREACHES = {
    "backward": ("loss.backward()", "only update calls .backward()"),
    "step": ("optimizer.step()", "only update steps an optimizer"),
    "multinomial": ("import torch\nids = torch.multinomial(shares, 1)", "only generate draws tokens"),
    "categorical": ("from torch.distributions import Categorical", "only generate draws tokens"),
    "draw": ("from tetrad.inference.sampler import sample", "only generate draws tokens"),
    "onednn": ("import torch\ny = torch.ops.mkldnn._linear_pointwise(x, w)", "only product knows oneDNN"),
    "distributed": ("import torch.distributed as dist", "only collectives communicate"),
    "distributed-from": ("from torch import distributed", "only collectives communicate"),
    "distributed-use": ("import torch\ntorch.distributed.barrier()", "only collectives communicate"),
    "objects": ("dist.all_gather_object(values, value)", "collectives of objects are pickles"),
    "objects-from": ("from thing import broadcast_object_list", "collectives of objects are pickles"),
    "sdpa": (
        "import torch.nn.functional as F\nF.scaled_dot_product_attention(q, k, v)",
        "only attention knows kernels",
    ),
    "varlen": ("from torch.nn.attention.varlen import varlen_attn", "only attention knows kernels"),
    "open-w": ('open(path, "w")', "only storage writes files"),
    "open-mode": ('open(path, mode="ab")', "only storage writes files"),
    "path-open": ('path.open("x")', "only storage writes files"),
    "memmap": ('import numpy as np\nnp.memmap(path, mode="r+")', "only storage writes files"),
    "write_text": ('path.write_text("a")', "only storage writes files"),
    "write_bytes": ('path.write_bytes(b"a")', "only storage writes files"),
    "os-replace": ("import os\nos.replace(a, b)", "only storage writes files"),
    "path-replace": ("path.replace(target)", "only storage writes files"),
    "unlink": ("path.unlink()", "only storage writes files"),
    "mkdir": ("path.mkdir(parents=True)", "only storage writes files"),
    "rmtree": ("import shutil\nshutil.rmtree(path)", "only storage writes files"),
    "save_file": ("import safetensors.torch\nsafetensors.torch.save_file(t, p)", "only storage writes files"),
    "tempfile": ("from tempfile import mkdtemp", "only storage writes files"),
    "os-open": ("import os\nos.open(path, os.O_WRONLY)", "only storage writes files"),
    "memmap-3": ('import numpy as np\nnp.memmap(path, np.uint8, "w+")', "only storage writes files"),
    "stdout": ('import sys\nsys.stdout.write("hello")', "only the console and the command line print"),
    "print": ('print("hello")', "only the console and the command line print"),
    "pickle": ("import pickle", "pickles are never read"),
    "torch-load": ("import torch\ntorch.load(path)", "torch.load and torch.save are pickles"),
    "torch-save": ("from torch import save", "torch.load and torch.save are pickles"),
    "eval": ("eval(text)", "no text becomes code"),
    "exec": ("exec(text)", "no text becomes code"),
    "os-system": ('import os\nos.system("ls")', "no shell"),
    "subprocess": ("import subprocess", "no shell"),
    "transformers": ("from transformers import AutoTokenizer", "transformers and its kin stay out"),
    "peft": ("import peft.tuners", "transformers and its kin stay out"),
}

HARMLESS = """
import dataclasses
import os.path
import torch

text = "a b".replace("a", "b")
record = dataclasses.replace(record, step=3)
with open(path) as file, path.open("rb") as other, open(path, "r", encoding="utf-8") as third:
    names.remove(file.read())
model.eval()
step = run.step
keys = model(ids, cache.step(positions))
null = os.open(os.devnull, os.O_WRONLY)
ids = np.memmap(path, np.uint8, "r")
with tempfile.TemporaryFile() as spool:
    spool.write(b"a")
weights = torch.randn(3).exponential()
loaded = module.load_state(torch.zeros(1))
class Log:
    def backward(self): ...
    def step(self): ...
"""


def plant(root: Path, name: str, source: str) -> None:
    path = root / "src" / "tetrad" / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(source, encoding="utf-8")


@pytest.mark.parametrize("case", BREACHES)
def test_each_breach_is_found(tmp_path: Path, case: str) -> None:
    source, law = BREACHES[case]
    plant(tmp_path, "engine/thing.py", source + "\n")
    line = len(source.splitlines())
    assert laws.check(tmp_path)[1] == [f"src/tetrad/engine/thing.py:{line}: {law}"]


@pytest.mark.parametrize(
    ("home", "case"),
    [
        ("training/step.py", "backward"),
        ("training/step.py", "step"),
        ("inference/engine.py", "multinomial"),
        ("inference/sampler.py", "multinomial"),
        ("distributed/collectives.py", "distributed"),
        ("distributed/watchdog.py", "distributed"),
        ("distributed/launch.py", "distributed"),
        ("model/attention.py", "sdpa"),
        ("storage.py", "open-w"),
        ("console.py", "print"),
        ("cli/main.py", "print"),
    ],
)
def test_home_of_a_law_may(tmp_path: Path, home: str, case: str) -> None:
    plant(tmp_path, home, BREACHES[case][0])
    assert laws.check(tmp_path)[1] == []


def test_not_even_collectives_send_objects(tmp_path: Path) -> None:
    plant(tmp_path, "distributed/collectives.py", BREACHES["objects"][0])
    assert laws.check(tmp_path)[1] == [f"src/tetrad/distributed/collectives.py:1: {BREACHES['objects'][1]}"]


def test_what_only_looks_like_a_breach(tmp_path: Path) -> None:
    plant(tmp_path, "engine/thing.py", HARMLESS)
    assert laws.check(tmp_path)[1] == []


def test_lines_of_code_leave_out_blanks_comments_and_docstrings(tmp_path: Path) -> None:
    source = (
        '"""Two\nlines."""\n\n# why\nx = 1  # counted once\n"""A field\'s docstring."""\ny = """text\nthat counts"""\n'
    )
    source += 'def f(\n    a,\n):\n    """Doc."""\n    # no\n    return a\n'
    plant(tmp_path, "a.py", source)
    figures, _ = laws.check(tmp_path)
    assert figures.files == {"src/tetrad/a.py": 7}
    assert figures.functions == {"src/tetrad/a.py:9 f": 4}


def test_budgets(tmp_path: Path) -> None:
    body = "".join(f"    x = {number}\n" for number in range(39))
    plant(tmp_path, "fits.py", "def f():\n" + body + "y = 0\n" * 260)
    assert laws.check(tmp_path)[1] == []
    plant(tmp_path, "long.py", "def f():\n" + body + "    x = 39\n" + "y = 0\n" * 260)
    assert laws.check(tmp_path)[1] == [
        "src/tetrad/long.py:1: 301 lines of code, over 300 a file",
        "src/tetrad/long.py:1: f has 41 lines of code, over 40",
    ]


def test_budgets_of_names_folders_and_imports(tmp_path: Path) -> None:
    names = "".join(f"    x{number} = 0\n" for number in range(laws.NAMES_BUDGET - 1))
    plant(tmp_path, "wide.py", f"def f(a):\n{names}    def g(b, c):\n        pass\n")
    assert laws.check(tmp_path)[1] == []
    plant(tmp_path, "wide.py", f"def f(a, b):\n{names}")
    plant(tmp_path, "word.py", "def f(told):\n    for found in told:\n        pass\n")
    assert laws.check(tmp_path)[1] == [
        f"src/tetrad/wide.py:1: f binds {laws.NAMES_BUDGET + 1} names, over {laws.NAMES_BUDGET}",
        "src/tetrad/word.py:1: f binds `found`, which says nothing of what it holds",
        "src/tetrad/word.py:1: f binds `told`, which says nothing of what it holds",
    ]
    for name in ("wide.py", "word.py"):
        (tmp_path / "src/tetrad" / name).unlink()
    for number in range(16):
        plant(tmp_path, f"rl/m{number}.py", "")
    for page in ("ppo", "reward"):
        plant(tmp_path, f"train/{page}.py", "".join(f"from tetrad.rl import m{number}\n" for number in range(15)))
        assert laws.check(tmp_path)[1] == ["src/tetrad/rl: 16 files, over 14 a folder"]
        plant(tmp_path, f"train/{page}.py", "".join(f"from tetrad.rl.m{number} import x, y\n" for number in range(16)))
        assert laws.check(tmp_path)[1][1:] == [f"src/tetrad/train/{page}.py:1: imports 16 own modules, over 15"]
        (tmp_path / f"src/tetrad/train/{page}.py").unlink()


def test_total_budget(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(laws, "TOTAL_BUDGET", 4)
    plant(tmp_path, "a.py", "x = 0\n" * 2)
    plant(tmp_path, "b.py", "x = 0\n" * 3)
    assert laws.check(tmp_path)[1] == ["src: 5 lines of code, over 4"]


@pytest.mark.parametrize("name", ["README.md", "src/tetrad/a.py", ".ci/run", "examples/x/recipe.toml", "docs/a.md"])
def test_places_of_one_machine_are_found(tmp_path: Path, name: str) -> None:
    for text in laws.FOREIGN_TEXTS:
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"# fine\n# see {text}x\n", encoding="utf-8")
        assert laws.check(tmp_path)[1] == [f"{name}:2: names a place of one machine, {text}"]


def test_exit_status_and_figures(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    plant(tmp_path, "a.py", "x = 0\n")
    assert laws.main(tmp_path) == 0
    assert f"src: 1 lines of code in 1 files (budget {laws.TOTAL_BUDGET:,})" in capsys.readouterr().out
    plant(tmp_path, "a.py", "eval(x)\n")
    assert laws.main(tmp_path) == 1
    assert "src/tetrad/a.py:1: no text becomes code" in capsys.readouterr().out
