"""One description of a model's sizes, for transformers' models, writers of traces and the bench."""

from __future__ import annotations

import math
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from moepolicy import find_policy
from moeroute.architecture import CORRECTION_BIAS
from moeroute.families import FAMILIES, family_of
from moeroute.models import DenseSizes, ModelShape, describe, find_model, published
from moerun.bench.generated import GeneratedModel, GeneratedStore
from moerun.bench.models import find_config
from moerun.bench.shapes import find_shape
from moerun.checkpoint.families import (
    empty_model,
    expert_shape,
    find_attention,
    find_experts,
    text_alone,
)
from moerun.checkpoint.hub import resolve
from moerun.errors import RunError
from moerun.format.expert import ExpertShape
from moerun.format.names import RECORD_ALIGN
from moerun.format.precision import PLAIN, SCHEMES
from moerun.live.recording import live_meta
from moerun.live.runner import Runner
from moerun.settings import Settings
from moerun.store.pack import pack
from moetrace.model import dense_sizes_of, expert_bytes, expert_params
from support.families import FAMILIES as PUBLISHED
from support.families import save_small, telling_fast
from support.families import small_config as published_config
from support.moe_models import FAMILIES as SMALL
from support.moe_models import small_config

MIXED = {
    "head_dim": 16,
    "num_experts": 8,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 24,
    "shared_expert_intermediate_size": 40,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 16,
    "linear_conv_kernel_dim": 4,
}
DEEP = SMALL["deepseek_v3"]
QUICK = {"deepseek_v3", "gemma4", "nemotron_h"}
# Beside each family's plain form, the forms that change which weights there are.
CASES: list[tuple[str, dict[str, Any]]] = [
    *((family, {}) for family in ("mixtral", "qwen2_moe", "olmoe", "gpt_oss")),
    ("deepseek_v2", {"q_lora_rank": None}),
    ("deepseek_v2", {"attention_bias": True, "n_shared_experts": 2}),
    ("deepseek_v3", {}),
    ("deepseek_v3", {"q_lora_rank": None, "first_k_dense_replace": 2}),
    ("mixtral", {"head_dim": 32, "tie_word_embeddings": True}),
    ("qwen2_moe", {"qkv_bias": False, "decoder_sparse_step": 2, "mlp_only_layers": [3]}),
    ("qwen3_moe", {**MIXED, "mlp_only_layers": [0], "attention_bias": True}),
    ("qwen3_next", MIXED),
    ("qwen3_next", {**MIXED, "layer_types": ["full_attention", *["linear_attention"] * 3]}),
    ("qwen3_5_moe_text", MIXED),
    ("glm4_moe", {**DEEP, "head_dim": 16, "num_key_value_heads": 2}),
    ("glm4_moe", {**DEEP, "head_dim": 16, "attention_bias": True, "use_qk_norm": True}),
    ("gpt_oss", {"attention_bias": False}),
    ("olmoe", {"attention_bias": True}),
]


def described(config: Any) -> ModelShape:
    return describe(config.to_dict() | {"dtype": "bfloat16"}, "this model")


def parts_of(model: Any) -> tuple[dict[str, tuple[int, ...]], dict[str, tuple[int, ...]]]:
    """All but routed experts, by name, and one expert's matrices [output, input]."""
    experts = find_experts(model)
    inside = tuple(f"{name}." for name, _ in experts)
    tied = set(getattr(model, "all_tied_weights_keys", {}))
    dense = {
        name: tuple(tensor.shape)
        for name, tensor in model.state_dict().items()
        if not name.startswith(inside) and name not in tied
    }
    shape = expert_shape(experts[0][1], torch.bfloat16)
    one = {p.name: p.rows_columns if p.is_matrix else p.shape for p in shape.params}
    return dense, one


@pytest.mark.parametrize(("family", "changes"), CASES)
def test_a_config_tells_every_weight_that_transformers_makes(
    family: str, changes: dict[str, Any]
) -> None:
    config = small_config(family, **changes)
    found = described(config)
    model = empty_model(config, torch.bfloat16)
    dense, one = parts_of(model)
    assert found.tensors == dense
    assert found.expert == one
    assert found.n_params == sum(parameter.numel() for parameter in model.parameters())
    assert len(found.layers) == len(find_experts(model)) == found.n_layers


SMALL_PUBLISHED = [
    *("gemma4", "deepseek_v4", "glm4_moe_lite", "qwen3_5_moe", "deepseek_v32", "dots1"),
    *("exaone_moe", "flex_olmo", "glm_moe_dsa", "granitemoe", "hy_v3", "minimax_m2", "solar_open"),
]


@pytest.mark.parametrize("family", SMALL_PUBLISHED)
def test_a_config_of_text_and_images_tells_the_weights_of_its_text(family: str) -> None:
    config = published_config(family)
    found = described(config)
    dense, one = parts_of(empty_model(text_alone(config), torch.bfloat16))
    assert (found.tensors, found.expert) == (dense, one)


def test_every_family_is_among_the_cases() -> None:
    tested = {family for family, _ in CASES} | {*SMALL_PUBLISHED}
    known = {each.model_type for each in FAMILIES if each.weights}
    assert {*map(family_of, tested)} == {*map(family_of, known)}


