"""How fast a machine copies an expert, against how fast it computes: a constant for policies."""

from __future__ import annotations

import math

from moepolicy import Context

from moesim.machine.costs import Sizes
from moesim.machine.profile import Machine


def copy_ns(machine: Machine, expert_bytes: int) -> int:
    """One expert's copy from host memory, alone on the link: its latency and all of its pieces."""
    piece = machine.link.chunk_bytes or expert_bytes
    whole, rest = divmod(expert_bytes, piece)
    found = machine.latency_ns + whole * machine.copy_ns(piece)
    return found + machine.copy_ns(rest) if rest else found


def layer_ns(machine: Machine, sizes: Sizes, top_k: int) -> int | None:
    """One layer's compute for a decoded token: all up to the gate's choice, without speculative
    gates, and ``top_k`` experts one after the other.

    None where the bytes of a layer's dense weights are unknown and the machine's rates apply to
    them.
    """
    if "layer" in sizes.uncharged(machine):
        return None
    gate_ns = machine.layer_ns(1, sizes.layer_bytes or 0)
    return gate_ns + top_k * machine.expert_ns(1, sizes.expert_bytes, sizes.expert_params)


def copy_over_layer(machine: Machine, sizes: Sizes, top_k: int) -> float:
    """`copy_ns` of the full precision over `layer_ns`: `moepolicy.Context.copy_over_layer`.

    Infinite where compute takes no time, NaN where nobody knows what it takes.
    """
    computed_ns = layer_ns(machine, sizes, top_k)
    if computed_ns is None:
        return math.nan
    return copy_ns(machine, sizes.expert_bytes) / computed_ns if computed_ns else math.inf


def gates_over_layer(machine: Machine, sizes: Sizes, top_k: int) -> float:
    """`Machine.gates_ns` over `layer_ns`: `moepolicy.Context.gates_over_layer`.

    NaN where nobody knows what a layer takes, or compute takes no time.
    """
    computed_ns = layer_ns(machine, sizes, top_k)
    return machine.gates_ns / computed_ns if computed_ns else math.nan


def with_constants(context: Context, machine: Machine, sizes: Sizes | None) -> Context:
    """``context`` with what policies may know of machine and experts; None: of unknown size."""
    if sizes is None:
        return context
    return context._replace(
        copy_over_layer=copy_over_layer(machine, sizes, context.top_k),
        expert_bytes=sizes.expert_bytes,
        low_bytes=sizes.low_bytes or None,
        gates_over_layer=gates_over_layer(machine, sizes, context.top_k),
    )
