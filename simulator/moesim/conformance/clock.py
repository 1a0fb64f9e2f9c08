"""An arbitrary clock for the state machine: any legal order of starts, arrivals and computes.

Whatever a live run's link and device do, this clock does some time. It stands for all of them.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable

from moepolicy import Call, ExpertCache, Kind, Step, TokenRows

COPIED = (Kind.HIT, Kind.LATE, Kind.MISS)  # of the others no copy of their own is computed


class RandomClock:
    """Drives a cache, a step at a time; a generator with a seed says what happens next.

    ``streams`` copies may be under way. ``resizes`` changes the cache's size at moments of the
    generator's choice. ``look`` is called after whatever has happened.
    """

    def __init__(
        self,
        cache: ExpertCache,
        seed: int,
        *,
        streams: int = 1,
        resizes: bool = False,
        look: Callable[[], None] | None = None,
        begun: Callable[[int], None] | None = None,
    ) -> None:
        self._cache = cache
        self._clock = random.Random(seed)
        self._streams = streams
        self._resizes = resizes
        self._look = look or (lambda: None)
        self._begun = begun or (lambda _: None)
        self._flying: list[int] = []

    def run(self, steps: Iterable[tuple[Step, TokenRows | None]]) -> None:
        """Serve the steps. AssertionError where the state machine stops with work left to do."""
        for step, rows in steps:
            self._serve(step, rows)

    def _serve(self, step: Step, rows: TokenRows | None) -> None:
        cache, clock = self._cache, self._clock
        for key in clock.sample(self._flying, clock.randint(0, len(self._flying))):
            self._flying.remove(key)
            cache.finish(key)
        self._maybe_resize()
        outcome = cache.begin(step, rows).tolist()
        assert cache.step is not None
        self._begun(step.number)
        keys = cache.step.experts.tolist()
        left = {key for key, kind in zip(keys, outcome, strict=True) if kind in COPIED}
        self._look()
        while left:
            self._one_move(left)
            self._maybe_resize()
            self._look()
        cache.end()
        self._look()
        assert not any(cache.arrays.pinned[keys]), "a pin outlived its step"

    def _maybe_resize(self) -> None:
        if self._resizes and self._clock.random() < 0.3:
            self._cache.resize(self._clock.randint(0, self._cache.max_slots))

    def _one_move(self, left: set[int]) -> None:
        """Let one thing happen: a copy starts or arrives, or an expert that is here is computed."""
        cache, clock, flying = self._cache, self._clock, self._flying
        here = [key for key in sorted(left) if cache.slot_of(key) >= 0 and key not in flying]
        moves = [Call.CONSUME] * bool(here) + [Call.FINISH] * bool(flying)
        if len(flying) < self._streams:
            moves.append(Call.START)
        move = clock.choice(moves)
        if move is Call.START:
            copy = cache.start()
            if copy is not None:
                flying.append(copy.key)
            else:
                assert here or flying, "the machine is stuck: nothing starts, flies or waits"
        elif move is Call.FINISH:
            cache.finish(flying.pop(clock.randrange(len(flying))))
        else:
            key = clock.choice(here)
            left.remove(key)
            cache.consume(key)
