"""Links: what brings an expert's record from where the weights are kept into a device slot."""

from moerun.links.base import (
    Done,
    DualSlot,
    Link,
    LinkStatistics,
    Records,
    Slot,
    Throttle,
    in_form,
)
from moerun.links.disk import DiskLink

__all__ = [
    "DiskLink",
    "Done",
    "DualSlot",
    "Link",
    "LinkStatistics",
    "Records",
    "Slot",
    "Throttle",
    "in_form",
]
