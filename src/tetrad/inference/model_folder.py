"""Which folder a name means, and whether its model can be used, checked without torch and before anything starts.

A model of the hub means a folder in its client's cache. It is downloaded once, the small files first, so that what
can't be loaded is refused before its weights; what the cache holds whole is not asked for again. The pipeline runs
`check` on every folder that a stage starts from, and commands that use a model on theirs: the manifest if there is one,
then `model.inspect` and the tokenizer.
"""

import fnmatch
import os
import stat
from collections.abc import Callable, Collection
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from tetrad import hub, storage
from tetrad.errors import UserError
from tetrad.hub import is_model
from tetrad.model.bases import CONFIG, INDEX, NOTES
from tetrad.model.config import GENERATION, is_reward, read_config, read_json
from tetrad.model.inspect import Facts, inspect, refuse_incomplete, verify_own, weight_names
from tetrad.settings.check import build
from tetrad.settings.common import Sampling
from tetrad.stages import ALIGNED
from tetrad.text.chat_template import TEMPLATES, Template, recognised, recorded
from tetrad.text.chat_template import template as template_of
from tetrad.text.tokenizer import CONVERT, MAX_JSON_BYTES, Tokenizer

_PROBES = [start * 60 + "!" for start in ("a", "1", " ", "\n", "é", "字", "ab ", "a1")]
"""Texts on which a regular expression that needs exponential time exhausts its retries at once."""
_FILES = (".json", ".safetensors", ".jinja")
_JSON = ("config.json", "tokenizer.json", "tokenizer_config.json")
_SMALL = (*_JSON, "chat_template.jinja", GENERATION, INDEX, CONFIG, NOTES)
_WEIGHTS = ("model.safetensors", "member-*.safetensors")
"""Those of the hub that are taken, beside the shards that an index names; never code or pickles."""
_SAMPLING = ("temperature", "top_k", "top_p", "min_p", "repetition_penalty")


@dataclass(frozen=True)
class Checked:
    """A usable folder. note: what the user should know; usually empty."""

    facts: Facts
    tokenizer: Tokenizer
    note: str


def check(folder: Path, *, role: str = "language", verify: bool = True) -> Checked:
    """What is known of a model folder before it is loaded. role: language | reward | any (of the two).

    verify: False if its files' sha256 have been compared already. Errors: E-MODEL-*, E-CKPT-*.
    """
    if verify:
        verify_own(folder)
    facts = inspect(folder, scalar=role != "language")
    if role == "reward" and not facts.reward:
        raise no_reward(folder)
    tokenizer = Tokenizer.load(folder)
    refuse_small_vocabulary(facts.config.vocab_size, tokenizer, folder)
    try:
        for text in _PROBES:
            tokenizer.encode(text)
    except UserError as error:
        raise UserError(error.code, error.what, where=str(folder / "tokenizer.json"), hint=error.hint) from None
    return Checked(facts, tokenizer, others_may_write(folder))


def usable(name: str, *, template: str = "", reward: bool = False) -> Checked:
    """`check` for a command that uses a model; the template is needed too. Errors: E-MODEL-*, E-CKPT-*."""
    folder = model_folder(name)
    if reward and not is_reward(folder):
        raise no_reward(folder)
    checked = check(folder, role="reward" if reward else "language")
    needed_template(folder_template(folder, template), folder)
    return checked


def model_folder(name: str | Path, *, weights: bool = True) -> Path:
    """The folder of the files: that of a stage of a run, or itself, or that of a model of the hub, downloaded and
    compared with the hub's sha256. weights: of the hub, whether they are needed. Errors: E-MODEL-MISSING, and for a
    model of the hub E-MODEL-*, E-CKPT-HASH, E-IO-*.
    """
    if is_model(str(name)):
        return snapshot(str(name), weights=weights, digest=storage.sha256_file)
    path = Path(name)
    for folder in (path / "model", path):
        if os.path.isfile(folder / "config.json"):
            return folder
    there = os.path.isdir(path)
    stages = sorted(p.parent.parent.name for p in path.glob("*/model/config.json")) if there else []
    if not there:
        what, hint = "there is no such folder", 'name a stage that is done ("runs/NAME/ppo") or a Hugging Face folder'
    elif stages:
        best = next((name for name in reversed(ALIGNED) if name in stages), stages[-1])
        what, hint = f"this is a run; its models are {', '.join(stages)}", f"name one: {path / best}"
    elif os.path.isfile(path / "lineage.json"):
        what, hint = "this stage has no finished language or reward model", "run its recipe to the end"
    else:
        what, hint = "there is no config.json", 'name a stage that is done ("runs/NAME/ppo") or a Hugging Face folder'
    raise UserError("E-MODEL-MISSING", what, where=str(path), hint=hint)


