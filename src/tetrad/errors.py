"""The two ways a command ends early: a mistake that the user can fix, and a stop that the user requested.

A `UserError` says what is wrong, where (`file:line`, a key, a tensor), and what to do. Its code is one of `CODES`, from
which `scripts/pages.py` writes docs/errors.md; the code's family sets the exit status. Errors are raised once, where
the fault is known, and printed once, by the command line.
"""

from functools import partial
from typing import Any

EXIT_STOPPED, EXIT_LOST = 75, 8
FAMILIES = {
    "CONF": (2, "the recipe or the command line"),
    "DATA": (3, "data"),
    "CKPT": (4, "checkpoints and model folders"),
    "MODEL": (4, "checkpoints and model folders"),
    "NUM": (5, "numbers"),
    "IO": (6, "disk and memory"),
    "MEM": (6, "disk and memory"),
    "RUN": (7, "the run folder"),
    "RANK": (EXIT_LOST, "processes that train together"),
}
CODES = {
    "E-CONF-CONFLICT": "two values are each legal but not together",
    "E-CONF-DEVICE": "the device that is asked for is not there",
    "E-CONF-DIVIDE": "one number must be a multiple of another",
    "E-CONF-DTYPE": "the device cannot compute in this type",
    "E-CONF-DUPKEY": "a key or table is given twice",
    "E-CONF-FUNCTION": "a `file.py:name` of a judge or reward cannot be loaded",
    "E-CONF-MISSING": "something needed is not given",
    "E-CONF-RANGE": "a value lies outside its bounds",
    "E-CONF-SECRET": "a key or password is written in the recipe, or others can read its file",
    "E-CONF-SIZE": "the file is too large to be a recipe, or a folder",
    "E-CONF-SYNTAX": "not TOML, or an unexpected argument on the command line",
    "E-CONF-TYPE": 'a value has the wrong type: `"5"` is not a number',
    "E-CONF-UNKNOWN": "no such key, table or command; the nearest is named",
    "E-DATA-BLANK": "a text that must say something is empty",
    "E-DATA-CHAT": "the turns of a conversation are not in order, or the template cannot hold them",
    "E-DATA-DUPKEY": "a record has one field twice, perhaps in another letter case",
    "E-DATA-EMPTY": "no records",
    "E-DATA-ENCODING": "not UTF-8, or half of a surrogate pair",
    "E-DATA-FORMAT": "a kind of file that is not read here",
    "E-DATA-HUB": "the hub of a name cannot be reached or refuses, or there is no downloaded copy",
    "E-DATA-HUGE": "a line or file beyond the limit",
    "E-DATA-LONG": "records have more tokens than allowed; the message names the longest",
    "E-DATA-MISSING": "a record lacks a field",
    "E-DATA-NULL": "a field is `null`",
    "E-DATA-NUMBER": "NaN, infinite, too large, or outside the declared scale",
    "E-DATA-OVERLAP": "a file or record is given twice where it must not be: train and held-out",
    "E-DATA-PATH": "no such file, no match for a pattern, or it cannot be opened",
    "E-DATA-RANK": "the ranks of `choices` are not numbers of one order",
    "E-DATA-SCALE": "records have scores and `score_scale` is not declared",
    "E-DATA-SYNTAX": "not JSON",
    "E-DATA-TYPE": "a field has the wrong type",
    "E-CKPT-FORMAT": "a weights file that is not safetensors; pickles are never read",
    "E-CKPT-HASH": "a file's sha256 differs from the manifest's: it is damaged",
    "E-CKPT-KEYS": "tensors are missing, or belong to no parameter",
    "E-CKPT-MANIFEST": "the manifest is missing, damaged, or does not name a file that is there",
    "E-CKPT-MISSING": "a file or part of a checkpoint is missing; nothing starts afresh in silence",
    "E-CKPT-PATH": "a link, or a name that is no plain file name",
    "E-CKPT-ROLE": "a model of another kind than asked for: a reward model for a language model, or the reverse",
    "E-CKPT-SETTINGS": "the checkpoint is of a run with other settings",
    "E-CKPT-SHAPE": "a tensor has another shape than the model",
    "E-CKPT-SIZE": "a file is shorter or longer than the manifest says",
    "E-CKPT-VERSION": "written by another version of the format",
    "E-MODEL-CODE": "the folder wants to run code of its own",
    "E-MODEL-FORMAT": "`config.json` or the index of shards cannot be read",
    "E-MODEL-HUB": "the hub of a name cannot be reached or refuses, or there is no downloaded copy",
    "E-MODEL-MISSING": "a file of the folder, or the folder, is missing",
    "E-MODEL-TEMPLATE": "the folder names no template, or its tokenizer cannot hold the one named",
    "E-MODEL-TOKENIZER": "the tokenizer cannot be read, or lacks a token",
    "E-MODEL-UNSUPPORTED": "an architecture or option that Tetrad does not have",
    "E-NUM-ALARM": "an alarm of PPO reached its second limit, and `alarms.strict` is set",
    "E-NUM-GATE": "the reward model fails its gate, and `gate.strict` is set",
    "E-NUM-NONFINITE": "a loss, gradient, weight or logged number is NaN or infinite: stopped before it was kept",
    "E-NUM-REWARD": "a reward or judge function or endpoint failed, or returned something that is not a finite number",
    "E-NUM-VERDICT": "the result of the run is not to be trusted, and `evaluate.strict` is set; the report is kept",
    "E-IO-READ": "the disk refuses to read",
    "E-IO-SPACE": "not enough disk space, reported before or when it happens",
    "E-IO-WRITE": "the disk refuses to write",
    "E-MEM-FULL": "memory ran out; says in which phase and what to lower",
    "E-RANK-FOLDER": "a process does not see the run folder that the others use",
    "E-RANK-LOST": "a process no longer answers, or ended without a word, or goes a way of its own",
    "E-RUN-LOCKED": "another process works in it: the message names its pid, host and start",
}
"""Every code and what it means. Codes are stable: one that was released is never given another meaning."""


class UserError(Exception):
    """A mistake that the user can fix.

    code: one of CODES, else a ValueError. what: one sentence. where: `file:line`, key or tensor. hint: what to do.
    """

    def __init__(self, code: str, what: str, *, where: str = "", hint: str = "") -> None:
        if code not in CODES:
            raise ValueError(f"{code} is not in the table of codes")
        self.code, self.what, self.where, self.hint = code, what, where, hint
        super().__init__(str(self))

    def __reduce__(self) -> tuple[Any, ...]:
        """As it passes between processes."""
        return partial(type(self), where=self.where, hint=self.hint), (self.code, self.what)

    @property
    def exit_code(self) -> int:
        return FAMILIES[self.code.split("-")[1]][0]

    def __str__(self) -> str:
        place = f" {self.where}:" if self.where else ""
        fix = f" Fix: {self.hint}" if self.hint else ""
        return f"error[{self.code}]{place} {self.what}{fix}"


class Stopped(BaseException):
    """SIGTERM or SIGINT ended the run; the same command continues from there (exit 75).

    A signal raises it anywhere, so no `except Exception` may mistake it for an error.
    """
