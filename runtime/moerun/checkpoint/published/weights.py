"""A checkpoint of quantised weights as one of plain weights: each is dequantised as it is read."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch

from moerun.checkpoint.published.declared import declaration
from moerun.checkpoint.published.reader import Coded, Header, Headers, MisfitError, Names, Reader
from moerun.checkpoint.published.table import FORMATS, SPARE, QuantFormat
from moerun.checkpoint.weights import Checkpoint
from moerun.errors import RunError
from moerun.format.coding import Coding
from moerun.format.precision import Tensors
from moerun.format.tensorfile import TensorEntry, bytes_of

_UNQUANTISED = (
    *(torch.float64, torch.float32, torch.float16, torch.bfloat16),
    *(torch.int64, torch.bool),
)


@dataclass(frozen=True, slots=True)
class Quantised:
    """One weight: its format, its name, and the names of its tensors by role."""

    format: QuantFormat
    name: str
    parts: dict[str, str]


class PublishedCheckpoint(Checkpoint):
    """The weights of a checkpoint by the names that they have unquantised, dequantised to `dtype`
    where they are quantised. One without quantised weights is read as it is.

    The class is long because it stands in for `Checkpoint` wherever one is read: each of that
    class's readings has a form here that takes a weight's parts together.
    """

    def __init__(self, path: Path) -> None:
        """Raises RunError where files are missing or damaged, where the tensors of a weight do not
        fit together, and where config.json declares another quantisation than the tensors have."""
        super().__init__(path)
        self.dtype = torch.bfloat16
        self._readers: dict[str, Reader] = {}
        self._shapes: dict[str, tuple[int, ...]] = {}
        try:
            self._declared = declaration(path)
            self.quantised = {each.name: each for each in self._find()}
            parts = {part for each in self.quantised.values() for part in each.parts.values()}
            stored = set(self._stored_names)
            spare = {name for name in stored - parts if name.endswith(SPARE)}
            self.spare = sorted(spare) if self.quantised else []
            """Tensors that would quantise activations, which stay as they are."""
            apart = parts.union(self.spare)
            self._plain = [name for name in self._stored_names if name not in apart]
            self._check_declared()
            self._check()
        except BaseException:
            self.close()
            raise

    @property
    def _stored_names(self) -> list[str]:
        return super().names

    def _stored(self, name: str) -> TensorEntry:
        return super().entry(name)

    def _dtype(self, name: str) -> torch.dtype | None:
        """The stored dtype; None where it cannot be read."""
        return None if self.unread(name) is not None else self._stored(name).dtype

    def _check(self) -> None:
        plain = set(self._plain)
        for each in self.quantised.values():
            if each.name in plain:
                raise RunError(
                    f"{self.path} has {each.name} in two precisions, plain and as "
                    f"{next(iter(each.parts.values()))!r}: keep one"
                )
            self._shape(each)
        if not self.quantised:
            return
        for name in self._plain:
            if self._dtype(name) in (torch.float8_e4m3fn, torch.float8_e5m2):
                raise RunError(
                    f"{self.described(name)} has no scale, which other weights of the checkpoint "
                    "have: download it again"
                )

    @property
    def names(self) -> list[str]:
        """Names of all tensors, of quantised weights those that they have unquantised."""
        return [*self._plain, *self.quantised]

    @property
    def formats(self) -> list[QuantFormat]:
        """The formats of the quantised weights."""
        return list({each.format.name: each.format for each in self.quantised.values()}.values())

    def entry(self, name: str) -> TensorEntry:
        """Dtype and shape of the weight as it is read; a quantised one lies nowhere."""
        if (each := self.quantised.get(name)) is None:
            return super().entry(name)
        shape = self._shape(each)
        return TensorEntry(name, self.dtype, shape, 0, bytes_of(self.dtype, shape))

    def described(self, name: str) -> str:
        """A tensor's file, name, dtype and shape, for messages; a quantised weight's by the first
        of its tensors."""
        each = self.quantised.get(name)
        return super().described(next(iter(each.parts.values())) if each else name)

    def first_float(self) -> torch.dtype | None:
        """The dtype of the first tensor that is not quantised."""
        if not self.quantised:
            return super().first_float()
        dtypes = (self._dtype(name) for name in sorted(self._plain))
        return next((d for d in dtypes if d and d.is_floating_point and d.itemsize > 1), None)

    def read(self, name: str) -> torch.Tensor:
        """The tensor of that name, dequantised, in memory of its own."""
        each = self.quantised.get(name)
        if each is None:
            return super().read(name)
        if len(self._shape(each)) > 2:
            return torch.stack([self.read_row(name, row) for row in range(self._shape(each)[0])])
        return self._dequantise(each, self._parts(each, None))

    def read_row(self, name: str, row: int) -> torch.Tensor:
        """One entry of the tensor's first dimension, dequantised."""
        each = self.quantised.get(name)
        if each is None:
            return super().read_row(name, row)
        if len(self._shape(each)) < 3:
            return self.read(name)[row]
        return self._dequantise(each, self._parts(each, row))

    def equal(self, name: str, other: str, dtype: torch.dtype) -> bool:
        """Whether two tensors, cast to `dtype`, have the same values."""
        if name not in self.quantised and other not in self.quantised:
            return super().equal(name, other, dtype)
        return torch.equal(self.read(name).to(dtype), self.read(other).to(dtype))

    def notes(self, kept: str | None) -> Iterator[str]:
        """See the class this one is of."""
        if not self.quantised:
            return
        names = " and ".join(each.name for each in self.formats)
        dtype = str(self.dtype).removeprefix("torch.")
        how = f"in their own bits ({kept})" if kept else f"as {dtype}, dequantised"
        yield (
            f"{len(self.quantised)} weights are quantised ({names}) and are dequantised to "
            f"{dtype}; at precision native, experts are kept {how}"
        )
        if self.spare:
            yield (
                f"left out: {len(self.spare)} scales of activations, such as "
                f"{self.spare[0]}: activations are not quantised here"
            )

    def coding(self, name: str) -> Coding | None:
        """How a record can keep a weight, or one of its rows, in its own bits; None where it
        cannot, or is not quantised."""
        each = self.quantised.get(name)
        return self._reader(each).coding(self._headers(each)) if each else None

    def read_coded(self, name: str, row: int | None = None) -> Coded:
        """A weight, or one of its rows, in its own bits."""
        each = self.quantised[name]
        return self._reader(each).coded(self._parts(each, row))

    def _dequantise(self, each: Quantised, parts: Tensors) -> torch.Tensor:
        try:
            return self._reader(each).dequantise(each.name, parts, self.dtype)
        except MisfitError as error:
            raise self._misfit(each, error) from error

    def _parts(self, each: Quantised, row: int | None) -> Tensors:
        read = super().read
        if row is None:
            return {role: read(part) for role, part in each.parts.items()}
        take = super().read_row
        return {
            role: take(part, row) if self._stored(part).shape else read(part)
            for role, part in each.parts.items()
        }

    def _reader(self, each: Quantised) -> Reader:
        kind = each.format.reader
        assert kind is not None
        if each.format.name not in self._readers:
            try:
                described = self._declared.described if self._declared else {}
                self._readers[each.format.name] = kind(described)
            except RunError as error:
                raise RunError(f"{self.path} is quantised ({each.format.name}): {error}") from error
        return self._readers[each.format.name]

    def _headers(self, each: Quantised) -> Headers:
        found = {}
        for role, part in each.parts.items():
            if (unread := self.unread(part)) is not None:
                raise RunError(
                    f"{super().described(part)} has a dtype that this moerun does not read"
                    f" ({unread.code}): give a checkpoint in another format"
                )
            entry = self._stored(part)
            found[role] = Header(entry.dtype, entry.shape)
        return found

    def _shape(self, each: Quantised) -> tuple[int, ...]:
        if each.name not in self._shapes:
            try:
                shape = self._reader(each).shape(each.name, self._headers(each))
            except MisfitError as error:
                raise self._misfit(each, error) from error
            self._shapes[each.name] = shape
        return self._shapes[each.name]

    def _misfit(self, each: Quantised, error: MisfitError) -> RunError:
        return RunError(
            f"{self.described(each.name)} and its other tensors do not fit together as "
            f"{each.format.name} ({error}): download the checkpoint again"
        )

    def _find(self) -> Iterator[Quantised]:
        """The weights that are quantised in a format that is read."""
        known = set(self._stored_names)
        taken: set[str] = set()
        for each in FORMATS:
            for names in each.names:
                tell = names.parts[names.tells]
                for teller in sorted(n for n in known - taken if n.endswith(tell)):
                    stem = teller.removesuffix(tell)
                    if (parts := self._tensors_of(stem, names, known)) is not None:
                        taken |= set(parts.values())
                        yield Quantised(each, stem + names.weight, parts)

    def _tensors_of(self, stem: str, names: Names, known: set[str]) -> dict[str, str] | None:
        """The tensors of one weight by role; None where they are of another format."""
        parts = {role: stem + ending for role, ending in names.parts.items()}
        absent = [name for name in parts.values() if name not in known]
        if (codes := parts.get("codes")) and (
            codes in absent or (names.dtypes and self._dtype(codes) not in names.dtypes)
        ):
            return None
        if absent:
            raise RunError(
                f"{super().described(parts[names.tells])} is a part of a quantised weight, of "
                f"which {absent[0]!r} is missing: download the checkpoint again"
            )
        optional = {role: stem + ending for role, ending in names.optional.items()}
        return parts | {role: name for role, name in optional.items() if name in known}

    def _check_declared(self) -> None:
        """RunError where what config.json says of the quantisation is not what the tensors are."""
        declared = self._declared
        if declared is None or declared.method is None:
            return
        method, formats = declared.method.lower(), {each.name for each in self.formats}
        known = [each.name for each in FORMATS if method in each.methods]
        if formats and known and not formats.intersection(known):
            first = next(iter(self.quantised.values()))
            raise RunError(
                f"{self.described(first.name)} is of a weight in the format {first.format.name}, "
                f"but the checkpoint is said to be {declared}: config.json and weights do not "
                "belong together"
            )
        dtypes = (self._dtype(name) for name in self._plain)
        if not formats and all(dtype in _UNQUANTISED for dtype in dtypes):
            raise RunError(
                f"{self.path} is said to be {declared}, but no tensor is quantised: take that out "
                "of the file, or download the checkpoint again"
            )
