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
from collections.abc import Callable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TextIO

import torch

from moerun.errors import RunError
from moerun.index import (
    DENSE_FILE,
    INDEX_FILE,
    LayerRecords,
    experts_file,
    write_json,
)
from moerun.layout import RECORD_ALIGN
from moerun.packing import Scheme
from moerun.plan import build_index, plan_pack
from moerun.shape import NATIVE, PLAIN, scheme_of
from moerun.source import ModelSource
from moerun.store import ExpertStore
from moerun.tensorfile import TensorFileWriter, header_of, memory_of

PLAN_FILE = "plan.json"
JOURNAL_FILE = "done.jsonl"
_COPIED = ("*.json", "*.model", "*.txt", "*.jinja", "*.tiktoken")
_NOT_COPIED = ("index.json", "safetensors.index.json")
_EXPERTS_IN_FLIGHT = 3  # reading and writing beside quantising; each holds one expert in memory

Progress = Callable[[int, int], None]
"""Told of records done and records in all."""


def pack(
    source: Path,
    out: Path,
    *,
    precision: str = NATIVE,
    dense_precision: str | None = None,
    name: str | None = None,
    revision: str | None = None,
    workers: int | None = None,
    device: str | None = None,
    progress: Progress | None = None,
) -> ExpertStore:
    """Pack the checkpoint folder `source` into the new store `out`; continues what was begun.

    precision        of the experts: native, fp32, fp16, bf16, 4bit, 3bit or 2bit
    dense_precision  of everything else: native, fp32, fp16 or bf16; by default the experts' own
                     where they are not quantised, native where they are
    name, revision   of the model, for the index; the folder's name by default
    workers          threads that quantise, by default one a core
    device           that quantises: cpu, cuda, cuda:1; a GPU where there is one by default

    Raises RunError for bad input, an `out` that holds something else, and a full disk.
    """
    scheme_of(precision)
    dense = dense_precision or (precision if precision in PLAIN else NATIVE)
    if dense != NATIVE and dense not in PLAIN:
        raise RunError(
            f"dense weights cannot be {dense!r}: choose from {', '.join((NATIVE, *PLAIN))}"
        )
    _refuse_taken(out)
    model = ModelSource(source, dtype=PLAIN.get(dense))
    try:
        packer = _Packer(model, out, precision, dense, device or _best_device())
        with _disk_errors(packer.folder):
            packer.prepare()
            packer.write_experts(workers or os.cpu_count() or 1, progress)
            packer.finish(name or source.resolve().name, revision)
    finally:
        model.close()
    return ExpertStore.open(out)


