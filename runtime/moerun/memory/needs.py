"""The bytes that a run will hold in the device's memory, computed before anything is loaded.

On a GPU the bytes are all that torch allocates there. On the CPU they are all that the run adds to
the process, in which the libraries have been loaded.
"""

from __future__ import annotations

import math
from typing import Any

import torch

from moerun.checkpoint.context import context_limit
from moerun.checkpoint.families import layer_configs
from moerun.format.precision import BlockScheme, Scheme, scheme_of
from moerun.format.tensorfile import bytes_of
from moerun.kernels.coded import DECODING_BYTES
from moerun.kernels.coded import scratch_bytes as coded_scratch_bytes
from moerun.kernels.cpu_prompt import scratch_bytes
from moerun.kernels.slots import SlotForm
from moerun.memory.cache import ModelShape, shape_of
from moerun.memory.libraries import KEPT_OPERATIONS
from moerun.memory.plan import MIB, Needs
from moerun.offload.attention import packed_attention_bytes
from moerun.store.expert_store import ExpertStore

# What libraries take for themselves as they are first used, measured: on the CPU mostly code that
# is only loaded then and what malloc keeps, on a GPU the workspaces of its matrix library.
LIBRARIES_BYTES = {"cpu": 48 * MIB, "cuda": 96 * MIB}
# Of `moerun.kernels.gpu`: 64 rows of 64 tokens in float32, for four programs a multiprocessor.
PARTIAL_SUMS_BYTES = 16 * MIB
# numba and the kernels that dequantise, compiled (measured: 121 MiB) or kept on disk (102 MiB).
KERNELS_BYTES = 128 * MIB
# Operations of oneDNN that one more thread keeps, where weights are of fewer bits than float32.
OPERATIONS_BYTES = KEPT_OPERATIONS * MIB
LOGIT_ROWS = 256  # turned into float32 at a time where many are scored
PackedMatrix = tuple[int, int, Scheme | BlockScheme]
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
    computes_on_cpu: bool = False,
    host_tier_bytes: int = 0,
    logit_tokens: int = 1,
    texts: int = 1,
    marks: bool = False,
) -> Needs:
    """What serving ``store`` takes in addition to the slots. Reads no weights.

    prompt_tokens    longest prompt; None: the whole context, less one token
    copies           that may be under way at once
    computes_on_cpu  some experts are computed on the CPU
    logit_tokens     whose logits one pass gives
    texts            that may be decoded together, each as long as the context
    marks            of each text, what cannot be cut is copied where its prompt's chunks end
    """
    whole_config = store.config()
    config = whole_config.get_text_config()
    limit = context_limit(whole_config)
    context = min(context_tokens or DEFAULT_CONTEXT, limit or (1 << 30))
    batch = max(1, min(prompt_tokens or context - 1, context))
    dense = store.dense_tensors()
    dtype = store.dense_dtype()
    itemsize = dtype.itemsize
    model = shape_of(whole_config, dtype)
    weights = sum(bytes_of(dtype, shape) for dtype, shape in dense.values())
    on_host = device.type == "cpu"
    scores = _holds_scores(config, model, device)
    cpu_expert_bytes = 0
    if computes_on_cpu and on_host:
        cpu_expert_bytes = _cpu_expert_bytes(config, model, store, batch, itemsize)
    quantised = max(_quantised_bytes(each, device, copies, batch) for each in (store, low) if each)
    return Needs(
        weights_bytes=weights + packed_attention_bytes(store, device),
        kv_cache_bytes=texts
        * (model.cache_bytes(context) + (model.marked_bytes(context) if marks else 0)),
        workspace_bytes=_activation_bytes(
            config, model, store, batch, context, itemsize, horizon, scores
        )
        + (texts - 1) * _text_bytes(config, context, itemsize, scores)
        + _logit_bytes(config, logit_tokens, itemsize)
        + quantised
        + LIBRARIES_BYTES[device.type],
        context_tokens=context,
        texts=texts,
        cpu_expert_bytes=cpu_expert_bytes,
        host_tier_bytes=host_tier_bytes if on_host else 0,
    )


def _attended_widths(config: Any) -> tuple[int, int]:
    """Heads, and the numbers of a head's key and value as they are multiplied: of the widest layer.
    Gemma's layers differ."""
    widths = [(heads, key + value) for heads, key, value in map(_widths_of, layer_configs(config))]
    return max(widths, key=math.prod)


def _widths_of(config: Any) -> tuple[int, int, int]:
    """A layer's heads, and the numbers of a head's key and of its value: DeepSeek's two differ."""
    heads = config.num_attention_heads
    if getattr(config, "qk_nope_head_dim", None):
        return heads, config.qk_nope_head_dim + config.qk_rope_head_dim, config.v_head_dim
    width = getattr(config, "head_dim", None) or config.hidden_size // heads
    return heads, width, getattr(config, "v_head_dim", None) or width


def _holds_scores(config: Any, model: ModelShape, device: torch.device) -> bool:
    """Whether attention holds its scores whole: torch's kernel for the CPU does not where keys and
    values are of the same width."""
    differ = any(key != value for _, key, value in map(_widths_of, layer_configs(config)))
    return model.holds_scores or (differ and device.type == "cpu")


