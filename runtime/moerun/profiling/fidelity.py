"""Live runs against the simulator's predictions, from this machine's own profile."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from itertools import count
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

import torch
from moepolicy import PolicyError, PolicySpec
from moepolicy.refusals import Refusals

from moerun.devices import freeze_loaded_objects
from moerun.errors import RunError
from moerun.live.recording import LiveRecording
from moerun.live.runner import Runner
from moerun.live.sampling import Sampling
from moerun.live.work import Generated
from moerun.memory.fit import plan_memory
from moerun.policies import CALIBRATION, require_some, servable
from moerun.profiling.profiler import Profiler, Turn
from moerun.profiling.undisturbed import Measured, least_disturbed
from moerun.ranges import check_rounds
from moerun.settings import Settings
from moerun.simulation import simulated_row
from moerun.store.expert_store import ExpertStore
from moerun.store.progress import Notify, silent

WARM_UP_TOKENS = 8


@dataclass(frozen=True)
class Comparison:
    """One policy, live and simulated. Shares are of the experts wanted; rates are of decoding."""

    policy: str
    slots: int
    live_tokens_per_s: float
    simulated_tokens_per_s: float
    live_hits: float
    simulated_hits: float
    live_late: float
    simulated_late: float
    live_misses: float
    simulated_misses: float
    live_useless: float
    simulated_useless: float
    live_runs: tuple[float, ...]
    """tokens/s of each of the interleaved runs whose median is ``live_tokens_per_s``."""
    waited: float
    """The largest share of a turn's time that was spent waiting for a processor."""
    lossy: bool = False
    """Whether the policy changes what the model computes."""

    @property
    def error(self) -> float:
        """How much faster than live the simulator thinks it is, as a fraction."""
        return self.simulated_tokens_per_s / self.live_tokens_per_s - 1


def compare(
    store: ExpertStore,
    policies: Sequence[PolicySpec],
    settings: Settings,
    prompt: str,
    sampling: Sampling,
    *,
    repeats: int = 5,
    machine: str | Path | None = None,
    report: Notify | None = None,
    refused: Refusals | None = None,
    within_s: float | None = None,
) -> list[Comparison]:
    """Run each policy live ``repeats`` times, in turns, and simulate its recorded trace.

    ``machine`` is a profile of this machine, or a machine that moesim knows by name; without one
    the machine is measured, in the same turns. Turns that other programs disturbed are made again,
    twice as many as asked for at most; none begins that would likely end after ``within_s``
    seconds, but the first. A policy that cannot run, live or simulated, has no row, but
    its reason in ``refused``. Raises RunError as a run does, and PolicyError where no policy could
    run.
    """
    refused = {} if refused is None else refused
    tell = report or silent
    check_rounds(repeats)
    policies = servable(
        policies, refused, low=settings.low is not None, machine=machine is not None
    )
    settings = replace(settings, machine=None if machine is None else str(machine))
    with tempfile.TemporaryDirectory(prefix="moerun-fidelity-") as name, ExitStack() as stack:
        profiler = None
        if machine is None:
            tokens = sampling.max_new_tokens
            profiler = Profiler(store, settings, prompt=prompt, decoded_tokens=tokens)
            stack.enter_context(profiler)
        runs = LiveRuns(store, settings, policies, prompt, sampling, Path(name), refused)
        numbers = count(1)

        def turn() -> LiveTurn:
            of, measured = f"turn {next(numbers)}", None
            if profiler:
                tell(f"{of}: measuring this machine")
                measured = profiler.turn()
            return LiveTurn(measured, runs.turn(lambda policy: tell(f"{of}: {policy}")))

        turns = least_disturbed(turn, repeats, lambda _: None, within_s)
        if profiler:
            machine = _write_profile(profiler, turns, Path(name))
        assert machine is not None
        tell("simulating")
        return _simulate_all(runs, turns, machine)


class LiveTurn(NamedTuple):
    """The machine as measured, if it was, and each policy's run; None for one that failed."""

    measured: Turn | None
    live: list[Generated | None]


@dataclass(frozen=True)
class LiveRuns:
    """Policies that run live in turns; each one's trace is recorded once, in ``folder``.

    A policy that fails joins ``refused`` and runs no more.
    """

    store: ExpertStore
    settings: Settings
    policies: Sequence[PolicySpec]
    prompt: str
    sampling: Sampling
    folder: Path
    refused: Refusals

    def turn(self, report: Notify = silent) -> list[Generated | None]:
        """Each policy run once; None for one that fails. ``report`` is told each one's name.

        Raises PolicyError where all fail.
        """
        found: list[Generated | None] = []
        for number, policy in enumerate(self.policies):
            report(policy.label)
            chosen, trace = self.chosen(policy), self.trace(number)
            try:
                if policy.label in self.refused:
                    raise PolicyError(self.refused[policy.label])
                found.append(run_live(self.store, chosen, self.prompt, self.sampling, trace))
            except PolicyError as error:
                self.refused[policy.label] = str(error)
                found.append(None)
        require_some([each for each in found if each is not None], self.refused)
        return found

    def chosen(self, policy: PolicySpec) -> Settings:
        """The settings of a policy's run."""
        return replace(self.settings, policy=policy)

    def trace(self, number: int) -> Path:
        """Where the trace of the policy with this number is recorded."""
        return self.folder / f"{number}.parquet"


