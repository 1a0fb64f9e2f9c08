"""The link to a GPU, with CUDA as a log of its calls: order, refused memory, errors."""

from __future__ import annotations

import itertools
from contextlib import nullcontext
from pathlib import Path
from queue import SimpleQueue
from typing import Any

import pytest
import torch
from moerun.errors import RunError
from moerun.links import HostTier
from support.links import N_KEYS, PATIENCE_S, RECORD_BYTES, FileRecords, LandingSlot, Reports


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
