"""What a trace says by itself, as rows for charts."""

from __future__ import annotations

from typing import Any

import numpy as np
from moeroute import Trace
from moeroute.schema import prediction_column
from moeroute.statistics import Routing, locality, popularity, recall

from moesim.pictures.routing import RECORDED, SHUFFLED

Row = dict[str, Any]


def use_rows(routing: Routing) -> list[Row]:
    """Each expert's share of its layer's uses."""
    return [
        {"layer": layer, "expert": expert, "share": float(share)}
        for (layer, expert), share in np.ndenumerate(popularity(routing).shares)
    ]


def locality_rows(routing: Routing, seed: int) -> list[Row]:
    """The share of uses that repeat one of a token so many tokens earlier, mean over layers."""
    rows = []
    for name, of in ((RECORDED, routing), (SHUFFLED, routing.shuffled(seed))):
        found = locality(of)
        rows += [
            {"lag": lag, "copy": name, "share": float(share)}
            for lag, share in zip(found.lags, found.mean, strict=True)
            if not np.isnan(share)
        ]
    return rows


def recall_rows(trace: Trace) -> list[Row]:
    """The share of experts used that were among the likeliest of a prediction, mean over layers;
    empty where the trace has no predictions."""
    if not trace.has(prediction_column(1)):
        return []
    found = recall(trace)
    return [
        {
            "ahead": f"{ahead + 1} layer{'s' * (ahead > 0)} ahead",
            "fetched": found.counts[place],
            "recall": float(value),
        }
        for (ahead, place), value in np.ndenumerate(found.mean)
        if not np.isnan(value)
    ]
