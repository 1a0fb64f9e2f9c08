"""What is cached of several texts that are decoded together, side by side.

Keys and values: texts end at the same column. What is missing of a shorter one is at its left,
where a mask hides it. So a token of each text is appended by one operation, as in a batch of
transformers' generate(). The state of a recurrent layer is of one size for any text: a row a text.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from transformers import DynamicCache
from transformers.cache_utils import (
    DummyLayer,
    DynamicSlidingWindowLayer,
    LinearAttentionLayer,
)

from moerun.errors import RunError
from moerun.live.kvcache import GrowingLayer, WindowLayer, new_cache

_SIDE_BY_SIDE = (GrowingLayer, WindowLayer, LinearAttentionLayer, DummyLayer)  # exactly these


class BatchCache:
    """The caches of some texts as one; ``lengths`` has their tokens."""

    def __init__(self, model: Any) -> None:
        self.lengths: list[int] = []
        self.cache: DynamicCache | None = None
        """Of all texts: keys and values [texts, heads, tokens, width]; None where there is none."""
        self._model = model

    def add(self, cache: DynamicCache, tokens: int) -> None:
        """Put the cache of one more text of ``tokens``, which is used up, behind the others."""
        if self.cache is None:
            self.cache, self.lengths = cache, [tokens]
            return
        self.lengths.append(tokens)
        longest = max(self.lengths)
        for mine, new in zip(self.cache.layers, cache.layers, strict=True):
            if isinstance(mine, LinearAttentionLayer):
                _join_states(mine, new)
            elif not isinstance(mine, DummyLayer):
                _join(mine, new, longest)
        cache.layers.clear()

    def remove(self, row: int, *, keep: bool = False) -> DynamicCache | None:
        """Take a text out; its cache where it is to be kept."""
        assert self.cache is not None
        tokens = self.lengths.pop(row)
        if not self.lengths:
            alone, self.cache = self.cache, None
            return alone if keep else None
        taken = self._copied(row, tokens) if keep else None
        others = [i for i in range(len(self.lengths) + 1) if i != row]
        for layer in self.cache.layers:
            if isinstance(layer, LinearAttentionLayer):
                _set_states(layer, lambda _, state: state[others].contiguous())
            elif not isinstance(layer, DummyLayer):
                _select(layer, others, max(self.lengths))
        return taken

    def grown(self) -> None:
        """A token has been appended to each text."""
        self.lengths = [tokens + 1 for tokens in self.lengths]

    def mask(self, device: torch.device) -> torch.Tensor:
        """Which columns each text has once a token is appended, int64[texts, tokens]."""
        longest = max(self.lengths) + 1
        columns = torch.arange(longest, device=device)
        missing = torch.tensor([longest - 1 - tokens for tokens in self.lengths], device=device)
        return (columns[None] >= missing[:, None]).long()

    def positions(self, device: torch.device) -> torch.Tensor:
        """Of the tokens that are appended next, int64[texts, 1]."""
        return torch.tensor(self.lengths, device=device)[:, None]

    def _copied(self, row: int, tokens: int) -> DynamicCache:
        """A text's cache on its own."""
        assert self.cache is not None
        alone = new_cache(self._model, tokens)
        for i, (mine, other) in enumerate(zip(self.cache.layers, alone.layers, strict=True)):
            if isinstance(mine, LinearAttentionLayer):
                alone.layers[i] = _copied_states(mine, row)
                continue
            if isinstance(mine, DummyLayer):
                continue
            held = min(tokens, mine.keys.shape[-2])
            for name in ("keys", "values"):
                setattr(other, name, getattr(mine, name)[row : row + 1, :, -held:].clone())
            other.is_initialized, other.dtype, other.device = True, mine.dtype, mine.device
            if isinstance(other, DynamicSlidingWindowLayer):
                other.cumulative_length = tokens
        return alone


def check_batches(model: Any) -> None:
    """RunError where a model's cache has layers that are not known to go side by side: their
    indexer or their compression counts the columns that are missing of shorter texts."""
    for layer in new_cache(model, 1).layers:
        if type(layer) not in _SIDE_BY_SIDE:
            raise RunError(
                f"{model.config.model_type} keeps more of a text than keys, values and states "
                f"({type(layer).__name__}), and texts of other lengths cannot share a pass with "
                "it: leave --max-batch out"
            )


def _join_states(mine: Any, new: Any) -> None:
    """Put a text's recurrent states behind those of the others."""
    _set_states(mine, lambda of, state: torch.cat([state, of(new)]))


def _set_states(layer: Any, change: Callable[[Callable[[Any], Any], torch.Tensor], Any]) -> None:
    """Put ``change(of, state)`` in the place of each state [texts, ...] of a layer; ``of`` finds
    the same state of another layer."""
    for name in ("conv_states", "recurrent_states"):
        for i, state in getattr(layer, name).items():
            if state is not None:
                of = partial(_state, name, i)
                getattr(layer, name)[i] = change(of, state)


def _state(name: str, i: int, layer: Any) -> Any:
    return getattr(layer, name)[i]


def _copied_states(layer: Any, row: int) -> Any:
    """A layer with a text's states alone."""
    alone = copy.copy(layer)
    for name, value in vars(layer).items():
        if isinstance(value, dict):  # of each of the layer's states
            setattr(alone, name, dict(value))
    _set_states(alone, lambda _, state: state[row : row + 1].clone())
    return alone


def _join(mine: Any, new: Any, longest: int) -> None:
    """Put a text's states behind those of the others, all ending at one column."""
    columns = _columns(mine, longest)
    if isinstance(mine, GrowingLayer):
        mine.limit_tokens = max(mine.limit_tokens, new.limit_tokens)
    for name in ("keys", "values"):
        rows = [_aligned(getattr(layer, name), columns) for layer in (mine, new)]
        setattr(mine, name, torch.cat(rows))
    _set_length(mine, longest)


def _select(layer: Any, rows: Sequence[int], longest: int) -> None:
    """Keep these rows, and the columns that the longest of them has."""
    columns = _columns(layer, longest)
    for name in ("keys", "values"):
        kept = getattr(layer, name)[list(rows)]
        setattr(layer, name, kept[:, :, -columns:].contiguous())
    _set_length(layer, longest)


def _columns(layer: Any, longest: int) -> int:
    """How many columns a layer holds of texts of which the longest has so many tokens."""
    if isinstance(layer, DynamicSlidingWindowLayer):
        return min(longest, int(layer.sliding_window) - 1)
    return longest


def _aligned(states: torch.Tensor, columns: int) -> torch.Tensor:
    """States [texts, heads, tokens, width] with so many columns, the last ones at the end."""
    missing = columns - states.shape[-2]
    return F.pad(states, (0, 0, missing, 0)) if missing > 0 else states[..., -columns:, :]


def _set_length(layer: Any, longest: int) -> None:
    if isinstance(layer, DynamicSlidingWindowLayer):
        layer.cumulative_length = longest
