"""The dimensions of models whose weights nobody needs: published configurations by name."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from moepolicy.console import nearest

from moerun.checkpoint.families import SUPPORTED, read_config
from moerun.errors import RunError, UsageError

# As in the config.json that each model is published with, as far as it decides what moves and
# what is computed. tests/runtime/test_bench.py holds the weights they come to against the names.
PUBLISHED: dict[str, dict[str, Any]] = {
    "mixtral-8x7b": {
        "model_type": "mixtral",
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "num_local_experts": 8,
        "num_experts_per_tok": 2,
        "vocab_size": 32000,
        "max_position_embeddings": 32768,
    },
    "mixtral-8x22b": {
        "model_type": "mixtral",
        "hidden_size": 6144,
        "intermediate_size": 16384,
        "num_hidden_layers": 56,
        "num_attention_heads": 48,
        "num_key_value_heads": 8,
        "num_local_experts": 8,
        "num_experts_per_tok": 2,
        "vocab_size": 32768,
        "max_position_embeddings": 65536,
    },
    "qwen3-30b-a3b": {
        "model_type": "qwen3_moe",
        "hidden_size": 2048,
        "intermediate_size": 6144,
        "moe_intermediate_size": 768,
        "num_hidden_layers": 48,
        "num_attention_heads": 32,
        "num_key_value_heads": 4,
        "head_dim": 128,
        "num_experts": 128,
        "num_experts_per_tok": 8,
        "norm_topk_prob": True,
        "vocab_size": 151936,
        "max_position_embeddings": 40960,
    },
    "gpt-oss-20b": {
        "model_type": "gpt_oss",
        "hidden_size": 2880,
        "intermediate_size": 2880,
        "num_hidden_layers": 24,
        "num_attention_heads": 64,
        "num_key_value_heads": 8,
        "head_dim": 64,
        "num_local_experts": 32,
        "num_experts_per_tok": 4,
        "vocab_size": 201088,
        "max_position_embeddings": 131072,
    },
    "olmoe-1b-7b": {
        "model_type": "olmoe",
        "hidden_size": 2048,
        "intermediate_size": 1024,
        "num_hidden_layers": 16,
        "num_attention_heads": 16,
        "num_key_value_heads": 16,
        "num_experts": 64,
        "num_experts_per_tok": 8,
        "vocab_size": 50304,
        "max_position_embeddings": 4096,
    },
}
TINY = "tiny"


def shape_names() -> list[str]:
    return [TINY, *PUBLISHED]


def shape_name(shape: str) -> str:
    """As one would cite it: a folder's own name, not the way to it."""
    if shape in shape_names():
        return shape
    path = Path(shape).expanduser().resolve()
    return path.parent.name if path.name == "config.json" else path.name


def find_config(shape: str, layers: int | None = None) -> Any:
    """The transformers configuration of a shape: a name, a config.json, or a checkpoint's folder.

    ``layers`` keeps only so many of its layers. Raises RunError for what does not exist.
    """
    config = _config(shape)
    if layers is not None:
        text = config.get_text_config()
        if not 1 <= layers <= text.num_hidden_layers:
            raise UsageError(f"layers must be 1 to {text.num_hidden_layers}, not {layers}")
        _cut(text, layers)
    return config


def _config(shape: str) -> Any:
    if shape == TINY:
        from moerun.checkpoint.hub import resolve

        return read_config(resolve(TINY))
    if shape in PUBLISHED:
        from transformers import AutoConfig

        return AutoConfig.for_model(**PUBLISHED[shape])
    path = Path(shape).expanduser()
    folder = path.parent if path.name == "config.json" else path
    if folder.is_dir() and path.exists():
        return read_config(folder)
    raise RunError(
        f"unknown shape '{shape}'; {nearest(shape, shape_names())}; or give the path of a "
        f"config.json ({', '.join(SUPPORTED)})"
    )


def _cut(config: Any, layers: int) -> None:
    config.num_hidden_layers = layers
    for name in ("layer_types", "mlp_layer_types"):
        if isinstance(getattr(config, name, None), list):
            setattr(config, name, getattr(config, name)[:layers])
