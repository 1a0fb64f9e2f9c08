"""Checkpoints that cannot be packed: each is refused by name, and nothing is written."""

import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from moerun.checkpoint.published.blocks import BlockScaled
from moerun.errors import RunError
from moerun.store.pack import pack
from support.stores import TINY, rewrite


def test_pickles_are_refused_unread(checkpoint: Path, tmp_path: Path) -> None:
    (checkpoint / "model.safetensors").unlink()
    trap = tmp_path / "unpickled"
    torch.save({}, checkpoint / "pytorch_model.bin")
    (checkpoint / "pytorch_model.bin").write_bytes(
        f"cos\nsystem\n(S'touch {trap}'\ntR.".encode()  # a pickle that runs a command
    )
    with pytest.raises(RunError, match=r"only as pickles \(pytorch_model\.bin\)"):
        pack(checkpoint, tmp_path / "out")
    assert not trap.exists()


def test_a_folder_without_weights(checkpoint: Path, tmp_path: Path) -> None:
    (checkpoint / "model.safetensors").unlink()
    with pytest.raises(RunError, match="has no weights"):
        pack(checkpoint, tmp_path / "out")


def cut(path: Path, keep: int) -> None:
    os.truncate(path, keep)


@pytest.mark.parametrize("keep", [0, 5, 1000, 1_000_000])
def test_a_truncated_shard_is_named(checkpoint: Path, tmp_path: Path, keep: int) -> None:
    cut(checkpoint / "model.safetensors", keep)
    with pytest.raises(RunError, match=r"model\.safetensors is no whole safetensors file"):
        pack(checkpoint, tmp_path / "out")
    assert not list(tmp_path.glob("out*"))


@pytest.mark.parametrize("junk", [b"\xff" * 64, b"\x10\0\0\0\0\0\0\0" + b"{'a':" + b" " * 40])
def test_a_shard_of_junk_is_named(checkpoint: Path, tmp_path: Path, junk: bytes) -> None:
    (checkpoint / "model.safetensors").write_bytes(junk)
    with pytest.raises(RunError, match=r"model\.safetensors is no whole safetensors file"):
        pack(checkpoint, tmp_path / "out")


def test_a_missing_expert_is_named(checkpoint: Path, tmp_path: Path) -> None:
    missing = "model.layers.4.block_sparse_moe.experts.6.w2.weight"
    rewrite(checkpoint, lambda tensors: tensors.pop(missing))
    with pytest.raises(RunError, match=r"7 of 8 tensors .*model\.layers\.4\.mlp\.experts\.down"):
        pack(checkpoint, tmp_path / "out")


def test_a_missing_dense_tensor_is_named(checkpoint: Path, tmp_path: Path) -> None:
    rewrite(checkpoint, lambda tensors: tensors.pop("model.layers.2.self_attn.q_proj.weight"))
    with pytest.raises(RunError, match=r"no weights for model\.layers\.2\.self_attn\.q_proj"):
        pack(checkpoint, tmp_path / "out")


def edit_config(checkpoint: Path, **changes: object) -> None:
    path = checkpoint / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def test_weights_that_do_not_fit_the_config(checkpoint: Path, tmp_path: Path) -> None:
    edit_config(checkpoint, intermediate_size=320)
    with pytest.raises(
        RunError, match=r"layers\.0\.mlp\.experts\.\w+_proj .* where the configuration says"
    ):
        pack(checkpoint, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_dense_model_is_refused_by_name(checkpoint: Path, tmp_path: Path) -> None:
    dense = {"num_local_experts": None, "num_experts_per_tok": None}
    edit_config(checkpoint, model_type="llama", architectures=["LlamaForCausalLM"], **dense)
    with pytest.raises(RunError, match="a 'llama' model, which is no mixture of experts; 'moerun"):
        pack(checkpoint, tmp_path / "out")


def test_an_unknown_model_type_is_refused_by_name(checkpoint: Path, tmp_path: Path) -> None:
    edit_config(checkpoint, model_type="marvin")
    with pytest.raises(RunError, match="marvin"):
        pack(checkpoint, tmp_path / "out")


def test_a_config_that_calls_plain_weights_quantised_is_refused(
    checkpoint: Path, tmp_path: Path
) -> None:
    edit_config(checkpoint, quantization_config={"quant_method": "fp8"})
    with pytest.raises(RunError, match=r"said to be fp8, as .* but no tensor is quantised"):
        pack(checkpoint, tmp_path / "out")


@pytest.mark.parametrize("text", ["{", "[]", '"mixtral"'])
def test_a_damaged_config_is_named(checkpoint: Path, tmp_path: Path, text: str) -> None:
    (checkpoint / "config.json").write_text(text)
    with pytest.raises(RunError, match=r"config\.json cannot be used"):
        pack(checkpoint, tmp_path / "out")


@pytest.mark.parametrize(
    ("field", "value"),
    [("num_hidden_layers", 1 << 31), ("num_local_experts", 10**7), ("anything", 10**15)],
)
def test_a_number_that_no_model_has_is_refused_before_it_is_believed(
    checkpoint: Path, tmp_path: Path, field: str, value: int
) -> None:
    edit_config(checkpoint, **{field: value})
    with pytest.raises(RunError, match=rf"config\.json cannot be used: it says {field} {value:,}"):
        pack(checkpoint, tmp_path / "out")


@pytest.mark.parametrize("block", [[128, [1]], [0, 128], [128, 1 << 58], [1.5, 2], ["x", 1]])
def test_a_block_that_cannot_be_is_refused(block: list[Any]) -> None:
    with pytest.raises(RunError, match=r"weight_block_size is .*, not two whole numbers"):
        BlockScaled({"weight_block_size": block})


def test_weights_that_cannot_be_quantised_name_the_expert(checkpoint: Path, tmp_path: Path) -> None:
    name = "model.layers.1.block_sparse_moe.experts.2.w2.weight"
    rewrite(checkpoint, lambda tensors: tensors[name][0].fill_(float("nan")))
    with pytest.raises(RunError, match=r"down_proj of expert 2 of layer 1: .*not finite"):
        pack(checkpoint, tmp_path / "out", precision="4bit")
    assert not list(tmp_path.glob("out*"))
    pack(checkpoint, tmp_path / "out", precision="bf16").close()


def test_unknown_precisions_list_what_there_is(tmp_path: Path) -> None:
    with pytest.raises(RunError, match="4bit, 3bit, 2bit"):
        pack(TINY, tmp_path / "out", precision="5bit")
    with pytest.raises(RunError, match="native, fp32, fp16, bf16"):
        pack(TINY, tmp_path / "out", dense_precision="4bit")
