"""The order of points: a worker stays with the trace it has read and the policy it compiled."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Iterable

from moesim.sweep.plan import SweepPlan

MOST_AT_ONCE = 16

Group = tuple[int, str]  # a trace, a policy's class


class Schedule:
    """The points still to be run, by number, in groups that share a workload and compiled code."""

    def __init__(self, plan: SweepPlan, numbers: Iterable[int], n_workers: int) -> None:
        self._plan = plan
        self._n_workers = max(1, n_workers)
        self._groups: dict[Group, deque[int]] = {}
        self._at: dict[int, Group] = {}  # worker -> the group it took from last
        order = sorted(numbers, key=self._decisions)
        for number in order:
            self._groups.setdefault(self._group(number), deque()).append(number)

    def __len__(self) -> int:
        return sum(map(len, self._groups.values()))

    def take(self, worker: int) -> list[int]:
        """The points that ``worker`` runs next; empty when none are left.

        Fewer at a time towards the end, so that the workers finish together.
        """
        group = self._choose(worker)
        if group is None:
            return []
        self._at[worker] = group
        waiting = self._groups[group]
        share = math.ceil(len(self) / (4 * self._n_workers))
        n = min(MOST_AT_ONCE, share, len(waiting))
        return [waiting.popleft() for _ in range(n)]

    def put_back(self, number: int, *, last: bool = False) -> None:
        """Take back a point that was not run; ``last`` puts it behind the others of its group."""
        waiting = self._groups[self._group(number)]
        if last:
            waiting.append(number)
        else:
            waiting.appendleft(number)

    def forget(self, worker: int) -> None:
        """Forget which group ``worker``, which is gone, has worked on."""
        self._at.pop(worker, None)

    def _choose(self, worker: int) -> Group | None:
        """The worker's own group, or one of the same trace, or one that few other workers are
        at."""
        mine = self._at.get(worker)
        others = [group for who, group in self._at.items() if who != worker]
        best = None
        for group, waiting in self._groups.items():
            if not waiting:
                continue
            there = sum(other[0] == group[0] for other in others)
            same_trace = mine is not None and mine[0] == group[0]
            rank = (
                group == mine,
                same_trace,
                -there if not same_trace else 0,
                -others.count(group),
                len(waiting),
            )
            if best is None or rank > best[0]:
                best = rank, group
        return best[1] if best else None

    def _group(self, number: int) -> Group:
        point = self._plan.points[number]
        return point.trace, self._plan.job.policies[point.policy].name

    def _decisions(self, number: int) -> tuple[int | str, ...]:
        """Points that differ only in machine and precision are next to each other: their decisions
        are the same."""
        point = self._plan.points[number]
        return (point.trace, point.policy, point.scope, point.slots or 0, number)
