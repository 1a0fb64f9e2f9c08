"""A model's configuration from a GGUF header: transformers' fields from llama.cpp's.

transformers 5.23 makes configurations of a few architectures itself and leaves out, for its older
ones, what a mixture of experts needs (the experts' width, their number in llama.cpp's "llama").
So the families that are run here have a table of their own; others are asked of transformers.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from moerun.checkpoint.gguf.header import GgufHeader
from moerun.errors import RunError

_COMMON = {
    "context_length": "max_position_embeddings",
    "embedding_length": "hidden_size",
    "feed_forward_length": "intermediate_size",
    "attention.head_count": "num_attention_heads",
    "attention.head_count_kv": "num_key_value_heads",
    "attention.layer_norm_rms_epsilon": "rms_norm_eps",
    "expert_used_count": "num_experts_per_tok",
}
_INNER = {"expert_feed_forward_length": "moe_intermediate_size"}
_HEAD = {"attention.key_length": "head_dim"}
# The fields that DeepSeek-V3 and the families after it share.
_SHARED_EXPERTS = {
    **_INNER,
    "expert_count": "n_routed_experts",
    "expert_shared_count": "n_shared_experts",
    "expert_weights_scale": "routed_scaling_factor",
    "expert_weights_norm": "norm_topk_prob",
    "expert_group_count": "n_group",
    "expert_group_used_count": "topk_group",
    "leading_dense_block_count": "first_k_dense_replace",
}
_END_TOKENS = ("eos_token_id", "eot_token_id", "eom_token_id")
_SIGMOID = 2  # llama.cpp's number of the gating function


class Fields:
    """The fields of a header under the name of its architecture, and the names of its tensors."""

    def __init__(self, headers: Sequence[GgufHeader]) -> None:
        self.path = headers[0].path
        self.architecture = headers[0].architecture
        self.metadata = headers[0].metadata
        self.tensors = {n: t for header in headers for n, t in header.tensors.items()}

    def get(self, key: str, default: Any = None) -> Any:
        """The field ``{architecture}.{key}``."""
        return self.metadata.get(f"{self.architecture}.{key}", default)

    def need(self, key: str) -> Any:
        """As `get`; RunError where the field is missing."""
        if (value := self.get(key)) is None:
            raise RunError(
                f"{self.path} does not say {self.architecture}.{key}, without which the model "
                "cannot be built: convert the model to GGUF again"
            )
        return value

    def has(self, part: str) -> bool:
        """Whether a tensor of some block has this in its name."""
        return any(name.startswith("blk.") and f".{part}" in name for name in self.tensors)


def _nothing(_fields: Fields) -> dict[str, Any]:
    return {}


@dataclass(frozen=True)
class GgufFamily:
    """How an architecture of llama.cpp is one of transformers'.

    families   the model_type; where there are several, ``choose`` says which
    fields     llama.cpp's name of each field, and transformers'
    constants  what llama.cpp's graph of the architecture assumes
    more       what takes more than a name
    """

    families: str | tuple[str, ...]
    fields: Mapping[str, str] = field(default_factory=dict)
    constants: Mapping[str, Any] = field(default_factory=dict)
    more: Callable[[Fields], dict[str, Any]] = _nothing
    choose: Callable[[Fields], str] | None = None

    @property
    def model_types(self) -> tuple[str, ...]:
        """Every family that files of the architecture can be of."""
        return (self.families,) if isinstance(self.families, str) else self.families


def _partial_rotary(fields: Fields) -> dict[str, Any]:
    share = fields.need("rope.dimension_count") / fields.need("attention.key_length")
    biased = {"attention_bias": fields.has("attn_q.bias"), "use_qk_norm": fields.has("attn_q_norm")}
    return {"partial_rotary_factor": share, **biased}


def _deepseek_type(fields: Fields) -> str:
    told = fields.get("expert_gating_func")
    sigmoid = told == _SIGMOID if told is not None else fields.has("exp_probs_b")
    return "deepseek_v3" if sigmoid or fields.has("exp_probs_b") else "deepseek_v2"


def _deepseek(fields: Fields) -> dict[str, Any]:
    """Sizes of latent attention: newer files give those of the heads under names of their own."""
    rope = fields.need("rope.dimension_count")
    key = fields.get("attention.key_length_mla") or fields.need("attention.key_length")
    # Files from before llama.cpp knew groups lack them; of the published models, those with 256
    # experts (V3, R1) have 8 groups and take 4.
    groups = (8, 4) if fields.need("expert_count") == 256 else (1, 1)
    n_group = fields.get("expert_group_count", groups[0])
    made = {
        "num_key_value_heads": fields.need("attention.head_count"),  # 1 in newer files
        "q_lora_rank": fields.get("attention.q_lora_rank"),
        "kv_lora_rank": fields.need("attention.kv_lora_rank"),
        "qk_rope_head_dim": rope,
        "qk_nope_head_dim": key - rope,
        "v_head_dim": fields.get("attention.value_length_mla")
        or fields.need("attention.value_length"),
        "n_group": n_group,
        "topk_group": fields.get("expert_group_used_count", groups[1]),
        "norm_topk_prob": fields.get("expert_weights_norm", False),
        "routed_scaling_factor": fields.get("expert_weights_scale", 1.0),
    }
    if _deepseek_type(fields) == "deepseek_v2":
        made["topk_method"] = "group_limited_greedy" if n_group > 1 else "greedy"
    return made


def _tied_bias(fields: Fields) -> dict[str, Any]:
    return {"attention_bias": fields.has("attn_q.bias")}


FAMILIES: dict[str, GgufFamily] = {
    "llama": GgufFamily("mixtral", {"expert_count": "num_local_experts", **_HEAD}),
    "qwen2moe": GgufFamily(
        "qwen2_moe",
        {
            **_INNER,
            "expert_count": "num_experts",
            "expert_shared_feed_forward_length": "shared_expert_intermediate_size",
        },
        more=lambda fields: {"qkv_bias": fields.has("attn_q.bias")},
    ),
    "qwen3moe": GgufFamily(
        "qwen3_moe",
        {**_INNER, **_HEAD, "expert_count": "num_experts"},
        {"norm_topk_prob": True},
        _tied_bias,
    ),
    "olmoe": GgufFamily("olmoe", {"expert_count": "num_experts"}),
    "deepseek2": GgufFamily(
        ("deepseek_v2", "deepseek_v3"), _SHARED_EXPERTS, more=_deepseek, choose=_deepseek_type
    ),
    "gpt-oss": GgufFamily(
        "gpt_oss",
        {
            **_HEAD,
            "expert_count": "num_local_experts",
            "expert_feed_forward_length": "intermediate_size",
            "attention.sliding_window": "sliding_window",
        },
    ),
    "glm4moe": GgufFamily("glm4_moe", {**_SHARED_EXPERTS, **_HEAD}, more=_partial_rotary),
    "dots1": GgufFamily("dots1", {**_SHARED_EXPERTS, **_HEAD}, more=_tied_bias),
    "ernie4_5-moe": GgufFamily(
        "ernie4_5_moe",
        {
            **_INNER,
            "expert_count": "moe_num_experts",
            "expert_used_count": "moe_k",
            "expert_shared_count": "moe_num_shared_experts",
            "leading_dense_block_count": "moe_layer_start_index",
            "interleave_moe_layer_step": "moe_layer_interval",
        },
    ),
    "granitemoe": GgufFamily(
        "granitemoe",
        {
            "expert_count": "num_local_experts",
            "embedding_scale": "embedding_multiplier",
            "residual_scale": "residual_multiplier",
            "attention.scale": "attention_multiplier",
            "logit_scale": "logits_scaling",
        },
    ),
    "minimax-m2": GgufFamily(
        "minimax_m2",
        {
            **_HEAD,
            "expert_count": "num_local_experts",
            "rope.dimension_count": "rotary_dim",
            "expert_feed_forward_length": "intermediate_size",
        },
    ),
}


# Architectures whose configuration and names transformers gives, and the families of their files.
BY_TRANSFORMERS = {"qwen35moe": "qwen3_5_moe_text"}


def gguf_config(path: Path) -> dict[str, Any]:
    """The configuration of a GGUF model, as config.json would have it.

    Raises RunError where a file is damaged, or the architecture is not known.
    """
    from moerun.checkpoint.gguf.files import model_headers, native_dtype

    headers = model_headers(path)
    fields = Fields(headers)
    config = _described(fields)
    return config | {
        "dtype": str(native_dtype(headers)).removeprefix("torch."),
        "tie_word_embeddings": "output.weight" not in fields.tensors,
        **_tokens(fields),
    }


def _described(fields: Fields) -> dict[str, Any]:
    from transformers.integrations.gguf import GGUF_CONFIG_ARCHS, get_gguf_config

    architecture = fields.architecture
    if architecture in FAMILIES:
        return _of_table(FAMILIES[architecture], fields)
    if architecture in GGUF_CONFIG_ARCHS:
        try:
            made: dict[str, Any] = get_gguf_config(fields.metadata, tuple(fields.tensors))
        except KeyError as error:
            raise RunError(f"{fields.path} does not say {error}: convert it again") from error
        return made
    raise RunError(
        f"{fields.path} is of llama.cpp's architecture {architecture!r}, which is not read from "
        f"GGUF; read are {', '.join(sorted({*FAMILIES, *GGUF_CONFIG_ARCHS}))}: give the model's "
        "checkpoint in safetensors format"
    )


def _of_table(family: GgufFamily, fields: Fields) -> dict[str, Any]:
    if not fields.get("expert_count"):
        raise RunError(
            f"{fields.path} is a {fields.architecture!r} model without experts "
            f"({fields.architecture}.expert_count), which needs no offloading of them"
        )
    names = {**_COMMON, **family.fields}
    config = {ours: fields.get(key) for key, ours in names.items() if fields.get(key) is not None}
    ahead = fields.get("nextn_predict_layers", 0)
    return {
        "model_type": family.choose(fields) if family.choose else family.model_types[0],
        "num_hidden_layers": fields.need("block_count") - ahead,
        "num_nextn_predict_layers": ahead,
        "vocab_size": _vocabulary(fields),
        "rope_parameters": _rope(fields),
        **config,
        **family.constants,
        **family.more(fields),
    }


def _vocabulary(fields: Fields) -> int:
    embedding = fields.tensors.get("token_embd.weight")
    if embedding is None:
        raise RunError(f"{fields.path} has no tensor 'token_embd.weight': download it again")
    return embedding.shape[0]


def _rope(fields: Fields) -> dict[str, Any]:
    """How positions turn, with the stretching of contexts if there is one."""
    kind = fields.get("rope.scaling.type", "none")
    rope: dict[str, Any] = {"rope_type": "default"}
    if (theta := fields.get("rope.freq_base")) is not None:
        rope["rope_theta"] = theta
    if kind == "none":
        return rope
    if kind not in ("linear", "yarn"):
        raise RunError(
            f"{fields.path} stretches its context by {kind!r} ({fields.architecture}.rope.scaling."
            "type), which is not read from GGUF: give the checkpoint in safetensors format"
        )
    rope |= {"rope_type": kind, "factor": fields.need("rope.scaling.factor")}
    if kind == "yarn":
        rope |= _yarn(fields)
    return rope


def _yarn(fields: Fields) -> dict[str, Any]:
    given = {
        "original_max_position_embeddings": fields.get("rope.scaling.original_context_length"),
        "beta_fast": fields.get("rope.scaling.yarn_beta_fast", 32.0),
        "beta_slow": fields.get("rope.scaling.yarn_beta_slow", 1.0),
    }
    if fields.architecture == "gpt-oss":
        given["truncate"] = False  # as published; llama.cpp has no field for it
    if (log_multiplier := fields.get("rope.scaling.yarn_log_multiplier")) is not None:
        # llama.cpp writes 0.1 * mscale_all_dim, and the published models have mscale the same.
        given |= dict.fromkeys(("mscale", "mscale_all_dim"), round(10 * log_multiplier, 6))
    return {name: value for name, value in given.items() if value is not None}


def _tokens(fields: Fields) -> dict[str, Any]:
    """The special tokens; every one that ends a text or a turn counts as an end."""
    told = {name: fields.metadata.get(f"tokenizer.ggml.{name}") for name in _END_TOKENS}
    ends = list(dict.fromkeys(token for token in told.values() if token is not None))
    return {
        "bos_token_id": fields.metadata.get("tokenizer.ggml.bos_token_id"),
        "pad_token_id": fields.metadata.get("tokenizer.ggml.padding_token_id"),
        "eos_token_id": ends[0] if len(ends) == 1 else ends or None,
    }
