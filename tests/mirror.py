"""A small hub on this machine, with as much of its protocol as the real client asks for: listings, files with their
headers, ranges, redirects, refusals. Tests say what goes wrong."""

import hashlib
import json
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Event, Thread
from typing import Any

import pytest

COMMIT = "0" * 39 + "1"
_API = re.compile(r"/api/(models|datasets)/(\w+/[\w-]+)(?:/(revision|tree)/([^/]+))?")
_FILE = re.compile(r"/(datasets/)?(\w+/[\w-]+)/resolve/([^/]+)/(.+)")


@dataclass
class Mirror:
    """repos: files by name, by repository ("datasets/" before that of a data set). gated: repositories whose files are
    refused; private: those that don't exist without a token. renamed: their new names, where the old ones lead by a
    relative redirect. elsewhere: files lie at another address, as those of a CDN. breaks: the bytes after which the
    server closes, each once, by file. damaged: files whose content is not that of their hash. pause:
    seconds after half a MiB."""

    repos: dict[str, Mapping[str, bytes]] = field(default_factory=dict)
    gated: set[str] = field(default_factory=set)
    private: set[str] = field(default_factory=set)
    renamed: dict[str, str] = field(default_factory=dict)
    elsewhere: bool = False
    breaks: dict[str, list[int]] = field(default_factory=dict)
    damaged: set[str] = field(default_factory=set)
    pause: float = 0.0
    agents: set[str] = field(default_factory=set)
    revisions: set[str] = field(default_factory=set)
    log: list[tuple[str, str, str]] = field(default_factory=list)
    """(method, path, range)"""
    url: str = ""

    def taken(self) -> list[str]:
        """The names of the files that were sent, or a part of them."""
        return [path.rpartition("/")[2] for method, path, _ in self.log if method == "GET" and "/api/" not in path]


class Answer(BaseHTTPRequestHandler):
    def __init__(self, mirror: Mirror, *args: Any) -> None:
        self.mirror = mirror
        super().__init__(*args)

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        path, m = self.path.partition("?")[0], self.mirror
        m.log.append((self.command, path, self.headers.get("Range", "")))
        if match := _API.fullmatch(path):
            name = match[2] if match[1] == "models" else f"datasets/{match[2]}"
            self.listing(name, match[3], match[4] or "main")
        elif match := _FILE.fullmatch(path):
            self.file((match[1] or "") + match[2], match[3], match[4])
        elif path.startswith("/cdn/"):
            _, _, owner, name, file = path.split("/", 4)
            self.content(file, m.repos[f"{owner}/{name}"][file], {})
        else:
            self.send(404, {})

    def refused(self, name: str, revision: str) -> bool:
        m = self.mirror
        known = name in m.repos and not (name in m.private and not self.headers.get("Authorization"))
        if name in m.renamed:
            self.send(307, {"Location": self.path.replace(name, m.renamed[name])})
        elif not known:
            self.send(401 if name in m.private else 404, {"X-Error-Code": "RepoNotFound"})
        elif revision not in ("main", COMMIT):
            self.send(404, {"X-Error-Code": "RevisionNotFound"})
        else:
            return False
        return True

    def listing(self, name: str, kind: str, revision: str) -> None:
        if self.refused(name, revision):
            return
        entries = []
        for path, content in self.mirror.repos[name].items():
            sha256 = hashlib.sha256(content).hexdigest()
            lfs = {"oid": sha256, "sha256": sha256, "size": len(content), "pointerSize": 100}
            entry = {"type": "file", "path": path, "rfilename": path, "size": len(content), "oid": "x"}
            entries.append(entry | ({"lfs": lfs} if path.endswith(".safetensors") else {}))
        about = {"id": name, "sha": COMMIT, "siblings": entries, "private": False, "tags": [], "downloads": 0}
        body = json.dumps(entries if kind == "tree" else about | {"likes": 0}).encode()
        self.send(200, {"Content-Type": "application/json"}, body)

    def file(self, name: str, revision: str, path: str) -> None:
        if self.refused(name, revision):
            return
        if name in self.mirror.gated and self.headers.get("Authorization") != "Bearer hf_good":
            self.send(403 if self.headers.get("Authorization") else 401, {"X-Error-Code": "GatedRepo"})
            return
        content = self.mirror.repos[name].get(path)
        if content is None:
            self.send(404, {"X-Error-Code": "EntryNotFound", "X-Repo-Commit": COMMIT})
            return
        headers = {"X-Repo-Commit": COMMIT, "ETag": f'"{hashlib.sha1(content).hexdigest()}"'}
        if path.endswith(".safetensors"):
            headers["X-Linked-Etag"] = f'"{hashlib.sha256(content).hexdigest()}"'
            headers["X-Linked-Size"] = str(len(content))
        if self.mirror.elsewhere:
            self.send(
                302, headers | {"Location": f"{self.mirror.url}/cdn/{name}/{path}".replace("127.0.0.1", "localhost")}
            )
            return
        self.content(path, content, headers)

    def content(self, path: str, content: bytes, headers: Mapping[str, str]) -> None:
        m, status, start, headers = self.mirror, 200, 0, {**headers, "Accept-Ranges": "bytes"}
        if path in m.damaged:
            content = content[:-1] + bytes([content[-1] ^ 1])
        if match := re.fullmatch(r"bytes=(\d+)-", self.headers.get("Range", "")):
            status, start = 206, int(match[1])
            headers["Content-Range"] = f"bytes {start}-{len(content) - 1}/{len(content)}"
        cut = m.breaks[path].pop(0) if self.command == "GET" and m.breaks.get(path) else None
        self.send(status, headers, content[start:], cut)

    def send(self, status: int, headers: Mapping[str, str], body: bytes = b"", cut: int | None = None) -> None:
        self.send_response(status)
        for name, value in {**headers, "Content-Length": str(len(body))}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command == "GET":
            with suppress(ConnectionError):  # the client may be stopped
                for start in range(0, len(body[:cut]), 1 << 19):
                    self.wfile.write(body[:cut][start : start + (1 << 19)])
                    Event().wait(self.mirror.pause)

    def log_message(self, *_: Any) -> None:
        pass


