"""What each thing a simulated machine does takes, in whole nanoseconds, for one workload."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from moesim.errors import SimulationError
from moesim.profile import Machine
from moesim.workload import Workload


@dataclass(frozen=True)
class Sizes:
    """Bytes and parameters that the machine's rates apply to."""

    expert_bytes: int
    expert_params: int
    layer_bytes: int
    token_bytes: int


class Costs(NamedTuple):
    """Durations for every engine; a named tuple of arrays and integers, as compiled code takes it.

    An expert crosses the link in ``n_pieces`` pieces, of which the last may be shorter. A copy
    that returns its victim first (``write_back``) has twice as many.
    """

    layer_ns: NDArray[np.int64]  # [steps] up to the gate's choice, the pass's share included
    expert_ns: NDArray[np.int64]  # [demanded keys] on the compute stream
    cpu_ns: NDArray[np.int64]  # [demanded keys] on a CPU worker
    latency_ns: int
    piece_ns: int
    last_piece_ns: int
    n_pieces: int
    chunked: bool
    streams: int
    write_back: bool
    read_ns: int  # an expert from disk to host memory; 0: no disk
    host_experts: int
    cpu_workers: int


def costs_of(workload: Workload, machine: Machine, sizes: Sizes, *, predicting: bool) -> Costs:
    """The durations of ``workload`` on ``machine``. SimulationError where they make no sense."""
    chunk = machine.link.chunk_bytes
    if chunk > sizes.expert_bytes:
        raise SimulationError(
            f"machine '{machine.name}': chunk_bytes is {chunk:,}, more than an expert's "
            f"{sizes.expert_bytes:,}; leave it out to copy experts whole"
        )
    n_pieces = -(-sizes.expert_bytes // chunk) if chunk else 1
    last = sizes.expert_bytes - (n_pieces - 1) * chunk
    per_token = np.unique(workload.routed, return_inverse=True)
    return Costs(
        layer_ns=_layer_times(workload, machine, sizes, predicting=predicting),
        expert_ns=_spread(
            per_token,
            [machine.expert_ns(n, sizes.expert_bytes, sizes.expert_params) for n in per_token[0]],
        ),
        cpu_ns=_spread(
            per_token,
            [
                machine.cpu_expert_ns(n, sizes.expert_bytes, sizes.expert_params)
                for n in per_token[0]
            ],
        ),
        latency_ns=machine.latency_ns,
        piece_ns=machine.copy_ns(chunk or sizes.expert_bytes),
        last_piece_ns=machine.copy_ns(last),
        n_pieces=n_pieces,
        chunked=bool(chunk),
        streams=machine.link.streams,
        write_back=machine.link.write_back,
        read_ns=machine.read_ns(sizes.expert_bytes),
        host_experts=machine.host_experts(sizes.expert_bytes),
        cpu_workers=machine.cpu.workers if machine.cpu else 0,
    )


def _spread(
    distinct: tuple[NDArray[np.int32], NDArray[np.int64]], values: list[int]
) -> NDArray[np.int64]:
    """``values`` of the distinct counts, put where the counts are."""
    return np.array(values, np.int64)[distinct[1]]


def _layer_times(
    workload: Workload, machine: Machine, sizes: Sizes, *, predicting: bool
) -> NDArray[np.int64]:
    """ns of each step before its gate's choice is known; a pass's first layer carries the pass."""
    tokens = np.unique(workload.tokens, return_inverse=True)
    times = _spread(
        tokens,
        [machine.layer_ns(n, sizes.layer_bytes, predicting=predicting) for n in tokens[0].tolist()],
    )
    first_of_pass = np.diff(workload.rows[:, 0], prepend=-1) != 0
    times[first_of_pass] += machine.pass_ns(sizes.token_bytes)
    return times
