"""The link of a GPU on a device of threads: what it queues, what waits for what."""

from __future__ import annotations

import threading
import time

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from moerun.links import Throttle, Variant
from support.pinned import (
    CHUNK,
    FIRST_LOW,
    N_KEYS,
    RECORD,
    Rig,
    SteppedRecords,
    full_records,
    low_records,
    wait_for,
)
from support.thread_device import PATIENCE_S, ThreadDevice


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
        rig.device.compute.run(lambda: _wait(go_on))
        told = rig.check(0, 3)  # queued behind that
        rig.link.submit(5, 0)
        time.sleep(0.01)
        assert rig.reports.empty()
        go_on.set()
        told()
        assert rig.wait() == 5
        rig.check(0, 5)()


def test_a_reader_waits_for_exactly_its_expert() -> None:
    with Rig(full_records(), device=ThreadDevice(hold_back=True), streams=2) as rig:
        rig.link.submit(1, 0)
        rig.link.submit(2, 1)
        rig.link.acquire(0)
        rig.device.compute.run(lambda: None)
        event = rig.device.compute.record_event()
        rig.device.allow(1)
        key = rig.wait()
        assert event.reached.wait(PATIENCE_S) if key == 1 else not event.reached.is_set()
        rig.device.allow(1)
        event.wait()
        assert rig.wait() == 3 - key


def test_the_next_piece_is_queued_while_one_crosses_and_no_more() -> None:
    with Rig(full_records(), device=ThreadDevice(hold_back=True), chunk_bytes=CHUNK) as rig:
        rig.link.submit(1, 0)
        assert rig.queued == [(0, 0), (0, 1)]
        rig.device.allow(1)
        wait_for(lambda: len(rig.queued) == 3)
        assert rig.queued == [(0, 0), (0, 1), (0, 2)]
        rig.device.allow(3)
        assert rig.wait() == 1
        rig.check(0, 1)()


def test_whole_records_follow_each_other_without_any_thread() -> None:
    with Rig(full_records(), device=ThreadDevice(hold_back=True), streams=3) as rig:
        for slot in range(3):
            rig.link.submit(slot, slot)
        assert rig.queued == [(0, 0), (1, 0), (2, 0)]
        rig.device.allow(3)
        assert sorted(rig.wait() for _ in range(3)) == [0, 1, 2]


def test_what_is_asked_for_in_a_report_is_queued_before_the_report_ends() -> None:
    rig = Rig(full_records(), streams=1)
    queued = []

    def report(key: int, error: Exception | None, ended_s: float) -> None:
        if key < 4:
            rig.link.submit(key + 1, 0, begin_s=ended_s)
            queued.append(len(rig.device.queued))
        rig.reports.put((key, error))

    rig.link._done = report
    with rig:
        rig.link.submit(0, 0)
        assert [rig.wait() for _ in range(5)] == list(range(5))
    assert queued == [2, 3, 4, 5]


def test_a_demand_overtakes_a_prefetch_after_the_pieces_on_their_way() -> None:
    with Rig(full_records(), device=ThreadDevice(hold_back=True), chunk_bytes=CHUNK) as rig:
        rig.link.submit(1, 0, demand=False)
        rig.link.submit(2, 1)
        rig.device.allow(8)
        assert sorted([rig.wait(), rig.wait()]) == [1, 2]
        assert rig.queued == [(0, 0), (0, 1), (1, 0), (1, 1), (1, 2), (1, 3), (0, 2), (0, 3)]


def test_a_guess_that_turns_out_right_travels_as_demand() -> None:
    device = ThreadDevice(hold_back=True)
    with Rig(full_records(), device=device, chunk_bytes=CHUNK, streams=2) as rig:
        rig.link.submit(1, 0, demand=False)
        rig.link.submit(2, 1, demand=False)
        rig.link.want(2)
        device.allow(8)
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

    def report(key: int, error: Exception | None, ended_s: float) -> None:
        busy.append(rig.link.statistics.busy_s)
        if key < 4:
            time.sleep(0.002)
            rig.link.submit(key + 1, 0, begin_s=ended_s)
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
    device = ThreadDevice(hold_back=True)
    with Rig(full_records(), n_bytes=2 * RECORD, device=device, streams=2) as rig:
        rig.link.submit(1, 0)
        wait_for(lambda: rig.queued[-1:] == [(0, 3)])
        rig.link.submit(2, 1)
        wait_for(lambda: rig.queued[-1:] == [(1, 3)])
        assert rig.reports.empty()
        device.allow(8)
        assert sorted([rig.wait(), rig.wait()]) == [1, 2]


def test_the_disk_serves_one_record_at_a_time_and_demand_first() -> None:
    records = SteppedRecords()
    with Rig(records, n_bytes=4 * RECORD, chunk_bytes=CHUNK, streams=2) as rig:
        rig.link.submit(1, 0, demand=False)
        wait_for(lambda: records.log == [(1, 0)])
        rig.link.submit(2, 1, demand=False)
        rig.link.submit(3, 2)
        wait_for(lambda: rig.tier._readers._disk.n_waiting == 2)
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


def test_the_memory_of_a_slot_that_goes_stays_until_its_last_reader_is_done() -> None:
    with Rig(full_records(), n_slots=3) as rig:
        rig.link.submit(1, 2)
        rig.wait()
        go_on = threading.Event()
        rig.device.compute.run(lambda: _wait(go_on))
        told = rig.check(2, 1)
        thread = threading.Thread(target=rig.link.resize, args=([2], []))
        thread.start()
        time.sleep(0.01)
        assert rig.slots[2] is not None
        go_on.set()
        thread.join(PATIENCE_S)
        told()
        assert rig.slots[2] is None
        assert rig.device.trimmed == 1


@pytest.mark.parametrize("slot", [2, 4])
def test_a_new_slot_waits_for_what_its_memory_was_used_for_before(slot: int) -> None:
    with Rig(full_records(), n_slots=3) as rig:
        rig.link.resize([2], [])
        go_on = threading.Event()
        rig.device.compute.run(lambda: _wait(go_on))
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
        device=ThreadDevice(seed),
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
                    rig.link.submit(key, slot, Variant(low), demand=demand)
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
