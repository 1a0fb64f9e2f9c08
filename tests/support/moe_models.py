"""Small random models of several mixture-of-experts families."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

_SIZES: dict[str, Any] = {
    "hidden_size": 64,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 128,
    "intermediate_size": 96,
    "max_position_embeddings": 64,
    "bos_token_id": 0,
    "eos_token_id": 0,
    "pad_token_id": 0,
}
_DEEPSEEK: dict[str, Any] = {
    "n_routed_experts": 8,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 32,
    "n_shared_experts": 1,
    "first_k_dense_replace": 1,
    "kv_lora_rank": 16,
    "q_lora_rank": 16,
    "qk_rope_head_dim": 16,
    "qk_nope_head_dim": 16,
    "v_head_dim": 16,
    "num_key_value_heads": 4,
}
FAMILIES: dict[str, dict[str, Any]] = {
    "mixtral": {"num_local_experts": 8, "num_experts_per_tok": 2},
    "qwen2_moe": {
        "num_experts": 8,
        "num_experts_per_tok": 4,
        "moe_intermediate_size": 32,
        "shared_expert_intermediate_size": 32,
    },
    "olmoe": {"num_experts": 8, "num_experts_per_tok": 4},
    "gpt_oss": {"num_local_experts": 8, "num_experts_per_tok": 4, "head_dim": 16},
    "deepseek_v2": {**_DEEPSEEK, "n_group": 1, "topk_group": 1, "topk_method": "greedy"},
    "deepseek_v3": {**_DEEPSEEK, "n_group": 2, "topk_group": 1},
    "phimoe": {"num_local_experts": 8, "num_experts_per_tok": 2},
    "minimax_m2": {"num_local_experts": 8, "num_experts_per_tok": 2, "head_dim": 16},
}


def small_config(family: str, **changes: Any) -> Any:
    """The configuration of a small model; `changes` come on top of the family's own."""
    from transformers import AutoConfig

    return AutoConfig.for_model(family, **{**_SIZES, **FAMILIES.get(family, {}), **changes})


def random_model(family: str, **changes: Any) -> Any:
    """A model with seeded weights, large enough that its gates are decided."""
    from transformers import AutoModelForCausalLM

    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(small_config(family, **changes)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(mean=float(parameter.ndim == 1), std=0.15)
    return model


def save_checkpoint(model: Any, tokenizer_of: Path, folder: Path) -> Path:
    """Write a model as a checkpoint, with the tokenizer of another."""
    from transformers import AutoTokenizer

    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(tokenizer_of).save_pretrained(folder)
    return folder
