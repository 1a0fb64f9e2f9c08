"""A checkpoint to pack."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from support.stores import TINY


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    """A copy of the bundled model, to be changed."""
    return Path(shutil.copytree(TINY, tmp_path / "model"))
