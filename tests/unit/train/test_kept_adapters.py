"""Stages of adapters leave adapters: what opens them has the numbers of merged weights; the base is checked."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

import tetrad
from tetrad import storage
from tetrad.cli.main import main
from tetrad.errors import UserError
from tetrad.model.huggingface import read_causal, read_members
from tiny import Chain

EVERY = ("--sft.adapters", "true", "--reward.adapters", "true", "--ppo.adapters", "true", "--ppo.ema-decay", "0.5")
FILES = {"adapter_config.json", "adapter_model.safetensors", "tetrad.json"}


@pytest.fixture(scope="module")
def chain(tmp_path_factory: pytest.TempPathFactory) -> Chain:
    chain = Chain(tmp_path_factory.mktemp("kept"))
    chain.run(*EVERY)
    return chain


def weights(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    return dict(model.named_parameters())


def same(first: torch.nn.Module, second: torch.nn.Module) -> bool:
    ours, theirs = weights(first), weights(second)
    return ours.keys() == theirs.keys() and all(torch.equal(tensor, theirs[name]) for name, tensor in ours.items())


def test_the_numbers_are_those_of_merged_weights(chain: Chain, tmp_path: Path) -> None:
    merged = Chain(tmp_path)
    merged.run(*EVERY, "--lora.merge", "true")
    for stage in ("sft", "reward", "ppo"):
        assert chain.lines(stage) == merged.lines(stage)
        names = {path.name for path in (chain.home / stage / "model").iterdir()}
        assert names >= FILES and "model.safetensors" not in names and not (chain.home / stage / "adapter").exists()
        names = {path.name for path in (merged.home / stage / "model").iterdir()}
        assert not names & FILES and "model.safetensors" in names and (merged.home / stage / "adapter").is_dir()
    reports = [json.loads((c.home / "evaluate/report/report.json").read_text()) for c in (chain, merged)]
    for report in reports:  # minutes are the clock's
        del report["costs"], report["verdict"]["methods"]
    assert reports[0] == reports[1]  # greedy and sampled text, scores by both judges
    for stage in ("sft", "ppo"):
        assert same(*(read_causal(c.home / stage / "model") for c in (chain, merged)))
    ours, theirs = (read_members(c.home / "reward/model")[0] for c in (chain, merged))
    assert same(ours, theirs) and ours.bias == theirs.bias != 0 and ours.config == theirs.config
    assert main(["status", str(chain.path), *EVERY, "--lora.merge", "true", "--run.out", str(chain.runs)]) == 0
    assert chain.run(*EVERY, "--lora.merge", "true") == []  # no number depends on it


def test_an_ensemble(chain: Chain, tmp_path: Path) -> None:
    """Every member's own adapters, head and bias."""
    scores: list[Any] = []
    for number, merge in enumerate(("false", "true")):
        copy = Chain(tmp_path / merge)
        shutil.copytree(chain.home / "tokenizer", copy.home / "tokenizer")
        shutil.copytree(chain.home / "pretrain", copy.home / "pretrain")
        words = ("--sft.adapters", "true", "--reward.adapters", "true", "--reward.ensemble-size", "2")
        copy.run(*words, "--ppo.steps", "1", "--lora.merge", merge)
        scores.append(read_members(copy.home / "reward/model"))
        assert len(scores[number]) == 2
    assert all(same(*pair) and pair[0].bias == pair[1].bias for pair in zip(*scores, strict=True))
    assert not same(*scores[0])


def copied(chain: Chain, to: Path) -> Path:
    shutil.copytree(chain.home, to)
    return to


def test_a_run_that_was_moved(chain: Chain, tmp_path: Path) -> None:
    moved = copied(chain, tmp_path / "elsewhere")
    away = chain.home.rename(chain.home.with_name("away"))
    try:
        assert same(tetrad.load(moved / "ppo").model, read_causal(moved / "ppo/model"))
        assert len(tetrad.load_reward(moved / "reward").members) == 1
    finally:
        away.rename(chain.home)


