"""Links: records land whole in their slots, failures are reported, threads end."""

from __future__ import annotations

import os
import threading
import time
from pathlib import Path
from queue import SimpleQueue

import pytest
import torch
from moerun.checkpoint.hub import resolve
from moerun.errors import RunError
from moerun.links import DirectRecords, DiskLink, DualSlot, Throttle, Variant
from moerun.links.arena import device_memory
from moerun.store.pack import pack
from support.links import N_KEYS, PATIENCE_S, RECORD_BYTES, FileRecords, LandingSlot, Reports


class DerivingSlot:
    """A slot whose expert is not computed from the record as it lies."""

    landing = None

    def __init__(self) -> None:
        self.total = 0

    def arrive(self, record: torch.Tensor) -> None:
        self.total = int(record.sum(dtype=torch.int64))


@pytest.mark.parametrize("streams", [1, 2, 3])
def test_every_record_lands_in_the_slot_it_was_sent_to(tmp_path: Path, streams: int) -> None:
    slots = [LandingSlot() for _ in range(N_KEYS)]
    reports: Reports = SimpleQueue()
    link = DiskLink(FileRecords(tmp_path / "records"), slots, streams=streams)
    link.start(lambda key, error, _ended_s: reports.put((key, error)))
    for key in range(N_KEYS):
        link.submit(key, N_KEYS - 1 - key)
    done = [reports.get(timeout=PATIENCE_S) for _ in range(N_KEYS)]
    link.close()
    assert sorted(done) == [(key, None) for key in range(N_KEYS)]
    for key in range(N_KEYS):
        slot = slots[N_KEYS - 1 - key]
        assert slot.landing is not None
        assert bool((slot.landing == key + 1).all())
        assert slot.arrivals == 1
    assert link.statistics.copies == N_KEYS
    assert link.statistics.bytes_copied == N_KEYS * RECORD_BYTES
    assert link.statistics.busy_s > 0


def test_a_record_that_must_be_derived_is_handed_over_from_scratch_memory(tmp_path: Path) -> None:
    slots = [DerivingSlot(), DerivingSlot()]
    reports: Reports = SimpleQueue()
    link = DiskLink(FileRecords(tmp_path / "records"), slots)
    link.start(lambda key, error, _ended_s: reports.put((key, error)))
    for slot, key in enumerate((4, 9)):
        link.submit(key, slot)
    assert [reports.get(timeout=PATIENCE_S)[1] for _ in slots] == [None, None]
    link.close()
    assert [slot.total for slot in slots] == [5 * RECORD_BYTES, 10 * RECORD_BYTES]


