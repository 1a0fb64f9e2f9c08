"""How many slots a budget of memory leaves: an estimate of what `moerun` plans with the model."""

from __future__ import annotations

import math
from dataclasses import dataclass

from moepolicy import PolicySpec
from moeroute.models import ModelShape
from moeroute.schema import TraceMeta

from moesim.errors import SimulationError
from moesim.sweep.worker import slots_in
from moesim.workload.steps import Workload

LIBRARY_BYTES = 96 << 20  # what torch's libraries take for themselves
CACHE_ITEM_BYTES = 2  # of an element of a key, of a value, of a hidden state
LOGIT_BYTES = 64  # of a word of the vocabulary, while a token is sampled
PARTIAL_SUMS_BYTES = 16 << 20  # of kernels that read quantised weights on a GPU


@dataclass(frozen=True)
class Budget:
    """What the device's memory is spent on, besides weights."""

    memory_bytes: int
    kv_cache_bytes: int
    workspace_bytes: int

    @classmethod
    def of(cls, memory_bytes: int, context_tokens: int | None, shape: ModelShape | None) -> Budget:
        """A budget with room for the keys and values of so many tokens; without a shape nothing
        says how big these are, and none are counted."""
        if shape is None or context_tokens is None:
            return cls(memory_bytes, 0, LIBRARY_BYTES)
        kv = context_tokens * kv_token_bytes(shape)
        return cls(memory_bytes, kv, _workspace_bytes(shape, context_tokens))

    def slots(
        self, workload: Workload, policy: PolicySpec, expert_bytes: int, dense_bytes: int
    ) -> int | None:
        """Slots a layer; None where not even the policy's staging fits."""
        free = self.memory_bytes - self.workspace_bytes - self.kv_cache_bytes - dense_bytes
        context = workload.context(workload.meta.n_experts, "layer")
        try:
            return max(0, slots_in(free, expert_bytes, policy, context)) if free > 0 else None
        except SimulationError:
            return None


def _workspace_bytes(shape: ModelShape, tokens: int) -> int:
    """Libraries, logits, and the most that one layer holds of a prompt of so many tokens: what
    moerun.memory.needs counts, without what only some families have."""
    vocabulary, hidden = shape.tensors["model.embed_tokens.weight"]
    queries = max(
        (dims[0] for name, dims in shape.tensors.items() if name.endswith("q_proj.weight")),
        default=hidden,
    )
    # The matrices that read the hidden state lie in the store as one.
    widest = sum(dims[0] for dims in shape.expert.values() if dims[-1] == hidden)
    attention = 4 * 2 * tokens * queries * CACHE_ITEM_BYTES + 5 * tokens**2
    # Attention with sinks holds the scores of all heads, in float32, while it normalises them.
    sinks = (dims[0] for name, dims in shape.tensors.items() if name.endswith("self_attn.sinks"))
    attention += 3 * 4 * max(sinks, default=0) * tokens**2
    inside = tokens * 3 * (widest + hidden) * CACHE_ITEM_BYTES
    experts = tokens * (shape.top_k + 2) * hidden * 4 + inside
    around = 6 * tokens * hidden * 4
    sums = 4 * tokens * widest + PARTIAL_SUMS_BYTES
    return LIBRARY_BYTES + vocabulary * LOGIT_BYTES + around + max(attention, experts) + sums


def kv_token_bytes(shape: ModelShape) -> int:
    """Bytes of one token's keys and values in all layers; of latent attention, what both are
    made from."""
    rows = sum(
        dims[0]
        for name, dims in shape.tensors.items()
        if name.endswith((".k_proj.weight", ".v_proj.weight", ".kv_a_proj_with_mqa.weight"))
    )
    return rows * CACHE_ITEM_BYTES


def dense_bytes(shape: ModelShape | None, meta: TraceMeta, attention: str) -> int:
    """Bytes of all weights that are not experts, at a precision of attention."""
    if shape is None:
        return meta.n_layers * (meta.layer_bytes or 0) + (meta.token_bytes or 0)
    sizes = shape.dense(attention)
    found = shape.n_layers * sizes.layer_bytes + sizes.token_bytes
    if "lm_head.weight" in shape.tensors:
        found += math.prod(shape.tensors["model.embed_tokens.weight"]) * CACHE_ITEM_BYTES
    return found
