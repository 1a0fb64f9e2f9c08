"""Text from a prompt through transformers' own generate(), streamed and timed."""

from __future__ import annotations

import operator
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from transformers import GenerationConfig, StoppingCriteria, StoppingCriteriaList, set_seed
from transformers.generation.streamers import BaseStreamer

from moerun.checkpoint.context import context_limit
from moerun.devices import naming_lack_of_memory
from moerun.errors import RunError, UsageError
from moerun.live.kvcache import new_cache
from moerun.live.session import Session
from moerun.live.text import TextStream
from moerun.live.totals import Totals
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


class Timings(BaseStreamer):  # type: ignore[misc]
    """Notes when each token came."""

    def __init__(self) -> None:
        self.began_s = 0.0
        self.token_s: list[float] = []
        self.token_ids: list[int] = []
        self._prompt = True

    def put(self, value: torch.Tensor) -> None:
        now = time.perf_counter()
        if self._prompt:
            self.began_s, self._prompt = now, False
        else:
            self.token_s.append(now)
            self.token_ids += value.reshape(-1).tolist()

    def end(self) -> None:
        """Nothing is held back."""


@dataclass(frozen=True)
class Work:
    """What answering took, of one prompt or of several together.

    The first new token comes out of the prompt's own pass: prompt_s is the time until it,
    decode_s from there to the last. ``answers`` counts the prompts that got to a first token.
    """

    prompt_tokens: int
    new_tokens: int
    answers: int
    prompt_s: float
    decode_s: float
    totals: Totals

    def __add__(self, other: Work) -> Work:
        return Work(
            prompt_tokens=self.prompt_tokens + other.prompt_tokens,
            new_tokens=self.new_tokens + other.new_tokens,
            answers=self.answers + other.answers,
            prompt_s=self.prompt_s + other.prompt_s,
            decode_s=self.decode_s + other.decode_s,
            totals=Totals._make(map(operator.add, self.totals, other.totals)),
        )

    @property
    def decoded_tokens(self) -> int:
        """Tokens that took a forward pass of their own."""
        return self.new_tokens - self.answers

    @property
    def tokens_per_s(self) -> float:
        return self.decoded_tokens / self.decode_s if self.decode_s else 0.0

    @property
    def prompt_tokens_per_s(self) -> float:
        return self.prompt_tokens / self.prompt_s if self.prompt_s else 0.0


NO_WORK = Work(0, 0, 0, 0.0, 0.0, Totals._make([0] * len(Totals._fields)))

Ending = Literal["stop", "length", "cancelled"]


@dataclass(frozen=True)
class Generated(Work):
    """One prompt's outcome: stopped by an end token or a stop string, full, or cut short.

    ``reasoning`` is what the model's turn marks as such; it is no part of ``text``."""

    token_ids: list[int]
    text: str
    reasoning: str
    ending: Ending


class Cancelled(Exception):
    """A generation was told to stop while it read its prompt."""


class Ends(StoppingCriteria):  # type: ignore[misc]
    """Ends a generation of one sequence when ``ends`` says so of the newest token."""

    def __init__(self, ends: Callable[[int], bool], device: torch.device) -> None:
        self._ends = ends
        self._answers = torch.tensor([False, True], device=device)  # copied there but once

    def __call__(self, input_ids: torch.Tensor, scores: Any, **_: Any) -> torch.Tensor:
        ends = self._ends(int(input_ids[0, -1]))
        return self._answers[int(ends) : int(ends) + 1]


