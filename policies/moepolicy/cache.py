"""The state machine as an object: what SimPy and the live runtime hold, with events and a journal.

``ExpertCache`` adds nothing to the decisions. It names them, tells observers, and can keep the
journal of calls from which ``replay_journal`` reproduces a run without any clock.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple, NoReturn

import numpy as np
from numpy.typing import NDArray

from moepolicy.blame import broken
from moepolicy.calls import (
    BEGIN,
    CONSUME,
    END,
    FINISH,
    RESIZE,
    START,
    Call,
    Calls,
    CompiledCalls,
    lacking_calls,
)
from moepolicy.kinds import Kind
from moepolicy.overdue import watch_policy
from moepolicy.pointers import Missing
from moepolicy.policy import Context, Policy, PolicyError
from moepolicy.routing import RoutingBuffers, RoutingRule, routing_buffers
from moepolicy.sharing import domain_slots
from moepolicy.state import DEMAND, PREFETCH, Cache, check, new_cache
from moepolicy.steps import Step, TokenRows


class Transfer(NamedTuple):
    """A copy that starts now: the key's record goes to ``slot``."""

    key: int
    slot: int
    speculative: bool
    evicts: bool  # another expert gave up its slot for it
    low: bool = False  # the record of the lower precision


class Event(NamedTuple):
    """One decision of a step about a key. ``other`` is what ``Kind`` says it is, or -1."""

    kind: Kind
    step: int
    key: int
    other: int


Journal = list[tuple[int, int]]
Observer = Callable[[Event], None]


