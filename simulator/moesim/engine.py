"""The simulated machine: one compute stream and one link around the state machine, in SimPy.

Time is integer nanoseconds. At one instant copies complete first (by stream), then compute
advances and decides, then copies are dispatched, so that a run repeats exactly.
"""

from __future__ import annotations

from collections.abc import Generator
from dataclasses import dataclass
from functools import partial

import numpy as np
import simpy
from moepolicy import ExpertCache, Kind
from numpy.typing import NDArray

from moesim.profile import Machine
from moesim.workload import Workload

# SimPy orders the events of one instant by priority. Copies of stream i complete at
# COMPLETION + i.
COMPLETION = 1
COMPUTE = 10
DISPATCH = 20

Process = Generator[simpy.Event, None, None]


class Nanoseconds(simpy.Environment):
    """SimPy's clock, in whole nanoseconds."""

    @property
    def now(self) -> int:
        return int(self._now)


class At(simpy.Event):
    """An event ``delay`` ns from now, with its place among those of its instant."""

    def __init__(self, env: Nanoseconds, delay: int, priority: int) -> None:
        super().__init__(env)
        self._ok = True
        self._value = None
        env.schedule(self, priority, delay)  # type: ignore[arg-type]


@dataclass(frozen=True)
class Sizes:
    """Bytes and parameters that the machine's rates apply to."""

    expert_bytes: int
    expert_params: int
    layer_bytes: int
    token_bytes: int


@dataclass
class Clock:
    """Where the simulated time went, in ns."""

    decode_ns: int = 0
    prompt_ns: int = 0
    stall_ns: int = 0  # compute waited for an expert
    link_busy_ns: int = 0  # bytes flowed


class SimulatedLink:
    """Copies in the order the state machine starts them; their bytes share one bus."""

    def __init__(
        self, env: Nanoseconds, machine: Machine, cache: ExpertCache, sizes: Sizes
    ) -> None:
        self.env = env
        self.cache = cache
        self.latency_ns = machine.latency_ns
        self.bus_ns = machine.copy_ns(sizes.expert_bytes)
        self.busy_ns = 0
        self.arrived: dict[int, int] = {}  # key -> when, of those not yet collected
        self.on_arrival: simpy.Event | None = None
        self._idle = list(range(machine.link.streams))
        self._bus_free_at = 0
        self._dispatching = False

    def kick(self) -> None:
        """Something may have become startable: dispatch once this instant's decisions are made."""
        if self._idle and not self._dispatching and self.cache.has_queued():
            self._dispatching = True
            At(self.env, 0, DISPATCH).callbacks.append(self._dispatch)

    def _dispatch(self, _: simpy.Event) -> None:
        self._dispatching = False
        while self._idle and (copy := self.cache.start()) is not None:
            stream = self._idle.pop(0)
            begins = max(self.env.now + self.latency_ns, self._bus_free_at)
            self._bus_free_at = begins + self.bus_ns
            self.busy_ns += self.bus_ns
            done = At(self.env, self._bus_free_at - self.env.now, COMPLETION + stream)
            done.callbacks.append(partial(self._complete, copy.key, stream))

    def _complete(self, key: int, stream: int, _: simpy.Event) -> None:
        self.cache.finish(key)
        self.arrived[key] = self.env.now
        self._idle.append(stream)
        self._idle.sort()
        if self.on_arrival is not None:
            waiting, self.on_arrival = self.on_arrival, None
            self.env.schedule(waiting, COMPUTE)  # type: ignore[arg-type]
        self.kick()

    def arrival(self) -> simpy.Event:
        """An event at the next completion, after all completions of its instant."""
        event = simpy.Event(self.env)
        event._ok, event._value = True, None
        self.on_arrival = event
        return event


class Simulation:
    """One policy's cache on one machine, driven through a workload."""

    def __init__(
        self, workload: Workload, cache: ExpertCache, machine: Machine, sizes: Sizes
    ) -> None:
        self.workload = workload
        self.cache = cache
        self.env = Nanoseconds(initial_time=0)
        self.link = SimulatedLink(self.env, machine, cache, sizes)
        self.clock = Clock()
        self._detail = cache.arrays.prefetching
        self._layer_ns = _layer_times(workload, machine, sizes, predicting=self._detail)
        counts = np.unique(workload.routed)
        self._expert_ns = {
            int(n): machine.expert_ns(int(n), sizes.expert_bytes, sizes.expert_params)
            for n in counts
        }

    def run(self) -> Clock:
        """Replay every step; returns where the time went."""
        self.env.process(self._compute())
        self.env.run()
        self.clock.link_busy_ns = self.link.busy_ns
        return self.clock

    def _compute(self) -> Process:
        workload, clock = self.workload, self.clock
        for number in range(workload.n_steps):
            began = self.env.now
            yield At(self.env, int(self._layer_ns[number]), COMPUTE)
            yield from self._expert_step(number)
            took = self.env.now - began
            if workload.decode[number]:
                clock.decode_ns += took
            else:
                clock.prompt_ns += took

    def _expert_step(self, number: int) -> Process:
        """Decide, compute what is here in router order, then what arrives as it arrives."""
        cache, link = self.cache, self.link
        step = self.workload.step(number, detail=self._detail)
        outcome = cache.begin(step).tolist()
        link.kick()
        first = int(self.workload.offsets[number])
        keys = step.experts.tolist()
        link.arrived.clear()  # guesses that landed before they were wanted are plain hits now
        for rank, key in enumerate(keys):
            if outcome[rank] == Kind.HIT:
                yield from self._run_expert(key, first + rank)
        awaited = {key: rank for rank, key in enumerate(keys) if outcome[rank] != Kind.HIT}
        while awaited:
            here = [(link.arrived[k], rank, k) for k, rank in awaited.items() if k in link.arrived]
            if not here:
                since = self.env.now
                yield link.arrival()
                self.clock.stall_ns += self.env.now - since
                continue
            _, rank, key = min(here)
            del awaited[key]
            yield from self._run_expert(key, first + rank)
        cache.end()

    def _run_expert(self, key: int, index: int) -> Process:
        yield At(self.env, self._expert_ns[int(self.workload.routed[index])], COMPUTE)
        self.cache.consume(key)
        self.link.kick()


def _layer_times(
    workload: Workload, machine: Machine, sizes: Sizes, *, predicting: bool
) -> NDArray[np.int64]:
    """ns of each step before its gate's choice is known; a pass's first layer carries the pass."""
    by_tokens = {
        int(n): machine.layer_ns(int(n), sizes.layer_bytes, predicting=predicting)
        for n in np.unique(workload.tokens)
    }
    times = np.array([by_tokens[n] for n in workload.tokens.tolist()], np.int64)
    first_of_pass = np.diff(workload.rows[:, 0], prepend=-1) != 0
    times[first_of_pass] += machine.pass_ns(sizes.token_bytes)
    return times
