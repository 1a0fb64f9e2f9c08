"""Gates that decide as routing says, one token a pass: recorded routing in place of their own."""

from __future__ import annotations

from functools import partial
from typing import Any

import numpy as np
import torch

from moerun.bench.routing import ForcedRouting
from moerun.checkpoint.families import family_of_model
from moerun.errors import RunError
from moerun.live.gates import SessionExperts
from moerun.offload.gate import GateOutput
from moerun.offload.gate_predictor import GatePredictor, find_routers


class ForcedGates:
    """Hooks on a model's gates that let routing decide, one token a pass.

    The gates, and a policy's predictors, still compute what they would: it costs what it costs.
    """

    def __init__(self, model: Any, routing: ForcedRouting) -> None:
        """Raises RunError where the model's gates are not the routing's, or give no choice that
        could be replaced."""
        family = family_of_model(model)
        if family is not None and family.gate_gives == "scores":
            raise RunError(
                f"the gates of {family.model_type} give scores alone, so no routing can be forced "
                "on them: take a shape of another family"
            )
        self.routing = routing
        self.experts: SessionExperts | None = None
        self.horizon = 0  # how many layers ahead the policy reads predictions
        self._routers = find_routers(model)
        self._token = 0
        self._tensors: tuple[torch.Tensor, ...] = ()
        self._recorded: torch.Tensor | None = None
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
        if layer == 0 and self.experts is not None:
            self.experts.pass_begins(self._token_id(), begins_sequence=self._token == 0)
        asked = bool(self.horizon)
        if asked and self.experts is not None:
            asked = self.experts.wants_predictions(layer)
        if asked:
            self._predictors[self.horizon].predict(layer, arguments[0])
        token = slice(self._token, self._token + 1)
        if self.experts is not None:
            ahead = self._ahead[: self.horizon, token, layer] if asked else None
            recorded = None if self._recorded is None else self._recorded[token, layer]
            self.experts.gate_ran(layer, GateOutput(recorded, ahead))
        if layer == len(self._routers) - 1:
            self._token += 1
        return logits[token, layer], weights[token, layer], ids[token, layer]

    def _token_id(self) -> torch.Tensor | None:
        """The id of the token whose pass it is, int32[1, 1]; None where the routing has none."""
        ids = self.routing.token_ids
        return None if ids is None else torch.from_numpy(ids[None, self._token : self._token + 1])

    def _forced(self, output: Any) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Logits, weights and ids of all tokens, in the types the gate itself gives."""
        if not self._tensors:
            routing = self.routing
            said = routing.logits
            if said is None:  # weights and ids decide: what computes experts reads no logits
                said = np.zeros((*routing.ids.shape[:2], routing.n_experts), np.float16)
            self._tensors = tuple(
                torch.from_numpy(np.ascontiguousarray(array)).to(like)
                for array, like in zip((said, routing.weights, routing.ids), output, strict=True)
            )
            # As they were recorded, whatever the gate's type: a replay decides by the same.
            if routing.logits is not None:
                self._recorded = torch.from_numpy(routing.logits).to(output[0].device)
            self._ahead = _by_predicting_layer(routing).to(output[0].device)
        logits, weights, ids = self._tensors
        return logits, weights, ids


def _by_predicting_layer(routing: ForcedRouting) -> torch.Tensor:
    """float16[h, T, L, E]: entry j at layer l is what layer l predicts of layer l + 1 + j."""
    ahead = np.full_like(routing.predicted, np.nan)
    for j, predicted in enumerate(routing.predicted):
        ahead[j, :, : -(j + 1)] = predicted[:, j + 1 :]
    return torch.from_numpy(ahead)
