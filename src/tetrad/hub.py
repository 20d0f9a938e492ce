"""Hugging Face and ModelScope: the only file that asks them, with one sentence for each way to fail.

Neither is contacted unless a recipe or a command names a repository. HF_ENDPOINT, HF_HOME, HF_TOKEN, HF_HUB_OFFLINE and
MODELSCOPE_ENDPOINT (or MODELSCOPE_DOMAIN), MODELSCOPE_CACHE, MODELSCOPE_API_TOKEN have their usual meaning; the client
of ModelScope has no switch for offline, so HF_HUB_OFFLINE is that of both. The clients keep what they download, and go
on with a broken download where it stopped.
"""

import logging
import os
import re
import threading
import warnings
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from tetrad import disk
from tetrad.errors import Stopped, UserError
from tetrad.signals import on_stop_request

SCHEME, MODELSCOPE = SCHEMES = ("hf://", "ms://")
REPOSITORY = r"\w[\w.-]*/\w[\w.-]*"
_MODEL = re.compile(rf"({REPOSITORY})(?:@((?!.*\.\.)\w[\w./-]*))?")
_CODES = {"model": ("E-MODEL-MISSING", "E-MODEL-HUB"), "dataset": ("E-DATA-PATH", "E-DATA-HUB")}


def is_model(name: str, folder: str | Path = "") -> bool:
    """Whether a name is that of a model of a hub: hf://..., ms://..., or OWNER/NAME where neither that nor OWNER is a
    folder.

    folder: where it may lie, beside the current one.
    """
    if name.startswith(SCHEMES) or not _MODEL.fullmatch(name):
        return name.startswith(SCHEMES)
    paths = [Path(place, part) for place in (folder, "") for part in (name, name.partition("/")[0])]
    return not any(map(os.path.exists, paths))


def full_name(name: str) -> str:
    """A model's name with its hub: where it names none, ModelScope if USE_MODELSCOPE_HUB is set, else Hugging Face."""
    wanted = os.environ.get("USE_MODELSCOPE_HUB", "").lower() in ("1", "true", "yes", "on", "y")
    return name if name.startswith(SCHEMES) else (MODELSCOPE if wanted else SCHEME) + name


