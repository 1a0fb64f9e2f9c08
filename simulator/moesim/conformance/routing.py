"""The seeded routing that policies are checked on: small, with all that a trace can tell."""

from __future__ import annotations

from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
from moeroute import DECODE, PROMPT, Rows, TraceMeta, TraceWriter, open_trace
from moeroute.weight_rules import WeightRule, weights_by

from moesim.workload.loading import load_workload
from moesim.workload.steps import Workload

RULE = WeightRule("softmax-topk-renorm")
VOCABULARY = 50
EXPERT_BYTES = 10


def seeded_workload(
    seed: int,
    *,
    n_layers: int = 3,
    n_experts: int = 8,
    top_k: int = 2,
    n_tokens: int = 40,
    horizon: int = 1,
) -> Workload:
    """Routing by ``seed``: three sequences of a prompt and decoded tokens, some experts popular and
    some used again soon, with logits, token ids and predictions ``horizon`` layers ahead that are
    mostly right."""
    rng = np.random.default_rng(seed)
    tokens = np.arange(n_tokens)
    sequence = tokens * 3 // n_tokens
    position = tokens - np.searchsorted(sequence, sequence)
    logits = _logits(rng, n_tokens, n_layers, n_experts)
    experts = np.argsort(-logits.astype(np.float32), axis=-1, kind="stable")[..., :top_k]
    wrong = rng.normal(scale=0.7, size=(horizon, *logits.shape))
    predicted = np.where(
        np.arange(n_layers)[:, None] > np.arange(horizon)[:, None, None, None],
        logits + wrong,
        np.nan,
    )
    meta = TraceMeta(
        source="synthetic",
        model=f"seeded routing {seed}",
        n_layers=n_layers,
        n_experts=n_experts,
        top_k=top_k,
        expert_bytes={"fp16": EXPERT_BYTES},
        expert_params=EXPERT_BYTES // 2,
        layer_bytes=3,
        token_bytes=2,
        prediction="the layer's logits with noise",
        horizon=horizon,
        weight_rule=RULE.name,
        weight_scale=RULE.scale,
    )
    n = n_tokens * n_layers
    rows = Rows(
        sequence=np.repeat(sequence, n_layers).astype(np.uint32),
        position=np.repeat(position, n_layers).astype(np.uint32),
        phase=np.repeat(np.where(position < 3, PROMPT, DECODE), n_layers).astype(np.uint8),
        token_id=np.repeat(rng.integers(0, VOCABULARY, n_tokens), n_layers).astype(np.uint32),
        layer=np.tile(np.arange(n_layers), n_tokens).astype(np.uint16),
        experts=experts.reshape(n, top_k).astype(np.uint16),
        weights=weights_by(RULE, logits, experts).reshape(n, top_k),
        router_logits=logits.reshape(n, n_experts),
        predicted=tuple(one.reshape(n, n_experts).astype(np.float16) for one in predicted),
    )
    with TemporaryDirectory(prefix="moesim-") as folder:
        with TraceWriter(Path(folder) / "trace.parquet", meta) as writer:
            writer.write(rows)
        return load_workload(
            open_trace(Path(folder) / "trace.parquet"),
            logits=True,
            predictions=True,
            token_ids=True,
            rows=True,
        )


def _logits(
    rng: np.random.Generator, n_tokens: int, n_layers: int, n_experts: int
) -> np.ndarray[tuple[int, ...], np.dtype[np.float16]]:
    """[n_tokens, n_layers, n_experts]: a bias an expert keeps, and what drifts from token to token,
    in eighths, so that some are equal."""
    bias = rng.normal(size=(n_layers, n_experts))
    drift = np.zeros((n_layers, n_experts))
    found = np.empty((n_tokens, n_layers, n_experts))
    for token in range(n_tokens):
        drift = 0.7 * drift + rng.normal(size=drift.shape)
        found[token] = bias + drift
    return (np.round(found * 8) / 8).astype(np.float16)
