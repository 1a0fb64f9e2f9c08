"""The folder that a pack works in, `<out>.partial`: whose it is, and what is done.

Its folder `store` becomes `<out>` by one rename when everything is written, so that an unfinished
pack never reads as a store.
"""

from __future__ import annotations

import errno
import fcntl
import json
import shutil
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TextIO

import torch
from moepolicy.outputs import PARTIAL, exchange, naming, remove_tree, sync_folder, sync_tree
from moeroute.jsontext import journal_entries, parse_json

from moerun.errors import RunError
from moerun.format.names import RECORD_ALIGN
from moerun.format.tensorfile import TensorFileWriter
from moerun.store.index import INDEX_FILE, read_index, write_json
from moerun.store.pack_plan import RecordFile, crc32_of
from moerun.store.shared_files import SharedFiles

PLAN_FILE = "plan.json"
JOURNAL_FILE = "done.jsonl"


class PartialFolder:
    """The folder of an unfinished pack into ``out``, taken up by whoever packs the same again."""

    def __init__(self, out: Path) -> None:
        self.out = out
        self.path = out.with_name(f"{out.name}{PARTIAL}")
        self.store = self.path / "store"

    def refuse_another(self, identity: dict[str, Any]) -> None:
        """RunError where what was begun is another pack than the one of ``identity``."""
        begun = self.path.exists() and any(f.suffix != PARTIAL for f in self.path.iterdir())
        if begun and _read_json(self.path / PLAN_FILE) != identity:
            raise RunError(
                f"{self.path} holds another unfinished pack (of another checkpoint or "
                "precision): finish that one, or remove the folder"
            )

    def check_space(self, total_bytes: int, shared: SharedFiles) -> None:
        """RunError where the disk has too little for what is not there yet of ``total_bytes``."""
        present = sum(f.stat().st_blocks * 512 for f in self.store.glob("*.safetensors"))
        parent = next(p for p in (self.path, *self.path.parents) if p.exists())
        present += shared.bytes_on(parent.stat().st_dev)
        free, needed = shutil.disk_usage(parent).free, total_bytes - present
        if needed > free:
            raise RunError(
                f"the store needs {needed / 1e9:.2f} GB more and {parent} has {free / 1e9:.2f} GB "
                "free: choose another --out, a lower precision, or make room"
            )

    def begin(self, identity: dict[str, Any]) -> None:
        """Make the folder, or take it up, and note whose it is."""
        self.path.mkdir(parents=True, exist_ok=True)
        write_json(self.path / PLAN_FILE, identity)
        self.store.mkdir(exist_ok=True)

    def finished_records(self, files: Iterable[RecordFile]) -> dict[tuple[str, str], int]:
        """The records of ``files`` that an earlier run wrote and their CRC-32, as far as the disk
        really has them; by the names of file and record."""
        noted = self._noted_records()
        kept = {}
        for file in files:
            if not any((file.name, record.name) in noted for record in file.records):
                continue
            with self.writer(file) as writer:
                for record in file.records:
                    key = file.name, record.name
                    buffer = torch.empty(record.layout.record_bytes, dtype=torch.uint8)
                    writer.read(record.name, buffer)
                    if noted.get(key) == crc32_of(buffer):
                        kept[key] = noted[key]
        return kept

    def _noted_records(self) -> dict[tuple[str, str], int]:
        journal = self.path / JOURNAL_FILE
        noted: dict[tuple[str, str], int] = {}
        if not journal.exists():
            return noted
        with journal.open("rb") as lines:
            for _, (file_name, record_name, crc32) in journal_entries(lines, 3):
                if isinstance(file_name, str) and isinstance(record_name, str):
                    noted[file_name, record_name] = crc32
        return noted

    @contextmanager
    def journal(self) -> Iterator[Journal]:
        """The journal, which one process at a time may write."""
        with (self.path / JOURNAL_FILE).open("a") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError as error:
                raise RunError(
                    f"another process is packing into {self.path}: wait for it to end"
                ) from error
            yield Journal(file)

    def writer(self, file: RecordFile) -> TensorFileWriter:
        """Writes records of ``file``, of which some may be there."""
        path = self.store / file.name
        if path.exists() and path.stat().st_nlink > 1:
            path.unlink()  # shared by an earlier run with a store that is not to be written to
        return TensorFileWriter(path, file.tensors, align=RECORD_ALIGN, resume=True)

    def become_store(self) -> None:
        """Give the finished folder its name; a store that had it goes only then."""
        sync_tree(self.store)
        if _is_store(self.out):
            exchange(self.store, self.out)
        else:
            if self.out.exists():
                self.out.rmdir()  # an empty folder, as checked before
            self.store.rename(self.out)
        sync_folder(self.out.absolute().parent)
        remove_tree(self.path)


class Journal:
    """Notes each record that is written, so that a killed pack goes on after it."""

    def __init__(self, file: TextIO) -> None:
        self._file = file

    def add(self, file: str, record: str, crc32: int) -> None:
        """Note that a record is written, with its checksum."""
        with naming(Path(self._file.name)):
            self._file.write(json.dumps([file, record, crc32]) + "\n")
            self._file.flush()


def refuse_taken(out: Path, *, force: bool) -> None:
    """RunError where ``out`` holds anything but a store that ``force`` replaces."""
    if not out.exists() or (out.is_dir() and not any(out.iterdir())):
        return
    if not _is_store(out):
        raise RunError(
            f"{out} exists already and is no expert store: give a new folder, or remove it first"
        )
    if not force:
        found = read_index(out)
        raise RunError(
            f"{out} exists already, a finished store of {found.model} with {found.expert_label} "
            f"experts and {found.attention_precision} attention: --force replaces it"
        )


@contextmanager
def disk_errors(folder: Path) -> Iterator[None]:
    """A full disk, and a folder that cannot be written, as one clear line."""
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise RunError(
                f"no space left for {folder}: make room and run the same command again, "
                "finished experts are kept"
            ) from error
        raise RunError(f"{error.filename or folder}: {error.strerror}") from error


def _is_store(folder: Path) -> bool:
    return (folder / INDEX_FILE).is_file()


def _read_json(path: Path) -> Any:
    try:
        return parse_json(path.read_bytes())
    except (OSError, ValueError):
        return None
