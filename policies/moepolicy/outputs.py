"""Files that commands write: in the format of their suffix, whole or not at all, and never over a
finished file unless told to."""

from __future__ import annotations

import ctypes
import errno
import io
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from moepolicy.console import CommandError, CommandUsageError, emit
from moepolicy.tables import Format, to_csv, to_json

PARQUET = "parquet"
FORMATS = {".txt": "table", ".json": "json", ".csv": "csv", ".parquet": PARQUET}
"""The format of a file of results by its suffix."""

PARTIAL = ".partial"  # ends the names of folders that hold what is being written
_HERE, _EXCHANGE = -100, 2  # AT_FDCWD and RENAME_EXCHANGE of Linux

# Keys of Parquet metadata: the trace format's and the sweep's own.
_TRACE, _SWEEP = "moeroute", "moesim-sweep"


def check_suffix(path: Path | str, suffixes: Sequence[str], what: str = "--out") -> str:
    """The suffix of ``path``, one of ``suffixes``. Raises CommandUsageError listing them.

    A suffix of two parts, such as .json.gz, is looked for first.
    """
    if "://" not in str(path) and Path(path).is_dir():
        raise CommandError(f"{what} {path} is a folder, not a file to write to")
    name = Path(path).name.lower()
    for suffix in sorted(suffixes, key=len, reverse=True):
        if name.endswith(suffix) and name != suffix:
            return suffix
    known = ", ".join(suffixes)
    raise CommandUsageError(f"{what} {path}: the suffix says the format, and there are: {known}")


def check_free(
    path: Path | None, *, force: bool, what: str = "--out", folder: bool = False
) -> None:
    """Raise CommandError unless a file can be written to ``path``: call it before the work.

    The folder must be there, and no file may lie at ``path`` unless ``force`` lets it be replaced.
    ``folder``: what is written is a new folder.
    """
    if path is None:
        return
    if not path.absolute().parent.is_dir():
        raise CommandError(f"{what} {path}: the folder {path.parent} does not exist")
    if not os.access(path.absolute().parent, os.W_OK):
        raise CommandError(f"{what} {path}: the folder {path.parent} cannot be written to")
    if folder and path.exists():
        raise CommandUsageError(f"{what} {path} exists already: name a new folder")
    if path.is_dir():
        raise CommandError(f"{what} {path} is a folder, not a file to write to")
    # Devices (/dev/stdout, /dev/null) hold nothing that could be lost.
    if not force and path.is_file():
        raise CommandError(
            f"{what} {path} exists already, {what_lies_at(path)}: --force replaces it"
        )


def what_lies_at(path: Path) -> str:
    """A file in words: a trace, a sweep, or its size."""
    size = path.stat().st_size
    with path.open("rb") as file:
        is_parquet = file.read(4) == b"PAR1"
    return (_parquet(path) if is_parquet else None) or f"a file of {size:,} bytes"


def _parquet(path: Path) -> str | None:
    """The metadata of a Parquet file of this project; None for other files."""
    import json

    import polars as pl

    try:
        noted = pl.read_parquet_metadata(path)
        n_rows = pl.scan_parquet(path, glob=False).select(pl.len()).collect().item()
        if _TRACE in noted:
            meta = json.loads(noted[_TRACE])
            n_tokens = n_rows // max(meta["n_layers"], 1)
            return f"a finished trace of {n_tokens:,} tokens of {meta['model']}"
        if _SWEEP in noted:
            policies = ", ".join(json.loads(noted[_SWEEP])["policies"])
            return f"a finished sweep of {n_rows:,} points ({policies})"
    except (pl.exceptions.PolarsError, OSError, ValueError, KeyError, TypeError, RecursionError):
        return None
    return None


@contextmanager
def written_whole(path: Path) -> Iterator[Path]:
    """Yields a name beside ``path`` to write to; it becomes ``path`` if nothing fails.

    System errors that name no file, as those of a full disk, or the passing name are told as ones
    of ``path``.
    """
    if path.exists() and not path.is_file():
        with naming(path):
            yield path  # a device has no name to be replaced
        return
    with naming(path, _hidden(path)), own_folder(path) as folder:
        partial = folder / path.name
        yield partial
        settle(partial, path)


def _hidden(path: Path) -> Path:
    """What the names of folders begin with in which ``path`` is being written."""
    return path.absolute().with_name(f".{path.name}.")


@contextmanager
def own_folder(path: Path) -> Iterator[Path]:
    """An empty folder beside ``path`` that is this process's own, and goes with it.

    The process holds a lock on it. Folders for ``path`` that nobody holds, which killed processes
    have left, go, too. System errors that name the folder are told as ones of ``path``.
    """
    with ExitStack() as held:
        with naming(path, _hidden(path)):
            while not (folder := _made_folder(path, held)).exists():
                pass  # taken for a killed process's before it was held
            _drop_left(folder, path)
        yield folder


def _made_folder(path: Path, held: ExitStack) -> Path:
    hidden = _hidden(path)
    folder = Path(tempfile.mkdtemp(PARTIAL, hidden.name, hidden.parent))
    held.callback(drop_tree, folder)
    fd = os.open(folder, os.O_RDONLY | os.O_CLOEXEC)
    held.callback(os.close, fd)
    _lock(fd)
    return folder


