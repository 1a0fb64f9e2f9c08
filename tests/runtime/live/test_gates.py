"""What a gate gives reaches the step of its own layer, or the run says that it does not."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from moepolicy import find_policy
from moerun.live.gates import SessionExperts
from moerun.live.runner import Runner
from moerun.live.sampling import Sampling
from moerun.offload.gate import GateOutput
from moerun.offload.gate_predictor import GatePredictor
from moerun.settings import Settings
from moerun.store.expert_store import ExpertStore

OWN = Path(__file__).parents[2] / "support" / "policies.py"


class Asked:
    """A session that keeps what it was asked to serve."""

    def __init__(self) -> None:
        self.asked: list[tuple[int, GateOutput]] = []

    def serve(self, layer: int, ids: Any, weights: Any, output: GateOutput) -> Any:
        self.asked.append((layer, output))
        return ()

    def raise_failure(self) -> None: ...


IDS, WEIGHTS = torch.tensor([[0, 1]]), torch.tensor([[0.7, 0.3]])


def test_each_layer_is_served_with_what_its_own_gate_gave() -> None:
    session: Any = Asked()
    experts = SessionExperts(session)
    outputs = [GateOutput(torch.full((1, 4), float(layer))) for layer in range(3)]
    for layer in (0, 1, 0, 2):
        experts.gate_ran(layer, outputs[layer])
        experts.serve(layer, IDS, WEIGHTS)
    assert [(layer, id(output)) for layer, output in session.asked] == [
        (layer, id(outputs[layer])) for layer in (0, 1, 0, 2)
    ]


def test_experts_without_their_gate_are_refused() -> None:
    session: Any = Asked()
    experts = SessionExperts(session)
    with pytest.raises(RuntimeError, match="layer 0 are asked for before its gate ran"):
        experts.serve(0, IDS, WEIGHTS)
    experts.gate_ran(1, GateOutput())
    with pytest.raises(RuntimeError, match="layer 2 are asked for before its gate ran"):
        experts.serve(2, IDS, WEIGHTS)
    experts.serve(1, IDS, WEIGHTS)
    with pytest.raises(RuntimeError, match="layer 1 are asked for before its gate ran"):
        experts.serve(1, IDS, WEIGHTS)  # what its gate gave was for the step before
    assert [layer for layer, _ in session.asked] == [1]


def test_the_gates_are_asked_for_what_the_policy_wants_and_no_more(
    stores: dict[str, ExpertStore], monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[int] = []
    predict = GatePredictor.predict

    def counted(self: GatePredictor, layer: int, gate_input: torch.Tensor) -> torch.Tensor:
        asked.append(layer)
        return predict(self, layer, gate_input)

    monkeypatch.setattr(GatePredictor, "predict", counted)
    with Runner(stores["native"], Settings(find_policy(f"{OWN}:Declining"), slots=3)) as runner:
        runner.generation().run(torch.tensor([[3, 1, 4, 1, 5]]), Sampling(6))
        shown = vars(runner.session.cache.policy)["shown"].tolist()
    assert shown[0] > 0
    assert shown[1] == len(asked) > 0


def test_a_closed_runner_has_left_no_hook_on_the_gates(
    stores: dict[str, ExpertStore],
) -> None:
    with Runner(stores["native"], Settings(find_policy("lru-spec"), slots=4)) as runner:
        model = runner.model
        hooked = [module for module in model.modules() if module._forward_hooks]
        assert len(hooked) == runner.store.n_layers + 1  # and the model itself
    assert not [module for module in model.modules() if module._forward_hooks]
    assert not [module for module in model.modules() if module._forward_pre_hooks]
