"""Links: what brings an expert's record from where the weights are kept into a device slot."""

from moerun.links.base import Done, Link, LinkStatistics, Records, Slot, Throttle, Tier
from moerun.links.disk import DiskLink

__all__ = ["DiskLink", "Done", "Link", "LinkStatistics", "Records", "Slot", "Throttle", "Tier"]
