"""What becomes of a miss where the policy has a say, and the account of what that changes.

Parts of the state machine that a cache whose policy loads every miss never comes to.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from moepolicy.kinds import COMPUTE, EVICT, LOAD, LOW, MISS, SKIP, SUBSTITUTE, WrongAnswer
from moepolicy.places import domain_of, join_queue, leave_device, note, push_free, remove
from moepolicy.policy import Policy
from moepolicy.state import (
    ALL_MASS,
    DEMAND,
    LOW_MASS,
    NOTHING,
    RESIDENT,
    SKIPPED_MASS,
    SUBSTITUTED_MASS,
    Cache,
)
from moepolicy.steps import Step


def drop_low_copies(cache: Cache, policy: Policy, step: Step) -> None:
    """Evict low copies of the step's experts where the policy asks for full precision."""
    for rank in range(len(step.experts)):
        key = int(step.experts[rank])
        if cache.status[key] != RESIDENT or not cache.is_low[key]:
            continue
        answer = policy.precision(step, rank)
        if answer == LOAD:
            note(cache, EVICT, key, key)
            domain = domain_of(cache, key)
            remove(cache, domain, key)
            push_free(cache, domain, int(cache.place[key]))
            leave_device(cache, policy, key)
        elif answer != LOW:
            raise WrongAnswer("precision answered neither LOW nor LOAD")


def settle(cache: Cache, policy: Policy, step: Step, rank: int) -> int:
    """Ask what becomes of a miss and see to it. Returns the step's outcome for it: COMPUTE, SKIP,
    SUBSTITUTE, or MISS where a copy, of whichever precision, will come."""
    key = int(step.experts[rank])
    note(cache, MISS, key, NOTHING)
    answer = policy.on_miss(step, rank)
    if answer == COMPUTE:
        if not cache.computing:
            raise WrongAnswer('on_miss answered COMPUTE: put "cpu" into what the policy requires')
        note(cache, COMPUTE, key, NOTHING)
        return COMPUTE
    if answer in (LOW, SUBSTITUTE, SKIP) and not cache.lossy:
        raise WrongAnswer(
            "on_miss answered what changes what the model computes: put lossy = True into the class"
        )
    if answer == SKIP:
        cache.pinned[key] = 0
        note(cache, SKIP, key, NOTHING)
        return SKIP
    if answer == SUBSTITUTE:
        substitute = _find_substitute(cache, policy, step, rank)
        if substitute >= 0:
            cache.pinned[key] = 0
            cache.pinned[substitute] = 1
            cache.unused[substitute] = 0
            cache.substitutes[rank] = substitute
            note(cache, SUBSTITUTE, key, substitute)
            return SUBSTITUTE
    elif answer == LOW:
        if not cache.lowering:
            raise WrongAnswer('on_miss answered LOW: put "low" into what the policy requires')
        cache.is_low[key] = 1
        note(cache, LOW, key, NOTHING)
    elif answer != LOAD:
        raise WrongAnswer("on_miss answered none of LOAD, COMPUTE, LOW, SUBSTITUTE and SKIP")
    join_queue(cache, key, DEMAND)
    return MISS


def _find_substitute(cache: Cache, policy: Policy, step: Step, rank: int) -> int:
    """The expert that stands in for the step's ``rank``-th one; -1 where none does.

    What lies in a staging buffer may be gone before the step is over, and is not offered.
    """
    n = 0
    first = step.layer * cache.n_experts
    domain = domain_of(cache, first)
    for i in range(cache.n_held[domain]):
        key = cache.held[domain, i]
        if first <= key < first + cache.n_experts and cache.status[key] == RESIDENT:
            cache.candidates[n] = key
            n += 1
    if n == 0:
        return -1
    chosen = policy.substitute(step, rank, cache.candidates[:n])
    if chosen == -1:
        return -1
    # Not looked up among the candidates, which the policy may have written over.
    for i in range(cache.n_held[domain]):
        key = cache.held[domain, i]
        of_layer = first <= key < first + cache.n_experts
        if key == chosen and of_layer and cache.status[key] == RESIDENT:
            return int(key)
    raise WrongAnswer("substitute named a key that was not among the candidates")


def use_substitute(cache: Cache, policy: Policy, step: Step, rank: int) -> None:
    """Tell the policy that the expert which stands in for the ``rank``-th, if any, is used."""
    substitute = int(cache.substitutes[rank])
    if substitute >= 0:
        policy.on_hit(substitute, step.number * (cache.n_experts + 1) + len(step.experts) - rank)


def weigh(cache: Cache, step: Step, outcome: NDArray[np.int8]) -> None:
    """Add the step's gate weights to the account."""
    mass = cache.mass
    for rank in range(len(step.experts)):
        weight = step.weights[rank]
        kind = outcome[rank]
        if not cache.routing:  # else counted as the gate gave them
            mass[ALL_MASS] += weight
        if kind == SKIP:
            mass[SKIPPED_MASS] += weight
        elif kind == SUBSTITUTE:
            mass[SUBSTITUTED_MASS] += weight
        elif cache.is_low[step.experts[rank]]:
            mass[LOW_MASS] += weight


def release_substitute(cache: Cache, rank: int) -> None:
    """The step is over: whoever stood in for its ``rank``-th expert is pinned no more."""
    substitute = cache.substitutes[rank]
    if substitute >= 0:
        cache.pinned[substitute] = 0
        cache.substitutes[rank] = -1