class Generation:
    """One prompt being answered; ``outcome`` is right at any time, also after an interruption."""

    def __init__(
        self,
        model: Any,
        tokenizer: Any,
        session: Session,
        on_text: Callable[[str], None] | None = None,
        *,
        on_reasoning: Callable[[str], None] | None = None,
        context_tokens: int | None = None,
    ) -> None:
        """``on_text`` is given the new text piece by piece as it becomes certain,
        ``on_reasoning`` what a chat's turn has before its answer.

        ``context_tokens`` is what memory was planned for; None: whatever the model takes.
        """
        self.model = model
        self.context_tokens = context_tokens
        self.session = session
        self.prompt_tokens = 0
        self._tokenizer = tokenizer
        self._on_text = on_text
        self._on_reasoning = on_reasoning
        self._text = TextStream(tokenizer, on_text)
        self._timings = Timings()
        self._cancelled = threading.Event()
        self._end_ids: tuple[int, ...] = ()
        self._room = 1
        self._before = session.totals

    def cancel(self) -> None:
        """End soon, from any thread: after this token, or before the prompt's next layer.

        ``run`` then returns what there is, and the cache stays as good as ever.
        """
        self._cancelled.set()

    def run(self, prompt_ids: torch.Tensor, sampling: Sampling) -> Generated:
        """Answer prompt_ids [1, tokens]. Raises RunError when the model cannot take them."""
        sampling.check()
        check_ids(self.model, prompt_ids)
        room = check_length(self.model, prompt_ids.shape[1], self.context_tokens)
        self._room = min(sampling.max_new_tokens, room)
        self.prompt_tokens = prompt_ids.shape[1]
        self._end_ids = sampling.ends(self.model, self._tokenizer)
        config = sampling.config(self.model, self._room, self._end_ids)
        self._text = TextStream(
            self._tokenizer,
            self._on_text,
            sampling.stop_strings,
            on_reasoning=self._on_reasoning,
            parser=sampling.turn and sampling.turn.parser(self._tokenizer, prompt_ids),
        )
        set_seed(sampling.seed)
        self.session.before_steps.append(self._look_up)
        try:
            out_of_memory = naming_lack_of_memory(prompt_ids.device, "generating")
            with torch.inference_mode(), out_of_memory:
                self.model.generate(
                    prompt_ids,
                    attention_mask=torch.ones_like(prompt_ids),
                    past_key_values=new_cache(self.model, self.prompt_tokens + self._room),
                    generation_config=config,
                    streamer=self._timings,
                    stopping_criteria=StoppingCriteriaList([Ends(self._take, prompt_ids.device)]),
                )
        except Cancelled:
            pass
        finally:
            self.session.before_steps.remove(self._look_up)
        self.end_text()
        return self.outcome()

    def end_text(self) -> None:
        """Hand on the text still held back, for nothing more will come."""
        self._text.end()

    def outcome(self) -> Generated:
        """What has been generated until now."""
        ids, times = self._timings.token_ids, self._timings.token_s
        return Generated(
            prompt_tokens=self.prompt_tokens,
            new_tokens=len(ids),
            answers=1 if ids else 0,
            prompt_s=times[0] - self._timings.began_s if times else 0.0,
            decode_s=times[-1] - times[0] if times else 0.0,
            totals=self.session.totals.since(self._before),
            token_ids=ids,
            text=self._text.text,
            reasoning=self._text.reasoning,
            ending=self._ending(ids),
        )

    def _take(self, token: int) -> bool:
        self._text.push(token)
        return self._text.stopped or self._cancelled.is_set()

    def _look_up(self) -> None:
        """Between two layers nothing is left half done."""
        if self._cancelled.is_set():
            raise Cancelled

    def _ending(self, ids: list[int]) -> Ending:
        if self._text.stopped or (ids and ids[-1] in self._end_ids):
            return "stop"
        return "length" if len(ids) >= self._room else "cancelled"


def encode(tokenizer: Any, prompt: str, device: torch.device) -> torch.Tensor:
    """The prompt's token ids, int64[1, tokens]. Raises RunError when there are none."""
    if tokenizer is None:
        raise RunError("the model has no tokenizer: it cannot take text")
    ids: torch.Tensor = tokenizer(prompt, return_tensors="pt").input_ids
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
