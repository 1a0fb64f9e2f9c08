"""Choosing an engine for one run: SimPy, or the replay, compiled where that pays and can be done.

All give the same decisions and the same timeline, in integer nanoseconds.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Self

import numpy as np
from moepolicy import Context, ExpertCache, Policy, PolicyError, PolicySpec
from moepolicy.blame import broken, files_of
from moepolicy.cache import Journal, Observer
from moepolicy.calls import answer_mail
from moepolicy.compiled import NotCompilable, allow_memory
from moepolicy.guard import guarded
from moepolicy.overdue import watch_policy
from moepolicy.pointers import Missing, compile_hooks, compile_machine, link, missing, pointed
from moepolicy.pointers import engine as engine_for
from moepolicy.reasons import why_not
from moepolicy.routing import RoutingRule, routing_buffers
from moepolicy.state import Cache, arrays_of, new_cache
from numpy.typing import NDArray

from moesim.engines import replay as twin
from moesim.engines import replay_state, step_times
from moesim.engines.clock import SimulatedTime
from moesim.engines.compilations import PREFIX, Compilations
from moesim.engines.compile_process import CompileProcess, shared_out
from moesim.engines.in_simpy import Simulation
from moesim.engines.names import Engine
from moesim.engines.one_piece import Omit, Pieces, piece
from moesim.machine.costs import Costs
from moesim.workload.steps import CHUNK, Workload

AHEAD = {Engine.replay: "replay", Engine.simpy: "calls"}
"""What `moesim.ahead` calls an engine."""


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
    kinds: NDArray[np.int64] | None = None,
) -> tuple[Cache, SimulatedTime]:
    """Replay ``workload``; returns the cache as it ended and where the time went.

    ``compilations`` decides whether it runs compiled. Observers and a journal need SimPy, which
    tells of every event; "auto" then chooses it. ``n_steps`` says how many steps the policy will
    be asked for, where ``workload`` is not all of them. ``kinds`` [2, kinds] is filled with the
    numbers of steps by kind (see `moesim.engines.replay_state.Clocks`), for a caller who knows that
    all can be counted; SimPy leaves it alone.
    """
    if engine is Engine.auto:
        engine = Engine.simpy if observers or journal is not None else Engine.replay
    kind = _Simulation if engine is Engine.simpy else _Replay
    workload = workload.shown_to(policy)
    job = kind(workload, policy, context, costs, timeline, observers, journal, kinds)
    asked = max(n_steps, compilations.ask(engine, policy, workload.n_steps))
    job.pieces = compilations.pieces if asked >= compilations.worth_one_piece else None
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
    kinds: NDArray[np.int64] | None = None  # to be filled
    pieces: Pieces | None = None  # where the replay is to change over to one piece
    in_one_piece: bool = False  # have the replay compiled so from the start
    engine: ClassVar[Engine]
    driver: ClassVar[Callable[..., Any]]  # the function that is compiled

    def run(self, *, compile: bool, n_steps: int | None = None) -> tuple[Cache, SimulatedTime]:
        """The first ``n_steps`` steps (None: all of them).

        Interpreted it raises PolicyError where the policy fails. Compiled it raises whatever the
        compiler and the code do: NotCompilable, numba's own errors, what the policy raises."""
        raise NotImplementedError

    def trial(self) -> Self:
        """The same run as nobody sees it, for a prefix."""
        return replace(
            self,
            timeline=False,
            observers=(),
            journal=None,
            kinds=None,
            pieces=None,
        )

    def lacks(self) -> Missing:
        """What of the code that ``compile`` asks for is not on disk. Raises NotCompilable."""
        policy = self.policy.build(self.context)
        cache = new_cache(self.context, policy, name=self.policy.label)
        return missing(self.driver, cache, policy)

    def is_compiled(self) -> bool:
        """Whether all but the policy's own code lies on disk. Raises NotCompilable."""
        return self.lacks().nothing_general

    def lacks_hooks(self) -> bool:
        """Whether the policy's own code can be compiled, and is not on disk."""
        try:
            return self.lacks().hooks
        except Exception:  # of the policy's author; when its turn comes, it is told
            return False

    def compile_hooks(self) -> None:
        """Compile the policy's hooks, if they can be."""
        policy = self.policy.build(self.context)
        try:
            compile_hooks(policy)
        except Exception as error:  # numba's own, of many classes
            if allow_memory(policy, error):
                with suppress(Exception):
                    compile_hooks(policy)

    def compile_machine(self) -> None:
        """Compile the state machine."""
        policy = self.policy.build(self.context)
        compile_machine(new_cache(self.context, policy, name=self.policy.label))

    @property
    def _weight_rule(self) -> RoutingRule | None:
        """How the trace's gates make weights; None where no policy asks."""
        return self.workload.weight_rule if self.policy.routes else None


