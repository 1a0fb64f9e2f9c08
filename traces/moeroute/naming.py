"""Errors of reading and writing, told by the name of the file."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from moeroute.schema import TraceError

Place = Path | str  # a file, or a URL that polars can read


@contextmanager
def naming_errors(path: Place) -> Iterator[None]:
    """Turn polars' errors, and system errors that name no file, into TraceError with `path`."""
    from polars.exceptions import PolarsError

    try:
        yield
    except FileNotFoundError as error:
        if error.filename is not None:
            raise
        raise TraceError(f"{path}: there is no such trace") from error
    except (PolarsError, OSError) as error:
        if isinstance(error, OSError) and error.filename is not None:
            raise
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise TraceError(f"{path}: cannot be read or written ({reason})") from error
