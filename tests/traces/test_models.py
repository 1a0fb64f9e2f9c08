"""The table of models, configurations that people give, and sizes put into a trace's metadata."""

from __future__ import annotations

import json
import tomllib
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from moeroute import TraceError, TraceMeta, open_trace
from moeroute.models import TABLE, dense_sizes, describe, find_model, layer_prefix, published
from moeroute.sizes import GivenSizes, sizes_line, unknown_sizes
from support.tracekit import make_meta, make_rows, write

MIXTRAL: dict[str, Any] = {**published()["mixtral-8x7b"]}

# Billions of parameters as their publishers say, or as their names do.
BILLIONS = {
    "mixtral-8x7b": 46.7,
    "mixtral-8x22b": 140.6,
    "qwen3-30b-a3b": 30.5,
    "qwen3-next-80b-a3b": 79.7,
    "qwen3.6-35b-a3b": 34.7,
    "gpt-oss-20b": 20.9,
    "gpt-oss-120b": 116.8,
    "deepseek-v2-lite": 15.7,
    "deepseek-v3": 671.0,
    "glm-4.5-air": 106.9,
    "olmoe-1b-7b": 6.9,
    "glm-4.7-flash": 29.9,
    "gemma-4-26b-a4b": 25.2,
    "deepseek-v4-flash": 284.3,
}


@pytest.mark.parametrize("name", sorted(published()))
def test_every_entry_has_the_weights_of_its_name(name: str) -> None:
    assert find_model(name).n_params / 1e9 == pytest.approx(BILLIONS[name], abs=0.06)
    entry = tomllib.loads(TABLE.read_text())[name]
    assert entry["repository"].count("/") == 1
    assert entry["dtype"] == "bfloat16"


@pytest.mark.parametrize(
    ("name", "experts", "layer_bytes", "token_bytes"),
    [
        # q and o 4096 x 4096, k and v 1024 x 4096, gate 8 x 4096, two norms, in 16 bits; and
        # 32000 x 4096 of the head, a row and a norm.
        (
            "mixtral-8x7b",
            {"bf16": 352_321_536},
            2 * (2 * 4096 * 4096 + 2 * 1024 * 4096 + 8 * 4096 + 2 * 4096),
            2 * 4096 * (32000 + 2),
        ),
        # 24.9 million values of 4 bits, a byte for 32 of them, and 8640 biases of 16 bits.
        (
            "gpt-oss-20b",
            {"mxfp4": 3 * 2880 * 2880 * 17 // 32 + 2 * 8640},
            2
            * (
                (4096 + 2 * 512) * 2881
                + 2880 * 4097
                + 64
                + 32 * 2881  # router
                + 2 * 2880
            ),
            2 * 2880 * (201088 + 2),
        ),
    ],
)
def test_bytes_by_hand(
    name: str, experts: dict[str, int], layer_bytes: int, token_bytes: int
) -> None:
    found = find_model(name)
    sizes = found.expert_bytes()
    first = next(iter(sizes))
    assert {first: sizes[first]} == experts
    assert found.dense() == (layer_bytes, token_bytes)


def test_shared_experts_are_a_layers_and_layers_without_experts_a_tokens() -> None:
    """DeepSeek-V2-Lite: 26 of 27 layers have experts; each has two shared ones of 1408."""
    lite = find_model("deepseek-v2-lite")
    assert (lite.n_layers, lite.n_all_layers, lite.n_shared_experts) == (26, 27, 2)
    alone = describe({**published()["deepseek-v2-lite"], "n_shared_experts": 0}, "alone")
    shared = 2 * 3 * 2048 * 2 * 1408
    assert lite.dense().layer_bytes - alone.dense().layer_bytes == shared
    moe = describe({**published()["deepseek-v2-lite"], "first_k_dense_replace": 0}, "all")
    first_layer = lite.dense().token_bytes - moe.dense().token_bytes
    assert first_layer == 2 * sum(
        rows * columns
        for rows, columns in (
            (3072, 2048),
            (576, 2048),
            (4096, 512),
            (2048, 2048),
            (1, 512),
            *[(10944, 2048)] * 3,
            (2, 2048),
        )
    )


def test_precision_of_attention_is_counted_apart() -> None:
    model = find_model("mixtral-8x7b")
    native, packed = model.dense(), model.dense("4bit")
    assert native.token_bytes == packed.token_bytes
    # 84 MB in 16 bits; 4.26 bits of each of attention's 42 million weights, as the base paper.
    assert packed.layer_bytes == pytest.approx(22.4e6, rel=0.01)
    assert model.dense("bf16") == native
    assert model.dense_label("4bit") == "bf16, attention 4bit"
    with pytest.raises(TraceError, match=r"attention in '5bit': choose from native"):
        model.dense("5bit")


def test_deepseek_v3_is_counted_in_the_8_bits_it_is_published_in() -> None:
    model = find_model("deepseek-v3")
    sizes = model.expert_bytes()
    assert next(iter(sizes)) == "fp8"
    assert sizes["fp8"] == 3 * 7168 * 2048 + 4 * (32 * 56 + 56 * 16)
    assert model.dense_label() == "fp8"
    plain = describe({**published()["deepseek-v3"], "quantization_config": None}, "plain")
    assert 0.5 < model.dense().layer_bytes / plain.dense().layer_bytes < 0.52


def test_a_tied_head_is_the_embedding_read_whole() -> None:
    tied = describe({**MIXTRAL, "tie_word_embeddings": True}, "tied")
    assert tied.dense() == find_model("mixtral-8x7b").dense()
    assert tied.n_params == find_model("mixtral-8x7b").n_params - 32000 * 4096


def test_what_a_layer_and_a_token_read_of_tensors_by_name() -> None:
    tensors = {
        "model.embed_tokens.weight": 1000,
        "model.layers.0.mlp.up_proj": 7,
        "model.layers.1.attn": 10,
        "model.layers.10.attn": 21,
        "model.norm.weight": 3,
        "lm_head.weight": 900,
    }
    layers = ["model.layers.1.mlp.experts", "model.layers.10.mlp.experts"]
    assert dense_sizes(tensors, layers, 100) == (16, 10 + 7 + 3 + 900)
    del tensors["lm_head.weight"]
    assert dense_sizes(tensors, layers, 100) == (16, 10 + 7 + 3 + 1000)
    assert layer_prefix("model.layers.10.mlp.experts") == "model.layers.10."


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model_type": "gemma9"}, r"family 'gemma9', whose sizes are not known here; known are"),
        ({"hidden_size": None}, "hidden_size is missing, not a positive whole number"),
        ({"num_hidden_layers": 0}, "num_hidden_layers is 0, not a positive"),
        ({"dtype": "float4"}, "dtype 'float4' is not one of float32, float16, bfloat16"),
        ({"quantization_config": {"quant_method": "gptq"}}, "quantised by gptq, whose sizes"),
        ({"quantization": {"bits": 4}}, "quantised by a method it does not name"),
        ({"num_experts_per_tok": 9}, "no layer has 9 experts or more"),
        ({"model_type": "deepseek_v2"}, "q_lora_rank is missing|kv_lora_rank is missing"),
    ],
)
def test_a_config_that_tells_no_sizes_is_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(TraceError, match=message):
        describe({**MIXTRAL, **changes}, "x/config.json")


