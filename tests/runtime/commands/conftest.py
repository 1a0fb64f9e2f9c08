"""The command `moerun` in this process, with a cache that a module's runs share."""

from __future__ import annotations

from pathlib import Path

import pytest
from support.commands import Call, caller


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A user's cache that the module's runs share, so that the model is packed once."""
    return tmp_path_factory.mktemp("home")


@pytest.fixture
def moerun(home: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Call:
    return caller(monkeypatch, capsys, home=home)
