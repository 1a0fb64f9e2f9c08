"""Prefetching by the gates of later layers on this layer's hidden state."""

from moepolicy.library.gate.fate import Fate
from moepolicy.library.gate.lru_spec import LruSpec
from moepolicy.policy import Policy

POLICIES: dict[str, type[Policy]] = {
    "lru-spec": LruSpec,
    "fate": Fate,
}
