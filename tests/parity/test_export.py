"""What `tetrad export` writes, in transformers: folders in their type, GGUF files with the same logits."""

from pathlib import Path
from typing import Any

import pytest
import torch

import toys
from served import write_model
from tetrad.cli.main import main
from tetrad.model.config import RopeScaling
from tetrad.model.huggingface import read_causal
from tetrad.text.tokenizer import Tokenizer

transformers = pytest.importorskip("transformers")
pytest.importorskip("gguf")
pytestmark = pytest.mark.parity
IDS = toys.ids(40, 3)


def test_the_type_of_a_folder(tmp_path: Path) -> None:
    for number, kind in enumerate((transformers.AutoModelForCausalLM, transformers.AutoModelForSequenceClassification)):
        stage = write_model(tmp_path / f"stage{number}", "chatml", reward=bool(number))
        out = tmp_path / f"out{number}"
        assert main(["export", str(stage), "--to", str(out), "--dtype", "bfloat16"]) == 0
        assert transformers.AutoConfig.from_pretrained(out).dtype == torch.bfloat16
        loaded, said = kind.from_pretrained(out, dtype="auto", output_loading_info=True)
        assert {p.dtype for p in loaded.parameters()} == {torch.bfloat16}
        assert not any(said[name] for name in ("missing_keys", "unexpected_keys", "mismatched_keys"))
        tokenizer = transformers.AutoTokenizer.from_pretrained(out)
        chat = [{"role": "user", "content": "the plot"}]
        assert "<|im_start|>user\nthe plot<|im_end|>" in tokenizer.apply_chat_template(chat, tokenize=False)


@pytest.mark.parametrize(
    "changes",
    [
        {"family": "qwen2"},
        {"family": "qwen3", "tied": False, "head_dim": 128},  # that reader knows no other
        {"family": "llama", "rope_scaling": RopeScaling(4.0, 1.0, 4.0, 32), "tied": False},
    ],
    ids=lambda changes: changes["family"],
)
def test_a_second_reader_of_gguf(tmp_path: Path, changes: dict[str, Any]) -> None:
    """Transformers' own, which undoes what llama.cpp wants otherwise; it leaves out Llama 3's factors."""
    stage = write_model(tmp_path / "stage", "chatml", hidden_size=64, **{"head_dim": 16, **changes})
    assert main(["export", str(stage), "--gguf", str(tmp_path / "out/m.gguf"), "--type", "f32"]) == 0
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out", gguf_file="m.gguf").eval()
    ours = read_causal(stage / "model")
    if changes.get("rope_scaling"):
        ours.model.inv_freq = 1.0 / 10_000.0 ** (torch.arange(0, 16, 2) / 16)
    with torch.no_grad():
        expected = theirs(torch.tensor([IDS])).logits[0]
        logits = ours(toys.packed([toys.document(IDS)]), "logits")
    torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-4)
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "out", gguf_file="m.gguf")
    text = "the plot, slow 请帮我 42"
    assert tokenizer(text, add_special_tokens=False)["input_ids"] == Tokenizer.load(stage / "model").encode(text)
