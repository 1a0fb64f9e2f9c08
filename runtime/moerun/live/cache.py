"""A live cache: the state machine and the link that fills its slots, under one lock.

The generating thread begins and ends steps; the link's threads report arrivals and start the next
copy themselves, so that the link never waits for the generating thread.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from moepolicy import ExpertCache, Kind, PolicyFailed, Step, TokenRows
from moepolicy.cache import Transfer

from moerun.errors import RunError, as_error
from moerun.kernels.slots import computes_whole
from moerun.links import Link, Variant, in_form
from moerun.live.step import Opened, opened


@dataclass
class StepCounts:
    """Counters that the cache itself does not have (see `Totals`)."""

    steps: int = 0
    stall_s: float = 0.0
    decide_s: float = 0.0


class LiveCache:
    """Keeps a link busy with what its cache wants copied, and tells what has arrived.

    An error in a link's thread or in the policy is kept, and raised from the next ``begin`` or
    ``await_arrival``; nothing is copied after one until the cache is renewed.
    """

    def __init__(self, cache: ExpertCache, link: Link, *, has_low: bool) -> None:
        """``link`` has not been started. ``has_low``: its slots take a lower precision, too."""
        self.lock = threading.RLock()
        """Held for every call of the cache."""
        self.copy_ended = threading.Condition(self.lock)
        self.cache = cache
        self.link = link
        self.counts = StepCounts()
        self._has_low = has_low
        # Experts of two precisions are of two forms.
        slots = () if has_low else link.slots[:1]
        self._together = any(computes_whole(slot) for slot in slots)
        self._memory = SlotMemory(link, cache.n_slots)
        self._streams = Streams(link)
        self._awaited: set[int] = set()
        self._arrived: deque[int] = deque()
        self._failure: Exception | None = None

    def start(self) -> None:
        """Start the link's threads."""
        self.link.start(self._on_copied)

    @property
    def computes_together(self) -> bool:
        """Whether several experts may be computed in one call."""
        return self._together

    def begin(self, step: Step, rows: TokenRows | None = None) -> Opened:
        """Open a step: what each of its experts is, with the copies of those absent begun.

        A policy that routes rewrites ``rows``."""
        with self.lock:
            self.raise_failure()
            cache, counts = self.cache, self.counts
            began_s = time.perf_counter()
            outcome = cache.begin(step, rows).tolist()
            counts.decide_s += time.perf_counter() - began_s
            if cache.step is not None:
                step = cache.step  # with the demand that the policy's routing came to
            if self._memory.shrinking:
                self._memory.fit(cache)
            counts.steps = step.number + 1
            step_keys = opened(cache, step.experts.tolist(), outcome)
            self._awaited = set(step_keys.absent)
            if self._streams.guesses:
                for key in self._awaited & self._streams.guesses:
                    self.link.want(key)
            self._pump()
        return step_keys

    def acquire(self, key: int, slot: int) -> Any:
        """The weights of ``key``, in ``slot``, for the compute issued from now on."""
        link = self.link
        link.acquire(slot)
        is_low = self._has_low and self.cache.is_low(key)
        return in_form(link.slots[slot], Variant.LOW if is_low else Variant.FULL)

    def release(self, key: int, slot: int) -> None:
        """The step's compute with ``key``, in ``slot``, has been issued."""
        self.link.release(slot)
        with self.lock:
            self.cache.consume(key)
            if self.cache.queued() is not None:
                self._pump()

    def release_all(self, keys: Sequence[int]) -> None:
        """The same of several, one after the other."""
        cache, release = self.cache, self.link.release
        with self.lock:
            for key in keys:
                release(cache.slot_of(key))
                cache.consume(key)
                if cache.queued() is not None:
                    self._pump()

    def await_arrival(self) -> int:
        """The next of the step's absent experts to arrive. Waiting for it counts as a stall."""
        with self.lock:
            if not self._arrived and not self._failure:
                began_s = time.perf_counter()
                while not self._arrived and not self._failure:
                    if not self._streams.under_way:
                        raise RunError("an expert is waited for that nothing is copying")
                    self.copy_ended.wait()
                self.counts.stall_s += time.perf_counter() - began_s
            self.raise_failure()
            return self._arrived.popleft()

    def end(self) -> None:
        """All of the step's experts have been computed, or their compute has been issued."""
        with self.lock:
            if isinstance(self._failure, PolicyFailed):
                raise self._failure  # what it left behind may not be fit to go on with
            began_s = time.perf_counter()
            self.cache.end()
            self.counts.decide_s += time.perf_counter() - began_s
            if self._memory.shrinking:
                self._memory.fit(self.cache)
            self._pump()

    def fail(self, error: Exception) -> None:
        """Serve no more, for ``error`` or an earlier one."""
        with self.lock:
            self._failure = self._failure or error

    def raise_failure(self) -> None:
        """Raise what keeps it from serving, if anything does."""
        if self._failure:
            raise self._failure

    def resize(self, slots: int, *, before: int) -> None:
        """Have ``slots`` slots a layer instead of ``before``, in use or not (see
        `Session.resize`)."""
        with self.lock:
            self.cache.resize(slots)
            try:
                self._memory.fit(self.cache)
            except RunError:
                self.cache.resize(before)
                self._memory.fit(self.cache)
                raise
            self._pump()

    def settle(self) -> None:
        """Wait until no copy is under way."""
        with self.lock:
            while self._streams.under_way:
                self.copy_ended.wait()

    def renew(self, cache: ExpertCache) -> None:
        """Start over with ``cache``, as `replace` goes on with it."""
        self.replace(cache)
        self.counts = StepCounts()

    def replace(self, cache: ExpertCache) -> None:
        """Go on with ``cache``, which is empty, and without what has failed. The lock is held and
        no copy is under way."""
        self.cache = cache
        self._memory.fit(cache)
        self._awaited.clear()
        self._arrived.clear()
        self._failure = None

    def _pump(self, begin_s: float | None = None) -> None:
        """Start copies while the link has a stream free: at ``begin_s`` (None: now). The lock is
        held."""
        while (
            not self._failure
            and (kind := self.cache.queued()) is not None
            and self._streams.free(kind)
        ):
            started_s = time.perf_counter()
            copy = self.cache.start()
            self.counts.decide_s += time.perf_counter() - started_s
            if copy is None:  # a demand waits for a staging buffer
                return
            self._streams.take(copy)
            self.link.submit(
                copy.key,
                copy.slot,
                Variant.LOW if copy.low else Variant.FULL,
                demand=not copy.speculative,
                begin_s=begin_s,
            )

    def _on_copied(self, key: int, error: Exception | None, ended_s: float) -> None:
        """A copy ended; called by the link's threads. What it made room for follows at once."""
        with self.lock:
            self._streams.give_back(key)
            try:
                if error is not None:
                    raise error
                if self._failure is None:
                    self._arrive(key, ended_s)
            except BaseException as failure:  # SystemExit would end the thread, and all wait for it
                self._failure = self._failure or as_error(failure)
            self.copy_ended.notify_all()

    def _arrive(self, key: int, ended_s: float) -> None:
        began_s = time.perf_counter()
        self.cache.finish(key)
        self.counts.decide_s += time.perf_counter() - began_s
        if self._memory.shrinking:
            self._memory.fit(self.cache)
        if key in self._awaited:
            self._awaited.discard(key)
            self._arrived.append(key)
        self._pump(ended_s)


