"""A small configuration of every family that can be offloaded."""

from __future__ import annotations

import json
from collections.abc import Collection, Iterable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as tf
from safetensors.torch import load_file, save_file

SMALL: dict[str, Any] = {
    "vocab_size": 128,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
# Three summands: the order of two cannot show.
TOP_3 = {"num_experts_per_tok": 3}
HEAD = {"head_dim": 16}
INNER = {"moe_intermediate_size": 32}
DENSE_FIRST = {"n_routed_experts": 8, "n_shared_experts": 1, "first_k_dense_replace": 1}
LATENT = {
    "q_lora_rank": 24,
    "kv_lora_rank": 16,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 16,
    "v_head_dim": 16,
    "num_key_value_heads": 4,
}
GROUPS = {"n_group": 2, "topk_group": 1}
DELTA_NET = {
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 24,
    "layer_types": ["linear_attention", "full_attention"],
    "shared_expert_intermediate_size": 48,
    "num_experts": 4,
}
INDEXED = {"index_topk": 8, "index_head_dim": 16, "index_n_heads": 2}
SPARSE = {"mlp_layer_types": ["dense", "sparse"]}
WINDOW = {"sliding_window": 6, "layer_types": ["sliding_attention", "full_attention"]}
MAMBA = {"n_groups": 2, "ssm_state_size": 8, "mamba_num_heads": 8, "mamba_head_dim": 16}
ONE_GROUP = {"n_group": 1, "topk_group": 1}


def text(changes: dict[str, Any]) -> dict[str, Any]:
    """The configuration of a model of text and images, with small images."""
    vision = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1}
    return {"text_config": SMALL | changes, "vision_config": vision}


FAMILIES: dict[str, tuple[type, dict[str, Any]]] = {
    "deepseek_v2": (
        tf.DeepseekV2Config,
        TOP_3 | INNER | DENSE_FIRST | LATENT | GROUPS | {"topk_method": "group_limited_greedy"},
    ),
    "deepseek_v3": (tf.DeepseekV3Config, TOP_3 | INNER | DENSE_FIRST | LATENT | GROUPS),
    "dots1": (tf.Dots1Config, TOP_3 | INNER | DENSE_FIRST | ONE_GROUP | HEAD),
    "ernie4_5_moe": (
        tf.Ernie4_5_MoeConfig,
        INNER | {"moe_k": 3, "moe_num_experts": 4, "moe_num_shared_experts": 1},
    ),
    "glm4_moe": (tf.Glm4MoeConfig, TOP_3 | INNER | DENSE_FIRST | ONE_GROUP | HEAD),
    "gpt_oss": (tf.GptOssConfig, TOP_3 | HEAD | {"num_local_experts": 4, "intermediate_size": 64}),
    "granitemoe": (tf.GraniteMoeConfig, TOP_3 | {"num_local_experts": 4}),
    "hunyuan_v1_moe": (tf.HunYuanMoEV1Config, HEAD | {"num_experts": 4, "moe_topk": [3, 3]}),
    "minimax_m2": (tf.MiniMaxM2Config, TOP_3 | HEAD | {"num_local_experts": 4}),
    "mixtral": (tf.MixtralConfig, TOP_3 | {"num_local_experts": 4}),
    "olmoe": (tf.OlmoeConfig, TOP_3 | {"num_experts": 4}),
    "phimoe": (tf.PhimoeConfig, TOP_3 | {"num_local_experts": 4}),
    "qwen2_moe": (
        tf.Qwen2MoeConfig,
        TOP_3 | INNER | {"num_experts": 4, "shared_expert_intermediate_size": 48},
    ),
    "qwen3_moe": (
        tf.Qwen3MoeConfig,
        TOP_3 | INNER | HEAD | {"num_experts": 4, "norm_topk_prob": True},
    ),
    "qwen3_next": (tf.Qwen3NextConfig, TOP_3 | INNER | HEAD | DELTA_NET),
    "qwen3_5_moe": (tf.Qwen3_5MoeConfig, text(TOP_3 | INNER | HEAD | DELTA_NET)),
    "glm4_moe_lite": (tf.Glm4MoeLiteConfig, TOP_3 | INNER | DENSE_FIRST | LATENT | ONE_GROUP),
    "gemma4": (
        tf.Gemma4Config,
        text(
            INNER
            | HEAD
            | WINDOW
            | {
                "enable_moe_block": True,
                "num_experts": 4,
                "top_k_experts": 3,
                "global_head_dim": 32,
                "num_global_key_value_heads": 1,
                "attention_k_eq_v": True,
                "hidden_size_per_layer_input": 0,
                "final_logit_softcapping": 30.0,
            }
        ),
    ),
    "nemotron_h": (
        tf.NemotronHConfig,
        TOP_3
        | INNER
        | HEAD
        | MAMBA
        | {
            "layers_block_type": ["linear_attention", "moe", "full_attention", "mlp", "moe"],
            "n_routed_experts": 4,
            "moe_shared_expert_intermediate_size": 48,
            "chunk_size": 8,
        },
    ),
    "deepseek_v32": (
        tf.DeepseekV32Config,
        TOP_3 | INNER | DENSE_FIRST | LATENT | GROUPS | INDEXED,
    ),
    "deepseek_v4": (
        tf.DeepseekV4Config,
        TOP_3
        | INNER
        | INDEXED
        | {
            "num_hidden_layers": 4,
            "head_dim": 16,
            "num_key_value_heads": 1,
            "q_lora_rank": 24,
            "o_lora_rank": 16,
            "o_groups": 2,
            "n_routed_experts": 8,
            "num_hash_layers": 2,
            "sliding_window": 6,
            "qk_rope_head_dim": 8,
            "compress_rate_csa": 2,
            "compress_rate_hca": 4,
            "hc_mult": 2,
        },
    ),
    "kimi_linear": (
        tf.KimiLinearConfig,
        TOP_3
        | INNER
        | LATENT
        | GROUPS
        | {
            "q_lora_rank": None,
            "num_local_experts": 8,
            "linear_head_dim": 16,
            "linear_num_heads": 2,
            "layer_types": ["linear_attention", "full_attention"],
            "first_k_dense_replace": 1,
        },
    ),
    "granitemoehybrid": (
        tf.GraniteMoeHybridConfig,
        TOP_3
        | {
            "num_local_experts": 4,
            "shared_intermediate_size": 48,
            "layer_types": ["linear_attention", "full_attention"],
            "mamba_n_heads": 8,
            "mamba_n_groups": 2,
            "mamba_d_state": 8,
            "mamba_chunk_size": 8,
        },
    ),
    "hy_v3": (tf.HYV3Config, TOP_3 | INNER | HEAD | {"num_experts": 4, "num_shared_experts": 1}),
    "glm_moe_dsa": (
        tf.GlmMoeDsaConfig,
        TOP_3 | INNER | DENSE_FIRST | LATENT | ONE_GROUP | INDEXED,
    ),
    "llama4": (
        tf.Llama4Config,
        text(
            HEAD
            | {
                "num_experts_per_tok": 1,
                "num_local_experts": 4,
                "intermediate_size_mlp": 48,
                "attention_chunk_size": 16,
                "no_rope_layers": [1, 0],
            }
        ),
    ),
    "mimo_v2_flash": (
        tf.MiMoV2FlashConfig,
        TOP_3
        | INNER
        | ONE_GROUP
        | WINDOW
        | SPARSE
        | {"n_routed_experts": 4, "head_dim": 24, "v_head_dim": 16},
    ),
    "cohere2_moe": (
        tf.Cohere2MoeConfig,
        TOP_3 | HEAD | WINDOW | SPARSE | {"num_experts": 4, "num_shared_experts": 1},
    ),
    "afmoe": (
        tf.AfmoeConfig,
        TOP_3 | INNER | HEAD | WINDOW | {"num_experts": 4, "num_dense_layers": 1},
    ),
    "solar_open": (tf.SolarOpenConfig, TOP_3 | INNER | HEAD | ONE_GROUP | {"n_routed_experts": 4}),
    "exaone_moe": (
        tf.ExaoneMoeConfig,
        TOP_3 | INNER | WINDOW | ONE_GROUP | {"num_experts": 4, "num_shared_experts": 1},
    ),
    "flex_olmo": (tf.FlexOlmoConfig, TOP_3 | {"num_experts": 4}),
}


