"""Sizes that a simulation counts with: given, of a precision, or the trace's own."""

from __future__ import annotations

from collections.abc import Iterable

from moeroute.schema import TraceMeta

from moesim.errors import SimulationError, UsageError
from moesim.machine.costs import Sizes

WEIGHT_BITS = {"fp32": 32, "fp16": 16, "bf16": 16}


def expert_size(meta: TraceMeta, *, precision: str | None, expert_bytes: int | None) -> int | None:
    """Bytes of one expert: given, of a named precision, or of the trace's own; None: unknown."""
    if expert_bytes is not None:
        if expert_bytes <= 0:
            raise UsageError.of("expert_bytes", f"must be above 0, not {expert_bytes}")
        return expert_bytes
    if precision is None:
        return next(iter(meta.expert_bytes.values()), None)
    if precision not in meta.expert_bytes:
        known = f"it has {', '.join(meta.expert_bytes)}" if meta.expert_bytes else "it has none"
        raise SimulationError(
            f"the trace has no size for precision '{precision}'; {known}; or give --like or "
            "--expert-bytes"
        )
    return meta.expert_bytes[precision]


def low_expert_size(
    meta: TraceMeta, full_bytes: int | None, *, precision: str | None, expert_bytes: int | None
) -> int:
    """Bytes of one expert in the lower-precision store; 0 where there is none."""
    if precision is None and expert_bytes is None:
        return 0
    low_bytes = expert_size(meta, precision=precision, expert_bytes=expert_bytes)
    if low_bytes is None or full_bytes is None:
        raise SimulationError(f"a lower precision needs the size at the full precision: {_HOW_BIG}")
    if low_bytes >= full_bytes:
        raise SimulationError(
            f"an expert takes {low_bytes:,} bytes at the lower precision, no fewer than the "
            f"{full_bytes:,} at the full precision: choose a lower precision"
        )
    return low_bytes


_HOW_BIG = "nothing says how big an expert is; give --like or --expert-bytes"


def sizes_of(meta: TraceMeta, expert_bytes: int, low_bytes: int = 0) -> Sizes:
    """The byte and parameter counts the machine's rates apply to.

    Where nothing tells the parameters of an expert, it is taken to have 16 bits for each.
    """
    params = meta.expert_params
    for precision, bits in WEIGHT_BITS.items():
        if params is None and precision in meta.expert_bytes:
            params = meta.expert_bytes[precision] * 8 // bits
    if params is None:
        params = expert_bytes // 2
    return Sizes(expert_bytes, params, meta.layer_bytes, meta.token_bytes, low_bytes)


def spare_slots(slots: Iterable[int], meta: TraceMeta) -> list[str]:
    """A note on the numbers of slots that are more than a layer has experts; empty without any."""
    more = sorted({n for n in slots if n > meta.n_experts})
    if not more:
        return []
    return [
        f"--slots {', '.join(map(str, more))}: a layer of {meta.model} has {meta.n_experts} "
        "experts, so that the cache holds all of them and has slots to spare"
    ]


def quarters(n_experts: int) -> list[int]:
    """A quarter, half and three quarters of a layer's experts: the default cache sizes, in slots
    a layer."""
    return sorted({max(1, n_experts * quarter // 4) for quarter in (1, 2, 3)})
