"""A random model large enough that its experts, and not the libraries, are what takes memory."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from moerun.checkpoint.hub import resolve
from moerun.store.expert_store import ExpertStore
from moerun.store.pack import pack
from transformers import AutoConfig, AutoModelForCausalLM

from support import published
from support.checkpoints import Tensors, change_config, change_weights, is_matrix
from support.moe_models import save_checkpoint

SIZES: dict[str, Any] = {
    "hidden_size": 512,
    "num_hidden_layers": 4,
    "num_attention_heads": 8,
    "num_key_value_heads": 8,
    "intermediate_size": 1024,
    "max_position_embeddings": 2048,
    "num_local_experts": 8,
    "num_experts_per_tok": 2,
    "vocab_size": 5000,
    "bos_token_id": 0,
    "eos_token_id": 0,
    "pad_token_id": 0,
}


def big_store(folder: Path) -> ExpertStore:
    """A Mixtral of 4 layers of 8 experts, 6 MiB each in float32."""
    return _stored("mixtral", SIZES, folder)


def big_linear_store(folder: Path) -> ExpertStore:
    """A Qwen3-Next of the same sizes, three of its layers of linear attention."""
    experts = {"num_experts": 8, "moe_intermediate_size": 1024}
    shared = {"shared_expert_intermediate_size": 256, "head_dim": 64}
    heads = {"linear_num_key_heads": 4, "linear_num_value_heads": 8}
    widths = {"linear_key_head_dim": 64, "linear_value_head_dim": 64}
    return _stored("qwen3_next", SIZES | experts | shared | heads | widths, folder)


def _stored(kind: str, sizes: dict[str, Any], folder: Path) -> ExpertStore:
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **sizes)).eval()
    source = save_checkpoint(model, resolve("tiny"), folder / "model")
    return pack(source, folder / "store")


def big_published_store(folder: Path) -> ExpertStore:
    """The same model published in FP8, its experts kept so: 1.5 MiB each."""
    big_store(folder).close()

    def quantise(tensors: Tensors) -> None:
        for name in [n for n in tensors if is_matrix(n)]:
            stored, _ = published.fp8_block(tensors.pop(name))
            base = name.removesuffix("weight")
            tensors.update({base + part: tensor for part, tensor in stored.items()})

    source = change_weights(folder / "model", quantise)
    return pack(change_config(source, quantization_config=published.BLOCKS), folder / "published")
