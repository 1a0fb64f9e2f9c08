"""Which model families can be offloaded, and what of a model is an expert."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from torch import nn

from moerun.checkpoint.folder import instead_of_config
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

_COUNTS = (
    *(
        "num_experts",
        "num_local_experts",
        "n_routed_experts",
        "moe_num_experts",
        "num_experts_list",
    ),
    *("num_moe_experts", "moe_num_routed_experts", "n_experts", "num_routed_experts"),
)
_TEXTS = ("text_config", "llm_config", "language_config", "thinker_config", "ffn_config")
_ATTENTION = (None, "eager", "sdpa")  # those that every installation of torch has


def read_config(path: Path) -> Any:
    """The transformers configuration of a supported checkpoint folder.

    An attention or experts implementation that only other machines or packages have is left out:
    the weights do not depend on it, and whoever runs the model chooses one.
    Raises RunError when there is none, it is damaged, or its family cannot be offloaded.
    """
    from transformers import AutoConfig

    described = read_raw_config(path)
    _refuse_unsupported(path, described)
    try:
        config = AutoConfig.from_pretrained(path, trust_remote_code=False)
    except Exception as error:  # every configuration class fails in its own way
        raise RunError(f"{path / 'config.json'} cannot be used: {_reason(error)}") from error
    _refuse_quantised(path, config)
    if config._attn_implementation not in _ATTENTION:
        config._attn_implementation = None
    config._experts_implementation = None
    return config


def read_raw_config(path: Path) -> dict[str, Any]:
    """What config.json says, word for word. Raises RunError when there is none or it is damaged."""
    file = path / "config.json"
    if not file.is_file():
        raise RunError(f"{path} is no checkpoint: it has no config.json{instead_of_config(path)}")
    try:
        described = json.loads(file.read_bytes())
    except OSError as error:
        raise RunError(f"{file} cannot be used: {error.strerror}") from error
    except ValueError as error:
        raise RunError(f"{file} cannot be used: it is not JSON ({error})") from error
    if not isinstance(described, dict):
        raise RunError(f"{file} cannot be used: it is no JSON object")
    return described


def attention_left_out(path: Path) -> str | None:
    """The attention implementation that config.json asks for and `read_config` leaves out."""
    described = read_raw_config(path)
    asked = described.get("_attn_implementation", described.get("attn_implementation"))
    return None if asked is None or asked in _ATTENTION else str(asked)


def _refuse_unsupported(path: Path, described: dict[str, Any]) -> None:
    model_type, families = described.get("model_type"), ", ".join(SUPPORTED)
    if model_type in SUPPORTED:
        return
    if model_type is None:
        raise RunError(
            f"{path / 'config.json'} cannot be used: it has no model_type; supported are {families}"
        )
    texts = [described, *(v for k, v in described.items() if k in _TEXTS and isinstance(v, dict))]
    mixture = next((f"{n} {t[n]}" for t in texts for n in _COUNTS if t.get(n)), None)
    what = (
        f"which is a mixture of experts ({mixture}), but of a family that is not supported"
        if mixture
        else "which is no mixture of experts"
    )
    raise RunError(f"{path} is a {model_type!r} model, {what}; supported are {families}")


def _refuse_quantised(path: Path, config: Any) -> None:
    quantised = getattr(config, "quantization_config", None)
    if quantised:
        method = dict(quantised).get("quant_method") if isinstance(quantised, dict) else None
        raise RunError(
            f"{path} is quantised already ({method or 'see its config.json'}): give the "
            "unquantised checkpoint, 'moerun pack' quantises it itself"
        )


def _reason(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__


def empty_model(config: Any, dtype: torch.dtype, *, experts: str | None = None) -> nn.Module:
    """The model on the meta device: modules and shapes, no weights.

    Raises RunError when transformers cannot build what the configuration says.
    """
    from transformers import AutoModelForCausalLM

    chosen = {} if experts is None else {"experts_implementation": experts}
    try:
        with torch.device("meta"):
            model: nn.Module = AutoModelForCausalLM.from_config(config, dtype=dtype, **chosen)
    except Exception as error:  # every model class fails in its own way
        raise RunError(
            f"the {config.model_type} model that config.json describes cannot be built "
            f"({type(error).__name__}: {_reason(error)})"
        ) from error
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
    """How many routed experts a fused module has."""
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
    """How many routed experts a token uses; 0 where the configuration does not say."""
    return int(_first(config.get_text_config(), _TOP_K, 0))


def shared_experts_of(config: Any) -> int:
    """Experts that every token passes besides the routed ones."""
    config = config.get_text_config()
    if getattr(config, "shared_expert_intermediate_size", 0):
        return 1
    return int(_first(config, _SHARED, 0))


def vocabulary_of(config: Any) -> int:
    """Tokens that the model knows: rows of its embedding."""
    return int(config.get_text_config().vocab_size)


def _first(config: Any, names: tuple[str, ...], default: int) -> Any:
    for name in names:
        value = getattr(config, name, None)
        if isinstance(value, list):  # hunyuan lists one a layer
            value = value[0]
        if value is not None:
            return value
    return default
