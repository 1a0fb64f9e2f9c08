"""What must be settled before any test module is imported."""

from __future__ import annotations

import os

import pytest


def pytest_configure(config: pytest.Config) -> None:
    os.environ["COLUMNS"] = "100"  # tables are as wide as the terminal
    if config.getoption("markexpr") != "gpu":
        # Triton's interpreter runs the GPU's kernels. It is asked for where a kernel is defined,
        # Triton's own included, and some libraries import those.
        os.environ["TRITON_INTERPRET"] = "1"
