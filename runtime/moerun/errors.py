"""The expected failures of this package: one line that names the thing and what to do."""

from __future__ import annotations

from moepolicy.console import WrongUsage


class RunError(ValueError):
    """A model, store, budget or option that cannot be run; the message is shown as it is."""


class UsageError(RunError, WrongUsage):
    """An option or setting whose value is wrong for every machine and model."""


def as_error(error: BaseException) -> Exception:
    """What a thread tells of any end of its work: SystemExit and the like would end it alone."""
    if isinstance(error, Exception):
        return error
    told = f" ({error})" if str(error) else ""
    return RunError(f"a copy's thread was ended by {type(error).__name__}{told}")
