"""The expected failures of this package: one line that names the thing and what to do."""


class RunError(ValueError):
    """A model, store, budget or option that cannot be run; the message is shown as it is."""