@cache
def snapshot(name: str, *, weights: bool = True, digest: Callable[[Path], str] | None = None) -> Path:
    """The folder of a model of the hub, in its client's cache, downloaded if that does not hold it whole.

    weights: False for what is needed to read its settings and to tokenise. digest: for `hub_sha256`, at once.
    Errors: E-MODEL-*, E-CKPT-HASH, E-IO-*.
    """
    repository = hub.model(name)
    folder = repository.cached(_SMALL, _SMALL[:2])
    if folder and weights:
        folder = repository.cached([*(names := weight_names(folder)), *_WEIGHTS], names)
    folder = folder or _downloaded(repository, weights=weights)
    if digest:
        hub_sha256(name, folder, digest)
    return folder


def hub_sha256(name: str, folder: Path, digest: Callable[[Path], str]) -> dict[str, str]:
    """Of each file of a model of the hub; those of which the hub knows it are compared. digest: computes it.

    Hugging Face's cache links a file of a commit to one that is named by its hash at the hub; ModelScope's client
    compares what it downloads, and its cache has no hashes. Errors: E-CKPT-HASH.
    """
    names = {*_SMALL, *weight_names(folder), *(path.name for path in folder.glob(_WEIGHTS[1]))}
    sums = {file: digest((folder / file).resolve()) for file in sorted(names) if (folder / file).is_file()}
    for file, sha256 in sums.items():
        path = folder / file
        known = os.path.basename(os.readlink(path)) if path.is_symlink() else ""
        if len(known) == len(sha256) and known != sha256:
            what = f"{file} is damaged: its sha256 is {sha256[:12]}..., the hub's {known[:12]}..."
            hint = f"delete {folder / os.readlink(path)} and run the same command again"
            raise UserError("E-CKPT-HASH", what, where=name, hint=hint)
    return sums


def small_folder(name: str) -> Path:
    """The folder that a name means, or that of a model of the hub without its weights. Errors: those of `snapshot`."""
    return snapshot(name, weights=False) if is_model(name) else Path(name)


def _downloaded(repository: hub.Repository, *, weights: bool) -> Path:
    sizes = {name: size for name, size in repository.files().items() if "/" not in name}
    _refuse_names(sizes, repository.given, "name a repository of transformers' form")
    folder = repository.download(_SMALL, 0)
    try:
        read_config(folder)
    except UserError as error:
        raise UserError(error.code, error.what, where=repository.given, hint=error.hint) from None
    if weights:
        patterns = [*weight_names(folder), *_WEIGHTS]
        wanted = [name for name in sizes if any(fnmatch.fnmatch(name, pattern) for pattern in patterns)]
        repository.download(wanted, sum(sizes[name] for name in wanted if not (folder / name).is_file()))
    return folder


def own_sampling(name: str | Path) -> dict[str, Any]:
    """How the model of a folder, or of a stage of a run, should be sampled: the settings that the table has in
    generation_config.json, if that sets do_sample. Errors: E-MODEL-FORMAT, E-CONF-*."""
    name = model_folder(name) if is_model(str(name)) else name
    path = next((p for p in (Path(name, "model", GENERATION), Path(name, GENERATION)) if os.path.isfile(p)), None)
    if not path or (stated := read_json(path)).get("do_sample") is not True:
        return {}
    values = {key: stated[key] for key in _SAMPLING if stated.get(key) is not None}
    build(Sampling, values, dict.fromkeys(values, str(path)))
    return values


def folder_template(folder: Path, choice: str) -> Template | None:
    """The template that the user chose, else the folder's own; None if there is neither.

    Errors: E-MODEL-TEMPLATE.
    """
    noted = recorded(folder)
    if choice and choice not in TEMPLATES:
        hint = f"choose one of {', '.join(TEMPLATES)}"
        raise UserError("E-MODEL-TEMPLATE", f"there is no template {choice!r}", hint=hint)
    if choice:
        return noted if noted and noted.name == choice else template_of(choice)
    return noted or recognised(folder)


