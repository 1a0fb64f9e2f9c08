"""What must be settled before any test module is imported."""

from __future__ import annotations

import os
import random
import signal
import sys

import numpy as np
import pytest
from hypothesis import settings

# A run finds what the run before it found: whoever changes a line is told of that line. `make
# explore` draws other examples each time.
settings.register_profile("repeatable", derandomize=True)
settings.register_profile("explore", derandomize=False, print_blob=True)


def pytest_configure(config: pytest.Config) -> None:
    if not config.getoption("hypothesis_profile"):
        settings.load_profile("repeatable")
    os.environ["COLUMNS"] = "100"  # tables are as wide as the terminal
    # A shell without job control starts what it runs in the background with SIGINT ignored, and
    # processes hand that on: those that tests interrupt would not hear it.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    if config.getoption("markexpr") != "gpu":
        # Triton's interpreter runs the GPU's kernels. It is asked for where a kernel is defined,
        # Triton's own included, and some libraries import those.
        os.environ["TRITON_INTERPRET"] = "1"


@pytest.fixture(autouse=True)
def _seeded() -> None:
    """Whatever a test draws without a seed of its own, it draws in every run."""
    random.seed(0)
    np.random.seed(0)
    if torch := sys.modules.get("torch"):
        torch.manual_seed(0)
