"""What each layer's gate gives, brought to the session when it serves that layer's experts."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import nn

from moerun.live.session import Session
from moerun.offload.experts import Served
from moerun.offload.gate import GateOutput
from moerun.offload.gate_predictor import GatePredictor, find_routers


class SessionExperts:
    """A session as the provider of a model's experts.

    A model runs a layer's gate and then asks for the layer's experts, by two modules that know
    nothing of each other. This object holds what the gate gave from the one to the other.
    """

    def __init__(self, session: Session) -> None:
        self._session = session
        self._layer = -1  # whose gate has run and whose experts have not been asked for
        self._output = GateOutput()

    def gate_ran(self, layer: int, output: GateOutput) -> None:
        """The gate of ``layer`` has run: ``output`` is for the ``serve`` of this layer."""
        self._layer, self._output = layer, output

    def serve(self, layer: int, top_k_index: torch.Tensor, top_k_weights: torch.Tensor) -> Served:
        """Serve by the session. RuntimeError where the last gate to run was not ``layer``'s."""
        if layer != self._layer:
            self._session.raise_failure()  # the model of a closed run has lost its hooks
            raise RuntimeError(f"the experts of layer {layer} are asked for before its gate ran")
        output = self._output
        self._layer, self._output = -1, GateOutput()
        return self._session.serve(layer, top_k_index, top_k_weights, output)


class GateHooks:
    """Hooks on a model's gates, which tell its experts' provider what each layer's gate gives."""

    def __init__(
        self, model: nn.Module, experts: SessionExperts, predictor: GatePredictor | None
    ) -> None:
        """``predictor`` asks the later layers' gates; None: nobody reads predictions."""
        self._experts = experts
        self._predictor = predictor
        self._hooks = [
            router.register_forward_hook(partial(self._on_gate, layer))
            for layer, router in enumerate(find_routers(model))
        ]

    def close(self) -> None:
        """Remove the hooks from the model."""
        for hook in self._hooks:
            hook.remove()

    def _on_gate(self, layer: int, _router: Any, arguments: Any, output: Any) -> None:
        predictor = self._predictor
        predicted = predictor.predict(layer, arguments[0]) if predictor else None
        self._experts.gate_ran(layer, GateOutput(output[0], predicted))
