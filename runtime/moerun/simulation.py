"""What the simulator says, asked as a user would ask it, by its command.

moerun does not depend on moesim: where it is not installed, asking is an error.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tomllib
from collections.abc import Sequence
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

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
        *("compare", policy, "--trace", str(trace), "--machine", str(machine)),
        *("--slots", str(slots), "--scope", scope, "--format", "json", *more),
    ]
    if low_bytes is not None:
        command += ["--low-expert-bytes", str(low_bytes)]
    if calibration is not None:
        command += ["--calibration", calibration]
    return _asked(command, f"moesim could not simulate policy '{policy}'")


class Speed(NamedTuple):
    """What policies may know of a machine's speed, as `moepolicy.Context` has it."""

    copy_over_layer: float
    gates_over_layer: float


@cache
def speed_of(
    machine: str, *, expert_bytes: int, expert_params: int, layer_bytes: int | None, top_k: int
) -> Speed:
    """The speed of ``machine``, a profile or a name, with a model.

    ``layer_bytes`` are a layer's other weights. Raises RunError with the simulator's message where
    the profile cannot be read, and where it does not say.
    """
    command = ["machines", machine, "--expert-bytes", str(expert_bytes), "--format", "json"]
    command += ["--expert-params", str(expert_params), "--top-k", str(top_k)]
    if layer_bytes:
        command += ["--dense-layer-bytes", str(layer_bytes)]
    row = _asked(command, "moesim could not read --machine")
    found = [row[name] for name in Speed._fields]
    if None in found:
        raise RunError(f"--machine {machine} does not say how long this model's layers take")
    return Speed(*map(float, found))


def check_profile(path: Path) -> None:
    """RunError with the simulator's message where a file is no machine's profile.

    Where the simulator is not installed, only whether it is TOML.
    """
    try:
        tomllib.loads(path.read_text(encoding="utf-8"))
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise RunError(f"--machine {path} is not a machine profile: {error}") from None
    if find_spec("moesim") is not None:
        _asked(["machines", str(path), "--format", "json"], "--machine")


def _asked(command: Sequence[str], failed: str) -> dict[str, Any]:
    """The first row that a command of moesim prints; RunError, which begins with ``failed``."""
    whole = [sys.executable, "-c", "from moesim.cli import main; main()", *command]
    done = subprocess.run(whole, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        last = (done.stderr.strip().splitlines() or ["it said nothing"])[-1]
        raise RunError(f"{failed}: {last.removeprefix('error: ')}")
    row: dict[str, Any] = json.loads(done.stdout)[0]
    return row
