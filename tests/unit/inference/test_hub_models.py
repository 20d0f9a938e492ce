"""Models by name: the real client against a small hub on this machine; nothing is asked of any other address."""

import hashlib
import io
import json
import os
import socket
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import mirror
from served import write_model
from tetrad import console, hub, signals
from tetrad.errors import Stopped, UserError
from tetrad.inference import model_folder
from tetrad.inference.model_folder import snapshot
from tetrad.storage import sha256_file

WEIGHTS = "model.safetensors"


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """Those of a language model, with more that a repository may hold."""
    folder = write_model(tmp_path_factory.mktemp("model")) / "model"
    content = {path.name: path.read_bytes() for path in folder.iterdir() if path.name != "manifest.json"}
    return content | {"README.md": b"# a", "pytorch_model.bin": b"pickle", "modeling.py": b"1/0", "onnx/a.json": b"{}"}


@pytest.fixture
def served(files: dict[str, bytes], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[mirror.Mirror]:
    with mirror.serving(mirror.Mirror({"me/tiny": files})) as hub:
        mirror.use(monkeypatch, hub.url, tmp_path / "cache")
        monkeypatch.chdir(tmp_path)
        monkeypatch.setattr("time.sleep", lambda _: None)  # the client's pauses between its attempts
        yield hub
    forget()


def forget() -> None:
    """As a new process begins."""
    snapshot.cache_clear()


def offline(monkeypatch: pytest.MonkeyPatch) -> None:
    from huggingface_hub import constants

    forget()
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)


def refusal(name: str) -> UserError:
    with pytest.raises(UserError) as caught:
        model_folder.model_folder(name)
    return caught.value


def test_what_is_taken_and_from_where(served: mirror.Mirror, files: dict[str, bytes]) -> None:
    """Only what is read: no pickle, no code, nothing of folders; and the cache's folder is that of the commit."""
    folder = model_folder.model_folder("me/tiny")
    assert folder.name == mirror.COMMIT
    wanted = {"config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json", WEIGHTS}
    assert {path.name for path in folder.iterdir()} == set(served.taken()) == wanted
    assert served.taken()[-1] == WEIGHTS  # the small files decide whether it is wanted at all
    assert all((folder / name).read_bytes() == files[name] for name in wanted)
    sums = model_folder.hub_sha256("me/tiny", folder, sha256_file)
    assert sums == {name: hashlib.sha256(files[name]).hexdigest() for name in wanted}
    assert model_folder.check(folder).facts.config.layers


def test_what_is_here_is_never_asked_for_again(served: mirror.Mirror, monkeypatch: pytest.MonkeyPatch) -> None:
    first = model_folder.model_folder("hf://me/tiny")
    served.log.clear()
    forget()
    assert model_folder.model_folder("me/tiny") == first and not served.log
    assert model_folder.model_folder(f"me/tiny@{mirror.COMMIT}") == first and not served.log
    offline(monkeypatch)
    assert model_folder.model_folder("me/tiny@main") == first and not served.log


def test_only_the_small_files_where_no_weight_is_read(served: mirror.Mirror) -> None:
    snapshot("me/tiny", weights=False)
    assert WEIGHTS not in served.taken() and "tokenizer.json" in served.taken()
    served.log.clear()
    assert (snapshot("me/tiny") / WEIGHTS).is_file()
    assert served.taken() == [WEIGHTS]


def test_a_broken_download_goes_on(served: mirror.Mirror, files: dict[str, bytes]) -> None:
    served.breaks = {WEIGHTS: [1000, 500]}
    folder = model_folder.model_folder("me/tiny")
    ranges = [part for _, path, part in served.log if path.endswith(WEIGHTS) and part]
    assert ranges == ["bytes=1000-", "bytes=1500-"]
    assert (folder / WEIGHTS).read_bytes() == files[WEIGHTS]


def test_a_download_that_breaks_off_for_good(served: mirror.Mirror, files: dict[str, bytes]) -> None:
    served.breaks = {WEIGHTS: [0] * 20}
    error = refusal("me/tiny")
    assert error.code == "E-MODEL-HUB" and "cannot be reached" in error.what and "run it again" in error.hint
    served.breaks.clear()
    served.log.clear()
    model_folder.model_folder("me/tiny")
    assert served.taken() == [WEIGHTS]  # whole files stayed


