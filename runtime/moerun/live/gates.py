"""What each layer's gate gives, brought to the session when it serves that layer's experts."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from moepolicy import NO_TOKEN_IDS
from torch import nn

from moerun.live.session import NOTHING_ASKED, Session
from moerun.live.step import PassStart
from moerun.offload.experts import Served
from moerun.offload.gate import GateOutput, logits_reader
from moerun.offload.gate_predictor import GatePredictor, find_routers


class SessionExperts:
    """A session as the provider of a model's experts.

    A model runs a layer's gate and then asks for the layer's experts, by two modules that know
    nothing of each other. This object holds what the gate gave from the one to the other.
    """

    def __init__(self, session: Session) -> None:
        self._session = session
        self._layer = -1  # whose gate has run and whose experts have not been asked for
        self._output = NOTHING_ASKED

    def pass_begins(self, ids: torch.Tensor | None, begins_sequence: bool) -> None:
        """A forward pass over ``ids`` [sequences, tokens] begins; None: over something else.
        ``begins_sequence`` counts where nobody has said whose tokens these are."""
        texts = self._session.texts
        if texts.rows:
            begins_sequence = texts.begins_sequence
        token_ids = NO_TOKEN_IDS
        if ids is not None and self._session.reads_token_ids:
            token_ids = ids.reshape(-1).to("cpu", torch.int32).numpy()
        self._session.begin_pass(PassStart(token_ids, begins_sequence))

    def wants_predictions(self, layer: int) -> bool:
        """Whether the later gates are to be asked at this step of ``layer``."""
        return self._session.wants_predictions(layer)

    def pass_ended(self, tokens: int) -> None:
        """The pass over so many tokens of each sequence is complete."""
        self._session.texts.passed(tokens)

    def gate_ran(self, layer: int, output: GateOutput) -> None:
        """The gate of ``layer`` has run: ``output`` is for the ``serve`` of this layer."""
        self._layer, self._output = layer, output

    def serve(self, layer: int, top_k_index: torch.Tensor, top_k_weights: torch.Tensor) -> Served:
        """Serve by the session. RuntimeError where the last gate to run was not ``layer``'s."""
        return self._session.serve(layer, top_k_index, top_k_weights, self.take(layer))

    def take(self, layer: int) -> GateOutput:
        """What the gate of ``layer`` gave, once. RuntimeError where it was not the last to run."""
        if layer != self._layer:
            self._session.raise_failure()  # the model of a closed run has lost its hooks
            raise RuntimeError(f"the experts of layer {layer} are asked for before its gate ran")
        output = self._output
        self._layer, self._output = -1, NOTHING_ASKED
        return output


class GateHooks:
    """Hooks on a model's gates, which tell its experts' provider what each layer's gate gives."""

    def __init__(
        self, model: nn.Module, experts: SessionExperts, predictor: GatePredictor | None
    ) -> None:
        """``predictor`` asks the later layers' gates; None: nobody reads predictions."""
        self._experts = experts
        self._predictor = predictor
        self._logits = logits_reader(model)
        self._hooks = [
            router.register_forward_hook(partial(self._on_gate, layer))
            for layer, router in enumerate(find_routers(model))
        ]
        self._hooks += [
            model.register_forward_pre_hook(self._on_pass, with_kwargs=True),
            model.register_forward_hook(self._on_end, with_kwargs=True),
        ]

    def close(self) -> None:
        """Remove the hooks from the model."""
        for hook in self._hooks:
            hook.remove()

    def _on_pass(self, _model: Any, arguments: tuple[Any, ...], keywords: dict[str, Any]) -> None:
        before = keywords.get("past_key_values")
        begins = before is None or not before.get_seq_length()
        self._experts.pass_begins(_ids(arguments, keywords), begins)

    def _on_end(
        self, _model: Any, arguments: tuple[Any, ...], keywords: dict[str, Any], _output: Any
    ) -> None:
        ids = _ids(arguments, keywords)
        self._experts.pass_ended(0 if ids is None else ids.shape[-1])

    def _on_gate(self, layer: int, _router: Any, arguments: Any, output: Any) -> None:
        predictor, predicted = self._predictor, None
        if predictor and self._experts.wants_predictions(layer):
            predicted = predictor.predict(layer, arguments[0])
        self._experts.gate_ran(layer, GateOutput(self._logits(output), predicted))


def _ids(arguments: tuple[Any, ...], keywords: dict[str, Any]) -> Any:
    """The token ids that a model is called with; None where it is called with none."""
    return keywords.get("input_ids", arguments[0] if arguments else None)
