"""A random model large enough that its experts, and not the libraries, are what takes memory."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from moerun.checkpoint.hub import resolve
from moerun.store.expert_store import ExpertStore
from moerun.store.pack import pack

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
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(0)
    config = AutoConfig.for_model("mixtral", **SIZES)
    model = AutoModelForCausalLM.from_config(config).eval()
    source = save_checkpoint(model, resolve("tiny"), folder / "model")
    return pack(source, folder / "store")
