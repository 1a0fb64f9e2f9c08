"""What no policy can beat on one machine with one number of slots: loads and tokens/s."""

from __future__ import annotations

from dataclasses import dataclass

from moesim.limits.loads import Shares, min_loads
from moesim.limits.time import min_time_ns
from moesim.machine.costs import Sizes
from moesim.machine.profile import NS_PER_S, Machine
from moesim.workload.steps import Workload


@dataclass(frozen=True)
class Limits:
    """What no policy can beat with so many slots on a machine, knowing the future.

    loads         copies over the link, whatever is prefetched or bypassed
    loads_kept    the same without bypass: of a policy that copies on demand only, and keeps what
                  it copied at least while its step lasts
    tokens_per_s  counted as `Result.tokens_per_s` is; None where nobody knows how big an expert is
    buffers       staging buffers that ``tokens_per_s`` lets hold prefetched experts
    """

    loads: int
    loads_kept: int
    tokens_per_s: float | None
    buffers: int


def limits_of(
    workload: Workload,
    machine: Machine,
    sizes: Sizes | None,
    slots: int,
    scope: str,
    *,
    buffers: int = 0,
    cold: bool = False,
    shares: Shares = None,
) -> Limits:
    """The limits of `min_loads` and `min_time_ns`, which say what they hold for; without ``sizes``
    those of the loads alone. ``shares``: the slots of each layer where they are not equal."""
    tokens_per_s = None
    if sizes is not None:
        least_ns = min_time_ns(
            workload,
            machine,
            sizes,
            slots,
            scope,
            buffers=buffers,
            cold=cold,
            decoding=workload.n_decoded > 0,
            shares=shares,
        )
        tokens = workload.n_decoded or workload.n_prompt
        tokens_per_s = tokens * NS_PER_S / least_ns if least_ns else float("inf")
    return Limits(
        loads=min_loads(workload, slots, scope, cold=cold, shares=shares),
        loads_kept=min_loads(workload, slots, scope, bypass=False, cold=cold, shares=shares),
        tokens_per_s=tokens_per_s,
        buffers=buffers,
    )
