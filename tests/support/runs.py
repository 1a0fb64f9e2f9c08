"""What tests run models by: a text in one call, and experts that are all in memory."""

from __future__ import annotations

import torch
from moerun.errors import RunError
from moerun.kernels.slots import ExpertSlot, SlotForm
from moerun.live.runner import Runner
from moerun.live.sampling import Sampling
from moerun.offload.experts import Served, served_in_order
from moerun.store.expert_store import ExpertStore


def generate(runner: Runner, prompt: str, sampling: Sampling) -> str:
    """The text that follows ``prompt``."""
    return runner.generation().run(runner.encode(prompt), sampling).text


class ResidentProvider:
    """All experts of a store in memory, served in router order. Nothing is ever loaded again."""

    def __init__(self, store: ExpertStore, device: torch.device | str = "cpu") -> None:
        """Reads every record. Raises RunError when one is damaged or memory does not suffice."""
        form = SlotForm(store.index.shape, store.index.precision, torch.device(device))
        self._n_experts = store.n_experts
        try:
            memory = torch.empty(
                (store.n_keys, form.slot_bytes), dtype=torch.uint8, device=torch.device(device)
            )
            staging = torch.empty(store.record_bytes, dtype=torch.uint8)
        except (RuntimeError, MemoryError) as error:
            raise RunError(
                f"all experts of {store.path} take {store.n_keys * form.slot_bytes / 2**30:.2f} "
                f"GiB, which {device} does not have free: offload them or pack at a lower precision"
            ) from error
        self.slots: list[ExpertSlot] = [form.bind(slot) for slot in memory]
        for key, slot in enumerate(self.slots):
            store.read_into(key, staging)
            slot.arrive(staging)

    def serve(self, layer: int, top_k_index: torch.Tensor, top_k_weights: torch.Tensor) -> Served:
        first = layer * self._n_experts
        return served_in_order(top_k_index, lambda expert: self.slots[first + expert])
