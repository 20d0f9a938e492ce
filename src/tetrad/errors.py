"""The two ways a command ends early: a mistake that the user can mend, and a stop that the user asked for.

A `UserError` says what is wrong, where (`file:line`, a key, a tensor), and what to do. The code is stable and
documented; its family fixes the exit status. Errors are raised once, where the fault is known, and printed once, by the
command line.
"""

EXIT_STOPPED = 75
_EXIT_OF_FAMILY = {"CONF": 2, "DATA": 3, "CKPT": 4, "MODEL": 4, "NUM": 5, "IO": 6, "MEM": 6, "RUN": 7}


class UserError(Exception):
    """A mistake that the user can mend.

    code: stable, `E-<FAMILY>-<NAME>`. what: one sentence. where: `file:line`, key or tensor. hint: what to do.
    """

    def __init__(self, code: str, what: str, *, where: str = "", hint: str = "") -> None:
        self.code, self.what, self.where, self.hint = code, what, where, hint
        super().__init__(str(self))

    @property
    def exit_code(self) -> int:
        return _EXIT_OF_FAMILY[self.code.split("-")[1]]

    def __str__(self) -> str:
        place = f" {self.where}:" if self.where else ""
        fix = f" Fix: {self.hint}" if self.hint else ""
        return f"error[{self.code}]{place} {self.what}{fix}"


class Stopped(Exception):
    """SIGTERM or SIGINT was answered with a checkpoint; the same command goes on from there (exit 75)."""