class _Packer:
    """One run of a pack over the partial folder."""

    def __init__(
        self, model: ModelSource, out: Path, precision: str, dense: str, device: str
    ) -> None:
        self.model = model
        self.out = out
        self.folder = out.with_name(f"{out.name}.partial")
        self.plan = plan_pack(model, precision, dense)
        self._scheme: Scheme | None = scheme_of(precision)
        self._device = device
        self._source_digest = model.checkpoint.digest()
        self._done: dict[tuple[int, int], int] = {}

    def prepare(self) -> None:
        """Make or take up the partial folder; refuses one of another pack, and too small a disk."""
        identity = {
            "source": self._source_digest,
            "precision": self.plan.precision,
            "dense": self.plan.dense_precision,
            "record": self.plan.layout.to_json(),
        }
        plan_file = self.folder / PLAN_FILE
        begun = self.folder.exists() and any(f.suffix != ".new" for f in self.folder.iterdir())
        if begun and _read_json(plan_file) != identity:
            raise RunError(
                f"{self.folder} holds another unfinished pack (of another checkpoint or "
                "precision): finish that one, or remove the folder"
            )
        self._check_space()
        self.folder.mkdir(parents=True, exist_ok=True)
        write_json(plan_file, identity)
        self._done = self._read_journal()

    def _check_space(self) -> None:
        present = sum(f.stat().st_blocks * 512 for f in self.folder.glob("*.safetensors"))
        parent = next(p for p in (self.folder, *self.folder.parents) if p.exists())
        free, needed = shutil.disk_usage(parent).free, self.plan.total_bytes - present
        if needed > free:
            raise RunError(
                f"the store needs {needed / 1e9:.2f} GB more and {parent} has {free / 1e9:.2f} GB "
                "free: choose another --out, a lower precision, or make room"
            )

    def _read_journal(self) -> dict[tuple[int, int], int]:
        """Finished records and their CRC-32, as far as the disk really has them."""
        journal = self.folder / JOURNAL_FILE
        if not journal.exists():
            return {}
        done = {}
        for line in journal.read_text().splitlines():
            try:
                layer, expert, crc = json.loads(line)
            except ValueError:
                continue  # the last line of a killed run
            done[layer, expert] = crc
        buffer = torch.empty(self.plan.layout.record_bytes, dtype=torch.uint8)
        kept = {}
        for layer in sorted({layer for layer, _ in done}):
            with self._writer(layer) as writer:
                for expert in range(self.plan.n_experts):
                    writer.read(_record_name(expert), buffer)
                    if done.get((layer, expert)) == _crc32(buffer):
                        kept[layer, expert] = done[layer, expert]
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

    @property
    def _records(self) -> dict[str, tuple[torch.dtype, tuple[int, ...]]]:
        record = (torch.uint8, (self.plan.layout.record_bytes,))
        return {_record_name(expert): record for expert in range(self.plan.n_experts)}

    def _writer(self, layer: int) -> TensorFileWriter:
        path = self.folder / experts_file(layer)
        return TensorFileWriter(path, self._records, align=RECORD_ALIGN, resume=True)

    def write_experts(self, workers: int, progress: Progress | None) -> None:
        """Every record that is not there yet, layer by layer."""
        threads = torch.get_num_threads()
        report = progress or _silent
        report(len(self._done), self.plan.n_records)
        try:
            with (
                ThreadPoolExecutor(workers, "quantise", _one_thread) as blocks,
                ThreadPoolExecutor(_EXPERTS_IN_FLIGHT, "expert", _one_thread) as experts,
                self._journal() as journal,
            ):
                for layer in range(self.plan.n_layers):
                    with self._writer(layer) as writer:
                        for expert, crc in self._pack_layer(layer, writer, experts, blocks):
                            journal.write(f"[{layer},{expert},{crc}]\n")
                            journal.flush()
                            self._done[layer, expert] = crc
                            report(len(self._done), self.plan.n_records)
        finally:
            torch.set_num_threads(threads)

    def _pack_layer(
        self,
        layer: int,
        writer: TensorFileWriter,
        experts: ThreadPoolExecutor,
        blocks: ThreadPoolExecutor,
    ) -> Iterator[tuple[int, int]]:
        """Experts as they are written, with the CRC-32 of their records."""

        def one(expert: int) -> tuple[int, int]:
            record = self._record(layer, expert, blocks)
            writer.write(_record_name(expert), record)
            return expert, _crc32(record)

        missing = [e for e in range(self.plan.n_experts) if (layer, e) not in self._done]
        pending: set[Future[tuple[int, int]]] = set()
        try:
            for expert in missing:
                if len(pending) == _EXPERTS_IN_FLIGHT:
                    finished, pending = wait(pending, return_when=FIRST_COMPLETED)
                    yield from (future.result() for future in finished)
                pending.add(experts.submit(one, expert))
            yield from (future.result() for future in wait(pending).done)
        except BaseException:
            blocks.shutdown(wait=False, cancel_futures=True)  # so that they end soon
            wait(pending)  # nothing may write to a file that is being closed
            raise

    def _record(self, layer: int, expert: int, blocks: ThreadPoolExecutor) -> torch.Tensor:
        parts: dict[str, torch.Tensor] = {}
        dtypes = {part.name: part.dtype for part in self.plan.layout.parts}
        for name, tensor in self.model.read_expert(layer, expert).items():
            if name in dtypes:
                parts[name] = tensor.to(dtypes[name])
            else:
                parts |= self._quantised(layer, expert, name, tensor, blocks)
        record = torch.empty(self.plan.layout.record_bytes, dtype=torch.uint8)
        self.plan.layout.write(parts, record)
        return record

    def _quantised(
        self, layer: int, expert: int, name: str, tensor: torch.Tensor, blocks: ThreadPoolExecutor
    ) -> dict[str, torch.Tensor]:
        from moerun.quant import quantise

        assert self._scheme is not None
        param = next(p for p in self.model.shape.params if p.name == name)
        weight = tensor.T.contiguous() if param.transposed else tensor
        try:
            packed = quantise(weight, self._scheme, device=self._device, run=blocks.map)
        except RunError as error:
            raise RunError(f"{name} of expert {expert} of layer {layer}: {error}") from error
        return {f"{name}.{part}": value for part, value in packed.items()}

    def finish(self, name: str, revision: str | None) -> None:
        """Dense weights, tokenizer and index; then the folder gets its name."""
        self._copy_side_files()
        with TensorFileWriter(self.folder / DENSE_FILE, self.model.dense_tensors()) as writer:
            for tensor_name, tensor in self.model.read_dense():
                writer.write(tensor_name, tensor)
        index = build_index(
            self.model,
            self.plan,
            self._layers(),
            name=name,
            revision=revision,
            source_digest=self._source_digest,
        )
        write_json(self.folder / INDEX_FILE, index.to_json())
        if self.out.exists():
            self.out.rmdir()  # an empty folder, as checked before
        self.folder.rename(self.out)
        (self.out / PLAN_FILE).unlink()
        (self.out / JOURNAL_FILE).unlink()

    def _copy_side_files(self) -> None:
        source = self.model.checkpoint.path
        for pattern in _COPIED:
            for file in source.glob(pattern):
                if not file.name.endswith(_NOT_COPIED):
                    shutil.copyfile(file, self.folder / file.name)

    def _layers(self) -> tuple[LayerRecords, ...]:
        # All files are laid out alike, so one header says where the records of each lie.
        header, entries = header_of(self._records, align=RECORD_ALIGN)
        experts = range(self.plan.n_experts)
        return tuple(
            LayerRecords(
                module=module,
                file=experts_file(layer),
                file_bytes=len(header) + self.plan.n_experts * self.plan.layout.record_bytes,
                offsets=tuple(entries[_record_name(expert)].offset for expert in experts),
                crc32=tuple(self._done[layer, expert] for expert in experts),
            )
            for layer, module in enumerate(self.model.layers)
        )


def _refuse_taken(out: Path) -> None:
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise RunError(f"{out} exists already: give a new folder, or remove it first")


def _silent(_done: int, _total: int) -> None:
    pass


def _record_name(expert: int) -> str:
    return f"expert.{expert}"


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
