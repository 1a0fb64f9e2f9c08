"""What came of a generation, when each token came, and what it took."""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from transformers.generation.streamers import BaseStreamer

from moerun.live.logprobs import TokenLogprob
from moerun.live.totals import Totals


class Timings(BaseStreamer):  # type: ignore[misc]
    """Notes when each token came."""

    def __init__(self) -> None:
        self.began_s = 0.0
        self.token_s: list[float] = []
        self.token_ids: list[int] = []
        self._prompt = True

    def begin(self) -> None:
        """The prompt begins to be read."""
        self.began_s = time.perf_counter()

    def put(self, value: torch.Tensor) -> None:
        """Note the time and the id of a token, int64[1]; the first call brings the prompt's ids."""
        if self._prompt:
            self._prompt = False
        else:
            self.token_s.append(time.perf_counter())
            self.token_ids += value.reshape(-1).tolist()

    def end(self) -> None:
        """Do nothing: no token is held back."""


@dataclass(frozen=True)
class Work:
    """What answering took, of one prompt or of several together.

    The first new token comes out of the prompt's own pass: prompt_s is the time until it,
    decode_s from there to the last. ``answers`` counts the prompts that got to a first token.
    Of the prompt's tokens, ``cached_tokens`` were not read: their keys and values had been kept.
    """

    prompt_tokens: int
    new_tokens: int
    answers: int
    prompt_s: float
    decode_s: float
    totals: Totals
    cached_tokens: int = 0

    def __add__(self, other: Work) -> Work:
        return Work(
            prompt_tokens=self.prompt_tokens + other.prompt_tokens,
            new_tokens=self.new_tokens + other.new_tokens,
            answers=self.answers + other.answers,
            prompt_s=self.prompt_s + other.prompt_s,
            decode_s=self.decode_s + other.decode_s,
            totals=self.totals + other.totals,
            cached_tokens=self.cached_tokens + other.cached_tokens,
        )

    @property
    def decoded_tokens(self) -> int:
        """Tokens that took a forward pass of their own."""
        return self.new_tokens - self.answers

    @property
    def tokens_per_s(self) -> float:
        """Decoded tokens per second; 0 where none was decoded."""
        return self.decoded_tokens / self.decode_s if self.decode_s else 0.0

    @property
    def prompt_tokens_per_s(self) -> float:
        """Tokens of the prompt read per second; 0 where there was no prompt."""
        read = self.prompt_tokens - self.cached_tokens
        return read / self.prompt_s if self.prompt_s else 0.0


NO_WORK = Work(0, 0, 0, 0.0, 0.0, Totals())

Ending = Literal["stop", "length", "cancelled"]


@dataclass(frozen=True, kw_only=True)
class Generated(Work):
    """One prompt's outcome: stopped by an end token or a stop string, full, or cut short.

    ``reasoning`` is what the model's turn marks as such; it is no part of ``text``, and neither are
    the calls of tools, each as the model's response template gives it. Log-probabilities are there
    where the sampling asks for them: one for each token."""

    token_ids: list[int]
    text: str
    reasoning: str
    ending: Ending
    token_s: list[float]  # when each token came, by the clock of `time.perf_counter`
    tool_calls: list[Any] = field(default_factory=list)
    logprobs: list[TokenLogprob] = field(default_factory=list)
    prompt_logprobs: list[TokenLogprob] = field(default_factory=list)
