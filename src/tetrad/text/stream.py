"""Text as it grows: never half a character, and never the beginning of a stop string that may still be completed."""

from collections.abc import Sequence

from tetrad.text.tokenizer import Tokenizer


class TextStream:
    """One response. stops: strings that end it, left out; the first that is complete counts and sets `stopped`."""

    def __init__(self, tokenizer: Tokenizer, stops: Sequence[str] = ()) -> None:
        self._decode = tokenizer.stream()
        self._stops = [stop for stop in stops if stop]
        self._held = ""
        self.stopped = False

    def push(self, token: int) -> str:
        """What can be shown after this id."""
        return self._shown(self._decode(token))

    def close(self) -> str:
        """What was held back, once no id will follow."""
        shown = self._shown(self._decode(None))
        held, self._held = self._held, ""
        return shown + held

    def _shown(self, new: str) -> str:
        if self.stopped or not self._stops:
            return "" if self.stopped else new
        text = self._held + new
        matches = [(at + len(stop), at) for stop in self._stops if (at := text.find(stop)) >= 0]
        self.stopped = bool(matches)
        keep = min(matches)[1] if matches else len(text) - max(_beginning(text, stop) for stop in self._stops)
        self._held = "" if matches else text[keep:]
        return text[:keep]


def _beginning(text: str, stop: str) -> int:
    """How many of the last characters of the text could begin the stop string."""
    most = min(len(text), len(stop) - 1)
    return next((n for n in range(most, 0, -1) if text.endswith(stop[:n])), 0)
