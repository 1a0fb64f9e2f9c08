"""The simulated machine in SimPy: one compute stream, a link, a disk, CPU workers.

This is the readable reference; `moesim.engines.replay` is its compiled twin. Time is integer
nanoseconds. At one instant arrivals complete first, then compute advances and decides, then the
link is given its next work, so that a run repeats exactly.
"""

from __future__ import annotations

from collections.abc import Generator
from dataclasses import dataclass, field

import simpy
from moepolicy import ExpertCache, Kind, Transfer
from moepolicy.kinds import COMPUTE, HIT, LATE, MISS, SUBSTITUTE

from moesim.engines.clock import COMPUTE_LANE, CPU_LANE, DISK_LANE, LINK_LANE, SimulatedTime
from moesim.machine.costs import Costs
from moesim.workload.steps import Workload

# SimPy orders the events of one instant by priority.
AT_COMPLETION = 1
AT_COMPUTE = 10
AT_DISPATCH = 20


Process = Generator[simpy.Event, None, None]


class Nanoseconds(simpy.Environment):
    """SimPy's clock, in whole nanoseconds."""

    _now: int

    @property
    def now(self) -> int:
        """The simulation's time in ns."""
        return self._now


class At(simpy.Event):
    """An event ``delay`` ns from now, with its place among those of its instant."""

    def __init__(self, env: Nanoseconds, delay: int, priority: int) -> None:
        self.env = env
        self.callbacks = []
        self._ok = True
        self._value = None
        env.schedule(self, priority, delay)  # type: ignore[arg-type]


@dataclass(slots=True)
class SimulatedCopy:
    """An expert on its way, from the start of its copy to its arrival."""

    key: int
    low: bool
    stream: int
    number: int  # copies are numbered as they start
    demand: bool  # wanted now; a guess becomes so when it is late
    ready_at: int  # its bytes can flow
    pieces: int  # still to cross


@dataclass
class Host:
    """The host-memory cache in front of a disk: the most recently used records."""

    capacity_bytes: int
    used: dict[tuple[int, bool], int] = field(default_factory=dict)  # bytes, oldest first

    def has(self, key: int, low: bool, n_bytes: int) -> bool:
        """Whether the record is there; it is afterwards, if there is room for it at all."""
        hit = self.used.pop((key, low), None) is not None
        if n_bytes <= self.capacity_bytes:
            self.used[key, low] = n_bytes
        while sum(self.used.values()) > self.capacity_bytes:
            del self.used[next(iter(self.used))]
        return hit


