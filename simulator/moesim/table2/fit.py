"""Fitting a card's constants on some of its rows.

A simulated token's time is one unknown, the compute of a layer, times a function of another: how
many such layers a copy takes. That function is a curve that all cards with as many slots share;
it is simulated at some ratios, once, and a card's fit is a search along it. No link is fitted
faster than its kind can be.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from moesim.table2.published import Algorithm
from moesim.table2.rows import Constants, Reading, RowSimulator

LAYER_S = 0.01  # of the simulated curve; any would do
# Copy time over layer time. Where guesses begin to outlast compute the curve bends: more points.
ENDS = np.array([0.02, 5.0])
BENT = np.array([0.02, 0.2, 0.3, *np.linspace(0.4, 1.2, 13), 1.4, 1.7, 2.5, 5.0])
TRIED = np.geomspace(0.01, 20.0, 8001)


@dataclass(frozen=True)
class Curve:
    """Time of a token, in layers' compute, over the ratio of copy time to it."""

    ratios: NDArray[np.float64]
    layers: NDArray[np.float64]

    def at(self, ratios: NDArray[np.float64]) -> NDArray[np.float64]:
        """Interpolated; beyond its ends the curve goes on straight."""
        x, y = self.ratios, self.layers
        i = np.clip(np.searchsorted(x, ratios), 1, len(x) - 1)
        slope = (y[i] - y[i - 1]) / (x[i] - x[i - 1])
        return np.asarray(y[i - 1] + slope * (ratios - x[i - 1]))


class Curves:
    """The curves of one trace, each simulated when it is first asked for."""

    def __init__(self, bench: RowSimulator, expert_bytes: int) -> None:
        self.bench = bench
        self.expert_bytes = expert_bytes
        self._known: dict[tuple[object, ...], Curve] = {}

    def of(self, algorithm: Algorithm, reading: Reading, *, slots: int, guesses: int) -> Curve:
        """The curve of one algorithm under a reading, with so many slots a layer and guesses."""
        full, naive = algorithm is Algorithm.full, algorithm is Algorithm.naive
        # What makes no difference to a row is no part of its key.
        key = (
            algorithm,
            reading.write_back and not naive,
            reading.streamed and naive,
            slots if algorithm in (Algorithm.full, Algorithm.lru) else 0,
            guesses if full else 0,
        )
        if key not in self._known:
            ratios = ENDS  # where copies and compute take turns, the curve is a straight line
            if full:
                ratios = BENT
            elif naive and reading.streamed:  # bent where a layer's copies outlast its compute
                ratios = np.array([ENDS[0], 1 / self.bench.workload.meta.n_experts, ENDS[1]])
            layers = [self._layers(algorithm, reading, slots, guesses, r) for r in ratios]
            self._known[key] = Curve(ratios, np.array(layers))
        return self._known[key]

    def _layers(
        self, algorithm: Algorithm, reading: Reading, slots: int, guesses: int, ratio: float
    ) -> float:
        constants = Constants(self.expert_bytes / (ratio * LAYER_S), LAYER_S)
        seconds = self.bench.seconds(
            algorithm,
            reading,
            constants,
            slots=slots,
            guesses=guesses,
            expert_bytes=self.expert_bytes,
        )
        return seconds / LAYER_S


@dataclass(frozen=True)
class Fit:
    """A card's constants.

    misfit                  root mean square of the rows' logarithmic errors that remain
    asked_link_bytes_per_s  the link's rate if any rate were possible
    """

    constants: Constants
    misfit: float
    asked_link_bytes_per_s: float


def fit(
    curves: Sequence[Curve],
    seconds: Sequence[float],
    expert_bytes: int,
    fastest_link: float,
) -> Fit:
    """The constants under which ``curves`` come nearest to ``seconds`` a token, in ratio.

    The link is at most ``fastest_link`` bytes/s.
    """
    layers = np.stack([curve.at(TRIED) for curve in curves])
    asked = np.log(np.asarray(seconds))[:, None] - np.log(layers)
    free, _ = _nearest(asked, expert_bytes, np.inf)
    constants, misfit = _nearest(asked, expert_bytes, fastest_link)
    return Fit(constants, misfit, free.link_bytes_per_s)


def _nearest(
    asked: NDArray[np.float64], expert_bytes: int, fastest_link: float
) -> tuple[Constants, float]:
    """Of the ``asked`` logarithms of a layer's time [rows, ratios], the ratio that suits all best.

    At each ratio the best layer time is the rows' geometric mean, or the least with which the
    link is no faster than it can be.
    """
    layer_s = np.maximum(np.exp(asked.mean(axis=0)), expert_bytes / (TRIED * fastest_link))
    misfit = np.sqrt(((asked - np.log(layer_s)) ** 2).mean(axis=0))
    best = int(misfit.argmin())
    link = min(expert_bytes / float(TRIED[best] * layer_s[best]), fastest_link)
    return Constants(link, float(layer_s[best])), float(misfit[best])
