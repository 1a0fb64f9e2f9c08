"""Misses shared between the link and the CPU."""

from moepolicy.library.cpu.fiddler import Fiddler
from moepolicy.library.cpu.hybrimoe import HybriMoe
from moepolicy.library.cpu.insert_cap import InsertCap
from moepolicy.library.cpu.pay_back import PayBack
from moepolicy.library.cpu.split import Split
from moepolicy.policy import Policy

POLICIES: dict[str, type[Policy]] = {
    "fiddler": Fiddler,
    "hybrimoe": HybriMoe,
    "split": Split,
    "pay-back": PayBack,
    "insert-cap": InsertCap,
}
