"""Models of ModelScope by name: its real client against a small server on this machine."""

import hashlib
import io
import logging
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import mirror
import modelscope_mirror
from served import write_model
from tetrad import console, hub, signals
from tetrad.errors import Stopped, UserError
from tetrad.inference import model_folder
from tetrad.inference.model_folder import snapshot
from tetrad.storage import sha256_file

WEIGHTS, NAME = "model.safetensors", "ms://me/tiny"
SMALL = {"config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json"}


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """Those of a language model, with more that a repository may hold."""
    folder = write_model(tmp_path_factory.mktemp("model")) / "model"
    content = {path.name: path.read_bytes() for path in folder.iterdir() if path.name != "manifest.json"}
    return content | {"README.md": b"# a", "pytorch_model.bin": b"pickle", "modeling.py": b"1/0", "onnx/a.json": b"{}"}


@pytest.fixture
def served(files: dict[str, bytes], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[mirror.Mirror]:
    logger, log = logging.getLogger("modelscope_hub"), io.StringIO()
    logger.setLevel(logging.INFO)
    logger.addHandler(handler := logging.StreamHandler(log))
    with mirror.serving(mirror.Mirror({"me/tiny": files}), modelscope_mirror.Answer) as server:
        modelscope_mirror.use(monkeypatch, server.url, tmp_path)
        modelscope_mirror.no_pauses(monkeypatch)
        monkeypatch.chdir(tmp_path)
        yield server
        for _, path, _ in server.log:  # nothing but the repository is asked for
            assert "/me/" in path or "/" not in path[1:], path
    snapshot.cache_clear()
    logger.removeHandler(handler)
    assert log.getvalue() == ""


def offline(monkeypatch: pytest.MonkeyPatch) -> None:
    """As a new process begins without a network."""
    from huggingface_hub import constants

    snapshot.cache_clear()
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)


def refusal(name: str = NAME) -> UserError:
    with pytest.raises(UserError) as caught:
        model_folder.model_folder(name)
    return caught.value