class Streams:
    """How many copies are under way. Where records travel in pieces, prefetches have as many
    streams of their own as demand."""

    def __init__(self, link: Link) -> None:
        self.under_way = 0
        self.guesses: set[int] = set()
        """Keys of the prefetches under way that have streams of their own."""
        self._n = link.streams
        self._chunked = link.chunked

    def free(self, kind: Kind) -> bool:
        """Whether a copy of ``kind``, LOAD or SPECULATE, may start."""
        if not self._chunked:
            return self.under_way < self._n
        guesses = len(self.guesses)
        return (guesses if kind is Kind.SPECULATE else self.under_way - guesses) < self._n

    def take(self, copy: Transfer) -> None:
        """``copy`` starts."""
        self.under_way += 1
        if self._chunked and copy.speculative:
            self.guesses.add(copy.key)

    def give_back(self, key: int) -> None:
        """The copy of ``key`` has ended."""
        self.under_way -= 1
        self.guesses.discard(key)


class SlotMemory:
    """Device memory of a link's slots: those have it that the cache has, and no others."""

    def __init__(self, link: Link, n_slots: int) -> None:
        """The slots have their memory."""
        self.shrinking = False
        """Whether slots are to go as soon as they can."""
        self._link = link
        self._held = frozenset(range(n_slots))

    def fit(self, cache: ExpertCache) -> None:
        """Give memory to the slots that ``cache`` has and take it from the others. RunError where
        there is none left to give; what was to go has gone then."""
        spare = cache.spare_slots()
        wanted = frozenset(range(cache.n_slots + len(spare))) - spare
        withdrawn, granted = self._held - wanted, wanted - self._held
        self._held &= wanted
        if withdrawn or granted:
            self._link.resize(sorted(withdrawn), sorted(granted))
        self._held = wanted
        self.shrinking = cache.shrinking
