"""A model made ready to run from an expert store: its session, its link, its gates listened to."""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from moepolicy import Context, PolicySpec
from numpy.typing import NDArray

from moerun.arena import Arena, device_memory, lacking
from moerun.aside import Aside
from moerun.budget import BudgetWatch
from moerun.devices import (
    format_bytes,
    free_bytes,
    naming_lack_of_memory,
    peak_device_bytes,
    peak_host_bytes,
    who_holds,
)
from moerun.errors import RunError
from moerun.forms import ExpertSlot, SlotForm
from moerun.generate import Generation, Sampling, context_tokens, encode
from moerun.links import DirectRecords, DiskLink, DualSlot, HostTier, Link, Records, Throttle
from moerun.links.host import host_tier
from moerun.memory import MemoryPlan, baseline_bytes, needs_of
from moerun.model import load_offloaded
from moerun.predict import GatePredictor, find_routers
from moerun.servable import refuse_unservable
from moerun.session import Session
from moerun.store import ExpertStore

CPU = torch.device("cpu")
CALIBRATION = "tiny"  # the trace in which experts are counted unless another is named


@dataclass(frozen=True)
class Settings:
    """How a store is to be run. ``slots`` is per layer; ``memory_bytes``, for all of the device's
    memory that the run may take, sets it instead."""

    policy: PolicySpec
    slots: int | None = None
    memory_bytes: int | None = None
    context_tokens: int | None = None  # to plan memory for; None: some thousand
    prompt_tokens: int | None = None  # the longest prompt; None: all of the context
    memory_file: Path | None = None  # in which the budget may be changed
    scope: str = "layer"
    device: torch.device = CPU
    streams: int = 1
    link_bytes_per_s: float | None = None  # a cap; None: as fast as it goes
    host_bytes: int | None = None  # of the cache between disk and device; None: room for all
    chunk_bytes: int = 0  # experts travel in pieces of this; 0: whole
    cold: bool = False  # keep what is read out of the page cache
    horizon: int | None = None  # None: 1 if the policy looks at predictions, else 0
    calibration: str | None = None  # the trace that policies count experts in
    low: ExpertStore | None = None  # the same experts at a lower precision

    @property
    def predicts(self) -> int:
        """How many layers ahead the gates are asked."""
        needed = int("predictions" in self.policy.requires)
        return needed if self.horizon is None else max(self.horizon, needed)


