"""What a model's cache holds, learnt from the model itself: it reads a token or two on the meta
device, where tensors have shapes and no memory.

So whatever transformers caches is counted, as it is: keys and values of any width, windows, what
heads share, and the states of layers that keep no tokens.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import nn

from moerun.checkpoint.families import empty_model, find_attention, find_experts, reason_of
from moerun.errors import RunError
from moerun.memory.workspace import NO_WORKSPACE, EnoughError, Workspace, workspace_of

_STATES = {"conv_states", "recurrent_states"}  # as large for any text
# Tokens that a cache is measured at where several are kept as one: just before a multiple of 128,
# which is the most that is known (DeepSeek-V4), most tokens wait for becoming one.
_LENGTHS = (255, 511)


@dataclass(frozen=True, slots=True)
class CacheLayer:
    """What a layer caches, in bytes: of each token, and of states that are as large for any text.

    window         the most tokens it keeps from one pass to the next; None: all
    passing_bytes  of each token of a prompt while it reads that, where it keeps less
    """

    token_bytes: int
    state_bytes: int
    window: int | None
    passing_bytes: int = 0

    def kept_bytes(self, tokens: int) -> int:
        """Bytes that the layer keeps between two passes, after ``tokens`` tokens."""
        kept = tokens if self.window is None else min(tokens, self.window)
        return kept * self.token_bytes + self.state_bytes

    def marked_bytes(self, tokens: int) -> int:
        """Bytes of a copy of the layer, where it cannot be cut to fewer tokens."""
        whole = self.window is None and not self.state_bytes
        return 0 if whole else self.kept_bytes(tokens)


@dataclass(frozen=True, slots=True)
class ModelShape:
    """What a memory plan must know of a model besides its weights.

    widest       rows of the widest dense matrix between two others: no head's, no attention's
    holds_scores attention holds its scores whole, as it does where torch's kernels cannot do it
    linear       what a layer of linear attention holds while it reads a prompt
    indexing     what an indexer of sparse attention does, besides the attention
    """

    cache: tuple[CacheLayer, ...]
    widest: int
    holds_scores: bool
    linear: Workspace = NO_WORKSPACE
    indexing: Workspace = NO_WORKSPACE

    def marked_bytes(self, tokens: int) -> int:
        """What is copied of the cache of ``tokens`` tokens, to take it back to these."""
        return sum(layer.marked_bytes(tokens) for layer in self.cache)

    def cache_bytes(self, tokens: int) -> int:
        """The cache of ``tokens`` tokens, and one layer's again: it grows by copying, and a layer
        with a window has all of a prompt while it reads it."""
        growing = max((max(of.token_bytes, of.passing_bytes) for of in self.cache), default=0)
        return sum(layer.kept_bytes(tokens) for layer in self.cache) + tokens * growing


def shape_of(config: Any, dtype: torch.dtype) -> ModelShape:
    """The shape of the model of a configuration, its weights of ``dtype``. Takes up to a second
    or two, for the largest."""
    model: Any = empty_model(config, dtype)
    for _, experts in find_experts(model):  # whose part no meta tensor can decide
        experts.forward = _as_it_was
    one = _cache_of(model, 1)
    if all(_is_plain(layer) for layer in one.layers):
        two = _cache_of(model, 2)
        layers = [_plain(*pair) for pair in zip(one.layers, two.layers, strict=True)]
    else:
        layers = _bounds(model, one)
    read = partial(_cache_of, model)
    indexers = {type(m) for m in model.modules() if type(m).__name__.endswith("Indexer")}
    return ModelShape(
        cache=tuple(layers),
        widest=_widest(model),
        holds_scores=model.config.get_text_config()._attn_implementation == "eager",
        linear=workspace_of(model, read, one.kinds),
        indexing=workspace_of(model, read, indexers),
    )


def _is_plain(layer: Any) -> bool:
    """Whether a layer keeps keys and values, of a window at most, or states, and nothing else."""
    return set(_dicts(layer)) <= _STATES


def _plain(one: Any, two: Any) -> CacheLayer:
    """A layer as it is after one token and after two."""
    token_bytes = held_bytes(two) - held_bytes(one)
    window = one.get_max_length()
    return CacheLayer(
        token_bytes=token_bytes,
        state_bytes=held_bytes(one) - token_bytes,
        # One more than a layer looks back to: what it keeps is part of what the last token saw.
        window=None if window < 0 else window,
    )


def _bounds(model: Any, one: Any) -> list[CacheLayer]:
    """Bounds of layers that keep several tokens in one, and the tokens since then: measured where
    no window is filling up any more."""
    short, long = _LENGTHS
    kinds = [(type(layer), getattr(layer, "compress_rate", None)) for layer in one.layers]
    firsts = [kinds.index(kind) for kind in kinds]  # layers of a kind keep the same
    few, many = (_cache_of(model, tokens, max(firsts)).layers for tokens in _LENGTHS)
    layers = []
    for first, at in zip(one.layers, firsts, strict=True):
        at_short, at_long = kept_bytes(few[at]), kept_bytes(many[at])
        token_bytes = -(-(at_long - at_short) // (long - short))
        # One token of each more: what is kept is part of what the last token saw.
        state_bytes = max(at_short - token_bytes * short, 0) + held_bytes(first)
        layers.append(CacheLayer(token_bytes, state_bytes, None, held_bytes(first)))
    return layers


def held_bytes(layer: Any) -> int:
    """What a layer of a cache holds, tensors that are parts of larger ones as these."""
    storages = (tensor.untyped_storage() for tensor in _tensors(vars(layer).values()))
    return sum({each._cdata: each.nbytes() for each in storages}.values())


def kept_bytes(layer: Any) -> int:
    """What a layer of a cache holds, tensors that are parts of larger ones as themselves alone."""
    parts = {
        (t.untyped_storage()._cdata, t.storage_offset(), t.shape): t.nbytes
        for t in _tensors(vars(layer).values())
    }
    return sum(parts.values())


def _tensors(values: Any) -> Iterator[torch.Tensor]:
    for value in values:
        if isinstance(value, torch.Tensor):
            yield value
        elif isinstance(value, dict):
            yield from _tensors(value.values())


def _dicts(layer: Any) -> Iterator[str]:
    return (n for n, v in vars(layer).items() if isinstance(v, dict) and [*_tensors([v])])


def _as_it_was(hidden: torch.Tensor, *_: Any, **__: Any) -> torch.Tensor:
    return torch.zeros_like(hidden)


def _cache_of(model: Any, tokens: int, last: int | None = None) -> Any:
    """The cache after a pass of ``tokens`` through the layers up to ``last`` (None: all). RunError
    where the model, as its configuration has it, can make no pass."""
    cache = _watched_cache(model, last)
    ids = torch.zeros(1, tokens, dtype=torch.long, device="meta")
    hooks = [m.register_forward_pre_hook(cache.stack_push) for m in model.modules()]
    hooks += [m.register_forward_hook(cache.stack_pop) for m in model.modules()]
    try:
        with torch.inference_mode():
            model(input_ids=ids, past_key_values=cache, use_cache=True)
    except EnoughError:
        if last is None:
            raise
    except Exception as error:  # every model class fails in its own way
        raise RunError(
            f"the {model.config.model_type} model that config.json describes cannot run "
            f"({reason_of(error)})"
        ) from error
    finally:
        for hook in hooks:
            hook.remove()
    return cache


def _watched_cache(model: Any, last: int | None) -> Any:
    """A stock cache that notes the ``kinds`` of the modules that update recurrent states in it."""
    from transformers import DynamicCache

    class Watched(DynamicCache):  # type: ignore[misc]
        def __init__(self) -> None:
            super().__init__(config=model.config.get_text_config(decoder=True))
            self.kinds: set[type] = set()
            self._stack: list[nn.Module] = []

        def stack_push(self, module: nn.Module, _arguments: Any) -> None:
            self._stack.append(module)

        def stack_pop(self, _module: nn.Module, _arguments: Any, _made: Any) -> None:
            self._stack.pop()

        def update(self, keys: Any, values: Any, layer_idx: int, *args: Any, **kwargs: Any) -> Any:
            if last is not None and layer_idx > last:
                raise EnoughError
            return super().update(keys, values, layer_idx, *args, **kwargs)

        def update_recurrent_state(self, *args: Any, **kwargs: Any) -> Any:
            self.kinds.add(type(self._stack[-1]))
            return super().update_recurrent_state(*args, **kwargs)

    return Watched()


def _widest(model: nn.Module) -> int:
    head = model.get_output_embeddings()  # type: ignore[operator]
    apart = {head, *(linear for _, linear in find_attention(model))}
    rows = (m.out_features for m in model.modules() if isinstance(m, nn.Linear) and m not in apart)
    return max(rows, default=0)
