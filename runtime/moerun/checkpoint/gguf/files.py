"""The files of a GGUF checkpoint, and its tensors: read by position, a row at a time if need be."""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from moerun.checkpoint.gguf.blocks import (
    MXFP4,
    MXFP4_CODING,
    PLAIN,
    check_readable,
    mxfp4_parts,
    type_name,
    values_of,
)
from moerun.checkpoint.gguf.header import GgufHeader, GgufTensor, read_header
from moerun.checkpoint.published.reader import Coded
from moerun.checkpoint.weights import Weights
from moerun.errors import RunError
from moerun.format.block_files import row_bytes
from moerun.format.block_scheme import BLOCK_SCHEMES, BlockScheme
from moerun.format.coding import Kept
from moerun.format.tensorfile import TensorEntry, UnreadEntry, read_at

_SPLIT = re.compile(r"(.+)-(\d{5})-of-(\d{5})\.gguf")
_NOT_A_MODEL = ("mmproj", "imatrix")  # vision towers and calibration data lie beside models


def find_gguf(folder: Path) -> Path | None:
    """The GGUF model of a folder, the first file of one that is split; None where there is none.

    Raises RunError where there are several.
    """
    files = [f for f in sorted(folder.glob("*.gguf")) if not f.name.startswith(_NOT_A_MODEL)]
    models: dict[str, Path] = {}
    for file in files:
        split = _SPLIT.fullmatch(file.name)
        models.setdefault(split[1] if split else file.name, file)
    if len(models) > 1:
        named = ", ".join(file.name for file in list(models.values())[:4])
        raise RunError(f"{folder} has {len(models)} GGUF models ({named}): give one of the files")
    return next(iter(models.values()), None)


def model_headers(path: Path) -> list[GgufHeader]:
    """The headers of all files of a model, the first one first; ``path`` is any of the files.

    Raises RunError where a file is missing or damaged, or they are of different models.
    """
    split = _SPLIT.fullmatch(path.name)
    if split is None:
        header = read_header(path)
        if (count := header.metadata.get("split.count", 1)) > 1:
            raise RunError(
                f"{path} is one of {count} parts of a model, but not named as one: give the parts "
                f"their names again, NAME-00001-of-{count:05}.gguf"
            )
        return [header]
    names = [f"{split[1]}-{n:05}-of-{split[3]}.gguf" for n in range(1, int(split[3]) + 1)]
    if missing := [name for name in names if not path.with_name(name).is_file()]:
        raise RunError(
            f"{path.with_name(missing[0])} is missing ({len(missing)} of {len(names)} parts of "
            "this model are not there): download it"
        )
    headers = [read_header(path.with_name(name)) for name in names]
    _check_parts(headers)
    return headers


def _check_parts(headers: list[GgufHeader]) -> None:
    for number, header in enumerate(headers):
        told = header.metadata.get("split.count"), header.metadata.get("split.no")
        if told != (len(headers), number):
            raise RunError(
                f"{header.path} says that it is part {told[1]} of {told[0]}, counted from 0, not "
                f"part {number} of {len(headers)}: one of the parts is of another model"
            )
    wanted = headers[0].metadata.get("split.tensors.count")
    found = sum(len(header.tensors) for header in headers)
    if wanted is not None and wanted != found:
        raise RunError(
            f"{headers[0].path}: the parts have {found} tensors, not {wanted} as the first says: "
            "one of the parts is of another model"
        )


