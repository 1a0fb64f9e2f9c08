"""Whether tokens can be taken out of a model's cache again, so that a text may go on from an
earlier place without being read anew.

Keys and values lie token by token, and the newest can be cut off. A recurrent or convolution state
has all tokens in one sum; a window has forgotten what stood before it; compressed keys have several
tokens in one. Such a cache goes on from where it is, or from a copy that was made in time.
"""

from __future__ import annotations

import copy
from typing import Any

from transformers.cache_utils import (
    DummyLayer,
    DynamicIndexedLayer,
    DynamicLayer,
    DynamicSlidingWindowLayer,
)

from moerun.live.kvcache import GrowingLayer, WindowLayer

# Exact classes: a subclass may keep a state that the inherited `crop` knows nothing of, as
# DeepSeek-V4's compressed keys (transformers' own `is_croppable` is inherited, too).
_WHOLE = (DynamicLayer, GrowingLayer, DynamicIndexedLayer, DummyLayer)
_WINDOWS = (DynamicSlidingWindowLayer, WindowLayer)


def can_crop(cache: Any, tokens: int) -> bool:
    """Whether the newest ``tokens`` of ``cache`` can be taken out by ``cache.crop(-tokens)``, and
    the cache is then that of the text before them.

    False for any layer that is not known to allow it. No tokens can always be taken out.
    """
    return tokens <= 0 or all(_layer_can(layer) for layer in cache.layers)


def is_whole(layer: Any) -> bool:
    """Whether a layer of a cache allows it whatever it has read."""
    return type(layer) in _WHOLE


def _layer_can(layer: Any) -> bool:
    if type(layer) in _WINDOWS:
        # Not yet full, it holds every token there was.
        return bool(layer.get_seq_length() < layer.sliding_window)
    return is_whole(layer)


def copied(cache: Any) -> Any:
    """A copy of a cache, or a layer of one, in memory of its own: what a text goes on from, where
    `can_crop` is False and the text up to here may be wanted again. The copy takes as many bytes
    as the original."""
    return copy.deepcopy(cache)
