"""The state machine of expert caching: every decision, once, for simulation and live runs alike.

Plain functions over NumPy arrays, so that numba can compile them as they stand. They know
nothing of time: a driver (SimPy, the fast replay, the live runtime) calls ``begin`` and ``end``
around each expert step, ``start`` whenever its link could take a copy, ``finish`` when a copy has
arrived, ``consume`` when an expert's compute is done, and ``resize`` (`moepolicy.resize`) when the
cache is to have another size. The decisions are a deterministic function of that sequence of calls.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from moepolicy.asking import as_asked, ask_ahead
from moepolicy.kinds import (
    BYPASS,
    CANCEL,
    DROP,
    HIT,
    LATE,
    LOAD,
    MISS,
    PROMOTE,
    QUEUE_PREFETCH,
    SPECULATE,
    WrongAnswer,
)
from moepolicy.misses import (
    drop_low_copies,
    release_substitute,
    settle,
    use_substitute,
    weigh,
)
from moepolicy.places import (
    NOT_SCORING,
    SCORING,
    domain_of,
    gather_candidates,
    hold,
    join_queue,
    leave_device,
    leave_queue,
    may_go,
    may_stay,
    note,
    pop_free,
    push_free,
    stage,
    unstage,
    write_down,
)
from moepolicy.policy import Policy
from moepolicy.resize import resize, take_from, take_least, trim
from moepolicy.routing import reroute
from moepolicy.state import (
    ABSENT,
    DEMAND,
    INDEX,
    LOADING,
    NOTHING,
    PREFETCH,
    QUEUED,
    RESIDENT,
    Cache,
)
from moepolicy.steps import Step


def begin(cache: Cache, policy: Policy, step: Step, outcome: NDArray[np.int8]) -> None:
    """A step's demand is known: pin it, tell hits from misses, queue misses and prefetches.

    ``outcome`` [n] is filled with HIT, LATE, MISS (a copy will come), COMPUTE, SKIP or SUBSTITUTE
    for each key of ``step.experts``.
    """
    step = as_asked(cache, step)
    n = len(step.experts)
    cache.step[0] = step.number
    cache.n_demand[0] = n
    policy.on_step(step)
    for rank in range(n):
        key = int(step.experts[rank]) & INDEX
        cache.wanted[rank] = key
        cache.pinned[key] = 1
        cache.stamp[key] = step.number * (cache.n_experts + 1) + n - rank
    if cache.prefetching:
        _disprove(cache, policy, step.layer)
    if cache.lowering:
        drop_low_copies(cache, policy, step)
        if cache.excess[0] > 0:
            trim(cache, policy)
    for rank in range(n):
        outcome[rank] = _request(cache, policy, step, rank)
    for i in range(n):
        rank = n - 1 - i
        key = int(step.experts[rank]) & INDEX
        if outcome[rank] == HIT or outcome[rank] == LATE:
            policy.on_hit(key, cache.stamp[key])
        elif cache.choosing:
            use_substitute(cache, policy, step, rank)
    if cache.choosing:
        weigh(cache, step, outcome)
    if cache.prefetching:
        for rank in range(n):
            key = int(step.experts[rank]) & INDEX
            if cache.staged[key]:
                _promote(cache, policy, key)
        _queue_prefetches(cache, policy, step)
    ask_ahead(cache, policy, step.layer)


def start(cache: Cache, policy: Policy) -> int:
    """The key whose copy starts now, its slot chosen and emptied; -1 when none can start.

    Demand goes before prefetch. A demand that waits for a staging buffer holds everything behind
    it back, so that the order of demanded copies never depends on the clock.
    """
    cache.evicted[0] = -1
    key = int(cache.first[DEMAND])
    if key >= 0:
        return _start_demand(cache, policy, key)
    key = int(cache.first[PREFETCH])
    while key >= 0:
        leave_queue(cache, key)
        slot = _prefetch_slot(cache, policy, key)
        if slot >= 0:
            cache.unused[key] = 1
            _load(cache, policy, key, slot, SPECULATE)
            return key
        cache.backlog[0] -= 1
        note(cache, DROP, key, NOTHING)
        key = int(cache.first[PREFETCH])
    return -1


def finish(cache: Cache, policy: Policy, key: int) -> None:
    """The copy of ``key`` has arrived."""
    cache.status[key] = RESIDENT
    cache.backlog[0] -= 1
    if cache.transient[key] and not cache.pinned[key]:
        _discard(cache, policy, key)
    elif cache.scoring and not cache.pinned[key]:
        may_go(cache, key)
    if cache.excess[0] > 0:
        trim(cache, policy)


def consume(cache: Cache, key: int) -> None:
    """The step's compute has finished with ``key``; a bypassed expert's buffer may be reused."""
    cache.consumed[key] = 1


def end(cache: Cache, policy: Policy) -> None:
    """All of the step's experts are computed: pins drop, bypassed experts go."""
    for rank in range(cache.n_demand[0]):
        key = int(cache.wanted[rank]) & INDEX
        cache.pinned[key] = 0
        cache.consumed[key] = 0
        if cache.scoring:
            may_go(cache, key)
        if cache.choosing:
            release_substitute(cache, rank)
    if cache.excess[0] > 0:
        trim(cache, policy)
    i = 0
    while i < cache.n_held[cache.staging]:
        key = int(cache.held[cache.staging, i])
        if not (cache.transient[key] and cache.status[key] == RESIDENT):
            i += 1
        elif not (cache.retaining and _retain(cache, policy, key)):
            _discard(cache, policy, key)
    cache.n_demand[0] = 0


