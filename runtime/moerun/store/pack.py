"""Packing a checkpoint into an expert store: one expert in memory at a time, resumable.

All work happens in `<out>.partial`, which becomes `<out>` by one rename when everything is
written, so that an unfinished pack never reads as a store.
"""

from __future__ import annotations

import errno
import fcntl
import json
import os
import shutil
import zlib
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, TextIO

import torch

from moerun.checkpoint.source import ModelSource
from moerun.errors import RunError
from moerun.format.layout import RECORD_ALIGN
from moerun.format.precision import NATIVE, PLAIN, SCHEMES, Precisions, Scheme
from moerun.format.quantise import quantise
from moerun.format.tensorfile import TensorFileWriter, memory_of, read_at, write_tensors
from moerun.store.expert_store import ExpertStore
from moerun.store.index import DENSE_FILE, INDEX_FILE, checksums, read_index, write_json
from moerun.store.pack_plan import Record, RecordFile, build_index, plan_pack
from moerun.versions import store_packages

PLAN_FILE = "plan.json"
JOURNAL_FILE = "done.jsonl"
_COPIED = ("*.json", "*.model", "*.txt", "*.jinja", "*.tiktoken")
_NOT_COPIED = ("index.json", "safetensors.index.json")
_RECORDS_IN_FLIGHT = 3  # reading and writing beside quantising; each holds one expert in memory

Progress = Callable[[int, int], None]
"""Told of records done and records in all."""


def pack(
    source: Path,
    out: Path,
    *,
    precision: str = NATIVE,
    attention: str = NATIVE,
    dense_precision: str | None = None,
    name: str | None = None,
    revision: str | None = None,
    workers: int | None = None,
    device: str | None = None,
    reuse: Sequence[ExpertStore] = (),
    force: bool = False,
    report: Callable[[str], None] | None = None,
    progress: Progress | None = None,
) -> ExpertStore:
    """Pack the checkpoint folder `source` into the new store `out`; continues what was begun.

    precision        of the experts: native, fp32, fp16, bf16, 4bit, 3bit or 2bit
    attention        the same of attention's projections (the base paper's Table 1 has them apart);
                     plain ones are the dense weights'
    dense_precision  of everything else: native, fp32, fp16 or bf16; by default attention's or the
                     experts' own where one of them is plain, else native
    name, revision   of the model, for the index; the folder's name by default
    workers          threads that quantise, by default one a core
    device           that quantises: cpu, cuda, cuda:1; a GPU where there is one by default
    reuse            stores of the same checkpoint: files that would be the same are shared with
                     them (hard links) instead of being packed again, as `report` is told
    force            replace a finished store at `out`, which stays until the new one is whole

    Raises RunError for bad input, an `out` that holds something else, and a full disk.
    """
    precisions = Precisions.chosen(precision, attention, dense_precision)
    _refuse_taken(out, force=force)
    model = ModelSource(
        source, dtype=PLAIN.get(precisions.dense), attention_apart=precisions.packs_attention
    )
    try:
        for note in model.notes:
            (report or _silent)(note)
        packer = _Packer(model, out, precisions, device or _best_device())
        with _disk_errors(packer.folder):
            packer.prepare(reuse, report or _silent)
            try:
                packer.write_records(workers or os.cpu_count() or 1, progress)
            except _UnfitError:
                shutil.rmtree(packer.folder)  # it would stand in the way of another precision
                raise
            packer.finish(name or source.resolve().name, revision)
    finally:
        model.close()
    return ExpertStore.open(out)


class _UnfitError(RunError):
    """Weights that this pack can never take, however often it is begun again."""


