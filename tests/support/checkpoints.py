"""Small checkpoints as publishers and accidents leave them, from seeded random models."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from support.moe_models import random_model

WEIGHTS = "model.safetensors"
Tensors = dict[str, torch.Tensor]


def make_checkpoint(family: str, folder: Path, **changes: Any) -> Path:
    """A plain checkpoint of two layers, without a tokenizer."""
    random_model(family, **{"num_hidden_layers": 2, **changes}).save_pretrained(folder)
    return folder


def change_weights(folder: Path, change: Callable[[Tensors], object]) -> Path:
    """Save the weights again after `change` to their dict."""
    tensors = load_file(folder / WEIGHTS)
    change(tensors)
    whole = {name: tensor.contiguous() for name, tensor in tensors.items()}
    save_file(whole, folder / WEIGHTS, metadata={"format": "pt"})
    return folder


def change_config(folder: Path, **changes: Any) -> Path:
    """Set fields of config.json; those that are None are taken out."""
    path = folder / "config.json"
    described = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({k: v for k, v in described.items() if v is not None}))
    return folder


def is_matrix(name: str) -> bool:
    """Whether publishers quantise a tensor of this name."""
    return name.endswith(("_proj.weight", "w1.weight", "w2.weight", "w3.weight"))


def quantise_float8(tensors: Tensors, scale: str | None) -> None:
    """Matrices become float8 with a scale a row, named by the ending `scale` (None: dropped)."""
    for name in [n for n in tensors if is_matrix(n)]:
        weight = tensors[name].float()
        step = weight.abs().amax(1, keepdim=True) / 448
        tensors[name] = (weight / step).to(torch.float8_e4m3fn)
        if scale is not None:
            tensors[name + scale] = step


def shard(folder: Path, *, index: bool = True) -> list[Path]:
    """Split the weights into two files, with or without the index of what they hold."""
    tensors = load_file(folder / WEIGHTS)
    (folder / WEIGHTS).unlink()
    files: list[Path] = []
    held: dict[str, str] = {}
    for number in range(2):
        names = sorted(tensors)[number::2]
        files.append(folder / f"model-{number + 1:05}-of-00002.safetensors")
        save_file({n: tensors[n] for n in names}, files[-1], metadata={"format": "pt"})
        held |= dict.fromkeys(names, files[-1].name)
    if index:
        (folder / f"{WEIGHTS}.index.json").write_text(
            json.dumps({"metadata": {}, "weight_map": held})
        )
    return files


def rename_dtype(file: Path, tensor: str, code: str) -> None:
    """Give a tensor of a file another dtype by name, its bytes as they are."""
    data = file.read_bytes()
    length = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + length])
    header[tensor]["dtype"] = code
    text = json.dumps(header).encode()
    file.write_bytes(len(text).to_bytes(8, "little") + text + data[8 + length :])
