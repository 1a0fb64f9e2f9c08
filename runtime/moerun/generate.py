"""Text from a prompt through transformers' own generate(), streamed and timed."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from transformers import GenerationConfig, TextStreamer, set_seed

from moerun.errors import RunError
from moerun.session import Session
from moerun.totals import Totals

NO_TOKEN = -1


@dataclass(frozen=True)
class Sampling:
    """How tokens are chosen; temperature 0 takes the likeliest."""

    max_new_tokens: int = 100
    temperature: float = 0.0
    top_p: float = 1.0
    seed: int = 0
    stop: bool = True  # False: go on past the model's own end tokens

    def check(self) -> None:
        """Raises RunError naming what is out of range."""
        if self.max_new_tokens < 1:
            raise RunError(f"max-new-tokens must be 1 or more, not {self.max_new_tokens}")
        if not 0 <= self.temperature < float("inf"):
            raise RunError(f"temperature must be 0 or more, not {self.temperature}")
        if not 0 < self.top_p <= 1:
            raise RunError(f"top-p must be above 0 and at most 1, not {self.top_p}")
        if not 0 <= self.seed < 2**32:
            raise RunError(f"seed must be 0 to {2**32 - 1}, not {self.seed}")

    def config(self, model: Any, max_new_tokens: int) -> GenerationConfig:
        """For this model's generate(): its end tokens, and nothing else of its defaults."""
        own = model.generation_config
        end = own.eos_token_id
        pad = own.pad_token_id
        if pad is None:
            pad = end[0] if isinstance(end, list) else end
        sampled = {"temperature": self.temperature, "top_p": self.top_p, "top_k": 0}
        return GenerationConfig(
            max_new_tokens=max_new_tokens,
            do_sample=self.temperature > 0,
            eos_token_id=end if self.stop else NO_TOKEN,
            pad_token_id=pad,
            bos_token_id=own.bos_token_id,
            **(sampled if self.temperature > 0 else {}),
        )


class Timings(TextStreamer):  # type: ignore[misc]
    """Hands text on as it is generated, and notes when each token came."""

    def __init__(self, tokenizer: Any, on_text: Callable[[str], None] | None) -> None:
        super().__init__(tokenizer, skip_prompt=True, skip_special_tokens=True)
        self.on_text = on_text
        self.began_s = 0.0
        self.token_s: list[float] = []
        self.token_ids: list[int] = []

    def put(self, value: torch.Tensor) -> None:
        now = time.perf_counter()
        if self.next_tokens_are_prompt:
            self.began_s = now
        else:
            self.token_s.append(now)
            self.token_ids += value.reshape(-1).tolist()
        super().put(value)

    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
        if text and self.on_text:
            self.on_text(text)


@dataclass(frozen=True)
class Generated:
    """One prompt's outcome. The first new token comes out of the prompt's own pass.

    prompt_s is the time until the first token, decode_s from the first to the last.
    """

    prompt_tokens: int
    token_ids: list[int]
    prompt_s: float
    decode_s: float
    totals: Totals

    @property
    def decoded_tokens(self) -> int:
        """Tokens that took a forward pass of their own."""
        return max(len(self.token_ids) - 1, 0)

    @property
    def tokens_per_s(self) -> float:
        return self.decoded_tokens / self.decode_s if self.decode_s else 0.0

    @property
    def prompt_tokens_per_s(self) -> float:
        return self.prompt_tokens / self.prompt_s if self.prompt_s else 0.0


class Generation:
    """One prompt being answered; ``outcome`` is right at any time, also after an interruption."""

    def __init__(
        self,
        model: Any,
        tokenizer: Any,
        session: Session,
        on_text: Callable[[str], None] | None = None,
    ) -> None:
        """``on_text`` is given the new text piece by piece as it becomes certain."""
        self.model = model
        self.session = session
        self.timings = Timings(tokenizer, on_text)
        self.prompt_tokens = 0
        self._before = session.totals

    def run(self, prompt_ids: torch.Tensor, sampling: Sampling) -> Generated:
        """Answer prompt_ids [1, tokens]. Raises RunError when the model cannot take them."""
        sampling.check()
        room = check_length(self.model, prompt_ids.shape[1])
        new_tokens = min(sampling.max_new_tokens, room)
        self.prompt_tokens = prompt_ids.shape[1]
        set_seed(sampling.seed)
        with torch.inference_mode():
            self.model.generate(
                prompt_ids,
                attention_mask=torch.ones_like(prompt_ids),
                generation_config=sampling.config(self.model, new_tokens),
                streamer=self.timings,
            )
        return self.outcome()

    def outcome(self) -> Generated:
        """What has been generated until now."""
        times = self.timings.token_s
        return Generated(
            prompt_tokens=self.prompt_tokens,
            token_ids=self.timings.token_ids,
            prompt_s=times[0] - self.timings.began_s if times else 0.0,
            decode_s=times[-1] - times[0] if times else 0.0,
            totals=self.session.totals.since(self._before),
        )


def encode(tokenizer: Any, prompt: str, device: torch.device) -> torch.Tensor:
    """The prompt's token ids, int64[1, tokens]. Raises RunError when there are none."""
    if tokenizer is None:
        raise RunError("the model has no tokenizer: it cannot take text")
    ids: torch.Tensor = tokenizer(prompt, return_tensors="pt").input_ids
    if ids.shape[1] == 0:
        raise RunError("the prompt is empty")
    return ids.to(device)


def context_tokens(model: Any) -> int | None:
    """The longest text the model was made for; None where its configuration does not say."""
    limit = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    return int(limit) if limit else None


def check_length(model: Any, prompt_tokens: int) -> int:
    """How many tokens may follow the prompt; RunError when the prompt itself is too long."""
    limit = context_tokens(model)
    if limit is None:
        return 1 << 30
    if prompt_tokens >= limit:
        raise RunError(
            f"the prompt has {prompt_tokens} tokens and the model's context is {limit}: shorten it"
        )
    return limit - prompt_tokens
