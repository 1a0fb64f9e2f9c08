"""The base paper's policy: LRU with speculative loading."""

from __future__ import annotations

from moepolicy.composite import Composite
from moepolicy.library.gate.next_gate import NextGate
from moepolicy.library.recency.lru import Lru
from moepolicy.policy import Context


class LruSpec(Composite):
    """LRU with speculative loading of the next layer's ``n`` likeliest experts (2312.17238).

    The guesses wait in ``staging`` buffers shared by all layers; one enters the cache, in place
    of its layer's least recently used expert, only when it is used.
    """

    requires = frozenset({"predictions"})

    def __init__(self, context: Context, n: int = 2, staging: int = 4) -> None:
        super().__init__(Lru(context), NextGate(context, n))
        self.staging = staging