@pytest.mark.parametrize("way", ["elsewhere", "renamed"])
def test_redirects(way: str, served: mirror.Mirror, files: dict[str, bytes]) -> None:
    """To an absolute address, as a CDN's, and to a relative one, as of a repository with a new name."""
    served.elsewhere, name = way == "elsewhere", "me/tiny"
    if way == "renamed":
        served.renamed, name = {"me/old": "me/tiny"}, "me/old"
    served.breaks = {WEIGHTS: [100]}
    folder = model_folder.model_folder(name)
    assert (folder / WEIGHTS).read_bytes() == files[WEIGHTS]
    assert any("/cdn/" in path and part == "bytes=100-" for _, path, part in served.log) == served.elsewhere


def test_wrong_bytes(served: mirror.Mirror) -> None:
    """They are seen each time, until the file that is named is deleted."""
    served.damaged = {WEIGHTS}
    for _ in range(2):
        error = refusal("me/tiny")
        assert (error.code, error.where) == ("E-CKPT-HASH", "me/tiny") and error.what.startswith(WEIGHTS)
        forget()
    served.damaged = set()
    Path(error.hint.removeprefix("delete ").partition(" and run")[0]).unlink()
    assert model_folder.check(model_folder.model_folder("me/tiny")).facts.files


@pytest.mark.parametrize(
    ("change", "name", "code", "words"),
    [
        ({"gated": {"me/tiny"}}, "me/tiny", "E-MODEL-HUB", ["gated", "/me/tiny", "HF_TOKEN", "/settings/tokens"]),
        ({"private": {"me/tiny"}}, "me/tiny", "E-MODEL-MISSING", ["no such model for you", "HF_TOKEN"]),
        ({}, "me/none", "E-MODEL-MISSING", ["no such model for you", "check the name", "path of a folder"]),
        ({}, "hf://me/none", "E-MODEL-MISSING", ["no such model for you"]),
        ({}, "me/tiny@v2", "E-MODEL-MISSING", ["no revision v2", "/me/tiny"]),
        ({}, "hf://me", "E-MODEL-MISSING", ["names no model", "hf://OWNER/NAME@REVISION"]),
        ({}, "hf://../../etc/passwd", "E-MODEL-MISSING", ["names no model"]),
    ],
)
def test_refusals(change: dict[str, Any], name: str, code: str, words: list[str], served: mirror.Mirror) -> None:
    for key, value in change.items():
        setattr(served, key, value)
    error = refusal(name)
    assert (error.code, error.where, error.exit_code) == (code, error.where, 4)
    assert error.where.removeprefix("hf://") == name.removeprefix("hf://")
    assert all(word in str(error) for word in words), str(error)


def test_a_token_opens_a_gated_one(served: mirror.Mirror, monkeypatch: pytest.MonkeyPatch) -> None:
    served.gated = {"me/tiny"}
    monkeypatch.setenv("HF_TOKEN", "hf_other")
    assert "gated" in refusal("me/tiny").what
    monkeypatch.setenv("HF_TOKEN", "hf_good")
    assert (model_folder.model_folder("me/tiny") / WEIGHTS).is_file()


@pytest.mark.parametrize(
    ("changed", "code", "words"),
    [
        ({"config.json": b'{"architectures": ["MambaForCausalLM"]}'}, "E-MODEL-UNSUPPORTED", "MambaForCausalLM"),
        ({WEIGHTS: None}, "E-MODEL-MISSING", ".bin files to safetensors"),
        ({"tokenizer.json": None}, "E-MODEL-MISSING", "AutoTokenizer"),
        ({"adapter_config.json": b"{}"}, "E-MODEL-UNSUPPORTED", "merge_and_unload"),
    ],
)
def test_refused_before_the_weights(
    changed: dict[str, bytes | None], code: str, words: str, served: mirror.Mirror, files: dict[str, bytes]
) -> None:
    served.repos["me/tiny"] = {k: v for k, v in (files | changed).items() if v is not None}
    error = refusal("me/tiny")
    assert (error.code, error.where) == (code, "me/tiny") and words in str(error)
    assert not {name for name in served.taken() if name.endswith((".safetensors", ".bin"))}


