"""Prefetching that knows the trace's future: the least time."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from moepolicy.library.clairvoyant.belady import BeladyBypass
from moepolicy.library.clairvoyant.future import first_use
from moepolicy.policy import NO_USE, Context, PolicyError, PolicyUsageError
from moepolicy.steps import Step

UNKNOWN = -2  # a domain's soonest missing key has to be looked for again


class Clairvoyant(BeladyBypass):
    """Fetch ahead, knowing the future: always what is missing soonest, for what is needed latest.

    Cao et al.'s "aggressive" (1995): a copy starts whenever the link is free and some resident
    is needed later than what it brings. With ``delay`` d their "delay(d)": the victim is who
    would be needed latest d steps on, and a copy waits until that one's uses before are over. A
    demanded expert is kept as Belady with bypass keeps it.

    In a cache of one layer most victims would have stayed, and have to be loaded again. Such a
    copy is made only when there is no other to make, and if its victim is next used ``margin``
    tokens or more after what it brings. 0 makes no difference between copies: plain aggressive,
    as in a cache shared by all layers, where some victim is always needed late.
    """

    stage_prefetches = False

    def __init__(self, context: Context, delay: int = 0, margin: int = 4) -> None:
        super().__init__(context)
        if context.demands is None:
            raise PolicyError("policy 'clairvoyant' needs a trace's demands in its context")
        if delay < 0 or margin < 0:
            raise PolicyUsageError(
                f"clairvoyant: delay and margin must be 0 or more, not {delay} and {margin}"
            )
        shared = context.scope == "global"
        self.delay = delay
        self.margin = 0 if shared else margin * context.n_layers  # steps
        self.demands = context.demands
        n_keys, n_domains = context.n_keys, 1 if shared else context.n_layers
        self.width = n_keys // n_domains  # keys of a domain
        self.slots = min(context.slots, context.n_experts) * context.n_layers // n_domains
        self.due = first_use(self.demands, self.offsets, n_keys)
        self.wanted_at = np.full(n_keys, -1, np.int64)
        self.dear = np.zeros(n_keys, np.bool_)  # named although it costs a load
        self.n_held = np.zeros(n_domains, np.int64)
        self.started = np.zeros(1, np.int64)  # prefetches since they were last asked for
        self.soonest = np.full(n_domains, UNKNOWN, np.int64)  # a domain's missing key due first
        self.offer = np.zeros(n_domains, np.int64)  # its next one to name, -1: none
        self.offered = np.zeros(n_domains, np.int64)  # how many were named

    def on_step(self, step: Step) -> None:
        """Learn when the step's experts are used next, and which of them were due first."""
        self.foresee(step)
        for rank in range(len(step.experts)):
            key = step.experts[rank]
            self.wanted_at[key] = step.number
            if self.soonest[key // self.width] == key:
                self.soonest[key // self.width] = UNKNOWN

    def on_load(self, key: int, speculative: bool, now: int) -> None:
        """Count the key as held, and a prefetch as started."""
        domain = key // self.width
        self.held[key] = True
        self.n_held[domain] += 1
        if speculative:
            self.started[0] += 1
        if self.soonest[domain] == key:
            self.soonest[domain] = UNKNOWN

    def on_evict(self, key: int) -> None:
        """Count the key as gone, and look anew for the missing key that is due first."""
        domain = key // self.width
        self.held[key] = False
        self.n_held[domain] -= 1
        self.soonest[domain] = UNKNOWN

    def victim(self, layer: int, incoming: int, candidates: NDArray[np.int32]) -> int:
        """For a demand the victim of Belady with bypass; for a prefetch the candidate needed
        latest, or -1."""
        if self.wanted_at[incoming] == self.now[0]:
            return self.displaced(incoming, candidates)
        due = self.due[incoming]
        horizon = min(self.now[0] + 1 + self.delay, due)
        best, latest = -1, -1
        for i in range(len(candidates)):
            use = use_from(
                self.due, self.offsets, self.demands, self.next_use, candidates[i], horizon
            )
            if use > latest:
                best, latest = int(candidates[i]), use
        if self.due[best] <= due:
            return -1
        return best if self.dear[incoming] or self.cheap(best, incoming) else -1

    def cheap(self, victim: int, incoming: int) -> bool:
        """Whether ``victim`` would have left by the step that uses ``incoming`` anyway, as
        Belady with bypass has it: as many as fit are then needed before it."""
        last = self.due[victim]
        if self.margin == 0 or last == NO_USE:
            return True
        step = self.due[incoming]
        first = incoming // self.width * self.width
        before = 0
        for other in range(first, first + self.width):
            if other != victim and (self.held[other] or self.due[other] == step):
                use = use_from(self.due, self.offsets, self.demands, self.next_use, other, step + 1)
                before += use < last
        return before >= self.slots

    def prefetch(self, step: Step, keys: NDArray[np.int32]) -> int:
        """Name the missing keys that are due first: cheap ones, or one that costs a load."""
        # As many as the link will take before it is asked again, if it goes on like this.
        room = min(self.started[0] + 2, len(keys))
        self.started[0] = 0
        n = self.name(keys, room, False)
        if n == 0 and self.margin > 0:
            n = self.name(keys, 1, True)
        return n

    def name(self, keys: NDArray[np.int32], room: int, dear: bool) -> int:
        """Write up to ``room`` missing keys, soonest first; ``dear``: that cost a load."""
        for domain in range(len(self.soonest)):
            self.offered[domain] = 0
            if self.soonest[domain] == UNKNOWN:
                self.soonest[domain] = self.missing_after(domain, -1)
            self.offer[domain] = self.soonest[domain]
        n = 0
        while n < room:
            domain = most_urgent(self.due, self.offer)
            if domain < 0:
                break
            key = self.offer[domain]
            if self.finds_room(domain, key, dear):
                keys[n] = key
                n += 1
                self.dear[key] = dear
                self.offered[domain] += 1
                self.offer[domain] = self.missing_after(domain, key)
            else:
                self.offer[domain] = -1
        return n

    def missing_after(self, domain: int, key: int) -> int:
        """The missing key of ``domain`` that is due next after ``key`` (-1: first); -1 if none."""
        first = domain * self.width
        return next_missing(
            self.due, self.held, self.wanted_at, self.now[0], first, first + self.width, key
        )

    def finds_room(self, domain: int, key: int, dear: bool) -> bool:
        """Whether ``key`` finds a slot after those already offered: a free one, or the slot of
        one due later that would go anyway or is worth a load."""
        room = self.slots - self.n_held[domain] - self.offered[domain]
        if room > 0:
            return True
        first = domain * self.width
        latest = latest_held(self.due, self.held, first, first + self.width, key, 1 - room)
        if latest < 0:
            return False
        if dear:
            return bool(self.due[latest] - self.due[key] >= self.margin)
        return self.cheap(latest, key)


def use_from(
    due: NDArray[np.int64],
    offsets: NDArray[np.int64],
    demands: NDArray[np.int32],
    next_use: NDArray[np.int64],
    key: int,
    step: int,
) -> int:
    """The first use of ``key`` at ``step`` or later."""
    use = due[key]
    while use < step:
        i = offsets[use]
        while demands[i] != key:
            i += 1
        use = next_use[i]
    return int(use)


def most_urgent(due: NDArray[np.int64], offer: NDArray[np.int64]) -> int:
    """The domain whose offer is due first; -1 where no domain has one."""
    best = -1
    for domain in range(len(offer)):
        if offer[domain] >= 0 and (best < 0 or due[offer[domain]] < due[offer[best]]):
            best = domain
    return best


def next_missing(
    due: NDArray[np.int64],
    held: NDArray[np.bool_],
    wanted_at: NDArray[np.int64],
    now: int,
    first: int,
    last: int,
    key: int,
) -> int:
    """Of the keys first..last-1 that are neither held nor wanted now, the one due next after
    ``key`` (-1: the first); -1 if there is none."""
    best = -1
    soonest = NO_USE
    for other in range(first, last):
        use = due[other]
        if use < soonest and not held[other] and wanted_at[other] != now:
            behind = key < 0 or use > due[key] or (use == due[key] and other > key)
            if behind:
                best = other
                soonest = use
    return best


def latest_held(
    due: NDArray[np.int64], held: NDArray[np.bool_], first: int, last: int, key: int, least: int
) -> int:
    """Of the keys first..last-1 that are held, the one due last, where at least ``least`` of
    them are due later than ``key``; else -1."""
    best = -1
    later = 0
    for other in range(first, last):
        if held[other] and due[other] > due[key]:
            later += 1
            if best < 0 or due[other] > due[best]:
                best = other
    return best if later >= least else -1
