"""The times of a simulated machine, in whole nanoseconds, for one workload."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from moesim.errors import SimulationError
from moesim.machine.profile import Machine
from moesim.workload.steps import Workload

YEAR_NS = 365 * 24 * 3600 * 10**9
LONGEST_NS = 100 * YEAR_NS  # a run's; 64 bits hold 292 years


@dataclass(frozen=True)
class Sizes:
    """Bytes and parameters that the machine's rates apply to.

    Where the bytes of dense weights are None, unknown, the time to read them cannot be charged.
    `uncharged` names these parts; whoever prints a time must name them next to the time.
    """

    expert_bytes: int
    expert_params: int
    layer_bytes: int | None
    token_bytes: int | None
    low_bytes: int = 0  # of an expert in the lower-precision store; 0: there is none

    def uncharged(self, machine: Machine) -> tuple[str, ...]:
        """The parts ("layer", "token") whose dense weights are unknown but read by ``machine``."""
        if math.isinf(machine.compute.memory_bytes_per_s):
            return ()  # their reading is in the fixed costs
        sizes = {"layer": self.layer_bytes, "token": self.token_bytes}
        return tuple(name for name, size in sizes.items() if size is None)


class Costs(NamedTuple):
    """Durations for every engine: a named tuple of arrays and integers, which compiled code takes.

    An expert crosses the link in ``n_pieces`` pieces, of which the last may be shorter. A copy that
    returns its victim first (``write_back``) has twice as many: the victim is taken to be as big as
    the expert. The entries in ``low_`` are those of a copy of the lower precision, where there are
    any; all but the last piece of such a copy take ``piece_ns`` too.
    """

    tokens: NDArray[np.int32]  # [steps] the workload's own
    routed: NDArray[np.int32]  # [demanded keys] the workload's own
    begins_pass: NDArray[np.bool_]  # [steps]
    pass_ns: int  # of a forward pass outside its layers
    layer_ns: NDArray[np.int64]  # [tokens of a step] up to the gate's choice
    gates_ns: (
        int  # more where the later gates are asked; 0 under a policy that reads no predictions
    )
    expert_ns: NDArray[np.int64]  # [tokens routed to a key] on the compute stream
    cpu_ns: NDArray[np.int64]  # [tokens routed to a key] on a CPU worker
    arrival_ns: int  # from the arrival of an expert that compute stood still for to its compute
    latency_ns: int
    back_to_back: bool  # without latency where a copy waited for its stream
    piece_ns: int
    last_piece_ns: int
    n_pieces: int
    chunked: bool
    streams: int
    write_back: bool
    read_ns: int  # an expert from disk to host memory; 0: no disk
    host_bytes: int  # of the host's cache
    expert_bytes: int
    low_bytes: int  # 0: no lower precision
    low_expert_ns: NDArray[np.int64]
    low_pieces: int
    low_last_piece_ns: int
    low_read_ns: int
    cpu_workers: int

    @property
    def host_experts(self) -> int:
        """How many experts of full precision the host's cache holds."""
        return self.host_bytes // self.expert_bytes

    def gate_ns(self, steps: slice) -> NDArray[np.int64]:
        """[steps] until the gate's choice is known, the pass's share included, later gates not."""
        found: NDArray[np.int64] = self.layer_ns[self.tokens[steps]]
        found[self.begins_pass[steps]] += self.pass_ns
        return found

    def compute_ns(self, demands: slice) -> NDArray[np.int64]:
        """[demanded keys] on the compute stream."""
        found: NDArray[np.int64] = self.expert_ns[self.routed[demands]]
        return found