def _drop_left(own: Path, path: Path) -> None:
    for other in own.parent.iterdir():
        mine = other.name.startswith(_hidden(path).name) and other.name.endswith(PARTIAL)
        if mine and other != own and other.is_dir():
            with suppress(OSError):
                fd = os.open(other, os.O_RDONLY | os.O_CLOEXEC)
                if _lock(fd):
                    drop_tree(other)
                os.close(fd)


def _lock(fd: int) -> bool:
    """Hold a file as long as it is open; False where another process does, or nobody can."""
    try:
        import fcntl  # not everywhere

        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (ImportError, OSError):
        return False
    return True


def settle(finished: Path, path: Path) -> None:
    """Give a finished file its name, its bytes being on the disk before the name is.

    After a power cut there is the old file or the new one, whole.
    """
    with finished.open("rb") as file:
        sync(file.fileno(), finished)
    finished.replace(path)
    sync_folder(path.absolute().parent)


def sync_tree(folder: Path) -> None:
    """Have all files below a folder, and their names, on the disk."""
    for path in (*folder.rglob("*"), folder):
        if path.is_dir():
            sync_folder(path)
        else:
            with path.open("rb") as file:
                sync(file.fileno(), path)


def remove_tree(folder: Path) -> None:
    """Remove a folder with all in it; OSError that names the folder where that fails."""
    try:
        shutil.rmtree(folder)
    except OSError as error:
        error.filename = str(folder)  # by itself it names a file as seen from its own folder
        raise


def drop_tree(folder: Path | str) -> None:
    """Remove a folder with all in it, as far as that can be done."""
    with suppress(OSError):  # rmtree lets some errors through that it is to ignore
        shutil.rmtree(folder, ignore_errors=True)


def exchange(one: Path, other: Path) -> None:
    """Give two folders each other's names, in one step where the file system has one."""
    rename = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)
    if rename and not rename(_HERE, bytes(one), _HERE, bytes(other), _EXCHANGE):
        return
    if rename and ctypes.get_errno() not in (errno.EINVAL, errno.ENOSYS, errno.ENOTSUP):
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()), str(other))
    aside = other.with_name(f".{other.name}.{os.getpid()}.old")  # NFS, for one, has no such step
    other.rename(aside)
    one.rename(other)
    aside.rename(one)


def sync_folder(folder: Path) -> None:
    """Have the names of a folder's files on the disk; nothing where folders cannot be read."""
    try:
        fd = os.open(folder, os.O_RDONLY | os.O_CLOEXEC)
    except PermissionError:
        return
    try:
        sync(fd, folder)
    finally:
        os.close(fd)


def sync(fd: int, path: Path) -> None:
    """Have the bytes of an open file on the disk; OSError that names it where that fails."""
    with naming(path):
        os.fsync(fd)


@contextmanager
def naming(path: Path, alias: Path | None = None) -> Iterator[None]:
    """Let system errors that name no file, or one whose name begins with ``alias``, name
    ``path``."""
    try:
        yield
    except OSError as error:
        named = error.filename
        if named is None or (alias is not None and str(named).startswith(str(alias))):
            error.filename = str(path)
            if error.filename2 is not None:
                error.filename2 = None
        raise


@dataclass(frozen=True)
class Output:
    """Where results go and in which format: stdout, or a file in the format of its suffix."""

    format: str
    path: Path | None

    @classmethod
    def checked(cls, out: Path | None, format: Format | None, *, force: bool) -> Output:
        """What --out, --format and --force ask for.

        Raises CommandError, before any work is done, where the suffix is unknown or contradicts
        ``format``, the folder is not there, or a file lies at ``out`` that may not be replaced.
        """
        if out is None:
            return cls(format or Format.table, None)
        suffix = check_suffix(out, list(FORMATS))
        wanted = FORMATS[suffix]
        if format is not None and format != wanted:
            raise CommandUsageError(
                f"--out {out} would hold {wanted}, and --format says {format.value}: give one of "
                "the two, or a suffix of that format"
            )
        check_free(out, force=force)
        return cls(wanted, out)

    def deliver(
        self,
        rows: Sequence[Mapping[str, Any]],
        table: Callable[[], str],
        document: Any = None,
    ) -> None:
        """Print or write the results: ``rows`` for CSV and Parquet, ``document`` (by default the
        rows) for JSON, and what ``table`` makes for people."""
        if self.path is None:
            emit(self._text(rows, table, document))
            return
        with written_whole(self.path) as partial:
            if self.format == PARQUET:
                import polars as pl

                whole = io.BytesIO()  # polars' own errors on a full disk do not name the file
                pl.DataFrame(list(rows), infer_schema_length=None).write_parquet(whole)
                partial.write_bytes(whole.getvalue())
            else:
                partial.write_text(self._text(rows, table, document), encoding="utf-8")

    def _text(
        self, rows: Sequence[Mapping[str, Any]], table: Callable[[], str], document: Any
    ) -> str:
        if self.format == Format.json:
            return to_json(rows if document is None else document)
        return to_csv(rows) if self.format == Format.csv else table()
