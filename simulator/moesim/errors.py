"""The simulator's expected failures."""

from __future__ import annotations

from moepolicy.console import WrongUsage


class SimulationError(ValueError):
    """A simulation that cannot be run as asked: the message says what, where and what to do."""


class MissingSize(SimulationError):
    """A simulation that depends on a size which the trace does not have."""


class UsageError(SimulationError, WrongUsage):
    """An option or setting whose value is wrong for every trace and machine."""
