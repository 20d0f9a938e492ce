"""Datasets by name: the real client against a small hub on this machine, in processes of their own, since the client
reads its environment once. Nothing is asked of any other address."""

import hashlib
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from typing import Any

import pytest

from tetrad.data.hub import fetch
from tetrad.data.source import SUFFIXES
from tetrad.data.source import files as source_files
from tetrad.errors import UserError

ROW = b'{"instruction": "a", "output": "b"}\n'
REPOS = {
    "me/one": {"README.md": b"# one", "train.jsonl": ROW * 3, "dataset_infos.json": b"{}"},
    "me/split": {"data/train-0.jsonl": ROW * 2, "data/train-1.jsonl": ROW, "data/test-0.jsonl": ROW * 5},
    "me/none": {"README.md": b"# none"},
}
COMMIT = "0" * 39 + "1"
asked: list[str] = []


class Hub(BaseHTTPRequestHandler):
    """As much of the hub as the client asks for when it lists and downloads a dataset."""

    def do_HEAD(self) -> None:
        self.answer(body=False)

    def do_GET(self) -> None:
        self.answer(body=True)

    def answer(self, *, body: bool) -> None:
        path = self.path.partition("?")[0].strip("/").split("/")
        asked.append(self.path)
        if path[:2] == ["api", "datasets"] and (files := REPOS.get("/".join(path[2:4]))) is not None:
            entries = [
                {"type": "file", "path": p, "size": len(c), "oid": "x", "rfilename": p} for p, c in files.items()
            ]
            told: Any = entries if path[4:5] == ["tree"] else self.info("/".join(path[2:4]), entries)
            self.send(json.dumps(told).encode(), {"Content-Type": "application/json"}, body)
        elif path[:1] == ["datasets"] and path[3:4] == ["resolve"]:
            content = REPOS["/".join(path[1:3])]["/".join(path[5:])]
            tag = hashlib.sha1(content).hexdigest()
            self.send(content, {"ETag": f'"{tag}"', "X-Repo-Commit": COMMIT, "Accept-Ranges": "bytes"}, body)
        else:
            self.send_response(404)
            self.send_header("X-Error-Code", "RepoNotFound")
            self.send_header("Content-Length", "0")
            self.end_headers()

    @staticmethod
    def info(name: str, entries: list[dict[str, Any]]) -> dict[str, Any]:
        return {
            "id": name,
            "sha": COMMIT,
            "siblings": entries,
            "private": False,
            "tags": [],
            "downloads": 0,
            "likes": 0,
        }

    def send(self, content: bytes, headers: dict[str, str], body: bool) -> None:
        self.send_response(200)
        for name, value in {**headers, "Content-Length": str(len(content))}.items():
            self.send_header(name, value)
        self.end_headers()
        if body:
            self.wfile.write(content)

    def log_message(self, *_: Any) -> None:
        pass


@pytest.fixture(scope="module")
def endpoint() -> Iterator[str]:
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()


def files(name: str, home: Path, endpoint: str, **environment: str) -> str:
    """What `source.files` gives, or the error, in a process of its own."""
    code = "import time\ntime.sleep = lambda seconds: None\n"  # the client's pauses between its attempts
    code += "import sys\nfrom tetrad.data.source import files\nfrom tetrad.errors import UserError\n"
    code += "try:\n    [print(p.name, p.stat().st_size) for p in files(sys.argv[1:])]\n"
    code += "except UserError as error:\n    print(error)\n"
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("HF_", "TRANSFORMERS_"))}
    kept |= {"HF_HOME": str(home), "HF_ENDPOINT": endpoint, "HF_HUB_DISABLE_TELEMETRY": "1", "HF_HUB_DISABLE_XET": "1"}
    kept |= {"PYTHONPATH": os.pathsep.join(sys.path), "HF_HUB_ETAG_TIMEOUT": "2"}
    done = subprocess.run(
        [sys.executable, "-c", code, name], env={**kept, **environment}, capture_output=True, text=True, check=False
    )
    assert "Traceback" not in done.stderr, done.stderr
    return done.stdout


def test_a_dataset_is_downloaded_once_and_read_offline(tmp_path: Path, endpoint: str) -> None:
    assert files("hf://me/one", tmp_path, endpoint) == "train.jsonl 108\n"
    assert any("/resolve/" in path for path in asked) and not any("README" in path for path in asked)
    offline = files("hf://me/one", tmp_path, "http://127.0.0.1:9", HF_HUB_OFFLINE="1")
    assert offline == "train.jsonl 108\n"


def test_several_splits_want_a_glob(tmp_path: Path, endpoint: str) -> None:
    said = files("hf://me/split", tmp_path, endpoint)
    assert (
        "E-DATA-PATH" in said and "several splits: test, train" in said and "hf://me/split/data/*train*.jsonl" in said
    )
    named = files("hf://me/split/data/train-*.jsonl", tmp_path, endpoint)
    assert named == "train-0.jsonl 72\ntrain-1.jsonl 36\n"
    assert files("hf://me/split/data/*train*.jsonl", tmp_path, endpoint) == named
    assert "no file of 3 matches" in files("hf://me/split/*.csv", tmp_path, endpoint)


def test_what_is_not_there(tmp_path: Path, endpoint: str) -> None:
    assert "E-DATA-PATH" in files("hf://me/none", tmp_path, endpoint)
    unknown = files("hf://me/unknown", tmp_path, endpoint)
    assert "E-DATA-PATH" in unknown and "HF_TOKEN" in unknown
    dead = files("hf://me/one", tmp_path, "http://127.0.0.1:9")
    assert "E-DATA-HUB" in dead and "HF_HUB_OFFLINE=1" in dead and "HF_ENDPOINT" in dead
    never = files("hf://me/one", tmp_path, endpoint, HF_HUB_OFFLINE="1")
    assert "E-DATA-HUB" in never and "no downloaded copy" in never


@pytest.mark.parametrize(
    "name", ["hf://", "hf://one", "hf://a b/c", "hf://me/one@", "hf://me/one//", "hf://../../etc", "hf://a/.."]
)
def test_names_that_are_none(name: str) -> None:
    with pytest.raises(UserError, match=r"E-DATA-PATH.*names no dataset"):
        fetch(name, SUFFIXES)


def test_modelscope_has_none_for_us() -> None:
    """Models alone are asked for there."""
    with pytest.raises(UserError, match=r"E-DATA-PATH\] ms://me/one: only models.*Fix: modelscope download --dataset"):
        source_files(["ms://me/one"])