def _compiles(job: _Job, compilations: Compilations) -> bool:
    """Whether a policy's class compiles and does the same compiled, on a prefix of the trace.

    Raises PolicyError where the policy fails interpreted, too: that is its author's mistake.
    """
    policy, prefix = job.policy, compilations.prefix
    if (job.engine, policy.policy) in compilations.proven:
        return True
    trial = job.trial()
    expected = _comparable(*trial.run(compile=False, n_steps=prefix))
    reason = ""
    try:
        trial.lacks()  # says in which form the hooks are there, if they are
        if compilations.on_all_cores and not compilations.shared_out:
            compilations.shared_out = True
            _compile_on_all_cores(trial, compilations.coming)
        found = _comparable(*_compile_somehow(trial, prefix))
        reason = "" if _same(found, expected) else "it decides differently when compiled"
    except Exception as error:  # numba's own, of many classes: the policy's code is beyond it
        reason = _reason(policy, error)
    if reason:
        compilations.interpret(policy, reason)
        return False
    compilations.proven.add((job.engine, policy.policy))
    return True


def _compile_on_all_cores(trial: _Job, policies: tuple[PolicySpec, ...]) -> None:
    """Compile what serves every policy, and the hooks of those that are to come, as far as an
    earlier run has not left it; other processes take a part where that pays.

    Raises NotCompilable where ``trial``'s own policy is. What cannot be compiled of another one is
    left for when its turn comes.
    """
    lacks = trial.lacks()
    own = ["machine"] if lacks.machine else []
    units = [AHEAD[trial.engine]] if lacks.engine else []
    if lacks.machine and lacks.engine:
        units.append("limits")
    jobs = {spec.label: replace(trial, policy=spec) for spec in (trial.policy, *policies)}
    hooks = [label for label, job in jobs.items() if job.lacks_hooks()]
    mine, *shares = shared_out([*units, *hooks], own)
    others = [CompileProcess(share) for share in shares]
    try:
        if lacks.machine:
            trial.compile_machine()
        for label in mine:
            if label in jobs:
                jobs[label].compile_hooks()
        for other in others:
            other.wait()
    finally:
        for other in others:
            other.stop()


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
    job = replace(job, observers=tuple(past))
    n_calls = 0 if job.journal is None else len(job.journal)
    try:
        return job.run(compile=True)
    except Exception as error:
        if job.journal is not None:
            del job.journal[n_calls:]
        for each in past:
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


def _same(found: list[Any], expected: list[Any]) -> bool:
    return all(np.array_equal(one, other) for one, other in zip(found, expected, strict=True))


def _as_it_is(values: Any) -> Any:
    return values


class _Simulation(_Job):
    """SimPy keeps the clocks; the calls of the state machine may be compiled."""

    engine = Engine.simpy
    driver = staticmethod(answer_mail)

    def run(self, *, compile: bool, n_steps: int | None = None) -> tuple[Cache, SimulatedTime]:
        cache = ExpertCache(
            self.context,
            self.policy.build(self.context),
            name=self.policy.label,
            observers=self.observers,
            journal=self.journal,
            compile=compile,
            horizon=len(self.workload.predicted),
            weight_rule=self._weight_rule,
        )
        simulation = Simulation(
            self.workload, cache, self.costs, timeline=self.timeline, n_steps=n_steps
        )
        return cache.arrays, simulation.run()


