"""Packing a checkpoint into an expert store: one expert in memory at a time, resumable."""

from __future__ import annotations

import os
from collections.abc import Sequence
from contextlib import closing
from dataclasses import asdict, replace
from pathlib import Path

import torch
from moepolicy.outputs import remove_tree

from moerun.checkpoint.source import ModelSource
from moerun.format.precision import NATIVE, PLAIN, Precisions
from moerun.format.tensorfile import write_tensors
from moerun.store.expert_store import ExpertStore
from moerun.store.index import DENSE_FILE, INDEX_FILE, write_json
from moerun.store.pack_folder import PartialFolder, disk_errors, refuse_taken
from moerun.store.pack_plan import RecordFile, build_index, plan_pack
from moerun.store.pack_records import RecordMaker, UnfitError
from moerun.store.progress import Notify, RecordProgress, silent
from moerun.store.shared_files import SharedFiles, find_shared
from moerun.store.side_files import write_side_files


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
    report: Notify | None = None,
    progress: RecordProgress | None = None,
) -> ExpertStore:
    """Pack the checkpoint `source` into the new store `out`; continues what was begun.

    source           a folder of safetensors files, or a GGUF file
    precision        of the experts: native, fp32, fp16, bf16, 4bit, 3bit, 2bit, q4_0 or q8_0
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
    refuse_taken(out, force=force)
    source_dtype = PLAIN.get(precisions.dense)
    apart = precisions.packs_attention
    with closing(ModelSource(source, dtype=source_dtype, attention_apart=apart)) as model:
        if precisions.keeps_all:
            model.keep_attention()
        for note in model.notes:
            (report or silent)(note)
        packer = _Packer(model, out, precisions)
        with disk_errors(packer.folder.path):
            packer.prepare(reuse, report or silent)
            with RecordMaker(workers or os.cpu_count() or 1, device or _best_device()) as maker:
                try:
                    packer.write_records(maker, progress or silent)
                except UnfitError:
                    remove_tree(packer.folder.path)  # in the way of another precision
                    raise
            packer.finish(name or source.resolve().name, revision)
    return ExpertStore.open(out)


class _Packer:
    """One run of a pack: what is there already, what is made now, and the index of both."""

    def __init__(self, model: ModelSource, out: Path, precisions: Precisions) -> None:
        self.folder = PartialFolder(out)
        self._model = model
        self._plan = plan_pack(model, precisions)
        self._source_digest = model.checkpoint.digest()
        self._shared = SharedFiles(0)
        self._own: list[RecordFile] = []  # the files that are not shared
        self._crc32: dict[tuple[str, str], int] = {}  # of each record that is done

    def prepare(self, reuse: Sequence[ExpertStore], report: Notify) -> None:
        """Make or take up the partial folder; refuses one of another pack, and too small a disk."""
        identity = {
            "source": self._source_digest,
            "precisions": asdict(self._plan.precisions),
            "record": self._plan.layout.to_json(),
        }
        self.folder.refuse_another(identity)
        self._shared = find_shared(self._plan, self._source_digest, reuse)
        for note in self._shared.notes():
            report(note)
        self.folder.check_space(self._plan.total_bytes, self._shared)
        self.folder.begin(identity)
        self._own = [file for file in self._plan.files if file.name not in self._shared.paths]
        self._crc32 = self._shared.crc32 | self.folder.finished_records(self._own)

    def write_records(self, maker: RecordMaker, progress: RecordProgress) -> None:
        """Every record that is not there yet, file by file."""
        progress(len(self._crc32), self._plan.n_records)
        with self.folder.journal() as journal:
            for file in self._own:
                missing = [r for r in file.records if (file.name, r.name) not in self._crc32]
                with self.folder.writer(file) as writer:
                    for record, crc32 in maker.write(missing, file.precision, writer):
                        journal.add(file.name, record, crc32)
                        self._crc32[file.name, record] = crc32
                        progress(len(self._crc32), self._plan.n_records)

    def finish(self, name: str, revision: str | None) -> None:
        """Dense weights, tokenizer and index; then the folder gets its name."""
        folder, model = self.folder.store, self._model
        write_side_files(model, folder)
        self._shared.link_into(folder)
        dense_crc32 = write_tensors(folder / DENSE_FILE, model.dense_tensors(), model.read_dense())
        index = build_index(
            model,
            self._plan,
            self._crc32,
            name=name,
            revision=revision,
            source_digest=self._source_digest,
        )
        write_json(folder / INDEX_FILE, replace(index, dense_crc32=dense_crc32).to_json())
        self.folder.become_store()


def _best_device() -> str:
    return "cuda" if torch.cuda.is_available() else "cpu"
