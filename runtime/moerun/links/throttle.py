"""The cap on a link's bandwidth."""

from __future__ import annotations

import threading
from dataclasses import dataclass, field


@dataclass
class Throttle:
    """Makes copies take as long as a slower bus would: latency, then bytes at a bandwidth.

    Latencies of several streams overlap, their bytes go one copy after the other. Every deadline
    follows from the one before while copies queue, so late wake-ups do not add up.
    """

    bytes_per_s: float
    latency_s: float = 0.0
    _free_s: float = 0.0  # when the bus has carried everything promised so far
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def deadline_s(self, begin_s: float, n_bytes: int) -> float:
        """When a copy that began at ``begin_s`` may be called done (time.perf_counter)."""
        with self._lock:
            flows_s = max(begin_s + self.latency_s, self._free_s)
            self._free_s = flows_s + n_bytes / self.bytes_per_s
            return self._free_s
