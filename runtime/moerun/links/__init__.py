"""Links: what brings an expert's record from where the weights are kept into a device slot."""

from moerun.links.base import Done, Link, LinkStatistics, Records
from moerun.links.direct import DirectRecords
from moerun.links.disk import DiskLink
from moerun.links.host import HostTier
from moerun.links.slot import DualSlot, Slot, Variant, in_form
from moerun.links.throttle import Throttle

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
    "Variant",
    "in_form",
]
