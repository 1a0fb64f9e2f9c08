"""Perplexity of a model at several precisions and under several policies, over one text.

The model is the one that generates: its experts come through the session, its forward pass is
stock. Every finished window is noted, so that a killed measurement goes on where it was.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from moepolicy import Counts, PolicySpec

from moerun.checkpoint.context import context_limit
from moerun.checkpoint.families import read_config
from moerun.checkpoint.hub import resolve
from moerun.checkpoint.weights import Checkpoint
from moerun.errors import RunError, UsageError
from moerun.format.expert import ExpertShape
from moerun.live.kvcache import new_cache
from moerun.live.runner import Runner
from moerun.memory.needs import LOGIT_ROWS
from moerun.offload.load import load_tokenizer
from moerun.perplexity.results import Cell, Published, Results, Scored
from moerun.perplexity.table1 import published
from moerun.settings import Settings
from moerun.store.expert_store import ExpertStore
from moerun.store.find import cache_folder, is_store
from moerun.store.index import read_index
from moerun.versions import run_packages

COMMON_CONTEXT = 2048  # what papers on quantisation measure at, where the model has as much


@dataclass(frozen=True, slots=True)
class Window:
    """Tokens [begin, end) are read together, of which [first, end) are scored."""

    begin: int
    first: int
    end: int


def windows(n_tokens: int, context: int, stride: int) -> list[Window]:
    """Windows of `context` tokens, one every `stride`; each token is scored once.

    A token is scored in the first window that has it with a token before it. So with stride =
    context, the disjoint windows of papers on quantisation, the first of each is scored nowhere;
    with a smaller stride all but the text's first are, after context - stride tokens or more.
    """
    found, scored = [], 0
    for begin in range(0, n_tokens, stride):
        end = min(begin + context, n_tokens)
        first = max(scored, begin + 1)
        if first < end:
            found.append(Window(begin, first, end))
        scored = end
        if end == n_tokens:
            break
    return found


@torch.inference_mode()
def nats(model: Any, ids: torch.Tensor, window: Window) -> float:
    """The negative log-likelihood of a window's scored tokens; ids int64[1, tokens]."""
    text = ids[:, window.begin : window.end]
    scored = window.end - window.first
    logits = model(text, use_cache=False, logits_to_keep=scored + 1).logits[0, :-1]
    labels = text[0, -scored:]
    total = 0.0
    for start in range(0, scored, LOGIT_ROWS):
        rows = slice(start, start + LOGIT_ROWS)
        total += float(F.cross_entropy(logits[rows].float(), labels[rows], reduction="sum"))
    return total


