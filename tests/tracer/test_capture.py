"""What is captured is what the gates gave, family by family."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from moerun.errors import RunError
from moerun.offload.gate_predictor import GATE_INPUT, METHODS, OWN_NORM, GatePredictor, find_routers
from moetrace.capture import Routing, RoutingCapture
from support.moe_models import FAMILIES, random_model
from torch import Tensor

HORIZON = 3


@pytest.fixture(scope="module", params=sorted(FAMILIES))
def model(request: pytest.FixtureRequest) -> Any:
    return random_model(request.param)


def token_ids() -> Tensor:
    return torch.randint(1, 128, (2, 12), generator=torch.Generator().manual_seed(1))


def capture(model: Any, ids: Tensor, prediction: str | None = None) -> Routing:
    with RoutingCapture(model, HORIZON, prediction) as captured, torch.no_grad():
        model(input_ids=ids, use_cache=False)
        return captured.take()


def test_experts_weights_and_logits_are_those_of_the_gates(model: Any) -> None:
    given: list[tuple[Tensor, Tensor, Tensor]] = []
    norms: list[Tensor] = []

    def keep(_router: Any, arguments: Any, output: Any) -> None:
        given.append(output)
        norms.append(arguments[0].reshape(-1, 64).norm(dim=-1))

    hooks = [router.register_forward_hook(keep) for router in find_routers(model)]
    found = capture(model, token_ids())
    for hook in hooks:
        hook.remove()

    assert found.experts.shape[:2] == (24, len(given))
    for layer, (logits, weights, ids) in enumerate(given):
        np.testing.assert_array_equal(found.router_logits[:, layer], logits.half().numpy())
        np.testing.assert_allclose(found.input_norm[:, layer], norms[layer].numpy(), rtol=1e-5)
        for token in range(24):
            row = zip(found.experts[token, layer], found.weights[token, layer], strict=True)
            assert dict(row) == dict(zip(ids[token].tolist(), weights[token].tolist(), strict=True))
    assert (np.diff(found.weights, axis=-1) <= 0).all()


def test_logits_are_those_the_model_records_itself(model: Any) -> None:
    ids = token_ids()
    found = capture(model, ids)
    with torch.no_grad():
        recorded = model.base_model(ids, output_router_logits=True, use_cache=False).router_logits
    for layer, logits in enumerate(recorded):
        expected = logits.reshape(-1, logits.shape[-1]).half().numpy()
        np.testing.assert_array_equal(found.router_logits[:, layer], expected)


@pytest.mark.parametrize("method", sorted(METHODS))
def test_predictions_are_later_gates_on_earlier_states(model: Any, method: str) -> None:
    routers = find_routers(model)
    layers = [
        layer for layer in model.base_model.layers if any(r in layer.modules() for r in routers)
    ]
    norms = [layer.post_attention_layernorm for layer in layers]
    states: list[Tensor] = []
    if method == OWN_NORM:
        hooks = [norm.register_forward_pre_hook(lambda _, a: states.append(a[0])) for norm in norms]
    else:
        hooks = [r.register_forward_pre_hook(lambda _, a: states.append(a[0])) for r in routers]
    # A gate that is called, not hooked, so that nothing of the predictor is in the expectation.
    blocks = [layer.mlp if hasattr(layer, "mlp") else layer.block_sparse_moe for layer in layers]
    extra = [
        (block.e_score_correction_bias,) if "minimax" in type(block).__name__.lower() else ()
        for block in blocks
    ]
    found = capture(model, token_ids(), method)
    for hook in hooks:
        hook.remove()

    for ahead in range(1, HORIZON + 1):
        rows = found.predicted[ahead - 1]
        assert np.isnan(rows[:, :ahead]).all()
        for layer in range(ahead, len(routers)):
            state = states[layer - ahead].reshape(-1, 64)
            with torch.no_grad():
                state = norms[layer](state) if method == OWN_NORM else state
                expected = routers[layer](state, *extra[layer])[0].numpy()
            np.testing.assert_allclose(rows[:, layer], expected, rtol=5e-3, atol=5e-3)


def test_own_norm_is_the_default_where_there_is_one(model: Any) -> None:
    with GatePredictor(model, 1) as predictor:
        assert predictor.method == OWN_NORM


def test_the_model_is_left_as_it_was(model: Any) -> None:
    def hooks() -> int:
        return sum(
            len(module._forward_hooks) + len(module._forward_pre_hooks)
            for module in model.modules()
        )

    before = hooks()
    capture(model, token_ids())
    assert hooks() == before


def test_filling_up_a_batch_changes_no_row() -> None:
    model = random_model("mixtral")
    ids = token_ids()
    filled = torch.cat([ids, torch.zeros(2, 5, dtype=torch.long)], dim=1)
    wanted = (torch.arange(17) < 12).repeat(2)
    with RoutingCapture(model, HORIZON) as captured, torch.no_grad():
        model(input_ids=filled, use_cache=False)
        found = captured.take(wanted)
    alone = capture(model, ids)
    np.testing.assert_array_equal(found.experts, alone.experts)
    np.testing.assert_allclose(found.weights, alone.weights, atol=1e-5)
    np.testing.assert_allclose(found.predicted[0], alone.predicted[0], atol=5e-3)


def test_without_a_horizon_there_are_no_predictions() -> None:
    model = random_model("mixtral")
    with RoutingCapture(model, 0) as captured, torch.no_grad():
        model(input_ids=token_ids(), use_cache=False)
        found = captured.take()
    assert found.predicted == ()
    assert found.experts.shape == (24, 4, 2)


def test_a_dense_model_is_refused() -> None:
    with pytest.raises(RunError, match="LlamaForCausalLM is no mixture of experts"):
        RoutingCapture(random_model("llama"), 1)


def test_a_predictor_refuses_what_it_cannot_do() -> None:
    model = random_model("mixtral")
    with pytest.raises(RunError, match="horizon 0"):
        GatePredictor(model, 0)
    with pytest.raises(RunError, match="unknown prediction 'guesswork'; there are: own-norm"):
        GatePredictor(model, 1, "guesswork")


def test_gates_behind_no_plain_norm_are_applied_one_by_one() -> None:
    """phimoe has layer norms: predictions must not go through the joined product."""
    model = random_model("phimoe")
    with GatePredictor(model, 1) as predictor, GatePredictor(model, 1, GATE_INPUT) as plain:
        assert predictor._products is None
        assert plain._products is not None
