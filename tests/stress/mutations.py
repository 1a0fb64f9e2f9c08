"""Wrong files made of right ones: by structure where the format has one, else by bytes.

A mutator takes the whole file and a random generator, and gives the whole file back. Equal seeds
give equal files.
"""

from __future__ import annotations

import io
import json
import random
import struct
import zipfile
from collections.abc import Callable
from typing import Any

import numpy as np
import polars as pl

Mutator = Callable[[bytes, random.Random], bytes]

HUGE = (1 << 62, (1 << 63) - 1, (1 << 64) - 1, 10**15, 10**30)
STRANGE: tuple[Any, ...] = (
    *(None, True, False, "", "x", "\x00", "é", "../../etc/passwd", "nan", "1e400", "9" * 40),
    *(0, -1, 1, 7, 255, 65536, -(1 << 63), *HUGE),
    *(0.5, -0.0, 1e308, float("nan"), float("inf")),
    *([], {}, [[]], [None], {"a": []}, [1, "x"]),
)


def flip(data: bytes, rng: random.Random) -> bytes:
    """Some bytes changed."""
    changed = bytearray(data)
    for _ in range(rng.choice((1, 1, 2, 8, 64))):
        if changed:
            changed[rng.randrange(len(changed))] = rng.randrange(256)
    return bytes(changed)


def cut(data: bytes, rng: random.Random) -> bytes:
    """The end is missing, or the beginning."""
    at = rng.randrange(len(data) + 1)
    return data[:at] if rng.random() < 0.8 else data[at:]


def shuffle(data: bytes, rng: random.Random) -> bytes:
    """A piece is repeated, removed, zeroed or moved."""
    first, last = sorted(rng.randrange(len(data) + 1) for _ in range(2))
    piece = data[first:last][: rng.choice((1, 8, 64, 4096))]
    last = first + len(piece)
    return rng.choice(
        (
            data[:last] + piece + data[last:],
            data[:first] + data[last:],
            data[:first] + bytes(len(piece)) + data[last:],
            piece + data[:first] + data[last:],
        )
    )


def huge_number(data: bytes, rng: random.Random) -> bytes:
    """Eight bytes of the file's first or last part become a number that no file can mean."""
    if len(data) < 8:
        return data
    reach = min(len(data) - 8, 256)
    at = rng.randrange(reach + 1)
    if rng.random() < 0.5:
        at = len(data) - 8 - at
    number = rng.choice((1 << 50, 1 << 62, (1 << 64) - 1, (1 << 31) - 1))
    return data[:at] + struct.pack("<Q", number) + data[at + 8 :]


BYTES: tuple[Mutator, ...] = (flip, flip, cut, shuffle, huge_number)


def change_value(value: Any, rng: random.Random) -> Any:
    """One place of a JSON value changed: replaced, removed, repeated, renamed, or nested deep."""
    places = list(_places(value))
    if not places or rng.random() < 0.03:
        return rng.choice(STRANGE)
    holder, key = rng.choice(places)
    kind = rng.randrange(6)
    if kind == 0:
        del holder[key]
    elif kind == 1 and isinstance(holder, list):
        holder.insert(key, holder[key])
    elif kind == 1:
        holder[rng.choice(("x", "", key + "s"))] = holder.pop(key)
    elif kind == 2:
        holder[key] = _deep(rng.choice((3, 100, 5000)))
    elif kind == 3 and isinstance(holder[key], int | float):
        holder[key] = rng.choice((-holder[key], holder[key] + 1, holder[key] * 1000, *HUGE))
    else:
        holder[key] = rng.choice(STRANGE)
    return value


def _deep(levels: int) -> Any:
    value: Any = 1
    for _ in range(levels):
        value = [value]
    return value


def _places(value: Any) -> Any:
    items: list[tuple[Any, Any]] = []
    if isinstance(value, dict | list):
        items = list(value.items() if isinstance(value, dict) else enumerate(value))
    for key, inner in items:
        yield value, key
        yield from _places(inner)


def _dump(value: Any) -> bytes:
    # json refuses to write lists nested as deep as those here.
    try:
        return json.dumps(value).encode()
    except RecursionError:
        return b"[" * 5000 + b"]" * 5000


def json_text(data: bytes, rng: random.Random) -> bytes:
    """A file that is one JSON value."""
    return _dump(change_value(json.loads(data), rng))


def json_lines(data: bytes, rng: random.Random) -> bytes:
    """A file of a JSON value a line: one line's value changed, or the lines' order."""
    found = data.splitlines()
    at = rng.randrange(len(found))
    if rng.random() < 0.1:
        rng.shuffle(found)
    else:
        found[at] = json_text(found[at], rng)
    return b"\n".join(found) + b"\n"


def fields(data: bytes, rng: random.Random) -> bytes:
    """Text of names and numbers (CSV, TOML): one word replaced, or one line repeated or moved."""
    found = data.split(b"\n")
    at = rng.randrange(len(found))
    if rng.random() < 0.3:
        found.insert(rng.randrange(len(found)), found[at])
        return b"\n".join(found)
    words = [b"-1", b"nan", b"1e400", b"9" * 30, b"", b'"x"', b"[]", b"\xff\xfe", b"true", b"0.5"]
    separator = rng.choice((b",", b"=", b" "))
    parts = found[at].split(separator)
    parts[rng.randrange(len(parts))] = rng.choice(words)
    found[at] = separator.join(parts)
    return b"\n".join(found)


