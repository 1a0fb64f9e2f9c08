"""What the gates are to decide in a bench: routing as recorded, or drawn."""

from __future__ import annotations

import hashlib
import importlib.util
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from moepolicy import RoutingRule
from moepolicy.amounts import counted
from numpy.typing import NDArray

from moerun.errors import RunError

if TYPE_CHECKING:
    from moeroute import Rows, TraceMeta

    from moerun.store.index import StoreIndex

MIXTRAL = "mixtral-like"
UNIFORM = "uniform"
_SHOWING = 4096  # rows that show by which rule gates make weights
_SAMPLE_SEED = 0  # of the sample that moeroute.synthetic makes


@dataclass(frozen=True)
class ForcedRouting:
    """Decoded tokens' routing, T tokens in the order they were decoded.

    ids [T, L, K], weights float32[T, L, K], logits float16[T, L, E], predicted
    float16[h, T, L, E]: entry j is what was predicted for this layer j + 1 layers before, NaN
    where there is no such layer. ``sha256`` is of all of these.

    ``logits`` are None where the source has none, and so are ``token_ids`` int32[T];
    ``weight_rule`` is how the gates made the weights of their logits, None where by no rule that
    is known.
    """

    source: str
    n_experts: int
    ids: NDArray[np.int64]
    weights: NDArray[np.float32]
    logits: NDArray[np.float16] | None
    predicted: NDArray[np.float16]
    token_ids: NDArray[np.int32] | None = None
    weight_rule: RoutingRule | None = None

    @property
    def tokens(self) -> int:
        """Number of decoded tokens."""
        return len(self.ids)

    @property
    def horizon(self) -> int:
        """Number of layers ahead that predictions reach."""
        return len(self.predicted)

    @property
    def sha256(self) -> str:
        """Digest of all arrays, in hexadecimal."""
        digest = hashlib.sha256()
        for array in (self.ids, self.weights, self.logits, self.predicted):
            if array is None:
                continue
            digest.update(np.ascontiguousarray(array).tobytes())
        return digest.hexdigest()

    def cut(self, tokens: int, layers: int) -> ForcedRouting:
        """The same routing of the first ``tokens`` tokens and ``layers`` layers alone."""
        return replace(
            self,
            ids=self.ids[:tokens, :layers],
            weights=self.weights[:tokens, :layers],
            logits=None if self.logits is None else self.logits[:tokens, :layers],
            predicted=self.predicted[:, :tokens, :layers],
            token_ids=None if self.token_ids is None else self.token_ids[:tokens],
        )

    def counts(self) -> NDArray[np.int64]:
        """How often each expert is used: [L, E]."""
        layers, experts = self.ids.shape[1], self.n_experts
        keys = self.ids + np.arange(layers)[None, :, None] * experts
        return np.bincount(keys.ravel(), minlength=layers * experts).reshape(layers, experts)

    def write_trace(self, path: Path, index: StoreIndex) -> None:
        """One sequence of decoded tokens, as the simulator reads it."""
        from moeroute import TraceWriter

        writer = TraceWriter(path, _meta(self, index))
        try:
            writer.write(_rows(self))
            writer.close()
        except BaseException:
            writer.discard()
            raise


def choose_routing(
    layers: int, experts: int, top_k: int, *, of_layers: int | None = None
) -> tuple[str, str]:
    """The routing of a shape: the sample of the same experts, recorded before synthetic, and how
    it was found, as a line; ``uniform`` where no sample has them.

    A sample must have the shape's layers or more. One of ``of_layers`` layers, which are the whole
    model's where the shape is a part of it, stands first.
    """
    from moeroute import open_trace, sample_names

    of = f"{counted(layers, 'layer')}, top-{top_k} of {experts} experts"
    if importlib.util.find_spec("polars") is None:
        return UNIFORM, (
            "routing: uniform, drawn without locality: traces cannot be read without polars, which "
            "is not installed"
        )
    found = [(name, open_trace(name).meta) for name in sample_names()]
    fit = [
        (meta.n_layers != (of_layers or layers), meta.source == "synthetic", meta.n_layers, name)
        for name, meta in found
        if (meta.n_experts, meta.top_k) == (experts, top_k) and meta.n_layers >= layers
    ]
    if not fit:
        return UNIFORM, (
            f"routing: uniform, drawn without locality: no sample is of {of}; a recorded trace "
            "(--routing FILE) gives truer rates"
        )
    _, synthetic, has_layers, name = min(fit)
    kind = "synthetic" if synthetic else "recorded"
    more = f", of whose {has_layers} layers the first count" if has_layers > layers else ""
    return name, f"routing: the sample {name} ({kind}), of {of}{more}"


