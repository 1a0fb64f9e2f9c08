"""Small traces for the tests of moeroute."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from moeroute import Rows, TraceMeta, TraceWriter


def make_meta(**changes: object) -> TraceMeta:
    settings: dict[str, object] = {
        "source": "recorded",
        "model": "test-model",
        "n_layers": 3,
        "n_experts": 4,
        "top_k": 2,
        "expert_bytes": {"fp16": 1000, "4bit": 300},
        "seed": 7,
    }
    return TraceMeta(**{**settings, **changes})  # type: ignore[arg-type]


def make_rows(
    meta: TraceMeta, n_sequences: int = 2, n_tokens: int = 5, seed: int = 0, first: int = 0
) -> Rows:
    """Random but valid rows of whole sequences, every optional column present."""
    rng = np.random.default_rng(seed)
    shape = (n_sequences, n_tokens, meta.n_layers)
    n = int(np.prod(shape))
    sequence, position, layer = (axis.ravel() for axis in np.indices(shape))
    logits = rng.normal(size=(n, meta.n_experts)).astype(np.float16)
    experts = np.argsort(-logits, axis=1)[:, : meta.top_k]
    chosen = np.exp(np.take_along_axis(logits.astype(np.float32), experts, axis=1))
    predicted = [rng.normal(size=logits.shape).astype(np.float16) for _ in range(meta.horizon)]
    for j, prediction in enumerate(predicted):
        prediction[layer <= j] = np.nan
    return Rows(
        sequence=(sequence + first).astype(np.uint32),
        position=position.astype(np.uint32),
        phase=(position > 1).astype(np.uint8),
        token_id=rng.integers(0, 1000, n).astype(np.uint32),
        layer=layer.astype(np.uint16),
        experts=experts.astype(np.uint16),
        weights=(chosen / chosen.sum(axis=1, keepdims=True)).astype(np.float32),
        router_logits=logits,
        input_norm=rng.random(n).astype(np.float32),
        predicted=tuple(predicted),
    )


def write(path: Path, meta: TraceMeta, *batches: Rows, resume: bool = False) -> None:
    """Write a whole trace."""
    with TraceWriter(path, meta, resume=resume) as writer:
        for rows in batches:
            writer.write(rows)


def leave_unfinished(path: Path, meta: TraceMeta, *batches: Rows) -> None:
    """Write a trace and give up before its end, as an interrupted recorder does."""
    writer = TraceWriter(path, meta)
    for rows in batches:
        writer.write(rows)
    writer.abort()
