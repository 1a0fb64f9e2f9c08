"""The weights of a mixture-of-experts model, by name and shape, from its config.json alone.

The names are those of transformers' models; the experts of a layer are listed apart from the rest.
A test compares each family with the parameters of the transformers model on the meta device.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from moeroute.families import FAMILIES, family_of
from moeroute.schema import TraceError

Shapes = dict[str, tuple[int, ...]]


# Without it these would take a constant of their own for it; every published config has it.
_HEAD_DIM_IS_STATED = ("gpt_oss", "qwen3_next", "qwen3_5_moe")
_EXPERTS = ("n_routed_experts", "num_experts", "num_local_experts")  # versions differ
CORRECTION_BIAS = "e_score_correction_bias"  # a buffer, float32 whatever the rest is


class Architecture:
    """The weights of one configuration. Raises TraceError that names a missing or wrong field.

    The class is long because each block that families build of (attention's four kinds, experts,
    dense) is a method here that reads the same configuration.
    """

    def __init__(self, config: Mapping[str, Any], name: str) -> None:
        self.config: Mapping[str, Any] = config.get("text_config") or config
        self.name = name
        found = str(self.config.get("model_type", config.get("model_type", "")))
        family = family_of(found)
        if family is None or family.weights is None:
            known = ", ".join(each.model_type for each in FAMILIES if each.weights)
            raise TraceError(
                f"{name}: a model of family {found or 'unknown'!r}, whose sizes are not known "
                f"here; known are {known}: give the sizes as numbers"
            )
        self.model_type = family.model_type
        self.family = family.weights
        self.hidden = self.whole("hidden_size")
        self.n_layers = self.whole("num_hidden_layers")
        named = [field for field in _EXPERTS if self.config.get(field) is not None]
        self.n_experts = self.whole(named[0] if named else "num_experts")
        self.top_k = self.whole(self.family.top_k_field)
        self.vocabulary = self.whole("vocab_size")

    def whole(self, field: str, default: int | None = None) -> int:
        """A positive whole number of the config (``default`` may be 0)."""
        value = self.config.get(field)
        if value is None and default is not None:
            return default
        if isinstance(value, bool) or not isinstance(value, int) or value < (default is None):
            said = "is missing" if value is None else f"is {value!r}"
            raise TraceError(f"{self.name}: {field} {said}, not a positive whole number")
        return value

    @property
    def moe_layers(self) -> list[int]:
        """The numbers of the layers that have experts."""
        kinds = self.layer_kinds("mlp_layer_types")
        if kinds is not None:
            return [i for i, kind in enumerate(kinds) if kind != "dense"]
        if self.whole("moe_layer_freq", 1) != 1:
            raise TraceError(f"{self.name}: moe_layer_freq is not 1: give the sizes as numbers")
        first = self.whole("first_k_dense_replace", self.family.dense_first)
        dense = set(self.config.get("mlp_only_layers") or ())
        every = self.whole("decoder_sparse_step", 1) or 1
        return [
            i for i in range(self.n_layers) if i >= first and i not in dense and not (i + 1) % every
        ]

    def tensors(self) -> Shapes:
        """Every weight but those of routed experts, the head last. A tied head is not listed."""
        found: Shapes = {"model.embed_tokens.weight": (self.vocabulary, self.hidden)}
        for i in range(self.n_layers):
            found |= {f"model.layers.{i}.{name}": shape for name, shape in self.layer(i).items()}
        found |= self.after_layers()
        if not self.config.get("tie_word_embeddings", self.family.tied):
            found["lm_head.weight"] = (self.vocabulary, self.hidden)
        return found

    def layer(self, layer: int) -> Shapes:
        """Every weight of a layer but those of routed experts, by names within the layer."""
        block = self._experts_block() if layer in self.moe_layers else self._dense_block()
        parts = self._attention(layer) | block
        for norm in self.family.layer_norms:
            parts[f"{norm}.weight"] = (self.hidden,)
        return parts

    def after_layers(self) -> Shapes:
        """The weights between the last layer and the head."""
        return {"model.norm.weight": (self.hidden,)}

    def layer_kinds(self, field: str) -> list[str] | None:
        """What ``field`` says of each layer; None where the config does not have it."""
        kinds = self.config.get(field)
        if kinds is None:
            return None
        if not isinstance(kinds, list | tuple) or len(kinds) < self.n_layers:
            raise TraceError(f"{self.name}: {field} names not all {self.n_layers} layers")
        return [str(kind) for kind in kinds[: self.n_layers]]

    def expert(self) -> Shapes:
        """One routed expert: matrices [output, input] and, where the family has them, biases."""
        inner = self.whole(self.family.expert_field)
        shapes: Shapes = {"gate_up_proj": (2 * inner, self.hidden)}
        if self.model_type == "gpt_oss":
            shapes["gate_up_proj_bias"] = (2 * inner,)
        shapes["down_proj"] = (self.hidden, inner)
        if self.model_type == "gpt_oss":
            shapes["down_proj_bias"] = (self.hidden,)
        return shapes

    def _experts_block(self) -> Shapes:
        """What a layer has besides its routed experts: the gate, and shared experts."""
        block = self.family.block
        router = f"{block}.{self.family.router}"
        found: Shapes = {f"{router}.weight": (self.n_experts, self.hidden)}
        if self.model_type == "gpt_oss":
            found[f"{router}.bias"] = (self.n_experts,)
        if self.family.correction:
            at = self.family.correction_at
            holder = router if at is None else f"{block}.{at}".rstrip(".")
            found[f"{holder}.{CORRECTION_BIAS}"] = (self.n_experts,)
        if self.family.shared == "one" and self.n_shared_experts:
            found |= self.gated("mlp.shared_expert", self.whole("shared_expert_intermediate_size"))
            found["mlp.shared_expert_gate.weight"] = (1, self.hidden)
        elif n := self.n_shared_experts:
            found |= self.gated("mlp.shared_experts", n * self.whole("moe_intermediate_size"))
        return found

    @property
    def n_shared_experts(self) -> int:
        """Experts that every token passes besides the routed ones."""
        if self.family.shared == "one":
            return int(self.whole("shared_expert_intermediate_size", 0) > 0)
        return self.whole(self.family.shared_field, 0) if self.family.shared else 0

    def _dense_block(self) -> Shapes:
        return self.gated("mlp", self.whole("intermediate_size"))

    def gated(self, prefix: str, inner: int) -> Shapes:
        """Two matrices up and one down, under ``prefix``."""
        return {
            f"{prefix}.gate_proj.weight": (inner, self.hidden),
            f"{prefix}.up_proj.weight": (inner, self.hidden),
            f"{prefix}.down_proj.weight": (self.hidden, inner),
        }

    def _attention(self, layer: int) -> Shapes:
        if self.family.attention == "latent":
            found = self._latent()
        elif self.family.attention == "indexed":
            found = self._latent() | self._indexer()
        elif self.family.attention == "mixed" and not self._is_full(layer):
            return {f"linear_attn.{name}": shape for name, shape in self._delta_net().items()}
        else:
            found = self._grouped()
        return {f"self_attn.{name}": shape for name, shape in found.items()}

    def _is_full(self, layer: int) -> bool:
        kinds = self.layer_kinds("layer_types")
        if kinds is not None:
            return kinds[layer] == "full_attention"
        return not (layer + 1) % self.whole("full_attention_interval")

    def _grouped(self) -> Shapes:
        heads = self.whole("num_attention_heads")
        kv = self.whole("num_key_value_heads", heads)
        stated = self.model_type in _HEAD_DIM_IS_STATED
        dim = self.whole("head_dim", None if stated else self.hidden // heads)
        # A mixed model's output gate lies with its queries.
        gated = 2 if self.family.attention == "mixed" else 1
        projections = {
            "q_proj": (gated * heads * dim, self.hidden),
            "k_proj": (kv * dim, self.hidden),
            "v_proj": (kv * dim, self.hidden),
            "o_proj": (self.hidden, heads * dim),
        }
        found: Shapes = {f"{name}.weight": shape for name, shape in projections.items()}
        field = "qkv_bias" if self.model_type == "qwen2_moe" else "attention_bias"
        if self.config.get(field, self.family.biases):
            biased = list(projections)
            if self.model_type in ("qwen2_moe", "glm4_moe"):
                biased.remove("o_proj")
            found |= {f"{name}.bias": projections[name][:1] for name in biased}
        if self.model_type == "gpt_oss":
            found["sinks"] = (heads,)
        norms = self.family.norms
        if self.model_type == "glm4_moe" and self.config.get("use_qk_norm", False):
            norms = "head"
        if norms:
            over = {"head": (dim, dim), "all": (heads * dim, kv * dim)}[norms]
            found["q_norm.weight"], found["k_norm.weight"] = (over[0],), (over[1],)
        return found

    def _latent(self) -> Shapes:
        heads, rank = self.whole("num_attention_heads"), self.whole("kv_lora_rank")
        nope, rope = self.whole("qk_nope_head_dim"), self.whole("qk_rope_head_dim")
        values = self.whole("v_head_dim")
        queries = heads * (nope + rope)
        found: Shapes
        if "q_lora_rank" not in self.config:
            raise TraceError(f"{self.name}: q_lora_rank is missing: null says there is none")
        if self.config["q_lora_rank"] is None:
            found = {"q_proj.weight": (queries, self.hidden)}
        else:
            compressed = self.whole("q_lora_rank")
            found = {
                "q_a_proj.weight": (compressed, self.hidden),
                "q_a_layernorm.weight": (compressed,),
                "q_b_proj.weight": (queries, compressed),
            }
        found |= {
            "kv_a_proj_with_mqa.weight": (rank + rope, self.hidden),
            "kv_a_layernorm.weight": (rank,),
            "kv_b_proj.weight": (heads * (nope + values), rank),
            "o_proj.weight": (self.hidden, heads * values),
        }
        if self.config.get("attention_bias", False):
            for name in ("q_a_proj", "kv_a_proj_with_mqa", "o_proj"):
                if f"{name}.weight" in found:
                    found[f"{name}.bias"] = found[f"{name}.weight"][:1]
        return found

    def _indexer(self) -> Shapes:
        """What chooses the tokens that sparse attention looks at."""
        heads, dim = self.whole("index_n_heads"), self.whole("index_head_dim")
        shapes: Shapes = {
            "wq_b.weight": (heads * dim, self.whole("q_lora_rank")),
            "wk.weight": (dim, self.hidden),
            "k_norm.weight": (dim,),
            "k_norm.bias": (dim,),
            "weights_proj.weight": (heads, self.hidden),
        }
        return {f"indexer.{name}": shape for name, shape in shapes.items()}

    def _delta_net(self) -> Shapes:
        heads = self.whole("linear_num_value_heads")
        head_dim = self.whole("linear_value_head_dim")
        keys = self.whole("linear_num_key_heads") * self.whole("linear_key_head_dim")
        values, mixed = heads * head_dim, 2 * keys + heads * head_dim
        if self.model_type == "qwen3_next":
            inputs = {"in_proj_qkvz": mixed + values, "in_proj_ba": 2 * heads}
        else:
            inputs = {
                "in_proj_qkv": mixed,
                "in_proj_z": values,
                "in_proj_b": heads,
                "in_proj_a": heads,
            }
        return {
            "dt_bias": (heads,),
            "A_log": (heads,),
            "conv1d.weight": (mixed, 1, self.whole("linear_conv_kernel_dim")),
            **{f"{name}.weight": (rows, self.hidden) for name, rows in inputs.items()},
            "norm.weight": (head_dim,),
            "out_proj.weight": (self.hidden, values),
        }
