"""Choosing an engine for one run: SimPy, or the replay, compiled where that pays and can be done.

All give the same decisions and the same timeline, in integer nanoseconds.
"""

from __future__ import annotations

import sys
import warnings
from collections import Counter
from collections.abc import Callable
from enum import StrEnum
from typing import Any

import numpy as np
from moepolicy import Context, ExpertCache, Policy, PolicyError, PolicySpec
from moepolicy.cache import Journal, Observer
from moepolicy.compiled import NotCompilable, compiled, compiled_policy
from moepolicy.state import Cache, new_cache

from moesim import replay as twin
from moesim.costs import Costs
from moesim.engine import Clock, Segment, Simulation
from moesim.workload import Workload

# Compiling takes seconds; the interpreted loop does some ten thousand steps in each. A policy is
# compiled once so many of its steps have been asked for.
WORTH_COMPILING = 100_000
CHUNK = 1 << 15  # steps whose predictions are in memory together
PREFIX = 256  # steps on which compiled code is held against its interpreted self

Look = Callable[[Cache, int, int], None]

_interpreted: dict[type[Policy], str] = {}  # policies that do not compile, and why
_proven: set[type[Policy]] = set()
_replayed: Counter[type[Policy]] = Counter()


class Engine(StrEnum):
    auto = "auto"
    simpy = "simpy"
    replay = "replay"


def run(
    workload: Workload,
    policy: PolicySpec,
    context: Context,
    costs: Callable[[Cache], Costs],
    *,
    engine: Engine = Engine.auto,
    timeline: bool = False,
    observers: tuple[Observer, ...] = (),
    journal: Journal | None = None,
    n_steps: int = 0,
    look: Look | None = None,
    n_events: int = 0,
) -> tuple[Cache, Clock]:
    """Replay ``workload``; returns the cache as it ended and where the time went.

    ``costs`` makes the durations once it is known whether the policy predicts. Observers and a
    journal need SimPy, which tells of every event; "auto" then chooses it. ``n_steps`` says how
    many steps the policy will be asked for, where ``workload`` is not all of them. The replay
    calls ``look`` after every stretch of at most CHUNK steps, whose events (``n_events`` at most)
    the cache then holds.
    """
    if engine is Engine.auto:
        engine = Engine.simpy if observers or journal is not None else Engine.replay
    if engine is Engine.simpy:
        cache = ExpertCache(
            context,
            policy.build(context),
            name=policy.label,
            observers=observers,
            journal=journal,
        )
        simulation = Simulation(workload, cache, costs(cache.arrays), timeline=timeline)
        return cache.arrays, simulation.run()
    _replayed[policy.policy] += workload.n_steps
    expected = max(n_steps, _replayed[policy.policy])
    if expected >= WORTH_COMPILING and _compiles(workload, policy, context, costs):
        return _replay(workload, policy, context, costs, timeline, look, n_events, compile=True)
    return _replay(workload, policy, context, costs, timeline, look, n_events, compile=False)


def _compiles(
    workload: Workload, policy: PolicySpec, context: Context, costs: Callable[[Cache], Costs]
) -> bool:
    """Whether a policy's class compiles and does the same compiled, on a prefix of the trace."""
    if policy.policy in _interpreted:
        return False
    if policy.policy in _proven:
        return True
    try:
        states = [
            _replay(workload, policy, context, costs, False, compile=how, until=PREFIX)
            for how in (False, True)
        ]
        same = all(
            np.array_equal(one, other)
            for one, other in zip(*(_comparable(*state) for state in states), strict=True)
        )
        reason = "" if same else "it decides differently when compiled"
    except PolicyError:
        raise
    except NotCompilable as error:
        reason = str(error)
    except Exception as error:  # numba's own, of many classes: the policy's code is beyond it
        reason = str(error).strip().splitlines()[0]
    if reason:
        _interpreted[policy.policy] = reason
        print(
            f"policy '{policy.name}' runs interpreted, some 100 times slower: {reason}",
            file=sys.stderr,
        )
        return False
    _proven.add(policy.policy)
    return True


def _comparable(cache: Cache, clock: Clock) -> list[Any]:
    return [cache.keys, cache.domains, cache.staging, cache.board, clock.total_ns, clock.stall_ns]


def _replay(
    workload: Workload,
    policy: PolicySpec,
    context: Context,
    costs_of: Callable[[Cache], Costs],
    timeline: bool,
    look: Look | None = None,
    n_events: int = 0,
    *,
    compile: bool,
    until: int | None = None,
) -> tuple[Cache, Clock]:
    """The loop over the machine's clocks, a chunk of steps at a time."""
    built = policy.build(context)
    cache = new_cache(context, built, n_events=n_events)
    costs = costs_of(cache)
    n_steps = workload.n_steps if until is None else min(until, workload.n_steps)
    n_segments = _most_segments(workload, costs, n_steps) if timeline else 0
    link = twin.new_link(costs, workload.n_keys, n_segments)
    work = twin.Work(
        workload.keys,
        workload.weights,
        workload.offsets,
        workload.layer,
        workload.tokens,
        workload.decode,
    )
    function = twin.replay
    if compile:
        function = compiled(twin.replay, omit=twin.unreachable(cache, costs, link))
    state = compiled_policy(built) if compile else built
    outcome = np.zeros(context.n_experts, np.int8)
    try:
        for first in range(0, n_steps, CHUNK):
            last = min(first + CHUNK, n_steps)
            logits, predicted = workload.details(first, last, predictions=cache.prefetching)
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                function(cache, state, work, costs, link, (first, last), logits, predicted, outcome)
            if look is not None:
                look(cache, first, last)
            workload.release()
    except (ValueError, IndexError, RuntimeError) as error:
        raise PolicyError(f"policy '{policy.label}' failed: {error}") from error
    clock = link.clock
    n = int(clock[twin.N_SEGMENTS])
    return cache, Clock(
        total_ns=int(clock[twin.NOW]),
        decode_ns=int(clock[twin.DECODE_NS]),
        prompt_ns=int(clock[twin.PROMPT_NS]),
        stall_ns=int(clock[twin.STALL_NS]),
        link_busy_ns=int(clock[twin.LINK_BUSY_NS]),
        segments=[Segment(*row) for row in link.segments[:n].tolist()] if timeline else None,
    )


def _most_segments(workload: Workload, costs: Costs, n_steps: int) -> int:
    """An upper bound: every step may copy, read and compute everything it could want or guess."""
    per_step = 1 + workload.meta.n_experts * 2
    pieces = 2 * costs.n_pieces + 1
    return n_steps * per_step * pieces
