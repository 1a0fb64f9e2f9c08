"""The stock model with all of its weights in memory, read by the readers of `moerun pack`.

transformers loads no GGUF without unpacking all of a file, and needs packages of its own for some
formats of quantised checkpoints. Here each is read as for a store, a tensor at a time.
"""

from __future__ import annotations

from typing import Any

import torch

from moerun.checkpoint.families import empty_model
from moerun.checkpoint.source import ModelSource
from moerun.errors import RunError
from moerun.offload.load import rebuild_buffers


def whole_model(source: ModelSource, dtype: torch.dtype, device: torch.device) -> Any:
    """The model of a checkpoint, dequantised, computing in ``dtype``.

    Raises RunError where a tensor cannot be read, or does not fit the configuration.
    """
    source.config.dtype = dtype
    model: Any = empty_model(source.config, dtype)
    state = {name: _as(tensor, source.dtype, dtype, device) for name, tensor in source.read_dense()}
    for layer, module in enumerate(source.layers):
        for param in source.shape.params:
            shape = (source.n_experts, *param.shape)
            state[f"{module}.{param.name}"] = torch.empty(shape, dtype=dtype, device=device)
        for expert in range(source.n_experts):
            for name, tensor in source.read_expert(layer, expert).items():
                state[f"{module}.{name}"][expert] = tensor
    absent, unexpected = model.load_state_dict(state, strict=False, assign=True)
    model.requires_grad_(False)
    missing = set(absent)
    model.tie_weights(missing_keys=missing, recompute_mapping=False)
    if missing or unexpected:
        wrong = sorted(missing or unexpected)[0]
        raise RunError(f"{source.checkpoint.path} does not fit its configuration: {wrong}")
    rebuild_buffers(model, device)
    return model.eval()


def _as(
    tensor: torch.Tensor, stored: torch.dtype, dtype: torch.dtype, device: torch.device
) -> torch.Tensor:
    """A tensor of the checkpoint's own precision in ``dtype``; others, such as biases of the
    ranking in float32, as they are."""
    return tensor.to(device, dtype if tensor.dtype is stored else tensor.dtype)
