"""GGUF files as people publish them, Q4_K_M and its like: experts kept in the file's own bits."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as tf
from gguf.constants import GGMLQuantizationType as Kind
from moepolicy import find_policy
from moerun.checkpoint.source import ModelSource
from moerun.errors import RunError
from moerun.format.blocks import dequantise_blocks
from moerun.format.expert import KIND
from moerun.kernels.slots import SlotForm
from moerun.live.runner import Runner
from moerun.live.sampling import Sampling
from moerun.memory.fit import plan_memory
from moerun.offload.load import load_offloaded
from moerun.settings import Settings
from moerun.store.expert_store import ExpertStore
from moerun.store.index import BLOCK_VERSION
from moerun.store.pack import pack
from support.families import FAMILIES, SMALL
from support.gguf_files import TypeOf, gguf_of
from support.runs import ResidentProvider

IDS = torch.tensor([[5, 9, 17, 101, 64, 3, 77, 9, 12, 1, 33, 90]])


def config_of(family: str = "qwen3_moe", **changes: Any) -> Any:
    """Sizes that K blocks divide."""
    kind, sizes = FAMILIES[family]
    wide = {"hidden_size": 256, "intermediate_size": 256, "moe_intermediate_size": 256}
    return kind(**{**SMALL, **sizes, "norm_topk_prob": True, **wide, "head_dim": 64, **changes})


def as_q4_k_m(name: str) -> Kind:
    """llama.cpp's mixture: of some layers the matrices down, and values, have more bits."""
    if "experts" not in name:
        return Kind.Q6_K if "v_proj" in name else Kind.Q4_K
    layer = int(re.search(r"layers\.(\d+)", name)[1])  # type: ignore[index]
    return Kind.Q6_K if "down_proj" in name and layer % 2 else Kind.Q4_K


def every(kind: Kind) -> TypeOf:
    return lambda name: kind if "experts" in name else Kind.Q8_0


def packed(folder: Path, type_of: Callable[[str], Kind], **options: Any) -> Any:
    """A GGUF file, its values as a checkpoint, and its native store."""
    file, checkpoint = gguf_of("qwen3_moe", folder, type_of, config_of())
    return file, checkpoint, pack(file, folder / "store", **options)


def assert_kept(file: Path, store: ExpertStore) -> None:
    """Each expert's record stands for the very values of the file."""
    source = ModelSource(file)
    record = torch.empty(store.record_bytes, dtype=torch.uint8)
    for layer in range(store.n_layers):
        kind = store.index.shape.kinds[store.index.layers[layer].kind]
        for expert in (0, store.n_experts - 1):
            store.read_into(layer * store.n_experts + expert, record)
            views = store.index.layout_of(layer).views(record)
            wanted = source.read_expert(layer, expert)
            for param, scheme in zip(kind.params, kind.blocks("native"), strict=True):
                parts = {part: views[f"{param.name}.{part}"] for part in ("codes", "scales")}
                kept = dequantise_blocks(parts, scheme, param.shape[0])
                assert torch.equal(kept, wanted[param.name])
    source.close()


@torch.no_grad()
def assert_near_stock(store: ExpertStore, checkpoint: Path, within: float) -> None:
    ours, _ = load_offloaded(store, "cpu", ResidentProvider(store))
    stock = tf.AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32).eval()
    logits, wanted = ours(IDS).logits.float(), stock(IDS).logits
    assert (logits - wanted).norm() < within * wanted.norm()


@pytest.mark.slow  # each type is compiled
@pytest.mark.parametrize("kind", [Kind.Q4_K, Kind.Q5_K, Kind.Q6_K, Kind.Q5_0, Kind.Q8_0])
def test_a_file_of_one_type_is_kept_to_the_bit(kind: Kind, tmp_path: Path) -> None:
    file, checkpoint, store = packed(tmp_path, every(kind))
    assert store.index.expert_format == kind.name.lower()
    assert store.index.to_json()["version"] == BLOCK_VERSION
    assert not store.index.shape.others
    assert_kept(file, store)
    # Activations of 8 bits in groups of 32, and of bfloat16 elsewhere.
    assert_near_stock(store, checkpoint, 0.1)


def test_q4_k_m_keeps_each_layer_in_its_own_types(tmp_path: Path) -> None:
    file, checkpoint, store = packed(tmp_path, as_q4_k_m)
    index = store.index
    assert index.expert_format == "q4_k+q6_k"
    assert [layer.kind for layer in index.layers] == [n % 2 for n in range(store.n_layers)]
    assert [scheme.name for scheme in index.shape.kinds[0].blocks("native")] == ["q4_k", "q4_k"]
    assert [scheme.name for scheme in index.shape.kinds[1].blocks("native")] == ["q4_k", "q6_k"]
    assert ExpertStore.open(store.path).index == index
    assert_kept(file, store)
    assert_near_stock(store, checkpoint, 0.1)


