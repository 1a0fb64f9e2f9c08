"""Eviction by when experts were used or loaded, or by neither (random)."""

from moepolicy.library.recency.clock import Clock
from moepolicy.library.recency.fifo import Fifo
from moepolicy.library.recency.first_loads import S3Fifo, TwoQ
from moepolicy.library.recency.least_stale import LeastStale
from moepolicy.library.recency.lru import Lru
from moepolicy.library.recency.random_victim import Random
from moepolicy.library.recency.sieve import Sieve
from moepolicy.library.recency.slru import Slru
from moepolicy.policy import Policy

POLICIES: dict[str, type[Policy]] = {
    "lru": Lru,
    "fifo": Fifo,
    "clock": Clock,
    "sieve": Sieve,
    "slru": Slru,
    "2q": TwoQ,
    "s3-fifo": S3Fifo,
    "least-stale": LeastStale,
    "random": Random,
}
