"""Output may go to a limited terminal, or none: no text exceeds what its encoding can hold, no stream is missing,
and a run of hours outlives the window that it was started in.
"""

import codecs
import io
import os
import sys
from typing import Any, TextIO, cast

from tetrad.errors import UserError

_ESCAPES = "tetrad-escapes"


def prepare() -> None:
    """Repairs the three standard streams of this process: characters that an output's encoding lacks are written as
    \\uXXXX, which is valid JSON too, and a closed stream (`>&-`) becomes one that refuses writes, or has nothing to
    read."""
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "FATAL")  # else torch prints its own stack for a lost connection
    codecs.register_error(_ESCAPES, _escaped)
    for number, name in enumerate(("stdin", "stdout", "stderr")):
        stream = getattr(sys, name)
        if stream is None:
            stream = os.fdopen(os.open(os.devnull, os.O_RDONLY), "w" if number else "r")
            setattr(sys, name, stream)
        if number and isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors=_ESCAPES)


def _escaped(error: UnicodeError) -> tuple[str, int]:
    """The replacement of characters that can't be encoded; those beyond 16 bits as JSON's surrogate pair."""
    assert isinstance(error, UnicodeEncodeError)
    units = error.object[error.start : error.end].encode("utf-16-be", "surrogatepass").hex()
    return "".join(f"\\u{units[i : i + 4]}" for i in range(0, len(units), 4)), error.end


class _Guarded:
    """An output that may fail. outlives: what is written afterwards is lost silently."""

    def __init__(self, stream: TextIO, outlives: bool) -> None:
        self._stream, self._outlives, self._gone = stream, outlives, False

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def write(self, text: str) -> int:
        if self._gone:
            return len(text)
        try:
            self._stream.write(text)
            self._stream.flush()
        except (OSError, ValueError) as error:  # no reader, no room, no terminal; closed
            self._gone = True
            for name in ("stdout", "stderr"):
                if getattr(sys, name) is self._stream:  # its buffered text would fail again at exit
                    setattr(sys, name, io.StringIO())
            if not self._outlives:
                if isinstance(error, BrokenPipeError):
                    raise
                why = getattr(error, "strerror", None) or str(error)
                raise UserError("E-IO-WRITE", f"what was asked for can't be printed: {why}", where="stdout") from error
        return len(text)

    def flush(self) -> None:
        """Everything was flushed as it was written."""


def guarded(stream: TextIO, *, outlives: bool) -> TextIO:
    """The stream; a failure raises E-IO-WRITE (BrokenPipeError if its reader has gone), or nothing for what outlives
    it."""
    return cast(TextIO, _Guarded(stream, outlives))
