"""A session: a live cache of experts that serves a model, layer by layer, under one policy."""

from __future__ import annotations

import threading
from collections.abc import Callable, Generator, Sequence
from typing import Any

import numpy as np
import torch
from moepolicy import (
    Context,
    ExpertCache,
    Journal,
    PolicyError,
    PolicyFailed,
    PolicySpec,
    RoutingRule,
    Step,
    TokenRows,
    find_policy,
)
from moepolicy.cache import Observer

from moerun.errors import RunError
from moerun.links import Link
from moerun.live.cache import LiveCache, StepCounts
from moerun.live.step import Opened, PassStart, StepMaker, as_in_gate
from moerun.live.texts import Texts
from moerun.live.totals import Totals, totals_of
from moerun.memory.compiling import Compilation, Compiling
from moerun.offload.cpu_experts import CpuExperts
from moerun.offload.experts import Item, Served
from moerun.offload.gate import Gate, GateObserver, GateOutput, to_host

NOTHING_ASKED = GateOutput()


class Session:
    """Serves experts to a model out of ``n_slots`` device slots under one policy.

    The cache lives on from prompt to prompt until ``reset`` makes it cold again. An error in a
    link's thread or in the policy surfaces in the generating thread, from ``serve``; after one
    the session serves no more until it is reset. With ``on_policy_failure`` an error of the policy
    does not surface: the step in which it came, and all after it, are served under LRU.

    The class is long because serving, falling back, resizing and resetting exchange one cache, one
    policy and the link's slots under one lock.
    """

    def __init__(
        self,
        context: Context,
        policy: PolicySpec,
        make_link: Callable[[int], Link],
        *,
        record_bytes: int,
        low_record_bytes: int = 0,
        make_cpu_experts: Callable[[Link], CpuExperts] | None = None,
        journal: Journal | None = None,
        observers: Sequence[Observer] = (),
        compiling: Compiling = Compiling.NEVER,
        on_policy_failure: Callable[[str], None] | None = None,
    ) -> None:
        """``make_link(n_slots)`` gives a link with so many slots, not yet started.

        ``make_cpu_experts(link)`` gives what computes experts on the CPU, for policies that require
        "cpu"; the link has slots of a lower precision for those that require "low".
        ``compiling``: what to do to have the policy's compiled calls, used once there are some.
        ``on_policy_failure`` is told, in a line, that the policy failed and LRU goes on.
        """
        self.context = context
        self.policy = policy
        self.record_bytes = record_bytes
        self.low_record_bytes = low_record_bytes
        if "cpu" in policy.requires and make_cpu_experts is None:
            raise PolicyError(f"policy '{policy.label}' needs experts computed on the CPU")
        self.gate_observers: list[GateObserver] = []
        self.texts = Texts()
        """Whose tokens the passes have."""
        self.policy_failure: PolicyFailed | None = None
        """What the policy failed of; LRU has served since, also after a reset."""
        self._on_policy_failure = on_policy_failure
        self._serving = policy
        self._staging: int | None = None  # buffers, where not the policy's own number
        self._earlier = Totals()  # of the cache of a policy that failed
        self._weight_rule: RoutingRule | None = None
        self.before_steps: list[Callable[[], None]] = []
        """Called before each step, when nothing is half done; what one raises ends the pass."""
        cache = self._new_cache(journal, observers)
        self.link = make_link(cache.n_slots)
        self.cpu_experts = make_cpu_experts(self.link) if make_cpu_experts else None
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
        """What the session has counted since it was made or reset.

        Experts of the step in which a policy failed are counted for it, and again for LRU; weights
        of the gates for the policy alone.
        """
        with self.lock:
            return self._earlier + self._counted(self._live.counts)

    def _counted(self, counts: StepCounts) -> Totals:
        return totals_of(
            self.cache,
            steps=counts.steps,
            record_bytes=self.record_bytes,
            low_record_bytes=self.low_record_bytes,
            stall_s=counts.stall_s,
            decide_s=counts.decide_s,
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
        computed on CPU  a CpuExpert
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
        opened, rows = self._open(layer, gate)
        together = self._together(opened) if len(gate.ids) == 1 else 0
        served = self._served(layer, opened, together > 0)
        if rows is None:
            return Served(gate.ids, served, together=together)
        rows = as_in_gate(rows, gate)
        weights = _reweighed(top_k_weights, gate, rows)
        return Served(rows.ids, served, weights, together=together)

    def _together(self, opened: Opened) -> int:
        """How many experts come first that may be computed in one call; 0 where one does not."""
        alone = not self._live.computes_together or opened.skipped or opened.on_cpu
        return 0 if alone or len(opened.hits) < 2 else len(opened.hits)

    def wants_predictions(self, layer: int) -> bool:
        """Whether the gates of later layers are to be asked at the next step of ``layer``: because
        the policy wants it so, or because the run is recorded."""
        if self.gate_observers:
            return True
        return self._steps.reads_predictions and self.cache.wants_predictions(layer)

    @property
    def reads_token_ids(self) -> bool:
        """Whether the policy asks for the tokens' ids."""
        return "tokens" in self._serving.requires

    def begin_pass(self, start: PassStart) -> None:
        """A forward pass begins: its layers' experts are asked for next."""
        self._steps.pass_start = start

    def set_weight_rule(self, rule: RoutingRule) -> None:
        """How the model's gates make weights of their logits, for a policy that routes."""
        with self.lock:
            self._weight_rule = rule
            self.cache.set_weight_rule(rule)

    def _open(self, layer: int, gate: Gate) -> tuple[Opened, TokenRows | None]:
        """Begin a step; the rows are as a policy that routes has rewritten them."""
        live, number = self._live, self._live.counts.steps
        try:
            try:
                rows = self._steps.rows(gate)
                asked = self.cache.wants_predictions(layer)
                return live.begin(self._steps.step(number, layer, gate, asked=asked), rows), rows
            except PolicyFailed as error:
                self._fall_back(error)
            return live.begin(self._steps.step(number, layer, gate)), None
        except BaseException:
            live.fail(RunError("a step was left unfinished"))
            raise

    def _served(self, layer: int, opened: Opened, together: bool) -> Generator[Item]:
        live, first, step = self._live, layer * self.context.n_experts, self.cache.step
        assert step is not None
        served: list[int] = []
        computing = bool(opened.on_cpu)
        try:
            while True:
                try:
                    for key, weights in self._ready(opened, together):
                        served.append(key)
                        yield key - first, weights
                    if computing:
                        self._join()
                    live.end()
                    return
                except PolicyFailed as error:
                    self._fall_back(error)
                if len(served) == len(step.experts):
                    break
                opened, together = live.begin(_rest(step, served)), False
            if computing:
                self._join()
        except BaseException:
            live.fail(RunError("a step was left unfinished"))
            raise

    def _ready(self, opened: Opened, together: bool) -> Generator[tuple[int, Any]]:
        """Keys of a step and what computes each, as soon as it may; see `serve` for the order.
        ``together``: hits stay until the last one has been computed."""
        live = self._live
        for key in opened.skipped:
            yield key, None
        for key in opened.on_cpu:
            yield key, self._cpu_expert(key)
        for key in opened.hits:
            slot = live.cache.slot_of(key)  # pinned: it cannot move
            yield key, live.acquire(key, slot)
            if not together:
                live.release(key, slot)
        if together:
            live.release_all(opened.hits)
        for key, substitute in opened.substitutes:
            slot = live.cache.slot_of(substitute)
            yield key, live.acquire(substitute, slot)
            live.link.release(slot)
        for _ in opened.absent:
            key = live.await_arrival()
            slot = live.cache.slot_of(key)
            yield key, live.acquire(key, slot)
            live.release(key, slot)

    def _fall_back(self, error: PolicyFailed) -> None:
        """Go on under LRU, with slots that count as empty; ``error`` where that is not wanted.

        Nothing that the policy left half done is taken over: its cache is given up, and what the
        link still copies arrives for nobody.
        """
        if self._on_policy_failure is None or self.policy_failure is not None:
            raise error
        live = self._live
        live.fail(error)  # no more copies begin
        with self.lock:
            live.settle()
            self._earlier += self._counted(StepCounts())  # the others go on counting
            self.policy_failure, self._serving = error, find_policy("lru")
            # As many buffers as the link has slots for.
            self._staging = self.cache.arrays.staging_buffers
            start = self._steps.pass_start
            self._steps = StepMaker(self.context, self._serving)
            self._steps.pass_start = start
            live.replace(self._new_cache(None, ()))
            former = self.compilation.renew(self.cache)
        self._on_policy_failure(f"{error}: from this step on, LRU keeps the experts")
        if former:
            former.close()

    def raise_failure(self) -> None:
        """Raise what keeps the session from serving, if anything does."""
        self._live.raise_failure()

    def resize(self, slots: int) -> None:
        """Have ``slots`` slots a layer from now on; any thread may say so at any time.

        What the step in progress uses stays until its end, and its memory with it. Raises
        PolicyError beyond a layer's experts, RunError where memory for more is not there; the
        cache is then as it was. A policy that fails of it is replaced when the next step begins.
        """
        with self.lock:
            try:
                self._live.resize(slots, before=self.context.slots)
            except PolicyFailed as error:
                if self._on_policy_failure is None or self.policy_failure is not None:
                    raise
                self._live.fail(error)
            self.context = self.context._replace(slots=slots)

    def reset(self, *, journal: Journal | None = None, observers: Sequence[Observer] = ()) -> None:
        """Start over with an empty cache and a fresh policy; waits for copies under way."""
        with self.lock:
            self._live.settle()
            if self.cpu_experts:
                self.cpu_experts.drop()
            self._earlier = Totals()
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
        if self.cpu_experts:  # it may read what the link holds
            self.cpu_experts.close()
        try:
            self.link.close()
        finally:
            self.compilation.close()

    def _new_cache(self, journal: Journal | None, observers: Sequence[Observer]) -> ExpertCache:
        policy = self._serving.build(self.context)
        if self._staging is not None:
            policy.staging = self._staging
        return ExpertCache(
            self.context,
            policy,
            name=self._serving.label,
            observers=observers,
            journal=journal,
            max_slots=self.context.n_experts,
            weight_rule=self._weight_rule,
        )

    def _cpu_expert(self, key: int) -> Any:
        assert self.cpu_experts is not None  # or the session had refused the policy
        return self.cpu_experts.expert(key)

    def _join(self) -> None:
        """Wait for what is computed on the CPU."""
        assert self.cpu_experts is not None
        try:
            self._live.counts.stall_s += self.cpu_experts.join()
        except Exception as error:
            self._live.fail(error)
            raise


def _rest(step: Step, served: Sequence[int]) -> Step:
    """``step`` with the keys that are still to be computed."""
    keep = np.isin(step.experts, served, invert=True)
    return step._replace(experts=step.experts[keep], weights=step.weights[keep])


def _reweighed(weights: torch.Tensor, gate: Gate, rows: TokenRows) -> torch.Tensor:
    """The weights of ``rows``: the gate's own, to the bit, for tokens that kept its choice."""
    changed = (rows.ids != gate.ids).any(axis=1).nonzero()[0]
    if not len(changed):
        return weights
    found = weights.clone()
    at = torch.from_numpy(changed).to(weights.device)
    found[at] = torch.from_numpy(rows.weights[changed]).to(weights.device, weights.dtype)
    return found
