"""Policies that make the most of a memory budget: by sharing the slots out among the layers, or
(lossy) by using fewer of a model's experts."""

from moepolicy.library.budget.adapmoe_slots import AdapmoeSlots
from moepolicy.library.budget.swapmoe import SwapMoe
from moepolicy.policy import Policy

POLICIES: dict[str, type[Policy]] = {
    "adapmoe-slots": AdapmoeSlots,
    "swapmoe": SwapMoe,
}
