"""Every schedule of copies and evictions there is, on machines small enough to try them all."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from heapq import heappop, heappush
from itertools import combinations, count
from typing import NamedTuple

Key = tuple[int, int]  # layer, expert


class Tiny(NamedTuple):
    """A machine in whole ns: one layer outside its experts, one expert, one copy's bytes."""

    layer_ns: int
    expert_ns: int
    copy_ns: int
    latency_ns: int = 0
    streams: int = 1


class State(NamedTuple):
    """A moment of a run. ``copies`` are (key, ns until ready, bus ns left) in order of start."""

    step: int
    begun: bool  # the step's gate has spoken
    todo: frozenset[Key]  # of its demand, not computed yet
    busy: int  # ns until compute is free
    here: frozenset[Key]
    copies: tuple[tuple[Key, int, int], ...]


def quickest(
    demands: Sequence[tuple[int, Sequence[int]]],
    machine: Tiny,
    slots: int,
    scope: str,
    shares: Sequence[int] | None = None,
) -> int:
    """The least time of any schedule: at every event, any copy may start and evict anything.

    A superset of what the state machine lets a policy do: a step's demand needs no slots while
    the step lasts, and only at its end must what is held or under way fit the slots. ``shares``
    are the slots of each layer where they are not equal.
    """
    wanted = [frozenset((layer, e) for e in experts) for layer, experts in demands]
    layers = {layer for layer, _ in demands}
    equal = [slots] * (1 + max(layers))
    capacity = (shares or equal) if scope == "layer" else [sum(equal)]

    def domain(key: Key) -> int:
        return key[0] if scope == "layer" else 0

    def occupied(state: State, of: int) -> list[Key]:
        """What fills the slots of a domain: all but the demand of the step in progress."""
        exempt = wanted[state.step] if state.begun else frozenset()
        held = [*state.here, *(key for key, _, _ in state.copies)]
        return [key for key in held if domain(key) == of and key not in exempt]

    def starts(state: State) -> Iterator[State]:
        under_way = {key for key, _, _ in state.copies}
        if len(under_way) == machine.streams or not (state.step or state.begun):
            return
        useful = state.todo.union(*wanted[state.step + state.begun :])
        copies_of = sorted(useful - state.here - under_way)
        for key in copies_of:
            copies = (*state.copies, (key, machine.latency_ns, machine.copy_ns))
            pinned = state.begun and key in wanted[state.step]
            full = occupied(state, domain(key))
            if pinned or len(full) < capacity[domain(key)]:
                yield state._replace(copies=copies)
            else:
                for victim in full:
                    if victim in state.here:
                        yield state._replace(copies=copies, here=state.here - {victim})

    def advance(state: State) -> tuple[int, State] | None:
        """The time to the next event and what it finds; None where nothing will ever happen."""
        on_bus = _on_bus(state.copies, machine.copy_ns)
        events = [wait for _, wait, _ in state.copies if wait > 0]
        if state.busy:
            events.append(state.busy)
        if on_bus >= 0:
            events.append(state.copies[on_bus][2])
        if not events:
            return None
        took = min(events)
        copies = [
            (key, max(wait - took, 0), left - took * (i == on_bus))
            for i, (key, wait, left) in enumerate(state.copies)
        ]
        return took, state._replace(
            busy=max(state.busy - took, 0),
            here=state.here.union(key for key, _, left in copies if left == 0),
            copies=tuple(copy for copy in copies if copy[2] > 0),
        )

    def settle(state: State) -> Iterator[State]:
        """Compute goes on at once if it can; where a step ends, every choice of what stays."""
        if state.busy:
            yield state
        elif not state.begun:
            yield from settle(state._replace(begun=True, todo=wanted[state.step]))
        elif state.todo:
            ready = sorted(state.todo & state.here)
            if ready:
                state = state._replace(todo=state.todo - {ready[0]}, busy=machine.expert_ns)
            yield state
        else:
            after = state._replace(step=state.step + 1, begun=False, busy=machine.layer_ns)
            if after.step == len(wanted):
                yield after
                return
            of = domain(next(iter(wanted[state.step])))
            held = occupied(after, of)
            loose = [key for key in held if key in state.here]
            for gone in combinations(loose, max(len(held) - capacity[of], 0)):
                yield after._replace(here=state.here - set(gone))

    nothing: frozenset[Key] = frozenset()
    reached = [(0, 0, State(0, False, nothing, machine.layer_ns, nothing, ()))]
    seen = set()
    tie = count()
    while True:
        now, _, state = heappop(reached)
        if state.step == len(wanted):
            return now
        if state in seen:
            continue
        seen.add(state)
        for started in starts(state):
            heappush(reached, (now, next(tie), started))
        if (event := advance(state)) is not None:
            took, later = event
            for settled in settle(later):
                heappush(reached, (now + took, next(tie), settled))


def _on_bus(copies: Sequence[tuple[Key, int, int]], copy_ns: int) -> int:
    """Whose bytes are flowing: what has begun, else the first that is ready; -1 for none."""
    begun = (i for i, (_, _, left) in enumerate(copies) if left < copy_ns)
    ready = (i for i, (_, wait, _) in enumerate(copies) if wait == 0)
    return next(begun, next(ready, -1))
