"""How many slots a budget of memory leaves: an estimate of what `moerun` plans with the model."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

from moepolicy import PolicySpec
from moeroute.models import ModelShape
from moeroute.schema import TraceMeta

from moesim.errors import SimulationError
from moesim.sweep.worker import slots_in
from moesim.workload.steps import Workload

# What torch's libraries take for themselves, as moerun.memory.needs has it.
LIBRARY_BYTES = {"gpu": 96 << 20, "cpu": 48 << 20}
CACHE_ITEM_BYTES = 2  # of an element of a key, of a value, of a hidden state
LOGIT_BYTES = 64  # of a word of the vocabulary, while a token is sampled
PARTIAL_SUMS_BYTES = 16 << 20  # of kernels that read quantised weights on a GPU
PREFETCH_HORIZON = 3  # layers ahead whose gates are asked, at most
# Of a layer of gated delta rule while it reads a prompt, as moerun measures Qwen3.6's on the meta
# device: bytes of each number of each token's values, and of each pair of tokens.
LINEAR_VALUE_BYTES = 50
LINEAR_PAIR_BYTES = 11


@dataclass(frozen=True)
class Budget:
    """What memory of a device there is, and what of it is spent on other things than weights.

    context_tokens  that keys and values are kept of; None: none are counted
    shape           None: nothing says how big keys, values and activations are
    device          "gpu" or "cpu": where the slots lie
    """

    memory_bytes: int
    context_tokens: int | None
    shape: ModelShape | None
    device: str = "gpu"

    def slots(
        self,
        workload: Workload,
        policy: PolicySpec,
        expert_bytes: int,
        dense_bytes: int,
        prompt_chunk: int | None = None,
    ) -> int | None:
        """Slots a layer; None where not even the policy's staging fits."""
        free = self.memory_bytes - self.workspace_bytes(prompt_chunk) - dense_bytes
        if self.shape is not None and self.context_tokens is not None:
            free -= cache_bytes(self.shape, self.context_tokens)
        context = workload.context(workload.meta.n_experts, "layer")
        try:
            return max(0, slots_in(free, expert_bytes, policy, context)) if free > 0 else None
        except SimulationError:
            return None

    def workspace_bytes(self, prompt_chunk: int | None = None) -> int:
        """Libraries, logits, and the most that one layer holds of a prompt that fills the context,
        read so many tokens at a time (None: at once): what moerun.memory.needs counts, without what
        only some families have."""
        libraries = LIBRARY_BYTES[self.device]
        if self.shape is None or self.context_tokens is None:
            return libraries
        tokens = min(prompt_chunk or self.context_tokens, self.context_tokens)
        vocabulary, _ = self.shape.tensors["model.embed_tokens.weight"]
        sums = PARTIAL_SUMS_BYTES if self.device == "gpu" else 0
        return (
            libraries
            + vocabulary * LOGIT_BYTES
            + sums
            + _layer_bytes(self.shape, tokens, self.context_tokens)
        )


def _layer_bytes(shape: ModelShape, tokens: int, context: int) -> int:
    """The most that one layer holds of so many tokens of a prompt, the last of a context."""
    hidden = shape.tensors["model.embed_tokens.weight"][1]
    queries = max(_rows(shape, ("q_proj.weight",)), default=hidden)
    # The matrices that read the hidden state lie in the store as one.
    widest = sum(dims[0] for dims in shape.expert.values() if dims[-1] == hidden)
    projected = 2 * (3 * tokens + context) * queries * CACHE_ITEM_BYTES
    # Attention with sinks holds the scores of all heads, in float32, while it normalises them.
    sinks = max(_rows(shape, ("self_attn.sinks",)), default=0)
    attention = projected + (5 + 3 * 4 * sinks) * tokens * context
    values = max(map(math.prod, linear_states(shape)), default=0)
    if values:
        pairs = LINEAR_PAIR_BYTES * tokens * context
        attention = max(attention, LINEAR_VALUE_BYTES * values * tokens + pairs)
    inside = tokens * 3 * (widest + hidden) * CACHE_ITEM_BYTES
    experts = tokens * (shape.top_k + 2) * hidden * 4 + inside
    around = 6 * tokens * hidden * 4
    gates = 4 * tokens * shape.n_experts * (3 + 2 * PREFETCH_HORIZON)
    return around + max(attention, experts) + gates + 4 * tokens * widest


def cache_bytes(shape: ModelShape, tokens: int) -> int:
    """Bytes of the keys and values of so many tokens in all layers (of latent attention, of what
    both are made from), with one layer's again, which grows by copying, and of the states of
    layers of linear attention."""
    of_layers = _rows(shape, ("k_proj.weight", "v_proj.weight", "kv_a_proj_with_mqa.weight"))
    rows, states = sum(of_layers), list(linear_states(shape))
    kept = shape.n_layers - len(states)
    growing = rows // kept if kept else 0
    in_states = sum(heads * width * width * 4 for heads, width in states)
    return (rows + growing) * CACHE_ITEM_BYTES * tokens + in_states


def linear_states(shape: ModelShape) -> Iterator[tuple[int, int]]:
    """Heads and width of the states of each layer of linear attention, where there are such."""
    for name, dims in shape.tensors.items():
        if name.endswith("linear_attn.dt_bias"):
            width = shape.tensors[name.replace("dt_bias", "norm.weight")][0]
            yield dims[0], width


def _rows(shape: ModelShape, ends: tuple[str, ...]) -> list[int]:
    """Rows of the tensors whose names end so."""
    return [dims[0] for name, dims in shape.tensors.items() if name.endswith(ends)]


def dense_bytes(shape: ModelShape | None, meta: TraceMeta, attention: str) -> int:
    """Bytes of all weights that are not experts, at a precision of attention."""
    if shape is None:
        return meta.n_layers * (meta.layer_bytes or 0) + (meta.token_bytes or 0)
    sizes = shape.dense(attention)
    found = shape.n_layers * sizes.layer_bytes + sizes.token_bytes
    if "lm_head.weight" in shape.tensors:
        found += math.prod(shape.tensors["model.embed_tokens.weight"]) * CACHE_ITEM_BYTES
    return found
