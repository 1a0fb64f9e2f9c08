"""How many slots a running model has, and the memory budget that says so: changed at any time."""

from __future__ import annotations

import threading

import torch

from moerun.live.session import Session
from moerun.memory.fit import require_free
from moerun.memory.libraries import keep_little
from moerun.memory.plan import MemoryPlan


class Sizing:
    """Resizes a session from any thread, one change after the other.

    A change that cannot be raises, and all is then as it was: PolicyError beyond a layer's
    experts, RunError where the memory is not there or too little is asked for.
    """

    def __init__(self, session: Session, plan: MemoryPlan, device: torch.device) -> None:
        """``plan`` is what the session was made by."""
        self.plan = plan
        """How memory is to be spent now."""
        self._session = session
        self._device = device
        self._lock = threading.Lock()

    def set_memory(self, budget_bytes: int) -> None:
        """Have as many slots as the budget leaves room for, and compiled calls where it does."""
        with self._lock:
            compilation = self._session.compilation
            on_host = self._device.type == "cpu"
            done = compilation.done
            if on_host:
                plan = self.plan.on_host_within(budget_bytes, done)
            else:
                plan = self.plan.within(budget_bytes)
            more_bytes = plan.slots_bytes - self.plan.slots_bytes
            require_free(more_bytes, budget_bytes, self._device)
            if on_host and compilation.allow(plan.compiling) is not done:
                # It has begun meanwhile, and counts.
                plan = self.plan.on_host_within(budget_bytes, compilation.done)
            if self.plan.budget_bytes is None:
                keep_little(on_host=on_host)
            self._session.resize(plan.slots)
            self.plan = plan
