"""A live cache of experts: the state machine and a link under one lock, serving a model's layers.

The generating thread calls ``serve`` for each layer; the link's threads report arrivals and start
the next copy themselves, so that the link never waits for the generating thread.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from moepolicy import (
    NO_LOGITS,
    NO_PREDICTIONS,
    Context,
    ExpertCache,
    Journal,
    Kind,
    PolicyError,
    PolicySpec,
    Step,
    demand_order,
    pool_logits,
)
from moepolicy.cache import Observer
from numpy.typing import NDArray

from moerun.compiling import CompileBeside
from moerun.errors import RunError
from moerun.links import Link


class Gate(NamedTuple):
    """What one layer's gate decided for a batch, on the host; what a step and a trace row hold.

    ids        integer[tokens, top_k]
    weights    float32[tokens, top_k] as applied
    logits     float16[tokens, n_experts], or None where nobody looks at them
    predicted  float16[horizon, tokens, n_experts]: row j is the gate of layer + 1 + j; NaN past
               the last layer. None without predictions
    """

    ids: NDArray[Any]
    weights: NDArray[Any]
    logits: NDArray[Any] | None = None
    predicted: NDArray[Any] | None = None


GateObserver = Callable[[int, Gate], None]


class Totals(NamedTuple):
    """Counts since the cache was made, under the names every report uses.

    ``loads`` counts the copies over the link, prefetches included.
    """

    steps: int
    requests: int
    hits: int
    late: int
    misses: int
    loads: int
    bypasses: int
    prefetches: int
    useless_prefetches: int
    bytes_loaded: int
    stall_s: float

    @property
    def hit_ratio(self) -> float:
        return self.hits / self.requests if self.requests else 0.0

    def since(self, before: Totals) -> Totals:
        return Totals._make(now - then for now, then in zip(self, before, strict=True))


class Session:
    """Serves experts to a model out of ``n_slots`` device slots under one policy.

    The cache lives on from prompt to prompt until ``reset`` makes it cold again. An error in a
    link's thread or in the policy surfaces in the generating thread, from ``serve``; after one
    the session serves no more until it is reset.
    """

    def __init__(
        self,
        context: Context,
        policy: PolicySpec,
        make_link: Callable[[int], Link],
        *,
        record_bytes: int,
        journal: Journal | None = None,
        observers: Sequence[Observer] = (),
        compile: bool = False,
    ) -> None:
        """``make_link(n_slots)`` gives a link with so many slots, not yet started.

        ``compile``: take the policy's compiled calls into use as soon as there are some.
        """
        self.context = context
        self.policy = policy
        self.record_bytes = record_bytes
        self.gate_observers: list[GateObserver] = []
        self.before_steps: list[Callable[[], None]] = []
        """Called before each step, when nothing is half done; what one raises ends the pass."""
        self.cache = self._new_cache(journal, observers)
        self.link = make_link(self.cache.n_slots)
        self._mutex = threading.RLock()  # that of ``lock``, quicker to take
        self.lock = threading.Condition(self._mutex)  # held for every call of the cache
        self._wants_logits = "logits" in policy.requires
        self._wants_predictions = "predictions" in policy.requires
        self._under_way = 0
        self._awaited: set[int] = set()
        self._arrived: deque[int] = deque()
        self._failure: Exception | None = None
        self._steps = 0
        self._requests = 0
        self._stall_s = 0.0
        self._noted: dict[int, tuple[Any, Any]] = {}
        self._compile = compile
        self._compiling = self._compile_beside()
        self.link.start(self._on_copied)

    def __enter__(self) -> Session:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @property
    def totals(self) -> Totals:
        count = self.cache.count
        with self.lock:
            prefetches = count(Kind.SPECULATE)
            loads = count(Kind.LOAD) + prefetches
            return Totals(
                steps=self._steps,
                requests=self._requests,
                hits=count(Kind.HIT),
                late=count(Kind.LATE),
                misses=count(Kind.MISS),
                loads=loads,
                bypasses=count(Kind.BYPASS),
                prefetches=prefetches,
                useless_prefetches=count(Kind.USELESS),
                bytes_loaded=loads * self.record_bytes,
                stall_s=self._stall_s,
            )

    def note(self, layer: int, logits: Any, predicted: Any = None) -> None:
        """The gate of ``layer`` has run: tensors for the ``serve`` of this layer that follows.

        logits [tokens, n_experts]; predicted float16[horizon, tokens, n_experts] or None.
        """
        self._noted[layer] = (logits, predicted)

    def serve(
        self, layer: int, top_k_index: torch.Tensor, top_k_weights: torch.Tensor
    ) -> Iterator[tuple[int, Any]]:
        """The experts a batch wants at ``layer``, each as soon as it may be computed.

        top_k_index, top_k_weights [tokens, top_k]. Yields (expert, the link's slot it lies in):
        hits first, in router order, then the others as they arrive. When the next one is asked
        for, the compute of the one before must have been issued. Raises RunError or PolicyError
        where an expert cannot be had.
        """
        for call in self.before_steps:
            call()
        logits, predicted = self._noted.pop(layer, (None, None))
        if not (self._wants_logits or self.gate_observers):
            logits = None  # nobody looks at them: they need not travel
        gate = to_host(top_k_index, top_k_weights, logits, predicted)
        for observe in self.gate_observers:
            observe(layer, gate)
        first = layer * self.context.n_experts
        try:
            hits, absent = self._begin(layer, gate)
            for key in hits:
                yield key - first, self._acquire(key)
                self._release(key)
            for _ in range(absent):
                key = self._await_arrival()
                yield key - first, self._acquire(key)
                self._release(key)
        except BaseException:
            with self.lock:
                self._failure = self._failure or RunError("a step was left unfinished")
            raise
        with self._mutex:
            self.cache.end()
            self._pump()

    def reset(self, *, journal: Journal | None = None, observers: Sequence[Observer] = ()) -> None:
        """Start over with an empty cache and a fresh policy; waits for copies under way."""
        with self.lock:
            while self._under_way:
                self.lock.wait()
            self.cache = self._new_cache(journal, observers)
            compiling, self._compiling = self._compiling, self._compile_beside()
            self._failure = None
            self._awaited.clear()
            self._arrived.clear()
            self._noted.clear()
            self._steps = self._requests = 0
            self._stall_s = 0.0
        if compiling:
            compiling.close()

    def wait_compiled(self) -> None:
        """Wait until the policy's calls are compiled, where they can be and are to be."""
        if self._compiling:
            self._compiling.finish()

    def settle(self) -> None:
        """Wait until no copy is under way."""
        with self.lock:
            while self._under_way:
                self.lock.wait()

    def close(self) -> None:
        """End the link's threads; the totals stay readable."""
        with self.lock:
            self._failure = self._failure or RunError("the session is closed")
        self.link.close()
        if self._compiling:
            self._compiling.close()

    def _compile_beside(self) -> CompileBeside | None:
        if not self._compile:
            return None
        # Nobody can predict further ahead than there are layers.
        return CompileBeside(self.cache, self.lock, self.context.n_layers)

    def _new_cache(self, journal: Journal | None, observers: Sequence[Observer]) -> ExpertCache:
        policy = self.policy.build(self.context)
        return ExpertCache(
            self.context, policy, name=self.policy.label, observers=observers, journal=journal
        )

    def _begin(self, layer: int, gate: Gate) -> tuple[list[int], int]:
        """Open the step: the keys that are here, in router order, and how many are not."""
        experts, weights = demand_order(gate.ids, gate.weights)
        keys = experts + layer * self.context.n_experts
        logits = gate.logits if self._wants_logits else None
        predicted = gate.predicted if self._wants_predictions else None
        with self._mutex:
            self._raise_failure()
            step = Step(
                number=self._steps,
                layer=layer,
                experts=keys,
                weights=weights,
                logits=NO_LOGITS if logits is None else pool_logits(logits),
                predicted=NO_PREDICTIONS if predicted is None else pool_rows(predicted),
                tokens=len(gate.ids),
            )
            outcome = self.cache.begin(step).tolist()
            self._steps += 1
            self._requests += len(outcome)
            if not SERVED.issuperset(outcome):
                raise PolicyError(
                    f"policy '{self.policy.label}' asks for an expert not to be fetched, which a "
                    "live run cannot do"
                )
            hits = [key for key, kind in zip(keys.tolist(), outcome, strict=True) if kind == HIT]
            self._awaited = set(keys.tolist()).difference(hits)
            absent = len(self._awaited)
            self._pump()
        return hits, absent

    def _acquire(self, key: int) -> Any:
        slot = self.cache.slot_of(key)  # pinned: it cannot move
        self.link.acquire(slot)
        return self.link.slots[slot]

    def _release(self, key: int) -> None:
        self.link.release(self.cache.slot_of(key))
        with self._mutex:
            self.cache.consume(key)
            self._pump()

    def _await_arrival(self) -> int:
        with self.lock:
            if not self._arrived and not self._failure:
                began_s = time.perf_counter()
                while not self._arrived and not self._failure:
                    if not self._under_way:
                        raise RunError("an expert is waited for that nothing is copying")
                    self.lock.wait()
                self._stall_s += time.perf_counter() - began_s
            self._raise_failure()
            return self._arrived.popleft()

    def _raise_failure(self) -> None:
        if self._failure:
            raise self._failure

    def _pump(self) -> None:
        """Start copies while the link has a stream free. The lock is held."""
        while (
            self._under_way < self.link.streams
            and not self._failure
            and self.cache.queued() is not None
        ):
            copy = self.cache.start()
            if copy is None:  # a demand waits for a staging buffer
                return
            self._under_way += 1
            self.link.submit(copy.key, copy.slot)

    def _on_copied(self, key: int, error: Exception | None) -> None:
        """A copy ended; called by the link's threads."""
        with self.lock:
            self._under_way -= 1
            try:
                if error is not None:
                    raise error
                if self._failure is None:
                    self.cache.finish(key)
                    if key in self._awaited:
                        self._awaited.discard(key)
                        self._arrived.append(key)
                    self._pump()
            except Exception as failure:
                self._failure = self._failure or failure
            self.lock.notify_all()


HIT = int(Kind.HIT)
SERVED = frozenset({HIT, int(Kind.LATE), int(Kind.MISS)})


def pool_rows(predicted: NDArray[Any]) -> NDArray[Any]:
    """float16[horizon, tokens, n_experts] -> float32[horizon, n_experts], pooled over tokens."""
    if predicted.shape[1] == 1:
        return predicted[:, 0].astype(np.float32)
    return np.stack([pool_logits(rows) for rows in predicted])


def to_host(ids: torch.Tensor, weights: torch.Tensor, logits: Any, predicted: Any) -> Gate:
    """A gate's choice as NumPy arrays, in one copy where it lies on another device.

    Logits and predictions become float16, what a trace stores, before anyone decides by them: a
    replay of the trace must be asked the same question.
    """
    if ids.is_cpu:
        return Gate(
            ids.numpy(),
            weights.float().numpy(),
            None if logits is None else _half(logits),
            None if predicted is None else _half(predicted),
        )
    parts = [ids, weights.float()]
    parts += [part.to(torch.float16) for part in (logits, predicted) if part is not None]
    flat = torch.cat([part.reshape(-1).double() for part in parts]).cpu()
    pieces = torch.split(flat, [part.numel() for part in parts])
    arrays = [
        piece.view(part.shape).to(part.dtype).numpy()
        for piece, part in zip(pieces, parts, strict=True)
    ]
    return Gate(
        arrays[0],
        arrays[1],
        arrays[2] if logits is not None else None,
        arrays[-1] if predicted is not None else None,
    )


def _half(tensor: torch.Tensor) -> NDArray[np.float16]:
    """In float16, by NumPy where it can: for a row of logits it takes a fifth of torch's time."""
    if tensor.dtype is torch.float32:
        halves: NDArray[np.float16] = tensor.numpy().astype(np.float16)
        return halves
    return tensor.to(torch.float16).numpy()
