"""What is written to may be a poor terminal, or none: no text is more than its encoding holds, no stream is missing,
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
    """Mends the three standard streams of this process: characters that an output's encoding lacks are written as
    \\uXXXX, which is JSON too, and a stream that was closed (`>&-`) is one that refuses to be written to, or has
    nothing to read."""
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "FATAL")  # of a lost connection torch would print its own stack
    codecs.register_error(_ESCAPES, _escaped)
    for number, name in enumerate(("stdin", "stdout", "stderr")):
        stream = getattr(sys, name)
        if stream is None:
            stream = os.fdopen(os.open(os.devnull, os.O_RDONLY), "w" if number else "r")
            setattr(sys, name, stream)
        if number and isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors=_ESCAPES)


def _escaped(error: UnicodeError) -> tuple[str, int]:
    """What is written instead of characters that can't be; those beyond 16 bits as the pair that JSON asks for."""
    assert isinstance(error, UnicodeEncodeError)
    units = error.object[error.start : error.end].encode("utf-16-be", "surrogatepass").hex()
    return "".join(f"\\u{units[i : i + 4]}" for i in range(0, len(units), 4)), error.end


class _Nowhere(io.TextIOBase):
    def write(self, text: str) -> int:
        return len(text)


class _Guarded:
    """An output that may fail. outlives: what is written afterwards is lost, and nobody is told."""

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
                if getattr(sys, name) is self._stream:  # what it still holds would fail once more at exit
                    setattr(sys, name, _Nowhere())
            if not self._outlives:
                if isinstance(error, BrokenPipeError):
                    raise
                why = getattr(error, "strerror", None) or str(error)
                raise UserError("E-IO-WRITE", f"what was asked for can't be printed: {why}", where="stdout") from error
        return len(text)

    def flush(self) -> None:
        """Everything was flushed as it was written."""


def guarded(stream: TextIO, *, outlives: bool) -> TextIO:
    """The stream; a failure raises E-IO-WRITE (BrokenPipeError where its reader has gone) or, for what outlives it,
    nothing."""
    return cast(TextIO, _Guarded(stream, outlives))
