"""The arrays the state machine works on, and the invariants that must hold between its calls."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from moepolicy.kinds import Kind
from moepolicy.policy import Context, Policy, PolicyUsageError, overrides

# Columns of Cache.keys: one row a key, so that a decision touches one cache line.
STATUS = 0  # ABSENT, QUEUED, LOADING, RESIDENT
PINNED = 1  # wanted by the step in progress
STAGED = 2  # sits in (or travels to) a staging buffer, not a cache slot
UNUSED = 3  # was fetched on a guess and not used since
TRANSIENT = 4  # leaves its staging buffer when it is done: bypassed, or disproved in flight
CONSUMED = 5  # the step's compute has finished with it
PLACE = 6  # the slot it occupies, -1 without one
QUEUE = 7  # DEMAND or PREFETCH while QUEUED
NEXT = 8  # neighbours in that queue, -1 at its ends
PREVIOUS = 9
STAMP = 10  # logical time of its use, while PINNED
IS_LOW = 11  # its copy, queued, under way or resident, is of the lower precision
KEY_COLUMNS = 12

ABSENT = 0
QUEUED = 1
LOADING = 2
RESIDENT = 3

DEMAND = 0
PREFETCH = 1

# A row of Cache.domains, and Cache.staging: two counts, the keys that hold a slot there
# (a domain's ascending, staging's oldest copy first), then the stack of unused slots.
N_HELD = 0
N_FREE = 1
HELD = 2

# Entries of Cache.board. The counters, by Kind, follow.
STEP = 0  # number of the step in progress
N_DEMAND = 1  # keys of the step in progress; 0 between steps
N_EVENTS = 2
NOTHING = -1
FIRST = 3  # first key of each queue, -1 when empty
LAST = 5  # and the last
BACKLOG = 7  # copies queued or under way
EVICTED = 8  # the key whose slot the copy started last took over, -1
LIMIT = 9  # slots a domain is to have
EXCESS = 10  # slots that domains have beyond it, until what lies in them can go
COUNTERS = 11

# Rows of Cache.scratch.
CANDIDATES = 0  # as shown to the policy
WANTED = 1  # the step's keys in router order
GUESSED = 2  # what the policy would prefetch
STAND_INS = 3  # by rank: the expert that is computed in place of the step's; -1: none
SCRATCH_ROWS = 4

# Entries of Cache.mass: gate weight since the start.
ALL_MASS = 0  # of everything demanded
SKIPPED_MASS = 1
SUBSTITUTED_MASS = 2
LOW_MASS = 3  # computed from a copy of the lower precision
MASS_ENTRIES = 4


class Cache(NamedTuple):
    """Everything the state machine knows. Slots are numbered over cache and staging together.

    A slot belongs to a domain (a layer, or the one shared cache) or to staging; a promotion
    exchanges two slots' roles instead of moving bytes. A cache that can be resized has room for
    the most slots it may get; those it has not are spare. Few arrays, because compiled code
    passes each of them from function to function.
    """

    n_experts: int
    slots: int  # of each domain, at most
    staging_buffers: int
    per_layer: bool
    stage_prefetches: bool
    prefetching: bool
    retaining: bool
    choosing: bool  # the policy has a say in what happens on a miss
    computing: bool  # and may answer COMPUTE
    lowering: bool  # and may answer LOW
    resizable: bool
    keys: NDArray[np.int64]  # [n_keys, KEY_COLUMNS]
    domains: NDArray[np.int64]  # [n_domains, HELD + 2 * slots]
    staging: NDArray[np.int64]  # [HELD + 2 * staging_buffers]
    spare: NDArray[np.int64]  # [1 + n] how many slots belong to no domain now, then their stack
    board: NDArray[np.int64]  # [COUNTERS + len(Kind)]
    mass: NDArray[np.float64]  # [MASS_ENTRIES]; none where the policy does not choose
    scratch: NDArray[np.int32]  # [SCRATCH_ROWS, n_keys]
    events: NDArray[np.int32]  # [capacity, 4] kind, step, key, other; capacity 0: not kept


def new_cache(
    context: Context, policy: Policy, *, n_events: int = 0, max_slots: int | None = None
) -> Cache:
    """An empty cache for ``policy``; with ``max_slots`` (a layer) one that can be resized up to it.

    Raises PolicyError when there are fewer slots or buffers than the machine can work with.
    """
    n_domains, slots = _domains(context)
    most = slots
    if max_slots is not None:
        most = max(slots, _domains(context._replace(slots=max_slots))[1])
    buffers = policy.staging
    if buffers < 1:
        raise PolicyUsageError(
            f"staging must be 1 or more, not {buffers}: an expert without a slot is used "
            "from a staging buffer"
        )
    keys = np.zeros((context.n_layers * context.n_experts, KEY_COLUMNS), np.int64)
    keys[:, [PLACE, NEXT, PREVIOUS]] = -1
    domains = np.full((n_domains, HELD + 2 * most), -1, np.int64)
    domains[:, N_HELD] = 0
    domains[:, N_FREE] = slots
    n_cached = n_domains * slots
    # Stacks hand out the lowest slot first.
    domains[:, HELD + most : HELD + most + slots] = np.arange(n_cached).reshape(n_domains, slots)[
        :, ::-1
    ]
    staging = np.full(HELD + 2 * buffers, -1, np.int64)
    staging[:HELD] = 0, buffers
    staging[HELD + buffers :] = np.arange(n_cached, n_cached + buffers)[::-1]
    n_spare = n_domains * (most - slots)
    spare = np.empty(1 + n_domains * most * (max_slots is not None), np.int64)
    spare[0] = n_spare
    spare[1 : 1 + n_spare] = n_cached + buffers + np.arange(n_spare)[::-1]
    board = np.zeros(COUNTERS + len(Kind), np.int64)
    board[FIRST:BACKLOG] = -1
    board[LIMIT] = slots
    choosing = overrides(policy, "on_miss")
    scratch = np.zeros((SCRATCH_ROWS, len(keys)), np.int32)
    scratch[STAND_INS] = -1
    return Cache(
        n_experts=context.n_experts,
        slots=most,
        staging_buffers=buffers,
        per_layer=context.scope == "layer",
        stage_prefetches=policy.stage_prefetches,
        prefetching=overrides(policy, "prefetch"),
        retaining=overrides(policy, "retain"),
        choosing=choosing,
        computing=choosing and "cpu" in policy.requires,
        lowering=choosing and "low" in policy.requires,
        resizable=max_slots is not None,
        keys=keys,
        domains=domains,
        staging=staging,
        spare=spare,
        board=board,
        mass=np.zeros(MASS_ENTRIES * choosing),
        scratch=scratch,
        events=np.zeros((n_events, 4), np.int32),
    )


def _domains(context: Context) -> tuple[int, int]:
    """How many caches share the experts out, and the slots of each."""
    if context.slots < 0:
        raise PolicyUsageError(f"slots must be 0 or more, not {context.slots}")
    # More slots than keys would never be filled.
    slots = min(context.slots, context.n_experts)
    if context.scope == "layer":
        return context.n_layers, slots
    if context.scope == "global":
        return 1, slots * context.n_layers
    raise PolicyUsageError(f"unknown scope '{context.scope}': it is 'layer' or 'global'")


def check(cache: Cache) -> None:
    """Recompute every invariant from the arrays; AssertionError names the one that broke."""
    keys = cache.keys
    on_device = keys[:, STATUS] >= LOADING
    assert np.array_equal(on_device, keys[:, PLACE] >= 0), "a key on the device without a slot"
    used: list[int] = []
    n_held = excess = 0
    for domain, row in enumerate(cache.domains):
        held = row[HELD : HELD + row[N_HELD]]
        beyond = row[N_HELD] + row[N_FREE] - cache.board[LIMIT]
        assert beyond >= 0, "slots lost"
        if beyond:
            excess += beyond
            assert not row[N_FREE], "a slot beyond the limit is kept free"
            waits = (keys[held, STATUS] == LOADING) | (keys[held, PINNED] == 1)
            assert np.all(waits), "an expert beyond the limit stays that could go"
        assert np.all(np.diff(held) > 0), "residents out of order"
        assert not np.any(keys[held, STAGED]), "a staged key holds a cache slot"
        if cache.per_layer:
            assert np.all(held // cache.n_experts == domain), "a key in a foreign domain"
        free = row[HELD + cache.slots :][: row[N_FREE]]
        used += [*keys[held, PLACE], *free]
        n_held += len(held)
    assert excess == cache.board[EXCESS], "the slots beyond the limit are miscounted"
    assert cache.resizable or not excess, "slots gained"
    used += cache.spare[1 : 1 + cache.spare[0]].tolist()
    buffers = cache.staging
    staged = buffers[HELD : HELD + buffers[N_HELD]]
    assert buffers[N_HELD] + buffers[N_FREE] == cache.staging_buffers, "buffers lost or gained"
    assert np.all(keys[staged, STAGED] == 1), "a key in staging is not marked so"
    used += [*keys[staged, PLACE], *buffers[HELD + cache.staging_buffers :][: buffers[N_FREE]]]
    assert on_device.sum() == n_held + len(staged), "a key on the device is nowhere"
    assert sorted(used) == list(range(len(used))), "a slot used twice or not at all"
    _check_queues(cache)
    _check_pins(cache)
    low = np.flatnonzero(keys[:, IS_LOW])
    assert cache.lowering or not len(low), "a low copy that nobody asked for"
    assert np.all(keys[low, STATUS] != ABSENT), "a low copy of a key that is not there"


def _check_pins(cache: Cache) -> None:
    """What the step computes with is pinned: its demand, less what the policy let go of, and the
    experts that stand in for some of that."""
    n = cache.board[N_DEMAND]
    wanted, stand_ins = cache.scratch[WANTED, :n], cache.scratch[STAND_INS, :n]
    pinned = set(np.flatnonzero(cache.keys[:, PINNED]).tolist())
    used = set(stand_ins[stand_ins >= 0].tolist())
    assert used <= pinned <= used | set(wanted.tolist()), "pins are not the step's"
    assert np.all(cache.keys[list(used), STATUS] == RESIDENT), "a stand-in is not there"
    if not cache.choosing:
        assert pinned == set(wanted.tolist()), "a key of the step is not pinned"


def _check_queues(cache: Cache) -> None:
    queued = 0
    for queue in (DEMAND, PREFETCH):
        key, previous = cache.board[FIRST + queue], -1
        while key >= 0:
            row = cache.keys[key]
            assert row[STATUS] == QUEUED, "a queue holds a key that is not queued"
            assert row[QUEUE] == queue, "a queue holds another queue's key"
            assert row[PREVIOUS] == previous, "a queue's links disagree"
            previous, key, queued = key, row[NEXT], queued + 1
        assert cache.board[LAST + queue] == previous, "a queue's end is not its last key"
    under_way = np.count_nonzero(cache.keys[:, STATUS] == LOADING)
    assert cache.board[BACKLOG] == queued + under_way, "the backlog is miscounted"
    assert queued == np.count_nonzero(cache.keys[:, STATUS] == QUEUED), "a queued key is lost"
