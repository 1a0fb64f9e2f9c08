"""What a link to a device queues next, by hand: no device, no thread."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
from moerun.links.bus import Job
from moerun.links.copies import Copy, CopyQueue
from moerun.links.host_memory import Readable
from moerun.links.slot import Variant

CHUNK = 10
RECORD = 25


class Queue:
    """A queue of two streams, and of two more for guesses where there are chunks."""

    def __init__(self, chunk_bytes: int = CHUNK, max_on_bus: int = 2) -> None:
        n_streams = 4 if chunk_bytes else 2
        self.copies = CopyQueue(
            streams=2, n_streams=n_streams, chunk_bytes=chunk_bytes, max_on_bus=max_on_bus
        )
        self.held: dict[int, Any] = {}
        self.stream_of: dict[int, int] = {}

    def add(self, key: int, *, demand: bool = True, readable: int = RECORD) -> None:
        self.held[key] = SimpleNamespace(readable=Readable(readable, 0.5), error=None)
        self.copies.add(Job(key, key, Variant.FULL, 0.0, number=key, demand=demand))
        self.copies.take_up(self._begin)

    def _begin(self, job: Job, stream: int) -> Copy:
        self.stream_of[job.key] = stream
        return Copy(job, stream, self.held[job.key], RECORD)

    def send(self) -> tuple[int, int, int] | None:
        """Queue what crosses next: key, begin, end."""
        piece = self.copies.next_piece()
        if piece is None:
            return None
        self.copies.expect(piece.copy)
        self.copies.queued(piece)
        self.sent = piece.copy
        return piece.copy.job.key, piece.begin, piece.end


def test_a_stream_takes_up_the_next_copy_when_all_of_its_last_is_queued() -> None:
    queue = Queue(chunk_bytes=0)
    for key in range(3):
        queue.add(key)
    assert queue.stream_of == {0: 0, 1: 1}
    assert [queue.send(), queue.send()] == [(0, 0, RECORD), (1, 0, RECORD)]
    first = queue.sent
    queue.copies.take_up(queue._begin)
    assert queue.stream_of == {0: 0, 1: 1, 2: 0}
    assert queue.copies.reached(first, None)
    queue.copies.remove(first)
    assert [job.key for job in queue.copies.jobs()] == [0, 2]


def test_guesses_have_streams_of_their_own_where_records_travel_in_pieces() -> None:
    queue = Queue()
    for key in range(3):
        queue.add(key, demand=False)
    queue.add(3)
    assert queue.stream_of == {0: 2, 1: 3, 3: 0}


def test_no_more_pieces_than_allowed_are_on_the_bus_and_demand_goes_first() -> None:
    queue = Queue()
    queue.add(0, demand=False)
    assert queue.send() == (0, 0, 10)
    guess = queue.sent
    queue.add(1)
    assert queue.send() == (1, 0, 10)
    assert queue.send() is None
    assert not queue.copies.reached(guess, None)
    assert queue.send() == (1, 10, 20)
    assert queue.send() is None
    assert not queue.copies.reached(queue.sent, None)
    assert queue.send() == (1, 20, RECORD)


@pytest.mark.parametrize(("chunk_bytes", "ends"), [(0, [5, 15, 25]), (CHUNK, [None, 10, 20])])
def test_only_what_has_been_read_crosses_in_whole_pieces(
    chunk_bytes: int, ends: list[int | None]
) -> None:
    queue = Queue(chunk_bytes, max_on_bus=9)
    queue.add(0, readable=0)
    assert queue.send() is None
    found = []
    for readable in (5, 15, 25):
        queue.held[0].readable = Readable(readable, 0.5)
        sent = queue.send()
        found.append(sent and sent[2])
    assert found == ends


def test_a_copy_that_fails_is_over_when_nothing_of_it_is_in_its_stream() -> None:
    queue = Queue()
    queue.add(0)
    queue.send()
    queue.send()
    failed, error = queue.sent, OSError("the first")
    assert not queue.copies.reached(failed, error)
    assert queue.send() is None  # of it no more crosses
    assert queue.copies.reached(failed, OSError("the second"))
    assert failed.error is error
    queue.copies.remove(failed)
    assert queue.copies.idle


def test_a_record_that_cannot_be_read_is_heard_of_though_the_bus_is_full() -> None:
    queue = Queue(max_on_bus=1)
    queue.add(0)
    queue.add(1, readable=0)
    queue.send()
    assert queue.copies.next_piece() is None
    queue.held[1].error = OSError("cut off")
    piece = queue.copies.next_piece()
    assert piece is not None
    assert piece.copy.job.key == 1
