"""Model folders and checkpoints that are damaged, foreign, hostile or of another kind than asked for."""

import json
import os
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from faults.bad_inputs import Case, world, write
from tetrad import storage

Change = Callable[[Path], object]
GENERATE = "generate hf --instruction a --template instruction --max-new-tokens 2"
TRAIN = '[model]\nfrom = "hf"\n[sft]\ndata = ["sft.jsonl"]\n[run]\nout = "new"\n'
RESUME = "run recipe.toml --ppo.steps 40"
SFT = "generate runs/tiny/sft --instruction a --max-new-tokens 2"


# Model folders


def hf(change: Change, stage: str = "sft") -> Change:
    """A folder `hf` as others make them, without a manifest, changed; and a recipe that starts from it."""

    def make(folder: Path) -> None:
        world(folder)
        shutil.copytree(folder / "runs/tiny" / stage / "model", folder / "hf")
        (folder / "hf/manifest.json").unlink()
        write(folder / "r.toml", TRAIN)
        change(folder / "hf")

    return make


def ours(change: Change, stage: str = "sft") -> Change:
    """A finished stage's own folder, changed."""

    def make(folder: Path) -> None:
        change(world(folder) / "runs/tiny" / stage / "model")

    return make


def remove(*names: str) -> Change:
    return lambda folder: [(folder / name).unlink() for name in names]


def put(name: str, content: str | bytes) -> Change:
    return lambda folder: write(folder / name, content)


def index(shard: str) -> Change:
    """Instead of one file an index that names this one, in JSON."""

    def change(folder: Path) -> None:
        (folder / "model.safetensors").unlink()
        write(folder / "model.safetensors.index.json", f'{{"weight_map": {{"a": {shard}}}}}')

    return change


def config(**values: Any) -> Change:
    """config.json with these values."""

    def change(folder: Path) -> None:
        path = folder / "config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | values))

    return change


def tokenizer(change: Callable[[dict[str, Any]], object]) -> Change:
    def apply(folder: Path) -> None:
        path = folder / "tokenizer.json"
        spec = json.loads(path.read_text())
        change(spec)
        path.write_text(json.dumps(spec))

    return apply


def regex(pattern: str) -> Change:
    split = {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False}
    return tokenizer(lambda spec: spec.update(pre_tokenizer=split))


def read_header(path: Path) -> tuple[dict[str, Any], bytes]:
    raw = path.read_bytes()
    length = int.from_bytes(raw[:8], "little")
    return json.loads(raw[8 : 8 + length]), raw[8 + length :]


def write_header(path: Path, header: Mapping[str, Any] | str, data: bytes) -> None:
    text = (header if isinstance(header, str) else json.dumps(header)).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + data)


def header(change: Callable[[dict[str, Any]], object], name: str = "model.safetensors") -> Change:
    """The weights' header, changed, over the same bytes."""

    def apply(folder: Path) -> None:
        found, data = read_header(folder / name)
        change(found)
        write_header(folder / name, found, data)

    return apply


def first(found: dict[str, Any]) -> dict[str, Any]:
    return found["model.norm.weight"]  # type: ignore[no-any-return]


def header_text(make: Callable[[dict[str, Any]], str]) -> Change:
    def apply(folder: Path) -> None:
        found, data = read_header(folder / "model.safetensors")
        write_header(folder / "model.safetensors", make(found), data)

    return apply


def sparse(name: str, size: int, start: bytes = b"") -> Change:
    def apply(folder: Path) -> None:
        with write(folder / name, start).open("r+b") as file:
            file.truncate(size)

    return apply


