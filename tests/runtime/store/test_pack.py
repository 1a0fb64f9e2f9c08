"""Packing: whole or not there, and taken up where it was killed."""

import errno
import json
import os
import signal
import subprocess
import sys
from collections import namedtuple
from pathlib import Path
from typing import Any

import pytest
import torch
from moerun.checkpoint.source import ModelSource
from moerun.checkpoint.weights import Checkpoint
from moerun.errors import RunError
from moerun.store.expert_store import ExpertStore
from moerun.store.find import stores_in
from moerun.store.index import read_index
from moerun.store.pack import pack
from moerun.store.pack_folder import JOURNAL_FILE, PartialFolder
from safetensors.torch import load_file, save_file
from support.stores import TINY, files_of, rewrite, verify
from transformers import (
    GraniteMoeConfig,
    GraniteMoeForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_cast_is_that_of_torch(tmp_path: Path, precision: str) -> None:
    store = pack(TINY, tmp_path / "out", precision=precision)
    dtype = {"fp32": torch.float32, "bf16": torch.bfloat16}[precision]
    buffer = torch.empty(store.record_bytes, dtype=torch.uint8)
    store.read_into(9, buffer)
    weight = load_file(TINY / "model.safetensors")[
        "model.layers.1.block_sparse_moe.experts.1.w2.weight"
    ]
    assert torch.equal(store.layout.views(buffer)["down_proj"], weight.to(dtype))
    dense = load_file(store.dense_path)
    assert {tensor.dtype for tensor in dense.values()} == {dtype}
    assert not any("experts" in name for name in dense)


def test_dense_weights_have_a_precision_of_their_own(tmp_path: Path) -> None:
    store = pack(TINY, tmp_path / "out", precision="2bit", dense_precision="bf16")
    assert store.index.dense_precision == "bf16"
    assert {t.dtype for t in load_file(store.dense_path).values()} == {torch.bfloat16}
    assert "gate_up_proj.codes" in store.layout.views(
        torch.empty(store.record_bytes, dtype=torch.uint8)
    )


def test_the_result_does_not_depend_on_the_workers(tmp_path: Path) -> None:
    pack(TINY, tmp_path / "one", precision="3bit", workers=1, name="m")
    pack(TINY, tmp_path / "four", precision="3bit", workers=4, name="m")
    assert files_of(tmp_path / "one") == files_of(tmp_path / "four")


def test_progress_counts_every_record(tmp_path: Path) -> None:
    seen: list[tuple[int, int]] = []
    pack(TINY, tmp_path / "out", progress=lambda done, total: seen.append((done, total)))
    assert seen == [(done, 64) for done in range(65)]


def test_sharded_checkpoints_are_read_through_their_index(checkpoint: Path, tmp_path: Path) -> None:
    tensors = load_file(checkpoint / "model.safetensors")
    names = sorted(tensors)
    shards = {"a.safetensors": names[::2], "b.safetensors": names[1::2]}
    for shard, held in shards.items():
        save_file({name: tensors[name] for name in held}, checkpoint / shard)
    (checkpoint / "model.safetensors").unlink()
    weight_map = {name: shard for shard, held in shards.items() for name in held}
    (checkpoint / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    sharded = pack(checkpoint, tmp_path / "sharded")
    whole = pack(TINY, tmp_path / "whole")
    assert [x.crc32 for x in sharded.index.layers] == [x.crc32 for x in whole.index.layers]
    (checkpoint / "b.safetensors").unlink()
    with pytest.raises(RunError, match=r"b\.safetensors is missing"):
        pack(checkpoint, tmp_path / "again")


SLOW_PACK = """
import sys, time
from pathlib import Path
from moerun.store import pack
source, out = map(Path, sys.argv[1:3])
pause_s = float(sys.argv[3])
def progress(done, total):
    print(done, flush=True)
    time.sleep(pause_s)
pack.pack(source, out, precision="4bit", workers=1, progress=progress)
"""


def slow_pack(out: Path, pause_s: float = 0.05) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", SLOW_PACK, str(TINY), str(out), str(pause_s)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def wait_for_record(process: subprocess.Popen[str], number: int) -> None:
    assert process.stdout is not None
    for line in process.stdout:
        if int(line) >= number:
            return
    raise AssertionError(process.stderr.read() if process.stderr else "it ended")


def test_a_killed_pack_is_no_store_and_is_taken_up(tmp_path: Path) -> None:
    out = tmp_path / "out"
    process = slow_pack(out)
    wait_for_record(process, 20)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not out.exists()
    partial = tmp_path / "out.partial"
    with pytest.raises(RunError, match="no expert store"):
        ExpertStore.open(partial)
    finished = len((partial / JOURNAL_FILE).read_text().splitlines())
    assert 20 <= finished < 64

    seen: list[int] = []
    resumed = pack(TINY, out, precision="4bit", progress=lambda done, _: seen.append(done))
    assert seen[0] >= finished - 1  # the line being written may be lost
    assert not partial.exists()
    verify(resumed)
    pack(TINY, tmp_path / "fresh", precision="4bit", name=resumed.index.model)
    assert files_of(out) == files_of(tmp_path / "fresh")


def test_a_pack_that_was_killed_when_all_was_written_is_taken_up(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    with monkeypatch.context() as at_the_end:
        at_the_end.setattr(PartialFolder, "become_store", _stop)
        with pytest.raises(KeyboardInterrupt):
            pack(TINY, out, precision="4bit")
    left = files_of(PartialFolder(out).store)
    assert stores_in(tmp_path) == []  # whose files would be shared with a new one
    pack(TINY, out, precision="4bit", reuse=stores_in(tmp_path))
    assert files_of(out) == left
    assert not PartialFolder(out).path.exists()


@pytest.mark.parametrize("line", ["3", "[[], [], 1]", '["experts-00000.safetensors"]', '"x"', "{}"])
def test_a_line_of_something_else_in_the_journal_costs_nothing(tmp_path: Path, line: str) -> None:
    partial = PartialFolder(tmp_path / "out")
    partial.begin({})
    (partial.path / JOURNAL_FILE).write_text(line + "\n")
    assert partial.finished_records([]) == {}


def _stop(folder: PartialFolder) -> None:
    raise KeyboardInterrupt


@pytest.mark.slow
def test_two_processes_do_not_pack_into_one_folder(tmp_path: Path) -> None:
    process = slow_pack(tmp_path / "out", pause_s=0.2)
    try:
        wait_for_record(process, 1)
        with pytest.raises(RunError, match="another process is packing"):
            pack(TINY, tmp_path / "out", precision="4bit")
    finally:
        process.kill()
        process.wait()


def test_a_record_that_the_disk_lost_is_packed_again(tmp_path: Path) -> None:
    out = tmp_path / "out"
    stop_after(tmp_path, 12)
    with (tmp_path / "out.partial" / "store" / "experts-00000.safetensors").open("r+b") as file:
        file.seek(3 * 200_000)
        file.write(b"\0" * 50_000)
    verify(pack(TINY, out))


class StoppedError(Exception):
    pass


def stop_after(folder: Path, records: int, **options: Any) -> None:
    def progress(done: int, _total: int) -> None:
        if done == records:
            raise StoppedError

    with pytest.raises(StoppedError):
        pack(TINY, folder / "out", progress=progress, **options)


def test_an_unfinished_pack_of_something_else_is_not_mixed_in(
    checkpoint: Path, tmp_path: Path
) -> None:
    stop_after(tmp_path, 3)
    with pytest.raises(RunError, match=r"out\.partial holds another unfinished pack"):
        pack(TINY, tmp_path / "out", precision="4bit")
    rewrite(checkpoint, lambda tensors: tensors["model.norm.weight"].add_(1))
    with pytest.raises(RunError, match=r"out\.partial holds another unfinished pack"):
        pack(checkpoint, tmp_path / "out")


def test_models_of_one_architecture_have_different_digests(checkpoint: Path) -> None:
    same = Checkpoint(checkpoint).digest()
    assert same == Checkpoint(TINY).digest()
    rewrite(checkpoint, lambda tensors: [t.add_(1) for t in tensors.values()])
    assert Checkpoint(checkpoint).digest() != same


def test_what_exists_is_not_overwritten(tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / "thesis.tex").write_text("important")
    with pytest.raises(RunError, match="exists already"):
        pack(TINY, out)
    assert files_of(out) == {"thesis.tex": b"important"}
    (out / "thesis.tex").unlink()
    verify(pack(TINY, out))


def test_too_small_a_disk_is_refused_before_anything_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr("shutil.disk_usage", lambda _path: usage(10**9, 10**9, 10**6))
    with pytest.raises(RunError, match=r"needs 0\.03 GB more and .* has 0\.00 GB free"):
        pack(TINY, tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_a_disk_that_fills_up_leaves_no_store_but_what_was_done(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real, written = os.pwrite, 0

    def pwrite(fd: int, data: memoryview, offset: int) -> int:
        nonlocal written
        written += len(data)
        if written > 5_000_000:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return real(fd, data, offset)

    monkeypatch.setattr("os.pwrite", pwrite)
    with pytest.raises(RunError, match=r"no space left for .*out\.partial"):
        pack(TINY, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    with pytest.raises(RunError, match="no expert store"):
        ExpertStore.open(tmp_path / "out.partial")
    monkeypatch.undo()
    seen: list[int] = []
    verify(pack(TINY, tmp_path / "out", progress=lambda done, _: seen.append(done)))
    assert seen[0] > 10


PACK_AND_MEASURE = """
import sys
from pathlib import Path
from moerun.checkpoint.hub import resolve
from moerun.devices import peak_host_bytes
from moerun.store.pack import pack
folder = Path(sys.argv[1])
pack(resolve("tiny"), folder / "tiny", precision="bf16")  # whatever is loaded once
before = peak_host_bytes()
pack(folder / "model", folder / "store", precision="bf16")
print((peak_host_bytes() - before) // 1024)
"""


@pytest.mark.slow
def test_one_expert_at_a_time_is_in_memory(tmp_path: Path) -> None:
    config = MixtralConfig(
        vocab_size=64,
        hidden_size=512,
        intermediate_size=1024,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        num_local_experts=16,
        dtype="bfloat16",
    )
    MixtralForCausalLM._from_config(config).save_pretrained(tmp_path / "model")
    checkpoint_kib = (tmp_path / "model" / "model.safetensors").stat().st_size // 1024
    done = subprocess.run(
        [sys.executable, "-c", PACK_AND_MEASURE, str(tmp_path)],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) < checkpoint_kib / 2  # 64 experts, a few of them at a time


def test_the_source_reads_one_expert_of_fused_checkpoints(tmp_path: Path) -> None:
    config = GraniteMoeConfig(
        vocab_size=64,
        hidden_size=64,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        num_local_experts=4,
        num_experts_per_tok=2,
    )
    stock = GraniteMoeForCausalLM(config)
    stock.save_pretrained(tmp_path / "model")
    source = ModelSource(tmp_path / "model")
    parts = source.read_expert(1, 3)
    experts = stock.model.layers[1].block_sparse_moe.experts
    assert torch.equal(parts["gate_up_proj"], experts.gate_up_proj[3])
    assert torch.equal(parts["down_proj"], experts.down_proj[3])


@pytest.mark.slow
def test_an_interrupted_pack_can_be_taken_up(tmp_path: Path) -> None:
    process = slow_pack(tmp_path / "out")
    wait_for_record(process, 5)
    process.send_signal(signal.SIGINT)
    process.wait(timeout=60)
    assert not (tmp_path / "out").exists()
    verify(pack(TINY, tmp_path / "out", precision="4bit"))


def test_short_reads_are_read_on_and_a_file_that_is_cut_off_meanwhile_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = pack(TINY, tmp_path / "whole", precision="bf16").index.source_digest
    real, ends_at = os.pread, [1 << 60]

    def pread(fd: int, n_bytes: int, offset: int) -> bytes:
        return real(fd, max(n_bytes // 2, 1), offset) if offset < ends_at[0] else b""

    monkeypatch.setattr("os.pread", pread)
    assert pack(TINY, tmp_path / "short", precision="bf16").index.source_digest == whole
    ends_at[0] = 5_000_000
    with pytest.raises(RunError, match=r"model\.safetensors was cut off while it was read"):
        pack(TINY, tmp_path / "cut", precision="bf16")


def test_a_read_error_names_the_checkpoint_s_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(fd: int, buffers: object, offset: int) -> int:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr("os.preadv", broken)
    with pytest.raises(RunError, match=r"model\.safetensors: Input/output error"):
        pack(TINY, tmp_path / "out", precision="bf16")


def test_a_store_is_replaced_in_one_step(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "out"
    before = pack(TINY, out, precision="bf16").index
    real = os.fsync

    def full(fd: int) -> None:
        if Path(f"/proc/self/fd/{fd}").readlink().name == "tokenizer.json":
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        real(fd)

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(RunError, match="Input/output error"):
        pack(TINY, out, precision="4bit", force=True)
    assert read_index(out).precision == before.precision == "bf16"
    monkeypatch.undo()
    pack(TINY, out, precision="4bit", force=True)
    assert read_index(out).precision == "4bit"
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
