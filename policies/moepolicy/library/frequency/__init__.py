"""Eviction by how often experts were used, here or in a calibration trace."""

from moepolicy.library.frequency.class_lru import ClassLru
from moepolicy.library.frequency.coserve import CoServe
from moepolicy.library.frequency.lfru import Lfru
from moepolicy.library.frequency.lfru_guard import LfruGuard
from moepolicy.library.frequency.lfu import Lfu
from moepolicy.library.frequency.lfu_aging import LfuAging
from moepolicy.library.frequency.static import Static
from moepolicy.policy import Policy

POLICIES: dict[str, type[Policy]] = {
    "lfu": Lfu,
    "lfu-aging": LfuAging,
    "lfru": Lfru,
    "class-lru": ClassLru,
    "static": Static,
    "lfru-guard": LfruGuard,
    "coserve": CoServe,
}