class GgufWeights(Weights):
    """The tensors of a GGUF model under llama.cpp's names. May be shared between threads.

    Weights in blocks are given as float32; nothing is read before it is asked for, and one row
    (an expert of a fused tensor) takes no more than its own bytes.
    """

    def __init__(self, path: Path) -> None:
        """Raises RunError where a file is missing or damaged, or a tensor is there twice."""
        self.path = path
        self.headers = model_headers(path)
        self._of: dict[str, tuple[int, GgufTensor]] = {}
        self._fds: list[int] = []
        try:
            for header in self.headers:
                self._open(header)
        except BaseException:
            self.close()
            raise

    def _open(self, header: GgufHeader) -> None:
        try:
            fd = os.open(header.path, os.O_RDONLY)
        except OSError as error:
            raise RunError(f"{header.path} cannot be read: {error.strerror}") from error
        self._fds.append(fd)
        check_readable({t.ggml_type: t.name for t in header.tensors.values()}, header.path)
        for name, tensor in header.tensors.items():
            if name in self._of:
                raise RunError(f"{header.path} has tensor {name!r}, which an earlier part has too")
            self._of[name] = (fd, tensor)

    @property
    def names(self) -> list[str]:
        """Names of all tensors."""
        return list(self._of)

    @property
    def total_bytes(self) -> int:
        """Bytes of all files."""
        return sum(header.file_bytes for header in self.headers)

    def entry(self, name: str) -> TensorEntry:
        """Dtype and shape of the values. Raises KeyError for an unknown name.

        ``offset`` is 0: values that are unpacked lie nowhere in a file.
        """
        tensor = self._of[name][1]
        dtype = PLAIN.get(tensor.ggml_type, torch.float32)
        return TensorEntry(name, dtype, tensor.shape, 0, tensor.nbytes)

    def unread(self, name: str) -> UnreadEntry | None:
        """None: a file with a type that cannot be read is refused when it is opened."""
        return None

    def described(self, name: str) -> str:
        """A tensor's file, name, type and shape, for messages."""
        tensor = self._of[name][1]
        kind = type_name(tensor.ggml_type)
        return f"{self._file_of(name)}: tensor {name!r} ({kind} {list(tensor.shape)})"

    def _file_of(self, name: str) -> Path:
        return next(header.path for header in self.headers if name in header.tensors)

    def first_float(self) -> torch.dtype | None:
        """The dtype that a model of these weights has: see `native_dtype`."""
        return native_dtype(self.headers)

    def notes(self, kept: str | None) -> Iterator[str]:
        """See the class this one is of: which blocks there are, and of the tokenizer."""
        from moerun.checkpoint.gguf.tokenizer import tokenizer_note

        kinds = [tensor.ggml_type for _, tensor in self._of.values()]
        blocks = [kind for kind in kinds if kind not in PLAIN]
        if blocks:
            named = ", ".join(sorted({type_name(kind) for kind in blocks}))
            dtype = str(self.dtype).removeprefix("torch.")
            how = f"in {kept.replace('+', ' and ').upper()}" if kept else f"as {dtype}"
            yield (
                f"{len(blocks)} weights are in blocks ({named}) and are dequantised; at precision "
                f"native, experts are kept {how}"
            )
        if (told := tokenizer_note(self.path)) is not None:
            yield told

    def transforms(self, model: Any) -> list[Any]:
        """See the class this one is of: llama.cpp's names and layouts are undone."""
        from moerun.checkpoint.gguf.names import gguf_transforms

        return gguf_transforms(self.headers[0].architecture, model.config)

    def read_rows(self, name: str, start: int, stop: int) -> torch.Tensor:
        """Entries ``start`` to ``stop`` of the tensor's first dimension."""
        tensor = self._of[name][1]
        raw = self._raw(name, start, stop)
        return values_of(raw, tensor.ggml_type, (stop - start, *tensor.shape[1:]))

    def coding(self, name: str) -> Kept | None:
        """See the class this one is of: some types of blocks are kept as they are."""
        ggml_type = self._of[name][1].ggml_type
        if ggml_type == MXFP4:
            return MXFP4_CODING
        return None if ggml_type in PLAIN else BLOCK_SCHEMES.get(type_name(ggml_type).lower())

    def read_coded(self, name: str, row: int | None = None) -> Coded:
        """See the class this one is of."""
        shape = self._of[name][1].shape
        start, stop = (0, shape[0]) if row is None else (row, row + 1)
        raw, coding = self._raw(name, start, stop), self.coding(name)
        if isinstance(coding, BlockScheme):
            return Coded(coding, {"rows": raw.view(-1, row_bytes(coding, shape[-1]))})
        elements, scales = mxfp4_parts(raw, shape[-1])
        return Coded(MXFP4_CODING, {"codes": elements, "scales": scales})

    def _raw(self, name: str, start: int, stop: int) -> torch.Tensor:
        fd, tensor = self._of[name]
        row_bytes = tensor.nbytes // tensor.shape[0]
        raw = torch.empty((stop - start) * row_bytes, dtype=torch.uint8)
        try:
            done = read_at(fd, tensor.offset + start * row_bytes, raw)
        except OSError as error:
            raise RunError(f"{self.described(name)} cannot be read: {error.strerror}") from error
        if done < len(raw):
            raise RunError(f"{self._file_of(name)} was cut off while it was read")
        return raw

    def read(self, name: str) -> torch.Tensor:
        """The tensor of that name, in memory of its own."""
        return self.read_rows(name, 0, self._of[name][1].shape[0])

    def digest(self) -> str:
        """SHA-256 over metadata, names, shapes and samples of the weights."""
        digest = hashlib.sha256()
        for header, fd in zip(self.headers, self._fds, strict=True):
            shapes = [(t.name, t.ggml_type, t.shape) for t in header.tensors.values()]
            described: list[Any] = [header.file_bytes, header.metadata, shapes]
            digest.update(json.dumps(described, sort_keys=True).encode())
            self.add_samples(digest, fd, header.path, header.header_bytes, header.file_bytes)
        return digest.hexdigest()

    def close(self) -> None:
        """Close all files. May be called again."""
        while self._fds:
            os.close(self._fds.pop())


def native_dtype(headers: list[GgufHeader]) -> torch.dtype:
    """What the model computes in: the file's own 16-bit or 32-bit floats; bfloat16 where it has
    blocks."""
    types = {tensor.ggml_type for header in headers for tensor in header.tensors.values()}
    if not types <= set(PLAIN) or 30 in types:
        return torch.bfloat16
    return torch.float16 if 1 in types else torch.float32
