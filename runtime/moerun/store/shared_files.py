"""Files that a new store takes over from others of the same checkpoint, instead of packing them."""

from __future__ import annotations

import os
import shutil
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from moepolicy.outputs import naming

from moerun.format.tensorfile import read_at
from moerun.store.expert_store import ExpertStore
from moerun.store.index import checksums
from moerun.store.pack_plan import PackPlan, RecordFile, crc32_of
from moerun.versions import store_packages


@dataclass(frozen=True)
class SharedFiles:
    """``paths`` of the files taken over, by name, and ``crc32`` of their records, by the names of
    file and record."""

    n_files: int
    paths: dict[str, Path] = field(default_factory=dict)
    crc32: dict[tuple[str, str], int] = field(default_factory=dict)

    def notes(self) -> Iterator[str]:
        """A sentence for each folder that files are shared with."""
        for folder, n in Counter(path.parent for path in self.paths.values()).items():
            yield f"{n} of {self.n_files} files are hard links to those of {folder}"

    def bytes_on(self, device: int) -> int:
        """Bytes of the files on the file system ``device`` (st_dev), which take no room again."""
        found = [path.stat() for path in self.paths.values()]
        return sum(stat.st_size for stat in found if stat.st_dev == device)

    def link_into(self, folder: Path) -> None:
        """Link the files into a folder; files on another disk are copied."""
        for name, path in self.paths.items():
            to = folder / name
            to.unlink(missing_ok=True)
            try:
                os.link(path, to)
            except OSError:  # another file system, or one without hard links
                shutil.copyfile(path, to)


def find_shared(plan: PackPlan, source_digest: str, stores: Sequence[ExpertStore]) -> SharedFiles:
    """The files of ``plan`` that one of ``stores`` has whole: of the same weights, packed alike."""
    shared = SharedFiles(len(plan.files))
    alike = [
        store
        for store in stores
        if store.index.source_digest == source_digest and store.index.packages == store_packages()
    ]
    for file in plan.files:
        records = {record.name: record.layout for record in file.records}
        for store in alike:
            crc32 = checksums(store.index, file.name, file.precision, records)
            path = store.path / file.name
            if crc32 is not None and _whole(path, file, crc32):
                shared.paths[file.name] = path
                shared.crc32.update({(file.name, record): crc for record, crc in crc32.items()})
                break
    return shared


def _whole(path: Path, file: RecordFile, crc32: Mapping[str, int]) -> bool:
    """Whether a file has what it was written with; a store packed anew must not have old damage."""
    _, entries = file.entries()
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        for record in file.records:
            buffer = torch.empty(record.layout.record_bytes, dtype=torch.uint8)
            with naming(path):
                read_at(fd, entries[record.name].offset, buffer)
            if crc32_of(buffer) != crc32[record.name]:
                return False
        return True
    finally:
        os.close(fd)