@dataclass(frozen=True)
class Repository:
    """A repository at a revision (a branch, a tag or a commit; None is its main branch). kind: model | dataset. name:
    OWNER/NAME. given: the user's name for it, for errors."""

    kind: str
    name: str
    revision: str | None
    given: str
    hub, command, prefix, closed = "huggingface", "hf download", "", "gated"
    token, tokens, endpoint, counted = "HF_TOKEN", "settings/tokens", "HF_ENDPOINT", "huggingface_hub.snapshot_download"

    def files(self) -> dict[str, int]:
        """The hub's list of its files, with their bytes. Errors: those of `download`."""
        with self._explained():
            api = _client().HfApi()
            about = api.repo_info(self.name, repo_type=self.kind, revision=self.revision, files_metadata=True)
        return {file.rfilename: file.size or 0 for file in about.siblings or ()}

    def cached(self, wanted: Sequence[str], needed: Sequence[str]) -> Path | None:
        """The folder of an earlier download, as far as the client knows with all of the wanted files; None where it has
        no such folder, or a needed file is missing."""
        with suppress(OSError, ValueError):
            folder = self._snapshot(wanted, local_files_only=True)
            return folder if all((folder / name).is_file() for name in needed) else None
        return None

    def download(self, wanted: Sequence[str], nbytes: int, ignored: Sequence[str] = ()) -> Path:
        """The folder with the files of these names or patterns. nbytes: of all that is missing.

        Errors: E-MODEL-{MISSING,HUB} or E-DATA-{PATH,HUB}, E-IO-*; of ModelScope E-CKPT-HASH, and E-CONF-MISSING
        without its client; Stopped.
        """
        from tetrad.console import phase  # noqa: PLC0415 - a terminal library, and recipes read names only

        with self._explained(), phase(f"downloading {self.name}, MiB", nbytes >> 20 or 1) as bar, ExitStack() as stack:
            stop, received, counted = threading.Event(), 0, self.counted
            on_stop_request.append(stop.set)  # the client's threads would finish their files first
            stack.callback(on_stop_request.remove, stop.set)

            class Bytes(_client().utils.tqdm):  # type: ignore[misc]
                """A client's bar, never drawn: of bytes, beside one of files."""

                def __init__(self, *args: Any, **options: Any) -> None:
                    self.counts = options.get("name", "") == counted
                    super().__init__(*args, **{**options, "disable": True})

                def update(self, n: float | None = 1) -> None:
                    nonlocal received
                    if stop.is_set():
                        raise Stopped("in a download")
                    if self.counts:
                        received += int(n or 0)
                        bar.advance((received >> 20) - bar.done)

            return self._snapshot(wanted, ignore_patterns=ignored, tqdm_class=Bytes)

    def about(self, folder: Path) -> dict[str, Any]:
        """What a lineage has of it. folder: that of `cached` or `download`; at Hugging Face its name is the commit."""
        commit = {"commit": folder.name} if self.hub == Repository.hub else {}
        return {"hub": self.hub, "repository": self.name, "revision": self.revision, **commit}

    def _snapshot(self, wanted: Sequence[str], **options: Any) -> Path:
        options |= {"repo_type": self.kind, "revision": self.revision, "allow_patterns": list(wanted)}
        return Path(_client().snapshot_download(self.name, **options))

    def _places(self) -> tuple[Path, str]:
        """The client's cache, and the address that it asks."""
        return Path(_client().constants.HF_HUB_CACHE), _client().constants.ENDPOINT

    @contextmanager
    def _explained(self) -> Iterator[None]:
        try:
            yield
        except Exception as error:  # the clients raise a dozen classes, their own and their HTTP libraries'
            if isinstance(error, OSError) and error.errno:
                with disk.explained(self._places()[0]):
                    raise
            code, what, hint = self._why(error)
            raise UserError(code, what, where=self.given, hint=hint) from error

    def _why(self, error: Exception) -> tuple[str, str, str]:
        """The code, the sentence and the hint for an error of the client."""
        missing, unreachable = _CODES[self.kind]
        site, fault, beneath = self._places()[1], type(error).__name__, error
        page = f"{site}/{self.prefix}{'datasets/' * (self.kind == 'dataset')}{self.name}"
        while isinstance(beneath.__cause__, Exception):
            beneath = beneath.__cause__
        first = f"{getattr(beneath, 'message', beneath)!s:.200}".strip().partition("\n")[0] or type(beneath).__name__
        with suppress(Exception):  # ModelScope's client has one class for both
            known = fault == "NotExistError" and self.revision and _modelscope().list_repo_revisions(self.name, "model")
            fault = "RevisionNotFoundError" if known else fault
        match fault:
            case "RevisionNotFoundError":
                code, what = missing, f"there is no revision {self.revision}"
                hint = f"branches and tags are listed at {page}; without @REVISION it is the main branch"
            case "GatedRepoError" | "AuthenticationError" | "PermissionDeniedError":
                code, what = unreachable, f"it is {self.closed}: the hub gives it only to those who may read it"
                hint = f"accept its terms at {page}, then set {self.token} to your token ({site}/{self.tokens})"
            case "RepositoryNotFoundError" | "NotExistError":
                code, what = missing, f"the hub has no such {self.kind} for you ({first})"
                hint = f"check the name, or the path of a folder; a private one needs the variable {self.token}"
            case "FileIntegrityError" | "FileSizeMismatchError":
                code, what = "E-CKPT-HASH", f"what arrives is not what the hub lists ({first})"
                hint = f"run the same command again; if it stays so, report it at {page}"
            case _ if offline():
                code, what = unreachable, "HF_HUB_OFFLINE is set, and there is no downloaded copy, or a part of one"
                more = " --repo-type dataset" * (self.kind == "dataset")
                more += f" --revision {self.revision}" * bool(self.revision)
                hint = f"where there is a network: {self.command} {self.name}{more}; or unset HF_HUB_OFFLINE once"
            case _:
                code, what = unreachable, f"the hub cannot be reached ({first})"
                hint = f"run it again; a mirror: {self.endpoint} (now {site}); a copy that is here: HF_HUB_OFFLINE=1"
        return code, what, hint


