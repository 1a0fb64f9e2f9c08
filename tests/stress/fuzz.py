"""Parsers of our own under atheris, which changes bytes by what code they reach.

Atheris is in no extra: ``pip install atheris``. Each parser runs in a process of its own, and keeps
what it has found in a folder, from which the next run goes on.
"""

from __future__ import annotations

import importlib.util
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from stress.forks import forked

MEMORY_MIB = 2048
SLOWEST_S = 20


@dataclass(frozen=True)
class Target:
    """A parser: the module that is watched, what makes its reader, and files to begin with."""

    module: str
    reader: Callable[[], Callable[[bytes], object]]
    begin: Callable[[], list[bytes]]


def _in_file(suffix: str, read: Callable[[Path], object]) -> Callable[[bytes], object]:
    """A parser of files, given bytes. What it refuses in its own way is well."""
    from moepolicy.console import CommandError
    from moeroute import TraceError
    from moerun.errors import RunError

    folder = Path(tempfile.mkdtemp())
    path = folder / f"x{suffix}"

    def call(data: bytes) -> None:
        path.write_bytes(data)
        with suppress(CommandError, RunError, TraceError):
            read(path)
        (folder / "out.parquet").unlink(missing_ok=True)

    return call


def _gguf() -> Callable[[bytes], object]:
    from moerun.checkpoint.gguf.header import read_header

    return _in_file(".gguf", read_header)


def _index() -> Callable[[bytes], object]:
    from moerun.store.index import read_index

    def read(path: Path) -> None:
        path.rename(path.with_name("index.json"))
        read_index(path.parent)

    return _in_file(".json", read)


def _metadata() -> Callable[[bytes], object]:
    from moeroute import TraceError, TraceMeta

    def read(data: bytes) -> None:
        with suppress(TraceError):
            TraceMeta.from_json(data)

    return read


def _import() -> Callable[[bytes], object]:
    from moeroute.importers import import_foreign

    return _in_file(".x", lambda path: import_foreign(path, path.with_name("out.parquet")))


def _recordings() -> list[bytes]:
    from support.recorders import FILES

    return [data for _, _, data, _, _ in FILES.values()]


def _made(make: Callable[[], object], name: str) -> list[bytes]:
    """The file ``name`` that a case of `stress.right_files` writes."""
    with tempfile.TemporaryDirectory() as folder:

        def work() -> None:
            os.chdir(folder)
            make()

        ended = forked(work, Path(folder, "said"))
        assert not ended.how, ended
        return [Path(folder, name).read_bytes()]


def _begin_gguf() -> list[bytes]:
    from stress import right_files

    return [data[: 1 << 16] for data in _made(right_files.gguf, "m.gguf")]


def _begin_index() -> list[bytes]:
    from stress import right_files

    return _made(right_files.store, "store/index.json")


def _begin_metadata() -> list[bytes]:
    from moeroute import open_trace

    return [open_trace("tiny").meta.to_json().encode()]


TARGETS = {
    "gguf": Target("moerun.checkpoint.gguf.header", _gguf, _begin_gguf),
    "index": Target("moerun.store.index", _index, _begin_index),
    "metadata": Target("moeroute.schema", _metadata, _begin_metadata),
    "import": Target("moeroute.importers", _import, _recordings),
}


def run(folder: Path, names: tuple[str, ...], *, minutes: float, seed: int) -> list[dict[str, Any]]:
    """Fuzz each parser for its part of the time; a row each. SystemExit without atheris."""
    if importlib.util.find_spec("atheris") is None:
        sys.exit("error: atheris is not installed: pip install atheris")
    rows = []
    for name in names or tuple(TARGETS):
        corpus = (folder / name).resolve()
        corpus.mkdir(parents=True, exist_ok=True)
        if not any(corpus.iterdir()):
            for number, data in enumerate(TARGETS[name].begin()):
                (corpus / f"begin-{number}").write_bytes(data)
        seconds = int(60 * minutes / len(names or TARGETS))
        command = [sys.executable, "-m", "stress.fuzz", name, str(corpus), f"-seed={seed + 1}"]
        command += [f"-max_total_time={seconds}", f"-rss_limit_mb={MEMORY_MIB}"]
        command += [f"-timeout={SLOWEST_S}", f"-artifact_prefix={folder.resolve()}/{name}-"]
        done = subprocess.run(
            command,
            capture_output=True,
            text=True,
            check=False,
            cwd=Path(__file__).parents[1],
        )
        (folder / f"{name}.log").write_text(done.stderr)
        tried = re.findall(r"^#(\d+)", done.stderr, re.MULTILINE)
        covered = re.findall(r"cov: (\d+)", done.stderr)
        rows.append(
            {
                "parser": name,
                "files": tried[-1] if tried else "0",
                "covered": covered[-1] if covered else "0",
                "faults": int(done.returncode != 0),
            }
        )
    return rows


def main() -> None:
    """Fuzz the parser that the first argument names; the others are libFuzzer's."""
    import atheris

    target = TARGETS[sys.argv.pop(1)]
    with atheris.instrument_imports(include=[target.module]):
        importlib.import_module(target.module)
    read = target.reader()
    read(b"")  # imports the rest
    atheris.Setup(sys.argv, read)
    atheris.Fuzz()


if __name__ == "__main__":
    main()
