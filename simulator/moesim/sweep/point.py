"""A point of a sweep, and what travels to the workers with it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from moeroute.schema import TraceMeta
from numpy.typing import NDArray

from moesim.machine.profile import Machine


@dataclass(frozen=True)
class TraceSource:
    """A trace of the grid: its name there, where it is, what it must be, what is read of it.

    ``meta`` is its own with the sizes that the grid gives it, unless ``refused`` says why those
    cannot be its.
    """

    meta: TraceMeta
    refused: str | None
    path: str
    place: str
    digest: str
    seed: int | None
    predictions: bool
    logits: bool


@dataclass(frozen=True)
class SweepPoint:
    """One simulation. ``trace``, ``policy`` and ``machine`` number the plan's.

    A cache has ``slots`` a layer or, where that is None, what ``memory_bytes`` holds. ``key``
    names everything the result depends on; ``refused`` says why a point cannot run.
    ``expert_bytes`` is 0 where nothing says how big an expert is: its result has no times. A
    ``reference`` is none of the grid's: others are measured from it, and it is no row.
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
    """A policy as it travels to workers: its spec, and its code where that is a file's.

    ``digest`` is of the file that its class is in.
    """

    name: str
    parameters: Mapping[str, int | float | str]
    label: str
    code: str | None
    digest: str | None
    needs_future: bool


@dataclass(frozen=True)
class Calibration:
    """How often a trace uses each expert, int64[n_layers, n_experts], for policies that ask."""

    counts: NDArray[np.int64]
    digest: str


@dataclass(frozen=True)
class SweepJob:
    """What every worker must know to run any point.

    ``timings`` is how many points differ only in what takes how long.
    """

    traces: tuple[TraceSource, ...]
    policies: tuple[NamedPolicy, ...]
    machines: tuple[Machine, ...]
    engine: str
    cold: bool
    limits: bool
    timings: int
    calibration: Calibration | None
