"""What a file is, by its first bytes: for messages, and for importers to choose by."""

from __future__ import annotations

import bz2
import gzip
import io
import lzma
import zipfile
import zlib
from collections.abc import Callable
from contextlib import suppress
from functools import cached_property
from pathlib import Path
from typing import Any, BinaryIO

from moeroute.schema import TraceError

PARQUET, NPZ, TORCH, TEXT = "Parquet", "an .npz archive", "a PyTorch file (.pt)", "text"
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
    b"\x93NUMPY": "a single NumPy array (.npy)",
    b"\x80": "a Python pickle",
    b"ARROW1": "Arrow IPC",
    b"\x89HDF": "HDF5",
    b"SQLite": "an SQLite database",
    b"7z\xbc\xaf": "a 7z archive",
}
_START = 512


class Source:
    """A file that may be compressed (gzip, bzip2, xz, zstd) or marked with a byte order.

    Raises TraceError if it is a folder, absent, no regular file, or damaged where it is compressed.
    """

    def __init__(self, path: Path, wanted: str = "file") -> None:
        self.path = path
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
        if self._head.startswith(_ZSTD):
            return io.BytesIO(self._zstd_text().encode())
        for magic, opener in _COMPRESSED.items():
            if self._head.startswith(magic):
                try:
                    with opener(self.path) as packed:
                        return io.BytesIO(packed.read())
                except (EOFError, OSError, zlib.error, lzma.LZMAError) as error:
                    raise TraceError(f"{self.path}: cannot be unpacked ({error})") from None
        return self.path.open("rb")

    def _zstd_text(self) -> str:
        """polars unpacks zstd where the standard library of our Python does not: text only."""
        import polars as pl

        from moeroute.naming import naming_errors

        with naming_errors(self.path):
            lines = pl.read_csv(
                self.path, has_header=False, separator="\x1f", quote_char=None, infer_schema=False
            )
        return "\n".join(lines.to_series().fill_null(""))

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

    def lines(self) -> list[str]:
        """The lines of the text without their ends (LF, CRLF or CR)."""
        with io.TextIOWrapper(self.open(), encoding=self.encoding, errors="replace") as text:
            try:
                return text.read().split("\n")
            except UnicodeError as error:
                raise TraceError(f"{self.path}: is no {self.encoding} text ({error})") from None

    @cached_property
    def first_line(self) -> str:
        """The first line of the text, as far as `start` reaches; replaced where undecodable."""
        text = self.start.decode(self.encoding, errors="replace")
        return text.splitlines()[0].strip() if text.strip() else ""

    @cached_property
    def kind(self) -> str:
        """What the contents are, in words; one of this module's constants where it knows more."""
        if not self.start:
            return "empty"
        if self.start.startswith(b"PK"):
            return self._zip_kind()
        for magic, name in _BINARY.items():
            if self.start.startswith(magic):
                return name
        if b"safetensors" in self.start or self.start[8:10] == b'{"':
            return "safetensors"
        if self.encoding == "utf-8" and b"\x00" in self.start:
            return "binary"
        return TEXT

    @property
    def described(self) -> str:
        """`kind`, with the first line of text."""
        kind = f"text that starts with {self.first_line[:60]!r}" if self.kind == TEXT else self.kind
        return f"compressed, in it {kind}" if self.is_packed else kind

    def _zip_kind(self) -> str:
        with suppress(zipfile.BadZipFile), self.open() as file, zipfile.ZipFile(file) as archive:
            names = archive.namelist()
            if any(name.endswith("/data.pkl") or name == "data.pkl" for name in names):
                return TORCH
            if not any(name.endswith(".npy") for name in names):
                return f"a zip archive (it holds {', '.join(names[:3])}): unpack it first"
        return NPZ
