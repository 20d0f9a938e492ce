"""The Hugging Face hub: the only file that asks it, for data sets and models, with one sentence for each way to fail.

It is not contacted unless a recipe or a command names a repository. HF_ENDPOINT, HF_HOME, HF_TOKEN and HF_HUB_OFFLINE
have their usual meaning. The client keeps what it downloads, and goes on with a broken download where it stopped.
"""

import logging
import os
import re
import threading
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tetrad import disk
from tetrad.errors import Stopped, UserError
from tetrad.signals import on_stop_request

SCHEME = "hf://"
REPOSITORY = r"\w[\w.-]*/\w[\w.-]*"
_MODEL = re.compile(rf"({REPOSITORY})(?:@((?!.*\.\.)\w[\w./-]*))?")
_CODES = {"model": ("E-MODEL-MISSING", "E-MODEL-HUB"), "dataset": ("E-DATA-PATH", "E-DATA-HUB")}


def is_model(name: str, folder: str | Path = "") -> bool:
    """Whether a name is that of a model of the hub: hf://..., or OWNER/NAME where neither that nor OWNER is a folder.

    folder: where it may lie, beside the current one.
    """
    if name.startswith(SCHEME) or not _MODEL.fullmatch(name):
        return name.startswith(SCHEME)
    paths = [Path(place, part) for place in (folder, "") for part in (name, name.partition("/")[0])]
    return not any(map(os.path.exists, paths))


@dataclass(frozen=True)
class Repository:
    """A repository at a revision (a branch, a tag or a commit; None is its main branch). kind: model | dataset. name:
    OWNER/NAME. given: the user's name for it, for errors."""

    kind: str
    name: str
    revision: str | None
    given: str

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
        """The folder with the files of these names or patterns; its name is the commit. nbytes: of all that is missing.

        Errors: E-MODEL-{MISSING,HUB} or E-DATA-{PATH,HUB}, E-IO-*; Stopped.
        """
        from tetrad.console import phase  # noqa: PLC0415 - a terminal library, and recipes read names only

        with self._explained(), phase(f"downloading {self.name}, MiB", nbytes >> 20 or 1) as bar, ExitStack() as stack:
            stop, received = threading.Event(), 0
            on_stop_request.append(stop.set)  # the client's threads would finish their files first
            stack.callback(on_stop_request.remove, stop.set)

            class Bytes(_client().utils.tqdm):  # type: ignore[misc]
                """The client's bar, never drawn: of bytes, beside one of files."""

                def __init__(self, *args: Any, **options: Any) -> None:
                    self.counts = options.get("name") == "huggingface_hub.snapshot_download"
                    super().__init__(*args, **{**options, "disable": True})

                def update(self, n: float | None = 1) -> None:
                    nonlocal received
                    if stop.is_set():
                        raise Stopped("in a download")
                    if self.counts:
                        received += int(n or 0)
                        bar.advance((received >> 20) - bar.done)

            return self._snapshot(wanted, ignore_patterns=ignored, tqdm_class=Bytes)

    def _snapshot(self, wanted: Sequence[str], **options: Any) -> Path:
        options |= {"repo_type": self.kind, "revision": self.revision, "allow_patterns": list(wanted)}
        return Path(_client().snapshot_download(self.name, **options))

    @contextmanager
    def _explained(self) -> Iterator[None]:
        try:
            yield
        except Exception as error:  # the client raises a dozen classes, its own and its HTTP library's
            if isinstance(error, OSError) and error.errno:
                with disk.explained(Path(_client().constants.HF_HUB_CACHE)):
                    raise
            missing, unreachable = _CODES[self.kind]
            site = _client().constants.ENDPOINT
            page = f"{site}/{'datasets/' * (self.kind == 'dataset')}{self.name}"
            first = f"{str(error.__cause__ or error).strip().partition(chr(10))[0]:.200}"
            match type(error).__name__:
                case "RevisionNotFoundError":
                    code, what = missing, f"there is no revision {self.revision}"
                    hint = f"branches and tags are listed at {page}; without @REVISION it is the main branch"
                case "GatedRepoError":
                    code, what = unreachable, "it is gated: the hub gives it only to those who accepted its terms"
                    hint = f"accept them at {page}, then set HF_TOKEN to your token ({site}/settings/tokens)"
                case "RepositoryNotFoundError":
                    code, what = missing, f"the hub has no such {self.kind} for you ({first})"
                    hint = "check the name, or the path of a folder; a private one needs the variable HF_TOKEN"
                case _ if offline():
                    code, what = unreachable, "HF_HUB_OFFLINE is set, and there is no downloaded copy, or a part of one"
                    more = " --repo-type dataset" * (self.kind == "dataset")
                    more += f" --revision {self.revision}" * bool(self.revision)
                    hint = f"where there is a network: hf download {self.name}{more}; or unset HF_HUB_OFFLINE once"
                case _:
                    code, what = unreachable, f"the hub cannot be reached ({first})"
                    hint = f"run it again; a mirror: HF_ENDPOINT (now {site}); a copy that is here: HF_HUB_OFFLINE=1"
            raise UserError(code, what, where=self.given, hint=hint) from error


def model(name: str) -> Repository:
    """The repository of a model's name. Errors: E-MODEL-MISSING."""
    match = _MODEL.fullmatch(name.removeprefix(SCHEME))
    if not match:
        hint = "write hf://OWNER/NAME or hf://OWNER/NAME@REVISION"
        raise UserError("E-MODEL-MISSING", "names no model of the hub", where=name, hint=hint)
    return Repository("model", match[1], match[2], match[0])


def offline() -> bool:
    """Whether HF_HUB_OFFLINE is set."""
    return bool(_client().constants.HF_HUB_OFFLINE)


def _client() -> Any:
    import huggingface_hub.constants  # noqa: PLC0415 - only where a repository is named
    import huggingface_hub.utils  # noqa: PLC0415

    logging.getLogger("huggingface_hub").setLevel(logging.ERROR)  # what it warns of stands in our errors
    return huggingface_hub
