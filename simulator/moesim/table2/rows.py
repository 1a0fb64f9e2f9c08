"""The table's rows as things the simulator runs: a policy, a workload, a machine profile.

What a decoded token costs, with L layers, c the compute of a layer and its experts, b the time
one expert takes over the link, and x the experts a token misses:

    without pre-loading           L c + 2 x b     each miss sends its victim back first
    without LRU and pre-loading   L c + 2 (top-k L) b
    naive                         L c + (n_experts L) b
    full                          as without pre-loading, except that a copy made on a guess runs
                                  while compute does, and sends nothing back

Copies and compute take turns in the released code, so all compute of a layer stands before its
gate's decision here (``layer_s``): nothing is left for a demanded copy to overlap. Speculative
loading was measured with code that was never released; it can only have gained time by copying
during compute, from the arrival of one layer's experts to the decision of the next one's gate,
and that is as much compute as ``layer_s``. Every row computes the same experts in the same
layers, so an expert's time and a layer's cannot be told apart and are one constant.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
from moepolicy import Context, Policy, PolicySpec, Step, find_policy
from numpy.typing import NDArray

from moesim.engines.compilations import Compilations
from moesim.machine.profile import Compute, LinkProfile, Machine
from moesim.simulation import simulate
from moesim.table2.published import Algorithm
from moesim.workload.steps import Workload

STEADY_TOKENS = 16  # enough where every token costs the same


@dataclass(frozen=True)
class Reading:
    """One understanding of how the measured engines moved experts.

    write_back        a demanded copy sends an expert back first, over the same link
    streamed          the naive engine copies the next layer while compute does this one
    compute_by_bytes  compute grows with an expert's bytes, not with its weights' number
    """

    name: str
    summary: str
    write_back: bool
    streamed: bool
    compute_by_bytes: bool = False


READINGS = (
    Reading("released", "no overlap, victims written back", True, False),
    Reading("by-bytes", "the same, compute grows with bytes", True, False, True),
    Reading("one-way", "no overlap, nothing written back", False, False),
    Reading("streamed", "written back, naive layers stream", True, True),
    Reading("one-way-streamed", "one way, naive layers stream", False, True),
)


@dataclass(frozen=True)
class Constants:
    """What is fitted for a card: the link's effective rate, and compute of a layer in seconds."""

    link_bytes_per_s: float
    layer_s: float

    def machine(self, *, write_back: bool) -> Machine:
        """A machine of these constants."""
        return Machine(
            name="table2",
            description="constants fitted on published rows",
            source="published",
            link=LinkProfile(self.link_bytes_per_s, write_back=write_back),
            compute=Compute(layer_s=self.layer_s),
        )


class WholeLayers(Policy):
    """Copy the next layer's experts, all of them, while this layer's are used."""

    def __init__(self, context: Context) -> None:
        self.staging = 2 * context.n_experts
        self.n_layers = context.n_layers
        self.n_experts = context.n_experts

    def victim(self, layer: int, incoming: int, candidates: NDArray[np.int32]) -> int:
        """Decline: an expert without a slot passes through staging."""
        return -1

    def prefetch(self, step: Step, keys: NDArray[np.int32]) -> int:
        """All experts of the next layer."""
        first = (step.layer + 1) % self.n_layers * self.n_experts
        keys[: self.n_experts] = np.arange(first, first + self.n_experts)
        return self.n_experts


def decoding(workload: Workload) -> Workload:
    """The workload without its prompts: the table is of generation."""
    width = np.diff(workload.offsets)
    kept = workload.decode
    keys = np.repeat(kept, width)
    return replace(
        workload,
        keys=workload.keys[keys],
        weights=workload.weights[keys],
        routed=workload.routed[keys],
        offsets=np.concatenate(([0], np.cumsum(width[kept]))).astype(np.int64),
        layer=workload.layer[kept],
        tokens=workload.tokens[kept],
        decode=workload.decode[kept],
        rows=workload.rows[kept],
    )


def whole_layers(workload: Workload) -> Workload:
    """The workload of an engine that brings all of a layer's experts whatever the gate says."""
    n_experts = workload.meta.n_experts
    keys = workload.layer[:, None] * n_experts + np.arange(n_experts, dtype=np.int32)
    return replace(
        workload,
        keys=keys.astype(np.int32).ravel(),
        weights=np.full(keys.size, 1 / n_experts, np.float32),
        routed=np.ones(keys.size, np.int32),
        offsets=np.arange(workload.n_steps + 1, dtype=np.int64) * n_experts,
    )


class RowSimulator:
    """Runs rows of the table on one trace."""

    def __init__(self, workload: Workload, compilations: Compilations) -> None:
        self.workload = workload
        self.few = workload.head(STEADY_TOKENS)
        self.layers = whole_layers(self.few)
        self.compilations = compilations

    def seconds(
        self,
        algorithm: Algorithm,
        reading: Reading,
        constants: Constants,
        *,
        slots: int,
        guesses: int,
        expert_bytes: int,
    ) -> float:
        """Simulated seconds of a decoded token."""
        machine = constants.machine(write_back=reading.write_back)
        workload, policy = self.workload, find_policy("lru")
        if algorithm is Algorithm.full:
            policy = find_policy(f"lru-spec:n={guesses}")
        elif algorithm is Algorithm.no_cache:
            workload, slots = self.few, 0
            if reading.write_back:  # an expert out for each one in, and no slot to tell it by
                halved = replace(machine.link, bytes_per_s=machine.link.bytes_per_s / 2)
                machine = replace(machine, link=halved)
        elif algorithm is Algorithm.naive:
            workload, slots = self.layers, 0
            if reading.streamed:
                policy = PolicySpec("whole-layers", WholeLayers)
        result = simulate(
            workload,
            policy,
            machine,
            slots=slots,
            expert_bytes=expert_bytes,
            limits=False,
            compilations=self.compilations,
        )
        return 1 / result.speed
