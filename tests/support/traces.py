"""Small routing traces written by hand."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from hypothesis import strategies as st
from moeroute import DECODE, PROMPT, Rows, TraceMeta, TraceWriter


def write_trace(
    path: Path,
    tokens: list[tuple[int, int, list[list[int]]]],
    n_experts: int,
    predicted: Any = None,
    logits: bool = False,
) -> Path:
    """A trace of (sequence, phase, experts of each layer) tokens; ``logits`` are any at all."""
    n_layers, top_k = len(tokens[0][2]), len(tokens[0][2][0])
    n = len(tokens) * n_layers
    meta = TraceMeta(
        source="recorded",
        model="test",
        n_layers=n_layers,
        n_experts=n_experts,
        top_k=top_k,
        expert_bytes={"fp16": 10},
        prediction="by hand" if predicted is not None else None,
        horizon=0 if predicted is None else 1,
    )
    position: dict[int, int] = {}
    where = []
    for sequence, _, _ in tokens:
        where.append(position.setdefault(sequence, 0))
        position[sequence] += 1
    rows = Rows(
        sequence=np.repeat([t[0] for t in tokens], n_layers).astype(np.uint32),
        position=np.repeat(where, n_layers).astype(np.uint32),
        phase=np.repeat([t[1] for t in tokens], n_layers).astype(np.uint8),
        token_id=np.repeat(np.arange(len(tokens)) * 7 % 50, n_layers).astype(np.uint32),
        layer=np.tile(np.arange(n_layers), len(tokens)).astype(np.uint16),
        experts=np.array([t[2] for t in tokens], np.uint16).reshape(n, top_k),
        weights=np.tile(np.linspace(0.6, 0.4, top_k, dtype=np.float32), (n, 1)),
        router_logits=np.random.default_rng(n).normal(size=(n, n_experts)).astype(np.float16)
        if logits
        else None,
        predicted=() if predicted is None else (np.asarray(predicted, np.float16),),
    )
    with TraceWriter(path, meta) as writer:
        writer.write(rows)
    return path


def decoded(*experts: list[list[int]]) -> list[tuple[int, int, list[list[int]]]]:
    return [(0, DECODE, layers) for layers in experts]


@st.composite
def traces(draw: st.DrawFn) -> tuple[Any, int, int]:
    """Tokens of a small model, with prompts, several sequences and repeated experts."""
    n_layers, n_experts = draw(st.integers(1, 3)), draw(st.integers(2, 5))
    top_k = draw(st.integers(1, 2))
    one = st.permutations(range(n_experts)).map(lambda order: list(order[:top_k]))
    tokens = []
    for sequence in range(draw(st.integers(1, 2))):
        n_prompt, n_decode = draw(st.integers(0, 3)), draw(st.integers(1, 4))
        for phase in [PROMPT] * n_prompt + [DECODE] * n_decode:
            tokens.append((sequence, phase, [draw(one) for _ in range(n_layers)]))
    logits = st.lists(st.integers(-1, 1).map(float), min_size=n_experts, max_size=n_experts)
    predicted = [
        draw(logits) if layer else [np.nan] * n_experts for _ in tokens for layer in range(n_layers)
    ]
    return (tokens, predicted), n_experts, draw(st.integers(0, n_experts))


def random_trace(
    path: Path,
    *,
    seed: int = 0,
    n_tokens: int = 30,
    n_layers: int = 2,
    n_experts: int = 4,
    top_k: int = 2,
) -> Path:
    """Decoded tokens routed at random."""
    rng = np.random.default_rng(seed)
    tokens = [
        [rng.permutation(n_experts)[:top_k].tolist() for _ in range(n_layers)]
        for _ in range(n_tokens)
    ]
    return write_trace(path, decoded(*tokens), n_experts)
