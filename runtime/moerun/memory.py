"""What a run will hold in the device's memory, worked out before anything is loaded.

On a GPU that is everything torch allocates there; on the CPU what the run adds to the process, in
which the libraries have been loaded.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from typing import Any

import torch

from moerun.attention import packed_attention_bytes
from moerun.devices import format_bytes, resident_bytes
from moerun.errors import RunError
from moerun.families import read_config
from moerun.shape import scheme_of
from moerun.store import ExpertStore
from moerun.tensorfile import TensorFile

MIB = 1 << 20
# What libraries take for themselves as they are first used, measured: on the CPU mostly code that
# is only loaded then and what malloc keeps, on a GPU the workspaces of its matrix library.
LIBRARIES_BYTES = {"cpu": 48 * MIB, "cuda": 96 * MIB}
# Of `moerun.fused`: 64 rows of 64 tokens in float32, for four programs a multiprocessor.
PARTIAL_SUMS_BYTES = 16 * MIB
DEFAULT_CONTEXT = 2048  # tokens planned for where neither the user nor a prompt says how many


@dataclass(frozen=True, slots=True)
class Needs:
    """What a run holds besides its expert slots, in bytes."""

    weights_bytes: int
    kv_cache_bytes: int
    workspace_bytes: int
    context_tokens: int

    @property
    def total_bytes(self) -> int:
        return self.weights_bytes + self.kv_cache_bytes + self.workspace_bytes


@dataclass(frozen=True, slots=True)
class MemoryPlan:
    """How a budget is spent. ``slots`` is per layer; without a budget they were asked for."""

    needs: Needs
    budget_bytes: int | None
    slots: int
    n_layers: int
    n_experts: int
    staging: int
    slot_bytes: int

    @property
    def slots_bytes(self) -> int:
        return (self.slots * self.n_layers + self.staging) * self.slot_bytes

    @property
    def total_bytes(self) -> int:
        return self.needs.total_bytes + self.slots_bytes

    @property
    def least_bytes(self) -> int:
        """The smallest budget that works: no slots, every expert through staging."""
        return self.needs.total_bytes + self.staging * self.slot_bytes

    def within(self, budget_bytes: int) -> MemoryPlan:
        """The same run in another budget; RunError where that is too small for any."""
        if budget_bytes < self.least_bytes:
            raise RunError(
                f"{format_bytes(budget_bytes)} of memory is too little: the least that works is "
                f"{exact(self.least_bytes)} (weights besides the experts "
                f"{format_bytes(self.needs.weights_bytes)}, cache of {self.needs.context_tokens:,} "
                f"tokens {format_bytes(self.needs.kv_cache_bytes)}, workspace "
                f"{format_bytes(self.needs.workspace_bytes)}, {self.staging} staging "
                f"buffer{'s' if self.staging > 1 else ''} "
                f"{format_bytes(self.staging * self.slot_bytes)}); each slot in all "
                f"{self.n_layers} layers takes {format_bytes(self.n_layers * self.slot_bytes)} more"
            )
        slots = (budget_bytes - self.least_bytes) // (self.n_layers * self.slot_bytes)
        return replace(self, budget_bytes=budget_bytes, slots=min(slots, self.n_experts))

    def rows(self) -> list[tuple[str, int, str]]:
        """What takes how many bytes, and why: for a table."""
        needs = self.needs
        slots = f"{self.slots} of {self.n_experts} experts in each of {self.n_layers} layers"
        return [
            ("weights", needs.weights_bytes, "all but the experts"),
            ("KV cache", needs.kv_cache_bytes, f"{needs.context_tokens:,} tokens of context"),
            ("workspace", needs.workspace_bytes, "activations, logits, libraries"),
            ("staging", self.staging * self.slot_bytes, f"{self.staging} experts in passing"),
            ("slots", self.slots * self.n_layers * self.slot_bytes, slots),
            ("total", self.total_bytes, "" if self.budget_bytes is None else self._unused()),
        ]

    def table(self) -> str:
        return "".join(
            f"{name:10} {format_bytes(n_bytes):>11}  {why}".rstrip() + "\n"
            for name, n_bytes, why in self.rows()
        )

    def to_json(self) -> dict[str, Any]:
        """Sizes in bytes under the names of the plan's parts."""
        return {
            **asdict(self.needs),
            "staging_bytes": self.staging * self.slot_bytes,
            "slots_bytes": self.slots * self.n_layers * self.slot_bytes,
            "total_bytes": self.total_bytes,
            "budget_bytes": self.budget_bytes,
            "least_bytes": self.least_bytes,
            "slots": self.slots,
        }

    def _unused(self) -> str:
        assert self.budget_bytes is not None
        left = format_bytes(max(self.budget_bytes - self.total_bytes, 0))
        return f"of {format_bytes(self.budget_bytes)}; {left} unused"


def exact(n_bytes: int) -> str:
    """An amount that can be given back as an option's value: rounded up to a MiB."""
    return f"{-(-n_bytes // MIB)}MiB"


