"""Have other processes compile a part of what a command needs, while it compiles the rest."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Sequence
from contextlib import suppress

from moepolicy.codecache import share_code

STARTING_S = 1.5  # until a process has imported what it compiles with
COMPILING_S = {"machine": 7.0, "replay": 3.2, "limits": 2.0, "calls": 1.0}
HOOKS_S = 0.4  # of one policy


def shared_out(units: Sequence[str], own: Sequence[str] = ()) -> list[list[str]]:
    """``units`` of `moesim.ahead` by who is to compile them: first what this process does in
    addition to ``own``, then what each of the others does, of which there are as many as pay.

    The longest are given away first, each to whoever would be done with it soonest.
    """

    def takes_s(unit: str) -> float:
        return COMPILING_S.get(unit, HOOKS_S)

    shares: list[list[str]] = [[]]
    busy_s = [sum(map(takes_s, own))]
    for unit in sorted(units, key=takes_s, reverse=True):
        if len(shares) < (os.cpu_count() or 1):
            shares.append([])
            busy_s.append(STARTING_S)
        soonest = min(range(len(shares)), key=busy_s.__getitem__)
        shares[soonest].append(unit)
        busy_s[soonest] += takes_s(unit)
        if not shares[-1] and len(shares) > 1:  # none of these has to be started
            shares.pop()
            busy_s.pop()
    return shares


class CompileProcess:
    """A process that compiles ``units`` of `moesim.ahead`; none where there is one core."""

    def __init__(self, units: Sequence[str]) -> None:
        share_code()
        self._process: subprocess.Popen[bytes] | None = None
        if units and (os.cpu_count() or 1) > 1:
            # What it could say would be said here again, by whoever compiles what it did not. Where
            # no process can be started, that is this one.
            with suppress(OSError):
                self._process = subprocess.Popen(
                    [sys.executable, "-m", "moesim.ahead", *units],
                    stdin=subprocess.DEVNULL,
                    stdout=subprocess.DEVNULL,
                    stderr=subprocess.DEVNULL,
                )

    def wait(self) -> None:
        """Return when it is done, whether it could or not."""
        if self._process is not None:
            self._process.wait()

    def stop(self) -> None:
        """End it: its work is no longer wanted."""
        if self._process is not None and self._process.poll() is None:
            self._process.terminate()
            self._process.wait()
