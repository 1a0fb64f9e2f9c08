"""What a live cache has done so far, under the names every report uses."""

from __future__ import annotations

from typing import NamedTuple

from moepolicy import ExpertCache, Kind
from moepolicy.state import ALL_MASS, LOW_MASS, SKIPPED_MASS, SUBSTITUTED_MASS

MASSES = {
    "gate_mass": ALL_MASS,
    "skipped_mass": SKIPPED_MASS,
    "substituted_mass": SUBSTITUTED_MASS,
    "low_mass": LOW_MASS,
}


class Totals(NamedTuple):
    """Counts since the cache was made, under the names every report uses.

    ``loads`` counts the copies over the link, prefetches included; ``low_loads`` those that were
    asked for at the lower precision. The masses are sums of the gates' weights, 0 under a policy
    that loads every miss.
    """

    steps: int
    requests: int
    hits: int
    late: int
    misses: int
    loads: int
    bypasses: int
    prefetches: int
    useless_prefetches: int
    cpu_experts: int
    low_loads: int
    substituted: int
    skipped: int
    bytes_loaded: int
    stall_s: float
    gate_mass: float = 0.0
    skipped_mass: float = 0.0
    substituted_mass: float = 0.0
    low_mass: float = 0.0

    @property
    def hit_ratio(self) -> float:
        return self.hits / self.requests if self.requests else 0.0

    @property
    def shares(self) -> dict[str, float]:
        """Of the gates' weights, what was left out, computed by another expert, or computed at
        the lower precision."""
        changed = {
            "skipped_share": self.skipped_mass,
            "substituted_share": self.substituted_mass,
            "low_share": self.low_mass,
        }
        return {name: mass / (self.gate_mass or 1.0) for name, mass in changed.items()}

    def since(self, before: Totals) -> Totals:
        return Totals._make(now - then for now, then in zip(self, before, strict=True))


def totals_of(
    cache: ExpertCache,
    *,
    steps: int,
    requests: int,
    record_bytes: int,
    low_record_bytes: int,
    stall_s: float,
) -> Totals:
    """The counts of ``cache``, whose driver knows the rest."""
    count, mass = cache.count, cache.arrays.mass
    prefetches, low_loads = count(Kind.SPECULATE), count(Kind.LOW)
    loads = count(Kind.LOAD) + prefetches
    return Totals(
        steps=steps,
        requests=requests,
        hits=count(Kind.HIT),
        late=count(Kind.LATE),
        misses=count(Kind.MISS),
        loads=loads,
        bypasses=count(Kind.BYPASS),
        prefetches=prefetches,
        useless_prefetches=count(Kind.USELESS),
        cpu_experts=count(Kind.COMPUTE),
        low_loads=low_loads,
        substituted=count(Kind.SUBSTITUTE),
        skipped=count(Kind.SKIP),
        bytes_loaded=(loads - low_loads) * record_bytes + low_loads * low_record_bytes,
        stall_s=stall_s,
        **({name: float(mass[i]) for name, i in MASSES.items()} if len(mass) else {}),
    )
