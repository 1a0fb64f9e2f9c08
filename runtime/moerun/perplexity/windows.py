"""The windows that a text is read in, and the negative log-likelihood of one."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F

from moerun.live.kvcache import new_cache
from moerun.memory.needs import LOGIT_ROWS


@dataclass(frozen=True, slots=True)
class Window:
    """Tokens [begin, end) are read together, of which [first, end) are scored."""

    begin: int
    first: int
    end: int


def windows(n_tokens: int, context: int, stride: int) -> list[Window]:
    """Windows of `context` tokens, one every `stride`; each token is scored once.

    A token is scored in the first window that has it with a token before it. So with stride =
    context, the disjoint windows of papers on quantisation, the first of each is scored nowhere;
    with a smaller stride all but the text's first are, after context - stride tokens or more.
    """
    found, scored = [], 0
    for begin in range(0, n_tokens, stride):
        end = min(begin + context, n_tokens)
        first = max(scored, begin + 1)
        if first < end:
            found.append(Window(begin, first, end))
        scored = end
        if end == n_tokens:
            break
    return found


@torch.inference_mode()
def nats(model: Any, ids: torch.Tensor, window: Window) -> float:
    """The negative log-likelihood of a window's scored tokens; ids int64[1, tokens]."""
    text = ids[:, window.begin : window.end]
    scored = window.end - window.first
    logits = model(text, use_cache=False, logits_to_keep=scored + 1).logits[0, :-1]
    labels = text[0, -scored:]
    total = 0.0
    for start in range(0, scored, LOGIT_ROWS):
        rows = slice(start, start + LOGIT_ROWS)
        total += float(F.cross_entropy(logits[rows].float(), labels[rows], reduction="sum"))
    return total


@torch.inference_mode()
def nats_by_token(model: Any, ids: torch.Tensor, window: Window) -> float:
    """The nats of a window whose scored tokens are decoded one by one after the others."""
    text = ids[:, window.begin : window.end]
    prompt = window.first - window.begin
    cache = new_cache(model, text.shape[1])  # as an answer has
    out = model(text[:, :prompt], past_key_values=cache, use_cache=True, logits_to_keep=1)
    total = 0.0
    for i in range(prompt, text.shape[1]):
        total += float(F.cross_entropy(out.logits[:, -1].float(), text[:, i], reduction="sum"))
        if i + 1 < text.shape[1]:
            out = model(text[:, i : i + 1], past_key_values=cache, use_cache=True)
    return total
