"""The policy interface: what an author writes, and what a policy is given to start from."""

from __future__ import annotations

from typing import Any, ClassVar, NamedTuple

import numpy as np
from numpy.typing import NDArray

from moepolicy.console import WrongUsage
from moepolicy.kinds import LOAD, LOW
from moepolicy.steps import Step

NO_USE = np.iinfo(np.int64).max


class PolicyError(ValueError):
    """A policy that does not exist, cannot run here, or broke the rules of the interface."""


class PolicyUsageError(PolicyError, WrongUsage):
    """A name or value that can be no policy, parameter or cache, on any machine."""


class Context(NamedTuple):
    """The cache a policy will order, and the knowledge some policies ask for.

    slots is per layer; a global cache holds ``slots * n_layers`` experts together. ``counts``
    [n_layers, n_experts] is how often each expert was used in a calibration trace.
    ``next_use``, ``offsets`` and ``demands`` are the future: entry ``offsets[step] + rank`` is the
    index of the step that next uses that step's ``rank``-th expert (``NO_USE``: never), and its
    key.
    """

    n_layers: int
    n_experts: int
    top_k: int
    slots: int
    scope: str = "layer"
    counts: NDArray[np.int64] | None = None
    next_use: NDArray[np.int64] | None = None
    offsets: NDArray[np.int64] | None = None
    demands: NDArray[np.int32] | None = None

    @property
    def n_keys(self) -> int:
        """All experts of all layers."""
        return self.n_layers * self.n_experts


class Same(NamedTuple):
    """Another policy that decides alike, and why."""

    policy: str
    why: str


class Policy:
    """Orders and chooses experts. A policy owns no slots, no statistics, and knows no clock.

    A key is ``layer * n_experts + expert``. ``now`` is a logical time that grows from step to
    step; within a step the heaviest expert has the greatest, so a policy that orders by ``now``
    needs no counter of its own. Every ``on_load`` is followed by one ``on_evict`` when the key
    leaves the device. A replay can compile a class whose state is all in NumPy arrays and plain
    numbers; a class with any other state runs interpreted.

    requires          what the context or the steps must carry: "future", "counts", "predictions",
                      "logits", "weights"; and what the machine must have: "cpu" workers to
                      COMPUTE, a "low" store of experts for LOW. What is not required is not given
    horizon           how many layers ahead the policy reads predictions; fewer are refused
    always_evicts     promises that ``victim`` never answers -1
    lossy             whether the policy can change what the model computes
    staging           buffers besides the slots: for bypasses and, where ``stage_prefetches``, for
                      prefetched experts until their first use
    stage_prefetches  False sends a prefetched expert straight to a slot, evicting as it starts
    """

    requires: ClassVar[frozenset[str]] = frozenset()
    horizon: ClassVar[int] = 1
    lossy: ClassVar[bool] = False
    always_evicts: ClassVar[bool] = False
    staging: int = 1
    stage_prefetches: bool = True

    def __init__(self, context: Context) -> None:
        """Policies take the context first and their own parameters by keyword."""

    @classmethod
    def same_as(cls, context: Context) -> Same | None:
        """The built-in policy that this one cannot differ from in a cache of this kind, or None.

        A comparison names that policy under the table.
        """
        own = ("prefetch", "on_miss")
        if any(getattr(cls, hook) is not getattr(Policy, hook) for hook in own):
            return None
        if context.slots >= context.n_experts:
            return Same("lru", "there is a slot for every expert, and none is evicted")
        if cls.always_evicts and context.scope == "layer" and context.slots <= context.top_k:
            return Same(
                "lru",
                "a layer has no more slots than a token has experts, and all else must go",
            )
        return None

    def on_step(self, step: Step) -> None:
        """A step begins; called before anything is decided about it."""

    def on_hit(self, key: int, now: int) -> None:
        """``key`` is used and was resident or already in flight."""

    def on_load(self, key: int, speculative: bool, now: int) -> None:
        """A copy of ``key`` starts, because it was missing or (speculative) on a guess."""

    def on_evict(self, key: int) -> None:
        """``key`` has left the device."""

    def on_resize(self, slots: int) -> None:
        """The cache has ``slots`` slots a layer from now on, no longer those of the context."""

    def victim(self, layer: int, incoming: int, candidates: NDArray[np.int32]) -> int:
        """Which of ``candidates`` (ascending keys, never empty) makes room for ``incoming``.

        -1 declines: a missing expert is then used from a staging buffer and not kept, and a
        prefetch is dropped. The array is only valid during the call. Where the cache must shrink,
        ``incoming`` is one of the candidates, and ``incoming`` is evicted if the policy declines.
        """
        raise NotImplementedError(f"{type(self).__name__} has no victim")

    def retain(self, layer: int, key: int, candidates: NDArray[np.int32]) -> int:
        """The candidate whose slot a bypassed expert may take at the end of the expert's step.

        The step's own experts are among the candidates now. -1, the default, drops ``key``.
        """
        return -1

    def on_miss(self, step: Step, rank: int) -> int:
        """What becomes of a miss, the step's ``rank``-th expert; asked in router order.

        LOAD        copies the expert; the default
        COMPUTE     computes the expert on the CPU, at the same time as the others
        LOW         copies the expert's lower-precision record
        SUBSTITUTE  computes a resident expert in its place (see ``substitute``)
        SKIP        leaves the expert out of the sum; nothing is renormalised

        The last three change what the model computes, and make a policy ``lossy``.
        """
        return LOAD

    def precision(self, step: Step, rank: int) -> int:
        """Whether a resident copy at the lower precision serves the step's ``rank``-th expert.

        LOW, the default: the low copy is a hit. LOAD: the low copy leaves its slot, and the expert
        is a miss. The hook is called before anything else is decided, for a policy that has an
        ``on_miss`` and requires "low".
        """
        return LOW

    def substitute(self, step: Step, rank: int, candidates: NDArray[np.int32]) -> int:
        """The candidate that stands in for the step's ``rank``-th expert; -1: LOAD that expert.

        The candidates are all of the layer's experts that lie in slots, ascending keys, never
        empty. Experts that the step wants anyway are among the candidates. The array is only valid
        during the call. ``on_hit`` is called for the use of the chosen candidate.
        """
        return -1

    def prefetch(self, step: Step, keys: NDArray[np.int32]) -> int:
        """Write the keys to fetch ahead into ``keys``, most wanted first; return how many.

        ``keys`` has room for every key. Keys that are present or under way are passed over.
        """
        return 0


def overrides(policy: Policy, hook: str) -> bool:
    """Whether a policy's class supplies its own ``hook``; the machine skips the others."""
    parts: tuple[Any, ...] = getattr(policy, "parts", ())
    if parts:
        return any(overrides(part, hook) for part in parts)
    return getattr(type(policy), hook) is not getattr(Policy, hook)


NEEDS = {
    "future": "the future of a recorded trace",
    "counts": "the expert counts of a calibration trace",
    "predictions": "the gates' predictions of later layers",
    "logits": "the gates' logits",
    "weights": "the gates' weights",
    "cpu": "CPU workers",
    "low": "experts at a lower precision",
}
"""What a policy may require."""

HOOKS = frozenset(
    {
        "on_step",
        "on_hit",
        "on_load",
        "on_evict",
        "on_resize",
        "victim",
        "retain",
        "on_miss",
        "precision",
        "substitute",
        "prefetch",
    }
)
"""The methods that the state machine calls."""
