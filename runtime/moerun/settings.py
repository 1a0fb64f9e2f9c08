"""How a store is to be run: what the command line, a program or a bench asks for."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from moepolicy import PolicySpec

from moerun.store.expert_store import ExpertStore

CPU = torch.device("cpu")


@dataclass(frozen=True)
class Settings:
    """How a store is to be run. ``slots`` is per layer; ``memory_bytes``, for all of the device's
    memory that the run may take, sets it instead."""

    policy: PolicySpec
    slots: int | None = None
    memory_bytes: int | None = None
    context_tokens: int | None = None  # to plan memory for; None: some thousand
    prompt_tokens: int | None = None  # the longest prompt; None: all of the context
    prompt_chunk: int | None = None  # tokens of a prompt that are read at a time; None: all
    logit_tokens: int = 1  # of which a pass gives the logits
    texts: int = 1  # that may be decoded together
    exact_reuse: bool = False  # what a text goes on from has the bits of a run from the start
    memory_file: Path | None = None  # in which the budget may be changed
    scope: str = "layer"
    device: torch.device = CPU
    streams: int = 1
    link_bytes_per_s: float | None = None  # a cap; None: as fast as it goes
    host_bytes: int | None = None  # of the cache between disk and device; None: room for all
    chunk_bytes: int = 0  # experts travel in pieces of this; 0: whole
    cold: bool = False  # keep what is read out of the page cache
    horizon: int | None = None  # None: as far as the policy reads predictions
    calibration: str | None = None  # the trace that policies count experts in
    learned: Path | None = None  # where what the policy learns is kept from run to run
    falls_back: bool = False  # to LRU, where the policy fails; else its error ends the run
    low: ExpertStore | None = None  # the same experts at a lower precision
    machine: str | None = None  # a machine profile, for policies that ask for this machine's speed

    @property
    def predicts(self) -> int:
        """Number of layers ahead that gates are applied."""
        return self.ahead(self.policy)

    def ahead(self, policy: PolicySpec) -> int:
        """Number of layers ahead that gates are applied under ``policy``."""
        return max(self.horizon or 0, policy.horizon)

    @property
    def copies(self) -> int:
        """Copies that may be under way at once; in pieces, prefetches have their own streams."""
        return self.streams * (2 if self.chunk_bytes else 1)
