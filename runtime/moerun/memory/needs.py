"""What a run will hold in the device's memory, worked out before anything is loaded.

On a GPU that is everything torch allocates there; on the CPU what the run adds to the process, in
which the libraries have been loaded.
"""

from __future__ import annotations

from typing import Any

import torch

from moerun.checkpoint.context import context_limit
from moerun.format.precision import Scheme, scheme_of
from moerun.format.tensorfile import bytes_of
from moerun.kernels.cpu_prompt import scratch_bytes
from moerun.kernels.slots import SlotForm
from moerun.memory.cache import ModelShape, shape_of
from moerun.memory.plan import MIB, Needs
from moerun.offload.attention import packed_attention_bytes
from moerun.store.expert_store import ExpertStore

# What libraries take for themselves as they are first used, measured: on the CPU mostly code that
# is only loaded then and what malloc keeps, on a GPU the workspaces of its matrix library.
LIBRARIES_BYTES = {"cpu": 48 * MIB, "cuda": 96 * MIB}
# Of `moerun.kernels.gpu`: 64 rows of 64 tokens in float32, for four programs a multiprocessor.
PARTIAL_SUMS_BYTES = 16 * MIB
LOGIT_ROWS = 256  # turned into float32 at a time where many are scored
# Float32 copies of its keys and values that a layer with a recurrent state makes of a prompt, where
# it runs torch's own operations (measured with Qwen3-Next: 8.0 to 9.3).
STATE_COPIES = 10
DEFAULT_CONTEXT = 2048  # tokens planned for where neither the user nor a prompt says how many


def needs_of(
    store: ExpertStore,
    device: torch.device,
    *,
    context_tokens: int | None,
    prompt_tokens: int | None,
    horizon: int,
    copies: int,
    low: ExpertStore | None = None,
    aside: bool = False,
    host_tier_bytes: int = 0,
    logit_tokens: int = 1,
) -> Needs:
    """What serving ``store`` takes besides slots. Reads no weights.

    A prompt may be as long as ``prompt_tokens`` (None: the whole context, less one token);
    ``copies`` may be under way at once; ``aside``: some experts are computed on the CPU; a pass
    gives the logits of ``logit_tokens``.
    """
    whole_config = store.config()
    config = whole_config.get_text_config()
    limit = context_limit(whole_config)
    context = min(context_tokens or DEFAULT_CONTEXT, limit or (1 << 30))
    batch = max(1, min(prompt_tokens or context - 1, context))
    dense = store.dense_tensors()
    matrices = [dtype for dtype, shape in dense.values() if len(shape) > 1]
    dtype = max(matrices, key=lambda dtype: dtype.itemsize, default=torch.float32)
    itemsize = dtype.itemsize
    model = shape_of(whole_config, dtype)
    weights = sum(bytes_of(dtype, shape) for dtype, shape in dense.values())
    on_host = device.type == "cpu"
    quantised = max(_quantised_bytes(each, device, copies, batch) for each in (store, low) if each)
    return Needs(
        weights_bytes=weights + packed_attention_bytes(store, device),
        kv_cache_bytes=model.cache_bytes(context),
        workspace_bytes=_activation_bytes(config, model, store, batch, context, itemsize, horizon)
        + _logit_bytes(config, logit_tokens, itemsize)
        + quantised
        + LIBRARIES_BYTES[device.type],
        context_tokens=context,
        aside_bytes=_aside_bytes(config, model, store, batch, itemsize) if aside and on_host else 0,
        host_tier_bytes=host_tier_bytes if on_host else 0,
    )


def _head_widths(config: Any) -> tuple[int, int]:
    """Of a key and a value as they are multiplied; DeepSeek's differ."""
    if getattr(config, "qk_nope_head_dim", None):
        return config.qk_nope_head_dim + config.qk_rope_head_dim, config.v_head_dim
    width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return width, width


