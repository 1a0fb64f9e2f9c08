"""Eviction and prefetching that know the trace's future: the limits."""

from moepolicy.library.clairvoyant.aggressive import Clairvoyant
from moepolicy.library.clairvoyant.belady import Belady, BeladyBypass
from moepolicy.policy import Policy

POLICIES: dict[str, type[Policy]] = {
    "belady": Belady,
    "belady-bypass": BeladyBypass,
    "clairvoyant": Clairvoyant,
}
