"""How much memory PPO takes, against what `tetrad check` says beforehand.

    python benchmarks/memory.py MODEL --shapes 256x4 512x8 >> results.jsonl

MODEL: a folder whose tokenizer is borrowed (runs/reviews-en/sft). For each shape, hidden size and layers, a model of
random weights goes through the reward stage and two iterations of PPO, each stage in a process of its own: with four
full models, with a critic on the actor's trunk, and with adapters on one base. One JSON line each: the peak of resident
memory that the system saw, and the plan.
"""

import argparse
import json
import os
import random
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from tetrad.inference.model_folder import model_folder
from tetrad.model.config import DecoderConfig
from tetrad.model.huggingface import model_files
from tetrad.model.transformer import CausalLM, initialise
from tetrad.text.tokenizer import Tokenizer

WORDS = "the film was warm and funny but the story is slow and the end never comes although it is moving".split()
RECIPE = """\
name = "memory"
[run]
out = "{folder}/runs"
micro_batch_tokens = {micro}
[model]
from = "{folder}/base"
[sft]
template = "instruction"
[reward]
data = ["{folder}/pairs.jsonl"]
validation = ["{folder}/held.jsonl"]
batch_size = 16
normalise = 16
normalise_max_new_tokens = 32
patience = 0
adapters = {adapters}
[ppo]
prompts = ["{folder}/prompts.jsonl"]
critic = "{critic}"
adapters = {adapters}
steps = 2
batch_size = 32
max_new_tokens = 64
ppo_epochs = 1
"""
WAYS = {"full": ("reward", "false"), "shared": ("shared", "false"), "adapters": ("reward", "true")}


def write_base(folder: Path, tokenizer: Tokenizer, hidden: int, layers: int) -> int:
    """A model of random weights; its number of parameters."""
    config = DecoderConfig(
        family="qwen2",
        vocab_size=tokenizer.size,
        hidden_size=hidden,
        layers=layers,
        heads=hidden // 64,
        kv_heads=hidden // 64,
        head_dim=64,
        ff=3 * hidden,
        max_positions=512,
        tied=True,
        eos_ids=tokenizer.eos_ids,
        pad_id=tokenizer.pad_id,
    )
    model = CausalLM(config)
    initialise(model, 0)
    folder.mkdir()
    for name, content in {**model_files(model), **tokenizer.files(None)}.items():
        (folder / name).write_bytes(content if isinstance(content, bytes) else b"".join(bytes(c) for c in content))
    return sum(p.numel() for p in model.parameters())


def write_data(folder: Path) -> None:
    draw = random.Random(0)

    def text(words: int) -> str:
        return " ".join(draw.choices(WORDS, k=words))

    pairs = [{"Instruction": "Go on.", "Input": text(6), "chosen": text(60), "rejected": text(50)} for _ in range(80)]
    prompts = [{"Instruction": "Go on.", "Input": text(6)} for _ in range(64)]
    for name, rows in {"pairs": pairs[:64], "held": pairs[64:], "prompts": prompts}.items():
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def tetrad(words: list[str]) -> int:
    """Runs a command; the bytes of resident memory that it reached."""
    child = subprocess.Popen([sys.executable, "-m", "tetrad", *words], stdout=subprocess.DEVNULL)
    _, status, usage = os.wait4(child.pid, 0)
    if status:
        raise SystemExit(f"{words} failed")
    return usage.ru_maxrss * 1024


def measured(model: str, hidden: int, layers: int, way: str, micro: int) -> list[dict[str, Any]]:
    critic, adapters = WAYS[way]
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        n = write_base(folder / "base", Tokenizer.load(model_folder(model)), hidden, layers)
        write_data(folder)
        path = folder / "recipe.toml"
        path.write_text(RECIPE.format(folder=folder, critic=critic, adapters=adapters, micro=micro))
        tetrad(["check", str(path), "--json", f"{folder}/check.json"])
        report = json.loads((folder / "check.json").read_text())
        planned = report["sections"]["cost"]["figures"]
        found = []
        for stage in ("reward", "ppo"):
            seen, told = tetrad([stage, str(path)]), planned[stage]["memory_bytes"]
            row = {"way": way, "stage": stage, "hidden": hidden, "layers": layers, "parameters": n}
            row |= {"micro_batch_tokens": micro}
            found.append({**row, "peak_mib": seen >> 20, "plan_mib": told >> 20, "plan / peak": round(told / seen, 3)})
        return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--shapes", nargs="+", default=["256x4", "512x8"])
    parser.add_argument("--ways", nargs="+", default=list(WAYS))
    parser.add_argument("--micro-tokens", type=int, default=4096)
    asked = parser.parse_args()
    for shape in asked.shapes:
        hidden, layers = map(int, shape.split("x"))
        for way in asked.ways:
            for row in measured(asked.model, hidden, layers, way, asked.micro_batch_tokens):
                print(json.dumps(row), flush=True)


if __name__ == "__main__":
    main()