def _activation_bytes(
    config: Any,
    model: ModelShape,
    store: ExpertStore,
    batch: int,
    context: int,
    itemsize: int,
    horizon: int,
) -> int:
    """The most that one forward pass holds at once besides weights and cache: a layer's attention
    or its experts, and the hidden states around them."""
    hidden, heads = config.hidden_size, config.num_attention_heads
    wide = max(itemsize, 4)  # norms and sums of experts are computed in float32
    key, value = _head_widths(config)
    # Queries, keys and values, rotated; keys and values of the context, repeated for each head.
    projected = 3 * batch * heads * (key + value) * itemsize
    repeated = context * heads * (key + value) * itemsize
    scores = batch * context * (1 + wide)  # the mask, as bits and as what is added
    if model.holds_scores:
        scores += 3 * heads * batch * context * wide
    recurrent = STATE_COPIES * batch * model.state_width * 4
    attention = max(projected + repeated + scores, recurrent)
    inside = _inside_bytes(config, model, store, batch, itemsize)
    experts = batch * (store.index.top_k + 2) * hidden * wide + inside
    gates = batch * store.n_experts * 4 * (3 + 2 * horizon)
    around = 6 * batch * hidden * wide
    return int(around + max(attention, experts) + gates)


def _logit_bytes(config: Any, tokens: int, itemsize: int) -> int:
    """Logits as they are computed, and what becomes of them: the last token's are sorted with their
    places and summed in float32 (sampling), or some at a time are turned into float32 (scoring)."""
    becomes = 64 if tokens == 1 else 4 * min(tokens, LOGIT_ROWS) * 3
    return int(config.vocab_size) * (becomes + (tokens + 1) * itemsize * (tokens > 1))


def _inside_bytes(
    config: Any, model: ModelShape, store: ExpertStore, batch: int, itemsize: int
) -> int:
    """What one expert holds between its matrices, or the layer's shared one."""
    sides = (param.rows_columns for param in store.index.shape.params if param.is_matrix)
    widest = max(model.widest, *(rows for rows, _ in sides))
    return batch * (3 * widest + 3 * int(config.hidden_size)) * itemsize


def _aside_bytes(
    config: Any, model: ModelShape, store: ExpertStore, batch: int, itemsize: int
) -> int:
    """The slot of what computes beside the device, its buffer and what it derives the slot with,
    and its own activations: its inputs wait for it, and it computes one expert at a time."""
    form = SlotForm(store.index.shape, store.index.precision, torch.device("cpu"))
    quantised = scheme_of(store.index.precision) is not None
    buffers = 3 * form.record_bytes if quantised else 0
    inputs = batch * store.index.top_k * int(config.hidden_size) * itemsize
    return form.slot_bytes + buffers + inputs + _inside_bytes(config, model, store, batch, itemsize)


def _quantised_bytes(store: ExpertStore, device: torch.device, copies: int, batch: int) -> int:
    """What quantised weights need beside their own memory, at most. On the CPU that is to derive
    what its kernels read from an expert's record, and blocks of a matrix for a prompt's tokens, in
    the main thread and in one that computes beside; on a GPU it is what the programs that share a
    row have each summed."""
    matrices = _quantised_matrices(store)
    if not matrices:
        return 0
    if device.type == "cpu":
        arriving = scheme_of(store.index.precision) is not None
        records = 3 * copies * store.record_bytes if arriving else 0
        return records + 2 * max(scratch_bytes(*matrix) for matrix in matrices)
    return 4 * batch * max(rows for rows, _, _ in matrices) + PARTIAL_SUMS_BYTES


def _quantised_matrices(store: ExpertStore) -> list[tuple[int, int, Scheme]]:
    """Rows, columns and scheme of an expert's matrices and of attention's, as far as quantised."""
    index = store.index
    found: list[tuple[int, int, Scheme]] = []
    if scheme := scheme_of(index.precision):
        params = [param for param in index.shape.params if param.is_matrix]
        found += [(*param.rows_columns, scheme) for param in params]
    if index.attention and (scheme := scheme_of(index.attention.precision)):
        found += [(each.rows, each.columns, scheme) for each in index.attention.linears]
    return found