def _activation_bytes(
    config: Any,
    model: ModelShape,
    store: ExpertStore,
    batch: int,
    context: int,
    itemsize: int,
    horizon: int,
    holds_scores: bool,
) -> int:
    """The most that one forward pass holds at once in addition to weights and cache: a layer's
    attention or experts, and the hidden states around them."""
    hidden = config.hidden_size
    wide = max(itemsize, 4)  # norms and sums of experts are computed in float32
    heads, widths = _attended_widths(config)
    # Queries, keys and values, rotated; keys and values of the context, repeated for each head.
    projected = 3 * batch * heads * widths * itemsize
    repeated = context * heads * widths * itemsize
    scores = batch * context * (1 + wide)  # the mask, as bits and as what is added
    if holds_scores:
        scores += 3 * heads * batch * context * wide
    sparse = model.indexing.n_bytes(batch, context)
    linear = model.linear.n_bytes(batch, context)
    attention = max(projected + repeated + scores + sparse, linear)
    inside = _inside_bytes(config, model, store, batch, itemsize)
    experts = batch * (store.index.top_k + 2) * hidden * wide + inside
    gates = batch * store.n_experts * 4 * (3 + 2 * horizon)
    around = 6 * batch * hidden * wide * (getattr(config, "hc_mult", None) or 1)
    return int(around + max(attention, experts) + gates)


def _text_bytes(config: Any, context: int, itemsize: int, holds_scores: bool) -> int:
    """What a pass over a token of each of several texts holds for one more of them: the keys and
    values of its context, repeated for each head, their scores, and its logits."""
    heads, widths = _attended_widths(config)
    repeated = context * heads * widths * itemsize
    scores = context * 8 * (3 * heads if holds_scores else 1)
    return int(repeated + scores + 64 * int(config.vocab_size))


def _logit_bytes(config: Any, tokens: int, itemsize: int) -> int:
    """Bytes of computed logits and of what is computed from them. In sampling, the last token's are
    sorted with their places and summed in float32; in scoring, some at a time are cast to
    float32."""
    becomes = 64 if tokens == 1 else 4 * min(tokens, LOGIT_ROWS) * 3
    return int(config.vocab_size) * (becomes + (tokens + 1) * itemsize * (tokens > 1))


def _inside_bytes(
    config: Any, model: ModelShape, store: ExpertStore, batch: int, itemsize: int
) -> int:
    """What one expert, or the layer's shared expert, holds between its matrices."""
    sides = (param.rows_columns for param in store.index.shape.params if param.is_matrix)
    widest = max(model.widest, *(rows for rows, _ in sides))
    return batch * (3 * widest + 3 * int(config.hidden_size)) * itemsize


def _cpu_expert_bytes(
    config: Any, model: ModelShape, store: ExpertStore, batch: int, itemsize: int
) -> int:
    """Bytes for computing experts on the CPU: the slot, its buffer, what the slot's contents are
    derived with, activations, and operations of oneDNN. Inputs wait for the thread, which computes
    one expert at a time."""
    form = SlotForm(store.index.shape, store.index.precision, torch.device("cpu"))
    shape, precision = store.index.shape, store.index.precision
    quantised = scheme_of(precision) is not None or bool(shape.blocks(precision))
    buffers = 3 * form.record_bytes if quantised else 0
    inputs = batch * store.index.top_k * int(config.hidden_size) * itemsize
    inside = _inside_bytes(config, model, store, batch, itemsize)
    operations = OPERATIONS_BYTES if itemsize < 4 else 0
    return form.slot_bytes + buffers + inputs + inside + operations


def _quantised_bytes(store: ExpertStore, device: torch.device, copies: int, batch: int) -> int:
    """What quantised weights need in addition to their own memory, at most. On the CPU: what the
    kernels read is derived from an expert's record, and a prompt's tokens need blocks of a matrix,
    both in the main thread and in the thread that computes experts on the CPU. On a GPU: the sums
    of each of the programs that share a row."""
    coded = _coded_bytes(store, device)
    matrices = _quantised_matrices(store)
    if not matrices:
        return coded
    if device.type == "cpu":
        arriving = isinstance(scheme_of(store.index.precision), Scheme)
        records = 3 * copies * store.record_bytes if arriving else 0
        return coded + records + _cpu_scratch_bytes(matrices, batch)
    return coded + 4 * batch * max(rows for rows, _, _ in matrices) + PARTIAL_SUMS_BYTES


def _cpu_scratch_bytes(matrices: list[PackedMatrix], batch: int) -> int:
    """What multiplying by quantised matrices on the CPU holds at most, twice."""
    by_torch = [scratch_bytes(rows, cols, s) for rows, cols, s in matrices if isinstance(s, Scheme)]
    # Activations in float32 and rounded, and results in float32.
    by_blocks = [
        batch * (6 * cols + 6 * rows)
        for rows, cols, scheme in matrices
        if isinstance(scheme, BlockScheme)
    ]
    most = 2 * max(by_torch + by_blocks)
    return most + KERNELS_BYTES if by_blocks else most


def _coded_bytes(store: ExpertStore, device: torch.device) -> int:
    """What experts kept in the bits of their publication are dequantised in: on the CPU by the
    main thread and by the thread that computes experts there."""
    if not store.index.shape.is_decoded(store.index.precision):
        return 0
    one = coded_scratch_bytes(store.index.shape)
    return 2 * one + KERNELS_BYTES if device.type == "cpu" else one + DECODING_BYTES


def _quantised_matrices(store: ExpertStore) -> list[PackedMatrix]:
    """Rows, columns and scheme of an expert's matrices and of attention's, as far as quantised."""
    index = store.index
    found: list[PackedMatrix] = []
    scheme = scheme_of(index.precision)
    for kind in index.shape.kinds:
        matrices = [param.rows_columns for param in kind.params if param.is_matrix]
        schemes = (scheme,) * len(matrices) if scheme else kind.blocks(index.precision)
        found += [(*sizes, each) for sizes, each in zip(matrices, schemes, strict=False)]
    if index.attention:
        of_all = scheme_of(index.attention.precision)
        for each in index.attention.linears:
            if scheme := of_all or each.coding:
                found.append((each.rows, each.columns, scheme))
    return found
