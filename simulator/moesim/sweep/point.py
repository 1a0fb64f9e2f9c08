"""A point of a sweep, and the data that travels to the workers with it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from moeroute.schema import TraceMeta
from numpy.typing import NDArray

from moesim.machine.profile import Machine


@dataclass(frozen=True)
class TraceSource:
    """A trace of the grid: its name in the grid, its place, its digest, and the columns that are
    read.

    ``meta`` is the trace's own with the sizes that the grid gives, unless ``refused`` says why
    those do not fit the trace.
    """

    meta: TraceMeta
    refused: str | None
    path: str
    place: str
    digest: str
    seed: int | None
    predictions: bool
    logits: bool
    token_ids: bool
    rows: bool


@dataclass(frozen=True)
class SweepPoint:
    """One simulation. ``trace``, ``policy`` and ``machine`` are numbers in the plan's lists.

    A cache has ``slots`` a layer, or where ``slots`` is None as many as ``memory_bytes`` holds.
    ``key`` names everything that the result depends on; ``refused`` says why a point cannot run.
    ``expert_bytes`` is 0 where the size of an expert is unknown: the result then has no times. A
    ``reference`` is not a point of the grid and has no row: other points are compared with it.
    """

    key: str
    trace: int
    policy: int
    machine: int
    scope: str
    slots: int | None
    memory_bytes: int | None
    expert_bytes: int
    precision: str | None
    low_bytes: int = 0  # of an expert in a second store, where the policy requires one
    refused: str | None = None
    reference: bool = False


@dataclass(frozen=True)
class NamedPolicy:
    """A policy as it travels to workers: its spec, and its code if it is in a file.

    ``digest`` is that of the file with the policy's class.
    """

    name: str
    parameters: Mapping[str, int | float | str]
    label: str
    code: str | None
    digest: str | None
    needs_future: bool


@dataclass(frozen=True)
class Calibration:
    """How often a trace uses each expert, int64[n_layers, n_experts], for policies that read
    counts."""

    counts: NDArray[np.int64]
    digest: str


@dataclass(frozen=True)
class SweepJob:
    """Everything that a worker needs in order to run any point.

    ``timings`` is the number of points that differ only in the times of their machines.
    """

    traces: tuple[TraceSource, ...]
    policies: tuple[NamedPolicy, ...]
    machines: tuple[Machine, ...]
    engine: str
    cold: bool
    limits: bool
    timings: int
    calibration: Calibration | None
