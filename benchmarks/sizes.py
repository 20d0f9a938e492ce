"""What `tetrad check` plans for bases of published sizes: memory of each stage, and time at SPEED.

    python benchmarks/sizes.py > table.md

Of each base only config.json is written, and a tokenizer of bytes; no weights are needed. The recipe is the one that
`tetrad init` writes for 2,000 SFT records and 2,000 pairs, 60 tokens of prompt and 200 of answer, with micro-batches of
2,048 tokens. Nothing is trained, and nothing is measured.
"""

import contextlib
import io
import json
import random
import tempfile
from pathlib import Path
from typing import Any

from tetrad.cli.main import main
from tetrad.datacheck import cost
from tetrad.text.bpe import SMALLEST, learn
from tetrad.text.chat_template import TEMPLATES

QWEN = {"architectures": ["Qwen2ForCausalLM"], "model_type": "qwen2", "max_position_embeddings": 32_768}
LLAMA = {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "max_position_embeddings": 8192}
KEYS = "hidden_size num_hidden_layers num_attention_heads num_key_value_heads intermediate_size vocab_size"
SHAPES: dict[str, tuple[dict[str, Any], str]] = {
    "SmolLM2-135M": (LLAMA, "576 30 9 3 1536 49152"),
    "Qwen2.5-0.5B": (QWEN, "896 24 14 2 4864 151936"),
    "Qwen2.5-1.5B": (QWEN, "1536 28 12 2 8960 151936"),
    "Qwen2.5-3B": (QWEN, "2048 36 16 2 11008 151936"),
    "Qwen2.5-7B": (QWEN | {"tie_word_embeddings": False}, "3584 28 28 4 18944 152064"),
}
"""config.json of each, as published."""
STAGES = ("sft", "reward", "ppo")
CARDS = (8, 16, 24, 48, 80)
SPEED = 100e9  # floating-point operations a second of large products; `tetrad check` prints a machine's own


def write(folder: Path, name: str, records: int = 2000) -> Path:
    """A base without weights, data, and the recipe that `tetrad init` makes of them; the recipe's path."""
    base, draw = folder / "base", random.Random(0)
    base.mkdir(parents=True)
    family, sizes = SHAPES[name]
    shape = dict(zip(KEYS.split(), map(int, sizes.split()), strict=True))
    config = {"tie_word_embeddings": True, "hidden_act": "silu", "rms_norm_eps": 1e-6} | family | shape
    form = TEMPLATES["qwen2.5" if family["model_type"] == "qwen2" else "smollm2"].with_system("")
    for file, content in learn(["a"], SMALLEST).files(form).items():
        (base / file).write_bytes(content)
    (base / "config.json").write_text(json.dumps(config))

    def text(letters: int) -> str:
        return "".join(draw.choices("abcdefghij klmno pqrst uvwxyz", k=letters))

    sft = [{"prompt": text(60), "completion": text(200)} for _ in range(records)]
    pairs = [{"prompt": text(60), "chosen": text(200), "rejected": text(200)} for _ in range(records)]
    for file, rows in {"sft.jsonl": sft, "prefs.jsonl": pairs}.items():
        (folder / file).write_text("".join(json.dumps(row) + "\n" for row in rows))
    run("init", folder / "sft.jsonl", folder / "prefs.jsonl", "--from", base, "--out", folder / "recipe.toml")
    return folder / "recipe.toml"


def run(*words: object) -> None:
    with contextlib.redirect_stdout(io.StringIO()):
        if main([str(word) for word in words]):
            raise SystemExit(f"{words} failed")


def plan(recipe: Path, *, adapters: bool, micro: int = 2048) -> dict[str, Any]:
    """What `tetrad check` says of the stages: memory_bytes, flop and seconds of each, and the number of parameters."""
    words = [word for stage in STAGES for word in (f"--{stage}.adapters", str(adapters).lower())]
    report = recipe.parent / "check.json"
    cost.speed = lambda: SPEED
    words += ["--run.out", str(recipe.parent / "runs"), "--run.micro-batch-tokens", str(micro)]
    run("check", recipe, *words, "--json", report)
    figures: dict[str, Any] = json.loads(report.read_text())["sections"]["cost"]["figures"]
    return figures


def card(size: float) -> str:
    """The smallest card whose memory a plan in GiB leaves a tenth of."""
    return next((f"{each} GB" for each in CARDS if size <= 0.9 * each), "none")


def times(figures: dict[str, Any]) -> str:
    """Of the three stages."""
    return ", ".join(cost.duration(figures[stage]["seconds"]) for stage in STAGES)


def table() -> None:
    print("| base | weights trained | SFT | reward | PPO | smallest card | SFT, reward, PPO at 100 GFLOP/s |")
    print("| --- | --- | ---: | ---: | ---: | ---: | ---: |")
    for name in SHAPES:
        with tempfile.TemporaryDirectory() as place:
            recipe = write(Path(place), name)
            for adapters in (False, True):
                figures = plan(recipe, adapters=adapters)
                sizes = [figures[stage]["memory_bytes"] / 2**30 for stage in STAGES]
                cells = [name, "adapters" if adapters else "all", *(f"{size:.1f} GiB" for size in sizes)]
                print("| " + " | ".join([*cells, card(max(sizes)), times(figures)]) + " |", flush=True)


if __name__ == "__main__":
    table()
