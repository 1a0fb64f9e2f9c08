"""What a policy decides, found once and timed for many machines.

A policy that copies on demand alone decides the same whatever the clock says, and has nothing under
way when a step begins. So a decoded token's step takes as long as any other with the same hits,
copies into free or emptied slots, and bypasses; there are few such kinds of step. One replay counts
them, and a machine then times one of each.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from moepolicy import NO_LOGITS, NO_PREDICTIONS, Context, Policy, PolicySpec, Step, machine
from moepolicy.counts import Counts, counts_of
from moepolicy.policy import overrides
from moepolicy.state import Cache, new_cache
from numpy.typing import NDArray

from moesim.engines import replay as twin
from moesim.engines.choose import run
from moesim.engines.clock import SimulatedTime
from moesim.engines.compilations import Compilations
from moesim.engines.replay_state import ReplaySteps, clock_of, new_clocks
from moesim.engines.step_kinds import INTO_EMPTIED, INTO_FREE
from moesim.machine.costs import Costs
from moesim.machine.profile import Machine
from moesim.workload.steps import CHUNK, Workload

WIDEST = 10  # experts a step: kinds are counted in a table with an entry for each there could be


@dataclass(frozen=True)
class Decisions:
    """What a run counted, and how many of its steps are of each kind of step."""

    counts: Counts
    steps: dict[int, int]
    top_k: int
    staging: int

    def clock(self, costs: Costs) -> SimulatedTime:
        """Where the time goes with these costs: a run's own clock, to the ns."""
        total = SimulatedTime()
        for kind, n in self.steps.items():
            spent = _time(kind, self.top_k, self.staging, costs)
            total.total_ns += n * spent.total_ns
            total.stall_ns += n * spent.stall_ns
            total.link_busy_ns += n * spent.link_busy_ns
        total.decode_ns = total.total_ns
        return total


def timeless(workload: Workload, policy: PolicySpec, on: Machine, slots: int, scope: str) -> bool:
    """Whether the decisions can be found once: on-demand copies alone, from memory and not from a
    disk with a cache of its own, in a trace of decoded tokens alone."""
    steps_alike = (
        workload.extent == ((1, 1), (1, 1))
        and workload.n_prompt == 0
        and len(workload.keys) == workload.n_steps * workload.meta.top_k
        and workload.meta.top_k <= WIDEST
    )
    if not steps_alike or on.disk is not None:
        return False
    built = policy.build(workload.context(slots, scope))
    return not overrides(built, "prefetch") and not overrides(built, "on_miss")


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
    from moesim.engines.onepass_kernel import count_kinds

    top_k = workload.meta.top_k
    table = np.zeros(1 << (2 * top_k + 1), np.int64)

    def look(cache: Cache, first: int, last: int) -> None:
        n = int(cache.n_events[0])
        steps = slice(first, last)
        begins = workload.begins_pass[steps]
        count_kinds(cache.events[:n], first, workload.keys, top_k, begins, table)
        cache.n_events[0] = 0

    context = workload.context(slots, scope)
    # A key is wanted, copied, bypassed and kept after all, and two others leave for it.
    room = 6 * top_k * min(CHUNK, workload.n_steps) + len(Step._fields)
    cache, _ = run(
        workload, policy, context, costs, compilations=compilations, look=look, n_events=room
    )
    kinds = np.flatnonzero(table)
    return Decisions(
        counts=counts_of(cache),
        steps=dict(zip(kinds.tolist(), table[kinds].tolist(), strict=True)),
        top_k=top_k,
        staging=cache.staging_buffers,
    )


class _Scripted(Policy):
    """Does with rank r of the step, whose key is r, what a kind of step says."""

    def __init__(self, context: Context, came: list[int], staging: int) -> None:
        self.came = came
        self.staging = staging

    def victim(self, layer: int, incoming: int, candidates: NDArray[np.int32]) -> int:
        return int(candidates[0]) if self.came[incoming] == INTO_EMPTIED else -1


def _time(kind: int, top_k: int, staging: int, costs: Costs) -> SimulatedTime:
    """The replay's clock after one step of a kind: keys 0 to top_k - 1 wanted, others cached that
    may go."""
    came = [kind >> (1 + 2 * rank) & 3 for rank in range(top_k)]
    held = [rank for rank in range(top_k) if came[rank] == 0]
    going = list(range(top_k, top_k + came.count(INTO_EMPTIED)))
    n_slots = len(held) + len(going) + came.count(INTO_FREE)
    context = Context(1, top_k + len(going), top_k, n_slots)
    policy = _Scripted(context, came, staging)
    cache = new_cache(context, policy)
    outcome = np.zeros(context.n_experts, np.int8)
    _fill(cache, policy, np.array(held + going, np.int32), outcome)
    clocks = new_clocks(costs, context.n_experts)
    begins = np.array([bool(kind & 1)])
    wanted = np.arange(top_k, dtype=np.int32)
    ones = np.ones(top_k, np.int32)
    work = ReplaySteps(
        wanted,
        np.ones(top_k, np.float32),
        np.array([0, top_k]),
        np.zeros(1, np.int32),
        ones[:1],
        np.ones(1, np.bool_),
    )
    costs = costs._replace(tokens=ones[:1], routed=ones, begins_pass=begins)
    logits, predicted = NO_LOGITS[None], NO_PREDICTIONS[None]
    twin.replay(cache, policy, work, costs, clocks, (0, 1), logits, predicted, outcome)
    return clock_of(clocks)


def _fill(cache: Cache, policy: Policy, keys: NDArray[np.int32], outcome: NDArray[np.int8]) -> None:
    """Let ``keys`` be in the cache, through a step of their own."""
    if not len(keys):
        return
    weights = np.ones(len(keys), np.float32)
    step = Step(0, 0, keys, weights, NO_LOGITS, NO_PREDICTIONS, 1)
    machine.begin(cache, policy, step, outcome)
    while (key := machine.start(cache, policy)) >= 0:
        machine.finish(cache, policy, key)
    machine.end(cache, policy)
