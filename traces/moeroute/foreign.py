"""What a file is, by its first bytes. Messages name the kind, and importers are chosen by it."""

from __future__ import annotations

import bz2
import gzip
import io
import lzma
import tempfile
import zipfile
import zlib
from collections.abc import Callable, Iterator
from contextlib import suppress
from functools import cached_property
from pathlib import Path
from typing import Any, BinaryIO

from moeroute.schema import TraceError

PARQUET, NPZ, TORCH, TEXT = "Parquet", "an .npz archive", "a PyTorch file (.pt)", "text"
NPY, SAFETENSORS, BINARY = "a single NumPy array (.npy)", "safetensors", "binary"
FOLDER = "a folder with manifest.json"
_ZSTD = b"\x28\xb5\x2f\xfd"
_COMPRESSED: dict[bytes, Callable[[Path], Any]] = {
    b"\x1f\x8b": gzip.open,
    b"BZh": bz2.open,
    b"\xfd7zXZ\x00": lzma.open,
}
_MARKED = {  # byte order marks, and the encodings that read them
    b"\xef\xbb\xbf": "utf-8-sig",
    b"\xff\xfe\x00\x00": "utf-32",
    b"\x00\x00\xfe\xff": "utf-32",
    b"\xff\xfe": "utf-16",
    b"\xfe\xff": "utf-16",
}
_BINARY = {
    b"PAR1": PARQUET,
    b"\x93NUMPY": NPY,
    b"\x80": "a Python pickle",
    b"ARROW1": "Arrow IPC",
    b"\x89HDF": "HDF5",
    b"SQLite": "an SQLite database",
    b"7z\xbc\xaf": "a 7z archive",
}
_START = 512
_BOMB_BYTES, _BOMB_RATIO = 256 << 20, 200  # routing packs by 2 to 20 times
_BLOCK_CHARS = 1 << 22
_LONGEST_LINE = 1 << 28
MANIFEST = "manifest.json"


