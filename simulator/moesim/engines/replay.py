"""The compiled twin of `moesim.engines.in_simpy`: the same machine as a loop over its few clocks.

Plain functions over arrays and integers, compiled with numba together with the state machine and
the policy. There is no event heap: what comes next is the end of the bus's piece, a copy whose
bytes become ready, or compute itself. Event for event it gives SimPy's timeline.

A step of one token that finds the link idle and leaves it so takes a time that depends on its kind
alone (`moesim.engines.step_kinds`). Where no decision depends on a clock, such steps are counted by
kind, and `moesim.engines.step_times` adds their times.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from moepolicy import machine
from moepolicy.kinds import COMPUTE, HIT, LATE, MISS, SKIP, SUBSTITUTE
from moepolicy.machine import begin, consume, end, finish, start
from moepolicy.routing import RoutingBuffers, reroute
from moepolicy.state import DEMAND, INDEX, PREFETCH, RESIDENT, Cache
from moepolicy.steps import Step, with_demand
from numpy.typing import NDArray

from moesim.engines.clock import COMPUTE_LANE, CPU_LANE, DISK_LANE, LINK_LANE
from moesim.engines.replay_host import host_has
from moesim.engines.replay_state import NEVER, Clocks, ReplaySteps, rows_at, step_at
from moesim.engines.step_kinds import BITS, BYPASSED, INTO_EMPTIED, INTO_FREE
from moesim.machine.costs import Costs
from moesim.workload.details import Details

DONE = -1  # an expert's outcome once it is computed
STUCK = "the simulated machine is stuck: nothing will arrive"


def unreachable(cache: Cache, costs: Costs, clocks: Clocks, *, all_counted: bool) -> frozenset[Any]:
    """The functions that a run with these features will not come to. ``all_counted``: the kinds of
    all steps are, where any are."""
    without: set[Any] = set()
    if clocks.counted_width < 0:
        without.add(_copy_at_once)
    elif all_counted:
        without |= {_advance, _compute, _run_on_cpu}
    if not len(clocks.segments):
        without.add(_draw)
    if not costs.cpu_workers:
        without.add(_run_on_cpu)
    if not costs.read_ns:
        without.add(host_has)
    if not cache.prefetching:
        without.add(_want)
    if not cache.choosing:
        without.add(_runs)
    return machine.unreachable(cache) | without


def replay(
    cache: Cache,
    policy: Any,
    work: ReplaySteps,
    costs: Costs,
    clocks: Clocks,
    steps: tuple[int, int],
    details: Details,
    routing: RoutingBuffers,
    outcome: NDArray[np.int8],
) -> None:
    """Steps first to one before last, of which ``details`` are; ``outcome`` is scratch of
    n_experts entries, ``routing`` that of a policy that routes."""
    for number in range(steps[0], steps[1]):
        began = clocks.now[0]
        first, last = work.offsets[number], work.offsets[number + 1]
        tokens = costs.tokens[number] & INDEX
        until_gate = costs.layer_ns[tokens]
        if costs.begins_pass[number]:
            until_gate += costs.pass_ns
        layer = work.layer[number]
        if cache.asks[layer]:
            until_gate += costs.gates_ns
            clocks.gates_ns[0] += costs.gates_ns
        counted = tokens == 1 and last - first == clocks.counted_width
        if counted:
            clocks.now[0] += until_gate
        else:
            _advance(cache, policy, costs, clocks, began + until_gate)
        _draw(clocks, COMPUTE_LANE, 0, began, clocks.now[0], -1 - layer, 1)
        step = step_at(cache, work, number, number - steps[0], details)
        used_by = costs.routed[first:last]
        if cache.routing:
            rows = rows_at(number - steps[0], details)
            n = reroute(cache, policy, step, rows, routing)
            step = with_demand(step, routing.keys[:n], routing.weights[:n], step.logits)
            used_by = routing.used_by[:n]
        begin(cache, policy, step, outcome)
        if counted:
            kind = _copy_at_once(cache, policy)
            clocks.kinds[int(work.decode[number]), kind] += 1
        else:
            _compute(cache, policy, costs, clocks, step, used_by, outcome)
        end(cache, policy)
        if work.decode[number]:
            clocks.decode_ns[0] += clocks.now[0] - began
        else:
            clocks.prompt_ns[0] += clocks.now[0] - began


def _copy_at_once(cache: Cache, policy: Any) -> int:
    """Let each copy of a step arrive, and its expert be computed, before the next one starts, which
    decides nothing else than any other clock does; returns the step's kind."""
    kind = shift = 0
    while cache.backlog[0]:
        key = start(cache, policy)
        if key < 0:
            raise RuntimeError(STUCK)
        came = INTO_EMPTIED if cache.evicted[0] >= 0 else INTO_FREE
        if cache.transient[key]:
            came = BYPASSED
        finish(cache, policy, key)
        consume(cache, key)
        kind |= came << shift
        shift += BITS
    return kind