class Runner:
    """A model served by a session. A context manager; ``close`` ends its threads and hooks."""

    def __init__(
        self,
        store: ExpertStore,
        settings: Settings,
        *,
        report: Callable[[str], None] | None = None,
    ) -> None:
        """Raises RunError or PolicyError before anything big is loaded where it cannot run.

        ``report`` is told, from another thread, what became of a change of ``memory_file``.
        """
        refuse_unservable(settings.policy, low=settings.low is not None)
        check_low(store, settings.low)
        self.store = store
        self.settings = settings
        self.form = SlotForm(store.index.shape, store.index.precision, settings.device)
        self.slot_bytes = max(self.form.slot_bytes, low_slot_bytes(settings))
        self.plan = plan_memory(store, settings, self.slot_bytes)
        self._baseline_bytes = baseline_bytes(store)
        if settings.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(settings.device)
        self._sizing = threading.Lock()
        self._hooks: list[Any] = []
        self.session = Session(
            plan_context(store, settings, self.plan.slots),
            settings.policy,
            partial(make_link, store, self.form, settings),
            record_bytes=store.record_bytes,
            low_record_bytes=settings.low.record_bytes if settings.low else 0,
            make_aside=(
                partial(make_aside, store, settings) if "cpu" in settings.policy.requires else None
            ),
            # The compiler takes some 100 MB of host memory, which a budget's plan does not count.
            compile=settings.memory_bytes is None,
        )
        try:
            with naming_lack_of_memory(settings.device, "loading the weights"):
                self.model, self.tokenizer = load_offloaded(store, settings.device, self.session)
            self.predictor = (
                GatePredictor(self.model, settings.predicts) if settings.predicts else None
            )
            self._listen()
            self._watch = self._watch_budget(report)
        except BaseException:
            self.session.close()
            raise

    def __enter__(self) -> Runner:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @property
    def context(self) -> Context:
        """The cache as it is to be now."""
        return self.session.context

    @property
    def context_tokens(self) -> int | None:
        """The longest text that memory was planned for; None where no budget was given."""
        return None if self.plan.budget_bytes is None else self.plan.needs.context_tokens

    @property
    def limit_tokens(self) -> int | None:
        """The longest text it takes: what memory was planned for, else the model's; None: any."""
        return self.context_tokens or context_tokens(self.model)

    @property
    def host_tier(self) -> HostTier | None:
        """The cache between disk and device, where there is one that does not hold everything."""
        tier = getattr(self.session.link, "tier", None)
        return tier if isinstance(tier, HostTier) and tier.n_records < tier.n_keys else None

    @property
    def peak_bytes(self) -> int:
        """The most of the device's memory this run has held, as a budget counts it."""
        on_device = peak_device_bytes(self.settings.device)
        if on_device is not None:
            return on_device
        return max(peak_host_bytes() - self._baseline_bytes, 0)

    def set_slots(self, slots: int) -> None:
        """Cache so many experts a layer from now on; any thread may say so, at any time.

        Nothing that is generated changes by it. What the step in progress uses stays until its
        end. Raises PolicyError beyond a layer's experts, RunError where memory for more is not
        there; all is then as it was.
        """
        with self._sizing:
            self.session.resize(slots)
            self.plan = replace(self.plan, slots=slots)

    def set_memory(self, budget_bytes: int) -> None:
        """Have another budget from now on (see ``set_slots``): the slots follow from it.

        Raises RunError, changing nothing, for a budget too small for what is not slots or larger
        than the memory there is.
        """
        with self._sizing:
            plan = self.plan.within(budget_bytes)
            more_bytes = plan.slots_bytes - self.plan.slots_bytes
            require_free(more_bytes, budget_bytes, self.settings.device)
            self.session.resize(plan.slots)
            self.plan = plan

    @property
    def arena_bytes(self) -> int:
        """Device memory of all slots, staging included."""
        return self.session.cache.n_slots * self.slot_bytes

    def encode(self, prompt: str) -> torch.Tensor:
        """Token ids, int64[1, tokens], on the model's device."""
        return encode(self.tokenizer, prompt, self.settings.device)

    def generation(self, on_text: Callable[[str], None] | None = None) -> Generation:
        return Generation(
            self.model, self.tokenizer, self.session, on_text, context_tokens=self.context_tokens
        )

    def generate(self, prompt: str, sampling: Sampling) -> str:
        """The text that follows ``prompt``."""
        return self.generation().run(self.encode(prompt), sampling).text

    def close(self) -> None:
        if self._watch:
            self._watch.close()
        for hook in self._hooks:
            hook.remove()
        if self.predictor:
            self.predictor.close()
        self.session.close()

    def _watch_budget(self, report: Callable[[str], None] | None) -> BudgetWatch | None:
        if (path := self.settings.memory_file) is None:
            return None
        device = self.settings.device
        return BudgetWatch(path, device, self.set_memory, report or (lambda _: None))

    def _listen(self) -> None:
        """Give the session what each layer's gate and the later layers' gates say."""
        for layer, router in enumerate(find_routers(self.model)):
            self._hooks.append(router.register_forward_hook(partial(self._on_gate, layer)))

    def _on_gate(self, layer: int, _router: Any, arguments: Any, output: Any) -> None:
        predictor = self.predictor
        predicted = predictor.predict(layer, arguments[0]) if predictor else None
        self.session.note(layer, output[0], predicted)


def make_link(store: ExpertStore, form: SlotForm, settings: Settings, n_slots: int) -> Link:
    """A link, not yet started, from the store to new slots on the device. Raises RunError."""
    rate, device = settings.link_bytes_per_s, settings.device
    if rate is not None and not 0 < rate < float("inf"):
        raise RunError(f"link-gbps must be above 0, not {rate / 1e9:g}")
    throttle = Throttle(rate) if rate else None
    slots = make_slots(form, settings, n_slots)
    if device.type == "cuda":
        from moerun.links.cuda import CudaLink

        if settings.cold:
            raise RunError(f"on {device} experts come from memory, not from disk: leave --cold")
        tier = make_tier(store, settings)
        return CudaLink(
            tier,
            slots,
            device,
            streams=settings.streams,
            throttle=throttle,
            low=host_tier(settings.low, None) if settings.low else None,
            chunk_bytes=settings.chunk_bytes,
        )
    records: Records = DirectRecords(store) if settings.cold else store
    if settings.host_bytes is not None:
        records = make_tier(store, settings)
    low = DirectRecords(settings.low) if settings.cold and settings.low else settings.low
    return DiskLink(
        records,
        slots,
        streams=settings.streams,
        throttle=throttle,
        low=low,
        chunk_bytes=settings.chunk_bytes,
    )


def make_slots(form: SlotForm, settings: Settings, n_slots: int) -> Arena:
    """New slots on the device, which may come and go. Raises RunError where it has no room."""
    return Arena(partial(make_slot, form, settings), n_slots)


