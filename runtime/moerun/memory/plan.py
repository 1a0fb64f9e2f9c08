"""The memory plan: what a run needs besides its slots, and how many slots a budget leaves."""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from typing import Any

from moepolicy.tables import described

from moerun.amounts import counted, format_bytes, unit_hint
from moerun.errors import RunError
from moerun.memory.compiling import Compiling

MIB = 1 << 20
MUCH_BYTES = 1 << 30  # of workspace, which a long prompt takes


# What numba takes to load a policy's kept code (measured: 103 to 105 MiB, whichever the policy),
# and to compile it (171 to 215 MiB).
COMPILED_BYTES = {Compiling.NEVER: 0, Compiling.KEPT: 112 * MIB, Compiling.ALWAYS: 256 * MIB}


COMPILED_SHARE = 16  # compiled calls may cost slots of no more than this part of a budget


@dataclass(frozen=True, slots=True)
class Needs:
    """What a run holds besides its expert slots, in bytes.

    cpu_expert_bytes      of what computes experts on the CPU, where that is the device
    host_tier_bytes  of the experts kept between disk and device, where the host is the device
    compiled_bytes   of numba and the policy's compiled code, where the host is the device
    texts            that may be decoded together
    """

    weights_bytes: int
    kv_cache_bytes: int
    workspace_bytes: int
    context_tokens: int
    cpu_expert_bytes: int = 0
    host_tier_bytes: int = 0
    compiled_bytes: int = 0
    texts: int = 1

    def _context(self) -> str:
        tokens = f"{self.context_tokens:,} tokens of context"
        return tokens if self.texts == 1 else f"{self.texts} texts of {tokens}"

    @property
    def total_bytes(self) -> int:
        """Bytes of all parts together."""
        return sum(n_bytes for _, n_bytes, _ in self.rows())

    def rows(self) -> list[tuple[str, int, str]]:
        """What takes how many bytes, and why; what a run does not have is left out."""
        optional = [
            ("CPU experts", self.cpu_expert_bytes, "memory to compute experts on the CPU"),
            ("host memory", self.host_tier_bytes, "experts between disk and slots"),
            ("compiled", self.compiled_bytes, "numba and the policy's code"),
        ]
        return [
            ("weights", self.weights_bytes, "all but the experts"),
            ("KV cache", self.kv_cache_bytes, self._context()),
            ("workspace", self.workspace_bytes, "activations, logits, libraries"),
            *(row for row in optional if row[1]),
        ]


