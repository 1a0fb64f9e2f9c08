"""Where the time of a run goes, and the lanes of its timeline."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

# Lanes of a timeline.
COMPUTE_LANE = 0


LINK_LANE = 1


DISK_LANE = 2


CPU_LANE = 3


class Segment(NamedTuple):
    """A stretch of one lane's time, ns. ``key`` is -1 - layer for a layer outside its experts.

    ``unit`` numbers the copy stream or CPU worker; ``demand`` tells a wanted copy from a guess.
    """

    lane: int
    unit: int
    begins: int
    ends: int
    key: int
    demand: int


@dataclass
class SimulatedTime:
    """Where the simulated time went, in ns, and what each lane did if that was asked for."""

    total_ns: int = 0
    decode_ns: int = 0
    prompt_ns: int = 0
    stall_ns: int = 0  # compute waited for an expert, or woke up for one
    link_busy_ns: int = 0  # bytes flowed
    gates_ns: int = 0  # later gates were asked for predictions
    segments: list[Segment] | None = None

    def add(self, *segment: int) -> None:
        """Keep a segment (see `Segment`), where a timeline is kept."""
        if self.segments is not None:
            self.segments.append(Segment(*segment))

    def follow(self, other: SimulatedTime) -> None:
        """Let another run's time come after this one's; what it left under way is cut off."""
        if self.segments is not None:
            for segment in other.segments or ():
                begins, ends = segment.begins, min(segment.ends, other.total_ns)
                if begins <= ends:
                    shift = self.total_ns
                    self.segments.append(segment._replace(begins=shift + begins, ends=shift + ends))
        self.total_ns += other.total_ns
        self.decode_ns += other.decode_ns
        self.prompt_ns += other.prompt_ns
        self.stall_ns += other.stall_ns
        self.link_busy_ns += other.link_busy_ns
        self.gates_ns += other.gates_ns