TOML_VALUES = (
    *("-1", "0", "nan", "inf", "-inf", "1e400", "9" * 40, "0x" + "f" * 20, "true", '"x"', "''"),
    *("[]", "{}", "{a = 1}", "[1, 'x']", "1979-05-27T07:32:00Z", "07:32:00", '"\\u0000"', '"""'),
    *("[" * 3 + "]" * 3, "[" * 5000 + "]" * 5000, "{a = " * 2000 + "1" + "}" * 2000),
)


def toml_line(data: bytes, rng: random.Random) -> bytes:
    """Another value of a TOML key, another key, or a table or key more."""
    found = data.decode("utf-8", "replace").split("\n")
    keyed = [i for i, line in enumerate(found) if "=" in line]
    at = rng.choice(keyed)
    key, _, value = found[at].partition("=")
    kind = rng.randrange(5)
    if kind == 0:
        new = f"{rng.choice(('x', key + 's', '', 'a.' * 3000 + 'b'))} = {value}"
    elif kind == 1:
        new = f"{found[at]}\n{rng.choice(('[x]', '[[x]]', '[link.x]', '[', key + '.a = 1'))}"
    else:
        new = f"{key}= {rng.choice(TOML_VALUES)}"
    found[at] = new
    return "\n".join(found).encode()


def safetensors_header(data: bytes, rng: random.Random) -> bytes:
    """The header's JSON changed, its length made right again."""
    length = int.from_bytes(data[:8], "little")
    header = json_text(data[8 : 8 + length], rng)
    return len(header).to_bytes(8, "little") + header + data[8 + length :]


def npy_header(data: bytes, rng: random.Random) -> bytes:
    """Another type or shape in the header of a NumPy file."""
    array = np.load(io.BytesIO(data))
    shapes = [(1 << 40,), (0,), (1 << 31, 1 << 31), array.shape[::-1], (*array.shape, 1), (3,)]
    kinds = ["<i8", "<f2", ">i4", "|O", "<U7", "|b1", "<c16", array.dtype.str]
    header = {
        "descr": rng.choice(kinds),
        "fortran_order": rng.random() < 0.3,
        "shape": rng.choice([array.shape, *shapes]),
    }
    file = io.BytesIO()
    np.lib.format.write_array_header_1_0(file, header)
    return bytes(file.getvalue() + array.tobytes())


def npy_values(data: bytes, rng: random.Random) -> bytes:
    """Whole arrays of wrong values, of the right type or another."""
    array = np.load(io.BytesIO(data))
    file = io.BytesIO()
    if array.size and rng.random() < 0.5:
        array = array.copy()
        limits = (-1, 0, 32767, 255)
        array.flat[rng.randrange(array.size)] = np.array(rng.choice(limits)).astype(array.dtype)
    else:
        array = array.astype(rng.choice(("f8", "i8", "u1", "f2", "S4", "?")))
    np.save(file, array)
    return file.getvalue()


def npz_members(data: bytes, rng: random.Random) -> bytes:
    """One array of an archive changed, renamed, doubled or dropped; the checksums are right."""
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        members = {name: archive.read(name) for name in archive.namelist()}
    name = rng.choice(sorted(members))
    change = rng.randrange(4)
    if change == 0:
        members["x.npy"] = members.pop(name)
    elif change == 1:
        del members[name]
    elif change == 2:
        members[name] = npy_header(members[name], rng)
    else:
        members[name] = rng.choice((npy_values, flip, cut))(members[name], rng)
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as archive:
        for member, content in members.items():
            archive.writestr(member, content)
    return file.getvalue()


def parquet_columns(data: bytes, rng: random.Random) -> bytes:
    """A valid Parquet file, its metadata kept, with a column that is wrong."""
    metadata = pl.read_parquet_metadata(io.BytesIO(data))
    metadata = {k: v for k, v in metadata.items() if not k.startswith("ARROW")}
    table = pl.read_parquet(io.BytesIO(data))
    name = rng.choice(table.columns)
    column = pl.col(name)
    wrong = rng.randrange(7)
    if wrong == 0:
        table = table.drop(name)
    elif wrong == 1:
        table = table.rename({name: "x"})
    elif wrong == 2:
        table = table.with_columns(pl.lit(rng.choice(("x", -1, 2.5, None))).alias(name))
    elif wrong == 3:
        table = table.with_columns(
            pl.when(pl.int_range(pl.len()) == 3).then(None).otherwise(column).alias(name)
        )
    elif wrong == 4:
        table = table.with_columns(column.shuffle(rng.randrange(1000)))
    elif wrong == 5:
        table = rng.choice(
            (
                table.head(0),
                table.reverse(),
                table.sample(fraction=0.5, seed=1),
                pl.concat([table, table]),
            )
        )
    elif metadata:
        key = rng.choice(sorted(metadata))
        try:
            metadata[key] = json_text(metadata[key].encode(), rng).decode()
        except ValueError:
            metadata[key] = rng.choice(("", "x", "9" * 30, "-1", "\x00"))
    file = io.BytesIO()
    table.write_parquet(file, metadata=metadata)
    return file.getvalue()
