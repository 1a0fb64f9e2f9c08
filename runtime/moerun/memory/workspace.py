"""How much memory layers of linear attention, and indexers of sparse attention, take while they
read a prompt, learnt from the model itself on the meta device, as their cache is (see `cache.py`).

transformers computes them in torch's own operations, with intermediates that no formula over the
configuration would hold for another family: Mamba's has chunk x heads numbers a token, several
times, and an indexer a score of every token for every other, for each of its heads.
"""

from __future__ import annotations

import math
import weakref
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

_TOKENS = (256, 512, 1024)  # measured at: whole chunks, which are of 64 to 256 tokens
_CHUNK = 256


class Workspace(NamedTuple):
    """The most that a layer holds at once while it reads a prompt, in bytes: of each pair of a
    token of the prompt and one of the context, of each token of the prompt, and besides."""

    pair_bytes: float = 0.0
    token_bytes: int = 0
    fixed_bytes: int = 0

    def n_bytes(self, tokens: int, context: int) -> int:
        """For a prompt of ``tokens``, the last of a ``context``. Chunks are filled up."""
        tokens, context = tokens + _CHUNK, context + _CHUNK
        pairs = math.ceil(self.pair_bytes * tokens * context)
        return pairs + self.token_bytes * tokens + self.fixed_bytes if any(self) else 0


NO_WORKSPACE = Workspace()


class EnoughError(Exception):
    """All that a pass was to tell is known, and the rest of the pass is of no use."""


def workspace_of(model: nn.Module, read: Callable[[int], Any], kinds: set[type]) -> Workspace:
    """Measure the modules of ``kinds``, the first of each, while ``read(tokens)`` runs ``model`` on
    the meta device. Nothing where there are none."""
    modules = [_first(model, kind) for kind in kinds]
    if not modules:
        return NO_WORKSPACE
    n, twice, four = (max(live_bytes(modules, partial(read, tokens))) for tokens in _TOKENS)
    # Through three points: the steps between them grow by what pairs take.
    tokens = _TOKENS[0]
    steps = (twice - n) / tokens, (four - twice) / (2 * tokens)
    pair_bytes = max(0.0, (steps[1] - steps[0]) / (3 * tokens))
    token_bytes = max(0, math.ceil(steps[1] - 6 * tokens * pair_bytes))
    fixed_bytes = max(0, math.ceil(n - token_bytes * tokens - pair_bytes * tokens**2))
    return Workspace(pair_bytes, token_bytes, fixed_bytes)


def _first(model: nn.Module, kind: type) -> nn.Module:
    return next(module for module in model.modules() if type(module) is kind)


def live_bytes(modules: Sequence[nn.Module], read: Callable[[], Any]) -> list[int]:
    """The most that each of ``modules`` holds at once in its forward pass while ``read()`` runs the
    model: bytes of the tensors that it makes and that are alive, on any device. The pass ends as
    soon as all of them have run."""
    tracked: list[_Tracked] = []

    def ended() -> None:
        if all(each.ran for each in tracked):
            raise EnoughError

    tracked += [_Tracked(module, ended) for module in modules]
    try:
        read()
    except EnoughError:
        pass
    finally:
        for each in tracked:
            each.remove()
    return [each.live.peak_bytes for each in tracked]


class _Tracked:
    """A module whose forward pass is watched; ``ended()`` is called after it."""

    def __init__(self, module: nn.Module, ended: Callable[[], None]) -> None:
        self.live = _LiveBytes()
        self.ran = False
        self._ended = ended
        self._hooks = [
            module.register_forward_pre_hook(self._begin),
            module.register_forward_hook(self._end),
        ]

    def _begin(self, *_: Any) -> None:
        self.live.__enter__()  # type: ignore[no-untyped-call]

    def _end(self, *_: Any) -> None:
        self.live.__exit__(None, None, None)  # type: ignore[no-untyped-call]
        self.ran = True
        self._ended()

    def remove(self) -> None:
        for hook in self._hooks:
            hook.remove()


class _LiveBytes(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts the bytes of the tensors that are made under it and are alive, and the most of it."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.peak_bytes = 0
        self._live_bytes = 0
        self._tensors: dict[int, int] = {}  # how many of each storage
        self._given: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run ``func`` and count what it made."""
        for tensor in tree_leaves((args, kwargs)):
            if isinstance(tensor, torch.Tensor):
                key = tensor.untyped_storage()._cdata
                if key not in self._tensors:
                    self._given.add(key)  # weights and inputs, which others count
        made = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(made):
            if isinstance(tensor, torch.Tensor):
                self._count(tensor)
        return made

    def _count(self, tensor: torch.Tensor) -> None:
        storage = tensor.untyped_storage()
        key, n_bytes = storage._cdata, storage.nbytes()
        if key in self._given:
            return
        if key not in self._tensors:
            self._tensors[key] = 0
            self._live_bytes += n_bytes
            self.peak_bytes = max(self.peak_bytes, self._live_bytes)
        self._tensors[key] += 1
        weakref.finalize(tensor, self._drop, key, n_bytes)

    def _drop(self, key: int, n_bytes: int) -> None:
        self._tensors[key] -= 1
        if not self._tensors[key]:
            del self._tensors[key]
            self._live_bytes -= n_bytes