def tensors(add: Mapping[str, Any] | None = None, drop: tuple[str, ...] = ()) -> Change:
    """Weights with other tensors, whole as a file; add: name to shape."""

    def apply(folder: Path) -> None:
        found, data = read_header(folder / "model.safetensors")
        found.pop("__metadata__", None)
        bodies = {name: data[slice(*entry["data_offsets"])] for name, entry in found.items() if name not in drop}
        shapes = {name: found[name]["shape"] for name in bodies}
        for name, shape in (add or {}).items():
            size = 4
            for side in shape:
                size *= side
            bodies[name], shapes[name] = bytes(size), shape
        entries, end = {}, 0
        for name, body in bodies.items():
            entries[name] = {"dtype": "F32", "shape": shapes[name], "data_offsets": [end, end + len(body)]}
            end += len(body)
        write_header(folder / "model.safetensors", entries, b"".join(bodies.values()))

    return apply


def pickled(folder: Path) -> None:
    write(
        folder / "model.safetensors", b"\x80\x04\x95\x10\x00\x00\x00\x00\x00\x00\x00\x8c\x05posix\x94\x8c\x06system\x94"
    )


def flip(name: str) -> Change:
    def apply(folder: Path) -> None:
        raw = bytearray((folder / name).read_bytes())
        raw[len(raw) * 2 // 3] ^= 16
        (folder / name).write_bytes(raw)

    return apply


def zeros(name: str) -> Change:
    def apply(folder: Path) -> None:
        with (folder / name).open("r+b") as file:
            file.seek(4096)
            file.write(bytes(4096))

    return apply


def append(name: str) -> Change:
    return lambda folder: (folder / name).write_bytes((folder / name).read_bytes() + b"\0")


def cut(name: str) -> Change:
    return lambda folder: (folder / name).write_bytes((folder / name).read_bytes()[:-9])


def link(name: str) -> Change:
    def apply(folder: Path) -> None:
        (folder / name).rename(folder.parent / "elsewhere")
        (folder / name).symlink_to(folder.parent / "elsewhere")

    return apply


def manifest(change: Callable[[dict[str, Any]], object]) -> Change:
    """A manifest with a true checksum of its own, changed."""

    def apply(folder: Path) -> None:
        found = json.loads((folder / "manifest.json").read_bytes())
        change(found)
        (folder / "manifest.json").write_bytes(storage._render(found))

    return apply


def named(name: str) -> Change:
    entry = {"size": 1, "sha256": "0" * 64}
    return manifest(lambda found: found["files"].update({name: entry}))


def million(folder: Path) -> None:
    entries = ",".join(f'"f{i}":{{"size":1,"sha256":"{"0" * 64}"}}' for i in range(1_000_000))
    write(folder / "manifest.json", f'{{"version":1,"files":{{{entries}}}}}')


def _foreign_actor(spec: dict[str, Any]) -> None:
    spec["added_tokens"][0]["content"] = "<|other|>"


SHAPE_64 = {"model.norm.weight": [64]}
HOSTILE: list[tuple[str, Change]] = [
    ("length-2-63", put("model.safetensors", (2**63).to_bytes(8, "little") + b"{}")),
    ("header-200-mb", sparse("model.safetensors", 200 << 20, (150 << 20).to_bytes(8, "little") + b"{")),
    ("empty", put("model.safetensors", b"")),
    ("short", put("model.safetensors", b"\1\0\0")),
    ("not-json", header_text(lambda h: "{" * 50)),
    ("a-list", header_text(lambda h: "[]")),
    ("deep", header_text(lambda h: '{"a":' * 9000)),
    ("deep-lists", header_text(lambda h: "[" * 100_000)),
    ("twice", header_text(lambda h: json.dumps(h)[:-1] + ', "model.norm.weight": ' + json.dumps(first(h)) + "}")),
    ("five-thousand-digits", header_text(lambda h: '{"a": ' + "9" * 5000 + "}")),
    ("not-a-number", header_text(lambda h: '{"a": NaN}')),
    ("overlap", header(lambda h: first(h).update(data_offsets=[0, 128]))),
    ("negative", header(lambda h: first(h).update(shape=[-32]))),
    ("dtype", header(lambda h: first(h).update(dtype="F31"))),
    ("shape-and-bytes", header(lambda h: first(h).update(shape=[31]))),
    ("backwards", header(lambda h: first(h).update(data_offsets=first(h)["data_offsets"][::-1]))),
    ("hole", header(lambda h: h.pop("model.norm.weight"))),
    ("metadata", header(lambda h: h.update(__metadata__=[1]))),
    ("no-offsets", header(lambda h: first(h).pop("data_offsets"))),
    ("appended", append("model.safetensors")),
    ("truncated", cut("model.safetensors")),
    ("pickle", pickled),
    ("zip", put("model.safetensors", b"PK\3\4" + bytes(2000))),
    ("gzip", put("model.safetensors", b"\x1f\x8b\x08" + bytes(2000))),
    ("folder", lambda f: [(f / "model.safetensors").unlink(), (f / "model.safetensors").mkdir()]),
]

FOLDERS: list[tuple[str, Change, str, str]] = [
    # what, how, the code, the place
    ("no-config", remove("config.json"), "E-MODEL-MISSING", "config.json"),
    ("no-weights", remove("model.safetensors"), "E-MODEL-MISSING", "model.safetensors"),
    ("no-tokenizer", remove("tokenizer.json"), "E-MODEL-MISSING", "tokenizer.json"),
    ("empty", lambda f: [path.unlink() for path in f.iterdir()], "E-MODEL-MISSING", "config.json"),
    ("bin-only", lambda f: (f / "model.safetensors").rename(f / "pytorch_model.bin"), "E-MODEL-MISSING", "convert"),
    (
        "config-pipe",
        lambda f: [(f / "config.json").unlink(), os.mkfifo(f / "config.json")],
        "E-MODEL-MISSING",
        "config",
    ),
    ("config-1-gib", sparse("config.json", 1 << 30, b"{"), "E-MODEL-FORMAT", "config.json"),
    ("config-not-json", put("config.json", "{"), "E-MODEL-FORMAT", "config.json"),
    ("config-list", put("config.json", "[1]"), "E-MODEL-FORMAT", "config.json"),
    ("config-deep", put("config.json", "[" * 100_000), "E-MODEL-FORMAT", "config.json"),
    ("config-digits", put("config.json", "9" * 9000), "E-MODEL-FORMAT", "config.json"),
    ("code", config(auto_map={"AutoModel": "m.M"}), "E-MODEL-CODE", "auto_map"),
    ("architecture", config(architectures=["GPT2LMHeadModel"]), "E-MODEL-UNSUPPORTED", "GPT2LMHeadModel"),
    ("architecture-odd", config(architectures=[{"a": 1}]), "E-MODEL-UNSUPPORTED", "config.json"),
    ("architecture-text", config(architectures="Qwen2ForCausalLM"), "E-MODEL-UNSUPPORTED", "config.json"),
    ("yarn", config(rope_parameters={"rope_type": "yarn", "factor": 4.0}), "E-MODEL-UNSUPPORTED", "yarn"),
    ("rope-list", config(rope_parameters=[1]), "E-MODEL-FORMAT", "config.json"),
    ("windows", config(use_sliding_window=True), "E-MODEL-UNSUPPORTED", "sliding"),
    ("layer-types", config(layer_types=7), "E-MODEL-FORMAT", "config.json"),
    ("quantised", config(quantization_config={"bits": 4}), "E-MODEL-UNSUPPORTED", "quantised"),
    ("size-text", config(hidden_size="32"), "E-MODEL-FORMAT", "hidden_size"),
    ("size-float", config(hidden_size=32.5), "E-MODEL-FORMAT", "hidden_size"),
    ("size-negative", config(num_hidden_layers=-1), "E-MODEL-FORMAT", "num_hidden_layers"),
    ("heads-zero", config(num_attention_heads=0), "E-MODEL-FORMAT", "num_attention_heads"),
    ("size-huge", config(vocab_size=10**30), "E-MODEL-FORMAT", "vocab_size"),
    ("layers-billion", config(num_hidden_layers=10**9), "E-CKPT-KEYS", "1000000000 layers"),
    ("theta-infinite", put("config.json", "{}"), "E-MODEL-UNSUPPORTED", "unnamed"),
    ("ends-text", config(eos_token_id="x"), "E-MODEL-FORMAT", "eos_token_id"),
    (
        "two-sets",
        put("model.safetensors.index.json", '{"weight_map": {"a": "model-1.safetensors"}}'),
        "E-MODEL-FORMAT",
        "two sets of weights lie here: model.safetensors, and",
    ),
    ("adapter-beside", put("adapter_config.json", "{}"), "E-MODEL-UNSUPPORTED", "adapter_config.json"),
    (
        "head-differs",
        tensors({"lm_head.weight": [320, 32]}),
        "E-CKPT-KEYS",
        "lm_head.weight differs from model.embed_tokens.weight",
    ),
    (
        "head-shape",
        tensors({"lm_head.weight": [8, 32]}),
        "E-CKPT-KEYS",
        "lm_head.weight differs from model.embed_tokens.weight",
    ),
    ("head-missing", config(tie_word_embeddings=False), "E-CKPT-KEYS", "lm_head.weight"),
    (
        "sampling-odd",
        put("generation_config.json", '{"do_sample": true, "top_p": 2}'),
        "E-CONF-RANGE",
        "generation_config.json: top_p = 2",
    ),
    ("shape", config(intermediate_size=64), "E-CKPT-SHAPE", "mlp"),
    ("shape-of-a-tensor", tensors(SHAPE_64, ("model.norm.weight",)), "E-CKPT-SHAPE", "model.norm.weight is [64]"),
    ("whole-numbers", header(lambda h: first(h).update(dtype="I32")), "E-CKPT-SHAPE", "model.norm.weight is I32"),
    ("tensor-missing", tensors({}, ("model.norm.weight",)), "E-CKPT-KEYS", "model.norm.weight"),
    ("tensor-unexpected", tensors({"lora_A": [2]}), "E-CKPT-KEYS", "lora_A"),
    ("index-not-json", put("model.safetensors.index.json", "{"), "E-MODEL-FORMAT", "index"),
    ("index-up", index('"../x"'), "E-MODEL-MISSING", "../x"),
    ("index-zero", index('"a\\u0000"'), "E-MODEL-MISSING", "a"),
    ("index-shard", index('"b"'), "E-MODEL-MISSING", "b"),
    (
        "sentencepiece",
        lambda f: (f / "tokenizer.json").rename(f / "tokenizer.model"),
        "E-MODEL-TOKENIZER",
        "save_pretrained",
    ),
    ("tokenizer-1-gib", sparse("tokenizer.json", 1 << 30, b"{"), "E-MODEL-TOKENIZER", "larger than 64 MiB"),
    ("tokenizer-not-json", put("tokenizer.json", "{"), "E-MODEL-TOKENIZER", "tokenizer.json"),
    ("tokenizer-deep", put("tokenizer.json", '{"a":' * 50_000), "E-MODEL-TOKENIZER", "tokenizer.json"),
    ("tokenizer-binary", put("tokenizer.json", bytes(range(256))), "E-MODEL-TOKENIZER", "tokenizer.json"),
    ("tokenizer-empty", tokenizer(lambda s: s["model"].update(vocab={}, merges=[])), "E-MODEL-TOKENIZER", "tokenizer"),
    (
        "tokenizer-merges",
        tokenizer(lambda s: s["model"]["merges"].append(["zz", "zz"])),
        "E-MODEL-TOKENIZER",
        "tokenizer",
    ),
    (
        "tokenizer-merge-of-nothing",
        tokenizer(lambda s: s["model"]["merges"].append(["a", ""])),
        "E-MODEL-TOKENIZER",
        "tokenizer",
    ),
    ("tokenizer-added", tokenizer(lambda s: s.update(added_tokens=[7])), "E-MODEL-TOKENIZER", "tokenizer"),
    ("tokenizer-ids", tokenizer(lambda s: s["added_tokens"][0].update(id=10**12)), "E-MODEL-TOKENIZER", "tokens"),
    ("tokenizer-large", config(vocab_size=8), "E-CKPT-SHAPE", "embed_tokens"),
    ("regex-nested", regex(r"(\w+\s?)+$"), "E-MODEL-TOKENIZER", "endless"),
    ("regex-counted", regex("(a+){2,}b"), "E-MODEL-TOKENIZER", "endless"),
    ("regex-alternatives", regex("(a|aa)+$"), "E-MODEL-TOKENIZER", "tokenizer.json: tokenizer.json cannot be used"),
    ("regex-broken", regex("(a"), "E-MODEL-TOKENIZER", "tokenizer"),
    (
        "reward-is-no-language-model",
        lambda f: [shutil.rmtree(f), shutil.copytree(f.parent / "runs/tiny/reward/model", f)],
        "E-CKPT-ROLE",
        "reward model",
    ),
]

CASES = [Case(f"header-{name}", hf(change), GENERATE, "E-CKPT-FORMAT", "model.safetensors") for name, change in HOSTILE]
CASES = [case for case in CASES if case.id != "header-folder"]
CASES += [Case(f"folder-{name}", hf(change), GENERATE, code, place) for name, change, code, place in FOLDERS]
CASES += [
    Case(f"start-{name}", hf(change), "run r.toml", code, place)
    for name, change, code, place in FOLDERS
    if name
    in ("bin-only", "code", "yarn", "shape", "tensor-missing", "regex-nested", "tokenizer-1-gib", "config-1-gib")
    or name in ("reward-is-no-language-model", "layers-billion", "empty")
]
CASES += [
    Case("start-header-twice", hf(dict(HOSTILE)["twice"]), "run r.toml", "E-CKPT-FORMAT", "model.safetensors"),
    Case(
        "template-none",
        hf(put("tokenizer_config.json", "{}")),
        "generate hf --instruction a",
        "E-MODEL-TEMPLATE",
        "--template instruction",
    ),
    Case(
        "template-walks",
        hf(put("tokenizer_config.json", json.dumps({"chat_template": "{{ ''.__class__.__mro__ }}"}))),
        "generate hf --instruction a",
        "E-MODEL-TEMPLATE",
        "chatml",
    ),
    Case(
        "template-1-mb",
        hf(put("tokenizer_config.json", json.dumps({"chat_template": "{% include 'x' %}" * 60_000}))),
        "chat hf",
        "E-MODEL-TEMPLATE",
        "chatml",
    ),
    Case(
        "template-not-json",
        hf(put("tokenizer_config.json", "{")),
        "chat hf",
        "E-MODEL-TOKENIZER",
        "tokenizer_config.json",
    ),
    Case(
        "template-1-gib",
        hf(sparse("tokenizer_config.json", 1 << 30, b"{")),
        "chat hf --template chatml",
        "E-MODEL-TOKENIZER",
        "8 MiB",
    ),
    Case(
        "separator-missing",
        hf(tokenizer(lambda s: [t.update(content="<|x|>") for t in s["added_tokens"] if t["content"] == "<|sep|>"])),
        "run r.toml",
        "E-MODEL-TOKENIZER",
        "add_separator",
    ),
    Case(
        "start-sentencepiece",
        hf(lambda f: (f / "tokenizer.json").rename(f / "tokenizer.model")),
        "run r.toml",
        "E-MODEL-MISSING",
        "save_pretrained",
    ),
    Case(
        "start-config-pipe",
        hf(lambda f: [(f / "config.json").unlink(), os.mkfifo(f / "config.json")]),
        "run r.toml",
        "E-CKPT-PATH",
        "config.json",
    ),
    Case("generate-nothing", world, "generate none --instruction a", "E-MODEL-MISSING", "none"),
    Case("generate-300", world, ("generate", "a" * 300, "--instruction", "a"), "E-MODEL-MISSING", "aaa"),
    Case("generate-file", world, "generate recipe.toml --instruction a", "E-MODEL-MISSING", "recipe.toml"),
    Case(
        "generate-archive",
        lambda f: write(world(f) / "m.tar.gz", b"\x1f\x8b" + bytes(99)),
        "generate m.tar.gz --instruction a",
        "E-MODEL-MISSING",
        "m.tar.gz",
    ),
    Case("generate-run", world, "generate runs/tiny --instruction a", "E-MODEL-MISSING", "runs/tiny/sft"),
    Case(
        "generate-stopped",
        world,
        "generate runs/tiny/ppo --instruction a",
        "E-MODEL-MISSING",
        "run its recipe to the end",
    ),
    Case("generate-reward", world, "generate runs/tiny/reward --instruction a", "E-CKPT-ROLE", "reward model"),
    Case("score-language", world, "score runs/tiny/sft --data sft.jsonl", "E-CKPT-ROLE", "no reward"),
    Case(
        "best-of-language",
        world,
        "generate runs/tiny/sft --instruction a --best-of 2 --reward runs/tiny/sft",
        "E-CKPT-ROLE",
        "no reward",
    ),
    Case(
        "referee-reward",
        world,
        "run recipe.toml --ppo.steps 40 --evaluate.external-lm runs/tiny/reward",
        "E-CKPT-ROLE",
        "reward model",
    ),
    Case(
        "reward-of-another-tokenizer",
        hf(tokenizer(_foreign_actor), "reward"),
        ("run", "recipe.toml", "--reward.from", "hf", "--reward.data", "[]", "--ppo.steps", "4"),
        "E-MODEL-TOKENIZER",
        "whose tokenizer isn't the answering model's",
    ),
    Case(
        "reward-is-a-language-model",
        hf(lambda f: None),
        ("run", "recipe.toml", "--reward.from", "hf", "--reward.data", "[]", "--ppo.steps", "4"),
        "E-CKPT-ROLE",
        "no reward",
    ),
    Case("own-flip", ours(flip("model.safetensors")), SFT, "E-CKPT-HASH", "model.safetensors"),
    Case("own-flip-run", ours(flip("model.safetensors")), RESUME, "E-CKPT-HASH", "sft/model/model.safetensors"),
    Case("own-zeros", ours(zeros("model.safetensors")), SFT, "E-CKPT-HASH", "sha256"),
    Case("own-appended", ours(append("config.json")), SFT, "E-CKPT-SIZE", "config.json"),
    Case("own-unnamed", ours(put("evil.py", "1")), SFT, "E-CKPT-MANIFEST", "evil.py"),
    Case("own-link", ours(link("model.safetensors")), SFT, "E-CKPT-PATH", "link"),
    Case("own-version", ours(manifest(lambda m: m.update(version=99))), SFT, "E-CKPT-VERSION", "99"),
]


# Checkpoints


def steps(change: Change, *, newest_alone: bool = False) -> Change:
    """The last two checkpoints of the stopped PPO, or the last one alone, changed; there are no others."""

    def make(folder: Path) -> None:
        found = sorted((world(folder) / "runs/tiny/ppo/checkpoints").glob("step-*"))
        for path in found[:-2]:
            shutil.rmtree(path)
        for path in found[-1:] if newest_alone else found[-2:]:
            change(path)

    return make


def rewritten(change: Callable[[dict[str, bytes]], object]) -> Change:
    """Files changed under a manifest that vouches for them."""

    def apply(folder: Path) -> None:
        found = json.loads((folder / "manifest.json").read_bytes())
        files = {name: (folder / name).read_bytes() for name in found["files"]}
        change(files)
        storage.write_folder(folder, files, {"step": found["step"]})

    return apply


def state(**values: Any) -> Change:
    def change(files: dict[str, bytes]) -> None:
        files["state.json"] = json.dumps(json.loads(files["state.json"]) | values).encode()

    return rewritten(change)


def _copy(source: str, to: str) -> Callable[[dict[str, bytes]], object]:
    return lambda files: files.update({to: files[source]})


CHECKPOINTS: list[tuple[str, Change, str, str]] = [
    ("flip", flip("actor.safetensors"), "E-CKPT-HASH", "sha256"),
    ("flip-state", flip("state.json"), "E-CKPT-HASH", "state.json"),
    ("flip-manifest", flip("manifest.json"), "E-CKPT-MANIFEST", "manifest.json"),
    ("zeros", zeros("critic_optimizer.safetensors"), "E-CKPT-HASH", "critic_optimizer.safetensors"),
    ("cut", cut("actor.safetensors"), "E-CKPT-SIZE", "actor.safetensors"),
    ("appended", append("critic.safetensors"), "E-CKPT-SIZE", "critic.safetensors"),
    ("no-actor", remove("actor.safetensors"), "E-CKPT-MISSING", "actor.safetensors"),
    ("no-optimizer", remove("actor_optimizer.safetensors"), "E-CKPT-MISSING", "actor_optimizer.safetensors"),
    ("no-critic", remove("critic.safetensors"), "E-CKPT-MISSING", "critic.safetensors"),
    ("no-state", remove("state.json"), "E-CKPT-MISSING", "state.json"),
    ("no-manifest", remove("manifest.json"), "E-CKPT-MANIFEST", "manifest"),
    ("empty", lambda f: [path.unlink() for path in f.iterdir()], "E-CKPT-MANIFEST", "manifest"),
    ("never-had-critic", rewritten(lambda f: f.pop("critic.safetensors")), "E-CKPT-MISSING", "critic.safetensors"),
    ("never-had-optimizer", rewritten(lambda f: f.pop("critic_optimizer.safetensors")), "E-CKPT-MISSING", "critic_opt"),
    ("never-had-state", rewritten(lambda f: f.pop("state.json")), "E-CKPT-MISSING", "state.json"),
    ("no-beta", state(values={}), "E-CKPT-MISSING", "beta"),
    ("state-list", rewritten(lambda f: f.update({"state.json": b"[]"})), "E-CKPT-FORMAT", "state.json"),
    ("state-empty", rewritten(lambda f: f.update({"state.json": b""})), "E-CKPT-FORMAT", "state.json"),
    ("state-deep", rewritten(lambda f: f.update({"state.json": b"[" * 100_000})), "E-CKPT-FORMAT", "state.json"),
    ("another-seed", state(seed=99), "E-CKPT-SETTINGS", "seed was 99, is 3"),
    ("another-step", state(step=77), "E-CKPT-SETTINGS", "step was 77"),
    ("actor-as-critic", rewritten(_copy("actor.safetensors", "critic.safetensors")), "E-CKPT-ROLE", "critic"),
    ("critic-as-actor", rewritten(_copy("critic.safetensors", "actor.safetensors")), "E-CKPT-ROLE", "actor"),
    (
        "pickle",
        rewritten(lambda f: f.update({"actor.safetensors": b"\x80\x04."})),
        "E-CKPT-FORMAT",
        "actor.safetensors",
    ),
    ("version", manifest(lambda m: m.update(version=99)), "E-CKPT-VERSION", "99"),
    ("version-text", manifest(lambda m: m.update(version="1")), "E-CKPT-VERSION", "manifest.json"),
    ("name-up", named("../../etc/passwd"), "E-CKPT-PATH", "etc/passwd"),
    ("name-absolute", named("/etc/passwd"), "E-CKPT-PATH", "/etc/passwd"),
    ("name-zero", named("a\0b"), "E-CKPT-PATH", "plain file name"),
    ("name-long", named("a" * 300), "E-CKPT-PATH", "plain file name"),
    ("size-text", manifest(lambda m: m["files"]["actor.safetensors"].update(size="1")), "E-CKPT-SIZE", "actor"),
    ("files-list", manifest(lambda m: m.update(files=[])), "E-CKPT-MANIFEST", "manifest.json"),
    ("million-entries", million, "E-CKPT-SIZE", "manifest.json"),
    ("manifest-1-gib", sparse("manifest.json", 1 << 30, b"{"), "E-CKPT-SIZE", "manifest.json"),
    ("manifest-deep", put("manifest.json", "[" * 100_000), "E-CKPT-MANIFEST", "manifest.json"),
    ("link", link("actor.safetensors"), "E-CKPT-PATH", "link"),
    ("link-manifest", link("manifest.json"), "E-CKPT-PATH", "link"),
    ("link-passwd", lambda f: (f / "x").symlink_to("/etc/passwd"), "E-CKPT-PATH", "link"),
    ("pipe", lambda f: [(f / "state.json").unlink(), os.mkfifo(f / "state.json")], "E-CKPT-PATH", "state.json"),
    ("unnamed-pickle", put("extra.pt", "x"), "E-CKPT-MANIFEST", "extra.pt"),
]


def beside(name: str, content: str | bytes) -> Change:
    """A file of the stopped PPO's own folder."""
    return lambda folder: write(world(folder) / "runs/tiny" / name, content)


def lineage(**values: Any) -> Change:
    def make(folder: Path) -> None:
        path = world(folder) / "runs/tiny/ppo/lineage.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | values))

    return make


# What only helps is never an error: a lineage that can't be read is an unknown one, hashes are computed again.
CASES += [
    Case(f"status-{name}", change, "status recipe.toml --ppo.steps 40", "", place, 8)
    for name, change, place in [
        ("lineage-not-json", beside("ppo/lineage.json", "{"), "stale"),
        ("lineage-deep", beside("ppo/lineage.json", "[" * 100_000), "stale"),
        ("lineage-list", beside("ppo/lineage.json", "[]"), "stale"),
        ("lineage-settings", lineage(settings=[1]), "stale"),
        ("lineage-data", lineage(data={"a": 1}), "stale"),
        ("lineage-items", lineage(data={"a": [{"sha256": 1}]}), "stale"),
        ("lineage-parents", lineage(parents=[1]), "stale"),
        ("lineage-key", lineage(key=7), "stale"),
        ("lineage-nothing-changed", lineage(), "stopped"),
        ("hashes-deep", beside(".cache/hashes.json", "[" * 100_000), "stopped"),
        ("hashes-list", beside(".cache/hashes.json", "[1]"), "stopped"),
        ("hashes-items", beside(".cache/hashes.json", '{"a": 1}'), "stopped"),
    ]
]
CASES += [Case(f"checkpoint-{name}", steps(change), RESUME, code, place) for name, change, code, place in CHECKPOINTS]
CROWDED = "[" + "{}," * 5_000_000 + "0]"
CASES += [
    Case("crowded-config", hf(put("config.json", CROWDED[: 8 << 20])), GENERATE, "E-MODEL-FORMAT", "more parts"),
    Case("crowded-tokenizer", hf(put("tokenizer.json", CROWDED)), GENERATE, "E-MODEL-TOKENIZER", "more parts"),
    Case(
        "crowded-numbers",
        hf(put("tokenizer.json", "[" + "0," * 20_000_000 + "0]")),
        GENERATE,
        "E-MODEL-TOKENIZER",
        "more parts",
    ),
    Case("crowded-header", hf(header_text(lambda h: CROWDED[: 2 << 20])), GENERATE, "E-CKPT-FORMAT", "safetensors"),
    Case(
        "crowded-header-names",
        hf(header_text(lambda h: "{" + ",".join(f'"{i}":[]' for i in range(160_000)) + "}")),
        GENERATE,
        "E-CKPT-FORMAT",
        "safetensors",
    ),
    Case("crowded-manifest", steps(put("manifest.json", CROWDED)), RESUME, "E-CKPT-MANIFEST", "manifest.json"),
    Case("hub offline", lambda folder: None, "chat me/nothing", "E-MODEL-HUB", "hf download me/nothing"),
    Case("hub name", lambda folder: None, "score hf://nothing --data x", "E-MODEL-MISSING", "names no model"),
    # These end well: they resume, or sample, and so import torch.
    Case(
        "checkpoint-before",
        steps(flip("actor.safetensors"), newest_alone=True),
        "ppo recipe.toml --ppo.steps 40",
        "",
        "was passed over",
        60,
        2000,
    ),
    Case("own-world-writable", ours(lambda f: f.chmod(0o777)), SFT, "", "can be changed by, another user", 30, 2000),
]
