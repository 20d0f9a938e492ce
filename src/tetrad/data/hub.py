"""Files of a Hugging Face dataset: `hf://OWNER/NAME[@REVISION][/GLOB]`. The only user of huggingface_hub.

The hub is not contacted unless a recipe or a command names such a dataset. HF_ENDPOINT, HF_HOME, HF_TOKEN and
HF_HUB_OFFLINE have their usual meaning; with HF_HUB_OFFLINE=1 the copy of an earlier download is used.
"""

import fnmatch
import re
from collections.abc import Sequence
from functools import cache
from pathlib import Path, PurePosixPath
from typing import NoReturn

from tetrad.errors import UserError

SCHEME = "hf://"
_NAME = re.compile(r"hf://(\w[\w.-]*/\w[\w.-]*)(?:@(\w[\w.-]*))?(?:/([^/].*))?")
_SPLIT = re.compile(r"(?<![a-z])(train|validation|valid|dev|test)(?![a-z])")
_ABOUT = ("dataset_infos.json", "dataset_info.json", "config.json")


@cache
def fetch(name: str, suffixes: tuple[str, ...]) -> list[Path]:
    """The local copies of a dataset's data files, downloaded if they are not cached yet.

    Errors: E-DATA-PATH (no such name or file, or several splits and none chosen), E-DATA-HUB (hub unreachable).
    """
    match = _NAME.fullmatch(name)
    if not match:
        hint = "write hf://OWNER/NAME, hf://OWNER/NAME/data/train-*.parquet or hf://OWNER/NAME@REVISION"
        raise UserError("E-DATA-PATH", "names no dataset", where=name, hint=hint)
    repo, revision, pattern = match[1], match[2], match[3] or ""
    from huggingface_hub import HfApi, constants, snapshot_download  # noqa: PLC0415 - only where a dataset is named

    offline = constants.HF_HUB_OFFLINE
    try:
        if offline:
            wanted = [pattern] if pattern else [f"*{suffix}{gz}" for suffix in suffixes for gz in ("", ".gz")]
        else:
            there = HfApi().list_repo_files(repo, repo_type="dataset", revision=revision)
            wanted = _chosen(name, there, pattern, suffixes)
        folder = snapshot_download(
            repo,
            repo_type="dataset",
            revision=revision,
            allow_patterns=wanted,
            ignore_patterns=[f"*{about}" for about in _ABOUT],
            local_files_only=offline,
        )
    except UserError:
        raise
    except Exception as error:  # the client raises a dozen classes, its own and its HTTP library's
        _unreachable(name, error, offline=offline)
    here = [p.relative_to(folder).as_posix() for p in sorted(Path(folder).rglob("*")) if p.is_file()]
    return [Path(folder) / path for path in _chosen(name, here, pattern, suffixes)]


def _chosen(name: str, there: Sequence[str], pattern: str, suffixes: tuple[str, ...]) -> list[str]:
    """The files that a name refers to; an ambiguous name is an error, not a guess."""
    data = [p for p in sorted(there) if _suffix(p) in suffixes and PurePosixPath(p).name not in _ABOUT]
    data = [p for p in data if not PurePosixPath(p).name.startswith(".")]
    if pattern:
        data = [p for p in there if p == pattern] or [p for p in data if fnmatch.fnmatch(p, pattern)]
    if not data:
        what = f"no file of {len(there)} matches" if pattern else f"has no data file of a known kind in {len(there)}"
        hint = f"name files: {name.partition('@')[0]}/GLOB; there are {', '.join(sorted(there)[:6])}"
        raise UserError("E-DATA-PATH", what, where=name, hint=hint)
    splits = sorted({split[1] for p in data if (split := _SPLIT.search(p.lower()))})
    if not pattern and len(splits) > 1:
        hint = f'name one, as "{SCHEME}{name.removeprefix(SCHEME)}/{_example(data, splits[-1])}"'
        raise UserError("E-DATA-PATH", f"has several splits: {', '.join(splits)}", where=name, hint=hint)
    return data


def _example(data: Sequence[str], split: str) -> str:
    path = PurePosixPath(next(p for p in data if split in p.lower()))
    return str(path.with_name(f"*{split}*{path.suffix}")) if split in path.name.lower() else f"{path.parent}/*"


def _suffix(path: str) -> str:
    return PurePosixPath(path.lower().removesuffix(".gz")).suffix


def _unreachable(name: str, error: Exception, *, offline: bool) -> NoReturn:
    first = str(error).strip().partition("\n")[0] or type(error).__name__
    if type(error).__name__ in ("RepositoryNotFoundError", "RevisionNotFoundError", "GatedRepoError"):
        hint = "check the name; private and gated datasets need the environment variable HF_TOKEN"
        raise UserError("E-DATA-PATH", f"the hub has no such dataset for you ({first:.200})", where=name, hint=hint)
    if offline:
        hint = "unset HF_HUB_OFFLINE once to download it, or copy its files here and name them"
        raise UserError("E-DATA-HUB", f"there is no downloaded copy ({first:.200})", where=name, hint=hint)
    hint = "with a copy of an earlier download: HF_HUB_OFFLINE=1; a mirror: HF_ENDPOINT; else name files of your own"
    raise UserError("E-DATA-HUB", f"the hub cannot be reached ({first:.200})", where=name, hint=hint)
