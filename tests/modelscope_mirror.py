"""A small ModelScope on this machine, with what the real client asks for: listings, files with ranges, revisions,
refusals. Any other request is answered by 404 and stands in the log."""

import hashlib
import json
import re
from pathlib import Path
from urllib.parse import parse_qs, urlsplit

import pytest

import mirror

TOKEN = "ms-good"
_API = re.compile(r"/api/v1/models/(\w+/[\w.-]+)/(repo/files|repo|revisions)")


class Answer(mirror.Answer):
    """Of a `Mirror`: gated are those whose files need a token that opens them, private those that need any."""

    def do_GET(self) -> None:
        url, m = urlsplit(self.path), self.mirror
        query = {key: values[0] for key, values in parse_qs(url.query).items()}
        match, path = _API.fullmatch(url.path), query.get("FilePath")
        m.log.append((self.command, f"/{path}" if path else url.path, self.headers.get("Range", "")))
        m.agents.add(self.headers.get("User-Agent", ""))
        m.revisions.update({query["Revision"]} if "Revision" in query else ())
        token = self.headers.get("Authorization", "").removeprefix("Bearer ")
        name, kind = (match[1], match[2]) if match else ("", "")
        if url.path.startswith("/cdn/"):
            assert not token and not self.headers.get("Cookie"), "a secret for another address"
            _, _, owner, name, file = url.path.split("/", 4)
            self.content(file, m.repos[f"{owner}/{name}"][file], {})
        elif name not in m.repos or (name in m.private and not token):
            self.reply(404, "Record not found")
        elif kind == "revisions":
            self.reply(200, {"RevisionMap": {"Branches": [{"Revision": "master"}], "Tags": []}})
        elif query["Revision"] not in ("master", "v1", mirror.COMMIT):
            self.reply(404, "the revision does not exist")
        elif kind == "repo/files":
            self.reply(200, {"Files": [entry(path, content) for path, content in m.repos[name].items()]})
        elif name in m.gated and token != TOKEN:
            self.reply(403 if token else 401, "no permission")
        elif path not in m.repos[name]:
            self.reply(404, "no such file")
        elif m.elsewhere and path == "model.safetensors":
            place = m.url.replace("127.0.0.1", "localhost")
            self.send(302, {"Location": f"{place}/cdn/{name}/{path}"})
        else:
            self.content(path, m.repos[name][path], {})

    def reply(self, status: int, data: object) -> None:
        known = {"Data": data, "Success": True} if status == 200 else {"Message": data, "Success": False}
        self.send(status, {"Content-Type": "application/json"}, json.dumps({"Code": status, **known}).encode())


def entry(path: str, content: bytes) -> dict[str, object]:
    """One of a listing."""
    about = {"Name": path.rpartition("/")[2], "Path": path, "Type": "blob", "Revision": mirror.COMMIT, "IsLFS": False}
    return about | {"Size": len(content), "Sha256": hashlib.sha256(content).hexdigest(), "CommittedDate": 1}


def use(monkeypatch: pytest.MonkeyPatch, url: str, home: Path, *, offline: bool = False) -> None:
    """The clients of this process use this ModelScope, this cache, and no Hugging Face."""
    mirror.use(monkeypatch, "http://127.0.0.1:9", home / "huggingface", offline=offline)
    for name in ("MODELSCOPE_API_TOKEN", "MODELSCOPE_ENDPOINT", "USE_MODELSCOPE_HUB"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("MODELSCOPE_DOMAIN", url)
    monkeypatch.setenv("MODELSCOPE_CACHE", str(home / "cache"))
    monkeypatch.setenv("MODELSCOPE_HOME", str(home / "settings"))


def no_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    """Between the client's attempts."""
    import modelscope_hub._download as client

    monkeypatch.setattr("time.sleep", lambda _: None)
    monkeypatch.setattr(client, "DOWNLOAD_RETRY_MAX_DELAY_SECONDS", 0)
    monkeypatch.setattr(client, "DOWNLOAD_INTEGRITY_RETRY_BACKOFF", 0.0)
    monkeypatch.setattr(client, "DOWNLOAD_CHUNK_SIZE", 1 << 18)
