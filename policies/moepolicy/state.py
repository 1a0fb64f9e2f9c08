"""The arrays the state machine works on, and the invariants that must hold between its calls."""

from __future__ import annotations

from enum import IntEnum
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from moepolicy.policy import Context, Policy, PolicyError, overrides

# Columns of Cache.keys: one row a key, so that a decision touches one cache line.
STATUS = 0  # ABSENT, QUEUED, LOADING, RESIDENT
PINNED = 1  # wanted by the step in progress
STAGED = 2  # sits in (or travels to) a staging buffer, not a cache slot
UNUSED = 3  # was fetched on a guess and not used since
TRANSIENT = 4  # leaves its staging buffer when it is done: bypassed, or disproved in flight
CONSUMED = 5  # the step's compute has finished with it
PLACE = 6  # the slot it occupies, -1 without one
QUEUE = 7  # DEMAND or PREFETCH while QUEUED
NEXT = 8
PREVIOUS = 9
KEY_COLUMNS = 10

ABSENT = 0
QUEUED = 1
LOADING = 2
RESIDENT = 3

DEMAND = 0
PREFETCH = 1

# Entries of Cache.scalars.
STEP = 0  # index of the step in progress
LAYER = 1
N_DEMAND = 2  # keys of the step in progress; 0 between steps
N_STAGED = 3
N_FREE_STAGING = 4
N_EVENTS = 5
N_SCALARS = 6


class Kind(IntEnum):
    """What the state machine decided. The values index ``Cache.counters``."""

    HIT = 0  # wanted and resident
    LATE = 1  # wanted and in flight: waited for
    MISS = 2  # wanted and neither
    QUEUE_PREFETCH = 3
    CANCEL = 4  # a queued prefetch the gate disproved
    DROP = 5  # a prefetch that found no place when its turn came
    LOAD = 6  # a demanded copy starts; other: the slot
    SPECULATE = 7  # a prefetch's copy starts; other: the slot
    BYPASS = 8  # a demanded copy that will not be kept
    EVICT = 9  # other: the key it makes room for
    PROMOTE = 10  # a staged expert becomes a cached one
    USELESS = 11  # prefetched, and gone before it was used


HIT, LATE, MISS = int(Kind.HIT), int(Kind.LATE), int(Kind.MISS)
QUEUE_PREFETCH, CANCEL, DROP = int(Kind.QUEUE_PREFETCH), int(Kind.CANCEL), int(Kind.DROP)
LOAD, SPECULATE, BYPASS = int(Kind.LOAD), int(Kind.SPECULATE), int(Kind.BYPASS)
EVICT, PROMOTE, USELESS = int(Kind.EVICT), int(Kind.PROMOTE), int(Kind.USELESS)


class Cache(NamedTuple):
    """Everything the state machine knows. Slots are numbered over cache and staging together.

    A slot belongs to a domain (a layer, or the one shared cache) or to staging; a promotion
    exchanges two slots' roles instead of moving bytes.
    """

    n_layers: int
    n_experts: int
    n_domains: int
    stage_prefetches: bool
    prefetching: bool
    retaining: bool
    keys: NDArray[np.int32]  # [n_keys, KEY_COLUMNS]
    stamp: NDArray[np.int64]  # [n_keys] logical time of a pinned key's use
    demand: NDArray[np.int32]  # [n_experts] the step's keys, router order
    residents: NDArray[np.int32]  # [n_domains, slots] keys that hold a slot, ascending
    free: NDArray[np.int32]  # [n_domains, slots] stack of unused slots
    n_residents: NDArray[np.int64]  # [n_domains]
    n_free: NDArray[np.int64]  # [n_domains]
    staged: NDArray[np.int32]  # [staging] keys in staging buffers, oldest copy first
    free_staging: NDArray[np.int32]  # [staging] stack
    ends: NDArray[np.int32]  # [2, 2] first and last key of each queue, -1 when empty
    scalars: NDArray[np.int64]
    counters: NDArray[np.int64]  # by Kind
    scratch: NDArray[np.int32]  # candidates shown to the policy
    events: NDArray[np.int32]  # [capacity, 4] kind, step, key, other; capacity 0: not kept