@pytest.mark.parametrize("family", ["mixtral", "qwen3_moe"])
def test_attention_is_kept_in_the_blocks_of_the_file(family: str, tmp_path: Path) -> None:
    """Also where llama.cpp has changed the order of the rows (Mixtral's queries and keys)."""
    file, checkpoint = gguf_of(family, tmp_path, as_q4_k_m, config_of(family))
    store = pack(file, tmp_path / "store")
    attention = store.index.attention
    assert attention is not None
    assert store.index.attention_precision == "q4_k+q6_k"
    assert len(attention.linears) == 4 * store.config().num_hidden_layers
    source = ModelSource(file)
    for linear in attention.linears:
        assert linear.coding is not None
        layout = attention.layout(linear)
        record = torch.empty(layout.record_bytes, dtype=torch.uint8)
        store.read_attention(linear.module, record)
        parts = {k.removeprefix("weight."): v for k, v in layout.views(record).items()}
        kept = dequantise_blocks(parts, linear.coding, linear.rows)
        assert torch.equal(kept, source.read_attention(linear.module)["weight"])
        assert (linear.coding.name == "q6_k") == linear.module.endswith("v_proj")
    source.close()
    assert ExpertStore.open(store.path).index == store.index
    assert_near_stock(store, checkpoint, 0.1)


def test_attention_that_is_asked_for_in_another_precision_is_not_kept(tmp_path: Path) -> None:
    _, _, store = packed(tmp_path, as_q4_k_m, attention="bf16")
    assert store.index.attention is None
    assert store.index.attention_precision == "bf16"
    assert store.index.expert_format == "q4_k+q6_k"


def test_policies_and_slots_change_no_token_of_mixed_layers(tmp_path: Path) -> None:
    """One cache for all layers, so that a slot holds experts of both kinds in turn."""
    _, _, store = packed(tmp_path, as_q4_k_m)
    sampling = replace(Sampling(), stop=False, max_new_tokens=12)
    told = []
    for policy, options in (
        ("lru", {"slots": store.n_experts}),
        ("lru", {"slots": 2}),
        ("lru", {"slots": 3, "scope": "global"}),
        ("foresight-bypass", {"slots": 3}),
    ):
        settings = Settings(policy=find_policy(policy), **options)
        with Runner(store, settings) as runner:
            told.append(runner.generation().run(IDS, sampling).token_ids)
    assert len(told[0]) == 12
    assert all(ids == told[0] for ids in told[1:])


def test_records_of_mixed_layers_have_one_length(tmp_path: Path) -> None:
    """That of the largest: 512 rows of gate and up in 4.5 bits, 256 down in 6.5625, and the tag."""
    _, _, store = packed(tmp_path, as_q4_k_m)
    parts = 512 * 256 * 9 // 16 + 256 * 256 * 105 // 128
    assert store.record_bytes == -(-(256 + parts) // 4096) * 4096
    assert SlotForm(store.index.shape, "native", torch.device("cpu")).slot_bytes == (
        store.record_bytes
    )
    plan = plan_memory(store, Settings(policy=find_policy("lru"), slots=2))
    assert plan.slot_bytes == store.record_bytes
    record = torch.empty(store.record_bytes, dtype=torch.uint8)
    for layer in range(store.n_layers):
        store.read_into(layer * store.n_experts, record)
        assert store.index.layout_of(layer).views(record)[KIND].tolist() == [layer % 2]


def test_another_store_of_the_file_shares_its_records(tmp_path: Path) -> None:
    file, _, store = packed(tmp_path, as_q4_k_m)
    again = pack(file, tmp_path / "again", reuse=[store])
    assert again.index.layers == store.index.layers
    shared = [layer.file for layer in again.index.layers]
    assert all((again.path / name).samefile(store.path / name) for name in shared)


def test_what_no_kernel_multiplies_is_kept_dequantised_and_told(tmp_path: Path) -> None:
    def with_iq(name: str) -> Kind:
        return Kind.IQ4_NL if "down_proj" in name else as_q4_k_m(name)

    told: list[str] = []
    _, _, store = packed(tmp_path, with_iq, report=told.append)
    assert store.index.expert_format == "native"
    assert [line for line in told if "IQ4_NL" in line and "experts are kept as bfloat16" in line]


def test_a_gpu_is_told_of_the_types(tmp_path: Path) -> None:
    _, _, store = packed(tmp_path, as_q4_k_m)
    with pytest.raises(RunError, match=r"weights in q4_k\+q6_k are computed on the CPU alone"):
        SlotForm(store.index.shape, "native", torch.device("cuda"))
