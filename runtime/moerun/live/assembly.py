"""A run's parts, made from its settings: link, slots, host tier, experts on the CPU."""

from __future__ import annotations

from functools import partial

import torch

from moerun.errors import RunError
from moerun.kernels.slots import ExpertSlot, SlotForm
from moerun.links import DirectRecords, DiskLink, DualSlot, HostTier, Link, Records, Throttle
from moerun.links.arena import Arena, device_memory, lacking
from moerun.links.host import host_tier
from moerun.offload.cpu_experts import CpuExperts
from moerun.ranges import check_rate
from moerun.settings import CPU, Settings
from moerun.store.expert_store import ExpertStore


def make_link(store: ExpertStore, form: SlotForm, settings: Settings, n_slots: int) -> Link:
    """A link, not yet started, from the store to new slots on the device. Raises RunError."""
    rate, device = settings.link_bytes_per_s, settings.device
    if rate is not None:
        check_rate(rate)
    throttle = Throttle(rate) if rate else None
    slots = make_slots(form, settings, n_slots)
    if device.type == "cuda":
        from moerun.links.cuda import CudaDevice
        from moerun.links.pinned import PinnedLink

        if settings.cold:
            raise RunError(f"on {device} experts come from memory, not from disk: leave --direct")
        return PinnedLink(
            make_tier(store, settings),
            slots,
            CudaDevice(device),
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


def make_cpu_experts(store: ExpertStore, settings: Settings, link: Link) -> CpuExperts:
    """What computes experts on the CPU: from the link's host memory where it has that, else from
    the store."""
    form = SlotForm(store.index.shape, store.index.precision, CPU)
    if settings.device.type == "cuda":
        from moerun.links.pinned import PinnedLink

        assert isinstance(link, PinnedLink)
        return CpuExperts(form, link.tier, link.tier if link.tier.whole else None)
    return CpuExperts(form, DirectRecords(store) if settings.cold else store)


def check_low(store: ExpertStore, low: ExpertStore | None) -> None:
    """RunError where ``low`` holds other experts than ``store`` does."""
    if low is not None and low.index.source_digest != store.index.source_digest:
        raise RunError(
            f"{low.path} is the store of another model ({low.index.model}): give --low a "
            f"store that was packed from the checkpoint of {store.path}"
        )


def check_lower(store: ExpertStore, low: ExpertStore) -> None:
    """RunError where the experts of ``low`` are no smaller: nobody means that."""
    if low.record_bytes >= store.record_bytes:
        raise RunError(
            f"an expert takes {low.record_bytes:,} bytes at the lower precision "
            f"({low.index.precision}), no fewer than the {store.record_bytes:,} at "
            f"{store.index.precision}: give --low a lower precision"
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
