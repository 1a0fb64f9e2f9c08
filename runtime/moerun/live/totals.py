"""What a live cache has done so far, under the names every report uses."""

from __future__ import annotations

from dataclasses import dataclass

from moepolicy import ExpertCache
from moepolicy.counts import Counts, counts_of


@dataclass(frozen=True, kw_only=True)
class Totals(Counts):
    """A live run's counts (see `CountColumns`) and what they took.

    steps         that were served
    bytes_loaded  over the link
    stall_s       seconds that compute waited for experts
    decide_s      seconds that the policy took, with the state machine that asks it
    """

    steps: int = 0
    bytes_loaded: int = 0
    stall_s: float = 0.0
    decide_s: float = 0.0


def totals_of(
    cache: ExpertCache,
    *,
    steps: int,
    record_bytes: int,
    low_record_bytes: int,
    stall_s: float,
    decide_s: float,
) -> Totals:
    """The counts of ``cache``, whose driver knows the rest."""
    counted = counts_of(cache.arrays)
    return Totals(
        **counted.counted(),
        steps=steps,
        bytes_loaded=counted.bytes_over_link(record_bytes, low_record_bytes),
        stall_s=stall_s,
        decide_s=decide_s,
    )