class _Replay(_Job):
    """The loop over the machine's clocks, a chunk of steps at a time."""

    engine = Engine.replay
    driver = staticmethod(twin.replay)

    def run(self, *, compile: bool, n_steps: int | None = None) -> tuple[Cache, SimulatedTime]:
        n_steps = self.workload.n_steps if n_steps is None else min(n_steps, self.workload.n_steps)
        policy, cache, clocks = self._parts(n_steps)
        function, given, as_code_takes = self._driver(cache, policy, clocks, compile)
        pieces = self.pieces if compile else None
        outcome = np.zeros(self.context.n_experts, np.int8)
        watch = watch_policy(self.policy.label, self.policy.policy, cache.step)
        routing = as_code_takes(routing_buffers(self.context, self._weight_rule))
        try:
            for first in range(0, n_steps, CHUNK):
                steps = first, min(first + CHUNK, n_steps)
                details = self.workload.details(*steps)
                if pieces and pieces.ready(self.policy, policy, *self._piece(cache, clocks)):
                    # All state is in arrays that both forms share.
                    change = replace(self, in_one_piece=True)
                    function, given, as_code_takes = change._driver(cache, policy, clocks, True)
                    routing = routing_buffers(self.context, self._weight_rule)
                    pieces = None
                with warnings.catch_warnings(), watch:
                    warnings.simplefilter("ignore")
                    function(*given, steps, as_code_takes(details), routing, outcome)
                self.workload.release()
        except Exception as error:
            if compile:
                raise
            step = int(cache.step[0])
            found = broken(self.policy.label, self.policy.policy, error, step)
            if found is error:
                raise
            raise found from error
        return cache, self._clock(cache, clocks)

    def _clock(self, cache: Cache, clocks: replay_state.Clocks) -> SimulatedTime:
        """Where the time went, that of the steps counted by kind included."""
        clock = replay_state.clock_of(clocks)
        if self.kinds is not None:
            self.kinds[:] = clocks.kinds
        if clocks.counted_width >= 0:
            width, staging = clocks.counted_width, cache.staging_buffers
            clock.follow(step_times.time_of(clocks.kinds, width, staging, self.costs))
        return clock

    def _driver(
        self, cache: Cache, policy: Policy, clocks: replay_state.Clocks, compile: bool
    ) -> tuple[Callable[..., Any], tuple[Any, ...], Callable[[Any], Any]]:
        """The function that replays; its arguments but for those of a stretch of steps; and what
        makes of a named tuple what it takes for those."""
        work, costs = replay_state.work_of(self.workload), self.costs
        if not compile:
            return twin.replay, (cache, guarded(policy), work, costs, clocks), _as_it_is
        if self.in_one_piece:
            function, state = piece(policy, self._piece(cache, clocks)[0])
            return function, (cache, state, work, costs, clocks), _as_it_is
        linked = link(cache, policy)
        tables = pointed(work), pointed(costs), pointed(clocks)
        return engine_for(twin.replay, linked), (*linked, *tables), pointed

    def _piece(self, cache: Cache, clocks: replay_state.Clocks) -> tuple[Omit, Callable[[], bool]]:
        """What one piece of code for this run leaves out, and whether it does the same."""
        alike = step_times.all_alike(self.workload)
        omit = twin.unreachable(cache, self.costs, clocks, all_counted=alike)
        return omit, self._same_in_one_piece

    def _same_in_one_piece(self) -> bool:
        trial = self.trial()
        expected = trial.run(compile=False, n_steps=PREFIX)
        trial.in_one_piece = True
        found = trial.run(compile=True, n_steps=PREFIX)
        return _same(_comparable(*found), _comparable(*expected))

    def _parts(self, n_steps: int) -> tuple[Policy, Cache, replay_state.Clocks]:
        policy = self.policy.build(self.context)
        cache = new_cache(self.context, policy, name=self.policy.label)
        n_segments, width = 0, replay_state.NOT_COUNTED
        if self.timeline:
            n_segments = _most_segments(self.workload, self.costs, n_steps)
        else:
            evicts, forced = policy.always_evicts, self.kinds is not None
            width = step_times.counted_width(
                self.workload, self.costs, cache, evicts, forced=forced
            )
        n_keys = self.workload.n_keys
        return policy, cache, replay_state.new_clocks(self.costs, n_keys, n_segments, width)


def _most_segments(workload: Workload, costs: Costs, n_steps: int) -> int:
    """An upper bound: every step may copy, read and compute everything it could want or guess."""
    per_step = 1 + workload.meta.n_experts * 2
    pieces = 2 * max(costs.n_pieces, costs.low_pieces) + 1
    return n_steps * per_step * pieces
