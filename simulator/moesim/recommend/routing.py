"""Routing of any shape, generated, for models that no trace is of.

An expert's logit is the sum of a bias that stays, a part that is carried from token to token, and
noise. The carried part is set so that an expert is among the last token's as often as published for
models of so many experts: 0.376 of Mixtral-8x7B's (8 experts, top-2), 0.446 of gpt-oss-20b's (32,
top-4), 0.380 of Qwen3-30B-A3B's (128, top-6 of its 8). Layers are independent of one another, and
there are no tokens behind them.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
from moeroute import Trace, open_trace
from moeroute.models import ModelShape
from moeroute.schema import DECODE, Rows, TraceMeta
from moeroute.writer import TraceWriter
from numpy.typing import NDArray

HORIZON = 3
BIAS = 0.25  # spread of the biases, of logits that spread by 1
PREDICTION_NOISE = (0.3, 0.43, 0.47)  # 1, 2, 3 layers ahead, as in moeroute.synthetic
# Of what is above chance, the share that is published: by the number of experts.
_EXPERTS, _ABOVE_CHANCE = (8, 32, 128), (0.168, 0.367, 0.349)
_TRIAL_TOKENS, _TRIALS = 2000, 12

Floats = NDArray[np.float64]


def locality_of(n_experts: int, top_k: int) -> float:
    """P(an expert is among those of the token before) to aim at."""
    chance = top_k / n_experts
    above = float(np.interp(np.log2(n_experts), np.log2(_EXPERTS), _ABOVE_CHANCE))
    return chance + above * (1 - chance)


def write_routing(path: Path, shape: ModelShape, *, tokens: int, seed: int = 0) -> Trace:
    """Generate ``tokens`` decoded tokens of a model's shape to ``path``; the same seed gives the
    same tokens."""
    carried = _carried_share(shape.n_experts, shape.top_k)
    dense = shape.dense()
    meta = TraceMeta(
        source="synthetic",
        model=shape.name,
        n_layers=shape.n_layers,
        n_experts=shape.n_experts,
        top_k=shape.top_k,
        n_shared_experts=shape.n_shared_experts,
        expert_bytes=shape.expert_bytes(),
        expert_params=shape.expert_params,
        layer_bytes=dense.layer_bytes,
        token_bytes=dense.token_bytes,
        dense_precision=shape.dense_label(),
        prediction="synthetic: the layer's logits with noise",
        horizon=HORIZON,
        seed=seed,
    )
    rng = np.random.default_rng(seed)
    latent = _latent(rng, (tokens, shape.n_layers, shape.n_experts), carried)
    writer = TraceWriter(path, meta)
    try:
        writer.write(_rows(rng, latent, shape.top_k))
        writer.close()
    except BaseException:
        writer.discard()
        raise
    return open_trace(path)


def _carried_share(n_experts: int, top_k: int) -> float:
    """The share of the variance that is carried for the locality aimed at, by bisection."""
    wanted, low, high = locality_of(n_experts, top_k), 0.0, 0.999
    for _ in range(_TRIALS):
        middle = (low + high) / 2
        rng = np.random.default_rng(1)
        latent = _latent(rng, (_TRIAL_TOKENS, 1, n_experts), middle)[:, 0]
        chosen = np.zeros(latent.shape, np.bool_)
        np.put_along_axis(chosen, np.argsort(-latent, axis=1)[:, :top_k], True, axis=1)
        found = (chosen[1:] & chosen[:-1]).sum() / chosen[1:].sum()
        low, high = (middle, high) if found < wanted else (low, middle)
    return (low + high) / 2


def _latent(rng: np.random.Generator, shape: tuple[int, int, int], carried: float) -> Floats:
    """[tokens, L, E] The logits before they are rounded, of a variance of about 1."""
    tokens, *layer = shape
    bias = BIAS * rng.standard_normal(layer)
    found = np.empty(shape)
    state = rng.standard_normal(layer)
    for token in range(tokens):
        state = np.sqrt(carried) * state + np.sqrt(1 - carried) * rng.standard_normal(layer)
        found[token] = bias + state
    return found


def _rows(rng: np.random.Generator, latent: Floats, top_k: int) -> Rows:
    tokens, n_layers, n_experts = latent.shape
    position, layer = (axis.ravel() for axis in np.indices((tokens, n_layers)))
    logits = latent.astype(np.float16).reshape(-1, n_experts)
    experts = np.argsort(-logits, axis=1, kind="stable")[:, :top_k]
    chosen = np.exp(np.take_along_axis(logits, experts, axis=1).astype(np.float64))
    predicted = []
    for ahead, noise in enumerate(PREDICTION_NOISE):
        values = (latent + noise * rng.standard_normal(latent.shape)).astype(np.float16)
        values[:, : ahead + 1] = np.nan  # no layer is that far before
        predicted.append(values.reshape(-1, n_experts))
    return Rows(
        sequence=np.zeros(len(layer), np.uint32),
        position=position.astype(np.uint32),
        phase=np.full(len(layer), DECODE, np.uint8),
        token_id=None,
        layer=layer.astype(np.uint16),
        experts=experts.astype(np.uint16),
        weights=(chosen / chosen.sum(axis=1, keepdims=True)).astype(np.float32),
        router_logits=logits,
        predicted=tuple(predicted),
    )
