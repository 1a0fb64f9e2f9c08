"""The policy interface: what an author writes, and what a policy is given to start from."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any, ClassVar, NamedTuple

import numpy as np
from numpy.typing import NDArray

from moepolicy.console import WrongUsage
from moepolicy.kinds import LOAD, LOW
from moepolicy.steps import Step

NO_USE = np.iinfo(np.int64).max


class PolicyError(ValueError):
    """A policy that does not exist, cannot run here, or broke the rules of the interface."""


class PolicyFailed(PolicyError):
    """A policy's own code raised, or gave an answer that there cannot be, while it was run."""


class PolicyUsageError(PolicyError, WrongUsage):
    """A name or value that can be no policy, parameter or cache, on any machine."""


class Context(NamedTuple):
    """The cache a policy will order, and the knowledge some policies ask for.

    slots is per layer (on average, where the policy shares them out); a global cache holds
    ``slots * n_layers`` experts together. ``counts`` [n_layers, n_experts] is how often each expert
    was used in a calibration trace. ``next_use``, ``offsets`` and ``demands`` are the future: entry
    ``offsets[step] + rank`` is the index of the step that next uses that step's ``rank``-th expert
    (``NO_USE``: never), and its key.

    Constants of the machine and the experts, never a clock:

    copy_over_layer  how many layers are computed while one expert is copied: the time of a copy of
                     the full precision from host memory, its latency included, over the time of a
                     layer and its ``top_k`` experts for one decoded token; NaN where unknown (see
                     `moesim.machine.speed.copy_over_layer`, which computes it)
    gates_over_layer how many layers are computed while a layer's later gates are asked for
                     predictions; NaN where unknown (`moesim.machine.speed.gates_over_layer`)
    expert_bytes     of an expert at the full precision; None where unknown
    low_bytes        of an expert at the lower precision; None where there is none
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
    copy_over_layer: float = math.nan
    expert_bytes: int | None = None
    low_bytes: int | None = None
    gates_over_layer: float = math.nan

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
                      "logits", "weights", "tokens" (their ids); and what the machine must have:
                      "cpu" workers to COMPUTE, a "low" store of experts for LOW; and what of
                      the context must be known: "speed" (``copy_over_layer`` and
                      ``gates_over_layer``), "bytes" (of an expert). What is not required is
                      not given
    welcomes          "speed" or "bytes", which are given where they are known, and are NaN or
                      None where they are not
    horizon           how many layers ahead the policy reads predictions; fewer are refused
    always_evicts     promises that ``victim`` never answers -1
    lossy             whether the policy can change what the model computes
    staging           buffers besides the slots: for bypasses and, where ``stage_prefetches``, for
                      prefetched experts until their first use
    made_of, only     of a class that was made for a composition: the classes of its parts, and
                      the one aspect of them that it decides
    stage_prefetches  False sends a prefetched expert straight to a slot, evicting as it starts
    fills_slots       where ``stage_prefetches``: True sends a prefetched expert to a slot that is
                      free, where there is one, and there it stays; to a buffer otherwise
    """

    requires: ClassVar[frozenset[str]] = frozenset()
    welcomes: ClassVar[frozenset[str]] = frozenset()
    horizon: ClassVar[int] = 1
    lossy: ClassVar[bool] = False
    made_of: ClassVar[tuple[type[Policy], ...]] = ()
    only: ClassVar[str] = ""
    always_evicts: ClassVar[bool] = False
    staging: int = 1
    stage_prefetches: bool = True
    fills_slots: bool = False

    def __init__(self, context: Context) -> None:
        """Policies take the context first and their own parameters by keyword."""

    @classmethod
    def same_as(cls, context: Context) -> Same | None:
        """The built-in policy that this one cannot differ from in a cache of this kind, or None.

        A comparison names that policy under the table.
        """
        own = ("prefetch", "on_miss", "route")
        if any(getattr(cls, hook) is not getattr(Policy, hook) for hook in own):
            return None
        if context.slots >= context.n_experts:
            return Same("lru", "there is a slot for every expert, and none is evicted")
        if context.scope == "layer" and shares_slots(cls):
            return None  # a layer may have more slots than another
        if cls.always_evicts and context.scope == "layer" and context.slots <= context.top_k:
            return Same(
                "lru",
                "a layer has no more slots than a token has experts, and all else must go",
            )
        return None

    @classmethod
    def fit(
        cls, context: Context, steps: Iterable[Step], rng: np.random.Generator
    ) -> dict[str, NDArray[Any]]:
        """Make arrays of a calibration trace, for ``__init__`` to take as ``params``.

        ``steps`` are those of whole sequences, one after the other, with all that the policy
        requires; they can be gone through once. A class that has ``fit`` takes a keyword
        ``params``, a dict of the arrays by name, or None where it was not fitted. `moesim fit`
        calls it, and ``name:params=FILE`` gives the arrays back.
        """
        raise NotImplementedError(f"{cls.__name__} cannot be fitted")

    def learned(self) -> dict[str, NDArray[Any]]:
        """What the policy has learned so far, as ``fit`` answers it: for the next run to begin
        with. Only a policy that learns while it runs has it."""
        raise NotImplementedError(f"{type(self).__name__} learns nothing")

    @classmethod
    def share_slots(cls, total: int, context: Context) -> NDArray[np.integer[Any]] | None:
        """How the layers share ``total`` slots: a whole number each [n_layers]; None: equally.

        Each is 0 to n_experts, and the sum is ``total``. Only a cache with scope "layer" asks: when
        it is made, and anew whenever it is to have another size, which ``context.slots`` is then.
        The answer must depend on nothing else. What the class requires of ``context`` is there,
        all but the future, which is another for each sequence of a cold run.
        """
        return None

    def on_step(self, step: Step) -> None:
        """A step begins; called before anything is decided about it."""

    def route(
        self, step: Step, row: int, resident: NDArray[np.bool_], chosen: NDArray[np.int32]
    ) -> None:
        """Which experts a token gets; may rewrite ``chosen`` in place.

        Called for each token row of a step, before ``on_step`` and all decisions; ``step`` is the
        gate's own: ``step.logits`` are the row's, unbiased, ``step.experts`` and ``step.weights``
        the keys and weights that the gate gave the row. ``chosen`` holds the gate's choice, top_k
        or fewer experts of the layer (0 to n_experts - 1), and must stay distinct. ``resident``
        [n_experts] marks
        experts that are on the device or under way. The weights of another choice come from
        ``step.logits`` by the model's own rule. Such a policy is ``lossy``; the hook requires
        "logits" and "weights" without saying so.
        """

    def on_hit(self, key: int, now: int) -> None:
        """``key`` is used and was resident or already in flight."""

    def on_load(self, key: int, speculative: bool, now: int) -> None:
        """A copy of ``key`` starts, because it was missing or (speculative) on a guess."""

    def on_evict(self, key: int) -> None:
        """``key`` has left the device."""

    def on_resize(self, slots: int) -> None:
        """The cache has ``slots`` slots a layer from now on, no longer those of the context.

        It is an average where ``share_slots`` answers."""

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

    def wants_predictions(self, layer: int) -> bool:
        """Whether the later gates are to be asked at the next step of ``layer``.

        Asking them takes compute (``Context.gates_over_layer``). A policy that requires
        "predictions" may decline them: that step's ``predicted`` has no rows then. Called at the
        end of the decisions about the step before; the first step of each layer has predictions.
        """
        return True

    def prefetch(self, step: Step, keys: NDArray[np.int32]) -> int:
        """Write the keys to fetch ahead into ``keys``, most wanted first; return how many.

        ``keys`` has room for every key. Keys that are present or under way are passed over.
        """
        return 0


