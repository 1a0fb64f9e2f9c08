"""The cache of keys and values that a generation writes to: transformers' own, with room to grow.

Its stock layers copy all they hold for each token that comes. And where no mask says otherwise,
torch attends to grouped heads in bfloat16 on the CPU one head after the other.
"""

from __future__ import annotations

from typing import Any

import torch
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

STEP_TOKENS = 256  # room is made for so many more


class RoomyLayer(DynamicLayer):  # type: ignore[misc]
    """Keys and values of a layer, written behind those there are; their room grows in steps."""

    keys: torch.Tensor
    values: torch.Tensor

    def __init__(self, limit_tokens: int) -> None:
        """No room is made beyond ``limit_tokens`` before it is needed."""
        super().__init__()
        self._limit_tokens = limit_tokens
        self._rooms: dict[str, torch.Tensor] = {}

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        """Take type and device from the first states; forget the rooms of an earlier text."""
        super().lazy_initialization(key_states, value_states)
        self._rooms.clear()

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Take up the states [batch, heads, tokens, width]; returns those of all tokens."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        held = self.get_seq_length()
        self.keys = self._append("keys", held, self.keys, key_states)
        self.values = self._append("values", held, self.values, value_states)
        return self.keys, self.values

    def _append(self, name: str, held: int, old: torch.Tensor, new: torch.Tensor) -> torch.Tensor:
        total = held + new.shape[-2]
        room = self._rooms.get(name)
        # The stock layer's other methods replace what is held: it lies in the room no more then.
        if room is None or room.shape[-2] < total or not _begins_with(room, old, held):
            tokens = max(total, min(total + STEP_TOKENS, self._limit_tokens))
            room = new.new_empty(*new.shape[:-2], tokens, new.shape[-1])
            if held:
                room[..., :held, :] = old
            self._rooms[name] = room
        room[..., held:total, :] = new
        return room[..., :total, :]


class WindowLayer(DynamicSlidingWindowLayer):  # type: ignore[misc]
    """Keys and values of a layer that looks back so far only, in memory of that size: the stock
    layer's are part of those of the whole prompt, which they keep alive until the next token."""

    keys: torch.Tensor
    values: torch.Tensor

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Take up the states [batch, heads, tokens, width]; returns all in reach."""
        states: tuple[torch.Tensor, torch.Tensor] = super().update(
            key_states, value_states, *args, **kwargs
        )
        self.keys, self.values = _alone(self.keys), _alone(self.values)
        return states


def _alone(states: torch.Tensor) -> torch.Tensor:
    """The tensor itself, or a copy where the tensor is the smaller part of a larger one."""
    return states.clone() if states.untyped_storage().nbytes() > 2 * states.nbytes else states


def _begins_with(room: torch.Tensor, held: torch.Tensor, tokens: int) -> bool:
    """Whether the ``tokens`` held [batch, heads, tokens, width] are the first ones of a room."""
    if not tokens:
        return True
    same = room.data_ptr() == held.data_ptr() and room.stride() == held.stride()
    return same and room.shape[:2] == held.shape[:2]


def new_cache(model: Any, limit_tokens: int) -> DynamicCache:
    """An empty cache for one text of at most ``limit_tokens``; sliding windows keep no more."""
    config = model.config.get_text_config(decoder=True)
    cache = DynamicCache(config=config)
    cache.layers = [_roomy(layer, limit_tokens) for layer in cache.layers]
    if _attends_quicker_with_a_mask(model, config):
        for layer in cache.layers:
            # All that this says of a layer of a DynamicCache is that decoding has a mask.
            layer.is_compileable = True
    return cache


def _roomy(layer: Any, limit_tokens: int) -> Any:
    """A layer that does the same as an empty stock one in less time or memory; if none does, it."""
    if type(layer) is DynamicLayer:
        return RoomyLayer(limit_tokens)
    if type(layer) is DynamicSlidingWindowLayer:
        return WindowLayer(layer.sliding_window)
    return layer


def _attends_quicker_with_a_mask(model: Any, config: Any) -> bool:
    """Whether transformers, having a mask, takes the heads of a group together: one token to 2048
    of Mixtral's in 0.9 ms, where torch's own way of grouped heads takes 11.8 (one core, bfloat16;
    in float32 1.1 and 1.9, which is not worth another rounding than the stock model's)."""
    heads = config.num_attention_heads
    grouped = (getattr(config, "num_key_value_heads", None) or heads) < heads
    on_cpu = model.device.type == "cpu" and model.dtype.itemsize == 2
    return bool(grouped and on_cpu and config._attn_implementation == "sdpa")
