"""What the gates decide in a bench: recorded routing, put in place of what they say."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray

from moerun.errors import RunError
from moerun.live.gates import SessionExperts
from moerun.offload.gate import GateOutput
from moerun.offload.gate_predictor import GatePredictor, find_routers

if TYPE_CHECKING:
    from moeroute import Rows, TraceMeta

    from moerun.store.index import StoreIndex

MIXTRAL = "mixtral-like"
UNIFORM = "uniform"
_SAMPLE_SEED = 0  # of the sample that moeroute.synthetic makes


@dataclass(frozen=True)
class ForcedRouting:
    """Decoded tokens' routing, T tokens in the order they were decoded.

    ids [T, L, K], weights float32[T, L, K], logits float16[T, L, E], predicted
    float16[h, T, L, E]: entry j is what was predicted for this layer j + 1 layers before, NaN
    where there is no such layer. ``sha256`` is of all of these.
    """

    source: str
    ids: NDArray[np.int64]
    weights: NDArray[np.float32]
    logits: NDArray[np.float16]
    predicted: NDArray[np.float16]

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
            digest.update(np.ascontiguousarray(array).tobytes())
        return digest.hexdigest()

    def cut(self, tokens: int, layers: int) -> ForcedRouting:
        """The same routing of the first ``tokens`` tokens and ``layers`` layers alone."""
        return ForcedRouting(
            self.source,
            self.ids[:tokens, :layers],
            self.weights[:tokens, :layers],
            self.logits[:tokens, :layers],
            self.predicted[:, :tokens, :layers],
        )

    def counts(self) -> NDArray[np.int64]:
        """How often each expert is used: [L, E]."""
        _, layers, experts = self.logits.shape
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
    _, has_layers, has_experts = found.logits.shape
    if has_layers < layers or (has_experts, found.ids.shape[2]) != (experts, top_k):
        raise RunError(
            f"routing '{source}' is of {has_layers} layers, top-{found.ids.shape[2]} of "
            f"{has_experts} experts, the shape of {layers} layers, top-{top_k} of {experts}: give "
            f"--routing a trace of that shape, or '{UNIFORM}' (experts drawn without locality)"
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
            return _routing(source, [*_mixtral_rows()])
        raise RunError(f"reading routing '{source}' needs polars: install it") from error
    trace = open_trace(source)
    for column in ("weights", "router_logits"):
        trace.require(column, "moerun bench")
    return _routing(source, [*trace.batches()])


def _mixtral_rows() -> Iterator[Rows]:
    """The rows of the sample: it is generated, and need not be read."""
    from moeroute.synthetic import SAMPLE_TOKENS, generate

    return generate(SAMPLE_TOKENS, _SAMPLE_SEED)


def _routing(source: str, batches: list[Rows]) -> ForcedRouting:
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
    logits = column("router_logits")
    return ForcedRouting(
        source,
        column("experts").astype(np.int64),
        column("weights"),
        logits,
        np.stack(ahead) if ahead else np.empty((0, *logits.shape), np.float16),
    )


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
    return ForcedRouting(UNIFORM, ids, weights.astype(np.float32), logits, ahead[None])


class ForcedGates:
    """Hooks on a model's gates that let routing decide, one token a pass.

    The gates, and a policy's predictors, still compute what they would: it costs what it costs.
    """

    def __init__(self, model: Any, routing: ForcedRouting) -> None:
        """Raises RunError where the model's gates are not the routing's."""
        self.routing = routing
        self.experts: SessionExperts | None = None
        self.horizon = 0  # how many layers ahead the policy reads predictions
        self._routers = find_routers(model)
        self._token = 0
        self._tensors: tuple[torch.Tensor, ...] = ()
        self._model = model
        self._predictors: dict[int, GatePredictor] = {}  # by how many layers ahead they look
        self._hooks = [
            router.register_forward_hook(partial(self._decide, layer))
            for layer, router in enumerate(self._routers)
        ]

    def start(self, experts: SessionExperts | None, *, horizon: int = 0) -> None:
        """The next pass is the routing's first token; ``experts`` are told of the logits, and of
        ``horizon`` predictions."""
        self.experts, self.horizon, self._token = experts, horizon, 0
        if horizon and horizon not in self._predictors:
            self._predictors[horizon] = GatePredictor(self._model, horizon)

    def close(self) -> None:
        """Remove the hooks from the gates."""
        for hook in self._hooks:
            hook.remove()
        for predictor in self._predictors.values():
            predictor.close()

    @torch.no_grad()
    def _decide(self, layer: int, _router: Any, arguments: Any, output: Any) -> Any:
        logits, weights, ids = self._forced(output)
        if self.horizon:
            self._predictors[self.horizon].predict(layer, arguments[0])
        token = slice(self._token, self._token + 1)
        if self.experts is not None:
            ahead = self._ahead[: self.horizon, token, layer] if self.horizon else None
            self.experts.gate_ran(layer, GateOutput(logits[token, layer], ahead))
        if layer == len(self._routers) - 1:
            self._token += 1
        return logits[token, layer], weights[token, layer], ids[token, layer]

    def _forced(self, output: Any) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Logits, weights and ids of all tokens, in the types the gate itself gives."""
        if not self._tensors:
            arrays = self.routing.logits, self.routing.weights, self.routing.ids
            self._tensors = tuple(
                torch.from_numpy(np.ascontiguousarray(array)).to(like)
                for array, like in zip(arrays, output, strict=True)
            )
            self._ahead = _by_predicting_layer(self.routing).to(output[0].device)
        logits, weights, ids = self._tensors
        return logits, weights, ids


def _by_predicting_layer(routing: ForcedRouting) -> torch.Tensor:
    """float16[h, T, L, E]: entry j at layer l is what layer l predicts of layer l + 1 + j."""
    ahead = np.full_like(routing.predicted, np.nan)
    for j, predicted in enumerate(routing.predicted):
        ahead[j, :, : -(j + 1)] = predicted[:, j + 1 :]
    return torch.from_numpy(ahead)


def _meta(routing: ForcedRouting, index: StoreIndex) -> TraceMeta:
    from moeroute import TraceMeta

    _, layers, experts = routing.logits.shape
    return TraceMeta(
        source="imported",
        model=index.model,
        n_layers=layers,
        n_experts=experts,
        top_k=routing.ids.shape[2],
        expert_bytes={index.precision: index.layout.record_bytes},
        expert_params=index.shape.n_weights,
        layer_bytes=index.layer_bytes,
        token_bytes=index.token_bytes,
        prediction="forced" if routing.horizon else None,
        horizon=routing.horizon,
        notes={"routing": routing.source},
    )


def _rows(routing: ForcedRouting) -> Rows:
    from moeroute import DECODE, Rows

    tokens, layers, _ = routing.ids.shape
    position, layer = (axis.ravel() for axis in np.indices((tokens, layers)))

    def flat(values: NDArray[Any]) -> NDArray[Any]:
        return np.ascontiguousarray(values).reshape(tokens * layers, -1)

    return Rows(
        sequence=np.zeros(tokens * layers, np.uint32),
        position=position.astype(np.uint32),
        phase=np.full(tokens * layers, DECODE, np.uint8),
        token_id=None,
        layer=layer.astype(np.uint16),
        experts=flat(routing.ids).astype(np.uint16),
        weights=flat(routing.weights),
        router_logits=flat(routing.logits),
        predicted=tuple(flat(ahead) for ahead in routing.predicted),
    )
