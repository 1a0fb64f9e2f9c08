"""One simulation as a row: what was counted, how long it took, what no policy can beat."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from moepolicy.counts import CountColumns, as_row


@dataclass(frozen=True, kw_only=True)
class _ResultOf:
    """What a result is of: the first columns of its row."""

    policy: str
    slots: int
    scope: str
    machine: str
    trace: str
    expert_bytes: int | None
    low_expert_bytes: int
    layer_bytes: int | None
    token_bytes: int | None
    dense_precision: str | None
    time_is_lower_bound: bool | None
    steps: int


@dataclass(frozen=True, kw_only=True)
class Result(CountColumns, _ResultOf):
    """One policy on one cache and machine. Times are simulated seconds, counts of experts
    (see `CountColumns`).

    expert_bytes      None: unknown, and with it every time, None too
    layer_bytes       of a layer's dense weights; None: unknown
    token_bytes       that a token reads outside the layers; None: unknown
    dense_precision   what those two count the weights as; None: the trace does not say
    time_is_lower_bound  whether the times leave out reading dense weights of unknown bytes, so
                      that times are at least, and tokens/s at most, what is said; None: no times
    low_expert_bytes  of one in the second, lower-precision store; 0: there was none
    bytes_loaded      over the link; None: the size of an expert is unknown
    tokens_per_s      decoded tokens over the time spent on them; of a trace that has none,
                      prompt tokens
    gates_s           of the time: asking later layers' gates for predictions
    cold              whether caches started empty with every sequence
    shares_slots      whether the policy says how many slots each layer has; ``slots`` is then the
                      average
    lossy             whether the policy changes what the model computes: the limits do not bind it

    Of what no policy can beat with these slots, and with the policy's shares of them, knowing the
    future (None: was not asked for):

    limit_loads         the fewest loads, whatever is prefetched or bypassed
    limit_loads_kept    the fewest of a policy that copies on demand only and bypasses nothing
    limit_tokens_per_s  the most tokens/s
    limit_buffers       staging buffers that it may hold prefetched experts in: the policy's own
    share_of_limit      tokens_per_s / limit_tokens_per_s
    """

    bytes_loaded: int | None
    time_s: float | None
    stall_s: float | None
    link_busy_s: float | None
    gates_s: float | None
    tokens_per_s: float | None
    cold: bool
    shares_slots: bool
    lossy: bool
    limit_loads: int | None
    limit_loads_kept: int | None
    limit_tokens_per_s: float | None
    limit_buffers: int | None
    share_of_limit: float | None

    @property
    def speed(self) -> float:
        """``tokens_per_s`` of a run that has times."""
        assert self.tokens_per_s is not None
        return self.tokens_per_s

    def row(self) -> dict[str, Any]:
        """Every column by name, in their order."""
        return as_row(self)
