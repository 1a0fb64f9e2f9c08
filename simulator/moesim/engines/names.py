"""The engines by name; the command line imports no more of them."""

from __future__ import annotations

from enum import StrEnum


class Engine(StrEnum):
    """What replays a workload. All give the same results: SimPy slowly, with an event for each
    decision, the replay fast. "auto" takes the replay where nothing observes the events."""

    auto = "auto"
    simpy = "simpy"
    replay = "replay"