class _Packer:
    """One run of a pack over the partial folder."""

    def __init__(self, model: ModelSource, out: Path, precisions: Precisions, device: str) -> None:
        self.model = model
        self.out = out
        self.folder = out.with_name(f"{out.name}.partial")
        self.plan = plan_pack(model, precisions)
        self._device = device
        self._source_digest = model.checkpoint.digest()
        self._done: dict[tuple[str, str], int] = {}
        self._shared: dict[str, Path] = {}

    def prepare(self, reuse: Sequence[ExpertStore], report: Callable[[str], None]) -> None:
        """Make or take up the partial folder; refuses one of another pack, and too small a disk."""
        identity = {
            "source": self._source_digest,
            "precisions": asdict(self.plan.precisions),
            "record": self.plan.layout.to_json(),
        }
        plan_file = self.folder / PLAN_FILE
        begun = self.folder.exists() and any(f.suffix != ".new" for f in self.folder.iterdir())
        if begun and _read_json(plan_file) != identity:
            raise RunError(
                f"{self.folder} holds another unfinished pack (of another checkpoint or "
                "precision): finish that one, or remove the folder"
            )
        for file in self.plan.files:
            self._share(file, reuse)
        for folder, n in Counter(path.parent for path in self._shared.values()).items():
            report(f"{n} of {len(self.plan.files)} files are those of {folder}, and shared with it")
        self._check_space()
        self.folder.mkdir(parents=True, exist_ok=True)
        write_json(plan_file, identity)
        self._done |= self._read_journal()

    def _share(self, file: RecordFile, stores: Sequence[ExpertStore]) -> None:
        """Take a file over from the first store that has the same one, checksums and all."""
        records = {record.name: record.layout for record in file.records}
        for store in stores:
            index = store.index
            if index.source_digest != self._source_digest or index.packages != store_packages():
                continue
            crc32 = checksums(index, file.name, file.precision, records)
            path = store.path / file.name
            if crc32 is not None and _whole(path, file, crc32):
                self._shared[file.name] = path
                self._done |= {(file.name, record): crc for record, crc in crc32.items()}
                return

    def _check_space(self) -> None:
        present = sum(f.stat().st_blocks * 512 for f in self.folder.glob("*.safetensors"))
        parent = next(p for p in (self.folder, *self.folder.parents) if p.exists())
        linked = [p.stat() for p in self._shared.values()]
        present += sum(s.st_size for s in linked if s.st_dev == parent.stat().st_dev)
        free, needed = shutil.disk_usage(parent).free, self.plan.total_bytes - present
        if needed > free:
            raise RunError(
                f"the store needs {needed / 1e9:.2f} GB more and {parent} has {free / 1e9:.2f} GB "
                "free: choose another --out, a lower precision, or make room"
            )

    @property
    def _unshared(self) -> list[RecordFile]:
        return [file for file in self.plan.files if file.name not in self._shared]

    def _read_journal(self) -> dict[tuple[str, str], int]:
        """Finished records and their CRC-32, as far as the disk really has them."""
        journal = self.folder / JOURNAL_FILE
        if not journal.exists():
            return {}
        done = {}
        for line in journal.read_text().splitlines():
            try:
                file_name, record_name, crc = json.loads(line)
            except ValueError:
                continue  # the last line of a killed run
            done[file_name, record_name] = crc
        kept = {}
        for file in self._unshared:
            if not any((file.name, record.name) in done for record in file.records):
                continue
            with self._writer(file) as writer:
                for record in file.records:
                    key = file.name, record.name
                    buffer = torch.empty(record.layout.record_bytes, dtype=torch.uint8)
                    writer.read(record.name, buffer)
                    if done.get(key) == _crc32(buffer):
                        kept[key] = done[key]
        return kept

    @contextmanager
    def _journal(self) -> Iterator[TextIO]:
        """The journal, which one process at a time may write."""
        with (self.folder / JOURNAL_FILE).open("a") as journal:
            try:
                fcntl.flock(journal, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError as error:
                raise RunError(
                    f"another process is packing into {self.folder}: wait for it to end"
                ) from error
            yield journal

    def _writer(self, file: RecordFile) -> TensorFileWriter:
        path = self.folder / file.name
        if path.exists() and path.stat().st_nlink > 1:
            path.unlink()  # shared by an earlier run with a store that is not to be written to
        return TensorFileWriter(path, file.tensors, align=RECORD_ALIGN, resume=True)

    def write_records(self, workers: int, progress: Progress | None) -> None:
        """Every record that is not there yet, file by file."""
        threads = torch.get_num_threads()
        report = progress or _silent
        report(len(self._done), self.plan.n_records)
        try:
            with (
                ThreadPoolExecutor(workers, "quantise", _one_thread) as blocks,
                ThreadPoolExecutor(_RECORDS_IN_FLIGHT, "record", _one_thread) as records,
                self._journal() as journal,
            ):
                for file in self._unshared:
                    with self._writer(file) as writer:
                        for record, crc in self._pack_file(file, writer, records, blocks):
                            journal.write(json.dumps([file.name, record, crc]) + "\n")
                            journal.flush()
                            self._done[file.name, record] = crc
                            report(len(self._done), self.plan.n_records)
        finally:
            torch.set_num_threads(threads)

    def _pack_file(
        self,
        file: RecordFile,
        writer: TensorFileWriter,
        records: ThreadPoolExecutor,
        blocks: ThreadPoolExecutor,
    ) -> Iterator[tuple[str, int]]:
        """Names of records as they are written, with their CRC-32."""

        def one(record: Record) -> tuple[str, int]:
            made = self._make(record, SCHEMES.get(file.precision), blocks)
            writer.write(record.name, made)
            return record.name, _crc32(made)

        missing = [r for r in file.records if (file.name, r.name) not in self._done]
        pending: set[Future[tuple[str, int]]] = set()
        try:
            for record in missing:
                if len(pending) == _RECORDS_IN_FLIGHT:
                    finished, pending = wait(pending, return_when=FIRST_COMPLETED)
                    yield from (future.result() for future in finished)
                pending.add(records.submit(one, record))
            yield from (future.result() for future in wait(pending).done)
        except BaseException:
            blocks.shutdown(wait=False, cancel_futures=True)  # so that they end soon
            wait(pending)  # nothing may write to a file that is being closed
            raise

    def _make(
        self, record: Record, scheme: Scheme | None, blocks: ThreadPoolExecutor
    ) -> torch.Tensor:
        parts: dict[str, torch.Tensor] = {}
        dtypes = {part.name: part.dtype for part in record.layout.parts}
        params = {param.name: param for param in record.shape.params}
        for name, tensor in record.read().items():
            if name in dtypes:
                parts[name] = tensor.to(dtypes[name])
                continue
            assert scheme is not None
            weight = tensor.T.contiguous() if params[name].transposed else tensor
            try:
                packed = quantise(weight, scheme, device=self._device, run=blocks.map)
            except RunError as error:
                raise _UnfitError(f"{name} of {record.what}: {error}") from error
            parts |= {f"{name}.{part}": value for part, value in packed.items()}
        made = torch.empty(record.layout.record_bytes, dtype=torch.uint8)
        record.layout.write(parts, made)
        return made

    def finish(self, name: str, revision: str | None) -> None:
        """Dense weights, tokenizer and index; then the folder gets its name."""
        self._copy_side_files()
        for shared, path in self._shared.items():
            _link(path, self.folder / shared)
        dense_crc32 = write_tensors(
            self.folder / DENSE_FILE, self.model.dense_tensors(), self.model.read_dense()
        )
        index = build_index(
            self.model,
            self.plan,
            self._done,
            name=name,
            revision=revision,
            source_digest=self._source_digest,
        )
        write_json(self.folder / INDEX_FILE, replace(index, dense_crc32=dense_crc32).to_json())
        old = None
        if _is_store(self.out):
            old = self.out.rename(self.out.with_name(f"{self.out.name}.old"))
        elif self.out.exists():
            self.out.rmdir()  # an empty folder, as checked before
        self.folder.rename(self.out)
        if old is not None:
            shutil.rmtree(old)
        (self.out / PLAN_FILE).unlink()
        (self.out / JOURNAL_FILE).unlink()

    def _copy_side_files(self) -> None:
        source = self.model.checkpoint.path
        for pattern in _COPIED:
            for file in source.glob(pattern):
                if not file.name.endswith(_NOT_COPIED):
                    shutil.copyfile(file, self.folder / file.name)


def _refuse_taken(out: Path, *, force: bool) -> None:
    if not out.exists() or (out.is_dir() and not any(out.iterdir())):
        return
    if not _is_store(out):
        raise RunError(
            f"{out} exists already and is no expert store: give a new folder, or remove it first"
        )
    if not force:
        found = read_index(out)
        raise RunError(
            f"{out} exists already, a finished store of {found.model} with {found.precision} "
            f"experts and {found.attention_precision} attention: --force replaces it"
        )


def _is_store(folder: Path) -> bool:
    return (folder / INDEX_FILE).is_file()


def _silent(*_: object) -> None:
    pass


def _whole(path: Path, file: RecordFile, crc32: Mapping[str, int]) -> bool:
    """Whether a file has what it was written with; a store packed anew must not have old damage."""
    _, entries = file.entries()
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        for record in file.records:
            buffer = torch.empty(record.layout.record_bytes, dtype=torch.uint8)
            read_at(fd, entries[record.name].offset, buffer)
            if _crc32(buffer) != crc32[record.name]:
                return False
        return True
    finally:
        os.close(fd)


def _link(path: Path, to: Path) -> None:
    """The same file under a second name; a copy of it on another disk."""
    to.unlink(missing_ok=True)
    try:
        os.link(path, to)
    except OSError:  # another file system, or one without hard links
        shutil.copyfile(path, to)


def _crc32(record: torch.Tensor) -> int:
    return zlib.crc32(memory_of(record))


def _one_thread() -> None:
    torch.set_num_threads(1)  # the workers are the parallelism


def _best_device() -> str:
    return "cuda" if torch.cuda.is_available() else "cpu"


def _read_json(path: Path) -> Any:
    try:
        return json.loads(path.read_bytes())
    except (OSError, ValueError):
        return None


@contextmanager
def _disk_errors(folder: Path) -> Iterator[None]:
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
