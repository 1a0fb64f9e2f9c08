"""What a model's cache holds, learnt from the model itself: it reads a token or two on the meta
device, where tensors have shapes and no memory.

So whatever transformers caches is counted, as it is: keys and values of any width, windows, what
heads share, and the states of layers that keep no tokens.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from moerun.checkpoint.families import empty_model, find_attention, find_experts


@dataclass(frozen=True, slots=True)
class CacheLayer:
    """What a layer caches, in bytes: of each token, and of states that are as large for any text.
    ``window``: the most tokens it keeps from one pass to the next; None: all."""

    token_bytes: int
    state_bytes: int
    window: int | None
    state_width: int = 0  # numbers of a token that a recurrent state is updated with

    def kept_bytes(self, tokens: int) -> int:
        """Bytes that the layer keeps between two passes, after ``tokens`` tokens."""
        kept = tokens if self.window is None else min(tokens, self.window)
        return kept * self.token_bytes + self.state_bytes


@dataclass(frozen=True, slots=True)
class ModelShape:
    """What a memory plan must know of a model besides its weights.

    widest       rows of the widest dense matrix between two others: no head's, no attention's
    holds_scores attention holds its scores whole, as it does where torch's kernels cannot do it
    """

    cache: tuple[CacheLayer, ...]
    widest: int
    holds_scores: bool

    def cache_bytes(self, tokens: int) -> int:
        """The cache of ``tokens`` tokens, and one layer's again: it grows by copying, and a layer
        with a window has all of a prompt while it reads it."""
        growing = max((layer.token_bytes for layer in self.cache), default=0)
        return sum(layer.kept_bytes(tokens) for layer in self.cache) + tokens * growing

    @property
    def state_width(self) -> int:
        """The widest keys and values, together, that a layer folds into a recurrent state."""
        return max((layer.state_width for layer in self.cache), default=0)


def shape_of(config: Any, dtype: torch.dtype) -> ModelShape:
    """The shape of the model of a configuration, its weights of ``dtype``. Takes up to a second
    or two, for the largest."""
    model: Any = empty_model(config, dtype)
    for _, experts in find_experts(model):  # whose part no meta tensor can decide
        experts.forward = _as_it_was
    one, two = (_cache_of(model, tokens) for tokens in (1, 2))
    layers = []
    for first, second in zip(one.layers, two.layers, strict=True):
        token_bytes = held_bytes(second) - held_bytes(first)
        window = first.get_max_length()
        layers.append(
            CacheLayer(
                token_bytes=token_bytes,
                state_bytes=held_bytes(first) - token_bytes,
                # What a layer keeps has room for the next token.
                window=None if window < 0 else max(window - 1, 1),
                state_width=_state_width(first),
            )
        )
    return ModelShape(
        cache=tuple(layers),
        widest=_widest(model),
        holds_scores=model.config.get_text_config()._attn_implementation == "eager",
    )


def held_bytes(layer: Any) -> int:
    """What a layer of a cache holds, tensors that are parts of larger ones as these."""
    storages = (tensor.untyped_storage() for tensor in _tensors(vars(layer).values()))
    return sum({each._cdata: each.nbytes() for each in storages}.values())


def _tensors(values: Any) -> Iterator[torch.Tensor]:
    for value in values:
        if isinstance(value, torch.Tensor):
            yield value
        elif isinstance(value, dict):
            yield from _tensors(value.values())


def _state_width(layer: Any) -> int:
    """Of recurrent states [batch, heads, key, value]: heads times widths."""
    states = list(_tensors(getattr(layer, "recurrent_states", {}).values()))
    return sum(state.shape[1] * sum(state.shape[2:]) for state in states)


def _as_it_was(hidden: torch.Tensor, *_: Any, **__: Any) -> torch.Tensor:
    return torch.zeros_like(hidden)


def _cache_of(model: Any, tokens: int) -> Any:
    from transformers import DynamicCache

    cache = DynamicCache(config=model.config.get_text_config(decoder=True))
    ids = torch.zeros(1, tokens, dtype=torch.long, device="meta")
    with torch.inference_mode():
        model(input_ids=ids, past_key_values=cache, use_cache=True)
    return cache


def _widest(model: nn.Module) -> int:
    head = model.get_output_embeddings()  # type: ignore[operator]
    apart = {head, *(linear for _, linear in find_attention(model))}
    rows = (m.out_features for m in model.modules() if isinstance(m, nn.Linear) and m not in apart)
    return max(rows, default=0)
