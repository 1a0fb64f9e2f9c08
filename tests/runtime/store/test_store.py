"""The expert store: what is packed is read back, and what is damaged is named."""

import json
import mmap
import os
import re
import shutil
import subprocess
import sys
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from moerun.checkpoint.hub import resolve
from moerun.errors import RunError
from moerun.format.layout import RecordLayout
from moerun.format.tensorfile import TensorFile, memory_of
from moerun.offload.load import load_offloaded, load_tokenizer
from moerun.store.expert_store import ExpertStore
from moerun.store.index import read_index
from moerun.store.pack import pack
from safetensors import safe_open
from support.runs import ResidentProvider
from support.shapes import gated_expert
from support.stores import TINY, verify


@pytest.fixture(scope="module")
def packed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("store") / "tiny"
    pack(resolve("tiny"), out).close()
    return out


@pytest.fixture
def copied(packed: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(packed, tmp_path / "tiny"))


def test_records_hold_the_checkpoint_weights_bit_for_bit(packed: Path) -> None:
    store = ExpertStore.open(packed)
    buffer = torch.empty(store.record_bytes, dtype=torch.uint8)
    with safe_open(resolve("tiny") / "model.safetensors", "pt") as checkpoint:
        for layer, expert in ((0, 0), (3, 5), (7, 7)):
            store.read_into(layer * store.n_experts + expert, buffer)
            prefix = f"model.layers.{layer}.block_sparse_moe.experts.{expert}"
            gate, up, down = (
                checkpoint.get_tensor(f"{prefix}.{name}.weight") for name in ("w1", "w3", "w2")
            )
            views = store.layout.views(buffer)
            assert torch.equal(views["gate_up_proj"], torch.cat([gate, up]))
            assert torch.equal(views["down_proj"], down)


def test_views_share_the_buffer(packed: Path) -> None:
    store = ExpertStore.open(packed)
    buffer = torch.zeros(store.record_bytes, dtype=torch.uint8)
    views = store.layout.views(buffer)
    views["down_proj"].fill_(1.0)
    assert buffer.any()
    assert {view.untyped_storage().data_ptr() for view in views.values()} == {buffer.data_ptr()}


def test_a_record_can_be_read_past_the_page_cache(packed: Path) -> None:
    store = ExpertStore.open(packed)
    assert all(store.location(key).offset % 4096 == 0 for key in range(store.n_keys))
    path, offset, nbytes = store.location(11)
    aligned = mmap.mmap(-1, nbytes)
    try:
        fd = os.open(path, os.O_RDONLY | os.O_DIRECT)
    except OSError:
        pytest.skip("this file system has no direct reads")
    try:
        assert os.preadv(fd, [aligned], offset) == nbytes
    finally:
        os.close(fd)
    buffer = torch.empty(nbytes, dtype=torch.uint8)
    store.read_into(11, buffer)
    assert memory_of(buffer) == aligned[:]


def test_the_expert_files_are_ordinary_safetensors(packed: Path) -> None:
    store = ExpertStore.open(packed)
    buffer = torch.empty(store.record_bytes, dtype=torch.uint8)
    store.read_into(store.n_experts + 2, buffer)
    with safe_open(packed / "experts-00001.safetensors", "pt") as file:
        assert torch.equal(file.get_tensor("expert.2"), buffer)


def test_the_index_comes_back_as_it_was_written(packed: Path) -> None:
    index = read_index(packed)
    assert type(index).from_json(json.loads(json.dumps(index.to_json()))) == index
    assert (index.n_layers, index.n_experts, index.top_k) == (8, 8, 2)
    assert index.model == "tiny"
    assert index.packages["torch"] == torch.__version__


def test_bytes_of_layer_and_token_follow_from_the_dims(packed: Path) -> None:
    index = read_index(packed)
    hidden, kv, experts, vocabulary = 128, 64, 8, 4096
    attention = 2 * hidden * hidden + 2 * hidden * kv
    assert index.layer_bytes == 2 * (attention + experts * hidden + 2 * hidden)
    assert index.token_bytes == 2 * hidden * (1 + 1 + vocabulary)  # a row, the last norm, the head


def flip(path: Path, offset: int, bits: int = 1) -> None:
    with path.open("r+b") as file:
        file.seek(offset)
        byte = file.read(1)[0]
        file.seek(offset)
        file.write(bytes([byte ^ bits]))


def load(folder: Path) -> None:
    with ExpertStore.open(folder) as store:
        load_offloaded(store, "cpu", ResidentProvider(store, "cpu"))


@pytest.mark.parametrize("which", [0, 7, -1])
@pytest.mark.parametrize("at", [0, 0.5, 1])
def test_a_flipped_byte_of_a_dense_tensor_names_it(copied: Path, which: int, at: float) -> None:
    path = copied / "dense.safetensors"
    with TensorFile(path) as file:
        entry = list(file.entries.values())[which]
    flip(path, entry.offset + int(at * (entry.nbytes - 1)))
    message = rf"^{re.escape(entry.name)} is damaged .*{re.escape(str(path))}: .*pack it again"
    with pytest.raises(RunError, match=message):
        load(copied)
    with ExpertStore.open(copied) as store, pytest.raises(RunError, match=message):
        verify(store)


