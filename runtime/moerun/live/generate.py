"""Text from a prompt through transformers' own generate(), streamed and timed."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from transformers import (
    DynamicCache,
    LogitsProcessor,
    LogitsProcessorList,
    StoppingCriteria,
    StoppingCriteriaList,
    set_seed,
)
from transformers.generation.streamers import BaseStreamer

from moerun.devices import naming_lack_of_memory
from moerun.live.kept import Begun, KeptCache, Mark
from moerun.live.kvcache import new_cache
from moerun.live.logprobs import LogprobRecorder, PromptStates, TokenLogprob
from moerun.live.processors import processors_of
from moerun.live.prompt import check_ids, check_length
from moerun.live.sampling import Sampling
from moerun.live.session import Session
from moerun.live.text import TextStream
from moerun.live.texts import Text
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
    """One prompt being answered; ``outcome`` is right at any time, also after an interruption.

    The class is long because reading the prompt, taking tokens, ending and telling of it share the
    one text, its cache and its clock.
    """

    def __init__(
        self,
        model: Any,
        tokenizer: Any,
        session: Session,
        on_text: Callable[[str], None] | None = None,
        on_reasoning: Callable[[str], None] | None = None,
        context_tokens: int | None = None,
        kept: KeptCache | None = None,
        prompt_chunk: int = 0,
    ) -> None:
        """``on_text`` is given the new text piece by piece as it becomes certain,
        ``on_reasoning`` what a chat's turn has before its answer.

        ``context_tokens`` is what memory was planned for; None: whatever the model takes.
        ``kept``: where to look for a cache of how the prompt begins, and to leave the text's own.
        ``prompt_chunk``: tokens of the prompt that a pass reads; 0: all.
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
        self._kept = kept
        self._prompt_chunk = prompt_chunk
        self.row = Text()
        """The text, as whoever is told of passes knows it."""
        self._mark: Mark | None = None
        self.texts_beside = 0
        """Of a batch, whose caches there are in addition to this one's."""
        self._cached_tokens = 0
        self._taken: list[int] = []
        self._recorder: LogprobRecorder | None = None
        self._score: Callable[[], list[TokenLogprob]] | None = None  # the prompt, once it was read
        self.prompt_logprobs: list[TokenLogprob] = []
        """Of the prompt's tokens, from before its first new token on, where they are asked for."""
        self._end_ids: tuple[int, ...] = ()
        self._room = 1
        self._before = session.totals

    def cancel(self) -> None:
        """End soon, from any thread: after this token, or before the prompt's next layer.

        ``run`` then returns what there is, and the cache stays as good as ever.
        """
        self._cancelled.set()

    def run(
        self,
        prompt_ids: torch.Tensor,
        sampling: Sampling,
        constraint: LogitsProcessor | None = None,
    ) -> Generated:
        """Answer prompt_ids [1, tokens]; ``constraint`` forbids tokens that a grammar has no place
        for. Raises RunError when the model cannot take the prompt."""
        config = self._prepare(prompt_ids, sampling)
        set_seed(sampling.seed)
        self.session.before_steps.append(self._look_up)
        try:
            out_of_memory = naming_lack_of_memory(prompt_ids.device, "generating")
            with torch.inference_mode(), out_of_memory:
                begun = self._begin(prompt_ids, sampling)
                processors = self._processors(sampling, prompt_ids.device, constraint)
                with self.session.texts.passes_of([self.row]), self._scoring(prompt_ids, sampling):
                    self._read_chunks(prompt_ids, begun)
                    self._generate(prompt_ids, begun, config, processors)
                self._keep(prompt_ids[0].tolist() + self._timings.token_ids, begun.cache)
        except Cancelled:
            pass
        finally:
            self.session.before_steps.remove(self._look_up)
            self.session.texts.end(self.row)
        self.end_text()
        return self.outcome()

    def _generate(
        self, prompt_ids: torch.Tensor, begun: Begun, config: Any, processors: LogitsProcessorList
    ) -> None:
        self.model.generate(
            prompt_ids,
            attention_mask=torch.ones_like(prompt_ids),
            past_key_values=begun.cache,
            generation_config=config,
            logits_processor=processors,
            streamer=self._timings,
            stopping_criteria=StoppingCriteriaList([Ends(self._take, prompt_ids.device)]),
        )

    def _begin(self, prompt_ids: torch.Tensor, sampling: Sampling) -> Begun:
        """The cache that the text goes on from; its passes begin."""
        self._timings.begin()
        begun = self._begun(prompt_ids, sampling)
        self._cached_tokens = begun.tokens
        self.row = self.session.texts.begin(begun.tokens, self.prompt_tokens)
        return begun

    def _begun(self, prompt_ids: torch.Tensor, sampling: Sampling) -> Begun:
        limit_tokens = self.prompt_tokens + self._room
        if self._kept is not None and (sampling.prompt_logprobs or not sampling.reuse):
            self._kept.drop()  # all of the prompt is to be read
        if self._kept is None:
            return Begun(new_cache(self.model, limit_tokens), 0)
        return self._kept.begin(prompt_ids[0].tolist(), limit_tokens, self.texts_beside)

    def _read_chunks(self, prompt_ids: torch.Tensor, begun: Begun) -> int:
        """Read the prompt's chunks, but for the last, where prompts are read so; returns how many
        tokens have been read."""
        read, chunk = begun.tokens, self._kept.chunk_tokens if self._kept else 0
        aligned, chunk = chunk, chunk or self._prompt_chunk
        while chunk and read + chunk < self.prompt_tokens:
            self._read(prompt_ids[:, : read + chunk], begun.cache, read)
            read += chunk
        if self._kept is not None and aligned:
            self._mark = self._kept.mark(begun.cache, read)
        return read

    def _read(self, token_ids: torch.Tensor, cache: DynamicCache, held_tokens: int) -> torch.Tensor:
        """Read token_ids [1, tokens], of which ``cache`` holds some; the logits that follow."""
        logits: torch.Tensor = self.model(
            input_ids=token_ids[:, held_tokens:],
            attention_mask=torch.ones_like(token_ids),
            past_key_values=cache,
            use_cache=True,
            logits_to_keep=1,
        ).logits[:, -1]
        return logits

    def _processors(
        self, sampling: Sampling, device: torch.device, constraint: LogitsProcessor | None
    ) -> LogitsProcessorList:
        found = processors_of(sampling, self.prompt_tokens, self._end_ids, device, constraint)
        if sampling.logprobs is None:
            return found
        self._recorder = LogprobRecorder(sampling.logprobs)
        return LogitsProcessorList([self._recorder, *found])

    @contextmanager
    def _scoring(self, prompt_ids: torch.Tensor, sampling: Sampling) -> Iterator[None]:
        """Score the prompt, where that is asked for, when its pass has ended."""
        if not sampling.prompt_logprobs:
            yield
            return
        states = PromptStates(self.prompt_tokens)
        n_top = sampling.logprobs or 0
        self._score = lambda: states.logprobs(self.model, prompt_ids, n_top)
        with states.kept(self.model):
            yield

    def _keep(self, token_ids: list[int], cache: DynamicCache) -> None:
        if self._kept is not None:
            self._kept.keep(token_ids, cache, self._mark)

    def end_text(self) -> None:
        """Hand on the text still held back, for nothing more will come."""
        self._text.end()

    @property
    def logprobs(self) -> list[TokenLogprob]:
        """Of the tokens until now, where they are asked for."""
        return [] if self._recorder is None else self._recorder.tokens

    @property
    def token_ids(self) -> list[int]:
        """The tokens until now, those of text that is being handed on included."""
        return self._taken

    @property
    def tool_calls(self) -> list[Any]:
        """The calls of tools until now, as the response template gives them."""
        return self._text.tool_calls

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
            token_s=times,
            cached_tokens=self._cached_tokens,
            tool_calls=self.tool_calls,
            logprobs=self.logprobs,
            prompt_logprobs=self.prompt_logprobs,
        )

    def work(self) -> Work:
        """What it has taken until now; from any thread."""
        times = list(self._timings.token_s)
        return Work(
            prompt_tokens=self.prompt_tokens,
            new_tokens=len(times),
            answers=1 if times else 0,
            prompt_s=times[0] - self._timings.began_s if times else 0.0,
            decode_s=times[-1] - times[0] if times else 0.0,
            totals=self.session.totals.since(self._before),
            cached_tokens=self._cached_tokens,
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
        if self._score is not None:
            self.prompt_logprobs = self._score()
            self._score = None
        self._taken.append(token)
        if self._recorder is not None:
            self._recorder.took(token)
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
