"""Measures what an expert takes that is computed on the CPU, from where its record is kept."""

from __future__ import annotations

import time
from dataclasses import dataclass
from functools import partial
from statistics import median
from typing import Any, Self

import torch

from moerun.live.assembly import make_cpu_experts
from moerun.offload.cpu_experts import CpuExperts
from moerun.offload.experts import compute_expert
from moerun.settings import Settings
from moerun.store.expert_store import ExpertStore

KEYS = 12  # experts measured in a turn, spread over all
BATCH = 8  # tokens; the other case is one


@dataclass(frozen=True)
class CpuCost:
    """Seconds, measured while nothing else computes; the entries are those of moesim's profiles.

    expert_s         one expert's compute for one token, bringing its record and the result included
    expert_token_s   each further token in it
    """

    workers: int
    expert_s: float
    expert_token_s: float

    @classmethod
    def median_of(cls, runs: list[Self]) -> Self:
        """The median of each time over several runs, which had the same workers."""
        return cls(
            workers=runs[0].workers,
            expert_s=median(run.expert_s for run in runs),
            expert_token_s=median(run.expert_token_s for run in runs),
        )


class CpuExpertBench:
    """Times experts of a store on the CPU. ``link`` is a link of the same store."""

    def __init__(self, store: ExpertStore, settings: Settings, link: Any, module: Any) -> None:
        self._cpu_experts: CpuExperts = make_cpu_experts(store, settings, link)
        self._compute = partial(compute_expert, module)
        self._keys = range(0, store.n_keys, max(1, store.n_keys // KEYS))
        first = next(param for param in store.index.shape.params if param.is_matrix)
        columns = first.rows_columns[1]
        self._x = torch.ones(BATCH, columns, device=settings.device)
        self.run()  # checksums are compared the first time

    def close(self) -> None:
        """End the workers."""
        self._cpu_experts.close()

    def run(self) -> CpuCost:
        """Measure an expert on one token and on many: the difference is the further tokens'."""
        one = median(self._time(key, 1) for key in self._keys)
        many = median(self._time(key, BATCH) for key in self._keys)
        return CpuCost(1, one, max((many - one) / (BATCH - 1), 0.0))

    def _time(self, key: int, tokens: int) -> float:
        began_s = time.perf_counter()
        self._cpu_experts.expert(key).begin(self._compute, self._x[:tokens])()
        self._cpu_experts.join()
        return time.perf_counter() - began_s