def _compute(
    cache: Cache,
    policy: Any,
    costs: Costs,
    clocks: Clocks,
    step: Step,
    used_by: NDArray[np.int32],
    outcome: NDArray[np.int8],
) -> None:
    """Compute what of the step is here in router order, then what arrives as it arrives."""
    n = len(step.experts)
    joins_at = _run_on_cpu(costs, clocks, step, used_by, outcome)
    remaining = n
    for rank in range(n):
        if outcome[rank] == LATE:
            _want(clocks, step.experts[rank])
        if outcome[rank] == COMPUTE or outcome[rank] == SKIP:
            remaining -= 1
    hits = 0  # the ranks among which all hits are computed
    waking_ns = 0
    # One place for time to pass in, as compiled code has all that can happen then in each.
    while remaining > 0 or joins_at > clocks.now[0]:
        began = clocks.now[0]
        while hits < n and outcome[hits] != HIT:
            hits += 1
        rank = hits if hits < n else _first_ready(cache, clocks, step, outcome)
        runs = -1
        if rank >= 0:
            runs = step.experts[rank]
            until = began + waking_ns + costs.expert_ns[used_by[rank]]
            if cache.choosing:
                runs = _runs(cache, runs, rank, outcome)
                if cache.is_low[runs]:
                    until = began + waking_ns + costs.low_expert_ns[used_by[rank]]
        else:
            until = NEVER if remaining > 0 else joins_at
        _advance(cache, policy, costs, clocks, until)
        if rank < 0:
            clocks.stall_ns[0] += clocks.now[0] - began
            waking_ns = costs.arrival_ns
        else:
            clocks.stall_ns[0] += waking_ns
            _draw(clocks, COMPUTE_LANE, 0, began + waking_ns, clocks.now[0], runs, 1)
            waking_ns = 0
            consume(cache, step.experts[rank])
            outcome[rank] = DONE
            remaining -= 1


def _runs(cache: Cache, key: int, rank: int, outcome: NDArray[np.int8]) -> int:
    """What computes for the step's ``rank``-th expert, ``key``: itself, or its substitute."""
    return int(cache.substitutes[rank]) if outcome[rank] == SUBSTITUTE else key


def _run_on_cpu(
    costs: Costs,
    clocks: Clocks,
    step: Step,
    used_by: NDArray[np.int32],
    outcome: NDArray[np.int8],
) -> int:
    """Share the step's CPU experts among the workers; returns when the last is done."""
    free_at = clocks.cpu_free_at
    joins_at = 0
    for rank in range(len(step.experts)):
        if outcome[rank] == COMPUTE:
            if joins_at == 0:
                free_at[:] = clocks.now[0]
            worker = 0
            for other in range(1, len(free_at)):
                if free_at[other] < free_at[worker]:
                    worker = other
            began = free_at[worker]
            free_at[worker] = began + costs.cpu_ns[used_by[rank]]
            joins_at = max(joins_at, free_at[worker])
            _draw(clocks, CPU_LANE, worker, began, free_at[worker], step.experts[rank], 1)
    return joins_at


