"""A model made ready to run from an expert store: its session, its link, its gates listened to."""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from moepolicy import Context, PolicySpec

from moerun.devices import naming_lack_of_memory
from moerun.errors import RunError, UsageError
from moerun.kernels.slots import ExpertSlot, SlotForm
from moerun.links import DirectRecords, DiskLink, DualSlot, HostTier, Link, Records, Throttle
from moerun.links.arena import Arena, device_memory, lacking
from moerun.links.host import host_tier
from moerun.live.generate import Generation, Sampling, context_tokens, encode
from moerun.live.session import Session
from moerun.memory.budget import BudgetWatch
from moerun.memory.fit import plan_context, plan_memory, require_free
from moerun.memory.needs import Peak
from moerun.offload.cpu_experts import Aside
from moerun.offload.gate_predictor import GatePredictor, find_routers
from moerun.offload.load import load_offloaded
from moerun.policies import refuse_unservable
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
    logit_tokens: int = 1  # of which a pass gives the logits
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
    low: ExpertStore | None = None  # the same experts at a lower precision

    @property
    def predicts(self) -> int:
        """How many layers ahead the gates are asked."""
        return self.ahead(self.policy)

    def ahead(self, policy: PolicySpec) -> int:
        """How many layers ahead the gates are asked under ``policy``."""
        return max(self.horizon or 0, policy.horizon)

    @property
    def copies(self) -> int:
        """How many may be under way at once: in pieces, prefetches have streams of their own."""
        return self.streams * (2 if self.chunk_bytes else 1)


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
        self.plan = plan_memory(store, settings)
        self._peak = Peak(store, settings.device)
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
            compiling=self.plan.compiling,
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
        return tier if isinstance(tier, HostTier) and not tier.whole else None

    @property
    def peak_bytes(self) -> int:
        """The most of the device's memory this run has held, as a budget counts it."""
        return self._peak.n_bytes

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
            on_host = self.settings.device.type == "cpu"
            done = self.session.compiled
            if on_host:
                plan = self.plan.on_host_within(budget_bytes, done)
            else:
                plan = self.plan.within(budget_bytes)
            more_bytes = plan.slots_bytes - self.plan.slots_bytes
            require_free(more_bytes, budget_bytes, self.settings.device)
            if on_host and self.session.allow_compiling(plan.compiling) is not done:
                # It has begun meanwhile, and counts.
                plan = self.plan.on_host_within(budget_bytes, self.session.compiled)
            self.session.resize(plan.slots)
            self.plan = plan

    @property
    def arena_bytes(self) -> int:
        """Device memory of all slots, staging included."""
        return self.session.cache.n_slots * self.plan.slot_bytes

    def encode(self, prompt: str) -> torch.Tensor:
        """Token ids, int64[1, tokens], on the model's device."""
        return encode(self.tokenizer, prompt, self.settings.device)

    def generation(
        self,
        on_text: Callable[[str], None] | None = None,
        on_reasoning: Callable[[str], None] | None = None,
    ) -> Generation:
        return Generation(
            self.model,
            self.tokenizer,
            self.session,
            on_text,
            on_reasoning=on_reasoning,
            context_tokens=self.context_tokens,
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


def check_rate(bytes_per_s: float) -> None:
    """UsageError for a cap that no link could have."""
    if not 0 < bytes_per_s < float("inf"):
        raise UsageError(f"link-gbps must be above 0, not {bytes_per_s / 1e9:g}")


def make_link(store: ExpertStore, form: SlotForm, settings: Settings, n_slots: int) -> Link:
    """A link, not yet started, from the store to new slots on the device. Raises RunError."""
    rate, device = settings.link_bytes_per_s, settings.device
    if rate is not None:
        check_rate(rate)
    throttle = Throttle(rate) if rate else None
    slots = make_slots(form, settings, n_slots)
    if device.type == "cuda":
        from moerun.links.cuda import CudaLanes
        from moerun.links.pinned import PinnedLink

        if settings.cold:
            raise RunError(f"on {device} experts come from memory, not from disk: leave --cold")
        return PinnedLink(
            make_tier(store, settings),
            slots,
            CudaLanes(device),
            streams=settings.streams,
            throttle=throttle,
            chunk_bytes=settings.chunk_bytes,
        )
    records: Records = DirectRecords(store) if settings.cold else store
    low: Records | None = settings.low
    if settings.host_bytes is not None:
        records, low = make_tier(store, settings), None  # it has both
    elif settings.cold and settings.low:
        low = DirectRecords(settings.low)
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
    low = _low_form(settings.low, settings.device) if settings.low else None
    n_bytes = max(form.slot_bytes, low.slot_bytes if low else 0)
    with lacking(n_bytes, settings.device):
        memory = device_memory(n_bytes, settings.device)
    slot = form.bind(memory[: form.slot_bytes])
    if low is None:
        return slot
    return DualSlot(slot, low.bind(memory[: low.slot_bytes]))


def make_aside(store: ExpertStore, settings: Settings, link: Link) -> Aside:
    """What computes experts on the CPU: from the link's host memory where it has that, else from
    the store."""
    form = SlotForm(store.index.shape, store.index.precision, CPU)
    if settings.device.type == "cuda":
        from moerun.links.pinned import PinnedLink

        assert isinstance(link, PinnedLink)
        return Aside(form, link.tier, link.tier if link.tier.whole else None)
    return Aside(form, DirectRecords(store) if settings.cold else store)


def check_low(store: ExpertStore, low: ExpertStore | None) -> None:
    """RunError where ``low`` holds other experts than ``store`` does."""
    if low is not None and low.index.source_digest != store.index.source_digest:
        raise RunError(
            f"{low.path} is the store of another model ({low.index.model}): give --low one that "
            f"was packed from the checkpoint of {store.path}"
        )


def check_lower(store: ExpertStore, low: ExpertStore) -> None:
    """RunError where the experts of ``low`` are no smaller: nobody means that."""
    if low.record_bytes >= store.record_bytes:
        raise RunError(
            f"an expert takes {low.record_bytes:,} bytes at the lower precision "
            f"({low.index.precision}), no fewer than the other's {store.record_bytes:,} "
            f"({store.index.precision}): give --low a lower one"
        )


def _low_form(low: ExpertStore, device: torch.device) -> SlotForm:
    return SlotForm(low.index.shape, low.index.precision, device)


def make_tier(store: ExpertStore, settings: Settings) -> HostTier:
    """Host memory for all records, of both precisions, or for as many as it may hold. Raises
    RunError."""
    host_bytes, low = settings.host_bytes, settings.low
    record_bytes = store.record_bytes + (low.record_bytes if low else 0)
    if host_bytes is None or host_bytes >= store.n_keys * record_bytes:
        # What is read only once may stay in the file cache, for the next start.
        return host_tier(store, None, low=low)
    lower = DirectRecords(low) if low else None
    return host_tier(DirectRecords(store), host_bytes, settings.copies, low=lower)
