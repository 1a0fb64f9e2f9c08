"""From llama.cpp's tensors to the model's: names, and what its converter changed.

The transforms are transformers' own (WeightRenaming, WeightConverter), which work on the slice of
one expert as well as on a whole tensor. transformers has lists for the architectures of its new
GGUF loader; the others, whose old loader reads all experts of a layer at once, have theirs here.
llama.cpp's converter (conversion/ in its repository) says what must be undone.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from transformers.core_model_loading import (
    ConversionOps,
    WeightConverter,
    WeightRenaming,
    WeightTransform,
)
from transformers.integrations.gguf.gguf_conversion_mapping import (
    DENSE_DECODER_RENAMINGS,
    GGUF_ARCHS,
    ConcatenateRows,
    PermuteRows,
    Unsqueeze,
)

from moerun.errors import RunError

_NORMS = {
    r"^output_norm\.": "model.norm.",
    r"\.attn_norm\.": ".input_layernorm.",
    r"\.ffn_norm\.": ".post_attention_layernorm.",
    r"\.post_attention_norm\.": ".post_attention_layernorm.",
    r"\.attn_q_norm\.": ".self_attn.q_norm.",
    r"\.attn_k_norm\.": ".self_attn.k_norm.",
}
_DOWN = r"\.ffn_down_exps\.weight"
_GATE_UP = [r"\.ffn_gate_exps\.weight", r"\.ffn_up_exps\.weight"]


def gguf_transforms(architecture: str, config: Any) -> list[WeightTransform]:
    """What turns the tensors of a GGUF file into those of the model that ``config`` describes.

    Raises KeyError for an architecture without a list.
    """
    if architecture in GGUF_ARCHS and architecture not in _TRANSFORMS:
        theirs: list[WeightTransform] = GGUF_ARCHS[architecture](config)
        return theirs
    return [*DENSE_DECODER_RENAMINGS, *_renamings(_NORMS), *_TRANSFORMS[architecture](config)]


def _renamings(names: dict[str, str]) -> list[WeightTransform]:
    return [WeightRenaming(source, target) for source, target in names.items()]


def _experts(block: str = "mlp", gate: str = "gate", shared: str = "shared_experts") -> list[Any]:
    """The gate, the routed experts fused as the model has them, and the shared ones."""
    names = {
        r"\.ffn_gate_inp\.": f".{block}.{gate}.",
        _DOWN: f".{block}.experts.down_proj",
        **{rf"\.ffn_{w}_shexp\.": f".{block}.{shared}.{w}_proj." for w in ("gate", "up", "down")},
    }
    return [
        *_renamings(names),
        WeightConverter(list(_GATE_UP), f".{block}.experts.gate_up_proj", [ConcatenateRows(dim=1)]),
    ]


def _balance(target: str) -> list[Any]:
    """The bias of the gate's choice, which was named in two ways."""
    return _renamings({r"\.exp_probs_b(?:\.bias)?$": f".{target}"})


def _mixtral(config: Any, block: str = "mlp", gate: str = "gate") -> list[Any]:
    """llama.cpp turns pairs of neighbours where transformers turns halves: rows of q and k were
    permuted."""
    q, k = config.num_attention_heads, config.num_key_value_heads or config.num_attention_heads
    width = getattr(config, "head_dim", None) or config.hidden_size // q
    return [*_experts(block, gate), _halves("q", q, width), _halves("k", k, width)]


