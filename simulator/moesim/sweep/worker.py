"""Runs the points of a sweep, in a process of this machine or on a node of a cluster."""

from __future__ import annotations

import contextlib
import io
import os
import platform
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from moepolicy import Context, PolicyError, PolicySpec, find_policy
from moepolicy.blame import is_failure
from moepolicy.versions import installed
from moeroute import TraceError, open_trace

from moesim import __version__
from moesim.engines.compilations import Compilations
from moesim.engines.names import Engine
from moesim.engines.onepass import Decisions, decide, timeless
from moesim.errors import MissingSize, SimulationError
from moesim.machine.costs import costs_of
from moesim.machine.profile import Machine
from moesim.machine.speed import with_constants
from moesim.simulation import simulate
from moesim.sizes import sizes_of
from moesim.sweep.digests import code_digest
from moesim.sweep.point import NamedPolicy, SweepJob, SweepPoint, TraceSource
from moesim.sweep.shared_workloads import shared_workload
from moesim.workload.loading import load_workload
from moesim.workload.steps import Workload

PACKAGES = ("numpy", "numba", "polars", "simpy")
EXPECTED = (PolicyError, SimulationError, TraceError, OSError)


def one_thread() -> None:
    """Keep libraries to one thread, as there is a worker for every core. Call before importing
    them."""
    for name in ("POLARS_MAX_THREADS", "OMP_NUM_THREADS", "NUMBA_NUM_THREADS"):
        os.environ.setdefault(name, "1")


@dataclass(frozen=True)
class Outcome:
    """A point's row, or the error that it failed with; ``notes`` are the messages meanwhile.

    ``refused``: the error is of something that the policy needs and does not get.
    """

    row: dict[str, Any] | None
    error: str | None = None
    notes: tuple[str, ...] = ()
    refused: bool = False


class SweepWorker:
    """Runs points one at a time. Keeps one workload, and the class of every policy that it has met.

    ``node`` is the name that messages use where a trace cannot be found.
    """

    def __init__(self, job: SweepJob, scratch: Path, node: str | None = None) -> None:
        self.job = job
        self.scratch = scratch
        self.node = node
        self._held: tuple[int, Workload | str] | None = None
        self._decided: tuple[object, Decisions] | None = None
        self._classes: dict[str, PolicySpec] = {}
        self._compilations = Compilations(on_all_cores=False)  # each core has its worker

    def run(self, point: SweepPoint) -> Outcome:
        """Simulate ``point``; every error becomes the outcome's error."""
        said = io.StringIO()
        try:
            with contextlib.redirect_stderr(said):
                row = self._simulate(point)
        except EXPECTED as error:
            refused = isinstance(error, PolicyError | MissingSize) and not is_failure(error)
            return Outcome(None, " ".join(str(error).split()), _lines(said), refused)
        except Exception as error:
            return Outcome(None, f"{_where(error)}: {error!r}", _lines(said))
        return Outcome(row, None, _lines(said))

    def _simulate(self, point: SweepPoint) -> dict[str, Any]:
        workload = self._workload(point.trace)
        policy = self._policy(point.policy)
        machine = self.job.machines[point.machine]
        slots = point.slots
        if slots is None:
            assert point.memory_bytes is not None
            sizes = sizes_of(workload.meta, point.expert_bytes, point.low_bytes)
            context = with_constants(workload.context(0, point.scope), machine, sizes)
            slots = slots_in(point.memory_bytes, point.expert_bytes, policy, context)
        result = simulate(
            workload,
            policy,
            machine,
            slots=slots,
            scope=point.scope,
            expert_bytes=point.expert_bytes or None,
            low_bytes=point.low_bytes,
            engine=Engine(self.job.engine),
            decisions=self._decisions(point, workload, policy, machine, slots),
            cold=self.job.cold,
            limits=self.job.limits,
            compilations=self._compilations,
        )
        return result.row() | {"engine": self.job.engine} | versions()

    def _decisions(
        self,
        point: SweepPoint,
        workload: Workload,
        policy: PolicySpec,
        machine: Machine,
        slots: int,
    ) -> Decisions | None:
        """The policy's decisions, where they do not depend on the machine and several points ask
        for them; kept until a point asks for other decisions."""
        job, scope = self.job, point.scope
        if (
            job.timings < 2
            or not point.expert_bytes
            or job.cold
            or Engine(job.engine) is Engine.simpy
        ):
            return None
        if not timeless(workload, policy, machine, slots, scope):
            return None
        key = point.trace, point.policy, scope, slots
        if self._decided is None or self._decided[0] != key:
            sizes = sizes_of(workload.meta, point.expert_bytes)
            costs = costs_of(workload, machine, sizes, predicting=False)
            self._decided = (
                key,
                decide(workload, policy, costs, slots, scope, compilations=self._compilations),
            )
        return self._decided[1]

    def _policy(self, number: int) -> PolicySpec:
        policy = self.job.policies[number]
        if policy.name not in self._classes:
            with _source_file(policy) as name:
                self._classes[policy.name] = find_policy(name)
        found = self._classes[policy.name]
        if found.policy.made_of:
            return found  # its name has the parameters of its parts
        return PolicySpec(policy.name, found.policy, dict(policy.parameters))

    def _workload(self, number: int) -> Workload:
        """The workload of a trace; a trace that cannot be read is not tried for every point."""
        if self._held is None or self._held[0] != number:
            self._held = None  # or two of them would be in memory
            self._held = (number, self._load(self.job.traces[number]))
        workload = self._held[1]
        if isinstance(workload, str):
            raise SimulationError(workload)
        return workload

    def _load(self, source: TraceSource) -> Workload | str:
        name = f"{source.digest[:16]}-{source.predictions:d}{source.logits:d}"
        name += f"{source.token_ids:d}{source.rows:d}"
        try:
            workload = shared_workload(self.scratch, name, lambda to: read_source(source, to))
        except EXPECTED as error:
            return f"on node {self.node}: {error}" if self.node else str(error)
        workload = workload.sized(source.meta)
        shape = workload.meta.n_layers, workload.meta.n_experts
        calibration = self.job.calibration
        # Of another shape, it is for another of the traces.
        if calibration is None or calibration.counts.shape != shape:
            return workload
        return workload.calibrated(calibration.counts)


