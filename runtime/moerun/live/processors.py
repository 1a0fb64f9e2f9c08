"""What is done to the logits before a token is chosen: transformers' own processors, in its order,
and those that it lacks."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from transformers import (
    LogitsProcessor,
    LogitsProcessorList,
    MinNewTokensLengthLogitsProcessor,
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from moerun.live.sampling import Sampling


class CountPenalties(LogitsProcessor):  # type: ignore[misc]
    """OpenAI's penalties of presence and frequency, for tokens that the answer has already.

    https://platform.openai.com/docs/api-reference/chat/create: logit - count * frequency - (count >
    0) * presence. The prompt's tokens do not count.
    """

    def __init__(self, prompt_tokens: int, presence: float, frequency: float) -> None:
        self._prompt_tokens = prompt_tokens
        self._presence = presence
        self._frequency = frequency

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        """Penalised scores [1, vocabulary] after input_ids, int64[1, tokens]."""
        answer = input_ids[0, self._prompt_tokens :]
        if not len(answer):
            return scores
        counts = torch.bincount(answer, minlength=scores.shape[-1]).to(scores.dtype)
        return scores - self._frequency * counts - self._presence * (counts > 0)


class Bias(LogitsProcessor):  # type: ignore[misc]
    """Adds a number to the logits of some tokens."""

    def __init__(self, biases: Sequence[tuple[int, float]], device: torch.device) -> None:
        self._ids = torch.tensor([token for token, _ in biases], device=device)
        self._added = torch.tensor([added for _, added in biases], device=device)

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        """The scores [1, vocabulary] with the biases added."""
        return scores.index_add(-1, self._ids, self._added[None].to(scores.dtype))


def processors_of(
    sampling: Sampling,
    prompt_tokens: int,
    ends: Sequence[int],
    device: torch.device,
    constraint: LogitsProcessor | None = None,
) -> LogitsProcessorList:
    """What makes scores of a sequence's logits, in the order of transformers' generate().

    ``ends``: the tokens that end the text; ``constraint`` forbids tokens that a grammar has no
    place for.
    """
    found: list[Any] = []
    if sampling.logit_bias:
        found.append(Bias(sampling.logit_bias, device))
    if sampling.repetition_penalty != 1:
        found.append(RepetitionPenaltyLogitsProcessor(sampling.repetition_penalty))
    if sampling.presence_penalty or sampling.frequency_penalty:
        penalties = (sampling.presence_penalty, sampling.frequency_penalty)
        found.append(CountPenalties(prompt_tokens, *penalties))
    if sampling.min_new_tokens and ends and constraint is None:  # else a grammar says when to end
        found.append(
            MinNewTokensLengthLogitsProcessor(
                prompt_tokens, sampling.min_new_tokens, list(ends), device=device
            )
        )
    if constraint is not None:
        found.append(constraint)
    if not sampling.greedy:
        found += _warpers(sampling)
    return LogitsProcessorList(found)


def _warpers(sampling: Sampling) -> list[Any]:
    """What reshapes the distribution that a token is drawn from."""
    found: list[Any] = []
    if sampling.temperature != 1:
        found.append(TemperatureLogitsWarper(sampling.temperature))
    if sampling.top_k:
        found.append(TopKLogitsWarper(sampling.top_k))
    if sampling.top_p < 1:
        found.append(TopPLogitsWarper(sampling.top_p))
    if sampling.min_p > 0:
        found.append(MinPLogitsWarper(sampling.min_p))
    return found
