"""Live runs beside the simulator's predictions of them, from this machine's own profile.

The simulator is asked as a user would ask it, by its command: this package does not depend on it.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import torch
from moepolicy import PolicyError, PolicySpec

from moerun.devices import calm_collector
from moerun.errors import RunError, UsageError
from moerun.live.generate import Generated
from moerun.live.recording import LiveRecording
from moerun.live.runner import Runner
from moerun.live.sampling import Sampling
from moerun.policies import CALIBRATION, Refusals, require_some, servable
from moerun.profiling.profiler import Profiler, Turn
from moerun.profiling.undisturbed import calmest
from moerun.settings import Settings
from moerun.store.expert_store import ExpertStore

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
    """Of the time of everything measured, the share spent waiting for a processor, at its worst."""

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
    report: Callable[[str], None] | None = None,
    refused: Refusals | None = None,
) -> list[Comparison]:
    """Run each policy live ``repeats`` times, in turns, and simulate its recorded trace.

    ``machine`` is a profile of this machine, or a machine that moesim knows by name; without one
    the machine is measured, in the same turns. Turns that other programs disturbed are made again,
    twice as many as asked for at most. A policy that cannot run, live or simulated, has no row, but
    its reason in ``refused``. Raises RunError as a run does, and PolicyError where no policy could
    run.
    """
    refused = {} if refused is None else refused
    tell = report or (lambda text: None)  # noqa: ARG005
    if repeats < 1:
        raise UsageError(f"rounds must be 1 or more, not {repeats}")
    policies = servable(policies, refused, low=settings.low is not None)
    with tempfile.TemporaryDirectory(prefix="moerun-fidelity-") as name, ExitStack() as stack:
        folder = Path(name)
        profiler = None
        if machine is None:
            tokens = sampling.max_new_tokens
            profiler = Profiler(store, settings, prompt=prompt, decoded_tokens=tokens)
            stack.enter_context(profiler)
        run = partial(_turn, store, policies, settings, prompt, sampling, folder, profiler, refused)
        turns = calmest(run, repeats, lambda n: tell(f"measuring and running, turn {n}"))
        if profiler:
            machine = folder / "this-machine.toml"
            measured = [turn.found[0] for turn in turns if turn.found[0]]
            profile = profiler.result(machine.stem, measured)
            machine.write_text(profile.to_toml(), encoding="utf-8")
        assert machine is not None
        tell("simulating")
        waited = max(turn.waited for turn in turns)
        rows = []
        for i, policy in enumerate(policies):
            live = [found for turn in turns if (found := turn.found[1][i]) is not None]
            if policy.label in refused:
                continue
            chosen = replace(settings, policy=policy)
            try:
                row = _simulated(store, chosen, machine, _trace(folder, i))
            except RunError as error:
                refused[policy.label] = str(error)
                continue
            rows.append(_comparison(policy, live, row, waited))
        require_some(rows, refused)
        return rows


def _turn(
    store: ExpertStore,
    policies: Sequence[PolicySpec],
    settings: Settings,
    prompt: str,
    sampling: Sampling,
    folder: Path,
    profiler: Profiler | None,
    refused: Refusals,
) -> tuple[Turn | None, list[Generated | None]]:
    """The machine measured once, and each policy run once; None for one that fails."""
    measured = profiler.turn() if profiler else None
    found: list[Generated | None] = []
    for i, policy in enumerate(policies):
        chosen = replace(settings, policy=policy)
        try:
            if policy.label in refused:
                raise PolicyError(refused[policy.label])
            found.append(run_live(store, chosen, prompt, sampling, _trace(folder, i)))
        except PolicyError as error:
            refused[policy.label] = str(error)
            found.append(None)
    require_some([each for each in found if each is not None], refused)
    return measured, found


def _simulated(
    store: ExpertStore, settings: Settings, machine: str | Path, trace: Path
) -> dict[str, Any]:
    """What the simulator makes of a run with these settings."""
    policy = settings.policy
    calibration = (settings.calibration or CALIBRATION) if "counts" in policy.requires else None
    return simulate(
        trace,
        policy.label,
        store.n_experts // 2 if settings.slots is None else settings.slots,
        settings.scope,
        machine,
        low_bytes=settings.low.record_bytes if settings.low else None,
        calibration=calibration,
    )


def _trace(folder: Path, policy: int) -> Path:
    return folder / f"{policy}.parquet"


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
        calm_collector()
        return runner.generation().run(ids, sampling)


def _record(runner: Runner, ids: torch.Tensor, sampling: Sampling, trace: Path) -> None:
    """Recording takes time, so what is recorded is not what is timed."""
    recording = LiveRecording(runner, trace, None, sampling.seed)
    recording.recorder.begin_sequence()
    try:
        runner.generation().run(ids, sampling)
    except BaseException:
        recording.discard()
        raise
    recording.finish()


def simulate(
    trace: Path,
    policy: str,
    slots: int,
    scope: str,
    machine: str | Path,
    *,
    low_bytes: int | None = None,
    calibration: str | None = None,
) -> dict[str, Any]:
    """The row that `moesim compare` gives for one policy."""
    command = [
        *(sys.executable, "-c", "from moesim.cli import main; main()"),
        *("compare", policy, "--trace", str(trace), "--slots", str(slots), "--scope", scope),
        *("--machine", str(machine), "--format", "json", "--no-limits"),
    ]
    if low_bytes is not None:
        command += ["--low-expert-bytes", str(low_bytes)]
    if calibration is not None:
        command += ["--calibration", calibration]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        last = (done.stderr.strip().splitlines() or ["it said nothing"])[-1]
        why = last.removeprefix("error: ")
        raise RunError(f"moesim could not simulate policy '{policy}': {why}")
    row: dict[str, Any] = json.loads(done.stdout)[0]
    return row


def _comparison(
    policy: PolicySpec, live: list[Generated], row: dict[str, Any], waited: float
) -> Comparison:
    # Of several runs of a prefetching policy, the shares of the one in the middle by speed.
    middle = sorted(live, key=lambda run: run.tokens_per_s)[len(live) // 2].totals
    wanted, simulated_wanted = middle.requests, row["requests"]
    return Comparison(
        policy=policy.label,
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
