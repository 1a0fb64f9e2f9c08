"""Errors that name things: the file that could not be read, the name that was meant."""

from __future__ import annotations

import difflib
import hashlib
import os
import stat
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

from moeroute.schema import TraceError

Place = Path | str  # a file, or a URL that polars can read
NEARLY_ALL = 0.7  # of two names' letters, as in moepolicy.near: what is further is not suggested


@contextmanager
def naming_errors(path: Place) -> Iterator[None]:
    """Turn polars' errors, and system errors that name no file, into TraceError with `path`."""
    from polars.exceptions import PanicException, PolarsError

    try:
        yield
    except FileNotFoundError as error:
        if error.filename is not None:
            raise
        raise TraceError(f"{path}: there is no such trace") from error
    except (PolarsError, PanicException, OSError) as error:  # damaged Parquet makes polars panic
        if isinstance(error, OSError) and error.filename is not None:
            raise
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise TraceError(f"{path}: cannot be read or written ({reason})") from error


def sha256_of(path: Path) -> bytes:
    """SHA-256 of a file's bytes. Raises TraceError where the file ends while it is read."""
    with path.open("rb") as file, naming_errors(path):
        status = os.fstat(file.fileno())
        digest = hashlib.file_digest(file, "sha256").digest()
        if stat.S_ISREG(status.st_mode) and file.tell() < status.st_size:
            raise TraceError(f"{path}: was cut off while it was read")
    return digest


def meant(name: str, choices: Iterable[str]) -> str:
    """The words "did you mean 'x'? " for the choice nearest to ``name`` in any case, or none."""
    folded = {choice.casefold(): choice for choice in choices}
    near = difflib.get_close_matches(name.casefold(), folded, n=1, cutoff=NEARLY_ALL)
    return f"did you mean {folded[near[0]]!r}? " if near else ""
