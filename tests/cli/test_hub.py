"""A base by name, from end to end: a stage is trained from it, skipped offline, and commands use it."""

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import mirror
import modelscope_mirror
from served import write_model
from tetrad.cli.main import main
from tetrad.inference import model_folder

RECIPE = """\
[model]
from = "me/base"
[sft]
data = ["sft.jsonl"]
batch_size = 2
"""


def repository(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in (folder / "model").iterdir() if path.name != "manifest.json"}


@pytest.fixture(scope="module")
def repositories(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, bytes]]:
    folder = tmp_path_factory.mktemp("hub")
    judge = repository(write_model(folder / "judge", reward=True))
    return {"me/base": repository(write_model(folder / "base")), "me/judge": judge}


@pytest.fixture
def served(
    repositories: dict[str, dict[str, bytes]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[mirror.Mirror]:
    monkeypatch.chdir(tmp_path)
    Path("recipe").mkdir()
    Path("recipe/recipe.toml").write_text(RECIPE)
    records = [{"Instruction": f"say {n}", "Output": "the plot"} for n in range(4)]
    Path("recipe/sft.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    with mirror.serving(mirror.Mirror(dict(repositories))) as hub:
        mirror.use(monkeypatch, hub.url, tmp_path / "cache")
        yield hub
    forget()


def forget() -> None:
    """As a new process begins."""
    model_folder.snapshot.cache_clear()


def test_a_stage_from_a_name(
    served: mirror.Mirror, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["sft", "recipe/recipe.toml"]
    assert main(command) == 0
    lineage = json.loads(Path("runs/recipe/sft/lineage.json").read_bytes())
    base = lineage["parents"]["base"]
    assert (base["repository"], base["revision"], base["commit"]) == ("me/base", None, mirror.COMMIT)
    assert len(base["sha256"]["model.safetensors"]) == 64 and "config.json" in base["sha256"]
    assert json.loads(Path("runs/recipe/sft/model/manifest.json").read_bytes())["lineage"]["parents"]["base"] == base
    assert 'from = "hf://me/base"' in Path("runs/recipe/sft/recipe.toml").read_text()

    served.log.clear()
    forget()
    capsys.readouterr()
    mirror.use(monkeypatch, "http://127.0.0.1:9", tmp_path / "cache", offline=True)
    assert main(command) == 0  # offline: the cache has it
    assert "unchanged, skipped" in capsys.readouterr().out and not served.log
    assert main(["status", "recipe/recipe.toml"]) == 0

    forget()
    mirror.use(monkeypatch, served.url, tmp_path / "another")
    assert main([*command, "--model.from", f"hf://me/base@{mirror.COMMIT}"]) == 0  # another cache, another word for it
    assert "unchanged, skipped" in capsys.readouterr().out and served.log

    forget()
    mirror.use(monkeypatch, served.url, tmp_path / "none", offline=True)
    assert main(command) == 4
    assert "hf download me/base" in capsys.readouterr().err


def test_the_other_hub(
    served: mirror.Mirror, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The same bytes from ModelScope are the same stage; a name without a hub means it by setting."""
    command = ["sft", "recipe/recipe.toml", "--run.out", f"{tmp_path}/runs"]
    assert main(command) == 0
    with mirror.serving(mirror.Mirror(served.repos), modelscope_mirror.Answer) as other:
        modelscope_mirror.use(monkeypatch, other.url, tmp_path)
        monkeypatch.setenv("USE_MODELSCOPE_HUB", "true")
        capsys.readouterr()
        assert main(command) == 0 and "unchanged, skipped" in capsys.readouterr().out
        assert "model.safetensors" in other.taken()
        assert main([*command, "--name", "new", "--sft.adapters", "true"]) == 0
        base = json.loads(Path("runs/new/sft/lineage.json").read_bytes())["parents"]["base"]
        assert (base["hub"], base["repository"], base["revision"]) == ("modelscope", "me/base", None)
        assert len(base["sha256"]["model.safetensors"]) == 64 and "commit" not in base
        assert 'from = "ms://me/base"' in Path("runs/new/sft/recipe.toml").read_text()
        config = json.loads(Path("runs/new/sft/model/adapter_config.json").read_bytes())
        assert config["base_model_name_or_path"] == base["folder"]  # PEFT asks Hugging Face alone for a name
        assert main(["generate", "runs/new/sft", "--max-new-tokens", "2", "--instruction", "go"]) == 0
        assert main(["chat", "me/none"]) == 4
        assert "ms://me/none: the hub has no such model" in capsys.readouterr().err


def test_adapters_on_a_base_by_name(served: mirror.Mirror, tmp_path: Path) -> None:
    """Its weights are hashed through the links of the client's cache."""
    runs = f"{tmp_path}/runs"  # this process remembers the store of another test by its relative path
    assert main(["sft", "recipe/recipe.toml", "--sft.adapters", "true", "--run.out", runs]) == 0
    assert main(["export", f"{runs}/recipe/sft", "--to", "adapter", "--adapter-only", "--base", "me/base"]) == 0
    config = json.loads(Path(runs, "recipe/sft/model/adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == "me/base" and len(config["revision"]) == 40
    assert main(["generate", f"{runs}/recipe/sft", "--max-new-tokens", "2", "--instruction", "go"]) == 0
    assert main(["export", f"{runs}/recipe/sft", "--to", "own", "--adapter-only"]) == 0
    assert json.loads(Path("own/adapter_config.json").read_text())["revision"] == config["revision"]


def test_lengths_are_checked_once_the_model_is_here(served: mirror.Mirror, capsys: pytest.CaptureFixture[str]) -> None:
    """When the recipe is read for the first time, nothing is known of the model."""
    for _ in range(2):
        assert main(["sft", "recipe/recipe.toml", "--sft.max-tokens", "5000"]) == 2
        assert "sft.max_tokens = 5000" in capsys.readouterr().err
        forget()


def test_commands(served: mirror.Mirror, capsys: pytest.CaptureFixture[str]) -> None:
    Path("answers.jsonl").write_text('{"input": "a", "output": "the plot"}\n')
    short = ["--max-new-tokens", "2", "--instruction", "go"]
    assert main(["generate", "me/base", "--max-new-tokens", "x"]) == 2 and not served.log  # before any download
    assert main(["generate", "me/base", *short]) == 0
    assert main(["generate", "me/base", "--reward", "hf://me/judge", "--best-of", "2", *short]) == 0
    assert main(["score", "me/judge", "--data", "answers.jsonl"]) == 0
    assert main(["export", "me/base", "--to", "exported"]) == 0 and Path("exported/config.json").is_file()
    assert '"score"' in capsys.readouterr().out
    assert main(["score", "me/base", "--data", "answers.jsonl"]) == 4
    assert "E-CKPT-ROLE" in capsys.readouterr().err
    assert main(["chat", "me/none"]) == 4
    assert "me/none: the hub has no such model" in capsys.readouterr().err


def test_check_and_init_take_no_weights(served: mirror.Mirror, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["check", "recipe/recipe.toml"]) == 0
    assert main(["check", "recipe/sft.jsonl", "--tokenizer", "me/base"]) == 0
    assert main(["init", "recipe/sft.jsonl", "--from", "me/base", "--out", "recipe/new.toml"]) == 0
    assert 'from = "me/base"' in Path("recipe/new.toml").read_text()
    assert "tokenizer.json" in served.taken() and "model.safetensors" not in served.taken()


def test_nothing_of_the_client_is_loaded_unless_a_name_asks(tmp_path: Path) -> None:
    write_model(tmp_path / "base")
    (tmp_path / "recipe.toml").write_text(RECIPE.replace("me/base", "base/model"))
    (tmp_path / "sft.jsonl").write_text('{"Instruction": "say", "Output": "the plot"}\n')
    lines = ["--help", "sft --help-all", "check recipe.toml"]
    program = "import sys\nfrom tetrad.cli.main import main\n"
    program += f"assert not any(main(line.split()) for line in {lines})\n"
    program += "assert not {'huggingface_hub', 'modelscope_hub'} & {*sys.modules}"
    command = [sys.executable, "-c", program]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=tmp_path)
    assert done.returncode == 0, done.stderr[-2000:]