def costs_of(
    workload: Workload, machine: Machine, sizes: Sizes, *, predicting: bool, routing: bool = False
) -> Costs:
    """The durations of ``workload`` on ``machine``. Raises SimulationError where they make no
    sense.

    ``predicting``: later layers' gates are asked, unless the policy declines. ``routing``: a policy
    may send any tokens of a step to an expert.
    """
    chunk = machine.link.chunk_bytes
    if chunk > sizes.expert_bytes:
        raise SimulationError(
            f"machine '{machine.name}': chunk_bytes is {chunk:,}, more than an expert's "
            f"{sizes.expert_bytes:,}; leave it out to copy experts whole"
        )
    n_pieces, last = _cut(sizes.expert_bytes, chunk)
    # Without a second store its entries are the first one's, and nobody looks at them.
    low_bytes = sizes.low_bytes or sizes.expert_bytes
    low_pieces, low_last = _cut(low_bytes, chunk)
    # Tables by the number of tokens, not a duration a step: a workload can have 10^8 of them.
    of_step, of_key = workload.extent
    tokens, routed = _counts(*of_step), _counts(*((1, of_step[1]) if routing else of_key))
    expert = sizes.expert_bytes, sizes.expert_params
    low = low_bytes, sizes.expert_params
    layer_bytes, token_bytes = sizes.layer_bytes or 0, sizes.token_bytes or 0
    layer_ns = [machine.layer_ns(n, layer_bytes) for n in tokens]
    gates_ns = machine.gates_ns if predicting else 0
    expert_ns = [machine.expert_ns(n, *expert) for n in routed]
    cpu_ns = [machine.cpu_expert_ns(n, *expert) for n in routed]
    copy_ns = machine.latency_ns + machine.read_ns(sizes.expert_bytes) + machine.arrival_ns
    copy_ns += 2 * n_pieces * machine.copy_ns(chunk or sizes.expert_bytes)
    step_ns = max(layer_ns) + gates_ns + machine.pass_ns(token_bytes)
    most_ns = len(workload.keys) * (copy_ns + max(expert_ns) + max(cpu_ns))
    if most_ns + workload.n_steps * step_ns > LONGEST_NS:
        raise SimulationError(
            f"machine '{machine.name}' is so slow that {workload.n_steps:,} steps may take "
            f"{LONGEST_NS // YEAR_NS} years or more: check the rates and times of its profile"
        )
    return Costs(
        tokens=workload.tokens,
        routed=workload.routed,
        begins_pass=workload.begins_pass,
        pass_ns=machine.pass_ns(token_bytes),
        layer_ns=np.array(layer_ns, np.int64),
        gates_ns=gates_ns,
        expert_ns=np.array(expert_ns, np.int64),
        cpu_ns=np.array(cpu_ns, np.int64),
        arrival_ns=machine.arrival_ns,
        latency_ns=machine.latency_ns,
        back_to_back=machine.link.back_to_back,
        piece_ns=machine.copy_ns(chunk or sizes.expert_bytes),
        last_piece_ns=machine.copy_ns(last),
        n_pieces=n_pieces,
        chunked=bool(chunk),
        streams=machine.link.streams,
        write_back=machine.link.write_back,
        read_ns=machine.read_ns(sizes.expert_bytes),
        host_bytes=machine.disk.host_bytes if machine.disk else 0,
        expert_bytes=sizes.expert_bytes,
        low_bytes=sizes.low_bytes,
        low_expert_ns=np.array([machine.expert_ns(n, *low) for n in routed], np.int64),
        low_pieces=low_pieces,
        low_last_piece_ns=machine.copy_ns(low_last),
        low_read_ns=machine.read_ns(low_bytes),
        cpu_workers=machine.cpu.workers if machine.cpu else 0,
    )


def _cut(n_bytes: int, chunk_bytes: int) -> tuple[int, int]:
    """The number of pieces of a copy of so many bytes, and the bytes of the last piece."""
    n_pieces = -(-n_bytes // chunk_bytes) if chunk_bytes else 1
    return n_pieces, n_bytes - (n_pieces - 1) * chunk_bytes


def _counts(least: int, most: int) -> list[int]:
    """0, 1, 2 ... to ``most``; numbers below ``least`` are replaced by ``least``, since no step can
    take fewer."""
    return [max(least, n) for n in range(most + 1)]
