"""Every tensor of a checkpoint is accounted for: none is lost, misread or made up."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from moerun.checkpoint.source import ModelSource
from moerun.errors import RunError
from moerun.store.pack import pack
from safetensors.torch import load_file, save_file
from support import checkpoints as made

Change = Callable[[made.Tensors], object]
EXPERT = "model.layers.1.block_sparse_moe.experts."
NORM = "model.layers.0.input_layernorm.weight"


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """By family: a whole checkpoint, not to be changed."""
    folder, done = tmp_path_factory.mktemp("plain"), {}

    def get(family: str) -> Path:
        if family not in done:
            done[family] = made.make_checkpoint(family, folder / family)
        return done[family]

    return get


def changed(plain: Callable[[str], Path], family: str, to: Path, change: Change) -> Path:
    return made.change_weights(Path(shutil.copytree(plain(family), to / "model")), change)


def refusal(checkpoint: Path) -> str:
    """What packing it says; nothing of the refused pack is left."""
    before = sorted(checkpoint.parent.iterdir())
    with pytest.raises(RunError) as caught:
        pack(checkpoint, checkpoint.parent / "out")
    assert sorted(checkpoint.parent.iterdir()) == before
    return str(caught.value)


def unread(endings: tuple[str, ...]) -> Change:
    """Matrices in a format that is not read: bytes under names with these endings."""

    def change(tensors: made.Tensors) -> None:
        for name in [n for n in tensors if made.is_matrix(n)]:
            del tensors[name]
            base = name.removesuffix("weight")
            tensors.update({base + e: torch.zeros(8, 8, dtype=torch.uint8) for e in endings})

    return change


@pytest.mark.parametrize(
    ("quantise", "tensor", "format_name"),
    [
        (partial(made.quantise_float8, scale=None), "float8_e4m3fn", "a quantised checkpoint"),
        (unread(("weight.absmax", "weight.quant_map")), ".absmax", "bitsandbytes 4-bit"),
        (unread(("q_weight", "q_scale")), ".q_weight", "EXL2"),
        (unread(("trellis",)), ".trellis", "EXL3"),
        (unread(("W_q",)), ".W_q", "HQQ"),
        (unread(("weight.qdata", "weight.scale")), "qdata", "torchao"),
    ],
)
def test_formats_that_are_not_read_are_named_by_their_tensors(
    plain: Any, tmp_path: Path, quantise: Change, tensor: str, format_name: str
) -> None:
    said = refusal(changed(plain, "mixtral", tmp_path, quantise))
    assert "model.safetensors: tensor " in said
    assert tensor in said
    assert f"looks like {format_name}, which is not supported; give the unquantised" in said


@pytest.mark.parametrize("key", ["compression_config", "text.quantization_config"])
def test_a_declaration_under_another_name_is_quoted(plain: Any, tmp_path: Path, key: str) -> None:
    folder = changed(plain, "mixtral", tmp_path, unread(("trellis",)))
    declared = {"quant_method": "compressed-tensors"}
    outer, _, inner = key.partition(".")
    made.change_config(folder, **{outer: {inner: declared} if inner else declared})
    assert f"compressed-tensors, as config.json's {key} says" in refusal(folder)


def test_a_side_file_declares_too(plain: Any, tmp_path: Path) -> None:
    folder = changed(plain, "mixtral", tmp_path, unread(("trellis",)))
    (folder / "quantize_config.json").write_text('{"bits": 4, "group_size": 128, "desc_act": true}')
    assert "EXL3 (gptq, as quantize_config.json says)" in refusal(folder)


@pytest.mark.parametrize("dtype", [torch.int8, torch.uint8, torch.float8_e5m2, torch.uint32])
def test_integers_do_not_feed_floating_point_parameters(
    plain: Any, tmp_path: Path, dtype: torch.dtype
) -> None:
    name = "model.layers.0.self_attn.q_proj.weight"
    folder = changed(plain, "mixtral", tmp_path, lambda t: t.update({name: t[name].to(dtype)}))
    said = refusal(folder)
    assert name in said
    assert str(dtype).removeprefix("torch.") in said


@pytest.mark.parametrize("code", ["F4", "F6_E2M3", "X9_NEWER"])
def test_dtypes_that_torch_has_not_are_named(plain: Any, tmp_path: Path, code: str) -> None:
    folder = Path(shutil.copytree(plain("mixtral"), tmp_path / "model"))
    made.rename_dtype(folder / made.WEIGHTS, NORM, code)
    said = refusal(folder)
    assert f"{made.WEIGHTS}: tensor {NORM!r} ({code} [64])" in said
    assert "again" not in said


@pytest.mark.parametrize(
    ("family", "tensor"),
    [
        ("mixtral", "model.layers.0.self_attn.rotary_emb.inv_freq"),
        ("deepseek_v3", "model.layers.61.eh_proj.weight"),
        ("ernie4_5_moe", "model.mtp_block.0.weight"),
    ],
)
def test_what_stock_declares_ignored_passes(
    plain: Any, tmp_path: Path, family: str, tensor: str
) -> None:
    if family == "ernie4_5_moe":
        more = {"moe_num_experts": 8, "moe_k": 2, "moe_intermediate_size": 32}
        folder = made.make_checkpoint(family, tmp_path / "model", **more)
        made.change_weights(folder, lambda t: t.update({tensor: torch.ones(8)}))
    else:
        codes = torch.ones(8).to(torch.float8_e4m3fn)
        folder = changed(plain, family, tmp_path, lambda t: t.update({tensor: codes}))
    notes: list[str] = []
    pack(folder, tmp_path / "out", report=notes.append).close()
    assert any("not read, as stock transformers does not either: 1 tensors" in n for n in notes)
    assert tensor in notes[-1]


def test_layers_past_the_last_pass_where_the_config_counts_them(plain: Any, tmp_path: Path) -> None:
    extra = {"model.layers.2.eh_proj.weight": torch.ones(4)}
    folder = changed(plain, "deepseek_v3", tmp_path, lambda t: t.update(extra))
    made.change_config(folder, num_nextn_predict_layers=0)
    assert "config.json says num_hidden_layers 2" in refusal(folder)
    made.change_config(folder, num_nextn_predict_layers=1)
    ModelSource(folder).close()


LOST: dict[str, tuple[Change, str]] = {
    "bias": (
        lambda t: t.update({"model.layers.0.self_attn.q_proj.bias": torch.ones(64)}),
        "q_proj.bias' (float32 [64]) is taken by no part of the mixtral model",
    ),
    "layer": (
        lambda t: t.update({"model.layers.2.input_layernorm.weight": torch.ones(64)}),
        "num_hidden_layers 2",
    ),
    "adapter": (
        lambda t: t.update({"model.layers.0.self_attn.q_proj.lora_A.weight": torch.ones(2, 64)}),
        "a LoRA adapter",
    ),
    "expert": (lambda t: t.pop(EXPERT + "7.w2.weight"), "none of expert 7"),
    "renumbered": (
        lambda t: t.update({EXPERT + "8.w2.weight": t.pop(EXPERT + "3.w2.weight")}),
        "none of expert 3",
    ),
    "one too many": (
        lambda t: t.update({EXPERT + "8.w2.weight": torch.ones(64, 96)}),
        "9 tensors",
    ),
    "projection": (
        lambda t: [t.pop(n) for n in list(t) if n.startswith(EXPERT) and ".w3." in n],
        ".w3.weight' for model.layers.1.mlp.experts.gate_up_proj",
    ),
    "expert's shape": (
        lambda t: t.update({EXPERT + "5.w1.weight": torch.ones(95, 64)}),
        "experts.5.w1.weight' (float32 [95, 64]) has another shape than expert 0's",
    ),
    "attention's shape": (
        lambda t: t.update({"model.layers.0.self_attn.k_proj.weight": torch.ones(64, 64)}),
        "k_proj.weight as (64, 64) where the configuration says (32, 64)",
    ),
    "scalar": (lambda t: t.update({EXPERT + "5.w1.weight": torch.ones(())}), "experts.5.w1"),
    "empty": (lambda t: t.update({NORM: torch.ones(0)}), f"{NORM} as (0,)"),
    "dense": (lambda t: t.pop(NORM), f"no weights for {NORM}"),
    "head": (lambda t: t.pop("lm_head.weight"), "does not say tie_word_embeddings"),
    "twice": (
        lambda t: t.update({"layers.0.input_layernorm.weight": torch.ones(64)}),
        f"has {NORM} twice",
    ),
}


@pytest.mark.parametrize("kind", LOST)
def test_what_is_lost_or_made_up_is_named(plain: Any, tmp_path: Path, kind: str) -> None:
    change, wanted = LOST[kind]
    assert wanted in refusal(changed(plain, "mixtral", tmp_path, change))


@pytest.mark.parametrize("rows", [7, 9])
def test_fused_experts_are_as_many_as_the_config_says(
    plain: Any, tmp_path: Path, rows: int
) -> None:
    name = "model.layers.0.mlp.experts.down_proj"

    def change(tensors: made.Tensors) -> None:
        tensors[name] = tensors[name][:1].repeat(rows, 1, 1)

    said = refusal(changed(plain, "gpt_oss", tmp_path, change))
    assert f"has {rows} experts for {name} where config.json says 8" in said


@pytest.mark.parametrize("differs", [False, True])
def test_two_shards_may_hold_a_tensor_only_if_it_is_one(
    plain: Any, tmp_path: Path, differs: bool
) -> None:
    folder = Path(shutil.copytree(plain("mixtral"), tmp_path / "model"))
    first, second = made.shard(folder)
    one, two = load_file(first), load_file(second)
    name = next(iter(one))
    save_file(two | {name: one[name] + float(differs)}, second)
    if differs:
        assert f"hold different tensors {name!r}" in refusal(folder)
    else:
        ModelSource(folder).close()


def test_an_index_that_is_wrong_about_a_file_is_quoted(plain: Any, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(plain("mixtral"), tmp_path / "model"))
    for file in made.shard(folder):
        tensors = load_file(file)
        if tensors.pop(NORM, None) is not None:
            save_file(tensors, file)
            assert f"says that {file.name} holds it, which does not" in refusal(folder)


@pytest.mark.parametrize("dtype", ["float8_e4m3fn", "int8"])
def test_a_model_cannot_compute_in_codes(plain: Any, tmp_path: Path, dtype: str) -> None:
    folder = Path(shutil.copytree(plain("mixtral"), tmp_path / "model"))
    made.change_config(folder, dtype=dtype)
    assert f"says dtype torch.{dtype}" in refusal(folder)


def test_a_config_without_experts_is_refused(plain: Any, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(plain("qwen3_moe"), tmp_path / "model"))
    made.change_config(folder, mlp_only_layers=[0, 1])
    assert "without any experts" in refusal(folder)
