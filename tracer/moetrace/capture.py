"""Hooks on a stock model's gates that turn each forward pass into trace columns."""

from __future__ import annotations

from contextlib import ExitStack
from types import TracebackType
from typing import Any, NamedTuple, Self

import numpy as np
import torch
from moerun.errors import RunError
from moerun.offload.gate import choice_reader, logits_reader
from moerun.offload.gate_predictor import GatePredictor, find_routers
from numpy.typing import NDArray
from torch import Tensor, nn


class Routing(NamedTuple):
    """What all gates decided for T tokens; layers count mixture-of-experts layers only."""

    experts: NDArray[np.uint16]  # [T, L, K] by weight descending
    weights: NDArray[np.float32]  # [T, L, K] as applied
    router_logits: NDArray[np.float16]  # [T, L, E]
    input_norm: NDArray[np.float32]  # [T, L]
    predicted: tuple[NDArray[np.float16], ...]  # h times [T, L, E], NaN where there is none


class RoutingCapture:
    """A context manager under which forward passes of `model` leave their routing for `take`.

    `horizon` 0 records no predictions; `prediction` is a method of moerun.offload.gate_predictor,
    None the default one. What the gates give stays on the model's device until taken.
    """

    def __init__(self, model: nn.Module, horizon: int, prediction: str | None = None) -> None:
        self.routers = find_routers(model)
        self._logits, self._choice = logits_reader(model), choice_reader(model)
        self.horizon = horizon
        self.predictor = GatePredictor(model, horizon, prediction) if horizon else None
        self._outputs: list[tuple[Tensor, Tensor, Tensor]] = []
        self._norms: list[Tensor] = []
        self._predicted: list[Tensor] = []
        self._cleanup = ExitStack()

    def __enter__(self) -> Self:
        for router in self.routers:
            handle = router.register_forward_hook(self._keep)
            self._cleanup.callback(handle.remove)
        if self.predictor is not None:
            self._cleanup.callback(self.predictor.close)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._cleanup.close()

    def take(self, wanted: Tensor | None = None) -> Routing:
        """The routing of the forward pass since the last call, of the tokens `wanted` [T] marks."""
        if len(self._outputs) != len(self.routers):
            raise RunError(
                f"the forward pass ran {len(self._outputs)} of the model's "
                f"{len(self.routers)} gates: such a model cannot be recorded"
            )
        weights = torch.stack([weights for _, weights, _ in self._outputs], 1).float()
        ids = torch.stack([ids for *_, ids in self._outputs], 1)
        logits = torch.stack([logits for logits, *_ in self._outputs], 1).half()
        norms = torch.stack(self._norms, 1)
        predicted = self._by_row(logits)
        self.reset()
        if wanted is not None:
            weights, ids, logits, norms = (t[wanted] for t in (weights, ids, logits, norms))
            predicted = predicted[:, wanted]
        if bool((weights[..., 1:] > weights[..., :-1]).any()):  # some families do not sort
            order = weights.argsort(dim=-1, descending=True, stable=True)
            weights, ids = weights.gather(-1, order), ids.gather(-1, order)
        return Routing(
            ids.cpu().numpy().astype(np.uint16),
            weights.cpu().numpy(),
            logits.cpu().numpy(),
            norms.cpu().numpy(),
            tuple(predicted.cpu().numpy()),
        )

    def reset(self) -> None:
        """Forget what a forward pass that did not end has left."""
        self._outputs, self._norms, self._predicted = [], [], []

    @property
    def device(self) -> torch.device:
        """Where the gates' outputs are."""
        return self._outputs[0][0].device

    def _keep(self, router: nn.Module, arguments: tuple[Any, ...], output: Any) -> None:
        try:
            weights, ids = self._choice(output)
            logits, weights, ids = (p.detach() for p in (self._logits(output), weights, ids))
        except (TypeError, ValueError, AttributeError, IndexError) as error:
            raise RunError(
                f"{type(router).__name__} does not give (logits, weights, experts): "
                "its family cannot be recorded"
            ) from error
        hidden = arguments[0].detach().reshape(-1, arguments[0].shape[-1])
        layer = len(self._outputs) % len(self.routers)
        if self.predictor is not None:
            self._predicted.append(self.predictor.predict(layer, hidden))
        self._norms.append(torch.linalg.vector_norm(hidden, dim=-1, dtype=torch.float32))
        self._outputs.append((logits, weights, ids))

    def _by_row(self, logits: Tensor) -> Tensor:
        """Predictions [h, T, L, E] on the layer they are for, of a shape with `logits`."""
        n_layers = len(self.routers)
        rows = logits.new_full((self.horizon, *logits.shape), float("nan"))
        for layer, predicted in enumerate(self._predicted):
            for ahead in range(1, min(self.horizon, n_layers - 1 - layer) + 1):
                rows[ahead - 1, :, layer + ahead] = predicted[ahead - 1]
        return rows
