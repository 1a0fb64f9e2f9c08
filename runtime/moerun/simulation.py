"""What the simulator says, asked as a user would ask it, by its command.

moerun does not depend on moesim: where it is not installed, asking is an error.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from moerun.errors import RunError


def simulated_row(
    policy: str,
    trace: Path,
    machine: str | Path,
    *,
    slots: int,
    scope: str,
    low_bytes: int | None = None,
    calibration: str | None = None,
    more: Sequence[str] = (),
) -> dict[str, Any]:
    """The row that `moesim compare` gives for one policy; ``more`` are further arguments.

    ``low_bytes`` is the size of an expert at the lower precision. Raises RunError with the
    simulator's message where it fails.
    """
    command = [
        *(sys.executable, "-c", "from moesim.cli import main; main()"),
        *("compare", policy, "--trace", str(trace), "--machine", str(machine)),
        *("--slots", str(slots), "--scope", scope, "--format", "json", *more),
    ]
    if low_bytes is not None:
        command += ["--low-expert-bytes", str(low_bytes)]
    if calibration is not None:
        command += ["--calibration", calibration]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        last = (done.stderr.strip().splitlines() or ["it said nothing"])[-1]
        why = last.removeprefix("error: ")
        raise RunError(f"moesim could not simulate policy '{policy}': {why}")
    row: dict[str, Any] = json.loads(done.stdout)[0]
    return row