def test_offline_without_a_copy(served: mirror.Mirror, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nor is half a copy one."""
    offline(monkeypatch)
    error = refusal("me/tiny@v1")
    assert error.code == "E-MODEL-HUB" and "hf download me/tiny --revision v1" in error.hint and not served.log
    monkeypatch.undo()


def test_offline_with_half_a_copy(served: mirror.Mirror, monkeypatch: pytest.MonkeyPatch) -> None:
    snapshot("me/tiny", weights=False)
    offline(monkeypatch)
    assert "a part of one" in refusal("me/tiny").what
    assert snapshot("me/tiny", weights=False).name == mirror.COMMIT


def test_no_network(served: mirror.Mirror, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    mirror.use(monkeypatch, "http://127.0.0.1:9", tmp_path / "other")
    error = refusal("me/tiny")
    assert error.code == "E-MODEL-HUB" and "cannot be reached" in error.what and "HF_ENDPOINT" in error.hint


def test_shards_of_which_one_is_missing_are_completed(served: mirror.Mirror, files: dict[str, bytes]) -> None:
    index = {"weight_map": {"a": "model-1.safetensors", "b": "model-2.safetensors"}}
    shards = {"model-1.safetensors": b"1" * 10, "model-2.safetensors": b"2" * 10, "consolidated.safetensors": b"3"}
    rest = {name: content for name, content in files.items() if name != WEIGHTS}
    served.repos["me/tiny"] = rest | shards | {"model.safetensors.index.json": json.dumps(index).encode()}
    folder = snapshot("me/tiny")
    assert "consolidated.safetensors" not in served.taken()
    (folder / "model-2.safetensors").unlink()
    served.log.clear()
    forget()
    assert snapshot("me/tiny") == folder
    assert (folder / "model-2.safetensors").read_bytes() == b"2" * 10 and "model-1.safetensors" not in served.taken()


def test_a_folder_wins(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert hub.is_model("a/b") and hub.is_model("a/b@v1") and hub.is_model("hf://a/b")
    assert not any(map(hub.is_model, ["", "a", "./a/b", "/a/b", "a/b/c", "../b", "a b/c", "a/b/", "~/b"]))
    (tmp_path / "a").mkdir()
    assert not hub.is_model("a/b") and not hub.is_model("a/c") and hub.is_model("hf://a/b")  # a/c: a slip of the pen
    assert hub.is_model("b/c") and hub.is_model("b/c", tmp_path / "x")
    (tmp_path / "x/b/c").mkdir(parents=True)
    assert not hub.is_model("b/c", tmp_path / "x")


def test_no_connection_unless_a_name_asks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, run: Path) -> None:
    """Folders and runs, there or not."""

    def refuse(*_: Any) -> None:
        raise AssertionError("a connection was opened")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    monkeypatch.chdir(run.parent)
    assert model_folder.usable("tiny/ppo").facts.config
    for name in ("tiny/none", "tiny", str(run / "none"), os.path.join(".", "none", "x")):
        with pytest.raises(UserError, match="E-MODEL-MISSING"):
            model_folder.model_folder(name)


def in_pieces(served: mirror.Mirror, files: dict[str, bytes], monkeypatch: pytest.MonkeyPatch) -> None:
    """Three MiB of weights, half a MiB at a time, with pauses."""
    from huggingface_hub import constants

    served.repos["me/tiny"], served.pause = files | {WEIGHTS: bytes(3 << 20)}, 0.1
    monkeypatch.setattr(constants, "DOWNLOAD_CHUNK_SIZE", 1 << 18)


def test_progress(served: mirror.Mirror, files: dict[str, bytes], monkeypatch: pytest.MonkeyPatch) -> None:
    """On our console, in MiB, with the time left; the client's own bars and warnings never show."""
    monkeypatch.setattr(console, "PHASE_SECONDS", 0.0)
    monkeypatch.setattr(console, "LINE_SECONDS", (0.0, 0.0))
    in_pieces(served, files, monkeypatch)
    err = io.StringIO()
    with console.Console(err=err).in_use():
        snapshot("me/tiny")
    lines = [line for line in err.getvalue().splitlines() if line.startswith("downloading me/tiny, MiB")]
    assert any(line.startswith("downloading me/tiny, MiB 2/3") and line.endswith(" left") for line in lines), lines
    assert not any(" 4/3" in line or " 5/3" in line for line in lines), lines  # each byte once


def test_a_stop_ends_a_download(
    served: mirror.Mirror, files: dict[str, bytes], monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    in_pieces(served, files, monkeypatch)
    stop = threading.Timer(0.4, lambda: [tell() for tell in signals.on_stop_request])
    stop.start()
    with pytest.raises(Stopped):
        snapshot("me/tiny")
    assert not signals.on_stop_request and not list(Path("cache").rglob("*.incomplete"))
    assert capfd.readouterr().err == ""
