"""A seeded generator of routing like Mixtral-8x7B's, for machines that cannot run the model.

The gate's logits are the sum of four parts: a bias that an expert keeps, a component that holds
through a few tokens, a component that drifts over tens of tokens, and noise. The constants were
fitted to the published statistics (`moeroute.mixtral`). Layers are generated independently, so the
trace says nothing about policies that predict one layer's experts from another's.

This command makes the sample `mixtral-like` in traces/moeroute/samples:

    python -m moeroute.synthetic --tokens 2048 --seed 0 --out mixtral-like.parquet
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Annotated

import numpy as np
import typer
from numpy.typing import NDArray

from moeroute import mixtral
from moeroute.mixtral import N_EXPERTS, N_LAYERS, TOP_K
from moeroute.schema import DECODE, Rows, TraceError, TraceMeta
from moeroute.trace import Trace, open_trace
from moeroute.writer import TraceWriter

NAMES = ("mixtral-8x7b",)
HORIZON = 3
SEQUENCE_TOKENS = 128  # then everything but the biases starts anew
SAMPLE_TOKENS = 2048

Floats = NDArray[np.float64]  # [tokens, L, E] unless said otherwise


def write_synthetic(
    out: str | Path, *, name: str = NAMES[0], tokens: int = SAMPLE_TOKENS, seed: int = 0
) -> Trace:
    """Generate `tokens` decode tokens to `out` and open the trace.

    The same seed gives the same tokens, and a shorter trace is the start of a longer one. Raises
    TraceError for an unknown name or fewer than one token.
    """
    if name not in NAMES:
        raise TraceError(f"no synthetic model {name!r}; there are: {', '.join(NAMES)}")
    if tokens < 1 or seed < 0:
        raise TraceError(f"cannot generate {tokens} tokens from seed {seed}: 1, and 0, at least")
    writer = TraceWriter(out, _meta(name, seed))
    try:
        for rows in generate(tokens, seed):
            writer.write(rows)
        writer.close()
    except BaseException:
        writer.discard()
        raise
    return open_trace(Path(out))


def generate(tokens: int, seed: int) -> Iterator[Rows]:
    """Rows of `tokens` tokens, one sequence at a time."""
    for sequence in range(-(-tokens // SEQUENCE_TOKENS)):
        rng = np.random.default_rng((seed, sequence))
        latent = _latent_logits(rng)
        predicted = _predict(rng, latent)
        n = min(SEQUENCE_TOKENS, tokens - sequence * SEQUENCE_TOKENS)
        yield _rows(sequence, latent[:n], [p[:n] for p in predicted])


def _meta(name: str, seed: int) -> TraceMeta:
    return TraceMeta(
        source="synthetic",
        model=name,
        n_layers=N_LAYERS,
        n_experts=N_EXPERTS,
        top_k=TOP_K,
        expert_bytes=mixtral.expert_bytes(),
        layer_bytes=mixtral.dense_bytes().layer_bytes,
        token_bytes=mixtral.dense_bytes().token_bytes,
        prediction="synthetic: the layer's logits with noise to the published recall",
        horizon=HORIZON,
        seed=seed,
        packages={"numpy": np.__version__},
        notes={
            "caution": "made to have the published statistics of Mixtral-8x7B's routing; layers "
            "are independent of one another, and there are no tokens behind it",
            "layer_bytes": "attention in 4 bit, gate and norms in 16 bit, as in the base paper",
        },
    )


def _popularity_bias() -> Floats:
    """[L, E] The biases: part of the model, so the same for every seed.

    Normal quantiles, dealt to the experts of each layer; their scale spreads over the layers for
    the mean hottest share and the entropy, and one layer has the largest hottest share.
    """
    quantiles = np.array([-1.424, -0.853, -0.473, -0.153, 0.153, 0.473, 0.853, 1.424])
    scale = np.linspace(0.12, 0.24, N_LAYERS)[np.arange(N_LAYERS) * 13 % N_LAYERS]
    scale[20] = 0.37
    rng = np.random.default_rng(8)
    dealt = np.stack([rng.permutation(quantiles) for _ in range(N_LAYERS)])
    bias: Floats = scale[:, None] * dealt
    return bias


def _layer_locality() -> Floats:
    """[L] Lag-1 locality to aim at: the published least and most local layer, and a rise and fall
    between them that gives the published mean.
    """
    rise = 0.260 + 0.189 * (np.arange(10) / 9) ** 0.6
    return np.concatenate([rise, np.linspace(0.435, 0.318, N_LAYERS - 10)])


# Share of a layer's variance that persists, as a function of the locality wanted: fitted together
# with what follows to locality by lag, repeats, and the hit ratios of LRU and both Beladys.
_PERSISTING = 0.71
_BRIEF = 0.90  # of what persists: the part that holds through a few tokens
_BRIEF_RENEWED = 0.66  # chance a token renews it altogether, for all layers at once: two experts
_BRIEF_CARRY = 0.875  # repeat together more often than apart; what it keeps otherwise
_SLOW_CARRY = 0.975
_NOISE_SPREAD = 0.25  # of the noise's log-scale: some tokens are plainer than others


def _latent_logits(rng: np.random.Generator) -> Floats:
    """The latent process of one sequence; a layer's variance is about 1."""
    shape = (SEQUENCE_TOKENS, N_LAYERS, N_EXPERTS)
    brief, slow, noise = rng.standard_normal((3, *shape))
    spread = rng.standard_normal((SEQUENCE_TOKENS, N_LAYERS, 1))
    renewed = rng.random(SEQUENCE_TOKENS) < _BRIEF_RENEWED
    _carry(brief, np.where(renewed, 0.0, _BRIEF_CARRY))
    _carry(slow, np.full(SEQUENCE_TOKENS, _SLOW_CARRY))
    over_base = np.maximum(_layer_locality() - 0.260, 0.0) / 0.116
    share = np.minimum(_PERSISTING * over_base**0.75, 0.97)[:, None]
    kept = np.sqrt(_BRIEF) * brief + np.sqrt(1 - _BRIEF) * slow
    noise *= np.exp(_NOISE_SPREAD * spread - _NOISE_SPREAD**2)
    latent: Floats = _popularity_bias() + np.sqrt(share) * kept + np.sqrt(1 - share) * noise
    return latent


