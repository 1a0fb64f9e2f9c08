"""A copy only where it pays: the newcomer's expected uses against those of what it displaces."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from moepolicy.kinds import COMPUTE, LOAD
from moepolicy.library.selection import lowest
from moepolicy.policy import Context, Policy, PolicyUsageError
from moepolicy.steps import Step


class PayBack(Policy):
    """Load a miss if its expected uses repay the copy; else the CPU computes it.

    An expert's rate is its uses a forward pass, each counted half as much ``half_life`` passes
    later. The copy repays itself if the newcomer's rate exceeds that of the resident with the
    least, whom it would displace, by ``uses`` in ``passes`` passes; into a free slot always.
    ``uses`` is the copy's time over what a hit saves against the CPU. The test that engines of
    2026 put before an eviction; the rate is this project's choice.
    """

    requires = frozenset({"cpu"})
    always_evicts = True

    def __init__(
        self, context: Context, uses: float = 1.0, passes: int = 16, half_life: int = 32
    ) -> None:
        if uses < 0 or passes < 1 or half_life < 1:
            raise PolicyUsageError(
                "pay-back: uses must be 0 or more, passes and half_life 1 or more, "
                f"not {uses}, {passes} and {half_life}"
            )
        self.keep = 0.5 ** (1.0 / half_life)  # of a rate, after a pass
        self.least_gain = uses / passes
        self.n_domains = 1 if context.scope == "global" else context.n_layers
        self.width = context.n_keys // self.n_domains  # keys of a domain
        self.n_experts = context.n_experts
        self.rate = np.zeros(context.n_keys)
        self.held = np.zeros(context.n_keys, np.bool_)
        self.n_held = np.zeros(self.n_domains, np.int64)
        self.promised = np.zeros(self.n_domains, np.int64)  # loads of the step in progress
        self.slots = np.zeros(1, np.int64)
        self.on_resize(context.slots)

    def on_resize(self, slots: int) -> None:
        """A domain has room for so many from now on."""
        n_layers = len(self.rate) // self.n_experts
        self.slots[0] = min(slots, self.n_experts) * (n_layers // self.n_domains)

    def on_step(self, step: Step) -> None:
        """Let the layer's rates decay, and count the step's uses."""
        first = step.layer * self.n_experts
        for key in range(first, first + self.n_experts):
            self.rate[key] *= self.keep
        for rank in range(len(step.experts)):
            self.rate[step.experts[rank]] += 1.0 - self.keep
        self.promised[first // self.width] = 0

    def on_load(self, key: int, speculative: bool, now: int) -> None:
        """Note that the key is on the device."""
        self.held[key] = True
        self.n_held[key // self.width] += 1

    def on_evict(self, key: int) -> None:
        """Note that the key has left the device."""
        self.held[key] = False
        self.n_held[key // self.width] -= 1

    def on_miss(self, step: Step, rank: int) -> int:
        """LOAD into a free slot, or where that repays itself; else COMPUTE."""
        key = step.experts[rank]
        domain = key // self.width
        room = self.slots[0] - self.n_held[domain] - self.promised[domain]
        if room <= 0 and self.rate[key] - self.least_rate(step, domain) < self.least_gain:
            return COMPUTE
        self.promised[domain] += 1
        return LOAD

    def least_rate(self, step: Step, domain: int) -> float:
        """The least rate of a resident that the step does not use; 1, the most, if none is."""
        least = 1.0
        for key in range(domain * self.width, (domain + 1) * self.width):
            if self.held[key] and self.rate[key] < least:
                wanted = False
                for rank in range(len(step.experts)):
                    wanted = wanted or step.experts[rank] == key
                if not wanted:
                    least = float(self.rate[key])
        return least

    def victim(self, layer: int, incoming: int, candidates: NDArray[np.int32]) -> int:
        """The candidate of the least rate."""
        return lowest(self.rate, candidates)
