"""The cache of keys and values of a generation: transformers' own, with layers that grow in place.

A stock layer copies all that it holds for each new token. And where no mask says otherwise, torch
attends to grouped heads in bfloat16 on the CPU one head after the other.
"""

from __future__ import annotations

from typing import Any

import torch
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

from moerun.checkpoint.families import layer_configs

STEP_TOKENS = 256  # by which a buffer grows
_KEEPING = ("update", "store_compression_weights")  # methods after which a layer keeps other states


class GrowingLayer(DynamicLayer):  # type: ignore[misc]
    """Keys and values of a layer, appended in buffers that grow by STEP_TOKENS."""

    keys: torch.Tensor
    values: torch.Tensor

    def __init__(self, limit_tokens: int) -> None:
        """A buffer holds ``limit_tokens`` at most, unless a text needs more."""
        super().__init__()
        self.limit_tokens = limit_tokens
        self._buffers: dict[str, torch.Tensor] = {}

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        """Take type and device from the first states; drop the buffers of an earlier text."""
        super().lazy_initialization(key_states, value_states)
        self._buffers.clear()

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Append the states [batch, heads, tokens, width]; returns the states of all tokens."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        held = self.get_seq_length()
        self.keys = self._append("keys", held, self.keys, key_states)
        self.values = self._append("values", held, self.values, value_states)
        return self.keys, self.values

    @property
    def holds_halves(self) -> bool:
        """Whether it holds something of one text, in bfloat16."""
        if not self.is_initialized or self.keys.ndim != 4:
            return False
        texts, _, tokens, _ = self.keys.shape
        return texts == 1 and tokens > 0 and self.keys.dtype is torch.bfloat16

    def extend(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Have one token more, whose states [1, heads, 1, width] are the caller's to write: the
        states of all tokens."""
        held = self.get_seq_length()
        self.keys = self._extended("keys", held, self.keys)
        self.values = self._extended("values", held, self.values)
        return self.keys, self.values

    def _extended(self, name: str, held: int, old: torch.Tensor) -> torch.Tensor:
        return self._room(name, held, old, old[..., :1, :])[..., : held + 1, :]

    def _append(self, name: str, held: int, old: torch.Tensor, new: torch.Tensor) -> torch.Tensor:
        buffer, total = self._room(name, held, old, new), held + new.shape[-2]
        buffer[..., held:total, :] = new
        return buffer[..., :total, :]

    def _room(self, name: str, held: int, old: torch.Tensor, new: torch.Tensor) -> torch.Tensor:
        """The buffer, with room for the ``held`` tokens of ``old``, which are there, and the
        new ones."""
        total = held + new.shape[-2]
        buffer = self._buffers.get(name)
        # The stock layer's other methods replace the held tensor by one outside the buffer.
        if buffer is None or buffer.shape[-2] < total or not _begins_with(buffer, old, held):
            tokens = max(total, min(total + STEP_TOKENS, self.limit_tokens))
            buffer = new.new_empty(*new.shape[:-2], tokens, new.shape[-1])
            if held:
                buffer[..., :held, :] = old
            self._buffers[name] = buffer
        return buffer


class WindowLayer(DynamicSlidingWindowLayer):  # type: ignore[misc]
    """Keys and values of a layer that looks back over a window, in memory of the window's size. The
    stock layer's are views of those of the whole prompt, and so keep those alive until the next
    token."""

    keys: torch.Tensor
    values: torch.Tensor

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Append the states [batch, heads, tokens, width]; returns all states in reach."""
        states: tuple[torch.Tensor, torch.Tensor] = super().update(
            key_states, value_states, *args, **kwargs
        )
        self.keys, self.values = _alone(self.keys), _alone(self.values)
        return states


def _alone(states: torch.Tensor) -> torch.Tensor:
    """The tensor [..., tokens, width] itself, or a copy where the tensor is part of one that has
    more than a token more."""
    tokens = states.shape[-2] if states.ndim > 1 else 1
    one_bytes = states.nbytes // tokens if tokens else 0
    return (
        states.clone() if states.untyped_storage().nbytes() > states.nbytes + one_bytes else states
    )


def _begins_with(buffer: torch.Tensor, held: torch.Tensor, tokens: int) -> bool:
    """Whether the ``tokens`` held [batch, heads, tokens, width] are the first of ``buffer``."""
    if not tokens:
        return True
    same = buffer.data_ptr() == held.data_ptr() and buffer.stride() == held.stride()
    return same and buffer.shape[:2] == held.shape[:2]


def new_cache(model: Any, limit_tokens: int) -> DynamicCache:
    """An empty cache for one text of at most ``limit_tokens``. Layers with a sliding window keep
    the window only."""
    config = model.config.get_text_config(decoder=True)
    cache = DynamicCache(config=config)
    cache.layers = [_replacement(layer, limit_tokens) for layer in cache.layers]
    if _attends_quicker_with_a_mask(model, config):
        for layer in cache.layers:
            # All that this says of a layer of a DynamicCache is that decoding has a mask.
            layer.is_compileable = True
    return cache


def set_limit(cache: DynamicCache, limit_tokens: int) -> None:
    """Let the buffers of ``cache`` grow to ``limit_tokens`` from now on."""
    for layer in cache.layers:
        if isinstance(layer, GrowingLayer):
            layer.limit_tokens = limit_tokens


def _replacement(layer: Any, limit_tokens: int) -> Any:
    """A layer that does the same as an empty stock layer in less time or memory, or the stock layer
    itself where there is none."""
    if type(layer) is DynamicLayer:
        return GrowingLayer(limit_tokens)
    if type(layer) is DynamicSlidingWindowLayer:
        return WindowLayer(layer.sliding_window)
    if isinstance(layer, DynamicSlidingWindowLayer):
        layer.__class__ = _sparing(type(layer))
    return layer


def _sparing(kind: Any) -> Any:
    """The same as a ``kind`` of layer that keeps a window and more (DeepSeek-V4), in memory of its
    own: what the stock layer keeps of a prompt are parts of tensors of the whole prompt."""

    def keeping(name: str) -> Any:
        def method(self: Any, *args: Any, **kwargs: Any) -> Any:
            made = getattr(super(spared, self), name)(*args, **kwargs)
            _make_alone(vars(self))
            return made

        return method

    names = [name for name in _KEEPING if hasattr(kind, name)]
    # Without a type of layer of its own, by which transformers would take it for the stock class.
    body = {"_layer_type": None, **{name: keeping(name) for name in names}}
    spared = type(kind.__name__, (kind,), body)
    return spared


def _make_alone(states: dict[str, Any]) -> None:
    copies: dict[int, torch.Tensor] = {}  # keys may be the values, too
    for name, state in states.items():
        if isinstance(state, torch.Tensor):
            states[name] = copies.setdefault(id(state), _alone(state))
        elif isinstance(state, dict):
            _make_alone(state)


def _attends_quicker_with_a_mask(model: Any, config: Any) -> bool:
    """Whether transformers attends to the heads of a group together if there is a mask. One token
    of Mixtral's that looks back to 2048 takes 0.9 ms then, and 11.8 ms without a mask (one core,
    bfloat16). In float32 the times are 1.1 and 1.9 ms, which does not justify another rounding than
    the stock model's."""
    grouped = any(
        (getattr(layer, "num_key_value_heads", None) or layer.num_attention_heads)
        < layer.num_attention_heads
        for layer in layer_configs(config)
    )
    on_cpu = model.device.type == "cpu" and model.dtype.itemsize == 2
    return bool(grouped and on_cpu and config._attn_implementation == "sdpa")
