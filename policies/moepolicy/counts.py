"""What a run has counted, under the names that every report uses.

`CountColumns` is where a counter is named: a new one is one line there. The simulator's results and
the runtime's totals and reports inherit it.
"""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from types import UnionType
from typing import Any, Self, get_args, get_type_hints

from moepolicy.kinds import Kind
from moepolicy.state import (
    ALL_MASS,
    LOW_MASS,
    REROUTED_MASS,
    SKIPPED_MASS,
    SUBSTITUTED_MASS,
    Cache,
)

_KINDS, _MASS = "kinds", "mass"  # of a field's metadata


def _number_of(*kinds: Kind) -> Any:
    """A counter: how many decisions of these kinds there were."""
    return field(default=0, metadata={_KINDS: kinds})


def _mass_at(entry: int) -> Any:
    """An entry of ``Cache.mass``. A report shows its share of all the mass."""
    return field(default=0.0, metadata={_MASS: entry})


@dataclass(frozen=True, kw_only=True)
class CountColumns:
    """Counts of experts, and sums of the gates' weights of those a policy did not compute as asked.

    loads         copies over the link, prefetches included
    low_loads     of those, the ones that were asked for at the lower precision
    cpu_experts   misses computed where the experts are kept, and not copied
    substituted   misses that another expert stood in for
    skipped       misses left out of the sum
    rerouted      experts that a gate chose for a token and the policy replaced
    *_mass        gates' weights of all experts wanted, and of those that were left out, computed
                  by another expert, computed at the lower precision, or replaced by the policy; 0
                  under a policy that loads every miss of what the gates chose
    """

    requests: int = _number_of(Kind.HIT, Kind.LATE, Kind.MISS)
    hits: int = _number_of(Kind.HIT)
    late: int = _number_of(Kind.LATE)
    misses: int = _number_of(Kind.MISS)
    loads: int = _number_of(Kind.LOAD, Kind.SPECULATE)
    bypasses: int = _number_of(Kind.BYPASS)
    prefetches: int = _number_of(Kind.SPECULATE)
    useless_prefetches: int = _number_of(Kind.USELESS)
    cpu_experts: int = _number_of(Kind.COMPUTE)
    low_loads: int = _number_of(Kind.LOW)
    substituted: int = _number_of(Kind.SUBSTITUTE)
    skipped: int = _number_of(Kind.SKIP)
    rerouted: int = _number_of(Kind.REROUTE)
    gate_mass: float = _mass_at(ALL_MASS)
    skipped_mass: float = _mass_at(SKIPPED_MASS)
    substituted_mass: float = _mass_at(SUBSTITUTED_MASS)
    low_mass: float = _mass_at(LOW_MASS)
    rerouted_mass: float = _mass_at(REROUTED_MASS)

    @property
    def hit_ratio(self) -> float:
        """Hits of all requests; late hits, which were waited for, are none. 0 without requests."""
        return self.ratio(self.hits)

    @property
    def late_ratio(self) -> float:
        """Late hits of all requests; 0 without requests."""
        return self.ratio(self.late)

    @property
    def miss_ratio(self) -> float:
        """Misses of all requests; 0 without requests."""
        return self.ratio(self.misses)

    @property
    def cpu_ratio(self) -> float:
        """Requests computed on the CPU, of all requests; 0 without requests."""
        return self.ratio(self.cpu_experts)

    def ratio(self, count: int) -> float:
        """``count`` of all requests; 0 where there were none."""
        return count / max(self.requests, 1)

    @property
    def skipped_share(self) -> float:
        """Share of the gates' weights that was left out; 0 where no weights were summed."""
        return self._share(self.skipped_mass)

    @property
    def substituted_share(self) -> float:
        """Share of the gates' weights that another expert computed."""
        return self._share(self.substituted_mass)

    @property
    def low_share(self) -> float:
        """Share of the gates' weights that was computed at the lower precision."""
        return self._share(self.low_mass)

    @property
    def rerouted_share(self) -> float:
        """Share of the gates' weights whose expert the policy replaced."""
        return self._share(self.rerouted_mass)

    @property
    def shares(self) -> dict[str, float]:
        """The shares of the gates' weights, by the names of their columns."""
        return {name: getattr(self, name) for name in MASSES.values()}

    def _share(self, mass: float) -> float:
        return mass / (self.gate_mass or 1.0)

    def bytes_over_link(self, expert_bytes: int, low_expert_bytes: int) -> int:
        """What the loads moved, in records of these sizes."""
        return (self.loads - self.low_loads) * expert_bytes + self.low_loads * low_expert_bytes


MASSES = {
    one.name: one.name.replace("_mass", "_share")
    for one in fields(CountColumns)
    if one.metadata.get(_MASS, ALL_MASS) != ALL_MASS
}
"""The masses, and the columns that show them as shares."""


@dataclass(frozen=True, kw_only=True)
class Counts(CountColumns):
    """What was counted between two moments; a subclass may add sums of its own."""

    def __add__(self, other: Self) -> Self:
        return type(self)(**{name: n + getattr(other, name) for name, n in self._sums().items()})

    def since(self, before: Self) -> Self:
        """What has been added since ``before``."""
        return type(self)(**{name: n - getattr(before, name) for name, n in self._sums().items()})

    def _sums(self) -> dict[str, Any]:
        return {one.name: getattr(self, one.name) for one in fields(self)}

    def counted(self) -> dict[str, Any]:
        """The fields of `CountColumns`, to make a report of."""
        return {one.name: getattr(self, one.name) for one in fields(CountColumns)}


def counts_of(cache: Cache) -> Counts:
    """What ``cache`` has counted since it was made, in Python's numbers."""
    counters, mass = cache.counters.tolist(), cache.mass.tolist()
    found: dict[str, Any] = {}
    for one in fields(CountColumns):
        if _KINDS in one.metadata:
            found[one.name] = sum(counters[kind] for kind in one.metadata[_KINDS])
        elif mass:  # there is none where the policy does not choose
            found[one.name] = mass[one.metadata[_MASS]]
    return Counts(**found)


def columns(row: type[CountColumns]) -> dict[str, type]:
    """The columns that a report of ``row``'s fields has, in their order, and the type of each.

    Shares stand in place of masses, and the hit ratio follows the bytes that were loaded. A value
    that may be missing has the type it has if not.
    """
    found: dict[str, type] = {}
    hints = get_type_hints(row)
    for one in fields(row):
        if _MASS not in one.metadata:
            found[one.name] = _plain(hints[one.name])
        elif one.name in MASSES:
            found[MASSES[one.name]] = float
        if one.name == "bytes_loaded":
            found["hit_ratio"] = float
    return found


def always_there(row: type[CountColumns]) -> set[str]:
    """The columns of ``row``'s reports that have a value in every report."""
    hints = get_type_hints(row)
    return {n for n in columns(row) if n in hints and not isinstance(hints[n], UnionType)}


def _plain(kind: Any) -> type:
    kinds = get_args(kind) if isinstance(kind, UnionType) else (kind,)
    return next(one for one in kinds if one is not type(None))  # type: ignore[no-any-return]


def as_row(reported: CountColumns) -> dict[str, Any]:
    """The values of ``reported`` by column."""
    return {name: getattr(reported, name) for name in columns(type(reported))}