def unreachable(cache: Cache) -> frozenset[Any]:
    """The functions that no call for ``cache`` will come to, for those who compile it."""
    without: set[Any] = set()
    if not len(cache.events):
        without.add(write_down)
    if not cache.prefetching:
        without |= {_disprove, _promote, _queue_prefetches, _prefetch_slot}
    if not cache.declining:
        without.add(ask_ahead)
    if not cache.retaining:
        without.add(_retain)
    if not cache.resizable:
        without |= {resize, trim}
    if not cache.routing:
        without.add(reroute)
    if not cache.choosing:
        without |= {settle, use_substitute, weigh, release_substitute}
    if not cache.lowering:
        without.add(drop_low_copies)
    without |= {take_from} | NOT_SCORING if cache.scoring else {take_least} | SCORING
    return frozenset(without)


def _request(cache: Cache, policy: Policy, step: Step, rank: int) -> int:
    """Tell hit from late from miss, and deal with a miss; a prefetch found useful is used now."""
    key = int(step.experts[rank]) & INDEX
    if cache.status[key] == RESIDENT:
        kind = HIT
        if cache.scoring:
            may_stay(cache, key)
    elif cache.status[key] == LOADING:
        kind = LATE
        cache.transient[key] = 0  # disproved for an earlier token, wanted after all
    else:
        kind = MISS
        if cache.status[key] == QUEUED:
            leave_queue(cache, key)
            cache.backlog[0] -= 1
        if cache.choosing:
            return settle(cache, policy, step, rank)
        join_queue(cache, key, DEMAND)
    cache.unused[key] = 0
    note(cache, kind, key, NOTHING)
    return kind


def _disprove(cache: Cache, policy: Policy, layer: int) -> None:
    """The gate of ``layer`` has spoken: what was guessed for it and is not wanted goes."""
    first = layer * cache.n_experts
    if cache.first[PREFETCH] >= 0:
        for key in range(first, first + cache.n_experts):
            if cache.status[key] == QUEUED and not cache.pinned[key]:
                leave_queue(cache, key)
                cache.backlog[0] -= 1
                note(cache, CANCEL, key, NOTHING)
    i = 0
    while i < cache.n_held[cache.staging]:
        key = int(cache.held[cache.staging, i])
        if cache.layer[key] != layer or cache.pinned[key]:
            i += 1
        elif cache.status[key] == LOADING:
            cache.transient[key] = 1
            i += 1
        else:
            _discard(cache, policy, key)


def _queue_prefetches(cache: Cache, policy: Policy, step: Step) -> None:
    wanted = cache.guessed
    n = policy.prefetch(step, wanted)
    if n < 0 or n > len(wanted):
        raise WrongAnswer("prefetch answered a number of keys that there cannot be")
    for i in range(n):
        key = int(wanted[i])
        if key < 0 or key >= len(cache.status):
            raise WrongAnswer("prefetch named a key that does not exist")
        if cache.status[key] == ABSENT:
            join_queue(cache, key, PREFETCH)
            note(cache, QUEUE_PREFETCH, key, NOTHING)


