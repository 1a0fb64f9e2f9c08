"""The link of a GPU on a device of threads: what it queues, what waits for what, what may fail."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from queue import SimpleQueue
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from moerun.arena import Arena, device_memory
from moerun.checkpoints import resolve
from moerun.errors import RunError
from moerun.links import DualSlot, HostTier, Records, Throttle, in_form
from moerun.links.pinned import PinnedLink
from moerun.links.turns import Pieces
from moerun.pack import pack
from support.lanes import PATIENCE_S, Span, ThreadLanes
from support.links import MemoryRecords

CHUNK = 4096
RECORD = 4 * CHUNK
LOW = 2 * CHUNK
FIRST_LOW = 1000
N_KEYS = 8

Reports = SimpleQueue[tuple[int, Exception | None]]


class Form:
    """A slot's memory as one precision uses it; with ``derives`` records land elsewhere first."""

    def __init__(self, memory: torch.Tensor, derives: bool = False) -> None:
        self.memory = memory
        self.landing = None if derives else memory

    def arrive(self, record: torch.Tensor) -> None:
        if self.landing is None:
            self.memory.copy_(record)

    def holds(self, number: int) -> bool:
        return bool((self.memory.view(torch.int32) == number).all())


def dual_slot(derives: bool = False) -> DualSlot:
    memory = device_memory(RECORD, torch.device("cpu"))
    return DualSlot(Form(memory, derives), Form(memory[:LOW], derives))


def full_records(broken: frozenset[int] = frozenset()) -> MemoryRecords:
    return MemoryRecords(N_KEYS, broken, record_bytes=RECORD)


def low_records() -> MemoryRecords:
    return MemoryRecords(N_KEYS, record_bytes=LOW, first=FIRST_LOW)


