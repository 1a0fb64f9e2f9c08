"""Measures the times of compute while a model decodes: of each layer and expert, and of waking
up."""

from __future__ import annotations

import time
from collections.abc import Generator
from dataclasses import dataclass, fields
from itertools import pairwise
from statistics import fmean, median
from typing import NamedTuple, Self

import numpy as np
import torch

from moerun.live.gates import SessionExperts
from moerun.live.session import Session
from moerun.offload.experts import Item, Served
from moerun.profiling.link import LinkCost


@dataclass(frozen=True)
class ComputeCost:
    """Seconds; the entries are those of moesim's profiles.

    token_s          once a forward pass: embedding, head, sampling, the loop around them
    layer_s          a layer outside its experts: attention, norms, gate, policy, locks
    layer_token_s    each further token of a batch in such a layer
    prefetch_s       more in a layer where the policy predicts and fetches ahead: the gates it
                     asks, and what its copies take from compute
    arrival_s        more in a layer that stood still for an expert: waking up, with caches that
                     have gone cold
    expert_s         one expert's compute for one token
    expert_token_s   each further token in it
    """

    token_s: float
    layer_s: float
    layer_token_s: float
    prefetch_s: float
    arrival_s: float
    expert_s: float
    expert_token_s: float

    @classmethod
    def median_of(cls, runs: list[Self]) -> Self:
        """The median of each entry over several runs."""
        return cls(**{f.name: median(getattr(run, f.name) for run in runs) for f in fields(cls)})


@dataclass(frozen=True)
class StepTimes:
    """One step: when its gate had chosen, when its last expert was done, and the time of each
    expert."""

    layer: int
    tokens: int
    entered_s: float
    left_s: float
    stall_s: float
    misses: int
    experts: tuple[tuple[int, float], ...]  # tokens, seconds

    @property
    def serving_s(self) -> float:
        """Seconds of serving without computing experts and waiting for them: policy and locks."""
        return self.left_s - self.entered_s - self.stall_s - self.computing_s

    @property
    def computing_s(self) -> float:
        """Seconds of compute in the step's experts."""
        return sum(seconds for _, seconds in self.experts)


class Stopwatch:
    """Passes a model's calls on to its session, and notes when each step and expert ran."""

    def __init__(self, experts: SessionExperts, session: Session, device: torch.device) -> None:
        """``experts`` are those of ``session``."""
        self._experts = experts
        self._session = session
        self._device = device
        self._totals = session.totals
        self.steps: list[StepTimes] = []

    def serve(self, layer: int, top_k_index: torch.Tensor, top_k_weights: torch.Tensor) -> Served:
        """Serve the layer by the session, and note when each of its experts was computed."""
        entered_s = self._now()
        served = self._experts.serve(layer, top_k_index, top_k_weights)
        return Served(served.ids, self._timed(layer, served, entered_s))

    def _timed(self, layer: int, served: Served, entered_s: float) -> Generator[Item]:
        used = np.bincount(served.ids.ravel(), minlength=self._session.context.n_experts).tolist()
        experts = []
        for expert, slot in served:
            given_s = self._now()
            yield expert, slot
            experts.append((used[expert], self._now() - given_s))
        left_s = self._now()
        before, self._totals = self._totals, self._session.totals
        spent = self._totals.since(before)
        self.steps.append(
            StepTimes(
                layer=layer,
                tokens=len(served.ids),
                entered_s=entered_s,
                left_s=left_s,
                stall_s=spent.stall_s,
                misses=spent.misses,
                experts=tuple(experts),
            )
        )

    def _now(self) -> float:
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
        return time.perf_counter()


class Lap(NamedTuple):
    """A decoded token's step, and the model's work from there to the next step's gate."""

    step: StepTimes
    after_s: float
    ends_pass: bool
    stall_free: bool  # neither it nor the one before it stood still for an expert

    @property
    def total_s(self) -> float:
        """Seconds from the step's gate to the next step's gate."""
        return self.step.left_s - self.step.entered_s + self.after_s


def costs(
    steps: list[StepTimes], link: LinkCost, record_bytes: int, watching_s: float
) -> ComputeCost:
    """The constants of one run: of whole passes, a prompt's first, then one token each.

    ``watching_s`` is how much longer than an unwatched one a step took.
    ``expert_s`` and ``layer_s`` are medians over steps without a stall. ``arrival_s`` takes up all
    time that no other constant counts, such as what a stall costs the steps after it, so the
    constants add up to the decoding. Compute that a copy slows down is counted nowhere.
    """
    laps = _laps([step for step in steps if step.tokens == 1])
    inner = [lap for lap in laps if not lap.ends_pass] or laps
    last = [lap for lap in laps if lap.ends_pass] or laps
    steady = [lap for lap in inner if lap.stall_free] or inner
    expert_s = median(lap.step.computing_s / len(lap.step.experts) for lap in steady)
    layer_s = median(lap.step.serving_s + lap.after_s for lap in steady)
    copy_s = record_bytes / link.bytes_per_s
    stalls = sum(lap.step.stall_s > 0 for lap in inner)
    flow_s = sum(layer_s + _flow_s(lap.step, expert_s, link, copy_s) for lap in inner)
    waking_s = max(sum(lap.total_s for lap in inner) - flow_s, 0.0)
    prompt = [step for step in steps if step.tokens > 1]
    layer_token_s, expert_token_s = _of_further_tokens(prompt, layer_s, expert_s)
    return ComputeCost(
        token_s=max(fmean(lap.after_s for lap in last) - fmean(lap.after_s for lap in inner), 0.0),
        layer_s=max(layer_s - watching_s, 0.0),
        layer_token_s=layer_token_s,
        prefetch_s=0.0,
        arrival_s=waking_s / stalls if stalls else 0.0,
        expert_s=expert_s,
        expert_token_s=expert_token_s,
    )


def _laps(steps: list[StepTimes]) -> list[Lap]:
    stood = [False, *(step.stall_s > 0 for step in steps)]
    return [
        Lap(
            step=one,
            after_s=other.entered_s - one.left_s,
            ends_pass=other.layer == 0,
            stall_free=not (stood[i] or stood[i + 1]),
        )
        for i, (one, other) in enumerate(pairwise(steps))
    ]


def _flow_s(step: StepTimes, expert_s: float, link: LinkCost, copy_s: float) -> float:
    """Seconds from the gate's choice to the last expert's end, without waking up for an arrival."""
    now_s = (len(step.experts) - step.misses) * expert_s
    for n in range(1, step.misses + 1):
        now_s = max(now_s, link.latency_s + n * copy_s) + expert_s
    return now_s


def _of_further_tokens(
    prompt: list[StepTimes], layer_s: float, expert_s: float
) -> tuple[float, float]:
    """The seconds that each further token of a prompt's pass takes in a layer, and in an expert."""
    if not prompt:
        return 0.0, 0.0
    layers_s = [b.entered_s - a.left_s + b.serving_s for a, b in pairwise(prompt) if b.layer > 0]
    calls = [call for step in prompt for call in step.experts]
    further = sum(tokens - 1 for tokens, _ in calls)
    excess_s = sum(seconds for _, seconds in calls) - len(calls) * expert_s
    return (
        # A model of one layer has none that another one precedes.
        max((fmean(layers_s) - layer_s) / (prompt[0].tokens - 1), 0.0) if layers_s else 0.0,
        max(excess_s / further, 0.0) if further else 0.0,
    )
