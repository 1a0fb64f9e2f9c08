"""Checkpoints that hold more than the text model that runs: images, and layers that predict further
tokens. What is not read is said."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import transformers as tf
from moeroute.families import markdown
from moerun.errors import RunError
from moerun.offload.load import load_offloaded
from moerun.store.expert_store import ExpertStore
from moerun.store.pack import pack
from safetensors.torch import load_file, save_file
from support.families import save_small
from support.runs import ResidentProvider

IDS = torch.arange(3, 23)[None]


def add_tensors(checkpoint: Path, *names: str) -> None:
    """Write tensors of 8 x 64 beside those of a checkpoint in one file."""
    file = checkpoint / "model.safetensors"
    tensors = {name: tensor.clone() for name, tensor in load_file(file).items()}
    save_file(tensors | {name: torch.ones(8, 64) for name in names}, file)


def packed(checkpoint: Path, folder: Path) -> tuple[ExpertStore, list[str]]:
    said: list[str] = []
    return pack(checkpoint, folder, report=said.append), said


@torch.no_grad()
def check_equal(checkpoint: Path, store: ExpertStore) -> None:
    ours, _ = load_offloaded(store, "cpu", ResidentProvider(store))
    stock = tf.AutoModelForCausalLM.from_pretrained(checkpoint).eval()
    assert torch.equal(ours(IDS).logits, stock(IDS).logits)


@pytest.mark.parametrize(
    ("family", "prefix"), [("gemma4", "model.vision_tower."), ("qwen3_5_moe", "model.visual.")]
)
def test_a_model_of_text_and_images_runs_its_text_part(
    family: str, prefix: str, tmp_path: Path
) -> None:
    source = save_small(family, tmp_path / "m")
    images = [
        name
        for file in source.glob("*.safetensors")
        for name in load_file(file)
        if not name.startswith(("model.language_model.", "lm_head."))
    ]
    assert any(name.startswith(prefix) for name in images)
    store, said = packed(source, tmp_path / "s")
    (line,) = [note for note in said if "not read" in note]
    assert line.startswith(
        "not read, being of parts for images or sound, where text alone is run: "
        f"{len(images)} tensors, such as model."
    )
    assert not any("vis" in name for name in store.dense_tensors())
    assert store.config().get_text_config().num_hidden_layers == 2
    check_equal(source, store)


@pytest.mark.parametrize(
    ("family", "names"),
    [
        ("qwen3_next", ["mtp.fc.weight", "mtp.layers.0.mlp.gate.weight"]),
        ("nemotron_h", ["mtp.layers.0.mixer.up_proj.weight"]),
        ("qwen3_5_moe", ["mtp.layers.0.mlp.gate.weight"]),
        ("mixtral", ["model.mtp.0.proj.weight"]),
    ],
)
def test_layers_that_predict_further_tokens_are_not_read(
    family: str, names: list[str], tmp_path: Path
) -> None:
    source = save_small(family, tmp_path / "m")
    add_tensors(source, *names)
    store, said = packed(source, tmp_path / "s")
    line = (
        "not read, being of layers that predict further tokens (MTP), which are not run: "
        f"{len(names)} tensors, such as {names[0]}"
    )
    assert line in said
    check_equal(source, store)


@pytest.mark.parametrize(
    ("family", "name"),
    [
        ("glm4_moe_lite", "model.layers.2.eh_proj.weight"),
        ("qwen3_5_moe", "model.language_model.layers.2.eh_proj.weight"),
    ],
)
def test_layers_past_the_last_are_not_read_where_the_configuration_has_such(
    family: str, name: str, tmp_path: Path
) -> None:
    source = save_small(family, tmp_path / "m")
    add_tensors(source, name)
    with pytest.raises(RunError, match="num_hidden_layers 2"):
        pack(source, tmp_path / "s")
    file = source / "config.json"
    config = json.loads(file.read_text())
    config.get("text_config", config)["num_nextn_predict_layers"] = 1
    file.write_text(json.dumps(config))
    store, said = packed(source, tmp_path / "s")
    assert any("(MTP)" in note and f"such as {name}" in note for note in said)
    check_equal(source, store)


def test_a_family_that_cannot_run_in_float16_says_so_before_packing(tmp_path: Path) -> None:
    source = save_small("deepseek_v4", tmp_path / "m")
    with pytest.raises(RunError, match="cannot compute a deepseek_v4 model in float16") as refused:
        pack(source, tmp_path / "s", precision="fp16")
    assert "\n" not in str(refused.value)
    assert not (tmp_path / "s").exists()


@pytest.mark.parametrize(
    ("model_type", "why"),
    [
        ("jamba", "transformers has it, but its logits were not compared with stock's here"),
        ("jumbo", "this version of transformers does not have it either"),
    ],
)
def test_a_family_that_was_not_tried_is_told_with_where_those_that_were_are_listed(
    model_type: str, why: str, tmp_path: Path
) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"model_type": model_type, "num_experts": 16}))
    with pytest.raises(RunError, match=why) as refused:
        pack(tmp_path, tmp_path / "s")
    said = str(refused.value)
    assert "\n" not in said
    assert "a mixture of experts (num_experts 16), but of a family that is not supported" in said
    assert said.endswith("'moerun families' lists those that are supported")


def test_the_page_of_families_is_made_of_the_table() -> None:
    page = Path(__file__).parents[3] / "docs" / "families.md"
    made = "python -m moeroute.families prints the table anew"
    assert page.read_text(encoding="utf-8").endswith("\n\n" + markdown()), made
