"""What serves experts in a bench besides a session: hits alone, and the engine to be beaten."""

from __future__ import annotations

import time
from collections import OrderedDict
from collections.abc import Generator, Iterator, Sequence
from queue import SimpleQueue
from typing import Any

import torch

from moerun.links import Done, Link, Throttle, Variant, in_form
from moerun.live.totals import Totals
from moerun.offload.experts import Item, Served, served_in_order
from moerun.store.expert_store import ExpertStore

LINK_PROBE_S = 0.5  # what a measurement of the link aims at


class LentLink:
    """One link that sessions use in turns, so that its memory is filled only once.

    What a session does not decide (its slots, its memory) is the link's own; the owner closes it.
    """

    def __init__(self, link: Link) -> None:
        self.owned = link
        self._done: Done | None = None
        link.start(self._on_copied)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.owned, name)

    def start(self, done: Done) -> None:
        """Copies that end from now on are the caller's."""
        self._done = done

    def close(self) -> None:
        """Keep the link open: the link belongs to its owner."""
        self._done = None

    def _on_copied(self, key: int, error: Exception | None, ended_s: float) -> None:
        if self._done is not None:
            self._done(key, error, ended_s)


def copy_all(link: LentLink, copies: Sequence[tuple[int, int]]) -> float:
    """Seconds that these copies (key, slot) take behind each other, as many at once as it can."""
    ended: SimpleQueue[Exception | None] = SimpleQueue()
    link.start(lambda _key, error, _ended_s: ended.put(error))
    began_s = time.perf_counter()
    waiting = iter(copies)
    under_way = 0
    for _ in range(link.streams):
        under_way += _submit_next(link, waiting)
    while under_way:
        if (error := ended.get()) is not None:
            raise error
        under_way += _submit_next(link, waiting) - 1
    return time.perf_counter() - began_s


def link_bytes_per_s(link: LentLink, store: ExpertStore, cap: float | None) -> float:
    """The rate of copies that each begin as the one before ends; ``cap``, where there is one."""
    n, n_keys = len(link.slots), store.n_keys
    took_s = copy_all(link, [(key % n_keys, key) for key in range(n)])
    if cap is not None:
        return cap
    copies = min(max(n, int(LINK_PROBE_S / took_s * n)), 4096)
    if copies > n:
        took_s = copy_all(link, [(key % n_keys, key % n) for key in range(copies)])
    return copies * store.record_bytes / took_s


def _submit_next(link: LentLink, waiting: Iterator[tuple[int, int]]) -> int:
    copy = next(waiting, None)
    if copy is None:
        return 0
    link.submit(*copy)
    return 1


class HitsOnly:
    """Every expert is there already: what decoding takes where nothing has to be moved.

    A slot stands in for the expert, whichever lies in it at full precision: the compute is the
    same. Or none is computed at all: what decoding takes besides.
    """

    def __init__(self, slots: Sequence[Any], n_experts: int, *, computing: bool = True) -> None:
        self._slots = slots
        self._n_experts = n_experts
        self._computing = computing

    def serve(self, layer: int, top_k_index: torch.Tensor, top_k_weights: torch.Tensor) -> Served:
        """Hand out an expert for each pair that the gate chose, without any copy."""

        def slot(expert: int) -> Any:
            at = (layer * self._n_experts + expert) % len(self._slots)
            return in_form(self._slots[at], Variant.FULL) if self._computing else None

        return served_in_order(top_k_index, slot)


class ReleasedEngine:
    """A faithful model of the released mixtral-offloading engine, on the same link and slots.

    As its source does (expert_cache.py of dvmazur/mixtral-offloading): an LRU of the layer's
    experts, no speculation, and everything one after the other on one stream. Experts that are
    there compute first; for each missing one the layer's least recently used is written back to
    the host, though it has not changed, and then the missing one is copied and computed.
    """

    def __init__(
        self,
        link: Any,
        *,
        n_layers: int,
        n_experts: int,
        slots: int,
        record_bytes: int,
        throttle: Throttle | None,
        device: torch.device,
    ) -> None:
        """``slots``, 1 or more, are a layer's."""
        self._link = link
        self._n_experts = n_experts
        self._record_bytes = record_bytes
        self._throttle = throttle
        self._device = device
        self._host = torch.empty(record_bytes, dtype=torch.uint8, pin_memory=device.type == "cuda")
        self._packed = torch.empty(record_bytes, dtype=torch.uint8, device=device)
        self._free = [list(range(i * slots, (i + 1) * slots)) for i in range(n_layers)]
        self._held: list[OrderedDict[int, int]] = [OrderedDict() for _ in range(n_layers)]
        self.restart_counts()

    def restart_counts(self) -> None:
        """Hits, misses and experts written back are counted from now on."""
        self.hits = self.misses = self.written_back = 0

    @property
    def bytes_moved(self) -> int:
        """Bytes that crossed the link, both ways."""
        return (self.misses + self.written_back) * self._record_bytes

    @property
    def totals(self) -> Totals:
        """The counters, under the names of a session's totals."""
        hits, misses = self.hits, self.misses
        return Totals(requests=hits + misses, hits=hits, misses=misses, loads=misses)

    def serve(self, layer: int, top_k_index: torch.Tensor, top_k_weights: torch.Tensor) -> Served:
        """Hand out hits first, then load the missing experts of the layer one after the other."""
        ids = top_k_index.cpu().numpy()
        return Served(ids, self._served(layer, list(dict.fromkeys(ids.ravel().tolist()))))

    def _served(self, layer: int, wanted: list[int]) -> Generator[Item]:
        held = self._held[layer]
        hits = [expert for expert in wanted if expert in held]
        for expert in hits:
            held.move_to_end(expert)
        self.hits += len(hits)
        for expert in hits:
            yield expert, self._use(held[expert])
        for expert in wanted:
            if expert not in hits:
                held[expert] = self._bring(layer, expert)
                yield expert, self._use(held[expert])

    def _use(self, slot: int) -> Any:
        self._link.acquire(slot)
        return in_form(self._link.slots[slot], Variant.FULL)

    def _bring(self, layer: int, expert: int) -> int:
        self.misses += 1
        if self._free[layer]:
            slot = self._free[layer].pop()
        else:
            _, slot = self._held[layer].popitem(last=False)
            self.written_back += 1
            self._write_back(slot)
        self._link.release(slot)  # compute that reads it has been issued before
        copy_all(self._link, [(layer * self._n_experts + expert, slot)])
        return slot

    def _write_back(self, slot: int) -> None:
        began_s = time.perf_counter()
        # A slot that keeps another form than the record has none to send: as many bytes then.
        landing = in_form(self._link.slots[slot], Variant.FULL).landing
        self._host.copy_(self._packed if landing is None else landing, non_blocking=True)
        if self._device.type == "cuda":
            torch.cuda.current_stream(self._device).synchronize()
        if self._throttle:
            left_s = self._throttle.deadline_s(began_s, self._record_bytes) - time.perf_counter()
            time.sleep(max(left_s, 0.0))
