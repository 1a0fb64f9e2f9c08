"""Experts that are given inputs scaled by the gate's weights (Llama 4).

transformers' Llama 4 is the one family that calls its experts by no registry: every expert reads
every token, as zeros where the gate did not choose it. Here the blocks ask the provider for the
chosen experts alone. The outputs are the stock model's, as long as a token has one expert, which
all published models keep to.
"""

from __future__ import annotations

import types
from typing import Any

import torch
from torch import nn

from moerun.checkpoint.families import SCALED_INPUTS
from moerun.errors import RunError
from moerun.offload.experts import Served, outputs_of, sum_experts


def install_scaled_inputs(model: nn.Module) -> None:
    """Let the blocks of such experts ask for the chosen ones; nothing where the model has none.

    Raises RunError where a token has more experts than one.
    """
    for block in model.modules():
        experts = getattr(block, "experts", None)
        if type(experts).__name__ not in SCALED_INPUTS:
            continue
        if block.top_k != 1:
            raise RunError(
                f"config.json says num_experts_per_tok {block.top_k}: {type(block).__name__} can "
                "be offloaded with 1 alone, as all published models have it"
            )
        block.forward = types.MethodType(_forward, block)


def _forward(block: Any, hidden_states: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """As the stock block: hidden_states [..., H] to their sums [T, H], and the gate's logits."""
    x = hidden_states.reshape(-1, block.hidden_dim)
    scores, logits = block.router(x)
    ids = logits.topk(block.top_k, dim=1).indices
    total = block.shared_expert(x)
    total.add_(_scaled(block.experts, x, ids, scores.gather(1, ids)))
    return total, logits


def _scaled(
    experts: Any, x: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor
) -> torch.Tensor:
    """x[T, H] scaled by weights[T, 1] through the experts ids[T, 1]."""
    offload = experts.offload
    served = offload.provider.serve(offload.layer, ids, weights)
    given = weights if served.weights is None else served.weights
    x = x * given.to(x.dtype)
    if x.dtype is torch.float32 and len(x) > 1:
        return _all_rows(experts, x, served)
    return sum_experts(experts, x, served, torch.ones_like(given))


def _all_rows(experts: Any, x: torch.Tensor, served: Served) -> torch.Tensor:
    """As the stock experts compute x[T, H]: each multiplies T rows, zeros where it was not chosen.
    In float32 the number of rows can show in a product's last bit; in 16 bits it does not, and each
    expert reads its own rows alone."""
    ids = torch.from_numpy(served.ids).to(x.device)
    total = torch.zeros_like(x)
    for _, y in outputs_of(experts, served, lambda expert: x * (ids == expert)):
        total += y
    return total
