"""The arrays the state machine works on, and the invariants that must hold between its calls."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from moepolicy.kinds import Kind
from moepolicy.policy import Context, Policy, PolicyUsageError, overrides
from moepolicy.scores import scores_of
from moepolicy.sharing import domain_slots, sharing_class, slots_in_all

# Entries of Cache.status.
ABSENT = 0
QUEUED = 1
LOADING = 2
RESIDENT = 3

# The queues: entries of Cache.first, Cache.last and Cache.queue.
DEMAND = 0
PREFETCH = 1

STAYS = np.iinfo(np.int64).max  # an entry of Cache.standing: what may not go now

INDEX = (1 << 31) - 1  # what is masked so is no index from an array's end, for which there is code

BUFFERS = 1024  # of staging, that any policy may have: more only where there are more experts

NOTHING = -1  # what an event is about besides its key, where that is nothing

# Entries of Cache.mass: gate weight since the start.
ALL_MASS = 0  # of everything demanded
SKIPPED_MASS = 1
SUBSTITUTED_MASS = 2
LOW_MASS = 3  # computed from a copy of the lower precision
REROUTED_MASS = 4  # given by the gate to experts that the policy replaced
MASS_ENTRIES = 5


class Cache(NamedTuple):
    """Everything the state machine knows, in arrays; a single number is an array of one entry.

    Slots are numbered over cache and staging together. A slot belongs to a domain (a layer, or the
    one shared cache) or to staging; a promotion exchanges two slots' roles instead of moving bytes.
    A cache that can be resized has room for the most slots it may get; those it has not are spare.
    Domains may have different numbers of slots (see `moepolicy.sharing`). Domains and staging are
    areas: rows of ``held`` and ``free``.
    """

    n_experts: int
    slots: int  # of all domains together, at most
    staging_buffers: int
    staging: int  # the area of the staging buffers, after those of the domains
    stage_prefetches: bool
    fills_slots: bool
    prefetching: bool
    declining: bool  # the policy has a say in whether later gates are asked for predictions
    retaining: bool
    routing: bool  # the policy has a say in which experts a token gets
    choosing: bool  # the policy has a say in what happens on a miss
    lossy: bool  # and may answer what changes what the model computes
    computing: bool  # and may answer COMPUTE
    lowering: bool  # and may answer LOW
    resizable: bool
    scoring: bool  # the policy evicts by `scores` alone, and the cache keeps the order

    # Of each key: [n_keys].
    layer: NDArray[np.int64]  # looked up, as dividing takes longer
    domain: NDArray[np.int64]  # the cache it belongs to: of its layer, or the shared one
    status: NDArray[np.int64]  # ABSENT, QUEUED, LOADING, RESIDENT
    pinned: NDArray[np.int64]  # wanted by the step in progress
    staged: NDArray[np.int64]  # sits in (or travels to) a staging buffer, not a cache slot
    unused: NDArray[np.int64]  # was fetched on a guess and not used since
    transient: NDArray[np.int64]  # leaves its buffer when done: bypassed, or disproved in flight
    consumed: NDArray[np.int64]  # the step's compute has finished with it
    place: NDArray[np.int64]  # the slot it occupies, -1 without one
    queue: NDArray[np.int64]  # DEMAND or PREFETCH while QUEUED
    next: NDArray[np.int64]  # neighbours in that queue, -1 at its ends
    previous: NDArray[np.int64]
    stamp: NDArray[np.int64]  # logical time of its use, while pinned
    is_low: NDArray[np.int64]  # its copy, queued, under way or here, is of the lower precision
    at: NDArray[np.int64]  # its place among its domain's held keys, where ``scoring``
    scores: NDArray[np.int64]  # the policy's own array; none where not ``scoring``

    asks: NDArray[np.int64]  # [n_layers] whether a layer's next step is to have predictions

    # Of each area: [n_domains + 1].
    n_held: NDArray[np.int64]
    n_free: NDArray[np.int64]
    # [areas, most] its keys: staging's oldest first, a domain's ascend unless ``scoring``
    held: NDArray[np.int64]
    # [areas, most] scores of ``held`` that may go, else STAYS; none where not ``scoring``
    standing: NDArray[np.int64]
    free: NDArray[np.int64]  # [areas, most] a stack of unused slots

    limit: NDArray[np.int64]  # [n_domains] slots each is to have

    # Of each queue: [2].
    first: NDArray[np.int64]  # its first key, -1 when empty
    last: NDArray[np.int64]

    # Of the whole: [1].
    step: NDArray[np.int64]  # number of the step in progress
    n_demand: NDArray[np.int64]  # keys of the step in progress; 0 between steps
    backlog: NDArray[np.int64]  # copies queued or under way
    evicted: NDArray[np.int64]  # the key whose slot the copy started last took over, -1
    excess: NDArray[np.int64]  # slots that domains have beyond limits, until what is there can go
    n_spare: NDArray[np.int64]
    n_events: NDArray[np.int64]

    spare: NDArray[np.int64]  # a stack of the slots that belong to no area now
    counters: NDArray[np.int64]  # [len(Kind)] decisions since the start
    mass: NDArray[np.float64]  # [MASS_ENTRIES]; none where the policy neither routes nor chooses
    events: NDArray[np.int32]  # [capacity, 4] kind, step, key, other; capacity 0: not kept

    # Of the step in progress: [n_keys], in their first entries.
    candidates: NDArray[np.int32]  # as shown to the policy
    wanted: NDArray[np.int32]  # its keys in router order
    guessed: NDArray[np.int32]  # what the policy would prefetch
    substitutes: NDArray[np.int32]  # by rank: the expert computed in place of the step's; -1: none


def new_cache(
    context: Context,
    policy: Policy,
    *,
    name: str | None = None,
    n_events: int = 0,
    max_slots: int | None = None,
) -> Cache:
    """An empty cache for ``policy``; with ``max_slots`` (a layer) one that can be resized up to it.

    Raises PolicyError, with the policy's ``name``, when there are fewer slots or buffers than the
    machine can work with, or for shares of the slots that there cannot be.
    """
    limit = domain_slots(policy, context, name or type(policy).__name__)
    n_domains, n_cached = len(limit), int(limit.sum())
    most, widest = n_cached, int(limit.max())
    if max_slots is not None:
        most = max(n_cached, slots_in_all(context._replace(slots=max_slots)))
        widest = most // n_domains if sharing_class(policy) is None else context.n_experts
        widest = most if n_domains == 1 else widest
    buffers = policy.staging
    if buffers < 1:
        raise PolicyUsageError(
            f"policy '{name or type(policy).__name__}': staging must be 1 or more, not {buffers}: "
            "an expert without a slot is used from a staging buffer"
        )
    n_keys = context.n_layers * context.n_experts
    if buffers > max(n_keys, BUFFERS):
        raise PolicyUsageError(
            f"policy '{name or type(policy).__name__}': staging is {buffers}, and the model has "
            f"{n_keys} experts"
        )
    layers = np.repeat(np.arange(context.n_layers), context.n_experts)
    areas = n_domains + 1
    held = np.full((areas, max(widest, buffers)), -1, np.int64)
    n_free = np.append(limit, buffers)
    # Stacks hand out the lowest slot first.
    free = np.full_like(held, -1)
    ends = np.cumsum(n_free)
    for area in range(areas):
        free[area, : n_free[area]] = np.arange(ends[area] - n_free[area], ends[area])[::-1]
    n_spare = most - n_cached
    spare = np.empty(most * (max_slots is not None), np.int64)
    spare[:n_spare] = n_cached + buffers + np.arange(n_spare)[::-1]
    routing, choosing = overrides(policy, "route"), overrides(policy, "on_miss")
    retaining = overrides(policy, "retain")
    scores = None if choosing or retaining else scores_of(policy, n_keys)
    return Cache(
        n_experts=context.n_experts,
        slots=most,
        staging_buffers=buffers,
        staging=n_domains,
        stage_prefetches=policy.stage_prefetches,
        fills_slots=policy.fills_slots,
        prefetching=overrides(policy, "prefetch"),
        declining=overrides(policy, "wants_predictions"),
        retaining=retaining,
        routing=routing,
        choosing=choosing,
        lossy=choosing and type(policy).lossy,
        computing=choosing and "cpu" in policy.requires,
        lowering=choosing and "low" in policy.requires,
        resizable=max_slots is not None,
        scoring=scores is not None,
        layer=layers,
        domain=layers.copy() if context.scope == "layer" else _filled(n_keys, 0),
        status=_filled(n_keys, ABSENT),
        pinned=_filled(n_keys, 0),
        staged=_filled(n_keys, 0),
        unused=_filled(n_keys, 0),
        transient=_filled(n_keys, 0),
        consumed=_filled(n_keys, 0),
        place=_filled(n_keys, -1),
        queue=_filled(n_keys, DEMAND),
        next=_filled(n_keys, -1),
        previous=_filled(n_keys, -1),
        stamp=_filled(n_keys, 0),
        is_low=_filled(n_keys, 0),
        at=_filled(n_keys, 0),
        scores=_filled(0, 0) if scores is None else scores,
        asks=_filled(context.n_layers, 1),
        n_held=_filled(areas, 0),
        n_free=n_free,
        held=held,
        standing=np.full((areas, 0 if scores is None else held.shape[1]), STAYS),
        free=free,
        limit=limit,
        first=_filled(2, -1),
        last=_filled(2, -1),
        step=_filled(1, 0),
        n_demand=_filled(1, 0),
        backlog=_filled(1, 0),
        evicted=_filled(1, 0),
        excess=_filled(1, 0),
        n_spare=_filled(1, n_spare),
        n_events=_filled(1, 0),
        spare=spare,
        counters=_filled(len(Kind), 0),
        mass=np.zeros(MASS_ENTRIES * (routing or choosing)),
        events=np.zeros((n_events, 4), np.int32),
        candidates=np.zeros(n_keys, np.int32),
        wanted=np.zeros(n_keys, np.int32),
        guessed=np.zeros(n_keys, np.int32),
        substitutes=np.full(n_keys, -1, np.int32),
    )


def _filled(n: int, value: int) -> NDArray[np.int64]:
    return np.full(n, value, np.int64)


def arrays_of(cache: Cache) -> dict[str, NDArray[Any]]:
    """The cache's arrays by name: all that a decision can change."""
    fields = cache._asdict()
    return {name: value for name, value in fields.items() if isinstance(value, np.ndarray)}