class _ModelScope(Repository):
    """A model of ModelScope, whose client keeps a folder for each branch or tag and names no commit."""

    hub, command, prefix, closed = "modelscope", "modelscope download", "models/", "gated or private"
    token, tokens, endpoint, counted = "MODELSCOPE_API_TOKEN", "my/myaccesstoken", "MODELSCOPE_ENDPOINT", ""

    def files(self) -> dict[str, int]:
        with self._explained():
            return {file.path: file.size for file in self._listing}

    @cached_property
    def _listing(self) -> Any:
        """Asked for once, so that the files that are taken are of one commit."""
        if offline():
            raise ConnectionError("offline")
        return _modelscope().list_repo_files(self.name, "model", revision=self.revision)

    def _snapshot(self, wanted: Sequence[str], **options: Any) -> Path:
        """The client's folder; before version 1.38 it had one for all revisions, without dots. wanted: no patterns."""
        (cache, _), (owner, name) = self._places(), self.name.split("/")
        older = [cache / part / owner / name.replace(".", "___") for part in ("models", "hub/models")]
        newer = cache / "models" / f"{owner}--{name}" / "snapshots" / (self.revision or "master")
        folder: Path = next((path for path in older if path.is_dir() and not self.revision), newer)
        if not options.get("local_files_only"):
            api, files = _modelscope(options["tqdm_class"]), [file for file in self._listing if file.path in wanted]
            for file in sorted(files, key=lambda file: file.path == "config.json"):  # which makes a folder a copy
                known = {"expected_sha256": file.sha256, "file_size": file.size or None, "revision": self.revision}
                api.download_file(self.name, "model", file.path, local_dir=folder, **known)
        return folder

    def _places(self) -> tuple[Path, str]:
        config = _modelscope()._config
        return config.cache_dir, config.endpoint


def model(name: str) -> Repository:
    """The repository of a model's name. Errors: E-MODEL-MISSING."""
    full = full_name(name)
    match = _MODEL.fullmatch(full[len(SCHEME) :])
    if not match:
        hint = "write hf://OWNER/NAME or hf://OWNER/NAME@REVISION, and ms:// for ModelScope"
        raise UserError("E-MODEL-MISSING", "names no model of the hub", where=name, hint=hint)
    kind = _ModelScope if full.startswith(MODELSCOPE) else Repository
    return kind("model", match[1], match[2], full.removeprefix(SCHEME))


def offline() -> bool:
    """Whether HF_HUB_OFFLINE is set."""
    return bool(_client().constants.HF_HUB_OFFLINE)


def _client() -> Any:
    import huggingface_hub.constants  # noqa: PLC0415 - only where a repository is named
    import huggingface_hub.utils  # noqa: PLC0415

    logging.getLogger("huggingface_hub").setLevel(logging.ERROR)  # what it warns of stands in our errors
    return huggingface_hub


def _modelscope(bar: object = None) -> Any:
    """ModelScope's client, which logs nothing, and asks for repositories alone: not for the region of the machine, and
    without its number for this installation. bar: in place of tqdm. Errors: E-CONF-MISSING."""
    os.environ.setdefault("MODELSCOPE_DOWNLOAD_INTRA_CLOUD", "false")
    warnings.filterwarnings("ignore", "Environment variable", FutureWarning)  # that it has a newer name
    try:
        import modelscope_hub._download  # noqa: PLC0415 - only where a repository is named
    except ImportError:
        what, hint = "the package modelscope-hub is missing", 'pip install -c constraints.txt -e ".[modelscope]"'
        raise UserError("E-CONF-MISSING", what, where="ModelScope", hint=hint) from None
    logging.getLogger("modelscope_hub").setLevel(logging.CRITICAL + 1)
    own = {"get_session_id": lambda _: "0" * 32, "load_cookies": lambda _: None}  # a login is a pickle: never read
    modelscope_hub._download.tqdm = bar or modelscope_hub._download.tqdm
    return modelscope_hub.HubApi(type("Config", (modelscope_hub.HubConfig,), own)())