def new_cache(context: Context, policy: Policy, *, n_events: int = 0) -> Cache:
    """An empty cache for ``policy``.

    Raises PolicyError when there are fewer slots or buffers than the machine can work with.
    """
    if context.slots < 0:
        raise PolicyError(f"slots must be 0 or more, not {context.slots}")
    if policy.staging < 1:
        raise PolicyError(
            f"staging must be 1 or more, not {policy.staging}: an expert without a slot is used "
            "from a staging buffer"
        )
    per_layer = context.scope == "layer"
    if not per_layer and context.scope != "global":
        raise PolicyError(f"unknown scope '{context.scope}': it is 'layer' or 'global'")
    n_keys = context.n_layers * context.n_experts
    n_domains = context.n_layers if per_layer else 1
    in_domain = context.n_experts if per_layer else n_keys
    # More slots than keys would never be filled.
    slots = min(context.slots * (1 if per_layer else context.n_layers), in_domain)
    keys = np.zeros((n_keys, KEY_COLUMNS), np.int32)
    keys[:, PLACE] = keys[:, NEXT] = keys[:, PREVIOUS] = -1
    scalars = np.zeros(N_SCALARS, np.int64)
    scalars[N_FREE_STAGING] = policy.staging
    n_cached = n_domains * slots
    # Stacks hand out the lowest slot first.
    free = np.arange(n_cached, dtype=np.int32).reshape(n_domains, slots)[:, ::-1].copy()
    free_staging = np.arange(n_cached, n_cached + policy.staging, dtype=np.int32)[::-1].copy()
    return Cache(
        n_layers=context.n_layers,
        n_experts=context.n_experts,
        n_domains=n_domains,
        stage_prefetches=policy.stage_prefetches,
        prefetching=overrides(policy, "prefetch"),
        retaining=overrides(policy, "retain"),
        keys=keys,
        stamp=np.zeros(n_keys, np.int64),
        demand=np.zeros(context.n_experts, np.int32),
        residents=np.full((n_domains, slots), -1, np.int32),
        free=free,
        n_residents=np.zeros(n_domains, np.int64),
        n_free=np.full(n_domains, slots, np.int64),
        staged=np.full(policy.staging, -1, np.int32),
        free_staging=free_staging,
        ends=np.full((2, 2), -1, np.int32),
        scalars=scalars,
        counters=np.zeros(len(Kind), np.int64),
        scratch=np.zeros(max(slots, 1), np.int32),
        events=np.zeros((n_events, 4), np.int32),
    )


def check(cache: Cache) -> None:
    """Recompute every invariant from the arrays; AssertionError names the one that broke."""
    keys = cache.keys
    places = keys[keys[:, PLACE] >= 0, PLACE]
    assert len(np.unique(places)) == len(places), "two keys in one slot"
    held = keys[:, STATUS] >= LOADING
    assert np.array_equal(held, keys[:, PLACE] >= 0), "a key on the device without a slot"
    used = []
    for domain in range(cache.n_domains):
        n, n_free = cache.n_residents[domain], cache.n_free[domain]
        assert n + n_free == cache.residents.shape[1], "slots lost or gained"
        members = cache.residents[domain, :n]
        assert np.all(np.diff(members) > 0), "residents out of order"
        assert np.all(held[members]), "a resident key is not on the device"
        assert not np.any(keys[members, STAGED]), "a staged key holds a cache slot"
        if cache.n_domains > 1:
            assert np.all(members // cache.n_experts == domain), "a key in a foreign domain"
        used += [*keys[members, PLACE], *cache.free[domain, :n_free]]
    n_staged, n_free_staging = cache.scalars[N_STAGED], cache.scalars[N_FREE_STAGING]
    assert n_staged + n_free_staging == len(cache.staged), "staging buffers lost or gained"
    staged = cache.staged[:n_staged]
    assert np.all(keys[staged, STAGED] == 1), "a key in staging is not marked so"
    assert held.sum() == cache.n_residents.sum() + n_staged, "a key on the device is nowhere"
    used += [*keys[staged, PLACE], *cache.free_staging[:n_free_staging]]
    assert sorted(used) == list(range(len(used))), "a slot used twice or not at all"
    _check_queues(cache)
    wanted = cache.demand[: cache.scalars[N_DEMAND]]
    assert sorted(np.flatnonzero(keys[:, PINNED])) == sorted(wanted), "pins are not the step's"


def _check_queues(cache: Cache) -> None:
    queued = 0
    for queue in (DEMAND, PREFETCH):
        key, previous = cache.ends[queue, 0], -1
        while key >= 0:
            row = cache.keys[key]
            assert row[STATUS] == QUEUED, "a queue holds a key that is not queued"
            assert row[QUEUE] == queue, "a queue holds another queue's key"
            assert row[PREVIOUS] == previous, "a queue's links disagree"
            previous, key, queued = key, row[NEXT], queued + 1
        assert cache.ends[queue, 1] == previous, "a queue's end is not its last key"
    assert queued == np.count_nonzero(cache.keys[:, STATUS] == QUEUED), "a queued key is lost"
