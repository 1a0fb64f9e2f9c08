"""The built-in policies, a folder for each family. A family lists its policies in `POLICIES`."""

from moepolicy.library import (
    activation,
    adaptive,
    budget,
    clairvoyant,
    cpu,
    frequency,
    gate,
    learned,
    precision,
    recency,
    routing,
)
from moepolicy.library.gate.next_gate import NextGate
from moepolicy.policy import Policy

FAMILIES = (
    recency,
    frequency,
    adaptive,
    budget,
    gate,
    activation,
    learned,
    cpu,
    precision,
    routing,
    clairvoyant,
)

BUILT_IN: dict[str, type[Policy]] = {
    name: policy for family in FAMILIES for name, policy in family.POLICIES.items()
}

PARTS: dict[str, type[Policy]] = {"gate": NextGate}
"""What is no policy by itself and can be part of one, as in ``lru+gate``."""
