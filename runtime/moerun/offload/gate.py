"""A gate's choice on the host, in the precisions that a policy and a trace see it in."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import torch
from moepolicy import pool_logits
from moeroute.families import GateGives
from numpy.typing import NDArray

from moerun.checkpoint.families import family_of_model


class Gate(NamedTuple):
    """What one layer's gate decided for a batch, on the host; what a step and a trace row hold.

    ids        integer[tokens, top_k]
    weights    float32[tokens, top_k] as applied
    logits     float16[tokens, n_experts], or None where nobody looks at them
    predicted  float16[horizon, tokens, n_experts]: row j is the gate of layer + 1 + j; NaN past
               the last layer. None without predictions
    """

    ids: NDArray[Any]
    weights: NDArray[Any]
    logits: NDArray[Any] | None = None
    predicted: NDArray[Any] | None = None


class GateOutput(NamedTuple):
    """What a layer's gate gives besides its choice, on its device; None where nobody asked.

    logits     [tokens, n_experts]
    predicted  float16[horizon, tokens, n_experts], as in `Gate`
    """

    logits: torch.Tensor | None = None
    predicted: torch.Tensor | None = None


def logits_reader(model: Any) -> Callable[[Any], torch.Tensor]:
    """What makes the logits [T, E] of what a gate's module of the ``model`` gives."""
    return _LOGITS[_gives(model)]


def choice_reader(model: Any) -> Callable[[Any], tuple[torch.Tensor, torch.Tensor]]:
    """What makes the weights and ids [T, K] of the chosen experts of what a gate's module gives."""
    return _chosen_of_scores if _gives(model) == "scores" else lambda output: output[1:3]


def _gives(model: Any) -> GateGives:
    family = family_of_model(model)
    return "logits" if family is None else family.gate_gives


def _chosen_of_scores(output: Any) -> tuple[torch.Tensor, torch.Tensor]:
    scores, _ = output
    chosen: tuple[torch.Tensor, torch.Tensor] = scores.topk(int((scores > 0).sum(-1).max()), dim=-1)
    return chosen


_LOGITS: dict[GateGives, Callable[[Any], torch.Tensor]] = {
    "logits": lambda output: output[0],
    "probabilities": lambda output: output[0].log(),
    "scores": lambda output: output[1],
}

GateObserver = Callable[[int, Gate], None]


def pool_rows(predicted: NDArray[Any]) -> NDArray[Any]:
    """float16[horizon, tokens, n_experts] -> float32[horizon, n_experts], pooled over tokens."""
    if predicted.shape[1] == 1:
        return predicted[:, 0].astype(np.float32)
    return np.stack([pool_logits(rows) for rows in predicted])


def to_host(
    ids: torch.Tensor,
    weights: torch.Tensor,
    logits: torch.Tensor | None,
    predicted: torch.Tensor | None,
) -> Gate:
    """A gate's choice as NumPy arrays, in one copy where it lies on another device.

    Logits and predictions become float16, what a trace stores, before anyone decides by them: a
    replay of the trace must be asked the same question.
    """
    if weights.dtype is not torch.float32:  # asked in a third of the time that `float` takes
        weights = weights.float()
    if ids.is_cpu:
        return Gate(
            ids.numpy(),
            weights.numpy(),
            None if logits is None else _half(logits),
            None if predicted is None else _half(predicted),
        )
    parts = [ids, weights]
    parts += [part.to(torch.float16) for part in (logits, predicted) if part is not None]
    flat = torch.cat([part.reshape(-1).double() for part in parts]).cpu()
    pieces = torch.split(flat, [part.numel() for part in parts])
    arrays = [
        piece.view(part.shape).to(part.dtype).numpy()
        for piece, part in zip(pieces, parts, strict=True)
    ]
    return Gate(
        arrays[0],
        arrays[1],
        arrays[2] if logits is not None else None,
        arrays[-1] if predicted is not None else None,
    )


def _half(tensor: torch.Tensor) -> NDArray[np.float16]:
    """In float16, by NumPy where it can: for a row of logits it takes a fifth of torch's time."""
    if tensor.dtype is torch.bfloat16:  # which NumPy does not know
        tensor = tensor.float()
    halves: NDArray[np.float16] = tensor.numpy().astype(np.float16, copy=False)
    return halves
