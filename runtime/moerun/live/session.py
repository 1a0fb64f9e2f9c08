"""A session: a live cache of experts that serves a model, layer by layer, under one policy."""

from __future__ import annotations

import threading
from collections.abc import Callable, Generator, Sequence
from typing import Any

import torch
from moepolicy import Context, ExpertCache, Journal, PolicyError, PolicySpec
from moepolicy.cache import Observer

from moerun.errors import RunError
from moerun.links import Link
from moerun.live.cache import LiveCache
from moerun.live.step import StepMaker
from moerun.live.totals import Totals, totals_of
from moerun.memory.compiling import Compilation, Compiling
from moerun.offload.cpu_experts import Aside
from moerun.offload.experts import Item, Served
from moerun.offload.gate import Gate, GateObserver, GateOutput, to_host

NOTHING_ASKED = GateOutput()


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
        low_record_bytes: int = 0,
        make_aside: Callable[[Link], Aside] | None = None,
        journal: Journal | None = None,
        observers: Sequence[Observer] = (),
        compiling: Compiling = Compiling.NEVER,
    ) -> None:
        """``make_link(n_slots)`` gives a link with so many slots, not yet started.

        ``make_aside(link)`` gives what computes experts on the CPU, for policies that require
        "cpu"; the link has slots of a lower precision for those that require "low".
        ``compiling``: what to do to have the policy's compiled calls, used once there are some.
        """
        self.context = context
        self.policy = policy
        self.record_bytes = record_bytes
        self.low_record_bytes = low_record_bytes
        if "cpu" in policy.requires and make_aside is None:
            raise PolicyError(f"policy '{policy.label}' needs experts computed on the CPU")
        self.gate_observers: list[GateObserver] = []
        self.before_steps: list[Callable[[], None]] = []
        """Called before each step, when nothing is half done; what one raises ends the pass."""
        cache = self._new_cache(journal, observers)
        self.link = make_link(cache.n_slots)
        self.aside = make_aside(self.link) if make_aside else None
        self._steps = StepMaker(context, policy)
        self._live = LiveCache(cache, self.link, has_low=low_record_bytes > 0)
        # Nobody can predict further ahead than there are layers.
        self.compilation = Compilation(cache, self.lock, context.n_layers, compiling)
        self._live.start()

    def __enter__(self) -> Session:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @property
    def cache(self) -> ExpertCache:
        """The state machine, to be called with the lock held."""
        return self._live.cache

    @property
    def lock(self) -> threading.RLock:
        """Held for every call of the cache."""
        return self._live.lock

    @property
    def totals(self) -> Totals:
        """What the session has counted since it was made or reset."""
        with self.lock:
            counts = self._live.counts
            return totals_of(
                self.cache,
                steps=counts.steps,
                record_bytes=self.record_bytes,
                low_record_bytes=self.low_record_bytes,
                stall_s=counts.stall_s,
            )

    def serve(
        self,
        layer: int,
        top_k_index: torch.Tensor,
        top_k_weights: torch.Tensor,
        output: GateOutput = NOTHING_ASKED,
    ) -> Served:
        """The experts a batch wants at ``layer``, each as soon as it may be computed.

        top_k_index, top_k_weights [tokens, top_k]; ``output`` is what else the gate gave. Experts
        come as pairs (expert, what computes the expert), in this order:

        skipped          None
        computed on CPU  an AsideExpert
        hits             the slot, in router order
        substituted      the slot of the expert that stands in
        others           the slot, as they arrive

        RunError or PolicyError is raised here or between experts, where an expert cannot be had.
        """
        for call in self.before_steps:
            call()
        logits = output.logits
        if not (self._steps.reads_logits or self.gate_observers):
            logits = None  # nobody looks at them: they need not travel
        gate = to_host(top_k_index, top_k_weights, logits, output.predicted)
        for observe in self.gate_observers:
            observe(layer, gate)
        return Served(gate.ids, self._served(layer, gate))

    def _served(self, layer: int, gate: Gate) -> Generator[Item]:
        live, first = self._live, layer * self.context.n_experts
        try:
            opened = live.begin(self._steps.step(live.counts.steps, layer, gate))
            for key in opened.skipped:
                yield key - first, None
            for key in opened.aside:
                yield key - first, self._beside(key)
            for key in opened.hits:
                slot = live.cache.slot_of(key)  # pinned: it cannot move
                yield key - first, live.acquire(key, slot)
                live.release(key, slot)
            for key, stand_in in opened.stand_ins:
                slot = live.cache.slot_of(stand_in)
                yield key - first, live.acquire(stand_in, slot)
                live.link.release(slot)
            for _ in opened.absent:
                key = live.await_arrival()
                slot = live.cache.slot_of(key)
                yield key - first, live.acquire(key, slot)
                live.release(key, slot)
            if opened.aside:
                self._join()
        except BaseException:
            live.fail(RunError("a step was left unfinished"))
            raise
        live.end()

    def raise_failure(self) -> None:
        """Raise what keeps the session from serving, if anything does."""
        self._live.raise_failure()

    def resize(self, slots: int) -> None:
        """Have ``slots`` slots a layer from now on; any thread may say so at any time.

        What the step in progress uses stays until its end, and its memory with it. Raises
        PolicyError beyond a layer's experts, RunError where memory for more is not there; the
        cache is then as it was.
        """
        with self.lock:
            self._live.resize(slots, before=self.context.slots)
            self.context = self.context._replace(slots=slots)

    def reset(self, *, journal: Journal | None = None, observers: Sequence[Observer] = ()) -> None:
        """Start over with an empty cache and a fresh policy; waits for copies under way."""
        with self.lock:
            self._live.settle()
            if self.aside:
                self.aside.drop()
            self._live.renew(self._new_cache(journal, observers))
            former = self.compilation.renew(self.cache)
        if former:
            former.close()

    def wait_compiled(self) -> None:
        """Wait until the policy's calls are compiled, where they can be and are to be."""
        self.compilation.finish()

    def settle(self) -> None:
        """Wait until no copy is under way."""
        self._live.settle()

    def close(self) -> None:
        """End the link's threads; the totals stay readable."""
        self._live.fail(RunError("the session is closed"))
        if self.aside:  # it may read what the link holds
            self.aside.close()
        try:
            self.link.close()
        finally:
            self.compilation.close()

    def _new_cache(self, journal: Journal | None, observers: Sequence[Observer]) -> ExpertCache:
        policy = self.policy.build(self.context)
        return ExpertCache(
            self.context,
            policy,
            name=self.policy.label,
            observers=observers,
            journal=journal,
            max_slots=self.context.n_experts,
        )

    def _beside(self, key: int) -> Any:
        assert self.aside is not None  # or the session had refused the policy
        return self.aside.expert(key)

    def _join(self) -> None:
        """Wait for what is computed on the CPU."""
        assert self.aside is not None
        try:
            self._live.counts.stall_s += self.aside.join()
        except Exception as error:
            self._live.fail(error)
            raise
