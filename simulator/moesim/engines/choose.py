"""Choosing an engine for one run: SimPy, or the replay, compiled where that pays and can be done.

All give the same decisions and the same timeline, in integer nanoseconds.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import numpy as np
from moepolicy import Context, ExpertCache, Policy, PolicyError, PolicySpec
from moepolicy.blame import broken, files_of
from moepolicy.cache import Journal, Observer
from moepolicy.calls import calls_are_compiled
from moepolicy.compiled import NotCompilable, allow_memory, compiled, compiled_policy, is_compiled
from moepolicy.reasons import why_not
from moepolicy.state import Cache, arrays_of, new_cache

from moesim.engines import replay as twin
from moesim.engines import replay_state
from moesim.engines.clock import SimulatedTime
from moesim.engines.compilations import Compilations, Engine
from moesim.engines.in_simpy import Simulation
from moesim.machine.costs import Costs
from moesim.workload.steps import CHUNK, Workload

Look = Callable[[Cache, int, int], None]


def run(
    workload: Workload,
    policy: PolicySpec,
    context: Context,
    costs: Costs,
    *,
    compilations: Compilations,
    engine: Engine = Engine.auto,
    timeline: bool = False,
    observers: tuple[Observer, ...] = (),
    journal: Journal | None = None,
    n_steps: int = 0,
    look: Look | None = None,
    n_events: int = 0,
) -> tuple[Cache, SimulatedTime]:
    """Replay ``workload``; returns the cache as it ended and where the time went.

    ``compilations`` decides whether it runs compiled. Observers and a journal need SimPy, which
    tells of every event; "auto" then chooses it. ``n_steps`` says how many steps the policy will
    be asked for, where ``workload`` is not all of them. The replay calls ``look`` after every
    stretch of at most CHUNK steps, whose events (``n_events`` at most) the cache then holds.
    """
    if engine is Engine.auto:
        engine = Engine.simpy if observers or journal is not None else Engine.replay
    kind = _Simulation if engine is Engine.simpy else _Replay
    workload = workload.shown_to(policy)
    job = kind(workload, policy, context, costs, timeline, observers, journal, look, n_events)
    asked = max(n_steps, compilations.ask(engine, policy, workload.n_steps))
    if compilations.pays(policy, asked, job.is_compiled) and _compiles(job, compilations):
        return _run_compiled(job, compilations)
    return job.run(compile=False)


@dataclass
class _Job:
    """One run, yet to be made ready. Interpreted or compiled, whole or in part."""

    workload: Workload
    policy: PolicySpec
    context: Context
    costs: Costs
    timeline: bool = False
    observers: tuple[Observer, ...] = ()
    journal: Journal | None = None
    look: Look | None = None
    n_events: int = 0
    engine: ClassVar[Engine]

    def run(self, *, compile: bool, n_steps: int | None = None) -> tuple[Cache, SimulatedTime]:
        """The first ``n_steps`` steps (None: all of them).

        Interpreted it raises PolicyError where the policy fails. Compiled it raises whatever the
        compiler and the code do: NotCompilable, numba's own errors, what the policy raises."""
        raise NotImplementedError

    def is_compiled(self) -> bool:
        """Whether the code that ``compile`` asks for lies on disk."""
        raise NotImplementedError


def _compiles(job: _Job, compilations: Compilations) -> bool:
    """Whether a policy's class compiles and does the same compiled, on a prefix of the trace.

    Raises PolicyError where the policy fails interpreted, too: that is its author's mistake.
    """
    policy, prefix = job.policy, compilations.prefix
    if (job.engine, policy.policy) in compilations.proven:
        return True
    trial = replace(job, timeline=False, observers=(), journal=None, look=None, n_events=0)
    expected = _comparable(*trial.run(compile=False, n_steps=prefix))
    reason = ""
    try:
        trial.is_compiled()  # and in which form
        found = _comparable(*_compile_somehow(trial, prefix))
        same = all(np.array_equal(one, other) for one, other in zip(found, expected, strict=True))
        reason = "" if same else "it decides differently when compiled"
    except Exception as error:  # numba's own, of many classes: the policy's code is beyond it
        reason = _reason(policy, error)
    if reason:
        compilations.interpret(policy, reason)
        return False
    compilations.proven.add((job.engine, policy.policy))
    return True


def _compile_somehow(trial: _Job, n_steps: int) -> tuple[Cache, SimulatedTime]:
    """The prefix by compiled code that allocates nothing or, if need be, by code that does."""
    try:
        return trial.run(compile=True, n_steps=n_steps)
    except Exception as error:
        if not allow_memory(trial.policy.build(trial.context), error):
            raise
    return trial.run(compile=True, n_steps=n_steps)


