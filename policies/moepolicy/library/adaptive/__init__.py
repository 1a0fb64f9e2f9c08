"""Eviction whose balance follows the misses."""

from moepolicy.library.adaptive.arc import Arc
from moepolicy.policy import Policy

POLICIES: dict[str, type[Policy]] = {
    "arc": Arc,
}
