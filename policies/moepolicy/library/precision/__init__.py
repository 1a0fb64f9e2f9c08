"""Misses loaded at a precision that the gate's weights ask for; lossy."""

from moepolicy.library.precision.hobbit import Hobbit, HobbitSpec
from moepolicy.policy import Policy

POLICIES: dict[str, type[Policy]] = {
    "hobbit": Hobbit,
    "hobbit-spec": HobbitSpec,
}
