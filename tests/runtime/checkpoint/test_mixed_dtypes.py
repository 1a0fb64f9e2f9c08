"""Checkpoints whose shards are of two precisions: each weight is taken as a stock load takes it."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import transformers as tf
from moerun.offload.load import load_offloaded
from moerun.store.pack import pack
from safetensors.torch import load_file, save_file
from support import checkpoints as made
from support.runs import ResidentProvider

IDS = torch.tensor([[5, 9, 17, 101, 64, 3, 77, 9, 12, 1, 33, 90]])


def of_two_precisions(folder: Path, first: torch.dtype, second: torch.dtype) -> Path:
    """A checkpoint in two files, each in a precision of its own; the names alternate, so that an
    expert's matrices are in both."""
    made.make_checkpoint("mixtral", folder)
    for file, dtype in zip(made.shard(folder), (first, second), strict=True):
        tensors = {name: tensor.to(dtype) for name, tensor in load_file(file).items()}
        save_file(tensors, file, metadata={"format": "pt"})
    return folder


@torch.no_grad()
def assert_equals_stock(folder: Path, out: Path) -> None:
    with pack(folder, out) as store:
        ours, _ = load_offloaded(store, "cpu", ResidentProvider(store))
        stock = tf.AutoModelForCausalLM.from_pretrained(folder).eval()
        logits = ours(IDS).logits
        assert logits.dtype == stock.dtype
        assert torch.equal(logits, stock(IDS).logits)


@pytest.mark.parametrize("stated", ["bfloat16", "float32"])
@pytest.mark.parametrize("second", [torch.float32, torch.float16])
def test_shards_of_two_precisions_become_the_stated_one(
    second: torch.dtype, stated: str, tmp_path: Path
) -> None:
    folder = of_two_precisions(tmp_path / "m", torch.bfloat16, second)
    made.change_config(folder, dtype=stated)
    assert_equals_stock(folder, tmp_path / "store")


def test_without_a_stated_precision_the_first_shard_says_it(tmp_path: Path) -> None:
    folder = of_two_precisions(tmp_path / "m", torch.bfloat16, torch.float32)
    made.change_config(folder, dtype=None, torch_dtype=None)
    assert_equals_stock(folder, tmp_path / "store")
