"""How tokens are chosen, what ends a text, and what is reported of the choice."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from transformers import GenerationConfig

from moerun.errors import UsageError
from moerun.live.turn import Turn, model_ends
from moerun.ranges import check_sampling

NO_TOKEN = -1
LEAST_TEMPERATURE = 1e-5


@dataclass(frozen=True)
class Sampling:
    """How tokens are chosen; temperature 0 takes the likeliest.

    top_k               choose among the so many likeliest; 0: among all
    min_p               choose among those of this share of the likeliest's probability or more
    repetition_penalty  divides the logits of tokens of the prompt and the answer
    presence_penalty    is taken off the logits of tokens that the answer has
    frequency_penalty   is taken off them once for each time that the answer has them
    logit_bias          (token, what is added to its logit)
    min_new_tokens      no end token before so many
    end_ids             tokens that end the text in addition to the model's own
    logprobs            so many of the likeliest tokens are reported at each place, with the chosen
                        one; None: nothing is
    prompt_logprobs     the same is reported of the prompt
    reuse               go on from the keys and values of an earlier text, where some are kept
    """

    max_new_tokens: int = 100
    temperature: float = 0.0
    top_p: float = 1.0
    seed: int = 0
    stop: bool = True  # False: go on past the model's own end tokens
    stop_strings: tuple[str, ...] = ()  # the text ends before the first of them
    turn: Turn | None = None  # what ends an answer of a chat besides, and its channels
    top_k: int = 0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: tuple[tuple[int, float], ...] = ()
    min_new_tokens: int = 0
    end_ids: tuple[int, ...] = ()
    logprobs: int | None = None
    prompt_logprobs: bool = False
    reuse: bool = True

    def check(self) -> None:
        """Raises RunError naming what is out of range."""
        if not 0 <= self.min_p <= 1:
            raise UsageError(f"min-p must be 0 to 1, not {self.min_p}")
        if not 1e-3 <= self.repetition_penalty <= 1e3:
            raise UsageError(
                f"repetition-penalty must be 0.001 to 1000, not {self.repetition_penalty}"
            )
        stops = self.stop_strings
        check_sampling(self.max_new_tokens, self.temperature, self.top_p, self.seed, stops)

    @property
    def greedy(self) -> bool:
        """Whether the likeliest token is taken: so small a temperature leaves no other, and logits
        divided by it would overflow."""
        return self.temperature < LEAST_TEMPERATURE

    def ends(self, model: Any, tokenizer: Any) -> tuple[int, ...]:
        """The tokens that end a text: the model's, its tokenizer's, the turn's and `end_ids`."""
        if not self.stop:
            return self.end_ids
        turn = self.turn.end_ids if self.turn else ()
        return tuple(dict.fromkeys((*model_ends(model, tokenizer), *turn, *self.end_ids)))

    def config(self, model: Any, max_new_tokens: int, ends: Sequence[int] = ()) -> GenerationConfig:
        """For this model's generate(): ``ends``, and nothing of its own defaults.

        How tokens are chosen is not in it: `processors_of` makes that of the same sampling.
        """
        own = model.generation_config
        pad = own.pad_token_id
        if pad is None and ends:
            pad = ends[0]
        sampled = {"temperature": 1.0, "top_p": 1.0, "top_k": 0}
        return GenerationConfig(
            max_new_tokens=max_new_tokens,
            do_sample=not self.greedy,
            eos_token_id=list(ends) or NO_TOKEN,
            pad_token_id=pad,
            bos_token_id=own.bos_token_id,
            # Experts are loaded between the layers, by code that no compiled graph can hold.
            disable_compile=True,
            **({} if self.greedy else sampled),
        )