@contextmanager
def serving(mirror: Mirror, answer: type["Answer"] | None = None) -> Iterator[Mirror]:
    """answer: whose protocol it speaks; Hugging Face's without one."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(answer or Answer, mirror))
    mirror.url = f"http://127.0.0.1:{server.server_port}"
    thread = Thread(target=server.serve_forever, args=(0.01,), daemon=True)
    thread.start()
    try:
        yield mirror
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def use(monkeypatch: pytest.MonkeyPatch, url: str, home: Path, *, offline: bool = False) -> None:
    """The client of this process, which reads its environment once, uses this hub and this cache."""
    from huggingface_hub import constants

    for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN"):
        monkeypatch.delenv(name, raising=False)
    values = {"ENDPOINT": url, "HF_HUB_CACHE": str(home), "HF_HUB_OFFLINE": offline, "HF_HUB_DISABLE_XET": True}
    values |= {"HUGGINGFACE_CO_URL_TEMPLATE": url + "/{repo_id}/resolve/{revision}/{filename}"}
    values |= {"HF_TOKEN_PATH": str(home / "token"), "HF_HUB_DISABLE_TELEMETRY": True, "HF_HUB_ETAG_TIMEOUT": 2}
    values |= {"DOWNLOAD_CHUNK_SIZE": 100}  # what came before a break is kept in whole chunks
    for name, value in values.items():
        monkeypatch.setattr(constants, name, value)


def environment(url: str, home: Path, **more: str) -> dict[str, str]:
    """That of a process of its own."""
    own = {"HF_ENDPOINT": url, "HF_HOME": str(home), "HF_HUB_OFFLINE": "0", "TRANSFORMERS_OFFLINE": "0"}
    return own | {"HF_HUB_DISABLE_TELEMETRY": "1", "HF_HUB_DISABLE_XET": "1", "HF_HUB_ETAG_TIMEOUT": "2"} | more
