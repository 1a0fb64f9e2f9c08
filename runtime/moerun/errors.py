"""The expected failures of this package: one line that names the thing and what to do."""

from __future__ import annotations

from moepolicy.console import WrongUsage


class RunError(ValueError):
    """A model, store, budget or option that cannot be run; the message is shown as it is."""


class UsageError(RunError, WrongUsage):
    """An option or setting whose value is wrong for every machine and model."""