# Of the many families, those that differ most from the others, and those that are most like them.
TELLING = ("qwen3_next", "gemma4", "deepseek_v4", "llama4", "mixtral", "gpt_oss")
LIKE_OTHERS = (
    *("afmoe", "cohere2_moe", "deepseek_v32", "exaone_moe", "flex_olmo", "glm4_moe_lite"),
    *("glm_moe_dsa", "granitemoehybrid", "hy_v3", "mimo_v2_flash", "solar_open"),
)


def telling_fast(families: Iterable[str], slow: Collection[str] | None = None) -> list[Any]:
    """Parameters of a test: all of ``families``, those of ``slow`` (default: all but the telling
    ones) among the slow tests."""
    return [
        pytest.param(f, marks=pytest.mark.slow)
        if (f not in TELLING if slow is None else f in slow)
        else f
        for f in families
    ]


def small_config(family: str) -> Any:
    """The small configuration of a family."""
    config_class, changes = FAMILIES[family]
    return config_class(**(changes if "text_config" in changes else SMALL | changes))


def save_small(family: str, folder: Path, *, decided: bool = False) -> Path:
    """A checkpoint of a family's small model with seeded weights, as such models are published: of
    text and images together where the family has both. ``decided``: large enough weights that
    gates choose clearly."""
    config = small_config(family)
    torch.manual_seed(0)
    whole = config.get_text_config() is not config
    kind = tf.AutoModelForImageTextToText if whole else tf.AutoModelForCausalLM
    model = kind.from_config(config, dtype=torch.float32)
    with torch.no_grad():
        for parameter in model.parameters() if decided else ():
            parameter.normal_(mean=float(parameter.ndim == 1), std=0.15)
        for name, buffer in model.named_buffers():
            if name.endswith("tid2eid"):  # no expert twice
                n_experts = config.n_routed_experts
                rows = [torch.randperm(n_experts)[: buffer.shape[1]] for _ in buffer]
                buffer.copy_(torch.stack(rows))
    model.save_pretrained(folder)
    if family == "gemma4":
        _save_apart(folder, ".layer_scalar")
    return folder


def _save_apart(folder: Path, ending: str) -> None:
    """Put the tensors with names of that ending into a file of their own. One number between two
    layers would move the second layer's experts to another alignment, and the last bit of a float32
    product that stock computes in the mapped file can depend on it."""
    single = folder / "model.safetensors"
    tensors = load_file(single)
    names = [f"model-{i}-of-2.safetensors" for i in (1, 2)]
    files: dict[str, dict[str, torch.Tensor]] = {name: {} for name in names}
    one, two = files.values()
    for name, tensor in tensors.items():
        (two if name.endswith(ending) else one)[name] = tensor.clone()
    for name, part in files.items():
        save_file(part, folder / name, metadata={"format": "pt"})
    single.unlink()
    of = {tensor: name for name, part in files.items() for tensor in part}
    index = {"metadata": {}, "weight_map": of}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
