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
from moerun.links.direct import DirectRecords
from moerun.links.disk import DiskLink
from moerun.links.host import HostTier

__all__ = [
    "DirectRecords",
    "DiskLink",
    "Done",
    "DualSlot",
    "HostTier",
    "Link",
    "LinkStatistics",
    "Records",
    "Slot",
    "Throttle",
    "in_form",
]
