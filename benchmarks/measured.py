"""The file of a benchmark that measures CPU time of multiplications, and what made it."""

from __future__ import annotations

import json
import platform
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from moerun.bench.report import hardware
from moerun.versions import run_packages


def write_measured(out: Path, rows: Sequence[dict[str, Any]], *, rounds: int, seed: int) -> None:
    """Write the rows with hardware, packages and settings, as JSON."""
    cpu = hardware(torch.device("cpu"))
    made_by = {
        "kind": "measured, CPU time",
        "rounds": rounds,
        "seed": seed,
        "hardware": cpu | {"avx512_bf16": torch.cpu._is_avx512_bf16_supported()},
        "python": platform.python_version(),
        "packages": run_packages(),
    }
    out.write_text(json.dumps({"rows": rows, **made_by}, indent=1) + "\n", encoding="utf-8")
