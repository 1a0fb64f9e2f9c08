"""Text streams: whole characters, stop strings wherever tokens break them."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st
from moerun.checkpoint.hub import resolve
from moerun.live.text import TextStream
from moerun.offload.load import load_tokenizer

TOKENIZER = load_tokenizer(resolve("tiny"))


class Letters:
    """A tokenizer whose tokens are the bytes of a text."""

    def decode(self, ids: list[int], skip_special_tokens: bool) -> str:
        return bytes(ids).decode("utf-8", errors="replace")


def streamed(tokenizer: object, ids: list[int], *stops: str) -> tuple[list[str], TextStream, int]:
    """The pieces handed on, the stream, and how many tokens it took."""
    pieces: list[str] = []
    stream = TextStream(tokenizer, pieces.append, stops)
    taken = 0
    for token in ids:
        stream.push(token)
        taken += 1
        if stream.stopped:
            break
    stream.end()
    assert stream.text == "".join(pieces)
    return pieces, stream, taken


@given(st.text(alphabet="ab é漢😀\n", max_size=30))
def test_pieces_are_whole_characters_and_join_to_the_text(text: str) -> None:
    spelled = ((Letters(), list(text.encode())), (TOKENIZER, TOKENIZER(text).input_ids))
    for tokenizer, ids in spelled:
        pieces, _, _ = streamed(tokenizer, ids)
        assert "".join(pieces) == text
        assert not any("\ufffd" in piece for piece in pieces)


def test_half_a_character_at_the_end_is_shown_as_such() -> None:
    pieces, _, _ = streamed(Letters(), list("né".encode()[:-1]))
    assert "".join(pieces) == "n\ufffd"


@given(
    st.text(alphabet="abc", max_size=24),
    st.lists(st.text(alphabet="abc", min_size=1, max_size=4), min_size=1, max_size=3),
)
def test_text_ends_before_the_first_stop_string(text: str, stops: list[str]) -> None:
    pieces, stream, taken = streamed(Letters(), list(text.encode()), *stops)
    found = [i for i in range(len(text) + 1) if text[:i].endswith(tuple(stops))]
    if not found:
        assert ("".join(pieces), stream.stopped, taken) == (text, False, len(text))
        return
    seen = text[: found[0]]
    assert (stream.stopped, taken) == (True, found[0])
    assert "".join(pieces) == seen[: min(seen.find(s) for s in stops if s in seen)]


@pytest.mark.parametrize("stop", ["lazy", "e la", " dog", "q"])
def test_stop_strings_lie_across_tokens(stop: str) -> None:
    text = "The quick brown fox jumps over the lazy dog."
    pieces, stream, _ = streamed(TOKENIZER, TOKENIZER(text).input_ids, stop)
    assert stream.stopped
    assert "".join(pieces) == text[: text.index(stop)]


def test_what_only_began_like_a_stop_string_comes_at_the_end() -> None:
    pieces, stream, _ = streamed(Letters(), list(b"one\nUs"), "\nUser:")
    assert pieces == ["o", "n", "e", "\nUs"]
    assert not stream.stopped