def _first_ready(cache: Cache, clocks: Clocks, step: Step, outcome: NDArray[np.int8]) -> int:
    """After the hits: the first rank that has a substitute, then that of the awaited expert which
    arrived first; -1 while none has."""
    first = -1
    for rank in range(len(step.experts)):
        if outcome[rank] == SUBSTITUTE:
            return rank
        if outcome[rank] == LATE or outcome[rank] == MISS:
            key = step.experts[rank]
            if cache.status[key] == RESIDENT and (
                first < 0 or clocks.arrival[key] < clocks.arrival[step.experts[first]]
            ):
                first = rank
    return first


def _advance(cache: Cache, policy: Any, costs: Costs, clocks: Clocks, until: int) -> None:
    """Let the link work while compute is busy until then, or waits for an arrival if that is
    NEVER. What ends at ``until`` itself is complete on return, and dispatched on only after the
    decisions of that instant."""
    arrived = clocks.arrived[0]
    while until > clocks.now[0]:
        if clocks.n_copies[0] or cache.backlog[0]:
            _dispatch(cache, policy, costs, clocks)
        upcoming = min(until, _next_event(clocks))
        if upcoming == NEVER:
            raise RuntimeError(STUCK)
        clocks.now[0] = upcoming
        _complete(cache, policy, costs, clocks)
        if until == NEVER and clocks.arrived[0] > arrived:
            return


def _next_event(clocks: Clocks) -> int:
    """When the bus ends its piece or, if it is idle, the next copy's bytes become ready."""
    upcoming = int(clocks.bus_until[0])
    if upcoming == NEVER and clocks.n_copies[0]:
        for stream in range(len(clocks.copy_key)):
            if clocks.copy_key[stream] >= 0:
                upcoming = min(upcoming, clocks.ready_at[stream])
    return upcoming


def _complete(cache: Cache, policy: Any, costs: Costs, clocks: Clocks) -> None:
    """End the bus's piece if its time has come."""
    if clocks.bus_until[0] > clocks.now[0]:
        return
    clocks.bus_until[0] = NEVER
    stream = clocks.bus_copy[0]
    clocks.pieces[stream] -= 1
    if clocks.pieces[stream] > 0:
        return
    clocks.crossings[stream] -= 1
    if clocks.crossings[stream] > 0:
        low = clocks.copy_is_low[stream]
        clocks.pieces[stream] = costs.low_pieces if low else costs.n_pieces
    else:
        key = clocks.copy_key[stream]
        clocks.copy_key[stream] = -1
        clocks.n_copies[0] -= 1
        clocks.arrived[0] += 1
        clocks.arrival[key] = clocks.arrived[0]
        finish(cache, policy, key)
        if costs.back_to_back and not _nothing_queued(cache):
            clocks.followed_at[stream] = clocks.now[0]


def _nothing_queued(cache: Cache) -> bool:
    return bool(cache.first[DEMAND] < 0 and cache.first[PREFETCH] < 0)


def _dispatch(cache: Cache, policy: Any, costs: Costs, clocks: Clocks) -> None:
    stream = _free_stream(cache, costs, clocks)
    while stream >= 0:
        key = start(cache, policy)
        if key < 0:
            break
        _start_copy(cache, costs, clocks, key, stream)
        stream = _free_stream(cache, costs, clocks)
    if clocks.bus_until[0] == NEVER:
        _grant_bus(costs, clocks)


def _free_stream(cache: Cache, costs: Costs, clocks: Clocks) -> int:
    """A stream for what would be copied next; -1 where nothing is queued or none is free."""
    first = 0
    if cache.first[DEMAND] < 0:
        if cache.first[PREFETCH] < 0:
            return -1
        first = costs.streams if costs.chunked else 0
    for stream in range(first, first + costs.streams):
        if clocks.copy_key[stream] < 0:
            return stream
    return -1