@settings(max_examples=300, deadline=None)
@given(at=st.floats(0, 1, exclude_max=True), header=st.booleans(), bits=st.integers(1, 255))
def test_no_flipped_byte_changes_a_dense_weight(
    packed: Path, at: float, header: bool, bits: int
) -> None:
    path = packed / "dense.safetensors"
    whole, found, refused = read_dense(packed), {}, ""
    with TensorFile(path) as file:
        offset = int(at * (file.header_bytes if header else file.file_bytes))
    flip(path, offset, bits)
    try:
        found = read_dense(packed)
    except RunError as error:
        refused = str(error)
    finally:
        flip(path, offset, bits)
    # Some bytes of the header say nothing of any tensor.
    assert str(path) in refused or offset < file.header_bytes
    assert all(torch.equal(tensor, whole[name]) for name, tensor in found.items())


def read_dense(folder: Path) -> dict[str, torch.Tensor]:
    with ExpertStore.open(folder) as store:
        return dict(store.read_dense())


@pytest.mark.slow
def test_a_damaged_dense_tensor_is_one_line_of_the_command(copied: Path) -> None:
    path = copied / "dense.safetensors"
    flip(path, path.stat().st_size - 1)
    main = "from moerun.cli import main; main()"
    done = subprocess.run(
        [sys.executable, "-c", main, "--model", copied, "--prompt", "It was", "--slots", "2"],
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=120,
        env={**os.environ, "OMP_NUM_THREADS": "1", "COLUMNS": "400"},
        check=False,
    )
    with TensorFile(path) as file:
        name = list(file.entries)[-1]
    assert (done.returncode, done.stdout) == (1, "")
    assert "Traceback" not in done.stderr
    line = done.stderr.strip().splitlines()[-1]
    assert line.startswith(f"error: {name} is damaged (its checksum differs) in {path}")


def test_a_dense_file_cut_off_is_refused_at_opening(copied: Path) -> None:
    path = copied / "dense.safetensors"
    os.truncate(path, path.stat().st_size - 1)
    with pytest.raises(RunError, match=r"dense\.safetensors is no whole safetensors file"):
        load(copied)


def test_a_store_from_before_dense_checksums_opens(copied: Path) -> None:
    path = copied / "index.json"
    described = json.loads(path.read_text())
    assert set(described["dense"].pop("crc32")) == set(read_dense(copied))
    path.write_text(json.dumps(described))
    assert read_index(copied).dense_crc32 is None
    load(copied)
    described["dense"]["crc32"] = [1]
    path.write_text(json.dumps(described))
    with pytest.raises(RunError, match=r"index\.json is damaged"):
        ExpertStore.open(copied)


def test_a_flipped_byte_is_found_when_the_record_is_first_read(copied: Path) -> None:
    store = ExpertStore.open(copied)
    key = 2 * store.n_experts + 5
    path, offset, _ = store.location(key)
    flip(path, offset + 1000)
    buffer = torch.empty(store.record_bytes, dtype=torch.uint8)
    store.read_into(key - 1, buffer)
    with pytest.raises(RunError, match=r"expert 5 of layer 2 .*experts-00002\.safetensors"):
        store.read_into(key, buffer)
    with pytest.raises(RunError, match="expert 5 of layer 2"):
        verify(store)


def test_a_record_is_checked_once_by_each_store_that_is_opened(copied: Path) -> None:
    store = ExpertStore.open(copied)
    buffer = torch.empty(store.record_bytes, dtype=torch.uint8)
    store.read_into(0, buffer)
    path, offset, _ = store.location(0)
    with path.open("r+b") as file:
        file.seek(offset)
        file.write(b"\xff\xff\xff\xff")
    store.read_into(0, buffer)
    assert zlib.crc32(memory_of(buffer)) != store.index.layers[0].crc32[0]
    with pytest.raises(RunError, match="checksum"):
        ExpertStore.open(copied).read_into(0, buffer)


def test_a_file_cut_off_is_refused_at_opening_and_named_at_reading(copied: Path) -> None:
    store = ExpertStore.open(copied)
    key = store.n_keys - 1
    path, offset, _ = store.location(key)
    with path.open("r+b") as file:
        file.truncate(offset + 100)
    with pytest.raises(RunError, match="expert 7 of layer 7 is cut off after 100 of"):
        store.read_into(key, torch.empty(store.record_bytes, dtype=torch.uint8))
    with pytest.raises(RunError, match=r"experts-00007\.safetensors has .* bytes instead of"):
        ExpertStore.open(copied)


def rewrite(path: Path, pattern: str, by: str) -> None:
    text, n = re.subn(pattern, by, path.read_text())
    assert n == 1
    path.write_text(text)


def move_a_record(path: Path, offset: int) -> None:
    described = json.loads(path.read_text())
    described["layers"][0]["offsets"][0] = offset
    path.write_text(json.dumps(described))


