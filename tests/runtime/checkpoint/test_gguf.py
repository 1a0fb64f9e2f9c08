"""GGUF files, written in llama.cpp's layout: read as the stock model with the blocks' values."""

import json
import re
import shutil
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
import transformers as tf
from gguf.constants import GGML_QUANT_SIZES
from gguf.constants import GGMLQuantizationType as Kind
from moerun.checkpoint.gguf.blocks import block_of, values_of
from moerun.checkpoint.gguf.files import GgufWeights
from moerun.checkpoint.gguf.header import read_header
from moerun.checkpoint.hub import resolve
from moerun.checkpoint.source import ModelSource
from moerun.errors import RunError
from moerun.offload.load import load_offloaded, load_tokenizer
from moerun.store.pack import pack
from support.families import FAMILIES, SMALL
from support.gguf_files import ARCHITECTURES, Converter, TypeOf, gguf_of, random_blocks
from support.runs import ResidentProvider

BLOCKS = [kind for kind in GGML_QUANT_SIZES if kind not in (Kind.Q1_0, Kind.Q8_1, Kind.Q8_K)]
IDS = torch.tensor([[5, 9, 17, 101, 64, 3, 77, 9, 12, 1, 33, 90]])


# What llama.cpp's graphs assume, and files do not say.
ASSUMED: dict[str, dict[str, Any]] = {
    "qwen3_moe": {"norm_topk_prob": True},
    "deepseek_v3": {"norm_topk_prob": True},
    "minimax_m2": {"intermediate_size": 64},
}


def small_config(family: str, **changes: Any) -> Any:
    kind, sizes = FAMILIES[family]
    return kind(**{**SMALL, **sizes, **ASSUMED.get(family, {}), **changes})


def every(kind: Kind) -> TypeOf:
    return lambda _name: kind


@torch.no_grad()
def assert_equals_stock(file: Path, checkpoint: Path, out: Path) -> Any:
    """The logits of the packed file and of the checkpoint, to the last bit."""
    store = pack(file, out, precision="fp32", dense_precision="fp32")
    ours, _ = load_offloaded(store, "cpu", ResidentProvider(store))
    stock = tf.AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32).eval()
    assert torch.equal(ours(IDS).logits, stock(IDS).logits)
    return store


# The slow ones differ from the others in configuration alone.
FAST = ("mixtral", "qwen2_moe", "deepseek_v2", "gpt_oss", "granitemoe")


@pytest.mark.parametrize(
    "family",
    [f if f in FAST else pytest.param(f, marks=pytest.mark.slow) for f in ARCHITECTURES],
)
def test_each_architecture_equals_stock(family: str, tmp_path: Path) -> None:
    file, checkpoint = gguf_of(family, tmp_path, every(Kind.Q8_0), small_config(family))
    assert_equals_stock(file, checkpoint, tmp_path / "store")


def mixed(experts: Kind, others: Kind) -> TypeOf:
    return lambda name: experts if "experts" in name else others


@pytest.mark.parametrize(
    ("experts", "others"),
    [
        (Kind.Q4_0, Kind.F16),
        (Kind.Q5_0, Kind.BF16),
        (Kind.MXFP4, Kind.Q8_0),
        (Kind.Q4_K, Kind.Q6_K),
        pytest.param(Kind.IQ4_NL, Kind.Q5_K, marks=pytest.mark.slow),
        pytest.param(Kind.Q2_K, Kind.Q3_K, marks=pytest.mark.slow),
        pytest.param(Kind.IQ2_XXS, Kind.Q5_1, marks=pytest.mark.slow),
        pytest.param(Kind.TQ1_0, Kind.IQ4_XS, marks=pytest.mark.slow),
    ],
)
def test_each_type_of_block_equals_stock(experts: Kind, others: Kind, tmp_path: Path) -> None:
    config = small_config("mixtral", hidden_size=256, intermediate_size=256, head_dim=64)
    file, checkpoint = gguf_of("mixtral", tmp_path, mixed(experts, others), config)
    held = {Kind(t.ggml_type) for t in read_header(file).tensors.values()}
    assert held == {experts, others, Kind.F32}
    assert_equals_stock(file, checkpoint, tmp_path / "store")