class SimulatedLink:
    """Copies in the order the state machine starts them; their bytes share one bus, piece by piece.

    A stream carries one copy at a time. Whole experts share the streams; experts in pieces have
    as many streams for demand as for prefetch, and the bus goes to demand first.
    """

    def __init__(
        self, env: Nanoseconds, costs: Costs, cache: ExpertCache, clock: SimulatedTime
    ) -> None:
        self.env = env
        self.costs = costs
        self.cache = cache
        self.clock = clock
        self.arrived: dict[int, None] = {}  # in order of arrival, of those not yet collected
        self._copies: list[SimulatedCopy] = []
        self._host = Host(costs.host_bytes)
        self._bus_busy = False
        self._followed_at: dict[int, int] = {}  # by stream: when one ended that others waited for
        self._disk_free_at = 0
        self._started = 0
        self._dispatching = False
        self._waiting: simpy.Event | None = None

    def kick(self, _: simpy.Event | None = None) -> None:
        """Something changed: dispatch once this instant's decisions are made."""
        if not self._dispatching and (
            self.cache.queued() is not None or (self._copies and not self._bus_busy)
        ):
            self._dispatching = True
            At(self.env, 0, AT_DISPATCH).callbacks.append(self._dispatch)

    def want(self, key: int) -> None:
        """A guess under way turned out to be right: its bytes go with the demanded ones now."""
        for copy in self._copies:
            if copy.key == key:
                copy.demand = True

    def arrival(self) -> simpy.Event:
        """An event at the next arrival, after all completions of its instant."""
        self._waiting = event = simpy.Event(self.env)
        event._ok, event._value = True, None
        return event

    def _ready(self, event: simpy.Event) -> None:
        """The bytes of a copy can flow from this instant on."""
        if not self._dispatching and not self._bus_busy:
            self._dispatch(event)

    def _dispatch(self, _: simpy.Event) -> None:
        self._dispatching = False
        while (stream := self._free_stream()) >= 0 and (copy := self.cache.start()) is not None:
            self._start(copy, stream)
        if not self._bus_busy:
            self._grant_bus()

    def _free_stream(self) -> int:
        """A stream for what would be copied next; -1 where nothing is queued or none is free."""
        kind = self.cache.queued()
        if kind is None:
            return -1
        streams = self.costs.streams
        first = streams if self.costs.chunked and kind is Kind.SPECULATE else 0
        taken = {copy.stream for copy in self._copies}
        return next((s for s in range(first, first + streams) if s not in taken), -1)

    def _start(self, transfer: Transfer, stream: int) -> None:
        costs, now, low = self.costs, self.env.now, transfer.low
        n_bytes = costs.low_bytes if low else costs.expert_bytes
        demand = not transfer.speculative
        follows = costs.back_to_back and self._followed_at.get(stream) == now
        ready_at = now if follows else now + costs.latency_ns
        if costs.read_ns and not self._host.has(transfer.key, low, n_bytes):
            begins = max(now, self._disk_free_at)
            self._disk_free_at = begins + (costs.low_read_ns if low else costs.read_ns)
            ready_at = self._disk_free_at + costs.latency_ns
            self.clock.add(DISK_LANE, 0, begins, self._disk_free_at, transfer.key, int(demand))
        n_pieces = costs.low_pieces if low else costs.n_pieces
        pieces = n_pieces * (2 if costs.write_back and transfer.evicts else 1)
        self._started += 1
        self._copies.append(
            SimulatedCopy(transfer.key, low, stream, self._started, demand, ready_at, pieces)
        )
        if ready_at > now:
            At(self.env, ready_at - now, AT_DISPATCH).callbacks.append(self._ready)

    def _grant_bus(self) -> None:
        """The next piece: of demand before prefetch, of what started first."""
        now = self.env.now
        ready = [copy for copy in self._copies if copy.ready_at <= now]
        if not ready:
            return
        copy = ready[0]
        if len(ready) > 1:
            copy = min(ready, key=lambda c: (not c.demand, c.number))
        costs = self.costs
        n_pieces, last_ns = costs.n_pieces, costs.last_piece_ns
        if copy.low:
            n_pieces, last_ns = costs.low_pieces, costs.low_last_piece_ns
        took = last_ns if (copy.pieces - 1) % n_pieces == 0 else costs.piece_ns
        self._bus_busy = True
        self.clock.link_busy_ns += took
        self.clock.add(LINK_LANE, copy.stream, now, now + took, copy.key, int(copy.demand))
        At(self.env, took, AT_COMPLETION).callbacks.append(lambda _: self._piece_done(copy))

    def _piece_done(self, copy: SimulatedCopy) -> None:
        self._bus_busy = False
        copy.pieces -= 1
        if copy.pieces == 0:
            self._copies.remove(copy)
            self.cache.finish(copy.key)
            if self.cache.queued() is not None:
                self._followed_at[copy.stream] = self.env.now
            self.arrived[copy.key] = None
            if self._waiting is not None:
                waiting, self._waiting = self._waiting, None
                self.env.schedule(waiting, AT_COMPUTE)  # type: ignore[arg-type]
        self.kick()


