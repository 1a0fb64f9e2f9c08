"""Lack of memory: what is told of it, and commands under a limit of their address space."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from pathlib import Path

import pytest
from moepolicy import console, shortage

resource = pytest.importorskip("resource")
MIB = shortage.MIB
ON_LINUX = pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")


def caused(error: Exception, cause: BaseException) -> Exception:
    error.__cause__ = cause
    return error


@pytest.mark.parametrize(
    ("error", "says"),
    [
        (MemoryError(), ""),
        (caused(RuntimeError("cannot be built"), MemoryError("9 GiB")), ": 9 GiB"),
        (
            ImportError("libtorch_cpu.so: failed to map segment from shared object"),
            ": libtorch_cpu.so: failed to map segment from shared object",
        ),
        (
            ImportError("\n\nIMPORTANT: READ\n\nx.so: failed to map segment from shared object\n"),
            ": x.so: failed to map segment from shared object",
        ),
        (
            caused(OSError("no libllvmlite.so"), OSError("l.so: failed to map segment")),
            ": l.so: failed to map segment",
        ),
        (RuntimeError("std::bad_alloc"), ": std::bad_alloc"),
        (RuntimeError("OS can't spawn worker thread: os error 11"), ": OS can't spawn worker"),
    ],
)
def test_a_lack_of_memory_shows_in_errors_and_their_causes(error: Exception, says: str) -> None:
    told = shortage.told_of(error)
    assert told is not None
    assert told.startswith(f"there is not enough memory{says}")
    assert "\n" not in told


@pytest.mark.parametrize("left", [None, 4 * shortage.HARDLY_ANY_BYTES])
def test_a_defect_is_none(left: int | None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shortage, "left_bytes", lambda: left)
    assert shortage.told_of(ValueError("a defect")) is None


def test_causes_that_are_a_ring_have_an_end() -> None:
    one, other = ValueError("one"), ValueError("other")
    one.__cause__, other.__cause__ = other, one
    assert shortage.told_of(one) is None


def test_any_error_is_one_where_a_limit_leaves_next_to_nothing(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(shortage, "left_bytes", lambda: 3 * MIB)
    told = (
        "SyntaxError: expected ':' (there is not enough memory: the limit (ulimit -v) leaves 3 MiB)"
    )
    assert shortage.told_of(SyntaxError("expected ':'")) == told


@pytest.mark.parametrize(("left", "ends"), [(3 * MIB, "leaves 3 MiB)\n"), (None, "no model\n")])
def test_a_refusal_says_so_where_next_to_nothing_is_left(
    left: int | None,
    ends: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """What a file is refused for may be what a library made of the lack."""
    monkeypatch.setattr(shortage, "left_bytes", lambda: left)
    monkeypatch.setattr(sys, "unraisablehook", sys.unraisablehook)  # put back at the end

    def command() -> None:
        raise console.CommandError("no model")

    with pytest.raises(SystemExit):
        console.run(command, errors=tuple)
    assert capsys.readouterr().err.endswith(ends)


@pytest.mark.parametrize(("left", "says"), [(3 * MIB, False), (900 * MIB, True)])
def test_errors_that_nothing_can_catch_are_left_out_where_memory_lacks(
    left: int, says: bool, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    class Ends:
        def __del__(self) -> None:
            raise ValueError("at its end")

    monkeypatch.setattr(shortage, "left_bytes", lambda: left)
    monkeypatch.setattr(sys, "unraisablehook", sys.__unraisablehook__)
    monkeypatch.setattr(shortage, "_BALLAST", [])
    shortage.prepare()
    one = Ends()
    del one
    assert ("at its end" in capsys.readouterr().err) == says


def limited(mib: int, *command: str) -> subprocess.CompletedProcess[str]:
    """A command under a limit of its address space."""
    begin = (
        "import resource, sys, runpy;"
        f"resource.setrlimit(resource.RLIMIT_AS, ({mib * MIB}, {mib * MIB}));"
        f"sys.argv = {list(command)!r};"
        f"from {command[0]}.cli import main; main()"
    )
    return subprocess.run(
        [sys.executable, "-c", begin], check=False, capture_output=True, text=True, timeout=300
    )


@ON_LINUX
@pytest.mark.parametrize("mib", [400, 700, 1_000])
@pytest.mark.parametrize(
    "command",
    [
        ("moetrace", "stats", "tiny"),
        ("moesim", "compare", "lru", "--slots", "4", "--trace", "tiny"),
    ],
)
def test_a_command_says_what_polars_needs(command: tuple[str, ...], mib: int) -> None:
    ran = limited(mib, *command)
    assert ran.returncode == 1
    assert ran.stderr.startswith("error: there is not enough memory: polars needs ")
    assert ran.stderr.count("\n") == 1
    assert "the limit (ulimit -v) leaves " in ran.stderr


@ON_LINUX
@pytest.mark.skipif(not importlib.util.find_spec("torch"), reason="needs torch")
def test_a_library_that_cannot_be_loaded_is_told_in_one_line(tmp_path: Path) -> None:
    ran = limited(300, "moerun", "generate", "--prompt", "It", "--model", "tiny")
    assert ran.returncode == 1
    assert ran.stderr.startswith("error: there is not enough memory: ")
    assert "failed to map segment" in ran.stderr
    assert ran.stderr.count("\n") == 1


@ON_LINUX
def test_a_limit_that_leaves_enough_refuses_nothing() -> None:
    ran = limited(1 << 16, "moetrace", "stats", "tiny", "--format", "json")
    assert (ran.returncode, ran.stderr) == (0, "")
    assert ran.stdout


TAKES = """
import resource, sys
from pathlib import Path
import numpy
def used():
    return int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
before = used()
import polars as pl
pl.DataFrame({"a": numpy.arange(1000)}).write_parquet(sys.argv[1])
pl.scan_parquet(sys.argv[1]).select(pl.col("a").sum()).collect(engine="streaming")
print(used() - before)
"""


@ON_LINUX
@pytest.mark.parametrize("threads", ["1", "2", "4", "16"])
def test_polars_needs_what_it_takes(
    threads: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("POLARS_MAX_THREADS", threads)
    command = [sys.executable, "-c", TAKES, str(tmp_path / "t.parquet")]
    takes = int(subprocess.check_output(command, timeout=300))
    assert 0.6 * shortage.polars_needs_bytes() <= takes <= shortage.polars_needs_bytes()
