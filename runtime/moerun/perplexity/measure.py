"""Perplexity of a model at several precisions and under several policies, over one text.

The model is the one that generates: its experts come through the session, its forward pass is
stock. Every finished window is noted, so that a killed measurement goes on where it was.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from moepolicy import PolicySpec

from moerun.checkpoint.context import context_limit
from moerun.checkpoint.families import read_config
from moerun.errors import RunError, UsageError
from moerun.live.runner import Runner
from moerun.perplexity.cells import cell_of
from moerun.perplexity.results import Cell, Results, Scored
from moerun.perplexity.subject import Subject, Text
from moerun.perplexity.windows import Window, nats, nats_by_token, windows
from moerun.settings import Settings
from moerun.store.expert_store import ExpertStore
from moerun.store.find import cache_folder
from moerun.versions import run_packages

COMMON_CONTEXT = 2048  # what papers on quantisation measure at, where the model has as much


class Measurement:
    """One model on one text: what the cells of a grid have in common."""

    def __init__(
        self,
        model: str,
        text: str,
        settings: Settings,
        *,
        context: int | None = None,
        stride: int | None = None,
        tokens: int | None = None,
        by_token: bool = False,
        said_of: str = "the text",
    ) -> None:
        """`settings` say how to run, but for the policy. `tokens`: only the first so many;
        `said_of`: what errors call the text;
        `by_token`: decode as `nats_by_token` does. Raises RunError for what cannot be measured."""
        self.by_token = by_token
        self._subject = Subject.of(model)
        self._text = Text.encoded(text, self._subject.folder, tokens)
        limit = context_limit(read_config(self._subject.folder))
        self.context = context or min(limit or COMMON_CONTEXT, COMMON_CONTEXT)
        self.stride = stride or self.context
        self._check(limit, said_of)
        self.settings = replace(
            settings,
            context_tokens=self.context,
            prompt_tokens=self.context,
            logit_tokens=1 if by_token else self.context,
        )
        self.windows = windows(self._text.n_tokens, self.context, self.stride)

    @property
    def ids(self) -> torch.Tensor:
        """The text's tokens, int64[1, tokens]."""
        return self._text.ids

    def _check(self, limit: int | None, said_of: str) -> None:
        if self.context < 2 or (limit is not None and self.context > limit):
            most = "" if limit is None else f" and at most the model's {limit}"
            raise UsageError.of("context", f"must be 2 or more{most}, not {self.context}")
        if not 1 <= self.stride <= self.context:
            raise UsageError.of(
                "stride",
                f"must be 1 to the context of {self.context}, not {self.stride}: "
                "more would leave tokens out",
            )
        if self._text.n_tokens < 2:
            raise RunError(f"{said_of} has {self._text.n_tokens} tokens: give a text of 2 or more")

    def use_low(self, low: ExpertStore) -> None:
        """The store that policies load a lower precision from."""
        self.settings = replace(self.settings, low=low)

    @property
    def identity(self) -> dict[str, Any]:
        """All that the numbers depend on, besides the precisions and the policy."""
        settings = self.settings
        return {
            "model": self._subject.name,
            "source_digest": self._subject.digest,
            "text_sha256": self._text.sha256,
            "text_bytes": self._text.n_bytes,
            "tokens": self._text.n_tokens,
            "context": self.context,
            "stride": self.stride,
            "by_token": self.by_token,
            "low": settings.low.index.precision if settings.low else None,
            "slots": settings.slots,
            "memory_bytes": settings.memory_bytes,
            "scope": settings.scope,
            "calibration": settings.calibration,
            "device": str(settings.device),
            "packages": run_packages(),
        }

    def default_results(self) -> Path:
        """Where results are kept that the user named no place for."""
        digest = hashlib.sha256(repr(self.identity).encode()).hexdigest()[:16]
        name = self._subject.name.replace("/", "--")
        return cache_folder().parent / "perplexity" / f"{name}-{digest}.jsonl"

    def measure(
        self,
        store: ExpertStore,
        attention: str,
        experts: str,
        policy: PolicySpec,
        results: Results,
        progress: Callable[[], None],
    ) -> Cell:
        """One cell; `progress` is told of each window that is measured now.

        Under a lossy policy a window depends on what the ones before left in the cache, which a
        measurement that is taken up begins without. Raises RunError where logits overflow.
        """
        key = attention, experts, policy.label
        done = results.windows(key)
        ids = self.ids.to(self.settings.device)
        with Runner(store, replace(self.settings, policy=policy)) as runner:
            for number, window in enumerate(self.windows):
                if number in done:
                    continue
                done[number] = self._score(runner, ids, window, number)
                results.add_window(key, number, done[number])
                progress()
        n_scored = sum(window.end - window.first for window in self.windows)
        low = self.settings.low if "low" in policy.requires else None
        scored = done.values()
        cell = cell_of(store, attention, experts, policy, self._text, scored, n_scored, low)
        results.add_cell(cell)
        return cell

    def _score(self, runner: Runner, ids: torch.Tensor, window: Window, number: int) -> Scored:
        before = runner.session.totals
        found = (nats_by_token if self.by_token else nats)(runner.model, ids, window)
        if not math.isfinite(found):
            raise RunError(
                f"the logits of {runner.store.path} are not finite in window {number}: pack with "
                "--dense-precision bf16"
            )
        totals = runner.session.totals.since(before)
        return Scored(found, *(getattr(totals, name) for name in Scored._fields[1:]))
