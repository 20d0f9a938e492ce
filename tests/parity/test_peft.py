"""Adapters of ours in PEFT: the folder loads onto the same base, gives the same numbers, and merges."""

import importlib
import json
import warnings
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch

import tetrad
import toys
from tetrad.cli.main import main
from tetrad.model.huggingface import model_files, read_members
from tetrad.model.lora import ALL, adapter_files, add_adapters, merged, share_weights
from tetrad.model.transformer import CausalLM, ScalarModel, initial_head
from tetrad.storage import write_folder
from tiny import Chain

transformers = pytest.importorskip("transformers")
pytestmark = [
    pytest.mark.parity,
    pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing:FutureWarning"),  # PEFT of transformers, not of us
    pytest.mark.skipif(find_spec("peft") is None, reason="PEFT is not installed"),
]

IDS = [[*toys.ids(length, length), toys.EOS] for length in (30, 4, 17)]


@pytest.fixture(scope="module")
def peft_model() -> Any:
    """PEFT's class. Its import takes five seconds, which the collection of other tests is spared."""
    with warnings.catch_warnings():  # of what it imports; what it says of a folder is an error, as everywhere
        warnings.simplefilter("ignore")
        return importlib.import_module("peft").PeftModel


def written(folder: Path, model: CausalLM | ScalarModel, base: Path, *, hub: bool = False) -> Path:
    """The adapters as `tetrad export` takes them out of a stage."""
    stage = folder / "stage"
    files = {**model_files(merged(model)), **toys.tokenizer().files()}
    write_folder(stage / "model", files, {"key": "k"})
    write_folder(
        stage / "adapter",
        adapter_files(model, ("org/name", "c0ffee") if hub else (str(base), None), {"base_sha256": "0" * 64}, {}),
        {},
    )
    words = ["--adapter-only", "--base", str(base)]
    assert main(["export", str(stage), "--to", str(folder / "out"), *words]) == 0
    return folder / "out"


