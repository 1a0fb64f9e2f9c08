"""Whether a bench fits this machine, known before anything is made, and what of it would."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from moepolicy import Context

from moerun.bench.generated import GeneratedModel, GeneratedStore
from moerun.bench.schedule import BenchSchedule
from moerun.devices import free_bytes
from moerun.errors import RunError, UsageError
from moerun.live.assembly import check_lower
from moerun.memory.fit import plan_policies
from moerun.memory.plan import MemoryPlan
from moerun.settings import Settings

_SYSTEM_BYTES = 1 << 30  # activations, the libraries, what the system needs


@dataclass(frozen=True)
class BenchMemory:
    """Bytes: of all experts, of the slots they come and go in, of every other weight.

    Of these, ``layer_bytes`` of the other weights are each of ``n_layers``; ``staging_bytes`` are
    slots however many layers there are. ``all_slot_bytes``: of slots for all experts, where a
    budget has as many as it can; 0 where their number is given. ``tier_bytes``: host memory for
    experts on disk.
    """

    expert_bytes: int
    slot_bytes: int
    dense_bytes: int
    staging_bytes: int = 0
    n_layers: int = 1
    layer_bytes: int = 0
    all_slot_bytes: int = 0
    tier_bytes: int | None = None

    def of_layers(self, n: int) -> BenchMemory:
        """The memory of the same bench with ``n`` layers."""
        all_slot_bytes = self.all_slot_bytes * n // self.n_layers
        spared_bytes = (self.n_layers - n) * self.layer_bytes
        slot_bytes = self.slot_bytes * n // self.n_layers
        if self.all_slot_bytes:
            slot_bytes = min(self.slot_bytes + spared_bytes, all_slot_bytes)
        return replace(
            self,
            expert_bytes=self.expert_bytes * n // self.n_layers,
            slot_bytes=slot_bytes,
            dense_bytes=self.dense_bytes - spared_bytes,
            n_layers=n,
            all_slot_bytes=all_slot_bytes,
        )

    def on_device(self) -> int:
        """Bytes of device memory: slots, staging buffers, dense weights, libraries."""
        return self.slot_bytes + self.staging_bytes + self.dense_bytes + _SYSTEM_BYTES

    def in_host(self, device: torch.device, *, on_disk: bool) -> int:
        """Bytes of host memory; on the CPU these include the bytes of ``on_device``."""
        on_host = device.type == "cpu"
        held = self.expert_bytes
        if on_disk and (on_host or self.tier_bytes is not None):
            held = self.tier_bytes or 0
        return held + (self.on_device() if on_host else 0)

    def __str__(self) -> str:
        return (
            f"experts {self.expert_bytes / 1e9:.2f} GB, slots "
            f"{(self.slot_bytes + self.staging_bytes) / 1e9:.2f} GB, other weights "
            f"{self.dense_bytes / 1e9:.2f} GB"
        )


def fit_slots(
    generated: GeneratedModel,
    lower: GeneratedModel | None,
    settings: Settings,
    schedule: BenchSchedule,
    context: Context,
) -> MemoryPlan:
    """What `moerun` would plan, with room for every policy of ``schedule``.

    ``lower`` is the model at the lower precision. Raises RunError where that cannot be.
    """
    store = GeneratedStore(generated, held=False)
    if lower is not None:
        settings = replace(settings, low=GeneratedStore(lower, held=False))
    if settings.low:
        check_lower(store, settings.low)
    plan = plan_policies(store, settings, schedule.policies, context)
    plan = replace(plan, slots=min(plan.slots, store.n_experts))
    if plan.slots < 0:
        raise UsageError.of("slots", f"must be 0 or more, not {plan.slots}")
    if plan.slots < 1 and schedule.released:
        raise UsageError("the released engine needs 1 slot a layer or more: leave --baseline out")
    return plan


def bench_memory(
    generated: GeneratedModel,
    lower: GeneratedModel | None,
    settings: Settings,
    plan: MemoryPlan,
) -> BenchMemory:
    """What the bench takes, its slots as in ``plan``."""
    index = generated.index
    budgeted = settings.memory_bytes is not None
    staging_bytes = plan.staging * plan.slot_bytes
    return BenchMemory(
        expert_bytes=generated.expert_bytes + (lower.expert_bytes if lower else 0),
        slot_bytes=plan.slots_bytes - staging_bytes,
        dense_bytes=generated.weights_bytes,
        staging_bytes=staging_bytes,
        n_layers=index.n_layers,
        layer_bytes=index.layer_bytes,
        all_slot_bytes=index.n_layers * index.n_experts * plan.slot_bytes if budgeted else 0,
        tier_bytes=settings.host_bytes,
    )


def refuse_too_big(wanted: BenchMemory, device: torch.device, *, on_disk: bool) -> None:
    """RunError naming the sizes, and what would fit, where host or device memory does not do."""
    lack = _lack(wanted, device, on_disk=on_disk)
    if lack is None:
        return
    fewer = range(wanted.n_layers - 1, 0, -1)
    fit = [n for n in fewer if _lack(wanted.of_layers(n), device, on_disk=on_disk) is None]
    ways = [f"--layers {fit[0]} or fewer"] if fit else []
    if not on_disk and _lack(wanted, device, on_disk=True) is None:
        ways.append("--store FOLDER (experts on disk)")
    if _lack(replace(wanted, slot_bytes=0), device, on_disk=on_disk) is None:
        ways.append("less --memory" if wanted.all_slot_bytes else "fewer --slots")
    raise RunError(f"{lack}: give {', '.join([*ways, 'or a lower --precision'])}")


def _lack(wanted: BenchMemory, device: torch.device, *, on_disk: bool) -> str | None:
    """What is needed of which memory and not there; None where all is."""
    needs = [
        (wanted.in_host(device, on_disk=on_disk), torch.device("cpu"), "this machine's memory")
    ]
    if device.type != "cpu":
        needs.insert(0, (wanted.on_device(), device, str(device)))
    for needed, where, name in needs:
        if needed > (free := free_bytes(where)):
            return (
                f"this needs {needed / 1e9:.2f} GB of {name} ({wanted}), of which "
                f"{free / 1e9:.2f} GB are free"
            )
    return None
