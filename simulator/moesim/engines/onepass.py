"""What a policy decides, found once and timed for many machines.

One replay counts the kinds of step (`moesim.engines.step_kinds`) under a policy whose decisions no
clock changes, and a machine then times one of each (`moesim.engines.step_times`).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from moepolicy import PolicySpec
from moepolicy.counts import Counts, counts_of
from moepolicy.policy import CONSTANTS, overrides
from numpy.typing import NDArray

from moesim.engines.choose import run
from moesim.engines.clock import SimulatedTime
from moesim.engines.compilations import Compilations
from moesim.engines.step_kinds import BITS
from moesim.engines.step_times import WIDEST, all_alike, time_of
from moesim.machine.costs import Costs
from moesim.machine.profile import Machine
from moesim.workload.steps import Workload


@dataclass(frozen=True)
class Decisions:
    """What a run of decoded tokens counted: its decisions, and its steps by kind."""

    counts: Counts
    n_steps: int
    n_passes: int
    kinds: NDArray[np.int64]  # [2, kinds] steps, as `moesim.engines.replay_state.Clocks` has them
    top_k: int
    staging: int

    def clock(self, costs: Costs) -> SimulatedTime:
        """Where the time goes with these costs: a run's own clock, to the ns."""
        total = time_of(self.kinds, self.top_k, self.staging, costs)
        total.gates_ns = self.n_steps * costs.gates_ns
        before_ns = self.n_steps * int(costs.layer_ns[1]) + self.n_passes * costs.pass_ns
        total.total_ns += before_ns + total.gates_ns
        total.decode_ns += before_ns + total.gates_ns
        return total


def timeless(workload: Workload, policy: PolicySpec, on: Machine, slots: int, scope: str) -> bool:
    """Whether the decisions can be found once: on-demand copies alone, from memory and not from a
    disk with a cache of its own, in a trace of decoded tokens alone."""
    steps_alike = all_alike(workload) and workload.n_prompt == 0 and workload.meta.top_k <= WIDEST
    # What a policy knows of the machine or the experts, others may not have.
    constants = (policy.requires | policy.welcomes) & CONSTANTS
    if not steps_alike or on.disk is not None or constants:
        return False
    built = policy.build(workload.context(slots, scope))
    depends = ("prefetch", "on_miss", "route", "wants_predictions")
    return not any(overrides(built, hook) for hook in depends)


def decide(
    workload: Workload,
    policy: PolicySpec,
    costs: Costs,
    slots: int,
    scope: str,
    *,
    compilations: Compilations,
) -> Decisions:
    """Replay ``workload``, which must be `timeless`; any ``costs`` of it will do."""
    top_k = workload.meta.top_k
    kinds = np.zeros((2, 1 << BITS * top_k), np.int64)
    cache, _ = run(
        workload,
        policy,
        workload.context(slots, scope),
        costs,
        compilations=compilations,
        kinds=kinds,
    )
    return Decisions(
        counts=counts_of(cache),
        n_steps=workload.n_steps,
        n_passes=int(np.count_nonzero(workload.begins_pass)),
        kinds=kinds,
        top_k=top_k,
        staging=cache.staging_buffers,
    )
