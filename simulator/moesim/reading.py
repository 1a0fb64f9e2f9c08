"""A comparison's table in one sentence: which policy to take, and how much there is to gain."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

from moepolicy import PolicyError, find_policy

from moesim.gap import BASELINE
from moesim.report import Compared, RefusedPoint

LITTLE = 0.05  # of the time spent waiting
EVEN = 0.01  # of tokens/s, or of loads: less is no difference


def sentence(results: Sequence[Compared | RefusedPoint]) -> str:
    """What the rows say of the policies that can run live and change no token; empty where there
    are none."""
    ran = [one for one in results if isinstance(one, Compared)]
    live = [one for one in ran if _can_run_live(one)]
    if not live:
        return ""
    lossy = [one for one in ran if one.result.lossy and not needs_future(one.result.policy)]
    timed = all(one.result.tokens_per_s is not None for one in live)
    worth = _speed if timed else _fewness
    sizes = list(dict.fromkeys(one.slots for one in live))
    groups = {size: [one for one in live if one.slots == size] for size in sizes}
    best = {size: max(group, key=worth) for size, group in groups.items()}
    kind = _Kind("lossless " if lossy else "", timed)
    beyond = _faster(lossy, best, worth, timed)
    if len({one.result.policy for one in live}) == 1:
        of = "these policies" if len(ran) == len(results) else "the policies that could run"
        only = f"{live[0].result.policy} is the only {kind.lossless}one of {of} that runs live"
        return only + _distance(best, kind) + beyond
    if all(_are_even(group, worth) for group in groups.values()):
        return _even(best, kind) + beyond
    return _leaders(best, groups, worth, kind) + _distance(best, kind) + beyond


class _Kind(NamedTuple):
    """What the sentence is about."""

    lossless: str  # "lossless " where the table has lossy policies that run live, too
    timed: bool


def _faster(
    lossy: Sequence[Compared],
    best: dict[int, Compared],
    worth: Callable[[Compared], float],
    timed: bool,
) -> str:
    """The lossy policies that run live and do better than the best lossless one."""
    found: dict[str, list[int]] = {}
    for one in lossy:
        if one.slots in best and worth(one) > worth(best[one.slots]):
            found.setdefault(one.result.policy, []).append(one.slots)
    if not found:
        return ""
    named = _listed([f"{policy} at {_listed(sizes)}" for policy, sizes in found.items()])
    several = len(found) > 1
    what = f"{'are' if several else 'is'} faster" if timed else f"load{'s' * (not several)} fewer"
    return f" {named} slots {what}, and change{'s' * (not several)} what is computed."


def _can_run_live(one: Compared) -> bool:
    return not one.result.lossy and not needs_future(one.result.policy)


def needs_future(label: str) -> bool:
    """Whether a policy, by its label, runs on a recorded trace only. A label that leads to no
    policy is of a class, which a notebook compared, or of another machine's file."""
    try:
        return "future" in find_policy(label).requires
    except PolicyError:
        return False


def _speed(one: Compared) -> float:
    return one.result.speed


def _fewness(one: Compared) -> float:
    return 1 / max(1, one.result.loads)


def _are_even(group: Sequence[Compared], worth: Callable[[Compared], float]) -> bool:
    found = [worth(one) for one in group]
    return max(found) <= (1 + EVEN) * min(found)


def _even(best: dict[int, Compared], kind: _Kind) -> str:
    """Nothing to choose between: why, and what would matter."""
    what = "as fast as one another" if kind.timed else "alike in loads"
    who = f"The {kind.lossless}policies that run live"
    text = f"{who} are {what} within {EVEN:.0%} at {_listed(best)} slots"
    stalls = [one.result.stall_s or 0.0 for one in best.values()]
    times = [one.result.time_s or 0.0 for one in best.values()]
    if kind.timed and sum(stalls) < LITTLE * sum(times):
        text += ": compute hardly waits for experts here, so that no policy can gain much"
    return f"{text}."


def _leaders(
    best: dict[int, Compared],
    groups: dict[int, list[Compared]],
    worth: Callable[[Compared], float],
    kind: _Kind,
) -> str:
    """Who leads at which sizes, and by how much over the baseline or the next."""
    led: dict[str, list[int]] = {}
    for size, one in best.items():
        led.setdefault(one.result.policy, []).append(size)
    what = f"is the fastest {kind.lossless}policy that runs live"
    if not kind.timed:
        what = f"loads the fewest of the {kind.lossless}policies that run live"
    parts: list[str] = []
    for policy, sizes in led.items():
        gains = [_gain(best[size], groups[size], worth) for size in sizes]
        verb = f" {what}" if not parts else ""
        parts.append(f"{policy}{verb} at {_listed(sizes)} slots{_by(gains, kind.timed)}")
    return ", ".join(parts[:-1]) + ", and " * (len(parts) > 1) + parts[-1]


def _by(gains: Sequence[tuple[str, float]], timed: bool) -> str:
    """By how much over whom, in parentheses; empty where there is nobody else."""
    others = {other for other, _ in gains if other}
    if not others:
        return ""
    low, high = (f"{100 * of(gain for _, gain in gains):.0f}" for of in (min, max))
    over = others.pop() if len(others) == 1 else "the next"
    unit = "faster" if timed else "fewer loads"
    if all(gain == 0 for _, gain in gains):
        return f" (as {'fast' if timed else 'few loads'} as {over})"
    if high == "0":
        return f" (by less than 0.5 % over {over})"
    return f" ({low if low == high else f'{low} to {high}'} % {unit} than {over})"


def _gain(
    best: Compared, group: Sequence[Compared], worth: Callable[[Compared], float]
) -> tuple[str, float]:
    """What the best gains over the baseline if it is there and another, else over the next."""
    others = [one for one in group if one is not best]
    if not others:
        return "", 0.0
    against = [one for one in others if one.result.policy == BASELINE]
    other = against[0] if against else max(others, key=worth)
    return other.result.policy, worth(best) / worth(other) - 1


def _distance(best: dict[int, Compared], kind: _Kind) -> str:
    """How far the best is from what no policy can beat, where limits were asked for."""
    if kind.timed:
        shares = [one.result.share_of_limit for one in best.values()]
        found = [share for share in shares if share is not None]
        text = "of the most tokens/s that any policy could reach"
    else:
        found = [
            one.result.loads / one.result.limit_loads
            for one in best.values()
            if one.result.limit_loads
        ]
        text = "times the fewest loads possible"
    if not found:
        return "."
    if kind.timed:
        low, high, unit = f"{100 * min(found):.0f}", f"{100 * max(found):.0f}", " %"
    else:
        low, high, unit = f"{min(found):.2f}", f"{max(found):.2f}", ""
    span = (low if low == high else f"{low} to {high}") + unit
    one = len({each.result.policy for each in best.values()}) == 1
    which = "it" if one else f"the best {kind.lossless}policy that runs live"
    reaches = "reaches" if kind.timed else "does"
    return f"; {which} {reaches} {span} {text}."


def _listed(sizes: Sequence[int] | Sequence[str] | dict[int, Compared]) -> str:
    *first, last = map(str, sizes)
    return f"{', '.join(first)} and {last}" if first else last
