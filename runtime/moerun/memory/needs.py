"""What a run will hold in the device's memory, worked out before anything is loaded.

On a GPU that is everything torch allocates there; on the CPU what the run adds to the process, in
which the libraries have been loaded.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from typing import Any

import torch

from moerun.checkpoint.context import context_limit
from moerun.devices import format_bytes, peak_device_bytes, peak_host_bytes, resident_bytes
from moerun.errors import RunError
from moerun.format.bitplanes import Scheme
from moerun.format.expert import scheme_of
from moerun.format.tensorfile import bytes_of
from moerun.kernels.cpu_prompt import scratch_bytes
from moerun.kernels.slots import SlotForm
from moerun.memory.cache import ModelShape, shape_of
from moerun.memory.compiling import Compiling
from moerun.offload.attention import packed_attention_bytes
from moerun.store.expert_store import ExpertStore

MIB = 1 << 20
# What libraries take for themselves as they are first used, measured: on the CPU mostly code that
# is only loaded then and what malloc keeps, on a GPU the workspaces of its matrix library.
LIBRARIES_BYTES = {"cpu": 48 * MIB, "cuda": 96 * MIB}
# Of `moerun.kernels.gpu`: 64 rows of 64 tokens in float32, for four programs a multiprocessor.
PARTIAL_SUMS_BYTES = 16 * MIB
# What numba takes to load a policy's kept code (measured: 103 to 105 MiB, whichever the policy),
# and to compile it (171 to 215 MiB).
COMPILED_BYTES = {Compiling.NEVER: 0, Compiling.KEPT: 112 * MIB, Compiling.ALWAYS: 256 * MIB}
COMPILED_SHARE = 16  # compiled calls may cost slots of no more than this part of a budget
LOGIT_ROWS = 256  # turned into float32 at a time where many are scored
# Float32 copies of its keys and values that a layer with a recurrent state makes of a prompt, where
# it runs torch's own operations (measured with Qwen3-Next: 8.0 to 9.3).
STATE_COPIES = 10
DEFAULT_CONTEXT = 2048  # tokens planned for where neither the user nor a prompt says how many


@dataclass(frozen=True, slots=True)
class Needs:
    """What a run holds besides its expert slots, in bytes.

    aside_bytes      of what computes experts on the CPU, where that is the device
    host_tier_bytes  of the experts kept between disk and device, where the host is the device
    compiled_bytes   of numba and the policy's compiled code, where the host is the device
    """

    weights_bytes: int
    kv_cache_bytes: int
    workspace_bytes: int
    context_tokens: int
    aside_bytes: int = 0
    host_tier_bytes: int = 0
    compiled_bytes: int = 0

    @property
    def total_bytes(self) -> int:
        return sum(n_bytes for _, n_bytes, _ in self.rows())

    def rows(self) -> list[tuple[str, int, str]]:
        """What takes how many bytes, and why; what a run does not have is left out."""
        optional = [
            ("CPU experts", self.aside_bytes, "computed beside the others"),
            ("host memory", self.host_tier_bytes, "experts between disk and slots"),
            ("compiled", self.compiled_bytes, "numba and the policy's code"),
        ]
        return [
            ("weights", self.weights_bytes, "all but the experts"),
            ("KV cache", self.kv_cache_bytes, f"{self.context_tokens:,} tokens of context"),
            ("workspace", self.workspace_bytes, "activations, logits, libraries"),
            *(row for row in optional if row[1]),
        ]


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
    compiling: Compiling = Compiling.ALWAYS  # what may be done to have the policy's calls compiled

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
                f"{exact(self.least_bytes)} ({self._least()}); each slot in all "
                f"{self.n_layers} layers takes {format_bytes(self.n_layers * self.slot_bytes)} more"
            )
        slots = (budget_bytes - self.least_bytes) // (self.n_layers * self.slot_bytes)
        return replace(self, budget_bytes=budget_bytes, slots=min(slots, self.n_experts))

    def with_compiling(self, done: Compiling = Compiling.NEVER) -> MemoryPlan:
        """This plan, in a budget on the CPU, with what there is room for of compiled policy calls.

        They save some microseconds a layer, a slot saves copies: compiling gets what slots leave
        unused, code that is kept on disk may cost a small part of the budget. What is ``done``
        already is counted. Raises RunError where the budget is too small for that.
        """
        assert self.budget_bytes is not None
        assert self.needs.compiled_bytes == 0
        unused_bytes = self.budget_bytes - self.total_bytes
        for chosen in (Compiling.ALWAYS, Compiling.KEPT):
            n_bytes = COMPILED_BYTES[chosen]
            needs = replace(self.needs, compiled_bytes=n_bytes)
            plan = replace(self, needs=needs, compiling=chosen)
            small = chosen is Compiling.KEPT and n_bytes <= self.budget_bytes // COMPILED_SHARE
            fits = n_bytes <= unused_bytes or (small and plan.least_bytes <= self.budget_bytes)
            if fits or chosen is done:
                return plan.within(self.budget_bytes)
        return replace(self, compiling=Compiling.NEVER)

    def on_host_within(self, budget_bytes: int, done: Compiling) -> MemoryPlan:
        """As ``within``, of a run on the CPU for whose compiled calls so much is ``done``."""
        bare = replace(self, needs=replace(self.needs, compiled_bytes=0))
        bare = bare.within(budget_bytes)
        try:
            return bare.with_compiling(done)
        except RunError as error:
            raise RunError(
                f"{error}; the policy's code is loaded and stays: a run that begins with "
                "--memory does without it"
            ) from error

    def _least(self) -> str:
        """What the smallest budget would be spent on."""
        parts = [f"{name} {format_bytes(n_bytes)}" for name, n_bytes, _ in self.needs.rows()]
        buffers = f"{self.staging} staging buffer{'s' if self.staging > 1 else ''}"
        return ", ".join([*parts, f"{buffers} {format_bytes(self.staging * self.slot_bytes)}"])

    def rows(self) -> list[tuple[str, int, str]]:
        """What takes how many bytes, and why: for a table."""
        slots = f"{self.slots} of {self.n_experts} experts in each of {self.n_layers} layers"
        return [
            *self.needs.rows(),
            ("staging", self.staging * self.slot_bytes, f"{self.staging} experts in passing"),
            ("slots", self.slots * self.n_layers * self.slot_bytes, slots),
            ("total", self.total_bytes, "" if self.budget_bytes is None else self._unused()),
        ]

    def table(self) -> str:
        return "".join(
            f"{name:11} {format_bytes(n_bytes):>11}  {why}".rstrip() + "\n"
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


class Peak:
    """The most of a device's memory that a run has held since this was made, as a budget counts
    it: to be made when all is there that is not the run's own."""

    def __init__(self, store: ExpertStore, device: torch.device) -> None:
        """Imports the code of the store's model first, which is not the run's."""
        from transformers import MODEL_FOR_CAUSAL_LM_MAPPING

        MODEL_FOR_CAUSAL_LM_MAPPING[type(store.config())]  # imports the class
        self._device = device
        self._baseline_bytes = resident_bytes()
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)

    @property
    def n_bytes(self) -> int:
        on_device = peak_device_bytes(self._device)
        if on_device is not None:
            return on_device
        return max(peak_host_bytes() - self._baseline_bytes, 0)


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
