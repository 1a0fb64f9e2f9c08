"""The copies of a link to a device: which wait for a stream, and whose piece crosses next."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import NamedTuple

from moerun.links.bus import Job, rank_of
from moerun.links.host import Hold
from moerun.links.slot import Destination


@dataclass(eq=False, slots=True)
class Copy:
    """A record on its way over a stream."""

    job: Job
    stream: int
    held: Hold
    n_bytes: int
    into: Destination | None = None  # from its first piece on
    queued: int = 0  # bytes
    events: int = 0  # not yet reached
    error: Exception | None = None

    @property
    def over(self) -> bool:
        """Whether no piece of the copy is in a stream or will be."""
        return not self.events and (self.error is not None or self.queued == self.n_bytes)


class Piece(NamedTuple):
    """Part of a copy's record that can cross; an empty one where reading the record has failed."""

    copy: Copy
    begin: int
    end: int
    read_s: float  # when the last byte of it was there (time.perf_counter)

    @property
    def span(self) -> slice:
        """Where the piece lies in its record, in bytes."""
        return slice(self.begin, self.end)

    @property
    def last(self) -> bool:
        """Whether the whole record has crossed behind it."""
        return self.end == self.copy.n_bytes


class CopyQueue:
    """What waits for a stream, what has one, and how much is on the bus.

    A stream takes up another copy when all of the one before is queued, or will not be. Whoever
    calls holds the link's lock.
    """

    def __init__(self, *, streams: int, n_streams: int, chunk_bytes: int, max_on_bus: int) -> None:
        """Demanded copies take the first ``streams`` of all ``n_streams``, guesses the last. With
        ``chunk_bytes`` no more than ``max_on_bus`` pieces are queued at a time."""
        self._for_demand = range(streams)
        self._for_guesses = range(n_streams - streams, n_streams)
        self._chunk_bytes = chunk_bytes
        self._max_on_bus = max_on_bus
        self._on_bus = 0  # pieces that have an event
        self._waiting: deque[Job] = deque()
        self._under_way: list[Copy] = []
        self._loading: list[Copy | None] = [None] * n_streams  # by stream, not all queued

    @property
    def idle(self) -> bool:
        """Whether no copy waits or is under way."""
        return not self._waiting and not self._under_way

    def jobs(self) -> Iterator[Job]:
        """The jobs of all copies that are not over."""
        yield from self._waiting
        yield from (copy.job for copy in self._under_way)

    def add(self, job: Job) -> None:
        """Append a copy that waits for a stream."""
        self._waiting.append(job)

    def take_up(self, begin: Callable[[Job, int], Copy]) -> None:
        """``begin`` the copies, given job and stream, for which a stream is free."""
        for job in list(self._waiting):
            streams = self._for_demand if job.demand else self._for_guesses
            free = [stream for stream in streams if self._loading[stream] is None]
            if free:
                taken = [copy.stream for copy in self._under_way]
                stream = min(free, key=taken.count)
                self._waiting.remove(job)
                self._loading[stream] = copy = begin(job, stream)
                self._under_way.append(copy)

    def next_piece(self) -> Piece | None:
        """Of what could cross now, or has failed: demand first, then what was submitted first."""
        full = self._chunk_bytes > 0 and self._on_bus >= self._max_on_bus
        able = [
            piece
            for piece in (self._piece_of(copy) for copy in self._loading if copy is not None)
            if piece.copy.held.error is not None or (not full and piece.end > piece.begin)
        ]
        return min(able, key=lambda piece: rank_of(piece.copy.job), default=None)

    def _piece_of(self, copy: Copy) -> Piece:
        """What could cross next of a copy: if not in pieces, all that is there."""
        readable, read_s = copy.held.readable
        if not self._chunk_bytes:
            return Piece(copy, copy.queued, readable, read_s)
        end = min(copy.queued + self._chunk_bytes, copy.n_bytes)
        return Piece(copy, copy.queued, end if readable >= end else copy.queued, read_s)

    def queued(self, piece: Piece) -> None:
        """The piece is in its stream."""
        piece.copy.queued = piece.end
        if piece.last:
            self._loading[piece.copy.stream] = None

    def expect(self, copy: Copy) -> None:
        """There is one more event of the copy's to come, with which ``reached`` is to be called."""
        copy.events += 1
        self._on_bus += 1

    def reached(self, copy: Copy, error: Exception | None) -> bool:
        """An event of the copy's is reached, or cannot be; whether the copy is over."""
        copy.events -= 1
        self._on_bus -= 1
        if error is not None:
            self.fail(copy, error)
        return copy.over

    def fail(self, copy: Copy, error: Exception) -> None:
        """Queue no more of a copy. Its first error stays."""
        copy.error = copy.error or error
        if self._loading[copy.stream] is copy:
            self._loading[copy.stream] = None

    def remove(self, copy: Copy) -> None:
        """Forget a copy that is over."""
        self._under_way.remove(copy)
