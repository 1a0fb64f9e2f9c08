"""Sweeps as a user runs them, and policies of a user's own for them."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import polars as pl
from moesim.sweep import Grid, SweepSettings, run_sweep

POLICIES = Path(__file__).parent / "sweep_policies.py"
SWEEP = [sys.executable, "-c", "from moesim.cli import main; main()", "sweep"]


def policy(name: str) -> str:
    return f"{POLICIES}:{name}"


def sweep(*arguments: str | Path, code: int = 0) -> subprocess.CompletedProcess[str]:
    command = [*SWEEP, *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == code, done.stderr
    assert "Traceback" not in done.stderr
    return done


def swept(grid: Grid, out: Path, **settings: Any) -> pl.DataFrame:
    run_sweep(grid, str(out), SweepSettings(**settings))
    return pl.read_parquet(out)
