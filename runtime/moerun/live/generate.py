"""Text from a prompt, a token a pass of the stock model, streamed and timed."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from transformers import DynamicCache, LogitsProcessor, LogitsProcessorList

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
from moerun.live.work import Ending, Generated, Timings, Work


class Cancelled(Exception):
    """A generation was told to stop while it read its prompt."""


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
        self._ids: torch.Tensor  # of prompt and answer, int64[1, tokens]
        self._greedy: bool
        self._drawn: torch.Generator
        self._chain: LogitsProcessorList
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
        self._start(prompt_ids, sampling, constraint)
        self.session.before_steps.append(self._look_up)
        try:
            out_of_memory = naming_lack_of_memory(prompt_ids.device, "generating")
            with torch.inference_mode(), out_of_memory:
                begun = self._begin(prompt_ids, sampling)
                with self.session.texts.passes_of([self.row]), self._scoring(prompt_ids, sampling):
                    read = self._read_chunks(prompt_ids, begun)
                    while self.choose(self._read(self._ids, begun.cache, read)):
                        read = self._ids.shape[1] - 1
                self._keep(prompt_ids[0].tolist() + self._timings.token_ids, begun.cache)
        except Cancelled:
            pass
        finally:
            self.session.before_steps.remove(self._look_up)
            self.session.texts.end(self.row)
        self.end_text()
        return self.outcome()

    @property
    def newest(self) -> torch.Tensor:
        """The token that the next pass takes, int64[1, 1]."""
        return self._ids[:, -1:]

    def choose(self, logits: torch.Tensor) -> bool:
        """Choose a token by logits [1, vocabulary], as transformers' generate() does; whether the
        text goes on after it."""
        scores = self._chain(self._ids, logits.to(torch.float32, copy=True))
        if self._greedy:
            token = scores.argmax(-1)
        else:
            probabilities = scores.softmax(-1)
            token = torch.multinomial(probabilities, 1, generator=self._drawn)[:, 0]
        self._ids = torch.cat([self._ids, token[:, None]], dim=1)
        self._timings.put(token)
        chosen = int(token)
        stopped = self._take(chosen) or chosen in self._end_ids
        return not stopped and len(self.token_ids) < self._room

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

    def _start(
        self, prompt_ids: torch.Tensor, sampling: Sampling, constraint: LogitsProcessor | None
    ) -> None:
        """Note what the answer begins with, what ends it, and how its tokens are chosen."""
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
        device = prompt_ids.device
        self._ids, self._greedy = prompt_ids, sampling.greedy
        self._drawn = torch.Generator(device).manual_seed(sampling.seed)
        self._chain = self._processors(sampling, device, constraint)
        self._timings.put(prompt_ids)

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
