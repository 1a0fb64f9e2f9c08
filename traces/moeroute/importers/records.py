"""JSON lines as records, some at a time; what is no record is told by its line."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

from moeroute.foreign import TEXT, Source
from moeroute.jsontext import parse_json
from moeroute.schema import TraceError

Record = dict[str, Any]
_DOCUMENT_BYTES = 512 << 20
_PROBE_LINES = 64


def records(source: Source) -> Iterator[tuple[list[int], list[Record]]]:
    """The objects of a file of JSON lines: line numbers and objects, some at a time.

    Blank lines are skipped. Raises TraceError naming the line that holds no JSON object.
    """
    for first, lines in source.blocks():
        kept = [(i, line) for i, line in enumerate(lines, first) if line.strip()]
        if not kept:
            continue
        try:
            found = parse_json(f"[{','.join(line for _, line in kept)}]")
            whole = len(found) == len(kept)
        except ValueError:
            whole = False
        if not whole or not all(type(one) is dict for one in found):
            found = [_record(source, i, line) for i, line in kept]
        yield [i for i, _ in kept], found


def _record(source: Source, number: int, line: str) -> Record:
    try:
        found = parse_json(line)
    except json.JSONDecodeError as error:
        reason = f"{error.msg}, at {error.colno}"
        raise TraceError(f"{source.path}: line {number}: is no JSON ({reason})") from None
    if not isinstance(found, dict):
        raise TraceError(f"{source.path}: line {number}: is {named(found)}, not a JSON object")
    return found


def named(value: Any) -> str:
    """A JSON value's kind, for messages."""
    kinds = {dict: "an object", list: "a list", str: "text", bool: "true or false"}
    if value is None:
        return "null"
    return kinds.get(type(value), "a number")


def first_record(source: Source) -> Record | None:
    """The first line's object; None where the text does not begin with a line that is one."""
    if source.kind != TEXT or not source.first_line.startswith("{"):
        return None
    for _, lines in source.blocks():
        line = next((line for line in lines[:_PROBE_LINES] if line.strip()), "")
        break
    try:
        found = parse_json(line)
    except ValueError:
        return None
    return found if isinstance(found, dict) else None


def is_document(source: Source, starts: str) -> bool:
    """Whether the text may be one JSON document that starts with one of these characters."""
    return source.kind == TEXT and source.first_line[:1] in tuple(starts)


def document(source: Source) -> Any:
    """The whole text as one JSON value. Raises TraceError for damaged JSON, or above 512 MiB."""
    with source.open() as file:
        size = file.seek(0, 2)
        if size > _DOCUMENT_BYTES:
            raise TraceError(
                f"{source.path}: one JSON document of {size} bytes, above 512 MiB: write one "
                "object a line"
            )
        file.seek(0)
        text = file.read().decode(source.encoding, errors="replace")
    try:
        return parse_json(text)
    except json.JSONDecodeError as error:
        raise TraceError(
            f"{source.path}: line {error.lineno}: is no JSON ({error.msg}, at {error.colno})"
        ) from None
