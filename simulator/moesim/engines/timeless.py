"""What a policy decides where time plays no part: hits, misses and evictions, and no clock.

Every copy arrives at once. For a policy that does not prefetch these are the decisions of every
machine, live or simulated; for one that does, those of a link that is never waited for.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
from moepolicy import PolicySpec
from moepolicy.blame import broken
from moepolicy.compiled import compiled, compiled_policy
from moepolicy.guard import guarded
from moepolicy.kinds import HIT
from moepolicy.machine import begin, consume, end, finish, start, unreachable
from moepolicy.policy import Context
from moepolicy.routing import RoutingBuffers, reroute, routing_buffers
from moepolicy.state import Cache, new_cache
from moepolicy.steps import with_demand
from numpy.typing import NDArray

from moesim.engines.replay_state import ReplaySteps, rows_at, step_at, work_of
from moesim.workload.details import Details
from moesim.workload.steps import CHUNK, Workload


def decisions(
    workload: Workload, policy: PolicySpec, context: Context, *, compile: bool = True
) -> Cache:
    """Every step of ``workload``; returns the cache as it ended, with its counters.

    Raises PolicyError where the policy breaks a rule, NotCompilable (with ``compile``) where its
    state is not arrays and numbers.
    """
    workload = workload.shown_to(policy)
    built = policy.build(context)
    cache = new_cache(context, built, name=policy.label)
    state: Any = guarded(built)
    function: Callable[..., Any] = decide
    if compile:
        state = compiled_policy(built)
        function = compiled(decide, state, omit=unreachable(cache))
    work = work_of(workload)
    outcome = np.zeros(context.n_experts, np.int8)
    routing = routing_buffers(context, workload.weight_rule if policy.routes else None)
    try:
        for first in range(0, workload.n_steps, CHUNK):
            last = min(first + CHUNK, workload.n_steps)
            details = workload.details(first, last)
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                function(cache, state, work, (first, last), details, routing, outcome)
    except Exception as error:
        if compile:  # only the interpreter says where it was
            return decisions(workload, policy, context, compile=False)
        found = broken(policy.label, policy.policy, error, int(cache.step[0]))
        if found is error:
            raise
        raise found from error
    return cache


def decide(
    cache: Cache,
    policy: Any,
    work: ReplaySteps,
    steps: tuple[int, int],
    details: Details,
    routing: RoutingBuffers,
    outcome: NDArray[np.int8],
) -> None:
    """Steps first to one before last; the arguments are those of `moesim.engines.replay.replay`."""
    for number in range(steps[0], steps[1]):
        step = step_at(cache, work, number, number - steps[0], details)
        if cache.routing:
            n = reroute(cache, policy, step, rows_at(number - steps[0], details), routing)
            step = with_demand(step, routing.keys[:n], routing.weights[:n], step.logits)
        begin(cache, policy, step, outcome)
        for rank in range(len(step.experts)):
            if outcome[rank] == HIT:
                consume(cache, step.experts[rank])
        while cache.backlog[0]:
            key = start(cache, policy)
            if key < 0:
                break  # the last guesses found no place
            finish(cache, policy, key)
            if cache.pinned[key]:
                # Used as it arrives: the next copy may need its staging buffer.
                consume(cache, key)
        end(cache, policy)