@dataclass(frozen=True, slots=True)
class MemoryPlan:
    """How a budget is spent. ``slots`` is per layer; without a budget they were asked for."""

    needs: Needs
    budget_bytes: int | None
    slots: int
    n_layers: int
    n_experts: int
    staging: int
    slot_bytes: int
    shared: bool = False  # the policy says how many slots each layer has; ``slots`` is the average
    device: str = "cpu"  # that it was made for, and whether this machine has it
    expands: tuple[str, ...] = ()  # precisions that slots hold in 4 bits
    compiling: Compiling = Compiling.ALWAYS  # what may be done to have the policy's calls compiled

    @property
    def slots_bytes(self) -> int:
        """Bytes of all slots of all layers and of the staging buffers."""
        return (self.slots * self.n_layers + self.staging) * self.slot_bytes

    @property
    def total_bytes(self) -> int:
        """Bytes of the whole plan: needs and slots."""
        return self.needs.total_bytes + self.slots_bytes

    @property
    def least_bytes(self) -> int:
        """The smallest budget that works: no slots, every expert through staging."""
        return self.needs.total_bytes + self.staging * self.slot_bytes

    def within(self, budget_bytes: int) -> MemoryPlan:
        """The plan of the same run in another budget; RunError where the budget is too small."""
        if budget_bytes < self.least_bytes:
            raise RunError(
                f"{format_bytes(budget_bytes)} of memory is too little: the least that works is "
                f"{exact(self.least_bytes)} ({self._least()}); each slot in all "
                f"{self.n_layers} layers takes {format_bytes(self.n_layers * self.slot_bytes)} more"
                f"{self._chunk_hint()}{unit_hint(budget_bytes)}"
            )
        slots = (budget_bytes - self.least_bytes) // (self.n_layers * self.slot_bytes)
        return replace(self, budget_bytes=budget_bytes, slots=min(slots, self.n_experts))

    def with_compiling(self, done: Compiling = Compiling.NEVER) -> MemoryPlan:
        """This plan, in a budget on the CPU, with what there is room for of compiled policy calls.

        They save some microseconds a layer, a slot saves copies: compiling gets what slots leave
        unused, code that is kept on disk may cost a small part of the budget. What is ``done``
        already is counted. Raises RunError where the budget is too small for that.
        """
        assert self.budget_bytes is not None
        assert self.needs.compiled_bytes == 0
        unused_bytes = self.budget_bytes - self.total_bytes
        for chosen in (Compiling.ALWAYS, Compiling.KEPT):
            n_bytes = COMPILED_BYTES[chosen]
            needs = replace(self.needs, compiled_bytes=n_bytes)
            plan = replace(self, needs=needs, compiling=chosen)
            small = chosen is Compiling.KEPT and n_bytes <= self.budget_bytes // COMPILED_SHARE
            fits = n_bytes <= unused_bytes or (small and plan.least_bytes <= self.budget_bytes)
            if fits or chosen is done:
                return plan.within(self.budget_bytes)
        return replace(self, compiling=Compiling.NEVER)

    def on_host_within(self, budget_bytes: int, done: Compiling) -> MemoryPlan:
        """The plan of a run on the CPU in another budget; ``done``: its compiled calls so far."""
        bare = replace(self, needs=replace(self.needs, compiled_bytes=0))
        bare = bare.within(budget_bytes)
        try:
            return bare.with_compiling(done)
        except RunError as error:
            raise RunError(
                f"{error}; the policy's compiled code cannot be unloaded: a run that begins "
                "with --memory loads no such code"
            ) from error

    def _chunk_hint(self) -> str:
        """Where reading a long prompt takes the most, how to read it."""
        most = self.needs.workspace_bytes > max(self.least_bytes / 2, MUCH_BYTES)
        return "; --prompt-chunk 512 reads prompts in less" if most else ""

    def _least(self) -> str:
        """What the smallest budget would be spent on."""
        parts = [f"{name} {format_bytes(n_bytes)}" for name, n_bytes, _ in self.needs.rows()]
        buffers = counted(self.staging, "staging buffer")
        return ", ".join([*parts, f"{buffers} {format_bytes(self.staging * self.slot_bytes)}"])

    def rows(self) -> list[tuple[str, int, str]]:
        """What takes how many bytes, and why: for a table."""
        slots = f"{self.slots} of {self.n_experts} experts in each of "
        slots += counted(self.n_layers, "layer")
        slots += ", on average" * self.shared
        if self.expands:
            slots += f"; {' and '.join(self.expands)} codes take 4 bits in slots on the CPU"
        return [
            *self.needs.rows(),
            (
                "staging",
                self.staging * self.slot_bytes,
                f"{counted(self.staging, 'expert')} in passing",
            ),
            ("slots", self.slots * self.n_layers * self.slot_bytes, slots),
            ("total", self.total_bytes, "" if self.budget_bytes is None else self._unused()),
        ]

    def table(self) -> str:
        """The plan as a table: a line for each part, with its size and its reason."""
        rows = {f"{name:11} {format_bytes(size):>11}": why for name, size, why in self.rows()}
        return described({f"{'device':23}": self.device, **rows})

    def to_json(self) -> dict[str, Any]:
        """Sizes in bytes under the names of the plan's parts."""
        return {
            "device": self.device.partition(",")[0],
            **asdict(self.needs),
            "staging_bytes": self.staging * self.slot_bytes,
            "slots_bytes": self.slots * self.n_layers * self.slot_bytes,
            "total_bytes": self.total_bytes,
            "budget_bytes": self.budget_bytes,
            "least_bytes": self.least_bytes,
            "slots": self.slots,
        }

    def _unused(self) -> str:
        assert self.budget_bytes is not None
        left = format_bytes(max(self.budget_bytes - self.total_bytes, 0))
        return f"of {format_bytes(self.budget_bytes)}; {left} unused"


def exact(n_bytes: int) -> str:
    """An amount that can be given back as an option's value: rounded up to a MiB."""
    return f"{-(-n_bytes // MIB)}MiB"