def slots_in(memory_bytes: int, expert_bytes: int, policy: PolicySpec, context: Context) -> int:
    """Slots a layer that fit a budget together with the policy's staging buffers. ``context`` is
    the cache that the policy is made for, but for its slots.

    Raises SimulationError where the budget does not hold the staging buffers.
    """
    # Staging may depend on the parameters and the trace, so a policy is made to ask it.
    staging = policy.build(context).staging
    if memory_bytes < staging * expert_bytes:
        raise SimulationError(
            f"{memory_bytes:,} bytes are too small for the {staging} staging buffers of policy "
            f"'{policy.label}' with experts of {expert_bytes:,} bytes: the least that works is "
            f"{staging * expert_bytes:,}, and each slot in all {context.n_layers} layers takes "
            f"{context.n_layers * expert_bytes:,} more"
        )
    free = memory_bytes // expert_bytes - staging
    return min(free // context.n_layers, context.n_experts)


def read_source(source: TraceSource, folder: Path) -> None:
    """Load a trace into ``folder``.

    Raises SimulationError if the trace is not the one that the sweep was planned with.
    """
    trace = open_trace(source.place)
    # The digest of a remote trace means fetching all of it once more, and every node sees the
    # same object.
    if isinstance(trace.path, Path) and trace.digest != source.digest:
        raise SimulationError(
            f"{source.place} is not the trace the sweep began with: its digest is"
            f" {trace.digest[:12]}, not {source.digest[:12]}"
        )
    load_workload(
        trace,
        logits=source.logits,
        predictions=source.predictions,
        token_ids=source.token_ids,
        rows=source.rows,
        folder=folder,
    )


@cache
def versions() -> dict[str, str | None]:
    """Columns with the versions that a row was computed with."""
    found: dict[str, str | None] = {"moesim_version": __version__, "moesim_sha256": code_digest()}
    found["python_version"] = platform.python_version()
    there = installed(PACKAGES)
    found |= {f"{package}_version": there.get(package) for package in PACKAGES}
    return found


@contextlib.contextmanager
def _source_file(policy: NamedPolicy) -> Iterator[str]:
    """The spec to find a policy by. One that came from a file may be far from that file."""
    if policy.code is None:
        yield policy.name
        return
    path, _, cls = policy.name.rpartition(":")
    file = Path(path)
    if file.is_file() and file.read_text(encoding="utf-8") == policy.code:
        yield policy.name
        return
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder, file.name)
        copy.write_text(policy.code, encoding="utf-8")
        yield f"{copy}:{cls}"


def _lines(text: io.StringIO) -> tuple[str, ...]:
    return tuple(line for line in text.getvalue().splitlines() if line.strip())


def _where(error: BaseException) -> str:
    """The place an unexpected error came from, for a message of one line."""
    frame = error.__traceback__
    while frame is not None and frame.tb_next is not None:
        frame = frame.tb_next
    if frame is None:
        return "somewhere"
    code = frame.tb_frame.f_code
    return f"{code.co_filename}:{frame.tb_lineno}"
