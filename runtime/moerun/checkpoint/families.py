"""The model families that can be offloaded, and which modules of a model are its experts."""

from __future__ import annotations

import types
from pathlib import Path
from typing import Any

import torch
from moeroute.families import Family, family_of
from moeroute.jsontext import parse_json
from torch import nn

from moerun.checkpoint.folder import instead_of_config
from moerun.checkpoint.gguf.config import gguf_config
from moerun.checkpoint.gguf.header import is_gguf
from moerun.checkpoint.supported import refuse_unsupported
from moerun.errors import RunError
from moerun.format.expert import ExpertParam, ExpertShape

_TOP_K = ("num_experts_per_tok", "top_k", "moe_k", "moe_topk", "top_k_experts")
_SHARED = ("n_shared_experts", "num_shared_experts", "moe_num_shared_experts", "num_shared_expert")
_SHARED_WIDTHS = ("shared_expert_intermediate_size", "shared_intermediate_size")

# Classes of experts that transformers calls by no registry, with inputs that the gate has scaled by
# its weights (Llama 4).
SCALED_INPUTS = ("Llama4TextExperts",)
_QUANTISATIONS = ("quantization_config", "compression_config")
_ATTENTION = (None, "eager", "sdpa")  # those that every installation of torch has


# A hundred times what there is, and more.
_MOST = {
    **dict.fromkeys(("num_hidden_layers", "num_nextn_predict_layers"), 10_000),
    **dict.fromkeys(("num_local_experts", "num_experts", "n_routed_experts"), 100_000),
    **dict.fromkeys(("moe_num_experts", "num_attention_heads", "num_key_value_heads"), 100_000),
    **dict.fromkeys(("head_dim", "v_head_dim", "qk_rope_head_dim", "qk_nope_head_dim"), 1 << 20),
    **dict.fromkeys(("hidden_size", "intermediate_size", "moe_intermediate_size"), 1 << 24),
    "vocab_size": 1 << 28,
}
_MOST_OF_ANYTHING = 1 << 40


def read_config(path: Path) -> Any:
    """The transformers configuration of a supported checkpoint: a folder, or a GGUF file.

    An attention or experts implementation that needs another machine or package is left out:
    weights do not depend on the implementation, and whoever runs the model chooses one. Raises
    RunError where there is no configuration, it is damaged, or its family cannot be offloaded.
    """
    from transformers import AutoConfig

    described, place = read_raw_config(path), config_place(path)
    if is_gguf(path):
        return config_of(described, place)
    refuse_unsupported(described, place)
    _refuse_absurd(described, place)
    try:
        config = AutoConfig.from_pretrained(path, trust_remote_code=False)
    except Exception as error:  # every configuration class fails in its own way
        raise RunError(f"{place} cannot be used: {_reason(error)}") from error
    return _to_run(config)


def config_of(described: dict[str, Any], place: str) -> Any:
    """As `read_config`, of the fields of a config.json that stands at ``place``."""
    from transformers import AutoConfig

    refuse_unsupported(described, place)
    _refuse_absurd(described, place)
    fields = dict(described)
    try:
        config = AutoConfig.for_model(fields.pop("model_type"), **fields)
    except Exception as error:  # every configuration class fails in its own way
        raise RunError(f"{place} cannot be used: {_reason(error)}") from error
    return _to_run(config)


def _refuse_absurd(described: dict[str, Any], place: str) -> None:
    """RunError for a number that no model has: transformers would make as many layers, or reserve
    as much memory, as the number says."""
    for name, value in described.items():
        if isinstance(value, dict):
            _refuse_absurd(value, place)
        elif isinstance(value, int) and value > (most := _MOST.get(name, _MOST_OF_ANYTHING)):
            raise RunError(
                f"{place} cannot be used: it says {name} {value:,}, and no model has more than "
                f"{most:,}"
            )


def _to_run(config: Any) -> Any:
    """The configuration without what belongs to a checkpoint's tensors or to another machine."""
    for key in _QUANTISATIONS:  # of the checkpoint's tensors, not of the model that runs
        vars(config).pop(key, None)
    if config._attn_implementation not in _ATTENTION:
        config._attn_implementation = None
    config._experts_implementation = None
    return text_alone(config)


def family_of_model(model: Any) -> Family | None:
    """The entry of a model's family; None for one that is not known."""
    return family_of(getattr(getattr(model, "config", None), "model_type", None))


def text_alone(config: Any) -> Any:
    """The configuration of the text model, of a family whose text part is built alone; any other
    configuration as it is."""
    family = family_of(config.model_type)
    text = config.get_text_config()
    if family is None or family.text is None or text is config:
        return config
    text.dtype = text.dtype or config.dtype
    text.tie_word_embeddings = config.tie_word_embeddings
    return text


