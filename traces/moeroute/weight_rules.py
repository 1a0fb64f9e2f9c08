"""How a model's gate makes an expert's weight of its logits: the rules by name, and which it was.

A routing policy that changes a token's experts needs the weights of the new choice, by the model's
own rule and from the original logits. The rules are those of the families in transformers:

    softmax-topk-renorm   a softmax over all experts, the chosen scaled to sum to 1 (Mixtral)
    topk-softmax          a softmax over the chosen logits alone (gpt-oss); equal to the one above
    softmax               a softmax over all experts, the chosen as they are (OLMoE, DeepSeek-V2)
    sigmoid-renorm-scale  sigmoids scaled to sum to a constant (DeepSeek-V3, GLM-4.5)
    sigmoid               sigmoids as they are (Llama 4)
    sqrtsoftplus-renorm-scale  square roots of softplus, scaled to sum to a constant (DeepSeek-V4)

Each may be multiplied by a constant (`routed_scaling_factor`), which is fitted.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from moeroute.families import WEIGHT_RULES

_HALF_EPS = 2.0**-11  # relative rounding of a logit that was stored as float16
_WEIGHT_ERROR = 0.012  # relative: three roundings to bfloat16
_WEIGHT_FLOOR = 1e-4  # of the row's largest weight, below which a relative error says nothing
_CLEARLY = 0.5  # a later rule is taken where its error is below this share of an earlier one's


@dataclass(frozen=True, slots=True)
class WeightRule:
    """A rule of WEIGHT_RULES and the constant that its weights are multiplied by."""

    name: str
    scale: float = 1.0


def weights_by(rule: WeightRule, logits: NDArray[Any], chosen: NDArray[Any]) -> NDArray[np.float32]:
    """The weights of the experts ``chosen`` [..., K], by ``rule`` from logits [..., E]: float32.

    The logits are the gate's own, without any bias that served the choice alone. Raises ValueError
    for a rule that is not in WEIGHT_RULES.
    """
    weights: NDArray[np.float32] = (rule.scale * _unscaled(rule.name, logits, chosen)).astype(
        np.float32
    )
    return weights


def detect_weight_rule(
    logits: NDArray[Any], weights: NDArray[Any], experts: NDArray[Any]
) -> WeightRule | None:
    """The rule that made ``weights`` [n, K] of ``experts`` [n, K] from ``logits`` [n, E], or None.

    A rule has to reproduce every row whose numbers are finite, within the rounding of float16
    logits and bfloat16 weights. Where several do, the closest is named; of rules that are equally
    close, such as `softmax-topk-renorm` and `topk-softmax`, the first of WEIGHT_RULES.
    """
    logits, weights = np.asarray(logits, np.float64), np.asarray(weights, np.float64)
    usable = np.isfinite(logits).all(axis=-1) & np.isfinite(weights).all(axis=-1)
    usable &= (weights > 0).any(axis=-1)
    logits, weights, experts = logits[usable], weights[usable], np.asarray(experts)[usable]
    if not len(weights):
        return None
    best: tuple[float, WeightRule] | None = None
    for name in WEIGHT_RULES:
        found = _fit(name, logits, weights, experts)
        if found is not None and (best is None or found[0] < _CLEARLY * best[0]):
            best = found
    return None if best is None else best[1]


def _fit(
    name: str, logits: NDArray[Any], weights: NDArray[Any], experts: NDArray[Any]
) -> tuple[float, WeightRule] | None:
    """The mean relative error of a rule and the rule with its scale; None where it is no rule."""
    made = _unscaled(name, logits, experts)
    scale = float(np.median(weights.sum(axis=-1) / made.sum(axis=-1)))
    if abs(scale - 1) < _WEIGHT_ERROR:
        scale = 1.0
    made = scale * made
    floor = _WEIGHT_FLOOR * weights.max(axis=-1, keepdims=True)
    error = np.abs(made - weights) / np.maximum(np.abs(weights), floor)
    # Two logits decide a weight's share, and each may be off by half a float16 step.
    rounding = 2 * _HALF_EPS * np.abs(logits).max(axis=-1, keepdims=True)
    if (error > _WEIGHT_ERROR + rounding).any():
        return None
    return float(error.mean()), WeightRule(name, round(scale, 3))


def _unscaled(name: str, logits: NDArray[Any], chosen: NDArray[Any]) -> NDArray[np.float64]:
    if name not in WEIGHT_RULES:
        raise ValueError(f"weight rule {name!r}: there are {', '.join(WEIGHT_RULES)}")
    values = np.asarray(logits, np.float64)
    of = np.take_along_axis(values, np.asarray(chosen).astype(np.int64), axis=-1)
    if name.startswith("sigmoid"):
        made: NDArray[np.float64] = 1 / (1 + np.exp(-np.clip(of, -700, 700)))
    elif name.startswith("sqrtsoftplus"):
        made = np.sqrt(np.logaddexp(of, 0))
    elif name == "softmax":
        top = values.max(axis=-1, keepdims=True)
        made = np.exp(of - top) / np.exp(values - top).sum(axis=-1, keepdims=True)
    else:  # a share of the chosen alone, with and without the others' part in the sum before
        made = np.exp(of - of.max(axis=-1, keepdims=True))
    if name not in ("softmax", "sigmoid"):
        made = made / made.sum(axis=-1, keepdims=True)
    return made
