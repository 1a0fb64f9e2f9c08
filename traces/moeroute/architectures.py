"""The architectures whose layers are unlike the others', and the choice of the one that a
configuration is of."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from moeroute.architecture import CORRECTION_BIAS, Architecture, Shapes
from moeroute.families import family_of
from moeroute.schema import TraceError

_OWN = "per_layer_config"
_WINDOW, _SPARSE = "sliding_attention", "compressed_sparse_attention"
_TOKENS = {_WINDOW: 0, _SPARSE: 4, "heavily_compressed_attention": 128}


def architecture_of(config: Mapping[str, Any], name: str) -> Architecture:
    """The weights of a configuration. Raises TraceError that names a missing or wrong field."""
    text = config.get("text_config") or config
    family = family_of(text.get("model_type", config.get("model_type")))
    layout = family.weights.layout if family and family.weights else ""
    return _LAYOUTS[layout](config, name)


class Gemma4(Architecture):
    """A dense block in addition to the experts in every layer, with norms of their own; wider
    heads, whose values are their keys, in the layers of full attention."""

    @property
    def moe_layers(self) -> list[int]:
        """All layers."""
        return list(range(self.n_layers))

    def layer(self, layer: int) -> Shapes:
        """Every weight of a layer but those of routed experts, by names within the layer."""
        if self.whole("hidden_size_per_layer_input", 0) or self.whole("num_kv_shared_layers", 0):
            raise TraceError(
                f"{self.name}: inputs of each layer, or keys that layers share, are not counted: "
                "give the sizes as numbers"
            )
        norms = (
            *("input_layernorm", "post_attention_layernorm", "pre_feedforward_layernorm"),
            *("post_feedforward_layernorm", "post_feedforward_layernorm_1"),
            *("post_feedforward_layernorm_2", "pre_feedforward_layernorm_2"),
        )
        return {
            **self._heads(layer),
            **self.gated("mlp", self.whole("intermediate_size")),
            **{f"{norm}.weight": (self.hidden,) for norm in norms},
            "layer_scalar": (1,),
            "router.proj.weight": (self.n_experts, self.hidden),
            "router.scale": (self.hidden,),
            "router.per_expert_scale": (self.n_experts,),
        }

    def _attends_fully(self, layer: int) -> bool:
        kinds = self.layer_kinds("layer_types")
        if layer == self.n_layers - 1:
            return True  # whatever the config says
        return not (layer + 1) % 6 if kinds is None else kinds[layer] == "full_attention"

    def _heads(self, layer: int) -> Shapes:
        full, heads = self._attends_fully(layer), self.whole("num_attention_heads")
        same = full and bool(self.config.get("attention_k_eq_v", False))
        dim, kv = self._head_dim(layer, full), self._kv_heads(layer, same)
        found: Shapes = {
            "q_proj.weight": (heads * dim, self.hidden),
            "k_proj.weight": (kv * dim, self.hidden),
            "o_proj.weight": (self.hidden, heads * dim),
            "q_norm.weight": (dim,),
            "k_norm.weight": (dim,),
        }
        if not same:
            found["v_proj.weight"] = (kv * dim, self.hidden)
        return {f"self_attn.{name}": shape for name, shape in found.items()}

    def _head_dim(self, layer: int, full: bool) -> int:
        if _OWN in self.config:
            return self._own(layer, "head_dim", self.whole("head_dim"))
        return self.whole("global_head_dim", 512) if full else self.whole("head_dim")

    def _kv_heads(self, layer: int, same: bool) -> int:
        kv = self.whole("num_key_value_heads")
        if _OWN in self.config:
            return self._own(layer, "num_key_value_heads", kv)
        return self.whole("num_global_key_value_heads", kv) if same else kv

    def _own(self, layer: int, field: str, default: int) -> int:
        """What a layer has of its own, in a configuration that transformers has written."""
        own = self.config[_OWN]
        found = own.get(str(layer), {}) if isinstance(own, Mapping) else {}
        return int(found.get(field, default))


class DeepseekV4(Architecture):
    """Attention over compressed keys, hyper-connections around each block, and gates that choose by
    a table of tokens in the first layers."""

    @property
    def moe_layers(self) -> list[int]:
        """All layers."""
        return list(range(self.n_layers))

    def layer(self, layer: int) -> Shapes:
        """Every weight of a layer but those of routed experts, by names within the layer."""
        found = {f"self_attn.{name}": s for name, s in self._compressed(layer).items()}
        found["mlp.gate.weight"] = (self.n_experts, self.hidden)
        if self._chooses_by_table(layer):
            found["mlp.gate.tid2eid"] = (self.vocabulary, self.top_k)
        else:
            found[f"mlp.gate.{CORRECTION_BIAS}"] = (self.n_experts,)
        inner = self.whole("moe_intermediate_size")  # whatever n_shared_experts says
        found |= self.gated("mlp.shared_experts", inner)
        for norm in ("input_layernorm", "post_attention_layernorm"):
            found[f"{norm}.weight"] = (self.hidden,)
        streams = self.whole("hc_mult", 4)
        mixed = (2 + streams) * streams
        for block in ("attn_hc", "ffn_hc"):
            found[f"{block}.fn"] = (mixed, streams * self.hidden)
            found[f"{block}.base"], found[f"{block}.scale"] = (mixed,), (3,)
        return found

    def after_layers(self) -> Shapes:
        """The weights between the last layer and the head."""
        streams = self.whole("hc_mult", 4)
        return {
            "model.norm.weight": (self.hidden,),
            "model.hc_head.hc_fn": (streams, streams * self.hidden),
            "model.hc_head.hc_base": (streams,),
            "model.hc_head.hc_scale": (1,),
        }

    def _compressed(self, layer: int) -> Shapes:
        heads, dim = self.whole("num_attention_heads"), self.whole("head_dim")
        rank, groups = self.whole("q_lora_rank"), self.whole("o_groups")
        inside = groups * self.whole("o_lora_rank")
        found: Shapes = {
            "sinks": (heads,),
            "q_a_proj.weight": (rank, self.hidden),
            "q_a_norm.weight": (rank,),
            "q_b_proj.weight": (heads * dim, rank),
            "kv_proj.weight": (dim, self.hidden),
            "kv_norm.weight": (dim,),
            "o_a_proj.weight": (inside, heads * dim // groups),
            "o_b_proj.weight": (self.hidden, inside),
        }
        kind, tokens = self._compression(layer)
        if kind != _WINDOW:
            overlap = 2 if kind == _SPARSE else 1
            found |= self._compressor("compressor", tokens, dim, overlap)
            if kind == _SPARSE:
                index, n = self.whole("index_head_dim"), self.whole("index_n_heads")
                found |= self._compressor("compressor.indexer", tokens, index, overlap)
                found["compressor.indexer.q_b_proj.weight"] = (n * index, rank)
                found["compressor.indexer.scorer.weights_proj.weight"] = (n, self.hidden)
        return found

    def _compressor(self, prefix: str, tokens: int, dim: int, series: int) -> Shapes:
        width = series * dim
        return {
            f"{prefix}.position_bias": (tokens, width),
            f"{prefix}.kv_proj.weight": (width, self.hidden),
            f"{prefix}.gate_proj.weight": (width, self.hidden),
            f"{prefix}.kv_norm.weight": (dim,),
        }

    def _chooses_by_table(self, layer: int) -> bool:
        kinds = self.layer_kinds("mlp_layer_types")
        if kinds is not None:
            return kinds[layer] == "hash_moe"
        return layer < self.whole("num_hash_layers", 3)

    def _compression(self, layer: int) -> tuple[str, int]:
        """The kind of a layer's attention, and how many tokens' keys it makes one of."""
        kinds, ratios = self.layer_kinds("layer_types"), self.config.get("compress_ratios")
        if kinds is not None:
            rates = {**_TOKENS, **(self.config.get("compress_rates") or {})}
            return kinds[layer], int(rates.get(kinds[layer], 0))
        if not isinstance(ratios, list | tuple) or len(ratios) < self.n_layers:
            raise TraceError(f"{self.name}: compress_ratios names not all {self.n_layers} layers")
        named = {tokens: kind for kind, tokens in _TOKENS.items()}
        if ratios[layer] not in named:
            raise TraceError(f"{self.name}: compress_ratios {ratios[layer]!r} is not 0, 4 or 128")
        return named[ratios[layer]], ratios[layer]


_LAYOUTS = {"": Architecture, "gemma4": Gemma4, "deepseek_v4": DeepseekV4}