def _start_demand(cache: Cache, policy: Policy, key: int) -> int:
    slot = -1
    if not cache.transient[key]:
        slot = _claim_slot(cache, policy, key)
        if slot < 0:
            # Decided once: asking the policy again later would make it depend on the clock.
            cache.transient[key] = 1
            note(cache, BYPASS, key, NOTHING)
    if cache.transient[key]:
        slot = _claim_buffer(cache, policy)
        if slot < 0:
            return -1
        stage(cache, key)
    leave_queue(cache, key)
    _load(cache, policy, key, slot, LOAD)
    return key


def _load(cache: Cache, policy: Policy, key: int, slot: int, kind: int) -> None:
    cache.status[key] = LOADING
    cache.place[key] = slot
    note(cache, kind, key, slot)
    if kind == LOAD:
        policy.on_load(key, False, cache.stamp[key])
    else:
        policy.on_load(key, True, cache.step[0] * (cache.n_experts + 1))


def _prefetch_slot(cache: Cache, policy: Policy, key: int) -> int:
    """A place for a prefetch: a free staging buffer or, as the policy says, a cache slot that is
    free, or any."""
    if not cache.stage_prefetches:
        return _claim_slot(cache, policy, key)
    if cache.fills_slots and cache.n_free[domain_of(cache, key)]:
        return _claim_slot(cache, policy, key)
    if cache.n_free[cache.staging] == 0:
        return -1
    stage(cache, key)
    return pop_free(cache, cache.staging)


def _claim_slot(cache: Cache, policy: Policy, key: int) -> int:
    """A cache slot for ``key``, which becomes a resident: a free one, or a victim's; else -1."""
    domain = domain_of(cache, key)
    if cache.n_free[domain]:
        slot = pop_free(cache, domain)
        hold(cache, domain, key)
    elif cache.scoring:
        slot = take_least(cache, policy, domain, key)
    else:
        n = gather_candidates(cache, domain)
        if n == 0:
            return -1
        candidates = cache.candidates[:n]
        layer = int(cache.layer[key])
        return take_from(cache, policy, policy.victim(layer, key, candidates), key)
    return slot


def _claim_buffer(cache: Cache, policy: Policy) -> int:
    """A staging buffer for a demanded expert; -1 while it must wait for one.

    Free ones first, then the oldest unpinned guess, then the oldest bypass of this step once its
    compute is done: in order of their starts, whatever order they arrived in.
    """
    if cache.n_free[cache.staging] == 0:
        for i in range(cache.n_held[cache.staging]):
            key = int(cache.held[cache.staging, i])
            if cache.status[key] == RESIDENT and not cache.pinned[key]:
                _discard(cache, policy, key)
                break
    if cache.n_free[cache.staging] == 0:
        for i in range(cache.n_held[cache.staging]):
            key = int(cache.held[cache.staging, i])
            if cache.transient[key] and cache.pinned[key]:
                if cache.consumed[key]:
                    _discard(cache, policy, key)
                break
    if cache.n_free[cache.staging] == 0:
        return -1
    return pop_free(cache, cache.staging)


def _promote(cache: Cache, policy: Policy, key: int) -> None:
    """A staged expert is used for the first time: it becomes a resident, its buffer a slot."""
    slot = _claim_slot(cache, policy, key)
    if slot < 0:
        cache.transient[key] = 1
        note(cache, BYPASS, key, NOTHING)
    else:
        _keep(cache, key, slot)


def _retain(cache: Cache, policy: Policy, key: int) -> bool:
    """Ask whether a bypassed expert takes a slot after all, now that the pins have dropped."""
    domain = domain_of(cache, key)
    n = gather_candidates(cache, domain)
    if n == 0:
        return False
    candidates = cache.candidates[:n]
    layer = int(cache.layer[key])
    slot = take_from(cache, policy, policy.retain(layer, key, candidates), key)
    if slot < 0:
        return False
    _keep(cache, key, slot)
    return True


def _keep(cache: Cache, key: int, slot: int) -> None:
    """``key`` stays where it lies: its buffer joins the cache, ``slot`` becomes a buffer."""
    unstage(cache, key)
    cache.transient[key] = 0
    push_free(cache, cache.staging, slot)
    note(cache, PROMOTE, key, slot)


def _discard(cache: Cache, policy: Policy, key: int) -> None:
    """``key`` leaves its staging buffer."""
    slot = int(cache.place[key])
    unstage(cache, key)
    cache.transient[key] = 0
    push_free(cache, cache.staging, slot)
    leave_device(cache, policy, key)