@pytest.mark.parametrize("name", sorted(published()))
def test_the_table_has_the_weights_that_transformers_makes(name: str) -> None:
    from transformers import AutoConfig

    fields = dict(published()[name])
    fields.pop("quantization_config", None)
    family = fields.pop("model_type")
    model = empty_model(AutoConfig.for_model(family, **fields), torch.bfloat16)
    found = find_model(name)
    dense, one = parts_of(model)
    assert (found.tensors, found.expert) == (dense, one)
    own = sum(math.prod(shape) for tensor, shape in dense.items() if CORRECTION_BIAS not in tensor)
    assert found.n_params == own + found.n_layers * found.n_experts * found.expert_params


@pytest.mark.parametrize("name", ["mixtral-8x7b", "gpt-oss-20b", "deepseek-v2-lite", "olmoe-1b-7b"])
def test_bytes_of_an_expert_are_those_of_its_record(name: str) -> None:
    config = find_config(name)
    model = empty_model(config, torch.bfloat16)
    shape = expert_shape(find_experts(model)[0][1], torch.bfloat16)
    found = find_model(name).expert_bytes()
    for precision in (*PLAIN, *SCHEMES):
        try:
            record_bytes = shape.record(precision).record_bytes
        except RunError:
            assert precision not in found
        else:
            assert found[precision] == record_bytes
    attention = {
        f"{module}.weight": ExpertShape.matrix(*linear.weight.shape).record("3bit").record_bytes
        for module, linear in find_attention(model)
    }
    plain, packed = find_model(name).dense(), find_model(name).dense("3bit")
    tensors = find_model(name).tensors
    first = find_model(name).layers[0]
    saved = sum(2 * math.prod(tensors[n]) - b for n, b in attention.items() if n.startswith(first))
    assert plain.layer_bytes - packed.layer_bytes == saved


@pytest.mark.parametrize("family", ["mixtral", "gpt_oss", "deepseek_v3", "qwen2_moe", "olmoe"])
def test_every_writer_of_traces_says_the_same_of_one_model(family: str, tmp_path: Path) -> None:
    """The recorder, which sees a running model, the store, and the config alone."""
    from support.moe_models import random_model

    model = random_model(family).to(torch.bfloat16)
    model.config.dtype = torch.bfloat16
    model.save_pretrained(tmp_path / "checkpoint")
    index = pack(tmp_path / "checkpoint", tmp_path / "store")
    of_store = DenseSizes(index.index.layer_bytes, index.index.token_bytes)
    assert dense_sizes_of(model, torch.bfloat16) == of_store
    # What it computes in is not what it is stored in.
    assert dense_sizes_of(model.float(), torch.bfloat16) == of_store
    found = find_model(str(tmp_path / "checkpoint"))
    assert found.dense() == of_store
    assert found.expert_bytes()["bf16"] == index.index.layout.record_bytes
    assert expert_params(model, torch.bfloat16) == found.expert_params
    for precision, size in expert_bytes(model, torch.bfloat16).items():
        assert found.expert_bytes()[precision] == size
    index.close()


def test_the_bundled_models_tokens_read_the_last_norm_too(tmp_path: Path) -> None:
    """1,049,088 bytes: a row of 128, a norm of 128 and a head of 4096 x 128 in 16 bits."""
    store = pack(resolve("tiny"), tmp_path / "store")
    with Runner(store, Settings(find_policy("lru"), slots=4)) as runner:
        live = live_meta(runner, seed=0)
    described_so = find_model(str(resolve("tiny")))
    assert live.token_bytes == described_so.dense().token_bytes == 1_049_088
    assert live.layer_bytes == described_so.dense().layer_bytes == 100_864
    assert live.expert_params == described_so.expert_params
    assert live.dense_precision == described_so.dense_label() == "fp16"
    bench = GeneratedModel(find_config("tiny"), name="tiny", precision="fp16", seed=0)
    assert (bench.index.layer_bytes, bench.index.token_bytes) == described_so.dense()


def test_what_cannot_be_told_from_the_experts_is_unknown() -> None:
    """Experts kept in a way of their own would be counted among the dense weights."""
    assert dense_sizes_of(torch.nn.Linear(2, 2), torch.float32) is None
    assert expert_params(torch.nn.Linear(2, 2), torch.float32) is None


@pytest.mark.parametrize("family", telling_fast(sorted(PUBLISHED), slow={*PUBLISHED} - QUICK))
def test_a_configuration_alone_tells_what_a_checkpoint_has(family: str, tmp_path: Path) -> None:
    """What `--plan` and `moerun bench` count before a download, for every family."""
    folder = save_small(family, tmp_path / "model")
    store = pack(folder, tmp_path / "store")
    (tmp_path / "alone").mkdir()
    shutil.copy(folder / "config.json", tmp_path / "alone")
    shape = find_shape(str(tmp_path / "alone"))
    shape.check_family()
    model = GeneratedModel(find_config(shape), name="alone", precision="native", seed=0)
    generated = GeneratedStore(model, held=False)
    assert generated.dense_tensors() == store.dense_tensors()
    assert (generated.n_layers, generated.n_experts) == (store.n_layers, store.n_experts)
    one, other = generated.index, store.index
    assert (one.top_k, one.n_shared_experts) == (other.top_k, other.n_shared_experts)
    assert (one.layer_bytes, one.token_bytes) == (other.layer_bytes, other.token_bytes)
    assert one.shape.n_weights == other.shape.n_weights
    # Where a file has its experts at an odd place, so have the records: a page more at most.
    assert 0 <= store.record_bytes - generated.record_bytes <= RECORD_ALIGN


def test_a_configuration_nested_too_deep_is_refused_by_name(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": ' + "[" * 100_000)
    with pytest.raises(RunError, match=r"config\.json cannot be used: it is not JSON"):
        find_shape(str(tmp_path))