def _start_copy(cache: Cache, costs: Costs, clocks: Clocks, key: int, stream: int) -> None:
    demand = 1 - cache.unused[key]
    low = cache.is_low[key] if cache.lowering else 0
    ready_at = clocks.now[0]
    if not costs.back_to_back or clocks.followed_at[stream] != clocks.now[0]:
        ready_at += costs.latency_ns
    if costs.read_ns and not host_has(costs, clocks, key, low):
        begins = max(clocks.now[0], clocks.disk_free_at[0])
        clocks.disk_free_at[0] = begins + (costs.low_read_ns if low else costs.read_ns)
        ready_at = clocks.disk_free_at[0] + costs.latency_ns
        _draw(clocks, DISK_LANE, 0, begins, clocks.disk_free_at[0], key, demand)
    clocks.started[0] += 1
    clocks.n_copies[0] += 1
    clocks.copy_key[stream] = key
    clocks.copy_number[stream] = clocks.started[0]
    clocks.copy_is_demand[stream] = demand
    clocks.ready_at[stream] = ready_at
    twice = costs.write_back and cache.evicted[0] >= 0
    clocks.pieces[stream] = costs.low_pieces if low else costs.n_pieces
    clocks.crossings[stream] = 2 if twice else 1
    clocks.copy_is_low[stream] = low


def _want(clocks: Clocks, key: int) -> None:
    """A guess under way turned out to be right: its bytes go with the demanded ones now."""
    for stream in range(len(clocks.copy_key)):
        if clocks.copy_key[stream] == key:
            clocks.copy_is_demand[stream] = 1


def _grant_bus(costs: Costs, clocks: Clocks) -> None:
    """The next piece: of demand before prefetch, of what started first."""
    chosen = -1
    for stream in range(len(clocks.copy_key)):
        if clocks.copy_key[stream] < 0 or clocks.ready_at[stream] > clocks.now[0]:
            continue
        if chosen < 0:
            chosen = stream
            continue
        first = clocks.copy_number[stream] < clocks.copy_number[chosen]
        more_wanted = clocks.copy_is_demand[stream] - clocks.copy_is_demand[chosen]
        if more_wanted > 0 or (more_wanted == 0 and first):
            chosen = stream
    if chosen < 0:
        return
    low = clocks.copy_is_low[chosen]
    took = costs.low_last_piece_ns if low else costs.last_piece_ns
    if _undisturbed(clocks, chosen):
        whole = took + costs.piece_ns * ((costs.low_pieces if low else costs.n_pieces) - 1)
        took += costs.piece_ns * (clocks.pieces[chosen] - 1)
        took += whole * (clocks.crossings[chosen] - 1)
        clocks.pieces[chosen] = clocks.crossings[chosen] = 1
    elif clocks.pieces[chosen] > 1:
        took = costs.piece_ns
    clocks.bus_until[0] = clocks.now[0] + took
    clocks.bus_copy[0] = chosen
    clocks.link_busy_ns[0] += took
    _draw(
        clocks,
        LINK_LANE,
        chosen,
        clocks.now[0],
        clocks.bus_until[0],
        clocks.copy_key[chosen],
        clocks.copy_is_demand[chosen],
    )


def _undisturbed(clocks: Clocks, chosen: int) -> bool:
    """Whether nothing can come between the pieces of a copy: what is wanted goes first, and of that
    what started first. A timeline shows them one by one."""
    if len(clocks.segments) or not clocks.copy_is_demand[chosen]:
        return False
    for stream in range(len(clocks.copy_key)):
        earlier = clocks.copy_number[stream] < clocks.copy_number[chosen]
        if clocks.copy_key[stream] >= 0 and earlier:
            return False
    return True


def _draw(
    clocks: Clocks, lane: int, index: int, begins: int, ends: int, key: int, demand: int
) -> None:
    """Add a segment to the timeline, if one is kept."""
    if len(clocks.segments):
        n = clocks.n_segments[0]
        if n == len(clocks.segments):
            raise IndexError("the timeline is full")
        row = clocks.segments[n]
        row[0] = lane
        row[1] = index
        row[2] = begins
        row[3] = ends
        row[4] = key
        row[5] = demand
        clocks.n_segments[0] = n + 1