def needs_of(
    store: ExpertStore,
    device: torch.device,
    *,
    context_tokens: int | None,
    prompt_tokens: int | None,
    horizon: int,
    streams: int,
) -> Needs:
    """What serving ``store`` takes besides slots. Reads no weights.

    A prompt may be as long as ``prompt_tokens`` (None: the whole context, less one token).
    """
    config = read_config(store.path).get_text_config()
    limit = getattr(config, "max_position_embeddings", None)
    context = min(context_tokens or DEFAULT_CONTEXT, limit or (1 << 30))
    batch = max(1, min(prompt_tokens or context - 1, context))
    with TensorFile(store.dense_path) as file:
        weights = sum(entry.nbytes for entry in file.entries.values())
        itemsize = max(
            (e.dtype.itemsize for e in file.entries.values() if len(e.shape) > 1), default=4
        )
    return Needs(
        weights_bytes=weights + packed_attention_bytes(store, device),
        kv_cache_bytes=kv_cache_bytes(config, context, itemsize),
        workspace_bytes=_activation_bytes(config, store, batch, context, itemsize, horizon)
        + _quantised_bytes(store, device, streams, batch)
        + LIBRARIES_BYTES[device.type],
        context_tokens=context,
    )


def baseline_bytes(store: ExpertStore) -> int:
    """What the process has in memory before it loads the model, whose code it has loaded."""
    from transformers import MODEL_FOR_CAUSAL_LM_MAPPING

    MODEL_FOR_CAUSAL_LM_MAPPING[type(read_config(store.path))]  # imports the class
    return resident_bytes()


def kv_cache_bytes(config: Any, context_tokens: int, itemsize: int) -> int:
    """Keys and values of ``context_tokens`` tokens, and one layer's again: it grows by copying.

    Layers with a sliding window keep no more than that.
    """
    width = _cached_width(config) * itemsize
    window = getattr(config, "sliding_window", None) or context_tokens
    kinds = getattr(config, "layer_types", None) or ["full_attention"] * config.num_hidden_layers
    kept = [
        min(context_tokens, window) if kind == "sliding_attention" else context_tokens
        for kind in kinds
    ]
    return (sum(kept) + max(kept)) * width


def _cached_width(config: Any) -> int:
    """Numbers that a layer caches a token; DeepSeek's cache holds what all heads share."""
    if latent := getattr(config, "kv_lora_rank", None):
        return int(latent) + int(config.qk_rope_head_dim)
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    return int(heads) * sum(_head_widths(config))


def _head_widths(config: Any) -> tuple[int, int]:
    """Of a key and a value as they are multiplied; DeepSeek's differ."""
    if getattr(config, "qk_nope_head_dim", None):
        return config.qk_nope_head_dim + config.qk_rope_head_dim, config.v_head_dim
    width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return width, width


def _activation_bytes(
    config: Any, store: ExpertStore, batch: int, context: int, itemsize: int, horizon: int
) -> int:
    """The most that one forward pass holds at once besides weights and cache: a layer's attention
    or its experts, the hidden states around them, and what becomes of the last token's logits."""
    hidden, heads = config.hidden_size, config.num_attention_heads
    wide = max(itemsize, 4)  # norms and sums of experts are computed in float32
    key, value = _head_widths(config)
    # Queries, keys and values, rotated; keys and values of the context, repeated for each head.
    projected = 3 * batch * heads * (key + value) * itemsize
    repeated = context * heads * (key + value) * itemsize
    scores = batch * context * (1 + wide)  # the mask, as bits and as what is added
    if _attends_eagerly(config):
        scores += 3 * heads * batch * context * wide
    attention = projected + repeated + scores
    shape = store.index.shape
    matrix = max(param.rows_columns[0] for param in shape.params if param.is_matrix)
    shared = getattr(config, "intermediate_size", 0) or 0
    inside = 3 * max(matrix, shared) + 3 * hidden
    experts = batch * (store.index.top_k + 2) * hidden * wide + batch * inside * itemsize
    gates = batch * store.n_experts * 4 * (3 + 2 * horizon)
    around = 6 * batch * hidden * wide
    logits = 64 * config.vocab_size  # float32, sorted with their places, summed: sampling
    return int(around + max(attention, experts) + gates + logits)


def _quantised_bytes(store: ExpertStore, device: torch.device, streams: int, batch: int) -> int:
    """What quantised weights need beside their own memory: on the CPU to derive what its kernels
    read from an expert's record, on a GPU what the programs that share a row have each summed."""
    index = store.index
    quantised = scheme_of(index.precision) is not None
    if device.type == "cpu":
        return 3 * streams * store.record_bytes if quantised else 0
    rows = [linear.rows for linear in index.attention.linears] if index.attention else []
    if quantised:
        rows += [param.rows_columns[0] for param in index.shape.params if param.is_matrix]
    return 4 * batch * max(rows) + PARTIAL_SUMS_BYTES if rows else 0


def _attends_eagerly(config: Any) -> bool:
    """Whether scores are held whole: where attention has sinks, which torch's kernels have not."""
    return bool(config.model_type == "gpt_oss")
