"""Text from a prompt through transformers' own generate(), streamed and timed."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from transformers import StoppingCriteria, StoppingCriteriaList, set_seed
from transformers.generation.streamers import BaseStreamer

from moerun.devices import naming_lack_of_memory
from moerun.live.kvcache import new_cache
from moerun.live.prompt import check_ids, check_length
from moerun.live.sampling import Sampling
from moerun.live.session import Session
from moerun.live.text import TextStream
from moerun.live.totals import Totals


class Timings(BaseStreamer):  # type: ignore[misc]
    """Notes when each token came."""

    def __init__(self) -> None:
        self.began_s = 0.0
        self.token_s: list[float] = []
        self.token_ids: list[int] = []
        self._prompt = True

    def put(self, value: torch.Tensor) -> None:
        """Note the time and the id of a token, int64[1]; the first call brings the prompt's ids."""
        now = time.perf_counter()
        if self._prompt:
            self.began_s, self._prompt = now, False
        else:
            self.token_s.append(now)
            self.token_ids += value.reshape(-1).tolist()

    def end(self) -> None:
        """Do nothing: no token is held back."""


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
            totals=self.totals + other.totals,
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
        """Tokens of the prompt per second; 0 where there was no prompt."""
        return self.prompt_tokens / self.prompt_s if self.prompt_s else 0.0


NO_WORK = Work(0, 0, 0, 0.0, 0.0, Totals())

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
        """Whether to end, bool[1], after the newest of ``input_ids``, int64[1, tokens]."""
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
        config = self._prepare(prompt_ids, sampling)
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

    def _prepare(self, prompt_ids: torch.Tensor, sampling: Sampling) -> Any:
        """Note what ends the answer; returns transformers' configuration of it."""
        sampling.check()
        check_ids(self.model, prompt_ids)
        room = check_length(self.model, prompt_ids.shape[1], self.context_tokens)
        self._room = min(sampling.max_new_tokens, room)
        self.prompt_tokens = prompt_ids.shape[1]
        self._end_ids = sampling.ends(self.model, self._tokenizer)
        self._text = TextStream(
            self._tokenizer,
            self._on_text,
            sampling.stop_strings,
            on_reasoning=self._on_reasoning,
            parser=sampling.turn and sampling.turn.parser(self._tokenizer, prompt_ids),
        )
        return sampling.config(self.model, self._room, self._end_ids)

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