def read_raw_config(path: Path) -> dict[str, Any]:
    """The contents of config.json, unchanged, or what a GGUF header says in its place.

    Raises RunError where the one or the other is missing or damaged.
    """
    if is_gguf(path):
        return gguf_config(path)
    file = path / "config.json"
    if not file.is_file():
        raise RunError(f"{path} is no checkpoint: it has no config.json{instead_of_config(path)}")
    try:
        described = parse_json(file.read_bytes())
    except OSError as error:
        raise RunError(f"{file} cannot be used: {error.strerror}") from error
    except ValueError as error:
        raise RunError(f"{file} cannot be used: it is not JSON ({error})") from error
    if not isinstance(described, dict):
        raise RunError(f"{file} cannot be used: it is no JSON object")
    return described


def config_place(path: Path) -> str:
    """Where a checkpoint's configuration stands, for messages."""
    return f"the header of {path}" if is_gguf(path) else f"{path / 'config.json'}"


def attention_left_out(path: Path) -> str | None:
    """The attention implementation that config.json asks for and `read_config` leaves out."""
    described = read_raw_config(path)
    asked = described.get("_attn_implementation", described.get("attn_implementation"))
    return None if asked is None or asked in _ATTENTION else str(asked)


def _reason(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__


def reason_of(error: Exception) -> str:
    """What a model's or a configuration's class failed of, in a line."""
    return f"{type(error).__name__}: {_reason(error)}"


def empty_model(config: Any, dtype: torch.dtype, *, experts: str | None = None) -> nn.Module:
    """The model on the meta device: modules and shapes, no weights.

    Raises RunError where transformers cannot build the configuration's model.
    """
    from transformers import AutoModelForCausalLM

    chosen = {} if experts is None else {"experts_implementation": experts}
    try:
        with torch.device("meta"):
            model: nn.Module = AutoModelForCausalLM.from_config(config, dtype=dtype, **chosen)
    except Exception as error:  # every model class fails in its own way
        raise RunError(
            f"the {config.model_type} model that config.json describes cannot be built "
            f"({reason_of(error)})"
        ) from error
    return model.eval().requires_grad_(False)


def find_experts(model: nn.Module) -> list[tuple[str, nn.Module]]:
    """Name and module of the fused experts of each MoE layer, in layer order."""
    for module in model.modules():
        if type(module).__name__ in SCALED_INPUTS and not hasattr(module, "has_gate"):
            _mark(module)
    return [
        (name, module)
        for name, module in model.named_modules()
        if all(hasattr(module, flag) for flag in ("has_gate", "is_transposed", "num_experts"))
    ]


def _mark(module: Any) -> None:
    """Say of fused experts what those say of themselves that transformers calls by its registry."""
    from transformers.integrations.moe import _default_apply_gate

    module.has_gate = module.is_concatenated = module.is_transposed = True
    module.has_bias = module.has_post_expert_norm = False
    module._apply_gate = types.MethodType(_default_apply_gate, module)


def find_attention(model: nn.Module) -> list[tuple[str, nn.Linear]]:
    """Name and module of every linear projection under an attention module, in layer order.

    In all families the name of the class of attention ends so (MixtralAttention). Biases, norms and
    sinks are not projections. Linear attention is left out (KimiDeltaAttention, or classes named
    otherwise): an error in its few decays goes into a state that is kept for the whole text.
    """
    modules = dict(model.named_modules())
    within = tuple(f"{name}." for name, module in modules.items() if _attends(module))
    return [
        (name, module)
        for name, module in modules.items()
        if isinstance(module, nn.Linear)
        and type(module).forward is nn.Linear.forward  # not grouped, as one of DeepSeek-V4's
        and name.startswith(within)
    ]


def _attends(module: nn.Module) -> bool:
    name = type(module).__name__
    return name.endswith("Attention") and "Delta" not in name


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


def set_top_k(config: Any, top_k: int) -> None:
    """Have a token use so many routed experts."""
    text = config.get_text_config()
    for name in _TOP_K:
        value = getattr(text, name, None)
        if value is not None:
            setattr(text, name, [top_k] * len(value) if isinstance(value, list) else top_k)


def shared_experts_of(config: Any) -> int:
    """Experts that every token passes in addition to the routed ones."""
    config = config.get_text_config()
    if any(getattr(config, name, 0) for name in _SHARED_WIDTHS):
        return 1
    family = family_of(config.model_type)
    return int(_first(config, _SHARED, family.always_shared if family else 0))


def layer_configs(config: Any) -> list[Any]:
    """The configuration of a text model as each of its layers has it: some differ in heads."""
    return list(config.get_text_config().per_layer_config)


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
