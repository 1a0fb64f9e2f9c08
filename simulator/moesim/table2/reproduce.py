"""Fit every card on the 2-bit cells, predict the 3-bit cells, and simulate this project's engine.

Which understanding of the measured engines to report is the caller's choice; the others are
fitted too, so that a reader sees what rests on it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from moepolicy import PolicySpec
from moepolicy.console import nearest

from moesim.engines.compilations import Compilations
from moesim.errors import SimulationError, UsageError
from moesim.table2.fit import Curves, Fit, fit
from moesim.table2.ours import Reach, reach
from moesim.table2.published import (
    CARDS,
    FITTED,
    MISPRINTS,
    PRECISIONS,
    PREDICTED,
    Algorithm,
    Card,
    published,
)
from moesim.table2.rows import READINGS, Constants, Reading, RowSimulator, decoding
from moesim.workload.steps import Workload

GUESSES = (1, 2)  # experts fetched ahead: the paper says 1 or 2
SHAPE = (32, 8, 2)

Seconds = Callable[[Algorithm, Card, Constants, str], float]


@dataclass(frozen=True)
class TableCell:
    """One cell: tokens/s as printed and as simulated.

    role  "fitted", "predicted", or "excluded" (predicted, but printed wrongly)
    """

    gpu: str
    precision: str
    algorithm: Algorithm
    role: str
    published: float
    simulated: float

    @property
    def error(self) -> float:
        """Of the simulated value, relative to the printed one."""
        return self.simulated / self.published - 1


@dataclass(frozen=True)
class Account:
    """What one reading, with one number of guesses, makes of the table."""

    reading: Reading
    guesses: int
    fits: dict[str, Fit]
    cells: list[TableCell]

    def errors(self, role: str) -> list[float]:
        """By how much each cell of this role is off, as a share of the published rate."""
        return [abs(cell.error) for cell in self.cells if cell.role == role]

    def median_error(self, role: str) -> float:
        """The median of `errors`."""
        return float(np.median(self.errors(role)))

    def median_slowdown_error(self) -> float:
        """How far off the change from the fitted to the predicted cells is, whatever the fit
        left of either."""
        fitted = {(c.gpu, c.algorithm): c.error for c in self.cells if c.role == "fitted"}
        off = [
            abs((1 + cell.error) / (1 + fitted[cell.gpu, cell.algorithm]) - 1)
            for cell in self.cells
            if cell.role == "predicted"
        ]
        return float(np.median(off))

    @property
    def misfit(self) -> float:
        """Root mean square of the fitted cells' logarithmic errors."""
        return float(np.sqrt(np.mean([fit.misfit**2 for fit in self.fits.values()])))

    @property
    def asked_link_share(self) -> float:
        """The most that a fit without a bound asks of a link, over what its kind carries."""
        return max(
            self.fits[card.name].asked_link_bytes_per_s / card.link_bytes_per_s for card in CARDS
        )


@dataclass(frozen=True)
class Reproduction:
    """The reported account, each reading's best, what LRU must have moved, and our engine.

    implied_loads  experts a token that the row with LRU moved on each card, if the two rows
                   without a cache are right about its constants; with the trace's own figure
    """

    account: Account
    others: list[Account]
    implied_loads: dict[str, tuple[float, float]]
    reach: list[Reach]
    expert_bytes: dict[str, int]

    def median_error_unmodelled(self, *, scaled: bool) -> float:
        """Of taking each predicted cell to be the fitted one, or that ``scaled`` by the bytes."""
        growth = self.expert_bytes[PREDICTED] / self.expert_bytes[FITTED] if scaled else 1.0
        before = {
            (c.gpu, c.algorithm): c.published for c in self.account.cells if c.role == "fitted"
        }
        off = [
            abs(before[cell.gpu, cell.algorithm] / growth / cell.published - 1)
            for cell in self.account.cells
            if cell.role == "predicted"
        ]
        return float(np.median(off))


def find_reading(name: str) -> Reading:
    """A reading by name. SimulationError lists them."""
    for reading in READINGS:
        if reading.name == name:
            return reading
    known = [reading.name for reading in READINGS]
    raise UsageError(f"unknown reading '{name}'; {nearest(name, known)}")


def reproduce(
    workload: Workload, policies: Sequence[PolicySpec], *, reading: str = READINGS[0].name
) -> Reproduction:
    """Do all of it on a trace of Mixtral's shape, ``policies`` on this project's engine.

    Raises SimulationError for a trace of another shape or without the experts' sizes.
    """
    chosen = find_reading(reading)
    _check(workload)
    workload = decoding(workload)
    sizes = {name: workload.meta.expert_bytes[name] for name in PRECISIONS}
    compilations = Compilations()
    bench = RowSimulator(workload, compilations)
    curves = Curves(bench, sizes[FITTED])
    others = [
        min((_by_curves(curves, other, n, sizes) for n in GUESSES), key=lambda a: a.misfit)
        for other in READINGS
    ]
    best = others[READINGS.index(chosen)]
    account = _simulated(bench, best, sizes)
    return Reproduction(
        account=account,
        others=others,
        implied_loads={card.name: _implied_loads(curves, card) for card in CARDS},
        reach=reach(workload, policies, account.fits, sizes, compilations),
        expert_bytes=sizes,
    )


