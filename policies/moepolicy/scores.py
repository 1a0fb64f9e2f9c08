"""Policies that order by a score of each key: the cache keeps the scores, and chooses by itself."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from moepolicy.composite import MadeOfTwo, OnlyEviction
from moepolicy.policy import Policy, PolicyError


class ByScore(Policy):
    """Evict the candidate of least score; of equal scores the lowest key.

    A class sets ``eviction_score``, int64[n_keys], and changes its entries in its hooks: in
    ``on_step`` those of the step's experts, in the other hooks that of the key that the hook is
    about, and no other entry. No score is the greatest int64. In return the cache does not gather
    candidates to ask ``victim``: it has the scores of what may go at hand.
    """

    always_evicts = True
    eviction_score: NDArray[np.int64]

    def victim(self, layer: int, incoming: int, candidates: NDArray[np.int32]) -> int:
        """The candidate of least score, where the cache asks all the same."""
        best = candidates[0]
        for i in range(1, len(candidates)):
            if self.eviction_score[candidates[i]] < self.eviction_score[best]:
                best = candidates[i]
        return int(best)


def scores_of(policy: Policy, n_keys: int) -> NDArray[np.int64] | None:
    """The scores that a policy evicts by; None where its ``victim`` says more than they do.

    Raises PolicyError where they are no int64[n_keys].
    """
    victim = type(policy).victim
    if victim is MadeOfTwo.victim and isinstance(policy, MadeOfTwo):
        return scores_of(policy.base, n_keys)
    if victim is OnlyEviction.victim and isinstance(policy, OnlyEviction):
        return scores_of(policy.whole, n_keys)
    if victim is not ByScore.victim:
        return None
    found = getattr(policy, "eviction_score", None)
    if isinstance(found, np.ndarray) and found.dtype == np.int64 and found.shape == (n_keys,):
        return found
    raise PolicyError(
        f"{type(policy).__name__} evicts by score, and its eviction_score is no int64 array of "
        f"{n_keys} entries, one a key"
    )