def needed_template(form: Template | None, folder: Path) -> Template:
    """The template, or E-MODEL-TEMPLATE."""
    if form is None:
        hint = "choose --template " + " or --template ".join(TEMPLATES)
        raise UserError("E-MODEL-TEMPLATE", "the folder names no template", where=str(folder), hint=hint)
    return form


def refuse_small_vocabulary(rows: int, tokenizer: Tokenizer, folder: Path) -> None:
    """A model must cover all ids of its tokenizer. Errors: E-MODEL-TOKENIZER."""
    if tokenizer.size > rows:
        what = f"the tokenizer has {tokenizer.size} tokens, the model {rows}"
        raise UserError("E-MODEL-TOKENIZER", what, where=str(folder), hint="put the model's own tokenizer.json there")


def refuse_other_tokenizer(folder: Path, own: Tokenizer, policy: Tokenizer) -> None:
    """A critic must read the ids that the policy samples. Errors: E-MODEL-TOKENIZER."""
    if own.fingerprint != policy.fingerprint:
        what = "the critic can't start from a reward model whose tokenizer isn't the answering model's"
        hint = 'set ppo.critic = "actor", or train the reward model from this recipe\'s SFT model'
        raise UserError("E-MODEL-TOKENIZER", what, where=str(folder), hint=hint)


def refuse_other_run(folder: Path, own: Tokenizer, policy: Tokenizer) -> None:
    """A policy that is compared with this run's must read the same ids. Errors: E-MODEL-TOKENIZER."""
    if own.fingerprint != policy.fingerprint:
        what = "evaluate.others names a model whose tokenizer isn't this run's"
        hint = "name a stage of a run that starts from the same SFT model or tokenizer"
        raise UserError("E-MODEL-TOKENIZER", what, where=str(folder), hint=hint)


def foreign_files(folder: Path, setting: str) -> list[Path]:
    """The files of a folder without a manifest that define its model, none of them hashed or read.

    setting: what named the folder. Errors: E-MODEL-MISSING, and E-MODEL-* for text that is larger than any in use.
    """
    hint = 'name a Hugging Face folder, or a stage that is done ("runs/NAME/sft")'
    if not folder.is_dir():
        raise UserError("E-MODEL-MISSING", f"{setting} names no folder", where=str(folder), hint=hint)
    _refuse_names([path.name for path in folder.iterdir()], str(folder), hint)
    files = sorted(p for p in folder.iterdir() if p.suffix in _FILES)
    for path in files:
        if path.suffix != ".safetensors" and path.stat().st_size > MAX_JSON_BYTES:
            code = "E-MODEL-TOKENIZER" if path.name.startswith("tokenizer") else "E-MODEL-FORMAT"
            what = f"{path.name} is larger than {MAX_JSON_BYTES >> 20} MiB"
            raise UserError(code, what, where=str(path), hint="copy the whole model folder again")
    return files


def _refuse_names(names: Collection[str], where: str, hint: str) -> None:
    """Raises UserError E-MODEL-{MISSING,UNSUPPORTED} for the names of files that are no model with its tokenizer."""
    refuse_incomplete(names, where, hint)
    if "tokenizer.json" not in names:
        raise UserError("E-MODEL-MISSING", "tokenizer.json is missing", where=where, hint=CONVERT)


def no_reward(folder: Path) -> UserError:
    """The error for a language model in place of a reward model."""
    hint = 'name a reward model, such as "runs/NAME/reward"'
    return UserError("E-CKPT-ROLE", "this is a language model: it has no reward", where=str(folder), hint=hint)


def others_may_write(folder: Path) -> str:
    """A note if another user owns the folder or a file in it, or may write there; else nothing."""
    for path in (folder, *sorted(folder.iterdir())):
        status = path.lstat()
        foreign = status.st_uid not in (os.getuid(), 0)
        if foreign or (status.st_mode & stat.S_IWOTH and not stat.S_ISLNK(status.st_mode)):
            return f"{path} belongs to, or can be changed by, another user"
    return ""