def _run_compiled(job: _Job, compilations: Compilations) -> tuple[Cache, SimulatedTime]:
    """Run all of ``job`` compiled; where that fails, interpreted from the start.

    Compiled code cannot say where it failed. If the policy fails interpreted, too, that says it.
    """
    past = [_Past(observe) for observe in job.observers]
    looked = None if job.look is None else _Past(job.look)
    job = replace(job, observers=tuple(past), look=looked)
    n_calls = 0 if job.journal is None else len(job.journal)
    try:
        return job.run(compile=True)
    except Exception as error:
        if job.journal is not None:
            del job.journal[n_calls:]
        for each in [*past, *([looked] if looked else [])]:
            each.again()
        found = job.run(compile=False)
        compilations.interpret(job.policy, _reason(job.policy, error))
        return found


class _Past:
    """Tells what a run tells, and when it is run again only what it had not come to."""

    def __init__(self, tell: Callable[..., None]) -> None:
        self._tell = tell
        self._told = self._known = 0

    def again(self) -> None:
        self._told, self._known = 0, self._told

    def __call__(self, *about: Any) -> None:
        self._told += 1
        if self._told > self._known:
            self._tell(*about)


def _reason(policy: PolicySpec, error: Exception) -> str:
    """Why compiled code is not to be had, or not to be trusted."""
    if isinstance(error, NotCompilable):
        return str(error)
    cause = error.__cause__ if isinstance(error, PolicyError) and error.__cause__ else error
    return why_not(cause, files_of(policy.policy))


def _comparable(cache: Cache, clock: SimulatedTime) -> list[Any]:
    arrays = arrays_of(cache).values()
    return [*arrays, clock.total_ns, clock.stall_ns]


class _Simulation(_Job):
    """SimPy keeps the clocks; the calls of the state machine may be compiled."""

    engine = Engine.simpy

    def run(self, *, compile: bool, n_steps: int | None = None) -> tuple[Cache, SimulatedTime]:
        cache = ExpertCache(
            self.context,
            self.policy.build(self.context),
            name=self.policy.label,
            observers=self.observers,
            journal=self.journal,
            compile=compile,
            horizon=len(self.workload.predicted),
        )
        simulation = Simulation(
            self.workload, cache, self.costs, timeline=self.timeline, n_steps=n_steps
        )
        return cache.arrays, simulation.run()

    def is_compiled(self) -> bool:
        built = self.policy.build(self.context)
        return calls_are_compiled(new_cache(self.context, built), built)


class _Replay(_Job):
    """The loop over the machine's clocks, a chunk of steps at a time."""

    engine = Engine.replay

    def run(self, *, compile: bool, n_steps: int | None = None) -> tuple[Cache, SimulatedTime]:
        n_steps = self.workload.n_steps if n_steps is None else min(n_steps, self.workload.n_steps)
        policy, cache, clocks = self._parts(n_steps)
        costs = self.costs
        function: Callable[..., Any] = twin.replay
        state: Any = policy
        if compile:
            state = compiled_policy(policy)
            function = compiled(twin.replay, state, omit=twin.unreachable(cache, costs, clocks))
        work = replay_state.work_of(self.workload)
        outcome = np.zeros(self.context.n_experts, np.int8)
        try:
            for first in range(0, n_steps, CHUNK):
                steps = first, min(first + CHUNK, n_steps)
                details = self.workload.details(*steps)
                with warnings.catch_warnings():
                    warnings.simplefilter("ignore")
                    function(cache, state, work, costs, clocks, steps, *details, outcome)
                if self.look is not None:
                    self.look(cache, *steps)
                    cache.n_events[0] = 0
                self.workload.release()
        except Exception as error:
            if compile:
                raise
            step = int(cache.step[0])
            found = broken(self.policy.label, self.policy.policy, error, step)
            if found is error:
                raise
            raise found from error
        return cache, replay_state.clock_of(clocks)

    def is_compiled(self) -> bool:
        policy, cache, clocks = self._parts(0)
        omit = twin.unreachable(cache, self.costs, clocks)
        return is_compiled(twin.replay, policy, omit=omit)

    def _parts(self, n_steps: int) -> tuple[Policy, Cache, replay_state.Clocks]:
        policy = self.policy.build(self.context)
        cache = new_cache(self.context, policy, n_events=self.n_events)
        n_segments = _most_segments(self.workload, self.costs, n_steps) if self.timeline else 0
        return policy, cache, replay_state.new_clocks(self.costs, self.workload.n_keys, n_segments)


def _most_segments(workload: Workload, costs: Costs, n_steps: int) -> int:
    """An upper bound: every step may copy, read and compute everything it could want or guess."""
    per_step = 1 + workload.meta.n_experts * 2
    pieces = 2 * max(costs.n_pieces, costs.low_pieces) + 1
    return n_steps * per_step * pieces
