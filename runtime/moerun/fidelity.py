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
from pathlib import Path
from statistics import median
from typing import Any

import torch
from moepolicy import PolicySpec

from moerun.devices import calm_collector
from moerun.errors import RunError
from moerun.generate import Generated, Sampling, encode
from moerun.model import load_tokenizer
from moerun.profile import Profiler
from moerun.record import LiveRecording
from moerun.runner import Runner, Settings
from moerun.servable import refuse_unservable
from moerun.store import ExpertStore

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
    repeats: int = 3,
    machine: Path | None = None,
    report: Callable[[str], None] | None = None,
) -> list[Comparison]:
    """Run each policy live ``repeats`` times, in turns, and simulate its recorded trace.

    ``machine`` is a profile of this machine; without one it is measured first. Raises RunError
    and PolicyError as a run does, and RunError with the simulator's message when it fails.
    """
    tell = report or (lambda text: None)  # noqa: ARG005
    if repeats < 1:
        raise RunError(f"repeats must be 1 or more, not {repeats}")
    for policy in policies:
        refuse_unservable(policy, low=settings.low is not None)
    with tempfile.TemporaryDirectory(prefix="moerun-fidelity-") as name, ExitStack() as stack:
        folder = Path(name)
        profiler = None
        if machine is None:
            lengths = _prompt_tokens(store, prompt), sampling.max_new_tokens
            profiler = stack.enter_context(Profiler(store, settings, lengths=lengths))
        runs: list[list[Generated]] = [[] for _ in policies]
        for repeat in range(1, repeats + 1):
            if profiler:
                tell(f"measuring this machine, {repeat} of {repeats}")
                profiler.turn()
            for i, policy in enumerate(policies):
                tell(f"live run {repeat} of {repeats}: {policy.label}")
                chosen = replace(settings, policy=policy)
                runs[i].append(run_live(store, chosen, prompt, sampling, _trace(folder, i)))
        if profiler:
            machine = folder / "this-machine.toml"
            machine.write_text(profiler.result(machine.stem).to_toml(), encoding="utf-8")
        assert machine is not None
        tell("simulating")
        return _beside_simulated(policies, runs, folder, settings, machine, store.n_experts // 2)


def _beside_simulated(
    policies: Sequence[PolicySpec],
    runs: list[list[Generated]],
    folder: Path,
    settings: Settings,
    machine: Path,
    default_slots: int,
) -> list[Comparison]:
    slots = default_slots if settings.slots is None else settings.slots
    return [
        _comparison(
            policy,
            live,
            simulate(
                _trace(folder, i),
                policy.label,
                slots,
                settings.scope,
                machine,
                low_bytes=settings.low.record_bytes if settings.low else None,
            ),
        )
        for i, (policy, live) in enumerate(zip(policies, runs, strict=True))
    ]


def _trace(folder: Path, policy: int) -> Path:
    return folder / f"{policy}.parquet"


def _prompt_tokens(store: ExpertStore, prompt: str) -> int:
    return encode(load_tokenizer(store.path), prompt, torch.device("cpu")).shape[1]


def run_live(
    store: ExpertStore, settings: Settings, prompt: str, sampling: Sampling, trace: Path
) -> Generated:
    """One run from a cold cache, its trace written to ``trace``."""
    with Runner(store, settings) as runner:
        ids = runner.encode(prompt)
        runner.generation().run(ids, replace(sampling, max_new_tokens=WARM_UP_TOKENS))
        runner.session.settle()
        calm_collector()
        recording = LiveRecording(runner, trace, None, sampling.seed)
        runner.session.wait_compiled()
        recording.recorder.begin_sequence()
        try:
            generated = runner.generation().run(ids, sampling)
        except BaseException:
            recording.discard()
            raise
        recording.finish()
        return generated


def simulate(
    trace: Path,
    policy: str,
    slots: int,
    scope: str,
    machine: Path,
    *,
    low_bytes: int | None = None,
) -> dict[str, Any]:
    """The row that `moesim compare` gives for one policy."""
    command = [
        *(sys.executable, "-c", "from moesim.cli import main; main()"),
        *("compare", policy, "--trace", str(trace), "--slots", str(slots), "--scope", scope),
        *("--machine", str(machine), "--format", "json", "--no-limits"),
    ]
    if low_bytes is not None:
        command += ["--low-expert-bytes", str(low_bytes)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        last = (done.stderr.strip().splitlines() or ["it said nothing"])[-1]
        raise RunError(f"moesim could not simulate policy '{policy}': {last}")
    row: dict[str, Any] = json.loads(done.stdout)[0]
    return row


def _comparison(policy: PolicySpec, live: list[Generated], row: dict[str, Any]) -> Comparison:
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
    )
