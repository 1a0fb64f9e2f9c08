"""Which texts the forward passes of a run are of.

A pass has a row of token ids for each of its texts. Whoever runs passes says whose rows come next:
a generation its own text, a batch all of its texts. Policies and recordings are told by that where
a text begins, and where in it a pass's tokens stand.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager


class Text:
    """A text that is being read and gone on with.

    first   tokens of it that no pass needs to read: their keys and values had been kept
    prompt  tokens of its prompt, those included; None: those of its first pass
    tokens  read so far
    """

    def __init__(self, first: int = 0, prompt: int | None = None) -> None:
        self.first = self.tokens = first
        self.prompt = prompt

    @property
    def begins(self) -> bool:
        """Whether its next pass is its first."""
        return self.tokens == self.first


class Texts:
    """The texts in progress, and those of the pass that comes next."""

    def __init__(self) -> None:
        self.rows: list[Text] = []
        """The texts of the coming passes, a row each; none: nobody has said."""
        self._going_on: list[Text] = []

    def begin(self, first: int = 0, prompt: int | None = None) -> Text:
        """A text begins; see `Text`. It goes on until `end`."""
        text = Text(first, prompt)
        self._going_on.append(text)
        return text

    def end(self, text: Text) -> None:
        """No pass of this text comes any more. Harmless where that is known."""
        if text in self._going_on:
            self._going_on.remove(text)

    def has(self, text: Text) -> bool:
        """Whether a text is in progress."""
        return text in self._going_on

    @contextmanager
    def passes_of(self, texts: Sequence[Text]) -> Iterator[None]:
        """The passes until the end are of these texts, in this order."""
        before, self.rows = self.rows, list(texts)
        try:
            yield
        finally:
            self.rows = before

    @property
    def begins_sequence(self) -> bool:
        """Whether the next pass is the first of a text, and no other text is in progress."""
        return len(self._going_on) == 1 and self.rows == self._going_on and self.rows[0].begins

    def passed(self, tokens: int) -> None:
        """A pass over so many tokens of each row's text is complete."""
        for text in self.rows:
            if text.prompt is None:
                text.prompt = text.tokens + tokens
            text.tokens += tokens