def check(cache: Cache) -> None:
    """Recompute every invariant from the arrays; AssertionError names the one that broke."""
    on_device = cache.status >= LOADING
    assert np.array_equal(on_device, cache.place >= 0), "a key on the device without a slot"
    used = _check_domains(cache)
    used += cache.spare[: cache.n_spare[0]].tolist()
    n_staged, n_free = cache.n_held[cache.staging], cache.n_free[cache.staging]
    staged = cache.held[cache.staging, :n_staged]
    assert n_staged + n_free == cache.staging_buffers, "buffers lost or gained"
    assert np.all(cache.staged[staged] == 1), "a key in staging is not marked so"
    used += [*cache.place[staged], *cache.free[cache.staging, :n_free]]
    assert on_device.sum() == cache.n_held.sum(), "a key on the device is nowhere"
    assert sorted(used) == list(range(len(used))), "a slot used twice or not at all"
    _check_queues(cache)
    _check_pins(cache)
    low = np.flatnonzero(cache.is_low)
    assert cache.lowering or not len(low), "a low copy that nobody asked for"
    assert np.all(cache.status[low] != ABSENT), "a low copy of a key that is not there"


def _check_domains(cache: Cache) -> list[int]:
    """What holds of each domain; returns the slots that they have."""
    used: list[int] = []
    excess = short = 0
    for domain in range(cache.staging):
        n_held, n_free = cache.n_held[domain], cache.n_free[domain]
        held = cache.held[domain, :n_held]
        beyond = n_held + n_free - cache.limit[domain]
        short += max(-beyond, 0)
        if beyond > 0:
            excess += beyond
            assert not n_free, "a slot beyond the limit is kept free"
            waits = (cache.status[held] == LOADING) | (cache.pinned[held] == 1)
            assert np.all(waits), "an expert beyond the limit stays that could go"
        if cache.scoring:
            _check_standing(cache, domain, held)
        else:
            assert np.all(np.diff(held) > 0), "residents out of order"
        assert not np.any(cache.staged[held]), "a staged key holds a cache slot"
        assert np.all(cache.domain[held] == domain), "a key in a foreign domain"
        used += [*cache.place[held], *cache.free[domain, :n_free]]
    # What a domain lacks others have not given up yet.
    assert short <= excess, "slots lost"
    assert excess == cache.excess[0], "the slots beyond the limit are miscounted"
    assert cache.resizable or not excess, "slots gained"
    return used