def _carry(values: Floats, carry: NDArray[np.float64]) -> None:
    """Turn unit normals into an autoregression over tokens, in place, keeping the variance."""
    for token in range(1, len(values)):
        values[token] *= np.sqrt(1 - carry[token] ** 2)
        values[token] += carry[token] * values[token - 1]


# Noise on a prediction -> recall of two experts, measured on this process.
_RECALL_BY_NOISE = (
    (0.05, 0.968),
    (0.10, 0.938),
    (0.15, 0.908),
    (0.20, 0.881),
    (0.25, 0.854),
    (0.30, 0.828),
    (0.35, 0.804),
    (0.40, 0.782),
    (0.50, 0.739),
    (0.60, 0.701),
    (0.70, 0.666),
    (0.80, 0.636),
    (1.00, 0.583),
    (1.30, 0.524),
)
# Variance that each further layer back adds, so that top-1 recall comes to HOBBIT's figures.
_NOISE_VARIANCE_AHEAD = (0.0, 0.095, 0.035)


def _layer_recall() -> Floats:
    """[L] Recall to aim at one layer ahead: published for layers 1 to 4; then within the published
    range and with the published mean.
    """
    layers = np.arange(N_LAYERS)
    late = np.interp(layers, (4, 12, 24, 31), (0.866, 0.94, 0.872, 0.80))
    early = mixtral.RECALL_OF_LAYER
    return np.array([early.get(layer, value) for layer, value in enumerate(late)])


def _predict(rng: np.random.Generator, latent: Floats) -> list[Floats]:
    """Predictions 1..HORIZON layers ahead: ever more of the same noise, the scale kept."""
    noise_of, recalls = np.array(_RECALL_BY_NOISE).T
    variance = np.interp(-_layer_recall(), -recalls, noise_of)[:, None] ** 2  # [L, 1]
    noise = np.sqrt(variance) * rng.standard_normal(latent.shape)
    predicted = []
    for more in _NOISE_VARIANCE_AHEAD:
        noise = noise + np.sqrt(more) * rng.standard_normal(latent.shape)
        variance = variance + more
        predicted.append((latent + noise) / np.sqrt(1 + variance))
    return predicted


def _to_logits(latent: Floats) -> NDArray[np.float16]:
    """The gate's logits. The soft cap gives the published gate weights: without it too many
    top-1 weights are beyond 0.9. Steps of 1/64 are what a bf16 gate has.
    """
    return (np.round(64 * 5.75 * np.tanh(latent / 2.5)) / 64).astype(np.float16)


def _rows(sequence: int, latent: Floats, predicted: list[Floats]) -> Rows:
    position, layer = (axis.ravel() for axis in np.indices(latent.shape[:2]))
    logits = _to_logits(latent).reshape(-1, N_EXPERTS)
    experts = np.argsort(-logits, axis=1, kind="stable")[:, :TOP_K]
    chosen = np.exp(np.take_along_axis(logits, experts, axis=1).astype(np.float64))
    known = []
    for j, ahead in enumerate(predicted):
        values = _to_logits(ahead)
        values[:, : j + 1] = np.nan  # no layer that far back
        known.append(values.reshape(-1, N_EXPERTS))
    return Rows(
        sequence=np.full(len(layer), sequence, dtype=np.uint32),
        position=position.astype(np.uint32),
        phase=np.full(len(layer), DECODE, dtype=np.uint8),
        token_id=None,
        layer=layer.astype(np.uint16),
        experts=experts.astype(np.uint16),
        weights=(chosen / chosen.sum(axis=1, keepdims=True)).astype(np.float32),
        router_logits=logits,
        predicted=tuple(known),
    )


def _command(
    out: Annotated[Path, typer.Option(help="Trace to write (Parquet).")],
    name: Annotated[str, typer.Option(help="What to imitate.")] = NAMES[0],
    tokens: Annotated[int, typer.Option(min=1, help="Decode tokens.")] = SAMPLE_TOKENS,
    seed: Annotated[int, typer.Option(min=0, help="Seed; equal seeds, equal traces.")] = 0,
    force: Annotated[bool, typer.Option("--force", help="Replace a file at --out.")] = False,
) -> None:
    """Generate a synthetic trace and print its statistics next to the published statistics."""
    try:
        if out.exists() and not force:
            size = out.stat().st_size
            raise TraceError(f"{out} exists already, {size:,} bytes: --force replaces it")
        trace = write_synthetic(out, name=name, tokens=tokens, seed=seed)
    except (TraceError, OSError) as error:
        typer.echo(f"error: {error}", err=True)
        raise typer.Exit(1) from None
    typer.echo(trace.describe(), err=True)
    typer.echo(f"{'statistic':28} {'trace':>8} {'published':>10}")
    for row in mixtral.compare_with_published(trace):
        typer.echo(f"{row.name:28} {row.measured:8.3f} {row.published:10.3f}")


if __name__ == "__main__":
    typer.run(_command)