@pytest.mark.parametrize(
    ("break_it", "message"),
    [
        (lambda d: (d / "index.json").unlink(), "no expert store"),
        (lambda d: (d / "index.json").write_text("{"), "not JSON"),
        (lambda d: (d / "index.json").write_text('{"weight_map": {}}'), "not the index"),
        (lambda d: (d / "index.json").write_text("[1]"), "not the index"),
        (lambda d: rewrite(d / "index.json", r'("top_k":\s*)\d+', r"\g<1>1e999"), "is damaged"),
        (
            lambda d: rewrite(d / "index.json", r'"skew":\s*{[^}]*}', '"skew": {"lm_head": -64}'),
            "is damaged",
        ),
        (lambda d: move_a_record(d / "index.json", 1 << 70), "is damaged .a record at"),
        (lambda d: move_a_record(d / "index.json", -8), "is damaged .a record at -8 of a file"),
        (lambda d: (d / "index.json").write_text("[" * 100_000), "not JSON"),
        (lambda d: (d / "experts-00003.safetensors").unlink(), "experts of layer 3"),
        (lambda d: (d / "dense.safetensors").unlink(), "dense.safetensors is missing"),
        (lambda d: (d / "dense.safetensors").write_bytes(b"abc"), "no whole safetensors"),
    ],
)
def test_what_is_no_whole_store_is_refused(
    copied: Path, break_it: Callable[[Path], object], message: str
) -> None:
    break_it(copied)
    with pytest.raises(RunError, match=message):
        ExpertStore.open(copied)


def test_another_format_version_is_refused(copied: Path) -> None:
    path = copied / "index.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"version": 99}))
    with pytest.raises(RunError, match="version 99"):
        ExpertStore.open(copied)


@pytest.mark.parametrize("field", ["model", "layers", "expert", "dense"])
def test_an_index_without_a_field_is_damaged(copied: Path, field: str) -> None:
    path = copied / "index.json"
    described = json.loads(path.read_text())
    del described[field]
    path.write_text(json.dumps(described))
    with pytest.raises(RunError, match="damaged"):
        ExpertStore.open(copied)


@pytest.mark.parametrize(
    ("where", "value"),
    [
        *((("dense",), 0.5), (("expert",), [1]), (("model", "name"), 3), (("packages",), {"a": 1})),
        *((("layers", 0, "file"), 7), (("layers", 0, "module"), None), (("layers", 0), "x")),
        *((("layers", 0, "file"), "../experts-00000.safetensors"), (("layers", 0, "file"), "a\0")),
        *((("dense", "skew"), [1]), (("source",), None), (("model", "revision"), {})),
    ],
)
def test_an_index_with_something_else_in_a_place_is_damaged(
    copied: Path, where: tuple[Any, ...], value: Any
) -> None:
    path = copied / "index.json"
    described = json.loads(path.read_text())
    at = described
    for step in where[:-1]:
        at = at[step]
    at[where[-1]] = value
    path.write_text(json.dumps(described))
    with pytest.raises(RunError, match=r"index\.json is damaged"):
        ExpertStore.open(copied)


def test_a_tokenizer_whose_settings_are_of_another_kind_is_refused(tmp_path: Path) -> None:
    shutil.copytree(TINY, tmp_path / "model")
    path = tmp_path / "model/tokenizer_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"model_max_length": [1]}))
    with pytest.raises(RunError, match=r"the tokenizer of .*model cannot be used: "):
        load_tokenizer(tmp_path / "model")


def test_a_folder_that_does_not_exist(tmp_path: Path) -> None:
    with pytest.raises(RunError, match="no expert store"):
        ExpertStore.open(tmp_path / "nowhere")


def test_a_key_the_store_does_not_have(packed: Path) -> None:
    store = ExpertStore.open(packed)
    with pytest.raises(RunError, match="8 layers of 8 experts"):
        store.location(64)


# Bits a weight: codes, an 8-bit scale and zero a group, 64 bits of ranges for 128 groups.
@pytest.mark.parametrize(
    ("precision", "megabytes"), [("fp16", 352.3), ("4bit", 93.8), ("3bit", 71.7), ("2bit", 66.7)]
)
def test_record_sizes_at_the_dims_of_mixtral(precision: str, megabytes: float) -> None:
    layout = gated_expert(hidden=4096, inner=14336).record(precision)
    assert layout.record_bytes / 1e6 == pytest.approx(megabytes, abs=0.06)
    assert all(part.offset % 256 == 0 for part in layout.parts)
    assert layout.record_bytes % 4096 == 0


def test_a_layout_comes_back_from_json() -> None:
    layout = gated_expert(hidden=128, inner=256).record("3bit")
    assert RecordLayout.from_json(json.loads(json.dumps(layout.to_json()))) == layout


def test_an_unknown_precision_lists_what_there_is() -> None:
    with pytest.raises(RunError, match="native, fp32, fp16, bf16, 4bit, 3bit, 2bit"):
        gated_expert(hidden=128, inner=256).record("5bit")


def test_columns_that_do_not_divide_into_groups_are_refused() -> None:
    with pytest.raises(RunError, match=r"gate_up_proj has 96 input columns.*groups of 64"):
        gated_expert(hidden=96, inner=256).record("4bit")
