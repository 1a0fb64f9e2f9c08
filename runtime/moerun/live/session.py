"""A live cache of experts: the state machine and a link under one lock, serving a model's layers.

The generating thread calls ``serve`` for each layer; the link's threads report arrivals and start
the next copy themselves, so that the link never waits for the generating thread.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable, Generator, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from moepolicy import (
    NO_LOGITS,
    NO_PREDICTIONS,
    Context,
    ExpertCache,
    Journal,
    Kind,
    PolicyError,
    PolicySpec,
    Step,
    demand_order,
    pool_logits,
)
from moepolicy.cache import Observer
from numpy.typing import NDArray

from moerun.errors import RunError
from moerun.links import Link, Variant, in_form
from moerun.live.totals import Totals, totals_of
from moerun.memory.compiling import CompileBeside, Compiling
from moerun.offload.cpu_experts import Aside
from moerun.offload.experts import Item, Served
from moerun.offload.gate import Gate, GateObserver, pool_rows, to_host


class Opened(NamedTuple):
    """What a step's experts are, keys in router order but for how many are on their way."""

    hits: list[int]
    stand_ins: list[tuple[int, int]]  # (wanted, who runs in its place)
    aside: list[int]
    skipped: list[int]
    absent: int


class Session:
    """Serves experts to a model out of ``n_slots`` device slots under one policy.

    The cache lives on from prompt to prompt until ``reset`` makes it cold again. An error in a
    link's thread or in the policy surfaces in the generating thread, from ``serve``; after one
    the session serves no more until it is reset.
    """

    def __init__(
        self,
        context: Context,
        policy: PolicySpec,
        make_link: Callable[[int], Link],
        *,
        record_bytes: int,
        low_record_bytes: int = 0,
        make_aside: Callable[[Link], Aside] | None = None,
        journal: Journal | None = None,
        observers: Sequence[Observer] = (),
        compiling: Compiling = Compiling.NEVER,
    ) -> None:
        """``make_link(n_slots)`` gives a link with so many slots, not yet started.

        ``make_aside(link)`` gives what computes experts beside the device, for policies that
        require "cpu"; the link has slots of a lower precision for those that require "low".
        ``compiling``: what to do to have the policy's compiled calls, used once there are some.
        """
        self.context = context
        self.policy = policy
        self.record_bytes = record_bytes
        self.low_record_bytes = low_record_bytes
        if "cpu" in policy.requires and make_aside is None:
            raise PolicyError(f"policy '{policy.label}' needs experts computed beside the device")
        self.gate_observers: list[GateObserver] = []
        self.before_steps: list[Callable[[], None]] = []
        """Called before each step, when nothing is half done; what one raises ends the pass."""
        self.cache = self._new_cache(journal, observers)
        self.link = make_link(self.cache.n_slots)
        self._in_memory = frozenset(range(self.cache.n_slots))
        self._shrinking = False  # slots are to go as soon as they can
        self.aside = make_aside(self.link) if make_aside else None
        self._mutex = threading.RLock()  # that of ``lock``, quicker to take
        self.lock = threading.Condition(self._mutex)  # held for every call of the cache
        self._wants_logits = "logits" in policy.requires
        self._horizon = policy.horizon
        self._under_way = 0
        self._guessed: set[int] = set()  # of those, prefetches with streams of their own
        self._awaited: set[int] = set()
        self._arrived: deque[int] = deque()
        self._failure: Exception | None = None
        self._steps = 0
        self._requests = 0
        self._stall_s = 0.0
        self._noted: dict[int, tuple[Any, Any]] = {}
        self._allowed = compiling
        self._compiled = Compiling.NEVER  # for the caches before a reset
        self._compiling = self._compile_beside()
        self.link.start(self._on_copied)

    def __enter__(self) -> Session:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @property
    def totals(self) -> Totals:
        with self.lock:
            return totals_of(
                self.cache,
                steps=self._steps,
                requests=self._requests,
                record_bytes=self.record_bytes,
                low_record_bytes=self.low_record_bytes,
                stall_s=self._stall_s,
            )

    def note(self, layer: int, logits: Any, predicted: Any = None) -> None:
        """The gate of ``layer`` has run: tensors for the ``serve`` of this layer that follows.

        logits [tokens, n_experts]; predicted float16[horizon, tokens, n_experts] or None.
        """
        self._noted[layer] = (logits, predicted)

    def serve(self, layer: int, top_k_index: torch.Tensor, top_k_weights: torch.Tensor) -> Served:
        """The experts a batch wants at ``layer``, each as soon as it may be computed.

        top_k_index, top_k_weights [tokens, top_k]. They come as (expert, the link's slot it lies
        in): hits first, in router order, then those that another expert stands in for, with that
        one's slot, then the others as they arrive. Before them all come those that nothing runs
        for, with None, and those computed beside the device, with an AsideExpert. Here and as
        they come RunError or PolicyError is raised where an expert cannot be had.
        """
        for call in self.before_steps:
            call()
        logits, predicted = self._noted.pop(layer, (None, None))
        if not (self._wants_logits or self.gate_observers):
            logits = None  # nobody looks at them: they need not travel
        gate = to_host(top_k_index, top_k_weights, logits, predicted)
        for observe in self.gate_observers:
            observe(layer, gate)
        return Served(gate.ids, self._served(layer, gate))

    def _served(self, layer: int, gate: Gate) -> Generator[Item]:
        first = layer * self.context.n_experts
        try:
            opened = self._begin(layer, gate)
            for key in opened.skipped:
                yield key - first, None
            for key in opened.aside:
                yield key - first, self._beside(key)
            for key in opened.hits:
                slot = self.cache.slot_of(key)  # pinned: it cannot move
                yield key - first, self._acquire(key, slot)
                self._release(key, slot)
            for key, stand_in in opened.stand_ins:
                slot = self.cache.slot_of(stand_in)
                yield key - first, self._acquire(stand_in, slot)
                self.link.release(slot)
            for _ in range(opened.absent):
                key = self._await_arrival()
                slot = self.cache.slot_of(key)
                yield key - first, self._acquire(key, slot)
                self._release(key, slot)
            if opened.aside:
                self._join()
        except BaseException:
            with self.lock:
                self._failure = self._failure or RunError("a step was left unfinished")
            raise
        with self._mutex:
            self.cache.end()
            if self._shrinking:
                self._fit_memory()
            self._pump()

    def resize(self, slots: int) -> None:
        """Have ``slots`` slots a layer from now on; any thread may say so at any time.

        What the step in progress uses stays until its end, and its memory with it. Raises
        PolicyError beyond a layer's experts, RunError where memory for more is not there; the
        cache is then as it was.
        """
        with self.lock:
            before = self.context.slots
            self.cache.resize(slots)
            try:
                self._fit_memory()
            except RunError:
                self.cache.resize(before)
                self._fit_memory()
                raise
            self.context = self.context._replace(slots=slots)
            self._pump()

    def reset(self, *, journal: Journal | None = None, observers: Sequence[Observer] = ()) -> None:
        """Start over with an empty cache and a fresh policy; waits for copies under way."""
        with self.lock:
            while self._under_way:
                self.lock.wait()
            if self.aside:
                self.aside.drop()
            self.cache = self._new_cache(journal, observers)
            self._fit_memory()
            self._compiled = self.compiled
            compiling, self._compiling = self._compiling, self._compile_beside()
            self._failure = None
            self._awaited.clear()
            self._arrived.clear()
            self._noted.clear()
            self._steps = self._requests = 0
            self._stall_s = 0.0
        if compiling:
            compiling.close()

    @property
    def compiled(self) -> Compiling:
        """What memory has been spent for, or is about to be, to have compiled calls."""
        begun = self._compiling.taken if self._compiling else Compiling.NEVER
        return max(begun, self._compiled, key=lambda each: each.rank)

    def allow_compiling(self, allowed: Compiling) -> Compiling:
        """Do no more for compiled calls than ``allowed`` from now on. Returns what has been done,
        which stays."""
        with self.lock:
            if self._compiling and self._compiling.give_up() is Compiling.NEVER:
                self._compiling = None
            done = self.compiled
            self._allowed = max(allowed, done, key=lambda each: each.rank)
            if self._compiling is None:
                self._compiling = self._compile_beside()
            return done

    def wait_compiled(self) -> None:
        """Wait until the policy's calls are compiled, where they can be and are to be."""
        if self._compiling:
            self._compiling.finish()

    def settle(self) -> None:
        """Wait until no copy is under way."""
        with self.lock:
            while self._under_way:
                self.lock.wait()

    def close(self) -> None:
        """End the link's threads; the totals stay readable."""
        with self.lock:
            self._failure = self._failure or RunError("the session is closed")
        if self.aside:  # it may read what the link holds
            self.aside.close()
        try:
            self.link.close()
        finally:
            if self._compiling:
                self._compiling.close()

    def _compile_beside(self) -> CompileBeside | None:
        if self._allowed is Compiling.NEVER:
            return None
        # Nobody can predict further ahead than there are layers.
        return CompileBeside(self.cache, self.lock, self.context.n_layers, self._allowed)

    def _new_cache(self, journal: Journal | None, observers: Sequence[Observer]) -> ExpertCache:
        policy = self.policy.build(self.context)
        return ExpertCache(
            self.context,
            policy,
            name=self.policy.label,
            observers=observers,
            journal=journal,
            max_slots=self.context.n_experts,
        )

    def _fit_memory(self) -> None:
        """Give memory to the slots the cache has, and no others. The lock is held."""
        spare = self.cache.spare_slots()
        wanted = frozenset(range(self.cache.n_slots + len(spare))) - spare
        withdrawn, granted = self._in_memory - wanted, wanted - self._in_memory
        self._in_memory &= wanted
        if withdrawn or granted:
            self.link.resize(sorted(withdrawn), sorted(granted))
        self._in_memory = wanted
        self._shrinking = self.cache.shrinking

    def _begin(self, layer: int, gate: Gate) -> Opened:
        """Open the step."""
        experts, weights = demand_order(gate.ids, gate.weights)
        keys = experts + layer * self.context.n_experts
        logits = gate.logits if self._wants_logits else None
        predicted = self._predicted(gate)
        with self._mutex:
            self._raise_failure()
            step = Step(
                number=self._steps,
                layer=layer,
                experts=keys,
                weights=weights,
                logits=NO_LOGITS if logits is None else pool_logits(logits),
                predicted=predicted,
                tokens=len(gate.ids),
            )
            outcome = self.cache.begin(step).tolist()
            if self._shrinking:
                self._fit_memory()
            self._steps += 1
            self._requests += len(outcome)
            opened = self._opened(keys.tolist(), outcome)
            for key in self._awaited & self._guessed:
                self.link.want(key)
            self._pump()
        return opened

    def _predicted(self, gate: Gate) -> NDArray[np.float32]:
        """Predictions as far ahead as the policy reads them, and no further. PolicyError where the
        gates were not asked that far."""
        if not self._horizon:
            return NO_PREDICTIONS
        found = 0 if gate.predicted is None else len(gate.predicted)
        if gate.predicted is None or found < self._horizon:
            raise PolicyError(
                f"policy '{self.policy.label}' reads predictions {self._horizon} layers ahead, and "
                f"is given them {found} ahead"
            )
        return pool_rows(gate.predicted[: self._horizon])

    def _opened(self, keys: list[int], outcome: list[int]) -> Opened:
        """Sort a step's keys by what they are, and note which are awaited. The lock is held."""
        if FETCHED.issuperset(outcome):  # nothing but hits and copies: nearly every step
            hits = []
            self._awaited = awaited = set()
            for key, kind in zip(keys, outcome, strict=True):
                if kind == HIT:
                    hits.append(key)
                else:
                    awaited.add(key)
            return Opened(hits, [], [], [], len(awaited))
        hits = [key for key, kind in zip(keys, outcome, strict=True) if kind == HIT]
        of: dict[int, list[int]] = {kind: [] for kind in OUTCOMES}
        for key, kind in zip(keys, outcome, strict=True):
            of[kind].append(key)
        ranks = [rank for rank, kind in enumerate(outcome) if kind == Kind.SUBSTITUTE]
        stand_ins = [self.cache.stand_in(rank) for rank in ranks]
        self._awaited = {*of[Kind.LATE], *of[Kind.MISS]}
        replaced = list(zip(of[Kind.SUBSTITUTE], stand_ins, strict=True))
        return Opened(hits, replaced, of[Kind.COMPUTE], of[Kind.SKIP], len(self._awaited))

    def _beside(self, key: int) -> Any:
        assert self.aside is not None  # or the session had refused the policy
        return self.aside.expert(key)

    def _acquire(self, key: int, slot: int) -> Any:
        self.link.acquire(slot)
        low = bool(self.low_record_bytes) and self.cache.is_low(key)
        return in_form(self.link.slots[slot], Variant(low))

    def _release(self, key: int, slot: int) -> None:
        self.link.release(slot)
        with self._mutex:
            self.cache.consume(key)
            self._pump()

    def _await_arrival(self) -> int:
        with self.lock:
            if not self._arrived and not self._failure:
                began_s = time.perf_counter()
                while not self._arrived and not self._failure:
                    if not self._under_way:
                        raise RunError("an expert is waited for that nothing is copying")
                    self.lock.wait()
                self._stall_s += time.perf_counter() - began_s
            self._raise_failure()
            return self._arrived.popleft()

    def _join(self) -> None:
        """Wait for what is computed beside the device."""
        assert self.aside is not None
        try:
            self._stall_s += self.aside.join()
        except Exception as error:
            with self.lock:
                self._failure = self._failure or error
            raise

    def _raise_failure(self) -> None:
        if self._failure:
            raise self._failure

    def _pump(self, begin_s: float | None = None) -> None:
        """Start copies while the link has a stream free: at ``begin_s`` (None: now). The lock is
        held."""
        while (
            not self._failure
            and (kind := self.cache.queued()) is not None
            and self._streams_taken(kind) < self.link.streams
        ):
            copy = self.cache.start()
            if copy is None:  # a demand waits for a staging buffer
                return
            self._under_way += 1
            if self.link.chunked and copy.speculative:
                self._guessed.add(copy.key)
            self.link.submit(
                copy.key,
                copy.slot,
                Variant(copy.low),
                demand=not copy.speculative,
                begin_s=begin_s,
            )

    def _streams_taken(self, kind: Kind) -> int:
        """Of the streams that take what is to be copied next."""
        if not self.link.chunked:
            return self._under_way
        guesses = len(self._guessed)
        return guesses if kind is Kind.SPECULATE else self._under_way - guesses

    def _on_copied(self, key: int, error: Exception | None, ended_s: float) -> None:
        """A copy ended; called by the link's threads. What it made room for follows at once."""
        with self.lock:
            self._under_way -= 1
            self._guessed.discard(key)
            try:
                if error is not None:
                    raise error
                if self._failure is None:
                    self.cache.finish(key)
                    if self._shrinking:
                        self._fit_memory()
                    if key in self._awaited:
                        self._awaited.discard(key)
                        self._arrived.append(key)
                    self._pump(ended_s)
            except Exception as failure:
                self._failure = self._failure or failure
            self.lock.notify_all()


HIT = int(Kind.HIT)
FETCHED = frozenset({HIT, int(Kind.LATE), int(Kind.MISS)})
OUTCOMES = (Kind.HIT, Kind.LATE, Kind.MISS, Kind.COMPUTE, Kind.SKIP, Kind.SUBSTITUTE)