def test_a_base_that_is_gone_or_changed(chain: Chain, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    base = chain.home / "pretrain/model"
    hidden = base.with_name("hidden")
    base.rename(hidden)
    try:
        with pytest.raises(UserError) as caught:
            tetrad.load(chain.home / "ppo")
        assert (caught.value.code, caught.value.where) == ("E-CKPT-MISSING", str(base))
        assert "tetrad export" in caught.value.hint
        files = {path.name: path.read_bytes() for path in hidden.iterdir() if path.name != "manifest.json"}
        raw = files["model.safetensors"]
        storage.write_folder(base, files | {"model.safetensors": raw[:-1] + bytes([raw[-1] ^ 1])}, {})
        for attempt in (lambda: tetrad.load(chain.home / "sft"), lambda: tetrad.load_reward(chain.home / "reward")):
            with pytest.raises(UserError) as caught:
                attempt()
            assert (caught.value.code, caught.value.where) == ("E-CKPT-HASH", str(base))
        assert main(["export", str(chain.home / "sft"), "--to", str(tmp_path / "out")]) == 4
        assert "E-CKPT-HASH" in capsys.readouterr().err
    finally:
        shutil.rmtree(base, ignore_errors=True)
        hidden.rename(base)
    assert chain.run(*EVERY) == []


def test_the_base_is_read_once_for_its_sha256(chain: Chain, monkeypatch: pytest.MonkeyPatch) -> None:
    storage._digest.cache_clear()
    reads: list[Path] = []
    real = storage.sha256_file
    monkeypatch.setattr(storage, "sha256_file", lambda path: (reads.append(path), real(path))[1])
    for _ in range(2):
        tetrad.load(chain.home / "ppo")
    tetrad.load_reward(chain.home / "reward")
    assert reads == [chain.home / "pretrain/model/model.safetensors"]


def test_adapters_on_adapters_of_another_run(chain: Chain, tmp_path: Path) -> None:
    """Beside the first where they have the same matrices and scale; else whole weights."""
    for words, stacked in (((), True), (("--lora.alpha", "8"), False), (("--lora.targets", "attention"), False)):
        second = Chain(tmp_path / "".join(words))
        text = second.path.read_text()
        middle = text[text.index("[sft]") : text.index("[reward]")]
        start = text[: text.index("[model]")] + f'[model]\nfrom = "{chain.home / "sft"}"\n'
        second.path.write_text(start + middle + text[text.index("[run]") :])
        second.run("--sft.adapters", "true", *words)
        model = second.home / "sft/model"
        assert (model / "adapter_config.json").is_file() == stacked
        assert (second.home / "sft/adapter").is_dir() != stacked
        if stacked:
            config, notes = (json.loads((model / f"{name}.json").read_text()) for name in ("adapter_config", "tetrad"))
            assert (config["r"], config["lora_alpha"], notes["ranks"]) == (32, 64.0, [16, 16])
            assert Path(config["base_model_name_or_path"]) == chain.home / "pretrain/model"
            assert not same(read_causal(model), read_causal(chain.home / "sft/model"))


def test_export_writes_whole_weights(chain: Chain, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for stage in ("sft", "reward"):
        out = tmp_path / stage
        assert main(["export", str(chain.home / stage), "--to", str(out)]) == 0
        assert "AutoPeft" in (chain.home / stage / "model/README.md").read_text()
        assert "AutoPeft" not in (out / "README.md").read_text() and not (out / "adapter_config.json").exists()
    assert same(read_causal(tmp_path / "sft"), read_causal(chain.home / "sft/model"))
    assert same(read_members(tmp_path / "reward")[0], read_members(chain.home / "reward/model")[0])
    assert main(["export", str(chain.home / "ppo"), "--to", str(tmp_path / "own"), "--adapter-only"]) == 0
    notes = json.loads((tmp_path / "own/tetrad.json").read_text())
    assert "base" not in notes and notes["ranks"] == [16, 16]
    assert json.loads((tmp_path / "own/adapter_config.json").read_text())["base_model_name_or_path"] is None


def test_what_is_not_of_its_base_is_refused(chain: Chain, tmp_path: Path) -> None:
    """Of a folder without a manifest too, which nothing else vouches for."""
    folder = tmp_path / "bare"
    shutil.copytree(chain.home / "sft/model", folder)
    (folder / "manifest.json").unlink()
    assert same(tetrad.load(folder).model, read_causal(chain.home / "sft/model"))
    config = json.loads((folder / "config.json").read_text())
    for name, change, code in (
        ("config.json", {**config, "num_hidden_layers": 2}, "E-CKPT-SHAPE"),
        ("config.json", {**config, "vocab_size": 10}, "E-CKPT-SHAPE"),
        ("tetrad.json", {"base": "x"}, "E-MODEL-FORMAT"),
    ):
        before = (folder / name).read_text()
        (folder / name).write_text(json.dumps(change))
        with pytest.raises(UserError) as caught:
            tetrad.load(folder)
        assert caught.value.code == code
        (folder / name).write_text(before)