def test_a_config_is_found_by_name_file_or_folder(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(MIXTRAL))
    for given in (str(tmp_path), str(tmp_path / "config.json")):
        assert find_model(given).dense() == find_model("mixtral-8x7b").dense()
    with pytest.raises(TraceError, match=r"no model 'mixtral-8x7': did you mean 'mixtral-8x7b'\?"):
        find_model("mixtral-8x7")
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(TraceError, match=r"config\.json is no config\.json"):
        find_model(str(tmp_path))


def test_the_text_model_of_a_config_with_images_is_described(tmp_path: Path) -> None:
    whole = {"model_type": "qwen3_5_moe", "text_config": published()["qwen3.6-35b-a3b"]}
    assert describe(whole, "x").dense() == find_model("qwen3.6-35b-a3b").dense()


def test_the_first_layers_of_a_model() -> None:
    model = find_model("deepseek-v2-lite").first(3)
    assert (model.n_layers, model.n_all_layers) == (2, 3)
    whole = find_model("deepseek-v2-lite").dense()
    assert model.dense() == whole
    with pytest.raises(TraceError, match="the first 1 layers of deepseek-v2-lite have no experts"):
        find_model("deepseek-v2-lite").first(1)
    with pytest.raises(TraceError, match="has 27 layers: layers must be 1 to that, not 28"):
        find_model("deepseek-v2-lite").first(28)


def gpt_oss(**changes: Any) -> TraceMeta:
    settings = {"n_layers": 24, "n_experts": 32, "top_k": 4, "expert_bytes": {}} | changes
    return make_meta(source="imported", **settings)


def test_like_gives_a_trace_every_size() -> None:
    meta = GivenSizes(like="gpt-oss-20b").on(gpt_oss())
    model = find_model("gpt-oss-20b")
    assert (meta.layer_bytes, meta.token_bytes) == model.dense()
    assert meta.expert_bytes == model.expert_bytes()
    assert meta.precision == "mxfp4"
    assert meta.expert_params == model.expert_params
    assert meta.dense_precision == "bf16"
    assert meta.notes["sizes"] == "of gpt-oss-20b, dense weights bf16"
    assert unknown_sizes(meta) == []
    own = GivenSizes(like="gpt-oss-20b").on(gpt_oss(expert_bytes={"q4_k_m": 5}))
    assert (own.precision, own.expert_bytes["mxfp4"]) == ("q4_k_m", meta.expert_bytes["mxfp4"])


