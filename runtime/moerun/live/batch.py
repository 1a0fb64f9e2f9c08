"""Several texts decoded together: a pass takes the newest token of each, and a layer's step is the
union of their experts, each of which is brought once.

A prompt is read alone, then its text joins the others. Matrices multiply more rows then, so the
last bit of a text's logits may differ from a run alone: in float32 by some 1e-5, which changes a
token only where two are as likely to that digit.
"""

from __future__ import annotations

from typing import Any

import torch
from transformers import DynamicCache, LogitsProcessor

from moerun.devices import naming_lack_of_memory
from moerun.live.batch_cache import BatchCache, check_batches
from moerun.live.generate import Cancelled, Generation
from moerun.live.sampling import Sampling


class BatchedGeneration(Generation):
    """One prompt being answered in a batch, which asks for one token after the other."""

    def read(
        self,
        prompt_ids: torch.Tensor,
        sampling: Sampling,
        constraint: LogitsProcessor | None = None,
    ) -> DynamicCache | None:
        """Read prompt_ids [1, tokens] and choose the first token; its cache, None where that was
        the last. Raises RunError when the model cannot take the prompt."""
        self._start(prompt_ids, sampling, constraint)
        self.session.before_steps.append(self._look_up)
        goes_on = False
        try:
            begun = self._begin(prompt_ids, sampling)
            with self.session.texts.passes_of([self.row]), self._scoring(prompt_ids, sampling):
                read = self._read_chunks(prompt_ids, begun)
                goes_on = self.choose(self._read(prompt_ids, begun.cache, read))
        except Cancelled:
            return None
        finally:
            self.session.before_steps.remove(self._look_up)
            if not goes_on:
                self.session.texts.end(self.row)
        if not goes_on:
            self.leave(begun.cache)
        return begun.cache if goes_on else None

    @property
    def reads_again(self) -> bool:
        """Whether the text's cache is to be kept when it ends."""
        return self._kept is not None

    def leave(self, cache: DynamicCache | None) -> None:
        """The text has ended: its cache is for one that begins alike."""
        self.session.texts.end(self.row)
        if cache is not None:
            self._keep(self._ids[0].tolist(), cache)
        self.end_text()


class Batch:
    """The texts that are decoded together."""

    def __init__(self, model: Any, device: torch.device) -> None:
        """Raises RunError for a model whose texts cannot be decoded together."""
        check_batches(model)
        self.rows: list[BatchedGeneration] = []
        self._model = model
        self._device = device
        self._cache = BatchCache(model)

    def add(
        self,
        generation: BatchedGeneration,
        prompt_ids: torch.Tensor,
        sampling: Sampling,
        constraint: LogitsProcessor | None = None,
    ) -> bool:
        """Read a prompt and take its text in; False where it has ended with its first token.

        An error leaves the other texts as they were.
        """
        generation.texts_beside = len(self.rows)
        with torch.inference_mode(), naming_lack_of_memory(self._device, "reading a prompt"):
            cache = generation.read(prompt_ids, sampling, constraint)
            if cache is None:
                return False
            self._cache.add(cache, prompt_ids.shape[1])
            self.rows.append(generation)
        return True

    def clear(self) -> None:
        """Have no texts any more: an error has left the pass over them unfinished."""
        for row in self.rows:
            row.session.texts.end(row.row)
        self.rows = []
        self._cache = BatchCache(self._model)

    def step(self) -> list[BatchedGeneration]:
        """Decode a token of each text; those that have ended with it, and are texts of the batch
        no more."""
        cache, rows = self._cache, self.rows
        passes = rows[0].session.texts.passes_of([row.row for row in rows])
        with torch.inference_mode(), naming_lack_of_memory(self._device, "decoding"), passes:
            logits = self._model(
                input_ids=torch.cat([row.newest for row in rows]),
                attention_mask=cache.mask(self._device),
                position_ids=cache.positions(self._device),
                past_key_values=cache.cache,
                use_cache=True,
                logits_to_keep=1,
            ).logits[:, -1]
            cache.grown()
            going_on = [row.choose(logits[i : i + 1]) for i, row in enumerate(rows)]
            ended = [row for row, goes_on in zip(rows, going_on, strict=True) if not goes_on]
            for row in ended:
                place = rows.index(row)
                del rows[place]
                row.leave(cache.remove(place, keep=row.reads_again))
        return ended
