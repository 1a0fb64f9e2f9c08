"""The first answer of a command, where nothing has been compiled yet, and the second one."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

COMPILING = "compiling the simulator for this machine"


def compare(folder: Path, scratch: Path) -> subprocess.CompletedProcess[str]:
    """A comparison long enough to be compiled, with compiled code kept in ``folder``."""
    command = "from moesim.cli import main; main()"
    arguments = ["compare", "lru", "belady", "--slots", "4", "--tokens", "2000"]
    return subprocess.run(
        [sys.executable, "-c", command, *arguments],
        capture_output=True,
        text=True,
        timeout=280,
        check=False,
        env=os.environ | {"NUMBA_CACHE_DIR": str(folder), "TMPDIR": str(scratch)},
    )


@pytest.mark.slow
def test_the_first_run_says_what_takes_so_long_and_the_second_does_not_take_so_long(
    tmp_path: Path,
) -> None:
    folder = tmp_path / "code"
    first = compare(folder, tmp_path)
    assert first.returncode == 0, first.stderr
    (line,) = first.stderr.splitlines()
    assert line.startswith(COMPILING)
    assert line.endswith(str(folder))
    kept = sorted(file.name for file in folder.iterdir())
    second = compare(folder, tmp_path)
    assert second.stderr == ""
    assert second.stdout == first.stdout
    assert sorted(file.name for file in folder.iterdir()) == kept  # nothing was compiled again


@pytest.mark.slow
def test_where_code_cannot_be_kept_a_run_gives_the_same_answer_and_leaves_nothing(
    tmp_path: Path,
) -> None:
    """A home that cannot be written, as in a container: code is kept while the command runs."""
    (tmp_path / "file").write_text("")
    scratch = tmp_path / "scratch"
    scratch.mkdir()
    done = compare(tmp_path / "file" / "code", scratch)
    assert done.returncode == 0, done.stderr
    (line,) = done.stderr.splitlines()
    assert line.startswith(COMPILING)
    assert "cannot be written: set NUMBA_CACHE_DIR" in line
    assert list(scratch.iterdir()) == []