def _write_profile(profiler: Profiler, turns: Sequence[Measured[LiveTurn]], folder: Path) -> Path:
    """The profile of this machine over all turns, as the simulator reads it."""
    machine = folder / "this-machine.toml"
    measured = [turn.found.measured for turn in turns if turn.found.measured]
    profile = profiler.result(machine.stem, measured)
    machine.write_text(profile.to_toml(), encoding="utf-8")
    return machine


def _simulate_all(
    runs: LiveRuns, turns: Sequence[Measured[LiveTurn]], machine: str | Path
) -> list[Comparison]:
    """A row for each policy that ran and can be simulated. PolicyError where there is none."""
    waited = max(turn.waited for turn in turns)
    rows = []
    for number, policy in enumerate(runs.policies):
        if policy.label in runs.refused:
            continue
        live = [run for turn in turns if (run := turn.found.live[number]) is not None]
        try:
            row = _simulated(runs.store, runs.chosen(policy), machine, runs.trace(number))
        except RunError as error:
            runs.refused[policy.label] = str(error)
            continue
        rows.append(_comparison(policy, live, row, waited))
    require_some(rows, runs.refused)
    return rows


def _simulated(
    store: ExpertStore, settings: Settings, machine: str | Path, trace: Path
) -> dict[str, Any]:
    """What the simulator makes of a run with these settings."""
    policy = settings.policy
    calibration = (settings.calibration or CALIBRATION) if "counts" in policy.requires else None
    return simulated_row(
        policy.label,
        trace,
        machine,
        slots=_slots(store, settings),
        scope=settings.scope,
        low_bytes=settings.low.record_bytes if settings.low else None,
        calibration=calibration,
        more=("--no-limits",),
    )


def _slots(store: ExpertStore, settings: Settings) -> int:
    """The slots a layer that a live run with these settings has."""
    if settings.memory_bytes is not None:
        return plan_memory(store, settings).slots
    return store.n_experts // 2 if settings.slots is None else settings.slots


def run_live(
    store: ExpertStore, settings: Settings, prompt: str, sampling: Sampling, trace: Path
) -> Generated:
    """One run from a cold cache, after one whose trace is written to ``trace``, if it is not
    there yet."""
    with Runner(store, settings) as runner:
        ids = runner.encode(prompt)
        if trace.exists():
            runner.generation().run(ids, replace(sampling, max_new_tokens=WARM_UP_TOKENS))
        else:
            _record(runner, ids, sampling, trace)
        runner.session.settle()
        runner.session.reset()
        runner.session.wait_compiled()
        freeze_loaded_objects()
        return runner.generation().run(ids, sampling)


def _record(runner: Runner, ids: torch.Tensor, sampling: Sampling, trace: Path) -> None:
    """Recording takes time, so what is recorded is not what is timed."""
    recording = LiveRecording(runner, trace, None, sampling.seed)
    try:
        runner.generation().run(ids, sampling)
    except BaseException:
        recording.discard()
        raise
    recording.finish()


def _comparison(
    policy: PolicySpec, live: list[Generated], row: dict[str, Any], waited: float
) -> Comparison:
    # Of several runs of a prefetching policy, the shares of the one in the middle by speed.
    middle = sorted(live, key=lambda run: run.tokens_per_s)[len(live) // 2].totals
    wanted, simulated_wanted = middle.requests, row["requests"]
    return Comparison(
        policy=policy.label,
        lossy=policy.policy.lossy,
        slots=row["slots"],
        live_tokens_per_s=median(run.tokens_per_s for run in live),
        simulated_tokens_per_s=row["tokens_per_s"],
        live_hits=middle.hits / wanted,
        simulated_hits=row["hits"] / simulated_wanted,
        live_late=middle.late / wanted,
        simulated_late=row["late"] / simulated_wanted,
        live_misses=middle.misses / wanted,
        simulated_misses=row["misses"] / simulated_wanted,
        live_useless=middle.useless_prefetches / wanted,
        simulated_useless=row["useless_prefetches"] / simulated_wanted,
        live_runs=tuple(run.tokens_per_s for run in live),
        waited=waited,
    )