def load_routing(
    source: str, *, layers: int, experts: int, top_k: int, tokens: int
) -> ForcedRouting:
    """``tokens`` decoded tokens of a trace (a file or a sample's name), or drawn: ``uniform``.

    A trace may have more layers than are asked for. Raises RunError or TraceError where it has
    other experts, too few tokens, or lacks the columns.
    """
    if source == UNIFORM:
        return _uniform(tokens, layers, experts, top_k)
    found = _of_trace(source)
    _, has_layers, has_k = found.ids.shape
    if has_layers < layers or (found.n_experts, has_k) != (experts, top_k):
        same = has_layers >= layers and found.n_experts == experts
        raise RunError(
            f"routing '{source}' is of {has_layers} layers, top-{has_k} of {found.n_experts} "
            f"experts, the shape of {layers} layers, top-{top_k} of {experts}: "
            + (f"give --top-k {has_k}, or " if same else "give ")
            + f"--routing a trace of that shape, or '{UNIFORM}' (experts drawn without locality)"
        )
    if found.tokens < tokens:
        raise RunError(
            f"routing '{source}' has {found.tokens} decoded tokens, and warm-up and --tokens ask "
            f"for {tokens}: ask for fewer, or give a longer trace"
        )
    return found.cut(tokens, layers)


def _of_trace(source: str) -> ForcedRouting:
    try:
        import polars  # noqa: F401
        from moeroute import open_trace
    except ImportError as error:
        if source == MIXTRAL:
            from moeroute.mixtral import N_EXPERTS

            return _routing(source, N_EXPERTS, [*_mixtral_rows()], None)
        raise RunError(f"reading routing '{source}' needs polars: install it") from error
    trace = open_trace(source)
    if trace.meta.variable_top_k:
        raise RunError(
            f"routing '{source}': its tokens choose different numbers of experts, and the bench "
            "forces as many on each: give --routing another trace"
        )
    trace.require("weights", "moerun bench")
    meta = trace.meta
    named = meta.weight_rule and RoutingRule(meta.weight_rule, meta.weight_scale or 1.0)
    return _routing(source, meta.n_experts, [*trace.batches()], named or None)


def _mixtral_rows() -> Iterator[Rows]:
    """The rows of the sample: it is generated, and need not be read."""
    from moeroute.synthetic import SAMPLE_TOKENS, generate

    return generate(SAMPLE_TOKENS, _SAMPLE_SEED)


def _routing(
    source: str, n_experts: int, batches: list[Rows], rule: RoutingRule | None
) -> ForcedRouting:
    """``rule`` is what the source says of its gates' weights; None: what its rows show."""
    columns = [batch.columns() for batch in batches if len(batch)]
    rows = {name: np.concatenate([c[name] for c in columns]) for name in columns[0]}
    n_layers = int(rows["layer"].max()) + 1
    kept = _whole_decode_tokens(rows, n_layers)
    if not len(kept):
        raise RunError(f"routing '{source}' has no decoded tokens with all of their layers")

    def column(name: str) -> NDArray[Any]:
        taken: NDArray[Any] = rows[name][kept]
        return taken.reshape(-1, n_layers, taken.shape[1])

    ahead = [column(name) for name in sorted(rows) if name.startswith("predicted")]
    weights, ids = column("weights"), column("experts").astype(np.int64)
    logits = column("router_logits") if "router_logits" in rows else None
    token_ids = rows.get("token_id")
    if rule is None and logits is not None:
        rule = _shown_rule(logits, weights, ids)
    return ForcedRouting(
        source,
        n_experts,
        ids,
        weights,
        logits,
        np.stack(ahead) if ahead else np.empty((0, *ids.shape[:2], n_experts), np.float16),
        None if token_ids is None else token_ids[kept[::n_layers]].astype(np.int32),
        rule,
    )