def adapted(model: CausalLM | ScalarModel) -> None:
    add_adapters(model, 3, 6.0, ALL, seed=1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("adapter.b"):
                parameter.normal_(0, 0.1, generator=torch.Generator().manual_seed(len(name)))


@pytest.mark.parametrize("family", ["qwen2", "qwen3", "llama"])
def test_an_actors_adapter(tmp_path: Path, peft_model: Any, family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    base = toys.causal(seed=1, family=family).requires_grad_(False)
    place = toys.saved(tmp_path / "base", base)
    model = share_weights(CausalLM, base)
    adapted(model)
    folder = written(tmp_path / "adapter", model, place)
    monkeypatch.chdir(tmp_path)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(place, dtype=torch.float32)
    theirs = peft_model.from_pretrained(theirs, folder).eval()
    plain = theirs.merge_and_unload() if family == "qwen3" else theirs
    for ids in IDS:
        with torch.no_grad():
            expected = plain(torch.tensor([ids])).logits[0]
            ours = model(toys.packed([toys.document(ids)]), "logits")
        torch.testing.assert_close(ours, expected, rtol=1e-4, atol=1e-4)


def test_a_reward_models_adapter_with_its_head(
    tmp_path: Path, peft_model: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    base = toys.causal(seed=1).requires_grad_(False)
    place = toys.saved(tmp_path / "base", base)
    model = share_weights(ScalarModel, base)
    model.score.weight = torch.nn.Parameter(initial_head(32, 3))
    model.bias = torch.zeros(())
    adapted(model)
    folder = written(tmp_path / "adapter", model, place)
    monkeypatch.chdir(tmp_path)
    assert json.loads((folder / "adapter_config.json").read_text())["modules_to_save"] == ["score"]
    theirs = transformers.AutoModelForSequenceClassification.from_pretrained(place, num_labels=1, dtype=torch.float32)
    theirs.config.pad_token_id = toys.PAD
    theirs = peft_model.from_pretrained(theirs, folder).eval()
    for ids in IDS:
        with torch.no_grad():
            expected = theirs(torch.tensor([ids])).logits[0, 0]
            ours = model(toys.packed([toys.document(ids)]), "scores")[0]
        torch.testing.assert_close(ours, expected, rtol=1e-4, atol=1e-4)


def test_the_base_by_its_name_and_older_folders(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A folder is named in full, a name of the hub as it is, and nothing where none is given: never a relative path.
    Notes that stood in adapter_config.json, where PEFT warned of them, are moved out of it."""
    base = toys.causal(seed=1).requires_grad_(False)
    place = toys.saved(tmp_path / "base", base)
    model = share_weights(CausalLM, base)
    adapted(model)
    written(tmp_path / "x", model, place)
    stage = tmp_path / "x/stage"
    files = {path.name: path.read_bytes() for path in (stage / "adapter").iterdir() if path.name != "manifest.json"}
    notes = json.loads(files.pop("tetrad.json"))
    config = json.loads(files["adapter_config.json"]) | {"tetrad": notes}
    write_folder(stage / "adapter", files | {"adapter_config.json": json.dumps(config).encode()}, {})
    for number, words in enumerate(([], ["--base", "someone/base"])):
        out = tmp_path / f"out{number}"
        assert main(["export", str(stage), "--to", str(out), "--adapter-only", *words]) == 0
        written_config = json.loads((out / "adapter_config.json").read_text())
        assert written_config.get("base_model_name_or_path") == (words[1] if words else None)
        assert "tetrad" not in written_config
        assert json.loads((out / "tetrad.json").read_text()) == notes
        assert notes["base_sha256"] in (out / "README.md").read_text()


def test_a_base_of_the_hub_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """With the commit that was trained on; a base that the user names comes first."""
    base = toys.causal(seed=1).requires_grad_(False)
    model = share_weights(CausalLM, base)
    adapted(model)
    written(tmp_path / "x", model, toys.saved(tmp_path / "base", base), hub=True)
    for words, expected in (([], ("org/name", "c0ffee")), (["--base", "other/name"], ("other/name", None))):
        out = tmp_path / expected[0].replace("/", "-")
        assert main(["export", str(tmp_path / "x/stage"), "--to", str(out), "--adapter-only", *words]) == 0
        config = json.loads((out / "adapter_config.json").read_text())
        assert (config["base_model_name_or_path"], config["revision"]) == expected


def test_a_stage_of_adapters_on_adapters(tmp_path: Path) -> None:
    """The folder that a run leaves, without export: the adapters of SFT and PPO lie side by side on one base."""
    chain = Chain(tmp_path)
    words = ("--sft.adapters", "true", "--reward.adapters", "true", "--ppo.adapters", "true", "--ppo.steps", "2")
    chain.run(*words, "--ppo.actor-lr", "0.02")
    peft = importlib.import_module("peft")
    theirs = peft.AutoPeftModelForCausalLM.from_pretrained(chain.home / "ppo/model").eval()
    ours = tetrad.load(chain.home / "ppo").model
    packed = toys.packed([toys.document(IDS[0])])
    with torch.no_grad():
        expected = theirs(torch.tensor([IDS[0]])).logits[0]
        torch.testing.assert_close(ours(packed, "logits"), expected, rtol=1e-4, atol=1e-4)
        with theirs.disable_adapter():
            assert (theirs(torch.tensor([IDS[0]])).logits[0] - expected).abs().max() > 0.01
    folder = chain.home / "reward/model"
    theirs = peft.AutoPeftModelForSequenceClassification.from_pretrained(folder, num_labels=1).eval()
    theirs.config.pad_token_id = toys.PAD
    model = read_members(folder)[0]
    with torch.no_grad():
        expected = theirs(torch.tensor([IDS[0]])).logits[0, 0] + model.bias
        torch.testing.assert_close(model(packed, "scores")[0], expected, rtol=1e-4, atol=1e-4)