def _check(workload: Workload) -> None:
    meta = workload.meta
    if (meta.n_layers, meta.n_experts, meta.top_k) != SHAPE:
        raise SimulationError(
            f"the table is Mixtral-8x7B's, 32 layers and the top 2 of 8 experts; {workload.title} "
            f"has {meta.n_layers} layers and the top {meta.top_k} of {meta.n_experts}"
        )
    missing = [name for name in PRECISIONS if name not in meta.expert_bytes]
    if missing:
        raise SimulationError(
            f"{workload.title} does not say how big an expert is in {' and '.join(missing)}"
        )
    if not workload.n_decoded:
        raise SimulationError(
            f"{workload.title} has no decoded token, and the table is of decoding"
        )


def _by_curves(curves: Curves, reading: Reading, guesses: int, sizes: dict[str, int]) -> Account:
    """Fit each card, and read all of its cells off the curves."""
    fits = {}
    for card in CARDS:
        rows = [curves.of(a, reading, slots=card.slots, guesses=guesses) for a in Algorithm]
        seconds = [1 / published(FITTED, a, card) for a in Algorithm]
        fits[card.name] = fit(rows, seconds, sizes[FITTED], card.link_bytes_per_s)

    def seconds_of(algorithm: Algorithm, card: Card, constants: Constants, precision: str) -> float:
        curve = curves.of(algorithm, reading, slots=card.slots, guesses=guesses)
        copy_s = sizes[precision] / constants.link_bytes_per_s
        return float(constants.layer_s * curve.at(np.array([copy_s / constants.layer_s]))[0])

    return Account(reading, guesses, fits, _cells(reading, fits, sizes, seconds_of))


def _simulated(bench: RowSimulator, account: Account, sizes: dict[str, int]) -> Account:
    """The same account with each cell simulated at the fitted constants themselves."""

    def seconds_of(algorithm: Algorithm, card: Card, constants: Constants, precision: str) -> float:
        return bench.seconds(
            algorithm,
            account.reading,
            constants,
            slots=card.slots,
            guesses=account.guesses,
            expert_bytes=sizes[precision],
        )

    cells = _cells(account.reading, account.fits, sizes, seconds_of)
    return Account(account.reading, account.guesses, account.fits, cells)


def _cells(
    reading: Reading, fits: dict[str, Fit], sizes: dict[str, int], seconds_of: Seconds
) -> list[TableCell]:
    cells = []
    for precision in PRECISIONS:
        growth = sizes[precision] / sizes[FITTED] if reading.compute_by_bytes else 1.0
        for algorithm in Algorithm:
            for card in CARDS:
                constants = fits[card.name].constants
                constants = Constants(constants.link_bytes_per_s, constants.layer_s * growth)
                cells.append(
                    TableCell(
                        gpu=card.name,
                        precision=precision,
                        algorithm=algorithm,
                        role=_role(precision, algorithm, card),
                        published=published(precision, algorithm, card),
                        simulated=1 / seconds_of(algorithm, card, constants, precision),
                    )
                )
    return cells


def _role(precision: str, algorithm: Algorithm, card: Card) -> str:
    if (precision, algorithm, card.name) in MISPRINTS:
        return "excluded"
    return "fitted" if precision == FITTED else "predicted"


def _implied_loads(curves: Curves, card: Card) -> tuple[float, float]:
    """Loads a token in the row with LRU: what the rows without a cache leave for it, and the
    trace's. Both in the released engine, whose every load is two copies."""
    reading = READINGS[0]
    ends = np.array([0.0, 1.0])
    slope = {}
    for algorithm in (Algorithm.lru, Algorithm.no_cache, Algorithm.naive):
        curve = curves.of(algorithm, reading, slots=card.slots, guesses=1)
        slope[algorithm] = float(np.diff(curve.at(ends))[0])  # copies a token
    seconds = {algorithm: 1 / published(FITTED, algorithm, card) for algorithm in slope}
    copy_s = (seconds[Algorithm.naive] - seconds[Algorithm.no_cache]) / (
        slope[Algorithm.naive] - slope[Algorithm.no_cache]
    )
    saved = (seconds[Algorithm.no_cache] - seconds[Algorithm.lru]) / copy_s
    return (slope[Algorithm.no_cache] - saved) / 2, slope[Algorithm.lru] / 2