@torch.inference_mode()
def nats_by_token(model: Any, ids: torch.Tensor, window: Window) -> float:
    """The same, the scored tokens decoded one at a time after a prompt of those before them."""
    text = ids[:, window.begin : window.end]
    prompt = window.first - window.begin
    cache = new_cache(model, text.shape[1])  # as an answer has
    out = model(text[:, :prompt], past_key_values=cache, use_cache=True, logits_to_keep=1)
    total = 0.0
    for i in range(prompt, text.shape[1]):
        total += float(F.cross_entropy(out.logits[:, -1].float(), text[:, i], reduction="sum"))
        if i + 1 < text.shape[1]:
            out = model(text[:, i : i + 1], past_key_values=cache, use_cache=True)
    return total


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
    ) -> None:
        """`settings` say how it is run, the policy aside. `tokens`: only the first so many;
        `by_token`: decode as `nats_by_token` does. Raises RunError for what cannot be measured."""
        self.by_token = by_token
        self._model = model
        folder, self._digest, self._name = _subject(model)
        self.ids, self._text_bytes = _encode(folder, text, tokens)
        limit = context_limit(read_config(folder))
        self.context = context or min(limit or COMMON_CONTEXT, COMMON_CONTEXT)
        self.stride = stride or self.context
        self._check(limit)
        self.settings = replace(
            settings,
            context_tokens=self.context,
            prompt_tokens=self.context,
            logit_tokens=1 if by_token else self.context,
        )
        self.windows = windows(self.ids.shape[1], self.context, self.stride)
        self._text_digest = hashlib.sha256(text.encode()).hexdigest()

    def _check(self, limit: int | None) -> None:
        if self.context < 2 or (limit is not None and self.context > limit):
            most = "" if limit is None else f" and at most the model's {limit}"
            raise UsageError(f"context must be 2 or more{most}, not {self.context}")
        if not 1 <= self.stride <= self.context:
            raise UsageError(
                f"stride must be 1 to the context of {self.context}, not {self.stride}: "
                "more would leave tokens out"
            )
        if self.ids.shape[1] < 2:
            raise RunError(f"the text has {self.ids.shape[1]} tokens: give one of 2 or more")

    def use_low(self, low: ExpertStore) -> None:
        """The store that policies load a lower precision from."""
        self.settings = replace(self.settings, low=low)

    @property
    def identity(self) -> dict[str, Any]:
        """All that the numbers depend on, besides the precisions and the policy."""
        settings = self.settings
        return {
            "model": self._name,
            "source_digest": self._digest,
            "text_sha256": self._text_digest,
            "text_bytes": self._text_bytes,
            "tokens": self.ids.shape[1],
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
        name = self._name.replace("/", "--")
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
        cell = self._cell(store, attention, experts, policy, list(done.values()))
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

    def _cell(
        self,
        store: ExpertStore,
        attention: str,
        experts: str,
        policy: PolicySpec,
        scored: list[Scored],
    ) -> Cell:
        n_scored = sum(window.end - window.first for window in self.windows)
        total_nats = math.fsum(window.nats for window in scored)
        mean = total_nats / n_scored
        # By name: the first column is the nats.
        _, *sums = map(math.fsum, zip(*scored, strict=True))
        masses: dict[str, Any] = dict(zip(Scored._fields[1:], sums, strict=True))
        low = self.settings.low if "low" in policy.requires else None
        row = published(store.index)
        return Cell(
            attention=attention,
            experts=experts,
            policy=policy.label,
            lossy=policy.policy.lossy,
            perplexity=math.exp(mean),
            bits_per_byte=mean / math.log(2) * self.ids.shape[1] / self._text_bytes,
            scored_tokens=n_scored,
            nats=total_nats,
            store_bytes=store.total_bytes,
            expert_bytes=store.n_keys * store.record_bytes,
            attention_bytes=store.attention_bytes,
            low_expert_bytes=low.n_keys * low.record_bytes if low else 0,
            bits_per_weight=8 * store.total_bytes / store.n_weights,
            **Counts(**masses).shares,
            published=Published(row.size_gib, row.wikitext2, row.c4) if row else None,
            expert_data_bytes=store.n_keys * store.index.layout.data_bytes,
            attention_data_bytes=_attention_data_bytes(store),
        )


def _attention_data_bytes(store: ExpertStore) -> int:
    packed = store.index.attention
    if packed is None:
        return 0
    shapes = (ExpertShape.matrix(linear.rows, linear.columns) for linear in packed.linears)
    return sum(shape.record(packed.precision).data_bytes for shape in shapes)


def own_precisions(model: str) -> tuple[str, str] | None:
    """Attention's and the experts' of a store's folder; None for a checkpoint, which has all."""
    folder = Path(model).expanduser()
    if not is_store(folder):
        return None
    index = read_index(folder)
    return index.attention_precision, index.precision


def _subject(model: str) -> tuple[Path, str, str]:
    """Folder with configuration and tokenizer, digest of the weights, and name of a model."""
    folder = Path(model).expanduser()
    if is_store(folder):
        index = read_index(folder)
        return folder, index.source_digest, index.model
    folder = resolve(model)
    checkpoint = Checkpoint(folder)
    try:
        return folder, checkpoint.digest(), folder.resolve().name if Path(model).is_dir() else model
    finally:
        checkpoint.close()


def _encode(folder: Path, text: str, tokens: int | None) -> tuple[torch.Tensor, int]:
    """Token ids, int64[1, tokens], and how many bytes of text they are."""
    tokenizer = load_tokenizer(folder)
    if tokenizer is None:
        raise RunError(f"{folder} has no tokenizer: it cannot take text")
    ids: torch.Tensor = tokenizer(text, return_tensors="pt").input_ids
    if tokens is None or tokens >= ids.shape[1]:
        return ids.long(), len(text.encode())
    if tokens < 2:
        raise UsageError(f"tokens must be 2 or more, not {tokens}")
    ids = ids[:, :tokens].long()
    kept = tokenizer.decode(ids[0], skip_special_tokens=True, clean_up_tokenization_spaces=False)
    return ids, len(kept.encode())
