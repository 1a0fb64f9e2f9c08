"""Text out of tokens as they come: whole characters only, and nothing from a stop string on."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

UNFINISHED = "\ufffd"  # what a decoder shows for the first bytes of a character


class TextStream:
    """Decodes one sequence token by token, works with any tokenizer of transformers.

    A token's text may depend on the one before it (a leading space, the bytes of one character),
    so each is decoded together with the last piece shown, which is then taken off again.
    """

    def __init__(
        self,
        tokenizer: Any,
        on_text: Callable[[str], None] | None = None,
        stop_strings: Sequence[str] = (),
    ) -> None:
        """``on_text`` is given the text piece by piece as it becomes certain."""
        self.text = ""
        """What has been handed on; a stop string is not part of it."""
        self.stopped = False
        self._tokenizer = tokenizer
        self._on_text = on_text
        self._stops = tuple(stop_strings)
        self._ids: list[int] = []  # from the last piece shown on
        self._shown = 0  # how many of them have been decoded for good
        self._held = ""  # may turn out to begin a stop string

    def push(self, token: int) -> None:
        """The next token. ``stopped`` tells whether a stop string is complete with it."""
        if self._tokenizer is None or self.stopped:
            return
        self._ids.append(token)
        before, now = self._decode(self._ids[: self._shown]), self._decode(self._ids)
        if len(now) <= len(before) or now.endswith(UNFINISHED):
            return
        self._ids, self._shown = self._ids[self._shown :], len(self._ids) - self._shown
        self._add(now[len(before) :])

    def end(self) -> None:
        """Hand on what is still held back: no stop string will be completed any more."""
        if self._tokenizer is None or self.stopped:
            return
        rest = self._decode(self._ids)[len(self._decode(self._ids[: self._shown])) :]
        self._ids, self._shown = [], 0
        self._add(rest)
        held, self._held = self._held, ""
        if not self.stopped:
            self._emit(held)

    def _decode(self, ids: list[int]) -> str:
        text: str = self._tokenizer.decode(ids, skip_special_tokens=True) if ids else ""
        return text

    def _add(self, piece: str) -> None:
        text = self._held + piece
        places = [place for stop in self._stops if (place := text.find(stop)) >= 0]
        if places:
            self.stopped, self._held = True, ""
            self._emit(text[: min(places)])
            return
        kept = max((_overlap(text, stop) for stop in self._stops), default=0)
        certain = len(text) - kept
        self._held = text[certain:]
        self._emit(text[:certain])

    def _emit(self, text: str) -> None:
        self.text += text
        if text and self._on_text:
            self._on_text(text)


def _overlap(text: str, stop: str) -> int:
    """How many characters at the end of ``text`` may be the beginning of ``stop``."""
    longest = min(len(text), len(stop) - 1)
    return next((n for n in range(longest, 0, -1) if text.endswith(stop[:n])), 0)