class Simulation:
    """One policy's cache on one machine, driven through a workload."""

    def __init__(
        self,
        workload: Workload,
        cache: ExpertCache,
        costs: Costs,
        *,
        timeline: bool = False,
        n_steps: int | None = None,
    ) -> None:
        """``n_steps`` ends the run after so many; None: after all."""
        self.workload = workload
        self.n_steps = workload.n_steps if n_steps is None else min(n_steps, workload.n_steps)
        self.cache = cache
        self.costs = costs
        self.env = Nanoseconds(initial_time=0)
        self.clock = SimulatedTime(segments=[] if timeline else None)
        self.link = SimulatedLink(self.env, costs, cache, self.clock)
        self._detail = bool(workload.predicted) or workload.logits is not None
        self._expert_ns = costs.expert_ns.tolist(), costs.low_expert_ns.tolist()

    def run(self) -> SimulatedTime:
        """Replay the steps; returns where the time went."""
        done = self.env.process(self._compute())
        self.env.run(until=done)
        self.clock.total_ns = self.env.now
        return self.clock

    def _compute(self) -> Process:
        gate_ns, gates_ns = self.costs.gate_ns(slice(None)).tolist(), self.costs.gates_ns
        decode = self.workload.decode.tolist()
        layers = self.workload.layer.tolist()
        for number in range(self.n_steps):
            began = self.env.now
            asking_ns = gates_ns if self.cache.wants_predictions(layers[number]) else 0
            self.clock.gates_ns += asking_ns
            yield At(self.env, gate_ns[number] + asking_ns, AT_COMPUTE)
            self.clock.add(COMPUTE_LANE, 0, began, self.env.now, -1 - layers[number], 1)
            yield from self._expert_step(number)
            if decode[number]:
                self.clock.decode_ns += self.env.now - began
            else:
                self.clock.prompt_ns += self.env.now - began

    def _expert_step(self, number: int) -> Process:
        """Decide, compute what is here in router order, then what arrives as it arrives."""
        cache, link, env, clock = self.cache, self.link, self.env, self.clock
        step = self.workload.step(number, detail=self._detail)
        at = int(self.workload.offsets[number])
        used_by = self.costs.routed[at : at + len(step.experts)]
        decided = cache.begin(step, self.workload.rows_of(number)).tolist()
        if cache.arrays.routing:
            step, used_by = cache.routed()
        keys, tokens = step.experts.tolist(), used_by.tolist()
        for key, kind in zip(keys, decided, strict=True):
            if kind == LATE:
                link.want(key)
        link.kick()
        link.arrived.clear()  # guesses that landed before they were wanted are plain hits now
        joins_at = self._run_on_cpu(keys, decided, tokens)
        ready = [rank for rank, kind in enumerate(decided) if kind == HIT]
        ready += [rank for rank, kind in enumerate(decided) if kind == SUBSTITUTE]
        awaited = {keys[rank]: rank for rank, kind in enumerate(decided) if kind in (LATE, MISS)}
        waking_ns = 0
        while ready or awaited:
            began = env.now
            if not ready:
                first = next((key for key in link.arrived if key in awaited), None)
                ready = [] if first is None else [awaited.pop(first)]
            if not ready:
                yield link.arrival()
                clock.stall_ns += env.now - began
                waking_ns = self.costs.arrival_ns
                continue
            # Without prefetching no hit lies in a staging buffer, and nobody waits for its use.
            n = 1 if cache.arrays.prefetching else len(ready)
            ends = began + waking_ns
            for rank in ready[:n]:
                key = cache.substitute(rank) if decided[rank] == SUBSTITUTE else keys[rank]
                begins, ends = ends, ends + self._expert_ns[cache.is_low(key)][tokens[rank]]
                clock.add(COMPUTE_LANE, 0, begins, ends, key, 1)
            yield At(env, ends - began, AT_COMPUTE)
            clock.stall_ns += waking_ns
            waking_ns = 0
            for rank in ready[:n]:
                cache.consume(keys[rank])
            link.kick()
            del ready[:n]
        if joins_at > env.now:
            clock.stall_ns += joins_at - env.now
            yield At(env, joins_at - env.now, AT_COMPUTE)
        cache.end()
        link.kick()

    def _run_on_cpu(self, keys: list[int], decided: list[int], tokens: list[int]) -> int:
        """Share the step's CPU experts among the workers; returns when the last is done."""
        if COMPUTE not in decided:
            return 0
        free_at = [self.env.now] * self.costs.cpu_workers
        for rank, kind in enumerate(decided):
            if kind == COMPUTE:
                worker = free_at.index(min(free_at))
                began = free_at[worker]
                free_at[worker] += int(self.costs.cpu_ns[tokens[rank]])
                self.clock.add(CPU_LANE, worker, began, free_at[worker], keys[rank], 1)
        return max(free_at)