@pytest.mark.parametrize("kind", BLOCKS, ids=lambda kind: kind.name)
def test_blocks_have_the_values_that_gguf_gives_them(kind: Kind) -> None:
    elements, n_bytes = GGML_QUANT_SIZES[kind]
    assert block_of(kind) == (elements, n_bytes)
    if elements == 1:  # values, not blocks
        raw = np.arange(1, 1 + 4 * n_bytes, dtype=np.uint8).reshape(2, -1)
        if kind not in (Kind.F32, Kind.F16, Kind.BF16):
            return  # the package reads them as they are, too
    else:
        raw = random_blocks(kind, 2, 512)
    expected = torch.from_numpy(np.array(gguf.dequantize(raw, kind), np.float32))
    found = values_of(torch.from_numpy(raw.reshape(-1)), kind, tuple(expected.shape)).float()
    assert torch.equal(found, expected)
    assert found.isfinite().all()


@pytest.mark.parametrize("kind", [Kind.Q1_0, Kind.Q8_1])
def test_a_type_that_nobody_reads_is_refused_before_anything_is_read(
    kind: Kind, tmp_path: Path
) -> None:
    writer = gguf.GGUFWriter(tmp_path / "odd.gguf", "llama")
    blocks = np.zeros((2, GGML_QUANT_SIZES[kind][1]), np.uint8)
    writer.add_tensor("token_embd.weight", blocks, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with pytest.raises(RunError, match=f"'token_embd.weight' is of ggml type {kind.name}, which"):
        GgufWeights(tmp_path / "odd.gguf")


def test_old_files_of_deepseek_have_keys_and_values_in_one(tmp_path: Path) -> None:
    config = small_config("deepseek_v2")
    file, checkpoint = gguf_of("deepseek_v2", tmp_path, every(Kind.Q8_0), config, old=True)
    assert "blk.1.attn_kv_b.weight" in read_header(file).tensors
    assert_equals_stock(file, checkpoint, tmp_path / "store")


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A GGUF of a small Mixtral, which tests copy and damage."""
    folder = tmp_path_factory.mktemp("gguf")
    file, _ = gguf_of("mixtral", folder, every(Kind.Q4_0), small_config("mixtral"))
    return file


def test_a_model_in_parts_is_read_from_any_part_or_the_folder(small: Path, tmp_path: Path) -> None:
    config = small_config("mixtral")
    gguf_of("mixtral", tmp_path, every(Kind.Q4_0), config, split_max_tensors=9)
    parts = sorted(tmp_path.glob("*.gguf"))
    assert len(parts) > 2
    assert parts[0].name.endswith(f"-00001-of-0000{len(parts)}.gguf")
    assert resolve(tmp_path) == resolve(parts[2]) == parts[0]
    whole, split = ModelSource(small), ModelSource(parts[0])
    for one, two in zip(whole.read_dense(), split.read_dense(), strict=True):
        assert one[0] == two[0]
        assert torch.equal(one[1], two[1])
    for expert in range(whole.n_experts):
        first, second = (source.read_expert(1, expert) for source in (whole, split))
        assert all(torch.equal(first[name], second[name]) for name in first)
    parts[1].unlink()
    with pytest.raises(RunError, match=rf"{parts[1].name} is missing \(1 of {len(parts)} parts"):
        resolve(parts[0])


def test_a_part_of_another_model_is_refused(tmp_path: Path) -> None:
    config = small_config("mixtral")
    gguf_of("mixtral", tmp_path, every(Kind.Q4_0), config, split_max_tensors=9)
    parts = sorted(tmp_path.glob("*.gguf"))
    shutil.copyfile(parts[2], parts[1])
    with pytest.raises(RunError, match="says that it is part 2 of"):
        resolve(parts[0])


def test_one_expert_costs_its_own_bytes_whatever_the_size_of_the_file(tmp_path: Path) -> None:
    file = tmp_path / "large.gguf"
    writer = gguf.GGUFWriter(file, "llama")
    shape = (1 << 16, 1 << 10, 1 << 10)  # 64 GiB, of which the file has holes alone
    name = "blk.0.ffn_up_exps.weight"
    writer.add_tensor_info(name, shape, np.dtype(np.uint8), 0, raw_dtype=Kind.I8)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    writer.close()
    with file.open("r+b") as opened:
        header_bytes = -(-file.stat().st_size // 32) * 32
        opened.truncate(header_bytes + (1 << 36))
        opened.seek(header_bytes + (40_000 << 20))
        opened.write(b"\x07" * 8)
    weights = GgufWeights(file)
    assert weights.entry(name).shape == shape
    row = weights.read_row(name, 40_000)
    assert row.shape == shape[1:]
    assert row.flatten()[:9].tolist() == [7] * 8 + [0]
    weights.close()


def damaged(small: Path, out: Path, change: Callable[[bytearray], object]) -> Path:
    data = bytearray(small.read_bytes())
    change(data)
    file = out / "damaged.gguf"
    file.write_bytes(data)
    return file


def put(at: int, layout: str, value: int) -> Callable[[bytearray], object]:
    return lambda data: struct.pack_into(layout, data, at, value)


def renamed(old: bytes, new: bytes) -> Callable[[bytearray], object]:
    def change(data: bytearray) -> None:
        assert len(old) == len(new)
        assert old in data
        data[:] = data.replace(old, new)

    return change


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda data: data.clear(), "no GGUF file (it has 0 bytes)"),
        (put(0, "<I", 1), "is no GGUF file: it begins with"),
        (lambda data: data.__setitem__(slice(0, 30), b"version https://git-lfs.github"), "Git LFS"),
        (put(4, "<I", 0x72616720), "is damaged (its header says version 1918986016)"),
        (put(4, "<I", 0), "is damaged (its header says version 0)"),
        (put(4, "<I", 4), "is GGUF version 4, newer than 2 and 3, which are read: update moerun"),
        (put(4, "<I", 1), "is GGUF version 1, only 2 and 3 are read"),
        (put(4, ">I", 3), "of a big-endian machine"),
        (put(8, "<Q", 1 << 50), "its header says 1125899906842624 tensors"),
        (put(16, "<Q", 1 << 50), "1125899906842624 fields"),
        (lambda data: data.__delitem__(slice(60, None)), "cut off or damaged"),
        (lambda data: data.__delitem__(slice(-100, None)), "is cut off: tensor 'blk."),
        (renamed(b"llama", b"lluna"), "is of llama.cpp's architecture 'lluna'"),
        (renamed(b"expert_count", b"expert_comet"), "'llama' model without experts"),
        (renamed(b"ffn_up_exps", b"ffn_ex_hoch"), "is taken by no part of the mixtral model"),
        (renamed(b"token_embd", b"taken_embd"), "has no tensor 'token_embd.weight'"),
        (renamed(b"block_count", b"block_total"), "does not say llama.block_count"),
    ],
)
def test_a_bad_file_is_refused_in_one_line(
    change: Callable[[bytearray], object], said: str, small: Path, tmp_path: Path
) -> None:
    file = damaged(small, tmp_path, change)
    with pytest.raises(RunError, match=re.escape(said)) as refused:
        ModelSource(resolve(file))
    assert str(file) in str(refused.value)
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize(
    ("key", "at", "number", "said"),
    [
        # Of the tensor's name: how many dimensions, the first, the second.
        (b"blk.0.attn_k.weight", 12, 2, "k_proj.weight cannot be made of"),
        (b"attention.head_count", 4, 64, "its attention.head_count is not that of"),
    ],
)
def test_heads_that_no_tensor_has_are_refused_by_name(
    key: bytes, at: int, number: int, said: str, small: Path, tmp_path: Path
) -> None:
    """transformers' converter exchanges the rows of heads, and fails where there are none."""
    at += small.read_bytes().index(key) + len(key)
    file = damaged(small, tmp_path, put(at, "<I", number))
    with pytest.raises(RunError, match=re.escape(said)) as refused:
        pack(file, tmp_path / "store")
    assert "\n" not in str(refused.value)


def huge(small: Path, kind: int, count: int) -> bytes:
    """A header with a list of ``count`` entries that are not there."""
    key = b"general.tags"
    data = small.read_bytes()
    fields = struct.unpack_from("<Q", data, 16)[0] + 1
    listed = struct.pack("<Q", len(key)) + key + struct.pack("<IIQ", 9, kind, count)
    return data[:16] + struct.pack("<Q", fields) + listed + data[24:]


@pytest.mark.parametrize("kind", [4, 8])
def test_a_list_of_a_petabyte_is_refused(kind: int, small: Path, tmp_path: Path) -> None:
    file = tmp_path / "huge.gguf"
    file.write_bytes(huge(small, kind, 1 << 50))
    with pytest.raises(RunError, match="its header says a list of 1,125,899,906,842,624"):
        read_header(file)


def test_a_folder_of_several_models_asks_for_one(small: Path, tmp_path: Path) -> None:
    for name in ("a.gguf", "b.gguf", "mmproj-a.gguf"):
        shutil.copyfile(small, tmp_path / name)
    with pytest.raises(RunError, match=r"has 2 GGUF models \(a.gguf, b.gguf\): give one"):
        resolve(tmp_path)
    assert resolve(tmp_path / "b.gguf") == tmp_path / "b.gguf"


@pytest.fixture(scope="module")
def spoken(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A GGUF of a small random model with the vocabulary of the bundled one."""
    folder = tmp_path_factory.mktemp("spoken")
    torch.manual_seed(0)
    config = small_config("mixtral", vocab_size=4096)
    tf.AutoModelForCausalLM.from_config(config).save_pretrained(folder / "checkpoint")
    tf.AutoTokenizer.from_pretrained(resolve("tiny")).save_pretrained(folder / "checkpoint")
    return Converter(folder / "checkpoint", "mixtral", every(Kind.Q8_0)).write(folder / "m.gguf")


TEXT = "The old man looked at the sea; for i in range(10): print(i)\n"


def test_the_tokenizer_is_made_of_the_header(spoken: Path, tmp_path: Path) -> None:
    store = pack(spoken, tmp_path / "store")
    expected = load_tokenizer(resolve("tiny"))(TEXT).input_ids
    assert load_tokenizer(store.path)(TEXT).input_ids == expected
    assert json.loads((store.path / "config.json").read_text())["eos_token_id"] == 0


def test_a_tokenizer_that_splits_in_an_unknown_way_is_told(spoken: Path, tmp_path: Path) -> None:
    unknown = damaged(spoken, tmp_path, renamed(b"gpt-2", b"gpt-7"))
    blocks, told = ModelSource(unknown).notes
    assert "weights are in blocks (Q8_0)" in blocks
    assert "does not know how damaged.gguf splits text ('gpt-7')" in told


def test_a_tokenizer_that_cannot_be_converted_is_taken_from_files_beside(
    spoken: Path, tmp_path: Path
) -> None:
    length = b"\x04" + bytes(7)
    foreign = damaged(spoken, tmp_path, renamed(length + b"gpt2", length + b"what"))
    with pytest.raises(RunError, match=r"cannot convert the tokenizer of .* put the model's token"):
        load_tokenizer(foreign)
    bundled = resolve("tiny")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copyfile(bundled / name, tmp_path / name)
    assert load_tokenizer(foreign)(TEXT).input_ids == load_tokenizer(bundled)(TEXT).input_ids


@pytest.mark.parametrize("family", ["gpt_oss", "qwen3_moe"])
@torch.no_grad()
def test_mxfp4_experts_are_kept_in_their_own_bits(family: str, tmp_path: Path) -> None:
    sizes = {"intermediate_size": 64} if family == "gpt_oss" else {"moe_intermediate_size": 64}
    kinds = mixed(Kind.MXFP4, Kind.F32)
    file, _ = gguf_of(family, tmp_path, kinds, small_config(family, **sizes))
    kept = pack(file, tmp_path / "native", dense_precision="bf16")
    plain = pack(file, tmp_path / "bf16", precision="bf16", dense_precision="bf16")
    codings = [p.coding for p in kept.index.shape.params if p.is_matrix]
    assert [each and each.name for each in codings] == ["mxfp4", "mxfp4"]
    assert kept.record_bytes < plain.record_bytes
    ours, wanted = (
        load_offloaded(store, "cpu", ResidentProvider(store))[0](IDS).logits
        for store in (kept, plain)
    )
    assert torch.equal(ours, wanted)