def make_slot(form: SlotForm, settings: Settings) -> ExpertSlot | DualSlot:
    """A new slot on the device, for experts of the lower precision too if there is one.

    Raises RunError where there is no memory left for it.
    """
    n_bytes = max(form.slot_bytes, low_slot_bytes(settings))
    with lacking(n_bytes, settings.device):
        memory = device_memory(n_bytes, settings.device)
    slot = form.bind(memory[: form.slot_bytes])
    if settings.low is None:
        return slot
    low = _low_form(settings.low, settings.device)
    return DualSlot(slot, low.bind(memory[: low.slot_bytes]))


def make_aside(store: ExpertStore, settings: Settings, link: Link) -> Aside:
    """What computes experts on the CPU: from the link's host memory where it has that, else from
    the store."""
    form = SlotForm(store.index.shape, store.index.precision, CPU)
    if settings.device.type == "cuda":
        from moerun.links.cuda import CudaLink

        assert isinstance(link, CudaLink)
        assert link.tier is not None
        if link.tier.n_records < link.tier.n_keys:
            return Aside(form, link.tier)
        return Aside(form, store, link)
    return Aside(form, DirectRecords(store) if settings.cold else store)


def check_low(store: ExpertStore, low: ExpertStore | None) -> None:
    """RunError where ``low`` holds other experts than ``store`` does."""
    if low is not None and low.index.source_digest != store.index.source_digest:
        raise RunError(
            f"{low.path} is the store of another model ({low.index.model}): give --low one that "
            f"was packed from the checkpoint of {store.path}"
        )


def low_slot_bytes(settings: Settings) -> int:
    """Memory that a slot needs for an expert of the lower precision; 0 without one."""
    return _low_form(settings.low, settings.device).slot_bytes if settings.low else 0


def _low_form(low: ExpertStore, device: torch.device) -> SlotForm:
    return SlotForm(low.index.shape, low.index.precision, device)


def make_tier(store: ExpertStore, settings: Settings) -> HostTier:
    """Host memory for all records, or for as many as it may hold. Raises RunError."""
    host_bytes, all_bytes = settings.host_bytes, store.n_keys * store.record_bytes
    if host_bytes is None or host_bytes >= all_bytes:
        # What is read only once may stay in the file cache, for the next start.
        return host_tier(store, None)
    copies = settings.streams * (2 if settings.chunk_bytes else 1)
    return host_tier(DirectRecords(store), host_bytes, copies)


def plan_memory(store: ExpertStore, settings: Settings, slot_bytes: int) -> MemoryPlan:
    """How the run's memory is spent. RunError where a budget is too small, or is not there."""
    # Staging may depend on the parameters, so a policy is made to ask it.
    staging = settings.policy.build(plan_context(store, settings, 0)).staging
    plan = MemoryPlan(
        needs=needs_of(
            store,
            settings.device,
            context_tokens=settings.context_tokens,
            prompt_tokens=settings.prompt_tokens,
            horizon=settings.predicts,
            streams=settings.streams,
        ),
        budget_bytes=None,
        slots=settings.slots if settings.slots is not None else store.n_experts // 2,
        n_layers=store.n_layers,
        n_experts=store.n_experts,
        staging=staging,
        slot_bytes=slot_bytes,
    )
    if settings.memory_bytes is None:
        return plan
    plan = plan.within(settings.memory_bytes)
    require_free(plan.total_bytes, settings.memory_bytes, settings.device)
    return plan


def require_free(n_bytes: int, budget_bytes: int, device: torch.device) -> None:
    """RunError where a device does not have what a budget is about to take."""
    free = free_bytes(device)
    if n_bytes > free:
        raise RunError(
            f"of the {format_bytes(budget_bytes)} asked for, {format_bytes(n_bytes)} are needed "
            f"now and {device} has {format_bytes(free)} free{who_holds(device)}: give less "
            "--memory (or 'auto'), or end what else uses it"
        )


def plan_context(store: ExpertStore, settings: Settings, slots: int) -> Context:
    """The cache that a policy is made for."""
    counts = None
    if "counts" in settings.policy.requires:
        counts = calibration_counts(store, settings)
    return Context(
        n_layers=store.n_layers,
        n_experts=store.n_experts,
        top_k=store.index.top_k,
        slots=slots,
        scope=settings.scope,
        counts=counts,
    )


def calibration_counts(store: ExpertStore, settings: Settings) -> NDArray[np.int64]:
    """How often each expert is used in the calibration trace: int64[n_layers, n_experts]."""
    from moeroute import open_trace

    trace = open_trace(settings.calibration or CALIBRATION)
    meta = trace.meta
    if (meta.n_layers, meta.n_experts) != (store.n_layers, store.n_experts):
        hint = "give one of this model" if settings.calibration else "give one with --calibration"
        raise RunError(
            f"policy '{settings.policy.label}' needs the expert counts of a trace, and "
            f"{trace.path} is of {meta.n_layers} layers of {meta.n_experts} experts, the model of "
            f"{store.n_layers} of {store.n_experts}: {hint}"
        )
    return trace.expert_counts()
