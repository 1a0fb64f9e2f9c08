"""How tokens are chosen, and what ends a text."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from transformers import GenerationConfig

from moerun.errors import UsageError
from moerun.live.turn import Turn, model_ends

NO_TOKEN = -1


@dataclass(frozen=True)
class Sampling:
    """How tokens are chosen; temperature 0 takes the likeliest."""

    max_new_tokens: int = 100
    temperature: float = 0.0
    top_p: float = 1.0
    seed: int = 0
    stop: bool = True  # False: go on past the model's own end tokens
    stop_strings: tuple[str, ...] = ()  # the text ends before the first of them
    turn: Turn | None = None  # what ends an answer of a chat besides, and its channels

    def check(self) -> None:
        """Raises RunError naming what is out of range."""
        if self.max_new_tokens < 1:
            raise UsageError(f"max-new-tokens must be 1 or more, not {self.max_new_tokens}")
        if not 0 <= self.temperature < float("inf"):
            raise UsageError(f"temperature must be 0 or more, not {self.temperature}")
        if not 0 < self.top_p <= 1:
            raise UsageError(f"top-p must be above 0 and at most 1, not {self.top_p}")
        if not 0 <= self.seed < 2**32:
            raise UsageError(f"seed must be 0 to {2**32 - 1}, not {self.seed}")
        if not all(self.stop_strings):
            raise UsageError("a stop string must not be empty")

    def ends(self, model: Any, tokenizer: Any) -> tuple[int, ...]:
        """The tokens that end a text: the model's, its tokenizer's and the turn's."""
        if not self.stop:
            return ()
        turn = self.turn.end_ids if self.turn else ()
        return tuple(dict.fromkeys((*model_ends(model, tokenizer), *turn)))

    def config(self, model: Any, max_new_tokens: int, ends: Sequence[int] = ()) -> GenerationConfig:
        """For this model's generate(): ``ends``, and nothing of its own defaults."""
        own = model.generation_config
        pad = own.pad_token_id
        if pad is None and ends:
            pad = ends[0]
        sampled = {"temperature": self.temperature, "top_p": self.top_p, "top_k": 0}
        return GenerationConfig(
            max_new_tokens=max_new_tokens,
            do_sample=self.temperature > 0,
            eos_token_id=list(ends) or NO_TOKEN,
            pad_token_id=pad,
            bos_token_id=own.bos_token_id,
            # Experts are loaded between the layers, by code that no compiled graph can hold.
            disable_compile=True,
            **(sampled if self.temperature > 0 else {}),
        )
