"""Which model families can be offloaded, and what of a model is an expert."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import nn

from moerun.errors import RunError
from moerun.format.expert import ExpertParam, ExpertShape

# Those whose logits are tested equal to the stock model's, bit for bit.
SUPPORTED = (
    "deepseek_v2",
    "deepseek_v3",
    "dots1",
    "ernie4_5_moe",
    "glm4_moe",
    "gpt_oss",
    "granitemoe",
    "hunyuan_v1_moe",
    "minimax_m2",
    "mixtral",
    "olmoe",
    "phimoe",
    "qwen2_moe",
    "qwen3_moe",
)
_TOP_K = ("num_experts_per_tok", "top_k", "moe_k", "moe_topk")
_SHARED = ("n_shared_experts", "num_shared_experts", "moe_num_shared_experts", "num_shared_expert")


def read_config(path: Path) -> Any:
    """The transformers configuration of a supported checkpoint folder.

    Raises RunError when there is none, it is damaged, or its family cannot be offloaded.
    """
    from transformers import AutoConfig

    if not (path / "config.json").is_file():
        raise RunError(f"{path} is no checkpoint: it has no config.json")
    try:
        config = AutoConfig.from_pretrained(path, trust_remote_code=False)
    except Exception as error:  # every configuration class fails in its own way
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise RunError(f"{path / 'config.json'} cannot be used: {reason}") from error
    _refuse_unsupported(path, config)
    return config


def _refuse_unsupported(path: Path, config: Any) -> None:
    families = ", ".join(SUPPORTED)
    if config.model_type not in SUPPORTED:
        raise RunError(
            f"{path} is a {config.model_type!r} model, which is no mixture of experts that can be "
            f"offloaded; supported are {families}"
        )
    quantised = getattr(config, "quantization_config", None)
    if quantised:
        method = dict(quantised).get("quant_method") if isinstance(quantised, dict) else None
        raise RunError(
            f"{path} is quantised already ({method or 'see its config.json'}): give the "
            "unquantised checkpoint, 'moerun pack' quantises it itself"
        )


def empty_model(config: Any, dtype: torch.dtype, *, experts: str | None = None) -> nn.Module:
    """The model on the meta device: modules and shapes, no weights."""
    from transformers import AutoModelForCausalLM

    chosen = {} if experts is None else {"experts_implementation": experts}
    with torch.device("meta"):
        model: nn.Module = AutoModelForCausalLM.from_config(config, dtype=dtype, **chosen)
    return model.eval().requires_grad_(False)


def find_experts(model: nn.Module) -> list[tuple[str, nn.Module]]:
    """Name and module of the fused experts of each MoE layer, in layer order."""
    return [
        (name, module)
        for name, module in model.named_modules()
        if all(hasattr(module, flag) for flag in ("has_gate", "is_transposed", "num_experts"))
    ]


def find_attention(model: nn.Module) -> list[tuple[str, nn.Linear]]:
    """Name and module of every linear projection under an attention module, in layer order.

    All families name the class of theirs so (MixtralAttention); biases, norms and sinks are none.
    """
    modules = dict(model.named_modules())
    within = tuple(f"{n}." for n, m in modules.items() if type(m).__name__.endswith("Attention"))
    return [
        (name, module)
        for name, module in modules.items()
        if isinstance(module, nn.Linear) and name.startswith(within)
    ]


def count_experts(module: nn.Module) -> int:
    return int(module.num_experts)  # type: ignore[arg-type]


def expert_shape(module: nn.Module, dtype: torch.dtype) -> ExpertShape:
    """The parameters of one of a fused module's experts, stored as `dtype`."""
    return ExpertShape(
        tuple(
            ExpertParam(
                name,
                tuple(parameter.shape[1:]),
                dtype,
                bool(module.is_transposed) and parameter.dim() == 3,
            )
            for name, parameter in module.named_parameters(recurse=False)
        )
    )


def top_k_of(config: Any) -> int:
    return int(_first(config.get_text_config(), _TOP_K, 0))


def shared_experts_of(config: Any) -> int:
    """Experts that every token passes besides the routed ones."""
    config = config.get_text_config()
    if getattr(config, "shared_expert_intermediate_size", 0):
        return 1
    return int(_first(config, _SHARED, 0))


def _first(config: Any, names: tuple[str, ...], default: int) -> Any:
    for name in names:
        value = getattr(config, name, None)
        if isinstance(value, list):  # hunyuan lists one a layer
            value = value[0]
        if value is not None:
            return value
    return default
