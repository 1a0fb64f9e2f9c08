"""The simulator's expected failures."""


class SimulationError(ValueError):
    """A simulation that cannot be run as asked: the message says what, where and what to do."""
