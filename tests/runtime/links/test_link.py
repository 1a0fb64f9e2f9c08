"""Links: records land whole in their slots, failures are reported, threads end."""

from __future__ import annotations

import itertools
import os
import threading
import time
from contextlib import nullcontext
from pathlib import Path
from queue import SimpleQueue
from typing import Any

import pytest
import torch
from moerun.checkpoint.hub import resolve
from moerun.errors import RunError
from moerun.links import DirectRecords, DiskLink, DualSlot, HostTier, Throttle, Variant
from moerun.links.arena import device_memory
from moerun.links.bus import Pieces
from moerun.store.pack import pack

RECORD_BYTES = 4096
N_KEYS = 12
PATIENCE_S = 30.0


class FileRecords:
    """Records in one plain file; ``short`` makes the reads of one key fail."""

    record_bytes = RECORD_BYTES
    n_keys = N_KEYS

    def __init__(self, path: Path, short: int = -1) -> None:
        self.path = path
        self.short = short
        path.write_bytes(b"".join(bytes([key + 1]) * RECORD_BYTES for key in range(N_KEYS)))

    def read_into(self, key: int, buffer: torch.Tensor, *, pieces: Pieces | None = None) -> None:
        if key == self.short:
            raise RunError(f"expert {key} is cut off in {self.path}")
        for piece in pieces(self.record_bytes) if pieces else (slice(0, self.record_bytes),):
            with self.path.open("rb") as file:
                file.seek(key * self.record_bytes + piece.start)
                file.readinto(buffer[piece].numpy().data)


class LandingSlot:
    def __init__(self) -> None:
        self.landing: torch.Tensor | None = torch.zeros(RECORD_BYTES, dtype=torch.uint8)
        self.arrivals = 0

    def arrive(self, record: torch.Tensor) -> None:
        assert record is self.landing
        self.arrivals += 1


class DerivingSlot:
    """A slot whose expert is not computed from the record as it lies."""

    landing = None

    def __init__(self) -> None:
        self.total = 0

    def arrive(self, record: torch.Tensor) -> None:
        self.total = int(record.sum(dtype=torch.int64))


Reports = SimpleQueue[tuple[int, Exception | None]]


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


class FakeCuda:
    """CUDA's streams and events as a log of what was asked of them, in order."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.log: list[tuple[str, str, str]] = []
        self.registered: list[int] = []
        self.failure: RuntimeError | None = None
        names = itertools.count()

        class Event:
            def __init__(event) -> None:
                event.name = f"event{next(names)}"

            def record(event, stream: Stream) -> None:
                self.log.append(("record", event.name, stream.name))

            def synchronize(event) -> None:
                self.log.append(("synchronize", event.name, ""))
                if self.failure:
                    raise self.failure

        class Stream:
            def __init__(stream, device: object = None, name: str = "copies") -> None:
                stream.name, stream.device = name, "cuda:7"

            def wait_event(stream, event: Event) -> None:
                self.log.append(("wait", event.name, stream.name))

        compute = Stream(name="compute")
        self.cudaHostRegister = self._register
        self.cudaHostUnregister = lambda *_: self.registered.clear()
        for name, fake in (
            ("Event", Event),
            ("Stream", Stream),
            ("stream", lambda stream: self.on(stream.name)),
            ("current_stream", lambda *_: compute),
            ("synchronize", lambda *_: None),
            ("cudart", lambda: self),
            ("device", lambda _: nullcontext()),
        ):
            monkeypatch.setattr(torch.cuda, name, fake)

    def _register(self, _start: int, n_bytes: int, _flags: int) -> int:
        self.registered.append(n_bytes)
        return 0

    def on(self, stream: str) -> Any:
        self.log.append(("on", "", stream))
        return nullcontext()


def cuda_link(records: FileRecords, slots: list[LandingSlot], n_records: int = N_KEYS) -> Any:
    from moerun.links.cuda import CudaDevice
    from moerun.links.pinned import PinnedLink

    tier = HostTier(records, n_records * RECORD_BYTES)
    return PinnedLink(tier, slots, CudaDevice(torch.device("cpu")))


@pytest.mark.parametrize("n_records", [N_KEYS, 1])
def test_the_cuda_link_orders_copies_and_kernels_by_events_both_ways(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, n_records: int
) -> None:
    cuda = FakeCuda(monkeypatch)
    slots = [LandingSlot(), LandingSlot()]
    reports: Reports = SimpleQueue()
    link = cuda_link(FileRecords(tmp_path / "records"), slots, n_records)
    assert cuda.registered == [n_records * RECORD_BYTES]
    link.start(lambda key, error, _ended_s: reports.put((key, error)))
    for key in (4, 9):
        link.submit(key, 0)
        assert reports.get(timeout=PATIENCE_S) == (key, None)
        assert slots[0].landing is not None
        assert bool((slots[0].landing == key + 1).all())
        link.acquire(0)
        link.release(0)
    link.close()

    def copied(event: str, after: str) -> list[tuple[str, str, str]]:
        return [
            ("wait", after, "copies"),
            ("on", "", "copies"),  # the copy, then what derives the slot from it
            ("on", "", "copies"),
            ("record", event, "copies"),
            ("synchronize", event, ""),
        ]

    def computed(copied: str, used: str) -> list[tuple[str, str, str]]:
        return [("wait", copied, "compute"), ("record", used, "compute")]

    assert cuda.log == [
        ("record", "event0", "compute"),  # what had the memory before
        ("wait", "event0", "copies"),
        *copied("event1", after="event0"),
        *computed("event1", used="event2"),
        *copied("event3", after="event2"),
        *computed("event3", used="event4"),
    ]
    assert cuda.registered == []


def test_pinned_memory_that_is_not_given_is_one_clear_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cuda = FakeCuda(monkeypatch)
    cuda.cudaHostRegister = lambda *_: 2
    with pytest.raises(RunError, match=r"pinned host memory.* \(CUDA error 2\)"):
        cuda_link(FileRecords(tmp_path / "records"), [LandingSlot()])


def test_an_error_of_cuda_is_one_line_that_says_what_was_under_way(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cuda = FakeCuda(monkeypatch)
    reports: Reports = SimpleQueue()
    link = cuda_link(FileRecords(tmp_path / "records"), [LandingSlot()])
    link.start(lambda key, error, _ended_s: reports.put((key, error)))
    cuda.failure = RuntimeError("CUDA error: unspecified launch failure\nSearch for it")
    link.submit(4, 0)
    key, error = reports.get(timeout=PATIENCE_S)
    link.close()
    assert (key, type(error)) == (4, RunError)
    said = "copying an expert to cuda:7 failed: CUDA error: unspecified launch failure"
    assert str(error) == said