class Source:
    """A file that may be compressed (gzip, bzip2, xz, zstd) or begin with a byte order mark.

    `folders`: it may be a folder with manifest.json, too. Raises TraceError if it is another
    folder, absent, no regular file, damaged where it is compressed, or unpacks to absurdly much.
    """

    def __init__(self, path: Path, wanted: str = "file", *, folders: bool = False) -> None:
        self.path = path
        self._head = b""
        if folders and (path / MANIFEST).is_file():
            self.kind = FOLDER
            return
        if path.is_dir():
            inside = sorted(entry.name for entry in path.iterdir())
            named = ", ".join(inside[:3]) + (", ..." if len(inside) > 3 else "")
            raise TraceError(f"{path}: is a folder, not a {wanted}; it holds {named or 'nothing'}")
        if not path.exists():
            raise TraceError(f"{path}: there is no such {wanted}")
        if not path.is_file():
            raise TraceError(f"{path}: is no regular file; save its contents to one first")
        with path.open("rb") as file:
            self._head = file.read(8)

    def open(self) -> BinaryIO:
        """The contents, unpacked, as a binary file that can seek."""
        return Path(self._unpacked.name if self.is_packed else self.path).open("rb")

    @cached_property
    def _unpacked(self) -> Any:
        """The contents of a compressed file in a temporary one, which goes with this object."""
        unpacked = tempfile.NamedTemporaryFile()  # noqa: SIM115 (it goes with this object)
        if self._head.startswith(_ZSTD):
            unpacked.write(self._zstd_text().encode())
        for magic, opener in _COMPRESSED.items():
            if self._head.startswith(magic):
                try:
                    with opener(self.path) as packed:
                        self._copy(packed, unpacked)
                except (EOFError, OSError, zlib.error, lzma.LZMAError) as error:
                    raise TraceError(f"{self.path}: cannot be unpacked ({error})") from None
        unpacked.flush()
        return unpacked

    def _copy(self, packed: BinaryIO, unpacked: Any) -> None:
        while block := packed.read(_BLOCK_CHARS):
            unpacked.write(block)
            self.check_unpacked(unpacked.tell(), self.path.stat().st_size)

    def check_unpacked(self, unpacked_bytes: int, packed_bytes: int) -> None:
        """Raise TraceError where no recording could have been packed to so little."""
        if unpacked_bytes > max(_BOMB_BYTES, _BOMB_RATIO * packed_bytes):
            raise TraceError(
                f"{self.path}: {packed_bytes} packed bytes become {unpacked_bytes} and more: "
                "no recording packs so well (a zip bomb?)"
            )

    def _zstd_text(self) -> str:
        """polars unpacks zstd where the standard library of our Python does not: text only."""
        import polars as pl

        from moeroute.naming import naming_errors

        if (size := _zstd_size(self._start_of_file())) is not None:
            self.check_unpacked(size, self.path.stat().st_size)
        with naming_errors(self.path):
            lines = pl.read_csv(
                self.path, has_header=False, separator="\x1f", quote_char=None, infer_schema=False
            )
        return "\n".join(lines.to_series().fill_null(""))

    def _start_of_file(self) -> bytes:
        with self.path.open("rb") as file:
            return file.read(18)

    @property
    def is_packed(self) -> bool:
        """Whether the file is compressed."""
        return self._head.startswith((_ZSTD, *_COMPRESSED))

    @cached_property
    def start(self) -> bytes:
        """The first bytes of the unpacked contents."""
        with self.open() as file:
            return file.read(_START)

    @cached_property
    def encoding(self) -> str:
        """What the text is encoded in, by its byte order mark; UTF-8 without one."""
        marks = (name for mark, name in _MARKED.items() if self.start.startswith(mark))
        return next(marks, "utf-8")

    def blocks(self) -> Iterator[tuple[int, list[str]]]:
        """The lines of the text without their ends, some at a time: the first one's number, from 1,
        and the lines. Raises TraceError for a line longer than 2^28 characters."""
        number, rest = 1, ""
        with io.TextIOWrapper(self.open(), encoding=self.encoding, errors="replace") as text:
            while block := self._read(text):
                *lines, rest = (rest + block).split("\n")
                if lines:
                    yield number, lines
                number += len(lines)
                if len(rest) > _LONGEST_LINE:
                    raise TraceError(f"{self.path}: line {number}: is longer than 2^28 characters")
        if rest:
            yield number, [rest]

    def _read(self, text: io.TextIOWrapper) -> str:
        try:
            return text.read(_BLOCK_CHARS)
        except UnicodeError as error:
            raise TraceError(f"{self.path}: is no {self.encoding} text ({error})") from None

    def lines(self) -> list[str]:
        """The lines of the text without their ends (LF, CRLF or CR)."""
        with io.TextIOWrapper(self.open(), encoding=self.encoding, errors="replace") as text:
            try:
                return text.read().split("\n")
            except UnicodeError as error:
                raise TraceError(f"{self.path}: is no {self.encoding} text ({error})") from None

    @cached_property
    def first_line(self) -> str:
        """The first line of the text, cut where `start` ends; undecodable bytes are replaced."""
        text = self.start.decode(self.encoding, errors="replace")
        return text.splitlines()[0].strip() if text.strip() else ""

    @cached_property
    def kind(self) -> str:
        """The kind of the contents in words: one of this module's constants where one fits."""
        if not self.start:
            return "empty"
        if self.start.startswith(b"PK"):
            return self._zip_kind()
        if self.start[8:10] == b'{"':  # after the length of the header
            return SAFETENSORS
        for magic, name in _BINARY.items():
            if self.start.startswith(magic):
                return name
        if self.encoding == "utf-8" and b"\x00" in self.start:
            return BINARY
        return TEXT

    @property
    def described(self) -> str:
        """`kind`, with the first line of text."""
        kind = f"text that starts with {self.first_line[:60]!r}" if self.kind == TEXT else self.kind
        return f"compressed, in it {kind}" if self.is_packed else kind

    def _zip_kind(self) -> str:
        damages = (zipfile.BadZipFile, ValueError, NotImplementedError)
        with suppress(*damages), self.open() as file, zipfile.ZipFile(file) as archive:
            names = archive.namelist()
            if any(name.endswith("/data.pkl") or name == "data.pkl" for name in names):
                return TORCH
            if not any(name.endswith(".npy") for name in names):
                return f"a zip archive (it holds {', '.join(names[:3])}): unpack it first"
        return NPZ


def _zstd_size(start: bytes) -> int | None:
    """What a zstd frame's header says of the unpacked size (RFC 8878, 3.1.1.1); None: nothing."""
    if len(start) < 18:
        return None
    descriptor = start[4]
    single = bool(descriptor & 0x20)
    n_bytes = (1 if single else 0, 2, 4, 8)[descriptor >> 6]
    at = 5 + (not single) + (0, 1, 2, 4)[descriptor & 3]
    size = int.from_bytes(start[at : at + n_bytes], "little") + 256 * (n_bytes == 2)
    return size if n_bytes else None
