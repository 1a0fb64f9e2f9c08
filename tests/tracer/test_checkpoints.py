"""Where a model's name leads."""

from __future__ import annotations

from pathlib import Path

import pytest
from moerun.checkpoint.hub import resolve
from moerun.errors import RunError


def test_the_bundled_model_is_a_small_mixtral() -> None:
    from transformers import AutoConfig

    folder = resolve("tiny")
    config = AutoConfig.from_pretrained(folder)
    assert config.model_type == "mixtral"
    assert config.num_hidden_layers >= 8
    assert (config.num_local_experts, config.num_experts_per_tok) == (8, 2)
    assert sum(file.stat().st_size for file in folder.glob("*.safetensors")) <= 16_000_000


def test_its_tensors_have_the_original_names() -> None:
    from safetensors import safe_open

    with safe_open(resolve("tiny") / "model.safetensors", "pt") as file:
        names = set(file.keys())
    assert "model.layers.7.block_sparse_moe.experts.7.w2.weight" in names
    assert "model.layers.0.block_sparse_moe.gate.weight" in names


def test_a_local_folder_is_itself(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    assert resolve(tmp_path) == tmp_path


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("tinny", "there is no model 'tinny': give 'tiny'"),
        ("./tinny", "there is no model './tinny'"),
        ("/no/such/folder", "there is no model '/no/such/folder': there is no such folder"),
        ("store/", "there is no model 'store/': there is no such folder"),
        ("some one/model", "has no model 'some one/model'"),
        ("someone/model", "the Hugging Face hub did not give the model .* give the folder"),
    ],
)
def test_what_is_not_there_is_named(
    name: str, message: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(RunError, match=message):
        resolve(name)


def test_a_folder_without_a_model_is_named(tmp_path: Path) -> None:
    with pytest.raises(RunError, match=r"it has no config\.json"):
        resolve(tmp_path)
    (tmp_path / "file").write_text("")
    with pytest.raises(RunError, match="is a file"):
        resolve(tmp_path / "file")