def _shown_rule(
    logits: NDArray[Any], weights: NDArray[Any], ids: NDArray[Any]
) -> RoutingRule | None:
    from moeroute.weight_rules import detect_weight_rule

    some = (each.reshape(-1, each.shape[-1])[:_SHOWING] for each in (logits, weights, ids))
    found = detect_weight_rule(*some)
    return RoutingRule(found.name, found.scale) if found else None


def _whole_decode_tokens(rows: dict[str, NDArray[Any]], n_layers: int) -> NDArray[np.int64]:
    """The rows of decoded tokens that have every layer; rows are sorted by token and layer."""
    token = rows["sequence"].astype(np.int64) << 32 | rows["position"]
    _, first, counts = np.unique(token, return_index=True, return_counts=True)
    whole = (counts == n_layers) & (rows["phase"][first] == 1)
    kept: NDArray[np.int64] = first[whole][:, None] + np.arange(n_layers)
    return kept.ravel()


def _uniform(tokens: int, layers: int, experts: int, top_k: int) -> ForcedRouting:
    """Gates without locality or likes: the worst case of every cache."""
    rng = np.random.default_rng(0)
    logits = rng.standard_normal((tokens, layers, experts)).astype(np.float16)
    ids = np.argsort(-logits, axis=2, kind="stable")[:, :, :top_k]
    chosen = np.exp(np.take_along_axis(logits, ids, axis=2).astype(np.float32))
    ahead = logits.copy()  # a predictor that is always right
    ahead[:, 0] = np.nan
    weights = chosen / chosen.sum(axis=2, keepdims=True)
    return ForcedRouting(
        UNIFORM,
        experts,
        ids,
        weights.astype(np.float32),
        logits,
        ahead[None],
        weight_rule=RoutingRule("softmax-topk-renorm"),
    )


def _meta(routing: ForcedRouting, index: StoreIndex) -> TraceMeta:
    from moeroute import TraceMeta

    rule = routing.weight_rule
    return TraceMeta(
        source="imported",
        model=index.model,
        n_layers=routing.ids.shape[1],
        n_experts=routing.n_experts,
        top_k=routing.ids.shape[2],
        expert_bytes={index.precision: index.layout.record_bytes},
        expert_params=index.shape.n_weights,
        layer_bytes=index.layer_bytes,
        token_bytes=index.token_bytes,
        prediction="forced" if routing.horizon else None,
        horizon=routing.horizon,
        weight_rule=rule.name if rule else None,
        weight_scale=rule.scale if rule else None,
        notes={"routing": routing.source},
    )


def _rows(routing: ForcedRouting) -> Rows:
    from moeroute import DECODE, Rows

    tokens, layers, _ = routing.ids.shape
    ids = routing.token_ids
    position, layer = (axis.ravel() for axis in np.indices((tokens, layers)))

    def flat(values: NDArray[Any]) -> NDArray[Any]:
        return np.ascontiguousarray(values).reshape(tokens * layers, -1)

    return Rows(
        sequence=np.zeros(tokens * layers, np.uint32),
        position=position.astype(np.uint32),
        phase=np.full(tokens * layers, DECODE, np.uint8),
        token_id=None if ids is None else np.repeat(ids, layers).astype(np.uint32),
        layer=layer.astype(np.uint16),
        experts=flat(routing.ids).astype(np.uint16),
        weights=flat(routing.weights),
        router_logits=None if routing.logits is None else flat(routing.logits),
        predicted=tuple(flat(ahead) for ahead in routing.predicted),
    )