def test_numbers_go_before_like() -> None:
    given = GivenSizes("gpt-oss-20b", None, "4bit", {"4bit": 9}, dense_token_bytes=8)
    meta = given.on(gpt_oss())
    assert meta.layer_bytes == find_model("gpt-oss-20b").dense("4bit").layer_bytes
    assert (meta.token_bytes, meta.expert_bytes["4bit"]) == (8, 9)
    assert GivenSizes(dense_layer_bytes=7).on(gpt_oss()).layer_bytes == 7
    assert not GivenSizes()
    assert GivenSizes().on(gpt_oss()) == gpt_oss()
    with pytest.raises(TraceError, match="dense_layer_bytes is 0: leave it out"):
        GivenSizes(dense_layer_bytes=0).on(gpt_oss())
    with pytest.raises(TraceError, match="attention is of the model that like names"):
        GivenSizes(attention="4bit").on(gpt_oss())


def test_what_a_recorder_said_stays_unless_attention_is_given() -> None:
    dense = find_model("gpt-oss-20b").dense()
    measured = gpt_oss(layer_bytes=23_000_000, expert_bytes={"bf16": 5})
    meta = GivenSizes(like="gpt-oss-20b").on(measured)
    assert (meta.layer_bytes, meta.token_bytes) == (23_000_000, dense.token_bytes)
    assert meta.expert_bytes["bf16"] == 5
    assert meta.dense_precision == "a layer's as recorded, else bf16"
    assert meta.notes["sizes"].endswith("a layer's as the trace has them")
    both = GivenSizes(like="gpt-oss-20b").on(replace(measured, token_bytes=9))
    assert (both.layer_bytes, both.token_bytes, both.dense_precision) == (23_000_000, 9, None)
    other = GivenSizes(like="gpt-oss-20b", attention="bf16").on(measured)
    assert (other.layer_bytes, other.token_bytes) == dense


@pytest.mark.parametrize(
    ("meta", "like", "message"),
    [
        (gpt_oss(), "gpt-oss-120b", "24 layers where .* has 36, and 32 experts where .* has 128"),
        (gpt_oss(n_layers=12), "gpt-oss-20b", "first layers alone, say how many with layers"),
        (gpt_oss(top_k=5), "gpt-oss-20b", "top-5 where gpt-oss-20b has top-4"),
        (
            gpt_oss(n_layers=27, n_experts=64),
            "deepseek-v2-lite",
            "27 layers where deepseek-v2-lite has 26 with experts, and 1 without",
        ),
    ],
)
def test_a_model_the_trace_cannot_be_of_is_refused_by_what_differs(
    meta: TraceMeta, like: str, message: str
) -> None:
    with pytest.raises(TraceError, match=message):
        GivenSizes(like=like).on(meta)


def test_fewer_experts_a_token_and_the_first_layers_are_allowed() -> None:
    meta = GivenSizes(like="gpt-oss-20b").on(gpt_oss(top_k=2))
    assert meta.notes["top_k"].startswith("top-2 of a model that has top-4")
    some = GivenSizes(like="gpt-oss-20b", layers=12).on(gpt_oss(n_layers=12))
    assert some.layer_bytes == find_model("gpt-oss-20b").dense().layer_bytes


def test_zero_bytes_are_never_a_size(tmp_path: Path) -> None:
    """Earlier importers wrote 0 where a recording said nothing; elsewhere it is a mistake."""
    text = json.loads(gpt_oss(layer_bytes=5, token_bytes=6).to_json())
    old = TraceMeta.from_json(json.dumps(text | {"layer_bytes": 0, "token_bytes": 0}))
    assert (old.layer_bytes, old.token_bytes) == (None, None)
    assert unknown_sizes(old) == ["bytes of an expert", "dense weights of a layer and a token"]
    with pytest.raises(TraceError, match=r"token_bytes is 0, not above 0 \(null says unknown\)"):
        TraceMeta.from_json(json.dumps(text | {"source": "recorded", "token_bytes": 0}))
    with pytest.raises(TraceError, match="layer_bytes is 0"):
        make_meta(layer_bytes=0)


def test_a_trace_says_its_sizes_and_which_it_lacks(tmp_path: Path) -> None:
    meta = make_meta(layer_bytes=12345, dense_precision="bf16")
    write(tmp_path / "t.parquet", meta, make_rows(meta))
    line = (
        "sizes: an expert 1,000 bytes in fp16 (known as well: 4bit); dense weights of a layer "
        "12,345 bytes (bf16); dense weights of a token unknown"
    )
    assert sizes_line(meta) == line
    assert line in open_trace(tmp_path / "t.parquet").describe().splitlines()
    bare = sizes_line(replace(meta, expert_bytes={}, layer_bytes=None))
    assert bare == "sizes: bytes of an expert unknown; dense weights of a layer and a token unknown"
