"""Files of a Hugging Face dataset: `hf://OWNER/NAME[@REVISION][/GLOB]`.

With HF_HUB_OFFLINE=1 the copy of an earlier download is used; else the hub is asked what the dataset has.
"""

import fnmatch
import re
from collections.abc import Sequence
from functools import cache
from pathlib import Path, PurePosixPath

from tetrad.errors import UserError
from tetrad.hub import MODELSCOPE, REPOSITORY, SCHEME, Repository, offline

_NAME = re.compile(rf"{SCHEME}({REPOSITORY})(?:@(\w[\w.-]*))?(?:/([^/].*))?")
_SPLIT = re.compile(r"(?<![a-z])(train|validation|valid|dev|test)(?![a-z])")
_ABOUT = ("dataset_infos.json", "dataset_info.json", "config.json")


@cache
def fetch(name: str, suffixes: tuple[str, ...]) -> list[Path]:
    """The local copies of a dataset's data files, downloaded if they are not cached yet.

    Errors: E-DATA-PATH (no such name or file, or several splits and none chosen), E-DATA-HUB (hub unreachable).
    """
    match = _NAME.fullmatch(name)
    if name.startswith(MODELSCOPE):
        hint = "modelscope download --dataset OWNER/NAME --local_dir FOLDER, and name its files; or take it from hf://"
        raise UserError("E-DATA-PATH", "only models are taken from ModelScope by name", where=name, hint=hint)
    if not match:
        hint = "write hf://OWNER/NAME, hf://OWNER/NAME/data/train-*.parquet or hf://OWNER/NAME@REVISION"
        raise UserError("E-DATA-PATH", "names no dataset", where=name, hint=hint)
    repository, pattern = Repository("dataset", match[1], match[2], name), match[3] or ""
    wanted = [pattern] if pattern else [f"*{suffix}{gz}" for suffix in suffixes for gz in ("", ".gz")]
    sizes = {} if offline() else repository.files()
    wanted = wanted if offline() else _chosen(name, list(sizes), pattern, suffixes)
    folder = repository.download(wanted, sum(sizes.get(p, 0) for p in wanted), [f"*{about}" for about in _ABOUT])
    here = [p.relative_to(folder).as_posix() for p in sorted(folder.rglob("*")) if p.is_file()]
    return [folder / path for path in _chosen(name, here, pattern, suffixes)]


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
