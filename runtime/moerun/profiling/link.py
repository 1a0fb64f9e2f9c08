"""Measures the link: the rate of copies behind each other, and what a lone one takes beyond it."""

from __future__ import annotations

import time
from dataclasses import dataclass, replace
from queue import SimpleQueue
from statistics import median
from typing import Self

import torch
from moepolicy import find_policy

from moerun.kernels.slots import SlotForm
from moerun.live.assembly import make_link
from moerun.live.runner import Runner
from moerun.live.session import Session
from moerun.settings import Settings
from moerun.store.expert_store import ExpertStore

LINK_COPIES = 64


@dataclass(frozen=True)
class LinkCost:
    """``latency_s`` is what a lone copy takes beyond its bytes until it is known to be there.

    One that waited for its stream (``back_to_back``) flows at once: of copies behind each other
    everything but the last one's report is in the rate.
    """

    bytes_per_s: float
    latency_s: float
    streams: int
    back_to_back: bool = True

    @classmethod
    def median_of(cls, runs: list[Self]) -> Self:
        """The medians of rate and latency over several runs, which had the same streams."""
        return cls(
            bytes_per_s=median(run.bytes_per_s for run in runs),
            latency_s=median(run.latency_s for run in runs),
            streams=runs[0].streams,
        )


def measure_link(store: ExpertStore, settings: Settings) -> LinkCost:
    """The rate of copies behind each other, or the cap; and what a lone copy waits beyond that.

    The latency is taken where it matters: it is how long compute stands still for one missing
    expert, less that expert's bytes at the rate.
    """
    rate = settings.link_bytes_per_s or _raw_rate(store, settings)
    waits = []
    with Runner(store, replace(settings, policy=find_policy("lru"), slots=0)) as runner:
        for i in range(LINK_COPIES):
            before_s = runner.session.totals.stall_s
            layer, expert = divmod(i % store.n_keys, store.n_experts)
            _consume(runner.session, layer, torch.tensor([[expert]]))
            waits.append(runner.session.totals.stall_s - before_s)
    latency_s = max(median(waits) - store.record_bytes / rate, 0.0)
    return LinkCost(bytes_per_s=rate, latency_s=latency_s, streams=settings.streams)


def _raw_rate(store: ExpertStore, settings: Settings) -> float:
    """bytes/s of copies that each begin as the one before ends."""
    form = SlotForm(store.index.shape, store.index.precision, settings.device)
    link = make_link(store, form, settings, 1)
    ended: SimpleQueue[Exception | None] = SimpleQueue()
    left = LINK_COPIES

    def on_copied(key: int, error: Exception | None, ended_s: float) -> None:
        nonlocal left
        left -= 1
        if error is None and left:
            link.submit((key + 1) % store.n_keys, 0, begin_s=ended_s)
        else:
            ended.put(error)

    link.start(on_copied)
    try:
        began_s = time.perf_counter()
        link.submit(0, 0)
        if (error := ended.get()) is not None:
            raise error
        return LINK_COPIES * store.record_bytes / (time.perf_counter() - began_s)
    finally:
        link.close()


def _consume(session: Session, layer: int, ids: torch.Tensor) -> None:
    """Ask for experts as a model would, and compute nothing."""
    weights = torch.full(ids.shape, 1.0 / ids.shape[1], device=ids.device)
    for _ in session.serve(layer, ids, weights):
        pass
