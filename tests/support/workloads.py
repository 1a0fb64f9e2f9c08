"""Workloads from demands written by hand, without a trace file."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from moeroute.schema import TraceMeta
from moesim import Workload

N_TOKEN_IDS = 7  # the tokens' ids take turns


def make_workload(
    demands: Sequence[tuple[int, Sequence[int]]],
    n_layers: int,
    n_experts: int,
    *,
    tokens: Sequence[int] | None = None,
    foreseen: bool = False,
) -> Workload:
    """One step for each (layer, experts in router order); a pass begins where layers start over.

    ``tokens`` are those each step serves; a step of several is a prompt's. With ``foreseen`` there
    are gate logits, and the predictions one layer ahead are right. Experts are of 10 bytes.
    """
    served = np.array([1] * len(demands) if tokens is None else tokens, np.int32)
    widths = [len(experts) for _, experts in demands]
    layer = np.array([layer for layer, _ in demands], np.int32)
    pass_of = np.cumsum(np.diff(layer, prepend=-1) <= 0)
    keys = [layer * n_experts + expert for layer, experts in demands for expert in experts]
    # A pass has a row for each of its tokens and layers; where steps differ, for the most of them.
    rows_of_pass = np.zeros(int(pass_of[-1]) + 1, np.int64)
    np.maximum.at(rows_of_pass, pass_of, served * n_layers)
    starts = np.cumsum([0, *rows_of_pass])
    predicted = np.full((int(starts[-1]), n_experts), np.nan, np.float16)
    for i, (at, experts) in enumerate(demands):
        its = starts[pass_of[i]] + at + np.arange(served[i]) * n_layers
        predicted[its] = 0
        predicted[its[:, None], list(experts)] = 1
    return Workload(
        meta=TraceMeta(
            source="recorded",
            model="by hand",
            n_layers=n_layers,
            n_experts=n_experts,
            top_k=min(widths),
            expert_bytes={"fp16": 10},
        ),
        title="by hand",
        digest="",
        keys=np.array(keys, np.int32),
        weights=np.concatenate([np.linspace(1, 0.5, n, dtype=np.float32) for n in widths]),
        routed=np.repeat(served, widths).astype(np.int32),
        offsets=np.cumsum([0, *widths]).astype(np.int64),
        layer=layer,
        tokens=served,
        decode=served == 1,
        rows=np.stack([starts[pass_of], starts[pass_of + 1]], axis=1),
        row_layer=np.tile(np.arange(n_layers, dtype=np.int32), int(starts[-1]) // n_layers),
        logits=predicted if foreseen else None,
        predicted=(predicted,) if foreseen else (),
        token_ids=np.arange(starts[-1], dtype=np.int32) // n_layers % N_TOKEN_IDS,
    )