def _halves(which: str, heads: int, width: int) -> WeightConverter:
    if width < 2 or width % 2:
        raise RunError(
            f"the header's {heads} heads of attention would have {width} values each, which are "
            "no pairs: its attention.head_count is not that of its embedding_length"
        )
    rows = torch.arange(heads * width, device="cpu").reshape(heads, width // 2, 2)
    name = f"self_attn.{which}_proj.weight"
    return WeightConverter(name, name, [PermuteRows(rows.transpose(1, 2).reshape(-1))])


def _qwen2moe(_config: Any) -> list[Any]:
    name = "mlp.shared_expert_gate.weight"
    return [
        *_experts(shared="shared_expert"),
        *_renamings({r"\.ffn_gate_inp_shexp\.": ".mlp.shared_expert_gate."}),
        WeightConverter(name, name, [Unsqueeze(0, expected_ndim=2)]),
    ]


def _deepseek(_config: Any) -> list[Any]:
    latent = {
        r"\.attn_q_a\.": ".self_attn.q_a_proj.",
        r"\.attn_q_b\.": ".self_attn.q_b_proj.",
        r"\.attn_q_a_norm\.": ".self_attn.q_a_layernorm.",
        r"\.attn_kv_a_mqa\.": ".self_attn.kv_a_proj_with_mqa.",
        r"\.attn_kv_a_norm\.": ".self_attn.kv_a_layernorm.",
        r"\.attn_kv_b\.": ".self_attn.kv_b_proj.",
    }
    # Newer files have the keys' and the values' halves of kv_b apart.
    halves = [r"\.attn_k_b\.weight", r"\.attn_v_b\.weight"]
    joined = WeightConverter(halves, ".self_attn.kv_b_proj.weight", [JoinKeyValue()])
    balance = _balance("mlp.gate.e_score_correction_bias")
    return [*_experts(), *_renamings(latent), *balance, joined]


def _gpt_oss(_config: Any) -> list[Any]:
    target = ".mlp.experts."
    biases = [r"\.ffn_gate_exps\.bias", r"\.ffn_up_exps\.bias"]
    return [
        *_renamings(
            {
                r"\.ffn_gate_inp\.": ".mlp.router.",
                r"\.attn_sinks(?:\.weight)?$": ".self_attn.sinks",
                r"\.ffn_down_exps\.bias": f"{target}down_proj_bias",
            }
        ),
        WeightConverter(list(_GATE_UP), f"{target}gate_up_proj", [Interleave(), Transpose()]),
        WeightConverter(biases, f"{target}gate_up_proj_bias", [Interleave()]),
        WeightConverter(_DOWN, f"{target}down_proj", [Transpose()]),
    ]


def _ernie(_config: Any) -> list[Any]:
    name = "mlp.gate.moe_statics.e_score_correction_bias"
    return [
        *_experts(),
        *_balance(name),
        WeightConverter(name, name, [Unsqueeze(0, expected_ndim=2)]),
    ]


_TRANSFORMS: dict[str, Callable[[Any], list[Any]]] = {
    "llama": _mixtral,
    "granitemoe": lambda config: _mixtral(config, "block_sparse_moe", "router"),
    "qwen2moe": _qwen2moe,
    "qwen3moe": lambda _: _experts(),
    "olmoe": lambda _: _experts(),
    "deepseek2": _deepseek,
    "gpt-oss": _gpt_oss,
    "glm4moe": lambda _: [*_experts(), *_balance("mlp.gate.e_score_correction_bias")],
    "dots1": lambda _: [*_experts(), *_balance("mlp.gate.e_score_correction_bias")],
    "ernie4_5-moe": _ernie,
    "minimax-m2": lambda _: [*_experts(), *_balance("mlp.e_score_correction_bias")],
}


class _Operation(ConversionOps):  # type: ignore[misc]
    """An operation that makes one tensor of the tensors of its patterns, in their order."""

    @torch.no_grad()
    def convert(
        self,
        input_dict: dict[str, Any],
        source_patterns: list[str],
        target_patterns: list[str],
        **kwargs: Any,
    ) -> dict[str, torch.Tensor]:
        """The tensor under the target's name."""
        given = [input_dict[p] for p in source_patterns if p in input_dict]
        parts = given or list(input_dict.values())  # an operation before this one made it
        tensors = [part[0] if isinstance(part, list) else part for part in parts]
        return {target_patterns[0]: self.made(*tensors)}

    def made(self, *tensors: torch.Tensor) -> torch.Tensor:
        """The tensor that is made of these."""
        raise NotImplementedError


class Interleave(_Operation):
    """Rows of gate and up in turns: [E, I, ...] twice to [E, 2 I, ...]."""

    def made(self, *tensors: torch.Tensor) -> torch.Tensor:
        """See the class."""
        return torch.stack(tensors, dim=2).flatten(1, 2)


class Transpose(_Operation):
    """Each expert's matrix transposed: [E, rows, columns] to [E, columns, rows]."""

    def made(self, *tensors: torch.Tensor) -> torch.Tensor:
        """See the class."""
        return tensors[0].transpose(-1, -2)


class JoinKeyValue(_Operation):
    """kv_b [heads (nope + v), rank] of its keys [heads, rank, nope] and values [heads, v, rank]."""

    def made(self, *tensors: torch.Tensor) -> torch.Tensor:
        """See the class."""
        keys, values = tensors
        return torch.cat([keys.transpose(1, 2), values], dim=1).flatten(0, 1)
