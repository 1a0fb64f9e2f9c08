"""Policies that try a sweep's patience: slow ones, and some that take their worker down."""

from __future__ import annotations

import os
import signal
import sys
import time
from pathlib import Path
from typing import Any

from moepolicy import Context, Policy


class First(Policy):
    """Evicts the lowest key."""

    def victim(self, layer: int, incoming: int, candidates: Any) -> int:
        return int(candidates[0])


class Slow(First):
    """Takes ``ms`` to begin."""

    def __init__(self, context: Context, ms: int = 300) -> None:
        time.sleep(ms / 1000)


class Deadly(First):
    """Has its worker killed: ``times`` times (a file in ``where`` counts), with ``slots`` only."""

    def __init__(self, context: Context, where: str = ".", times: int = 1, slots: int = 1) -> None:
        deaths = Path(where, "deaths")
        before = len(deaths.read_text()) if deaths.exists() else 0
        if context.slots == slots and before < times:
            deaths.write_text("x" * (before + 1))
            os.kill(os.getpid(), signal.SIGKILL)


class Faulty(First):
    """Breaks where the cache has ``slots`` slots."""

    def __init__(self, context: Context, slots: int = 1) -> None:
        if context.slots == slots:
            raise RuntimeError(f"cannot live with {slots}")


class Talking(First):
    """Says something every time."""

    def __init__(self, context: Context) -> None:
        print("policy 'talking' has been made", file=sys.stderr)


class Staging(First):
    """Has as many staging buffers as it is told."""

    def __init__(self, context: Context, buffers: int = 1) -> None:
        self.staging = buffers
