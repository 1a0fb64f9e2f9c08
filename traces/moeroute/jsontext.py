"""JSON and TOML from files that anyone may have written."""

from __future__ import annotations

import json
import tomllib
from collections.abc import Callable, Iterable, Iterator
from typing import Any


def parse_json(
    text: str | bytes, object_hook: Callable[[dict[str, Any]], Any] | None = None
) -> Any:
    """The value of ``text``; ``object_hook`` makes what stands for an object of it.

    Every failure is a JSONDecodeError: values nested too deep, numbers of thousands of digits, and
    bytes that are no text, too.
    """
    try:
        return json.loads(text, object_hook=object_hook)
    except RecursionError as error:
        raise json.JSONDecodeError("too deeply nested", "", 0) from error
    except json.JSONDecodeError:
        raise
    except ValueError as error:
        raise json.JSONDecodeError(" ".join(str(error).split()), "", 0) from error


def parse_toml(data: bytes) -> dict[str, Any]:
    """The table of ``data``. Every failure is a TOMLDecodeError: values nested too deep, too."""
    try:
        return tomllib.loads(data.decode("utf-8"))
    except RecursionError as error:
        raise tomllib.TOMLDecodeError("too deeply nested") from error
    except tomllib.TOMLDecodeError:
        raise
    except ValueError as error:  # no UTF-8, or a number of thousands of digits
        raise tomllib.TOMLDecodeError(str(error)) from error


def journal_entries(lines: Iterable[bytes], n_fields: int) -> Iterator[tuple[int, list[Any]]]:
    """The lists of ``n_fields`` values, a line each, of a journal, and where in bytes each line
    ends. A last line without an end, of a killed run, is left out, as are lines that hold something
    else: zeros after a power cut."""
    at = 0
    for line in lines:
        if not line.endswith(b"\n"):
            return
        at += len(line)
        try:
            found = parse_json(line)
        except ValueError:
            continue
        if isinstance(found, list) and len(found) == n_fields:
            yield at, found