@pytest.mark.parametrize("slot_of", [LandingSlot, DerivingSlot])
def test_a_record_of_either_precision_lands_in_its_own_form(
    tmp_path: Path, slot_of: type[LandingSlot | DerivingSlot]
) -> None:
    class Smaller(FileRecords):
        record_bytes = RECORD_BYTES // 2

    full, low = [slot_of() for _ in range(2)], [DerivingSlot() for _ in range(2)]
    slots = [DualSlot(*each) for each in zip(full, low, strict=True)]
    reports: Reports = SimpleQueue()
    records = FileRecords(tmp_path / "full")
    link = DiskLink(records, slots, low=Smaller(tmp_path / "low"))
    link.start(lambda key, error, _ended_s: reports.put((key, error)))
    link.submit(3, 0)
    link.submit(6, 1, Variant.LOW)
    assert [reports.get(timeout=PATIENCE_S)[1] for _ in range(2)] == [None, None]
    link.close()
    assert [slot.total for slot in low] == [0, 4 * RECORD_BYTES // 2]  # it lies at half the way
    if isinstance(full[0], DerivingSlot):
        assert full[0].total == 4 * RECORD_BYTES
    assert link.statistics.bytes_copied == RECORD_BYTES + RECORD_BYTES // 2


def test_a_failed_read_is_reported_and_the_link_goes_on(tmp_path: Path) -> None:
    reports: Reports = SimpleQueue()
    link = DiskLink(FileRecords(tmp_path / "records", short=1), [LandingSlot(), LandingSlot()])
    link.start(lambda key, error, _ended_s: reports.put((key, error)))
    link.submit(1, 0)
    key, error = reports.get(timeout=PATIENCE_S)
    assert key == 1
    assert isinstance(error, RunError)
    assert "records" in str(error)
    link.submit(2, 0)
    assert reports.get(timeout=PATIENCE_S) == (2, None)
    link.close()
    assert link.statistics.copies == 1


class ThreadCountingSlot(DerivingSlot):
    def arrive(self, record: torch.Tensor) -> None:
        self.total = torch.get_num_threads()


def test_the_links_threads_leave_the_cores_to_compute(tmp_path: Path) -> None:
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    try:
        slot = ThreadCountingSlot()
        reports: Reports = SimpleQueue()
        link = DiskLink(FileRecords(tmp_path / "records"), [slot])
        link.start(lambda key, error, _ended_s: reports.put((key, error)))
        link.submit(0, 0)
        reports.get(timeout=PATIENCE_S)
        link.close()
        assert slot.total == 1
        later: list[int] = []
        thread = threading.Thread(target=lambda: later.append(torch.get_num_threads()))
        thread.start()
        thread.join()
        assert [*later, torch.get_num_threads()] == [3, 3]
    finally:
        torch.set_num_threads(before)


def test_closing_ends_the_threads_after_the_copies_under_way(tmp_path: Path) -> None:
    reports: Reports = SimpleQueue()
    link = DiskLink(FileRecords(tmp_path / "records"), [LandingSlot()], streams=2)
    link.start(lambda key, error, _ended_s: reports.put((key, error)))
    link.submit(3, 0)
    link.close()
    link.close()
    assert reports.get_nowait() == (3, None)
    assert not [t for t in threading.enumerate() if t.name.startswith("link")]


def test_a_link_that_never_started_can_be_closed(tmp_path: Path) -> None:
    DiskLink(FileRecords(tmp_path / "records"), [LandingSlot()]).close()


@pytest.mark.parametrize("streams", [0, 4, -1])
def test_streams_out_of_range_are_refused(tmp_path: Path, streams: int) -> None:
    with pytest.raises(RunError, match="streams must be 1, 2 or 3"):
        DiskLink(FileRecords(tmp_path / "records"), [LandingSlot()], streams=streams)


def test_a_throttle_takes_latency_and_then_the_bytes_of_one_copy_after_the_other() -> None:
    throttle = Throttle(bytes_per_s=1000.0, latency_s=0.5)
    assert throttle.deadline_s(10.0, 2000) == 12.5
    # The second stream's latency overlaps; its bytes wait for the first one's.
    assert throttle.deadline_s(10.0, 1000) == 13.5
    # An idle bus begins anew.
    assert throttle.deadline_s(20.0, 1000) == 21.5


def test_deadlines_of_queued_copies_follow_from_each_other() -> None:
    throttle = Throttle(bytes_per_s=1000.0)
    ended_s = 5.0
    for _ in range(1000):
        ended_s = throttle.deadline_s(ended_s, 10)
    assert ended_s == pytest.approx(15.0)


def test_a_throttled_link_still_delivers(tmp_path: Path) -> None:
    slots = [LandingSlot() for _ in range(4)]
    reports: Reports = SimpleQueue()
    throttle = Throttle(bytes_per_s=4e6)
    link = DiskLink(FileRecords(tmp_path / "records"), slots, throttle=throttle)
    link.start(lambda key, error, _ended_s: reports.put((key, error)))
    for slot in range(4):
        link.submit(slot, slot)
    assert [reports.get(timeout=PATIENCE_S) for _ in slots] == [(key, None) for key in range(4)]
    link.close()
    # A capped copy occupies the link for no less than its bytes at the cap take.
    assert link.statistics.busy_s >= 0.999 * 4 * RECORD_BYTES / 4e6


@pytest.mark.parametrize("chunk_bytes", [0, RECORD_BYTES])
@pytest.mark.parametrize("asked_s", [None, 0.0])
def test_a_copy_asked_for_in_a_report_begins_where_the_one_before_ended(
    tmp_path: Path, chunk_bytes: int, asked_s: float | None
) -> None:
    """However long the report takes; and no copy begins before its stream is free."""
    begins_s: list[float] = []
    ends_s: list[float] = []
    over = threading.Event()

    class Noted(Throttle):
        def deadline_s(self, begin_s: float, n_bytes: int) -> float:
            begins_s.append(begin_s)
            return super().deadline_s(begin_s, n_bytes)

    records, throttle = FileRecords(tmp_path / "records"), Noted(bytes_per_s=4e6)
    link = DiskLink(records, [LandingSlot()], throttle=throttle, chunk_bytes=chunk_bytes)

    def report(key: int, _error: Exception | None, ended_s: float) -> None:
        ends_s.append(ended_s)
        if key == 4:
            over.set()
            return
        time.sleep(0.002)
        link.submit(key + 1, 0, begin_s=ended_s if asked_s is None else asked_s)

    link.start(report)
    link.submit(0, 0)
    assert over.wait(PATIENCE_S)
    link.close()
    assert begins_s[1:] == ends_s[:4]


@pytest.mark.parametrize("aligned", [True, False])
def test_records_read_directly_do_not_stay_in_the_page_cache(tmp_path: Path, aligned: bool) -> None:
    store = pack(resolve("tiny"), tmp_path / "store")
    os.sync()  # what is not written yet cannot be dropped
    where = store.location(9)
    buffer = torch.empty(store.record_bytes, dtype=torch.uint8)

    def cached() -> bool:
        with where.path.open("rb") as file:
            try:
                got = os.preadv(file.fileno(), [bytearray(4096)], where.offset, os.RWF_NOWAIT)
            except BlockingIOError:
                return False
            except OSError as error:
                pytest.skip(f"this file system does not tell what it has cached: {error}")
        return got == 4096

    store.read_into(9, buffer)
    if not cached():
        pytest.skip("this file system keeps nothing in the page cache")
    expected = buffer.clone()
    direct = DirectRecords(store)
    memory = device_memory(store.record_bytes + 64, torch.device("cpu"))[64 * (not aligned) :]
    found = memory[: store.record_bytes]
    assert (found.data_ptr() % 4096 == 0) == aligned
    with where.path.open("rb") as file:
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    direct.read_into(9, found)
    direct.close()
    assert torch.equal(found, expected)
    assert not cached()