def test_what_is_taken_and_from_where(
    served: mirror.Mirror, files: dict[str, bytes], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """Only what is read, the small files first, into the client's own folder; nothing is printed or told of us."""
    folder = model_folder.model_folder(NAME)
    assert folder == tmp_path / "cache/models/me--tiny/snapshots/master"
    assert {path.name for path in folder.iterdir()} == set(served.taken()) == SMALL | {WEIGHTS}
    assert served.taken()[-2:] == ["config.json", WEIGHTS]  # without config.json the folder is no copy
    assert all((folder / name).read_bytes() == files[name] for name in SMALL | {WEIGHTS})
    sums = model_folder.hub_sha256(NAME, folder, sha256_file)
    assert sums == {name: hashlib.sha256(files[name]).hexdigest() for name in SMALL | {WEIGHTS}}
    assert model_folder.check(folder).facts.config.layers
    assert [path for _, path, _ in served.log].count("/api/v1/models/me/tiny/repo/files") == 1
    assert all(f"session_id/{'0' * 32}" in agent for agent in served.agents)
    assert not (tmp_path / "settings").exists() and capfd.readouterr() == ("", "")


def test_which_hub(served: mirror.Mirror, monkeypatch: pytest.MonkeyPatch) -> None:
    """ms:// and hf:// say it; without either USE_MODELSCOPE_HUB does."""
    assert hub.is_model(NAME) and hub.full_name("me/tiny") == "hf://me/tiny"
    assert "cannot be reached" in refusal("me/tiny").what and not served.log  # no Hugging Face is here
    monkeypatch.setenv("USE_MODELSCOPE_HUB", "1")
    assert hub.full_name("me/tiny@v1") == "ms://me/tiny@v1" and hub.full_name("hf://me/tiny") == "hf://me/tiny"
    assert (model_folder.model_folder("me/tiny@v1") / WEIGHTS).is_file() and served.revisions == {"v1"}
    served.log.clear()
    assert "HF_ENDPOINT" in refusal("hf://me/tiny").hint and not served.log


def test_what_is_here_is_never_asked_for_again(served: mirror.Mirror, monkeypatch: pytest.MonkeyPatch) -> None:
    first = model_folder.model_folder(NAME)
    served.log.clear()
    snapshot.cache_clear()
    assert model_folder.model_folder(NAME) == first and not served.log
    offline(monkeypatch)
    assert model_folder.model_folder(NAME) == first and not served.log
    assert "--revision v1" in refusal(NAME + "@v1").hint and not served.log  # another revision is not here


def test_a_copy_that_the_client_itself_made(served: mirror.Mirror, monkeypatch: pytest.MonkeyPatch) -> None:
    from modelscope_hub import HubApi, HubConfig

    with pytest.warns(FutureWarning, match="MODELSCOPE_DOMAIN"):
        config = HubConfig(token="")
    logging.getLogger("modelscope_hub").setLevel(logging.CRITICAL)
    monkeypatch.setattr(HubConfig, "get_session_id", lambda _: "0" * 32)
    HubApi(config).download_repo("me/tiny", "model")
    served.log.clear()
    offline(monkeypatch)
    assert (model_folder.model_folder(NAME) / "README.md").is_file() and not served.log


@pytest.mark.parametrize("place", ["models/me/ti___ny", "hub/models/me/ti___ny"])
def test_a_copy_of_an_older_client(
    place: str, served: mirror.Mirror, files: dict[str, bytes], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It names no revision, and so is none that is named."""
    served.repos["me/ti.ny"] = files
    folder = tmp_path / "cache" / place
    folder.mkdir(parents=True)
    for name in SMALL | {WEIGHTS}:
        (folder / name).write_bytes(files[name])
    assert model_folder.model_folder("ms://me/ti.ny") == folder and not served.log
    assert model_folder.model_folder("ms://me/ti.ny@v1").name == "v1" and served.taken()


def test_only_the_small_files_where_no_weight_is_read(served: mirror.Mirror) -> None:
    snapshot(NAME, weights=False)
    assert set(served.taken()) == SMALL
    served.log.clear()
    assert (snapshot(NAME) / WEIGHTS).is_file() and served.taken() == [WEIGHTS]


def test_small_files_of_which_some_are_missing_are_no_copy(served: mirror.Mirror) -> None:
    served.breaks = {"tokenizer_config.json": [0] * 20}
    with pytest.raises(UserError, match="E-MODEL-HUB"):
        snapshot(NAME, weights=False)
    served.breaks.clear()
    assert (snapshot(NAME, weights=False) / "tokenizer_config.json").is_file()


def test_a_broken_download_goes_on(served: mirror.Mirror, files: dict[str, bytes]) -> None:
    """In the same command, and in the next one from where the last one stopped for good."""
    served.breaks = {WEIGHTS: [1000, 500, *[0] * 20]}
    error = refusal()
    assert error.code == "E-MODEL-HUB" and "cannot be reached" in error.what and "run it again" in error.hint
    assert "IncompleteRead" in error.what and error.what.isascii()  # the client's own words are Chinese
    assert [part for _, path, part in served.log if path.endswith(WEIGHTS)][:3] == ["", "bytes=1000-", "bytes=1500-"]
    served.breaks.clear()
    served.log.clear()
    folder = model_folder.model_folder(NAME)
    assert [(path, part) for _, path, part in served.log if "/api/" not in path] == [(f"/{WEIGHTS}", "bytes=1500-")]
    assert (folder / WEIGHTS).read_bytes() == files[WEIGHTS]


def test_weights_that_lie_elsewhere(
    served: mirror.Mirror, files: dict[str, bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    """At a CDN's address, which is not given the token."""
    monkeypatch.setenv("MODELSCOPE_API_TOKEN", modelscope_mirror.TOKEN)
    served.elsewhere, served.breaks = True, {WEIGHTS: [100]}
    assert (model_folder.model_folder(NAME) / WEIGHTS).read_bytes() == files[WEIGHTS]
    assert ("GET", f"/cdn/me/tiny/{WEIGHTS}", "bytes=100-") in served.log


def test_wrong_bytes(served: mirror.Mirror) -> None:
    """They are refused each time, and not kept."""
    served.damaged = {WEIGHTS}
    for _ in range(2):
        error = refusal()
        assert (error.code, error.where) == ("E-CKPT-HASH", "ms://me/tiny") and WEIGHTS in error.what
        assert not list(Path("cache").rglob(f"{WEIGHTS}*"))
    served.damaged = set()
    assert model_folder.check(model_folder.model_folder(NAME)).facts.files


@pytest.mark.parametrize(
    ("change", "name", "code", "words"),
    [
        ({"gated": {"me/tiny"}}, NAME, "E-MODEL-HUB", ["gated or private", "/models/me/tiny", "MODELSCOPE_API_TOKEN"]),
        ({"private": {"me/tiny"}}, NAME, "E-MODEL-MISSING", ["no such model for you", "MODELSCOPE_API_TOKEN"]),
        ({}, "ms://me/none", "E-MODEL-MISSING", ["no such model for you (Record not found)", "check the name"]),
        ({}, "ms://me/none@v1", "E-MODEL-MISSING", ["no such model for you"]),
        ({}, NAME + "@v2", "E-MODEL-MISSING", ["no revision v2", "/models/me/tiny"]),
        ({}, "ms://me", "E-MODEL-MISSING", ["names no model", "ms:// for ModelScope"]),
        ({}, "ms://../../etc/passwd", "E-MODEL-MISSING", ["names no model"]),
    ],
)
def test_refusals(change: dict[str, Any], name: str, code: str, words: list[str], served: mirror.Mirror) -> None:
    for key, value in change.items():
        setattr(served, key, value)
    error = refusal(name)
    assert (error.code, error.where, error.exit_code) == (code, name, 4)
    assert all(word in str(error) for word in words), str(error)


def test_a_login_that_is_a_pickle_is_not_read(served: mirror.Mirror, tmp_path: Path) -> None:
    (tmp_path / "settings/credentials").mkdir(parents=True)
    hostile = b"cbuiltins\nexec\n(Vopen('read', 'w')\ntR."
    (tmp_path / "settings/credentials/cookies").write_bytes(hostile)
    assert model_folder.model_folder(NAME) and not (tmp_path / "read").exists()


def test_a_token_opens_a_gated_one(served: mirror.Mirror, monkeypatch: pytest.MonkeyPatch) -> None:
    served.gated = {"me/tiny"}
    monkeypatch.setenv("MODELSCOPE_API_TOKEN", "ms-other")
    assert "gated" in refusal().what
    monkeypatch.setenv("MODELSCOPE_API_TOKEN", modelscope_mirror.TOKEN)
    assert (model_folder.model_folder(NAME) / WEIGHTS).is_file()


@pytest.mark.parametrize(
    ("changed", "code", "words"),
    [
        ({"config.json": b'{"architectures": ["MambaForCausalLM"]}'}, "E-MODEL-UNSUPPORTED", "MambaForCausalLM"),
        ({WEIGHTS: None}, "E-MODEL-MISSING", ".bin files to safetensors"),
    ],
)
def test_refused_before_the_weights(
    changed: dict[str, bytes | None], code: str, words: str, served: mirror.Mirror, files: dict[str, bytes]
) -> None:
    served.repos["me/tiny"] = {k: v for k, v in (files | changed).items() if v is not None}
    error = refusal()
    assert error.code == code and words in str(error) and not {WEIGHTS, "pytorch_model.bin"} & set(served.taken())


def test_offline_without_a_copy(served: mirror.Mirror, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nor is half a copy one."""
    snapshot(NAME, weights=False)
    served.log.clear()
    offline(monkeypatch)
    error = refusal()
    assert error.code == "E-MODEL-HUB" and "modelscope download me/tiny;" in error.hint
    assert "a part of one" in error.what and not served.log


def test_no_network(served: mirror.Mirror, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    modelscope_mirror.use(monkeypatch, "http://127.0.0.1:9", tmp_path / "other")
    error = refusal()
    assert error.code == "E-MODEL-HUB" and "cannot be reached" in error.what and "MODELSCOPE_ENDPOINT" in error.hint


def test_without_the_client(served: mirror.Mirror, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "modelscope_hub", None)
    monkeypatch.delitem(sys.modules, "modelscope_hub._download")
    error = refusal()
    assert error.code == "E-CONF-MISSING" and ".[modelscope]" in error.hint


def test_progress_and_a_stop(served: mirror.Mirror, files: dict[str, bytes], monkeypatch: pytest.MonkeyPatch) -> None:
    """On our console, in MiB; a stop is answered in the middle, and the next command goes on from there."""
    monkeypatch.setattr(console, "PHASE_SECONDS", 0.0)
    monkeypatch.setattr(console, "LINE_SECONDS", (0.0, 0.0))
    served.repos["me/tiny"], served.pause = files | {WEIGHTS: bytes(3 << 20)}, 0.1
    stop = threading.Timer(0.35, lambda: [tell() for tell in signals.on_stop_request])
    err = io.StringIO()
    with console.Console(err=err).in_use():
        stop.start()
        with pytest.raises(Stopped):
            snapshot(NAME)
    assert "downloading me/tiny, MiB 1/3" in err.getvalue() and not signals.on_stop_request
    served.log.clear()
    snapshot(NAME)
    assert [part != "" for _, path, part in served.log if path.endswith(WEIGHTS)] == [True]
