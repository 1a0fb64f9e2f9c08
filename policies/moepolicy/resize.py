"""How slots are given up: by one expert to another, or for good when the cache is to be smaller.

The budget of a running cache is tunable, as SwapMoE's is (arXiv 2308.15030): each domain has
between none and a fixed number of slots, and what it is to lose goes as soon as it can. Where the
domains' shares change, what one loses another gets.
"""

from __future__ import annotations

from moepolicy.kinds import EVICT, WrongAnswer
from moepolicy.places import (
    domain_of,
    exchange,
    gather_candidates,
    least,
    leave_device,
    note,
    pop_free,
    push_free,
    remove,
)
from moepolicy.policy import Policy
from moepolicy.state import NOTHING, RESIDENT, Cache


def resize(cache: Cache, policy: Policy, slots: int) -> None:
    """The cache is to have ``slots`` slots a layer, and each domain as many as ``cache.limit`` says
    by now; the caller knows these to be within bounds.

    May come between any two other calls. Of the slots that go, the free ones go first, then the
    policy's victims; pinned experts and those in flight stay until a ``finish`` or ``end`` lets
    them go, and until then nothing new comes to their domain. New slots are free as soon as all
    domains together have fewer than they are to have: at once, unless others must give some up.
    """
    policy.on_resize(slots)
    excess = 0
    for domain in range(cache.staging):
        excess += max(0, cache.n_held[domain] + cache.n_free[domain] - cache.limit[domain])
    cache.excess[0] = excess
    trim(cache, policy)


def trim(cache: Cache, policy: Policy) -> None:
    """Withdraw the slots beyond the limits, as far as what lies in them can go now."""
    for domain in range(cache.staging):
        while cache.n_held[domain] + cache.n_free[domain] > cache.limit[domain]:
            slot = _given_up(cache, policy, domain)
            if slot < 0:
                break
            cache.spare[cache.n_spare[0]] = slot
            cache.n_spare[0] += 1
            cache.excess[0] -= 1
    _grant(cache)


def _grant(cache: Cache) -> None:
    """Give spare slots to the domains that are to have more, while all together lack some."""
    lacking = 0
    for domain in range(cache.staging):
        lacking += cache.limit[domain] - cache.n_held[domain] - cache.n_free[domain]
    for domain in range(cache.staging):
        while lacking > 0 and (cache.n_held[domain] + cache.n_free[domain] < cache.limit[domain]):
            cache.n_spare[0] -= 1
            push_free(cache, domain, cache.spare[cache.n_spare[0]])
            lacking -= 1


def _given_up(cache: Cache, policy: Policy, domain: int) -> int:
    """A slot of ``domain``, emptied if need be; -1 while everything in it must stay."""
    if cache.n_free[domain]:
        return pop_free(cache, domain)
    victim = least(cache, domain) if cache.scoring else _victim_of_none(cache, policy, domain)
    if victim < 0:
        return -1
    slot = int(cache.place[victim])
    note(cache, EVICT, victim, NOTHING)
    remove(cache, domain, victim)
    leave_device(cache, policy, victim)
    return slot


def _victim_of_none(cache: Cache, policy: Policy, domain: int) -> int:
    """The policy's victim where nothing comes in its place; -1 while everything must stay."""
    n = gather_candidates(cache, domain)
    if n == 0:
        return -1
    candidates = cache.candidates[:n]
    # Who goes if one of them came only now? Where the policy would not let it in, that one.
    newcomer = int(candidates[n - 1])
    victim = policy.victim(int(cache.layer[newcomer]), newcomer, candidates)
    if victim < 0:
        if victim != -1:
            raise WrongAnswer("victim named a negative key that is not -1")
        victim = newcomer
    _slot_of_victim(cache, victim, domain)
    return victim


def take_from(cache: Cache, policy: Policy, victim: int, incoming: int) -> int:
    """Give ``victim``'s slot to ``incoming`` and return it; -1 where the policy declined."""
    if victim < 0:
        if victim != -1:
            raise WrongAnswer("victim named a negative key that is not -1")
        return -1
    domain = domain_of(cache, incoming)
    slot = _slot_of_victim(cache, victim, domain)
    note(cache, EVICT, victim, incoming)
    cache.evicted[0] = victim
    exchange(cache, domain, victim, incoming)
    leave_device(cache, policy, victim)
    return slot


def take_least(cache: Cache, policy: Policy, domain: int, incoming: int) -> int:
    """Give the slot of the key with the least score to ``incoming`` and return it; -1 where every
    key must stay."""
    victim = least(cache, domain)
    if victim < 0:
        return -1
    slot = int(cache.place[victim])
    note(cache, EVICT, victim, incoming)
    cache.evicted[0] = victim
    exchange(cache, domain, victim, incoming)
    leave_device(cache, policy, victim)
    return slot


def _slot_of_victim(cache: Cache, victim: int, domain: int) -> int:
    if victim >= len(cache.status):
        raise WrongAnswer("victim named a key that does not exist")
    resident = cache.status[victim] == RESIDENT and not cache.staged[victim]
    if not resident or cache.pinned[victim] or domain_of(cache, victim) != domain:
        raise WrongAnswer("victim named a key that was not among the candidates")
    return int(cache.place[victim])
