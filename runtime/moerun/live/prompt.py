"""A prompt as token ids, and how much may follow it."""

from __future__ import annotations

from typing import Any

import torch

from moerun.checkpoint.context import context_limit
from moerun.errors import RunError


def encode(
    tokenizer: Any, prompt: str, device: torch.device, *, special: bool = True
) -> torch.Tensor:
    """The prompt's token ids, int64[1, tokens], with the ``special`` tokens that the tokenizer puts
    around a text. Raises RunError when there are none."""
    if tokenizer is None:
        raise RunError("the model has no tokenizer: it cannot take text")
    ids: torch.Tensor = tokenizer(prompt, return_tensors="pt", add_special_tokens=special).input_ids
    if ids.shape[1] == 0:
        raise RunError("the prompt is empty")
    return ids.to(device)


def check_ids(model: Any, ids: torch.Tensor) -> None:
    """RunError where a tokenizer's ids are beyond the model's: it is another model's then."""
    known, highest = model.get_input_embeddings().num_embeddings, int(ids.max())
    if highest >= known:
        raise RunError(
            f"the tokenizer gives token {highest}, and the model knows tokens below {known}: the "
            "tokenizer.json beside it is another model's"
        )


def context_tokens(model: Any) -> int | None:
    """The longest text the model was made for; None where its configuration does not say."""
    return context_limit(model.config)


def check_length(model: Any, prompt_tokens: int, planned_tokens: int | None = None) -> int:
    """How many tokens may follow the prompt; RunError when the prompt itself is too long."""
    limit = context_tokens(model)
    if planned_tokens is not None and planned_tokens < (limit or planned_tokens + 1):
        if prompt_tokens >= planned_tokens:
            raise RunError(
                f"the prompt has {prompt_tokens} tokens and memory was planned for a context of "
                f"{planned_tokens}: shorten it, or give a larger --context"
            )
        return planned_tokens - prompt_tokens
    if limit is None:
        return 1 << 30
    if prompt_tokens >= limit:
        raise RunError(
            f"the prompt has {prompt_tokens} tokens and the model's context is {limit}: shorten it"
        )
    return limit - prompt_tokens