class ExpertCache:
    """A cache of experts under one policy.

    Drive it like this, a step at a time; ``start`` and ``finish`` may come at any moment, also
    between steps, but never two calls at once::

        outcome = cache.begin(step)          # what each key is: see ``begin``
        while (copy := cache.start()):       # whenever the link could take one
            ...                              # bring copy.key's record into copy.slot
            cache.finish(copy.key)           # when it has arrived
        cache.consume(key)                   # as each expert's compute is done
        cache.end()

    The class is long because each call of the state machine is logged, run, told to observers and
    named in errors here, and nowhere else.
    """

    def __init__(
        self,
        context: Context,
        policy: Policy,
        *,
        name: str | None = None,
        observers: Sequence[Observer] = (),
        journal: Journal | None = None,
        compile: bool = False,
        horizon: int = 0,
        max_slots: int | None = None,
        weight_rule: RoutingRule | None = None,
    ) -> None:
        """With ``max_slots`` (a layer) the cache can be resized up to that. ``compile`` has the
        calls compiled together with the policy, which must lend itself to it (see
        `moepolicy.calls`); steps then carry ``horizon`` rows of predictions at most.
        ``weight_rule`` is how the model's gates make weights, for a policy that routes (see
        `set_weight_rule`)."""
        self.context = context
        self.policy = policy
        self.name = name or type(policy).__name__
        self.observers = list(observers)
        self.journal = journal
        # No call decides more than a few things about each key.
        n_events = 6 * context.n_keys + 64 if observers else 0
        self.arrays: Cache = new_cache(
            context, policy, name=self.name, n_events=n_events, max_slots=max_slots
        )
        most = context.slots if max_slots is None else max(context.slots, max_slots)
        self.max_slots = min(most, context.n_experts)
        self.routing: RoutingBuffers | None = None
        """Of the step in progress under a policy that routes: what its rows demand."""
        if weight_rule is not None:
            self.set_weight_rule(weight_rule)
        self.step: Step | None = None
        """The step begun last, as the policy routed it."""
        self._watch = watch_policy(self.name, type(policy), self.arrays.step)
        self._calls: Calls = self.compile_calls(horizon) if compile else Calls(self.arrays, policy)
        # Single entries are read in a third of the time that an array takes for them.
        self._place = self.arrays.place.data
        self._unused = self.arrays.unused.data
        self._is_low = self.arrays.is_low.data
        self._evicted = self.arrays.evicted.data
        self._first = self.arrays.first.data
        self._asks = self.arrays.asks.data

    @property
    def n_slots(self) -> int:
        """Slots over cache and staging together: the records a device arena must hold now.

        They are numbered from 0 until the first resize.
        """
        arrays = self.arrays
        return arrays.slots + arrays.staging_buffers - int(arrays.n_spare[0])

    @property
    def shrinking(self) -> bool:
        """Whether slots are still to go, as soon as what lies in them can."""
        return bool(self.arrays.excess[0])

    def spare_slots(self) -> frozenset[int]:
        """The slots that the cache could have and has not: nothing lies in them or is to come."""
        return frozenset(self.arrays.spare[: self.arrays.n_spare[0]].tolist())

    def lacks(self) -> Missing:
        """What of these calls no earlier run has left compiled on disk. Raises NotCompilable."""
        return lacking_calls(self.arrays, self.policy)

    def compile_calls(self, horizon: int) -> CompiledCalls:
        """The calls of the state machine, compiled or loaded from disk, for ``use``.

        Another thread may do it while the cache is driven: it neither reads nor changes what the
        cache knows. Raises NotCompilable, or numba's own errors, for a policy beyond compiling.
        """
        return CompiledCalls(self.arrays, self.policy, horizon)

    def use(self, calls: Calls) -> None:
        """Make every call by ``calls`` from now on; between two calls, at any time.

        All state is in the arrays, which both kinds share, so nothing else changes.
        """
        self._calls = calls

    def set_weight_rule(self, rule: RoutingRule) -> None:
        """How the model's gates make weights of their logits: needed before the first step of a
        policy that routes. PolicyError where the rule is not known."""
        self.routing = routing_buffers(self.context, rule)

    def begin(self, step: Step, rows: TokenRows | None = None) -> NDArray[np.int8]:
        """Pin a step's demand; returns the outcome of each key of the step.

        A policy that routes is given the ``rows`` of the step, and rewrites them; ``self.step`` is
        then the step with what they demand now.

        HIT         the expert is in its slot
        LATE, MISS  the expert's copy will arrive
        COMPUTE     the expert is to be computed on the CPU
        SUBSTITUTE  the expert of ``substitute`` is to be computed in its place
        SKIP        nothing is to be computed
        """
        self._log(BEGIN, step.number)
        self._watch.begin()
        try:
            if self.arrays.routing:
                step = self._rerouted(step, rows)
            self.step = step
            outcome = self._calls.begin(step)
        except Exception as error:
            self._fail(error)
        finally:
            self._publish()
        return outcome

    def routed(self) -> tuple[Step, NDArray[np.int32]]:
        """The step in progress as the policy routed it, and by rank how many rows use an expert."""
        assert self.step is not None
        assert self.routing is not None
        return self.step, self.routing.used_by[: len(self.step.experts)]

    def _rerouted(self, step: Step, rows: TokenRows | None) -> Step:
        """The step with the demand that the policy's choice of experts comes to."""
        if rows is None:
            raise PolicyError(f"policy '{self.name}' routes, and is given no rows to route")
        if self.routing is None:
            raise PolicyError(
                f"policy '{self.name}' gives tokens other experts, and how the model's gates make "
                "weights of their logits is not known"
            )
        n = self._calls.reroute(step, rows, self.routing)
        return step._replace(experts=self.routing.keys[:n], weights=self.routing.weights[:n])

    def start(self) -> Transfer | None:
        """The copy that starts now, into a slot that is emptied; None when no copy can start."""
        self._log(START, -1)
        self._watch.begin()
        try:
            key = self._calls.start()
        except Exception as error:
            self._fail(error)
        finally:
            self._publish()
        if key < 0:
            return None
        speculative, evicts = bool(self._unused[key]), self._evicted[0] >= 0
        return Transfer(key, self._place[key], speculative, evicts, bool(self._is_low[key]))

    def finish(self, key: int) -> None:
        """The copy of ``key`` has arrived."""
        self._log(FINISH, key)
        self._watch.begin()
        try:
            self._calls.finish(key)
        except Exception as error:
            self._fail(error)
        finally:
            self._publish()

    def consume(self, key: int) -> None:
        """The step's compute has finished with ``key``."""
        self._log(CONSUME, key)
        self._calls.consume(key)

    def end(self) -> None:
        """All of the step's experts have been computed."""
        self._log(END, -1)
        self._watch.begin()
        try:
            self._calls.end()
        except Exception as error:
            self._fail(error)
        finally:
            self._publish()

    def resize(self, slots: int) -> None:
        """Give the cache ``slots`` slots a layer, as soon as the experts that it loses can go.

        A policy that shares the slots out does so anew. Raises PolicyError beyond ``max_slots``,
        and for shares that there cannot be; the cache is then as it was.
        """
        if not (self.arrays.resizable and 0 <= slots <= self.max_slots):
            raise PolicyError(
                f"a cache made for {self.max_slots} slots a layer cannot have {slots}"
            )
        context = self.context._replace(slots=slots)
        limit = domain_slots(self.policy, context, self.name)
        self._log(RESIZE, slots)
        self.arrays.limit[:] = limit
        self._watch.begin()
        try:
            self._calls.resize(slots)
        except Exception as error:
            self._fail(error)
        finally:
            self._publish()

    def wants_predictions(self, layer: int) -> bool:
        """Whether the later gates are to be asked at the next step of ``layer``."""
        return bool(self._asks[layer])

    def slot_of(self, key: int) -> int:
        """The slot that ``key`` is in or is copied to; -1 when ``key`` is not on the device."""
        return self._place[key]

    def is_low(self, key: int) -> bool:
        """Whether the copy of ``key``, arrived or under way, is of the lower precision."""
        return bool(self._is_low[key])

    def substitute(self, rank: int) -> int:
        """The key computed in place of the ``rank``-th of the step in progress; -1: none."""
        return int(self.arrays.substitutes[rank])

    def count(self, kind: Kind) -> int:
        """Number of decisions of this kind so far."""
        return int(self.arrays.counters[kind])

    def in_step(self) -> bool:
        """Whether a step is in progress: begun and not ended."""
        return bool(self.arrays.n_demand[0])

    def queued(self) -> Kind | None:
        """Kind of the copy that ``start`` would try next: LOAD (demand), SPECULATE, or None."""
        if self._first[DEMAND] >= 0:
            return Kind.LOAD
        return Kind.SPECULATE if self._first[PREFETCH] >= 0 else None

    def check(self) -> None:
        """AssertionError if an invariant of the state machine does not hold."""
        check(self.arrays)

    def _log(self, call: int, key: int) -> None:
        if self.journal is not None:
            self.journal.append((call, key))

    def _fail(self, error: Exception) -> NoReturn:
        found = broken(self.name, type(self.policy), error, int(self.arrays.step[0]))
        if found is error:
            raise error
        raise found from error

    def _publish(self) -> None:
        self._watch.inside = False
        if not self.observers:
            return
        n = self.arrays.n_events[0]
        if n:
            for kind, step, key, other in self.arrays.events[:n].tolist():
                event = Event(Kind(kind), step, key, other)
                for observe in self.observers:
                    observe(event)
        self.arrays.n_events[0] = 0


def replay_journal(
    cache: ExpertCache, steps: Iterable[Step], journal: Journal, rows: Iterable[TokenRows] = ()
) -> None:
    """Drive ``cache`` by a journal in place of a clock.

    ``steps`` are those of the run that wrote the journal, in order, and ``rows`` their rows where
    the policy routes. Raises PolicyError where the journal does not fit them: it names a finish of
    a key that is not travelling, say.
    """
    upcoming, its_rows = iter(steps), iter(rows)
    for call, key in journal:
        if call == Call.BEGIN:
            step = next(upcoming, None)
            if step is None or step.number != key:
                raise PolicyError(f"the journal begins step {key}, which the trace does not have")
            cache.begin(step, next(its_rows, None))
        elif call == Call.START:
            cache.start()
        elif call == Call.FINISH:
            if cache.slot_of(key) < 0:
                raise PolicyError(f"the journal finishes key {key}, which is not travelling")
            cache.finish(key)
        elif call == Call.CONSUME:
            cache.consume(key)
        elif call == Call.RESIZE:
            cache.resize(key)
        else:
            cache.end()
