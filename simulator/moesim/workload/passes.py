"""The order in which a trace's rows went through the model.

A trace is sorted by sequence. Where its recorder said which rows made one forward pass, several
requests share passes, and time goes by pass.
"""

from __future__ import annotations

from functools import cached_property
from typing import Any

import numpy as np
from moeroute import Trace
from moeroute.schema import DECODE
from numpy.typing import NDArray

Columns = dict[str, NDArray[Any]]


class RowsInTime:
    """A trace's rows in the order of their forward passes.

    Rows that the file does not have in that order are brought into it in memory, whole columns at
    a time.
    """

    def __init__(self, trace: Trace) -> None:
        self.trace = trace
        self.has_passes = trace.has("pass_id")
        self._whole: Columns = {}

    @cached_property
    def _order(self) -> NDArray[np.intp] | None:
        """Which of the file's rows comes at each place; None: they are in order."""
        if not self.has_passes:
            return None
        of = self.trace.array("pass_id")
        return None if (of[1:] >= of[:-1]).all() else np.argsort(of, kind="stable")

    def arrays(self, *names: str, start: int, stop: int) -> Columns:
        """Columns of rows start..stop-1 in order of time."""
        if self._order is None:
            return self.trace.arrays(*names, start=start, stop=stop)
        for name in names:
            if name not in self._whole:
                self._whole[name] = self.trace.array(name)
        at = self._order[start:stop]
        return {name: self._whole[name][at] for name in names}

    def release(self) -> None:
        """Free the columns that were brought into order."""
        self._whole = {}

    @cached_property
    def apart(self) -> NDArray[np.int64] | None:
        """Rows at which all sequences before have ended; None where each sequence is by itself."""
        if self._order is None:
            return None
        _, of = np.unique(self.trace.array("sequence")[self._order], return_inverse=True)
        last = np.zeros(of.max() + 1, np.int64)
        last[of] = np.arange(len(of))
        ended = np.maximum.accumulate(last[of[:-1]]) == np.arange(len(of) - 1)
        return np.append(0, np.flatnonzero(ended) + 1)


def is_alone(columns: Columns, token_starts: NDArray[np.int64]) -> NDArray[np.bool_]:
    """bool[rows]: whether the row's forward pass is one decoded token.

    ``token_starts`` are the first rows of the block's tokens, and their number.
    """
    pass_of = columns["pass_id"][token_starts[:-1]]
    edges = np.append(np.flatnonzero(np.append(True, pass_of[1:] != pass_of[:-1])), len(pass_of))
    single = np.repeat(np.diff(edges) == 1, np.diff(edges))
    decode = columns["phase"][token_starts[:-1]] == DECODE
    alone: NDArray[np.bool_] = np.repeat(single & decode, np.diff(token_starts))
    return alone
