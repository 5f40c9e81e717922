"""TextStream: tokens become text, piece by piece, and end where a stop string begins.

A piece is given out once it is certain: characters are whole, and no stop string can begin in it any more. The pieces
together are the same text, however the tokens were grouped.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any


class StopStrings:
    """Text that flows until one of some strings appears in it; the string itself is held back.

    Args:
        stops: the strings; none never ends.

    Attributes:
        found: whether a string has appeared.
    """

    def __init__(self, stops: Sequence[str]) -> None:
        self._stops, self._held, self.found = tuple(stops), "", False

    def feed(self, text: str) -> str:
        """Take more text, and give out what is certain to come before any of the strings."""
        if self.found:
            return ""
        self._held += text
        # the string that is complete first counts, so that the grouping of the text makes no difference
        places = [(at + len(stop), at) for stop in self._stops if (at := self._held.find(stop)) >= 0]
        if places:
            self.found = True
            out, self._held = self._held[: min(places)[1]], ""
            return out
        kept = max((self._overlap(stop) for stop in self._stops), default=0)
        cut = len(self._held) - kept
        out, self._held = self._held[:cut], self._held[cut:]
        return out

    def end(self) -> str:
        """What was held back, now that no more text comes."""
        out, self._held = self._held, ""
        return out

    def _overlap(self, stop: str) -> int:
        """How many characters at the end of the held text are the beginning of a string."""
        longest = min(len(stop) - 1, len(self._held))
        return next((n for n in range(longest, 0, -1) if self._held.endswith(stop[:n])), 0)


class TextStream:
    """The text of an answer, token by token.

    Args:
        tokenizer: a fast tokenizer of transformers.
        stops: texts that end the answer.

    Attributes:
        stopped: whether a stop string has appeared.
    """

    def __init__(self, tokenizer: Any, stops: Sequence[str]) -> None:
        from tokenizers.decoders import DecodeStream

        self._tokenizer, self._stops = tokenizer, StopStrings(stops)
        self._stream: Any = DecodeStream(skip_special_tokens=True)
        self._ids: list[int] = []
        self._decoded = 0

    @property
    def stopped(self) -> bool:
        """Whether a stop string has appeared."""
        return self._stops.found

    def feed(self, token: int) -> str:
        """The text that one more token makes certain."""
        self._ids.append(token)
        piece = self._stream.step(self._tokenizer.backend_tokenizer, token)
        if not piece:
            return ""
        self._decoded = len(self._ids)
        return self._stops.feed(piece)

    def end(self) -> str:
        """The rest, once no more tokens come; characters that were cut off become U+FFFD."""
        if self.stopped:
            return ""
        rest = self._tokenizer.decode(self._ids[self._decoded :], skip_special_tokens=True)
        return self._stops.feed(rest) + ("" if self.stopped else self._stops.end())
