"""`tetrad export`: a model for other programs. Everything that can be refused is, before a weight is read."""

from pathlib import Path

from tetrad import storage
from tetrad.console import Console, phase
from tetrad.errors import UserError
from tetrad.export.folder import export_adapter, export_folder, free_target
from tetrad.export.ollama import modelfile
from tetrad.export.vocabulary import differences, words
from tetrad.inference.model_folder import Checked, check, folder_template, model_folder, own_sampling
from tetrad.model.huggingface import read_causal
from tetrad.settings.use import Export, Sample
from tetrad.text.chat_template import jinja_of


def export(settings: Export, console: Console) -> None:
    """What the settings name. Errors: E-CONF-*, E-MODEL-*, E-CKPT-*, E-IO-*, E-NUM-NONFINITE."""
    folder, to = model_folder(settings.model), Path(settings.gguf or settings.to)
    free_target(to, folder)
    checked = check(folder, role="any")
    about = checked.note and f"note: {checked.note}\n"
    with phase(f"writing {to.name}"):
        if settings.gguf:
            about += _gguf(settings, folder, checked)
        elif settings.adapter_only:
            about += export_adapter(folder, to, settings.dtype, settings.base)
        else:
            export_folder(folder, checked, to, settings.dtype)
    console.say(f"{about}wrote {to}")


def _gguf(settings: Export, folder: Path, checked: Checked) -> str:
    """Writes both files; returns what the user should know."""
    if checked.facts.reward:
        what = "a reward model can't be a GGUF file: llama.cpp would leave out its head and write text"
        raise UserError("E-CKPT-ROLE", what, where=str(folder), hint="write it as a folder, with --to")
    try:
        from tetrad.export.gguf import gguf_bytes
    except ImportError:
        hint = 'pip install -c constraints.txt -e ".[gguf]"'
        raise UserError("E-CONF-MISSING", "the package gguf is missing", where="--gguf", hint=hint) from None
    file, tokenizer, config = Path(settings.gguf), checked.tokenizer, checked.facts.config
    beside = file.with_name("Modelfile")
    free_target(beside, folder)
    try:
        template, about = folder_template(folder, settings.template), ""
    except UserError as error:  # another's, which the file has all the same
        template, about = None, f"note: {error.what}: the Modelfile has no TEMPLATE\n"
    own = (template.end_id(tokenizer),) if template else ()
    ends = tuple(dict.fromkeys((*own, *tokenizer.eos_ids, *config.eos_ids)))
    known = words(tokenizer, config, ends, str(folder))
    known["chat_template"] = jinja_of(folder) or (template.jinja(tokenizer) if template else "")
    name = "-".join(Path(settings.model).absolute().parts[-2:])
    storage.write_file(file, gguf_bytes(read_causal(folder), known, settings.type, name))
    names, sampling = [known["token_list"][i] for i in ends], vars(Sample()) | own_sampling(folder)
    text = modelfile(file.name, template, names, sampling, add_bos=known["add_bos_token"])
    storage.write_file(beside, text.encode())
    return about + "".join(f"note: {note}\n" for note in differences(tokenizer, ends))