def shares_slots(policy: type[Policy]) -> bool:
    """Whether a class has a say in how many slots each layer gets."""
    if policy.only:
        return policy.only == "sharing"
    return defines(policy, "share_slots") or any(map(shares_slots, policy.made_of))


def defines(policy: type[Policy], hook: str) -> bool:
    """Whether a class supplies its own ``hook``."""
    own, default = getattr(policy, hook, None), getattr(Policy, hook, None)
    # A method of the class is another object whenever it is asked for.
    return getattr(own, "__func__", own) is not getattr(default, "__func__", default)


def overrides(policy: Policy, hook: str) -> bool:
    """Whether a policy's class supplies its own ``hook``; the machine skips the others."""
    parts: tuple[Any, ...] = getattr(policy, "parts", ())
    if parts:
        return any(overrides(part, hook) for part in parts)
    return defines(type(policy), hook)


NEEDS = {
    "future": "the future of a recorded trace",
    "counts": "the expert counts of a calibration trace",
    "predictions": "the gates' predictions of later layers",
    "logits": "the gates' logits",
    "tokens": "the tokens' ids",
    "weights": "the gates' weights",
    "cpu": "CPU workers",
    "low": "experts at a lower precision",
    "speed": "the time of an expert's copy over that of a layer's compute",
    "bytes": "the bytes of an expert",
}
"""What a policy may require."""

CONSTANTS = frozenset({"speed", "bytes"})
"""What of that a policy may welcome: the constants of the machine and the experts."""

HOOKS = frozenset(
    {
        "route",
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
        "wants_predictions",
    }
)
"""The methods that the state machine calls."""
