"""The keys and values of the last texts, kept for a text that begins alike: a conversation's next
turn reads only what is new.

A matrix product's last bit may depend on the number of its rows. So where a text goes on from is
one of two:

exactly  Prompts are read in chunks of `CHUNK_TOKENS`. A text goes on from the end of a chunk that
         both begin with: what is kept, and what is still read, come out of the passes that a run
         from the start makes, so both have the same bits. Answers are read again, since they were
         decoded token by token.
nearly   A text goes on from the token where both part. What was computed in passes of other
         lengths differs by some 1e-5 in float32, and by the rounding of a pass in 16 bits.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer

from moerun.live.cropping import can_crop, copied, is_whole
from moerun.live.kvcache import new_cache, set_limit

CHUNK_TOKENS = 128


class Begun(NamedTuple):
    """A cache to go on with, and the number of a prompt's tokens that it holds."""

    cache: DynamicCache
    tokens: int


class Mark(NamedTuple):
    """The end of the last whole chunk of a prompt, to which a cache may be taken back.

    tokens  of the text until there
    layers  by number, copies of those layers of the cache that cannot be cut
    """

    tokens: int
    layers: dict[int, Any]


class KeptText(NamedTuple):
    """A text's tokens, as many as its cache has, and where its chunks end."""

    ids: list[int]
    cache: DynamicCache
    mark: Mark | None


class KeptCache:
    """Holds the caches of the last texts: with those that are in use, no more than there is memory
    planned for."""

    def __init__(self, model: Any, texts: int = 1, chunk_tokens: int = 0) -> None:
        """``texts``: of so many there may be caches at once. ``chunk_tokens``: in chunks of so many
        prompts are read, and texts go on exactly; 0: nearly, see the module."""
        self._model = model
        self._limit = texts
        self.chunk_tokens = chunk_tokens
        self._texts: list[KeptText] = []  # the one that ended last at the end

    @property
    def token_ids(self) -> Sequence[int]:
        """The text that ended last."""
        return self._texts[-1].ids if self._texts else []

    def begin(self, prompt_ids: Sequence[int], limit_tokens: int, in_use: int = 0) -> Begun:
        """A cache for a text of at most ``limit_tokens`` that begins with ``prompt_ids``; there are
        caches ``in_use`` by other texts.

        At least one token of the prompt is left to be read: its logits are not kept.
        """
        found, shared = self._taken(prompt_ids)
        room = self._limit - 1 - in_use
        self._texts = self._texts[-room:] if room > 0 else []  # before another takes memory
        if found is None:
            return Begun(new_cache(self._model, limit_tokens), 0)
        set_limit(found.cache, limit_tokens)
        return Begun(found.cache, shared)

    def _taken(self, prompt_ids: Sequence[int]) -> tuple[KeptText | None, int]:
        """The text that shares most with a prompt, cut where the prompt can go on, and kept no
        more."""
        shared = [self._shared(text, prompt_ids) for text in self._texts]
        order = sorted(range(len(shared)), key=lambda i: (shared[i], i), reverse=True)
        for i in order:
            if shared[i] and _taken_back(self._texts[i], shared[i]):
                return self._texts.pop(i), shared[i]
        return None, 0

    def _shared(self, text: KeptText, prompt_ids: Sequence[int]) -> int:
        """How many tokens a prompt may go on after."""
        least = len(prompt_ids) - 1
        shared = min(shared_tokens(text.ids, prompt_ids), least)
        if not self.chunk_tokens:
            return shared
        read = 0 if text.mark is None else text.mark.tokens
        return min(shared, read) // self.chunk_tokens * self.chunk_tokens

    def mark(self, cache: DynamicCache, tokens: int) -> Mark | None:
        """Where the whole chunks of a prompt have been read, with what is needed to come back."""
        if not tokens:
            return None
        copies = {i: copied(layer) for i, layer in enumerate(cache.layers) if not is_whole(layer)}
        return Mark(tokens, copies)

    def keep(self, token_ids: Sequence[int], cache: DynamicCache, mark: Mark | None = None) -> None:
        """Keep the cache of a text whose first tokens are ``token_ids``, as far as it has them.

        A cache whose layers differ in length, as an interrupted pass leaves it, is not kept.
        """
        lengths = {
            layer.get_seq_length() for layer in cache.layers if isinstance(layer, DynamicLayer)
        }
        if len(lengths) == 1 and 0 < (held := lengths.pop()) <= len(token_ids):
            self._texts.append(KeptText(list(token_ids[:held]), cache, mark))

    def drop(self) -> None:
        """Keep nothing."""
        self._texts = []


def _taken_back(text: KeptText, tokens: int) -> bool:
    """Take a text's cache back to its first ``tokens``; False, changing nothing, where it cannot
    be."""
    if crop(text.cache, len(text.ids) - tokens):
        return True
    if text.mark is None or text.mark.tokens != tokens:
        return False
    for i, layer in enumerate(text.cache.layers):
        if i in text.mark.layers:
            text.cache.layers[i] = text.mark.layers[i]
        else:
            layer.crop(-(len(text.ids) - tokens))
    return True


def shared_tokens(one: Sequence[int], other: Sequence[int]) -> int:
    """How many tokens both begin with."""
    pairs = zip(one, other, strict=False)
    return next((i for i, (a, b) in enumerate(pairs) if a != b), min(len(one), len(other)))


def crop(cache: DynamicCache, tokens: int) -> bool:
    """Take the last ``tokens`` off a cache; False, changing nothing, where a layer cannot."""
    if not tokens:
        return True
    if not can_crop(cache, tokens):
        return False
    for layer in cache.layers:
        layer.crop(-tokens)
    return True