class SteppedRecords(MemoryRecords):
    """Pieces are read only as ``allow`` lets them; ``log`` has those begun."""

    def __init__(self, broken: frozenset[int] = frozenset()) -> None:
        super().__init__(N_KEYS, broken, record_bytes=RECORD)
        self.log: list[tuple[int, int]] = []
        self._allowed = threading.Semaphore(0)

    def allow(self, pieces: int) -> None:
        self._allowed.release(pieces)

    def read_into(self, key: int, buffer: torch.Tensor, *, pieces: Pieces | None = None) -> None:
        def stepped(n_bytes: int) -> Iterator[slice]:
            assert pieces is not None
            for piece in pieces(n_bytes):
                self.log.append((key, piece.start // CHUNK))
                assert self._allowed.acquire(timeout=PATIENCE_S)
                yield piece

        super().read_into(key, buffer, pieces=stepped)


class Rig:
    """A started link over a tier of ``n_bytes``, with four slots, and what it reports."""

    def __init__(
        self,
        records: Records,
        *,
        n_bytes: int | None = None,
        lanes: ThreadLanes | None = None,
        low: Records | None = None,
        derives: bool = False,
        n_slots: int = 4,
        **options: Any,
    ) -> None:
        self.lanes = lanes or ThreadLanes()
        self.slots = Arena(partial(dual_slot, derives), n_slots)
        self.tier = HostTier(records, n_bytes, low, read_bytes=CHUNK)
        self.link = PinnedLink(self.tier, self.slots, self.lanes, **options)
        self.reports: Reports = SimpleQueue()
        self.link.start(lambda key, error: self.reports.put((key, error)))

    def __enter__(self) -> Rig:
        return self

    def __exit__(self, *_: object) -> None:
        self.link.close()
        self.lanes.end()
        assert self.lanes.pinned == []

    def wait(self) -> int:
        key, error = self.reports.get(timeout=PATIENCE_S)
        assert error is None
        return key

    def check(self, slot: int, number: int) -> Callable[[], None]:
        """Have compute look whether a slot holds ``number``; what is returned waits and tells."""
        found: list[bool] = []
        self.link.acquire(slot)
        form = in_form(self.slots[slot], number >= FIRST_LOW)
        self.lanes.compute.run(lambda: found.append(form.holds(number)))
        self.link.release(slot)
        mark = self.lanes.compute.mark()

        def told() -> None:
            mark.wait()
            assert found == [True]

        return told

    @property
    def queued(self) -> list[tuple[int, int]]:
        """The pieces queued so far: slot and number."""
        return [self._piece(span) for span in list(self.lanes.queued)]

    def _piece(self, span: Span) -> tuple[int, int]:
        for slot, memory in enumerate(self.slots):
            offset = span.address - memory.full.memory.data_ptr()
            if 0 <= offset < RECORD:
                return slot, offset // CHUNK
        raise AssertionError(span)


def wait_for(happened: Callable[[], bool]) -> None:
    deadline_s = time.monotonic() + PATIENCE_S
    while not happened():
        assert time.monotonic() < deadline_s
        time.sleep(0.001)


@pytest.mark.parametrize("chunk_bytes", [0, CHUNK])
@pytest.mark.parametrize("streams", [1, 2, 3])
@pytest.mark.parametrize("derives", [False, True])
def test_every_record_arrives_whole(streams: int, chunk_bytes: int, derives: bool) -> None:
    with Rig(full_records(), streams=streams, chunk_bytes=chunk_bytes, derives=derives) as rig:
        for first in (0, 4):
            for slot in range(4):
                rig.link.submit(first + slot, slot)
            assert sorted(rig.wait() for _ in range(4)) == list(range(first, first + 4))
            for told in [rig.check(slot, first + slot) for slot in range(4)]:
                told()
        statistics = rig.link.statistics
        assert (statistics.copies, statistics.bytes_copied) == (8, 8 * RECORD)
        assert statistics.busy_s > 0


@pytest.mark.parametrize("chunk_bytes", [0, CHUNK])
def test_a_slot_is_not_overwritten_before_its_last_reader_is_done(chunk_bytes: int) -> None:
    with Rig(full_records(), chunk_bytes=chunk_bytes) as rig:
        rig.link.submit(3, 0)
        rig.wait()
        go_on = threading.Event()
        rig.lanes.compute.run(lambda: _wait(go_on))
        told = rig.check(0, 3)  # queued behind that
        rig.link.submit(5, 0)
        time.sleep(0.01)
        assert rig.reports.empty()
        go_on.set()
        told()
        assert rig.wait() == 5
        rig.check(0, 5)()


def test_a_reader_waits_for_exactly_its_expert() -> None:
    with Rig(full_records(), lanes=ThreadLanes(hold_back=True), streams=2) as rig:
        rig.link.submit(1, 0)
        rig.link.submit(2, 1)
        rig.link.acquire(0)
        rig.lanes.compute.run(lambda: None)
        mark = rig.lanes.compute.mark()
        rig.lanes.allow(1)
        key = rig.wait()
        assert mark.reached.wait(PATIENCE_S) if key == 1 else not mark.reached.is_set()
        rig.lanes.allow(1)
        mark.wait()
        assert rig.wait() == 3 - key


def test_the_next_piece_is_queued_while_one_crosses_and_no_more() -> None:
    with Rig(full_records(), lanes=ThreadLanes(hold_back=True), chunk_bytes=CHUNK) as rig:
        rig.link.submit(1, 0)
        assert rig.queued == [(0, 0), (0, 1)]
        rig.lanes.allow(1)
        wait_for(lambda: len(rig.queued) == 3)
        assert rig.queued == [(0, 0), (0, 1), (0, 2)]
        rig.lanes.allow(3)
        assert rig.wait() == 1
        rig.check(0, 1)()


def test_whole_records_follow_each_other_without_any_thread() -> None:
    with Rig(full_records(), lanes=ThreadLanes(hold_back=True), streams=3) as rig:
        for slot in range(3):
            rig.link.submit(slot, slot)
        assert rig.queued == [(0, 0), (1, 0), (2, 0)]
        rig.lanes.allow(3)
        assert sorted(rig.wait() for _ in range(3)) == [0, 1, 2]


def test_what_is_asked_for_in_a_report_is_queued_before_the_report_ends() -> None:
    rig = Rig(full_records(), streams=1)
    queued = []

    def report(key: int, error: Exception | None) -> None:
        if key < 4:
            rig.link.submit(key + 1, 0)
            queued.append(len(rig.lanes.queued))
        rig.reports.put((key, error))

    rig.link._done = report
    with rig:
        rig.link.submit(0, 0)
        assert [rig.wait() for _ in range(5)] == list(range(5))
    assert queued == [2, 3, 4, 5]


def test_a_demand_overtakes_a_prefetch_after_the_pieces_on_their_way() -> None:
    with Rig(full_records(), lanes=ThreadLanes(hold_back=True), chunk_bytes=CHUNK) as rig:
        rig.link.submit(1, 0, demand=False)
        rig.link.submit(2, 1)
        rig.lanes.allow(8)
        assert sorted([rig.wait(), rig.wait()]) == [1, 2]
        assert rig.queued == [(0, 0), (0, 1), (1, 0), (1, 1), (1, 2), (1, 3), (0, 2), (0, 3)]


def test_a_guess_that_turns_out_right_travels_as_demand() -> None:
    lanes = ThreadLanes(hold_back=True)
    with Rig(full_records(), lanes=lanes, chunk_bytes=CHUNK, streams=2) as rig:
        rig.link.submit(1, 0, demand=False)
        rig.link.submit(2, 1, demand=False)
        rig.link.want(2)
        lanes.allow(8)
        assert sorted([rig.wait(), rig.wait()]) == [1, 2]
        assert rig.queued[2:6] == [(1, 0), (1, 1), (1, 2), (1, 3)]


def test_a_capped_link_takes_its_time_and_lets_demand_past_every_piece() -> None:
    throttle = Throttle(bytes_per_s=4e6)
    with Rig(full_records(), throttle=throttle, chunk_bytes=CHUNK) as rig:
        rig.link.submit(1, 0, demand=False)
        assert rig.queued == [(0, 0)]
        rig.link.submit(2, 1)
        assert sorted([rig.wait(), rig.wait()]) == [1, 2]
        assert rig.queued[1:5] == [(1, 0), (1, 1), (1, 2), (1, 3)]
        # The first one's time is that of both.
        assert rig.link.statistics.busy_s >= 0.999 * (2 * RECORD + RECORD) / 4e6


def test_a_copy_asked_for_in_a_report_begins_where_the_one_before_ended() -> None:
    """However late a thread wakes up, and whatever a session has to do first."""
    begins: list[float] = []
    busy: list[float] = []

    class Noted(Throttle):
        def deadline_s(self, begin_s: float, n_bytes: int) -> float:
            begins.append(begin_s)
            return super().deadline_s(begin_s, n_bytes)

    rig = Rig(full_records(), throttle=Noted(bytes_per_s=4e6))

    def report(key: int, error: Exception | None) -> None:
        busy.append(rig.link.statistics.busy_s)
        if key < 4:
            time.sleep(0.002)
            rig.link.submit(key + 1, 0)
        rig.reports.put((key, error))

    rig.link._done = report
    with rig:
        rig.link.submit(0, 0)
        assert [rig.wait() for _ in range(5)] == list(range(5))
    assert [begin - begins[0] for begin in begins[1:]] == pytest.approx(busy[:4])
    assert busy[4] >= 0.999 * 5 * RECORD / 4e6


@pytest.mark.parametrize("chunk_bytes", [0, CHUNK])
def test_a_record_crosses_while_it_is_being_read(chunk_bytes: int) -> None:
    records = SteppedRecords()
    with Rig(records, n_bytes=2 * RECORD, chunk_bytes=chunk_bytes) as rig:
        rig.link.submit(6, 2)
        for n in range(3):
            assert len(rig.queued) == n
            records.allow(1)
            wait_for(lambda n=n: len(rig.queued) > n)  # type: ignore[misc]
        assert rig.queued == [(2, 0), (2, 1), (2, 2)]
        assert rig.reports.empty()
        records.allow(1)
        assert rig.wait() == 6
        rig.check(2, 6)()


def test_the_next_record_is_read_while_the_one_before_crosses() -> None:
    lanes = ThreadLanes(hold_back=True)
    with Rig(full_records(), n_bytes=2 * RECORD, lanes=lanes, streams=2) as rig:
        rig.link.submit(1, 0)
        wait_for(lambda: rig.queued[-1:] == [(0, 3)])
        rig.link.submit(2, 1)
        wait_for(lambda: rig.queued[-1:] == [(1, 3)])
        assert rig.reports.empty()
        lanes.allow(8)
        assert sorted([rig.wait(), rig.wait()]) == [1, 2]


def test_the_disk_serves_one_record_at_a_time_and_demand_first() -> None:
    records = SteppedRecords()
    with Rig(records, n_bytes=4 * RECORD, chunk_bytes=CHUNK, streams=2) as rig:
        rig.link.submit(1, 0, demand=False)
        wait_for(lambda: records.log == [(1, 0)])
        rig.link.submit(2, 1, demand=False)
        rig.link.submit(3, 2)
        wait_for(lambda: rig.tier._turns.n_waiting == 2)
        rig.link.want(2)
        records.allow(12)
        arrived = [rig.wait() for _ in range(3)]
    assert records.log == [
        *((key, piece) for key, piece in [(1, 0)]),
        *((2, piece) for piece in range(4)),
        *((3, piece) for piece in range(4)),
        *((1, piece) for piece in range(1, 4)),
    ]
    assert sorted(arrived) == [1, 2, 3]


@pytest.mark.parametrize("chunk_bytes", [0, CHUNK])
def test_a_record_whose_checksum_fails_never_arrives(chunk_bytes: int) -> None:
    records = full_records(broken=frozenset({3}))
    with Rig(records, n_bytes=2 * RECORD, chunk_bytes=chunk_bytes) as rig:
        rig.link.submit(3, 0)
        key, error = rig.reports.get(timeout=PATIENCE_S)
        assert key == 3
        assert isinstance(error, RunError)
        assert "expert 3 in store.safetensors" in str(error)
        assert (0, 3) not in rig.queued  # its end has not even crossed
        rig.link.submit(4, 0)
        assert rig.wait() == 4
        rig.check(0, 4)()
        assert rig.link.statistics.copies == 1


@pytest.mark.parametrize("chunk_bytes", [0, CHUNK])
def test_a_read_that_fails_in_the_middle_hands_the_disk_on(chunk_bytes: int) -> None:
    class Failing(MemoryRecords):
        def read_into(
            self, key: int, buffer: torch.Tensor, *, pieces: Pieces | None = None
        ) -> None:
            def cut(n_bytes: int) -> Iterator[slice]:
                assert pieces is not None
                for piece in pieces(n_bytes):
                    if key == 3 and piece.start == 2 * CHUNK:
                        raise RunError("expert 3 could not be read (Input/output error)")
                    yield piece

            super().read_into(key, buffer, pieces=cut)

    records = Failing(N_KEYS, record_bytes=RECORD)
    with Rig(records, n_bytes=2 * RECORD, chunk_bytes=chunk_bytes, streams=2) as rig:
        rig.link.submit(3, 0)
        rig.link.submit(4, 1)
        found = dict(rig.reports.get(timeout=PATIENCE_S) for _ in range(2))
        assert found[4] is None
        assert "Input/output error" in str(found[3])
        rig.check(1, 4)()
        rig.link.submit(5, 0)
        assert rig.wait() == 5
        rig.check(0, 5)()


@pytest.mark.parametrize("damage", ["flip", "cut"])
def test_a_damaged_file_is_named_though_its_start_has_crossed(tmp_path: Path, damage: str) -> None:
    store = pack(resolve("tiny"), tmp_path / "tiny")
    where = store.location(9)
    if damage == "flip":
        with where.path.open("r+b") as file:
            file.seek(where.offset + 5)
            file.write(b"\x7f")
    else:
        os.truncate(where.path, where.offset + 8192)
    lanes = ThreadLanes()
    slots = [Form(torch.zeros(store.record_bytes, dtype=torch.uint8))]
    tier = HostTier(store, 2 * store.record_bytes, read_bytes=CHUNK)
    link = PinnedLink(tier, slots, lanes)
    reports: Reports = SimpleQueue()
    link.start(lambda key, error: reports.put((key, error)))
    link.submit(9, 0)
    key, error = reports.get(timeout=PATIENCE_S)
    assert (key, type(error)) == (9, RunError)
    assert "expert 1 of layer 1" in str(error)
    assert where.path.name in str(error)
    link.submit(0, 0)
    assert reports.get(timeout=PATIENCE_S) == (0, None)
    expected = torch.empty(store.record_bytes, dtype=torch.uint8)
    store.read_into(0, expected)
    assert torch.equal(slots[0].memory, expected)
    link.close()
    lanes.end()


@pytest.mark.parametrize(("chunk_bytes", "failing"), [(0, 1), (CHUNK, 4), (CHUNK, 6), (CHUNK, 7)])
def test_a_copy_that_fails_is_reported_once_and_the_link_goes_on(
    chunk_bytes: int, failing: int
) -> None:
    lanes = ThreadLanes(failing=frozenset({failing}))
    with Rig(full_records(), lanes=lanes, chunk_bytes=chunk_bytes) as rig:
        for key, fails in ((1, False), (2, True), (3, False)):
            rig.link.submit(key, 0)
            found, error = rig.reports.get(timeout=PATIENCE_S)
            assert (found, error is not None) == (key, fails)
        rig.check(0, 3)()
        assert rig.reports.empty()
        assert rig.link.statistics.copies == 2


@pytest.mark.parametrize("chunk_bytes", [0, CHUNK])
def test_a_slot_that_cannot_take_its_record_is_reported_and_the_link_goes_on(
    chunk_bytes: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    with Rig(full_records(), chunk_bytes=chunk_bytes) as rig:

        def copy(*_: object) -> None:
            raise RunError("copying an expert to cuda:0 failed")

        with monkeypatch.context() as patch:
            patch.setattr(rig.link._lanes[0], "copy", copy)
            rig.link.submit(1, 0)
            key, error = rig.reports.get(timeout=PATIENCE_S)
            assert (key, str(error)) == (1, "copying an expert to cuda:0 failed")
        rig.link.submit(2, 0)
        assert rig.wait() == 2
        rig.check(0, 2)()


def test_the_memory_of_a_slot_that_goes_stays_until_its_last_reader_is_done() -> None:
    with Rig(full_records(), n_slots=3) as rig:
        rig.link.submit(1, 2)
        rig.wait()
        go_on = threading.Event()
        rig.lanes.compute.run(lambda: _wait(go_on))
        told = rig.check(2, 1)
        thread = threading.Thread(target=rig.link.resize, args=([2], []))
        thread.start()
        time.sleep(0.01)
        assert rig.slots[2] is not None
        go_on.set()
        thread.join(PATIENCE_S)
        told()
        assert rig.slots[2] is None
        assert rig.lanes.trimmed == 1


@pytest.mark.parametrize("slot", [2, 4])
def test_a_new_slot_waits_for_what_its_memory_was_used_for_before(slot: int) -> None:
    with Rig(full_records(), n_slots=3) as rig:
        rig.link.resize([2], [])
        go_on = threading.Event()
        rig.lanes.compute.run(lambda: _wait(go_on))
        rig.link.resize([], [slot])
        rig.link.submit(5, slot)
        time.sleep(0.01)
        assert rig.reports.empty()
        go_on.set()
        assert rig.wait() == 5
        rig.check(slot, 5)()


def test_slots_made_while_text_is_generated_take_records_like_any_others() -> None:
    with Rig(full_records(), n_slots=1, chunk_bytes=CHUNK) as rig:
        with torch.inference_mode():
            rig.link.resize([], [3])
            rig.link.submit(5, 3)
        assert rig.wait() == 5
        rig.link.submit(6, 3)
        assert rig.wait() == 6
        rig.check(3, 6)()


def test_a_link_that_never_started_can_be_closed() -> None:
    lanes = ThreadLanes()
    link = PinnedLink(HostTier(full_records()), Arena(dual_slot, 1), lanes)
    link.close()
    lanes.end()
    assert lanes.pinned == []


def test_a_link_whose_device_is_lost_gives_up_its_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    def lost(_: object) -> None:
        raise RunError("the device is lost")

    monkeypatch.setattr(ThreadLanes, "drain", lost)
    rig = Rig(full_records(), n_bytes=2 * RECORD)
    with pytest.raises(RunError, match="lost"):
        rig.link.close()
    assert rig.lanes.pinned == []
    assert not [t.name for t in threading.enumerate() if t.name.startswith(("link", "reader"))]
    rig.lanes.end()
    monkeypatch.setattr(ThreadLanes, "open", lost)
    lanes = ThreadLanes()
    with pytest.raises(RunError, match="lost"):
        PinnedLink(HostTier(full_records()), Arena(dual_slot, 1), lanes)
    lanes.end()
    assert lanes.pinned == []


@pytest.mark.parametrize("n_bytes", [None, 2 * RECORD])
def test_closing_ends_everything_after_the_copies_under_way(n_bytes: int | None) -> None:
    rig = Rig(full_records(), n_bytes=n_bytes, streams=2)
    rig.link.submit(3, 0)
    rig.link.submit(4, 1)
    rig.link.close()
    rig.link.close()
    rig.lanes.end()
    assert sorted(rig.reports.get_nowait() for _ in range(2)) == [(3, None), (4, None)]
    names = [thread.name for thread in threading.enumerate()]
    assert not [name for name in names if name.startswith(("link", "reader"))]
    assert rig.lanes.pinned == []


def test_a_capped_copy_is_not_waited_for_when_closing() -> None:
    rig = Rig(full_records(), throttle=Throttle(bytes_per_s=1.0))  # hours
    rig.link.submit(3, 0)
    rig.link.close()
    rig.lanes.end()
    assert rig.reports.get_nowait() == (3, None)


def test_memory_that_cannot_be_pinned_or_filled_is_given_back() -> None:
    lanes = ThreadLanes()
    tier = HostTier(full_records(broken=frozenset({5})))
    with pytest.raises(RunError, match="expert 5 in store"):
        PinnedLink(tier, Arena(dual_slot, 1), lanes)
    assert lanes.pinned == []
    lanes.end()


operations = st.lists(
    st.tuples(
        st.sampled_from(["submit", "submit", "submit", "guess", "read", "read", "want", "wait"]),
        st.integers(0, N_KEYS - 1),
        st.integers(0, 3),
        st.booleans(),
    ),
    max_size=60,
)


@settings(max_examples=60, deadline=None)
@given(
    streams=st.integers(1, 3),
    chunk_bytes=st.sampled_from([0, CHUNK, 3 * CHUNK]),
    records_held=st.sampled_from([None, 0, 2]),
    derives=st.booleans(),
    operations=operations,
    seed=st.integers(0, 10**6),
)
def test_whatever_is_asked_every_reader_finds_its_record(
    streams: int,
    chunk_bytes: int,
    records_held: int | None,
    derives: bool,
    operations: list[tuple[str, int, int, bool]],
    seed: int,
) -> None:
    """Random copies of either precision into slots that are being read, as a session may ask."""
    copies = streams * (2 if chunk_bytes else 1)
    n_bytes = None if records_held is None else (copies + records_held) * RECORD
    rig = Rig(
        full_records(),
        n_bytes=n_bytes,
        lanes=ThreadLanes(seed),
        low=low_records(),
        derives=derives,
        streams=streams,
        chunk_bytes=chunk_bytes,
    )
    under_way: dict[int, tuple[int, int, bool]] = {}  # by key: slot, number, demand
    holds: dict[int, int] = {}  # by slot: number
    readers = []

    def wait() -> None:
        slot, number, _ = under_way.pop(rig.wait())
        holds[slot] = number

    with rig:
        for what, key, slot, low in operations:
            demand = what == "submit"
            like = [d for *_, d in under_way.values() if d == demand or not chunk_bytes]
            if what in ("submit", "guess"):
                busy = {slot for slot, *_ in under_way.values()}
                if len(like) < streams and key not in under_way and slot not in busy:
                    under_way[key] = slot, key + FIRST_LOW * low, demand
                    holds.pop(slot, None)
                    rig.link.submit(key, slot, low, demand=demand)
            elif what == "read" and slot in holds:
                readers.append(rig.check(slot, holds[slot]))
            elif what == "want":
                rig.link.want(key)
            elif under_way:
                wait()
        while under_way:
            wait()
        readers += [rig.check(slot, number) for slot, number in holds.items()]
        for told in readers:
            told()


def _wait(event: threading.Event) -> None:
    assert event.wait(PATIENCE_S)
