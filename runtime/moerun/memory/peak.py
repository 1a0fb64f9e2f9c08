"""The most memory a run has held, as a budget counts it."""

from __future__ import annotations

import torch

from moerun.devices import peak_device_bytes, peak_host_bytes, resident_bytes
from moerun.store.expert_store import ExpertStore


class Peak:
    """The most of a device's memory that a run has held since this was made, as a budget counts
    it: to be made when all is there that is not the run's own."""

    def __init__(self, store: ExpertStore, device: torch.device) -> None:
        """Imports the code of the store's model first, which is not the run's."""
        from transformers import MODEL_FOR_CAUSAL_LM_MAPPING

        MODEL_FOR_CAUSAL_LM_MAPPING[type(store.config())]  # imports the class
        self._device = device
        self._baseline_bytes = resident_bytes()
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)

    @property
    def n_bytes(self) -> int:
        """Bytes of the peak: of the device's memory, or of host memory above the baseline."""
        on_device = peak_device_bytes(self._device)
        if on_device is not None:
            return on_device
        return max(peak_host_bytes() - self._baseline_bytes, 0)