def _check_standing(cache: Cache, domain: int, held: NDArray[np.int64]) -> None:
    assert np.array_equal(cache.at[held], np.arange(len(held))), "a key is not where it is held"
    goes = (cache.status[held] == RESIDENT) & (cache.pinned[held] == 0)
    standing = np.where(goes, cache.scores[held], STAYS)
    assert np.array_equal(cache.standing[domain, : len(held)], standing), (
        "a score is not what the policy has, which may have changed that of another key"
    )


def _check_pins(cache: Cache) -> None:
    """What the step computes with is pinned: its demand, less what the policy let go of, and the
    experts that stand in for some of that."""
    n = cache.n_demand[0]
    wanted, substitutes = cache.wanted[:n], cache.substitutes[:n]
    pinned = set(np.flatnonzero(cache.pinned).tolist())
    used = set(substitutes[substitutes >= 0].tolist())
    assert used <= pinned <= used | set(wanted.tolist()), "pins are not the step's"
    assert np.all(cache.status[list(used)] == RESIDENT), "a substitute is not there"
    if not cache.choosing:
        assert pinned == set(wanted.tolist()), "a key of the step is not pinned"


def _check_queues(cache: Cache) -> None:
    queued = 0
    for queue in (DEMAND, PREFETCH):
        key, previous = cache.first[queue], -1
        while key >= 0:
            assert cache.status[key] == QUEUED, "a queue holds a key that is not queued"
            assert cache.queue[key] == queue, "a queue holds another queue's key"
            assert cache.previous[key] == previous, "a queue's links disagree"
            previous, key, queued = key, cache.next[key], queued + 1
        assert cache.last[queue] == previous, "a queue's end is not its last key"
    under_way = np.count_nonzero(cache.status == LOADING)
    assert cache.backlog[0] == queued + under_way, "the backlog is miscounted"
    assert queued == np.count_nonzero(cache.status == QUEUED), "a queued key is lost"
