"""What every command tells of a system error."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest
from moepolicy import console


def broken() -> None:
    raise OSError(errno.EIO, os.strerror(errno.EIO))


def read_file(path: Path) -> None:
    with path.open() as file:
        broken()
    assert file


def read_path(path: Path) -> None:
    broken()


@pytest.mark.parametrize("read", [read_file, read_path])
def test_an_error_that_names_no_file_is_told_as_one_of_the_file_in_use(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], read: object
) -> None:
    assert callable(read)
    place, outer = tmp_path / "x.bin", tmp_path / "other.bin"
    place.touch()

    def command() -> None:
        assert outer
        read(place)

    with pytest.raises(SystemExit) as end:
        console.run(command, errors=tuple)
    assert end.value.code == console.FAILED
    assert capsys.readouterr().err == f"error: {place}: Input/output error\n"


def test_an_error_of_no_file_is_told_as_it_is(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        console.run(broken, errors=tuple)
    assert capsys.readouterr().err == "error: Input/output error\n"


@pytest.mark.parametrize(
    ("error", "says"),
    [
        (MemoryError(), "there is not enough memory"),
        (MemoryError("Unable to allocate 9 GiB"), "there is not enough memory: Unable to allocate"),
        (
            RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried"),
            "DefaultCPU",
        ),
        (RuntimeError("can't start new thread"), "there is not enough memory: can't start"),
    ],
)
def test_a_lack_of_memory_is_one_line(
    error: Exception, says: str, capsys: pytest.CaptureFixture[str]
) -> None:
    def command() -> None:
        raise error

    with pytest.raises(SystemExit) as end:
        console.run(command, errors=tuple)
    assert end.value.code == console.FAILED
    told = capsys.readouterr().err
    assert says in told
    assert told.startswith("error: there is not enough memory")
    assert told.count("\n") == 1


def test_a_line_as_long_as_a_file_is_cut(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        console.fail(f"r.npz: damaged (names {'x' * 5000} differ)")
    told = capsys.readouterr().err
    assert told.startswith("error: r.npz: damaged (names xxx")
    assert told.endswith("xxx differ)\n")
    assert len(told) <= 600


def test_other_errors_keep_their_traceback() -> None:
    def command() -> None:
        raise RuntimeError("a defect")

    with pytest.raises(RuntimeError, match="a defect"):
        console.run(command, errors=tuple)
