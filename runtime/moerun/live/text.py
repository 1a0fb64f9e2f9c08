"""Text out of tokens as they come: whole characters only, nothing from a stop string on, and the
reasoning before an answer apart from it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from moerun.live.turn import REASONING, TOOL_CALLS, hidden_ids

UNFINISHED = "\ufffd"  # what a decoder shows for the first bytes of a character


class TextStream:
    """Decodes one sequence token by token, works with any tokenizer of transformers.

    A token's text may depend on the one before it (a leading space, the bytes of one character),
    so each is decoded together with the last piece shown, which is then taken off again.
    Special tokens are not shown, but stop strings may have them and channels are marked by them.
    """

    def __init__(
        self,
        tokenizer: Any,
        on_text: Callable[[str], None] | None = None,
        stop_strings: Sequence[str] = (),
        *,
        on_reasoning: Callable[[str], None] | None = None,
        parser: Any = None,
    ) -> None:
        """``on_text`` is given the text piece by piece as it becomes certain, ``on_reasoning``
        what ``parser``, one of transformers' response parsers, takes for reasoning."""
        self.text = ""
        """What has been handed on; a stop string is not part of it."""
        self.reasoning = ""
        self.tool_calls: list[Any] = []
        """Calls of tools that are complete, as the response template gives them."""
        self.stopped = False
        self._tokenizer = tokenizer
        self._on_text = on_text
        self._on_reasoning = on_reasoning
        self._stops = tuple(stop_strings)
        self._parser = parser
        self._hidden = hidden_ids(tokenizer) if stop_strings or parser else frozenset()
        self._hidden_texts: dict[str, None] = {}  # of the special tokens that came
        self._call = ""  # of a tool, not complete yet
        self._parted = False  # the region that is open follows another of its channel
        self._ids: list[int] = []  # from the last piece shown on
        self._shown = 0  # how many of them have been decoded for good
        self._held: list[tuple[str, bool]] = []  # pieces, whether shown; may begin a stop string

    def push(self, token: int) -> None:
        """The next token. ``stopped`` tells whether a stop string is complete with it."""
        if self._tokenizer is None or self.stopped:
            return
        if token in self._hidden:
            self._add(self._tokenizer.decode([token], skip_special_tokens=False), shown=False)
            return
        self._ids.append(token)
        before, now = self._decode(self._ids[: self._shown]), self._decode(self._ids)
        if len(now) <= len(before) or now.endswith(UNFINISHED):
            return
        self._ids, self._shown = self._ids[self._shown :], len(self._ids) - self._shown
        self._add(now[len(before) :])

    def end(self) -> None:
        """Hand on what is still held back: no stop string will be completed any more."""
        if self._tokenizer is None:
            return
        if not self.stopped:
            rest = self._decode(self._ids)[len(self._decode(self._ids[: self._shown])) :]
            self._ids, self._shown = [], 0
            self._add(rest)
        held, self._held = self._held, []
        for text, shown in held:
            self._emit(text, shown)
        self._end_channels()

    def _decode(self, ids: list[int]) -> str:
        text: str = self._tokenizer.decode(ids, skip_special_tokens=True) if ids else ""
        return text

    def _add(self, piece: str, *, shown: bool = True) -> None:
        if shown and self._held and self._held[-1][1]:
            piece = self._held.pop()[0] + piece
        self._held.append((piece, shown))
        text = "".join(part for part, _ in self._held)
        places = [place for stop in self._stops if (place := text.find(stop)) >= 0]
        if places:
            self.stopped = True
            self._emit_held(min(places))
            self._held = []
            return
        kept = max((_overlap(text, stop) for stop in self._stops), default=0)
        self._emit_held(len(text) - kept)

    def _emit_held(self, certain: int) -> None:
        """Hand on so many characters of what is held."""
        while certain > 0:
            text, shown = self._held.pop(0)
            if len(text) > certain:
                self._held.insert(0, (text[certain:], shown))
            self._emit(text[:certain], shown)
            certain -= len(text)

    def _emit(self, text: str, shown: bool) -> None:
        if self._parser is None:
            self._say(text if shown else "")
            return
        if not shown:
            self._hidden_texts[text] = None
        try:
            events = self._parser.feed(text)
        except Exception:  # what it takes for JSON may be none: it is shown as it came
            self._parser = None
            self._say_call()
            self._say(text if shown else "")
            return
        self._hear(events)

    def _end_channels(self) -> None:
        parser, self._parser = self._parser, None
        if parser is None:
            return
        try:
            _, events = parser.finalize()
        except Exception:  # a field that is required has not come, or one is not whole
            self._say_call()
            return
        self._hear(events)

    def _say_call(self) -> None:
        """Show what was taken for a call of a tool and is none."""
        text, self._call = self._call, ""
        self._say(self._without_hidden(text))

    def _hear(self, events: list[dict[str, Any]]) -> None:
        """Hand on the channels' text; two regions of one channel are two paragraphs."""
        for event in events:
            if event["field"] == TOOL_CALLS:
                self._hear_call(event)
                continue
            reasoning = event["field"] in REASONING
            if event["type"] == "region_open":
                self._parted = bool(self.reasoning if reasoning else self.text)
            elif event["type"] == "region_chunk":
                text = self._without_hidden(event["text"])
                if text and self._parted:
                    self._parted = False
                    text = f"\n{text}"
                self._say(text, reasoning=reasoning)

    def _hear_call(self, event: dict[str, Any]) -> None:
        """A part of a call of a tool, which counts when it is complete."""
        self._call += event.get("text", "")
        if event["type"] == "region_close":
            found, self._call = event["value"], ""
            self.tool_calls += found if isinstance(found, list) else [found]

    def _without_hidden(self, text: str) -> str:
        for special in self._hidden_texts:
            text = text.replace(special, "")
        return text

    def _say(self, text: str, *, reasoning: bool = False) -> None:
        if reasoning:
            self.reasoning += text
        else:
            self.text += text
        heard = self._on_reasoning if reasoning else self._on_text
        if text and heard:
            heard(text)


def _overlap(text: str, stop: str) -> int:
    """How many characters at the end of ``text`` may be the beginning of ``stop``."""
    longest = min(len(text), len(stop) - 1)
    return next((n for n in range(longest, 0, -1) if text.endswith(stop[:n])), 0)
