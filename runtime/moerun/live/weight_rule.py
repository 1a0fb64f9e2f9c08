"""How a loaded model's gates make weights of their logits: found by asking the first of them."""

from __future__ import annotations

from typing import Any

import torch
from moepolicy import RoutingRule
from moeroute.weight_rules import detect_weight_rule

from moerun.checkpoint.families import find_experts
from moerun.live.gates import SessionExperts
from moerun.offload.experts import Served

N_TOKENS = 64  # asked about: enough for no two rules to agree on all by chance


class _Answered(Exception):
    """The first layer has been asked, and the rest of the pass is of no use."""


class _Probe:
    """Stands where experts are served, and ends the pass there."""

    def __init__(self, experts: SessionExperts) -> None:
        self._experts = experts
        self.rule: RoutingRule | None = None

    def serve(self, layer: int, top_k_index: torch.Tensor, top_k_weights: torch.Tensor) -> Served:
        logits = self._experts.take(layer).logits
        if logits is not None:
            parts = (logits, top_k_weights, top_k_index)
            found = detect_weight_rule(*(_array(part) for part in parts))
            self.rule = RoutingRule(found.name, found.scale) if found else None
        raise _Answered


def find_weight_rule(model: Any, experts: SessionExperts) -> RoutingRule | None:
    """The rule by which the gates of ``model`` make weights; None where none that is known does.

    The model's gates tell ``experts`` what they give, and its first experts are attached to a
    provider already. One pass of arbitrary tokens goes as far as the first of these.
    """
    first: Any = find_experts(model)[0][1]
    attached, probe = first.offload, _Probe(experts)
    ids = torch.arange(N_TOKENS, device=model.device)[None] % model.config.vocab_size
    first.offload = attached.serving(probe)
    try:
        with torch.inference_mode():
            model(input_ids=ids, use_cache=False)
    except _Answered:
        pass
    finally:
        first.offload = attached
    return probe.rule


def _array(tensor: torch.Tensor) -> Any:
    return tensor.detach().to("cpu").double().numpy()
