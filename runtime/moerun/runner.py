"""A model made ready to run from an expert store: its session, its link, its gates listened to."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from moepolicy import Context, PolicySpec
from numpy.typing import NDArray

from moerun.devices import format_bytes
from moerun.errors import RunError
from moerun.forms import SlotForm
from moerun.generate import Generation, Sampling, encode
from moerun.links import DiskLink, Link, Throttle
from moerun.links.disk import ColdRecords
from moerun.model import load_offloaded
from moerun.predict import GatePredictor, find_routers
from moerun.servable import refuse_unservable
from moerun.session import Session
from moerun.store import ExpertStore

CPU = torch.device("cpu")


@dataclass(frozen=True)
class Settings:
    """How a store is to be run. ``slots`` is per layer; ``memory_bytes`` sets it instead."""

    policy: PolicySpec
    slots: int | None = None
    memory_bytes: int | None = None
    scope: str = "layer"
    device: torch.device = CPU
    streams: int = 1
    link_bytes_per_s: float | None = None  # a cap; None: as fast as it goes
    cold: bool = False  # keep what is read out of the page cache
    horizon: int | None = None  # None: 1 if the policy looks at predictions, else 0
    calibration: str | None = None  # the trace that policies count experts in

    @property
    def predicts(self) -> int:
        """How many layers ahead the gates are asked."""
        needed = int("predictions" in self.policy.requires)
        return needed if self.horizon is None else max(self.horizon, needed)


class Runner:
    """A model served by a session. A context manager; ``close`` ends its threads and hooks."""

    def __init__(self, store: ExpertStore, settings: Settings) -> None:
        """Raises RunError or PolicyError before anything big is loaded where it cannot run."""
        refuse_unservable(settings.policy)
        self.store = store
        self.settings = settings
        self.form = SlotForm(store.index.shape, store.index.precision, settings.device)
        self.context = plan_context(store, settings, self.form.slot_bytes)
        self._hooks: list[Any] = []
        self.session = Session(
            self.context,
            settings.policy,
            partial(make_link, store, self.form, settings),
            record_bytes=store.record_bytes,
            compile=True,
        )
        try:
            self.model, self.tokenizer = load_offloaded(store, settings.device, self.session)
            self.predictor = (
                GatePredictor(self.model, settings.predicts) if settings.predicts else None
            )
            self._listen()
        except BaseException:
            self.session.close()
            raise

    def __enter__(self) -> Runner:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @property
    def arena_bytes(self) -> int:
        """Device memory of all slots, staging included."""
        return self.session.cache.n_slots * self.form.slot_bytes

    def encode(self, prompt: str) -> torch.Tensor:
        """Token ids, int64[1, tokens], on the model's device."""
        return encode(self.tokenizer, prompt, self.settings.device)

    def generation(self, on_text: Callable[[str], None] | None = None) -> Generation:
        return Generation(self.model, self.tokenizer, self.session, on_text)

    def generate(self, prompt: str, sampling: Sampling) -> str:
        """The text that follows ``prompt``."""
        return self.generation().run(self.encode(prompt), sampling).text

    def close(self) -> None:
        for hook in self._hooks:
            hook.remove()
        if self.predictor:
            self.predictor.close()
        self.session.close()

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
    slots = [form.bind(memory) for memory in _arena(n_slots, form.slot_bytes, device)]
    if device.type == "cuda":
        from moerun.links.cuda import CudaLink

        if settings.cold:
            raise RunError(f"on {device} experts come from memory, not from disk: leave --cold")
        return CudaLink(store, slots, device, streams=settings.streams, throttle=throttle)
    records = ColdRecords(store) if settings.cold else store
    return DiskLink(records, slots, streams=settings.streams, throttle=throttle)


def plan_context(store: ExpertStore, settings: Settings, slot_bytes: int) -> Context:
    """The cache's size, from slots or a memory budget. RunError where the budget is too small."""
    counts = None
    if "counts" in settings.policy.requires:
        counts = calibration_counts(store, settings)
    context = Context(
        n_layers=store.n_layers,
        n_experts=store.n_experts,
        top_k=store.index.top_k,
        slots=settings.slots if settings.slots is not None else store.n_experts // 2,
        scope=settings.scope,
        counts=counts,
    )
    if settings.memory_bytes is None:
        return context
    # Staging may depend on the parameters, so a policy is made to ask it.
    staging = settings.policy.build(context._replace(slots=0)).staging
    if settings.memory_bytes < staging * slot_bytes:
        raise RunError(
            f"{format_bytes(settings.memory_bytes)} is too small for the {staging} staging "
            f"buffers of policy '{settings.policy.label}': the least that works is "
            f"{format_bytes(staging * slot_bytes)}, and each slot in all {store.n_layers} layers "
            f"takes {format_bytes(store.n_layers * slot_bytes)} more"
        )
    free = settings.memory_bytes // slot_bytes - staging
    return context._replace(slots=min(free // store.n_layers, store.n_experts))


def calibration_counts(store: ExpertStore, settings: Settings) -> NDArray[np.int64]:
    """How often each expert is used in the calibration trace: int64[n_layers, n_experts]."""
    from moeroute import open_trace

    trace = open_trace(settings.calibration or "tiny")
    meta = trace.meta
    if (meta.n_layers, meta.n_experts) != (store.n_layers, store.n_experts):
        hint = "give one of this model" if settings.calibration else "give one with --calibration"
        raise RunError(
            f"policy '{settings.policy.label}' needs the expert counts of a trace, and "
            f"{trace.path} is of {meta.n_layers} layers of {meta.n_experts} experts, the model of "
            f"{store.n_layers} of {store.n_experts}: {hint}"
        )
    columns = trace.arrays("layer", "experts")
    keys = columns["layer"].astype(np.int64)[:, None] * meta.n_experts + columns["experts"]
    counts = np.bincount(keys.ravel(), minlength=store.n_keys)
    return counts.reshape(store.n_layers, store.n_experts)


def _arena(n_slots: int, slot_bytes: int, device: torch.device) -> torch.Tensor:
    try:
        return torch.empty((n_slots, slot_bytes), dtype=torch.uint8, device=device)
    except (RuntimeError, MemoryError) as error:
        raise RunError(
            f"{n_slots} expert slots take {format_bytes(n_slots * slot_bytes)}, which {device} "
            "does not have free: use fewer slots or a lower precision"
        ) from error
