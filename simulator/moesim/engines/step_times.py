"""What a step of each kind takes on a machine, for steps that the replay counted by kind.

A policy that copies on demand alone decides the same whatever the clock says, and has nothing under
way when a step begins. So a step of one token takes as long as any other with the same number of
hits, and the same copies into free or emptied slots and bypasses in the same order. There are few
such kinds of step: the replay counts them, and one of each is timed here, by the replay.
"""

from __future__ import annotations

from functools import lru_cache

import numpy as np
from moepolicy import NO_LOGITS, NO_PREDICTIONS, NO_TOKEN_IDS, Context, Policy, Step, machine
from moepolicy.routing import routing_buffers
from moepolicy.state import Cache, new_cache
from numpy.typing import NDArray

from moesim.engines.clock import SimulatedTime
from moesim.engines.replay import replay
from moesim.engines.replay_state import NOT_COUNTED, ReplaySteps, clock_of, new_clocks
from moesim.engines.step_kinds import BITS, BYPASSED, INTO_EMPTIED, INTO_FREE
from moesim.machine.costs import Costs
from moesim.workload.details import Details
from moesim.workload.steps import Workload

WIDEST = 10  # experts a step: the table of kinds has an entry for each there could be
STEPS_WORTH_A_TIMING = 2000  # steps that are replayed while one kind is timed


def counted_width(
    workload: Workload, costs: Costs, cache: Cache, always_evicts: bool, *, forced: bool = False
) -> int:
    """How many experts the steps have that are counted by kind; NOT_COUNTED where none are.

    Decisions must depend on no clock, and the host's memory keep nothing. Bytes must take time, or
    a step could begin at the instant at which a copy of the last one ended that others waited for.
    A policy that may decline to evict makes many kinds of step, which must be worth it unless
    counting is ``forced``.
    """
    top_k = workload.meta.top_k
    if cache.prefetching or cache.choosing or costs.read_ns or top_k > WIDEST:
        return NOT_COUNTED
    many = not always_evicts and workload.n_steps < STEPS_WORTH_A_TIMING * BYPASSED**top_k
    return top_k if forced or (costs.last_piece_ns and not many) else NOT_COUNTED


def all_alike(workload: Workload) -> bool:
    """Whether every step is one token's, and demands top_k experts."""
    return (
        workload.extent == ((1, 1), (1, 1))
        and len(workload.keys) == workload.n_steps * workload.meta.top_k
    )


def time_of(kinds: NDArray[np.int64], width: int, staging: int, costs: Costs) -> SimulatedTime:
    """The time of the steps that ``kinds`` [2, kinds] counts, of prompts and decoded, from their
    gates on; ``width`` experts each, with ``staging`` buffers."""
    total = SimulatedTime()
    for decode, kind in np.argwhere(kinds).tolist():
        n = int(kinds[decode, kind])
        spent = _time(_came(kind, costs.write_back), width, staging, *_of_experts(costs))
        total.total_ns += n * spent.total_ns
        total.stall_ns += n * spent.stall_ns
        total.link_busy_ns += n * spent.link_busy_ns
        if decode:
            total.decode_ns += n * spent.total_ns
        else:
            total.prompt_ns += n * spent.total_ns
    return total


def _came(kind: int, write_back: bool) -> tuple[int, ...]:
    """How each missed expert came; where a victim costs nothing, any slot is as good as a free
    one."""
    found = []
    while kind:
        came = kind & (1 << BITS) - 1
        found.append(INTO_FREE if came == INTO_EMPTIED and not write_back else came)
        kind >>= BITS
    return tuple(found)


Constants = tuple[tuple[str, int], ...]


def _of_experts(costs: Costs) -> tuple[int, Constants]:
    """What the copies and the compute of a single token's experts take."""
    numbers = {name: value for name, value in costs._asdict().items() if isinstance(value, int)}
    return int(costs.expert_ns[1]), tuple(numbers.items())


@lru_cache(maxsize=1 << 16)
def _time(
    came: tuple[int, ...], width: int, staging: int, expert_ns: int, constants: Constants
) -> SimulatedTime:
    """The replay's clock after one step of a kind, without its gate: keys 0 to ``width`` - 1 are
    wanted, the first of which were missing, and others are cached that may go."""
    going = width + np.arange(came.count(INTO_EMPTIED))
    held = np.arange(len(came), width + len(going))
    context = Context(1, width + len(going), width, len(held) + came.count(INTO_FREE))
    policy = _Scripted(context, came, staging)
    cache = new_cache(context, policy)
    outcome = np.zeros(context.n_experts, np.int8)
    _fill(cache, policy, held.astype(np.int32), outcome)
    costs = _costs(width, expert_ns, constants)
    clocks = new_clocks(costs, context.n_experts)
    work, details = _step(width)
    routing = routing_buffers(context, None)
    replay(cache, policy, work, costs, clocks, (0, 1), details, routing, outcome)
    return clock_of(clocks)


class _Scripted(Policy):
    """Does with rank r of the step, whose key is r, what a kind of step says."""

    def __init__(self, context: Context, came: tuple[int, ...], staging: int) -> None:
        self.came = came
        self.staging = staging

    def victim(self, layer: int, incoming: int, candidates: NDArray[np.int32]) -> int:
        """An expert that the step does not want, or none."""
        return int(candidates[0]) if self.came[incoming] == INTO_EMPTIED else -1


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


def _costs(width: int, expert_ns: int, constants: Constants) -> Costs:
    """The costs of one step whose gate takes no time."""
    none = np.zeros(2, np.int64)
    return Costs(
        tokens=np.ones(1, np.int32),
        routed=np.ones(width, np.int32),
        begins_pass=np.zeros(1, np.bool_),
        layer_ns=none,
        expert_ns=np.full(2, expert_ns),
        cpu_ns=none,
        low_expert_ns=none,
        **(dict(constants) | {"gates_ns": 0}),  # type: ignore[arg-type]
    )


def _step(width: int) -> tuple[ReplaySteps, Details]:
    """A decoded token's step that demands keys 0 to ``width`` - 1."""
    wanted, ones = np.arange(width, dtype=np.int32), np.ones(width, np.float32)
    once, never = np.ones(1, np.int32), np.zeros(1, np.bool_)
    work = ReplaySteps(wanted, ones, np.array([0, width]), once - 1, once, ~never)
    nothing = np.empty((0, 0), np.float32)
    return work, Details(
        logits=NO_LOGITS[None],
        predicted=NO_PREDICTIONS[None],
        begins_pass=never,
        begins_sequence=never,
        row_offsets=np.zeros(2, np.int64),
        token_ids=NO_TOKEN_IDS,
        ids=wanted[None, :0],
        weights=nothing,
        row_logits=nothing,
    )
