"""What is measured: a model by its folder and the digest of its weights, and a text in tokens."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch

from moerun.checkpoint.hub import resolve
from moerun.checkpoint.opening import open_weights
from moerun.errors import RunError, UsageError
from moerun.offload.load import load_tokenizer
from moerun.store.find import is_store
from moerun.store.index import read_index


class Subject(NamedTuple):
    """A model: the folder of its configuration and tokenizer, its weights' digest, its name."""

    folder: Path
    digest: str
    name: str

    @classmethod
    def of(cls, model: str) -> Subject:
        """``model`` is a store's folder, or what ``hub.resolve`` takes. Raises RunError."""
        folder = Path(model).expanduser()
        if is_store(folder):
            index = read_index(folder)
            return cls(folder, index.source_digest, index.model)
        folder = resolve(model)
        checkpoint = open_weights(folder)
        try:
            name = folder.resolve().name if Path(model).exists() else model
            return cls(folder, checkpoint.digest(), name)
        finally:
            checkpoint.close()


@dataclass(frozen=True)
class Text:
    """Token ids, int64[1, tokens], the bytes of UTF-8 they stand for, and the whole text's hash."""

    ids: torch.Tensor
    n_bytes: int
    sha256: str

    @classmethod
    def encoded(cls, text: str, folder: Path, tokens: int | None) -> Text:
        """``text`` by the tokenizer in ``folder``; ``tokens``: only the first so many.

        Raises RunError where there is no tokenizer, UsageError for fewer than 2 tokens.
        """
        tokenizer = load_tokenizer(folder)
        if tokenizer is None:
            raise RunError(f"{folder} has no tokenizer: it cannot take text")
        sha256 = hashlib.sha256(text.encode()).hexdigest()
        ids: torch.Tensor = tokenizer(text, return_tensors="pt").input_ids
        if tokens is None or tokens >= ids.shape[1]:
            return cls(ids.long(), len(text.encode()), sha256)
        if tokens < 2:
            raise UsageError.of("tokens", f"must be 2 or more, not {tokens}")
        ids = ids[:, :tokens].long()
        kept = tokenizer.decode(
            ids[0], skip_special_tokens=True, clean_up_tokenization_spaces=False
        )
        return cls(ids, len(kept.encode()), sha256)

    @property
    def n_tokens(self) -> int:
        """Number of tokens in the text."""
        return self.ids.shape[1]


def own_precisions(model: str) -> tuple[str, str] | None:
    """Attention's and the experts' of a store's folder; None for a checkpoint, which has all."""
    folder = Path(model).expanduser()
    if not is_store(folder):
        return None
    index = read_index(folder)
    return index.attention_precision, index.precision
