"""Wrong headers of GGUF files: one number of a right header is another."""

from __future__ import annotations

import random
import struct
from collections.abc import Iterator
from itertools import islice
from typing import NamedTuple

SCALARS = {0: 1, 1: 1, 2: 2, 3: 2, 4: 4, 5: 4, 6: 4, 7: 1, 10: 8, 11: 8, 12: 8}
STRING, ARRAY = 8, 9
MOST = 10_000
MORE = (0, 1, 2, 7, 31, 255, 1 << 16, 1 << 31, (1 << 32) - 1, 1 << 40, 1 << 50, 1 << 62, 1 << 63)


class Number(NamedTuple):
    """A whole number of the header: what it says, where it lies, its bytes."""

    what: str
    at: int
    size: int


def gguf_number(data: bytes, rng: random.Random) -> bytes:
    """A count, length, type, dimension or offset becomes another number."""
    numbers = list(islice(_numbers(data), MOST))  # of a header that is wrong already, no end
    what = rng.choice(sorted({number.what for number in numbers}))
    number = rng.choice([number for number in numbers if number.what == what])
    old = int.from_bytes(data[number.at : number.at + number.size], "little")
    near = (old + 1, old - 1, old * 2, old ^ (1 << rng.randrange(8 * number.size)))
    new = rng.choice((*near, *MORE)) % (1 << 8 * number.size)
    wrong = new.to_bytes(number.size, "little")
    return data[: number.at] + wrong + data[number.at + number.size :]


def _numbers(data: bytes) -> Iterator[Number]:
    yield Number("version", 4, 4)
    yield Number("tensors", 8, 8)
    yield Number("fields", 16, 8)
    n_tensors, n_fields = struct.unpack_from("<QQ", data, 8)
    at = 24
    for _ in range(n_fields):
        yield Number("length", at, 8)
        at = _after_string(data, at)
        yield Number("type", at, 4)
        kind, at = _whole(data, at, 4), at + 4
        if kind in SCALARS:
            yield Number("value", at, SCALARS[kind])
            at += SCALARS[kind]
        elif kind == STRING:
            yield Number("length", at, 8)
            at = _after_string(data, at)
        else:
            yield Number("type", at, 4)
            yield Number("count", at + 4, 8)
            at = _after_array(data, at)
    for _ in range(n_tensors):
        yield Number("length", at, 8)
        at = _after_string(data, at)
        yield Number("dimensions", at, 4)
        n_dims, at = _whole(data, at, 4), at + 4
        yield from (Number("dimension", at + 8 * i, 8) for i in range(n_dims))
        at += 8 * n_dims
        yield Number("tensor's type", at, 4)
        yield Number("offset", at + 4, 8)
        at += 12


def _whole(data: bytes, at: int, size: int) -> int:
    return int.from_bytes(data[at : at + size], "little")


def _after_string(data: bytes, at: int) -> int:
    return at + 8 + _whole(data, at, 8)


def _after_array(data: bytes, at: int) -> int:
    kind, count = _whole(data, at, 4), _whole(data, at + 4, 8)
    assert count <= len(data)  # or a header that is wrong already has no end
    at += 12
    if kind in SCALARS:
        return at + count * SCALARS[kind]
    assert kind in (STRING, ARRAY)
    for _ in range(count):
        at = _after_string(data, at)
    return at
