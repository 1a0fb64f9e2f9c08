"""What must be settled before any test module is imported."""

from __future__ import annotations

import os
import signal

import pytest


def pytest_configure(config: pytest.Config) -> None:
    os.environ["COLUMNS"] = "100"  # tables are as wide as the terminal
    # A shell without job control starts what it runs in the background with SIGINT ignored, and
    # processes hand that on: those that tests interrupt would not hear it.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    if config.getoption("markexpr") != "gpu":
        # Triton's interpreter runs the GPU's kernels. It is asked for where a kernel is defined,
        # Triton's own included, and some libraries import those.
        os.environ["TRITON_INTERPRET"] = "1"
